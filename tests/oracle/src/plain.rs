//! Writes the tree of a commit as a plain image, as chunkah does: the largest components have one layer each, all others
//! share the last one. `ocidir` writes the image.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use ocidir::cap_std::{ambient_authority, fs::Dir};
use ocidir::oci_spec::image::{Arch, ImageConfiguration, Os, Platform};
use ocidir::OciDir;
use ostree_ext::chunking::ObjectMetaSized;
use ostree_ext::prelude::*;
use ostree_ext::{gio, glib, ostree};

/// Annotation with the component of a layer.
const COMPONENT: &str = "org.chunkah.component";
/// Directory of the SELinux policy. Debian generates it when the package is installed, so dpkg does not list it.
const POLICY: &str = "usr/etc/selinux/";
/// The component of its layer.
const POLICY_COMPONENT: &str = "selinux-policy";
/// The component of the last layer.
const REST: &str = "unclaimed";

/// An entry of the tree. Directories have no object.
struct Entry {
    path: String,
    object: Option<String>,
    /// Of a directory: its metadata object.
    dirmeta: Option<String>,
}

/// Writes `commit` to `layout` under the tag `tag`, in at most `max_layers` layers. Returns the digest of the manifest.
pub fn write(
    repo: &ostree::Repo,
    commit: &str,
    components: &ObjectMetaSized,
    labels: HashMap<String, String>,
    max_layers: usize,
    (layout, tag): (&Path, &str),
) -> Result<String> {
    let (root, _) = repo.read_commit(commit, gio::Cancellable::NONE)?;
    let mut entries = Vec::new();
    walk(&root, "", &mut entries)?;
    let layers = split(&entries, components, max_layers);

    fs::create_dir_all(layout)?;
    let layout = OciDir::ensure(&Dir::open_ambient_dir(layout, ambient_authority())?)?;
    let mut manifest = ocidir::new_empty_manifest().build()?;
    let mut config = ImageConfiguration::default();
    config.set_architecture(Arch::default());
    config.set_os(Os::Linux);
    let container = ocidir::oci_spec::image::ConfigBuilder::default().labels(labels).build()?;
    config.set_config(Some(container));
    for (component, members) in layers {
        let mut tar = layout.create_layer(None)?;
        for entry in members {
            add(repo, entry, &mut tar).with_context(|| format!("cannot archive /{}", entry.path))?;
        }
        let layer = tar.into_inner()?.complete()?;
        let annotations = HashMap::from([(COMPONENT.to_owned(), component.clone())]);
        layout.push_layer_full(&mut manifest, &mut config, layer, Some(annotations), &component, Default::default());
    }
    let descriptor = layout.insert_manifest_and_config(manifest, config, Some(tag), Platform::default())?;
    Ok(descriptor.digest().to_string())
}

/// Lists everything below `dir`, each directory before its content.
fn walk(dir: &gio::File, path: &str, entries: &mut Vec<Entry>) -> Result<()> {
    let file = dir.downcast_ref::<ostree::RepoFile>().context("not a directory of a commit")?;
    file.ensure_resolved()?;
    let dirmeta = file.tree_get_metadata_checksum().map(|checksum| checksum.to_string());
    entries.push(Entry { path: path.to_owned(), object: None, dirmeta });
    let attributes = "standard::name,standard::type";
    let listed =
        dir.enumerate_children(attributes, gio::FileQueryInfoFlags::NOFOLLOW_SYMLINKS, gio::Cancellable::NONE)?;
    let mut infos = listed.collect::<Result<Vec<_>, glib::Error>>()?;
    infos.sort_by_key(gio::FileInfo::name);
    for info in infos {
        let name = info.name();
        let (child, name) = (dir.child(&name), name.to_str().context("a file name that is not UTF-8")?);
        let path = if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") };
        if info.file_type() == gio::FileType::Directory {
            walk(&child, &path, entries)?;
        } else {
            let object = child.downcast_ref::<ostree::RepoFile>().context("not a file of a commit")?.checksum();
            entries.push(Entry { path, object: Some(object.to_string()), dirmeta: None });
        }
    }
    Ok(())
}

/// Distributes the entries over layers, each with the directories above its files. Layers are in the order of the sizes of
/// their components, so that a change that keeps sizes changes no other layer.
fn split<'a>(entries: &'a [Entry], components: &ObjectMetaSized, max: usize) -> Vec<(String, Vec<&'a Entry>)> {
    let mut sized: Vec<_> = components.sizes.iter().map(|size| (size.size, size.meta.identifier.to_string())).collect();
    sized.sort_by(|(size, name), (other_size, other)| other_size.cmp(size).then(name.cmp(other)));
    sized.truncate(max.saturating_sub(2));
    sized.push((0, POLICY_COMPONENT.to_owned()));
    let own: HashMap<&str, usize> = sized.iter().enumerate().map(|(at, (_, name))| (name.as_str(), at)).collect();
    let directories: BTreeMap<&str, &Entry> =
        entries.iter().filter(|entry| entry.object.is_none()).map(|entry| (entry.path.as_str(), entry)).collect();

    let mut layers: Vec<BTreeMap<&str, &Entry>> = vec![BTreeMap::new(); sized.len() + 1];
    for entry in entries {
        let component = match entry.object.as_ref() {
            Some(_) if entry.path.starts_with(POLICY) => Some(POLICY_COMPONENT),
            object => object.and_then(|object| components.map.get(object)).map(|name| &**name),
        };
        let layer = &mut layers[component.and_then(|name| own.get(name)).copied().unwrap_or(sized.len())];
        layer.insert(&entry.path, entry);
        let parents = Path::new(&entry.path).ancestors().skip(1).filter_map(Path::to_str);
        layer.extend(parents.filter_map(|path| directories.get_key_value(path)));
    }
    let names = sized.into_iter().map(|(_, name)| format!("deb/{name}")).chain([REST.to_owned()]);
    let filled = names.zip(layers).filter(|(_, members)| !members.is_empty());
    filled.map(|(name, members)| (name, members.into_values().collect())).collect()
}

fn add(repo: &ostree::Repo, entry: &Entry, tar: &mut tar::Builder<impl Write>) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mtime(0);
    header.set_size(0);
    // The defaults of an image are at /etc.
    let path = match entry.path.strip_prefix("usr/etc") {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => format!("etc{rest}"),
        _ if entry.path.is_empty() => "./".to_owned(),
        _ => entry.path.clone(),
    };
    if let Some(dirmeta) = &entry.dirmeta {
        let variant = repo.load_variant(ostree::ObjectType::DirMeta, dirmeta)?;
        let (uid, gid, mode, xattrs) = variant.get::<(u32, u32, u32, Xattrs)>().context("malformed metadata")?;
        owned(&mut header, u32::from_be(uid), u32::from_be(gid), u32::from_be(mode));
        header.set_entry_type(tar::EntryType::Directory);
        attributes(tar, &xattrs)?;
        return Ok(tar.append_data(&mut header, path, io::empty())?);
    }
    let object = entry.object.as_deref().context("neither a file nor a directory")?;
    let (stream, info, xattrs) = repo.load_file(object, gio::Cancellable::NONE)?;
    owned(
        &mut header,
        info.attribute_uint32("unix::uid"),
        info.attribute_uint32("unix::gid"),
        info.attribute_uint32("unix::mode"),
    );
    attributes(tar, &xattrs.get::<Xattrs>().context("malformed attributes")?)?;
    if let Some(target) = info.symlink_target() {
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_mode(0o777);
        return Ok(tar.append_link(&mut header, path, target)?);
    }
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(info.size().try_into()?);
    let stream = stream.context("a file without content")?;
    Ok(tar.append_data(&mut header, path, stream.into_read())?)
}

/// Names and values, both ended by a NUL or not.
type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

fn owned(header: &mut tar::Header, uid: u32, gid: u32, mode: u32) {
    header.set_uid(uid.into());
    header.set_gid(gid.into());
    header.set_mode(mode & 0o7777);
}

/// Adds the attributes of the next entry. Container images have no labels.
fn attributes(tar: &mut tar::Builder<impl Write>, xattrs: &Xattrs) -> Result<()> {
    let mut records = Vec::new();
    for (name, value) in xattrs {
        let name = std::str::from_utf8(name)?.trim_end_matches('\0');
        if name != "security.selinux" {
            records.push((format!("SCHILY.xattr.{name}"), value.as_slice()));
        }
    }
    if !records.is_empty() {
        tar.append_pax_extensions(records.iter().map(|(name, value)| (name.as_str(), *value)))?;
    }
    Ok(())
}
