//! Seeds for fuzzing: one valid input for each format that a target reads.

use std::collections::BTreeMap;

use ostree::glib::variant::ToVariant;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::store::{FileMeta, ObjectId, Xattrs};

use super::super::plain::{CommitInfo, commit_bytes};

type Tar = Builder<Vec<u8>>;

/// Returns target, name and bytes of each seed.
pub fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let mut seeds = vec![
        ("encapsulated", "format1", encapsulated(1)),
        ("encapsulated", "format0", encapsulated(0)),
        ("encapsulated", "chunk", chunk()),
        ("plain", "kinds", kinds()),
        ("plain", "whiteouts", whiteouts()),
        ("plain", "pax", pax()),
        ("plain", "empty", with_option(3, Builder::new(Vec::new()))),
        ("references", "stream", references("rhel-coreos")),
        ("references", "other", references("etcd")),
    ];
    let archives: Vec<_> = seeds.iter().filter(|seed| ["encapsulated", "plain"].contains(&seed.0)).cloned().collect();
    seeds.extend(archives.into_iter().map(|(_, name, bytes)| ("tar", name, bytes)));
    seeds
}

fn header(kind: EntryType, size: usize, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size as u64);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_700_000_000);
    header
}

fn file(tar: &mut Tar, path: &str, mode: u32, content: &[u8]) {
    tar.append_data(&mut header(EntryType::Regular, content.len(), mode), path, content).expect("writing to memory");
}

fn dir(tar: &mut Tar, path: &str) {
    tar.append_data(&mut header(EntryType::Directory, 0, 0o755), path, std::io::empty()).expect("writing to memory");
}

fn link(tar: &mut Tar, kind: EntryType, path: &str, target: &str) {
    tar.append_link(&mut header(kind, 0, 0o777), path, target).expect("writing to memory");
}

/// Returns the byte of options that targets read first, followed by the archive.
fn with_option(option: u8, tar: Tar) -> Vec<u8> {
    let mut bytes = vec![option];
    bytes.extend(tar.into_inner().expect("writing to memory"));
    bytes
}

fn id(bytes: &[u8]) -> ObjectId {
    ObjectId(Sha256::digest(bytes).into())
}

fn checksum(meta: &FileMeta, content: &[u8]) -> ObjectId {
    let mut hasher = meta.hasher();
    hasher.update(content);
    ObjectId(hasher.finalize().into())
}

struct Exporter {
    tar: Tar,
    prefix: &'static str,
    type_bits: u32,
}

impl Exporter {
    fn new(format: u8) -> Self {
        let (prefix, type_bits) = if format == 0 { ("./", 0o100_000) } else { ("", 0) };
        let mut tar = Builder::new(Vec::new());
        dir(&mut tar, &format!("{prefix}sysroot"));
        file(&mut tar, &format!("{prefix}sysroot/ostree/repo/config"), 0o644, b"[core]\nmode=bare-split-xattrs\n");
        Self { tar, prefix, type_bits }
    }

    fn path(&self, id: &ObjectId, kind: &str) -> String {
        let name = id.to_string();
        format!("{}sysroot/ostree/repo/objects/{}/{}.{kind}", self.prefix, &name[..2], &name[2..])
    }

    fn metadata(&mut self, kind: &str, bytes: &[u8]) -> ObjectId {
        let id = id(bytes);
        let path = self.path(&id, kind);
        file(&mut self.tar, &path, 0o644, bytes);
        id
    }

    /// Adds the entries of a content object: attributes, the hardlink to them, the object, and its path in the tree.
    fn content(&mut self, meta: &FileMeta, content: &[u8], at: &str) -> ObjectId {
        let object = checksum(meta, content);
        let xattrs = id(meta.xattrs.as_bytes());
        let (xattrs_path, path) = (self.path(&xattrs, "file-xattrs"), self.path(&object, "file"));
        file(&mut self.tar, &xattrs_path, 0o644, meta.xattrs.as_bytes());
        let link_path = self.path(&object, "file-xattrs-link");
        link(&mut self.tar, EntryType::Link, &link_path, &xattrs_path);
        match &meta.target {
            Some(target) => {
                link(&mut self.tar, EntryType::Symlink, &path, &String::from_utf8_lossy(target));
            }
            None => file(&mut self.tar, &path, meta.mode | self.type_bits, content),
        }
        link(&mut self.tar, EntryType::Link, &format!("{}{at}", self.prefix), &path);
        object
    }
}

fn regular() -> FileMeta {
    let xattrs = Xattrs::from_pairs([(b"user.note".as_slice(), b"value".as_slice())]);
    FileMeta { uid: 0, gid: 0, mode: 0o755, target: None, xattrs }
}

fn symlink() -> FileMeta {
    FileMeta { uid: 0, gid: 0, mode: 0o777, target: Some(b"tool".to_vec()), xattrs: Xattrs::from_pairs([]) }
}

fn encapsulated(format: u8) -> Vec<u8> {
    let mut exporter = Exporter::new(format);
    let dirmeta = (0_u32, 0_u32, 0o040_755_u32.to_be(), Vec::<(Vec<u8>, Vec<u8>)>::new()).to_variant();
    let dirmeta = exporter.metadata("dirmeta", dirmeta.data());
    let files: Vec<(String, Vec<u8>)> = [("sh", checksum(&symlink(), b"")), ("tool", checksum(&regular(), b"#!\n"))]
        .map(|(name, object)| (name.to_owned(), object.0.to_vec()))
        .into();
    let none: Vec<(String, Vec<u8>, Vec<u8>)> = Vec::new();
    let mut tree = exporter.metadata("dirtree", (files, none).to_variant().data());
    for name in ["bin", "usr"] {
        let dirs = vec![(name.to_owned(), tree.0.to_vec(), dirmeta.0.to_vec())];
        tree = exporter.metadata("dirtree", (Vec::<(String, Vec<u8>)>::new(), dirs).to_variant().data());
    }
    let commit = commit_bytes(&CommitInfo {
        strings: BTreeMap::new(),
        parent: Some(ObjectId([0; 32])),
        timestamp: None,
        tree,
        meta: dirmeta,
    });
    exporter.metadata("commit", &commit);
    exporter.content(&regular(), b"#!\n", "usr/bin/tool");
    exporter.content(&symlink(), b"", "usr/bin/sh");
    with_option(72, exporter.tar)
}

fn chunk() -> Vec<u8> {
    let mut exporter = Exporter::new(1);
    exporter.content(&regular(), &[b'x'; 3000], "usr/bin/big");
    with_option(75, exporter.tar)
}

fn kinds() -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    dir(&mut tar, "usr/bin/");
    file(&mut tar, "usr/bin/kubelet", 0o755, &[b'k'; 1500]);
    link(&mut tar, EntryType::Link, "usr/bin/hyperkube", "usr/bin/kubelet");
    link(&mut tar, EntryType::Link, "usr/bin/of-below", "usr/bin/bash");
    link(&mut tar, EntryType::Symlink, "usr/bin/oc", "kubelet");
    file(&mut tar, "etc/kubernetes/kubelet.conf", 0o600, b"");
    file(&mut tar, "var/lib/thing", 0o644, b"1");
    file(&mut tar, "opt/cni/bin", 0o644, b"2");
    for kind in [EntryType::Char, EntryType::Block, EntryType::Fifo] {
        let mut device = header(kind, 0, 0o600);
        device.set_device_major(1).and_then(|()| device.set_device_minor(3)).expect("a GNU header");
        tar.append_data(&mut device, "usr/device", std::io::empty()).expect("writing to memory");
    }
    file(&mut tar, &format!("usr/share/{}", "long-name/".repeat(15)), 0o644, b"long");
    with_option(73, tar)
}

fn whiteouts() -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for path in ["usr/bin/.wh.old", "usr/share/.wh..wh..opq", "etc/.wh.motd", "usr/share/doc/.wh.dir"] {
        file(&mut tar, path, 0o644, b"");
    }
    file(&mut tar, "usr/share/new", 0o644, b"after");
    with_option(201, tar)
}

fn pax() -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    let path = format!("usr/share/{}", "deep/".repeat(40));
    let records: [(&str, &[u8]); 5] = [
        ("SCHILY.xattr.security.capability", &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("SCHILY.xattr.user.bytes", b"\xff\x00\n="),
        ("uid", b"1000"),
        ("mtime", b"1700000000.5"),
        ("path", path.as_bytes()),
    ];
    tar.append_pax_extensions(records).expect("writing to memory");
    file(&mut tar, "short", 0o644, b"pax");
    with_option(1, tar)
}

fn references(name: &str) -> Vec<u8> {
    let digest = "ab".repeat(32);
    let image = format!("quay.example/node@sha256:{digest}");
    let tag = serde_json::json!({ "name": name, "from": { "kind": "DockerImage", "name": image } });
    let stream =
        serde_json::json!({ "kind": "ImageStream", "apiVersion": "image.openshift.io/v1", "spec": { "tags": [tag] } });
    serde_json::to_vec(&stream).unwrap_or_default()
}
