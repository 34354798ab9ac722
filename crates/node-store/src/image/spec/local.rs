//! Names of images on this machine.

use std::fmt;
use std::path::Path;

use super::Digest;

/// The form in which an image lies on this machine, in skopeo's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum Transport {
    /// A directory in OCI's layout: `oci:DIR[:TAG]`.
    Oci,
    /// A tar archive of such a directory: `oci-archive:FILE[:TAG]`.
    OciArchive,
    /// A directory as `skopeo copy … dir:DIR` writes it.
    Dir,
    /// The image store of podman: `containers-storage:NAME`.
    ContainersStorage,
}

impl Transport {
    pub(super) const ALL: [Self; 4] = [Self::Oci, Self::OciArchive, Self::Dir, Self::ContainersStorage];

    /// Returns the name in pull specs and in policy.json.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// An image on this machine, optionally with the digest of its manifest: `oci:DIR:TAG@sha256:…`.
///
/// skopeo's forms have no digest. The agent compares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalSpec {
    transport: Transport,
    /// skopeo's name of the image, without the transport.
    name: String,
    digest: Option<Digest>,
}

impl LocalSpec {
    pub(super) fn parse(transport: Transport, text: &str) -> Result<Self, &'static str> {
        let (name, digest) = match text.rsplit_once('@') {
            Some((name, digest)) if digest.contains(':') && !digest.contains('/') => (name, Some(digest.parse()?)),
            _ => (text, None),
        };
        let spec = Self { transport, name: name.to_owned(), digest };
        match transport {
            Transport::ContainersStorage => {
                let image =
                    if name.starts_with('[') { name.split_once(']').map_or("", |(_, image)| image) } else { name };
                if image.is_empty() {
                    return Err("it has no image name");
                }
            }
            _ if !spec.path().is_some_and(Path::is_absolute) => return Err("its path is not absolute"),
            _ if transport != Transport::Dir && name.ends_with(':') => return Err("its tag is empty"),
            _ => {}
        }
        Ok(spec)
    }

    /// Returns the transport.
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// Returns the file or directory with the image, or the directory of an image store that is not the default one.
    pub fn path(&self) -> Option<&Path> {
        let path = match self.transport {
            Transport::Dir => self.name.as_str(),
            Transport::Oci | Transport::OciArchive => self.name.split(':').next()?,
            // [DRIVER@ROOT+RUNROOT:OPTIONS]NAME, or [ROOT]NAME.
            Transport::ContainersStorage => {
                let store = self.name.strip_prefix('[')?.split(']').next()?;
                let root = store.split_once('@').map_or(store, |(_, root)| root);
                root.split(['+', ':']).next()?
            }
        };
        Some(Path::new(path))
    }

    pub(super) fn pinned(&self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self.clone() }
    }

    pub(super) fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// Returns skopeo's name of the image. An image store finds an image by digest if the name has no tag.
    pub(super) fn reference(&self) -> String {
        let image = self.name.rsplit(['/', ']']).next().unwrap_or_default();
        let by_digest = self.transport == Transport::ContainersStorage && !image.contains([':', '@']);
        match self.digest.filter(|_| by_digest) {
            Some(digest) => format!("{}:{}@{digest}", self.transport.as_str(), self.name),
            None => format!("{}:{}", self.transport.as_str(), self.name),
        }
    }
}

impl fmt::Display for LocalSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.transport.as_str(), self.name)?;
        self.digest.iter().try_for_each(|digest| write!(f, "@{digest}"))
    }
}
