#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn accounts(users: &[&str], groups: &[&str]) -> Accounts {
    let passwd: Vec<_> = users.iter().map(|user| format!("{user}:comment:/home:/bin/sh")).collect();
    let group: Vec<_> = groups
        .iter()
        .map(|group| match group.matches(':').count() {
            2 => format!("{group}:"),
            _ => (*group).to_owned(),
        })
        .collect();
    Accounts::parse(&passwd.join("\n"), &group.join("\n"))
}

const USER: &str = "u new 300:300 \"comment\" \"/home\" \"/bin/sh\"";

fn assert_plan(image: &Accounts, booted: &Accounts, machine: Accounts, lines: &[&str], left: &str) {
    let plan = decide(booted, image, machine);
    let left = Vec::from_iter((!left.is_empty()).then(|| left.to_owned()));
    assert_eq!((plan.lines, plan.remarks), (owned(lines), left), "{image:?}");
}

fn owned(lines: &[&str]) -> Vec<String> {
    lines.iter().map(|&line| line.to_owned()).collect()
}

#[test]
fn accounts_that_only_the_image_has_are_added() {
    for (image, booted, machine, lines, left) in [
        // Added with its group.
        (
            accounts(&["new:x:300:300"], &["new:x:300"]),
            accounts(&[], &[]),
            accounts(&["root:x:0:0"], &["root:x:0"]),
            vec!["g new 300", USER],
            "",
        ),
        // The machine has it already.
        (
            accounts(&["new:x:300:300"], &["new:x:300"]),
            accounts(&[], &[]),
            accounts(&["new:x:300:300"], &["new:x:300"]),
            vec![],
            "",
        ),
        // An administrator deleted it.
        (
            accounts(&["new:x:300:300"], &["new:x:300"]),
            accounts(&["new:x:300:300"], &["new:x:300"]),
            accounts(&["root:x:0:0"], &["root:x:0"]),
            vec![],
            "",
        ),
        // The machine has its group, and another one that it is a member of.
        (
            accounts(&["new:x:300:300"], &["new:x:300", "wheel:x:10:new,core", "other:x:11:new"]),
            accounts(&[], &[]),
            accounts(&["core:x:1000:1000"], &["new:x:300", "wheel:x:10", "other:x:12"]),
            vec![USER, "m new wheel", "m new other"],
            "group other of the node image is not added: the machine has it with the id 12, the node image with 11",
        ),
        // Members of a new group that exist here.
        (
            accounts(&[], &["docker:x:400:core,absent"]),
            accounts(&[], &[]),
            accounts(&["core:x:1000:1000"], &[]),
            vec!["g docker 400", "m core docker"],
            "",
        ),
    ] {
        assert_plan(&image, &booted, machine, &lines, left);
    }
}

#[test]
fn accounts_whose_id_is_taken_get_a_free_one() {
    for (image, machine, lines, left) in [
        // Another user has the id.
        (
            accounts(&["new:x:300:300"], &["new:x:300"]),
            accounts(&["own:x:300:301"], &["own:x:301"]),
            vec!["g new 300", "u new 999:300 \"comment\" \"/home\" \"/bin/sh\""],
            "user new of the node image has the id 999 here: its id 300 belongs to own, and files of the node image with \
             that id belong to it",
        ),
        // Another group has it. The user follows the group by its name. Ids of both systems are not free.
        (
            accounts(&["new:x:300:301"], &["new:x:301", "last:x:998"]),
            accounts(&["core:x:1000:999"], &["own:x:301"]),
            vec!["g new 997", "g last 998", "u new 300:997 \"comment\" \"/home\" \"/bin/sh\""],
            "group new of the node image has the id 997 here: its id 301 belongs to own, and files of the node image with \
             that id belong to it",
        ),
        // The machine has the group with another id.
        (
            accounts(&["new:x:300:300"], &["new:x:300"]),
            accounts(&[], &["new:x:310"]),
            vec!["u new 300:310 \"comment\" \"/home\" \"/bin/sh\""],
            "group new of the node image is not added: the machine has it with the id 310, the node image with 300",
        ),
    ] {
        assert_plan(&image, &Accounts::default(), machine, &lines, left);
    }
    let machine: Vec<_> = (1..=999).map(|id| format!("g{id}:x:{id}")).collect();
    let machine = accounts(&[], &machine.iter().map(String::as_str).collect::<Vec<_>>());
    let left =
        "group new of the node image is not added: its id 300 belongs to g300 here, and no id of 201..=999 is free";
    assert_plan(&accounts(&[], &["new:x:300"]), &Accounts::default(), machine, &[], left);
}

#[test]
fn accounts_that_cannot_be_added_are_named() {
    for (image, booted, machine, lines, left) in [
        // An administrator deleted its group.
        (
            accounts(&["new:x:300:300"], &["gone:x:300"]),
            accounts(&[], &["gone:x:300"]),
            accounts(&[], &[]),
            vec![],
            "user new of the node image is not added: its group gone is missing here",
        ),
        // A person's account, root's id, and a group without a name.
        (
            accounts(&["person:x:1000:1000"], &["person:x:1000"]),
            accounts(&[], &["person:x:1000"]),
            accounts(&[], &[]),
            vec![],
            "user person of the node image is not added: 1000 is not the id of a system account",
        ),
        (
            accounts(&["toor:x:0:0"], &[]),
            accounts(&[], &[]),
            accounts(&["root:x:0:0"], &["root:x:0"]),
            vec![],
            "user toor of the node image is not added: 0 is not the id of a system account",
        ),
        (
            accounts(&["new:x:300:300"], &[]),
            accounts(&[], &[]),
            accounts(&["root:x:0:0"], &["root:x:0"]),
            vec![],
            "user new of the node image is not added: its group id 300 has no name in the node image",
        ),
        (
            accounts(&[], &["a b:x:300"]),
            accounts(&[], &[]),
            accounts(&[], &[]),
            vec![],
            "group a b of the node image is not added: its name is not valid",
        ),
    ] {
        assert_plan(&image, &booted, machine, &lines, left);
    }
}

#[test]
fn malformed_lines_are_skipped() {
    let read = Accounts::parse("a:x:1:1:c:/:/bin/sh\n+\n+b::::::\nshort:x:1\nc:x:-1:1:::\n", "g:x:1:a,b\n+\ng2:x\n");
    assert_eq!(read.users.len(), 1);
    assert_eq!(read.groups, [Group { name: "g".into(), id: 1, members: vec!["a".into(), "b".into()] }]);
}

#[test]
fn lines_for_the_tool_are_quoted() {
    let user = User {
        name: "a".into(),
        id: 1,
        group: 2,
        comment: "50% \"x\" \\".into(),
        home: "/a b".into(),
        shell: String::new(),
    };
    assert_eq!(user_line(&user), r#"u a 1:2 "50%% \"x\" \\" "/a b" -"#);
}

#[test]
fn altfiles_count_if_both_databases_name_them() {
    for (text, expected) in [
        ("passwd: files altfiles systemd\ngroup: files altfiles\n", true),
        ("passwd:\tfiles altfiles\ngroup: files\n", false),
        ("# passwd: altfiles\npasswd: files\ngroup: files altfiles\n", false),
        ("", false),
    ] {
        assert_eq!(has_altfiles(text), expected, "{text}");
    }
}

/// All files of a tree and of a machine, applied by the real tool.
#[tokio::test]
async fn the_machine_gets_the_images_accounts() {
    let temp = tempfile::tempdir().unwrap();
    let put = |path: &str, text: &str| {
        let path = temp.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    put("etc/passwd", "root:x:0:0:root:/root:/bin/bash\nown:x:310:310::/:/bin/sh\n+\n");
    put("etc/group", "root:x:0:\nown:x:310:\n");
    put("etc/shadow", "root:*::0:99999:7:::\n");
    put(
        "new/etc/passwd",
        "root:x:0:0:root:/root:/bin/bash\nplain::301:302:a \"b\" 5%:/var/lib/a:/bin/sh\ntaken:x:310:303::/:/bin/sh\n",
    );
    put("new/etc/group", "root:x:0:\nplain:x:302:\nextra:x:303:plain\n");
    put("new/lib/passwd", "lib:x:302:302:Lib:/:/usr/sbin/nologin\n");
    let etc = temp.path().join("etc");
    let plan = |nsswitch: &str| plan_accounts(&Accounts::default(), &temp.path().join("new"), &etc, nsswitch).unwrap();
    let altfiles = plan("passwd: files altfiles\ngroup: files altfiles\n");
    assert_eq!(altfiles.added.users, ["plain", "taken"], "lib is found through nss-altfiles");
    let planned = plan("");
    assert_eq!((planned.added.users.join(" "), planned.remarks.len()), ("plain taken lib".to_owned(), 1));
    assert_eq!(planned.apply(temp.path()).await, [""; 0]);
    let lines = |name: &str| fs::read_to_string(etc.join(name)).unwrap();
    assert!(lines("passwd").contains("\nplain:x:301:302:a \"b\" 5%:/var/lib/a:/bin/sh\n"), "{}", lines("passwd"));
    assert!(lines("passwd").contains("\n+:") && lines("passwd").contains("\nlib:x:302:302:"), "{}", lines("passwd"));
    assert!(lines("passwd").contains("\ntaken:x:999:303:"), "{}", lines("passwd"));
    assert!(
        lines("group").contains("plain:x:302:") && lines("group").contains("extra:x:303:plain"),
        "{}",
        lines("group")
    );
    let password = lines("shadow").lines().find_map(|line| line.strip_prefix("plain:").map(str::to_owned)).unwrap();
    assert!(password.starts_with("!*:"), "an empty password is not taken over: {password}");
    let again = plan("");
    let differs =
        "user taken of the node image is not added: the machine has it with the id 999, the node image with 310";
    assert_eq!((again.lines, again.remarks), (Vec::new(), vec![differs.to_owned()]), "done once");
}

fn some(users: u32) -> impl Strategy<Value = Accounts> {
    let user = ("[a-f]", 298..298 + users, 298..302u32);
    let group = ("[a-f]", 298..302u32, proptest::collection::vec("[a-f]", 0..3));
    (proptest::collection::vec(user, 0..5), proptest::collection::vec(group, 0..5)).prop_map(|(users, groups)| {
        // One line for each name.
        let mut seen = BTreeSet::new();
        let users = users.into_iter().filter(|user| seen.insert(user.0.clone()));
        let users = users
            .map(|(name, id, group)| User {
                name,
                id,
                group,
                comment: String::new(),
                home: "/".into(),
                shell: String::new(),
            })
            .collect();
        let mut seen = BTreeSet::new();
        let groups = groups.into_iter().filter(|group| seen.insert(group.0.clone()));
        let groups = groups.map(|(name, id, members)| Group { name, id, members }).collect();
        Accounts { users, groups }
    })
}

proptest! {
    /// Each new account of the image exists, is added or is reported; names and ids stay unique, and each added user has
    /// the group of its name.
    #[test]
    fn every_new_account_exists_is_added_or_is_reported(booted in some(4), image in some(4), machine in some(4)) {
        let plan = decide(&booted, &image, machine.clone());
        let new = image.users.iter().filter(|user| booted.user(&user.name).is_none());
        for user in new {
            let known = machine.user(&user.name).is_some_and(|own| own.id == user.id);
            let added = plan.added.users.contains(&user.name);
            let left = plan.remarks.iter().any(|line| line.starts_with(&format!("user {} of the node image is not", user.name)));
            prop_assert_eq!(usize::from(known) + usize::from(added) + usize::from(left), 1);
        }
        let lines = |kind: &str| plan.lines.iter().filter_map(|line| line.strip_prefix(kind)).map(str::to_owned).collect::<Vec<_>>();
        let words = |line: &String| line.split([' ', ':']).map(str::to_owned).collect::<Vec<_>>();
        let mut groups: Vec<_> = machine.groups.iter().map(|group| (group.name.clone(), group.id)).collect();
        for line in lines("g ") {
            let line = words(&line);
            let id = line[1].parse().unwrap();
            prop_assert!(groups.iter().all(|own| own.0 != line[0] && own.1 != id));
            groups.push((line[0].clone(), id));
        }
        let mut users: Vec<_> = machine.users.iter().map(|user| (user.name.clone(), user.id)).collect();
        for line in lines("u ") {
            let line = words(&line);
            let (id, group): (u32, u32) = (line[1].parse().unwrap(), line[2].parse().unwrap());
            prop_assert!(users.iter().all(|own| own.0 != line[0] && own.1 != id));
            users.push((line[0].clone(), id));
            let own = image.user(&line[0]).unwrap().group;
            let name = &image.groups.iter().find(|one| one.id == own).unwrap().name;
            prop_assert!(groups.contains(&(name.clone(), group)));
        }
    }
}

#[test]
fn the_line_names_what_is_added() {
    let added = |users: &[&str], groups: &[&str]| AddedAccounts {
        users: users.iter().map(|&name| name.to_owned()).collect(),
        groups: groups.iter().map(|&name| name.to_owned()).collect(),
    };
    assert_eq!(added(&[], &[]).line(), None);
    let line = added(&["a", "b"], &["c"]).line();
    assert_eq!(line.as_deref(), Some("/etc/passwd and /etc/group gain users a b, groups c"));
}
