//! Keeps one child process running.

use std::{process::ExitStatus, time::Duration};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::servers::{Process, StartError};

/// Pause before a child that died is restarted; doubled while it keeps dying, up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// A child that ran this long has recovered: the next pause is [`BACKOFF_MIN`] again.
const STABLE_AFTER: Duration = Duration::from_secs(30);

/// Interval of health checks of a running child.
const HEALTH_INTERVAL: Duration = Duration::from_secs(5);

/// A child without a successful check for this long hangs, and is killed. Longer than what a busy laptop, or a
/// debugger, causes.
const HUNG_AFTER: Duration = Duration::from_secs(45);

/// What happened to a child.
#[derive(Debug)]
pub(super) struct Event {
    /// Which of the children.
    pub child: usize,
    pub what: What,
}

#[derive(Debug)]
pub(super) enum What {
    /// It has ended by itself.
    Died(Option<ExitStatus>),
    /// It does not answer, and is killed.
    Hung(String),
    /// It was restarted, and is ready.
    Restarted { pid: u32 },
    /// It did not become ready; the next attempt follows after the pause.
    RestartFailed { error: StartError, pause: Duration },
}

/// The pause before each restart.
#[derive(Debug)]
struct Backoff {
    next: Duration,
}

impl Backoff {
    fn new() -> Self {
        Self { next: BACKOFF_MIN }
    }

    fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (self.next * 2).min(BACKOFF_MAX);
        pause
    }

    /// The child has ended after it ran for `lived`.
    fn on_end(&mut self, lived: Duration) {
        if lived >= STABLE_AFTER {
            *self = Self::new();
        }
    }
}

/// Watches a child that is ready, restarts it when it ends or hangs (unless `restart` is off), and stops it when `stop`
/// is cancelled; returns when it is gone.
///
/// `events` is small. A reader that does not read delays restarts, but never [`CancellationToken::cancelled`].
pub(super) async fn supervise(
    child: usize,
    mut process: Process,
    restart: bool,
    events: mpsc::Sender<Event>,
    stop: CancellationToken,
) {
    // Dropping the inner future at any point leaves the process either dead or known to `process`.
    let _: Option<()> = stop
        .run_until_cancelled(keep_running(child, &mut process, restart, &events))
        .await;
    process.stop().await;
}

async fn keep_running(
    child: usize,
    process: &mut Process,
    restart: bool,
    events: &mpsc::Sender<Event>,
) {
    let tell = |what| async move {
        // The receiver is gone only while everything is being stopped.
        drop(events.send(Event { child, what }).await);
    };
    let mut backoff = Backoff::new();
    loop {
        let started = Instant::now();
        let what = wait_for_end(process).await;
        let hung = matches!(what, What::Hung(_));
        tell(what).await;
        if !restart && !hung {
            return;
        }
        process.kill().await;
        if !restart {
            return;
        }
        backoff.on_end(started.elapsed());
        loop {
            let pause = backoff.pause();
            sleep(pause).await;
            match process.start().await {
                Ok(()) => break,
                Err(error) => {
                    let pause = backoff.next;
                    tell(What::RestartFailed { error, pause }).await;
                }
            }
        }
        tell(What::Restarted {
            pid: process.pid().unwrap_or(0),
        })
        .await;
    }
}

/// Returns when the process has ended or hangs.
async fn wait_for_end(process: &mut Process) -> What {
    let mut last_well = Instant::now();
    loop {
        let check = process.check_alive();
        let check = async {
            sleep(HEALTH_INTERVAL).await;
            check.await
        };
        // Both branches are cancel-safe: waiting for the end can be repeated, and a check has no state.
        tokio::select! {
            status = process.exited() => return What::Died(status),
            result = check => match result {
                Ok(()) => last_well = Instant::now(),
                Err(error) if last_well.elapsed() >= HUNG_AFTER => {
                    return What::Hung(error.to_string());
                }
                Err(_not_for_long_yet) => {}
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_start_over_when_the_child_was_stable() {
        let mut backoff = Backoff::new();
        let pauses: Vec<_> = (0..8).map(|_| backoff.pause()).collect();
        assert_eq!(pauses[0], BACKOFF_MIN);
        assert_eq!(pauses[7], BACKOFF_MAX);
        backoff.on_end(Duration::from_secs(1));
        assert_eq!(backoff.pause(), BACKOFF_MAX);
        backoff.on_end(STABLE_AFTER);
        assert_eq!(backoff.pause(), BACKOFF_MIN);
    }
}
