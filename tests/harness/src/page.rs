//! The commands of docs/single-node.md, which the tests run.

const PAGE: &str = include_str!("../../../docs/single-node.md");

/// The image that updates of the disk follow, in the command of the page.
pub const FOLLOWED: &str = "ostree-unverified-registry:quay.io/example/node:latest";

/// The blocks of commands on the page, with its placeholders.
pub struct Commands {
    /// Makes the file system of a disk, `DEVICE`, and mounts it at `/mnt`.
    pub file_system: String,
    /// Creates the sysroot at `/mnt`, with the stateroot `NAME`.
    pub sysroot: String,
    /// Deploys to `/mnt`, with a kernel argument and the image [`FOLLOWED`].
    pub deploy: String,
    /// Deploys to the sysroot of the running system, to the stateroot `NAME`.
    pub deploy_own: String,
    /// Deploys the image `IMAGE` to that stateroot by ostree-ext.
    pub ostree_ext: String,
}

/// Returns the commands of the page. Panics if the page has another number of blocks, so that each of them is in
/// [`Commands`].
#[must_use]
pub fn commands() -> Commands {
    let mut blocks = Vec::new();
    let mut is_inside = false;
    for line in PAGE.lines() {
        let is_command = line.starts_with("    ");
        match (is_command, is_inside, blocks.last_mut()) {
            (true, true, Some(block)) => *block = format!("{block}\n{}", line.trim()),
            (true, ..) => blocks.push(line.trim().to_owned()),
            _ => {}
        }
        is_inside = is_command;
    }
    let blocks: Result<[String; 5], _> = blocks.try_into();
    let [file_system, sysroot, deploy, deploy_own, ostree_ext] =
        blocks.unwrap_or_else(|found| panic!("docs/single-node.md has other commands: {found:#?}"));
    Commands { file_system, sysroot, deploy, deploy_own, ostree_ext }
}
