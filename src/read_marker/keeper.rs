//! Loading and writing markers: requests that wait are handled together, and a marker that grows while it is written is
//! written once more.

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    task::yield_now,
    time::{Instant, sleep_until, timeout_at},
};

use super::{
    index::{Key, STEP},
    markers::Markers,
};
use crate::{
    bus::KvError,
    telemetry::metrics::{Counter, MarkerWrite, count},
};

/// Maximum number of writes in flight. More have to wait; a marker that grows while it waits is written once.
const WRITES: usize = 64;

/// Conflicts in a row after which the write of a key counts as failed and is queued again.
const ATTEMPTS: usize = 5;

/// Timeout of the last writes of an edge, so that a bucket that does not answer does not use up the time for the rest
/// of a drain.
const FLUSH_WITHIN: Duration = Duration::from_secs(5);

/// How often idle markers are removed, and the number of these intervals after which all markers were visited.
const SWEEP: Duration = Duration::from_secs(1);
const SWEEPS: usize = 10;

impl Markers {
    /// Loads and writes, forever.
    pub async fn keep(self: Arc<Self>) {
        tokio::join!(self.keep_loading(), self.keep_writing());
    }

    /// Requests that arrive during a read are read together by the next one.
    async fn keep_loading(&self) {
        loop {
            self.load.notified().await;
            let loads = std::mem::take(&mut self.state.lock().loads);
            let keys: HashSet<&Key> = loads.iter().flat_map(|load| &load.keys).collect();
            let keys: Vec<String> = keys.into_iter().map(ToString::to_string).collect();
            if keys.is_empty() {
                continue;
            }
            let loaded = self.fetch(&keys).await;
            for load in loads {
                // The requester may have given up.
                let _gone = load.done.send(loaded.clone());
            }
        }
    }

    async fn keep_writing(&self) {
        let mut writes = FuturesUnordered::new();
        let mut sweep = Instant::now() + SWEEP;
        loop {
            let now = Instant::now();
            if now >= sweep {
                sweep = now + SWEEP;
                self.sweep(now).await;
            }
            let due = {
                let mut state = self.state.lock();
                state.wake(now);
                while writes.len() < WRITES
                    && let Some(key) = state.next(now)
                {
                    writes.push(self.write_key(key));
                }
                if state.queues.flushing && !state.owes() {
                    self.written.notify_waiters();
                }
                state.due().map_or(sweep, |due| due.min(sweep))
            };
            // All branches are cancel-safe: an unfinished write stays in `writes`.
            tokio::select! {
                Some((key, written)) = writes.next() => {
                    self.state.lock().done(key, written, Instant::now());
                }
                () = self.write.notified() => {}
                () = sleep_until(due) => {}
            }
        }
    }

    /// Removes idle markers. The lock is held for one step at a time, since each durable send takes it.
    async fn sweep(&self, now: Instant) {
        let steps = self.state.lock().markers.len() / (STEP * SWEEPS) + 1;
        for _ in 0..steps {
            self.state.lock().markers.sweep(now);
            yield_now().await;
        }
    }

    /// Writes a key unless the bucket already has the value. Returns whether this succeeded.
    async fn write_key(&self, key: Key) -> (Key, bool) {
        for _ in 0..ATTEMPTS {
            let known = self.state.lock().marker(&key).is_ahead().is_some();
            if !known && self.load(vec![Arc::clone(&key)]).await.is_err() {
                return (key, false);
            }
            let (next, repair) = {
                let mut state = self.state.lock();
                let marker = state.marker(&key);
                (marker.to_write(), marker.is_repair())
            };
            let Some((cursor, revision)) = next else {
                return (key, true);
            };
            let (line, value) = (self.publisher.line(), cursor.to_string());
            let result = self.bucket.put_over(line, &key, &value, revision).await;
            let mut state = self.state.lock();
            let marker = state.marker(&key);
            match result {
                Ok(revision) => {
                    marker.written(cursor, revision, Instant::now());
                    count(Counter::MarkerWrites(MarkerWrite::Written), 1);
                    count(Counter::MarkerRepaired, u64::from(repair));
                    return (key, true);
                }
                Err(KvError::Conflict) => {
                    marker.doubt();
                    count(Counter::MarkerWrites(MarkerWrite::Conflict), 1);
                }
                Err(error) => {
                    marker.doubt();
                    drop(state);
                    count(Counter::MarkerWrites(MarkerWrite::Failed), 1);
                    tracing::debug!(error = %error, "a read marker is written again");
                    return (key, false);
                }
            }
        }
        (key, false)
    }

    /// Writes everything that is not written yet, without pauses, until `deadline` and at most for `FLUSH_WITHIN`.
    /// Returns whether nothing is left.
    pub async fn flush(&self, deadline: Instant) -> bool {
        let deadline = deadline.min(Instant::now() + FLUSH_WITHIN);
        self.state.lock().queues.flushing = true;
        let done = async {
            loop {
                let written = self.written.notified();
                if !self.state.lock().owes() {
                    return;
                }
                self.write.notify_one();
                written.await;
            }
        };
        timeout_at(deadline, done).await.is_ok()
    }
}
