//! Digests of manifests.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use crate::store::ObjectId;

/// The SHA-256 digest of a manifest: `sha256:` and 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest(ObjectId);

impl Digest {
    /// Computes the digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(ObjectId(Sha256::digest(bytes).into()))
    }
}

impl FromStr for Digest {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let digits = text.strip_prefix("sha256:").ok_or("its digest is not of the form sha256:…")?;
        digits.parse().map(Self).map_err(|_| "its digest is not 64 lower-case hexadecimal digits")
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

support::serialize_as_text!(Digest);
