//! Names of images in a registry.

use std::fmt;

use super::Digest;

/// An image in a registry: `registry/name:tag`, `registry/name@sha256:…`, or both.
///
/// Short names are rejected, because their registry depends on the host's configuration.
/// Grammar: the reference grammar of the distribution project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistrySpec {
    /// Host and optional port.
    registry: String,
    /// Path in the registry.
    name: String,
    version: Version,
}

/// The part of a name that selects one image. A tag beside a digest is checked and dropped, because tools do not accept
/// both.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Version {
    Tag(String),
    Digest(Digest),
}

impl RegistrySpec {
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        let (text, digest) = match text.split_once('@') {
            Some((text, digest)) => (text, Some(digest.parse()?)),
            None => (text, None),
        };
        let (registry, path) = text.split_once('/').ok_or("it has no registry (registry/name)")?;
        check_registry(registry)?;
        let (name, tag) = match path.split_once(':') {
            Some((name, tag)) => (name, Some(check_tag(tag)?)),
            None => (path, None),
        };
        check_name(name)?;
        let version = digest.map(Version::Digest).or(tag.map(Version::Tag));
        let version = version.ok_or("it has neither a tag nor a digest")?;
        Ok(Self { registry: registry.to_owned(), name: name.to_owned(), version })
    }

    pub(super) fn pinned(&self, digest: Digest) -> Self {
        Self { version: Version::Digest(digest), ..self.clone() }
    }

    pub(super) fn digest(&self) -> Option<Digest> {
        match self.version {
            Version::Digest(digest) => Some(digest),
            Version::Tag(_) => None,
        }
    }
}

impl fmt::Display for RegistrySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Version::Digest(digest) => write!(f, "{}/{}@{digest}", self.registry, self.name),
            Version::Tag(tag) => write!(f, "{}/{}:{tag}", self.registry, self.name),
        }
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
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let component = |part: &str| {
        let edge = |b: Option<u8>| b.is_some_and(letter);
        let separator = |run: &[u8]| matches!(run, b"" | b"." | b"_" | b"__") || run.iter().all(|b| *b == b'-');
        edge(part.bytes().next()) && edge(part.bytes().last()) && part.as_bytes().split(|b| letter(*b)).all(separator)
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
