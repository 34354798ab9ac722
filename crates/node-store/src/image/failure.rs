//! The error type of resolve and pull. Its class decides about another attempt.

use std::fmt;
use std::time::Duration;

/// The reaction to a failure. Ordered by the number of retries, the most first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// DNS, connection refused or reset, time-out, 429, 5xx, truncated, a wrong clock: retried without a limit.
    Transient,
    /// A cause that the agent does not know: retried for a limited time.
    Unknown,
    /// 401, 403, 404: mostly final, but registries also give such answers temporarily. A few attempts confirm them.
    Denied,
    /// A wrong digest, an unusable format, broken configuration: another attempt would give the same result.
    Permanent,
}

impl Class {
    /// Returns true if the cause may disappear without a change by an operator.
    pub fn may_pass(self) -> bool {
        matches!(self, Self::Transient | Self::Unknown)
    }
}

/// The kind of a failure, in the field's terms. Stable: it is shown in the status document as `error.class`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::EnumIter, strum::EnumMessage, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum Kind {
    /// Failed name resolution, connection refused or reset, time-out, 5xx, 429.
    Network,
    /// A blob or manifest that ended early.
    Truncated,
    /// An error text that the agent does not know.
    Unknown,
    /// 401, 403 or 407, or credentials that cannot be read.
    Unauthorized,
    /// 404: the repository, tag or digest does not exist.
    NotFound,
    /// The pull spec is invalid.
    BadPullSpec,
    /// Content whose digest differs from its name.
    BadDigest,
    /// Not the image of an operating system, or a malformed one.
    BadFormat,
    /// An image for another architecture.
    WrongArchitecture,
    /// Refused by policy.json, a missing signature, registries.conf or an untrusted certificate.
    Policy,
    /// The registry's certificate is expired or not yet valid by this machine's clock.
    Clock,
    /// The node store is full.
    NoSpace,
    /// The caller asked to stop.
    Cancelled,
    /// A failure of this machine, such as a program that does not start, or an I/O error.
    Local,
}

impl Kind {
    /// Returns the name in the status document and in the journal field.
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// Returns the default class of this kind.
    pub fn class(self) -> Class {
        match self {
            // A machine without a battery-backed clock gets the right time from NTP after some time.
            Kind::Network | Kind::Truncated | Kind::Clock => Class::Transient,
            Kind::Unknown => Class::Unknown,
            Kind::Unauthorized | Kind::NotFound => Class::Denied,
            _ => Class::Permanent,
        }
    }

    /// Returns the default remedy for a failure of this kind.
    pub fn advice(self) -> &'static str {
        match self {
            Kind::Network => "check name resolution, the proxy and the registry; the pull is retried",
            Kind::Truncated => "the transfer ended early; the pull is retried",
            Kind::Unknown => {
                "the pull is retried for a limited time (retry.unknown); check the registry and /etc/containers"
            }
            Kind::Unauthorized => "check the auth file (/root/.docker/config.json by default) for this registry",
            Kind::NotFound => "check the image name, tag or digest",
            Kind::BadPullSpec => {
                "write registry/name:tag, registry/name@sha256:digest, oci:DIR[:TAG], oci-archive:FILE[:TAG], dir:DIR or \
                 containers-storage:NAME, with absolute paths"
            }
            Kind::BadDigest => "the registry or a mirror serves altered content; nothing of it was used",
            Kind::BadFormat => {
                "the node image must be a bootable container image: an encapsulated commit, plain layers, or both"
            }
            Kind::WrongArchitecture => "use an image or an index for this machine's architecture",
            Kind::Policy => "check /etc/containers/policy.json and the image's signature",
            Kind::Clock => {
                "check this machine's clock (timedatectl); the pull is retried. If the clock is right, the registry \
                 needs another certificate"
            }
            Kind::NoSpace => "raise `ram_limit`, give the machine more memory, or use a smaller node image",
            Kind::Cancelled => "stored objects are kept; start the pull again to continue",
            Kind::Local => "see the journal of node-image-pivotd.service",
        }
    }
}

/// The answer of one of several endpoints, mirrors included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Registry and repository of the endpoint.
    pub name: String,
    /// Kind of the endpoint's failure.
    pub kind: Kind,
    /// Remedy for the operator.
    pub advice: &'static str,
}

/// A failure of resolve or pull. Displayed as the message and the advice.
#[derive(Debug)]
pub struct Failure {
    /// Kind, for the status document.
    pub kind: Kind,
    /// Class, which decides about another attempt.
    pub class: Class,
    /// Message with the name of the image, layer or object, and the cause.
    pub message: String,
    /// Remedy for the operator.
    pub advice: &'static str,
    /// All endpoints that were tried, if more than one. Their advice replaces `advice`.
    pub endpoints: Vec<Endpoint>,
    /// Time that the registry asked to wait.
    pub retry_after: Option<Duration>,
}

impl Failure {
    /// Makes a failure with the kind's default advice and class. The message loses passwords, because all users may read it.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        let (class, advice) = (kind.class(), kind.advice());
        let message = without_passwords(&message.into());
        Self { kind, class, message, advice, endpoints: Vec::new(), retry_after: None }
    }
}

/// Removes the user information of URLs, and invalid addresses of proxies.
fn without_passwords(text: &str) -> String {
    const INVALID: &str = "invalid proxy address";
    // Go quotes the address, and then its parts.
    if let Some((before, _)) = text.split_once(INVALID) {
        return format!("{}{INVALID}: write / # ? and % of its password as %2F %23 %3F %25", without_passwords(before));
    }
    let mut parts = text.split("://");
    let mut clean = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find(|c: char| c == '/' || c == '"' || c.is_whitespace()).unwrap_or(part.len());
        let host = part[..end].rfind('@').map(|at| &part[at..]);
        clean += if host.is_some() { "://[removed]" } else { "://" };
        clean += host.unwrap_or(part);
    }
    clean
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if self.endpoints.is_empty() {
            return write!(f, "; {}", self.advice);
        }
        self.endpoints.iter().try_for_each(|one| write!(f, "; {} ({}): {}", one.name, one.kind.as_str(), one.advice))
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::classify::classify;

    #[test]
    fn a_message_has_no_password_of_a_proxy_or_a_url() {
        let remedy = "invalid proxy address: write / # ? and % of its password as %2F %23 %3F %25";
        for (text, expected) in [
            (
                r#"Get "https://q.io/v2/": invalid proxy address "http://u:pa#ss@p:1": parse "http://u:pa#ss@p:1": x ":pa""#,
                format!(r#"Get "https://q.io/v2/": {remedy}"#),
            ),
            (
                "proxyconnect tcp: http://u:p@w@proxy:3128: EOF",
                "proxyconnect tcp: http://[removed]@proxy:3128: EOF".into(),
            ),
            (r#"Get "https://u:pw@q.io""#, r#"Get "https://[removed]@q.io""#.into()),
            ("docker://q.io/a/b@sha256:12", "docker://q.io/a/b@sha256:12".into()),
        ] {
            assert_eq!(Failure::new(Kind::Local, text).message, expected);
            assert_eq!(classify(text, false).message, expected);
        }
    }
}
