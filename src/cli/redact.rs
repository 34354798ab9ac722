//! Removes secrets from texts that leave the machine. Pure.
//!
//! A secret is found by its place (a URL, an auth file, `password=`), and then removed from all texts.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use regex::{Captures, Regex};

/// Stands in place of a secret.
const REMOVED: &str = "[removed]";
/// Shorter secrets are removed only in their places, because they may be a part of any word.
const SHORTEST: usize = 4;

/// Names of arguments and fields whose value is a secret.
const SECRET: &str = r"[\w.-]*(?:password|passwd|passphrase|secret|token)";

/// Places of secrets: the text before the secret, the secret, and the rest.
static PLACES: LazyLock<Vec<Regex>> = LazyLock::new(|| {
    let places = [
        // The user information of a URL, and that of a proxy without a scheme.
        r#"([a-zA-Z][a-zA-Z0-9+.-]*://)((?:\\+'|[^/\s"<>\\])+)(@)"#,
        r#"(?i)(\b\w+_proxy\s*=\s*(?:\$?["'])?(?:[a-z0-9+.-]+://)?)([^\s"]+)(@)"#,
        // Errors of Go about the address of a proxy: a slash in the password, and its part that Go takes for the port.
        r#"((?:invalid proxy address|parse) \\*"(?:[a-zA-Z0-9+.-]+://)?)([^\s"]+)(@)"#,
        r#"(invalid port \\*":)([^\s"\\]+)()"#,
        // Credentials and the user of an iSCSI disk on the kernel command line.
        r#"(\bsystemd\.set_credential\w*=[^\s:]*:)(\\*"[^"\n]*"|'[^'\n]*'|[^\s"\\]*[^\s"'\\])()"#,
        r#"(\b(?:net)?root=iscsi:)([^\s"\\]+)(@)"#,
        // Signed URLs.
        r#"(?i)([?&][\w-]*(?:signature|sig|credential|api_?key|key|token)=)([^\s"'&\\]+)()"#,
        // The whole value, and its part before a separator, which may be the whole secret.
        &format!(r#"(?i)(\b{SECRET}=)([^\s"'\\][^\s"\\]*)()"#),
        &format!(r#"(?i)(\b{SECRET}=["']?)([^\s"'&;,\\]+)()"#),
        // JSON, also within a string of another document.
        r#"(?i)(\\*"(?:auth|password|secret|token|identitytoken|registrytoken)\\*"\s*:\s*\\*")([^"\\]+)()"#,
        r#"(?i)(authorization\\*"?\s*[:=]\s*\\*"?(?:basic|bearer)\s+)([^\s"\\]+)()"#,
    ]
    .map(str::to_owned);
    // First those in quotes, which may have spaces.
    let quoted = [
        quoted(r"systemd\.set_credential\w*", r#"[^\s:"']*:"#, None),
        quoted("(?:net)?root", "iscsi:", Some("@")),
        quoted(SECRET, "", None),
    ];
    quoted.into_iter().flatten().chain(places).filter_map(|place| Regex::new(&place).ok()).collect()
});

/// Returns the places of a secret in an argument `name=` of which the value or the whole is in quotes: after `before`, up to
/// `end` or the closing quote. The quotes may be those within a JSON document.
fn quoted(name: &str, before: &str, end: Option<&str>) -> [String; 2] {
    [('"', r#"\\*""#), ('\'', "'")].map(|(letter, quote)| {
        let end = end.unwrap_or(quote);
        format!(r"(?i)((?:{quote}{name}=|\b{name}={quote}){before})([^{letter}\n]*[^{letter}\n\\])({end})")
    })
}

/// Known secrets.
#[derive(Debug, Default)]
pub(super) struct Secrets(BTreeSet<String>);

impl Secrets {
    /// Learns the secrets of a text by their places.
    pub(super) fn learn(&mut self, text: &str) {
        let found = PLACES.iter().flat_map(|place| place.captures_iter(text));
        // A name of a user alone is removed only in its place.
        let is_secret = |found: &Captures<'_>| &found[3] != "@" || found[2].contains(':');
        let found: Vec<String> = found.filter(is_secret).map(|found| found[2].to_owned()).collect();
        found.iter().for_each(|secret| self.add(secret));
    }

    /// Adds a secret in its forms: as it is, its password, and both decoded.
    fn add(&mut self, secret: &str) {
        let secret = secret.trim_matches(['"', '\\']);
        let decoded = base64::decode(secret).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        // The credential of a command line is a whole auth file.
        decoded.iter().for_each(|text| self.learn(text));
        for form in [Some(secret.to_owned()), decoded].into_iter().flatten() {
            let password = form.split_once(':').map_or(form.as_str(), |(_, password)| password);
            let forms = [form.clone(), password.to_owned(), percent_decoded(password)];
            let unquoted = forms.clone().map(|form| form.replace(r"\'", "'"));
            let long = |form: &String| form.len() >= SHORTEST && form != REMOVED;
            self.0.extend(forms.into_iter().chain(unquoted).filter(long));
        }
    }

    /// Returns the text without the known secrets and those in their places.
    pub(super) fn remove(&self, text: &str) -> String {
        let mut text = text.to_owned();
        // The longest first: a secret may contain another one.
        let mut known: Vec<_> = self.0.iter().collect();
        known.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        for secret in known {
            text = text.replace(secret.as_str(), REMOVED);
            // As it stands in a JSON document.
            let escaped = serde_json::Value::from(secret.as_str()).to_string();
            text = text.replace(escaped.trim_matches('"'), REMOVED);
        }
        for place in PLACES.iter() {
            let removed = |found: &Captures<'_>| format!("{}{REMOVED}{}", &found[1], &found[3]);
            text = place.replace_all(&text, removed).into_owned();
        }
        text
    }
}

/// Decodes the percent signs of a URL. Text that is invalid then stays.
fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let code = after.get(..2).filter(|_| *first == b'%').and_then(|code| hex::decode(code).ok());
        rest = if code.is_some() { &after[2..] } else { after };
        bytes.push(code.map_or(*first, |code| code[0]));
    }
    String::from_utf8(bytes).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_places_are_known() {
        assert_eq!(PLACES.len(), 17, "each expression is valid");
    }

    #[test]
    fn secrets_are_removed_by_their_place() {
        let auth = base64::encode("core:hunter2!");
        for (text, expected) in [
            ("proxyconnect tcp: http://u:pw@proxy:3128: EOF", "proxyconnect tcp: http://[removed]@proxy:3128: EOF"),
            ("HTTPS_PROXY=u:p%40w@proxy:3128 x", "HTTPS_PROXY=[removed]@proxy:3128 x"),
            ("HTTP_PROXY=http://proxy:3128", "HTTP_PROXY=http://proxy:3128"),
            ("docker://q.io/a/b@sha256:1234", "docker://q.io/a/b@sha256:1234"),
            ("rd.iscsi.password=abc quiet root=UUID=1", "rd.iscsi.password=[removed] quiet root=UUID=1"),
            ("//s/x /mnt cifs rw,password=a,vers=3", "//s/x /mnt cifs rw,password=[removed]"),
            ("GET /v2/?token=abc&x=1", "GET /v2/?token=[removed]"),
            ("rd.iscsi.password=ab,cd;ef quiet", "rd.iscsi.password=[removed] quiet"),
            (r#"password="two words" x"#, r#"password="[removed]" x"#),
            ("password='two words' x", "password='[removed]' x"),
            (r#""rd.iscsi.password=two words" x"#, r#""rd.iscsi.password=[removed]" x"#),
            (r#"{"line": "password=\"two words\" x"}"#, r#"{"line": "password=\"[removed]\" x"}"#),
            (r#"systemd.set_credential="a:two words" x"#, r#"systemd.set_credential="a:[removed]" x"#),
            (r#"systemd.set_credential=a:"two words" x"#, "systemd.set_credential=a:[removed] x"),
            (r#""systemd.set_credential=a:two words" x"#, r#""systemd.set_credential=a:[removed]" x"#),
            ("'systemd.set_credential=a:two words' x", "'systemd.set_credential=a:[removed]' x"),
            ("systemd.set_credential=a:'two words' x", "systemd.set_credential=a:[removed] x"),
            (
                r#"{"line": "quiet systemd.set_credential=\"a:two words\" x", "b": "c"}"#,
                r#"{"line": "quiet systemd.set_credential=\"a:[removed]\" x", "b": "c"}"#,
            ),
            (r#"netroot="iscsi:u:two words@192.0.2.1::::iqn" x"#, r#"netroot="iscsi:[removed]@192.0.2.1::::iqn" x"#),
            ("systemd.set_credential=passwd.root:hunter2 x", "systemd.set_credential=passwd.root:[removed] x"),
            ("netroot=iscsi:u:pw@192.0.2.1::::iqn x", "netroot=iscsi:[removed]@192.0.2.1::::iqn x"),
            ("netroot=iscsi:192.0.2.1::::iqn.x", "netroot=iscsi:192.0.2.1::::iqn.x"),
            ("https://x/r.img?api_key=abc quiet", "https://x/r.img?api_key=[removed] quiet"),
            (
                r#"Get "https://cdn/b?X-Amz-Date=1&X-Amz-Signature=abc&Key-Pair-Id=2": EOF"#,
                r#"Get "https://cdn/b?X-Amz-Date=1&X-Amz-Signature=[removed]&Key-Pair-Id=2": EOF"#,
            ),
            (r"HTTPS_PROXY=$'http://u:p\'w@proxy:3128'", "HTTPS_PROXY=$'http://[removed]@proxy:3128'"),
            ("HTTPS_PROXY=$'u:p!w@proxy:3128'", "HTTPS_PROXY=$'[removed]@proxy:3128'"),
            (
                r#"invalid proxy address "http://u:ab/cd@proxy:3128": invalid port ":ab" after host"#,
                r#"invalid proxy address "http://[removed]@proxy:3128": invalid port ":[removed]" after host"#,
            ),
            ("LoadCredential=node-image-pivot.auth", "LoadCredential=node-image-pivot.auth"),
            ("Authorization: Bearer abc.def", "Authorization: Bearer [removed]"),
            ("unauthorized: authentication required", "unauthorized: authentication required"),
            ("cannot get a token: 401", "cannot get a token: 401"),
            (
                &format!(r#"{{"auths": {{"q.io": {{"auth": "{auth}"}}}}}}"#),
                r#"{"auths": {"q.io": {"auth": "[removed]"}}}"#,
            ),
            (r#"{"text": "{\"auth\": \"abc\"}"}"#, r#"{"text": "{\"auth\": \"[removed]\"}"}"#),
        ] {
            assert_eq!(Secrets::default().remove(text), expected);
        }
    }

    #[test]
    fn a_secret_of_one_text_is_removed_from_all() {
        let mut secrets = Secrets::default();
        secrets.learn(&format!(r#"{{"auths": {{"q.io": {{"auth": "{}"}}}}}}"#, base64::encode("core:hunter\"2")));
        secrets.learn("http_proxy=http://u:p%40ssword@proxy");
        let text = r#"no core:hunter"2, "hunter\"2", p@ssword or p%40ssword"#;
        assert_eq!(secrets.remove(text), r#"no [removed], "[removed]", [removed] or [removed]"#);
        secrets.learn("http://u:a@proxy");
        secrets.learn("ssh://core@host");
        assert_eq!(
            secrets.remove("a layer, core"),
            "a layer, core",
            "short secrets and names are parts of other words"
        );
    }
}
