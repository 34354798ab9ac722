//! Compares labels with those of libselinux, called through libostree.

use ostree::gio;
use proptest::prelude::*;

use super::*;
use crate::open_contexts;

/// Opens the policy in libselinux.
fn libselinux(texts: &Texts) -> ostree::SePolicy {
    let root = tempfile::tempdir().unwrap();
    open_contexts(texts, root.path()).unwrap()
}

fn label(policy: &ostree::SePolicy, path: &str, mode: u32) -> Option<String> {
    policy.label(path, mode, gio::Cancellable::NONE).unwrap().map(String::from)
}

#[test]
fn lines_have_the_precedence_of_libselinux() {
    let texts = Texts {
        contexts: [
            "/.* default\n/usr(/.*)? usr\n/usr/bin/x -- program\n/usr/bin/.* bin\n/usr/lib/[^/]*\\.so -- lib\n\
             # comment\n\n/usr/none/.* <<none>>\n/usr/bin/x -l link\n/usr/two{2} braces\n"
                .into(),
            "/home/[^/]+/\\.ssh(/.*)? ssh\n".into(),
            "/usr/local/bin/.*\tlocal\n".into(),
        ],
        substitutions: ["/srv/local /usr/local\n".into(), "/bin /nowhere\n/bin /usr/bin\n/usr/etc /\n".into()],
    };
    let contexts = Contexts::parse(&texts).unwrap();
    let policy = libselinux(&texts);
    for (path, mode, expected) in [
        ("/", 0o040_755, Some("default")),
        ("/usr", 0o040_755, Some("usr")),
        ("/usrx", 0o040_755, Some("default")),
        ("/usr/bin/x", 0o100_755, Some("program")),
        ("/usr/bin/x", 0o120_777, Some("link")),
        ("/usr/bin/x", 0o040_755, Some("bin")),
        ("/bin/y", 0o100_755, Some("bin")),
        ("/binx", 0o100_755, Some("default")),
        ("/usr/lib/a.so", 0o100_755, Some("lib")),
        ("/usr/lib/a/b.so", 0o100_755, Some("usr")),
        ("/usr/none/x", 0o100_644, None),
        ("/home/me/.ssh/id", 0o100_600, Some("ssh")),
        ("/srv/local/bin/x", 0o100_755, Some("local")),
        ("/usr/etc/home/me/.ssh", 0o040_700, Some("ssh")),
        ("/usr/two", 0o100_644, Some("usr")),
        ("/usr/twoo", 0o100_644, Some("braces")),
    ] {
        assert_eq!(contexts.find(path, mode).unwrap().label, expected, "{path} {mode:o}");
        assert_eq!(label(&policy, path, mode).as_deref(), expected, "libselinux: {path} {mode:o}");
    }
}

fn only(contexts: &str) -> Texts {
    Texts { contexts: [contexts.to_owned(), String::new(), String::new()], ..Texts::default() }
}

#[test]
fn files_that_libselinux_may_refuse_are_left_to_it() {
    for line in ["/a", "/a -x label", "/ä label"] {
        assert!(Contexts::parse(&only(&format!("{line}\n"))).is_none(), "{line}");
    }
}

#[test]
fn paths_that_an_unusual_line_may_match_are_left_to_libselinux() {
    for (line, concerned, other) in [
        ("/a/|/b label", "/b", None),
        ("/a/(|b label", "/a/b", None),
        ("/ab/c[b&&c] label", "/ab/cb", Some("/ax")),
        ("/ab/[[:alpha:]] label", "/ab/c", Some("/ax")),
        ("/ab\\d label", "/ab1", Some("/x")),
        ("/ab(?=b) label", "/abb", Some("/x")),
        ("/ab/.*+ label", "/ab/x", Some("/ax")),
        ("/ab\\-b/c label", "/ab-b/c", Some("/x")),
        ("/ab$ label", "/ab", Some("/x")),
        ("/usr/?.* label", "/usr/x", Some("/usx")),
        ("/usr/?.* label", "/usrfoo", Some("/usx")),
    ] {
        let texts = only(&format!("/.* default\n{line}\n/ root\n"));
        let contexts = Contexts::parse(&texts).unwrap();
        assert!(contexts.find(concerned, 0o100_644).is_none(), "{line}");
        if let Some(other) = other {
            assert_eq!(contexts.find(other, 0o100_644).unwrap().label, Some("default"), "{line}");
        }
        assert_eq!(contexts.find("/", 0o040_755).map(|found| found.label), other.map(|_| Some("root")), "{line}");
    }
    let contexts = Contexts::parse(&only("/a{b} label\n/b label\n/c.* label\n")).unwrap();
    assert!(contexts.find("/a", 0).is_none(), "braces that are not a quantifier");
    assert!(contexts.find("/c\n", 0).is_none());
    assert_eq!(contexts.find("/b", 0).unwrap().label, Some("label"));
    contexts.refute();
    assert!(contexts.find("/b", 0).is_none());
}

#[test]
fn lines_that_newer_libselinux_orders_otherwise_are_left_to_it() {
    let contexts = Contexts::parse(&only(
        "/usr/bin/.* bin\n/usr/share/.* same\n/usr/.* same\n/usr/(.*/)?lib(/.*)? lib\n/usr/(.*/)?old(/.*)? old\n",
    ))
    .unwrap();
    for (path, expected) in [
        ("/usr/x", Some("same")),
        ("/usr/bin/x", None),
        ("/usr/share/x", Some("same")),
        ("/usr/x/lib", Some("lib")),
        ("/usr/x/lib/old", None),
    ] {
        assert_eq!(contexts.find(path, 0o100_644).and_then(|found| found.label), expected, "{path}");
    }
}

fn expression() -> impl Strategy<Value = String> {
    let part = prop::sample::select(vec![
        "/a",
        "/b",
        "/ab",
        "/a\\.b",
        "/a.b",
        "/[^/]*",
        "/[^/]+",
        "/.*",
        "(/.*)?",
        "(a|b)",
        "(/a|/b/a)",
        "a?",
        "b*",
        "b+",
        "a{2}",
        "[ab]+",
        "\\.",
        "(/a)?",
        "[^a]",
        ".",
        "\\+",
        "/-",
        "/?",
        "/*",
        "\\d",
    ]);
    prop::collection::vec(part, 0..5).prop_map(|parts| {
        let text = parts.concat();
        if text.starts_with('/') || text.starts_with("(/") { text } else { format!("/{text}") }
    })
}

fn lines(most: usize) -> impl Strategy<Value = String> {
    let kind = prop::sample::select(vec!["", "", "--", "-d", "-l"]);
    let label = prop_oneof![5 => (0..30_u32).prop_map(|n| format!("label{n}")), 1 => Just("<<none>>".to_owned())];
    let line = (expression(), kind, label).prop_map(|(text, kind, label)| format!("{text}\t{kind} {label}\n"));
    prop::collection::vec(line, 0..most).prop_map(|lines| lines.concat())
}

fn path() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec!["a", "b", "ab", "a.b", "aab", "-", "a+", "bb", "axb"]);
    prop::collection::vec(name, 0..5).prop_map(|names| format!("/{}", names.join("/")))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn found_labels_equal_those_of_libselinux(
        contexts in [lines(12), lines(3), lines(3)],
        substitutions in [0..2_usize, 0..3].map(|most| prop::collection::vec((path(), path()), most)),
        paths in prop::collection::vec((path(), prop::sample::select(vec![0o100_644, 0o040_755, 0o120_777])), 1..40),
    ) {
        let text = |list: Vec<(String, String)>| list.iter().filter(|(from, _)| from != "/").map(|(from, to)| format!("{from} {to}\n")).collect();
        let mut texts = Texts { contexts, substitutions: substitutions.map(text) };
        // libostree does not open a policy without a label for `/`.
        texts.contexts[2].push_str("/ root\n");
        let Some(ours) = Contexts::parse(&texts) else { return Ok(()) };
        let policy = libselinux(&texts);
        for (path, mode) in paths {
            let Some(found) = ours.find(&path, mode) else { continue };
            prop_assert_eq!(found.label.map(str::to_owned), label(&policy, &path, mode), "{} {:o}", path, mode);
        }
    }
}
