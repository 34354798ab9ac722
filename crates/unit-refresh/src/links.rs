//! How units hang together, as PID 1 has it.

use std::collections::HashMap;

use anyhow::{Context, Result};
use zbus::OwnedVariant;

use super::Manager;
use super::manager::{PROPERTIES, UNIT, Unit};

/// How a unit hangs together with others.
#[derive(Debug, Default)]
pub struct Links {
    /// What starts it when something happens: sockets, timers, paths.
    pub triggered_by: Vec<String>,
    /// What it starts when something happens.
    pub triggers: Vec<String>,
    /// What pulls it in.
    pub wanted_by: Vec<String>,
    /// What is stopped and restarted when it is.
    pub along: Vec<String>,
}

impl Manager {
    /// Its triggers and who wants it.
    pub async fn links(&self, unit: &Unit) -> Result<Links> {
        self.links_at(unit.path.as_str()).await
    }

    /// The same by name, of a unit that is loaded.
    pub async fn links_of(&self, unit: &str) -> Result<Links> {
        self.links_at(self.path_of(unit).await?.as_str()).await
    }

    async fn links_at(&self, path: &str) -> Result<Links> {
        let reply = self
            .connection
            .call_method(self.destination, path, Some(PROPERTIES), "GetAll", &(UNIT,))
            .await
            .with_context(|| format!("cannot read the properties of {path}"))?;
        let mut values: HashMap<String, OwnedVariant> =
            reply.body().deserialize().with_context(|| format!("the properties of {path}"))?;
        let mut list = |key: &str| values.remove(key).and_then(|value| Vec::<String>::try_from(value).ok());
        let mut links = Links {
            triggered_by: list("TriggeredBy").unwrap_or_default(),
            triggers: list("Triggers").unwrap_or_default(),
            ..Links::default()
        };
        // Of systemd's kinds of dependencies, those that stop with another unit (UNIT_ATOM_PROPAGATE_STOP in its table).
        for (key, pulls, stops) in [
            ("WantedBy", true, false),
            ("UpheldBy", true, false),
            ("RequiredBy", true, true),
            ("RequisiteOf", true, true),
            ("BoundBy", true, true),
            ("ConsistsOf", false, true),
            ("PropagatesStopTo", false, true),
        ] {
            let names = list(key).unwrap_or_default();
            links.wanted_by.extend(names.iter().filter(|_| pulls).cloned());
            links.along.extend(names.into_iter().filter(|_| stops));
        }
        Ok(links)
    }
}
