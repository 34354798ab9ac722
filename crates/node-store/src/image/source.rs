//! The source of images: verified manifests, configs and layers, through skopeo.

use oci_spec::image::{ImageConfiguration, ImageManifest};

use super::pool::{ImageSettings, Pool};
use super::reader::Reader;
use super::{Failure, Kind, PullSpec, ResolvedImage};

/// Label with the version of a release payload.
const RELEASE_LABEL: &str = "io.openshift.release";

/// The source of images. Each reader uses a separate skopeo process, and the next reader reuses it.
pub struct Source(Pool);

/// The manifest, the config and the layout of an image, all verified by the image's digest.
#[derive(Debug, Clone)]
pub struct ImageDescription {
    /// Manifest in OCI's form.
    pub manifest: ImageManifest,
    /// Config of the image.
    pub config: ImageConfiguration,
    /// Layers by purpose, as the source provides them.
    pub layout: super::Layout,
}

impl Source {
    /// Starts a skopeo process.
    ///
    /// # Errors
    /// skopeo is missing or too old, or the configured auth file does not exist.
    pub async fn open(settings: &ImageSettings) -> Result<Self, Failure> {
        Pool::open(settings).await.map(Self)
    }

    /// Pins an image by digest. For a multi-architecture index, this is the digest of this machine's manifest. skopeo
    /// enforces the signature policy here; if it is too old, images that need a signature are refused.
    pub async fn resolve(&self, spec: &PullSpec) -> Result<ResolvedImage, Failure> {
        let mut reader = self.reader().await?;
        let resolved = reader.resolve(spec).await?;
        reader.give_back();
        Ok(resolved)
    }

    /// Returns the manifest, config and layout of a node image, after a check of digests, architecture and ostree labels.
    pub async fn manifest(&self, image: &ResolvedImage) -> Result<ImageDescription, Failure> {
        let (manifest, provided, config) = self.described(image).await?;
        refuse_payload(&image.pinned, &config)?;
        let layout = super::layout(&image.pinned, &provided, &config, super::machine_architecture())?;
        Ok(ImageDescription { manifest, config, layout })
    }

    /// Returns the manifest, with the layers as the source provides them, and the config of any image, after a check of its
    /// digest.
    pub(super) async fn any_manifest(
        &self,
        image: &ResolvedImage,
    ) -> Result<(ImageManifest, ImageConfiguration), Failure> {
        let (_, provided, config) = self.described(image).await?;
        Ok((provided, config))
    }

    async fn described(
        &self,
        image: &ResolvedImage,
    ) -> Result<(ImageManifest, ImageManifest, ImageConfiguration), Failure> {
        let mut reader = self.reader().await?;
        let (manifest, config) = reader.manifest(image).await?;
        let provided = reader.provided(image, &manifest).await?;
        reader.give_back();
        Ok((manifest, provided, config))
    }

    /// Returns a reader with an idle skopeo process, or with a new one.
    pub async fn reader(&self) -> Result<Reader<'_>, Failure> {
        Reader::of(&self.0).await
    }
}

/// Refuses a release payload that is configured as the node image.
fn refuse_payload(name: impl std::fmt::Display, config: &ImageConfiguration) -> Result<(), Failure> {
    let labels = config.config().as_ref().and_then(|config| config.labels().as_ref());
    if labels.is_some_and(|labels| labels.contains_key(RELEASE_LABEL)) {
        let message = format!("{name} is a release payload, which only names the node image");
        let advice = "set release_image instead of image";
        return Err(Failure { advice, ..Failure::new(Kind::BadFormat, message) });
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_as_node_image_is_refused_with_a_remedy() {
        let config = |labels: &str| {
            let text = format!(
                r#"{{"architecture":"amd64","os":"linux","config":{{"Labels":{labels}}},"rootfs":{{"type":"layers","diff_ids":[]}}}}"#
            );
            serde_json::from_str::<ImageConfiguration>(&text).unwrap()
        };
        let failure = refuse_payload("q.io/r@sha256:0", &config(r#"{"io.openshift.release":"4.22.0"}"#)).unwrap_err();
        assert!(failure.to_string().contains("set release_image"), "{failure}");
        assert_eq!(failure.class, crate::image::Class::Permanent);
        assert!(refuse_payload("q.io/n@sha256:0", &config(r#"{"io.openshift.build.version":"1"}"#)).is_ok());
    }
}
