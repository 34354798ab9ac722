//! One error type for everything between a pull spec and stored objects, because the agent
//! branches on it: its class decides whether another attempt is made.

use std::fmt;
use std::time::Duration;

/// The reaction to a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// DNS, refused, reset, timeout, 429, 5xx, truncated, a wrong clock: retried without end.
    Transient,
    /// A cause that the agent does not know: retried for a limited time.
    Unknown,
    /// 401, 403, 404: mostly final, but registries give such answers now and then; confirmed by a few attempts.
    Denied,
    /// A bad digest, an unusable format, broken configuration: another attempt gives the same answer.
    Permanent,
}

impl Class {
    /// Returns true if the cause may pass without an answer that says otherwise.
    pub fn may_pass(self) -> bool {
        matches!(self, Self::Transient | Self::Unknown)
    }
}

/// The kind of a failure, in the field's terms. Stable: it is shown in the status document as `error.class`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Name resolution, connection refused or reset, time-outs, 5xx, 429.
    Network,
    /// A blob or manifest that ended early.
    Truncated,
    /// A message that the agent does not know.
    Unknown,
    /// 401, 403 or 407, or credentials that cannot be read.
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
    /// Refused by policy.json, a missing signature, registries.conf or an untrusted certificate.
    Policy,
    /// The registry's certificate is not valid yet, or not any more: by this machine's clock.
    Clock,
    /// The node store is full.
    NoSpace,
    /// The caller asked to stop.
    Cancelled,
    /// Anything on this machine: a tool that does not start, an I/O error.
    Local,
}

impl Kind {
    /// The name in the status document and in the journal field.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Network => "network",
            Kind::Truncated => "truncated",
            Kind::Unknown => "unknown",
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

    /// Returns the class of a failure of this kind, unless more is known about it.
    pub fn class(self) -> Class {
        match self {
            // A machine without a clock of its own has the right time a minute later.
            Kind::Network | Kind::Truncated | Kind::Clock => Class::Transient,
            Kind::Unknown => Class::Unknown,
            Kind::Unauthorized | Kind::NotFound => Class::Denied,
            _ => Class::Permanent,
        }
    }

    /// Returns what an operator can do about a failure of this kind.
    pub fn advice(self) -> &'static str {
        match self {
            Kind::Network => "check name resolution, the proxy and that the registry is up; the pull is retried",
            Kind::Truncated => "the transfer ended early; the pull is retried",
            Kind::Unknown => {
                "the pull is retried for a limited time (retry.unknown); check the registry and /etc/containers"
            }
            Kind::Unauthorized => "check the auth file (/root/.docker/config.json by default) for this registry",
            Kind::NotFound => "check the image name, tag or digest",
            Kind::BadPullSpec => "write registry/name:tag or registry/name@sha256:digest",
            Kind::BadDigest => "the registry or a mirror serves altered content; nothing of it was used",
            Kind::BadFormat => "the node image must be an ostree-encapsulated container image",
            Kind::WrongArchitecture => "use the image, or the index, that holds this machine's architecture",
            Kind::Policy => "check /etc/containers/policy.json and the image's signature",
            Kind::Clock => {
                "check this machine's clock (timedatectl); the pull is retried. If the clock is right, the registry \
                 needs another certificate"
            }
            Kind::NoSpace => "raise `ram_limit`, give the machine more memory, or use a smaller node image",
            Kind::Cancelled => "what was stored is kept; start the pull again to go on",
            Kind::Local => "see the journal of node-image-pivotd.service",
        }
    }
}

/// The answer of one of several endpoints, mirrors included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Registry and repository.
    pub name: String,
    /// Kind of its failure.
    pub kind: Kind,
    /// Remedy for the operator.
    pub advice: &'static str,
}

/// A failure of resolve or pull, neither of which changes the running system. The message ends with advice.
#[derive(Debug)]
pub struct Failure {
    /// Kind, for the status document.
    pub kind: Kind,
    /// Class, which decides about another attempt.
    pub class: Class,
    /// Names the image, layer or object, and what happened to it.
    pub message: String,
    /// Remedy for the operator.
    pub advice: &'static str,
    /// Every endpoint that was tried, where there was more than one. Their advice replaces `advice`.
    pub endpoints: Vec<Endpoint>,
    /// Time that the registry asked to wait.
    pub retry_after: Option<Duration>,
}

impl Failure {
    /// A failure with this kind's own advice and class.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        let (class, advice) = (kind.class(), kind.advice());
        Self { kind, class, message: message.into(), advice, endpoints: Vec::new(), retry_after: None }
    }
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
