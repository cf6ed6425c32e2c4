//! The terms that all client protocols share: commands, replies, events, refusals, error and close codes.
//!
//! Plain data: no I/O, no frames, no request ids. How a protocol encodes it is up to `codec`. The HTTP interface
//! answers with the same [`Reply`] values, as JSON.

#![warn(missing_docs, clippy::indexing_slicing)]

mod codes;
mod command;
mod event;
mod publication;
mod reply;

pub use codes::{Close, ErrorCode, Refused};
pub use command::{Anchor, Command, HistoryOf, PageOf, Wants};
pub use event::{Event, MessagePush, PresenceChange, PresenceState};
pub use publication::{Draft, Publication};
pub use reply::{
    HistoryReply, JoinReply, MessageBody, PresenceReply, PresentUser, PublishReply, ReadReply,
    ReaderBody, ReadersReply, Reply, SearchReply, UnreadBody, UnreadReply,
};
