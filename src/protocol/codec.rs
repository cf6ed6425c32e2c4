//! The client protocols.

/// A client protocol. How its frames look: [`crate::codec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Codec {
    /// `natter.v1`: JSON objects in WebSocket text frames.
    #[default]
    Native,
    /// Centrifugo's client protocol: JSON in WebSocket text frames.
    CentrifugalJson,
    /// Centrifugo's client protocol: Protobuf in WebSocket binary frames.
    CentrifugalProtobuf,
    /// STOMP 1.2.
    Stomp,
    /// STOMP 1.1 and 1.0, whose headers are written in another way.
    StompOld,
    /// A second protocol for tests.
    #[cfg(test)]
    Lines,
}

impl Codec {
    /// Every codec, each at its number.
    pub const ALL: &[Self] = &[
        Self::Native,
        Self::CentrifugalJson,
        Self::CentrifugalProtobuf,
        Self::Stomp,
        Self::StompOld,
        #[cfg(test)]
        Self::Lines,
    ];

    /// Its name, as metrics have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Native => "natter.v1",
            Self::CentrifugalJson => "centrifugal-json",
            Self::CentrifugalProtobuf => "centrifugal-protobuf",
            Self::Stomp => "stomp",
            Self::StompOld => "stomp-old",
            #[cfg(test)]
            Self::Lines => "natter.lines",
        }
    }
}
