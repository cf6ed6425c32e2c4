//! Everything that talks to NATS: connections, publishing, live subscriptions, direct reads of streams.
//!
//! No consumer and no watcher is created here: live messages come from the streams' RePublish, replay from batched direct
//! gets. Every request has a deadline of ours, since async-nats waits for ever while it is disconnected.

mod ack;
mod connection;
mod count;
mod kv;
mod live;
pub mod provision;
mod publish;
mod read;
mod record;
mod streams;

/// A message as it comes from NATS: subject, headers, payload.
pub use async_nats::Message;
pub use connection::{ConnectError, Connection};
pub use count::Newer;
pub use kv::{Bucket, Entry, KvError, Put};
pub use live::{LiveFeed, Suspicion};
pub use publish::{Acked, Outgoing, PublishError, Publisher};
pub use read::{MAX_HEADS, Page, ReadError, Reader, Stored};
pub use record::{BY_HAND, BadRecord, Record, message_key};
pub use streams::{StreamError, StreamState, Streams};
