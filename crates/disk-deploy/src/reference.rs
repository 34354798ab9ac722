//! The name of an image in the origin of a deployment. Pure.
//!
//! Format source: `OstreeImageReference` of ostree-ext.

use std::fmt;
use std::str::FromStr;

use node_store::image::{PullSpec, ResolvedImage};
use node_store::store::image_ref;

/// A name of an image that also tells how its signature is checked, such as
/// `ostree-unverified-registry:quay.io/example/node:latest`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OstreeReference {
    text: String,
    /// The name that ostree-ext uses in refs: `docker://…`, or another transport.
    image: String,
}

/// Error for a text that is not the name of an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid image reference {0:?}: expected for example ostree-unverified-registry:quay.io/example/node:latest or \
     ostree-image-signed:docker://quay.io/example/node:latest"
)]
pub struct BadReference(String);

impl OstreeReference {
    /// Returns the name of an image by digest. Its signature is checked by the machine's policy.
    pub fn of(image: &ResolvedImage) -> Self {
        let name = image.pinned.reference();
        let text = match &image.pinned {
            PullSpec::Registry(spec) => format!("ostree-unverified-registry:{spec}"),
            PullSpec::Local(_) => format!("ostree-unverified-image:{name}"),
        };
        Self { text, image: name }
    }

    /// Returns the ref that ostree-ext gives to the image. Images without a deployment of this name are removed by its
    /// garbage collection.
    pub fn ref_name(&self) -> String {
        image_ref(&self.image)
    }
}

impl FromStr for OstreeReference {
    type Err = BadReference;

    fn from_str(text: &str) -> Result<Self, BadReference> {
        let image = image(text).ok_or_else(|| BadReference(text.chars().take(200).collect()))?;
        Ok(Self { text: text.to_owned(), image })
    }
}

impl fmt::Display for OstreeReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Returns the name of the image in a ref, or `None` for an invalid reference.
fn image(text: &str) -> Option<String> {
    if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return None;
    }
    let (scheme, rest) = text.split_once(':')?;
    let (scheme, rest) = match scheme {
        "ostree-remote-image" | "ostree-remote-registry" => (scheme, rest.split_once(':')?.1),
        _ => (scheme, rest),
    };
    let registry = |name: &str| (!name.is_empty()).then(|| format!("docker://{name}"));
    match scheme {
        "ostree-unverified-registry" | "ostree-remote-registry" => registry(rest),
        "ostree-image-signed" | "ostree-unverified-image" | "ostree-remote-image" => match rest.split_once(':')? {
            ("registry", name) => registry(name),
            ("docker", name) => registry(name.strip_prefix("//")?),
            ("oci" | "oci-archive" | "docker-archive" | "containers-storage" | "dir", name) => {
                (!name.is_empty()).then(|| rest.to_owned())
            }
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn references_name_their_image() {
        for (text, image) in [
            ("ostree-unverified-registry:q.io/a:1", Some("docker://q.io/a:1")),
            ("ostree-remote-registry:fedora:q.io/a:1", Some("docker://q.io/a:1")),
            ("ostree-image-signed:docker://q.io/a:1", Some("docker://q.io/a:1")),
            ("ostree-unverified-image:registry:q.io/a", Some("docker://q.io/a")),
            ("ostree-remote-image:fedora:oci:/dir:tag", Some("oci:/dir:tag")),
            ("ostree-unverified-image:containers-storage:localhost/a", Some("containers-storage:localhost/a")),
            ("ostree-unverified-image:docker:q.io/a", None),
            ("ostree-unverified-image:ftp:q.io/a", None),
            ("ostree-unverified-registry:", None),
            ("ostree-remote-registry:fedora", None),
            ("ostree-unverified-registry:q.io/a b", None),
            ("q.io/a:1", None),
            ("", None),
        ] {
            let parsed = text.parse::<OstreeReference>();
            assert_eq!(parsed.as_ref().ok().map(|parsed| parsed.image.as_str()), image, "{text}");
            assert!(parsed.is_err() || parsed.unwrap().to_string() == text);
        }
    }

    #[test]
    fn the_default_is_the_image_by_digest() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        for (pinned, expected, name) in [
            (format!("q.io/a@{digest}"), format!("ostree-unverified-registry:q.io/a@{digest}"), "docker_3A__2F__2F_q"),
            (format!("oci:/x:1@{digest}"), "ostree-unverified-image:oci:/x:1".to_owned(), "oci_3A__2F_x_3A_1"),
        ] {
            let pinned: PullSpec = pinned.parse().unwrap();
            let image = ResolvedImage { requested: pinned.clone(), pinned, digest: digest.parse().unwrap() };
            let reference = OstreeReference::of(&image);
            assert_eq!(reference.to_string(), expected);
            assert!(reference.ref_name().starts_with(&format!("ostree/container/image/{name}")), "{reference}");
        }
    }
}
