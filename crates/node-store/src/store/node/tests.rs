use super::super::NODE_IMAGE_REF;
use super::*;

#[test]
fn libostree_opens_the_store_and_reads_its_refs() {
    let temp = tempfile::tempdir().unwrap();
    let store = NodeStore::on_tmpfs(temp.path(), None).unwrap();
    NodeStore::on_tmpfs(temp.path(), None).unwrap();
    let repo = ostree::Repo::new_for_path(store.repo_path());
    repo.open(ostree::gio::Cancellable::NONE).unwrap();
    assert_eq!(repo.mode(), ostree::RepoMode::Bare);
    assert_eq!(store.resolve_ref().unwrap(), None);
    let commit = ObjectId([0xab; 32]);
    store.set_ref(&commit).unwrap();
    assert_eq!(repo.resolve_rev(NODE_IMAGE_REF, false).unwrap().unwrap(), commit.to_string());
    assert_eq!(store.resolve_ref().unwrap(), Some(commit));
    let marked = store.repo.join(format!("state/{commit}.commitpartial"));
    for complete in [false, true, true] {
        store.publish(&[(commit, complete)], &[]).unwrap();
        assert_eq!(marked.exists(), !complete);
    }
    store.remove_ref().unwrap();
    store.remove_ref().unwrap();
    assert_eq!(store.resolve_ref().unwrap(), None);
}

#[test]
fn a_store_of_another_parent_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let booted = BootedRepo { path: "/ostree/repo".into(), commit: None };
    NodeStore::on_tmpfs(temp.path(), Some(&booted)).unwrap();
    assert_eq!(NodeStore::open(temp.path()).unwrap().parent.as_deref(), Some(Path::new("/ostree/repo")));
    assert!(NodeStore::on_tmpfs(temp.path(), None).is_err());
}

#[test]
fn content_that_cannot_be_read_is_not_reported_as_missing() {
    let temp = tempfile::tempdir().unwrap();
    let store = NodeStore::on_tmpfs(temp.path(), None).unwrap();
    let id = ObjectId([0xab; 32]);
    let message = |result: anyhow::Result<u64>| format!("{:#}", result.unwrap_err());
    assert!(message(store.content_size(&id)).contains("cannot find the content object abab"));
    let object = store.repo.join(loose_path(&id, ObjectType::File));
    let directory = object.parent().unwrap();
    fs::create_dir_all(directory).unwrap();
    fs::write(&object, "content").unwrap();
    assert_eq!((store.content_size(&id).unwrap(), store.find_content(&id).unwrap()), (7, object.clone()));
    fs::remove_dir_all(directory).unwrap();
    fs::write(directory, "").unwrap();
    assert!(message(store.content_size(&id)).contains("Not a directory"));
    assert!(store.find_content(&id).is_err());
}

#[test]
fn lock_removes_temporary_files_of_a_killed_import() {
    let temp = tempfile::tempdir().unwrap();
    let store = NodeStore::on_tmpfs(temp.path(), None).unwrap();
    fs::write(store.repo_path().join("tmp/import-7"), "").unwrap();
    let _lock = store.lock().unwrap();
    assert!(!store.repo_path().join("tmp/import-7").exists());
    assert!(matches!(store.lock(), Err(LockError::Held { .. })));
}

#[test]
fn only_the_disk_store_keeps_the_list_of_defaults() {
    let temp = tempfile::tempdir().unwrap();
    let ram = NodeStore::on_tmpfs(temp.path(), None).unwrap();
    ram.write_etc_defaults(Some(b"{}")).unwrap();
    assert_eq!(ram.read_etc_defaults().unwrap(), None);
    let disk = NodeStore::on_disk(ram.repo_path(), None).unwrap();
    assert_eq!(disk.read_etc_defaults().unwrap(), None);
    for list in [&b"{}"[..], b"{\"a\":null}"] {
        disk.write_etc_defaults(Some(list)).unwrap();
        let next_boot = NodeStore::on_disk(ram.repo_path(), None).unwrap();
        assert_eq!(next_boot.read_etc_defaults().unwrap().unwrap(), list);
    }
    disk.write_etc_defaults(None).unwrap();
    disk.write_etc_defaults(None).unwrap();
    assert_eq!(disk.read_etc_defaults().unwrap(), None);
}

#[test]
fn two_equal_layers_write_one_list() {
    let temp = tempfile::tempdir().unwrap();
    let store = NodeStore::on_tmpfs(temp.path(), None).unwrap();
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| (0..200).try_for_each(|_| store.write_layer_list("layer", b"same content".to_vec())))
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap().unwrap());
    });
    assert_eq!(store.read_layer_list("layer").unwrap().unwrap(), b"same content");
}

#[test]
fn a_part_of_a_list_is_a_missing_one() {
    let temp = tempfile::tempdir().unwrap();
    let store = NodeStore::on_tmpfs(temp.path(), None).unwrap();
    assert_eq!(store.read_layer_list("layer").unwrap(), None);
    for list in [vec![], vec![1; 64], vec![0; 8192]] {
        store.write_layer_list("layer", list.clone()).unwrap();
        assert_eq!(store.read_layer_list("layer").unwrap(), Some(list));
        let whole = fs::read(store.lists().join("layer")).unwrap();
        // A file system may leave the beginning, or zeros in the place of blocks that were not written.
        let zeros = vec![0; whole.len()];
        for part in [&whole[..0], &whole[..1], &whole[..whole.len() - 1], &whole[..whole.len() / 64 * 32], &zeros] {
            if *part != whole[..] {
                fs::write(store.lists().join("layer"), part).unwrap();
                assert_eq!(store.read_layer_list("layer").unwrap(), None, "{} of {} bytes", part.len(), whole.len());
            }
        }
    }
}
