//! Pulls a node image and imports it into the node store, an ostree repo that has only the objects which the booted repo
//! lacks.
//!
//! [`image`] reads pull specs, manifests and layers through skopeo, and classifies failures of registries. [`import`]
//! imports layers as ostree objects. [`store`] has the booted repo and the node store with its locks.
//!
//! The crate writes only to the node store. It does not mount or retry, and it does not know the running system's `/usr`
//! or `/etc` or the phases of a pivot.
//!
//! ```no_run
//! use std::path::Path;
//! use std::sync::Arc;
//!
//! use node_store::PullProgress;
//! use node_store::image::{ImageSettings, PullSpec, Source};
//! use node_store::import::{PullOptions, pull};
//! use node_store::store::NodeStore;
//! use tokio_util::sync::CancellationToken;
//!
//! # async fn example() -> anyhow::Result<()> {
//! let store = NodeStore::on_tmpfs(Path::new("/run/example"), None)?;
//! let source = Source::open(&ImageSettings::default()).await?;
//! let image = source.resolve(&"registry.example/node:latest".parse::<PullSpec>()?).await?;
//! let progress = Arc::new(PullProgress::default());
//! let options = PullOptions::default();
//! let pulled = pull(&source, &image, &store, None, &options, progress, &CancellationToken::new()).await?;
//! println!("{} is commit {}", image.pinned, pulled.commit);
//! # Ok(())
//! # }
//! ```

pub mod image;
pub mod import;
mod layer_read;
mod progress;
mod rate;
pub mod store;

pub use layer_read::{LayerRead, SpanResult, Work};
pub use progress::{ProgressSnapshot, PullProgress};
