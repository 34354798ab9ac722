//! The distribution and the major release of a system, from its os-release. Pure.

use std::fmt;

/// A distribution and its major release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct System {
    /// `ID` of os-release; `rhel` and `centos` also for their CoreOS variants.
    pub distribution: String,
    /// Major release, if os-release names one. Fedora has none: it updates from each release to the next.
    pub major: Option<u32>,
    /// True if the platform is Enterprise Linux, whichever the distribution.
    pub(super) is_el: bool,
}

impl System {
    /// Returns the system that an os-release describes, or `None` if it has no `ID`.
    pub fn parse(os_release: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = os_release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
            Some(line.trim().trim_matches(['"', '\'']))
        };
        let id = field("ID").filter(|id| !id.is_empty())?;
        let distribution = match id {
            "rhcos" => "rhel",
            "scos" => "centos",
            id => id,
        };
        let platform = field("PLATFORM_ID").filter(|platform| platform.starts_with("platform:el"));
        // With ID=rhcos, VERSION_ID is the version of the cluster.
        let version = field("RHEL_VERSION").or_else(|| field("VERSION_ID").filter(|_| id != "rhcos"));
        let major = platform.or(version).and_then(major_of).filter(|_| distribution != "fedora");
        Some(Self { distribution: distribution.to_owned(), major, is_el: platform.is_some() })
    }

    /// Returns true if the other system is another distribution, or is known to be another major release.
    pub fn differs_from(&self, other: &Self) -> bool {
        let releases = self.major.zip(other.major);
        self.distribution != other.distribution || releases.is_some_and(|(own, other)| own != other)
    }
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.distribution)?;
        self.major.iter().try_for_each(|major| write!(f, " {major}"))
    }
}

/// Returns the first number in a word such as `rhel-10`, `10.1` or `platform:el9`.
pub(super) fn major_of(word: &str) -> Option<u32> {
    let start = word.find(|c: char| c.is_ascii_digit())?;
    let digits = word[start..].split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const EL9: &str = "NAME=\"Red Hat Enterprise Linux CoreOS\"\nID=\"rhel\"\nVERSION_ID=\"9.6\"\n";

    #[test]
    fn systems_are_compared_by_distribution_and_major_release() {
        for (one, other, differs) in [
            (EL9, "ID=rhel\nVERSION_ID=9.8\n", false),
            (EL9, "ID=rhcos\nVERSION_ID=\"4.16\"\nRHEL_VERSION=9.4\n", false),
            (EL9, "ID=rhel\nVERSION_ID=10.1\n", true),
            (EL9, "ID=rhel\nVERSION_ID=4.22\nPLATFORM_ID=\"platform:el10\"\n", true),
            (EL9, "ID=centos\nVERSION_ID=9\n", true),
            ("ID=scos\nVERSION_ID=9\n", "ID=centos\nVERSION_ID=9\n", false),
            ("ID=fedora\nVERSION_ID=42\n", "ID=fedora\nVERSION_ID=43\n", false),
            ("ID=fedora\nVERSION_ID=43\n", EL9, true),
            ("ID=debian\nVERSION_ID=12\n", "ID=debian\nVERSION_ID=13\n", true),
            ("ID=debian\n", "ID=debian\nVERSION_ID=13\n", false),
        ] {
            let (one, other) = (System::parse(one).unwrap(), System::parse(other).unwrap());
            assert_eq!((one.differs_from(&other), other.differs_from(&one)), (differs, differs), "{one}, {other}");
        }
        assert_eq!(System::parse(EL9).unwrap().to_string(), "rhel 9");
        assert_eq!(System::parse("ID=fedora\nVERSION_ID=43\n").unwrap().to_string(), "fedora");
        assert_eq!(System::parse("NAME=x\nID=\n"), None);
    }
}
