//! Chooses this machine's node image among the images of a release payload. Pure.
//!
//! A payload may name images of several streams, such as `rhel-coreos` (RHEL 9) and `rhel-coreos-10`. Without a
//! configured name, the installer's script decides, then the booted system, then the payload if it has only one.

use super::ImageChoice;
use super::system::{System, major_of};

/// The installer's script that pulls the node image. Its text contains the tag as `coreos_img=NAME`.
pub const PULL_SCRIPT: &str = "/usr/local/bin/node-image-pull.sh";

/// Inputs of the choice, by priority.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct TagHints {
    /// Names from the configuration, in order of preference.
    pub configured: Option<Vec<String>>,
    /// Text of the installer's script.
    pub script: Option<String>,
    /// Text of the booted system's os-release.
    pub os_release: Option<String>,
}

/// A tag of a payload.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tag<'a> {
    pub name: &'a str,
    /// Value of the annotation `io.openshift.os.streamclass`.
    pub class: Option<&'a str>,
}

/// Reason why no tag was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NoChoice {
    /// The payload has none of these names.
    Missing(Vec<String>),
    /// The payload has these candidates, and no input decides.
    Ambiguous(Vec<String>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Rhel,
    CentosStream,
    Fedora,
}

/// A line of releases. For Fedora, the major version is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stream {
    family: Family,
    major: u32,
}

impl Stream {
    /// Returns true if the two streams are the same or differ only in the vendor.
    fn resembles(self, other: Self) -> bool {
        self.major == other.major && (self.family == Family::Fedora) == (other.family == Family::Fedora)
    }

    fn name(self) -> String {
        match self.family {
            Family::Rhel | Family::CentosStream => format!("el{}", self.major),
            Family::Fedora => "Fedora".to_owned(),
        }
    }
}

/// Chooses a tag and gives the reason.
pub(super) fn choose(hints: &TagHints, tags: &[Tag<'_>]) -> Result<ImageChoice, NoChoice> {
    let present = |wanted: &[String]| wanted.iter().find(|name| tags.iter().any(|tag| tag.name == **name)).cloned();
    let chosen = |tag: String, reason: String| Ok(ImageChoice { tag, reason });
    if let Some(wanted) = &hints.configured {
        let tag = present(wanted).ok_or_else(|| NoChoice::Missing(wanted.clone()))?;
        return chosen(tag, "image_tags names it".to_owned());
    }
    let of_script = hints.script.as_deref().map(script_tags).unwrap_or_default();
    if let Some(tag) = present(&of_script) {
        return chosen(tag, format!("{PULL_SCRIPT} names it"));
    }
    let known: Vec<(&str, Stream)> = tags.iter().filter_map(|tag| Some((tag.name, tag_stream(tag)?))).collect();
    let booted = hints.os_release.as_deref().and_then(booted_stream);
    if let Some(booted) = booted {
        let mut fitting: Vec<_> = known.iter().filter(|(_, stream)| stream.resembles(booted)).collect();
        if fitting.len() > 1 {
            fitting.retain(|(_, stream)| stream.family == booted.family);
        }
        if let [(tag, _)] = fitting.as_slice() {
            return chosen((*tag).to_owned(), format!("the booted system is {}", booted.name()));
        }
    }
    match known.as_slice() {
        [] => Err(NoChoice::Missing(
            ["rhel-coreos", "rhel-coreos-10", "stream-coreos", "stream-coreos-10", "fedora-coreos"]
                .map(str::to_owned)
                .to_vec(),
        )),
        [(tag, _)] => chosen((*tag).to_owned(), "the payload has no other CoreOS image".to_owned()),
        several => Err(NoChoice::Ambiguous(several.iter().map(|(name, _)| (*name).to_owned()).collect())),
    }
}

/// Returns the names that a script assigns to `coreos_img`, the last first: a later assignment wins in the shell.
fn script_tags(script: &str) -> Vec<String> {
    let value = |line: &str| {
        let line = line.trim_start();
        let value = ["local ", "export ", "readonly "]
            .into_iter()
            .find_map(|word| line.strip_prefix(word))
            .unwrap_or(line)
            .strip_prefix("coreos_img=")?;
        let value = value.split([' ', '\t', ';', '#']).next()?.trim_matches(['"', '\'']);
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        (!value.is_empty() && value.bytes().all(plain)).then(|| value.to_owned())
    };
    let mut names: Vec<String> = script.lines().filter_map(value).collect();
    names.reverse();
    names
}

/// Returns the stream of a tag, or `None` for other images, extensions included.
fn tag_stream(tag: &Tag<'_>) -> Option<Stream> {
    let (family, rest) =
        [("rhel-coreos", Family::Rhel), ("stream-coreos", Family::CentosStream), ("fedora-coreos", Family::Fedora)]
            .into_iter()
            .find_map(|(name, family)| Some((family, tag.name.strip_prefix(name)?)))?;
    let major = match (family, rest) {
        (Family::Fedora, "") => 0,
        (Family::Fedora, _) => return None,
        (_, "") => 9,
        (_, rest) => rest.strip_prefix('-')?.parse().ok()?,
    };
    let annotated = tag.class.filter(|_| family != Family::Fedora).and_then(major_of);
    Some(Stream { family, major: annotated.unwrap_or(major) })
}

fn booted_stream(os_release: &str) -> Option<Stream> {
    let system = System::parse(os_release)?;
    let family = match system.distribution.as_str() {
        "fedora" => return Some(Stream { family: Family::Fedora, major: 0 }),
        "centos" => Family::CentosStream,
        "rhel" => Family::Rhel,
        _ if system.is_el => Family::Rhel,
        _ => return None,
    };
    Some(Stream { family, major: system.major? })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const EL9: &str =
        "NAME=\"Red Hat Enterprise Linux CoreOS\"\nID=\"rhel\"\nVERSION_ID=\"9.6\"\nPLATFORM_ID=\"platform:el9\"\n";
    const EL10: &str = "ID=\"rhel\"\nVERSION_ID=\"10.1\"\nPLATFORM_ID=\"platform:el10\"\n";
    const RHCOS: &str = "ID=\"rhcos\"\nVERSION_ID=\"4.16\"\nRHEL_VERSION=9.4\n";
    const CENTOS: &str = "ID=\"centos\"\nVERSION_ID=\"10\"\n";
    const FEDORA: &str = "ID=fedora\nVERSION_ID=43\nPLATFORM_ID=\"platform:f43\"\n";
    const DEBIAN: &str = "ID=debian\nVERSION_ID=12\n";

    fn chosen(configured: Option<&[&str]>, script: &str, os_release: &str, tags: &[&str]) -> Result<String, NoChoice> {
        let configured = configured.map(|names| names.iter().map(|&name| name.to_owned()).collect());
        let hints = TagHints { configured, script: Some(script.into()), os_release: Some(os_release.into()) };
        let tags: Vec<Tag> = tags
            .iter()
            .map(|tag| match tag.split_once('=') {
                Some((name, class)) => Tag { name, class: Some(class) },
                None => Tag { name: tag, class: None },
            })
            .collect();
        choose(&hints, &tags).map(|choice| choice.tag)
    }

    #[test]
    fn configuration_then_script_then_booted_system_decide() {
        const DUAL: &[&str] = &[
            "etcd",
            "rhel-coreos=rhel-9",
            "rhel-coreos-extensions",
            "rhel-coreos-10=rhel-10",
            "rhel-coreos-10-extensions",
        ];
        const BARE: &[&str] = &["rhel-coreos", "rhel-coreos-10"];
        const OKD: &[&str] = &["stream-coreos", "stream-coreos-extensions", "stream-coreos-10"];
        let script_of_10 = "set -e\ncoreos_img=rhel-coreos-10\nostree x\n";
        for (configured, script, os_release, tags, expected) in [
            (Some(&["rhel-coreos-10"][..]), "coreos_img=rhel-coreos", EL9, DUAL, "rhel-coreos-10"),
            (Some(&["x", "rhel-coreos"][..]), script_of_10, EL10, DUAL, "rhel-coreos"),
            (None, script_of_10, EL9, DUAL, "rhel-coreos-10"),
            (None, "  coreos_img=\"rhel-coreos\"; x", EL10, DUAL, "rhel-coreos"),
            (None, "coreos_img=rhel-coreos\ncoreos_img='rhel-coreos-10'", EL9, DUAL, "rhel-coreos-10"),
            (None, "coreos_img=$(image_for x)", EL9, DUAL, "rhel-coreos"),
            (None, "coreos_img=gone", EL9, DUAL, "rhel-coreos"),
            (None, "", EL9, DUAL, "rhel-coreos"),
            (None, "", EL10, DUAL, "rhel-coreos-10"),
            (None, "", RHCOS, BARE, "rhel-coreos"),
            (None, "", EL10, BARE, "rhel-coreos-10"),
            (None, "", EL10, &["rhel-coreos=rhel-10.1", "rhel-coreos-9=rhel-9"][..], "rhel-coreos"),
            (None, "", CENTOS, OKD, "stream-coreos-10"),
            (None, "", CENTOS, &["rhel-coreos-10", "stream-coreos-10"][..], "stream-coreos-10"),
            (None, "", FEDORA, &["fedora-coreos", "stream-coreos"][..], "fedora-coreos"),
            (None, "", FEDORA, &["stream-coreos", "etcd"][..], "stream-coreos"),
            (None, "", EL9, &["rhel-coreos-10"][..], "rhel-coreos-10"),
            (None, "", DEBIAN, &["rhel-coreos"][..], "rhel-coreos"),
        ] {
            assert_eq!(
                chosen(configured, script, os_release, tags).as_deref(),
                Ok(expected),
                "{script:?} {os_release:?} {tags:?}"
            );
        }
        let ambiguous = |names: &[&str]| Err(NoChoice::Ambiguous(names.iter().map(|&name| name.to_owned()).collect()));
        assert_eq!(chosen(None, "", DEBIAN, BARE), ambiguous(BARE));
        assert_eq!(chosen(None, "", FEDORA, OKD), ambiguous(&["stream-coreos", "stream-coreos-10"]));
        assert!(matches!(chosen(Some(&["gone"]), "", EL9, DUAL), Err(NoChoice::Missing(names)) if names == ["gone"]));
        assert!(matches!(chosen(None, "", EL9, &["etcd"]), Err(NoChoice::Missing(_))));
    }

    #[test]
    fn the_reason_names_the_input_that_decided() {
        let hints = TagHints { os_release: Some(EL9.into()), ..TagHints::default() };
        let tags = [Tag { name: "rhel-coreos", class: None }, Tag { name: "rhel-coreos-10", class: None }];
        assert_eq!(choose(&hints, &tags).unwrap().reason, "the booted system is el9");
    }
}
