//! A rate limit for one client or key.

use std::time::{Duration, Instant};

/// A leaky bucket as the generic cell rate algorithm (ITU-T I.371). Its state is one instant.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// When the bucket will be empty.
    empty_at: Instant,
}

impl Pace {
    /// An empty bucket.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { empty_at: now }
    }

    /// Takes one of `per_second`, of which `burst` may come at once. Returns `false`, and takes nothing, if the rate is
    /// exceeded.
    pub fn take(&mut self, now: Instant, per_second: u32, burst: u32) -> bool {
        let each = Duration::from_secs(1) / per_second.max(1);
        let filled = self.empty_at.max(now) + each;
        let within = filled <= now + each * burst.max(1);
        if within {
            self.empty_at = filled;
        }
        within
    }

    /// Takes one, and returns how long to wait until it is within the rate. That is at most `most`: where it would be
    /// longer, nothing is taken.
    pub fn wait(&mut self, now: Instant, per_second: u32, burst: u32, most: Duration) -> Duration {
        let each = Duration::from_secs(1) / per_second.max(1);
        let filled = self.empty_at.max(now) + each;
        let wait = filled.saturating_duration_since(now + each * burst.max(1));
        if wait <= most {
            self.empty_at = filled;
        }
        wait.min(most)
    }

    /// Whether the bucket is empty, so that its state need not be kept.
    #[must_use]
    pub fn is_idle(&self, now: Instant) -> bool {
        self.empty_at <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_the_rate() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        let taken = (0..100).filter(|_| pace.take(start, 10, 5)).count();
        assert_eq!(taken, 5);
        let second = start + Duration::from_secs(1);
        let taken = (0..100).filter(|_| pace.take(second, 10, 5)).count();
        assert_eq!(taken, 5);
        // Those that wait have each their turn, and nobody waits for long.
        let mut pace = Pace::new(start);
        let most = Duration::from_secs(3);
        let waits = (0..9).map(|_| pace.wait(start, 1, 4, most).as_secs());
        assert_eq!(waits.collect::<Vec<_>>(), [0, 0, 0, 0, 1, 2, 3, 3, 3]);
        assert_eq!(pace.wait(start + most, 1, 4, most).as_secs(), 1);
        // Evenly spaced at the rate: none is refused.
        let mut pace = Pace::new(start);
        assert!((0..1000).all(|i| pace.take(start + Duration::from_millis(100) * i, 10, 1)));
    }
}
