//! The completion scripts.

use clap::CommandFactory;
use clap_complete::Shell;

use super::Arguments;

/// Returns the completion script of a shell.
pub(super) fn script(shell: Shell) -> String {
    // Written to memory, because clap panics if it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "node-image-pivot", &mut script);
    // For bash, clap_complete 4.6 writes the program's name in two forms, so that the label of a subcommand's options is
    // never reached. A version that fixes it leaves nothing to replace.
    String::from_utf8_lossy(&script).replace("node__subcmd__image__subcmd__pivot", "node__image__pivot")
}

#[cfg(test)]
#[path = "completions_tests.rs"]
pub(super) mod tests;
