//! Signature policy where skopeo leaves it out.
//!
//! skopeo serves as a proxy since 1.4, but looks at `policy.json` there only since 1.13. With an older
//! one, images that the policy accepts as they are can be pulled, and all others are refused: a
//! signature that nobody checks is none. From 1.13 on, skopeo enforces the policy and this does nothing.
//!
//! Format source: containers-policy.json(5): which scope applies to an image.

use std::path::PathBuf;

use serde_json::Value;

use super::{Failure, Kind};

/// The first skopeo whose proxy enforces the policy.
const ENFORCES: (u32, u32) = (1, 13);

/// What to do about the policy before an image is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Enforcement {
    /// skopeo does it.
    BySkopeo,
    /// It is ours; the text is what skopeo says to be.
    ByUs(String),
}

impl Enforcement {
    /// From what `skopeo --version` says. What cannot be read is taken for an old one.
    pub(super) fn of_version(said: &str) -> Self {
        let version = said.split_whitespace().last().unwrap_or("of an unknown version");
        let mut numbers = version.split(['.', '-', '+']).map(|part| part.parse::<u32>().ok());
        match (numbers.next().flatten(), numbers.next().flatten()) {
            (Some(major), Some(minor)) if (major, minor) >= ENFORCES => Self::BySkopeo,
            _ => Self::ByUs(version.chars().take(40).collect()),
        }
    }

    /// Refuses an image (`registry/name:tag` or `…@digest`) that the policy does not accept as it is.
    pub(super) fn check(&self, image: &str) -> Result<(), Failure> {
        let Self::ByUs(version) = self else { return Ok(()) };
        let refuse = |what: String| Err(Failure::new(Kind::Policy, format!("{image}: {what}")));
        let Some(path) = policy_path() else {
            return refuse("there is no policy.json that says whether it may be used".into());
        };
        let shown = path.display();
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) => return refuse(format!("reading {shown}: {error}")),
        };
        let requirements = serde_json::from_slice(&text).map_err(|error| error.to_string());
        match requirements.and_then(|policy: Value| verdict(&policy, image)) {
            Ok(Verdict::Accepted) => Ok(()),
            Ok(Verdict::Rejected) => refuse(format!("is rejected by {shown}")),
            Ok(Verdict::Needs(kind)) => refuse(format!(
                "{shown} wants it to be {kind}, but skopeo {version} checks no signatures when it serves as a \
                 proxy; install skopeo 1.13 or later"
            )),
            Err(why) => refuse(format!("{shown} cannot be used: {why}")),
        }
    }
}

/// What a policy says of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    /// Without any signature.
    Accepted,
    Rejected,
    /// Requires a signature of this kind.
    Needs(String),
}

/// The policy that skopeo reads: the user's own before the system's.
pub(super) fn policy_path() -> Option<PathBuf> {
    // Services have no HOME; skopeo then asks the user database, and the agent is root.
    let home = std::env::var_os("HOME").filter(|home| !home.is_empty()).unwrap_or_else(|| "/root".into());
    let own = PathBuf::from(home).join(".config/containers/policy.json");
    [own, PathBuf::from("/etc/containers/policy.json")].into_iter().find(|path| path.exists())
}

fn verdict(policy: &Value, image: &str) -> Result<Verdict, String> {
    let docker = policy.get("transports").and_then(|transports| transports.get("docker"));
    let requirements = scopes(image)
        .iter()
        .find_map(|scope| docker.and_then(|docker| docker.get(scope)))
        .or_else(|| policy.get("default"))
        .ok_or("it has no default")?;
    let requirements = requirements.as_array().filter(|all| !all.is_empty()).ok_or("it has no list of requirements")?;
    let mut verdict = Verdict::Accepted;
    for requirement in requirements {
        match requirement.get("type").and_then(Value::as_str) {
            Some("insecureAcceptAnything") => {}
            Some("reject") => return Ok(Verdict::Rejected),
            Some(kind) => verdict = Verdict::Needs(kind.chars().take(40).collect()),
            None => return Err("it has a requirement without a type".into()),
        }
    }
    Ok(verdict)
}

/// The scopes that an image is in, the narrowest first.
fn scopes(image: &str) -> Vec<String> {
    let mut scopes = vec![image.to_owned()];
    let repository = match image.split_once('@') {
        Some((name, _)) => name,
        None => match image.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => name,
            _ => image,
        },
    };
    let mut part = repository;
    loop {
        scopes.push(part.to_owned());
        match part.rsplit_once('/') {
            Some((parent, _)) => part = parent,
            None => break,
        }
    }
    // Then wildcards for the host's subdomains, and the transport's own default.
    let host = part.rsplit_once(':').map_or(part, |(host, _)| host);
    let mut rest = host;
    while let Some((_, parent)) = rest.split_once('.') {
        scopes.push(format!("*.{parent}"));
        rest = parent;
    }
    scopes.push(String::new());
    scopes
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn versions() {
        for (said, by_us) in [
            ("skopeo version 1.9.3", true),
            ("skopeo version 1.12.0", true),
            ("skopeo version 1.13.0", false),
            ("skopeo version 1.18.0-dev", false),
            ("skopeo version 2.0", false),
            ("nonsense", true),
            ("", true),
        ] {
            assert_eq!(Enforcement::of_version(said) != Enforcement::BySkopeo, by_us, "{said}");
        }
    }

    #[test]
    fn the_narrowest_scope_decides() {
        let accept = json!([{ "type": "insecureAcceptAnything" }]);
        let reject = json!([{ "type": "reject" }]);
        let signed = json!([{ "type": "insecureAcceptAnything" }, { "type": "signedBy", "keyPath": "/k" }]);
        let needs = || Verdict::Needs("signedBy".into());
        let policy = json!({ "default": reject, "transports": {
            "docker": {
                "q.io": signed, "q.io/open": accept, "q.io/open/not:1": reject, "127.0.0.1:5000": accept,
                "*.example.com": accept, "sub.example.com": reject,
            },
            "dir": { "": accept },
        }});
        for (image, expected) in [
            ("q.io/x:1", needs()),
            ("q.io/open:1", Verdict::Accepted),
            ("q.io/open/x@sha256:00", Verdict::Accepted),
            ("q.io/opener:1", needs()),
            ("q.io/open/not:1", Verdict::Rejected),
            ("q.io/open/not:2", Verdict::Accepted),
            ("127.0.0.1:5000/a/b:c", Verdict::Accepted),
            ("127.0.0.1:5001/a/b:c", Verdict::Rejected),
            ("a.b.example.com/x:1", Verdict::Accepted),
            ("sub.example.com/x:1", Verdict::Rejected),
            ("example.com/x:1", Verdict::Rejected),
        ] {
            assert_eq!(verdict(&policy, image), Ok(expected), "{image}");
        }
        let with_default = json!({ "default": reject, "transports": { "docker": { "": accept } } });
        assert_eq!(verdict(&with_default, "q.io/x:1"), Ok(Verdict::Accepted));
        for bad in [json!({}), json!({ "default": [] }), json!({ "default": "?" }), json!({ "default": [{}] })] {
            assert!(verdict(&bad, "q.io/x:1").is_err(), "{bad}");
        }
    }
}
