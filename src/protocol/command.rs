//! What clients ask for.

use super::{ErrorCode, Publication, Refused};
use crate::model::RoomId;

/// What a command wants.
#[derive(Debug)]
pub enum Command {
    /// Hand over a token, as the first command.
    Auth {
        /// The JWT.
        token: String,
    },
    /// Become a member of a room.
    Join {
        /// Which.
        room: RoomId,
        /// The client's last cursor, not yet parsed.
        since: Option<String>,
        /// What else than messages is to be pushed.
        wants: Wants,
    },
    /// Stop being a member.
    Leave {
        /// Of which room.
        room: RoomId,
    },
    /// Publish a message.
    Send(Box<Publication>),
    /// Show that the user is typing.
    Typing {
        /// Where.
        room: RoomId,
    },
    /// Move the user's read marker.
    Read {
        /// Where.
        room: RoomId,
        /// Up to what, not yet parsed.
        cursor: String,
    },
    /// Ask who is in a room.
    Presence {
        /// Which.
        room: RoomId,
        /// Which part of the list.
        page: PageOf,
    },
    /// Ask who has read up to where.
    Readers {
        /// In which room.
        room: RoomId,
        /// Which part of the list.
        page: PageOf,
    },
    /// Ask how much is new.
    Unread {
        /// In which rooms, in the order of the answer.
        rooms: Vec<RoomId>,
    },
    /// Ask for a page of what was said.
    History {
        /// In which room.
        room: RoomId,
        /// Which part of it.
        page: HistoryOf,
    },
    /// Replace the session's token.
    Refresh {
        /// The new JWT.
        token: String,
    },
    /// Ask for a sign of life.
    Ping,
}

/// What a member wants to be told besides messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wants {
    /// Who comes and goes.
    pub presence: bool,
    /// Who has read up to where.
    pub read: bool,
}

/// A part of a list of users, which is ordered by the bytes of their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageOf {
    /// The user before the first one wanted.
    pub after: Option<String>,
    /// At most this many.
    pub limit: usize,
}

impl PageOf {
    /// Users on a page where the client does not say how many.
    pub const DEFAULT: usize = 100;
    /// Most users on one page.
    pub const MAX: usize = 1000;

    /// A page after `after` of `limit` users.
    ///
    /// # Errors
    /// `bad_request` when `limit` is not 1 to [`Self::MAX`].
    pub fn new(after: Option<String>, limit: Option<u64>) -> Result<Self, Refused> {
        let limit = limit_of(limit, Self::DEFAULT, Self::MAX)?;
        Ok(Self { after, limit })
    }
}

/// A part of a room's history. What anchors it is a cursor or a message reference, not yet parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryOf {
    /// Which part.
    pub anchor: Anchor,
    /// At most this many messages.
    pub limit: usize,
}

/// Which part of a room's history a page has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Anchor {
    /// The end.
    Newest,
    /// What is before a message, without it.
    Before(String),
    /// What is after a message, without it; empty: from the first message on.
    After(String),
    /// What is around a message, with it.
    Around(String),
}

impl HistoryOf {
    /// Messages on a page where the client does not say how many.
    pub const DEFAULT: usize = 50;
    /// Most messages on one page.
    pub const MAX: usize = 200;

    /// The page that is named by at most one of `before`, `after` and `around`.
    ///
    /// # Errors
    /// `bad_request` when more than one is given, or `limit` is not 1 to [`Self::MAX`].
    pub fn new(
        before: Option<String>,
        after: Option<String>,
        around: Option<String>,
        limit: Option<u64>,
    ) -> Result<Self, Refused> {
        let anchor = match (before, after, around) {
            (None, None, None) => Anchor::Newest,
            (Some(at), None, None) => Anchor::Before(at),
            (None, Some(at), None) => Anchor::After(at),
            (None, None, Some(at)) => Anchor::Around(at),
            _ => {
                let text = "only one of before, after and around";
                return Err(Refused::new(ErrorCode::BadRequest, text));
            }
        };
        let limit = limit_of(limit, Self::DEFAULT, Self::MAX)?;
        Ok(Self { anchor, limit })
    }
}

/// How many are wanted, 1 to `max`.
fn limit_of(wanted: Option<u64>, default: usize, max: usize) -> Result<usize, Refused> {
    match wanted.map_or(Some(default), |limit| usize::try_from(limit).ok()) {
        Some(limit) if (1..=max).contains(&limit) => Ok(limit),
        _ => Err(Refused::new(
            ErrorCode::BadRequest,
            format!("limit must be 1 to {max}"),
        )),
    }
}
