//! What a cluster installer's own files say: the release payload that its `release-image.sh` names.
//!
//! That script is a library of shell functions. It is asked, not parsed: its text is a template that
//! differs from release to release. Asking it runs `podman inspect` on local storage, no more.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use support::command;

/// Where the installer puts it.
pub const SCRIPT: &str = "/usr/local/bin/release-image.sh";

/// How long the script may take: it inspects the local storage of podman, which may be large.
const LIMIT: Duration = Duration::from_secs(120);

/// Reads the script given as `$1` and prints what it sets. Newer scripts set the first variable, by digest
/// where podman has the image already; older ones may only have a function, for which podman would
/// have to pull and run the payload: that is not asked for.
const ASK: &str = ". \"$1\" >&2; printf '%s' \"${RELEASE_IMAGE_DIGEST:-${RELEASE_IMAGE:-}}\"";

/// The pull spec of the release payload, as `script` has it; `None` when there is no such script.
///
/// # Errors
/// The script cannot be run, or sets no release payload. Nothing was changed.
pub async fn release_image(script: &Path) -> Result<Option<String>> {
    if !script.is_file() {
        return Ok(None);
    }
    let shown = script.display().to_string();
    let answer =
        command::run(&["bash", "-c", ASK, "bash", &shown], LIMIT).await.with_context(|| format!("asking {shown}"))?;
    let spec = String::from_utf8(answer).with_context(|| format!("{shown}: what it sets is not UTF-8"))?;
    ensure!(
        !spec.trim().is_empty(),
        "{shown} sets neither RELEASE_IMAGE_DIGEST nor RELEASE_IMAGE: set `release_image` in \
         /etc/node-image-pivot.conf.d/*.toml"
    );
    Ok(Some(spec.trim().to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    async fn ask(text: &str) -> Result<Option<String>> {
        let temp = tempfile::tempdir().unwrap();
        let script = temp.path().join("release-image.sh");
        std::fs::write(&script, text).unwrap();
        release_image(&script).await
    }

    #[tokio::test]
    async fn the_script_is_asked() {
        let with_function = "#!/usr/bin/env bash\necho Warning: no digest\nRELEASE_IMAGE_DIGEST=\"r/p@sha256:1\"\nimage_for() { exit 1; }\n";
        assert_eq!(ask(with_function).await.unwrap().unwrap(), "r/p@sha256:1");
        assert_eq!(ask("RELEASE_IMAGE=r/p:4.20\n").await.unwrap().unwrap(), "r/p:4.20");
        // podman fails or is missing: the script itself falls back.
        let falls_back = "if ! D=$(false) || [[ -z \"$D\" ]]; then D=r/p:1; fi\nRELEASE_IMAGE_DIGEST=$D\n";
        assert_eq!(ask(falls_back).await.unwrap().unwrap(), "r/p:1");
        let error = ask("image_for() { :; }\n").await.unwrap_err().to_string();
        assert!(error.contains("release-image.sh sets neither") && error.contains("`release_image`"), "{error}");
        let error = format!("{:#}", ask("echo the reason >&2; exit 3\n").await.unwrap_err());
        assert!(error.contains("the reason") && error.contains("exit status: 3"), "{error}");
        assert_eq!(release_image(Path::new("/nonexistent/release-image.sh")).await.unwrap(), None);
    }
}
