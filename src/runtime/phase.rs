//! The phase of a process.

use std::{fmt, sync::Arc};

use tokio::sync::watch;

/// The phases, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Not everything is available yet. Not ready for work.
    Starting,
    /// Accepts work.
    Ready,
    /// Accepts no new work, and hands over what it has.
    Draining,
    /// Everything has ended.
    Stopped,
}

impl Phase {
    /// The name for logs and `/readyz`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The phase of a process. Clones share it.
///
/// # Invariant
/// The phase never goes back: a late `Ready` can't undo a drain.
#[derive(Debug, Clone)]
pub struct Lifecycle(Arc<watch::Sender<Phase>>);

impl Default for Lifecycle {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(Phase::Starting)))
    }
}

impl Lifecycle {
    /// The current phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.0.borrow()
    }

    /// Whether new work is accepted.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.phase() == Phase::Ready
    }

    /// Advances to `phase`. Returns `false` if that phase or a later one was already reached.
    pub fn advance(&self, phase: Phase) -> bool {
        self.0.send_if_modified(|current| {
            let later = phase > *current;
            if later {
                tracing::info!(from = %current, to = %phase, "phase");
                *current = phase;
            }
            later
        })
    }

    /// Waits until `phase` or a later one is reached, and returns the phase reached. Cancel-safe.
    pub async fn reached(&self, phase: Phase) -> Phase {
        let mut receiver = self.0.subscribe();
        match receiver.wait_for(|current| *current >= phase).await {
            Ok(current) => *current,
            // The sender is in `self`, so it can't have been dropped.
            Err(_closed) => Phase::Stopped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn phases_only_go_forward_and_are_seen_by_who_waits() {
        let lifecycle = Lifecycle::default();
        assert!(!lifecycle.is_ready());
        let waiting = tokio::spawn({
            let lifecycle = lifecycle.clone();
            async move { lifecycle.reached(Phase::Draining).await }
        });
        assert!(lifecycle.advance(Phase::Ready) && lifecycle.is_ready());
        assert!(lifecycle.advance(Phase::Draining));
        assert!(!lifecycle.advance(Phase::Ready), "a drain was undone");
        assert!(!lifecycle.advance(Phase::Draining));
        assert_eq!(waiting.await.unwrap(), Phase::Draining);
        assert!(!lifecycle.is_ready());
        lifecycle.advance(Phase::Stopped);
        assert_eq!(lifecycle.reached(Phase::Draining).await, Phase::Stopped);
    }
}
