//! `gather`: one archive for a support case, without secrets.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use flate2::Compression;
use flate2::write::GzEncoder;

use super::drive::unix_now;
use super::redact::Secrets;
use super::{case, say, show};
use crate::agent::StateDir;
use crate::config::Settings;
use crate::report::{self, Outcome};

/// Time limit for each program.
const LIMIT: Duration = Duration::from_secs(60);
/// The latest lines of each journal.
const LINES: &str = "--lines=20000";
const UNITS: [&str; 4] =
    ["node-image-pivotd.service", "node-image-pull.service", "node-image-overlay.service", "node-image-finish.service"];
/// State files without content of `/etc`.
const RECORDS: [&str; 5] = ["state.json", "state.json.damaged", "plan.json", "units.json", "timeline.json"];
/// Auth files of the agent's service and of installers, beside the configured one.
const AUTH_FILES: [&str; 3] = [
    "/run/credentials/node-image-pivotd.service/node-image-pivot.auth",
    "/root/.docker/config.json",
    "/var/lib/kubelet/config.json",
];

/// Files of the archive by name.
type Files = Vec<(String, String)>;

pub(super) async fn gather(paths: &StateDir, output: Option<&Path>) -> Result<Outcome> {
    ensure!(rustix::process::geteuid().is_root(), "must be root to read the record and the journals");
    let files = collect(paths).await;
    let mut secrets = Secrets::default();
    let configured = Settings::load().ok().and_then(|settings| settings.registry.auth_file);
    for file in AUTH_FILES.into_iter().map(PathBuf::from).chain(configured) {
        secrets.learn(&std::fs::read_to_string(file).unwrap_or_default());
    }
    let archive = pack(files, secrets)?;
    let default = || PathBuf::from(format!("/var/tmp/node-image-pivot-{}.tar.gz", unix_now()));
    match output {
        Some(file) if file == Path::new("-") => say::raw(&archive),
        file => {
            let file = file.map_or_else(default, Path::to_owned);
            write(&file, &archive).with_context(|| format!("cannot write {}", file.display()))?;
            say::out(file.display());
        }
    }
    Ok(Outcome::Done)
}

/// Writes a new file, which only root may read: names and addresses remain in it.
fn write(file: &Path, archive: &[u8]) -> std::io::Result<()> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)?.write_all(archive)
}

async fn collect(paths: &StateDir) -> Files {
    let mut files = vec![
        ("versions.txt".to_owned(), case::versions().await),
        ("configuration.txt".to_owned(), configuration()),
        ("report.json".to_owned(), show::current(paths).await.unwrap_or_else(|error| format!("{error:#}"))),
    ];
    if let Ok(report) = show::parse(&files[2].1) {
        files.push(("status.txt".to_owned(), show::page(&report).join("\n")));
        files.push(("report.txt".to_owned(), report::summary(&report)));
        files.push(("report.svg".to_owned(), report::plot(&report)));
    }
    for (name, path) in [
        ("os-release.txt", "/etc/os-release"),
        ("command-line.txt", "/proc/cmdline"),
        ("mounts.txt", "/proc/1/mountinfo"),
        ("memory.txt", "/proc/meminfo"),
    ] {
        files.push((name.to_owned(), read(Path::new(path))));
    }
    for name in RECORDS.into_iter().filter(|name| paths.run().join(name).exists()) {
        files.push((format!("record/{name}"), read(&paths.run().join(name))));
    }
    let journal = ["journalctl", "--boot", "--no-pager", "--output=short-precise", LINES];
    for unit in UNITS {
        files.push((format!("journal/{unit}.txt"), run(&[&journal[..], &["--unit", unit]].concat()).await));
    }
    let generator = [&journal[..], &["--identifier=node-image-pivot-generator"]].concat();
    files.push(("journal/generator.txt".to_owned(), run(&generator).await));
    files.push(("environment.txt".to_owned(), run(&["systemctl", "show-environment"]).await));
    let state = [&["systemctl", "show", "--no-pager"], &UNITS[..]].concat();
    files.push(("units.txt".to_owned(), run(&state).await));
    files.push(("failed.txt".to_owned(), run(&["systemctl", "--failed", "--no-pager"]).await));
    files
}

/// Returns the effective configuration with its sources.
fn configuration() -> String {
    Settings::configured().map_or_else(|error| format!("invalid: {error:#}"), |lines| lines.join("\n"))
}

fn read(path: &Path) -> String {
    let text = std::fs::read(path).map(|text| String::from_utf8_lossy(&text).into_owned());
    text.unwrap_or_else(|error| format!("cannot read {}: {error}", path.display()))
}

/// Returns the output of a program, or its failure.
async fn run(command: &[&str]) -> String {
    let output = support::command::run(command, LIMIT).await;
    output.map_or_else(|error| format!("{error:#}"), |text| String::from_utf8_lossy(&text).into_owned())
}

/// Returns the files as a tar archive, compressed with gzip, without secrets.
fn pack(files: Files, mut secrets: Secrets) -> Result<Vec<u8>> {
    files.iter().for_each(|(_, text)| secrets.learn(text));
    let mut archive = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::default()));
    for (name, text) in files {
        let text = secrets.remove(&text);
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(unix_now());
        let name = format!("node-image-pivot/{name}");
        archive.append_data(&mut header, name, text.as_bytes()).context("cannot write the archive")?;
    }
    Ok(archive.into_inner()?.finish()?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Returns all texts of an archive by name.
    fn unpacked(archive: &[u8]) -> Files {
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(archive));
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            (entry.path().unwrap().display().to_string(), text)
        });
        entries.collect()
    }

    #[test]
    fn an_archive_has_no_secret_of_an_auth_file_a_proxy_or_a_url() {
        let auth = base64::encode("puller:Planted-Auth-1");
        let mut secrets = Secrets::default();
        secrets.learn(&format!(r#"{{"auths": {{"q.example": {{"auth": "{auth}"}}}}}}"#));
        let files = [
            ("journal/a.txt", "skopeo: http://u:Planted-Url-2@mirror.example/v2/: EOF; Planted-Auth-1".to_owned()),
            ("environment.txt", "HTTPS_PROXY=http://proxyuser:Planted%2DProxy-3@proxy.example:3128".to_owned()),
            ("report.json", format!(r#"{{"message": "407 for Planted-Proxy-3 and {auth} at q.example"}}"#)),
            ("command-line.txt", "quiet rd.iscsi.password=Planted-Disk-4".to_owned()),
        ];
        let files = files.map(|(name, text)| (name.to_owned(), text)).to_vec();
        let texts = unpacked(&pack(files, secrets).unwrap());
        for (name, text) in &texts {
            assert!(!text.contains("Planted") && !text.contains(&auth), "{name}: {text}");
        }
        let all: String = texts.iter().map(|(name, text)| format!("{name} {text}\n")).collect();
        for kept in
            ["mirror.example/v2/: EOF", "proxy.example:3128", "at q.example", "quiet", "node-image-pivot/report.json"]
        {
            assert!(all.contains(kept), "{kept}: {all}");
        }
    }

    #[tokio::test]
    async fn a_machine_without_agent_and_journal_has_an_archive() {
        let run = tempfile::tempdir().unwrap();
        let paths = StateDir::below(run.path());
        std::fs::write(run.path().join("state.json"), "damaged http://u:Planted@x/").unwrap();
        let texts = unpacked(&pack(collect(&paths).await, Secrets::default()).unwrap());
        let text = |name: &str| {
            let found = texts.iter().find(|(known, _)| known.strip_prefix("node-image-pivot/") == Some(name));
            found.map(|(_, text)| text.clone()).unwrap()
        };
        assert_eq!(text("record/state.json"), "damaged http://[removed]@x/");
        assert!(text("versions.txt").contains(env!("CARGO_PKG_VERSION")));
        assert!(text("report.json").contains("\"status\"") && text("report.svg").contains("<svg"));
        UNITS.iter().for_each(|unit| assert!(!text(&format!("journal/{unit}.txt")).is_empty()));
    }

    #[test]
    fn the_archive_is_a_new_private_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a.tar.gz");
        write(&file, b"x").unwrap();
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(write(&file, b"y").is_err(), "another file stays");
    }
}
