//! From what skopeo says to what it means. Pure: text in, kind out.
//!
//! skopeo before 1.19 does not classify its errors, and its texts are all there is. The table in the
//! tests holds texts as skopeo 1.9.3 gave them to this program.

use std::time::Duration;

use super::Kind;

/// What a message of skopeo, or of the proxy crate, stands for, and how long a registry asked to wait.
/// What it does not know is [`Kind::Local`]: shown as it is, and not retried blindly.
pub fn classify(text: &str) -> (Kind, Option<Duration>) {
    let text = text.to_lowercase();
    let has = |needles: &[&str]| needles.iter().any(|needle| text.contains(needle));
    // Order matters: a message often wraps several causes, and the more specific one decides.
    let kind = if has(&[
        "signature was required",
        "rejected by policy",
        "policy.json",
        "signature verification",
        "source image rejected",
    ]) {
        Kind::Policy
    } else if has(&["toomanyrequests", "too many requests", "429"]) {
        Kind::Network
    } else if has(&[
        "unauthorized",
        "authentication required",
        "invalid username/password",
        "401",
        "403",
        "denied",
        "forbidden",
    ]) {
        Kind::Unauthorized
    } else if has(&["no such file or directory", "executable file not found", "permission denied"]) {
        Kind::Local
    } else if has(&["manifest unknown", "name unknown", "name_unknown", "blob unknown", "not found", "404"]) {
        Kind::NotFound
    } else if has(&["no image found in manifest list", "no image found in image index"]) {
        Kind::WrongArchitecture
    } else if has(&[
        "does not match expected",
        "digest did not match",
        "digest mismatch",
        "corrupted blob",
        "does not match provided manifest digest",
    ]) {
        Kind::BadDigest
    } else if has(&["unexpected eof", "size mismatch", "unexpected end of json"]) {
        Kind::Truncated
    } else if has(&[
        "dial tcp",
        "no such host",
        "connection refused",
        "connection reset",
        "timeout",
        "timed out",
        "deadline exceeded",
        "temporary failure",
        "server misbehaving",
        "network is unreachable",
        "no route to host",
        "broken pipe",
        "eof",
        "bad gateway",
        "service unavailable",
        "gateway timeout",
        "internal server error",
        "received unexpected http status: 5",
        "status 500",
        "status 502",
        "status 503",
        "status 504",
        "tls handshake",
        "http2: ",
        "proxyconnect",
        "use of closed",
    ]) {
        Kind::Network
    } else if has(&["x509", "certificate", "server gave http response to https client"]) {
        // A wrong certificate stays wrong; only the host's trust or its registries.conf can change that.
        Kind::Policy
    } else if has(&[
        "unsupported manifest",
        "unsupported media type",
        "unknown mime type",
        "schema1",
        "unsupported docker v2",
    ]) {
        Kind::BadFormat
    } else if has(&["no space left"]) {
        Kind::NoSpace
    } else {
        Kind::Local
    };
    (kind, retry_after(&text))
}

/// `Retry-After: 30`, wherever it stands in the (lower-cased) text.
fn retry_after(text: &str) -> Option<Duration> {
    let (_, rest) = text.split_once("retry-after")?;
    let digits: String =
        rest.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).take(6).collect();
    digits.parse().ok().map(Duration::from_secs)
}
