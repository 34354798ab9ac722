//! The structure of a message: the endpoints that were tried, and the segments of their errors.
//!
//! Go wraps errors as `doing something NAME: cause`, and quotes URLs and bodies. Names (hosts, tags, repositories,
//! digests) are in quotes or inside a longer segment. A segment is never only a name, so whole segments can be compared.
//!
//! Format source: containers/image, `newImageSource`: `(Mirrors also failed: [REF: ERROR]\n[REF: ERROR]): REF: ERROR`.

const MIRRORS: &str = "(Mirrors also failed: ";

/// One endpoint and its error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attempt<'a> {
    /// Reference that was tried. Empty if the message does not name it.
    pub endpoint: &'a str,
    pub message: &'a str,
}

/// Splits a message by endpoint, in the order of the attempts. A list of mirrors that does not parse is one attempt with
/// an empty message, which matches no cause.
pub(super) fn attempts(text: &str) -> Vec<Attempt<'_>> {
    let Some((_, list)) = text.split_once(MIRRORS) else { return vec![Attempt { endpoint: "", message: text }] };
    let unknown = || vec![Attempt { endpoint: "", message: "" }];
    let mut attempts = Vec::new();
    let mut rest = list;
    while rest.starts_with('[') {
        let Some(end) = closing(rest) else { return unknown() };
        attempts.push(attempt(&rest[1..end]));
        rest = rest[end + 1..].trim_start();
    }
    match rest.strip_prefix("): ") {
        Some(last) if !attempts.is_empty() => attempts.push(attempt(last)),
        _ => return unknown(),
    }
    attempts
}

fn attempt(text: &str) -> Attempt<'_> {
    let (endpoint, message) = text.split_once(": ").unwrap_or(("", text));
    Attempt { endpoint, message }
}

/// Returns the position of the bracket that closes the first one of `text`. Addresses contain brackets, too.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0_u32;
    for (at, character) in text.char_indices() {
        match character {
            '[' => depth += 1,
            ']' => depth = depth.checked_sub(1)?,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

/// Returns registry and name of a reference, without tag and digest.
pub(super) fn repository(reference: &str) -> &str {
    let name = reference.split('@').next().unwrap_or_default();
    match name.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') && name.contains('/') => name,
        _ => name,
    }
}

/// Returns the segments of an error in lower case, without quoted text.
pub(super) fn segments(message: &str) -> Vec<String> {
    unquoted(message)
        .split('\n')
        .flat_map(|line| line.split(": "))
        .map(|segment| segment.trim_matches(|c: char| c.is_whitespace() || matches!(c, '*' | ':' | '.')).to_lowercase())
        .filter(|segment| !segment.is_empty())
        .collect()
}

/// Returns `text` without the content of double quotes. An unclosed quote removes the rest.
fn unquoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut quoted = false;
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => quoted = !quoted,
            '\\' if quoted => drop(characters.next()),
            other if !quoted => out.push(other),
            _ => {}
        }
    }
    out
}

/// Returns the HTTP status if a segment contains one: `received unexpected HTTP status: 503 …`,
/// `invalid status code from registry 520 (…)`, `StatusCode: 404, …`.
pub(super) fn status_code(segments: &[String]) -> Option<u16> {
    const BEFORE: [&str; 3] = ["http status", "statuscode", "status code"];
    const INLINE: [&str; 3] = ["invalid status code from registry ", "unexpected status code ", "invalid status code "];
    segments.iter().enumerate().find_map(|(at, segment)| {
        let inline = INLINE.iter().find_map(|words| number(segment.strip_prefix(words)?));
        let next = || number(segments.get(at + 1)?);
        inline.or_else(|| BEFORE.iter().any(|words| segment.ends_with(words)).then(next).flatten())
    })
}

/// Parses a number of exactly three digits at the beginning of `text`.
fn number(text: &str) -> Option<u16> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (digits == 3).then(|| text[..digits].parse().ok()).flatten()
}
