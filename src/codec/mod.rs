//! Client protocols: how each encodes the terms of `protocol`.
//!
//! A codec decodes what a client sends into [`Request`]s, and encodes replies, events and messages into frames that are
//! ready for the connection. It knows nothing of sessions and rooms. A protocol is one module here and one variant of
//! [`Codec`]. The edge selects it by the path and the WebSocket subprotocol. Dispatch is a `match`: there is no trait object on the
//! path of a message.
//!
//! What is the same for all receivers of a protocol is encoded once: see [`Frames`].

#![warn(missing_docs, clippy::indexing_slicing)]

pub mod centrifugal;
pub mod events;
#[cfg(test)]
#[path = "../../tests/codec/lines.rs"]
mod lines;
mod names;
pub mod native;
pub mod stomp;

use std::{cell::OnceCell, ops::Range, sync::Arc};

use bytes::Bytes;

pub use crate::protocol::Codec;
pub use names::Names;

use centrifugal::Form;

use crate::{
    protocol::{
        Close, Command, ErrorCode, Event, MessagePush, Obeyed, Refused, Reply, RoomSubscription,
    },
    wire::{FrameBuilder, Framing, close_frame, ping_frame},
};

/// What a protocol needs to know of a command to answer it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tag {
    /// The number of the command could not be read.
    None,
    /// The client's number of the command.
    Number(u64),
    /// A command of Centrifugo's protocol.
    Call(centrifugal::Call),
    /// A frame of STOMP.
    Stomp(Arc<stomp::Asked>),
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

/// What reads the messages of one client.
#[derive(Debug)]
pub enum CommandReader {
    /// Each message is read by itself.
    Plain(Codec),
    /// Frames may span messages, and subscriptions have names.
    Stomp(Box<stomp::FrameReader>),
}

impl CommandReader {
    /// A reader for messages of up to `most` bytes.
    #[must_use]
    pub fn new(codec: Codec, most: usize) -> Self {
        match codec {
            Codec::Stomp | Codec::StompOld => Self::Stomp(Box::new(stomp::FrameReader::new(most))),
            codec => Self::Plain(codec),
        }
    }

    /// Reads the commands in one text message. Calls `each` once for each command, in order.
    pub fn text(&mut self, text: &str, each: impl FnMut(Request)) {
        match self {
            Self::Plain(codec) => codec.decode(text, each),
            Self::Stomp(reader) => reader.read(text.as_bytes(), each),
        }
    }

    /// Reads the commands in one binary message.
    pub fn binary(&mut self, message: &[u8], each: impl FnMut(Request)) {
        match self {
            Self::Plain(codec) => codec.decode_binary(message, each),
            Self::Stomp(reader) => reader.read(message, each),
        }
    }
}

/// Most commands in one message. A client that subscribes to many rooms at once sends one for each.
const MAX_COMMANDS: usize = 1000;

impl Request {
    /// What is not a command.
    fn unreadable(what: &str) -> Self {
        let text = format!("{what} is not a command");
        Self {
            tag: Tag::None,
            command: Err(Refused::new(ErrorCode::BadRequest, text)),
        }
    }
}

impl Codec {
    /// The codecs that are served at the same path: a client selects one by its subprotocol.
    #[must_use]
    pub fn at_the_same_path(self) -> &'static [Self] {
        match self {
            Self::Centrifugal(_) => &[
                Self::Centrifugal(Form::Json),
                Self::Centrifugal(Form::Protobuf),
            ],
            Self::Stomp | Self::StompOld => &[Self::Stomp],
            Self::Events | Self::Poll => &[],
            #[cfg(not(test))]
            Self::Native => &[Self::Native],
            #[cfg(test)]
            Self::Native | Self::Lines => &[Self::Native, Self::Lines],
        }
    }

    /// Its WebSocket subprotocols.
    #[must_use]
    pub fn subprotocols(self) -> &'static [&'static str] {
        match self {
            Self::Native => &[native::SUBPROTOCOL],
            Self::Centrifugal(Form::Protobuf) => &[centrifugal::SUBPROTOCOL],
            Self::Centrifugal(_) | Self::Events | Self::Poll => &[],
            Self::Stomp | Self::StompOld => stomp::SUBPROTOCOLS,
            #[cfg(test)]
            Self::Lines => &[lines::SUBPROTOCOL],
        }
    }

    /// Whether the first subprotocol is better than the second.
    #[must_use]
    pub fn prefers(self, first: &str, second: &str) -> bool {
        let mut names = self.subprotocols().iter();
        let best = names.find(|name| **name == first || **name == second);
        best == Some(&first) && first != second
    }

    /// Whether clients send binary messages.
    #[must_use]
    pub fn is_binary(self) -> bool {
        match self {
            Self::Centrifugal(form) => form.is_protobuf(),
            Self::Stomp | Self::StompOld => true,
            Self::Native | Self::Events | Self::Poll => false,
            #[cfg(test)]
            Self::Lines => false,
        }
    }

    /// Whether a refusal ends the session.
    #[must_use]
    pub fn refusal_is_final(self) -> bool {
        // A stream of events is joined by its request.
        self.is_stomp() || self == Self::Events
    }

    /// Whether it is STOMP.
    #[must_use]
    pub fn is_stomp(self) -> bool {
        matches!(self, Self::Stomp | Self::StompOld)
    }

    /// The codec after the version was agreed on.
    #[must_use]
    pub fn agreed(self, tag: &Tag) -> Self {
        match tag {
            Tag::Stomp(asked) if asked.is_old() => Self::StompOld,
            _ => self,
        }
    }

    /// Whether a client is closed at once if it sends what can't be read, or a command that the protocol does not allow
    /// at that point. Otherwise the command is refused.
    #[must_use]
    pub fn is_strict(self) -> bool {
        match self {
            Self::Centrifugal(_) => true,
            Self::Native | Self::Stomp | Self::StompOld | Self::Events | Self::Poll => false,
            #[cfg(test)]
            Self::Lines => false,
        }
    }

    /// Decodes the commands in one text message, in a protocol whose messages are each decoded by themselves. Calls `each`
    /// once for each command, in order.
    pub fn decode(self, text: &str, mut each: impl FnMut(Request)) {
        match self {
            Self::Stomp | Self::StompOld => {
                each(Request::unreadable("a message without its reader"))
            }
            Self::Native => each(native::decode(text)),
            Self::Centrifugal(form) if !form.is_protobuf() => centrifugal::decode_json(text, each),
            Self::Centrifugal(_) => each(Request::unreadable("a text message")),
            Self::Events | Self::Poll => each(Request::unreadable("what comes after the request")),
            #[cfg(test)]
            Self::Lines => lines::decode(text, each),
        }
    }

    /// Decodes the commands in one binary message.
    pub fn decode_binary(self, message: &[u8], mut each: impl FnMut(Request)) {
        match self {
            Self::Centrifugal(form) if form.is_protobuf() => {
                centrifugal::decode_protobuf(message, each);
            }
            Self::Native
            | Self::Centrifugal(_)
            | Self::Stomp
            | Self::StompOld
            | Self::Events
            | Self::Poll => {
                each(Request::unreadable("a binary message"));
            }
            #[cfg(test)]
            Self::Lines => each(Request::unreadable("a binary message")),
        }
    }

    /// The frame of a reply; `None` if the client asked for none.
    #[must_use]
    pub fn reply(self, tag: &Tag, reply: &Reply) -> Option<Bytes> {
        match self {
            Self::Native => Some(native::reply(Framing::Text, tag, reply)),
            Self::Centrifugal(form) => Some(centrifugal::reply(form, tag, reply)),
            Self::Events => Some(events::reply(reply)),
            Self::Poll => None,
            Self::Stomp | Self::StompOld => stomp::reply(self, tag, reply),
            #[cfg(test)]
            Self::Lines => Some(lines::reply(tag, reply)),
        }
    }

    /// The frame that tells a client that its command was refused; `None` if the protocol has no reply to the command.
    #[must_use]
    pub fn refusal(self, tag: &Tag, refused: &Refused) -> Option<Bytes> {
        match self {
            Self::Stomp | Self::StompOld => Some(stomp::refusal(self, tag, refused)),
            Self::Native => Some(native::refusal(Framing::Text, tag, refused)),
            Self::Centrifugal(form) => centrifugal::refusal(form, tag, refused),
            Self::Events => Some(events::refusal(refused)),
            Self::Poll => None,
            #[cfg(test)]
            Self::Lines => Some(lines::refusal(tag, refused)),
        }
    }

    /// The frame of an event; `None` if the protocol has no such event.
    #[must_use]
    pub fn event(self, event: &Event) -> Option<Bytes> {
        match self {
            Self::Stomp | Self::StompOld => stomp::event(self, event),
            Self::Native => Some(native::event(Framing::Text, event)),
            Self::Centrifugal(form) => centrifugal::event(form, event),
            Self::Events => Some(events::event(event)),
            Self::Poll => None,
            #[cfg(test)]
            Self::Lines => Some(lines::event(event)),
        }
    }

    /// The frame that tells a client what its back end did to its session; `None` if the protocol has none for it. For a
    /// disconnect it is the close frame.
    #[must_use]
    pub fn obeyed(self, obeyed: &Obeyed<'_>) -> Option<Bytes> {
        match self {
            Self::Centrifugal(form) => Some(centrifugal::obeyed(form, obeyed)),
            Self::Native | Self::Stomp | Self::StompOld | Self::Events | Self::Poll => None,
            #[cfg(test)]
            Self::Lines => None,
        }
    }

    /// What is sent before each frame of a subscription, in a protocol that has several for one room.
    #[must_use]
    pub fn head(self, subscription: &RoomSubscription) -> Bytes {
        match self {
            Self::Stomp | Self::StompOld => stomp::head(self, subscription),
            Self::Native | Self::Centrifugal(_) | Self::Events | Self::Poll => Bytes::new(),
            #[cfg(test)]
            Self::Lines => Bytes::new(),
        }
    }

    /// The frame of a message.
    #[must_use]
    pub fn message(self, message: &MessagePush<'_>) -> Encoded {
        match self {
            Self::Stomp | Self::StompOld => stomp::message(self, message),
            Self::Native => native::message(Framing::Text, message),
            Self::Centrifugal(form) => centrifugal::message(form, message),
            Self::Events => events::message(message),
            Self::Poll => events::polled(message),
            #[cfg(test)]
            Self::Lines => lines::message(message),
        }
    }

    /// The frame that pings an idle client.
    #[must_use]
    pub fn ping(self) -> Bytes {
        match self {
            Self::Native | Self::Stomp | Self::StompOld => ping_frame(),
            Self::Centrifugal(form) => centrifugal::ping(form),
            Self::Events | Self::Poll => events::ping(),
            #[cfg(test)]
            Self::Lines => ping_frame(),
        }
    }

    /// Makes the close frame of a reason, or what a stream ends with in its place.
    #[must_use]
    pub fn close_frame(self) -> fn(Close) -> Bytes {
        match self {
            Self::Centrifugal(Form::Json) => |close| centrifugal::close(Form::Json, close),
            Self::Centrifugal(Form::Protobuf) => |close| centrifugal::close(Form::Protobuf, close),
            Self::Centrifugal(Form::JsonStream) => {
                |close| centrifugal::close(Form::JsonStream, close)
            }
            Self::Centrifugal(Form::ProtobufStream) => {
                |close| centrifugal::close(Form::ProtobufStream, close)
            }
            Self::Centrifugal(Form::Events) => |close| centrifugal::close(Form::Events, close),
            Self::Events | Self::Poll => events::close,
            Self::Native | Self::Stomp | Self::StompOld => plain_close,
            #[cfg(test)]
            Self::Lines => plain_close,
        }
    }
}

/// The close frame of a protocol that has no codes of its own.
fn plain_close(close: Close) -> Bytes {
    close_frame(close.code(), close.reason())
}

/// Writes a text as a JSON string.
fn put_json_string(out: &mut FrameBuilder, value: &str) {
    if value.bytes().all(|b| b >= 0x20 && b != b'"' && b != b'\\') {
        out.put_u8(b'"');
        out.put(value.as_bytes());
        out.put_u8(b'"');
    } else {
        serde_json::to_writer(out, value).expect("writing a string to memory");
    }
}

/// One thing encoded for several receivers: one value for each codec, made when the first receiver needs it.
#[derive(Debug)]
pub struct PerCodec<T> {
    native: OnceCell<T>,
    /// One for each of the others. Apart, because most messages have no receiver of another protocol.
    others: OnceCell<Box<[OnceCell<T>; OTHERS]>>,
}

/// The number of codecs besides [`Codec::Native`].
const OTHERS: usize = Codec::ALL.len() - 1;

/// The frames of one thing.
pub type Frames = PerCodec<Bytes>;

impl<T> Default for PerCodec<T> {
    fn default() -> Self {
        Self {
            native: OnceCell::new(),
            others: OnceCell::new(),
        }
    }
}

impl<T> PerCodec<T> {
    /// The value for `codec`. The first call makes it with `encode`.
    #[expect(clippy::indexing_slicing, reason = "a slot for each codec")]
    pub fn get(&self, codec: Codec, encode: impl FnOnce() -> T) -> &T {
        match codec.number().checked_sub(1) {
            None => self.native.get_or_init(encode),
            Some(other) => {
                let new = || Box::new(std::array::from_fn(|_| OnceCell::new()));
                self.others.get_or_init(new)[other].get_or_init(encode)
            }
        }
    }

    /// The values that were made so far.
    pub fn made(&self) -> impl Iterator<Item = &T> {
        let others = self.others.get().into_iter().flat_map(|all| all.iter());
        std::iter::once(&self.native)
            .chain(others)
            .filter_map(OnceCell::get)
    }
}
