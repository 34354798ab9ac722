//! Plain layers made by code, and ostree-ext as the importer to compare with.

use std::path::Path;
use std::process::Command;

use super::fixture::{Compress, RawLayer, listing, run};

/// One entry of a plain layer.
#[derive(Debug, Clone)]
pub enum What {
    Dir(u32),
    File(Vec<u8>, u32),
    Symlink(String),
    Hardlink(String),
    Device,
    Fifo,
}

/// An entry with its owner, attributes and time.
#[derive(Debug, Clone)]
pub struct Item {
    pub path: String,
    pub what: What,
    pub owner: (u64, u64),
    pub xattrs: Vec<(String, Vec<u8>)>,
    pub mtime: u64,
}

pub fn item(path: &str, what: What) -> Item {
    Item { path: path.into(), what, owner: (0, 0), xattrs: Vec::new(), mtime: 1_700_000_000 }
}

pub fn dir(path: &str) -> Item {
    item(path, What::Dir(0o755))
}

pub fn file(path: &str, content: &str) -> Item {
    item(path, What::File(content.as_bytes().to_vec(), 0o644))
}

pub fn link(path: &str, target: &str) -> Item {
    item(path, What::Hardlink(target.into()))
}

/// An entry as it stands in an archive, with whatever bytes in it: names, targets and PAX records that
/// no library writes.
pub fn raw(path: &[u8], kind: u8, link: &[u8], content: &[u8], pax: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    if !pax.is_empty() {
        let mut records = Vec::new();
        for (key, value) in pax {
            let body = [b" ", *key, b"=", *value, b"\n"].concat();
            // The length counts its own digits.
            let length = (1..9)
                .map(|digits| body.len() + digits)
                .find(|length| length.to_string().len() + body.len() == *length);
            records.extend(length.unwrap().to_string().into_bytes());
            records.extend(body);
        }
        out.extend(raw(b"pax", b'x', b"", &records, &[]));
    }
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..path.len()].copy_from_slice(path);
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
    header.as_old_mut().linkflag = [kind];
    header.set_mode(if kind == b'5' { 0o755 } else { 0o644 });
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_700_000_000);
    header.set_size(content.len() as u64);
    header.set_cksum();
    out.extend(header.as_bytes());
    out.extend(content);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

/// A layer of entries made by [`raw`].
pub fn raw_layer(entries: &[Vec<u8>]) -> RawLayer {
    let tar = [entries.concat(), vec![0; 1024]].concat();
    RawLayer { tar, components: None, compress: Compress::Gzip }
}

/// The archive of a layer.
pub fn layer(items: &[Item]) -> RawLayer {
    let mut tar = tar::Builder::new(Vec::new());
    for item in items {
        if !item.xattrs.is_empty() {
            let records: Vec<_> =
                item.xattrs.iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.as_slice())).collect();
            tar.append_pax_extensions(records.iter().map(|(name, value)| (name.as_str(), *value))).unwrap();
        }
        let mut header = tar::Header::new_gnu();
        header.set_uid(item.owner.0);
        header.set_gid(item.owner.1);
        header.set_mtime(item.mtime);
        header.set_mode(0o644);
        header.set_size(0);
        let kind = |header: &mut tar::Header, kind| header.set_entry_type(kind);
        match &item.what {
            What::Dir(mode) => {
                kind(&mut header, tar::EntryType::Directory);
                header.set_mode(*mode);
                tar.append_data(&mut header, &item.path, std::io::empty()).unwrap();
            }
            What::File(content, mode) => {
                header.set_mode(*mode);
                header.set_size(content.len() as u64);
                tar.append_data(&mut header, &item.path, content.as_slice()).unwrap();
            }
            What::Symlink(target) => {
                // As tar writers have it; libostree 2022.7 takes another mode into the checksum.
                kind(&mut header, tar::EntryType::Symlink);
                header.set_mode(0o777);
                tar.append_link(&mut header, &item.path, target).unwrap();
            }
            What::Hardlink(target) => {
                kind(&mut header, tar::EntryType::Link);
                tar.append_link(&mut header, &item.path, target).unwrap();
            }
            What::Device | What::Fifo => {
                let device = matches!(item.what, What::Device);
                kind(&mut header, if device { tar::EntryType::Char } else { tar::EntryType::Fifo });
                header.set_device_major(1).unwrap();
                header.set_device_minor(3).unwrap();
                tar.append_data(&mut header, &item.path, std::io::empty()).unwrap();
            }
        }
    }
    RawLayer { tar: tar.into_inner().unwrap(), components: None, compress: Compress::Gzip }
}

/// The oracle program, built when it is not; `PIVOT_ORACLE` names another one.
pub fn oracle() -> String {
    if let Ok(path) = std::env::var("PIVOT_ORACLE") {
        return path;
    }
    built("oracle")
}

/// Builds a stage of the test bed if it is missing. Returns its path.
pub fn built(stage: &str) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bed/build.sh");
    let output = Command::new("bash").arg(script).arg(stage).env_remove("CARGO_TARGET_DIR").output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "building the test bed's {stage}: {told}");
    told.lines().last().unwrap().to_owned()
}

/// Imports an image with ostree-ext. Returns the listing of its merge commit, or its error.
pub fn by_ostree_ext(oracle: &str, spec: &str, repo: &Path) -> Result<String, String> {
    let path = repo.to_str().unwrap();
    if !repo.exists() {
        run("ostree", &["init", "--mode=bare", "--repo", path]);
    }
    let image = format!("ostree-unverified-registry:{spec}");
    let output = Command::new(oracle).args(["import", "--repo", path, &image]).output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(listing(repo, String::from_utf8_lossy(&output.stdout).trim()))
}

/// The lines that two listings do not share, for messages.
pub fn difference(ours: &str, theirs: &str) -> String {
    let (left, right): (Vec<&str>, Vec<&str>) = (ours.lines().collect(), theirs.lines().collect());
    let only = |some: &[&str], other: &[&str], sign: &str| {
        let other: std::collections::HashSet<&&str> = other.iter().collect();
        some.iter().filter(|line| !other.contains(line)).map(|line| format!("{sign}{line}\n")).collect::<String>()
    };
    only(&left, &right, "ours   ") + &only(&right, &left, "theirs ")
}
