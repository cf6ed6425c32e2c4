//! Who may send to a hook now: a bounded number, and only a single attempt from time to time while its receiver is down.

use std::{collections::BTreeSet, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, Semaphore, SemaphorePermit},
    time::{Instant, sleep_until},
};

use crate::outbound::pause;

/// Events that fail one after the other, without any success, after which a receiver counts as down. One event that is
/// never accepted, however often it is tried, says nothing of the others.
const DOWN_AFTER: usize = 8;

/// Pauses between attempts at a receiver that is down: the first and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// The state of a hook's receiver, shared by all partitions.
#[derive(Debug)]
pub(super) struct Gate {
    turns: Semaphore,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    /// The events that failed since the last success, at most [`DOWN_AFTER`].
    failing: BTreeSet<String>,
    /// Trials that failed since it is down. Requests that were open when it went down are no trials.
    trials: u32,
    successes: u64,
    /// No attempt before, while it is down.
    until: Instant,
    /// Whether somebody tries whether it is still down.
    is_tried: bool,
    /// The last failure.
    fault: String,
}

/// Permission for one request.
#[derive(Debug)]
pub(super) struct Turn<'g> {
    gate: &'g Gate,
    is_trial: bool,
    _permit: SemaphorePermit<'g>,
}

/// Why there is no turn: the receiver is down, with its last failure.
#[derive(Debug)]
pub(super) struct Down(pub String);

impl Gate {
    pub(super) fn new(at_once: usize) -> Self {
        Self {
            turns: Semaphore::new(at_once),
            state: Mutex::new(State {
                failing: BTreeSet::new(),
                trials: 0,
                successes: 0,
                until: Instant::now(),
                is_tried: false,
                fault: String::new(),
            }),
            changed: Notify::new(),
        }
    }

    /// Waits for a turn. Somebody for whom it is too late at `overdue` does not wait for a receiver that is down.
    pub(super) async fn turn(&self, overdue: Instant) -> Result<Turn<'_>, Down> {
        loop {
            // Registered before the look, so that no change is missed.
            let changed = self.changed.notified();
            if let Some((until, fault)) = self.closed() {
                if Instant::now() >= overdue {
                    return Err(Down(fault));
                }
                let wake = until.unwrap_or(overdue).min(overdue);
                tokio::select! {
                    () = changed => {}
                    () = sleep_until(wake) => {}
                }
                continue;
            }
            let Ok(permit) = self.turns.acquire().await else {
                // Never closed.
                continue;
            };
            let mut state = self.state.lock();
            let is_down = state.is_down();
            if is_down && (state.is_tried || Instant::now() < state.until) {
                continue;
            }
            state.is_tried |= is_down;
            return Ok(Turn {
                gate: self,
                is_trial: is_down,
                _permit: permit,
            });
        }
    }

    /// Until when nobody may send (`None`: until something changes), and why. `None`: somebody may.
    fn closed(&self) -> Option<(Option<Instant>, String)> {
        let state = self.state.lock();
        let is_down = state.is_down();
        let until = (!state.is_tried).then_some(state.until);
        let is_open = !is_down || until.is_some_and(|until| until <= Instant::now());
        (!is_open).then(|| (until, state.fault.clone()))
    }

    /// A request succeeded.
    pub(super) fn well(&self) {
        let mut state = self.state.lock();
        if state.is_down() {
            self.changed.notify_waiters();
        }
        state.failing.clear();
        state.trials = 0;
        state.successes += 1;
    }

    /// Requests that succeeded so far.
    pub(super) fn successes(&self) -> u64 {
        self.state.lock().successes
    }
}

impl State {
    fn is_down(&self) -> bool {
        self.failing.len() >= DOWN_AFTER
    }
}

impl Turn<'_> {
    /// The request of an event failed. Returns whether the receiver has just begun to count as down.
    pub(super) fn failed(&self, event: &str, fault: &str, after: Option<Duration>) -> bool {
        let mut state = self.gate.state.lock();
        fault.clone_into(&mut state.fault);
        let was_down = state.is_down();
        if !was_down {
            state.failing.insert(event.to_owned());
        }
        let begins = !was_down && state.is_down();
        if begins || self.is_trial {
            state.trials += 1;
            state.until = Instant::now() + pause(state.trials, PAUSES, after);
        }
        begins
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.is_trial {
            self.gate.state.lock().is_tried = false;
            self.gate.changed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    fn never() -> Instant {
        Instant::now() + Duration::from_secs(1_000_000)
    }

    /// Each of these events fails once.
    async fn fail(gate: &Gate, events: usize, after: Option<Duration>) {
        for n in 1..=events {
            let turn = gate.turn(never()).await.unwrap();
            let begins = turn.failed(&n.to_string(), "it is 503", after);
            assert_eq!(begins, n == DOWN_AFTER);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_receiver_that_is_down_is_tried_by_one_at_a_time() {
        let gate = Gate::new(4);
        fail(&gate, DOWN_AFTER, None).await;
        // Nobody for a moment, and then one.
        let soon = Duration::from_millis(400);
        assert!(timeout(soon, gate.turn(never())).await.is_err());
        let trial = gate.turn(never()).await.unwrap();
        assert!(timeout(2 * PAUSES.1, gate.turn(never())).await.is_err());
        // For whom it is too late, it is too late.
        let late = gate.turn(Instant::now()).await.unwrap_err();
        assert_eq!(late.0, "it is 503");
        // A trial that is given up leaves room for the next one.
        drop(trial);
        let trial = gate.turn(never()).await.unwrap();
        trial.failed("1", "it is 500", None);
        drop(trial);
        let before = Instant::now();
        let trial = gate.turn(never()).await.unwrap();
        assert!(before.elapsed() >= PAUSES.0);
        gate.well();
        drop(trial);
        let mut turns = Vec::new();
        for _ in 0..4 {
            turns.push(gate.turn(never()).await.unwrap());
        }
        assert!(
            timeout(PAUSES.1, gate.turn(never())).await.is_err(),
            "4 at once"
        );
        drop(turns.pop());
        gate.turn(never()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn many_failures_at_once_are_one_reason_for_a_pause() {
        let gate = Gate::new(64);
        let mut turns = Vec::new();
        for _ in 0..64 {
            turns.push(gate.turn(never()).await.unwrap());
        }
        for (event, turn) in turns.iter().enumerate() {
            turn.failed(&event.to_string(), "it restarts", None);
        }
        turns.clear();
        let before = Instant::now();
        gate.turn(never()).await.unwrap();
        assert!(before.elapsed() <= PAUSES.0, "{:?}", before.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_that_is_never_accepted_closes_the_gate_to_nobody() {
        let gate = Gate::new(4);
        let begun = Instant::now();
        for _ in 0..10 * DOWN_AFTER {
            let turn = gate.turn(never()).await.unwrap();
            assert!(!turn.failed("poison", "it is 500", None));
        }
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_receiver_that_is_down_learns_when_it_is_too_late() {
        let gate = Gate::new(1);
        fail(&gate, DOWN_AFTER, Some(Duration::from_secs(3600))).await;
        let begun = Instant::now();
        let late = gate.turn(begun + Duration::from_secs(7)).await;
        assert!(late.is_err() && begun.elapsed() == Duration::from_secs(7));
    }
}
