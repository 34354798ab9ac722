//! The choice among the node images of a release payload.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The choice of the node image in a release payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageChoice {
    /// Its name in the payload.
    pub tag: String,
    /// What decided.
    pub reason: String,
}

impl fmt::Display for ImageChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the node image is {} of the release payload: {}", self.tag, self.reason)
    }
}
