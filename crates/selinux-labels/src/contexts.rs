//! Finds the label that a policy's file contexts assign to a path, without trying every expression.
//!
//! The format is described in selabel_file(5), the order is that of libselinux 3.4. A line has an expression for whole
//! paths, an optional file type and a label. The last matching line decides, and a line without metacharacters precedes
//! all lines with metacharacters. `.homedirs` and `.local` follow the policy's own file. `.subs` and `.subs_dist`
//! rewrite a path first.
//!
//! Since libselinux 3.8, the line with the longest literal text decides among those with metacharacters, and their
//! order decides only between equals. If the two rules disagree about a path, the caller must ask libselinux.
//!
//! libselinux tries thousands of expressions for each path. This module tries a line only for paths that begin with the
//! line's literal text, and most lines need no expression at all. It leaves paths that an unusual line may match to
//! libselinux: [`Contexts::find`] returns `None` for them. [`Contexts::parse`] returns `None` for unusual files.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use regex::bytes::{Regex, RegexBuilder};

/// Characters that end the literal text of an expression in libselinux.
const META: &[u8] = b".^$?*+|[({";
/// Characters that apply to the character before them.
const QUANTIFIERS: &[u8] = b"?*{+";
/// Memory limit of one compiled expression, in bytes.
const EXPRESSION_LIMIT: usize = 1 << 20;

/// The file contexts of one policy.
#[derive(Debug)]
pub struct Contexts {
    /// In ascending precedence: the order of the files, but lines without metacharacters last.
    specs: Vec<Spec>,
    /// Indices of the specs that begin with a literal text, by that text.
    by_prefix: HashMap<Vec<u8>, Vec<usize>>,
    /// The length of the longest key of `by_prefix`, in bytes.
    longest_prefix: usize,
    /// Local substitutions, then the distribution's: source and replacement.
    substitutions: [Vec<(String, String)>; 2],
    /// True after [`Found::confirm`] for a path that no line matches.
    none_confirmed: AtomicBool,
    /// True after [`Contexts::refute`].
    refuted: AtomicBool,
}

/// One line of the file contexts.
#[derive(Debug)]
struct Spec {
    /// The file type bits of a mode; `None` matches every type.
    kind: Option<u32>,
    /// The precedence in libselinux 3.8: the length of the literal text, then that of the expression.
    rank: (usize, usize),
    rest: Rest,
    /// `None` for `<<none>>`.
    label: Option<String>,
    confirmed: AtomicBool,
}

/// The part of an expression after its literal text.
#[derive(Debug)]
enum Rest {
    Nothing,
    /// `(/.*)?`
    Below,
    /// `.*`
    Anything,
    /// An expression that only libselinux can match.
    Unusual,
    /// The whole expression, and its compiled form (`None` if it does not compile).
    Expression(String, OnceLock<Option<Regex>>),
}

/// The texts of one policy's file contexts. The text of a missing file is empty.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Texts {
    /// `file_contexts`, `file_contexts.homedirs` and `file_contexts.local`.
    pub contexts: [String; 3],
    /// `file_contexts.subs` and `file_contexts.subs_dist`.
    pub substitutions: [String; 2],
}

/// The result of [`Contexts::find`]. A caller that has compared it with libselinux's answer can [`Found::confirm`] it.
#[derive(Debug, Clone, Copy)]
pub struct Found<'a> {
    /// The label; `None` if no line matches, or the line has `<<none>>`.
    pub label: Option<&'a str>,
    confirmed: &'a AtomicBool,
}

impl Found<'_> {
    /// Returns true if [`Found::confirm`] was called for a result of the same line.
    pub fn is_confirmed(&self) -> bool {
        self.confirmed.load(Ordering::Relaxed)
    }

    /// Marks the line as confirmed: libselinux gives the same label.
    pub fn confirm(&self) {
        self.confirmed.store(true, Ordering::Relaxed);
    }
}

/// The suffixes of the file names, in the order of [`Texts`].
const SUFFIXES: [&str; 5] = ["", ".homedirs", ".local", ".subs", ".subs_dist"];

impl Texts {
    /// Writes a policy that consists of these file contexts to `selinux`, a directory like `/etc/selinux`.
    pub fn write(&self, selinux: &Path) -> io::Result<()> {
        let files = selinux.join("only/contexts/files");
        std::fs::create_dir_all(&files)?;
        std::fs::write(selinux.join("config"), "SELINUX=enforcing\nSELINUXTYPE=only\n")?;
        // libostree requires a binary policy, but does not read it.
        std::fs::create_dir_all(selinux.join("only/policy"))?;
        std::fs::write(selinux.join("only/policy/policy.33"), "")?;
        for (suffix, text) in SUFFIXES.iter().zip(self.contexts.iter().chain(&self.substitutions)) {
            std::fs::write(files.join(format!("file_contexts{suffix}")), text)?;
        }
        Ok(())
    }

    /// Returns the labels of all lines, with duplicates.
    pub fn labels(&self) -> impl Iterator<Item = &str> {
        let lines = self.contexts.iter().flat_map(|text| text.lines());
        lines.filter(|line| !line.trim_start().starts_with('#')).filter_map(|line| line.split_ascii_whitespace().last())
    }

    /// Reads the file `file_contexts` and those beside it with the suffixes.
    ///
    /// # Errors
    /// `file_contexts` is missing, or one of the files cannot be read.
    pub fn read(file_contexts: &Path) -> io::Result<Self> {
        let beside = |suffix: &str| {
            let mut name = file_contexts.as_os_str().to_owned();
            name.push(suffix);
            support::if_found(std::fs::read_to_string(&name)).map(Option::unwrap_or_default)
        };
        Ok(Self {
            contexts: [std::fs::read_to_string(file_contexts)?, beside(".homedirs")?, beside(".local")?],
            substitutions: [beside(".subs")?, beside(".subs_dist")?],
        })
    }
}

impl Contexts {
    /// Parses the texts. Returns `None` if one of them has a line that libselinux may refuse.
    pub fn parse(texts: &Texts) -> Option<Self> {
        let mut parsed = Vec::new();
        for line in texts.contexts.iter().flat_map(|text| text.lines()) {
            if let Some(fields) = fields(line)? {
                parsed.push(Spec::parse(&fields)?);
            }
        }
        // A stable sort keeps the order of the files within both kinds.
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

    /// Finds the line for `path` and the file type in `mode`. `path` is absolute, without repeated or trailing slashes.
    /// Returns `None` if the caller must ask libselinux.
    pub fn find(&self, path: &str, mode: u32) -> Option<Found<'_>> {
        const S_IFMT: u32 = 0o170_000;
        // `$` of PCRE also matches before a line feed at the end of a text, `$` of regex does not.
        if self.refuted.load(Ordering::Relaxed) || path.contains('\n') {
            return None;
        }
        let path = self.substitute(path);
        let path = path.as_bytes();
        let mut candidates: Vec<usize> = (0..=path.len().min(self.longest_prefix))
            .filter_map(|length| self.by_prefix.get(&path[..length]).map(|specs| (length, specs)))
            .flat_map(|(length, specs)| {
                let may_match = move |&spec: &usize| self.specs[spec].may_match(path, length, mode & S_IFMT);
                specs.iter().copied().filter(may_match)
            })
            .collect();
        candidates.sort_unstable();
        let mut candidates = candidates.into_iter().rev().map(|spec| &self.specs[spec]);
        while let Some(spec) = candidates.next() {
            if !spec.matches(path)? {
                continue;
            }
            // An earlier line that libselinux 3.8 would prefer.
            for other in candidates.filter(|other| other.rank >= spec.rank && other.label != spec.label) {
                if other.matches(path)? {
                    return None;
                }
            }
            return Some(Found { label: spec.label.as_deref(), confirmed: &spec.confirmed });
        }
        Some(Found { label: None, confirmed: &self.none_confirmed })
    }

    /// Makes [`Contexts::find`] return `None` from now on, because a result differed from libselinux's label.
    pub fn refute(&self) {
        self.refuted.store(true, Ordering::Relaxed);
    }

    /// Applies the local substitutions first, and those of the distribution to the result.
    fn substitute(&self, path: &str) -> String {
        let mut path = path.to_owned();
        for list in &self.substitutions {
            // The last matching line decides.
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
    /// Parses the fields of a line. Returns the literal text that its expression begins with, and the spec.
    fn parse(fields: &[&str]) -> Option<(Vec<u8>, Self)> {
        let (expression, kind, label) = match fields {
            [expression, label] => (*expression, None, *label),
            [expression, kind, label, ..] => (*expression, Some(kind_bits(kind)?), *label),
            _ => return None,
        };
        let (prefix, literal, rest) = match split(expression) {
            None => (certain_prefix(expression), usize::MAX, Rest::Unusual),
            Some((prefix, rest)) => {
                // Lines without metacharacters precede all others.
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

    /// Returns false if the type or the length of `path` excludes a match. The first `length` bytes of `path` are the
    /// literal text of the expression.
    fn may_match(&self, path: &[u8], length: usize, kind: u32) -> bool {
        let rest = &path[length..];
        (kind == 0 || self.kind.is_none_or(|only| only == kind))
            && match self.rest {
                Rest::Nothing => rest.is_empty(),
                Rest::Below => rest.is_empty() || rest[0] == b'/',
                Rest::Anything | Rest::Unusual | Rest::Expression(..) => true,
            }
    }

    /// Returns true if the expression matches a path for which [`Spec::may_match`] is true. Returns `None` if only
    /// libselinux can decide.
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

/// Returns the fields of a line, and `Some(None)` for a comment or an empty line. Returns `None` if the line is not
/// ASCII; libselinux refuses such a line.
fn fields(line: &str) -> Option<Option<Vec<&str>>> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    match fields.first() {
        None => Some(None),
        Some(first) if first.starts_with('#') => Some(None),
        Some(_) => line.is_ascii().then_some(Some(fields)),
    }
}

/// Returns the file type bits of a mode for the second field of a line, such as `--` or `-d`.
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

/// Splits an expression into the literal text that it begins with, and the rest. Returns `None` if PCRE and regex may
/// interpret the expression differently, or if libselinux splits it at another position.
fn split(expression: &str) -> Option<(Vec<u8>, &str)> {
    let bytes = expression.as_bytes();
    // libselinux treats a first component without metacharacters as literal text, including backslashes.
    let first = bytes.iter().skip(1).position(|byte| *byte == b'/').map_or(&[][..], |end| &bytes[..=end]);
    let literal = !first.iter().any(|byte| META.contains(byte));
    // It compares that component separately: a quantifier of the following slash does not make that slash optional.
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
    // Position of the last literal character, to which a quantifier would apply.
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

/// Returns a prefix of all paths that an unusual expression matches, independent of how PCRE interprets it.
fn certain_prefix(expression: &str) -> Vec<u8> {
    // An alternative can be outside of all brackets.
    if expression.contains('|') {
        return Vec::new();
    }
    let bytes = expression.as_bytes();
    let end = bytes.iter().position(|byte| *byte == b'\\' || META.contains(byte)).unwrap_or(bytes.len());
    // The next character can be a quantifier of the last one.
    bytes[..end.saturating_sub(1)].to_vec()
}

/// Returns true if brackets nest simply, no alternative is outside of them, and only punctuation is escaped.
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
            // regex supports nested classes and operations on classes, PCRE does not.
            (b'[', true) => return false,
            (byte @ (b'&' | b'-' | b'~'), true) if bytes.get(at + 1) == Some(&byte) => return false,
            (b']', true) => class = false,
            (b'[', false) => {
                class = true;
                at += usize::from(bytes.get(at + 1) == Some(&b'^'));
                // In PCRE, `]` at the beginning of a class is a member of the class.
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
