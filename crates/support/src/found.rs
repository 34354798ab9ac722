//! Files that may be missing.

use std::io;

/// Returns `None` if the file or directory does not exist.
///
/// # Errors
/// Any other error of the call.
pub fn if_found<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// Accepts that a file or directory to remove does not exist.
///
/// # Errors
/// Any other error of the call.
pub fn ignore_missing(removed: io::Result<()>) -> io::Result<()> {
    if_found(removed).map(drop)
}
