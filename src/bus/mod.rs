//! NATS on the path of a message: connections, publishing, live subscriptions, direct reads of streams. What only the
//! operators' tools need is in [`mesh`](crate::mesh).
//!
//! No consumer and no watcher is created on the path of a message: live messages come from the streams' RePublish,
//! replay from batched direct gets. Only the history service, workers and hooks have consumers, one per stream ([`Pull`]). Every request
//! has a deadline set here, since async-nats waits without limit while it is disconnected.

mod connection;
mod count;
mod dead;
mod direct_get;
mod erase;
mod jetstream;
mod kv;
pub(crate) mod line;
mod live;
mod publish;
mod pull;
mod record;
mod remembered;
mod rooms;
mod service;
mod signal;
mod streams;

/// A message as it comes from NATS: subject, headers, payload.
pub use async_nats::Message;
pub(crate) use connection::new_inbox;
pub use connection::{ConnectError, Connection};
pub use count::Newer;
pub use dead::{DeadLetter, DeadLetters, HOOK_ROLE, LetterError, WORKER_ROLE};
pub use direct_get::{MAX_HEADS, ReadError, Reader, Stored};
pub use erase::{Candidate, EraseError, Eraser, Scan};
pub use kv::{Bucket, Entry, Heard, KvError, Put};
pub use line::{Arrival, HeaderWriter, Line, LineError, Listener};
pub use live::LiveFeed;
pub use publish::{Acked, Outgoing, PublishError, Publisher};
pub use pull::{
    Answer, Consumer, ConsumerState, Delivery, Pull, PullError, answer, consumer_elsewhere,
    consumer_state, count_after, stored_after,
};
pub use record::{BadRecord, Record, message_key};
pub use remembered::{Leaving, Remembered, Suspect};
pub use rooms::rooms_of;
pub use service::{AskError, Endpoint, ServeError, ServiceError, ask, serve};
pub use signal::{News, Signal};
pub use streams::{
    Origins, STREAMS_WATCH, StreamError, StreamState, Streams, epoch_elsewhere, mesh_regions,
    newest_elsewhere,
};
