//! The core words of every client protocol: commands, replies, events, refusals, error and close codes.
//!
//! Plain data. How a protocol spells these words is the business of `codec`; the HTTP interface answers with the same
//! [`Reply`] values, as JSON. No I/O, no frames and no request ids.

#![warn(missing_docs, clippy::indexing_slicing)]

mod codes;
mod command;
mod event;
mod publication;
mod reply;

pub use codes::{Close, ErrorCode, Refused};
pub use command::{Anchor, Command, HistoryOf, PageOf, Wants};
pub use event::{Event, MessagePush, PresenceChange, PresenceState};
pub use publication::{Draft, MAX_MENTIONS, Mentions, Publication};
pub use reply::{
    HistoryReply, JoinReply, MessageBody, PresenceReply, PresentUser, PublishReply, ReadReply,
    ReaderBody, ReadersReply, Reply, SearchReply, UnreadBody, UnreadReply,
};
