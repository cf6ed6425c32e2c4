//! Room records: what a room is, who belongs to it, and its settings.
//!
//! A region writes its record of a room to its own bucket, and mirrors those of the others. What a reader sees is the
//! merge of all of them. Each field, and each member, is a register of its own in which the later write wins
//! ([`Stamp`]), so merging is commutative, associative and idempotent, and it does not matter which region hears of
//! what first.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

pub use crate::protocol::{MemberState, Role};
use crate::{
    bus::Entry,
    model::{Region, RoomId},
    protocol::{AlertBody, MemberBody, RecordReply},
};

/// When and where something was last written. The later one wins; of two of the same millisecond, the one of the region
/// that is later in the alphabet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Stamp {
    /// In ms since 1970.
    pub at: u64,
    /// The region.
    pub origin: Region,
}

/// A value with its [`Stamp`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Field<T> {
    /// The value.
    pub value: T,
    /// When and where it was written.
    #[serde(flatten)]
    pub stamp: Stamp,
}

/// What sort of room it is.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum RoomKind {
    /// A conversation of the members it was made for. Nobody is added later.
    Dm,
    /// A list of members that changes.
    Group,
    /// No list of members: grants say who is in it. Members are named only to mute or ban them, or to give them a role.
    Open,
}

/// A user in a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// What the user may do.
    pub role: Role,
    /// Whether the user is in the room.
    pub state: MemberState,
    /// Whether the user is out by their own will, and so may come back to a direct room.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub left: bool,
    /// Until when the user may not write, in ms since 1970; 0: the user may.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub muted_until: u64,
    /// When and where it was written.
    #[serde(flatten)]
    pub stamp: Stamp,
}

/// Who made the room. The first one counts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Made {
    /// In ms since 1970.
    pub created: u64,
    /// The user.
    pub by: String,
}

/// What a worker has noticed in a room.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alert {
    /// The worker.
    pub worker: String,
    /// The message, `<user>/<id>`.
    pub message: String,
}

/// A room record, of one region or merged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What sort of room it is. The name of a room is made from it, so it never changes.
    pub kind: RoomKind,
    /// What the room is about in the application, for example `item/4711`. It never changes either.
    #[serde(rename = "ref", default, skip_serializing_if = "Option::is_none")]
    pub about: Option<String>,
    /// Who made it.
    #[serde(flatten)]
    pub made: Made,
    /// What people call it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<Field<String>>,
    /// Whatever the application keeps with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub info: Option<Field<Map<String, Value>>>,
    /// Whether it is put aside. It works as before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archived: Option<Field<bool>>,
    /// Whether only moderators and owners may write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<Field<bool>>,
    /// How many seconds a member waits between two messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slow_mode_s: Option<Field<u32>>,
    /// The one of the staff who looks after it; empty: nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignee: Option<Field<String>>,
    /// What a worker has noticed; no value: somebody has seen to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alert: Option<Field<Option<Alert>>>,
    /// Whether it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<Field<bool>>,
    /// Those who are in it, who were, and who can't be.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub members: BTreeMap<String, Member>,
    /// The messages that are pinned, `<user>/<id>`, in the order in which they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pins: Option<Field<Vec<String>>>,
}

impl RoomKind {
    /// The kind of that name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let all = [Self::Dm, Self::Group, Self::Open];
        all.into_iter().find(|kind| kind.as_str() == name)
    }

    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dm => "dm",
            Self::Group => "group",
            Self::Open => "open",
        }
    }
}

/// Whether a field is there, and on.
pub(super) fn is_on(field: Option<&Field<bool>>) -> bool {
    field.is_some_and(|field| field.value)
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Whether `new` takes the place of `old`. Two writes with the same stamp can only come from a bucket that was rolled
/// back; then the text of the values decides, so that all regions still end equal.
fn wins<T: Serialize + PartialEq>(old: (&Stamp, &T), new: (&Stamp, &T)) -> bool {
    let text = |value: &T| serde_json::to_string(value).unwrap_or_default();
    match new.0.cmp(old.0) {
        std::cmp::Ordering::Less => false,
        std::cmp::Ordering::Greater => true,
        std::cmp::Ordering::Equal => new.1 != old.1 && text(new.1) > text(old.1),
    }
}

/// Something that is merged with what another region has of it.
pub(super) trait Merge {
    /// Takes over what is later in `other`.
    fn merge_from(&mut self, other: &Self);
}

/// The values of the entries by key, those of all regions merged.
pub(super) fn merged<'e, T: Merge + DeserializeOwned>(
    entries: impl IntoIterator<Item = &'e Entry>,
) -> BTreeMap<&'e str, T> {
    let mut all: BTreeMap<&str, T> = BTreeMap::new();
    for entry in entries {
        let Some(value) = &entry.value else { continue };
        match serde_json::from_slice::<T>(value) {
            Ok(one) => match all.get_mut(&*entry.key) {
                Some(known) => known.merge_from(&one),
                None => drop(all.insert(&entry.key, one)),
            },
            Err(error) => {
                tracing::warn!(key = entry.key, %error, "a key is not understood");
            }
        }
    }
    all
}

impl<T: Clone + Serialize + PartialEq> Merge for Field<T> {
    fn merge_from(&mut self, other: &Self) {
        if wins((&self.stamp, &self.value), (&other.stamp, &other.value)) {
            *self = other.clone();
        }
    }
}

impl Merge for Member {
    fn merge_from(&mut self, other: &Self) {
        if wins((&self.stamp, &*self), (&other.stamp, other)) {
            *self = other.clone();
        }
    }
}

impl<T: Merge + Clone> Merge for Option<T> {
    fn merge_from(&mut self, other: &Self) {
        match (self, other) {
            (Some(own), Some(other)) => own.merge_from(other),
            (own @ None, Some(other)) => *own = Some(other.clone()),
            (_, None) => {}
        }
    }
}

impl<T: Merge + Clone> Merge for BTreeMap<String, T> {
    fn merge_from(&mut self, other: &Self) {
        for (key, other) in other {
            match self.get_mut(key) {
                Some(own) => own.merge_from(other),
                None => drop(self.insert(key.clone(), other.clone())),
            }
        }
    }
}

impl Merge for Record {
    fn merge_from(&mut self, other: &Self) {
        // Of two regions that made the same room, the first one counts.
        self.kind = self.kind.min(other.kind);
        self.about = self.about.take().min(other.about.clone());
        if other.made < self.made {
            self.made = other.made.clone();
        }
        self.title.merge_from(&other.title);
        self.info.merge_from(&other.info);
        self.archived.merge_from(&other.archived);
        self.frozen.merge_from(&other.frozen);
        self.slow_mode_s.merge_from(&other.slow_mode_s);
        self.assignee.merge_from(&other.assignee);
        self.alert.merge_from(&other.alert);
        self.closed.merge_from(&other.closed);
        self.members.merge_from(&other.members);
        self.pins.merge_from(&other.pins);
    }
}

impl Record {
    /// A room without members and settings.
    #[must_use]
    pub fn new(kind: RoomKind, about: Option<String>, made: Made) -> Self {
        Self {
            kind,
            about,
            made,
            title: None,
            info: None,
            archived: None,
            frozen: None,
            slow_mode_s: None,
            assignee: None,
            alert: None,
            closed: None,
            members: BTreeMap::new(),
            pins: None,
        }
    }

    /// The text of the record in a bucket.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// This record, merged with the one that has this text, if it is one.
    #[must_use]
    pub fn merged_with(mut self, text: &str) -> Self {
        if let Ok(other) = serde_json::from_str(text) {
            self.merge_from(&other);
        }
        self
    }

    /// Whether it is put aside.
    #[must_use]
    pub fn is_archived(&self) -> bool {
        is_on(self.archived.as_ref())
    }

    /// Names this state of the record: different after each change, and the same in every region that has it.
    #[must_use]
    pub fn version(&self) -> String {
        let digest = Sha256::digest(self.to_json());
        digest
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// The user's entry, if there is one.
    #[must_use]
    pub fn member(&self, user: &str) -> Option<&Member> {
        self.members.get(user)
    }

    /// Those who are in the room, by name.
    pub fn present(&self) -> impl Iterator<Item = (&str, &Member)> {
        let all = self.members.iter();
        let present = all.filter(|(_, member)| member.state == MemberState::In);
        present.map(|(user, member)| (user.as_str(), member))
    }

    /// Whether the room has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        is_on(self.closed.as_ref())
    }

    /// What people call it.
    #[must_use]
    pub fn title(&self) -> Option<String> {
        self.title.as_ref().map(|title| title.value.clone())
    }

    /// What the application keeps with it.
    #[must_use]
    pub fn info(&self) -> Option<Map<String, Value>> {
        self.info.as_ref().map(|info| info.value.clone())
    }

    /// Who of the staff looks after it.
    #[must_use]
    pub fn assignee(&self) -> Option<String> {
        let assignee = self.assignee.as_ref().map(|assignee| &assignee.value);
        assignee.filter(|name| !name.is_empty()).cloned()
    }

    /// What a worker has noticed, until somebody has seen to it.
    #[must_use]
    pub fn alert(&self) -> Option<AlertBody> {
        let field = self.alert.as_ref()?;
        let alert = field.value.as_ref()?;
        Some(AlertBody {
            worker: alert.worker.clone(),
            message: alert.message.clone(),
            at: field.stamp.at,
        })
    }

    /// Whether only moderators and owners may write.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        is_on(self.frozen.as_ref())
    }

    /// The messages that are pinned.
    #[must_use]
    pub fn pins(&self) -> &[String] {
        self.pins.as_ref().map_or(&[], |pins| &pins.value)
    }

    /// Seconds between two messages of a member; 0: no limit.
    #[must_use]
    pub fn slow_mode_s(&self) -> u32 {
        self.slow_mode_s.as_ref().map_or(0, |its| its.value)
    }

    /// The record as clients see it; with those who are banned if `all`.
    #[must_use]
    pub fn reply(&self, room: &RoomId, all: bool) -> RecordReply {
        let is_shown = |member: &Member| match member.state {
            MemberState::In => true,
            MemberState::Banned => all,
            MemberState::Out => false,
        };
        let members = self.members.iter().filter(|(_, member)| is_shown(member));
        let members = members.map(|(user, member)| MemberBody {
            user: user.clone(),
            role: member.role.as_str(),
            state: member.state.as_str(),
            muted_until: (member.muted_until > 0).then_some(member.muted_until),
        });
        RecordReply {
            room: room.clone(),
            made: None,
            kind: self.kind.as_str(),
            about: self.about.clone(),
            title: self.title(),
            info: self.info(),
            at: self.made.created,
            by: self.made.by.clone(),
            archived: self.is_archived(),
            frozen: self.is_frozen(),
            closed: self.is_closed(),
            slow_mode_s: Some(self.slow_mode_s()).filter(|seconds| *seconds > 0),
            assignee: self.assignee(),
            alert: self.alert(),
            members: members.collect(),
            pins: self.pins().to_vec(),
            version: self.version(),
        }
    }

    /// The latest stamp in it. A change gets a later one.
    #[must_use]
    pub fn newest(&self) -> u64 {
        let fields = [
            self.title.as_ref().map(|it| it.stamp.at),
            self.info.as_ref().map(|it| it.stamp.at),
            self.archived.as_ref().map(|it| it.stamp.at),
            self.frozen.as_ref().map(|it| it.stamp.at),
            self.slow_mode_s.as_ref().map(|it| it.stamp.at),
            self.assignee.as_ref().map(|it| it.stamp.at),
            self.alert.as_ref().map(|it| it.stamp.at),
            self.closed.as_ref().map(|it| it.stamp.at),
            self.pins.as_ref().map(|it| it.stamp.at),
            Some(self.made.created),
        ];
        let members = self.members.values().map(|member| member.stamp.at);
        let all = fields.into_iter().flatten().chain(members);
        all.max().unwrap_or_default()
    }
}
