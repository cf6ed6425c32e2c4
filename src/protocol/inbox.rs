//! Summaries of rooms: what a list of conversations shows.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::reply::text;
use crate::model::{Cursor, RoomId};

/// A room in a list of conversations.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct RoomSummary {
    /// The room.
    #[schema(value_type = String)]
    pub room: RoomId,
    /// `dm`, `group` or `open`; absent if nobody has made the room.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    /// What it is about in the application.
    #[serde(rename = "ref", skip_serializing_if = "Option::is_none")]
    pub about: Option<String>,
    /// What people call it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// What the application keeps with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub info: Option<serde_json::Map<String, serde_json::Value>>,
    /// Other members, at most 10.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<String>,
    /// The cursor of the newest message.
    #[serde(serialize_with = "text", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub head: Option<Cursor>,
    /// The newest message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<LastMessage>,
    /// How many messages the user has not read. Absent in a watch of a pattern, where the user has no read marker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unread: Option<u64>,
    /// Whether there are more than that.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub capped: bool,
    /// How many of them mention the user. Absent if there are more than 200, and in a watch of a pattern.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mentions: Option<u64>,
    /// The user's read marker.
    #[serde(serialize_with = "text", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub marker: Option<Cursor>,
    /// Whether the user wants no notifications of it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub muted: bool,
    /// Whether the user wants to see it first.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub pinned: bool,
    /// Whether the user has put it aside.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub archived: bool,
    /// Who of the staff looks after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub assignee: Option<String>,
    /// What a worker has noticed, until somebody has seen to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alert: Option<AlertBody>,
}

/// What a worker has noticed in a room.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct AlertBody {
    /// The worker.
    pub worker: String,
    /// The message, `<user>/<id>`.
    pub message: String,
    /// When, in ms since 1970.
    pub at: u64,
}

/// The newest message of a room.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LastMessage {
    /// The id that the sender gave it.
    pub id: String,
    /// The sender.
    pub from: String,
    /// When it was stored, in ms since 1970.
    pub ts: u64,
    /// The beginning of its text, if it has one: the body, or its field `text`. At most 200 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

/// The rooms of a user.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct InboxReply {
    /// Pinned ones first, then by their newest message.
    pub rooms: Vec<RoomSummary>,
    /// The value of `after` for the next page, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// The reply to a watch: a page of its rooms.
#[derive(Debug, Clone, Serialize)]
pub struct WatchReply {
    /// The number of the watch.
    pub watch: u64,
    /// The page.
    #[serde(flatten)]
    pub inbox: InboxReply,
    /// Rooms that were asked for and are not watched.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<RefusedRoom>,
    /// Whether there may be rooms that no page shows.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub partial: bool,
}

impl WatchReply {
    /// A page that is the last one.
    #[must_use]
    pub fn new(watch: u64, rooms: Vec<RoomSummary>) -> Self {
        Self {
            watch,
            inbox: InboxReply { rooms, next: None },
            refused: Vec::new(),
            partial: false,
        }
    }
}

/// A room that is not watched.
#[derive(Debug, Clone, Serialize)]
pub struct RefusedRoom {
    /// The room.
    pub room: RoomId,
    /// The code of the refusal.
    pub code: &'static str,
    /// Why.
    pub message: String,
}

/// What is new in the rooms of a watch.
#[derive(Debug, Clone, Default, Serialize)]
pub struct WatchPush {
    /// The number of the watch.
    pub watch: u64,
    /// These rooms, as they are now.
    pub rooms: Vec<RoomSummary>,
    /// Rooms that are not among those of the watch any more.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gone: Vec<RoomId>,
    /// The number of further rooms in which something has happened.
    #[serde(skip_serializing_if = "is_zero")]
    pub more: usize,
    /// The code of the reason for which the watch has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<&'static str>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "what serde calls it with"
)]
fn is_zero(number: &usize) -> bool {
    *number == 0
}
