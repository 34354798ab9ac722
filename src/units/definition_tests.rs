#![allow(clippy::unwrap_used)]

use super::*;

/// Directories, the one that wins first: (path, [(name, entry)]).
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
fn syntax() {
    let text = "# c\n ; c\n[Service]\nExecStart=/a \\\n# in the middle\n  b\nEnvironment=X=1\nEnvironment= Y=2 \nUser=u\nUser=\nnonsense\n";
    let definition = files(&[("/d", &[("a.service", file(text))])]).definition("a.service").unwrap();
    assert_eq!(definition.value("Service", "ExecStart"), Some("/a  b"));
    assert_eq!(definition.values("Service", "Environment"), ["X=1", "Y=2"]);
    assert_eq!(definition.value("Service", "User"), None, "an empty value takes back");
    assert_eq!(definition.fragment.as_deref(), Some("/d/a.service"));
}

#[test]
fn the_service_of_a_socket() {
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
                ("a.service.d", folder(&[("50.conf", Some("[Service]\nExecStart=of a, which is no prefix"))])),
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

#[test]
fn what_a_target_pulls_in() {
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
