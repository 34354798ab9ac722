//! Deploys an image of the node store to the ostree sysroot of a disk.
//!
//! libostree writes the objects, the deployment, its `/etc` and the boot loader entries. This crate checks first that all
//! of it fits, and decides which objects, refs and kernel arguments the disk gets. It fetches nothing, mounts nothing and
//! does not know the phases of a pivot.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use disk_deploy::{Request, deploy};
//! use node_store::image::ResolvedImage;
//! use node_store::store::NodeStore;
//! use ostree::gio;
//!
//! # fn example(store: &NodeStore, image: &ResolvedImage) -> Result<(), disk_deploy::DeployError> {
//! let request = Request { sysroot: "/mnt".into(), stateroot: "node".into(), ..Request::default() };
//! let deployed = deploy(store, image, &request, &|percent| println!("{percent} %"), &gio::Cancellable::new())?;
//! println!("the next boot of that disk is {}", deployed.commit);
//! # Ok(())
//! # }
//! ```

mod content;
mod error;
mod guard;
mod reference;
mod seal;
mod space;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use node_store::image::ResolvedImage;
use node_store::store::{NodeStore, ObjectId};
use ostree::prelude::CancellableExtManual;
use ostree::{gio, glib};
use tracing::{info, warn};

pub use error::DeployError;
pub use reference::{BadReference, OstreeReference};

use content::Content;
use error::failed;
use seal::Sealer;

/// The key in the origin of a deployment that names its image.
const ORIGIN_KEY: &str = "container-image-reference";
/// Name of the image in a deployment that a composefs root is mounted from. libostree writes it.
const COMPOSEFS_IMAGE: &str = ".ostree.cfs";
/// Pause between two attempts to lock the sysroot.
const LOCK_PAUSE: Duration = Duration::from_millis(500);

/// A deployment to make.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// Directory with the sysroot: the root file system of the disk.
    pub sysroot: PathBuf,
    /// Name of an existing stateroot.
    pub stateroot: String,
    /// Kernel arguments that are added to those of the previous deployment.
    pub kernel_args: Vec<String>,
    /// Image that updates of the disk follow. By default, the node image by digest.
    pub imgref: Option<OstreeReference>,
    /// Enables fs-verity on the objects also if the configuration of the repo does not ask for it: the system that runs from
    /// the sysroot reads no others.
    pub must_seal: bool,
}

/// A finished deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deployed {
    /// Its commit.
    pub commit: ObjectId,
    /// Objects that were written.
    pub objects: usize,
    /// Size of these objects in bytes.
    pub bytes: u64,
    /// True if the disk had the deployment already, so that nothing was written.
    pub existed: bool,
}

/// Deploys `image` from `store`. After a success, the next boot of the disk is the image, and all of it is on the disk.
///
/// `progress` gets the percentage of the objects that are written, when it changes. A repeated call changes nothing. A call
/// that was killed is repeated: it continues with the missing objects.
///
/// # Errors
/// [`DeployError::Failed`] and [`DeployError::Cancelled`] can follow writes; all other errors are found before the first one,
/// except that objects of an earlier call may have got their names. After any failure, the disk boots as before.
pub fn deploy(
    store: &NodeStore,
    image: &ResolvedImage,
    request: &Request,
    progress: &dyn Fn(usize),
    cancel: &gio::Cancellable,
) -> Result<Deployed, DeployError> {
    let imgref = match &request.imgref {
        Some(imgref) => imgref.clone(),
        None => OstreeReference::of(image),
    };
    if let Some(arg) = request.kernel_args.iter().find(|arg| !is_kernel_arg(arg)) {
        return Err(DeployError::KernelArg(arg.clone()));
    }
    let content = Content::of(store, image)?;
    let sysroot = open(request)?;
    let _lock = Lock::take(&sysroot, cancel)?;
    // Another process may have deployed meanwhile.
    sysroot.load_if_changed(Some(cancel)).map_err(failed("read the sysroot"))?;
    let sealer = Sealer::of(&request.sysroot, request.must_seal || content.must_seal(cancel)?)?;
    if let Some(found) = existing(&sysroot, &content, request, &imgref, sealer, cancel)? {
        return Ok(found);
    }
    if sysroot.deployments().is_empty()
        && let Some(deployment) = guard::unlisted(&request.sysroot, &content.commit)
    {
        return Err(DeployError::NoBoot { path: request.sysroot.clone(), deployment });
    }
    content::finish_staged(&sysroot.repo(), cancel)?;
    let missing = content.missing_in(&sysroot.repo(), sealer, cancel)?;
    space::check(&sysroot, &content.repo, &content.commit, &missing, cancel)?;
    info!("writing {} objects to {}", missing.count, request.sysroot.display());
    content.write(&missing, &sysroot.repo(), sealer, &imgref, progress, cancel)?;
    info!("writing the deployment to {}", request.sysroot.display());
    write_deployment(&sysroot, &content.commit, request, &imgref, sealer, cancel)?;
    Ok(Deployed { commit: content.commit, objects: missing.count, bytes: missing.bytes, existed: false })
}

/// Returns true if `sysroot` is that of the running system, through whatever mount or link. To deploy there, the caller makes
/// `/sysroot` and `/boot` writable, and the request names the root directory.
pub fn is_running_system(sysroot: &Path) -> bool {
    guard::is_same_repo(sysroot, &["/", "/sysroot"])
}

/// Returns the image of the deployment that the running system boots next, or `None` if that is the booted deployment, or not
/// an image. Deployments of other programs count, too.
pub fn next_image() -> Option<String> {
    let sysroot = ostree::Sysroot::new(Some(&gio::File::for_path("/")));
    sysroot.load(gio::Cancellable::NONE).ok()?;
    let (booted, next) = (sysroot.booted_deployment()?, sysroot.deployments().into_iter().next()?);
    let origin = next.origin().filter(|_| next.index() != booted.index())?;
    origin.string("origin", ORIGIN_KEY).ok().map(|image| image.to_string())
}

/// Starts GLib's thread that watches programs, unless it runs. It stays in the mount namespace of its first caller, which may
/// be the private one of a deployment that runs bubblewrap.
pub fn start_watcher() {
    let program = gio::Subprocess::newv(&[OsStr::new("true")], gio::SubprocessFlags::NONE);
    if let Err(error) = program.and_then(|program| program.wait(gio::Cancellable::NONE)) {
        warn!("cannot run the program true: {error}; the private mounts of a deployment may stay until the agent ends");
    }
}

/// Returns true for one argument that can be in a boot loader entry. With white space it would become several, so that a
/// repeated call would not find it; a line feed would begin another key of the entry.
fn is_kernel_arg(arg: &str) -> bool {
    let is_word = !arg.is_empty() && !arg.contains(|letter: char| letter.is_whitespace() || letter.is_control());
    is_word && !arg.starts_with("ostree=")
}

/// Opens the sysroot and refuses one that cannot get a deployment.
fn open(request: &Request) -> Result<ostree::Sysroot, DeployError> {
    let sysroot = ostree::Sysroot::new(Some(&gio::File::for_path(&request.sysroot)));
    let (loaded, path) = (sysroot.load(gio::Cancellable::NONE), request.sysroot.clone());
    // libostree would remove a booted deployment that it does not find. It finds one only in the root directory.
    if is_running_system(&path)
        && (loaded.is_err() || sysroot.booted_deployment().is_none() || space::is_read_only(&path)?)
    {
        return Err(DeployError::Booted(path));
    }
    loaded.map_err(|source| DeployError::NoSysroot { path: path.clone(), source })?;
    let name = &request.stateroot;
    // The name becomes part of a path.
    let is_name = !name.is_empty() && !name.starts_with('.') && !name.contains('/');
    if !is_name || !request.sysroot.join("ostree/deploy").join(name).is_dir() {
        return Err(DeployError::NoStateroot { path: request.sysroot.clone(), name: name.clone() });
    }
    if sysroot.repo().mode() != ostree::RepoMode::Bare {
        return Err(DeployError::Mode(path));
    }
    Ok(sysroot)
}

/// Returns the deployment that boots next if it is the requested one. An earlier release, or another program, may have written
/// it without the fs-verity that it needs: libostree enables it only on what it writes itself.
fn existing(
    sysroot: &ostree::Sysroot,
    content: &Content,
    request: &Request,
    imgref: &OstreeReference,
    sealer: Sealer,
    cancel: &gio::Cancellable,
) -> Result<Option<Deployed>, DeployError> {
    let Some(first) = sysroot.deployments().into_iter().next() else { return Ok(None) };
    let origin = first.origin().and_then(|origin| origin.string("origin", ORIGIN_KEY).ok());
    let is_same = first.osname() == request.stateroot.as_str()
        && first.csum() == content.commit.to_string().as_str()
        && origin.is_some_and(|origin| origin == imgref.to_string().as_str());
    let present = kernel_args(Some(&first), &[]);
    let has_args = request.kernel_args.iter().all(|arg| present.contains(arg));
    let found = is_same
        && has_args
        && !sealer.misses(&composefs_image(sysroot, request, &first))
        && (sealer != Sealer::Must || content.missing_in(&sysroot.repo(), sealer, cancel)?.seals == 0);
    Ok(found.then_some(Deployed { commit: content.commit, objects: 0, bytes: 0, existed: true }))
}

/// Returns the path of the composefs image of a deployment. Not all have one.
fn composefs_image(sysroot: &ostree::Sysroot, request: &Request, deployment: &ostree::Deployment) -> PathBuf {
    request.sysroot.join(sysroot.deployment_dirpath(deployment)).join(COMPOSEFS_IMAGE)
}

/// Returns the kernel arguments of a deployment without the one that libostree sets itself, and those of `more` that it
/// lacks.
fn kernel_args(deployment: Option<&ostree::Deployment>, more: &[String]) -> Vec<String> {
    let options = deployment.and_then(|deployment| deployment.bootconfig()?.get("options"));
    let present = ostree::KernelArgs::from_string(options.as_deref().unwrap_or_default()).to_strv();
    let mut args: Vec<String> =
        present.iter().map(ToString::to_string).filter(|arg| !arg.starts_with("ostree=")).collect();
    for arg in more {
        if !args.contains(arg) {
            args.push(arg.clone());
        }
    }
    args
}

/// Writes the deployment and makes it the one that boots next. libostree merges `/etc` of the previous deployment of the
/// stateroot, which stays for a rollback, and syncs the file systems. After that, the call succeeds, because the disk boots
/// the deployment: the boot loader entries are written without a cancellation, and a failure of the cleanup is logged.
fn write_deployment(
    sysroot: &ostree::Sysroot,
    commit: &ObjectId,
    request: &Request,
    imgref: &OstreeReference,
    sealer: Sealer,
    cancel: &gio::Cancellable,
) -> Result<(), DeployError> {
    let stateroot = Some(request.stateroot.as_str());
    let previous = sysroot.merge_deployment(stateroot);
    let origin = glib::KeyFile::new();
    origin.set_string("origin", ORIGIN_KEY, &imgref.to_string());
    let args = kernel_args(previous.as_ref(), &request.kernel_args);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let options = ostree::SysrootDeployTreeOpts { override_kernel_argv: Some(&args), ..Default::default() };
    let written = sysroot
        .deploy_tree_with_options(
            stateroot,
            &commit.to_string(),
            Some(&origin),
            previous.as_ref(),
            Some(&options),
            Some(cancel),
        )
        .map_err(failed("write the deployment"))?;
    sealer.file(&composefs_image(sysroot, request, &written))?;
    let flags = ostree::SysrootSimpleWriteDeploymentFlags::NO_CLEAN;
    sysroot
        .simple_write_deployment(stateroot, &written, previous.as_ref(), flags, gio::Cancellable::NONE)
        .map_err(failed("write the boot loader entries"))?;
    if let Err(error) = sysroot.cleanup(gio::Cancellable::NONE) {
        warn!("cannot remove unused deployments and objects of the disk: {error}; the next deployment repeats it");
    }
    Ok(())
}

/// The lock of a sysroot, released when dropped.
struct Lock<'a>(&'a ostree::Sysroot);

impl<'a> Lock<'a> {
    /// Waits for the lock, until the call is cancelled.
    fn take(sysroot: &'a ostree::Sysroot, cancel: &gio::Cancellable) -> Result<Self, DeployError> {
        let mut is_first = true;
        while !sysroot.try_lock().map_err(failed("lock the sysroot"))? {
            if std::mem::take(&mut is_first) {
                info!("waiting for another process that holds the lock of the sysroot");
            }
            std::thread::sleep(LOCK_PAUSE);
            cancel.set_error_if_cancelled().map_err(failed("lock the sysroot"))?;
        }
        Ok(Self(sysroot))
    }
}

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        self.0.unlock();
    }
}

#[cfg(test)]
mod tests {
    use super::is_kernel_arg;

    #[test]
    fn kernel_arguments_are_single_words() {
        for arg in ["quiet", "root=UUID=1", "a=\"b\"", "ostree.prepare-root.composefs=0"] {
            assert!(is_kernel_arg(arg), "{arg}");
        }
        for arg in ["", "a b", "a\nlinux /evil", "a\tb", "ostree=/ostree/boot.1/x", "a\u{7f}"] {
            assert!(!is_kernel_arg(arg), "{arg:?}");
        }
    }
}
