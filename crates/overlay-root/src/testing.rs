//! The calling thread's namespace, for tests.

use super::Namespace;

/// The namespace of the calling thread.
pub fn here() -> Namespace {
    Namespace::of(rustix::thread::gettid().as_raw_nonzero().get())
}
