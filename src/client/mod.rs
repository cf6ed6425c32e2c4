//! A client of the native protocol (`natter.v1`) over plain `ws://`, for our own tools and tests.
//!
//! Two layers:
//! - [`Connection`]: one WebSocket. Commands go in, frames come out in the order in which they arrived. It neither
//!   reconnects nor interprets, so a checker can see exactly what an edge sent.
//! - [`Room`] and [`Publisher`]: what a real client must do on top: reconnect with backoff and jitter, resume by
//!   cursor, obey close codes, and repeat a publish with the same id until it is acknowledged.
//!
//! TLS is not supported: `wss://` is refused with an error that says so.
//!
//! Every queue is bounded. If frames or events are not taken, this client stops reading the socket, and the edge closes
//! the session as too slow (4003).

mod connection;
mod endpoint;
mod frame;
mod link;
mod publisher;
mod retry;
mod room;

pub use connection::{CallError, Commands, ConnectError, Connection, End, Silence};
pub use endpoint::Endpoint;
pub use frame::{Frame, Refusal};
pub use link::{Stop, Target, Token};
pub use publisher::{Draft, PublishError, Publisher};
pub use retry::{Advice, Backoff, advice};
pub use room::{Event, Room};

#[cfg(test)]
mod tests;
