//! Cancelling calls: every call holds a ticket, and cancel ends all that are out.

use std::sync::Mutex;

use tokio_util::sync::CancellationToken;

/// Where tickets come from.
#[derive(Debug, Default)]
pub struct Tickets {
    /// The parent of all tickets that are out, and those tickets.
    state: Mutex<(CancellationToken, Vec<CancellationToken>)>,
}

/// The right of one call to go on. Dropping it hands it back.
#[derive(Debug)]
pub struct Ticket {
    call: &'static str,
    token: CancellationToken,
    /// Cancelled when the call is over: whoever watches on its behalf ends with it.
    over: CancellationToken,
}

impl Tickets {
    /// A ticket for `call`, which a cancel from before does not end.
    pub fn draw(&self, call: &'static str) -> Ticket {
        let over = CancellationToken::new();
        // A poisoned lock means a panic while swapping two values; they are whole either way.
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.1.retain(|ticket| !ticket.is_cancelled());
        state.1.push(over.clone());
        Ticket { call, token: state.0.child_token(), over }
    }

    /// Ends all tickets that are out; returns whether there was any.
    pub fn cancel_all(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let any = state.1.drain(..).any(|over| !over.is_cancelled());
        std::mem::take(&mut state.0).cancel();
        any
    }
}

impl Ticket {
    /// Name of the call.
    pub fn call(&self) -> &'static str {
        self.call
    }

    /// Whether the call is to end.
    pub fn is_cancelled(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Waits until the call is to end.
    pub async fn cancelled(&self) {
        self.token.cancelled().await;
    }

    /// The token, for those who take one.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// Ends this call when `gone` is cancelled: nobody waits for it any more.
    pub fn end_with(&self, gone: &CancellationToken) {
        let (token, over, gone) = (self.token.clone(), self.over.clone(), gone.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = gone.cancelled() => token.cancel(),
                () = over.cancelled() => {}
            }
        });
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.over.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cancel_ends_what_is_out_and_nothing_later() {
        let tickets = Tickets::default();
        assert!(!tickets.cancel_all(), "nothing to cancel");
        let (first, second) = (tickets.draw("pull"), tickets.draw("pull"));
        assert!(tickets.cancel_all());
        assert!(first.is_cancelled() && second.is_cancelled());
        let third = tickets.draw("pull");
        assert!(!third.is_cancelled());
        drop(third);
        assert!(!tickets.cancel_all(), "a call that is over cannot be cancelled");
    }

    #[tokio::test]
    async fn a_caller_who_goes_away_ends_only_his_own_call() {
        let tickets = Tickets::default();
        let (mine, other) = (tickets.draw("pull"), tickets.draw("pull"));
        let gone = CancellationToken::new();
        mine.end_with(&gone);
        gone.cancel();
        mine.cancelled().await;
        assert!(!other.is_cancelled());
    }
}
