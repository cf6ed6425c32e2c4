//! Progress and problems of the writing, for `/metrics` and for the statistics of the service.

use std::{collections::BTreeSet, fmt, time::Duration};

use parking_lot::Mutex;
use serde::Serialize;
use tokio::time::Instant;

use crate::{
    runtime::unix_ms,
    telemetry::metrics::{Counter, count},
};

/// Interval at which a lasting problem is logged again.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// What this process has written, and its current problem.
#[derive(Debug, Default)]
pub(super) struct Figures(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    shown: ShownFigures,
    /// The words of the lasting problem, and when it was last logged.
    trouble: Option<(BTreeSet<String>, Instant)>,
}

/// The figures as they are shown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct ShownFigures {
    /// Batches that MongoDB has acknowledged.
    pub batches: u64,
    /// Messages in them.
    pub messages: u64,
    /// Messages in the last one.
    pub last_batch: usize,
    /// Erasures not yet carried out, in the whole database.
    pub erasures_running: u64,
    /// Rooms written to the directory, because their records have changed.
    pub rooms_listed: u64,
    /// Entries of the index of users that were repaired.
    pub index_repaired: u64,
    /// The last error.
    pub last_error: Option<String>,
    /// When it occurred, in ms since 1970.
    pub last_error_at: Option<u64>,
}

impl Figures {
    /// Counts an acknowledged batch.
    pub(super) fn written(&self, messages: usize) {
        let mut inner = self.0.lock();
        inner.shown.batches += 1;
        inner.shown.messages += messages as u64;
        inner.shown.last_batch = messages;
    }

    /// Counts rooms written to the directory.
    pub(super) fn listed(&self, rooms: usize) {
        self.0.lock().shown.rooms_listed += rooms as u64;
    }

    /// Counts entries of the index that were repaired.
    pub(super) fn repaired(&self, entries: u64) {
        self.0.lock().shown.index_repaired += entries;
    }

    /// Notes a problem. It is logged if it is new, and then every [`TELL_AGAIN`].
    pub(super) fn failed(&self, error: &dyn fmt::Display, what: &str) {
        let text = error.to_string();
        // The driver orders some of its text differently each time, so words are compared as a set.
        let words = text
            .split_ascii_whitespace()
            .flat_map(|word| word.split(','));
        let words = words.map(|word| word.trim_matches(['{', '}', '[', ']']).to_owned());
        let words = words.collect();
        let mut inner = self.0.lock();
        inner.shown.last_error = Some(text.clone());
        inner.shown.last_error_at = Some(unix_ms());
        let tell = inner
            .trouble
            .as_ref()
            .is_none_or(|(known, told)| *known != words || told.elapsed() >= TELL_AGAIN);
        if tell {
            inner.trouble = Some((words, Instant::now()));
            drop(inner);
            tracing::warn!(error = %text, "{what}");
        }
    }

    /// The problem is solved.
    pub(super) fn succeeded(&self) {
        if self.0.lock().trouble.take().is_some() {
            tracing::info!("MongoDB takes writes again");
        }
    }

    /// Sets the number of erasures in progress, by any instance.
    pub(super) fn erasing(&self, erasures: u64) {
        self.0.lock().shown.erasures_running = erasures;
    }

    /// The current figures.
    pub(super) fn shown(&self) -> ShownFigures {
        self.0.lock().shown.clone()
    }

    /// A batch failed and will be retried.
    pub(super) fn batch_failed(&self, error: &dyn fmt::Display) {
        count(Counter::HistoryBatchFailed, 1);
        self.failed(error, "MongoDB does not take a batch; it is repeated");
    }
}
