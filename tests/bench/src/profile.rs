//! Shares of the CPU time of the agent's side, sampled by perf. They explain its distance from the limit.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::proc::run;

/// Samples of each part.
pub type Profile = BTreeMap<Part, u64>;

/// Part of the work of a pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// gzip and zstd.
    Decompression,
    /// skopeo and the kernel on its behalf.
    Skopeo,
    /// The diff ids of layers and the names of objects.
    Digests,
    /// The kernel on behalf of the importer.
    Kernel,
    /// The rest of the importer.
    Rest,
}

impl Part {
    /// All, in the order of the table.
    pub const ALL: [Part; 5] = [Part::Decompression, Part::Skopeo, Part::Digests, Part::Kernel, Part::Rest];

    /// Its name in the table.
    pub fn label(self) -> &'static str {
        match self {
            Self::Decompression => "decompression",
            Self::Skopeo => "skopeo (transfer, digests of the blobs), kernel included",
            Self::Digests => "SHA-256: the diff ids of the layers, the names of the objects",
            Self::Kernel => "kernel, in the importer: reading from skopeo, writing to the tmpfs, looking for objects",
            Self::Rest => "the rest: parsing, metadata, labels, merging",
        }
    }

    /// True if the limit does this as well.
    pub fn in_limit(self) -> bool {
        matches!(self, Self::Decompression | Self::Skopeo)
    }

    /// The part to which a sample belongs, by the command, the object file and the symbol that perf names.
    fn of(command: &str, object: &str, symbol: &str) -> Self {
        let has = |words: &[&str]| words.iter().any(|word| symbol.contains(word));
        match () {
            () if command == "skopeo" => Self::Skopeo,
            () if object.starts_with('[') => Self::Kernel,
            () if has(&["sha2::", "sha256"]) => Self::Digests,
            () if has(&["zlib_rs::", "crc32", "ZSTD_", "HUF_", "FSE_", "XXH64"]) => Self::Decompression,
            () => Self::Rest,
        }
    }
}

/// Returns `program` under perf, which writes its samples to `file`.
pub fn recorded(program: &Path, file: &Path) -> Command {
    let mut command = Command::new("perf");
    command.args(["record", "--quiet", "--event=cpu-clock", "--freq=999", "--output"]).arg(file).arg("--").arg(program);
    command
}

/// Reads the samples in `file`.
///
/// # Errors
/// When perf fails, or its answer has another form.
pub fn read(file: &Path) -> Result<Profile> {
    let args = ["report", "--stdio", "--quiet", "--no-children", "--fields=sample,comm,dso,sym", "--field-separator=|"];
    let answer = run("perf", args.iter().map(AsRef::as_ref).chain(["--input".as_ref(), file.as_os_str()]))?;
    let profile = parsed(&answer)?;
    ensure!(!profile.is_empty(), "perf took no sample");
    Ok(profile)
}

fn parsed(answer: &str) -> Result<Profile> {
    let mut profile = Profile::new();
    for line in answer.lines().filter(|line| !line.trim().is_empty()) {
        let mut fields = line.splitn(4, '|').map(str::trim);
        let mut field = || fields.next().with_context(|| format!("perf answered an unknown line: {line}"));
        let (samples, command, object, symbol) = (field()?.parse::<u64>()?, field()?, field()?, field()?);
        *profile.entry(Part::of(command, object, symbol)).or_default() += samples;
    }
    Ok(profile)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_count_for_the_part_that_took_them() {
        let answer = "\
7 |benchmark|benchmark        |[.] zlib_rs::inflate::inffast
2 |skopeo   |[kernel.kallsyms]|[k] _copy_to_iter
3 |skopeo   |skopeo           |[.] crypto/sha256.blockSHANI
5 |layer-1  |[kernel.kallsyms]|[k] shmem_write_begin
4 |layer-1  |benchmark        |[.] sha2::sha256::x86::compress
1 |layer-1  |libc.so.6        |[.] malloc
1 |layer-1  |benchmark        |[.] node_store::import::merge::a|b
";
        let expected =
            [(Part::Decompression, 7), (Part::Skopeo, 5), (Part::Digests, 4), (Part::Kernel, 5), (Part::Rest, 2)];
        assert_eq!(parsed(answer).expect("lines of perf"), Profile::from(expected));
        assert!(parsed("12 benchmark").is_err());
    }
}
