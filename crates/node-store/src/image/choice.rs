//! The chosen node image of a release payload.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The node image that was chosen in a release payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageChoice {
    /// Name of the image in the payload.
    pub tag: String,
    /// Reason of the choice.
    pub reason: String,
}

impl fmt::Display for ImageChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the node image is {} of the release payload: {}", self.tag, self.reason)
    }
}
