//! Cancellation of calls: every call holds a handle, and a cancel ends all calls with handles.

use std::sync::Mutex;

use support::lock;
use tokio_util::sync::CancellationToken;

/// The handles of all running calls.
#[derive(Debug, Default)]
pub struct CancelHandles {
    /// The parent token of all handles, and for each handle the token that is cancelled when its call ends.
    state: Mutex<(CancellationToken, Vec<CancellationToken>)>,
}

/// The cancellation of one call. Dropping it ends the call's registration.
#[derive(Debug)]
pub struct CancelHandle {
    call: &'static str,
    token: CancellationToken,
    /// Cancelled when the call ends, so that tasks that watch on its behalf end, too.
    over: CancellationToken,
}

impl CancelHandles {
    /// Returns a handle for `call`, which earlier cancels do not affect.
    pub fn register(&self, call: &'static str) -> CancelHandle {
        let over = CancellationToken::new();
        let mut state = lock(&self.state);
        state.1.retain(|over| !over.is_cancelled());
        state.1.push(over.clone());
        CancelHandle { call, token: state.0.child_token(), over }
    }

    /// Returns true if a call runs or waits.
    pub fn any(&self) -> bool {
        lock(&self.state).1.iter().any(|over| !over.is_cancelled())
    }

    /// Cancels all running calls; returns true if there was one.
    pub fn cancel_all(&self) -> bool {
        let mut state = lock(&self.state);
        let any = state.1.drain(..).any(|over| !over.is_cancelled());
        std::mem::take(&mut state.0).cancel();
        any
    }
}

impl CancelHandle {
    /// Returns the name of the call.
    pub fn call(&self) -> &'static str {
        self.call
    }

    /// Returns true if the call must end.
    pub fn is_cancelled(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Waits until the call must end.
    pub async fn cancelled(&self) {
        self.token.cancelled().await;
    }

    /// Returns the token, for functions that expect one.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// Cancels this call when `gone` ends, because its caller has disconnected.
    pub fn end_with(&self, gone: impl Future<Output = ()> + Send + 'static) {
        let (token, over) = (self.token.clone(), self.over.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = gone => token.cancel(),
                () = over.cancelled() => {}
            }
        });
    }
}

impl Drop for CancelHandle {
    fn drop(&mut self) {
        self.over.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancel_ends_running_calls_and_not_later_ones() {
        let handles = CancelHandles::default();
        assert!(!handles.cancel_all(), "nothing to cancel");
        let (first, second) = (handles.register("pull"), handles.register("pull"));
        assert!(handles.cancel_all());
        assert!(first.is_cancelled() && second.is_cancelled());
        let third = handles.register("pull");
        assert!(!third.is_cancelled());
        drop(third);
        assert!(!handles.cancel_all(), "a call that has ended cannot be cancelled");
    }

    #[tokio::test]
    async fn a_caller_that_disconnects_ends_only_its_own_call() {
        let handles = CancelHandles::default();
        let (mine, other) = (handles.register("pull"), handles.register("pull"));
        let gone = CancellationToken::new();
        mine.end_with(gone.clone().cancelled_owned());
        gone.cancel();
        mine.cancelled().await;
        assert!(!other.is_cancelled());
    }
}
