//! Centrifugo's client protocol, in JSON and in Protobuf.
//!
//! Which room a channel is: [`Names`](super::Names). One WebSocket message has one or more commands, or replies and pushes: JSON
//! objects in lines, or Protobuf messages after their lengths. How positions are expressed: [`position`]. What an SDK
//! needs of each reply, and what differs from Centrifugo, is in `docs/centrifugal.md`. The API for back ends: [`server`].
//!
//! Source: `client.proto` and the SDKs at github.com/centrifugal.

mod decode;
mod encode;
mod position;
mod proto;
pub mod server;

pub(super) use decode::{decode_json, decode_protobuf};
pub(super) use encode::{close, event, message, obeyed, ping, refusal, reply};

/// The WebSocket subprotocol for Protobuf. JSON has none.
pub const SUBPROTOCOL: &str = "centrifuge-protobuf";

/// What the reply to a command needs to know of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// The client's number of the command.
    id: u32,
    method: Method,
}

/// The method of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Connect,
    Subscribe {
        /// Whether the client wants to recover what it missed.
        recovers: bool,
    },
    Unsubscribe,
    Publish,
    Presence,
    PresenceStats,
    History {
        /// Whether the newest is wanted first.
        reverse: bool,
    },
    Ping,
    Rpc,
    /// Has no reply.
    Send,
    Refresh,
    SubRefresh,
}

#[cfg(test)]
mod tests;
