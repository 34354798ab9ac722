//! Real systems for tests: a live bootimage under QEMU or systemd-nspawn, a real registry, and what to ask them.

pub mod check;
pub mod console;
pub mod container;
pub mod cuts;
pub mod deliver;
pub mod derived;
pub mod disk;
pub mod files;
pub mod guest;
pub mod ignition;
pub mod images;
pub mod in_use;
pub mod other_agent;
pub mod overlays;
pub mod page;
pub mod proc;
pub mod proxy;
pub mod registry;
pub mod scenario;
pub mod suite;
pub mod table;
pub mod unpivoted;
pub mod vm;
