//! The bytes of one WebSocket connection on a shard: frames in ([`Decoder`]), frames out ([`FrameBuilder`] and friends),
//! and the socket with its bounded queue ([`Conn`]).
//!
//! Not here: the handshake (`edge`), what a message means and when to ping (`session`), TLS.
//!
//! Everything is single-threaded (`Rc`, `Cell`): a connection lives and dies on the shard that owns it. An idle connection
//! holds no buffer, no queue and no task.

mod conn;
mod decode;
mod encode;

pub(crate) use conn::FRAME_COST;
pub use conn::{Conn, ConnLimits};
pub use decode::{Decoder, Incoming, MAX_FRAGMENTS};
pub use encode::{close_frame, ping_frame, pong_frame, text_frame, text_of};
