//! What a room record allows whom.

use super::record::{MemberState, Record, Role, RoomKind};
use crate::{
    auth::{Identity, Right},
    config::{Access, Config},
    model::RoomId,
    protocol::{ErrorCode, Refused},
};

/// Why a session may not be in a room any more: the `code` of `kicked`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// The user was removed, or has left.
    Removed,
    /// The user was banned.
    Banned,
    /// The room has ended.
    Closed,
}

impl Removal {
    /// The code on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Removed => "removed",
            Self::Banned => "banned",
            Self::Closed => "closed",
        }
    }
}

/// What the record of a room, or that it has none, means for one user.
#[derive(Debug, Clone, Copy)]
pub struct Standing<'r> {
    record: Option<&'r Record>,
    /// Whether only members are let in.
    members_only: bool,
    /// Whether one of the two users of a direct room has blocked the other.
    blocked: bool,
}

impl<'r> Standing<'r> {
    /// The standing in a room with this record.
    #[must_use]
    pub fn new(config: &Config, room: &RoomId, record: Option<&'r Record>, blocked: bool) -> Self {
        let namespace = config.namespaces.get(room.namespace());
        let members_only = namespace.is_some_and(|its| its.access == Access::Members);
        Self {
            blocked,
            ..Self::of(record, members_only)
        }
    }

    /// The standing in a room where nobody has blocked anybody.
    pub(super) fn of(record: Option<&'r Record>, members_only: bool) -> Self {
        Self {
            record,
            members_only,
            blocked: false,
        }
    }

    /// The role of a user, whose token gives `manage` in the room or not.
    ///
    /// Who may manage counts as an owner everywhere. Where grants say who is in a room, everybody is a member.
    pub(super) fn role(&self, user: &str, manages: bool) -> Option<Role> {
        if manages {
            return Some(Role::Owner);
        }
        let member = self.record.and_then(|record| record.member(user));
        let given = member.filter(|member| member.state == MemberState::In);
        // In an open room of a namespace for members only, grants say who is in it.
        let open = !self.members_only
            || self
                .record
                .is_some_and(|record| record.kind == RoomKind::Open);
        match (given, member.map(|member| member.state)) {
            (Some(member), _) => Some(member.role),
            (None, Some(MemberState::Banned)) => None,
            // Nobody gets more by leaving.
            (None, _) if open => {
                Some(member.map_or(Role::Member, |its| its.role.min(Role::Member)))
            }
            (None, _) => None,
        }
    }

    /// Why a user may not be in the room at all.
    #[must_use]
    pub fn removal(&self, identity: &Identity, room: &RoomId) -> Option<Removal> {
        let manages = identity.may(Right::Manage, room);
        if self.record.is_some_and(Record::is_closed) {
            return Some(Removal::Closed);
        }
        if self.role(&identity.user, manages).is_some() {
            return None;
        }
        let member = self.record.and_then(|record| record.member(&identity.user));
        Some(match member.map(|member| member.state) {
            Some(MemberState::Banned) => Removal::Banned,
            _ => Removal::Removed,
        })
    }

    /// Whether a user who has the right `follow` may watch the room without being in it.
    #[must_use]
    pub fn may_be_followed(&self, identity: &Identity) -> bool {
        let member = self.record.and_then(|record| record.member(&identity.user));
        let is_banned = member.is_some_and(|member| member.state == MemberState::Banned);
        !is_banned && !self.record.is_some_and(Record::is_closed)
    }

    /// How long a user waits between two messages, in ms, if the room is in slow mode and the user is no moderator.
    #[must_use]
    pub fn slow_mode(&self, identity: &Identity, room: &RoomId) -> Option<u64> {
        let seconds = self.record.map_or(0, Record::slow_mode_s);
        (seconds > 0 && !self.leads(identity, room)).then(|| 1000 * u64::from(seconds))
    }

    /// Whether a user moderates the room.
    pub(super) fn leads(&self, identity: &Identity, room: &RoomId) -> bool {
        let role = self.role(&identity.user, identity.may(Right::Manage, room));
        role >= Some(Role::Moderator) || !self.members_only && identity.may(Right::Moderate, room)
    }

    /// Checks whether a user whose token grants `right` may use it. `now`: ms since 1970.
    ///
    /// # Errors
    /// `forbidden`, with the reason.
    pub fn check(
        &self,
        identity: &Identity,
        right: Right,
        room: &RoomId,
        now: u64,
    ) -> Result<(), Refused> {
        let no = |text: String| Err(Refused::new(ErrorCode::Forbidden, text));
        match self.removal(identity, room) {
            None => {}
            Some(Removal::Closed) => return no(format!("{room} was closed")),
            Some(Removal::Banned) => return no(format!("this user is banned from {room}")),
            Some(Removal::Removed) => return no(format!("this user is not a member of {room}")),
        }
        let manages = identity.may(Right::Manage, room);
        let role = self.role(&identity.user, manages);
        let (role, needed) = (role.unwrap_or(Role::Reader), role_for(right));
        // A role narrows what a token grants where members have roles. Elsewhere, the token alone says who moderates.
        if self.members_only && role < needed || role < Role::Member && needed == Role::Member {
            let text = format!(
                "{} in {room} needs the role {}",
                right.as_str(),
                needed.as_str()
            );
            return no(text);
        }
        if right != Right::Write {
            return Ok(());
        }
        if self.blocked {
            // It does not say who has blocked whom.
            return no(format!("this user can't write in {room}"));
        }
        let Some(record) = self.record else {
            return Ok(());
        };
        if record.is_frozen() && !self.leads(identity, room) {
            return no(format!("{room} is frozen: only its moderators write"));
        }
        match record.member(&identity.user) {
            Some(member) if member.muted_until > now => no(format!(
                "this user is muted in {room} until {} (ms since 1970)",
                member.muted_until
            )),
            _ => Ok(()),
        }
    }
}

/// The lowest role that may use a right.
fn role_for(right: Right) -> Role {
    match right {
        Right::Read | Right::Presence | Right::History => Role::Reader,
        Right::Write => Role::Member,
        Right::Moderate => Role::Moderator,
        Right::Erase => Role::Owner,
        // These are for those who look after rooms of others, and are not narrowed.
        Right::Manage | Right::Admin | Right::Follow => Role::Reader,
    }
}
