//! The agent as a fragment for Ignition, which `ignition.config.merge` or Butane's `ignition.config.merge` adds to any
//! other configuration.

use std::io::{self, Write as _};

use clap::ValueEnum;
use clap::builder::PossibleValue;
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

/// Version of the specification that the fragment names. Its content is valid in each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Spec {
    #[value(name = "3.2.0")]
    V3_2,
    #[value(name = "3.3.0")]
    V3_3,
    #[value(name = "3.4.0")]
    V3_4,
}

/// Returns the fragment.
///
/// # Errors
/// The content cannot be compressed.
pub fn ignition(parts: &Parts, binaries: &Binaries, spec: Spec) -> io::Result<Value> {
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
    let version = spec.to_possible_value();
    Ok(json!({
        "ignition": {"version": version.as_ref().map(PossibleValue::get_name)},
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
