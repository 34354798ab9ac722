//! Where ostree objects live: the booted repo, and the node store, which is a bare repo on a tmpfs of
//! its own or, on an installed system, the booted repo itself ([`decide`] says which).
//!
//! This room knows paths, objects, refs, locking and what has to reach the disk in which order. It may
//! not talk to registries or change the running system's `/usr` or `/etc`. It mounts nothing: whoever
//! calls [`NodeStore::on_tmpfs`] has mounted the tmpfs before, and whoever calls
//! [`NodeStore::on_disk`] brings a mount that can be written.

mod booted;
mod dirtree;
mod disk;
mod header;
mod journal;
mod lock;
mod node;
mod object;
mod place;
mod refs;
mod write;

pub use booted::BootedRepo;
pub use dirtree::Dirtree;
pub use journal::{LayerJournal, Scope};
pub use lock::{LockError, StoreLock};
pub use node::NodeStore;
pub use object::{BadObjectId, ObjectId, ObjectSet, ObjectType};
pub use place::{Kind, NoDisk, SystemRepo, Wish, decide};
pub use refs::{LAYER_REF_PREFIX, escape_ref, layer_ref};
pub use write::{FileMeta, ObjectWriter, UnnamedWrite, WriteError, Xattrs};

/// The ref that names the node image's commit in the node store.
pub const NODE_IMAGE_REF: &str = "coreos/node-image";
