//! The agent as a fragment for Ignition, which `ignition.config.merge` or Butane's `ignition.config.merge` adds to any
//! other configuration.

use std::io::{self, Write as _};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::Parts;
use super::entry::Node;
use super::files::ETC;

/// Source of the two programs in the fragment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Binaries {
    /// The fragment contains them.
    Inline,
    /// A server has them, uncompressed, in the directory of this URL.
    Url(String),
}

/// Returns the fragment, in version 3.4.0 of the specification.
///
/// # Errors
/// The content cannot be compressed.
pub fn ignition(parts: &Parts, binaries: &Binaries) -> io::Result<Value> {
    let (mut directories, mut files, mut links) = (Vec::new(), Vec::new(), Vec::new());
    for (path, node) in ETC.settings(parts).into_iter().chain(ETC.units()).chain(ETC.programs(parts)) {
        match node {
            Node::Directory { mode } => directories.push(json!({"path": format!("/{path}"), "mode": mode})),
            Node::File { mode, content } => {
                let contents = match binaries {
                    Binaries::Url(url) if mode & 0o111 != 0 => remote(url, &path, &content),
                    _ => inline(&content)?,
                };
                files.push(json!({"path": format!("/{path}"), "mode": mode, "overwrite": true, "contents": contents}));
            }
            Node::Link(target) => links.push(json!({"path": format!("/{path}"), "overwrite": true, "target": target})),
        }
    }
    Ok(json!({
        "ignition": {"version": "3.4.0"},
        "storage": {"directories": directories, "files": files, "links": links},
    }))
}

fn inline(content: &[u8]) -> io::Result<Value> {
    let mut compressed = GzEncoder::new(Vec::new(), Compression::best());
    compressed.write_all(content)?;
    let data = base64::encode(compressed.finish()?);
    Ok(json!({"source": format!("data:;base64,{data}"), "compression": "gzip"}))
}

fn remote(url: &str, path: &str, content: &[u8]) -> Value {
    let name = path.rsplit('/').next().unwrap_or(path);
    json!({
        "source": format!("{}/{name}", url.trim_end_matches('/')),
        "verification": {"hash": format!("sha256-{}", hex::encode(Sha256::digest(content)))},
    })
}
