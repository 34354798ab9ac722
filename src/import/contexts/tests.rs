//! Against libselinux itself, by way of libostree.

use ostree::gio;
use proptest::prelude::*;

use super::*;
use crate::import::label::open_policy;

const FILES: [&str; 5] = ["", ".homedirs", ".local", ".subs", ".subs_dist"];

/// The policy as files, opened by libostree.
fn theirs(texts: &Texts) -> (tempfile::TempDir, ostree::SePolicy) {
    let root = tempfile::tempdir().unwrap();
    let kind = root.path().join("usr/etc/selinux/kind");
    std::fs::create_dir_all(kind.join("contexts/files")).unwrap();
    std::fs::create_dir(kind.join("policy")).unwrap();
    std::fs::write(kind.join("policy/policy.33"), "").unwrap();
    std::fs::write(kind.with_file_name("config"), "SELINUX=enforcing\nSELINUXTYPE=kind\n").unwrap();
    for (suffix, text) in FILES.iter().zip(texts.contexts.iter().chain(&texts.substitutions)) {
        std::fs::write(kind.join(format!("contexts/files/file_contexts{suffix}")), text).unwrap();
    }
    let policy = open_policy(root.path()).unwrap();
    (root, policy)
}

fn label(policy: &ostree::SePolicy, path: &str, mode: u32) -> Option<String> {
    policy.label(path, mode, gio::Cancellable::NONE).unwrap().map(String::from)
}

#[test]
fn which_line_decides() {
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
    let (_root, policy) = theirs(&texts);
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

#[test]
fn what_libselinux_should_judge() {
    let judged = |contexts: &str| {
        let contexts = [contexts.to_owned(), String::new(), String::new()];
        Contexts::parse(&Texts { contexts, ..Texts::default() })
    };
    for line in [
        "/a",
        "/a -x label",
        "/a|/b label",
        "/a(|b label",
        "/a[b&&c] label",
        "/a[[:alpha:]] label",
        "/a\\d label",
        "/a(?=b) label",
        "/a.*+ label",
        "/a\\-b/c label",
        "/ä label",
        "/a$ label",
    ] {
        assert!(judged(&format!("{line}\n")).is_none(), "{line}");
    }
    let contexts = judged("/a{b} label\n/b label\n/c.* label\n").unwrap();
    assert!(contexts.find("/a", 0).is_none(), "braces that are no quantifier");
    assert!(contexts.find("/c\n", 0).is_none());
    assert_eq!(contexts.find("/b", 0).unwrap().label, Some("label"));
    contexts.refute();
    assert!(contexts.find("/b", 0).is_none());
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

    /// Where there is a finding, it is libselinux's.
    #[test]
    fn libselinux_says_the_same(
        contexts in [lines(12), lines(3), lines(3)],
        substitutions in [0..2_usize, 0..3].map(|most| prop::collection::vec((path(), path()), most)),
        paths in prop::collection::vec((path(), prop::sample::select(vec![0o100_644, 0o040_755, 0o120_777])), 1..40),
    ) {
        let text = |list: Vec<(String, String)>| list.iter().filter(|(from, _)| from != "/").map(|(from, to)| format!("{from} {to}\n")).collect();
        let mut texts = Texts { contexts, substitutions: substitutions.map(text) };
        // Without a label for this libostree does not open a policy.
        texts.contexts[2].push_str("/ root\n");
        let Some(ours) = Contexts::parse(&texts) else { return Ok(()) };
        let (_root, policy) = theirs(&texts);
        for (path, mode) in paths {
            let Some(found) = ours.find(&path, mode) else { continue };
            prop_assert_eq!(found.label.map(str::to_owned), label(&policy, &path, mode), "{} {:o}", path, mode);
        }
    }
}
