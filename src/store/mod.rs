//! Where ostree objects live: the booted repo (read-only, never written by us on live media) and the
//! node store (a bare repo on a tmpfs of its own).
//!
//! This room knows paths, objects, refs and locking. It may not talk to registries or change the
//! running system's `/usr` or `/etc`. It mounts nothing: whoever calls [`NodeStore::on_tmpfs`] has
//! mounted the tmpfs before.

mod booted;
mod header;
mod journal;
mod lock;
mod node;
mod object;
mod refs;
mod write;

pub use booted::BootedRepo;
pub use journal::{LayerJournal, Scope};
pub use lock::{LockError, StoreLock};
pub use node::NodeStore;
pub use object::{BadObjectId, ObjectId, ObjectSet, ObjectType};
pub use refs::{LAYER_REF_PREFIX, escape_ref, layer_ref};
pub use write::{FileMeta, ObjectWriter, UnnamedWrite, WriteError, Xattrs};

/// The ref that names the node image's commit in the node store.
pub const NODE_IMAGE_REF: &str = "coreos/node-image";
