//! The mode: when to pivot.

use std::str::FromStr;

use crate::Problem;

/// `node-image-pivot=` on the kernel command line, `mode` in the configuration.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Pivot when none of the probe paths exists.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Pivot even if the probe paths exist.
    Force,
}

impl FromStr for Mode {
    type Err = Problem;

    fn from_str(word: &str) -> Result<Self, Problem> {
        match word {
            "auto" => Ok(Mode::Auto),
            "off" => Ok(Mode::Off),
            "force" => Ok(Mode::Force),
            _ => Err(Problem(format!("\"{word}\" is not a mode; write auto, off or force"))),
        }
    }
}

/// Paths that only the node image has: if any exists, the machine is one already.
pub const DEFAULT_PROBE_PATHS: [&str; 2] = ["/usr/bin/oc", "/usr/bin/kubelet"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes() {
        assert_eq!("force".parse(), Ok(Mode::Force));
        for bad in ["", "on", "OFF", "yes"] {
            assert!(bad.parse::<Mode>().is_err(), "{bad}");
        }
    }
}
