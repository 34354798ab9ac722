//! Which label a path has by a policy's file contexts, found without trying every expression.
//!
//! Format and order source: selabel_file(5) and libselinux 3.4. A line is an expression for whole
//! paths, perhaps a file type, and a label. Of the lines that match, the last one counts; one without
//! metacharacters counts more than any with; `.homedirs` and `.local` come after the policy's own; paths
//! are rewritten by `.subs` and `.subs_dist` first.
//!
//! From libselinux 3.8 on, of the lines with metacharacters the one with the longest literal text counts most, and
//! only then their order. Where both rules disagree about a path, libselinux decides.
//!
//! libselinux tries thousands of expressions for each path. Here a line is tried only for paths that
//! begin as it does, and most need no expression at all. Paths that an unusual line may match are left
//! to libselinux: [`Contexts::find`] returns `None` for them, and [`Contexts::parse`] for unusual files.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use regex::bytes::{Regex, RegexBuilder};

/// What separates an expression from literal text, as libselinux sees it.
const META: &[u8] = b".^$?*+|[({";
/// What concerns the character before it.
const QUANTIFIERS: &[u8] = b"?*{+";
/// The most memory that one compiled expression may take, in bytes.
const EXPRESSION_LIMIT: usize = 1 << 20;

/// The file contexts of one policy.
#[derive(Debug)]
pub struct Contexts {
    /// Those without metacharacters last, otherwise in the order of the files: a later one wins.
    specs: Vec<Spec>,
    /// Which specs begin with a text, by that text.
    by_prefix: HashMap<Vec<u8>, Vec<usize>>,
    /// The length of the longest of these texts.
    longest_prefix: usize,
    /// Local substitutions, then the distribution's: source and replacement.
    substitutions: [Vec<(String, String)>; 2],
    /// Whether "no label" was found to be right once.
    none_confirmed: AtomicBool,
    /// Whether a finding was found to be wrong: then nothing more is found.
    refuted: AtomicBool,
}

/// One line.
#[derive(Debug)]
struct Spec {
    /// File type bits of a mode; `None` is any.
    kind: Option<u32>,
    /// What libselinux 3.8 prefers lines by: the length of the literal text, then that of the expression.
    rank: (usize, usize),
    rest: Rest,
    /// `None` where the line says `<<none>>`.
    label: Option<String>,
    confirmed: AtomicBool,
}

/// What follows the literal text that an expression begins with.
#[derive(Debug)]
enum Rest {
    Nothing,
    /// `(/.*)?`
    Below,
    /// `.*`
    Anything,
    /// What only libselinux can judge.
    Unusual,
    /// Something else; holds the whole expression, and it compiled (`None`: that failed).
    Expression(String, OnceLock<Option<Regex>>),
}

/// The texts of one policy's files, each where it exists.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Texts {
    /// `file_contexts`, `.homedirs` and `.local`, in this order.
    pub contexts: [String; 3],
    /// `.subs` and `.subs_dist`, in this order.
    pub substitutions: [String; 2],
}

/// What the file contexts say about a path.
#[derive(Debug, Clone, Copy)]
pub struct Found<'a> {
    /// The label; `None` for `<<none>>`.
    pub label: Option<&'a str>,
    confirmed: &'a AtomicBool,
}

impl Found<'_> {
    /// Whether [`Found::confirm`] was called for the same line before.
    pub fn is_confirmed(&self) -> bool {
        self.confirmed.load(Ordering::Relaxed)
    }

    /// Notes that libselinux says the same.
    pub fn confirm(&self) {
        self.confirmed.store(true, Ordering::Relaxed);
    }
}

/// How the names of the files end, in the order of [`Texts`].
const SUFFIXES: [&str; 5] = ["", ".homedirs", ".local", ".subs", ".subs_dist"];

impl Texts {
    /// Writes the files of a policy that has nothing else to `selinux`, a directory such as `/etc/selinux`.
    pub fn write(&self, selinux: &Path) -> io::Result<()> {
        let files = selinux.join("only/contexts/files");
        std::fs::create_dir_all(&files)?;
        std::fs::write(selinux.join("config"), "SELINUX=enforcing\nSELINUXTYPE=only\n")?;
        // libostree wants a binary policy, but does not read it.
        std::fs::create_dir_all(selinux.join("only/policy"))?;
        std::fs::write(selinux.join("only/policy/policy.33"), "")?;
        for (suffix, text) in SUFFIXES.iter().zip(self.contexts.iter().chain(&self.substitutions)) {
            std::fs::write(files.join(format!("file_contexts{suffix}")), text)?;
        }
        Ok(())
    }

    /// All labels in them, many several times.
    pub fn labels(&self) -> impl Iterator<Item = &str> {
        let lines = self.contexts.iter().flat_map(|text| text.lines());
        lines.filter(|line| !line.trim_start().starts_with('#')).filter_map(|line| line.split_ascii_whitespace().last())
    }

    /// Reads the files whose names begin with `file_contexts`. Only the first has to exist.
    pub fn read(file_contexts: &Path) -> io::Result<Self> {
        let beside = |suffix: &str| {
            let mut name = file_contexts.as_os_str().to_owned();
            name.push(suffix);
            match std::fs::read_to_string(&name) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
                other => other,
            }
        };
        Ok(Self {
            contexts: [std::fs::read_to_string(file_contexts)?, beside(".homedirs")?, beside(".local")?],
            substitutions: [beside(".subs")?, beside(".subs_dist")?],
        })
    }
}

impl Contexts {
    /// Of the files' texts. Returns `None` if one has a line that libselinux may refuse.
    pub fn parse(texts: &Texts) -> Option<Self> {
        let mut parsed = Vec::new();
        for line in texts.contexts.iter().flat_map(|text| text.lines()) {
            if let Some(fields) = fields(line)? {
                parsed.push(Spec::parse(&fields)?);
            }
        }
        // Stable: within both kinds the order of the files stays.
        parsed.sort_by_key(|(_, spec)| matches!(spec.rest, Rest::Nothing));
        let mut by_prefix: HashMap<Vec<u8>, Vec<usize>> = HashMap::new();
        let mut specs = Vec::with_capacity(parsed.len());
        for (prefix, spec) in parsed {
            by_prefix.entry(prefix).or_default().push(specs.len());
            specs.push(spec);
        }
        let mut substitutions = [Vec::new(), Vec::new()];
        for (into, text) in substitutions.iter_mut().zip(&texts.substitutions) {
            for line in text.lines() {
                match fields(line)?.as_deref() {
                    Some([source, target, ..]) => into.push(((*source).to_owned(), (*target).to_owned())),
                    Some(_) => return None,
                    None => {}
                }
            }
        }
        let longest_prefix = by_prefix.keys().map(Vec::len).max().unwrap_or(0);
        let (none_confirmed, refuted) = Default::default();
        Some(Self { specs, by_prefix, longest_prefix, substitutions, none_confirmed, refuted })
    }

    /// What the contexts say about an absolute path without needless slashes, and a mode with its type.
    /// `None` when libselinux should say it.
    pub fn find(&self, path: &str, mode: u32) -> Option<Found<'_>> {
        const S_IFMT: u32 = 0o170_000;
        // At the end of a text PCRE overlooks a line feed, regex does not.
        if self.refuted.load(Ordering::Relaxed) || path.contains('\n') {
            return None;
        }
        let path = self.substitute(path);
        let path = path.as_bytes();
        let mut candidates: Vec<usize> = (0..=path.len().min(self.longest_prefix))
            .filter_map(|length| self.by_prefix.get(&path[..length]).map(|specs| (length, specs)))
            .flat_map(|(length, specs)| {
                let right = move |&spec: &usize| self.specs[spec].may_match(path, length, mode & S_IFMT);
                specs.iter().copied().filter(right)
            })
            .collect();
        candidates.sort_unstable();
        let mut candidates = candidates.into_iter().rev().map(|spec| &self.specs[spec]);
        while let Some(spec) = candidates.next() {
            if !spec.matches(path)? {
                continue;
            }
            // The lines before it that libselinux 3.8 would prefer.
            for other in candidates.filter(|other| other.rank >= spec.rank && other.label != spec.label) {
                if other.matches(path)? {
                    return None;
                }
            }
            return Some(Found { label: spec.label.as_deref(), confirmed: &spec.confirmed });
        }
        Some(Found { label: None, confirmed: &self.none_confirmed })
    }

    /// Notes that libselinux says otherwise than a finding: from now on nothing is found.
    pub fn refute(&self) {
        self.refuted.store(true, Ordering::Relaxed);
    }

    /// The local substitution is applied first, the distribution's to what comes of it.
    fn substitute(&self, path: &str) -> String {
        let mut path = path.to_owned();
        for list in &self.substitutions {
            // The last that fits.
            let rewritten = list.iter().rev().find_map(|(source, target)| {
                let rest = path.strip_prefix(source.as_str())?;
                match rest.strip_prefix('/') {
                    Some(inside) if target == "/" => Some(format!("/{inside}")),
                    Some(_) => Some(format!("{target}{rest}")),
                    None => rest.is_empty().then(|| target.clone()),
                }
            });
            path = rewritten.unwrap_or(path);
        }
        path
    }
}

impl Spec {
    /// The literal text that the expression begins with, and the spec.
    fn parse(fields: &[&str]) -> Option<(Vec<u8>, Self)> {
        let (expression, kind, label) = match fields {
            [expression, label] => (*expression, None, *label),
            [expression, kind, label, ..] => (*expression, Some(kind_bits(kind)?), *label),
            _ => return None,
        };
        let (prefix, literal, rest) = match split(expression) {
            None => (certain_prefix(expression), usize::MAX, Rest::Unusual),
            Some((prefix, rest)) => {
                // Lines without metacharacters come before all others.
                let literal = if rest.is_empty() { usize::MAX } else { expression.len() - rest.len() };
                let rest = match rest {
                    "" => Rest::Nothing,
                    "(/.*)?" => Rest::Below,
                    ".*" => Rest::Anything,
                    _ => Rest::Expression(expression.to_owned(), OnceLock::new()),
                };
                (prefix, literal, rest)
            }
        };
        let label = (label != "<<none>>").then(|| label.to_owned());
        Some((prefix, Self { kind, rank: (literal, expression.len()), rest, label, confirmed: AtomicBool::default() }))
    }

    /// Whether it can match a path of this type that has the first `length` bytes in common with it.
    fn may_match(&self, path: &[u8], length: usize, kind: u32) -> bool {
        let rest = &path[length..];
        (kind == 0 || self.kind.is_none_or(|only| only == kind))
            && match self.rest {
                Rest::Nothing => rest.is_empty(),
                Rest::Below => rest.is_empty() || rest[0] == b'/',
                Rest::Anything | Rest::Unusual | Rest::Expression(..) => true,
            }
    }

    /// Whether it matches a path that it can match. `None` when that cannot be told here.
    fn matches(&self, path: &[u8]) -> Option<bool> {
        let (text, compiled) = match &self.rest {
            Rest::Unusual => return None,
            Rest::Expression(text, compiled) => (text, compiled),
            Rest::Nothing | Rest::Below | Rest::Anything => return Some(true),
        };
        let compiled = compiled.get_or_init(|| {
            let whole = format!("^{text}$");
            let mut builder = RegexBuilder::new(&whole);
            builder.unicode(false).dot_matches_new_line(true).size_limit(EXPRESSION_LIMIT).build().ok()
        });
        compiled.as_ref().map(|regex| regex.is_match(path))
    }
}

/// The fields of a line; `Some(None)` for a comment or an empty one; `None` for what is not ASCII, which
/// libselinux refuses.
fn fields(line: &str) -> Option<Option<Vec<&str>>> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    match fields.first() {
        None => Some(None),
        Some(first) if first.starts_with('#') => Some(None),
        Some(_) => line.is_ascii().then_some(Some(fields)),
    }
}

/// The type bits of a mode for `--`, `-d` and the like.
fn kind_bits(field: &str) -> Option<u32> {
    Some(match field {
        "--" => 0o100_000,
        "-d" => 0o040_000,
        "-l" => 0o120_000,
        "-c" => 0o020_000,
        "-b" => 0o060_000,
        "-p" => 0o010_000,
        "-s" => 0o140_000,
        _ => return None,
    })
}

/// Splits an expression into the literal text that it begins with and the rest. `None` for what PCRE and
/// regex may understand differently, and for what libselinux splits elsewhere than we do.
fn split(expression: &str) -> Option<(Vec<u8>, &str)> {
    let bytes = expression.as_bytes();
    // libselinux takes a first component without metacharacters literally, backslashes included.
    let first = bytes.iter().skip(1).position(|byte| *byte == b'/').map_or(&[][..], |end| &bytes[..=end]);
    let literal = !first.iter().any(|byte| META.contains(byte));
    // It compares that component by itself: a quantifier of the slash behind it does not make the slash optional.
    let quantified =
        literal && first.len() > 1 && bytes.get(first.len() + 1).is_some_and(|next| QUANTIFIERS.contains(next));
    let possessive_or_special = ["*+", "++", "?+", "}+", "(?"];
    if literal && first.contains(&b'\\')
        || quantified
        || possessive_or_special.iter().any(|text| expression.contains(text))
        || !is_plain(bytes)
    {
        return None;
    }
    let mut prefix = Vec::new();
    // Where in the expression the last literal byte begins: a quantifier would concern it.
    let mut last = 0;
    let mut at = 0;
    while at < bytes.len() && !META.contains(&bytes[at]) {
        last = at;
        at += usize::from(bytes[at] == b'\\');
        prefix.push(bytes[at]);
        at += 1;
    }
    if at < bytes.len() && QUANTIFIERS.contains(&bytes[at]) {
        prefix.pop();
        at = last;
    }
    Some((prefix, &expression[at..]))
}

/// The text that every path begins with which an unusual expression matches, however it is understood.
fn certain_prefix(expression: &str) -> Vec<u8> {
    // An alternative may stand outside of all brackets.
    if expression.contains('|') {
        return Vec::new();
    }
    let bytes = expression.as_bytes();
    let end = bytes.iter().position(|byte| *byte == b'\\' || META.contains(byte)).unwrap_or(bytes.len());
    // What follows may be a quantifier.
    bytes[..end.saturating_sub(1)].to_vec()
}

/// Whether brackets nest simply, no alternative stands outside of them, and only punctuation is escaped.
fn is_plain(bytes: &[u8]) -> bool {
    let (mut depth, mut class) = (0_u32, false);
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], class) {
            (b'\\', _) => {
                at += 1;
                if !bytes.get(at).is_some_and(u8::is_ascii_punctuation) {
                    return false;
                }
            }
            // Inside of a class regex knows more classes and operations on them.
            (b'[', true) => return false,
            (byte @ (b'&' | b'-' | b'~'), true) if bytes.get(at + 1) == Some(&byte) => return false,
            (b']', true) => class = false,
            (b'[', false) => {
                class = true;
                at += usize::from(bytes.get(at + 1) == Some(&b'^'));
                // A bracket that comes first stands for itself.
                if bytes.get(at + 1) == Some(&b']') {
                    return false;
                }
            }
            (b'(', false) => depth += 1,
            (b')', false) if depth == 0 => return false,
            (b')', false) => depth -= 1,
            (b'|', false) if depth == 0 => return false,
            (b'^' | b'$', false) => return false,
            _ => {}
        }
        at += 1;
    }
    depth == 0 && !class
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
