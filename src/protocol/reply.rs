//! The replies to commands. The fields of these types are the fields of a reply over HTTP and in `natter.v1`.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::{AlertBody, ErrorCode, InboxReply, Refused, WatchReply};
use crate::model::{Cursor, Region, RoomId};

/// The reply to a command that was carried out.
#[derive(Debug)]
pub enum Reply {
    /// The server is there.
    Pong,
    /// The command was carried out, and there is nothing else to say.
    Done,
    /// The session is authenticated.
    Authed(Box<AuthReply>),
    /// The token of the session, or of a join, was replaced. This long the new one is valid.
    Refreshed(Validity),
    /// The session is a member of the room. The backlog follows.
    Joined(JoinReply),
    /// The session is not a member of the room any more.
    Left {
        /// The room.
        room: RoomId,
    },
    /// A message was accepted.
    Published(PublishReply),
    /// A read marker was moved.
    Read(ReadReply),
    /// The users who are in a room.
    Presence(PresenceReply),
    /// The read markers of a room.
    Readers(ReadersReply),
    /// The numbers of unread messages.
    Unread(UnreadReply),
    /// A page of a room's history.
    History(HistoryReply),
    /// The messages that a search has found.
    Search(SearchReply),
    /// The record of a room.
    Room(Box<RecordReply>),
    /// The rooms of the user.
    Inbox(InboxReply),
    /// The rooms of the user, of which the session is told from now on.
    Watching(WatchReply),
}

impl Reply {
    /// The fields of the reply over HTTP and in `natter.v1`, as a JSON object.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let json = match self {
            Self::Pong | Self::Done => serde_json::to_vec(&serde_json::Map::new()),
            Self::Authed(authed) => serde_json::to_vec(authed),
            Self::Refreshed(validity) => serde_json::to_vec(validity),
            Self::Joined(joined) => serde_json::to_vec(joined),
            Self::Left { room } => serde_json::to_vec(&serde_json::json!({ "room": room })),
            Self::Published(published) => serde_json::to_vec(published),
            Self::Read(read) => serde_json::to_vec(read),
            Self::Presence(presence) => serde_json::to_vec(presence),
            Self::Readers(readers) => serde_json::to_vec(readers),
            Self::Unread(unread) => serde_json::to_vec(unread),
            Self::History(page) => serde_json::to_vec(page),
            Self::Search(found) => serde_json::to_vec(found),
            Self::Room(record) => serde_json::to_vec(record),
            Self::Inbox(inbox) => serde_json::to_vec(inbox),
            Self::Watching(watching) => serde_json::to_vec(watching),
        };
        json.expect("writing plain data to memory")
    }
}

/// The reply to a token.
#[derive(Debug, Serialize)]
pub struct AuthReply {
    /// The user.
    pub user: Arc<str>,
    /// How long the token is valid.
    #[serde(flatten)]
    pub validity: Validity,
    /// A name of the session that no other has.
    #[serde(skip)]
    pub session: String,
    /// Where the client sends further commands, if the session is the stream of an HTTP response.
    #[serde(skip)]
    pub stream: Option<StreamAddress>,
    /// The rooms that the token has subscribed the session to, and for each whether the client asked to resume.
    #[serde(skip)]
    pub joined: Vec<(JoinReply, bool)>,
}

/// The answer to a poll.
#[derive(Debug, Serialize, ToSchema)]
pub struct PollReply {
    /// The room.
    #[schema(value_type = String)]
    pub room: RoomId,
    /// The messages after the cursor of the request, the oldest first, as `msg` pushes.
    #[schema(value_type = Vec<Object>)]
    pub messages: Vec<Box<RawValue>>,
    /// The cursor for the next poll.
    pub cursor: Option<String>,
    /// Set if the messages after the cursor of the request can't be had: load history.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub reset: bool,
    /// Why, if `reset` is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
}

impl PollReply {
    /// An answer with these messages, which are JSON.
    ///
    /// # Errors
    /// A message is not JSON, which is a bug.
    pub fn new(
        room: RoomId,
        messages: impl Iterator<Item = Bytes>,
        cursor: Option<String>,
        reason: Option<&'static str>,
    ) -> Result<Self, Refused> {
        let messages = messages.map(|message| serde_json::from_slice(&message));
        let messages: Result<_, _> = messages.collect();
        Ok(Self {
            room,
            messages: messages
                .map_err(|error| Refused::new(ErrorCode::Internal, error.to_string()))?,
            cursor,
            reset: reason.is_some(),
            reason,
        })
    }
}

/// Where the commands of a session are sent whose frames go into an HTTP response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamAddress {
    /// The edge.
    pub node: Arc<str>,
    /// The secret name of the session there.
    pub session: Arc<str>,
}

/// How long a token is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Validity {
    /// When it expires, in seconds since 1970.
    pub exp: u64,
    /// How long that is from now, in seconds; `None` if it does not expire.
    #[serde(skip)]
    pub ttl: Option<u64>,
}

/// The reply to a join.
#[derive(Debug, Serialize)]
pub struct JoinReply {
    /// The room.
    pub room: RoomId,
    /// Where the session stands before the messages that follow; absent in ephemeral rooms.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "text")]
    pub cursor: Option<Cursor>,
    /// The room's head; absent in ephemeral rooms.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "text")]
    pub head: Option<Cursor>,
    /// The number of missed messages that follow.
    pub replay: u64,
    /// Whether the session can't resume at its cursor.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub reset: bool,
    /// Why it can't.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// The user's read marker.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "text")]
    pub marker: Option<Cursor>,
    /// The region of the edge: the origin of what is published here.
    #[serde(skip)]
    pub own: Region,
    /// How long the token is valid that the join came with, if it came with one.
    #[serde(skip)]
    pub validity: Option<Validity>,
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
    /// When it was stored (in an ephemeral room: sent), in ms since 1970. 0 if it is stored, but the time is unknown.
    pub ts: u64,
    /// Whether it was already stored before.
    pub dup: bool,
}

/// The user's read marker after the request.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReadReply {
    /// The marker. It may be further than requested, since markers only grow. A cursor beyond the newest message of
    /// this region counts only up to that message.
    #[serde(serialize_with = "one_text")]
    #[schema(value_type = String)]
    pub cursor: Cursor,
}

/// The users who are in a room.
#[derive(Debug, Serialize, ToSchema)]
pub struct PresenceReply {
    /// The room.
    #[schema(value_type = String, example = "chat:lobby")]
    pub room: RoomId,
    /// The number of users in the room.
    pub count: usize,
    /// A part of these users, ordered by name. Empty if the namespace shows only counts.
    pub users: Vec<PresentUser>,
    /// The value of `after` for the next page, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub next: Option<Arc<str>>,
}

/// A user who is in the room.
#[derive(Debug, Serialize, ToSchema)]
pub struct PresentUser {
    /// The user.
    #[schema(value_type = String)]
    pub user: Arc<str>,
    /// The `info` claim of the user's token.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub info: Option<Arc<RawValue>>,
    /// Since when, in ms since 1970.
    pub since: u64,
    /// `unreachable` if the user's region is cut off. The user was present when the region was last heard of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<&'static str>,
}

/// The read markers of a room.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReadersReply {
    /// The room.
    #[schema(value_type = String, example = "chat:lobby")]
    pub room: RoomId,
    /// Ordered by the bytes of the users' names.
    pub readers: Vec<ReaderBody>,
    /// The last user of this page, if there are more. Use it as `after` for the next page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// A user's read marker.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReaderBody {
    /// The user.
    pub user: String,
    /// The cursor up to which the user has read.
    #[serde(serialize_with = "one_text")]
    #[schema(value_type = String)]
    pub cursor: Cursor,
    /// When the marker reached this cursor, in ms since 1970.
    pub at: u64,
}

/// The numbers of unread messages.
#[derive(Debug, Serialize, ToSchema)]
pub struct UnreadReply {
    /// In the order of the request.
    pub rooms: Vec<UnreadBody>,
}

/// The number of unread messages in a room.
#[derive(Debug, Serialize, ToSchema)]
pub struct UnreadBody {
    /// The room.
    #[schema(value_type = String, example = "chat:lobby")]
    pub room: RoomId,
    /// Messages after the user's read marker that the stream still holds; at most `limits.unread_cap`.
    pub count: u64,
    /// Whether there are more than `count`.
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
    /// The oldest first, unless another order was requested over HTTP.
    #[schema(value_type = Vec<MessageBody>)]
    pub messages: Vec<Box<RawValue>>,
    /// The value of `before` to get the messages before this page, if there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prev: Option<String>,
    /// The value of `after` to get the messages after this page, if there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// MongoDB, or the service that writes to it, is unavailable or behind: messages may be missing or out of date.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schema(required = false)]
    pub partial: bool,
    /// The room's head, if the session is in the room; only for client protocols.
    #[serde(skip)]
    pub head: Option<Cursor>,
    /// The region of the edge; only for client protocols.
    #[serde(skip)]
    pub own: Option<Region>,
}

impl HistoryReply {
    /// A page without messages.
    #[must_use]
    pub fn empty(room: RoomId) -> Self {
        Self {
            room,
            messages: Vec::new(),
            prev: None,
            next: None,
            partial: false,
            head: None,
            own: None,
        }
    }
}

/// A message in its current state.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "documents what `history` writes")]
pub struct MessageBody {
    /// The room; only in search results.
    room: Option<String>,
    /// The id that the sender gave it.
    id: String,
    /// The sender.
    from: String,
    /// When it was stored, in ms since 1970.
    ts: u64,
    /// The message's cursor.
    cursor: String,
    /// `system` for an entry about the room, which natter itself has made.
    kind: Option<String>,
    /// Any JSON, as it was sent or last edited; absent if the message was deleted.
    body: Option<serde_json::Value>,
    /// The message that it answers.
    reply_to: Option<String>,
    /// The users that it mentions.
    mentions: Option<Vec<String>>,
    /// When it was last edited, in ms since 1970.
    edited_at: Option<u64>,
    /// When it was deleted, in ms since 1970.
    deleted_at: Option<u64>,
    /// For each reaction: how many users have it, and the first 100 of them.
    #[schema(value_type = Option<Object>, example = json!({"👍": {"count": 1, "users": ["kim"]}}))]
    reactions: Option<serde_json::Value>,
    /// The results of workers, by name.
    #[schema(value_type = Option<Object>, example = json!({"translation": {"en": "hello"}}))]
    annotations: Option<serde_json::Value>,
    /// Whether it has more reactions or annotations than are kept or shown.
    truncated: Option<bool>,
    /// Its answers, if it has any; not in search results.
    replies: Option<RepliesBody>,
}

/// The answers to a message: the messages with its reference as `reply_to`.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "documents what `history` writes")]
pub struct RepliesBody {
    /// Their number, without deleted ones; at most 1,000.
    count: usize,
    /// Whether there are more than `count`.
    capped: Option<bool>,
    /// The newest one that was not deleted.
    last: Option<LastReplyBody>,
}

/// The newest answer to a message.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "documents what `history` writes")]
pub struct LastReplyBody {
    /// The id that the sender gave it.
    id: String,
    /// The sender.
    from: String,
    /// When it was stored, in ms since 1970.
    ts: u64,
}

/// A room's record.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct RecordReply {
    /// The room.
    #[schema(value_type = String)]
    pub room: RoomId,
    /// Whether this request made the room; only in the answer to one that makes rooms.
    #[serde(rename = "created", skip_serializing_if = "Option::is_none")]
    pub made: Option<bool>,
    /// `dm`, `group` or `open`.
    pub kind: &'static str,
    /// What the room is about in the application.
    #[serde(rename = "ref", skip_serializing_if = "Option::is_none")]
    pub about: Option<String>,
    /// What people call it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// What the application keeps with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub info: Option<serde_json::Map<String, serde_json::Value>>,
    /// When it was made, in ms since 1970.
    pub at: u64,
    /// Who made it.
    pub by: String,
    /// Whether it is put aside.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub archived: bool,
    /// Whether only moderators and owners write.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub frozen: bool,
    /// Whether it has ended.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub closed: bool,
    /// Seconds between two messages of a member; absent: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slow_mode_s: Option<u32>,
    /// Who of the staff looks after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub assignee: Option<String>,
    /// What a worker has noticed, until somebody has seen to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alert: Option<AlertBody>,
    /// Its members, by name; for moderators also who is banned.
    pub members: Vec<MemberBody>,
    /// The pinned messages, `<user>/<id>`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pins: Vec<String>,
    /// Names this state of the record, for `If-Match`.
    pub version: String,
}

/// A member of a room.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct MemberBody {
    /// The user.
    pub user: String,
    /// `owner`, `moderator`, `member` or `reader`.
    pub role: &'static str,
    /// `in` or `banned`.
    pub state: &'static str,
    /// Until when the user may not write, in ms since 1970; absent: the user may.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub muted_until: Option<u64>,
}

/// The messages that were found, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub struct SearchReply {
    /// The messages, each with its room.
    #[schema(value_type = Vec<MessageBody>)]
    pub messages: Vec<Box<RawValue>>,
    /// The value of `before` to continue, if there may be more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

fn one_text<S: Serializer>(cursor: &Cursor, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(cursor)
}

#[expect(clippy::ref_option, reason = "what serde calls it with")]
pub(super) fn text<S: Serializer>(
    cursor: &Option<Cursor>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match cursor {
        Some(cursor) => serializer.collect_str(cursor),
        None => serializer.serialize_none(),
    }
}
