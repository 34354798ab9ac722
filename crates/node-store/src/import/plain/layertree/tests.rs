use super::*;

fn path(text: &str) -> Vec<String> {
    text.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

fn object(byte: u8) -> LayerFile {
    LayerFile::Object(ObjectId([byte; 32]))
}

fn below(text: &str) -> LayerFile {
    LayerFile::Below(path(text))
}

fn sample() -> LayerTree {
    let mut tree = LayerTree::default();
    let meta = DirMeta { uid: 1, gid: 2, mode: 0o700, xattrs: vec![(b"user.a".to_vec(), vec![0, 255])] };
    tree.directory(&path("usr"), meta.clone()).unwrap();
    tree.directory(&path("usr/a"), meta).unwrap();
    tree.file(&path("usr/a/file"), object(1), 0, 0).unwrap();
    tree.file(&path("usr/a/link"), below("usr/a/file"), 0, 0).unwrap();
    tree.file(&path("usr/a/link2"), below("usr/a/link"), 0, 0).unwrap();
    tree.file(&path("usr/a/early"), below("usr/z"), 0, 0).unwrap();
    tree.file(&path("usr/a/lower"), below("usr/bin/bash"), 0, 0).unwrap();
    tree.file(&path("usr/z"), object(2), 0, 0).unwrap();
    assert!(tree.whiteout(&path("usr/a/.wh.gone"), 0, 0).unwrap());
    assert!(tree.whiteout(&path("usr/.wh..wh..opq"), 0, 0).unwrap());
    assert!(tree.whiteout(&path("usr/.wh..wh.plnk"), 0, 0).unwrap());
    assert!(tree.whiteout(&path("usr/a").into_iter().chain(["/.wh.\\xff".into()]).collect::<Vec<_>>(), 0, 0).unwrap());
    tree.unstorable(ObjectId([7; 32]), "\\xff".into()).unwrap();
    tree.leave_out("/opt".into());
    tree.leave_out("/opt".into());
    tree.resolve_links().unwrap();
    tree
}

#[test]
fn a_tree_survives_serialisation() {
    let tree = sample();
    let usr = tree.root.dirs.get("usr").unwrap();
    let a = usr.dirs.get("a").unwrap();
    assert!(usr.opaque && usr.whiteouts.is_empty());
    assert_eq!(a.whiteouts.iter().map(|(name, ())| name).collect::<Vec<_>>(), ["/\\xff", "gone"]);
    assert_eq!(["link", "link2", "early"].map(|name| a.files.get(name).unwrap()), [&object(1), &object(1), &object(2)]);
    assert_eq!(a.files.get("lower"), Some(&below("usr/bin/bash")));
    assert_eq!((usr.meta.mode, a.meta.mode), (0o700, 0o700));
    assert_eq!(tree.left_out["/opt"], 2);
    let budget = Budget::default();
    let kept = tree.to_bytes().unwrap();
    let again = LayerTree::new(&budget).read(&kept).unwrap().unwrap();
    assert_eq!((again.root, again.left_out, again.unstorable), (tree.root, tree.left_out, tree.unstorable));
    assert!(LayerTree::new(&budget).read(b"damaged").unwrap().is_none());
    assert!(LayerTree::new(&budget).read(&kept[..kept.len() / 2]).unwrap().is_none());
}

#[test]
fn missing_parents_get_the_owner_of_the_entry() {
    let mut tree = sample();
    tree.file(&path("usr/a/b/c"), object(3), 5, 6).unwrap();
    let a = tree.root.dirs.get("usr").unwrap().dirs.get("a").unwrap();
    let meta = DirMeta { uid: 5, gid: 6, mode: 0o755, xattrs: Vec::new() };
    assert_eq!((&*a.meta, &*a.dirs.get("b").unwrap().meta), (&meta, &meta), "as in libostree");
    assert_eq!(*tree.root.meta, meta, "as in libostree");
}

#[test]
fn later_entries_replace_earlier_ones_and_invalid_ones_are_refused() {
    let mut tree = sample();
    tree.file(&path("usr/a"), object(9), 0, 0).unwrap();
    tree.directory(&path("usr/z"), DirMeta::default()).unwrap();
    let usr = tree.root.dirs.get("usr").unwrap();
    assert!(usr.dirs.contains("z") && usr.files.contains("a"));
    for name in [".wh.", ".wh..", ".wh..."] {
        assert_eq!(tree.whiteout(&path(&format!("usr/{name}")), 0, 0), Err(BadEntry::EmptyWhiteout), "{name}");
    }
    assert_eq!(tree.file(&[], object(1), 0, 0), Err(BadEntry::Root));
    let below_file = Err(BadEntry::BelowFile("usr/a".into()));
    assert_eq!(tree.file(&path("usr/a/b/c"), object(1), 0, 0), below_file);
    assert_eq!(tree.directory(&path("usr/a/b"), DirMeta::default()), below_file);
    assert_eq!(tree.whiteout(&path("usr/a/.wh.x"), 0, 0).map(drop), below_file);
    tree.file(&path("usr/l"), below("usr/z"), 0, 0).unwrap();
    assert!(matches!(tree.resolve_links(), Err((_, BadEntry::LinkToDirectory(_)))));
    let mut tree = LayerTree::default();
    tree.file(&path("usr/l"), below("usr/m"), 0, 0).unwrap();
    tree.file(&path("usr/m"), below("usr/l"), 0, 0).unwrap();
    assert!(matches!(tree.resolve_links(), Err((_, BadEntry::LinkCircle(_)))));
}

#[test]
fn layers_over_the_budget_are_refused() {
    let budget = Budget::default();
    let mut first = LayerTree::new(&budget);
    first.file(&path("usr/x"), object(1), 0, 0).unwrap();
    let mut tree = LayerTree::new(&budget);
    let deep = vec!["d".to_owned(); 250];
    let result = (0..10_000).try_for_each(|at| {
        let own = [path(&format!("usr/{at}")), deep.clone()].concat();
        tree.file(&own, object(1), 0, 0)
    });
    assert!(matches!(result, Err(BadEntry::TooMany(_))), "{result:?}");
}

#[test]
fn a_file_hardlinked_to_itself_is_unchanged() {
    let mut tree = LayerTree::default();
    tree.file(&path("usr/a"), object(1), 0, 0).unwrap();
    tree.file(&path("usr/a"), below("usr/a"), 0, 0).unwrap();
    tree.file(&path("usr/lower"), below("usr/lower"), 0, 0).unwrap();
    tree.file(&path("usr/other"), below("usr/lower"), 0, 0).unwrap();
    tree.resolve_links().unwrap();
    let usr = tree.root.dirs.get("usr").unwrap();
    assert_eq!(usr.files.get("a"), Some(&object(1)));
    assert_eq!(usr.files.get("lower"), Some(&below("usr/lower")), "the file of the layers below");
    assert_eq!(usr.files.get("other"), Some(&below("usr/lower")));
}

#[test]
fn parents_without_an_entry_get_a_label() {
    let mut tree = LayerTree::default();
    let own = DirMeta { xattrs: vec![(b"security.selinux".to_vec(), b"own".to_vec())], ..DirMeta::default() };
    tree.directory(&path("usr/own"), own).unwrap();
    tree.file(&path("usr/own/new/x"), object(1), 0, 0).unwrap();
    let label = |path: &str, _| Ok::<_, BadEntry>(Some(path.as_bytes().to_vec()));
    tree.directory(&path("usr/own"), DirMeta { mode: 1, ..DirMeta::default() }).unwrap();
    tree.label_parents(&label).unwrap();
    let usr = tree.root.dirs.get("usr").unwrap();
    let own = usr.dirs.get("own").unwrap();
    for (dir, label) in
        [(&tree.root, "/"), (usr, "/usr"), (own, "/usr/own"), (own.dirs.get("new").unwrap(), "/usr/own/new")]
    {
        assert_eq!(label_of(&dir.meta.xattrs), Some(label.as_bytes()));
    }
}

#[test]
fn each_whiteout_makes_its_parent_directories() {
    for name in [".wh.gone", ".wh..wh..opq", ".wh..wh.plnk"] {
        let mut tree = LayerTree::default();
        assert!(tree.whiteout(&path(&format!("usr/d/{name}")), 7, 8).unwrap());
        let dir = tree.existing(&path("usr/d")).unwrap();
        assert_eq!((dir.meta.uid, dir.meta.gid, dir.meta.mode), (7, 8, 0o755), "{name}");
    }
}
