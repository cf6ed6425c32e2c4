//! Who may send to a hook now: a bounded number, and only a single attempt from time to time while its receiver is down.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, Semaphore, SemaphorePermit},
    time::{Instant, sleep_until},
};

use crate::outbound::pause;

/// Failures one after the other, without any success, after which a receiver counts as down.
const DOWN_AFTER: u32 = 8;

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
    /// Since the last success.
    failures: u32,
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
                failures: 0,
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
            let is_down = state.failures >= DOWN_AFTER;
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
        let is_down = state.failures >= DOWN_AFTER;
        let until = (!state.is_tried).then_some(state.until);
        let is_open = !is_down || until.is_some_and(|until| until <= Instant::now());
        (!is_open).then(|| (until, state.fault.clone()))
    }

    /// A request succeeded.
    pub(super) fn well(&self) {
        let mut state = self.state.lock();
        if state.failures >= DOWN_AFTER {
            self.changed.notify_waiters();
        }
        state.failures = 0;
        state.successes += 1;
    }

    /// Requests that succeeded so far.
    pub(super) fn successes(&self) -> u64 {
        self.state.lock().successes
    }

    /// A request failed. Returns whether the receiver has just begun to count as down.
    pub(super) fn failed(&self, fault: &str, after: Option<Duration>) -> bool {
        let mut state = self.state.lock();
        state.failures = state.failures.saturating_add(1);
        fault.clone_into(&mut state.fault);
        if state.failures >= DOWN_AFTER {
            let times = state.failures - DOWN_AFTER + 1;
            state.until = Instant::now() + pause(times, PAUSES, after);
        }
        state.failures == DOWN_AFTER
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

    #[tokio::test(start_paused = true)]
    async fn a_receiver_that_is_down_is_tried_by_one_at_a_time() {
        let gate = Gate::new(4);
        for n in 1..=DOWN_AFTER {
            let _turn = gate.turn(never()).await.unwrap();
            assert_eq!(gate.failed("it is 503", None), n == DOWN_AFTER);
        }
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
        gate.failed("it is 500", None);
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
    async fn who_waits_for_a_receiver_that_is_down_learns_when_it_is_too_late() {
        let gate = Gate::new(1);
        for _ in 0..DOWN_AFTER {
            gate.failed("down", Some(Duration::from_secs(3600)));
        }
        let begun = Instant::now();
        let late = gate.turn(begun + Duration::from_secs(7)).await;
        assert!(late.is_err() && begun.elapsed() == Duration::from_secs(7));
    }
}
