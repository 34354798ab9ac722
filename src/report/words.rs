//! Forms of values in messages and documents.

use ostree::glib::DateTime;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};

/// Letters of a digest that people compare.
const DIGEST: usize = 12;

/// Formats milliseconds: `85 ms`, `4.2 s`, `3 min 05 s`.
pub(super) fn human_ms(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..120_000 => format!("{:.1} s", ms as f64 / 1_000.0),
        _ => format!("{} min {:02} s", ms / 60_000, ms / 1_000 % 60),
    }
}

/// Returns `text` as one line without control characters. Messages quote registries and tools: a line break would begin
/// another field of the notification to systemd (`MAINPID=`, `STOPPING=1`), and an escape sequence would reach the
/// console.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.trim().chars() {
        match character {
            '\n' => line.push_str("; "),
            control if control.is_control() => line.push(' '),
            other => line.push(other),
        }
    }
    line
}

/// Reads a value; one that an agent of another version wrote in another form counts as unknown.
pub fn if_known<'de, T: DeserializeOwned, D: Deserializer<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    Ok(serde_json::from_value(serde_json::Value::deserialize(deserializer)?).ok())
}

/// Shortens digests, which take most of a line and of which people compare the begin.
pub(super) fn short_digests(text: &str) -> String {
    let mut short = String::with_capacity(text.len());
    let mut digits = 0;
    for letter in text.chars() {
        digits = if letter.is_ascii_hexdigit() { digits + 1 } else { 0 };
        // A digest is known only at its end, so the letters after the begin are removed then.
        short.push(letter);
        if digits == 64 {
            short.truncate(short.len() - (64 - DIGEST));
        }
    }
    short
}

/// Formats milliseconds since the epoch as UTC, to the second.
pub(super) fn timestamp(unix_ms: u64) -> String {
    let date = i64::try_from(unix_ms / 1000).ok().and_then(|seconds| DateTime::from_unix_utc(seconds).ok());
    date.and_then(|date| date.format("%Y-%m-%dT%H:%M:%SZ").ok()).map_or_else(|| unix_ms.to_string(), Into::into)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_shortened_and_other_words_stay() {
        let digest = "0123456789abcdef".repeat(4);
        let text = format!("q.io/x@sha256:{digest}: cannot read {digest}; feed {}", "a".repeat(63));
        let expected = format!("q.io/x@sha256:0123456789ab: cannot read 0123456789ab; feed {}", "a".repeat(63));
        assert_eq!(short_digests(&text), expected);
    }

    #[test]
    fn timestamps_agree_with_date() {
        // Around leap days, and around 1 March in centuries with and without a leap day.
        for seconds in [
            0u64,
            36_633_599,
            36_633_600,
            951_782_399,
            951_782_400,
            951_868_800,
            1_709_164_800,
            1_709_251_200,
            1_795_291_200,
            4_107_542_399,
            4_107_542_400,
        ] {
            let date = std::process::Command::new("date")
                .args(["-u", "-d", &format!("@{seconds}"), "+%Y-%m-%dT%H:%M:%SZ"])
                .output()
                .unwrap();
            assert_eq!(timestamp(seconds * 1000 + 7), String::from_utf8(date.stdout).unwrap().trim());
        }
    }
}
