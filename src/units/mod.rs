//! units: to be written.
