//! The signature policy for old versions of skopeo.
//!
//! skopeo has a proxy mode since version 1.4, but applies `policy.json` in it only since 1.13. With an older skopeo, the
//! agent accepts only images for which the policy requires no signature, and refuses all others. From 1.13 on, skopeo
//! enforces the policy and this module does nothing.
//!
//! Format source: containers-policy.json(5), which defines the scope that applies to an image.

use std::path::PathBuf;

use serde_json::Value;

use super::{Failure, Kind, LocalSpec, PullSpec};

/// The first skopeo whose proxy enforces the policy.
const ENFORCES: (u32, u32) = (1, 13);

/// The program that enforces the policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Enforcement {
    /// skopeo.
    BySkopeo,
    /// The agent, because skopeo is too old. Holds skopeo's version.
    ByAgent(String),
}

impl Enforcement {
    /// Parses the output of `skopeo --version`. Unknown output counts as an old version.
    pub(super) fn of_version(output: &str) -> Self {
        let version = output.split_whitespace().last().unwrap_or("of an unknown version");
        let mut numbers = version.split(['.', '-', '+']).map(|part| part.parse::<u32>().ok());
        match (numbers.next().flatten(), numbers.next().flatten()) {
            (Some(major), Some(minor)) if (major, minor) >= ENFORCES => Self::BySkopeo,
            _ => Self::ByAgent(version.chars().take(40).collect()),
        }
    }

    /// Refuses an image that the policy does not accept without a signature, if skopeo
    /// does not enforce the policy.
    pub(super) fn check(&self, image: &PullSpec) -> Result<(), Failure> {
        let Self::ByAgent(version) = self else { return Ok(()) };
        let refuse = |cause: String| Err(Failure::new(Kind::Policy, format!("cannot use {image}: {cause}")));
        let Some(path) = policy_path() else {
            return refuse("/etc/containers/policy.json does not exist".into());
        };
        let shown = path.display();
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) => return refuse(format!("cannot read {shown}: {error}")),
        };
        let requirements = serde_json::from_slice(&text).map_err(|error| error.to_string());
        let verdict = |policy: Value| match image {
            PullSpec::Registry(spec) => verdict(&policy, &spec.to_string()),
            PullSpec::Local(spec) => strictest(&policy, spec),
        };
        match requirements.and_then(verdict) {
            Ok(Verdict::Accepted) => Ok(()),
            Ok(Verdict::Rejected) => refuse(format!("{shown} rejects the image")),
            Ok(Verdict::Needs(kind)) => refuse(format!(
                "{shown} requires {kind}, but skopeo {version} does not check signatures in proxy mode; install \
                 skopeo 1.13 or later"
            )),
            Err(why) => refuse(format!("{shown} is invalid: {why}")),
        }
    }
}

/// Verdict of a policy about one image.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    /// Accepted without a signature.
    Accepted,
    Rejected,
    /// Requires a signature of this kind.
    Needs(String),
}

/// Returns the policy file that skopeo reads: the user's file if it exists, otherwise the system's.
pub(super) fn policy_path() -> Option<PathBuf> {
    // A service has no HOME. skopeo then asks the user database, and the agent runs as root.
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
        .ok_or("default is missing")?;
    judge(requirements)
}

fn judge(requirements: &Value) -> Result<Verdict, String> {
    let requirements =
        requirements.as_array().filter(|all| !all.is_empty()).ok_or("the list of requirements is missing or empty")?;
    let mut verdict = Verdict::Accepted;
    for requirement in requirements {
        match requirement.get("type").and_then(Value::as_str) {
            Some("insecureAcceptAnything") => {}
            Some("reject") => return Ok(Verdict::Rejected),
            Some(kind) => verdict = Verdict::Needs(kind.chars().take(40).collect()),
            None => return Err("a requirement has no type".into()),
        }
    }
    Ok(verdict)
}

/// Returns the strictest verdict of all scopes for the image's transport. The scope that applies depends on links in the
/// path and on the configuration of image stores, which skopeo 1.13 and later resolve.
fn strictest(policy: &Value, image: &LocalSpec) -> Result<Verdict, String> {
    let scopes = policy.get("transports").and_then(|transports| transports.get(image.transport().as_str()));
    let scopes = scopes.and_then(Value::as_object);
    let default = policy.get("default").ok_or("default is missing")?;
    let default = Some(default).filter(|_| !scopes.is_some_and(|scopes| scopes.contains_key("")));
    let mut strictest = Verdict::Accepted;
    for requirements in scopes.into_iter().flat_map(|scopes| scopes.values()).chain(default) {
        match judge(requirements)? {
            Verdict::Accepted => {}
            Verdict::Rejected => return Ok(Verdict::Rejected),
            needs @ Verdict::Needs(_) => strictest = needs,
        }
    }
    Ok(strictest)
}

/// Returns the scopes that contain an image in a registry, the narrowest first.
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
    // Then the wildcards for subdomains, and the default of the transport.
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
    fn only_old_versions_of_skopeo_need_the_agent() {
        for (output, by_agent) in [
            ("skopeo version 1.9.3", true),
            ("skopeo version 1.12.0", true),
            ("skopeo version 1.13.0", false),
            ("skopeo version 1.18.0-dev", false),
            ("skopeo version 2.0", false),
            ("nonsense", true),
            ("", true),
        ] {
            assert_eq!(Enforcement::of_version(output) != Enforcement::BySkopeo, by_agent, "{output}");
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
        let local = |policy: &Value, image: &str| match image.parse().unwrap() {
            PullSpec::Local(spec) => strictest(policy, &spec),
            PullSpec::Registry(_) => panic!("{image} is in a registry"),
        };
        for (scopes, expected) in [
            (json!({ "": accept }), Verdict::Accepted),
            (json!({ "": accept, "/elsewhere": reject }), Verdict::Rejected),
            (json!({ "/x": accept }), Verdict::Rejected),
            (json!({ "": signed }), needs()),
        ] {
            let policy = json!({ "default": reject, "transports": { "oci": scopes } });
            assert_eq!(local(&policy, "oci:/x:1"), Ok(expected), "{policy}");
            assert_eq!(local(&policy, "dir:/x"), Ok(Verdict::Rejected), "{policy}");
        }
        assert_eq!(local(&json!({ "default": accept }), "containers-storage:localhost/x:1"), Ok(Verdict::Accepted));
        assert!(local(&json!({}), "dir:/x").is_err());
        let with_default = json!({ "default": reject, "transports": { "docker": { "": accept } } });
        assert_eq!(verdict(&with_default, "q.io/x:1"), Ok(Verdict::Accepted));
        for bad in [json!({}), json!({ "default": [] }), json!({ "default": "?" }), json!({ "default": [{}] })] {
            assert!(verdict(&bad, "q.io/x:1").is_err(), "{bad}");
        }
    }
}
