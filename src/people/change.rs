//! Changes of a record: who may make them, what they do to it, and what the room is told.

use serde_json::{Map, Value, json};

use super::{
    access::Standing,
    record::{Alert, Field, Made, Member, MemberState, Record, Role, RoomKind, Stamp},
};
use crate::{
    auth::{Identity, Right},
    model::{MAX_USER, Reference, Region, RoomId, json_flaw},
    protocol::{ErrorCode, PutMember, Refused, Settings},
};

/// Levels of the `info` of a room.
const MAX_INFO_LEVELS: usize = 32;

/// Most users of a direct room.
pub const DIRECT_MEMBERS: usize = 10;

/// Most members whom the entry about a new room names.
const MAX_TOLD_MEMBERS: usize = 100;

/// Most pinned messages of a room.
pub const MAX_PINS: usize = 50;

/// Longest title and `ref`, in characters.
const MAX_TEXT: usize = 256;

/// Most bytes of `info`, as JSON text.
const MAX_INFO: usize = 8 * 1024;

/// Longest slow mode, in seconds: a day.
const MAX_SLOW_MODE_S: u32 = 86_400;

/// A change of a room's record.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// Makes the room, or gives back to those who make it again what they had: the creator of a direct room comes back
    /// to it.
    Create(Create),
    /// Changes its settings.
    Set(Box<Settings>),
    /// Adds or changes a member.
    Put {
        /// The user.
        user: String,
        /// What of the entry changes.
        what: PutMember,
    },
    /// Removes a user, or leaves, if it is oneself.
    Remove {
        /// The user.
        user: String,
    },
    /// Ends the room.
    Close,
    /// Marks the room with what a worker has noticed. Only workers make it: nobody's rights are checked.
    Alert(Alert),
    /// Pins or unpins a message.
    Pin {
        /// The message, `<user>/<id>`.
        message: String,
        /// Whether it is pinned.
        on: bool,
        /// The entry of the room's log that says so, if it was written before the record.
        said: Option<Said>,
    },
}

/// An entry of a room's log that tells of a change before the change is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Said {
    /// When it was stored, in ms since 1970; 0 if that is unknown.
    pub ts: u64,
    /// Whether it was there before: the change was made then, unless the edge could not make it.
    pub again: bool,
}

impl Change {
    /// The users whose entries it changes.
    #[must_use]
    pub fn users(&self) -> &[String] {
        match self {
            Self::Create(create) => &create.members,
            Self::Put { user, .. } | Self::Remove { user } => std::slice::from_ref(user),
            Self::Set(_) | Self::Close | Self::Alert(_) | Self::Pin { .. } => &[],
        }
    }
}

/// A new room.
#[derive(Debug, Clone, PartialEq)]
pub struct Create {
    /// What sort of room it is.
    pub kind: RoomKind,
    /// What it is about.
    pub about: Option<String>,
    /// Its members, besides the one who makes it.
    pub members: Vec<String>,
    /// Its title.
    pub title: Option<String>,
    /// What the application keeps with it.
    pub info: Option<Map<String, Value>>,
}

/// What the room is told of a change: the body of an entry in its log.
pub type Told = Map<String, Value>;

fn bad<T>(text: String) -> Result<T, Refused> {
    Err(Refused::new(ErrorCode::BadRequest, text))
}

fn forbidden<T>(text: String) -> Result<T, Refused> {
    Err(Refused::new(ErrorCode::Forbidden, text))
}

fn told(action: &str, by: &str) -> Told {
    let mut told = Map::new();
    told.insert("action".to_owned(), action.into());
    told.insert("by".to_owned(), by.into());
    told
}

/// What the room is told of an alert.
#[must_use]
pub fn alert_told(alert: &Alert, by: &str) -> Told {
    let mut told = told("alert", by);
    told.insert("message".to_owned(), alert.message.clone().into());
    told
}

/// What the room is told when `by` has pinned or unpinned a message.
#[must_use]
pub fn told_of_pin(by: &str, message: &str, on: bool) -> Told {
    let mut told = told(if on { "pinned" } else { "unpinned" }, by);
    told.insert("message".to_owned(), message.into());
    told
}

/// Checks the name of a user that a client gives.
pub(super) fn check_user(user: &str) -> Result<(), Refused> {
    match crate::auth::user_flaw(user) {
        Some(flaw) => bad(format!("the user {flaw}")),
        None if user.len() > MAX_USER => bad(format!("a user has at most {MAX_USER} bytes")),
        None => Ok(()),
    }
}

fn check_text(name: &str, text: &str) -> Result<(), Refused> {
    match text.chars().count() <= MAX_TEXT && !text.chars().any(char::is_control) {
        true => Ok(()),
        false => bad(format!(
            "{name} has at most {MAX_TEXT} characters, and no control characters"
        )),
    }
}

fn check_info(info: &Map<String, Value>) -> Result<(), Refused> {
    let text = serde_json::to_vec(info).unwrap_or_default();
    if text.len() > MAX_INFO {
        let size = text.len();
        return bad(format!("info has {size} bytes, the limit is {MAX_INFO}"));
    }
    // What is nested deeper than a parser reads would make the whole record unreadable.
    match json_flaw(&text, MAX_INFO_LEVELS) {
        None => Ok(()),
        Some(flaw) => bad(format!("info {flaw}")),
    }
}

/// A change, with what it needs to be judged.
#[derive(Debug)]
pub struct Ask<'a> {
    /// The room.
    pub room: &'a RoomId,
    /// Who makes the change.
    pub identity: &'a Identity,
    /// Whether only members are let into the room.
    pub members_only: bool,
    /// Whether users may make direct rooms.
    pub users_create: bool,
    /// Most members of a room.
    pub room_members: usize,
    /// The time, in ms since 1970.
    pub now: u64,
    /// The region in which the change is made.
    pub origin: &'a Region,
}

impl Ask<'_> {
    /// How much the one who asks may do: as a moderator, or an owner. `None`: neither.
    fn level(&self, record: Option<&Record>) -> Option<Role> {
        let (identity, room) = (self.identity, self.room);
        if identity.may(Right::Manage, room) {
            return Some(Role::Owner);
        }
        if !identity.may(Right::Moderate, room) {
            return None;
        }
        let standing = Standing::of(record, self.members_only);
        let role = standing.role(&identity.user, false)?;
        // Where grants say who is in a room, they also say who moderates.
        let at_least = if self.members_only {
            Role::Reader
        } else {
            Role::Moderator
        };
        Some(role.max(at_least)).filter(|role| *role >= Role::Moderator)
    }

    fn needs(&self, record: Option<&Record>, role: Role, what: &str) -> Result<Role, Refused> {
        match self.level(record) {
            Some(level) if level >= role => Ok(level),
            _ => {
                let text = format!(
                    "{what} in {} needs the right manage, or moderate and the role {}",
                    self.room,
                    role.as_str()
                );
                forbidden(text)
            }
        }
    }

    /// The record after a change of `record`, and what the room is told. `None` if nothing changes.
    ///
    /// # Errors
    /// `forbidden`, `bad_request` or `limit`, with the reason.
    pub fn apply(
        &self,
        record: Option<&Record>,
        change: &Change,
    ) -> Result<Option<(Record, Told)>, Refused> {
        // Later than everything in the record, also if the clocks of two regions differ.
        let mut at = record.map_or(self.now, |record| self.now.max(record.newest() + 1));
        if let Change::Pin {
            said: Some(said), ..
        } = change
        {
            at = at.max(said.ts);
        }
        let stamp = Stamp {
            at,
            origin: self.origin.clone(),
        };
        let by = &*self.identity.user;
        if let Change::Create(create) = change {
            return self.create(record, create, &stamp);
        }
        let Some(record) = record else {
            // In a room that grants open, the first mute, ban or setting makes the record.
            if !matches!(
                change,
                Change::Put { .. } | Change::Set(_) | Change::Alert(_) | Change::Pin { .. }
            ) || self.members_only
            {
                if change.users() == [by] {
                    // As in a room that was made: who leaves is not told whether there is one.
                    return self.is_no_member();
                }
                return Err(Refused::new(
                    ErrorCode::Forbidden,
                    format!("{} has no record: nobody has made it", self.room),
                ));
            }
            let made = Made {
                created: self.now,
                by: by.to_owned(),
            };
            let record = Record::new(RoomKind::Open, None, made);
            return self.apply(Some(&record), change);
        };
        if record.is_closed() {
            return forbidden(format!("{} was closed", self.room));
        }
        let mut new = record.clone();
        let told = match change {
            Change::Create(_) => return Ok(None),
            Change::Set(settings) => self.set(&mut new, settings, &stamp)?,
            Change::Put { user, what } => self.put(&mut new, user, what, stamp)?,
            Change::Remove { user } => self.remove(&mut new, user, stamp)?,
            Change::Close => {
                if !self.identity.may(Right::Erase, self.room) {
                    return forbidden(format!("the token does not grant erase on {}", self.room));
                }
                self.needs(Some(record), Role::Owner, "ending the room")?;
                new.closed = Some(Field { value: true, stamp });
                told("closed", by)
            }
            Change::Alert(alert) => {
                let known = record.alert.as_ref().and_then(|field| field.value.as_ref());
                if known != Some(alert) {
                    new.alert = Some(Field {
                        value: Some(alert.clone()),
                        stamp,
                    });
                }
                alert_told(alert, by)
            }
            Change::Pin { message, on, said } => {
                self.pin(&mut new, message, (*on, *said), stamp)?
            }
        };
        Ok((new != *record).then_some((new, told)))
    }

    fn create(
        &self,
        record: Option<&Record>,
        create: &Create,
        stamp: &Stamp,
    ) -> Result<Option<(Record, Told)>, Refused> {
        let Create {
            kind,
            about,
            members,
            title,
            info,
        } = create;
        let by = &*self.identity.user;
        let manages = self.identity.may(Right::Manage, self.room);
        let takes_part = members.iter().any(|member| *member == by);
        let as_user = self.users_create
            && *kind == RoomKind::Dm
            && takes_part
            && self.identity.may(Right::Write, self.room)
            && !self.identity.is_anonymous;
        if !manages && !as_user {
            let text = format!(
                "making {} needs the right manage; users with write make only direct rooms with themselves in them, in namespaces with create = \"members\"",
                self.room
            );
            return forbidden(text);
        }
        if let Some(record) = record {
            if record.is_closed() {
                return forbidden(format!("{} was closed", self.room));
            }
            let mut new = record.clone();
            return match new.members.get_mut(by) {
                _ if manages => Ok(None),
                Some(member) if member.state == MemberState::In => Ok(None),
                // Who has left a direct room comes back to it by making it again.
                Some(member) if member.left => {
                    member.state = MemberState::In;
                    member.left = false;
                    member.stamp = stamp.clone();
                    let mut told = told("added", by);
                    told.insert("user".to_owned(), by.into());
                    Ok(Some((new, told)))
                }
                _ => forbidden(format!("this user is not a member of {}", self.room)),
            };
        }
        for member in members {
            check_user(member)?;
        }
        let (least, most) = match kind {
            RoomKind::Dm => (1, DIRECT_MEMBERS),
            RoomKind::Group | RoomKind::Open => (0, self.room_members),
        };
        if !(least..=most).contains(&members.len()) {
            let text = format!(
                "members: {} of them, {least} to {most} are possible",
                members.len()
            );
            return Err(Refused::new(ErrorCode::Limit, text));
        }
        let made = Made {
            created: stamp.at,
            by: by.to_owned(),
        };
        let mut new = Record::new(*kind, about.clone(), made);
        if let Some(about) = about {
            check_text("ref", about)?;
        }
        let settings = Settings {
            title: title.clone(),
            info: info.clone(),
            ..Settings::default()
        };
        Self::fill(&mut new, &settings, stamp)?;
        for user in members {
            let leads = *kind == RoomKind::Group && *user == by;
            let member = Member {
                role: if leads { Role::Owner } else { Role::Member },
                state: MemberState::In,
                left: false,
                muted_until: 0,
                stamp: stamp.clone(),
            };
            new.members.insert(user.clone(), member);
        }
        let mut told = told("created", by);
        told.insert("kind".to_owned(), kind.as_str().into());
        if let Some(title) = title {
            told.insert("title".to_owned(), title.clone().into());
        }
        if (1..=MAX_TOLD_MEMBERS).contains(&members.len()) {
            told.insert("members".to_owned(), json!(members));
        }
        Ok(Some((new, told)))
    }

    /// Writes settings into a record.
    fn fill(new: &mut Record, settings: &Settings, stamp: &Stamp) -> Result<(), Refused> {
        fn put<T: Clone + PartialEq>(
            field: &mut Option<Field<T>>,
            value: Option<&T>,
            stamp: &Stamp,
        ) {
            if let Some(value) = value
                && field.as_ref().is_none_or(|field| field.value != *value)
            {
                *field = Some(Field {
                    value: value.clone(),
                    stamp: stamp.clone(),
                });
            }
        }
        let Settings {
            title,
            info,
            archived,
            frozen,
            slow_mode_s,
            assignee,
            alert,
        } = settings;
        if *alert == Some(true) {
            return bad("alert can only be false: workers set it".to_owned());
        }
        if let Some(title) = title {
            check_text("title", title)?;
        }
        if let Some(info) = info {
            check_info(info)?;
        }
        if slow_mode_s.is_some_and(|seconds| seconds > MAX_SLOW_MODE_S) {
            return bad(format!("slow_mode_s is at most {MAX_SLOW_MODE_S}"));
        }
        if let Some(assignee) = assignee.as_ref().filter(|name| !name.is_empty()) {
            check_user(assignee)?;
        }
        put(&mut new.title, title.as_ref(), stamp);
        put(&mut new.info, info.as_ref(), stamp);
        put(&mut new.archived, archived.as_ref(), stamp);
        put(&mut new.frozen, frozen.as_ref(), stamp);
        put(&mut new.slow_mode_s, slow_mode_s.as_ref(), stamp);
        put(&mut new.assignee, assignee.as_ref(), stamp);
        if new.alert().is_some() {
            put(&mut new.alert, alert.map(|_ended| None).as_ref(), stamp);
        }
        Ok(())
    }

    fn set(&self, new: &mut Record, settings: &Settings, stamp: &Stamp) -> Result<Told, Refused> {
        let Settings {
            title,
            info,
            archived,
            frozen,
            slow_mode_s,
            assignee,
            alert,
        } = settings;
        let of_owner = title.is_some() || info.is_some() || assignee.is_some();
        let role = if of_owner {
            Role::Owner
        } else {
            Role::Moderator
        };
        self.needs(Some(new), role, "changing settings")?;
        Self::fill(new, settings, stamp)?;
        let mut told = told("settings", &self.identity.user);
        let values = [
            ("title", title.as_ref().map(|it| json!(it))),
            ("info", info.as_ref().map(|it| json!(it))),
            ("archived", archived.map(|it| json!(it))),
            ("frozen", frozen.map(|it| json!(it))),
            ("slow_mode_s", slow_mode_s.map(|it| json!(it))),
            ("assignee", assignee.as_ref().map(|it| json!(it))),
            ("alert", alert.map(|it| json!(it))),
        ];
        for (name, value) in values {
            if let Some(value) = value {
                told.insert(name.to_owned(), value);
            }
        }
        if told.len() == 2 {
            return bad(
                "one of title, info, archived, frozen, slow_mode_s, assignee and alert is needed"
                    .to_owned(),
            );
        }
        Ok(told)
    }

    /// Checks that the one who asks may change the entry of `user`.
    fn outranks(&self, record: &Record, user: &str, what: &str) -> Result<Role, Refused> {
        let level = self.needs(Some(record), Role::Moderator, what)?;
        let is_in = record
            .member(user)
            .filter(|its| its.state == MemberState::In);
        let role = is_in.map_or(Role::Reader, |its| its.role);
        match level > role || level == Role::Owner {
            true => Ok(level),
            false => forbidden(format!("{what}: {user} has the role {}", role.as_str())),
        }
    }

    fn put(
        &self,
        new: &mut Record,
        user: &str,
        what: &PutMember,
        stamp: Stamp,
    ) -> Result<Told, Refused> {
        check_user(user)?;
        let level = self.outranks(new, user, "changing a member")?;
        if what.role.is_some_and(|role| role > Role::Member) && level < Role::Owner {
            return forbidden("only an owner gives this role".to_owned());
        }
        let known = new.members.get(user);
        if new.kind == RoomKind::Dm && known.is_none() {
            return bad("the members of a direct room don't change".to_owned());
        }
        let state = match (what.state, known) {
            (Some(MemberState::Out), _) => return bad("state is \"in\" or \"banned\"".to_owned()),
            (Some(state), _) => state,
            // To mute somebody in an open room does not make a member of them, but names them.
            (None, Some(known)) if known.state == MemberState::Banned => MemberState::Banned,
            (None, _) => MemberState::In,
        };
        let comes =
            known.is_none_or(|its| its.state != MemberState::In) && state == MemberState::In;
        let named = new
            .members
            .values()
            .filter(|its| its.state != MemberState::Out)
            .count();
        let is_new = known.is_none_or(|its| its.state == MemberState::Out);
        // Entries of those who left stay, so they are bounded too.
        let is_full = known.is_none() && new.members.len() >= 2 * self.room_members;
        if is_new && named >= self.room_members || is_full {
            let text = format!(
                "a room has at most {} members and banned users",
                self.room_members
            );
            return Err(Refused::new(ErrorCode::Limit, text));
        }
        let before = known.map(|its| match its.state {
            MemberState::In => its.role,
            // Only an owner gives back what somebody was.
            MemberState::Out | MemberState::Banned if level < Role::Owner => {
                its.role.min(Role::Member)
            }
            MemberState::Out | MemberState::Banned => its.role,
        });
        let member = Member {
            role: what.role.or(before).unwrap_or(Role::Member),
            state,
            left: false,
            muted_until: what
                .muted_until
                .or(known.map(|its| its.muted_until))
                .unwrap_or_default(),
            stamp,
        };
        let action = match known {
            _ if state == MemberState::Banned => "banned",
            _ if comes => "added",
            Some(known) if known.muted_until != member.muted_until => {
                match member.muted_until > self.now {
                    true => "muted",
                    false => "unmuted",
                }
            }
            _ => "role",
        };
        let same = known.is_some_and(|known| {
            (known.role, known.state, known.muted_until)
                == (member.role, member.state, member.muted_until)
        });
        let mut told = told(action, &self.identity.user);
        told.insert("user".to_owned(), user.into());
        told.insert("role".to_owned(), member.role.as_str().into());
        if member.muted_until > 0 {
            told.insert("muted_until".to_owned(), member.muted_until.into());
        }
        if !same {
            new.members.insert(user.to_owned(), member);
        }
        Ok(told)
    }

    fn is_no_member<T>(&self) -> Result<T, Refused> {
        forbidden(format!("this user is not a member of {}", self.room))
    }

    fn remove(&self, new: &mut Record, user: &str, stamp: Stamp) -> Result<Told, Refused> {
        let oneself = *user == *self.identity.user;
        if !oneself {
            self.outranks(new, user, "removing a member")?;
        }
        let Some(member) = new.members.get_mut(user) else {
            if oneself {
                return self.is_no_member();
            }
            return bad(format!("{user} is not named in {}", self.room));
        };
        match member.state {
            MemberState::Banned if oneself => {
                return forbidden(format!("this user is banned from {}", self.room));
            }
            MemberState::Out if oneself => return self.is_no_member(),
            MemberState::Out => {}
            MemberState::In | MemberState::Banned => {
                // A mute and the role stay: leaving must not end them.
                member.state = MemberState::Out;
                member.left = oneself;
                member.stamp = stamp;
            }
        }
        let mut told = told(
            if oneself { "left" } else { "removed" },
            &self.identity.user,
        );
        told.insert("user".to_owned(), user.into());
        Ok(told)
    }

    fn pin(
        &self,
        new: &mut Record,
        message: &str,
        (on, said): (bool, Option<Said>),
        stamp: Stamp,
    ) -> Result<Told, Refused> {
        // In a direct room everybody pins.
        let standing = Standing::of(Some(new), self.members_only);
        let direct =
            new.kind == RoomKind::Dm && standing.role(&self.identity.user, false).is_some();
        if !(direct && self.identity.may(Right::Write, self.room)) {
            self.needs(Some(new), Role::Moderator, "pinning")?;
        }
        let named = Reference::parse(message)
            .map_err(|error| Refused::new(ErrorCode::BadId, error.to_string()))?;
        let message = named.of(&self.identity.user);
        let told = told_of_pin(&self.identity.user, &message, on);
        // Said before, and done then: others may have pinned or unpinned since.
        if let (Some(Said { ts, again: true }), Some(pins)) = (said, &new.pins)
            && pins.stamp.at >= ts
        {
            return Ok(told);
        }
        let mut pins = new.pins().to_vec();
        let at = pins.iter().position(|pin| *pin == message);
        if on && at.is_none() && pins.len() >= MAX_PINS {
            let text = format!("a room has at most {MAX_PINS} pinned messages");
            return Err(Refused::new(ErrorCode::Limit, text));
        }
        match (on, at) {
            (true, None) => pins.push(message),
            (false, Some(at)) => drop(pins.remove(at)),
            (true, Some(_)) | (false, None) => return Ok(told),
        }
        new.pins = Some(Field { value: pins, stamp });
        Ok(told)
    }
}
