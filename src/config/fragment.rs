//! Parses a drop-in file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use serde::Deserialize;

/// The keys of a drop-in file. All are optional; an unknown key is an error.
#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fragment {
    pub image: Option<String>,
    pub release_image: Option<String>,
    pub image_tags: Option<Vec<String>>,
    pub os_mismatch: Option<String>,
    pub mode: Option<String>,
    pub target: Option<String>,
    pub probe_paths: Option<Vec<PathBuf>>,
    pub auth_file: Option<PathBuf>,
    pub ram_limit: Option<RamLimitText>,
    pub complete: Option<bool>,
    pub store: Option<String>,
    #[serde(default)]
    pub retry: RetryTable,
    #[serde(default)]
    pub etc: EtcTable,
    #[serde(default)]
    pub hooks: HooksTable,
    #[serde(default)]
    pub units: BTreeMap<String, String>,
}

/// A memory limit as written. A number is bytes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "ram_limit must be a number of bytes, or text such as \"60%\" or \"3GiB\"")]
pub(super) enum RamLimitText {
    Bytes(u64),
    Text(String),
}

#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RetryTable {
    pub initial: Option<f64>,
    pub maximum: Option<f64>,
    pub attempts: Option<u32>,
    pub denied: Option<f64>,
    pub unknown: Option<f64>,
}

#[derive(Debug, Default, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EtcTable {
    pub strategy: Option<String>,
}

#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HooksTable {
    pub timeout: Option<f64>,
}

impl Fragment {
    /// Parses `text`; the error names `path`, the line, the column and the key.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        toml::from_str(text).map_err(|error: toml::de::Error| {
            // The message must be one line for journal and status: the caret picture of `Display` is left out.
            let message = error.message().replace('\n', ", ");
            match error.span().and_then(|span| text.get(..span.start)) {
                Some(before) => anyhow!("{}: {}: {message}", path.display(), position(before)),
                None => anyhow!("{}: {message}", path.display()),
            }
        })
    }
}

/// Returns line and column of the character that follows `before`.
fn position(before: &str) -> String {
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |rest| rest.chars().count()) + 1;
    format!("line {line}, column {column}")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_file_and_the_key_in_one_line() {
        for (text, expected) in [
            ("imgae = \"x\"\n", "unknown field `imgae`"),
            ("[retry]\nfirst = 1\n", "unknown field `first`"),
            ("image = 3\n", "expected a string"),
            ("ram_limit = -1\n", "ram_limit must be"),
            ("image = \"a\"\nimage = \"b\"\n", "duplicate key"),
            ("image\n", "line 1"),
            ("mode = \"auto\"\nimage_tags = [\n  3 ]\n", "line 3, column 3: "),
        ] {
            let message = format!("{:#}", Fragment::parse(Path::new("/etc/x.toml"), text).unwrap_err());
            assert!(message.starts_with("/etc/x.toml: ") && message.contains(expected), "{message}");
            assert!(!message.contains(['\n', '^']), "{message}");
        }
    }

    #[test]
    fn seconds_may_be_whole_numbers() {
        let fragment = Fragment::parse(Path::new("x"), "[retry]\ninitial = 1\nmaximum = 2.5\n").unwrap();
        assert_eq!((fragment.retry.initial, fragment.retry.maximum), (Some(1.0), Some(2.5)));
    }
}
