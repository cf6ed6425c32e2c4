//! The client protocols.

/// A client protocol. How its frames look: [`crate::codec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Codec {
    /// `natter.v1`: JSON objects in WebSocket text frames.
    #[default]
    Native,
    /// Centrifugo's client protocol.
    Centrifugal(Form),
    /// STOMP 1.2.
    Stomp,
    /// STOMP 1.1 and 1.0, whose headers are written in another way.
    StompOld,
    /// The pushes of `natter.v1` in an HTTP response, as `text/event-stream`.
    Events,
    /// The messages of `natter.v1` that a poll collects.
    Poll,
    /// A second protocol for tests.
    #[cfg(test)]
    Lines,
}

/// How Centrifugo's client protocol is written, and on what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// JSON in WebSocket text frames.
    Json,
    /// Protobuf in WebSocket binary frames.
    Protobuf,
    /// JSON in the lines of an HTTP response: the SDKs' transport `http_stream`.
    JsonStream,
    /// Protobuf messages, each after its length, in an HTTP response.
    ProtobufStream,
    /// JSON in the events of `text/event-stream`: the SDKs' transport `sse`.
    Events,
}

impl Codec {
    /// Every codec, each at its number.
    pub const ALL: &[Self] = &[
        Self::Native,
        Self::Centrifugal(Form::Json),
        Self::Centrifugal(Form::Protobuf),
        Self::Centrifugal(Form::JsonStream),
        Self::Centrifugal(Form::ProtobufStream),
        Self::Centrifugal(Form::Events),
        Self::Stomp,
        Self::StompOld,
        Self::Events,
        Self::Poll,
        #[cfg(test)]
        Self::Lines,
    ];

    /// Its number in [`Codec::ALL`].
    #[must_use]
    pub const fn number(self) -> usize {
        match self {
            Self::Native => 0,
            Self::Centrifugal(form) => 1 + form as usize,
            Self::Stomp => 6,
            Self::StompOld => 7,
            Self::Events => 8,
            Self::Poll => 9,
            #[cfg(test)]
            Self::Lines => 10,
        }
    }

    /// Its name, as metrics have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Native => "natter.v1",
            Self::Centrifugal(Form::Json) => "centrifugal-json",
            Self::Centrifugal(Form::Protobuf) => "centrifugal-protobuf",
            Self::Centrifugal(Form::JsonStream) => "centrifugal-json-stream",
            Self::Centrifugal(Form::ProtobufStream) => "centrifugal-protobuf-stream",
            Self::Centrifugal(Form::Events) => "centrifugal-sse",
            Self::Stomp => "stomp",
            Self::StompOld => "stomp-old",
            Self::Events => "sse",
            Self::Poll => "poll",
            #[cfg(test)]
            Self::Lines => "natter.lines",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_codec_has_its_number() {
        let numbers: Vec<usize> = Codec::ALL.iter().map(|codec| codec.number()).collect();
        let all: Vec<usize> = (0..Codec::ALL.len()).collect();
        assert_eq!(numbers, all);
    }
}
