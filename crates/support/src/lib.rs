//! Small tools that every crate of this workspace uses: [`failpoint`]s for tests, atomic writes in a [`directory`],
//! child processes ([`command`]), missing files ([`if_found`]), extended attributes ([`xattr`]), [`clock`]s, name [`pattern`]s,
//! [`lock`]s, sizes ([`human_bytes`], [`BlockSize`]).
//!
//! The crate depends on no other crate of the workspace, and has no code that is specific to images, ostree, systemd or
//! the pivot.
//!
//! ```no_run
//! use std::path::Path;
//! use std::time::Duration;
//!
//! use support::{command, directory::Directory, human_bytes};
//!
//! # async fn example() -> anyhow::Result<()> {
//! let listing = command::run(&["ls", "-l", "/usr"], Duration::from_secs(10)).await?;
//! Directory::ensure(Path::new("/run/example"))?.write_atomic("listing", 0o600, &listing)?;
//! println!("wrote {}", human_bytes(listing.len() as u64));
//! # Ok(())
//! # }
//! ```

pub mod clock;
pub mod command;
pub mod directory;
pub mod failpoint;
mod found;
mod lock;
pub mod pattern;
mod size;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod text;
pub mod xattr;

pub use found::{if_found, ignore_missing};
pub use lock::lock;
pub use size::{BlockSize, human_bytes};
