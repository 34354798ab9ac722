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
/// Auth files of the agent's service, of its credential, of skopeo and of installers, beside the configured one.
const AUTH_FILES: [&str; 7] = [
    "/run/credentials/node-image-pivotd.service/node-image-pivot.auth",
    "/etc/credstore/node-image-pivot.auth",
    "/run/credstore/node-image-pivot.auth",
    "/run/containers/0/auth.json",
    "/root/.config/containers/auth.json",
    "/root/.docker/config.json",
    "/var/lib/kubelet/config.json",
];

/// Variables of systemd's environment in the archive, beside the proxies. Others may be secrets of other services.
const VARIABLES: [&str; 4] = ["PATH", "LANG", AUTH_VARIABLE, "NODE_IMAGE_PIVOT_TARGET"];
/// Variable with skopeo's auth file.
const AUTH_VARIABLE: &str = "REGISTRY_AUTH_FILE";
/// Keeps the end of a program's output, because the last lines of a journal name the failure.
const END_OF: [&str; 4] = ["sh", "-c", "\"$@\" | tail --bytes=4000000", "sh"];

/// Files of the archive by name.
type Files = Vec<(String, String)>;

pub(super) async fn gather(paths: &StateDir, output: Option<&Path>) -> Result<Outcome> {
    ensure!(rustix::process::geteuid().is_root(), "must be root to read the record and the journals");
    let files = collect(paths).await;
    let mut secrets = Secrets::default();
    for file in auth_files(&files) {
        secrets.learn(&std::fs::read_to_string(file).unwrap_or_default());
    }
    let archive = pack(files, secrets)?;
    let default = || PathBuf::from(format!("/var/tmp/node-image-pivot-{}.tar.gz", unix_now()));
    match output {
        Some(file) if file == Path::new("-") => {
            std::io::stdout().write_all(&archive).context("cannot write to stdout")?;
        }
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
    let written = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)?.write_all(archive);
    written.inspect_err(|_| drop(std::fs::remove_file(file)))
}

/// Returns the auth files of this machine that the agent, skopeo or an installer may use.
fn auth_files(files: &Files) -> impl Iterator<Item = PathBuf> {
    let configured = Settings::load().ok().and_then(|settings| settings.registry.auth_file);
    let of_environment = files.iter().filter(|(name, _)| name == "environment.txt").flat_map(|(_, text)| text.lines());
    let of_skopeo = of_environment.filter_map(|line| line.strip_prefix(AUTH_VARIABLE)?.strip_prefix('='));
    AUTH_FILES.into_iter().chain(of_skopeo).map(PathBuf::from).chain(configured)
}

/// Returns the lines of systemd's environment that the agent uses.
fn used_variables(environment: &str) -> String {
    let used = |line: &&str| {
        let name = line.split('=').next().unwrap_or_default();
        VARIABLES.contains(&name) || name.to_ascii_lowercase().ends_with("_proxy")
    };
    environment.lines().filter(used).map(|line| format!("{line}\n")).collect()
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
    let journal = [&END_OF[..], &["journalctl", "--boot", "--no-pager", "--output=short-precise", LINES]].concat();
    for unit in UNITS {
        files.push((format!("journal/{unit}.txt"), run(&[&journal[..], &["--unit", unit]].concat()).await));
    }
    let generator = [&journal[..], &["--identifier=node-image-pivot-generator"]].concat();
    files.push(("journal/generator.txt".to_owned(), run(&generator).await));
    files.push(("environment.txt".to_owned(), used_variables(&run(&["systemctl", "show-environment"]).await)));
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
        let auth_file = |auth: &str| format!(r#"{{"auths": {{"q.example": {{"auth": "{auth}"}}}}}}"#);
        let mut secrets = Secrets::default();
        secrets.learn(&auth_file(&auth));
        let credential = base64::encode(auth_file(&base64::encode("core:Planted-Auth-6")));
        let files = [
            ("journal/a.txt", "skopeo: http://u:Planted-Url-2@mirror.example/v2/: EOF; Planted-Auth-1".to_owned()),
            ("environment.txt", "HTTPS_PROXY=http://proxyuser:Planted%2DProxy-3@proxy.example:3128".to_owned()),
            ("report.json", format!(r#"{{"message": "407 for Planted-Proxy-3 and {auth} at q.example"}}"#)),
            (
                "command-line.txt",
                format!(
                    "quiet rd.iscsi.password=Planted-Disk-4,x;Planted netroot=iscsi:u:Planted-5@192.0.2.1 \
                     systemd.set_credential_binary=node-image-pivot.auth:{credential}"
                ),
            ),
            (
                "journal/b.txt",
                r#"Get "https://cdn.example/b?X-Amz-Signature=Planted-7": EOF; Planted-Auth-6"#.to_owned(),
            ),
            ("journal/c.txt", "Planted'Quote-8 Planted/Slash-9".to_owned()),
            (
                "environment.txt",
                used_variables(
                    "AWS_SECRET_ACCESS_KEY=Planted\nREGISTRY_PASS=Planted\nLANG=C\n\
                     HTTP_PROXY=$'http://u:Planted\\'Quote-8@p1:1'\nALL_PROXY=http://u:Planted/Slash-9@p2:2\n",
                ),
            ),
        ];
        let files = files.map(|(name, text)| (name.to_owned(), text)).to_vec();
        let texts = unpacked(&pack(files, secrets).unwrap());
        for (name, text) in &texts {
            assert!(
                !text.contains("Planted") && !text.contains(&auth) && !text.contains(&credential),
                "{name}: {text}"
            );
        }
        let all: String = texts.iter().map(|(name, text)| format!("{name} {text}\n")).collect();
        for kept in [
            "mirror.example/v2/: EOF",
            "proxy.example:3128",
            "at q.example",
            "quiet",
            "node-image-pivot/report.json",
            "cdn.example/b",
            "LANG=C",
        ] {
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
    fn the_auth_file_of_skopeo_is_known() {
        let files = vec![("environment.txt".to_owned(), "LANG=C\nREGISTRY_AUTH_FILE=/a.json\n".to_owned())];
        assert!(auth_files(&files).any(|file| file == Path::new("/a.json")));
    }

    #[tokio::test]
    async fn the_end_of_a_long_journal_is_kept() {
        let text = run(&[&END_OF[..], &["sh", "-c", "yes | head -c 9000000; echo the failure"]].concat()).await;
        assert!(text.ends_with("the failure\n") && text.len() == 4_000_000, "{}", text.len());
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
