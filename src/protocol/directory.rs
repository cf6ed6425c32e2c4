//! The directory of rooms.

use serde::Serialize;
use utoipa::ToSchema;

use super::AlertBody;
use crate::model::RoomId;

/// A part of the rooms that were asked for, newest activity first.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct RoomsReply {
    /// The rooms. There may be fewer than the limit although there are more.
    pub rooms: Vec<RoomBody>,
    /// The value of `after` to continue, if there may be more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// A room in the directory.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct RoomBody {
    /// The room.
    #[schema(value_type = String)]
    pub room: RoomId,
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
    /// When somebody last spoke there, or else when it was made, in ms since 1970.
    pub active_at: u64,
    /// Whether it is put aside.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schema(required = false)]
    pub archived: bool,
    /// Whether only moderators and owners write.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schema(required = false)]
    pub frozen: bool,
    /// Who of the staff looks after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub assignee: Option<String>,
    /// What a worker has noticed, until somebody has seen to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alert: Option<AlertBody>,
    /// How many named members are in it.
    pub member_count: usize,
    /// The first 10 of them, by name.
    pub members: Vec<String>,
    /// Names this state of the record.
    pub version: String,
}
