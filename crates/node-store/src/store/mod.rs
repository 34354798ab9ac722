//! Repos of ostree objects: the booted repo and the node store. The node store is a bare repo on a separate tmpfs or, on
//! an installed system, the booted repo itself; [`decide`] selects one.
//!
//! This module handles paths, objects, refs, locks and the order in which data reaches the disk. It does not talk to
//! registries and does not change the running system's `/usr` or `/etc`. It mounts nothing: the caller of
//! [`NodeStore::on_tmpfs`] mounts the tmpfs first, and the caller of [`NodeStore::on_disk`] provides a writable mount.

mod booted;
mod commit;
mod dirmeta;
mod dirtree;
mod disk;
mod framing;
mod header;
mod held;
mod journal;
mod lock;
mod node;
mod object;
mod place;
mod refs;
mod write;

pub use booted::{BootedRepo, deployments};
pub use commit::{commit_metadata, commit_root};
pub use dirmeta::DirMeta;
pub(crate) use dirmeta::{Pairs, S_IFDIR, SELINUX, label_of, set_label};
pub use dirtree::Dirtree;
pub use disk::{earlier_boots, remove_earlier_boots};
pub use held::HeldLayers;
pub use journal::{LayerJournal, Scope};
pub use lock::{LockError, StoreLock};
pub use node::NodeStore;
pub use object::{BadObjectId, ObjectId, ObjectSet, ObjectType};
pub use place::{Kind, NoDisk, Sealing, SystemRepo, Wish, decide, has_sealed_object, is_sealed, sealing};
pub use refs::{image_ref, layer_ref};
pub use write::{FileMeta, ObjectWriter, WriteError, Xattrs};

/// Ref of the node image's commit in the node store.
pub const NODE_IMAGE_REF: &str = "coreos/node-image";
