//! Rooms of one shard: a hub a room, with its subscription, its log in memory and its members.
//!
//! Everything here runs on the shard's thread: no locks, no `Send`. A hub is one task; joins and leaves touch its state
//! directly between the task's steps. A hub does not know sessions: a member is a connection's outbox and a place in the log.

mod backlog;
mod encode;
mod hub;
mod log;
mod rooms;

pub use hub::{Hub, Member};
pub use rooms::{JoinError, Joined, Membership, NewMember, ResetReason, Rooms};
