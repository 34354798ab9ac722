//! Refs of imported layers and images, named as ostree-ext names them: one ref for each. A repo with the ref has every
//! object of that layer or image.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::ObjectId;

/// Directory of layer refs, below `refs/heads`.
const LAYER_REF_PREFIX: &str = "ostree/container/blob";

/// Directory of image refs, below `refs/heads`.
pub(super) const IMAGE_REF_PREFIX: &str = "ostree/container/image";

/// Escapes a string for use in a ref name. ASCII letters, digits and `-` are unchanged, `_` is doubled, `/` is unchanged
/// between two names, and any other character becomes `_HEX_`.
///
/// Source: `escape_for_ref` in ostree-ext's `refescape.rs`.
fn escape_ref(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    let mut after_word = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            c if c.is_ascii_alphanumeric() || c == '-' => out.push(c),
            '/' if after_word && chars.peek().is_some() => out.push('/'),
            '_' => out.push_str("__"),
            c => {
                let _ = write!(out, "_{:02X}_", u32::from(c));
            }
        }
        after_word = c.is_ascii_alphanumeric();
    }
    out
}

/// Returns the ref of the layer with this digest (`sha256:…`).
pub fn layer_ref(digest: &str) -> String {
    format!("{LAYER_REF_PREFIX}/{}", escape_ref(digest))
}

/// Returns true for the name of a layer's ref.
pub(super) fn is_layer_ref(name: &str) -> bool {
    let digest = name.strip_prefix(LAYER_REF_PREFIX).and_then(|rest| rest.strip_prefix('/'));
    digest.is_some_and(|digest| !digest.is_empty() && digest.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
}

/// Returns the commit in the file of a ref, or `None` if the file is missing or damaged.
pub(super) fn commit_of(path: &Path) -> Option<ObjectId> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Returns the ref of the image with this name, which includes the transport (`docker://…`).
pub fn image_ref(name: &str) -> String {
    format!("{IMAGE_REF_PREFIX}/{}", escape_ref(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_outside_names_are_escaped() {
        for (text, escaped) in [
            ("sha256:00ff", "sha256_3A_00ff"),
            ("registry:quay.io/coreos/fedora:latest", "registry_3A_quay_2E_io/coreos/fedora_3A_latest"),
            ("a_b", "a__b"),
            ("docker://x", "docker_3A__2F__2F_x"),
            ("a-b/", "a-b_2F_"),
        ] {
            assert_eq!(escape_ref(text), escaped, "{text}");
        }
        assert_eq!(layer_ref("sha256:ab"), "ostree/container/blob/sha256_3A_ab");
        assert!(is_layer_ref(&layer_ref("sha256:ab")));
        for name in ["", "ostree/container/blob/", "ostree/container/blob/sha\0", "ostree/container/image/sha256_3A_ab"]
        {
            assert!(!is_layer_ref(name), "{name:?}");
        }
    }
}
