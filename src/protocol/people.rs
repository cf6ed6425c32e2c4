//! What is changed about rooms and the people in them, as clients say it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// What a member may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads.
    Reader,
    /// Reads and writes.
    Member,
    /// Also mutes, bans and removes members, adds some, freezes the room, and deletes messages of others.
    Moderator,
    /// Also gives roles, and changes title and info.
    Owner,
}

/// Whether a user is in a room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum MemberState {
    /// Left, or was removed. The entry stays, so that an older one of another region does not bring the user back.
    Out,
    /// A member.
    In,
    /// Not a member, and can't become one.
    Banned,
}

/// New settings. What is absent stays.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, ToSchema)]
pub struct Settings {
    /// What people call it.
    pub title: Option<String>,
    /// Whatever the application keeps with it.
    #[schema(value_type = Option<Object>)]
    pub info: Option<Map<String, Value>>,
    /// Whether it is put aside.
    pub archived: Option<bool>,
    /// Whether only moderators write.
    pub frozen: Option<bool>,
    /// Seconds between two messages of a member, at most 86400; 0: no limit.
    pub slow_mode_s: Option<u32>,
    /// Who of the staff looks after it; empty: nobody.
    pub assignee: Option<String>,
    /// `false`: somebody has seen to the alert of a worker.
    pub alert: Option<bool>,
}

/// What of a member changes. What is absent stays; a new member has the role `member`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, ToSchema)]
pub struct PutMember {
    /// What the user may do.
    pub role: Option<Role>,
    /// `in` or `banned`. Only as a command also `out`, and then nothing else: the user is removed.
    pub state: Option<MemberState>,
    /// Until when the user may not write, in ms since 1970; 0: the user may.
    pub muted_until: Option<u64>,
}

/// How a user wants to see a room. What is absent stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, ToSchema)]
pub struct Arrangement {
    /// Without notifications.
    pub muted: Option<bool>,
    /// First in the list.
    pub pinned: Option<bool>,
    /// Put aside.
    pub archived: Option<bool>,
}

impl Role {
    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reader => "reader",
            Self::Member => "member",
            Self::Moderator => "moderator",
            Self::Owner => "owner",
        }
    }
}

impl MemberState {
    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
            Self::Banned => "banned",
        }
    }
}
