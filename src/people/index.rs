//! Which rooms a user is in, and how the user wants to see them: a key for each user and room in the bucket `inbox`.
//!
//! It is written after the room's record. What it says of the membership is a copy of the entry there, with its stamp,
//! so that whoever compares the two and repairs the index writes the same.

use serde::{Deserialize, Serialize};

use super::record::{Field, Member, MemberState, Merge};

/// A user's entry of a room.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Entry {
    /// The user's entry in the room's record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<Member>,
    /// Whether the user wants no notifications of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub muted: Option<Field<bool>>,
    /// Whether the user wants to see it first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned: Option<Field<bool>>,
    /// Whether the user has put it aside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archived: Option<Field<bool>>,
}

impl Entry {
    /// Whether the user is in the room.
    #[must_use]
    pub fn is_in(&self) -> bool {
        let state = self.member.as_ref().map(|member| member.state);
        state == Some(MemberState::In)
    }
}

impl Merge for Entry {
    fn merge_from(&mut self, other: &Self) {
        self.member.merge_from(&other.member);
        self.muted.merge_from(&other.muted);
        self.pinned.merge_from(&other.pinned);
        self.archived.merge_from(&other.archived);
    }
}
