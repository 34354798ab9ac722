#![allow(clippy::unwrap_used)]

use std::path::Path;

use super::*;

/// Builds unit files from directories in descending priority: (path, [(name, entry)]).
fn files(dirs: &[(&str, &[(&str, Entry)])]) -> UnitFiles {
    let directory = |(path, entries): &(&str, &[(&str, Entry)])| UnitDirectory {
        path: (*path).to_owned(),
        entries: entries.iter().map(|(name, entry)| ((*name).to_owned(), entry.clone())).collect(),
    };
    UnitFiles(dirs.iter().map(directory).collect())
}

fn file(text: &str) -> Entry {
    Entry::File(text.to_owned())
}

fn alias(name: &str) -> Entry {
    Entry::Alias(name.to_owned())
}

fn folder(files: &[(&str, Option<&str>)]) -> Entry {
    Entry::Directory(files.iter().map(|(name, text)| ((*name).to_owned(), text.map(str::to_owned))).collect())
}

fn exec(files: &UnitFiles, name: &str) -> Vec<String> {
    files.definition(name).unwrap().values("Service", "ExecStart").to_vec()
}

#[test]
fn a_socket_starts_its_service() {
    for (text, expected) in [
        ("", Some("a-b.service")),
        ("Accept=no\n", Some("a-b.service")),
        ("Accept=yes\n", None),
        ("Accept=no\nService=other.service\n", Some("other.service")),
    ] {
        let text = format!("[Socket]\nListenStream=/run/x\n{text}");
        let socket = files(&[("/d", &[("a-b.socket", file(&text))])]).definition("a-b.socket").unwrap();
        assert_eq!(socket.service_of("a-b.socket").as_deref(), expected, "{text}");
    }
}

#[test]
fn the_first_directory_wins_and_masks() {
    let usr: (&str, &[(&str, Entry)]) =
        ("/usr", &[("a.service", file("[Service]\nExecStart=usr")), ("b.service", file("[Service]\nExecStart=b"))]);
    let both =
        files(&[("/etc", &[("a.service", file("[Service]\nExecStart=etc")), ("b.service", Entry::Masked)]), usr]);
    assert_eq!(exec(&both, "a.service"), ["etc"]);
    assert!(both.definition("b.service").unwrap().masked);
    assert_eq!(both.definition("c.service"), None);
}

#[test]
fn drop_ins_of_all_names_in_order_of_file_name() {
    let all = files(&[
        (
            "/etc",
            &[
                ("a-b@.service.d", folder(&[("20.conf", Some("[Service]\nExecStart=template"))])),
                ("a-b@x.service.d", folder(&[("10.conf", Some("[Service]\nExecStart=instance"))])),
                ("a.service.d", folder(&[("50.conf", Some("[Service]\nExecStart=of a, which is not a prefix"))])),
                ("hidden.service.d", folder(&[("x.conf", None)])),
            ],
        ),
        (
            "/usr",
            &[
                ("a-b@.service", file("[Service]\nExecStart=fragment")),
                ("a-.service.d", folder(&[("30.conf", Some("[Service]\nExecStart=prefix"))])),
                (
                    "service.d",
                    folder(&[
                        ("40.conf", Some("[Service]\nExecStart=kind")),
                        ("readme", Some("[Service]\nExecStart=no")),
                    ]),
                ),
                ("a-b@x.service.d", folder(&[("10.conf", Some("[Service]\nExecStart=hidden by /etc"))])),
                ("hidden.service", file("[Service]\nExecStart=h")),
                ("hidden.service.d", folder(&[("x.conf", Some("[Service]\nExecStart=masked in /etc"))])),
            ],
        ),
    ]);
    assert_eq!(exec(&all, "a-b@x.service"), ["fragment", "instance", "template", "prefix", "kind"]);
    assert_eq!(exec(&all, "a-b@y.service"), ["fragment", "template", "prefix", "kind"]);
    assert_eq!(exec(&all, "hidden.service"), ["h", "kind"]);
}

#[test]
fn aliases_are_one_unit() {
    let all = files(&[
        (
            "/etc",
            &[
                ("sshd.service", alias("ssh.service")),
                ("sshd.service.d", folder(&[("a.conf", Some("[Service]\nExecStart=alias"))])),
                ("autovt@.service", alias("getty@.service")),
                ("autovt@.service.d", folder(&[("a.conf", Some("[Service]\nExecStart=autovt"))])),
                ("getty@tty1.service.d", folder(&[("b.conf", Some("[Service]\nExecStart=tty1"))])),
                ("loop.service", alias("pool.service")),
                ("pool.service", alias("loop.service")),
            ],
        ),
        (
            "/usr",
            &[
                ("ssh.service", file("[Service]\nExecStart=ssh")),
                ("getty@.service", file("[Service]\nExecStart=getty")),
                ("other@.service", file("[Service]\nExecStart=other")),
            ],
        ),
    ]);
    for name in ["ssh.service", "sshd.service"] {
        assert_eq!(exec(&all, name), ["ssh", "alias"], "{name}");
    }
    for name in ["getty@tty1.service", "autovt@tty1.service"] {
        assert_eq!(exec(&all, name), ["getty", "autovt", "tty1"], "{name}");
    }
    assert_eq!(exec(&all, "other@tty1.service"), ["other"], "another template's alias is not its own");
    assert_eq!(all.definition("loop.service"), None);
}

/// Builds two trees with a drop-in of the same name for each of `names`, without the first `hidden` drop-ins.
fn equal_names(names: &[&str], hidden: usize) -> UnitFiles {
    let directory = |path: &str, skipped: usize| {
        let folders = names.iter().skip(skipped).map(|name| {
            let text = format!("[Service]\nExecStart={path}/{name}");
            let files = BTreeMap::from([("c.conf".to_owned(), Some(text))]);
            (format!("{name}.service.d"), Entry::Directory(files))
        });
        UnitDirectory { path: path.to_owned(), entries: folders.collect() }
    };
    UnitFiles(vec![directory("e", hidden.min(names.len())), directory("u", hidden.saturating_sub(names.len()))])
}

#[test]
fn equal_drop_in_names_are_searched_by_directory_first() {
    let names = ["q-r@in", "q-r@", "q-", "q-@in", "q-@"];
    for hidden in 0..2 * names.len() {
        let winner = format!("{}/{}", ["e", "u"][hidden / names.len()], names[hidden % names.len()]);
        assert_eq!(exec(&equal_names(&names, hidden), "q-r@in.service"), [winner]);
    }
}

#[test]
fn hidden_drop_ins_are_ignored() {
    let hidden = folder(&[(".x.conf", Some("[Service]\nExecStart=hidden"))]);
    let all = files(&[("/d", &[("a.service", file("[Service]\nExecStart=a")), ("a.service.d", hidden)])]);
    assert_eq!(exec(&all, "a.service"), ["a"]);
}

#[test]
fn aliases_of_aliases_and_of_instances() {
    let drop_in = |text: &str| folder(&[(&format!("{text}.conf"), Some(&format!("[Service]\nExecStart={text}")))]);
    let all = files(&[
        (
            "/etc",
            &[
                ("a1.service", alias("a.service")),
                ("a2.service", alias("a1.service")),
                ("a2.service.d", drop_in("a2")),
                ("g1@.service", alias("g@.service")),
                ("g1@.service.d", drop_in("g1")),
                ("g@own.service", file("[Service]\nExecStart=own")),
                ("fixed.service", alias("g@foo.service")),
                ("one@x.service", alias("g@.service")),
                ("one@x.service.d", drop_in("one")),
            ],
        ),
        ("/usr", &[("a.service", file("[Service]\nExecStart=a")), ("g@.service", file("[Service]\nExecStart=g"))]),
    ]);
    for (name, expected) in [
        ("a.service", &["a", "a2"] as &[&str]),
        ("a2.service", &["a", "a2"]),
        ("g@y.service", &["g", "g1"]),
        ("g1@y.service", &["g", "g1"]),
        ("g@own.service", &["own"]),
        ("g@x.service", &["g", "g1", "one"]),
        ("one@x.service", &["g", "g1", "one"]),
    ] {
        assert_eq!(exec(&all, name), expected, "{name}");
    }
    assert_eq!(all.definition("fixed.service"), None, "systemd finds no file for a link to an instance");
}

#[test]
fn dependencies_are_resolved_for_the_unit_that_names_them() {
    let all = files(&[(
        "/d",
        &[
            ("m.target", file("[Unit]\nWants=u@i.service v.service\nWants=\n")),
            ("u@.service", file("[Unit]\nWants=a@.service b@%i.service c-%H.service\n")),
            ("v.service", file("[Unit]\nWants=a@.service\n")),
            ("v.service.wants", folder(&[("d@.service", Some(""))])),
            ("service.wants", folder(&[("kind.target", Some(""))])),
        ],
    )]);
    let names: Vec<_> = all.pulled_in("m.target").into_iter().collect();
    let expected = [
        "a@i.service",
        "a@v.service",
        "b@i.service",
        "d@v.service",
        "kind.target",
        "m.target",
        "u@i.service",
        "v.service",
    ];
    assert_eq!(names, expected);
}

#[test]
fn a_target_pulls_in_its_dependencies() {
    let etc: (&str, &[(&str, Entry)]) =
        ("/etc", &[("m.target.wants", folder(&[("j.service", None), ("l.service", Some(""))]))]);
    let usr: (&str, &[(&str, Entry)]) = (
        "/usr",
        &[
            ("m.target", file("[Unit]\nRequires=b.target\nWants=c.service d.service\n")),
            ("m.target.wants", folder(&[("e.service", Some("")), ("j.service", Some("")), ("k.service", None)])),
            ("b.target", file("[Unit]\nWants=m.target\n")),
            ("b.target.requires", folder(&[("alias.service", Some(""))])),
            ("alias.service", alias("f.service")),
            ("f.service", file("[Unit]\nBindsTo=g.socket\nUpholds=h.service\n")),
            ("h.service.upholds", folder(&[("i.service", Some(""))])),
            ("d.service", Entry::Masked),
            ("x.service", file("[Unit]\nWants=y.service\n")),
        ],
    );
    let all = files(&[etc, usr]);
    let names: Vec<_> = all.pulled_in("m.target").into_iter().collect();
    assert_eq!(
        names,
        [
            "b.target",
            "c.service",
            "e.service",
            "f.service",
            "g.socket",
            "h.service",
            "i.service",
            "l.service",
            "m.target"
        ]
    );
}

/// Compares the drop-ins and their order with those that systemd finds.
#[test]
fn drop_ins_are_those_of_systemd() {
    let usr = tempfile::tempdir().unwrap();
    let units = usr.path().join("lib/systemd/system");
    let write = |path: String| {
        let path = units.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let text =
            format!("[Service]\nType=oneshot\nExecStart=/bin/true {}\n", path.strip_prefix(&units).unwrap().display());
        std::fs::write(path, text).unwrap();
    };
    let fragments = ["nipq-r@", "nipa-b-c", "nipx--y", "nipt-", "nipl", "nipg@", "nipg@own"];
    fragments.iter().for_each(|name| write(format!("{name}.service")));
    for (link, target) in [("nipl1", "nipl"), ("nipl2", "nipl1"), ("nipg1@", "nipg@"), ("nipone@x", "nipg@")] {
        std::os::unix::fs::symlink(format!("{target}.service"), units.join(format!("{link}.service"))).unwrap();
        write(format!("{link}.service.d/{link}.conf"));
    }
    let prefixes =
        ["nipq-r@in", "nipq-r@", "nipq-@in", "nipq-@", "nipq-", "nipq", "nipa-b-", "nipa-", "nipx--", "nipx-"];
    for (index, name) in prefixes.iter().enumerate() {
        write(format!("{name}.service.d/{index}.conf"));
        write(format!("{name}.service.d/same.conf"));
        write(format!("{name}.service.d/.hidden.conf"));
    }
    let files = super::super::files::Root { usr: usr.path().to_owned(), ..Default::default() }.unit_files().unwrap();
    for name in ["nipq-r@in", "nipa-b-c", "nipx--y", "nipt-", "nipl2", "nipg@y", "nipg@own", "nipg@x", "nipone@x"] {
        let name = format!("{name}.service");
        let output = std::process::Command::new("systemd-analyze")
            .args(["verify", "--man=no", "--recursive-errors=no", &name])
            .env("SYSTEMD_UNIT_PATH", &units)
            .env("SYSTEMD_LOG_LEVEL", "debug")
            .output()
            .unwrap();
        let output_text = String::from_utf8_lossy(&output.stdout).into_owned();
        let of_unit = output_text.split("-> Unit ").filter(|unit| unit.contains("Unit Load State: loaded"));
        let paths = |unit: &str| {
            let lines = unit.lines().filter_map(|line| line.trim().strip_prefix("DropIn Path: "));
            Vec::from_iter(lines.map(|path| Path::new(path).strip_prefix(&units).unwrap().display().to_string()))
        };
        let theirs = of_unit.map(paths).max_by_key(Vec::len).unwrap_or_else(|| panic!("{name}: {output:?}"));
        let ours = exec(&files, &name).into_iter().skip(1).map(|exec| exec.replace("/bin/true ", ""));
        assert_eq!(ours.collect::<Vec<_>>(), theirs, "{name}");
    }
}
