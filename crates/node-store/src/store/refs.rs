//! Refs of imported layers, as ostree-ext names them: one ref per layer, so that whoever has the ref
//! has every object of that layer.

use std::fmt::Write as _;

/// The directory of layer refs, below `refs/heads`.
pub const LAYER_REF_PREFIX: &str = "ostree/container/blob";

/// Escapes a string for use in a ref name: ASCII letters, digits and `-` stand for themselves, `_` is
/// doubled, `/` passes when it separates two names, anything else becomes `_HEX_`.
pub fn escape_ref(text: &str) -> String {
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

/// The ref of the layer with this digest (`sha256:…`).
pub fn layer_ref(digest: &str) -> String {
    format!("{LAYER_REF_PREFIX}/{}", escape_ref(digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes() {
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
    }
}
