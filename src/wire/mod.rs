//! The bytes of one WebSocket connection on a shard: incoming frames ([`Decoder`]), outgoing frames ([`FrameBuilder`]
//! and others), and the socket with its bounded queue ([`Conn`]).
//!
//! Not here: the handshake (`edge`), the meaning of messages and when to ping (`session`), TLS.
//!
//! Everything is single-threaded (`Rc`, `Cell`): a connection lives on the shard that owns it. An idle connection holds
//! no buffer, no queue and no task.

mod conn;
mod decode;
mod encode;
mod outlet;

pub(crate) use conn::FRAME_COST;
pub use conn::{Conn, ConnSettings};
pub use decode::{Decoder, Incoming, MAX_FRAGMENTS};
pub use encode::{FrameBuilder, Framing, close_frame, ping_frame, pong_frame};
#[cfg(test)]
pub use encode::{text_frame, text_of};
pub use outlet::{Collected, Gate, ID, Outlet, Positions};
