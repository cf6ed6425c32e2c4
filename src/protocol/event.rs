//! What clients are told without a request.

use std::sync::Arc;

use serde_json::value::RawValue;

use super::WatchPush;
use crate::model::{Cursor, Position, RoomId};

/// What clients are told besides messages.
#[derive(Debug, Clone)]
pub enum Event {
    /// A user is typing.
    Typing {
        /// The room.
        room: RoomId,
        /// The user.
        user: String,
    },
    /// A user has read further.
    Read {
        /// The room.
        room: RoomId,
        /// The user.
        user: String,
        /// The new read marker.
        cursor: Cursor,
    },
    /// The users of a room have changed.
    Presence {
        /// The room.
        room: RoomId,
        /// The change.
        change: PresenceChange,
    },
    /// The session is not a member of the room any more.
    Kicked {
        /// The room.
        room: RoomId,
        /// The reason.
        code: &'static str,
    },
    /// Something is new in rooms that the session watches.
    Inbox(WatchPush),
    /// The session's token is about to expire.
    TokenExpiring {
        /// When, in seconds since 1970.
        exp: u64,
    },
    /// The client should reconnect, to any edge.
    Reconnect {
        /// After this time, in ms.
        after_ms: u64,
    },
}

impl Event {
    /// The name of the event, in the protocols that name events.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Typing { .. } => "typing",
            Self::Read { .. } => "read",
            Self::Presence { .. } => "presence",
            Self::Kicked { .. } => "kicked",
            Self::Inbox(_) => "inbox",
            Self::TokenExpiring { .. } => "token_expiring",
            Self::Reconnect { .. } => "reconnect",
        }
    }
}

/// How the users of a room have changed.
#[derive(Debug, Clone)]
pub enum PresenceChange {
    /// The number of users now. The list that the client has is out of date.
    Count(usize),
    /// A change of one user.
    User {
        /// The user.
        user: Arc<str>,
        /// What has changed.
        state: PresenceState,
        /// The `info` claim of the user's token.
        info: Option<Arc<RawValue>>,
        /// When, in ms since 1970.
        at: u64,
    },
}

/// The change of a user in a room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PresenceState {
    /// The user joined.
    Join,
    /// The user left.
    Leave,
    /// The user's region is cut off. The user was present when the region was last heard of.
    Unreachable,
    /// The user's region is reachable again, and the user is still present.
    Reachable,
}

impl PresenceState {
    /// The state as it is sent to clients.
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

/// A message as it is sent to clients.
#[derive(Debug, Clone, Copy)]
pub struct MessagePush<'a> {
    /// The room.
    pub room: &'a RoomId,
    /// The id that the sender gave it.
    pub id: &'a str,
    /// The sender.
    pub from: &'a str,
    /// When it was stored (ephemeral: sent), in ms since 1970.
    pub ts: u64,
    /// The receiver's cursor after it; `None` in ephemeral rooms.
    pub cursor: Option<&'a Cursor>,
    /// If it was published in the region of the edge: the component of the cursor for that region.
    pub place: Option<&'a Position>,
    /// The body: valid JSON text.
    pub body: &'a [u8],
    /// Its kind; `None` for a plain message.
    pub kind: Option<&'static str>,
    /// The message that it refers to.
    pub target: Option<&'a str>,
    /// The message that it answers.
    pub reply_to: Option<&'a str>,
    /// The users that it mentions: a JSON array.
    pub mentions: Option<&'a str>,
}
