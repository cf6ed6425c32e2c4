//! What commands are answered with. The fields that a reply has over HTTP and in `natter.v1` are those of these types.

use std::sync::Arc;

use serde::{Serialize, Serializer};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use crate::model::{Cursor, RoomId};

/// The reply to a command that was carried out.
#[derive(Debug)]
pub enum Reply {
    /// A sign of life.
    Pong,
    /// It is done, and there is nothing to say about it.
    Done,
    /// The session has a user.
    Authed {
        /// Who.
        user: Arc<str>,
        /// When the token expires, in seconds since 1970.
        exp: u64,
    },
    /// The session has a new token.
    Refreshed {
        /// When the token expires, in seconds since 1970.
        exp: u64,
    },
    /// The session is a member. What it missed follows.
    Joined(JoinReply),
    /// The session is no member any more.
    Left {
        /// Of which room.
        room: RoomId,
    },
    /// A message was accepted.
    Published(PublishReply),
    /// A read marker was moved.
    Read(ReadReply),
    /// Who is in a room.
    Presence(PresenceReply),
    /// Who has read up to where.
    Readers(ReadersReply),
    /// How much is new.
    Unread(UnreadReply),
    /// What was said.
    History(HistoryReply),
}

/// The reply to a join.
#[derive(Debug, Serialize)]
pub struct JoinReply {
    /// The room.
    pub room: RoomId,
    /// Where the session stands before the messages that follow; absent in ephemeral rooms.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "text")]
    pub cursor: Option<Cursor>,
    /// The room's newest place; absent in ephemeral rooms.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "text")]
    pub head: Option<Cursor>,
    /// How many messages follow that the session missed.
    pub replay: u64,
    /// The session can't go on where it was.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub reset: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// The user's read marker.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "text")]
    pub marker: Option<Cursor>,
}

/// The answer to a publish.
#[derive(Debug, Serialize, ToSchema)]
pub struct PublishReply {
    /// The room.
    #[schema(value_type = String, example = "chat:lobby")]
    pub room: RoomId,
    /// The message's id.
    pub id: String,
    /// The room's cursor after the message; absent in ephemeral rooms.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "text")]
    #[schema(value_type = Option<String>)]
    pub cursor: Option<Cursor>,
    /// When it was stored (ephemeral: sent), in ms since 1970; 0: it is stored, and that can't be told.
    pub ts: u64,
    /// Whether it had been stored before.
    pub dup: bool,
}

/// The user's marker now.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReadReply {
    /// At least as far as was asked for: markers only grow.
    #[serde(serialize_with = "one_text")]
    #[schema(value_type = String)]
    pub cursor: Cursor,
}

/// Who is in a room.
#[derive(Debug, Serialize, ToSchema)]
pub struct PresenceReply {
    /// The room.
    #[schema(value_type = String, example = "chat:lobby")]
    pub room: RoomId,
    /// How many users are there.
    pub count: usize,
    /// Some of them, ordered by name; none where the namespace tells only counts.
    pub users: Vec<PresentUser>,
    /// What to give as `after` for the next page, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub next: Option<Arc<str>>,
}

/// A user who is there.
#[derive(Debug, Serialize, ToSchema)]
pub struct PresentUser {
    /// Who.
    #[schema(value_type = String)]
    pub user: Arc<str>,
    /// What the user's token says of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub info: Option<Arc<RawValue>>,
    /// Since when, in ms since 1970.
    pub since: u64,
    /// `unreachable`: their region is cut off, and they were there when it was last heard of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<&'static str>,
}

/// Who has read what.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReadersReply {
    /// The room.
    #[schema(value_type = String, example = "chat:lobby")]
    pub room: RoomId,
    /// Ordered by the bytes of the users' names.
    pub readers: Vec<ReaderBody>,
    /// The last user of this page, if there are more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// A user's read marker.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReaderBody {
    /// Who.
    pub user: String,
    /// Up to where.
    #[serde(serialize_with = "one_text")]
    #[schema(value_type = String)]
    pub cursor: Cursor,
    /// Since when, in ms since 1970.
    pub at: u64,
}

/// How much is new.
#[derive(Debug, Serialize, ToSchema)]
pub struct UnreadReply {
    /// In the order of the request.
    pub rooms: Vec<UnreadBody>,
}

/// How much is new in a room.
#[derive(Debug, Serialize, ToSchema)]
pub struct UnreadBody {
    /// The room.
    #[schema(value_type = String, example = "chat:lobby")]
    pub room: RoomId,
    /// Messages after the user's read marker, as far as the stream still holds them; at most `limits.unread_cap`.
    pub count: u64,
    /// There are more than `count`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schema(required = false)]
    pub capped: bool,
}

/// A page of a room's history.
#[derive(Debug, Serialize, ToSchema)]
pub struct HistoryReply {
    /// The room.
    #[schema(value_type = String, example = "chat:lobby")]
    pub room: RoomId,
    /// The oldest first, unless another order was asked for over HTTP.
    #[schema(value_type = Vec<MessageBody>)]
    pub messages: Vec<Box<RawValue>>,
    /// What to give as `before` for what was said before, if there is anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prev: Option<String>,
    /// What to give as `after` for what was said after, if there is anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// MongoDB or the service that writes to it is away or behind: something may be missing or out of date.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schema(required = false)]
    pub partial: bool,
}

/// A message as it is now.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "documents what `history` writes")]
pub struct MessageBody {
    /// Where it was said; only in what a search found.
    room: Option<String>,
    /// The sender's id.
    id: String,
    /// Who said it.
    from: String,
    /// When it was stored, in ms since 1970.
    ts: u64,
    /// Its place.
    cursor: String,
    /// Any JSON, as it was sent or last edited; absent if it was deleted.
    body: Option<serde_json::Value>,
    /// What it answers.
    reply_to: Option<String>,
    /// Mentioned users.
    mentions: Option<Vec<String>>,
    /// When it was last edited.
    edited_at: Option<u64>,
    /// When it was deleted.
    deleted_at: Option<u64>,
    /// By reaction: how many users have it, and the first 100 of them.
    #[schema(value_type = Option<Object>, example = json!({"👍": {"count": 1, "users": ["kim"]}}))]
    reactions: Option<serde_json::Value>,
    /// By name: what workers found out.
    #[schema(value_type = Option<Object>, example = json!({"translation": {"en": "hello"}}))]
    annotations: Option<serde_json::Value>,
    /// It has more reactions or annotations than are kept or shown.
    truncated: Option<bool>,
}

/// What was found, the newest first.
#[derive(Debug, Serialize, ToSchema)]
pub struct SearchReply {
    /// Each with its room.
    #[schema(value_type = Vec<MessageBody>)]
    pub messages: Vec<Box<RawValue>>,
    /// What to give as `before` to go on, if there may be more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

fn one_text<S: Serializer>(cursor: &Cursor, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(cursor)
}

#[expect(clippy::ref_option, reason = "what serde calls it with")]
fn text<S: Serializer>(cursor: &Option<Cursor>, serializer: S) -> Result<S::Ok, S::Error> {
    match cursor {
        Some(cursor) => serializer.collect_str(cursor),
        None => serializer.serialize_none(),
    }
}
