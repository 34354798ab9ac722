//! From what skopeo says to what it means. Pure: text in, kind out.
//!
//! skopeo before 1.19 does not classify its errors, and its texts are all there is. The table in the
//! tests holds texts as skopeo 1.9.3 gave them to this program, and 1.18 those about signatures.

use std::time::Duration;

use super::Kind;

/// What a message of skopeo, or of the proxy crate, stands for, and how long a registry asked to wait.
/// What it does not know is [`Kind::Local`]: shown as it is, and not retried blindly.
pub fn classify(text: &str) -> (Kind, Option<Duration>) {
    let text = text.to_lowercase();
    let retry_after = retry_after(&text);
    let text = without_names(&text);
    let status = |codes: &[&str]| text.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| codes.contains(&word));
    let has = |needles: &[&str]| needles.iter().any(|needle| text.contains(needle));
    // Order matters: a message often wraps several causes, and the more specific one decides.
    let kind = if has(&[
        "signature was required",
        "rejected by policy",
        "policy.json",
        "signature verification",
        "source image rejected",
        "invalid gpg signature",
        "invalid signature",
        "no public keys imported",
        "signatures were accepted",
    ]) || (has(&["signature"]) && has(&["is not accepted"]))
    {
        Kind::Policy
    } else if has(&["toomanyrequests", "too many requests"]) || status(&["429"]) {
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
    } else if has(&["manifest unknown", "name unknown", "name_unknown", "blob unknown", "not found"])
        || status(&["404"])
    {
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
    } else if is_about_the_clock(&text) {
        Kind::Clock
    } else if is_about_certificates(&text) {
        // Any other wrong certificate stays wrong; only the host's trust or its registries.conf can change that.
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
    (kind, retry_after)
}

/// Whether a registry's certificate is out of its time. Of a signature's, the time is not the clock's.
fn is_about_the_clock(text: &str) -> bool {
    text.contains("certificate has expired or is not yet valid") && !is_about_signatures(text)
}

/// Signatures may come with certificates of their own.
fn is_about_signatures(text: &str) -> bool {
    ["signature", "fulcio", "rekor"].iter().any(|needle| text.contains(needle))
}

/// Whether a text of kind [`Kind::Policy`] is about the registry's certificate, not about signatures.
pub(super) fn is_about_certificates(text: &str) -> bool {
    let text = text.to_lowercase();
    let has = |needles: &[&str]| needles.iter().any(|needle| text.contains(needle));
    has(&["x509", "server gave http response to https client"])
        || (has(&["certificate"]) && !is_about_signatures(&text))
}

/// The text without ports and digests, which may hold any number: a registry on port 42900 does not
/// mean that it had too many requests.
fn without_names(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for word in text.split_inclusive(|c: char| !c.is_ascii_alphanumeric()) {
        let bare = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        let is_port = out.ends_with(':') && bare.len() > 1 && bare.bytes().all(|b| b.is_ascii_digit());
        let is_digest = bare.len() >= 32 && bare.bytes().all(|b| b.is_ascii_hexdigit());
        out.push_str(if is_port || is_digest { &word[bare.len()..] } else { word });
    }
    out
}

/// `Retry-After: 30`, wherever it stands in the (lower-cased) text.
fn retry_after(text: &str) -> Option<Duration> {
    let (_, rest) = text.split_once("retry-after")?;
    let digits: String =
        rest.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).take(6).collect();
    digits.parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::super::{Class, Failure};
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_skopeo_says() {
        for (text, kind) in [
            // skopeo 1.9.3 against docker-registry and worse.
            (
                "failed to invoke method OpenImage: reading manifest nosuch in 127.0.0.1:42923/os: manifest unknown: manifest unknown",
                Kind::NotFound,
            ),
            (
                "failed to invoke method OpenImage: reading manifest 1 in 127.0.0.1:34917/os: unauthorized: authentication required",
                Kind::Unauthorized,
            ),
            (
                "failed to invoke method OpenImage: pinging container registry 127.0.0.1:42989: invalid status code from registry 403 (Forbidden)",
                Kind::Unauthorized,
            ),
            (
                "failed to invoke method OpenImage: pinging container registry 127.0.0.1:40401: received unexpected HTTP status: 503 Service Unavailable",
                Kind::Network,
            ),
            (
                "failed to invoke method FinishPipe: corrupted blob, expecting sha256:4014290f1293e8d815a2b9e635cfe45c1fff17cf323a118a669a55c80c18ad32",
                Kind::BadDigest,
            ),
            (
                "failed to invoke method OpenImage: pinging container registry 127.0.0.1:40903: Get \"http://127.0.0.1:40903/v2/\": dial tcp 127.0.0.1:40903: connect: connection refused",
                Kind::Network,
            ),
            (
                "failed to invoke method OpenImage: pinging container registry registry.invalid: Get \"http://registry.invalid/v2/\": dial tcp: lookup registry.invalid: no such host",
                Kind::Network,
            ),
            (
                "failed to invoke method OpenImage: pinging container registry 127.0.0.1:5000: Get \"http://127.0.0.1:5000/v2/\": EOF",
                Kind::Network,
            ),
            ("failed to invoke method FinishPipe: unexpected EOF", Kind::Truncated),
            // Texts of registries and of other versions.
            ("reading manifest x in q.io/y: denied: requested access to the resource is denied", Kind::Unauthorized),
            ("reading manifest x in q.io/y: toomanyrequests: slow down (Retry-After: 30)", Kind::Network),
            ("Source image rejected: Running image docker://q.io/y is rejected by policy.", Kind::Policy),
            ("Source image rejected: A signature was required, but no signature exists", Kind::Policy),
            ("Invalid GPG signature: gpgme.Signature{Summary:128, Fingerprint:\"C7\"}", Kind::Policy),
            (
                "cryptographic signature verification failed: invalid signature when validating ASN.1 encoded signature",
                Kind::Policy,
            ),
            ("Signature for identity q.io/x:1 is not accepted", Kind::Policy),
            ("no image found in manifest list for architecture s390x, variant \"\", OS linux", Kind::WrongArchitecture),
            ("Get \"https://q.io/v2/\": x509: certificate signed by unknown authority", Kind::Policy),
            (
                "failed to invoke method OpenImage: pinging container registry q.io: Get \"https://q.io/v2/\": tls: failed to verify certificate: x509: certificate has expired or is not yet valid: current time 2000-01-01T00:00:41Z is before 2026-03-04T04:01:04Z",
                Kind::Clock,
            ),
            ("Get \"https://q.io/v2/\": x509: certificate is valid for a.io, not q.io", Kind::Policy),
            ("verifying with the Fulcio certificate: x509: certificate has expired or is not yet valid", Kind::Policy),
            ("http: server gave HTTP response to HTTPS client", Kind::Policy),
            ("net/http: TLS handshake timeout", Kind::Network),
            ("write /var/tmp/x: no space left on device", Kind::NoSpace),
            ("something nobody has seen before", Kind::Local),
        ] {
            assert_eq!(classify(text).0, kind, "{text}");
        }
        assert_eq!(classify("429 Too Many Requests, retry-after: 17").1, Some(Duration::from_secs(17)));
        assert_eq!(classify("retry-after: soon").1, None);
        let clock = Failure::new(Kind::Clock, "x");
        assert_eq!(clock.kind.class(), Class::Transient);
        assert!(clock.advice.contains("clock"));
    }

    proptest! {
        #[test]
        fn ports_and_digests_do_not_matter(port in 1000_u16.., digest in "[0-9a-f]{64}") {
            let text = format!("reading blob sha256:{digest} from 127.0.0.1:{port}: something odd");
            prop_assert_eq!(classify(&text), (Kind::Local, None));
        }

        #[test]
        fn total(text in "\\PC{0,200}") {
            classify(&text);
        }
    }
}
