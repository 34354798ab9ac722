//! Byte strings for paths below `/etc`, with a readable text form.

use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::str::FromStr;

/// A byte string that need not be UTF-8.
///
/// In its text form (`Display`, `FromStr`, JSON), a backslash is `\\`, and bytes of control characters and of invalid
/// UTF-8 are `\xHH`.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub Vec<u8>);

impl Bytes {
    /// Returns the bytes as a path.
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    /// Appends one component to a path relative to `/etc`.
    pub(super) fn join(&self, name: &[u8]) -> Self {
        let mut path = self.0.clone();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        Self(path)
    }
}

impl From<&str> for Bytes {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for letter in chunk.valid().chars() {
                match letter {
                    '\\' => out.write_str("\\\\")?,
                    letter if letter.is_control() => {
                        letter.encode_utf8(&mut [0; 4]).bytes().try_for_each(|byte| write!(out, "\\x{byte:02x}"))?;
                    }
                    letter => out.write_char(letter)?,
                }
            }
            chunk.invalid().iter().try_for_each(|byte| write!(out, "\\x{byte:02x}"))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "\"{self}\"")
    }
}

const INVALID_ESCAPE: &str = "invalid escape: expected \\\\ or \\xHH";

impl FromStr for Bytes {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text.as_bytes();
        while let Some((&byte, tail)) = rest.split_first() {
            rest = match (byte, tail) {
                (b'\\', [b'\\', tail @ ..]) => {
                    bytes.push(b'\\');
                    tail
                }
                (b'\\', [b'x', high, low, tail @ ..]) => {
                    let digits = [*high, *low];
                    let digits = std::str::from_utf8(&digits).map_err(|_| INVALID_ESCAPE)?;
                    bytes.push(u8::from_str_radix(digits, 16).map_err(|_| INVALID_ESCAPE)?);
                    tail
                }
                (b'\\', _) => return Err(INVALID_ESCAPE),
                _ => {
                    bytes.push(byte);
                    tail
                }
            };
        }
        Ok(Self(bytes))
    }
}

support::serialize_as_text!(Bytes);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn unprintable_bytes_are_escaped() {
        assert_eq!(Bytes(b"a b/\xc3\xa4\\\n\xff".to_vec()).to_string(), "a b/ä\\\\\\x0a\\xff");
        for broken in ["\\", "\\x1", "\\xzz", "\\n"] {
            assert!(broken.parse::<Bytes>().is_err(), "{broken}");
        }
    }

    proptest! {
        #[test]
        fn text_and_json_preserve_all_bytes(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let bytes = Bytes(bytes);
            prop_assert_eq!(&bytes.to_string().parse::<Bytes>().unwrap(), &bytes);
            let json = serde_json::to_string(&bytes).unwrap();
            prop_assert_eq!(serde_json::from_str::<Bytes>(&json).unwrap(), bytes);
        }
    }
}
