//! State files: one envelope, one loader, one writer, and one wording for files that cannot be used.
//!
//! A state file is a JSON object. The fields of the envelope are beside those of the content: `schema`, `boot_id`, `image`
//! and `checksum`, which covers all other fields.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::StateDir;
use node_store::image::ResolvedImage;

/// Version of the format of all state files. A file of another version is refused, not guessed at.
const SCHEMA: u64 = 2;
const CHECKSUM: &str = "checksum";

/// The content of a state file.
pub trait StateFile: Serialize + DeserializeOwned {
    /// Name of the file.
    const NAME: &'static str;
    /// Name in messages.
    const SUBJECT: &'static str;
    /// Way out if the file cannot be used.
    const REMEDY: &'static str;
}

/// SHA-256 of a state file, independent of white space and the order of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Checksum(String);

impl Checksum {
    fn of(value: &Value) -> Self {
        Self(hex::encode(Sha256::digest(value.to_string())))
    }
}

/// A state file that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot use {subject}, {}: {damage}; {remedy}", path.display())]
pub struct Unusable {
    subject: &'static str,
    path: PathBuf,
    /// The cause.
    pub damage: Damage,
    remedy: &'static str,
}

/// The reason why a state file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// The file does not exist.
    #[error("it is missing")]
    Missing,
    /// The file cannot be read.
    #[error("it cannot be read: {0}")]
    Unreadable(String),
    /// The file does not hold what its name says.
    #[error("it is damaged: {0}")]
    Malformed(String),
    /// The content is not what was written.
    #[error("it is damaged: its checksum does not match")]
    Checksum,
    /// An agent of another version wrote it.
    #[error("it has format {0}, and this agent reads {SCHEMA}: another agent wrote it; use that agent")]
    Foreign(String),
    /// An agent wrote it before the machine booted.
    #[error("it is of another boot")]
    OtherBoot,
    /// It is about another image than the record.
    #[error("it is of another image, {0}")]
    OtherImage(String),
    /// It is not the file that the record was written with.
    #[error("it does not match the record")]
    OtherPlan,
}

/// Returns the file, or `None` if it is missing.
///
/// # Errors
/// The file is there and cannot be used.
pub fn if_present<T>(loaded: Result<T, Unusable>) -> Result<Option<T>, Unusable> {
    match loaded {
        Err(unusable) if unusable.damage == Damage::Missing => Ok(None),
        loaded => loaded.map(Some),
    }
}

impl StateDir {
    /// Loads a state file. The file is left unchanged.
    ///
    /// # Errors
    /// See [`Damage`].
    pub fn load<T: StateFile>(&self) -> Result<T, Unusable> {
        self.load_of(None, None)
    }

    /// Loads a state file that belongs to `image`, if that is known, and, if `tied` is known, is the one with this checksum.
    ///
    /// # Errors
    /// See [`Damage`].
    pub fn load_of<T: StateFile>(&self, image: Option<&ResolvedImage>, tied: Option<&Checksum>) -> Result<T, Unusable> {
        let path = self.run().join(T::NAME);
        let text = std::fs::read(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Damage::Missing,
            _ => Damage::Unreadable(error.to_string()),
        });
        text.and_then(|text| parse(&text, image, tied)).map_err(|damage| Unusable {
            subject: T::SUBJECT,
            path,
            damage,
            remedy: T::REMEDY,
        })
    }

    /// Replaces a state file atomically. `image` is the one that it is about.
    ///
    /// # Errors
    /// The old file is unchanged.
    pub fn save<T: StateFile>(&self, content: &T, image: Option<&ResolvedImage>) -> Result<Checksum> {
        let writing = || format!("cannot serialize {}", T::SUBJECT);
        let mut value = serde_json::to_value(content).with_context(writing)?;
        value["schema"] = SCHEMA.into();
        value["boot_id"] = boot_id().into();
        if let Some(image) = image {
            value["image"] = image.pinned.to_string().into();
        }
        let checksum = Checksum::of(&value);
        value[CHECKSUM] = checksum.0.clone().into();
        self.write(T::NAME, 0o600, &serde_json::to_vec_pretty(&value).with_context(writing)?)?;
        Ok(checksum)
    }
}

pub(super) fn parse<T: StateFile>(
    text: &[u8],
    image: Option<&ResolvedImage>,
    tied: Option<&Checksum>,
) -> Result<T, Damage> {
    let malformed = |error: serde_json::Error| Damage::Malformed(error.to_string());
    let mut value: Value = serde_json::from_slice(text).map_err(malformed)?;
    let schema = value.get("schema").ok_or_else(|| Damage::Malformed("it has no format number".to_owned()))?;
    if *schema != SCHEMA {
        return Err(Damage::Foreign(schema.to_string()));
    }
    let written = value.as_object_mut().and_then(|fields| fields.remove(CHECKSUM));
    let checksum = Checksum::of(&value);
    // A person who changes the file removes the checksum.
    if written.is_some_and(|written| written != checksum.0) {
        return Err(Damage::Checksum);
    }
    let field = |name: &str| value.get(name).and_then(Value::as_str);
    if let (Some(written), Some(now)) = (field("boot_id"), boot_id())
        && written != now
    {
        return Err(Damage::OtherBoot);
    }
    if let (Some(written), Some(image)) = (field("image"), image)
        && written != image.pinned.to_string()
    {
        return Err(Damage::OtherImage(written.to_owned()));
    }
    let content = serde_json::from_value(value).map_err(malformed)?;
    if tied.is_some_and(|tied| *tied != checksum) { Err(Damage::OtherPlan) } else { Ok(content) }
}

/// Returns the ID of this boot of the kernel, or `None` without `/proc`.
fn boot_id() -> Option<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim().to_owned())
}

#[cfg(test)]
#[path = "file_tests.rs"]
pub(in crate::agent) mod tests;
