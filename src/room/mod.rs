//! Rooms of one shard. Each room has a hub: its subscriptions, its log in memory and its members.
//!
//! Everything here runs on the shard's thread: no locks, no `Send`. A hub has a task only while it opens, reads its
//! stream, or works on a large room. Otherwise arriving messages, joins and leaves change its state directly. A hub
//! does not know sessions: a member is a connection's outbox and a place in the log.

mod backlog;
mod causal;
mod fan_out;
mod first;
mod gap;
mod hub;
mod join;
mod joined;
mod log;
mod member;
mod memory;
mod merge;
mod message;
mod missed;
mod numbers;
mod receipts;
mod references;
mod rings;
mod rooms;

pub use join::Membership;
pub use joined::{JoinAt, JoinError, Joined, ResetReason};
pub use member::NewMember;
pub use rooms::Rooms;
