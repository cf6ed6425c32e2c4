//! How the writing goes, for `/metrics` and for who asks the service.

use std::{collections::BTreeSet, fmt, time::Duration};

use parking_lot::Mutex;
use serde::Serialize;
use tokio::time::Instant;

use crate::{
    runtime::unix_ms,
    telemetry::metrics::{Counter, count},
};

/// How often a trouble that lasts is told again.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// What this process has written, and what stands in the way.
#[derive(Debug, Default)]
pub(super) struct Figures(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    shown: Shown,
    /// The words of the trouble that lasts, and when it was told last.
    trouble: Option<(BTreeSet<String>, Instant)>,
}

/// The figures as they are shown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Shown {
    /// Batches that MongoDB has confirmed.
    pub batches: u64,
    /// Messages in them.
    pub messages: u64,
    /// Messages in the last one.
    pub last_batch: usize,
    /// Erasures that are not carried out yet, in the whole database.
    pub erasures_running: u64,
    /// What went wrong last.
    pub last_error: Option<String>,
    /// When that was, in ms since 1970.
    pub last_error_at: Option<u64>,
}

impl Figures {
    /// A batch of so many messages was confirmed.
    pub(super) fn written(&self, messages: usize) {
        let mut inner = self.0.lock();
        inner.shown.batches += 1;
        inner.shown.messages += messages as u64;
        inner.shown.last_batch = messages;
    }

    /// Something is in the way: tells it when it is new, and once a minute.
    pub(super) fn failed(&self, error: &dyn fmt::Display, what: &str) {
        let text = error.to_string();
        // Some of what the driver says is in another order each time.
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

    /// What was in the way is gone.
    pub(super) fn succeeded(&self) {
        if self.0.lock().trouble.take().is_some() {
            tracing::info!("MongoDB takes writes again");
        }
    }

    /// So many erasures are being carried out, by whatever instance.
    pub(super) fn erasing(&self, erasures: u64) {
        self.0.lock().shown.erasures_running = erasures;
    }

    /// As they are now.
    pub(super) fn shown(&self) -> Shown {
        self.0.lock().shown.clone()
    }

    /// A batch was not taken, and will be repeated.
    pub(super) fn batch_failed(&self, error: &dyn fmt::Display) {
        count(Counter::HistoryBatchFailed, 1);
        self.failed(error, "MongoDB does not take a batch; it is repeated");
    }
}
