//! The manual pages: 1 from the command line, 5 from the table of keys in `docs/configuration.md`, 8 for the daemon.

use clap_mangen::roff::{Roff, bold, roman};
use strum::{EnumMessage, IntoEnumIterator};

use crate::report::Outcome;

/// The documentation of the configuration, whose table of keys is page 5.
const CONFIGURATION: &str = include_str!("../../docs/configuration.md");
const NAME: &str = "node-image-pivot";

/// Files of the machine, and their content.
const FILES: [(&str, &str); 7] = [
    (
        "/etc/node-image-pivot.conf.d/*.toml",
        "configuration, also below /run and /usr/lib; see node-image-pivot.conf(5)",
    ),
    ("/etc/node-image-pivot/{pre,post}-switch.d", "hooks, also below /run and /usr/lib"),
    ("/run/node-image-pivot", "state of the agent, and a packed agent; a reboot removes both"),
    ("/run/node-image-pivot/state.json, plan.json, timeline.json", "record, plan of the switch, timeline"),
    ("/run/node-image-pivot/socket", "private socket of the agent, for root"),
    ("/run/issue.d, /run/motd.d", "the cause and the command to run, at login prompts and logins"),
    ("/var/log/openshift", "service records, where a cluster installer collects them"),
];

/// Returns a manual page, or `None` if there is none in this section.
pub(super) fn page(section: u8, command: clap::Command) -> Option<String> {
    let mut roff = Roff::new();
    match section {
        1 => commands(&mut roff, command),
        5 => configuration(&mut roff),
        8 => daemon(&mut roff),
        _ => return None,
    }
    Some(roff.to_roff())
}

fn title(roff: &mut Roff, name: &str, section: &str, about: &str) {
    roff.control("TH", [name, section, "", concat!("node-image-pivot ", env!("CARGO_PKG_VERSION"))]);
    roff.control("SH", ["NAME"]).text([roman(format!("{name} - {about}"))]);
}

/// Adds an entry with a tag.
fn entry(roff: &mut Roff, tag: &str, text: &str) {
    roff.control("TP", []).text([bold(tag)]).text([roman(text)]);
}

fn see_also(roff: &mut Roff, pages: &[&str]) {
    roff.control("SH", ["SEE ALSO"]).text([roman(pages.join(", "))]);
}

fn commands(roff: &mut Roff, mut command: clap::Command) {
    command.build();
    title(roff, NAME, "1", "turn the running base system into its node image");
    roff.control("SH", ["SYNOPSIS"]).text([bold(NAME), roman(" COMMAND [OPTIONS]")]);
    roff.control("SH", ["DESCRIPTION"]).text([roman(
        "A base system that has booted becomes its node image without a reboot: the agent pulls the image, checks it, \
         exposes its /usr over the running one, merges /etc, and restarts what still runs old code. Most commands \
         are clients of the agent, node-image-pivotd(8). check, explain, pack, completions and man work without it; status, report \
         and gather read the record if it does not run.",
    )]);
    roff.control("SH", ["COMMANDS"]);
    for (name, sub) in leaves(&command) {
        let arguments = sub.get_positionals().map(|argument| format!(" {argument}")).collect::<String>();
        roff.control("SS", [format!("{name}{arguments}").as_str()]);
        let about = sub.get_long_about().or_else(|| sub.get_about()).map(ToString::to_string).unwrap_or_default();
        for paragraph in about.split("\n\n") {
            roff.control("PP", []).text([roman(paragraph.replace('\n', " "))]);
        }
        for argument in sub.get_arguments().filter(|argument| argument.get_id() != "help") {
            let help = argument.get_long_help().or_else(|| argument.get_help()).map(ToString::to_string);
            let help = help.unwrap_or_default().replace("\n\n", ". ").replace('\n', " ");
            entry(roff, &argument.to_string(), &help);
        }
    }
    roff.control("SH", ["EXIT STATUS"]);
    for outcome in Outcome::iter() {
        let text = outcome.get_documentation().unwrap_or_default().replace('\n', " ");
        entry(roff, &outcome.exit_code().to_string(), &text);
    }
    entry(roff, "2", "The command line is invalid.");
    roff.control("SH", ["FILES"]);
    FILES.iter().for_each(|(file, text)| entry(roff, file, text));
    see_also(roff, &["node-image-pivot.conf(5)", "node-image-pivotd(8)", "journalctl(1)", "systemctl(1)"]);
}

/// Returns the commands that do something, with their names, such as `pack initrd`.
fn leaves(command: &clap::Command) -> Vec<(String, &clap::Command)> {
    let subcommands = command.get_subcommands().filter(|sub| sub.get_name() != "help");
    let below = subcommands.flat_map(|sub| match sub.has_subcommands() {
        true => leaves(sub).into_iter().map(|(name, leaf)| (format!("{} {name}", sub.get_name()), leaf)).collect(),
        false => vec![(sub.get_name().to_owned(), sub)],
    });
    below.collect()
}

/// Returns the rows of the table of keys: key, type, default and meaning.
fn keys() -> impl Iterator<Item = [String; 4]> {
    let section = CONFIGURATION.split("\n## Keys\n").nth(1).unwrap_or_default().trim_start();
    let table = section.split("\n\n").next().unwrap_or_default();
    table.lines().skip(2).filter_map(|row| {
        let cells: Vec<String> = row.trim_matches('|').split(" | ").map(|cell| plain(cell.trim())).collect();
        cells.try_into().ok()
    })
}

/// Removes the marks of Markdown: links and code.
fn plain(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, link)) = rest.split_once('[') {
        out.push_str(before);
        match link.split_once("](").and_then(|(name, target)| Some((name, target.split_once(')')?.1))) {
            Some((name, after)) => {
                out.push_str(name);
                rest = after;
            }
            None => {
                out.push('[');
                rest = link;
            }
        }
    }
    out.push_str(rest);
    out.replace('`', "")
}

fn configuration(roff: &mut Roff) {
    title(roff, "node-image-pivot.conf", "5", "configuration of the node image pivot");
    roff.control("SH", ["DESCRIPTION"]).text([roman(
        "Drop-in files /usr/lib, /run and /etc/node-image-pivot.conf.d/*.toml, in TOML. A file hides a file of the same \
         name in an earlier directory. The files are read in the order of their names; later ones win key by key. The \
         kernel command line wins over files: node-image-pivot=MODE, node-image-pivot.image=, \
         node-image-pivot.release-image=, node-image-pivot.target=. The agent reads the configuration again for each call.",
    )]);
    roff.control("SH", ["KEYS"]);
    for [key, kind, default, meaning] in keys() {
        let default = match default.as_str() {
            "–" => String::new(),
            // Below the table of the documentation.
            "see below" => " The default is detected.".to_owned(),
            default => format!(" Default: {default}."),
        };
        entry(roff, &key, &format!("{kind}. {meaning}.{default}"));
    }
    roff.control("SH", ["EXAMPLE"]).control("nf", []);
    roff.text([roman("# /etc/node-image-pivot.conf.d/50-image.toml")]);
    roff.text([roman("image = \"registry.example.com/node@sha256:...\"")]);
    roff.text([roman("[retry]")]).text([roman("maximum = 30")]).control("fi", []);
    see_also(roff, &["node-image-pivot(1)", "node-image-pivotd(8)", "containers-auth.json(5)"]);
}

fn daemon(roff: &mut Roff) {
    title(roff, "node-image-pivotd", "8", "agent of the node image pivot");
    roff.control("SH", ["SYNOPSIS"]).text([bold("node-image-pivotd.service")]);
    roff.control("SH", ["DESCRIPTION"]).text([roman(
        "The agent does the work of the pivot. It serves org.nodeimage.Pivot1 on the system bus (methods for root; \
         properties, signals and the report for all users) and on a private socket, which works without a bus. \
         node-image-pull.service, node-image-overlay.service and node-image-finish.service ask it for the phases.",
    )]);
    roff.control("PP", []).text([roman(
        "The agent writes its record after each phase and before each step of the switch. If it is killed, systemd starts \
         it again, and it completes the switch or the undo. After five failed starts in ten minutes, run systemctl \
         reset-failed node-image-pivotd.service.",
    )]);
    roff.control("PP", []).text([roman(
        "SIGTERM cancels a pull, waits for a running switch or undo, and ends the agent. NODE_IMAGE_PIVOT_LOG sets the \
         filter of its log, for example debug.",
    )]);
    roff.control("SH", ["FILES"]);
    FILES.iter().for_each(|(file, text)| entry(roff, file, text));
    see_also(roff, &["node-image-pivot(1)", "node-image-pivot.conf(5)", "systemd.service(5)"]);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// Returns a page as plain words.
    fn words(section: u8) -> String {
        page(section, super::super::Arguments::command()).unwrap().replace('\\', "")
    }

    #[test]
    fn page_1_has_every_command_option_and_exit_code() {
        let page = words(1);
        let mut command = super::super::Arguments::command();
        command.build();
        for (name, sub) in leaves(&command) {
            let lines = [format!(".SS {name}\n"), format!(".SS \"{name} "), format!(".SS \"{name}\"\n")];
            assert!(lines.iter().any(|line| page.contains(line)), "{name}");
            for long in sub.get_arguments().filter_map(clap::Arg::get_long).filter(|long| *long != "help") {
                assert!(page.contains(&format!("--{long}")), "{name}: {long}");
            }
        }
        for code in ["0", "1", "2", "10", "11", "12", "13", "14"] {
            assert!(page.contains(&format!("fB{code}fR\n")), "{code}");
        }
    }

    #[test]
    fn page_5_has_every_key() {
        let page = words(5);
        let keys: Vec<String> = keys().map(|[key, ..]| key).collect();
        let section = CONFIGURATION.split("\n## Keys\n").nth(1).unwrap().split("\n`image` and").next().unwrap();
        assert_eq!(keys.len(), section.matches("\n| `").count(), "each row is read");
        assert!(keys.contains(&"retry.denied".to_owned()) && keys.contains(&"hooks.timeout".to_owned()), "{keys:?}");
        keys.iter().for_each(|key| assert!(page.contains(key.as_str()), "{key}"));
        assert!(!page.contains("](") && !page.contains('`'));
    }

    #[test]
    fn pages_refer_to_pages_that_exist() {
        let ours = ["node-image-pivot(1)", "node-image-pivot.conf(5)", "node-image-pivotd(8)"];
        let systems = ["containers-auth.json(5)", "journalctl(1)", "systemctl(1)", "systemd.service(5)"];
        for section in [1, 5, 8] {
            for word in words(section).split(|letter: char| letter.is_whitespace() || ",;:".contains(letter)) {
                let is_page = word.ends_with("(1)") || word.ends_with("(5)") || word.ends_with("(8)");
                assert!(!is_page || ours.contains(&word) || systems.contains(&word), "{section}: {word}");
            }
        }
        assert_eq!(page(2, super::super::Arguments::command()), None);
    }
}
