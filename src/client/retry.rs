//! When to reconnect: the advice of close codes, and how long to wait. Does no I/O.

use std::time::Duration;

/// What a close code tells a client to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Advice {
    /// Reconnect with the cursor, to another edge if there is one.
    Reconnect,
    /// Reconnect, but not before `LATER`.
    Later,
    /// Reconnect with another token.
    NewToken,
    /// Stop: the next connection would end the same way.
    Never,
}

/// Shortest pause before a reconnect with [`Advice::Later`].
pub(super) const LATER: Duration = Duration::from_secs(5);

/// The advice of a close code, as the documentation of the protocol gives it.
#[must_use]
pub fn advice(code: u16) -> Advice {
    match code {
        4001 => Advice::NewToken,
        // Revoked, ended by a back end, or this client violates the protocol and would do so again.
        4002 | 4004 | 4006 | 1002 | 1003 | 1007 | 1009 => Advice::Never,
        // 1011 is a fault of the edge: do not reconnect at once.
        4005 | 1011 => Advice::Later,
        // 1000 and 1005 without a close of this side mean that the edge stops. 1001, 1006, 4003, 4010.
        1000 | 1001 | 1005 | 1006 | 1012..=1014 | 4003 | 4010 => Advice::Reconnect,
        // A code of a newer edge.
        _ => Advice::Later,
    }
}

/// Exponential backoff with full jitter: the pause before attempt `n` is uniform between zero and `min(cap, base *
/// 2^n)`, so that the many clients of a dead edge do not reconnect in waves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Backoff {
    /// Longest pause before the first attempt.
    pub base: Duration,
    /// Longest pause of any attempt.
    pub cap: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            base: Duration::from_millis(250),
            cap: Duration::from_secs(10),
        }
    }
}

impl Backoff {
    /// The pause before attempt `attempt` (from 0), with `luck` from 0 to 1.
    #[must_use]
    pub fn delay(&self, attempt: u32, luck: f64) -> Duration {
        let longest = self
            .base
            .saturating_mul(2_u32.saturating_pow(attempt))
            .min(self.cap);
        longest.mul_f64(luck.clamp(0.0, 1.0))
    }

    /// The same with a random number.
    pub(super) fn roll(&self, attempt: u32) -> Duration {
        self.delay(attempt, rand::random())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Close;

    #[test]
    fn every_close_code_has_its_advice() {
        for close in Close::ALL {
            let expected = match close {
                Close::BadToken | Close::Expired | Close::Stale => Advice::NewToken,
                Close::Revoked
                | Close::Disconnected
                | Close::ClientProtocol
                | Close::Protocol
                | Close::Unsupported
                | Close::InvalidUtf8
                | Close::TooBig => Advice::Never,
                Close::TooMany | Close::Internal => Advice::Later,
                Close::Normal
                | Close::GoingAway
                | Close::TooSlow
                | Close::Draining
                | Close::PingTimeout => Advice::Reconnect,
            };
            assert_eq!(advice(close.code()), expected, "{close:?}");
        }
        assert_eq!(advice(1006), Advice::Reconnect);
        assert_eq!(advice(4999), Advice::Later);
    }

    #[test]
    fn backoff_grows_to_its_cap() {
        let backoff = Backoff {
            base: Duration::from_millis(100),
            cap: Duration::from_secs(3),
        };
        assert_eq!(backoff.delay(0, 1.0), Duration::from_millis(100));
        assert_eq!(backoff.delay(3, 0.5), Duration::from_millis(400));
        assert_eq!(backoff.delay(9, 1.0), Duration::from_secs(3));
        assert_eq!(backoff.delay(u32::MAX, 1.0), Duration::from_secs(3));
        assert_eq!(backoff.delay(9, 0.0), Duration::ZERO);
    }
}
