//! Plans the users and groups that a node image has in its passwd and group files, and not in sysusers.d.
//!
//! The merge of `/etc` keeps the machine's `/etc/passwd`. System accounts that are new in the node image are added with
//! the image's ids, because the image's files belong to these ids. An account whose id is taken gets a free id and is
//! reported. An account whose name is taken is reported and not changed.

use std::collections::BTreeSet;
use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::sysusers;
use support::if_found;

/// Ids of system accounts, as in login.defs(5) of the supported systems, without root's 0.
const SYSTEM: RangeInclusive<u32> = 1..=999;

/// Ids that an account gets whose own id is taken. Lower ids are assigned by distributions.
const FREE: RangeInclusive<u32> = 201..=999;

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

/// Accounts that the refresh adds, as the document of `plan` lists them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddedAccounts {
    /// Users that only the node image has.
    pub users: Vec<String>,
    /// Groups that only the node image has.
    pub groups: Vec<String>,
}

impl AddedAccounts {
    /// Returns one line, or `None` if there is nothing to add.
    pub fn line(&self) -> Option<String> {
        let list = |kind: &str, names: &[String]| match names {
            [] => None,
            names => Some(format!("{kind} {}", names.join(" "))),
        };
        let parts: Vec<_> = list("users", &self.users).into_iter().chain(list("groups", &self.groups)).collect();
        (!parts.is_empty()).then(|| format!("/etc/passwd and /etc/group gain {}", parts.join(", ")))
    }
}

/// The decisions about the accounts that only the node image has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AccountPlan {
    /// The accounts to add.
    pub added: AddedAccounts,
    /// A line for each account that is not added, or that has another id than in the image, with the reason.
    pub remarks: Vec<String>,
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
    let mut taken = [image, &machine].into_iter().flat_map(ids).collect();
    for group in image.groups.iter().filter(|group| booted.group(&group.name).is_none()) {
        let own = machine.group(&group.name).map(|group| group.id);
        let holder = machine.groups.iter().find(|other| other.id == group.id).map(|other| other.name.as_str());
        let found = place(&group.name, group.id, own, holder, &mut taken);
        if let Some(id) = plan.remark("group", &group.name, found) {
            plan.added.groups.push(group.name.clone());
            plan.lines.push(format!("g {} {id}", group.name));
            machine.groups.push(Group { id, members: Vec::new(), name: group.name.clone() });
        }
    }
    for user in image.users.iter().filter(|user| booted.user(&user.name).is_none()) {
        let own = machine.user(&user.name).map(|user| user.id);
        let holder = machine.users.iter().find(|other| other.id == user.id).map(|other| other.name.as_str());
        let group = group_of(user, image, &machine);
        let found = match (own, &group) {
            (None, Err(why)) if SYSTEM.contains(&user.id) => Place::Left(why.clone()),
            _ => place(&user.name, user.id, own, holder, &mut taken),
        };
        if let (Some(id), Ok(group)) = (plan.remark("user", &user.name, found), group) {
            let user = User { id, group, ..user.clone() };
            plan.added.users.push(user.name.clone());
            plan.lines.push(user_line(&user));
            machine.users.push(user);
        }
    }
    for group in image.groups.iter().filter(|group| machine.group(&group.name).is_some()) {
        let added = plan.added.groups.contains(&group.name);
        let members = group
            .members
            .iter()
            .filter(|name| plan.added.users.contains(name) || added && machine.user(name).is_some());
        plan.lines.extend(members.map(|name| format!("m {name} {}", group.name)));
    }
    plan
}

/// Returns the ids of all users and groups.
fn ids(accounts: &Accounts) -> impl Iterator<Item = u32> {
    let users = accounts.users.iter().flat_map(|user| [user.id, user.group]);
    users.chain(accounts.groups.iter().map(|group| group.id))
}

/// The decision about one account.
enum Place {
    /// The machine has it with the same id.
    Exists,
    /// It is added with the image's id.
    Same(u32),
    /// It is added with this id, for this reason.
    Free(u32, String),
    /// It is not added, for this reason.
    Left(String),
}

/// Decides about an account: `own` is the id that the machine has for the name, `holder` the name that it has for the id.
/// A free id is added to `taken`.
fn place(name: &str, id: u32, own: Option<u32>, holder: Option<&str>, taken: &mut BTreeSet<u32>) -> Place {
    match (own, holder) {
        (Some(own), _) if own == id => Place::Exists,
        (Some(own), _) => Place::Left(format!("the machine has it with the id {own}, the node image with {id}")),
        _ if !is_name(name) => Place::Left("its name is not valid".to_owned()),
        _ if !SYSTEM.contains(&id) => Place::Left(format!("{id} is not the id of a system account")),
        (None, None) => Place::Same(id),
        (None, Some(holder)) => match FREE.rev().find(|id| taken.insert(*id)) {
            Some(free) => {
                let files = "files of the node image with that id belong to it";
                Place::Free(free, format!("its id {id} belongs to {holder}, and {files}"))
            }
            None => Place::Left(format!("its id {id} belongs to {holder} here, and no id of {FREE:?} is free")),
        },
    }
}

/// Returns the id that the group of an image's user has on the machine.
fn group_of(user: &User, image: &Accounts, machine: &Accounts) -> Result<u32, String> {
    let group = image.groups.iter().find(|group| group.id == user.group);
    let group = group.ok_or_else(|| format!("its group id {} has no name in the node image", user.group))?;
    machine.group(&group.name).map(|own| own.id).ok_or_else(|| format!("its group {} is missing here", group.name))
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
    /// Returns the id with which an account is added. Adds a line for a decision that the administrator should know.
    fn remark(&mut self, kind: &str, name: &str, place: Place) -> Option<u32> {
        match place {
            Place::Exists => None,
            Place::Same(id) => Some(id),
            Place::Free(id, why) => {
                self.remarks.push(format!("{kind} {name} of the node image has the id {id} here: {why}"));
                Some(id)
            }
            Place::Left(why) => {
                self.remarks.push(format!("{kind} {name} of the node image is not added: {why}"));
                None
            }
        }
    }

    /// Adds the accounts to the system at `root`, with locked passwords. Returns a line for each that failed.
    pub async fn apply(&self, root: &Path) -> Vec<String> {
        sysusers::apply_lines(root, &self.lines).await
    }
}

#[cfg(test)]
#[path = "accounts_tests.rs"]
mod tests;
