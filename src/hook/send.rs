//! Sends the events of one entry, until they are accepted or it is given up.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use hyper::StatusCode;
use tokio::time::{Instant, sleep, sleep_until};

use super::{
    Hook, Parts,
    event::{Event, Only},
    gate::Down,
    lead::Leading,
    source::Told,
    state,
};
use crate::{
    outbound::{Fault, Outcome, pause},
    runtime::unix_ms,
    telemetry::metrics::{Counter, Gauge, Held, Histogram, record},
};

/// Pauses before a failed request is repeated: the first and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(300));

/// An entry that has failed for so long becomes a dead letter before its time, if others can't be taken because of what
/// waits behind such entries, and if the receiver accepts others, or refuses this one.
const HELD_UP_FOR: Duration = Duration::from_secs(30);

/// Interval of the looks whether others can't be taken.
const LOOK: Duration = Duration::from_secs(1);

/// What became of an entry.
#[derive(Debug)]
pub(super) enum Sent {
    /// Its events were accepted, or there is nothing to send.
    Done,
    /// It is given up, with the reason.
    Dead(String),
    /// The receiver wants nothing more, ever.
    Off(String),
}

/// Why an event was not accepted.
pub(super) enum Refusal {
    Off(String),
    Failed {
        fault: Fault,
        after: Option<Duration>,
    },
}

impl Hook {
    /// Posts an event.
    pub(super) async fn post(&self, event: &Event) -> Result<(), Refusal> {
        let failed = |fault, after| {
            self.count(Counter::HookFailed);
            Err(Refusal::Failed { fault, after })
        };
        let body = match event.body() {
            Ok(body) => Bytes::from(body),
            Err(error) => return failed(Fault::Unreachable(error.to_string()), None),
        };
        let _open = self.label.map(|label| Held::new(Gauge::HookOpen(label)));
        let started = Instant::now();
        let outcome = self.receiver.post(&event.id, body).await;
        record(Histogram::HookRequestDuration, started.elapsed());
        match outcome {
            Outcome::Done { .. } => {
                self.count(Counter::HookDelivered);
                Ok(())
            }
            Outcome::GiveUp(Fault::Status(StatusCode::GONE)) => {
                Err(Refusal::Off(Fault::Status(StatusCode::GONE).to_string()))
            }
            // Whatever else it says may be corrected: a secret, a path, a bug.
            Outcome::GiveUp(fault) => failed(fault, None),
            Outcome::Retry { fault, after } => failed(fault, after),
        }
    }
}

impl Told {
    /// Whether an event is to be told, besides what its entry says.
    pub(super) async fn counts(&self, parts: &Parts, event: &Event) -> Result<bool, String> {
        let Self::Entry {
            stored,
            part,
            epoch,
        } = self
        else {
            return Ok(true);
        };
        match &event.only {
            Only::Always => Ok(true),
            Only::First(upload) => {
                let place = format!("{epoch}.{part}.{}", stored.record.seq);
                let is_first = state::is_first(&parts.bucket, upload, &place).await;
                is_first.map_err(|error| error.to_string())
            }
            Only::Ended => {
                let room = BTreeSet::from([stored.room.clone()]);
                let records = parts.people.records_of(&room).await;
                let records = records.map_err(|error| error.to_string())?;
                Ok(records.iter().any(|(_, record)| record.is_closed()))
            }
        }
    }
}

/// Whether a receiver works, and refuses this request. A wrong secret, path or method is the same for all of them.
fn refuses(fault: &Fault) -> bool {
    let of_all = [
        StatusCode::UNAUTHORIZED,
        StatusCode::FORBIDDEN,
        StatusCode::NOT_FOUND,
        StatusCode::METHOD_NOT_ALLOWED,
        StatusCode::REQUEST_TIMEOUT,
        StatusCode::TOO_MANY_REQUESTS,
    ];
    matches!(fault, Fault::Status(status) if status.is_client_error() && !of_all.contains(status))
}

/// What of an entry in hand its sending and the hand tell each other.
#[derive(Debug, Default)]
pub(super) struct Signs {
    /// The receiver accepts others, or refuses this one: see [`Signs::is_stuck`].
    stuck: AtomicBool,
}

impl Signs {
    /// Whether the receiver works, and this entry has failed twice. Later entries of its room need not be in hand.
    pub(super) fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::Relaxed)
    }
}

/// Sends what is to be told of an entry. `is_full` says whether nothing else can be taken.
pub(super) async fn send(
    leading: Arc<Leading>,
    told: Arc<Told>,
    signs: Arc<Signs>,
    is_full: impl Fn() -> bool,
) -> Sent {
    let Leading {
        parts, hook, gate, ..
    } = &*leading;
    let events = told.events(parts, hook);
    let stored_ago = Duration::from_millis(unix_ms().saturating_sub(told.ts()));
    let left = hook.config.retry_for.saturating_sub(stored_ago);
    let overdue = Instant::now() + left;
    let (mut next, mut attempt, mut since) = (0, 0, None);
    while let Some(event) = events.get(next) {
        let ready = async {
            match told.was_erased(parts).await? {
                true => Ok(None),
                false => told.counts(parts, event).await.map(Some),
            }
        };
        match ready.await {
            Ok(Some(true)) => {}
            Ok(Some(false)) => {
                next += 1;
                continue;
            }
            // Nobody is told any more.
            Ok(None) => return Sent::Done,
            Err(reason) => {
                tracing::debug!(hook = hook.name(), reason, "an event must wait");
                attempt += 1;
                sleep(pause(attempt, PAUSES, None)).await;
                continue;
            }
        }
        let turn = match gate.turn(overdue).await {
            Ok(turn) => turn,
            Err(Down(fault)) => return Sent::Dead(fault),
        };
        let (fault, after) = match hook.post(event).await {
            Ok(()) => {
                gate.well();
                (next, attempt, since) = (next + 1, 0, None);
                continue;
            }
            Err(Refusal::Off(reason)) => return Sent::Off(reason),
            Err(Refusal::Failed { fault, after }) => (fault, after),
        };
        let is_refused = refuses(&fault);
        let fault = fault.to_string();
        // One that is refused says nothing of the receiver.
        if !is_refused && turn.failed(&event.id, &fault, after) {
            tracing::warn!(
                hook = hook.name(),
                fault,
                "the receiver of a hook is down: it is tried from time to time"
            );
        }
        drop(turn);
        attempt += 1;
        let wait = pause(attempt, PAUSES, after);
        let (began, done) = *since.get_or_insert_with(|| (Instant::now(), gate.successes()));
        // Where the receiver accepts nothing at all, everything waits.
        let is_alone = is_refused || gate.successes() > done;
        signs
            .stuck
            .store(is_alone && attempt > 1, Ordering::Relaxed);
        let again = Instant::now() + wait;
        if again > overdue {
            return Sent::Dead(fault);
        }
        tracing::debug!(hook = hook.name(), fault, "a hook failed");
        loop {
            if is_alone && began.elapsed() > HELD_UP_FOR && is_full() {
                return Sent::Dead(fault);
            }
            let now = Instant::now();
            if now >= again {
                break;
            }
            sleep_until(again.min(now + LOOK)).await;
        }
    }
    Sent::Done
}
