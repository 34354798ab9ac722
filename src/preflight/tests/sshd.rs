//! The words are those of OpenSSH 9.2 and 10.0.

use super::*;

const NO_KEYS: &str = "sshd: no hostkeys available -- exiting.\n";
const TOO_OPEN: &str = "@@@@@@@@@@@@\n@         WARNING: UNPROTECTED PRIVATE KEY FILE!          @\n@@@@@@@@@@@@\n\
    Permissions 0640 for '/etc/ssh/rsa' are too open.\n\
    It is required that your private key files are NOT accessible by others.\nThis private key will be ignored.\n";

#[test]
fn what_sshd_says() {
    for (code, words, expected) in [
        (Some(0), "", Says::Fine),
        (Some(0), "/etc/ssh/sshd_config line 1: Deprecated option UseLogin\n", Says::Fine),
        (Some(255), "/etc/ssh/sshd_config.d/50-x.conf line 1: Bad key types '+ssh-dss'.\n", Says::Configuration),
        (
            Some(255),
            "/etc/ssh/sshd_config: line 121: Bad configuration option: Old\n\
             /etc/ssh/sshd_config: terminating, 1 bad configuration options\n",
            Says::Configuration,
        ),
        (
            Some(255),
            "Unknown authentication method \"foo\" in list\n\
             /etc/ssh/sshd_config line 1: invalid AuthenticationMethods method list.\n",
            Says::Configuration,
        ),
        // The environment of a trial.
        (Some(255), "Missing privilege separation directory: /run/sshd\n", Says::Fine),
        (Some(255), "/x line 1: Deprecated option UseLogin\nMissing privilege separation directory: /x\n", Says::Fine),
        (Some(255), "Privilege separation user sshd does not exist\n", Says::NotYet),
        (Some(1), NO_KEYS, Says::NotYet),
        (Some(1), &format!("Unable to load host key: /etc/ssh/rsa\n{NO_KEYS}"), Says::NotYet),
        // Host keys that are seen and refused; with a key that was not configured, only the banner is said.
        (Some(1), &format!("{TOO_OPEN}{NO_KEYS}"), Says::Modes),
        (
            Some(1),
            &format!(
                "{TOO_OPEN}Unable to load host key \"/etc/ssh/rsa\": bad permissions\n\
                 Unable to load host key: /etc/ssh/rsa\n{NO_KEYS}"
            ),
            Says::Modes,
        ),
        // One of them is missing: it may be made.
        (Some(1), &format!("{TOO_OPEN}Unable to load host key: /var/lib/ssh/ed25519\n{NO_KEYS}"), Says::NotYet),
        (
            Some(1),
            &format!(
                "Unable to load host key \"/etc/ssh/dsa\": error in libcrypto\nUnable to load host key: /etc/ssh/dsa\n\
                 {NO_KEYS}"
            ),
            Says::Keys,
        ),
        (Some(255), "bad addr or host: no.such.host (Temporary failure in name resolution)\n", Says::Unknown),
        (Some(255), "AuthorizedKeysCommand set without AuthorizedKeysCommandUser\n", Says::Unknown),
        (Some(127), "sshd: error while loading shared libraries: libwrap.so.0\n", Says::Unknown),
        (Some(255), "somewhere on line 4: x\n", Says::Unknown),
        (Some(1), "", Says::Unknown),
        (None, "/etc/ssh/sshd_config line 1: Deprecated option UseLogin\n", Says::Unknown),
    ] {
        assert_eq!(says(code, words), expected, "{code:?} {words}");
    }
}

#[test]
fn only_what_the_new_one_alone_refuses_is_refused() {
    const HERE: Use = Use { used: true, other_file: false, modes_mended: false };
    use Says::{Configuration, Fine, Keys, Modes, NotYet, Unknown};
    for (new, old, here, expected) in [
        (Fine, Some(Fine), HERE, Verdict::Nothing),
        (Fine, None, HERE, Verdict::Nothing),
        (Configuration, Some(Fine), HERE, Verdict::Refuse),
        (Modes, Some(Fine), HERE, Verdict::Refuse),
        (Keys, Some(Fine), HERE, Verdict::Refuse),
        (Configuration, Some(Fine), Use { used: false, ..HERE }, Verdict::Nothing),
        (Configuration, Some(Fine), Use { other_file: true, ..HERE }, Verdict::Suspect),
        (Modes, Some(Fine), Use { modes_mended: true, ..HERE }, Verdict::Nothing),
        (Keys, Some(Fine), Use { modes_mended: true, ..HERE }, Verdict::Refuse),
        // No host keys yet, a key in /var, no sshd here: nothing that this can tell.
        (NotYet, Some(NotYet), HERE, Verdict::Nothing),
        (NotYet, Some(Fine), HERE, Verdict::Nothing),
        (Configuration, Some(NotYet), HERE, Verdict::Nothing),
        (Configuration, Some(Unknown), HERE, Verdict::Nothing),
        (Configuration, None, HERE, Verdict::Nothing),
        (Configuration, Some(Configuration), HERE, Verdict::BothRefuse),
        (Modes, Some(Modes), HERE, Verdict::Nothing),
        (Unknown, Some(Fine), HERE, Verdict::Suspect),
        (Unknown, Some(Unknown), HERE, Verdict::Nothing),
    ] {
        assert_eq!(verdict(new, old, here), expected, "{new:?} {old:?} {here:?}");
    }
}

#[test]
fn the_summary_leaves_out_what_is_no_reason() {
    let words = "/x line 1: Deprecated option UseLogin\n/x line 2: Bad key types 'ssh-dss'.\r\n\n";
    assert_eq!(summary(words), "/x line 2: Bad key types 'ssh-dss'.");
    assert_eq!(
        summary(&format!("{TOO_OPEN}{NO_KEYS}")),
        "Permissions 0640 for '/etc/ssh/rsa' are too open.; It is required that your private key files are NOT \
         accessible by others.; This private key will be ignored.; sshd: no hostkeys available -- exiting."
    );
}
