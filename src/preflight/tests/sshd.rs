//! Tests with messages of OpenSSH 9.2 and 10.0.

use super::*;

const NO_KEYS: &str = "sshd: no hostkeys available -- exiting.\n";
const TOO_OPEN: &str = "@@@@@@@@@@@@\n@         WARNING: UNPROTECTED PRIVATE KEY FILE!          @\n@@@@@@@@@@@@\n\
    Permissions 0640 for '/etc/ssh/rsa' are too open.\n\
    It is required that your private key files are NOT accessible by others.\nThis private key will be ignored.\n";

#[test]
fn messages_of_sshd_are_classified() {
    for (code, words, expected) in [
        (Some(0), "", Answer::Accepted),
        (Some(0), "/etc/ssh/sshd_config line 1: Deprecated option UseLogin\n", Answer::Accepted),
        (Some(255), "/etc/ssh/sshd_config.d/50-x.conf line 1: Bad key types '+ssh-dss'.\n", Answer::Configuration),
        (
            Some(255),
            "/etc/ssh/sshd_config: line 121: Bad configuration option: Old\n\
             /etc/ssh/sshd_config: terminating, 1 bad configuration options\n",
            Answer::Configuration,
        ),
        (
            Some(255),
            "Unknown authentication method \"foo\" in list\n\
             /etc/ssh/sshd_config line 1: invalid AuthenticationMethods method list.\n",
            Answer::Configuration,
        ),
        // Failures that come from the environment of the trial run.
        (Some(255), "Missing privilege separation directory: /run/sshd\n", Answer::Accepted),
        (
            Some(255),
            "/x line 1: Deprecated option UseLogin\nMissing privilege separation directory: /x\n",
            Answer::Accepted,
        ),
        (Some(255), "Privilege separation user sshd does not exist\n", Answer::NotYet),
        (Some(1), NO_KEYS, Answer::NotYet),
        (Some(1), &format!("Unable to load host key: /etc/ssh/rsa\n{NO_KEYS}"), Answer::NotYet),
        // Host keys that are read and rejected; for a key that is not configured, sshd prints only the banner.
        (Some(1), &format!("{TOO_OPEN}{NO_KEYS}"), Answer::Modes),
        (
            Some(1),
            &format!(
                "{TOO_OPEN}Unable to load host key \"/etc/ssh/rsa\": bad permissions\n\
                 Unable to load host key: /etc/ssh/rsa\n{NO_KEYS}"
            ),
            Answer::Modes,
        ),
        // One of them is missing and may be created.
        (Some(1), &format!("{TOO_OPEN}Unable to load host key: /var/lib/ssh/ed25519\n{NO_KEYS}"), Answer::NotYet),
        (
            Some(1),
            &format!(
                "Unable to load host key \"/etc/ssh/dsa\": error in libcrypto\nUnable to load host key: /etc/ssh/dsa\n\
                 {NO_KEYS}"
            ),
            Answer::Keys,
        ),
        (Some(255), "bad addr or host: no.such.host (Temporary failure in name resolution)\n", Answer::Unknown),
        (Some(255), "AuthorizedKeysCommand set without AuthorizedKeysCommandUser\n", Answer::Unknown),
        (Some(127), "sshd: error while loading shared libraries: libwrap.so.0\n", Answer::Unknown),
        (Some(255), "somewhere on line 4: x\n", Answer::Unknown),
        (Some(1), "", Answer::Unknown),
        (None, "/etc/ssh/sshd_config line 1: Deprecated option UseLogin\n", Answer::Unknown),
    ] {
        assert_eq!(answer(code, words), expected, "{code:?} {words}");
    }
}

#[test]
fn the_switch_is_refused_if_only_the_new_sshd_rejects_the_files() {
    const HERE: Use = Use { used: true, other_file: false, modes_corrected: false };
    use Answer::{Accepted, Configuration, Keys, Modes, NotYet, Unknown};
    for (new, old, here, expected) in [
        (Accepted, Some(Accepted), HERE, Verdict::Nothing),
        (Accepted, None, HERE, Verdict::Nothing),
        (Configuration, Some(Accepted), HERE, Verdict::Refuse),
        (Modes, Some(Accepted), HERE, Verdict::Refuse),
        (Keys, Some(Accepted), HERE, Verdict::Refuse),
        (Configuration, Some(Accepted), Use { used: false, ..HERE }, Verdict::Nothing),
        (Configuration, Some(Accepted), Use { other_file: true, ..HERE }, Verdict::Suspect),
        (Modes, Some(Accepted), Use { modes_corrected: true, ..HERE }, Verdict::Nothing),
        (Keys, Some(Accepted), Use { modes_corrected: true, ..HERE }, Verdict::Refuse),
        // Host keys that are missing or in /var, and a running system without sshd: inconclusive.
        (NotYet, Some(NotYet), HERE, Verdict::Nothing),
        (NotYet, Some(Accepted), HERE, Verdict::Nothing),
        (Configuration, Some(NotYet), HERE, Verdict::Nothing),
        (Configuration, Some(Unknown), HERE, Verdict::Nothing),
        (Configuration, None, HERE, Verdict::Nothing),
        (Configuration, Some(Configuration), HERE, Verdict::BothRefuse),
        (Modes, Some(Modes), HERE, Verdict::Nothing),
        (Unknown, Some(Accepted), HERE, Verdict::Suspect),
        (Unknown, Some(Unknown), HERE, Verdict::Nothing),
    ] {
        assert_eq!(verdict(new, old, here), expected, "{new:?} {old:?} {here:?}");
    }
}

#[test]
fn the_summary_omits_banners_and_deprecations() {
    let words = "/x line 1: Deprecated option UseLogin\n/x line 2: Bad key types 'ssh-dss'.\r\n\n";
    assert_eq!(summary(words), "/x line 2: Bad key types 'ssh-dss'.");
    assert_eq!(
        summary(&format!("{TOO_OPEN}{NO_KEYS}")),
        "Permissions 0640 for '/etc/ssh/rsa' are too open.; It is required that your private key files are NOT \
         accessible by others.; This private key will be ignored.; sshd: no hostkeys available -- exiting."
    );
}
