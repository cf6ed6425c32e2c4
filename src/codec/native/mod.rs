//! `natter.v1`: JSON text frames, and the JSON bodies of HTTP requests.
//!
//! Decoding reads one command from one text message. The text of a body is kept as it was sent. The server writes JSON
//! without needless white space, `op` first and `rid` next.

mod decode;
mod encode;

pub(super) use decode::decode_command;
pub use decode::{decode, decode_publication, decode_read, decode_unread};
pub(super) use encode::{event, message, refusal, reply};

use crate::protocol::Codec;

/// The WebSocket subprotocol.
pub const SUBPROTOCOL: &str = Codec::Native.name();

#[cfg(test)]
mod tests;
