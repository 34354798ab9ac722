//! Encapsulated images made by code: a small ostree repo, and the layers that ostree-ext would write of
//! it, as an OCI layout that skopeo pushes to a real registry.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use node_store::store::ObjectId;
use ostree::gio;
use ostree::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Runs a program; its standard output, or a panic with what it said.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs an ignored test of this program in a separate mount namespace: a copy of its mounts in another one would keep a file
/// system alive that the test mounts again.
pub fn run_in_namespace(test: &str) {
    let program = std::env::current_exe().unwrap();
    let unshare = ["--mount", "--propagation", "private", program.to_str().unwrap()];
    print!("{}", run("unshare", &[unshare.as_slice(), &["--ignored", "--exact", test, "--nocapture"]].concat()));
}

/// A bare repo to commit trees to.
pub struct Repo {
    pub path: PathBuf,
}

impl Repo {
    pub fn create(path: &Path) -> Self {
        run("ostree", &["init", "--mode=bare", "--repo", path.to_str().unwrap()]);
        Self { path: path.to_owned() }
    }

    /// Commits a directory to `branch`; the commit's checksum.
    pub fn commit(&self, tree: &Path, branch: &str) -> String {
        let (repo, tree) = (format!("--repo={}", self.path.display()), format!("--tree=dir={}", tree.display()));
        run("ostree", &["commit", &repo, "-b", branch, &tree, "-s", branch]).trim().to_owned()
    }

    fn open(&self) -> ostree::Repo {
        let repo = ostree::Repo::new_for_path(&self.path);
        repo.open(gio::Cancellable::NONE).unwrap();
        repo
    }
}

/// Function that returns the layer of a path's content, or `None` for the first layer.
pub type Chunker = dyn Fn(&str) -> Option<&'static str>;

/// Compression of a layer's blob.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Compress {
    Gzip,
    /// Several gzip files in a row, as pigz and estargz write them.
    GzipMembers,
    /// With something behind it.
    GzipAndMore,
    Zstd,
    /// A frame for each part, and frames to be skipped: zstd:chunked.
    ZstdChunked,
    /// With a window of so many bits.
    ZstdWindow(u32),
    None,
}

impl Compress {
    fn blob(self, data: &[u8]) -> (Vec<u8>, &'static str) {
        let gzip = |data: &[u8]| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        };
        let skipped = |content: &[u8]| {
            [&0x184d_2a50_u32.to_le_bytes()[..], &(content.len() as u32).to_le_bytes(), content].concat()
        };
        match self {
            Compress::None => (data.to_vec(), ""),
            Compress::Gzip => (gzip(data), "+gzip"),
            Compress::GzipMembers => (data.chunks(10_000).flat_map(gzip).collect(), "+gzip"),
            Compress::GzipAndMore => ([gzip(data), b"more to come".to_vec()].concat(), "+gzip"),
            Compress::Zstd => (zstd::encode_all(data, 3).unwrap(), "+zstd"),
            Compress::ZstdChunked => {
                let parts = data.chunks(10_000).flat_map(|part| zstd::encode_all(part, 3).unwrap());
                let (list, footer) = (skipped(&zstd::encode_all(&b"{}"[..], 3).unwrap()), skipped(&[7; 64]));
                (parts.chain(list).chain(footer).collect(), "+zstd")
            }
            Compress::ZstdWindow(bits) => {
                let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
                encoder.window_log(bits).unwrap();
                encoder.write_all(data).unwrap();
                (encoder.finish().unwrap(), "+zstd")
            }
        }
    }
}

/// One layer before compression.
#[derive(Clone)]
pub struct RawLayer {
    pub tar: Vec<u8>,
    pub components: Option<&'static str>,
    pub compress: Compress,
}

/// A whole image before it is written; tests spoil it as they like.
#[derive(Clone)]
pub struct Image {
    pub commit: String,
    pub layers: Vec<RawLayer>,
    pub final_layer: usize,
    pub architecture: String,
    pub labels: BTreeMap<String, String>,
}

impl Image {
    pub fn id(&self) -> ObjectId {
        self.commit.parse().unwrap()
    }
}

/// Encapsulates a commit in format 1, 0 (`./` in front and file types in modes) or 2 (with the parent directories of each
/// path in every layer).
pub fn encapsulate(repo: &Repo, commit: &str, chunker: &Chunker, format: u8) -> Image {
    let mut exporter =
        Exporter { repo: repo.open(), format, objects: BTreeMap::new(), metadata: Vec::new(), seen: BTreeSet::new() };
    exporter.scan(commit);
    let mut by_chunk: BTreeMap<Option<&'static str>, Vec<String>> = BTreeMap::from([(None, Vec::new())]);
    for (object, paths) in &exporter.objects {
        let chunk = paths.iter().map(|path| chunker(path)).next().flatten();
        by_chunk.entry(chunk).or_default().push(object.clone());
    }
    let mut layers = Vec::new();
    for (chunk, objects) in by_chunk {
        let compress = [Compress::Gzip, Compress::Zstd, Compress::Gzip, Compress::None][layers.len() % 4];
        layers.push(RawLayer { tar: exporter.layer(chunk.is_none(), &objects), components: chunk, compress });
    }
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    Image {
        commit: commit.to_owned(),
        final_layer: layers.len() - 1,
        layers,
        architecture: architecture.to_owned(),
        labels: BTreeMap::from([("ostree.commit".to_owned(), commit.to_owned())]),
    }
}

struct Exporter {
    repo: ostree::Repo,
    format: u8,
    /// Content objects and their paths in the tree (relative, without a leading slash).
    objects: BTreeMap<String, Vec<String>>,
    metadata: Vec<(ostree::ObjectType, String)>,
    seen: BTreeSet<String>,
}

impl Exporter {
    fn scan(&mut self, commit: &str) {
        let (variant, _) = self.repo.load_commit(commit).unwrap();
        let checksum = |index| hex::encode(variant.child_value(index).get::<Vec<u8>>().unwrap());
        self.note(ostree::ObjectType::Commit, commit);
        self.note(ostree::ObjectType::DirMeta, &checksum(7));
        self.scan_tree(&checksum(6), "");
    }

    fn note(&mut self, kind: ostree::ObjectType, checksum: &str) {
        if self.seen.insert(format!("{checksum}.{kind:?}")) {
            self.metadata.push((kind, checksum.to_owned()));
        }
    }

    fn scan_tree(&mut self, tree: &str, path: &str) {
        self.note(ostree::ObjectType::DirTree, tree);
        let variant = self.repo.load_variant(ostree::ObjectType::DirTree, tree).unwrap();
        let (files, dirs) = variant.get::<ostree::TreeVariantType>().unwrap();
        for (name, checksum) in files {
            self.objects.entry(hex::encode(checksum)).or_default().push(format!("{path}{name}"));
        }
        for (name, tree, meta) in dirs {
            self.note(ostree::ObjectType::DirMeta, &hex::encode(meta));
            self.scan_tree(&hex::encode(tree), &format!("{path}{name}/"));
        }
    }

    fn path(&self, path: &str) -> String {
        if self.format == 0 { format!("./{path}") } else { path.to_owned() }
    }

    fn layer(&self, first: bool, objects: &[String]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        let directory = |tar: &mut tar::Builder<Vec<u8>>, path: &str| {
            let mut header = header(tar::EntryType::Directory, 0, 0o755);
            tar.append_data(&mut header, path, std::io::empty()).unwrap();
        };
        for path in ["sysroot", "sysroot/ostree", "sysroot/ostree/repo", "sysroot/ostree/repo/objects"] {
            directory(&mut tar, &self.path(path));
        }
        directory(&mut tar, &self.path("sysroot/ostree/repo/objects/00"));
        append(&mut tar, &self.path("sysroot/ostree/repo/config"), b"[core]\nrepo_version=1\nmode=bare-split-xattrs\n");
        if first {
            for (kind, checksum) in &self.metadata {
                let data = self.repo.load_variant(*kind, checksum).unwrap();
                append(&mut tar, &self.object(checksum, &format!("{kind:?}").to_lowercase()), &data.data_as_bytes());
            }
        }
        let mut written = BTreeSet::new();
        let mut parents = BTreeSet::new();
        for object in objects {
            for path in self.objects[object].iter().filter(|_| self.format == 2) {
                let path = mapped(path);
                for (at, _) in path.match_indices('/').filter(|(at, _)| parents.insert(path[..*at].to_owned())) {
                    directory(&mut tar, &path[..at]);
                }
            }
            self.content(&mut tar, object, &mut written);
        }
        tar.into_inner().unwrap()
    }

    fn object(&self, checksum: &str, kind: &str) -> String {
        self.path(&format!("sysroot/ostree/repo/objects/{}/{}.{kind}", &checksum[..2], &checksum[2..]))
    }

    fn content(&self, tar: &mut tar::Builder<Vec<u8>>, object: &str, written: &mut BTreeSet<String>) {
        let (stream, info, xattrs) = self.repo.load_file(object, gio::Cancellable::NONE).unwrap();
        let xattrs = xattrs.data_as_bytes();
        let xattrs_name = hex::encode(Sha256::digest(&xattrs));
        let xattrs_path = self.object(&xattrs_name, "file-xattrs");
        if written.insert(xattrs_name) {
            append(tar, &xattrs_path, &xattrs);
        }
        let mut link = header(tar::EntryType::Link, 0, 0o644);
        tar.append_link(&mut link, self.object(object, "file-xattrs-link"), &xattrs_path).unwrap();

        let path = self.object(object, "file");
        let mode = info.attribute_uint32("unix::mode");
        let mode = if self.format == 0 { mode } else { mode & 0o7777 };
        let mut content = Vec::new();
        let is_file = stream.is_some();
        let mut header = match stream {
            Some(stream) => {
                stream.into_read().read_to_end(&mut content).unwrap();
                header(tar::EntryType::Regular, content.len() as u64, mode)
            }
            None => header(tar::EntryType::Symlink, 0, mode),
        };
        header.set_uid(u64::from(info.attribute_uint32("unix::uid")));
        header.set_gid(u64::from(info.attribute_uint32("unix::gid")));
        if is_file {
            tar.append_data(&mut header, &path, content.as_slice()).unwrap();
        } else {
            let target = info.symlink_target().unwrap();
            let target = target.to_str().unwrap();
            if target.len() <= 100 {
                header.set_link_name_literal(target).unwrap();
                tar.append_data(&mut header, &path, std::io::empty()).unwrap();
            } else {
                tar.append_link(&mut header, &path, target).unwrap();
            }
        }
        for name in &self.objects[object] {
            let name = mapped(name);
            header.set_size(0);
            if is_file && content.is_empty() {
                tar.append_data(&mut header, self.path(&name), std::io::empty()).unwrap();
            } else {
                header.set_entry_type(tar::EntryType::Link);
                tar.append_link(&mut header, self.path(&name), &path).unwrap();
            }
        }
    }
}

/// Returns the path in the archive of a path in the commit.
fn mapped(path: &str) -> String {
    path.strip_prefix("usr/etc").map_or(path.to_owned(), |rest| format!("etc{rest}"))
}

fn header(kind: tar::EntryType, size: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mode(mode);
    header.set_size(size);
    header
}

/// A regular file of root's, mode 0644.
pub fn append(tar: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8]) {
    let mut header = header(tar::EntryType::Regular, content.len() as u64, 0o644);
    tar.append_data(&mut header, path, content).unwrap();
}

impl Image {
    /// Writes an OCI layout to `dir`.
    pub fn write(&self, dir: &Path) {
        let _ = fs::remove_dir_all(dir);
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        let mut layers = Vec::new();
        let mut diff_ids = Vec::new();
        for layer in &self.layers {
            let diff_id = format!("sha256:{}", hex::encode(Sha256::digest(&layer.tar)));
            diff_ids.push(diff_id);
            let (data, suffix) = layer.compress.blob(&layer.tar);
            let mut descriptor = blob(dir, &data, &format!("application/vnd.oci.image.layer.v1.tar{suffix}"));
            if let Some(components) = layer.components {
                // chunkah writes one name, with the kind of the component.
                let key = if components.contains('/') { "org.chunkah.component" } else { "ostree.components" };
                descriptor["annotations"] = json!({ key: components });
            }
            layers.push(descriptor);
        }
        let mut labels = self.labels.clone();
        if labels.contains_key("ostree.commit") {
            labels.entry("ostree.final-diffid".into()).or_insert_with(|| diff_ids[self.final_layer].clone());
        }
        let config = json!({
            "architecture": self.architecture, "os": "linux", "config": { "Labels": labels },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            // ostree-ext wants one.
            "history": [{ "created_by": "the tests" }],
        });
        let config = blob(dir, config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
        let manifest = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                               "config": config, "layers": layers });
        let manifest = blob(dir, manifest.to_string().as_bytes(), "application/vnd.oci.image.manifest.v1+json");
        write_index(dir, &manifest);
    }

    /// Writes a multi-architecture index of this image and `other` to `dir`; this image's digest.
    pub fn write_with(&self, other: &Image, dir: &Path) -> String {
        let mut manifests = Vec::new();
        self.write(dir);
        other.write(&dir.join("other"));
        for (image, layout) in [(other, dir.join("other")), (self, dir.to_owned())] {
            let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
            let mut manifest = index["manifests"][0].clone();
            manifest["platform"] = json!({ "architecture": image.architecture, "os": "linux" });
            manifests.push(manifest);
        }
        run("cp", &["-r", dir.join("other/blobs").to_str().unwrap(), dir.to_str().unwrap()]);
        fs::remove_dir_all(dir.join("other")).unwrap();
        let own = manifests[1]["digest"].as_str().unwrap().to_owned();
        let index = index(dir, &manifests);
        write_index(dir, &index);
        own
    }
}

/// Writes an index of manifests or of other indexes; its descriptor.
pub fn index(dir: &Path, manifests: &[Value]) -> Value {
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": manifests });
    blob(dir, index.to_string().as_bytes(), media_type)
}

/// Writes the `index.json` of a layout with one image or index.
pub fn write_index(dir: &Path, manifest: &Value) {
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
}

/// Writes a blob; its descriptor.
pub fn blob(dir: &Path, data: &[u8], media_type: &str) -> Value {
    let digest = hex::encode(Sha256::digest(data));
    fs::write(dir.join("blobs/sha256").join(&digest), data).unwrap();
    json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": data.len() })
}

/// Lists a commit as `ostree ls` does, one line for each path: kind, mode, owner, checksum, xattrs.
pub fn listing(repo: &Path, commit: &str) -> String {
    run("ostree", &["ls", "-R", "-C", "-X", "--repo", repo.to_str().unwrap(), commit])
}

/// Checks a repo with libostree's own tool.
pub fn fsck(repo: &Path) {
    run("ostree", &["fsck", "--repo", repo.to_str().unwrap()]);
}
