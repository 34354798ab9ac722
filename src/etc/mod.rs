//! etc: to be written.
