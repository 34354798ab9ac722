//! A helper for tests.

use super::Namespace;

/// Returns the namespace of the calling thread.
pub fn here() -> Namespace {
    Namespace::of(rustix::thread::gettid().as_raw_nonzero().get())
}
