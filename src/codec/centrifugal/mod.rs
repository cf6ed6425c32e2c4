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

pub use crate::protocol::Form;
use crate::wire::Framing;

pub(super) use decode::{decode_json, decode_protobuf};
pub(super) use encode::{close, event, message, obeyed, ping, refusal, reply};
pub(crate) use proto::EmulationRequest;

/// The WebSocket subprotocol for Protobuf. JSON has none.
pub const SUBPROTOCOL: &str = "centrifuge-protobuf";

impl Form {
    /// Whether it is Protobuf.
    pub(super) fn is_protobuf(self) -> bool {
        matches!(self, Self::Protobuf | Self::ProtobufStream)
    }

    /// What stands around each message of the server.
    fn framing(self) -> Framing {
        match self {
            Self::Json => Framing::Text,
            Self::Protobuf => Framing::Binary,
            Self::JsonStream => Framing::Line,
            Self::ProtobufStream => Framing::Bare,
            Self::Events => Framing::Event,
        }
    }
}

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
