//! Relations between units, as PID 1 reports them.

use std::collections::HashMap;

use anyhow::{Context, Result};
use zbus::OwnedVariant;

use super::Manager;
use super::manager::{PROPERTIES, UNIT};
use super::units::Unit;

/// The relations of a unit with others.
#[derive(Debug, Default)]
pub(super) struct Links {
    /// Sockets, timers and paths that start it on an event.
    pub(super) triggered_by: Vec<String>,
    /// Units that it starts on an event.
    pub(super) triggers: Vec<String>,
    /// Units that pull it in.
    pub(super) wanted_by: Vec<String>,
    /// Units that systemd stops and restarts with it.
    pub(super) dependents: Vec<String>,
}

impl Manager {
    /// Reads the relations of `unit`.
    pub(super) async fn links(&self, unit: &Unit) -> Result<Links> {
        self.links_at(unit.path.as_str()).await
    }

    /// Reads the relations of a loaded unit by its name.
    pub(super) async fn links_of(&self, unit: &str) -> Result<Links> {
        self.links_at(self.path_of(unit).await?.as_str()).await
    }

    async fn links_at(&self, path: &str) -> Result<Links> {
        let reply = self
            .connection
            .call_method(self.destination, path, Some(PROPERTIES), "GetAll", &(UNIT,))
            .await
            .with_context(|| format!("cannot read the properties of {path}"))?;
        let mut values: HashMap<String, OwnedVariant> =
            reply.body().deserialize().with_context(|| format!("cannot decode the properties of {path}"))?;
        let mut list = |key: &str| values.remove(key).and_then(|value| Vec::<String>::try_from(value).ok());
        let mut links = Links {
            triggered_by: list("TriggeredBy").unwrap_or_default(),
            triggers: list("Triggers").unwrap_or_default(),
            ..Links::default()
        };
        // Dependency types that propagate a stop have UNIT_ATOM_PROPAGATE_STOP in systemd's unit-dependency-atom.c.
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
            links.dependents.extend(names.into_iter().filter(|_| stops));
        }
        Ok(links)
    }
}
