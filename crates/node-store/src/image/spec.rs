//! Pull specs: the names of images in a registry.

use std::fmt;
use std::str::FromStr;

use super::{Failure, Kind};

/// A pull spec: `registry/name:tag`, `registry/name@sha256:…`, or both, optionally with the prefix `docker://`.
///
/// Short names are rejected, because their registry depends on the host's configuration.
/// Grammar: the reference grammar of the distribution project. Displayed without the tag if there is a digest, because
/// tools do not accept both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullSpec {
    /// Host and optional port.
    registry: String,
    /// Path in the registry.
    name: String,
    tag: Option<String>,
    digest: Option<String>,
}

impl PullSpec {
    /// Returns `registry/name`, without tag and digest.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.registry, self.name)
    }

    /// Returns the pull spec of the same image by digest.
    pub fn pinned(&self, digest: &str) -> String {
        format!("{}@{digest}", self.repository())
    }

    /// Returns the digest, if the pull spec has one.
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }
}

impl fmt::Display for PullSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => write!(f, "{}/{}@{digest}", self.registry, self.name),
            (None, Some(tag)) => write!(f, "{}/{}:{tag}", self.registry, self.name),
            (None, None) => write!(f, "{}/{}", self.registry, self.name),
        }
    }
}

impl FromStr for PullSpec {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        parse(text).map_err(|cause| {
            let shown: String = text.chars().take(200).collect();
            Failure::new(Kind::BadPullSpec, format!("invalid pull spec {shown:?}: {cause}"))
        })
    }
}

fn parse(text: &str) -> Result<PullSpec, &'static str> {
    const TRANSPORTS: [&str; 7] =
        ["oci:", "oci-archive:", "docker-archive:", "docker-daemon:", "containers-storage:", "dir:", "ostree"];
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.len() > 1024 {
        return Err("it is longer than 1024 characters");
    }
    if let Some(odd) = text.chars().find(|c| c.is_whitespace() || c.is_control()) {
        return Err(if odd == ' ' { "it contains a space" } else { "it contains white space or control characters" });
    }
    let text = text.strip_prefix("docker://").unwrap_or(text);
    if text.contains("://") || TRANSPORTS.iter().any(|transport| text.starts_with(transport)) {
        return Err("only registries are supported (docker://, or no transport)");
    }
    let (text, digest) = match text.split_once('@') {
        Some((text, digest)) => (text, Some(check_digest(digest)?)),
        None => (text, None),
    };
    let (registry, path) = text.split_once('/').ok_or("it has no registry (registry/name)")?;
    check_registry(registry)?;
    let (name, tag) = match path.split_once(':') {
        Some((name, tag)) => (name, Some(check_tag(tag)?)),
        None => (path, None),
    };
    check_name(name)?;
    if tag.is_none() && digest.is_none() {
        return Err("it has neither a tag nor a digest");
    }
    Ok(PullSpec { registry: registry.to_owned(), name: name.to_owned(), tag, digest })
}

fn check_digest(digest: &str) -> Result<String, &'static str> {
    let hex = digest.strip_prefix("sha256:").ok_or("its digest is not of the form sha256:…")?;
    let lower_hex = hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if hex.len() == 64 && lower_hex {
        Ok(digest.to_owned())
    } else {
        Err("its digest is not 64 lower-case hexadecimal digits")
    }
}

fn check_registry(registry: &str) -> Result<(), &'static str> {
    let (host, port) = match registry.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) => {
            address.parse::<std::net::Ipv6Addr>().map_err(|_| "its registry is not an IPv6 address")?;
            (None, rest.strip_prefix(':').or((!rest.is_empty()).then_some("?")))
        }
        None => match registry.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(registry), None),
        },
    };
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return Err("its registry's port is not a number");
    }
    let Some(host) = host else { return Ok(()) };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if !host.split('.').all(label) {
        return Err("its registry is not a host name");
    }
    // The rule by which docker and podman distinguish a registry from the first part of a short name.
    if host.contains('.') || port.is_some() || host == "localhost" {
        Ok(())
    } else {
        Err("it has no registry (registry/name)")
    }
}

fn check_name(name: &str) -> Result<(), &'static str> {
    let component = |part: &str| {
        let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-');
        edge(part.bytes().next()) && edge(part.bytes().last()) && part.bytes().all(inner) && !part.contains("..")
    };
    match name {
        "" => Err("it has no image name"),
        name if name.len() > 255 => Err("its image name is longer than 255 characters"),
        name if name.split('/').all(component) => Ok(()),
        name if name.bytes().any(|b| b.is_ascii_uppercase()) => Err("image names are lower-case"),
        _ => Err("its image name contains invalid characters or separators"),
    }
}

fn check_tag(tag: &str) -> Result<String, &'static str> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let good = !tag.is_empty()
        && tag.len() <= 128
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'));
    if good { Ok(tag.to_owned()) } else { Err("its tag contains invalid characters, is empty or is too long") }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn valid_pull_specs_are_displayed_without_transport_and_redundant_tag() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        for (text, shown) in [
            ("quay.io/fedora/fedora-coreos:stable".to_owned(), "quay.io/fedora/fedora-coreos:stable".to_owned()),
            ("docker://quay.io/a:1".to_owned(), "quay.io/a:1".to_owned()),
            ("localhost/a/b-c__d.e:T_1.0-x".to_owned(), "localhost/a/b-c__d.e:T_1.0-x".to_owned()),
            ("127.0.0.1:5000/a:b".to_owned(), "127.0.0.1:5000/a:b".to_owned()),
            ("[::1]:5000/a:b".to_owned(), "[::1]:5000/a:b".to_owned()),
            ("[fd00::2]/a:b".to_owned(), "[fd00::2]/a:b".to_owned()),
            (format!("reg:5000/n@{digest}"), format!("reg:5000/n@{digest}")),
            (format!("q.io/n:tag@{digest}"), format!("q.io/n@{digest}")),
        ] {
            assert_eq!(text.parse::<PullSpec>().unwrap().to_string(), shown, "{text}");
        }
        let spec: PullSpec = "q.io/a/b:t".parse().unwrap();
        assert_eq!(spec.pinned(&digest), format!("q.io/a/b@{digest}"));
        assert_eq!(spec.digest(), None);
    }

    #[test]
    fn invalid_pull_specs_are_rejected_with_the_cause() {
        for (text, cause) in [
            ("", "empty"),
            ("fedora", "no registry"),
            ("library/fedora:1", "no registry"),
            ("quay.io/a", "neither a tag nor a digest"),
            ("quay.io/:x", "no image name"),
            ("quay.io/A:x", "lower-case"),
            ("quay.io/a//b:x", "invalid characters"),
            ("quay.io/../b:x", "invalid characters"),
            ("quay.io/a:", "tag"),
            ("quay.io/a:b:c", "tag"),
            ("quay.io/a:-b", "tag"),
            ("quay.io/a b:c", "space"),
            ("quay.io/a:b\n", "white space"),
            ("quay.io:port/a:b", "port"),
            ("quay..io/a:b", "host name"),
            ("-x.io/a:b", "host name"),
            ("[::g]/a:b", "IPv6"),
            ("[::1]x/a:b", "port"),
            ("quay.io/a@sha256:12", "64 lower-case"),
            ("quay.io/a@md5:12", "sha256"),
            ("https://quay.io/a:b", "only registries"),
            ("oci:/tmp/x", "only registries"),
            ("containers-storage:localhost/x:y", "only registries"),
        ] {
            let failure = text.parse::<PullSpec>().unwrap_err();
            assert_eq!(failure.kind, Kind::BadPullSpec);
            assert!(failure.message.contains(cause), "{text:?}: {}", failure.message);
        }
    }

    proptest! {
        #[test]
        fn display_of_any_accepted_text_parses_to_itself(text in "\\PC{0,60}") {
            if let Ok(spec) = text.parse::<PullSpec>() {
                prop_assert_eq!(spec.to_string().parse::<PullSpec>().unwrap().to_string(), spec.to_string());
            }
        }
    }
}
