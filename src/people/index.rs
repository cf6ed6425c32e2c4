//! Which rooms a user is in, and how the user wants to see them: a key for each user and room in the bucket `inbox`.
//!
//! It is written after the room's record. What it says of the membership is a copy of the entry there, with its stamp.
//! So the history service, which compares the two and repairs the index, writes the same.

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

    /// Whether a record says something newer of the user, or something that is missing here.
    #[must_use]
    pub(super) fn is_behind(&self, member: &Member) -> bool {
        let mut merged = self.member.clone();
        merged.merge_from(&Some(member.clone()));
        merged != self.member
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::Region,
        people::record::{Role, Stamp},
    };

    #[test]
    fn an_entry_is_behind_a_later_word_of_the_record_and_no_other() {
        let member = |at: u64| Member {
            role: Role::Member,
            state: MemberState::In,
            left: false,
            muted_until: 0,
            stamp: Stamp {
                at,
                origin: Region::parse("here").unwrap(),
            },
        };
        let entry = Entry {
            member: Some(member(5)),
            ..Entry::default()
        };
        assert!(Entry::default().is_behind(&member(1)));
        assert!(entry.is_behind(&member(6)));
        assert!(!entry.is_behind(&member(5)));
        assert!(!entry.is_behind(&member(4)));
    }
}
