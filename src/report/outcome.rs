//! Classifies the end of a call. Exit code, D-Bus error name and the words of the status document derive from it.

use serde::{Deserialize, Serialize};
use strum::{EnumIter, EnumMessage, IntoStaticStr};

/// The end of a call.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, EnumIter, EnumMessage, IntoStaticStr, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum Outcome {
    /// The goal is reached, or there is nothing to do.
    Done,
    /// A check refused before anything changed.
    Refused,
    /// Another attempt would give the same result.
    Permanent,
    /// Another attempt might help, but the configured attempts or time are used up.
    GaveUp,
    /// A caller asked to stop.
    Cancelled,
    /// The pivot has not ended; only `status --exit-code` reports it.
    Pending,
    /// Any other failure; the message has the cause.
    #[default]
    #[serde(other)]
    Internal,
}

/// Names of each outcome: exit code, and the last part of the D-Bus error's name.
const TABLE: [(Outcome, u8, &str); 7] = [
    (Outcome::Done, 0, ""),
    (Outcome::Internal, 1, "Failed"),
    (Outcome::Refused, 10, "Refused"),
    (Outcome::Permanent, 11, "Permanent"),
    (Outcome::Cancelled, 12, "Cancelled"),
    (Outcome::GaveUp, 13, "GaveUp"),
    (Outcome::Pending, 14, ""),
];

impl Outcome {
    fn row(self) -> (u8, &'static str) {
        TABLE.iter().find(|(outcome, ..)| *outcome == self).map_or((1, "Failed"), |(_, exit, name)| (*exit, *name))
    }

    /// Returns the exit code, which is documented and stable. clap exits with 2 for an invalid command line. Most codes
    /// begin at 10, because `systemctl status` shows 2 to 7 with the LSB's names for init scripts.
    pub fn exit_code(self) -> u8 {
        self.row().0
    }

    /// Returns its word in the status document and the journal.
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// Returns the last part of the D-Bus error's name; empty for [`Outcome::Done`].
    pub fn error_name(self) -> &'static str {
        self.row().1
    }

    /// Returns the outcome for a D-Bus error name. An error of another service is internal.
    pub fn of_error(name: &str) -> Self {
        let last = name.rsplit('.').next().unwrap_or_default();
        TABLE.iter().find(|(_, _, known)| *known == last && !last.is_empty()).map_or(Self::Internal, |row| row.0)
    }
}

/// The state of the running system after a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// Nothing of the running system was changed.
    Unchanged,
    /// `/usr` and `/etc` are the node image's; the refresh is not complete.
    Switched,
    /// The switch failed and was rolled back.
    RolledBack,
    /// The switch or an undo has begun and is not complete.
    HalfDone,
}

impl Standing {
    /// Returns the sentence about the state of the running system that ends a message.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::Unchanged => "the running system is unchanged",
            Self::Switched => {
                "/usr and /etc are switched: start node-image-overlay.service again to complete the refresh, or run undo"
            }
            Self::RolledBack => "rolled back: /usr and /etc are unchanged",
            Self::HalfDone => "the switch or undo is half done: run undo, again if it fails",
        }
    }
}

/// A reason for a refused call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Reason {
    /// Stable name of the check that refused.
    pub id: String,
    /// Cause and remedy.
    pub message: String,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn exit_code_error_name_and_word_agree() {
        for (outcome, exit, error, word) in [
            (Outcome::Done, 0, "", "done"),
            (Outcome::Internal, 1, "Failed", "internal"),
            (Outcome::Refused, 10, "Refused", "refused"),
            (Outcome::Permanent, 11, "Permanent", "permanent"),
            (Outcome::Cancelled, 12, "Cancelled", "cancelled"),
            (Outcome::GaveUp, 13, "GaveUp", "gave-up"),
            (Outcome::Pending, 14, "", "pending"),
        ] {
            assert_eq!((outcome.exit_code(), outcome.error_name()), (exit, error), "{outcome:?}");
            assert_eq!(serde_json::to_value(outcome).unwrap(), word);
            assert_eq!(outcome.as_str(), word);
            let name = format!("org.nodeimage.Pivot1.Error.{error}");
            let expected = if error.is_empty() { Outcome::Internal } else { outcome };
            assert_eq!(Outcome::of_error(&name), expected, "{name}");
        }
        assert_eq!(Outcome::of_error("org.freedesktop.DBus.Error.UnknownMethod"), Outcome::Internal);
    }
}
