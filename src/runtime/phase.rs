//! Where a process stands in its life.

use std::{fmt, sync::Arc};

use tokio::sync::watch;

/// Phases, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Not all is there yet: nobody should come.
    Starting,
    /// Takes work.
    Ready,
    /// Takes no new work, and hands over what it has.
    Draining,
    /// Nothing is left to do.
    Stopped,
}

impl Phase {
    /// The word for logs and `/readyz`.
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

/// The phase of a process, shared: clones show and move the same one.
///
/// # Invariant
/// It never goes back: whoever is late with `Ready` can't undo a drain.
#[derive(Debug, Clone)]
pub struct Lifecycle(Arc<watch::Sender<Phase>>);

impl Default for Lifecycle {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(Phase::Starting)))
    }
}

impl Lifecycle {
    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.0.borrow()
    }

    /// Whether new work may come.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.phase() == Phase::Ready
    }

    /// Moves on to `phase`; `false` if it stands there or further already.
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

    /// Waits until `phase` or a later one is reached, and says which. Cancel-safe.
    pub async fn reached(&self, phase: Phase) -> Phase {
        let mut receiver = self.0.subscribe();
        match receiver.wait_for(|current| *current >= phase).await {
            Ok(current) => *current,
            // The sender lives in `self`; it can't be gone.
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
