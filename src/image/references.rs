//! What a release payload says about its images: the file `release-manifests/image-references`. Pure.
//!
//! Format source: OpenShift's ImageStream in JSON; `spec.tags[].name` and `spec.tags[].from.name`.

use serde::Deserialize;

use super::PullSpec;

/// Why a payload's references give no node image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoReference {
    #[error("is not an ImageStream in JSON: {0}")]
    Malformed(String),
    #[error("has none of the tags {wanted}; the most similar ones are {nearby}")]
    NoSuchTag {
        wanted: String,
        /// Names that the payload has.
        nearby: String,
    },
    #[error("has the tag {tag} as {pull_spec:?}, which is not usable: {why}")]
    Unusable { tag: String, pull_spec: String, why: String },
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
    from: Option<From>,
}

#[derive(Deserialize)]
struct From {
    #[serde(default)]
    kind: Option<String>,
    #[serde(default)]
    name: String,
}

/// The pull spec, by digest, of the first of `wanted` that the references have.
pub(crate) fn node_image(json: &[u8], wanted: &[String]) -> Result<PullSpec, NoReference> {
    let stream: ImageStream =
        serde_json::from_slice(json).map_err(|error| NoReference::Malformed(error.to_string()))?;
    if stream.kind.as_deref() != Some("ImageStream") {
        let kind: String = stream.kind.unwrap_or_default().chars().take(60).collect();
        return Err(NoReference::Malformed(format!("its kind is {kind:?}")));
    }
    let tags = stream.spec.tags;
    let Some(tag) = wanted.iter().find_map(|name| tags.iter().find(|tag| tag.name == *name)) else {
        return Err(NoReference::NoSuchTag { wanted: wanted.join(", "), nearby: nearby(&tags, wanted) });
    };
    let from = tag.from.as_ref();
    let pull_spec = from.map_or("", |from| &from.name);
    let unusable = |why: &str| NoReference::Unusable {
        tag: tag.name.clone(),
        pull_spec: pull_spec.chars().take(200).collect(),
        why: why.to_owned(),
    };
    if let Some(kind) = from.and_then(|from| from.kind.as_deref()).filter(|kind| *kind != "DockerImage") {
        return Err(unusable(&format!("it is not an image but {:?}", kind.chars().take(60).collect::<String>())));
    }
    let spec: PullSpec = pull_spec.parse().map_err(|_| unusable("it is no pull spec"))?;
    // What a tag means can change; the payload's signature would say nothing about the node image.
    if spec.digest().is_none() {
        return Err(unusable("it is not by digest"));
    }
    Ok(spec)
}

/// The payload's names that resemble a wanted one most, for whoever misspelt it.
fn nearby(tags: &[Tag], wanted: &[String]) -> String {
    const SHOWN: usize = 6;
    let mut names: Vec<(usize, &str)> = tags
        .iter()
        .filter(|tag| tag.name.len() <= 100)
        .map(|tag| {
            let distance = wanted.iter().map(|name| distance(name.as_bytes(), tag.name.as_bytes())).min();
            (distance.unwrap_or(usize::MAX), tag.name.as_str())
        })
        .collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        return "none, for it has no tags at all".to_owned();
    }
    names.iter().take(SHOWN).map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
}

/// How many bytes have to be inserted, removed or replaced (Levenshtein).
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
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

    fn wanted() -> Vec<String> {
        ["rhel-coreos", "rhel-coreos-10", "stream-coreos"].map(str::to_owned).to_vec()
    }

    #[test]
    fn the_first_wanted_tag_wins_whatever_their_order_in_the_file() {
        let spec = |byte: &str| format!("q.io/release/art@sha256:{}", byte.repeat(32));
        let tags = json!([
            tag("etcd", &spec("00")),
            tag("stream-coreos", &spec("11")),
            tag("rhel-coreos", &spec("22")),
            { "name": "no-from" }
        ]);
        assert_eq!(node_image(&stream(tags.clone()), &wanted()).unwrap().to_string(), spec("22"));
        assert_eq!(node_image(&stream(tags), &["stream-coreos".to_owned()]).unwrap().to_string(), spec("11"));
    }

    #[test]
    fn refusals_say_why() {
        let no_such = stream(json!([tag("rhel-coros", "x"), tag("etcd", "x"), tag("rhel-coreos-11", "x")]));
        for (json, words) in [
            (b"{".to_vec(), "not an ImageStream"),
            (b"[]".to_vec(), "not an ImageStream"),
            (b"{\"kind\":\"List\",\"spec\":{}}".to_vec(), "kind is \"List\""),
            (b"{\"spec\":{\"tags\":[]}}".to_vec(), "kind is \"\""),
            (no_such, "similar ones are rhel-coreos-11, rhel-coros, etcd"),
            (stream(json!([])), "no tags at all"),
            (stream(json!([{ "name": "rhel-coreos" }])), "no pull spec"),
            (stream(json!([tag("rhel-coreos", "q.io/os:latest")])), "not by digest"),
            (stream(json!([tag("rhel-coreos", "not a spec")])), "no pull spec"),
            (
                stream(json!([{ "name": "rhel-coreos", "from": { "kind": "ImageStreamTag", "name": "x:y" } }])),
                "ImageStreamTag",
            ),
        ] {
            let error = node_image(&json, &wanted()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn distances() {
        for (a, b, expected) in [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("same", "same", 0)] {
            assert_eq!(distance(a.as_bytes(), b.as_bytes()), expected);
        }
    }

    proptest! {
        #[test]
        fn total(json in prop::collection::vec(any::<u8>(), 0..300), name in "\\PC{0,30}", from in "\\PC{0,60}") {
            let _ = node_image(&json, &wanted());
            let _ = node_image(&stream(json!([tag(&name, &from), tag("rhel-coreos", &from)])), &[name]);
        }
    }
}
