#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use super::*;

const BASH: &str = "source /dev/stdin; COMP_WORDS=(node-image-pivot \"$@\"); COMP_CWORD=$#
    _node__image__pivot node-image-pivot \"${@: -1}\" \"${COMP_WORDS[COMP_CWORD - 1]}\"
    printf '%s\\n' \"${COMPREPLY[@]}\"";
const FISH: &str = "source -; complete --do-complete \"node-image-pivot $argv[2..]\"";
/// The function that completes needs a terminal. It gets the options from a call of `_arguments`.
const ZSH: &str = "compdef() { [[ $2 == node-image-pivot ]] }
    _arguments() { (( ++calls == depth )) && print -rl -- \"$@\"; state=node-image-pivot; line=($command) }
    command=$1; depth=$#; words=(); CURRENT=1; source /dev/stdin && _node-image-pivot";

/// Returns all commands of the command line with their names.
pub(in crate::cli) fn commands() -> Vec<(Vec<String>, clap::Command)> {
    let mut root = Arguments::command();
    root.build();
    let sub = |command: &clap::Command| (vec![command.get_name().to_owned()], command.clone());
    root.get_subcommands().map(sub).chain([(vec![], root.clone())]).collect()
}

/// Sources the completion script in its shell. Returns the options or commands that it offers for the last of these words.
fn completed(shell: Shell, words: &[&str]) -> BTreeSet<String> {
    let (program, code) = match shell {
        Shell::Bash => (&["bash", "--norc", "-c"][..], BASH),
        Shell::Fish => (&["fish", "--no-config", "-c"][..], FISH),
        _ => (&["zsh", "-f", "-c"][..], ZSH),
    };
    let mut child = Command::new(program[0])
        .args(&program[1..])
        .arg(code)
        .arg("completions")
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}; make deps-build installs it", program[0]));
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), script(shell).as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{shell} {words:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    // fish adds a description, zsh has other options before and a description behind.
    let offered = text.lines().filter_map(|line| match shell {
        Shell::Zsh => {
            let (_, name) = line.split(['[', '=']).next()?.rsplit_once("--")?;
            (!name.contains(' ')).then(|| format!("--{name}"))
        }
        _ => line.split('\t').next().filter(|word| !word.is_empty()).map(str::to_owned),
    });
    offered.collect()
}

#[test]
fn each_shell_completes_the_options_of_every_subcommand() {
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        for (words, command) in commands() {
            let longs = command.get_arguments().filter_map(clap::Arg::get_long).map(|name| format!("--{name}"));
            let line: Vec<_> = words.iter().map(String::as_str).chain(["--"]).collect();
            assert_eq!(completed(shell, &line), longs.collect(), "{shell}: {line:?}");
        }
    }
}

#[test]
fn bash_and_fish_complete_the_subcommands() {
    for shell in [Shell::Bash, Shell::Fish] {
        for (words, _) in commands() {
            if let [name] = words.as_slice() {
                assert!(completed(shell, &[name.as_str()]).contains(name), "{shell}: {name}");
            }
        }
    }
}
