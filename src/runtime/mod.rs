//! What a long-lived process needs around its work: signals, phases, named tasks, the clock, rate limits,
//! TLS.
//!
//! This module does not know what the process does. A drain has this order: the phase becomes [`Phase::Draining`], the
//! work ends, then [`Tasks::drain`], then [`Phase::Stopped`].

mod pace;
mod panics;
mod phase;
mod signals;
mod tasks;
mod tls;

use std::time::{SystemTime, UNIX_EPOCH};

pub use pace::Pace;
pub use panics::on_panic;
pub use phase::{Lifecycle, Phase};
pub use signals::Signals;
pub use tasks::{Late, Tasks};
pub use tls::tls;

/// The wall clock in ms since 1970; 0 if it is before 1970.
#[must_use]
pub fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| u64::try_from(since.as_millis()).ok())
        .unwrap_or(0)
}

/// The wall clock in seconds since 1970, as used in tokens.
#[must_use]
pub fn unix_s() -> u64 {
    unix_ms() / 1000
}
