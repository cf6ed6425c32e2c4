//! Tests against real servers, one binary.

#![expect(clippy::print_stderr, reason = "progress of fetching servers")]

mod provision;
mod support;
mod up;
