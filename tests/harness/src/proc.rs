//! Child processes that end with the test, however it ends.

use std::fs::File;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A command that the kernel kills when the thread that starts it is gone: no test leaves an emulator behind.
pub fn bound(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command.stdin(Stdio::null());
    command
}

/// Run to the end; a failure carries the program's own words.
pub fn succeed(command: &mut Command) -> Result<Output> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output)
}

/// Both output streams of a command into one file.
pub fn log_to(command: &mut Command, path: &Path) -> Result<()> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    command.stdout(file.try_clone()?).stderr(file);
    Ok(())
}

/// Ask again until it holds or time is up.
pub fn wait_for(what: &str, limit: Duration, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    loop {
        let last = match holds() {
            Ok(true) => return Ok(()),
            Ok(false) => String::new(),
            Err(error) => format!(" (last: {error:#})"),
        };
        if start.elapsed() > limit {
            bail!("{what}: not within {} s{last}", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Kill and reap.
pub fn end(child: &mut Child) {
    // It may be gone already; then there is nothing to do.
    let _ = child.kill();
    let _ = child.wait();
}

/// Returns a TCP port of the loopback interface without a listener. It is below those that the kernel gives to connections
/// and to listeners without a port, so that no other process gets it.
pub fn free_port() -> Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = (std::process::id() % 313) as u16 * 64;
    let mut ports = (0..20_000).map(|_| 10_000 + first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000);
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).context("all ports have listeners")
}
