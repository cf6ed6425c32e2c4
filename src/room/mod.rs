//! Rooms of one shard: a hub a room, with its subscription, its log in memory and its members.
//!
//! Everything here runs on the shard's thread: no locks, no `Send`. A hub has a task only while it opens, reads its stream, or
//! is at work on a large room; else what the line brings and who joins or leaves touches its state directly. A hub does not
//! know sessions: a member is a connection's outbox and a place in the log.

mod backlog;
mod causal;
mod encode;
mod fan_out;
mod gap;
mod hub;
mod join;
mod log;
mod memory;
mod merge;
mod receipts;
mod references;
mod rooms;

pub use join::{JoinError, Joined, Membership, NewMember};
pub use rooms::Rooms;
