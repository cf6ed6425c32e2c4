//! What a back end does to the sessions of a user.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{JoinReply, Validity};
use crate::model::RoomId;

/// An order to all sessions of a user, as it is sent to all edges.
///
/// It is a single event: sessions that begin later are not concerned.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Order {
    /// The user.
    pub user: Arc<str>,
    /// What the sessions do.
    pub what: OrderKind,
}

/// What an order is.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OrderKind {
    /// The session ends.
    Disconnect {
        /// The close code that clients of Centrifugo get. Others have one of their own.
        code: u16,
        /// The reason that clients of Centrifugo get.
        reason: String,
    },
    /// The session leaves a room.
    Leave {
        /// The room.
        room: RoomId,
    },
    /// The session joins a room, whatever its token says of the room. Only clients of Centrifugo can be told so; others
    /// ignore it.
    Join {
        /// The room.
        room: RoomId,
        /// How long it stays there, in seconds since 1970.
        until: u64,
        /// What the client is told with it: JSON text.
        data: Option<Box<RawValue>>,
    },
    /// The token of the session gets another end.
    Extend {
        /// The end, in seconds since 1970.
        exp: u64,
    },
    /// The token of the session is over.
    Expire,
}

impl Order {
    /// The room that it is about, if it is about one.
    #[must_use]
    pub fn room(&self) -> Option<&RoomId> {
        match &self.what {
            OrderKind::Leave { room } | OrderKind::Join { room, .. } => Some(room),
            OrderKind::Disconnect { .. } | OrderKind::Extend { .. } | OrderKind::Expire => None,
        }
    }
}

impl OrderKind {
    /// The code and reason of a disconnect for which nobody has said another one: clients of Centrifugo do not come back.
    pub const DISCONNECT: (u16, &str) = (3503, "force disconnect");

    /// A disconnect for which nobody has said anything.
    #[must_use]
    pub fn disconnect() -> Self {
        let (code, reason) = Self::DISCONNECT;
        Self::Disconnect {
            code,
            reason: reason.to_owned(),
        }
    }
}

/// What a client is told when its session has obeyed.
#[derive(Debug)]
pub enum Obeyed<'a> {
    /// The session is closed with this code and reason.
    Disconnected(u16, &'a str),
    /// The session has joined a room. `data` of the order goes with it.
    Joined(&'a JoinReply, Option<&'a RawValue>),
    /// The token is valid for this long.
    Extended(Validity),
}
