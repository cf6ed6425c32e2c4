//! What clients are told unasked.

use std::sync::Arc;

use serde_json::value::RawValue;

use crate::model::{Cursor, RoomId};

/// What clients are told besides messages.
#[derive(Debug, Clone)]
pub enum Event {
    /// A user is typing.
    Typing {
        /// Where.
        room: RoomId,
        /// Who.
        user: String,
    },
    /// A user has read further.
    Read {
        /// Where.
        room: RoomId,
        /// Who.
        user: String,
        /// Up to what.
        cursor: Cursor,
    },
    /// Who is in a room has changed.
    Presence {
        /// In which room.
        room: RoomId,
        /// How.
        change: PresenceChange,
    },
    /// The session is no member any more.
    Kicked {
        /// Of which room.
        room: RoomId,
        /// Why.
        code: &'static str,
    },
    /// The session's token is about to expire.
    TokenExpiring {
        /// When, in seconds since 1970.
        exp: u64,
    },
    /// The client is to connect again, to whatever edge answers.
    Reconnect {
        /// After how many ms.
        after_ms: u64,
    },
}

/// How the users of a room have changed.
#[derive(Debug, Clone)]
pub enum PresenceChange {
    /// There are this many now. The list that the client has is out of date.
    Count(usize),
    /// One of them.
    User {
        /// Who.
        user: Arc<str>,
        /// What became of them.
        state: PresenceState,
        /// What the user's token says of them.
        info: Option<Arc<RawValue>>,
        /// Since when, in ms since 1970.
        at: u64,
    },
}

/// What became of a user in a room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PresenceState {
    /// They came.
    Join,
    /// They left.
    Leave,
    /// They were there when their region was last heard of, and it is cut off.
    Unreachable,
    /// Their region can be reached again, and they are still there.
    Reachable,
}

impl PresenceState {
    /// The word that clients know.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Join => "join",
            Self::Leave => "leave",
            Self::Unreachable => "unreachable",
            Self::Reachable => "reachable",
        }
    }
}

/// A message as clients get it.
#[derive(Debug, Clone, Copy)]
pub struct MessagePush<'a> {
    /// Where it was said.
    pub room: &'a RoomId,
    /// The sender's id.
    pub id: &'a str,
    /// Who said it.
    pub from: &'a str,
    /// When it was stored (ephemeral: sent), in ms since 1970.
    pub ts: u64,
    /// Where the receiver stands after it; `None` in ephemeral rooms.
    pub cursor: Option<&'a Cursor>,
    /// The body: valid JSON text.
    pub body: &'a [u8],
    /// The word of its kind; `None` for a plain message.
    pub kind: Option<&'static str>,
    /// What it is about.
    pub target: Option<&'a str>,
    /// What it answers.
    pub reply_to: Option<&'a str>,
    /// Whom it mentions: a JSON array.
    pub mentions: Option<&'a str>,
}
