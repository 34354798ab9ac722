//! Plans the users and groups that a node image has in its passwd and group files, and not in sysusers.d.
//!
//! The merge of `/etc` keeps the machine's `/etc/passwd`. System accounts that are new in the node image are added with
//! the image's ids, because the image's files belong to these ids. An account whose id or name is taken is reported and
//! not added.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::sysusers;
use support::if_found;

/// Ids of system accounts, as in login.defs(5) of the supported systems, without root's 0.
const SYSTEM: std::ops::RangeInclusive<u32> = 1..=999;

/// A line of passwd(5), without the password.
#[derive(Debug, Clone, PartialEq, Eq)]
struct User {
    name: String,
    id: u32,
    group: u32,
    comment: String,
    home: String,
    shell: String,
}

/// A line of group(5), without the password.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    name: String,
    id: u32,
    members: Vec<String>,
}

/// Users and groups of one system.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accounts {
    users: Vec<User>,
    groups: Vec<Group>,
}

/// The decisions about the accounts that only the node image has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AccountPlan {
    /// Users to add.
    pub users: Vec<String>,
    /// Groups to add.
    pub groups: Vec<String>,
    /// A line for each account that is not added, with the reason.
    pub left: Vec<String>,
    /// The additions as lines of sysusers.d(5).
    lines: Vec<String>,
}

impl Accounts {
    /// Parses passwd(5) and group(5). Lines with another number of fields, and those of NIS, are skipped.
    fn parse(passwd: &str, group: &str) -> Self {
        let user = |line: &str| {
            let [name, _, id, group, comment, home, shell] = fields(line)?;
            let (id, group) = (id.parse().ok()?, group.parse().ok()?);
            Some(User { name, id, group, comment, home, shell })
        };
        let group_line = |line: &str| {
            let [name, _, id, members] = fields(line)?;
            let members = members.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
            Some(Group { name, id: id.parse().ok()?, members })
        };
        Self {
            users: passwd.lines().filter_map(user).collect(),
            groups: group.lines().filter_map(group_line).collect(),
        }
    }

    /// Reads `passwd` and `group` of each directory. A missing file has no accounts.
    pub fn read(directories: &[&Path]) -> Result<Self> {
        let mut all = Self::default();
        for directory in directories {
            let text = |name: &str| read(&directory.join(name));
            let Self { users, groups } = Self::parse(&text("passwd")?, &text("group")?);
            all.users.extend(users);
            all.groups.extend(groups);
        }
        Ok(all)
    }

    fn user(&self, name: &str) -> Option<&User> {
        self.users.iter().find(|user| user.name == name)
    }

    fn group(&self, name: &str) -> Option<&Group> {
        self.groups.iter().find(|group| group.name == name)
    }
}

fn fields<const N: usize>(line: &str) -> Option<[String; N]> {
    let fields: Vec<String> = line.split(':').map(str::to_owned).collect();
    fields.try_into().ok()
}

fn read(path: &Path) -> Result<String> {
    // A symbolic link is not followed: it would be resolved in the running system, not in the given one.
    let text = fs::symlink_metadata(path).and_then(|file| if file.is_file() { fs::read(path) } else { Ok(Vec::new()) });
    let text = if_found(text).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(String::from_utf8_lossy(&text.unwrap_or_default()).into_owned())
}

/// Plans the accounts to add. `booted` has the defaults of the booted system: if `/etc` lacks one of them, an administrator
/// deleted it. `new_usr` is the node image's `/usr`, `nsswitch` the text of `/etc/nsswitch.conf` after the merge.
///
/// # Errors
/// A file cannot be read.
pub fn plan_accounts(booted: &Accounts, new_usr: &Path, etc: &Path, nsswitch: &str) -> Result<AccountPlan> {
    let (defaults, library) = (new_usr.join("etc"), new_usr.join("lib"));
    let image = Accounts::read(&[&defaults, &library])?;
    let machine = match has_altfiles(nsswitch) {
        true => Accounts::read(&[etc, &library])?,
        false => Accounts::read(&[etc])?,
    };
    Ok(decide(booted, &image, machine))
}

/// Returns true if users and groups are also looked up in `/usr/lib` (nss-altfiles).
fn has_altfiles(nsswitch: &str) -> bool {
    let has = |database: &str| {
        let lines = nsswitch.lines().filter_map(|line| line.trim().strip_prefix(database)?.trim().strip_prefix(':'));
        lines.flat_map(str::split_whitespace).any(|source| source == "altfiles")
    };
    has("passwd") && has("group")
}

/// Decides about each account of the image. Added accounts count as the machine's for the following ones.
fn decide(booted: &Accounts, image: &Accounts, mut machine: Accounts) -> AccountPlan {
    let mut plan = AccountPlan::default();
    for group in image.groups.iter().filter(|group| booted.group(&group.name).is_none()) {
        match group_problem(group, &machine) {
            Problem::Exists => {}
            Problem::Left(why) => plan.left.push(format!("group {} of the node image is not added: {why}", group.name)),
            Problem::None => {
                plan.groups.push(group.name.clone());
                plan.lines.push(format!("g {} {}", group.name, group.id));
                machine.groups.push(Group { members: Vec::new(), ..group.clone() });
            }
        }
    }
    for user in image.users.iter().filter(|user| booted.user(&user.name).is_none()) {
        match user_problem(user, image, &machine) {
            Problem::Exists => {}
            Problem::Left(why) => plan.left.push(format!("user {} of the node image is not added: {why}", user.name)),
            Problem::None => {
                plan.users.push(user.name.clone());
                plan.lines.push(user_line(user));
                machine.users.push(user.clone());
            }
        }
    }
    for group in image.groups.iter().filter(|group| machine.group(&group.name).is_some_and(|one| one.id == group.id)) {
        let added = plan.groups.contains(&group.name);
        let members =
            group.members.iter().filter(|name| plan.users.contains(name) || added && machine.user(name).is_some());
        plan.lines.extend(members.map(|name| format!("m {name} {}", group.name)));
    }
    plan
}

/// The reason not to add an account.
enum Problem {
    None,
    Exists,
    Left(String),
}

fn group_problem(group: &Group, machine: &Accounts) -> Problem {
    let holder = machine.groups.iter().find(|other| other.id == group.id).map(|other| other.name.as_str());
    problem(&group.name, group.id, machine.group(&group.name).map(|group| group.id), holder)
}

fn user_problem(user: &User, image: &Accounts, machine: &Accounts) -> Problem {
    let holder = machine.users.iter().find(|other| other.id == user.id).map(|other| other.name.as_str());
    match problem(&user.name, user.id, machine.user(&user.name).map(|user| user.id), holder) {
        Problem::None => {}
        other => return other,
    }
    match image.groups.iter().find(|group| group.id == user.group) {
        None => Problem::Left(format!("its group id {} has no name in the node image", user.group)),
        Some(group) if machine.group(&group.name).is_some_and(|own| own.id == group.id) => Problem::None,
        Some(group) => Problem::Left(format!("its group {} does not have the id {} here", group.name, group.id)),
    }
}

/// Checks name and id: `own` is the id that the machine has for the name, `holder` the name that it has for the id.
fn problem(name: &str, id: u32, own: Option<u32>, holder: Option<&str>) -> Problem {
    match (own, holder) {
        (Some(own), _) if own == id => Problem::Exists,
        (Some(own), _) => Problem::Left(format!("the machine has it with the id {own}, the node image with {id}")),
        _ if !is_name(name) => Problem::Left("its name is not valid".to_owned()),
        _ if !SYSTEM.contains(&id) => Problem::Left(format!("{id} is not the id of a system account")),
        (None, Some(holder)) => Problem::Left(format!("its id {id} belongs to {holder} here")),
        (None, None) => Problem::None,
    }
}

/// Returns true for a name that useradd(8) accepts.
fn is_name(name: &str) -> bool {
    let rest = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    let first = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
    first && name.len() < 32 && name.bytes().all(rest)
}

fn user_line(user: &User) -> String {
    let quoted = |text: &str| match text {
        "" => "-".to_owned(),
        text => format!("\"{}\"", text.replace('%', "%%").replace('\\', "\\\\").replace('"', "\\\"")),
    };
    let [comment, home, shell] = [&user.comment, &user.home, &user.shell].map(|text| quoted(text));
    format!("u {} {}:{} {comment} {home} {shell}", user.name, user.id, user.group)
}

impl AccountPlan {
    /// Adds the accounts to the system at `root`, with locked passwords. Returns a line for each that failed.
    pub async fn apply(&self, root: &Path) -> Vec<String> {
        sysusers::apply_lines(root, &self.lines).await
    }
}

#[cfg(test)]
#[path = "accounts_tests.rs"]
mod tests;
