//! The commands of clients.

use std::time::Duration;

use serde::Deserialize;
use utoipa::ToSchema;

use super::{Arrangement, ErrorCode, Publication, PutMember, Refused, Settings};
use crate::model::{Region, RoomId};

/// A command.
#[derive(Debug)]
pub enum Command {
    /// Present a token, as the first command.
    Auth {
        /// The JWT; `None` for a user without a name.
        token: Option<String>,
        /// A login that goes with the token, if the token is a password.
        login: Option<Box<str>>,
        /// How often both sides give a sign of life, if the client wants that.
        beats: Option<Box<Beats>>,
        /// Where the client stands in rooms that its token subscribes it to.
        since: Vec<(RoomId, Since)>,
    },
    /// Become a member of a room.
    Join {
        /// The room.
        room: RoomId,
        /// Where the client stands; `None` if it only wants what comes from now on.
        since: Option<Box<Since>>,
        /// What the member wants to be told besides messages.
        wants: Wants,
        /// A token for this room only.
        token: Option<Box<str>>,
        /// The subscription that the member gets messages or events under, in a protocol that has several for one room.
        subscription: Option<Box<RoomSubscription>>,
    },
    /// End one subscription of a room. With the last one, the session leaves the room.
    Unsubscribe {
        /// The room.
        room: RoomId,
        /// The name of the subscription.
        id: Box<str>,
    },
    /// Replace the token of a join.
    RefreshJoin {
        /// The room.
        room: RoomId,
        /// The new JWT.
        token: String,
    },
    /// Stop being a member.
    Leave {
        /// The room.
        room: RoomId,
    },
    /// Publish a message.
    Send(Box<Publication>),
    /// Check whether a message could be published.
    Check(Box<Publication>),
    /// Show that the user is typing.
    Typing {
        /// The room.
        room: RoomId,
    },
    /// Move the user's read marker.
    Read {
        /// The room.
        room: RoomId,
        /// The cursor up to which the user has read, not yet parsed.
        cursor: String,
    },
    /// Request the users who are in a room.
    Presence {
        /// The room.
        room: RoomId,
        /// The part of the list.
        page: PageOf,
    },
    /// Request the read markers of a room.
    Readers {
        /// The room.
        room: RoomId,
        /// The part of the list.
        page: PageOf,
    },
    /// Request the numbers of unread messages.
    Unread {
        /// The rooms, in the order of the answer.
        rooms: Vec<RoomId>,
    },
    /// Request a page of a room's history.
    History {
        /// The room.
        room: RoomId,
        /// The part of the history.
        page: HistoryOf,
    },
    /// Search messages.
    Search {
        /// The room; `None`: all rooms whose history the user may read.
        room: Option<RoomId>,
        /// What to search for.
        query: Box<SearchFor>,
    },
    /// Make a room, or find it.
    Create(Box<NewRoom>),
    /// Request the record of a room.
    Room {
        /// The room.
        room: RoomId,
    },
    /// Change the settings of a room.
    Settings {
        /// The room.
        room: RoomId,
        /// What changes.
        settings: Box<Settings>,
        /// Only if the record has this version.
        version: Option<String>,
    },
    /// Add, change or remove a member of a room, or leave it for good.
    Member {
        /// The room.
        room: RoomId,
        /// The user.
        user: String,
        /// What changes. With the state `out`, and nothing else, the user is removed.
        what: PutMember,
    },
    /// Mute, pin or archive a room for oneself.
    Arrange {
        /// The room.
        room: RoomId,
        /// What changes.
        how: Arrangement,
    },
    /// Block a user, or no longer.
    Block {
        /// The one who is blocked.
        user: String,
        /// Whether that begins, or ends.
        blocked: bool,
    },
    /// Request the user's rooms.
    Inbox {
        /// The `next` of the page before.
        after: Option<String>,
        /// At most this many rooms.
        limit: Option<u64>,
        /// Those that the user has put aside, instead of the others.
        archived: bool,
    },
    /// Be told what happens in rooms without joining them, or get a further page of a watch.
    Watch(Box<WatchOf>),
    /// No longer be told.
    Unwatch {
        /// The number of the watch.
        watch: u64,
    },
    /// Replace the session's token.
    Refresh {
        /// The new JWT.
        token: String,
    },
    /// End the session, after everything before it was carried out.
    End,
    /// Check that the server is there.
    Ping,
    /// The answer to a ping of the server, in a protocol whose pings are not those of WebSocket.
    Pong,
}

/// What to watch.
#[derive(Debug, Clone, PartialEq)]
pub struct WatchOf {
    /// The rooms.
    pub what: Watched,
    /// At most this many rooms in the reply.
    pub limit: Option<u64>,
}

/// The rooms of a watch.
#[derive(Debug, Clone, PartialEq)]
pub enum Watched {
    /// Those that the user is in.
    Mine,
    /// These.
    Rooms(Vec<RoomId>),
    /// Those that match.
    Pattern {
        /// `ns:*` or `*:*`, not yet parsed.
        pattern: String,
        /// Which of them, not yet parsed.
        filter: serde_json::Map<String, serde_json::Value>,
    },
    /// The next ones of a watch that exists.
    Page {
        /// Its number.
        watch: u64,
        /// The `next` of the page before.
        after: String,
    },
}

/// A room to make, as a client describes it.
#[derive(Debug, Clone, PartialEq, Deserialize, ToSchema)]
pub struct NewRoom {
    /// Its namespace.
    pub namespace: String,
    /// `dm`: a conversation of fixed members; `group`: a list of members that changes; `open`: grants say who is in it.
    pub kind: String,
    /// What it is about in the application, for example `item/4711`. Part of the name.
    #[serde(rename = "ref")]
    pub about: Option<String>,
    /// How the application knows a group or an open room. Whoever makes it again gets the same room.
    pub key: Option<String>,
    /// The name of a group or an open room, in place of one that is made from `ref` and `key`.
    pub name: Option<String>,
    /// Its members. Of a `dm` at most 10, with the one who makes it.
    #[serde(default)]
    pub members: Vec<String>,
    /// What people call it.
    pub title: Option<String>,
    /// Whatever the application keeps with it: at most 8 KiB.
    #[schema(value_type = Option<Object>)]
    pub info: Option<serde_json::Map<String, serde_json::Value>>,
}

/// Where a client stands in a room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Since {
    /// The place.
    pub at: ResumeAt,
    /// If set, the client has followed only the messages of this origin. It may have got later messages of other origins
    /// than the cursor says, so it can't resume if there are any.
    pub only: Option<Region>,
    /// Whether a join that can't resume is refused. If not, the session joins with what comes from now on.
    pub or_refuse: bool,
}

impl From<ResumeAt> for Since {
    fn from(at: ResumeAt) -> Self {
        Self {
            at,
            only: None,
            or_refuse: false,
        }
    }
}

/// A place in a room's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResumeAt {
    /// After the message with this cursor, which is not yet parsed.
    Cursor(String),
    /// Before the first message that there was.
    Beginning,
    /// Before a message that is not named by a cursor.
    Before(First),
}

/// The first message that a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First {
    /// The oldest one that there still is.
    Oldest,
    /// The last one that there is.
    Last,
    /// The first one of the own origin with this sequence or a higher one. Of other origins: those that were stored
    /// since then.
    Sequence(u64),
    /// The first one that was stored at this time or later, in ms since 1970.
    Time(u64),
}

/// How often each side gives a sign of life; `None`: it does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Beats {
    /// The server.
    pub server: Option<Duration>,
    /// The client.
    pub client: Option<Duration>,
}

/// One of several subscriptions of a session to a room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoomSubscription {
    /// Its name, which the client chose.
    pub id: Box<str>,
    /// What it gets.
    pub of: SubscribedTo,
}

/// What a subscription gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubscribedTo {
    /// The messages of the room.
    Messages,
    /// Who is typing.
    Typing,
    /// Who joins and leaves.
    Presence,
}

/// What a member wants to be told besides messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wants {
    /// Who is typing.
    pub typing: bool,
    /// Who joins and leaves.
    pub presence: bool,
    /// Who has read up to where.
    pub read: bool,
}

/// What to search for. A message must match everything that is given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SearchFor {
    /// Words, or parts of words.
    pub text: String,
    /// Only messages of this user.
    pub from: Option<String>,
    /// Only messages that mention this user.
    pub mentions: Option<String>,
    /// Only answers to this message: a reference, not yet parsed.
    pub reply_to: Option<String>,
    /// The `next` of the page before.
    pub before: Option<String>,
    /// At most this many messages.
    pub limit: Option<u64>,
}

/// A part of a list of users, which is ordered by the bytes of their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageOf {
    /// The list continues after this user.
    pub after: Option<String>,
    /// At most this many users.
    pub limit: usize,
}

impl PageOf {
    /// Users on a page if the client gives no limit.
    pub const DEFAULT: usize = 100;
    /// Most users on one page.
    pub const MAX: usize = 1000;

    /// A page of `limit` users after `after`.
    ///
    /// # Errors
    /// `bad_request` if `limit` is not 1 to [`Self::MAX`].
    pub fn new(after: Option<String>, limit: Option<u64>) -> Result<Self, Refused> {
        let limit = limit_of(limit, Self::DEFAULT, Self::MAX)?;
        Ok(Self { after, limit })
    }
}

/// A part of a room's history. Its anchor is a cursor or a message reference, not yet parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryOf {
    /// Which part.
    pub anchor: Anchor,
    /// At most this many messages. 0: the client only asks where the room stands.
    pub limit: usize,
    /// Only answers to this message: a reference, not yet parsed.
    pub thread: Option<String>,
}

/// Which part of a room's history a page contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Anchor {
    /// The end.
    Newest,
    /// The messages before this one, without it.
    Before(String),
    /// The messages after this one, without it. If empty, from the first message on.
    After(String),
    /// The messages around this one, with it.
    Around(String),
}

impl HistoryOf {
    /// Messages on a page if the client gives no limit.
    pub const DEFAULT: usize = 50;
    /// Most messages on one page.
    pub const MAX: usize = 200;

    /// The page of the room, or of a thread, that is given by at most one of `before`, `after` and `around`.
    ///
    /// # Errors
    /// `bad_request` if more than one is given, or `limit` is not 1 to [`Self::MAX`].
    pub fn new(
        before: Option<String>,
        after: Option<String>,
        around: Option<String>,
        limit: Option<u64>,
        thread: Option<String>,
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
        Ok(Self {
            anchor,
            limit,
            thread,
        })
    }
}

/// Checks a limit: 1 to `max`.
fn limit_of(wanted: Option<u64>, default: usize, max: usize) -> Result<usize, Refused> {
    match wanted.map_or(Some(default), |limit| usize::try_from(limit).ok()) {
        Some(limit) if (1..=max).contains(&limit) => Ok(limit),
        _ => Err(Refused::new(
            ErrorCode::BadRequest,
            format!("limit must be 1 to {max}"),
        )),
    }
}
