//! Reads the pull spec of the release payload from the cluster installer's `release-image.sh`.
//!
//! The script is a library of shell functions. The agent sources it and does not parse it, because its text is a template
//! that differs between releases. Sourcing it runs at most `podman inspect` on local storage.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use support::command;

/// Path of the installer's script.
pub const SCRIPT: &str = "/usr/local/bin/release-image.sh";

/// Time limit for the script: podman's local storage, which it inspects, may be large.
const LIMIT: Duration = Duration::from_secs(120);

/// Shell command that sources the script `$1` and prints the variable that it sets. Newer scripts set the first one, by
/// digest if podman has the image. Older scripts may only have a function, which is not called because it would let
/// podman pull and run the payload.
const ASK: &str = ". \"$1\" >&2; printf '%s' \"${RELEASE_IMAGE_DIGEST:-${RELEASE_IMAGE:-}}\"";

/// Returns the pull spec of the release payload that `script` sets, or `None` if the script does not exist.
///
/// # Errors
/// The script fails, or does not set a release payload.
pub async fn release_image(script: &Path) -> Result<Option<String>> {
    if !script.is_file() {
        return Ok(None);
    }
    let shown = script.display().to_string();
    let answer = command::run(&["bash", "-c", ASK, "bash", &shown], LIMIT)
        .await
        .with_context(|| format!("cannot run {shown}"))?;
    let spec =
        String::from_utf8(answer).with_context(|| format!("{shown} sets a release payload that is not UTF-8"))?;
    ensure!(
        !spec.trim().is_empty(),
        "{shown} sets neither RELEASE_IMAGE_DIGEST nor RELEASE_IMAGE; set `release_image` in \
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
    async fn the_pull_spec_is_read_from_the_script() {
        let with_function = "#!/usr/bin/env bash\necho Warning: no digest\nRELEASE_IMAGE_DIGEST=\"r/p@sha256:1\"\nimage_for() { exit 1; }\n";
        assert_eq!(ask(with_function).await.unwrap().unwrap(), "r/p@sha256:1");
        assert_eq!(ask("RELEASE_IMAGE=r/p:4.20\n").await.unwrap().unwrap(), "r/p:4.20");
        // podman fails or is missing: the script has its own fallback.
        let falls_back = "if ! D=$(false) || [[ -z \"$D\" ]]; then D=r/p:1; fi\nRELEASE_IMAGE_DIGEST=$D\n";
        assert_eq!(ask(falls_back).await.unwrap().unwrap(), "r/p:1");
        let error = ask("image_for() { :; }\n").await.unwrap_err().to_string();
        assert!(error.contains("release-image.sh sets neither") && error.contains("`release_image`"), "{error}");
        let error = format!("{:#}", ask("echo the reason >&2; exit 3\n").await.unwrap_err());
        assert!(error.contains("the reason") && error.contains("exit status: 3"), "{error}");
        assert_eq!(release_image(Path::new("/nonexistent/release-image.sh")).await.unwrap(), None);
    }
}
