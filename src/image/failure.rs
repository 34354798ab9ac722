//! One error type for everything between a pull spec and stored objects, because the agent
//! branches on it: transient failures are retried, permanent ones stop at once.

use std::time::Duration;

/// Whether another attempt can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// DNS, refused, reset, timeout, 429, 5xx, truncated, a wrong clock: try again.
    Transient,
    /// Credentials, a missing tag, a bad digest, a foreign format: another attempt gives the same answer.
    Permanent,
}

/// What went wrong, in the field's terms. Stable: it is shown in the status document as `error.class`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Name resolution, connection refused or reset, time-outs, 5xx, 429.
    Network,
    /// A blob or manifest that ended early.
    Truncated,
    /// 401 or 403.
    Unauthorized,
    /// 404: no such repository, tag or digest.
    NotFound,
    /// The pull spec itself does not parse.
    BadPullSpec,
    /// Content does not hash to the name it was asked for by.
    BadDigest,
    /// Not an ostree-encapsulated image, or a malformed one.
    BadFormat,
    /// An image for another architecture.
    WrongArchitecture,
    /// Refused by policy.json or a missing signature.
    Policy,
    /// The registry's certificate is not valid yet, or not any more: by this machine's clock.
    Clock,
    /// No room left in the node store.
    NoSpace,
    /// The caller asked to stop.
    Cancelled,
    /// Anything of this machine's own: a tool that does not start, an I/O error.
    Local,
}

impl Kind {
    /// The name in the status document and in the journal field.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Network => "network",
            Kind::Truncated => "truncated",
            Kind::Unauthorized => "unauthorized",
            Kind::NotFound => "not-found",
            Kind::BadPullSpec => "bad-pull-spec",
            Kind::BadDigest => "bad-digest",
            Kind::BadFormat => "bad-format",
            Kind::WrongArchitecture => "wrong-architecture",
            Kind::Policy => "policy",
            Kind::Clock => "clock",
            Kind::NoSpace => "no-space",
            Kind::Cancelled => "cancelled",
            Kind::Local => "local",
        }
    }

    /// Whether another attempt can help.
    pub fn class(self) -> Class {
        match self {
            // A machine without a clock of its own has the right time a minute later.
            Kind::Network | Kind::Truncated | Kind::Clock => Class::Transient,
            _ => Class::Permanent,
        }
    }
}

/// A failure of resolve or pull. The running system is untouched by either, and the message ends
/// with what to do.
#[derive(Debug, thiserror::Error)]
#[error("{message}; {advice}")]
pub struct Failure {
    /// What kind of failure.
    pub kind: Kind,
    /// Names the image, layer or object, and what happened to it.
    pub message: String,
    /// What the operator can do about it.
    pub advice: &'static str,
    /// How long the registry asked us to wait, when it did.
    pub retry_after: Option<Duration>,
}

impl Failure {
    /// A failure with this kind's own advice.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        let advice = match kind {
            Kind::Network => "check name resolution, the proxy and that the registry is up; the pull goes on by itself",
            Kind::Truncated => "the transfer ended early; the pull goes on by itself",
            Kind::Unauthorized => "check the auth file (/root/.docker/config.json by default) for this registry",
            Kind::NotFound => "check the image name, tag or digest",
            Kind::BadPullSpec => "write registry/name:tag or registry/name@sha256:digest",
            Kind::BadDigest => "the registry or a mirror serves altered content; nothing of it was used",
            Kind::BadFormat => "the node image must be an ostree-encapsulated container image",
            Kind::WrongArchitecture => "use the image, or the index, that holds this machine's architecture",
            Kind::Policy => "check /etc/containers/policy.json and the image's signature",
            Kind::Clock => {
                "check this machine's clock (timedatectl); the pull goes on by itself when it is right. If it is, the \
                 registry needs another certificate"
            }
            Kind::NoSpace => "raise `ram_limit`, give the machine more memory, or use a smaller node image",
            Kind::Cancelled => "what was stored is kept; start the pull again to go on",
            Kind::Local => "see the journal of node-image-pivotd.service",
        };
        Self { kind, message: message.into(), advice, retry_after: None }
    }
}
