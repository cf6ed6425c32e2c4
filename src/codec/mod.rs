//! Client protocols: how each encodes the terms of `protocol`.
//!
//! A codec decodes what a client sends into [`Request`]s, and encodes replies, events and messages into frames that are
//! ready for the connection. It knows nothing of sessions and rooms. A protocol is one module here and one variant of
//! [`Codec`]. The edge selects it by the WebSocket subprotocol. Dispatch is a `match`: there is no trait object on the
//! path of a message.
//!
//! What is the same for all receivers of a protocol is encoded once: see [`Frames`].

#![warn(missing_docs, clippy::indexing_slicing)]

#[cfg(test)]
#[path = "../../tests/codec/lines.rs"]
mod lines;
pub mod native;

use std::{cell::OnceCell, ops::Range};

use bytes::Bytes;

use crate::{
    protocol::{Command, Event, MessagePush, Refused, Reply},
    wire::ping_frame,
};

/// A client protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Codec {
    /// `natter.v1`: JSON objects in WebSocket text frames.
    #[default]
    Native,
    /// A second protocol for tests.
    #[cfg(test)]
    Lines,
}

/// What a protocol needs to know of a command to answer it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// The number of the command could not be read.
    None,
    /// The client's number of the command.
    Number(u64),
}

/// A command that was read, or the reason why it could not be read.
#[derive(Debug)]
pub struct Request {
    /// Identifies the command in its reply.
    pub tag: Tag,
    /// The command.
    pub command: Result<Command, Refused>,
}

/// A message as a frame.
#[derive(Debug)]
pub struct Encoded {
    /// The frame.
    pub frame: Bytes,
    /// Where the frame contains the body unchanged, if it does.
    pub body: Option<Range<usize>>,
}

impl Codec {
    /// Every codec; [`Frames`] has a slot for each.
    pub const ALL: &[Self] = &[
        Self::Native,
        #[cfg(test)]
        Self::Lines,
    ];

    /// The codec of a WebSocket subprotocol.
    #[must_use]
    pub fn of(subprotocol: &str) -> Option<Self> {
        let mut all = Self::ALL.iter().copied();
        all.find(|codec| codec.subprotocol() == subprotocol)
    }

    /// Its WebSocket subprotocol.
    #[must_use]
    pub fn subprotocol(self) -> &'static str {
        match self {
            Self::Native => native::SUBPROTOCOL,
            #[cfg(test)]
            Self::Lines => lines::SUBPROTOCOL,
        }
    }

    /// Decodes the commands in one text message. Calls `each` once for each command, in order.
    pub fn decode(self, text: &str, mut each: impl FnMut(Request)) {
        match self {
            Self::Native => each(native::decode(text)),
            #[cfg(test)]
            Self::Lines => lines::decode(text, each),
        }
    }

    /// The frame of a reply.
    #[must_use]
    pub fn reply(self, tag: Tag, reply: &Reply) -> Bytes {
        match self {
            Self::Native => native::reply(tag, reply),
            #[cfg(test)]
            Self::Lines => lines::reply(tag, reply),
        }
    }

    /// The frame that tells a client that its command was refused.
    #[must_use]
    pub fn refusal(self, tag: Tag, refused: &Refused) -> Bytes {
        match self {
            Self::Native => native::refusal(tag, refused),
            #[cfg(test)]
            Self::Lines => lines::refusal(tag, refused),
        }
    }

    /// The frame of an event.
    #[must_use]
    pub fn event(self, event: &Event) -> Bytes {
        match self {
            Self::Native => native::event(event),
            #[cfg(test)]
            Self::Lines => lines::event(event),
        }
    }

    /// The frame of a message.
    #[must_use]
    pub fn message(self, message: &MessagePush<'_>) -> Encoded {
        match self {
            Self::Native => native::message(message),
            #[cfg(test)]
            Self::Lines => lines::message(message),
        }
    }

    /// The frame that pings an idle client.
    #[must_use]
    pub fn ping(self) -> Bytes {
        match self {
            Self::Native => ping_frame(),
            #[cfg(test)]
            Self::Lines => ping_frame(),
        }
    }
}

/// One thing encoded for several receivers: one value for each codec, made when the first receiver needs it.
#[derive(Debug)]
pub struct PerCodec<T>([OnceCell<T>; Codec::ALL.len()]);

/// The frames of one thing.
pub type Frames = PerCodec<Bytes>;

impl<T> Default for PerCodec<T> {
    fn default() -> Self {
        Self(std::array::from_fn(|_| OnceCell::new()))
    }
}

impl<T> PerCodec<T> {
    /// The value for `codec`. The first call makes it with `encode`.
    #[expect(clippy::indexing_slicing, reason = "a slot for each codec")]
    pub fn get(&self, codec: Codec, encode: impl FnOnce() -> T) -> &T {
        self.0[codec as usize].get_or_init(encode)
    }

    /// The values that were made so far.
    pub fn made(&self) -> impl Iterator<Item = &T> {
        self.0.iter().filter_map(OnceCell::get)
    }
}
