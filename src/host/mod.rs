//! host: to be written.
