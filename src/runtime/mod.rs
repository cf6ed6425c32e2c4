//! What a long-lived process needs around its work: signals, phases, named tasks, the time, pace.
//!
//! Knows nothing of what the process does. The one order of a drain: phase to [`Phase::Draining`], the work ends, then
//! [`Tasks::drain`], then [`Phase::Stopped`].

mod pace;
mod panics;
mod phase;
mod signals;
mod tasks;

use std::time::{SystemTime, UNIX_EPOCH};

pub use pace::Pace;
pub use panics::on_panic;
pub use phase::{Lifecycle, Phase};
pub use signals::Signals;
pub use tasks::{Late, Tasks};

/// The wall clock in unix milliseconds; 0 if it stands before 1970.
#[must_use]
pub fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| u64::try_from(since.as_millis()).ok())
        .unwrap_or(0)
}

/// The wall clock in unix seconds, as tokens have it.
#[must_use]
pub fn unix_s() -> u64 {
    unix_ms() / 1000
}
