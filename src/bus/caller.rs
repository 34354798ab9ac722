//! Callers on the system bus. Their connections are not ours, so the bus says when one has left.

use futures_util::StreamExt;
use tracing::warn;
use zbus::Connection;
use zbus::fdo::DBusProxy;
use zbus::names::UniqueName;

/// Returns when the caller has left the bus of this connection, or the bus has ended.
pub(super) async fn left(connection: Connection, caller: UniqueName<'static>) {
    let watch = async {
        let bus = DBusProxy::new(&connection).await?;
        let mut gone = bus.receive_name_owner_changed_with_args(&[(0, caller.as_str()), (2, "")]).await?;
        // A caller that left before the bus knew the rule.
        if bus.name_has_owner(caller.clone().into()).await? {
            gone.next().await;
        }
        zbus::Result::Ok(())
    };
    if let Err(error) = watch.await {
        warn!("cannot watch the caller {caller}: {error}; its request continues if it disconnects");
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::process::{Child, Command, Stdio};

    use zbus::connection::Builder;

    use super::*;
    use crate::agent::CancelHandles;

    /// A message bus, ended when this value is dropped.
    struct Bus(Child, String);

    impl Bus {
        fn start() -> Self {
            let mut daemon = Command::new("dbus-daemon");
            daemon.args(["--session", "--nofork", "--nopidfile", "--print-address"]).stdout(Stdio::piped());
            let mut child = daemon.spawn().unwrap();
            let mut address = String::new();
            BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
            Self(child, address.trim().to_owned())
        }

        async fn connect(&self) -> Connection {
            Builder::address(self.1.as_str()).build().await.unwrap()
        }
    }

    impl Drop for Bus {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[tokio::test]
    async fn a_caller_that_leaves_the_bus_ends_only_its_own_call() {
        let bus = Bus::start();
        let agent = bus.connect().await;
        let handles = CancelHandles::default();
        let call = |caller: &Connection| {
            let handle = handles.register("pull");
            handle.end_with(left(agent.clone(), caller.unique_name().unwrap().clone().into()));
            handle
        };
        let (leaving, staying) = (bus.connect().await, bus.connect().await);
        let (ended, other) = (call(&leaving), call(&staying));
        leaving.close().await.unwrap();
        ended.cancelled().await;
        assert!(!other.is_cancelled());
        let late = handles.register("pull");
        late.end_with(left(agent.clone(), ":1.9999".try_into().unwrap()));
        late.cancelled().await;
        drop(bus);
        other.cancelled().await;
    }
}
