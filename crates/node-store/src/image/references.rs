//! Parses the file of a release payload that names its images, `release-manifests/image-references`. Pure.
//!
//! Format source: OpenShift's ImageStream in JSON: `spec.tags[].name` and `spec.tags[].from.name`.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::PullSpec;
use super::stream::{self, NoChoice, TagHints};
use crate::image::ImageChoice;

/// Annotation with the stream of a CoreOS image.
const STREAM_CLASS: &str = "io.openshift.os.streamclass";

/// Reason why a payload's references do not name a usable node image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoReference {
    #[error("is not an ImageStream in JSON: {0}")]
    Malformed(String),
    #[error("has none of the tags {wanted}; the most similar tags: {similar}")]
    NoSuchTag {
        wanted: String,
        /// Names of tags in the payload.
        similar: String,
    },
    #[error("has several CoreOS images: {0}; name one in image_tags")]
    Ambiguous(String),
    #[error("has an unusable pull spec {pull_spec:?} for the tag {tag}: {cause}")]
    Unusable { tag: String, pull_spec: String, cause: String },
}

#[derive(Deserialize)]
struct ImageStream {
    kind: Option<String>,
    spec: Spec,
}

#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    tags: Vec<Tag>,
}

#[derive(Deserialize)]
struct Tag {
    name: String,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    from: Option<From>,
}

impl Tag {
    fn class(&self) -> Option<&str> {
        self.annotations.as_ref()?.get(STREAM_CLASS).map(String::as_str)
    }
}

#[derive(Deserialize)]
struct From {
    #[serde(default)]
    kind: Option<String>,
    #[serde(default)]
    name: String,
}

/// Chooses a tag by `hints`. Returns its pull spec, which has a digest, and the choice.
pub(crate) fn node_image(json: &[u8], hints: &TagHints) -> Result<(PullSpec, ImageChoice), NoReference> {
    let stream: ImageStream =
        serde_json::from_slice(json).map_err(|error| NoReference::Malformed(error.to_string()))?;
    if stream.kind.as_deref() != Some("ImageStream") {
        let kind: String = stream.kind.unwrap_or_default().chars().take(60).collect();
        return Err(NoReference::Malformed(format!("its kind is {kind:?}")));
    }
    let tags = stream.spec.tags;
    let offered: Vec<stream::Tag<'_>> =
        tags.iter().map(|tag| stream::Tag { name: &tag.name, class: tag.class() }).collect();
    let choice = stream::choose(hints, &offered).map_err(|none| match none {
        NoChoice::Missing(wanted) => {
            NoReference::NoSuchTag { similar: similar(&tags, &wanted), wanted: wanted.join(", ") }
        }
        NoChoice::Ambiguous(names) => NoReference::Ambiguous(names.join(", ")),
    })?;
    let missing = || NoReference::NoSuchTag { wanted: choice.tag.clone(), similar: String::new() };
    let tag = tags.iter().find(|tag| tag.name == choice.tag).ok_or_else(missing)?;
    let from = tag.from.as_ref();
    let pull_spec = from.map_or("", |from| &from.name);
    let unusable = |cause: &str| NoReference::Unusable {
        tag: tag.name.clone(),
        pull_spec: pull_spec.chars().take(200).collect(),
        cause: cause.to_owned(),
    };
    if let Some(kind) = from.and_then(|from| from.kind.as_deref()).filter(|kind| *kind != "DockerImage") {
        let kind: String = kind.chars().take(60).collect();
        return Err(unusable(&format!("expected the kind DockerImage, found {kind:?}")));
    }
    let spec: PullSpec = pull_spec.parse().map_err(|_| unusable("it is not a pull spec"))?;
    // A tag can be moved to another image, so the payload's signature would not cover the node image.
    if spec.digest().is_none() {
        return Err(unusable("it has no digest"));
    }
    Ok((spec, choice))
}

/// Returns the payload's names that are most similar to a wanted one, as a hint at spelling mistakes.
fn similar(tags: &[Tag], wanted: &[String]) -> String {
    const SHOWN: usize = 6;
    let mut names: Vec<(usize, &str)> = tags
        .iter()
        .filter(|tag| tag.name.len() <= 100)
        .map(|tag| {
            let distance = wanted.iter().map(|name| strsim::levenshtein(name, &tag.name)).min();
            (distance.unwrap_or(usize::MAX), tag.name.as_str())
        })
        .collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        return "none: the payload has no tags".to_owned();
    }
    names.iter().take(SHOWN).map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn stream(tags: serde_json::Value) -> Vec<u8> {
        json!({ "kind": "ImageStream", "apiVersion": "image.openshift.io/v1", "metadata": { "name": "4.99.0" },
                "spec": { "lookupPolicy": { "local": false }, "tags": tags } })
        .to_string()
        .into_bytes()
    }

    fn tag(name: &str, from: &str) -> serde_json::Value {
        json!({ "name": name, "annotations": {}, "from": { "kind": "DockerImage", "name": from } })
    }

    fn configured(names: &[&str]) -> TagHints {
        TagHints { configured: Some(names.iter().map(|name| (*name).to_owned()).collect()), ..TagHints::default() }
    }

    fn wanted() -> TagHints {
        configured(&["rhel-coreos", "rhel-coreos-10", "stream-coreos"])
    }

    #[test]
    fn the_first_wanted_tag_wins_in_any_order_of_the_file() {
        let spec = |byte: &str| format!("q.io/release/art@sha256:{}", byte.repeat(32));
        let tags = json!([
            tag("etcd", &spec("00")),
            tag("stream-coreos", &spec("11")),
            tag("rhel-coreos", &spec("22")),
            { "name": "no-from" }
        ]);
        assert_eq!(node_image(&stream(tags.clone()), &wanted()).unwrap().0.to_string(), spec("22"));
        assert_eq!(node_image(&stream(tags), &configured(&["stream-coreos"])).unwrap().0.to_string(), spec("11"));
    }

    /// The names alone would be ambiguous.
    #[test]
    fn the_annotation_decides_about_the_stream() {
        let spec = |byte: &str| format!("q.io/release/art@sha256:{}", byte.repeat(32));
        let annotated = |name: &str, class: serde_json::Value, from: &str| {
            let mut tag = tag(name, from);
            tag["annotations"] = class;
            tag
        };
        let json = stream(json!([
            annotated("rhel-coreos", json!({ "io.openshift.os.streamclass": "rhel-10" }), &spec("10")),
            annotated("rhel-coreos-extensions", json!(null), &spec("08")),
            annotated("rhel-coreos-9", json!({ "io.openshift.os.streamclass": "rhel-9" }), &spec("09")),
        ]));
        let hints = TagHints { os_release: Some("ID=rhel\nVERSION_ID=9.6\n".into()), ..TagHints::default() };
        assert_eq!(node_image(&json, &hints).unwrap().0.to_string(), spec("09"));
        let error = node_image(&json, &TagHints::default()).unwrap_err().to_string();
        assert!(error.contains("rhel-coreos, rhel-coreos-9") && error.contains("image_tags"), "{error}");
    }

    #[test]
    fn errors_name_the_fault() {
        let misspelt = stream(json!([tag("rhel-coros", "x"), tag("etcd", "x"), tag("rhel-coreos-11", "x")]));
        for (json, words) in [
            (b"{".to_vec(), "not an ImageStream"),
            (b"[]".to_vec(), "not an ImageStream"),
            (b"{\"kind\":\"List\",\"spec\":{}}".to_vec(), "kind is \"List\""),
            (b"{\"spec\":{\"tags\":[]}}".to_vec(), "kind is \"\""),
            (misspelt, "similar tags: rhel-coreos-11, rhel-coros, etcd"),
            (stream(json!([])), "has no tags"),
            (stream(json!([{ "name": "rhel-coreos" }])), "not a pull spec"),
            (stream(json!([tag("rhel-coreos", "q.io/os:latest")])), "has no digest"),
            (stream(json!([tag("rhel-coreos", "not a spec")])), "not a pull spec"),
            (
                stream(json!([{ "name": "rhel-coreos", "from": { "kind": "ImageStreamTag", "name": "x:y" } }])),
                "ImageStreamTag",
            ),
        ] {
            let error = node_image(&json, &wanted()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_input_is_handled(json in prop::collection::vec(any::<u8>(), 0..300), name in "\\PC{0,30}", from in "\\PC{0,60}") {
            let _ = node_image(&json, &wanted());
            let _ = node_image(&stream(json!([tag(&name, &from), tag("rhel-coreos", &from)])), &configured(&[&name]));
        }
    }
}
