#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;

/// The texts of the table: class, kind, text.
fn table() -> Vec<(&'static str, &'static str, String)> {
    let lines = include_str!("texts.txt").lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (meaning, text) = line.split_once('|').unwrap();
            let (class, kind) = meaning.split_once(' ').unwrap();
            (class, kind, text.replace("\\n", "\n"))
        })
        .collect()
}

fn meaning(text: &str) -> (String, &'static str) {
    let verdict = classify(text, false);
    (format!("{:?}", verdict.class).to_lowercase(), verdict.kind.as_str())
}

#[test]
fn every_text_of_the_table_has_its_class_and_kind() {
    let wrong: Vec<_> = table()
        .into_iter()
        .filter_map(|(class, kind, text)| {
            let found = meaning(&text);
            ((found.0.as_str(), found.1) != (class, kind)).then_some((class, kind, found, text))
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_failure_that_skopeo_calls_retryable_is_transient() {
    for (text, kind) in [
        ("reading manifest x in q.io/y: denied: requested access to the resource is denied", Kind::Network),
        ("an odd text", Kind::Network),
        ("FinishPipe: unexpected EOF", Kind::Truncated),
    ] {
        let verdict = classify(text, true);
        assert_eq!((verdict.class, verdict.kind), (Class::Transient, kind), "{text}");
    }
}

#[test]
fn the_seconds_of_retry_after_are_returned_within_a_limit() {
    for (text, seconds) in [
        ("429 Too Many Requests, retry-after: 17", Some(17)),
        ("toomanyrequests: slow down (Retry-After: 30)", Some(30)),
        ("Retry-After: 99999999999999999999999", Some(3600)),
        ("retry-after: soon", None),
        ("Retry-After: Wed, 21 Oct 2026 07:28:00 GMT", None),
        ("pinging container registry retry-after.example:5000: received unexpected HTTP status: 503", None),
    ] {
        assert_eq!(classify(text, false).retry_after, seconds.map(Duration::from_secs), "{text}");
    }
}

#[test]
fn each_cause_has_its_advice() {
    for (text, words) in [
        ("registry q.io is blocked in /etc/containers/registries.conf or /etc/containers/registries.conf.d", "blocks"),
        (
            "getting username and password: 1 error occurred:\n\t* error getting credentials - err: exec: \"docker-credential-x\": executable file not found in $PATH, out: ``",
            "credential helper",
        ),
        (
            "pinging container registry q.io: Get \"https://q.io/v2/\": Proxy Authentication Required",
            "proxy asks for a login",
        ),
        ("pinging container registry q.io: Get \"https://q.io/v2/\": Forbidden", "proxy refuses"),
        (
            "loading registries configuration \"/etc/containers/registries.conf\": toml: line 1: unexpected EOF",
            "registries.conf",
        ),
        ("unmarshaling JSON at \"/root/.docker/config.json\": unexpected end of JSON input", "must be JSON"),
        ("Get \"https://q.io/v2/\": x509: certificate signed by unknown authority", "certs.d"),
        (
            "failed to invoke method GetManifest: unsupported manifest MIME type: application/vnd.oci.image.index.v1+json",
            "names another index",
        ),
    ] {
        let advice = classify(text, false).advice;
        assert!(advice.contains(words), "{text}: {advice}");
    }
}

#[test]
fn each_endpoint_has_its_advice() {
    let text = "failed to invoke method OpenImage: (Mirrors also failed: [m.example:5000/x@sha256:aa: reading manifest \
                sha256:aa in m.example:5000/x: manifest unknown]\n[n.example/x:1: Get \"https://n.example/v2/\": x509: \
                certificate signed by unknown authority]): q.io/x@sha256:aa: dial tcp: lookup q.io: no such host";
    let verdict = classify(text, false);
    assert_eq!((verdict.class, verdict.kind), (Class::Transient, Kind::Policy));
    let found: Vec<_> = verdict.endpoints.iter().map(|one| (one.name.as_str(), one.kind)).collect();
    assert_eq!(found, [("m.example:5000/x", Kind::NotFound), ("n.example/x", Kind::Policy), ("q.io/x", Kind::Network)]);
    let shown = verdict.to_string();
    for words in ["m.example:5000/x (not-found): check the image name", "n.example/x (policy): check the registry's"] {
        assert!(shown.contains(words), "{shown}");
    }
}

/// Returns a position inside of each name of a text: hosts, tags, repositories, digests, URLs, addresses.
fn names(text: &str) -> Vec<usize> {
    const NO_NAMES: [&str; 6] =
        ["net/http", "HTTP/1.x", "i/o", "username/password", "ASN.1", "application/vnd.oci.image.index.v1+json"];
    let boundary =
        |c: char| c.is_whitespace() || matches!(c, '"' | '(' | ')' | '[' | ']' | ',' | '\'' | '`' | '<' | '>');
    let mut positions = Vec::new();
    let mut start = 0;
    for word in text.split_inclusive(boundary) {
        let name = word.trim_end_matches(|c: char| boundary(c) || c == ':' || c == '.');
        let inner = name.char_indices().skip(1).any(|(_, c)| matches!(c, '.' | '/' | '@' | ':'));
        let plain = NO_NAMES.contains(&name) || name.starts_with("gpgme");
        let named = ["reading manifest ", "container registry "].iter().any(|words| text[..start].ends_with(words));
        if name.len() > 1 && inner && !plain || named {
            positions.push(start + 1);
        }
        start += word.len();
    }
    positions
}

#[test]
fn names_finds_each_name_of_a_text() {
    let text = "reading manifest 1 in q.io/x: Get \"https://h:5000/v2/\": dial tcp [2001:db8::1]:5000: i/o timeout";
    assert_eq!(names(text).len(), 4);
}

proptest! {
    #[test]
    fn changed_names_do_not_change_the_class(
        which in any::<Index>(),
        word in select(vec!["401", "403", "404", "429", "503", "denied", "unauthorized", "eof", "timeout", "signature", "x509", "blocked"]),
        digits in "[0-9a-z]{0,6}",
    ) {
        let table = table();
        let (class, kind, text) = which.get(&table);
        let mut changed = text.clone();
        for position in names(text).into_iter().rev() {
            changed.insert_str(position, &format!("{digits}{word}"));
        }
        prop_assert_eq!(meaning(&changed), ((*class).to_owned(), *kind), "{}", changed);
    }

    #[test]
    fn only_known_causes_are_permanent(text in "[a-z ]{0,40}: [a-z]{1,12}[0-9]{3}[a-z ]{0,12}") {
        prop_assert_eq!(classify(&text, false).class, Class::Unknown);
    }

    #[test]
    fn any_text_is_classified(text in "\\PC{0,200}", brackets in "[\\[\\]:a/ ()\n]{0,60}") {
        classify(&text, true);
        classify(&format!("(Mirrors also failed: {brackets}"), false);
    }
}
