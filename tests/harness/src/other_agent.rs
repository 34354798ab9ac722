//! A node image that ships another agent than the bootimage, and the hand-over between both.

use std::time::Duration;

use anyhow::Result;

use crate::guest::Guest;
use crate::proc::wait_for;

/// The process of the node image's agent runs this file.
pub const PROGRAM: &str = "/run/other-agent";

/// The node image's own agent, as a file of a layer: the bootimage's with one byte more. It lists its calls. With /run/older
/// it does not know the argument of a later version.
pub const FILE: (&str, &str) = (
    "usr/bin/node-image-pivot",
    r#"#!/bin/bash
other=/run/other-agent
if [ ! -e $other ]; then
    cp /sysroot/ostree/deploy/testbed/deploy/*/usr/bin/node-image-pivot $other.new
    printf x >>$other.new
    mv $other.new $other
fi
echo "$*" >>/run/other-agent.calls
if [ -e /run/older ] && [ "${2-}" = --check ]; then
    echo "unexpected argument '--check'" >&2
    exit 2
fi
exec -a /usr/bin/node-image-pivot $other "$@"
"#,
);

/// Waits until the agent's process runs `program`.
pub fn wait_for_agent(guest: &dyn Guest, program: &str) -> Result<()> {
    let running = "readlink /proc/$(systemctl show -p MainPID --value node-image-pivotd.service)/exe";
    wait_for(program, Duration::from_secs(120), || Ok(guest.run(running)?.text.trim() == program))
}
