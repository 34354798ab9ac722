//! The mode, which decides if a boot pivots.

use std::str::FromStr;

use crate::Problem;

/// Value of `node-image-pivot=` on the kernel command line and of `mode` in the configuration.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Pivot if none of the probe paths exists.
    #[default]
    Auto,
    /// Never pivot.
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
            _ => Err(Problem(format!("unknown mode \"{word}\": expected auto, off or force"))),
        }
    }
}

/// Paths that only a node image has. If one of them exists, the machine already runs a node image.
pub const DEFAULT_PROBE_PATHS: [&str; 2] = ["/usr/bin/oc", "/usr/bin/kubelet"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_modes_are_refused() {
        assert_eq!("force".parse(), Ok(Mode::Force));
        for bad in ["", "on", "OFF", "yes"] {
            assert!(bad.parse::<Mode>().is_err(), "{bad}");
        }
    }
}
