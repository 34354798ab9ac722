//! Where ostree objects live: the booted repo (read-only, never written by us on live media) and the
//! node store (a bare repo on a tmpfs of its own, or the system repo on disk).
//!
//! This room knows paths, objects, refs and locking. It may not talk to registries or change the
//! running system's `/usr` or `/etc`.

/// The ref that names the node image's commit in the node store.
pub const NODE_IMAGE_REF: &str = "coreos/node-image";
