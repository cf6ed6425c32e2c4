//! The terms that all client protocols share: commands, replies, events, refusals, error and close codes.
//!
//! Plain data: no I/O, no frames, no request ids. How a protocol encodes it is up to `codec`. The HTTP interface
//! answers with the same [`Reply`] values, as JSON.

#![warn(missing_docs, clippy::indexing_slicing)]

use std::time::Duration;

mod codec;
mod codes;
mod command;
mod directory;
mod event;
mod inbox;
mod order;
mod people;
mod publication;
mod reply;

pub use codec::{Codec, Form};
pub use codes::{Close, ErrorCode, Refused};
pub use command::{
    Anchor, Beats, Command, First, HistoryOf, NewRoom, PageOf, ResumeAt, RoomSubscription,
    SearchFor, Since, SubscribedTo, Wants, WatchOf, Watched,
};
pub use directory::{RoomBody, RoomsReply};
pub use event::{Event, MessagePush, PresenceChange, PresenceState};
pub use inbox::{
    AlertBody, InboxReply, LastMessage, RefusedRoom, RoomSummary, WatchPush, WatchReply,
};
pub use order::{Obeyed, Order, OrderKind};
pub use people::{Arrangement, MemberState, PutMember, Role, Settings};
pub use publication::{Draft, Mentions, Publication};
pub use reply::{
    AuthReply, HistoryReply, JoinReply, MemberBody, MessageBody, PollReply, PresenceReply,
    PresentUser, PublishReply, ReadReply, ReaderBody, ReadersReply, RecordReply, Reply,
    SearchReply, StreamAddress, UnreadBody, UnreadReply, Validity,
};

/// How often a client is pinged.
pub const PING_EVERY: Duration = Duration::from_secs(25);
