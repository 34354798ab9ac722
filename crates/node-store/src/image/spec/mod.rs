//! Pull specs: the names of images in a registry or on this machine.

mod digest;
mod local;
mod registry;

pub use digest::Digest;
pub use local::{LocalSpec, Transport};
pub use registry::RegistrySpec;

use std::str::FromStr;

use super::{Class, Failure, Kind};

/// A pull spec. Parsed and displayed without the prefix `docker://`.
#[derive(Debug, Clone, PartialEq, Eq, strum::Display)]
pub enum PullSpec {
    /// An image in a registry.
    #[strum(to_string = "{0}")]
    Registry(RegistrySpec),
    /// An image on this machine.
    #[strum(to_string = "{0}")]
    Local(LocalSpec),
}

impl PullSpec {
    /// Returns the pull spec of the same image by digest.
    pub fn pinned(&self, digest: Digest) -> Self {
        match self {
            Self::Registry(spec) => Self::Registry(spec.pinned(digest)),
            Self::Local(spec) => Self::Local(spec.pinned(digest)),
        }
    }

    /// Returns the digest, if the pull spec has one.
    pub fn digest(&self) -> Option<Digest> {
        match self {
            Self::Registry(spec) => spec.digest(),
            Self::Local(spec) => spec.digest(),
        }
    }

    /// Returns true for an image in an image store of podman.
    pub(super) fn is_store(&self) -> bool {
        matches!(self, Self::Local(spec) if spec.transport() == Transport::ContainersStorage)
    }

    /// Returns the name for skopeo, with its transport.
    pub fn reference(&self) -> String {
        match self {
            Self::Registry(spec) => format!("docker://{spec}"),
            Self::Local(spec) => spec.reference(),
        }
    }

    /// Returns a failure if the image is on this machine and its path does not exist.
    ///
    /// A mount or another service may still provide the path, so a few attempts confirm this.
    pub(super) fn check_path(&self) -> Result<(), Failure> {
        let Self::Local(spec) = self else { return Ok(()) };
        let Some(path) = spec.path() else { return Ok(()) };
        match path.metadata() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(Failure {
                class: Class::Denied,
                advice: "check `image`; if a mount provides the path, add RequiresMountsFor= to node-image-pull.service",
                ..Failure::new(Kind::Local, format!("cannot open {spec}: {} does not exist", path.display()))
            }),
            _ => Ok(()),
        }
    }

    /// Adapts a failure of skopeo to the source: no network of a registry can recover for an image on this machine, so
    /// retries end.
    pub(super) fn adapt(&self, failure: Failure) -> Failure {
        let Self::Local(_) = self else { return failure };
        let class = if failure.class == Class::Transient { Class::Unknown } else { failure.class };
        let advice = match failure.kind {
            Kind::Local => "check that `image` names the form in which the image lies there",
            Kind::BadDigest => "copy the image again; nothing of it was used",
            _ => failure.advice,
        };
        Failure { class, advice, ..failure }
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

support::serialize_as_text!(PullSpec);

fn parse(text: &str) -> Result<PullSpec, &'static str> {
    const UNSUPPORTED: [&str; 4] = ["docker-archive:", "docker-daemon:", "ostree", "sif:"];
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.len() > 1024 {
        return Err("it is longer than 1024 characters");
    }
    if let Some(odd) = text.chars().find(|c| c.is_whitespace() || c.is_control()) {
        return Err(if odd == ' ' { "it contains a space" } else { "it contains white space or control characters" });
    }
    for transport in Transport::ALL {
        if let Some(name) = text.strip_prefix(transport.as_str()).and_then(|rest| rest.strip_prefix(':')) {
            return LocalSpec::parse(transport, name).map(PullSpec::Local);
        }
    }
    let text = text.strip_prefix("docker://").unwrap_or(text);
    if text.contains("://") || UNSUPPORTED.iter().any(|transport| text.starts_with(transport)) {
        return Err("its transport is not supported");
    }
    RegistrySpec::parse(text).map(PullSpec::Registry)
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
            ("localhost/a/b---c__d.e_f:T_1.0-x".to_owned(), "localhost/a/b---c__d.e_f:T_1.0-x".to_owned()),
            ("127.0.0.1:5000/a:b".to_owned(), "127.0.0.1:5000/a:b".to_owned()),
            ("[::1]:5000/a:b".to_owned(), "[::1]:5000/a:b".to_owned()),
            ("[fd00::2]/a:b".to_owned(), "[fd00::2]/a:b".to_owned()),
            (format!("reg:5000/n@{digest}"), format!("reg:5000/n@{digest}")),
            (format!("q.io/n:tag@{digest}"), format!("q.io/n@{digest}")),
        ] {
            assert_eq!(text.parse::<PullSpec>().unwrap().to_string(), shown, "{text}");
        }
        let spec: PullSpec = "q.io/a/b:t".parse().unwrap();
        assert_eq!(spec.pinned(digest.parse().unwrap()).to_string(), format!("q.io/a/b@{digest}"));
        assert_eq!((spec.digest(), spec.reference().as_str()), (None, "docker://q.io/a/b:t"));
    }

    #[test]
    fn images_on_this_machine_have_a_path_a_reference_and_a_digest() {
        let digest: Digest = format!("sha256:{}", "0a".repeat(32)).parse().unwrap();
        let store = "containers-storage:[overlay@/s+/r:x=y]localhost/os";
        for (text, path, reference) in [
            ("oci:/a/b:v1", Some("/a/b"), "oci:/a/b:v1"),
            ("oci:/a/b", Some("/a/b"), "oci:/a/b"),
            ("oci-archive:/a.tar:v1", Some("/a.tar"), "oci-archive:/a.tar:v1"),
            ("dir:/a:b", Some("/a:b"), "dir:/a:b"),
            ("containers-storage:localhost/os:1", None, "containers-storage:localhost/os:1"),
            ("containers-storage:localhost/os", None, &format!("containers-storage:localhost/os@{digest}")),
            (store, Some("/s"), &format!("{store}@{digest}")),
            ("containers-storage:[/s]os:1", Some("/s"), "containers-storage:[/s]os:1"),
            ("containers-storage:@0a0a", None, "containers-storage:@0a0a"),
        ] {
            let spec: PullSpec = text.parse().unwrap();
            assert_eq!((spec.to_string().as_str(), spec.digest()), (text, None));
            let pinned: PullSpec = format!("{text}@{digest}").parse().unwrap();
            assert_eq!((&pinned, pinned.digest()), (&spec.pinned(digest), Some(digest)));
            assert_eq!(pinned.to_string(), format!("{text}@{digest}"));
            assert_eq!(pinned.reference(), reference);
            let PullSpec::Local(spec) = spec else { panic!("{text} is not on this machine") };
            assert_eq!(spec.path(), path.map(std::path::Path::new), "{text}");
        }
    }

    #[test]
    fn a_missing_path_is_confirmed_and_named() {
        let failure = "oci:/nonexistent/os:1".parse::<PullSpec>().unwrap().check_path().unwrap_err();
        assert_eq!((failure.kind, failure.class), (Kind::Local, Class::Denied));
        assert!(failure.message.contains("/nonexistent/os does not exist"), "{failure}");
        let failure = Failure::new(Kind::Truncated, "m");
        assert_eq!("dir:/".parse::<PullSpec>().unwrap().adapt(failure).class, Class::Unknown);
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
            ("quay.io/a.-b:x", "separators"),
            ("quay.io/a___b:x", "separators"),
            ("quay.io/a._b:x", "separators"),
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
            ("https://quay.io/a:b", "not supported"),
            ("docker-archive:/x.tar", "not supported"),
            ("ostree-unverified-registry:quay.io/a:b", "not supported"),
            ("oci:x", "not absolute"),
            ("oci:", "not absolute"),
            ("oci:/x:", "tag is empty"),
            ("oci-archive:../x.tar:1", "not absolute"),
            ("dir://x y", "space"),
            ("dir:/x@sha256:12", "64 lower-case"),
            ("containers-storage:", "no image name"),
            ("containers-storage:[vfs@/x]", "no image name"),
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
