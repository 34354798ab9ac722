//! The call that holds the record, for the calls that wait behind it.

use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

use tokio::sync::MutexGuard;

use super::Record;
use support::lock;

/// Name of the call that holds the record.
#[derive(Debug, Default)]
pub(super) struct Holder(Mutex<Option<&'static str>>);

/// The locked record of a named call.
pub(super) struct Held<'a> {
    record: MutexGuard<'a, Record>,
    holder: &'a Holder,
}

impl Holder {
    /// Names the call that has locked the record, until the returned value is dropped.
    pub(super) fn hold<'a>(&'a self, record: MutexGuard<'a, Record>, call: &'static str) -> Held<'a> {
        *lock(&self.0) = Some(call);
        Held { record, holder: self }
    }

    /// Returns the call that holds the record.
    pub(super) fn call(&self) -> Option<String> {
        lock(&self.0).map(str::to_owned)
    }
}

impl Deref for Held<'_> {
    type Target = Record;

    fn deref(&self) -> &Record {
        &self.record
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Record {
        &mut self.record
    }
}

impl Drop for Held<'_> {
    /// Runs before the lock is released, so that the name of the next call stays.
    fn drop(&mut self) {
        *lock(&self.holder.0) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_call_is_named_as_long_as_it_holds_the_record() {
        let (holder, record) = (Holder::default(), tokio::sync::Mutex::new(Record::default()));
        assert_eq!(holder.call(), None);
        let held = holder.hold(record.lock().await, "run");
        assert_eq!(holder.call().as_deref(), Some("run"));
        drop(held);
        let next = holder.hold(record.lock().await, "plan");
        assert_eq!(holder.call().as_deref(), Some("plan"));
        drop(next);
        assert_eq!(holder.call(), None);
    }
}
