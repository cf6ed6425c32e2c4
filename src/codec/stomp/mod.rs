//! STOMP 1.2, 1.1 and 1.0 over WebSocket.
//!
//! A destination `/topic/<room>` is a room. A session may have several subscriptions of a room; each gets a copy of every
//! message. So a MESSAGE is two fragments of one WebSocket message: a head with the name of the subscription, which each
//! member has its own of, and the rest, which all members share.
//!
//! Destinations, headers and what differs from brokers: `docs/stomp.md`. Source of the format: the specifications at
//! <https://stomp.github.io>.

mod encode;
mod frame;
mod read;

use crate::protocol::SubscribedTo;

pub use encode::sign_of_life;
pub(super) use encode::{event, head, message, refusal, reply};
pub use read::FrameReader;

use frame::Version;

/// The WebSocket subprotocols, the best first.
pub const SUBPROTOCOLS: &[&str] = &["v12.stomp", "v11.stomp", "v10.stomp"];

/// What the answer to a frame needs to know of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Asked {
    /// The value of its header `receipt`.
    receipt: Option<String>,
    what: What,
}

impl Asked {
    /// Whether it is a CONNECT after which an old version is spoken.
    pub(super) fn is_old(&self) -> bool {
        matches!(self.what, What::Connect { version, .. } if version < Version::V1_2)
    }

    /// Whether it was counted against the rate of commands before.
    pub(crate) fn is_paid(&self) -> bool {
        self.what == What::Committed
    }
}

/// The frame that is answered.
#[derive(Debug, PartialEq, Eq)]
enum What {
    Connect {
        version: Version,
    },
    Subscribe {
        id: Box<str>,
        /// Whether the client asked to resume.
        resumes: bool,
    },
    /// A frame of a transaction: only its refusal is told.
    Committed,
    Other,
}

/// Beginning of a destination.
const TOPIC: &str = "/topic/";

/// The end of a destination for events.
fn suffix(of: SubscribedTo) -> &'static str {
    match of {
        SubscribedTo::Messages => "",
        SubscribedTo::Typing => ".typing",
        SubscribedTo::Presence => ".presence",
    }
}

#[cfg(test)]
mod tests;
