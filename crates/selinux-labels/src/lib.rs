//! SELinux labels: the kernel's SELinux state, the labels that a policy assigns to paths ([`contexts`]), and
//! relabelling entries of a running system for another policy ([`FileContexts::relabel`]).
//!
//! The crate does not load policies, and has no code that is specific to images or the pivot.
//!
//! ```
//! use selinux_labels::contexts::{Contexts, Texts};
//!
//! let lines = "/usr(/.*)?  system_u:object_r:usr_t:s0\n/usr/bin/.*  --  system_u:object_r:bin_t:s0\n";
//! let texts = Texts { contexts: [lines.into(), String::new(), String::new()], ..Texts::default() };
//! let contexts = Contexts::parse(&texts).expect("plain file contexts");
//! // The second argument is a mode: only regular files below /usr/bin are bin_t.
//! let found = contexts.find("/usr/bin/ls", 0o100_755).expect("no need to ask libselinux");
//! assert_eq!(found.label, Some("system_u:object_r:bin_t:s0"));
//! ```

pub mod contexts;
mod kernel;
mod policy;
mod relabel;

pub use kernel::{
    ATTRIBUTE, Mode, advice, context, may_write_unknown, mode, policy_format, policy_type, running_domains, type_of,
    types_of,
};
pub use policy::{open_contexts, open_policy};
pub use relabel::{FileContexts, LABELLED, Relabelled};
