use super::*;
use crate::store::NodeStore;
use std::os::unix::fs::MetadataExt;

fn meta(target: Option<&str>) -> FileMeta {
    let xattrs = Xattrs::from_pairs([(b"trusted.test".as_slice(), b"value".as_slice())]);
    FileMeta { uid: 3, gid: 4, mode: 0o4755, target: target.map(|t| t.as_bytes().to_vec()), xattrs }
}

fn id_of(meta: &FileMeta, content: &[u8]) -> ObjectId {
    let mut hasher = meta.hasher();
    hasher.update(content);
    ObjectId(hasher.finalize().into())
}

fn store_file(writer: &ObjectWriter, id: ObjectId, content: &[u8]) -> Result<(), WriteError> {
    let mut file = writer.begin(Some(id), meta(None));
    file.write(content)?;
    file.finish(|_| true).map(drop)
}

/// Needs root for owners and trusted xattrs.
#[test]
fn libostree_accepts_written_objects() {
    let temp = tempfile::tempdir().unwrap();
    let store = NodeStore::on_tmpfs(temp.path(), None).unwrap();
    let writer = store.writer().unwrap();
    let large = vec![42; 300_000];
    let mut written = Vec::new();
    for content in [b"".as_slice(), b"small", &large] {
        let id = id_of(&meta(None), content);
        store_file(&writer, id, content).unwrap();
        store_file(&writer, id, content).unwrap();
        written.push(id);
    }
    let streamed = id_of(&FileMeta { mode: 0o644, ..meta(None) }, &large);
    let mut stream = writer.begin(Some(streamed), FileMeta { mode: 0o644, ..meta(None) });
    large.chunks(1000).for_each(|chunk| stream.write(chunk).unwrap());
    stream.finish(|_| true).unwrap();
    written.push(streamed);
    let link = id_of(&meta(Some("..//sbin/x")), b"");
    writer.symlink(&link, &meta(Some("..//sbin/x"))).unwrap();
    writer.symlink(&link, &meta(Some("..//sbin/x"))).unwrap();
    written.push(link);

    let repo = ostree::Repo::new_for_path(store.repo_path());
    repo.open(ostree::gio::Cancellable::NONE).unwrap();
    for id in &written {
        repo.fsck_object(ostree::ObjectType::File, &id.to_string(), ostree::gio::Cancellable::NONE).unwrap();
    }
    let stat = std::fs::metadata(store.object_path(&written[1], ObjectType::File)).unwrap();
    assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o7777, stat.mtime()), (3, 4, 0o4755, 0));
    assert_eq!(std::fs::read_dir(store.repo_path().join("tmp")).unwrap().count(), 1, "only tmp/cache");
}

#[test]
fn holes_are_hashed_and_stay_holes() {
    let temp = tempfile::tempdir().unwrap();
    let store = NodeStore::on_tmpfs(temp.path(), None).unwrap();
    let writer = store.writer().unwrap();
    const MIB: usize = 1 << 20;
    for parts in [&[(3, 16 * MIB), (4, 0)][..], &[(0, 16 * MIB)], &[(MIB, 16 * MIB), (1, 1), (1, 0)], &[(5, 100)]] {
        let mut content = Vec::new();
        let mut unnamed = writer.begin(None, meta(None));
        for (data, hole) in parts {
            unnamed.write(&vec![7; *data]).unwrap();
            unnamed.hole(*hole as u64).unwrap();
            content.extend(std::iter::repeat_n(7, *data).chain(std::iter::repeat_n(0, *hole)));
        }
        let (id, _) = unnamed.finish(|_| true).unwrap();
        assert_eq!(id, id_of(&meta(None), &content), "{parts:?}");
        let path = store.object_path(&id, ObjectType::File);
        let check = |what: &str| {
            assert!(std::fs::read(&path).unwrap() == content, "{what} {parts:?}");
            let kept = std::fs::metadata(&path).unwrap().blocks() * 512;
            assert!(kept < 3 * MIB as u64 / 2, "{what} {parts:?}: {kept} bytes of {}", content.len());
        };
        check("unnamed");
        std::fs::remove_file(&path).unwrap();
        let mut named = writer.begin(Some(id), meta(None));
        for (data, hole) in parts {
            named.write(&vec![7; *data]).unwrap();
            named.hole(*hole as u64).unwrap();
        }
        named.finish(|_| true).unwrap();
        check("named");
    }
}

#[test]
fn an_object_with_a_wrong_checksum_is_never_visible() {
    let temp = tempfile::tempdir().unwrap();
    let store = NodeStore::on_tmpfs(temp.path(), None).unwrap();
    let writer = store.writer().unwrap();
    let id = ObjectId([1; 32]);
    let mut stream = writer.begin(Some(id), meta(None));
    stream.write(b"x").unwrap();
    for result in [
        store_file(&writer, id, b"x"),
        writer.symlink(&id, &meta(Some("x"))),
        writer.metadata(&id, ObjectType::DirTree, b"x"),
        stream.finish(|_| true).map(drop),
    ] {
        let error = result.unwrap_err();
        assert!(matches!(error, WriteError::Mismatch { .. }), "{error}");
        assert!(error.to_string().contains(&id.to_string()));
    }
    assert!(store.content_objects().unwrap().is_empty());
    assert!(!store.has(&id, ObjectType::DirTree));
}

#[test]
fn files_without_a_name_do_not_use_the_limit() {
    const MIB: usize = 1 << 20;
    let temp = tempfile::tempdir().unwrap();
    let store = NodeStore::on_tmpfs(temp.path(), None).unwrap();
    let writer = ObjectWriter::new(store.repo_path(), 2 * (MIB + BLOCK) as u64).unwrap();
    let stream = |content: &[u8]| {
        let mut file = writer.begin(None, meta(None));
        file.write(content).map(|()| file)
    };
    let content = |byte| vec![byte; MIB];
    let id = id_of(&meta(None), &content(1));
    type Unnamed<'a> = &'a dyn Fn();
    let abandoned: [(&str, Unnamed<'_>); 6] = [
        ("not kept", &|| assert!(!stream(&content(1)).unwrap().finish(|_| false).unwrap().1)),
        ("dropped", &|| drop(stream(&content(1)).unwrap())),
        ("not kept, with a hole", &|| {
            let mut file = writer.begin(None, meta(None));
            file.write(&content(1)[..MIB / 3]).unwrap();
            file.hole(MIB as u64).unwrap();
            file.finish(|_| false).unwrap();
        }),
        ("another checksum", &|| {
            let mut file = writer.begin(Some(ObjectId([1; 32])), meta(None));
            file.write(&content(1)).unwrap();
            file.finish(|_| true).unwrap_err();
        }),
        ("too large", &|| drop(stream(&vec![1; 3 * MIB]).unwrap_err())),
        // The first of these gets the name.
        ("stored before", &|| assert!(stream(&content(1)).unwrap().finish(|_| true).unwrap().1)),
    ];
    for (what, write) in abandoned {
        for _ in 0..3 {
            write();
            assert!(writer.remaining.load(Ordering::Relaxed) >= (MIB + BLOCK) as u64, "{what}");
        }
    }
    assert!(store.has(&id, ObjectType::File));
    assert!(stream(&content(2)).unwrap().finish(|_| true).unwrap().1);
    let error = writer.metadata(&id_of(&meta(None), b""), ObjectType::CommitMeta, b"x").unwrap_err();
    let WriteError::Io { source, .. } = error else { panic!("{error}") };
    assert_eq!(source.kind(), io::ErrorKind::StorageFull, "two objects with names use the limit");
    for _ in 0..2 {
        store.remove_content(&id, &writer).unwrap();
        let file = stream(&content(3)).unwrap();
        stream(&content(4)).unwrap_err();
        assert!(file.finish(|_| true).unwrap().1, "the space of a removed object is free again");
        store.remove_content(&id_of(&meta(None), &content(3)), &writer).unwrap();
        assert!(stream(&content(1)).unwrap().finish(|_| true).unwrap().1);
    }
}

/// As on a tmpfs before Linux 6.6.
#[test]
fn attributes_that_the_file_system_refuses_are_read_again() {
    use rustix::fs::{XattrFlags, lsetxattr};
    let temp = tempfile::tempdir().unwrap();
    let store = NodeStore::on_tmpfs(temp.path(), None).unwrap();
    let writer = store.writer().unwrap();
    let path = temp.path().join("file");
    std::fs::write(&path, "").unwrap();
    let pairs = [(b"trusted.test".as_slice(), b"value".as_slice()), (b"user.test", b"own"), (b"user.other", b"")];
    let meta = FileMeta { xattrs: Xattrs::from_pairs(pairs), ..meta(None) };
    let set = |name: &[u8], value: &[u8]| match name.starts_with(b"user.") {
        true => Err(Errno::OPNOTSUPP),
        false => lsetxattr(&path, name, value, XattrFlags::empty()),
    };
    writer.set_xattrs(&ObjectId([1; 32]), &meta, set).unwrap();
    let mut found = xattr::read(&path).unwrap();
    found.remove(xattr::LABEL);
    let expected = meta.xattrs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
    assert_eq!(found, expected);
    assert!(writer.warnings()[0].contains("2 user.* attributes"));
    xattr::remove(&path, b"user.test").unwrap();
    assert!(!xattr::read(&path).unwrap().contains_key(b"user.test".as_slice()));
    // A name that is too long for the substitute is refused.
    let long = [b"user.", [b'n'; 245].as_slice()].concat();
    let meta = FileMeta { xattrs: Xattrs::from_pairs([(long.as_slice(), b"".as_slice())]), ..meta };
    writer.set_xattrs(&ObjectId([1; 32]), &meta, set).unwrap_err();
}
