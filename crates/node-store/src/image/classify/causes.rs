//! The known causes of failures, by the segments of an error. Whole segments are compared, or their first words.

use super::structure::{segments, status_code};
use super::{Class, Kind};

/// Cause of one endpoint's failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cause {
    pub kind: Kind,
    pub class: Class,
    pub advice: &'static str,
}

impl Cause {
    pub(super) fn of(kind: Kind) -> Self {
        Self { kind, class: kind.class(), advice: kind.advice() }
    }

    /// Makes a cause on this machine, which stays until an operator fixes it.
    fn own(kind: Kind, advice: &'static str) -> Self {
        Self { kind, class: Class::Permanent, advice }
    }
}

/// A pattern for a segment.
enum Words {
    /// The whole segment.
    Is(&'static str),
    /// The first words of a segment.
    Begins(&'static str),
    /// The first words of a segment, and other words after a name.
    Around(&'static str, &'static str),
}

impl Words {
    fn matches(&self, segment: &str) -> bool {
        match self {
            Is(words) => segment == *words,
            Begins(words) => segment.starts_with(words),
            Around(first, later) => segment.starts_with(first) && segment.contains(later),
        }
    }
}

use Words::{Around, Begins, Is};

const CONFIGURATION: &str = "fix the syntax of the file that the message names (/etc/containers/registries.conf or its \
                             drop-in files)";
const POLICY_FILE: &str = "fix the syntax of the signature policy that the message names";
const AUTH_FILE: &str = "fix the auth file that the message names: it must be JSON, see containers-auth.json(5)";
const HELPER: &str = "the auth file names a credential helper that is not installed: install it, or put the credentials \
                      into the auth file";
const BLOCKED: &str =
    "registries.conf blocks this registry: remove `blocked = true`, or use a mirror that is not blocked";
const PROXY_LOGIN: &str =
    "the proxy asks for a login: put user and password into HTTPS_PROXY, see docs/configuration.md";
const PROXY_REFUSES: &str = "the proxy refuses connections to this registry: allow it there, or list it in NO_PROXY";
const CERTIFICATE: &str = "check the registry's certificate, /etc/containers/certs.d and the machine's clock";

const SCHEMA_1: &str =
    "the registry has the image in docker's schema 1: push it again with an OCI or docker schema 2 manifest";

const NESTED: &str = "the index names another index: name the manifest for this machine by its digest";

/// Broken configuration of this machine, and other causes with special advice. They are compared first, because the
/// words of parsers resemble those of a broken transfer.
const CONFIGURED: &[(Words, Kind, &str)] = &[
    (Begins("loading registries configuration"), Kind::Local, CONFIGURATION),
    (Begins("parsing drop-in configuration"), Kind::Local, CONFIGURATION),
    (Begins("invalid policy in"), Kind::Policy, POLICY_FILE),
    (Around("registry ", " is blocked in "), Kind::Policy, BLOCKED),
    (Begins("reading json file"), Kind::Unauthorized, AUTH_FILE),
    (Begins("unmarshaling json at"), Kind::Unauthorized, AUTH_FILE),
    (Begins("unsupported legacy manifest mime type"), Kind::BadFormat, SCHEMA_1),
    (Is("application/vnd.oci.image.index.v1+json"), Kind::BadFormat, NESTED),
];

/// Causes that are more precise than `getting username and password` in the same message.
const CREDENTIALS: &[(Words, Kind, &str)] = &[
    (Begins("executable file not found"), Kind::Unauthorized, HELPER),
    (Is("permission denied"), Kind::Local, "let root read the auth file that the message names"),
];

/// Causes that may disappear without an operator. One such segment in a message decides.
const TRANSIENT: &[(Words, Kind)] = &[
    (Begins("dial "), Kind::Network),
    (Begins("lookup "), Kind::Network),
    (Begins("read tcp"), Kind::Network),
    (Begins("read udp"), Kind::Network),
    (Begins("write tcp"), Kind::Network),
    (Is("connection refused"), Kind::Network),
    (Is("connection reset by peer"), Kind::Network),
    (Is("connection timed out"), Kind::Network),
    (Is("no such host"), Kind::Network),
    (Is("server misbehaving"), Kind::Network),
    (Begins("temporary failure"), Kind::Network),
    (Is("network is unreachable"), Kind::Network),
    (Is("no route to host"), Kind::Network),
    (Begins("broken pipe"), Kind::Network),
    (Begins("i/o timeout"), Kind::Network),
    (Is("tls handshake timeout"), Kind::Network),
    (Begins("context deadline exceeded"), Kind::Network),
    (Begins("timeout awaiting"), Kind::Network),
    (Is("handshake failure"), Kind::Network),
    (Is("eof"), Kind::Network),
    (Is("http2"), Kind::Network),
    (Is("stream error"), Kind::Network),
    (Begins("server closed"), Kind::Network),
    (Is("use of closed network connection"), Kind::Network),
    (Begins("http/1.x transport connection broken"), Kind::Network),
    (Is("remote closed connection"), Kind::Network),
    (Is("toomanyrequests"), Kind::Network),
    (Begins("too many requests"), Kind::Network),
    (Is("too many connections"), Kind::Network),
    (Is("unavailable"), Kind::Network),
    (Is("service unavailable"), Kind::Network),
    (Is("bad gateway"), Kind::Network),
    (Is("gateway timeout"), Kind::Network),
    (Is("gateway time-out"), Kind::Network),
    (Is("internal server error"), Kind::Network),
    (Is("unexpected eof"), Kind::Truncated),
    (Is("size mismatch"), Kind::Truncated),
    (Is("unexpected end of json input"), Kind::Truncated),
];

/// Causes that end a pull if all endpoints give one.
const FINAL: &[(Words, Kind)] = &[
    (Begins("a signature was required"), Kind::Policy),
    (Around("running image ", " is rejected by policy"), Kind::Policy),
    (Begins("source image rejected"), Kind::Policy),
    (Begins("invalid gpg signature"), Kind::Policy),
    (Begins("invalid signature"), Kind::Policy),
    (Begins("cryptographic signature verification failed"), Kind::Policy),
    (Around("signature for ", " is not accepted"), Kind::Policy),
    (Begins("none of the signatures were accepted"), Kind::Policy),
    (Begins("no public keys imported"), Kind::Policy),
    (Begins("no image found in manifest list"), Kind::WrongArchitecture),
    (Begins("no image found in image index"), Kind::WrongArchitecture),
    (Begins("corrupted blob"), Kind::BadDigest),
    (Around("expected ", " bytes in blob, got "), Kind::BadDigest),
    (Begins("digest mismatch"), Kind::BadDigest),
    (Begins("digest did not match"), Kind::BadDigest),
    (Begins("manifest does not match provided manifest digest"), Kind::BadDigest),
    (Begins("unsupported manifest"), Kind::BadFormat),
    (Begins("unsupported media type"), Kind::BadFormat),
    (Begins("unknown mime type"), Kind::BadFormat),
    (Begins("unsupported docker v2"), Kind::BadFormat),
    (Is("no space left on device"), Kind::NoSpace),
    (Begins("executable file not found"), Kind::Local),
    (Is("no such file or directory"), Kind::Local),
    (Is("permission denied"), Kind::Local),
    (Is("unauthorized"), Kind::Unauthorized),
    (Is("denied"), Kind::Unauthorized),
    (Is("authentication required"), Kind::Unauthorized),
    (Begins("invalid username/password"), Kind::Unauthorized),
    (Is("manifest unknown"), Kind::NotFound),
    (Is("name unknown"), Kind::NotFound),
    (Is("blob unknown"), Kind::NotFound),
    (Is("not found"), Kind::NotFound),
    (Begins("no descriptor found for reference"), Kind::NotFound),
    (Around("reference ", "does not resolve to an image id"), Kind::NotFound),
    (Begins("more than one image in oci"), Kind::BadPullSpec),
];

/// Returns the cause of one endpoint's error.
pub(super) fn cause(message: &str) -> Cause {
    let segments = segments(message);
    let has = |words: &Words| segments.iter().any(|segment| words.matches(segment));
    let own = |table: &[(Words, Kind, &'static str)]| {
        table.iter().find(|(words, ..)| has(words)).map(|(_, kind, advice)| Cause::own(*kind, advice))
    };
    let of = |table: &[(Words, Kind)]| table.iter().find(|(words, _)| has(words)).map(|(_, kind)| Cause::of(*kind));
    let credentials = || has(&Begins("getting username and password")).then(|| own(CREDENTIALS)).flatten();
    credentials()
        .or_else(|| own(CONFIGURED))
        .or_else(|| status_code(&segments).and_then(by_status))
        .or_else(|| by_proxy(&segments))
        .or_else(|| of(TRANSIENT))
        .or_else(|| by_tls(&segments))
        .or_else(|| of(FINAL))
        .unwrap_or(Cause::of(Kind::Unknown))
}

fn by_status(code: u16) -> Option<Cause> {
    match code {
        401 | 403 => Some(Cause::of(Kind::Unauthorized)),
        407 => Some(Cause { advice: PROXY_LOGIN, ..Cause::of(Kind::Unauthorized) }),
        404 | 410 => Some(Cause::of(Kind::NotFound)),
        408 | 425 | 429 | 500..600 => Some(Cause::of(Kind::Network)),
        _ => None,
    }
}

/// Returns the cause of a proxy's refusal. Go puts the status text of the answer to CONNECT after the request.
fn by_proxy(segments: &[String]) -> Option<Cause> {
    let advice = match segments {
        [.., request, words] if matches!(request.as_str(), "get" | "head") => match words.as_str() {
            "proxy authentication required" => PROXY_LOGIN,
            "forbidden" => PROXY_REFUSES,
            _ => return None,
        },
        _ => return None,
    };
    Some(Cause { advice, ..Cause::of(Kind::Unauthorized) })
}

/// Returns the cause of a failed TLS handshake. Errors of certificates in signatures are excluded, because they do not
/// depend on the clock.
fn by_tls(segments: &[String]) -> Option<Cause> {
    let has = |words: &str| segments.iter().any(|segment| segment.starts_with(words));
    if has("x509") && ["verifying ", "signature ", "fulcio ", "rekor "].into_iter().any(has) {
        return Some(Cause::of(Kind::Policy));
    }
    if has("certificate has expired or is not yet valid") {
        return Some(Cause::of(Kind::Clock));
    }
    if segments.windows(2).any(|pair| pair == ["tls", "internal error"]) {
        return Some(Cause::of(Kind::Network));
    }
    (has("x509") || has("server gave http response to https client")).then_some(Cause::own(Kind::Policy, CERTIFICATE))
}
