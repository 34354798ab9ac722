//! Compares the workspace with `docs/architecture.md`: which crate may use which, and that no files of a crate import
//! each other in a circle.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};

/// Name to names.
type Graph = BTreeMap<String, BTreeSet<String>>;

/// This project, or another commit of it for `tests/figures.py`.
fn project() -> PathBuf {
    std::env::var_os("ARCHITECTURE_OF").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into()).into()
}

/// The directories of the crates that are shipped: the agent, the generator and the crates that they use.
fn crates() -> Vec<PathBuf> {
    // Old commits have none of these directories.
    let listed = fs::read_dir(project().join("crates")).into_iter().flatten().map(|entry| entry.unwrap().path());
    let mut all: Vec<_> = listed.chain([project(), project().join("generators")]).collect();
    all.retain(|directory| directory.join("src").is_dir());
    all.sort();
    assert!(all.len() > 5 || std::env::var_os("ARCHITECTURE_OF").is_some(), "only these crates were found: {all:?}");
    all
}

fn manifest(directory: &Path) -> toml::Table {
    fs::read_to_string(directory.join("Cargo.toml")).unwrap().parse().unwrap()
}

fn name(manifest: &toml::Table) -> String {
    manifest["package"]["name"].as_str().unwrap().to_owned()
}

#[test]
fn manifests_are_as_the_architecture_page_lists_them() {
    let manifests: Vec<_> = crates().iter().map(|directory| manifest(directory)).collect();
    let ours: BTreeSet<_> = manifests.iter().map(name).collect();
    let uses = |manifest: &toml::Table| -> BTreeSet<String> {
        let dependencies = manifest.get("dependencies").and_then(toml::Value::as_table);
        dependencies.into_iter().flat_map(toml::Table::keys).filter(|name| ours.contains(*name)).cloned().collect()
    };
    let found: Graph = manifests.iter().map(|manifest| (name(manifest), uses(manifest))).collect();

    let page = fs::read_to_string(project().join("docs/architecture.md")).unwrap();
    let (_, section) = page.split_once("\n## Crates\n").expect("docs/architecture.md has a section Crates");
    let section = section.split("\n## ").next().unwrap();
    let names = |cell: &str| -> BTreeSet<String> {
        cell.split('`').skip(1).step_by(2).filter(|name| ours.contains(*name)).map(str::to_owned).collect()
    };
    let rows = section.lines().filter_map(|line| {
        let cells: Vec<_> = line.strip_prefix("| `")?.trim_end_matches(" |").split(" | ").collect();
        let name = cells.first()?.split('`').next()?;
        Some((name.to_owned(), names(cells.last()?)))
    });
    assert_eq!(found, rows.collect::<Graph>(), "the manifests, then the table of docs/architecture.md");
    assert_eq!(circles(&found), Vec::<Vec<String>>::new());
}

#[test]
fn no_two_files_import_each_other() {
    for directory in crates() {
        let graph = imports(&directory.join("src"));
        assert!(!graph.is_empty(), "{} has no sources", directory.display());
        assert_eq!(circles(&graph), Vec::<Vec<String>>::new(), "in {}", directory.display());
    }
}

#[test]
#[ignore = "prints figures, checks nothing"]
fn print_circles() {
    for directory in crates() {
        for circle in circles(&imports(&directory.join("src"))) {
            println!("circle: {}", circle.join(", "));
        }
    }
}

#[test]
fn a_circle_is_found() {
    let graph = |edges: &[(&str, &str)]| {
        let mut graph = Graph::new();
        for (from, to) in edges {
            graph.entry((*from).to_owned()).or_default().insert((*to).to_owned());
        }
        graph
    };
    assert_eq!(circles(&graph(&[("a", "b"), ("b", "c"), ("a", "c")])), Vec::<Vec<String>>::new());
    assert_eq!(circles(&graph(&[("a", "b"), ("b", "c"), ("c", "b"), ("d", "d")])), [["b", "c"]]);
}

/// Returns each group of names that reach each other.
fn circles(graph: &Graph) -> Vec<Vec<String>> {
    let reached: BTreeMap<&String, BTreeSet<&String>> = graph
        .keys()
        .map(|start| {
            let (mut seen, mut open) = (BTreeSet::new(), vec![start]);
            while let Some(name) = open.pop() {
                open.extend(graph.get(name).into_iter().flatten().filter(|next| seen.insert(*next)));
            }
            (start, seen)
        })
        .collect();
    let mut groups = BTreeSet::new();
    for (name, below) in &reached {
        let circle = below.iter().filter(|other| reached.get(**other).is_some_and(|back| back.contains(*name)));
        let circle: Vec<String> = circle.map(|other| (*other).clone()).collect();
        if circle.len() > 1 {
            groups.insert(circle);
        }
    }
    groups.into_iter().collect()
}

/// Returns the imports of each source file, by module path. Imports of a module's root file from its own submodules do not
/// count. An import from a root file counts as one from the file that the root file re-exports.
fn imports(source: &Path) -> Graph {
    let mut files = BTreeMap::new();
    collect(source, source, &mut files);
    let reexports: BTreeMap<_, _> = files.iter().map(|(module, (_, file))| (module.clone(), reexports(file))).collect();
    let mut graph = Graph::new();
    for (module, (_, file)) in &files {
        let mut paths = Paths(Vec::new());
        paths.visit_file(file);
        let targets = paths.0.iter().filter_map(|path| target(module, path, &files, &reexports));
        let own = format!("{module}::");
        let targets = targets.filter(|target| target != module && !target.starts_with(&own));
        graph.insert(module.clone(), targets.collect());
    }
    graph
}

type Files = BTreeMap<String, (PathBuf, syn::File)>;

fn collect(top: &Path, directory: &Path, files: &mut Files) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(top, &path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") && !is_test(&path) {
            let relative = path.strip_prefix(top).unwrap().with_extension("");
            let parts = relative.components().map(|part| part.as_os_str().to_str().unwrap());
            let parts = parts.filter(|part| !["mod", "lib", "main"].contains(part));
            let module = ["crate"].into_iter().chain(parts).collect::<Vec<_>>().join("::");
            files.insert(module, (path.clone(), syn::parse_file(&fs::read_to_string(&path).unwrap()).unwrap()));
        }
    }
}

fn is_test(path: &Path) -> bool {
    let name = path.file_stem().and_then(|name| name.to_str()).unwrap();
    name == "tests" || name.ends_with("_tests") || path.components().any(|part| part.as_os_str() == "tests")
}

/// Returns the paths that a module's root file re-exports, by the last name.
fn reexports(file: &syn::File) -> BTreeMap<String, Vec<String>> {
    let uses = file.items.iter().filter_map(|item| match item {
        syn::Item::Use(item) if !matches!(item.vis, syn::Visibility::Inherited) => Some(&item.tree),
        _ => None,
    });
    let mut all = Vec::new();
    uses.for_each(|tree| flatten(tree, &mut Vec::new(), &mut all));
    all.into_iter().filter_map(|path| Some((path.last()?.clone(), path))).collect()
}

fn flatten(tree: &syn::UseTree, prefix: &mut Vec<String>, all: &mut Vec<Vec<String>>) {
    match tree {
        syn::UseTree::Path(path) => {
            prefix.push(path.ident.to_string());
            flatten(&path.tree, prefix, all);
            prefix.pop();
        }
        syn::UseTree::Group(group) => group.items.iter().for_each(|tree| flatten(tree, prefix, all)),
        syn::UseTree::Name(name) => all.push(prefix.iter().cloned().chain([name.ident.to_string()]).collect()),
        syn::UseTree::Rename(name) => all.push(prefix.iter().cloned().chain([name.ident.to_string()]).collect()),
        syn::UseTree::Glob(_) => all.push(prefix.clone()),
    }
}

/// All paths of a file, those in its tests excepted.
struct Paths(Vec<Vec<String>>);

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        let is_test = |attribute: &syn::Attribute| {
            attribute.path().is_ident("cfg")
                && matches!(&attribute.meta, syn::Meta::List(list) if list.tokens.to_string().contains("test"))
        };
        if !item.attrs.iter().any(is_test) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        flatten(&item.tree, &mut Vec::new(), &mut self.0);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.0.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }
}

/// Returns the file that holds the item that `path`, written in `module`, names.
fn target(
    module: &str,
    path: &[String],
    files: &Files,
    reexports: &BTreeMap<String, BTreeMap<String, Vec<String>>>,
) -> Option<String> {
    let mut at = match path.first()?.as_str() {
        "crate" => "crate".to_owned(),
        "super" => module.rsplit_once("::")?.0.to_owned(),
        "self" => module.to_owned(),
        _ => return None,
    };
    let mut rest = path[1..].iter().peekable();
    while rest.next_if(|part| *part == "super").is_some() {
        at = at.rsplit_once("::")?.0.to_owned();
    }
    for part in rest {
        let below = format!("{at}::{part}");
        if files.contains_key(&below) {
            at = below;
        } else if let Some(path) = reexports.get(&at).and_then(|names| names.get(part)) {
            // A root file names its submodules without a prefix.
            let mut full = path.clone();
            if !["crate", "self", "super"].contains(&full[0].as_str()) {
                full.insert(0, "self".to_owned());
            }
            return target(&at, &full, files, reexports).or(Some(at));
        } else {
            break;
        }
    }
    Some(at)
}
