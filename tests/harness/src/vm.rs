//! A virtual machine under software emulation: boots a live bootimage, or an installed system's disk, with its own
//! kernel and initramfs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::console::Console;
use crate::cuts::Recording;
use crate::disk;
use crate::files::Files;
use crate::guest::{Answer, Guest, ssh};
use crate::images::{Tools, project, work_dir};
use crate::proc::{bound, end, free_port, log_to, succeed, wait_for};

/// Address of the host in the emulator's network.
pub const HOST: &str = "10.0.2.2";

/// The oldest CPU of its kind.
pub const CPU: &str = "qemu64";

/// Label of the ISO file system of a live medium.
const LABEL: &str = "testbed-coreos";

/// The medium that a machine boots from.
#[derive(Clone, Copy)]
pub enum Medium<'a> {
    /// An ISO file system with the root of the bootimage, as of a CD or USB stick.
    Iso,
    /// The root of the bootimage in the initramfs, as a PXE server delivers it.
    Pxe,
    /// An installed system's disk, which the machine writes to, with a deployment that `kargs` name.
    Disk(&'a Path),
}

/// A file, the id of its drive, and options of its file.
type Drive = (PathBuf, &'static str, &'static str);

/// Ignores flushes of the guest. The end of the emulator loses only what the guest holds in its own caches.
const WRITABLE: &str = "cache.no-flush=on";

impl Medium<'_> {
    /// Returns the drives with their ids and options, and the kernel arguments.
    fn drives(self, boot: &Path, work: &Path, initrd: &Path) -> Result<(Vec<Drive>, String)> {
        let script = |form: &str, out: &Path| {
            let mut medium = Command::new("bash");
            medium.arg(project().join("tests/bed/medium.sh"));
            succeed(medium.env("BOOT", boot).env("FORM", form).env("OUT", out).env("LABEL", LABEL))
        };
        let live = || Ok::<_, anyhow::Error>(fs::read_to_string(boot.join("kargs"))?.trim().to_owned());
        Ok(match self {
            Medium::Iso => {
                let iso = work.join("live.iso");
                script("iso", &iso)?;
                (vec![(iso, "iso", "read-only=on")], format!("ro coreos.liveiso={LABEL} {}", live()?))
            }
            Medium::Pxe => {
                script("pxe", initrd)?;
                (vec![], format!("ro {}", live()?))
            }
            Medium::Disk(disk) => {
                let root = if disk::is_partitioned(disk)? { "xfs rootflags=prjquota" } else { "ext4" };
                (vec![(disk.to_owned(), "root", WRITABLE)], format!("root=LABEL=root rootfstype={root} rw"))
            }
        })
    }
}

/// Description of a machine.
pub struct Setup<'a> {
    /// Name of its folder.
    pub name: &'a str,
    /// A bootimage of [`Images`].
    pub boot: &'a Path,
    /// The medium that it boots from.
    pub medium: Medium<'a>,
    /// Another disk, `/dev/disk/by-id/virtio-spare`.
    pub spare: Option<&'a Path>,
    /// Records the writes to `spare`. Without it, records those to the disk of the installed system.
    pub recording: Option<&'a Recording>,
    /// More kernel arguments.
    pub kargs: &'a [&'a str],
    /// Memory.
    pub memory_mib: u32,
    /// Its CPU, as the emulator calls it; [`CPU`] boots quickest.
    pub cpu: &'a str,
    /// It is killed after this, whatever happens.
    pub limit: Duration,
}

impl<'a> Setup<'a> {
    /// Describes a machine that boots from an ISO medium.
    pub fn live(name: &'a str, boot: &'a Path) -> Self {
        let limit = Duration::from_secs(1500);
        Self {
            name,
            boot,
            medium: Medium::Iso,
            spare: None,
            recording: None,
            kargs: &[],
            memory_mib: 3072,
            cpu: CPU,
            limit,
        }
    }
}

/// A running machine; dropped, it is gone.
pub struct Vm {
    /// Its serial console.
    pub console: Console,
    work: PathBuf,
    sockets: PathBuf,
    key: PathBuf,
    port: u16,
    child: Child,
    done: Arc<AtomicBool>,
    started: Instant,
}

impl Vm {
    /// Switch a machine on. `fill` adds the files of this boot; the key for ssh is added here.
    pub fn start(
        images: &impl AsRef<Tools>,
        setup: &Setup<'_>,
        fill: impl FnOnce(&Files) -> Result<()>,
    ) -> Result<Self> {
        let tools = images.as_ref();
        let work = work_dir(setup.name)?;
        let files = Files::new(&work)?;
        files.put(
            "/var/roothome/.ssh/authorized_keys",
            0o600,
            &fs::read_to_string(tools.ssh_key.with_extension("pub"))?,
        )?;
        // Journal lines about every audited system call would push what matters off the console.
        files.put("/etc/sysctl.d/90-testbed.conf", 0o644, "kernel.printk = 4 4 1 7\n")?;
        fill(&files)?;
        if let Medium::Disk(disk) = setup.medium {
            // The initramfs brings files to /etc only: an installed system's /var is mounted after it.
            disk::put_var(disk, files.root())?;
            // The root may be read-only there.
            fs::remove_dir_all(files.root().join("var"))?;
        }
        let initrd = work.join("initrd.img");
        files.append_to_initramfs(&setup.boot.join("initramfs.img"), &initrd)?;

        let (mut drives, root) = setup.medium.drives(setup.boot, &work, &initrd)?;
        drives.extend(setup.spare.map(|disk| (disk.to_owned(), "spare", WRITABLE)));
        if let Some((recording, (disk, ..))) = setup.recording.zip(drives.last()) {
            recording.start(disk)?;
        }
        // Without the audit system unless a test looks at it: it costs time at each call.
        let audit = if setup.kargs.iter().any(|karg| karg.starts_with("audit=")) { "" } else { "audit=0 " };
        // On a busy host, the emulated timer may be late for the kernel's check at its start, which then panics.
        let append = format!("console=ttyS0 no_timer_check {audit}{root} {}", setup.kargs.join(" "));
        // Not in the work folder: the path of a socket has to be short.
        let sockets = std::env::temp_dir().join(format!("testbed-{}-{}", std::process::id(), setup.name));
        fs::create_dir_all(&sockets)?;
        let socket = sockets.join("console");
        let port = free_port()?;
        let mut qemu = bound(&tools.qemu);
        qemu.args(
            "-M pc -accel tcg,thread=multi,tb-size=512 -smp 2 -nodefaults -no-user-config -display none -no-reboot"
                .split(' '),
        );
        qemu.args(["-cpu", setup.cpu, "-m", &setup.memory_mib.to_string(), "-append", &append]);
        qemu.arg("-kernel").arg(setup.boot.join("vmlinuz")).arg("-initrd").arg(&initrd);
        for (number, (file, name, access)) in drives.iter().enumerate() {
            // The last one is the spare disk, or the installed system's.
            drive(&mut qemu, name, file, access, setup.recording.filter(|_| number + 1 == drives.len()));
        }
        qemu.args(["-device", "virtio-rng-pci"]);
        qemu.args([
            "-netdev",
            &format!("user,id=n,hostfwd=tcp:127.0.0.1:{port}-:22"),
            "-device",
            "virtio-net-pci,netdev=n",
        ]);
        let log = work.join("console.log");
        qemu.args([
            "-chardev",
            &format!("socket,id=c,path={},server=on,wait=off,logfile={}", socket.display(), log.display()),
        ]);
        qemu.args(["-serial", "chardev:c"]);
        log_to(&mut qemu, &work.join("qemu.log"))?;
        let child = qemu.spawn().context("starting the emulator")?;

        let done = Arc::new(AtomicBool::new(false));
        watchdog(child.id(), setup.limit, Arc::clone(&done));
        let console =
            Console::connect(&socket).with_context(|| fs::read_to_string(work.join("qemu.log")).unwrap_or_default())?;
        Ok(Vm { console, work, sockets, key: tools.ssh_key.clone(), port, child, done, started: Instant::now() })
    }

    /// Boots a disk as a boot loader does, with the kernel, initramfs and arguments of its first entry. Waits until ssh
    /// answers.
    pub fn boot_disk(
        images: &impl AsRef<Tools>,
        name: &str,
        disk: &Path,
        fill: impl FnOnce(&Files) -> Result<()>,
    ) -> Result<Self> {
        let boot = work_dir(&format!("{name}-boot"))?;
        let setup = Setup {
            medium: Medium::Disk(disk),
            kargs: &[&disk::load_entry(disk, &boot)?],
            memory_mib: 2048,
            ..Setup::live(name, &boot)
        };
        let machine = Self::start(images, &setup, fill)?;
        machine.wait_ssh(Duration::from_secs(300))?;
        fs::remove_dir_all(&boot)?;
        Ok(machine)
    }

    /// Time since power on.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Pull the plug.
    pub fn power_cut(mut self) {
        end(&mut self.child);
    }

    /// Wait until ssh answers.
    pub fn wait_ssh(&self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        self.console.expect(0, "OpenBSD Secure Shell server", limit)?;
        wait_for("ssh", limit.saturating_sub(start.elapsed()), || Ok(self.run("true")?.status == 0))
    }

    /// Log in on the serial console with the password, and run a command there.
    pub fn console_run(&self, command: &str, limit: Duration) -> Result<String> {
        let mark = self.console.mark();
        self.console.send("\n")?;
        self.console.expect(mark, "login:", limit)?;
        self.console.send("root\n")?;
        self.console.expect(mark, "Password:", limit)?;
        self.console.send("testbed\n")?;
        self.console.expect(mark, "# ", limit)?;
        let mark = self.console.mark();
        // The end mark is spelled so that the echo of the line does not contain it.
        self.console.send(&format!("{command}; echo end-of''-command\n"))?;
        self.console.expect(mark, "end-of-command", limit)?;
        let text = self.console.since(mark);
        // Not in the same line: the end of the session discards the output that the terminal has not sent yet.
        self.console.send("exit\n")?;
        Ok(text.split("end-of-command").next().unwrap_or_default().to_string())
    }

    fn ssh(&self, multiplexed: bool, command: &str) -> Result<Answer> {
        let mut ssh = ssh(&self.key);
        ssh.args(["-p", &self.port.to_string()]);
        if multiplexed {
            // One login serves all questions: a key exchange takes seconds in there.
            ssh.arg(format!("-oControlPath={}", self.sockets.join("ssh").display()))
                .args(["-oControlMaster=auto", "-oControlPersist=60"]);
        }
        let output = ssh
            .args(["root@127.0.0.1", &format!("exec 2>&1; {command}")])
            .stdin(std::process::Stdio::null())
            .output()?;
        Ok(Answer::of(&output))
    }
}

/// Adds a drive. The recording gets the flushes, too.
fn drive(qemu: &mut Command, name: &str, file: &Path, options: &str, recording: Option<&Recording>) {
    let mut node = |name: &str, node: &str| {
        qemu.args(["-blockdev", &format!("node-name={name},{node}")]);
    };
    node(&format!("{name}-file"), &format!("driver=file,filename={},{options}", file.display()));
    let read_only = if options == WRITABLE { "" } else { ",read-only=on" };
    match recording {
        Some(recording) => {
            node(&format!("{name}-log"), &format!("driver=file,filename={},{WRITABLE}", recording.log.display()));
            node(name, &format!("driver=blklogwrites,file={name}-file,log={name}-log"));
        }
        None => node(name, &format!("driver=raw,file={name}-file{read_only}")),
    }
    // QEMU merges waiting requests up to the largest number of buffers of a write (1024). The log adds a header to these
    // buffers, and the write then fails.
    let merging = if recording.is_some() { ",request-merging=off" } else { "" };
    qemu.args(["-device", &format!("virtio-blk-pci,drive={name},serial={name}{merging}")]);
}

/// Ends the emulator when its time is over, also when a test hangs in something else.
fn watchdog(pid: u32, limit: Duration, done: Arc<AtomicBool>) {
    std::thread::spawn(move || {
        let start = Instant::now();
        while start.elapsed() < limit {
            if done.load(Ordering::SeqCst) {
                return;
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        eprintln!("the machine (process {pid}) ran for {} s: ended by its watchdog", limit.as_secs());
        let _ = succeed(Command::new("kill").args(["-KILL", &pid.to_string()]));
    });
}

impl Guest for Vm {
    fn run(&self, command: &str) -> Result<Answer> {
        self.ssh(true, command)
    }

    fn login(&self, command: &str) -> Result<Answer> {
        self.ssh(false, command)
    }

    fn console(&self) -> String {
        self.console.since(0)
    }

    fn registry_host(&self) -> &'static str {
        HOST
    }

    fn has_own_kernel(&self) -> bool {
        true
    }

    fn work(&self) -> &Path {
        &self.work
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.collect();
        self.done.store(true, Ordering::SeqCst);
        let control = format!("-oControlPath={}", self.sockets.join("ssh").display());
        let _ = Command::new("ssh").args([&control, "-O", "exit", "root@127.0.0.1"]).output();
        end(&mut self.child);
        let _ = fs::remove_dir_all(&self.sockets);
        // Big, and made again at every boot.
        for name in ["initrd.img", "live.iso"] {
            let _ = fs::remove_file(self.work.join(name));
        }
    }
}
