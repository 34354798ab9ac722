//! mount: to be written.
