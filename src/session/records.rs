//! Room records, as commands: reading one, changing one, pinning messages; and what a user keeps of rooms and people.

use super::checks::{admitted, namespace};
use crate::{
    auth::{Identity, Right},
    bus::{Acked, News, Outgoing, Publisher, Signal},
    model::{Kind, RoomId},
    people::{
        self, Alert, Change, Changed, Create, MemberState, People, Record, RoomKind, Said, Told,
        preview,
    },
    protocol::{
        Arrangement, ErrorCode, LastMessage, Mentions, NewRoom, Publication, PublishReply,
        PutMember, RecordReply, Refused,
    },
    subject::FROM_NATTER,
};

/// The record of a room.
pub(crate) async fn record(
    people: &People,
    identity: &Identity,
    room: &RoomId,
) -> Result<RecordReply, Refused> {
    namespace(people.config(), room)?;
    let known = admitted(people, identity, Right::Read, room).await?;
    match known.record() {
        Some(record) => Ok(shown(people, identity, room, &record)),
        None => {
            let text = format!("{room} has no record: nobody has made it");
            Err(Refused::new(ErrorCode::UnknownRoom, text))
        }
    }
}

/// A record as one user may see it.
pub(crate) fn shown(
    people: &People,
    identity: &Identity,
    room: &RoomId,
    record: &Record,
) -> RecordReply {
    record.reply(room, people.moderates(record, identity, room))
}

/// Makes a room, or finds it.
pub(crate) async fn create(
    people: &People,
    publisher: &Publisher,
    identity: &Identity,
    new: NewRoom,
) -> Result<RecordReply, Refused> {
    let (room, create) = named(new)?;
    let create = Change::Create(create);
    let made = change(people, publisher, identity, &room, &create, None).await?;
    Ok(RecordReply {
        made: Some(made.created),
        ..shown(people, identity, &room, &made.record)
    })
}

/// The name of a new room, and what to make.
fn named(new: NewRoom) -> Result<(RoomId, Create), Refused> {
    let NewRoom {
        namespace,
        kind,
        about,
        key,
        name,
        mut members,
        title,
        info,
    } = new;
    let bad = |text: &str| Refused::new(ErrorCode::BadRequest, text);
    let kind = RoomKind::parse(&kind).ok_or_else(|| bad("kind is not one of dm, group, open"))?;
    members.sort_unstable();
    members.dedup();
    let its = about.as_deref();
    let room = match (kind, &key, &name) {
        (RoomKind::Dm, None, None) => {
            people::direct(&namespace, its, members.iter().map(String::as_str))
        }
        (RoomKind::Dm, _, _) => {
            return Err(bad("a dm has neither key nor name: its members name it"));
        }
        (_, Some(key), None) => people::group(&namespace, its, key),
        (_, None, Some(name)) => RoomId::named(&namespace, name),
        (_, None, None) => people::group(&namespace, its, &ulid::Ulid::new().to_string()),
        (_, Some(_), Some(_)) => return Err(bad("only one of key and name")),
    };
    let room = room.map_err(|error| Refused::new(ErrorCode::BadRoom, error.to_string()))?;
    let create = Create {
        kind,
        about,
        members,
        title,
        info,
    };
    Ok((room, create))
}

/// Changes the record of a room, and tells the room. `version`: only if the record has this version.
pub(crate) async fn change(
    people: &People,
    publisher: &Publisher,
    identity: &Identity,
    room: &RoomId,
    change: &Change,
    version: Option<&str>,
) -> Result<Changed, Refused> {
    let durable = namespace(people.config(), room)?.durable;
    let changed = people.change(identity, room, change, version).await?;
    signal_changed(publisher, room, &changed);
    if let Some(told) = &changed.told {
        let id = ulid::Ulid::new().to_string();
        if let Err(error) = tell(publisher, room, told, durable, &id).await {
            // The change is made, and those whom it concerns find it in the record.
            tracing::warn!(room.id = %room, %error, "a room can't be told of a change of its record");
        }
    }
    Ok(changed)
}

/// Marks a room with an alert, and tells the room by an entry with this id. Unlike after other changes, the room is told
/// for certain: a repeat tells it, if the first attempt did not get that far.
///
/// # Errors
/// Why it was refused, or that it can't be done now. A repeat with the same id is safe.
pub(crate) async fn alert(
    people: &People,
    publisher: &Publisher,
    identity: &Identity,
    room: &RoomId,
    alert: &Alert,
    id: &str,
) -> Result<(), Refused> {
    let change = Change::Alert(alert.clone());
    let changed = people.change(identity, room, &change, None).await?;
    signal_changed(publisher, room, &changed);
    let told = people::alert_told(alert, &identity.user);
    tell(publisher, room, &told, true, id).await.map(drop)
}

/// As [`change`], for a reply: the record after it, as the user may see it.
pub(crate) async fn changed(
    people: &People,
    publisher: &Publisher,
    identity: &Identity,
    room: &RoomId,
    (what, version): (&Change, Option<&str>),
) -> Result<RecordReply, Refused> {
    let changed = change(people, publisher, identity, room, what, version).await?;
    Ok(shown(people, identity, room, &changed.record))
}

/// What a client wants of a member: with the state `out` that the user is removed.
pub(super) fn of_member(user: String, what: PutMember) -> Result<Change, Refused> {
    match what {
        PutMember {
            state: Some(MemberState::Out),
            role: None,
            muted_until: None,
        } => Ok(Change::Remove { user }),
        PutMember {
            state: Some(MemberState::Out),
            ..
        } => {
            let text = "with the state \"out\" there is neither role nor muted_until";
            Err(Refused::new(ErrorCode::BadRequest, text))
        }
        what => Ok(Change::Put { user, what }),
    }
}

/// Changes how the user wants to see a room, and tells the user's sessions that watch.
pub(crate) async fn arrange(
    people: &People,
    publisher: &Publisher,
    identity: &Identity,
    room: RoomId,
    how: &Arrangement,
) -> Result<(), Refused> {
    people.arrange(&identity.user, &room, how).await?;
    let what = News::Changed;
    publisher.signal(&[&identity.user], &Signal { room, what });
    Ok(())
}

/// Blocks a user, or no longer.
pub(super) async fn block(
    people: &People,
    identity: &Identity,
    user: &str,
    blocked: bool,
) -> Result<(), Refused> {
    if identity.is_anonymous {
        let text = "users without a token block nobody";
        return Err(Refused::new(ErrorCode::BadRequest, text));
    }
    people.block(&identity.user, user, blocked).await
}

/// What a publication pins or unpins.
#[derive(Debug)]
pub(crate) struct Pinning<'p> {
    publication: &'p Publication,
    /// The message, `<user>/<id>`.
    message: String,
    on: bool,
}

impl<'p> Pinning<'p> {
    /// `None`: the publication does neither.
    pub(crate) fn of(identity: &Identity, publication: &'p Publication) -> Option<Self> {
        let on = publication.kind.pins()?;
        let (_, target) = publication.target.as_ref()?;
        Some(Self {
            publication,
            message: target.of(&identity.user),
            on,
        })
    }

    fn change(&self, said: Option<Said>) -> Change {
        Change::Pin {
            message: self.message.clone(),
            on: self.on,
            said,
        }
    }

    /// Checks it as a change of the record.
    pub(super) async fn check(&self, people: &People, identity: &Identity) -> Result<(), Refused> {
        let room = &self.publication.room;
        people.judge(identity, room, &self.change(None)).await
    }

    /// Carries out what was checked.
    ///
    /// The entry in the room's log comes first, with an id that is made from the one of the publication, and then the
    /// record. So the stream recognizes a repeat. It changes the record only if the first attempt did not get so far.
    pub(crate) async fn carry_out(
        &self,
        people: &People,
        publisher: &Publisher,
        identity: &Identity,
    ) -> Result<PublishReply, Refused> {
        let Publication { room, id, .. } = self.publication;
        let durable = namespace(people.config(), room)?.durable;
        let id = id.as_ref().map(ToString::to_string);
        let id = id.unwrap_or_else(|| ulid::Ulid::new().to_string());
        let told = people::told_of_pin(&identity.user, &self.message, self.on);
        let entry = people::entry_id(&identity.user, &id, &self.message, self.on);
        let entry = tell(publisher, room, &told, durable, &entry).await?;
        let pin = self.change(Some(Said {
            ts: entry.ts,
            again: entry.dup,
        }));
        let changed = people.change(identity, room, &pin, None).await?;
        signal_changed(publisher, room, &changed);
        Ok(PublishReply { id, ..entry })
    }
}

/// Signals a change of a record to those who are in the room, and to those who are not any more.
fn signal_changed(publisher: &Publisher, room: &RoomId, changed: &Changed) {
    if changed.told.is_none() {
        return;
    }
    signal_members(publisher, room, &changed.record, || News::Changed);
    let out = |user: &&String| {
        let member = changed.record.member(user);
        member.is_some_and(|member| member.state != MemberState::In)
    };
    let gone: Vec<&str> = changed
        .concerned
        .iter()
        .filter(out)
        .map(String::as_str)
        .collect();
    let (room, what) = (room.clone(), News::Changed);
    publisher.signal(&gone, &Signal { room, what });
}

/// Members up to which a room signals its messages to each of them. In a larger one, those who watch find them when they
/// compare.
const SIGNALLED: usize = 100;

/// Tells those members of a room of a message who watch it without being in it.
pub(crate) fn signal(
    people: &People,
    publisher: &Publisher,
    outgoing: &Outgoing<'_>,
    acked: &Acked,
) {
    let Publication {
        room,
        body,
        mentions,
        ..
    } = outgoing.publication;
    let Some(record) = people.known(room).and_then(|known| known.record()) else {
        return;
    };
    signal_members(publisher, room, &record, || News::Message {
        last: LastMessage {
            id: outgoing.id.to_owned(),
            from: outgoing.user.to_owned(),
            ts: acked.ts,
            text: preview(body.get().as_bytes()),
        },
        cursor: acked.cursor.clone(),
        mentions: mentions
            .json()
            .and_then(|users| serde_json::from_str(users).ok())
            .unwrap_or_default(),
    });
}

/// Signals something to the members of a room, if it names some, and not too many.
fn signal_members(
    publisher: &Publisher,
    room: &RoomId,
    record: &Record,
    what: impl FnOnce() -> News,
) {
    let users: Vec<&str> = record
        .present()
        .map(|(user, _)| user)
        .take(SIGNALLED + 1)
        .collect();
    if (1..=SIGNALLED).contains(&users.len()) {
        let (room, what) = (room.clone(), what());
        publisher.signal(&users, &Signal { room, what });
    }
}

/// Publishes what was changed, by whom, as a message of natter's own with this id.
async fn tell(
    publisher: &Publisher,
    room: &RoomId,
    told: &Told,
    durable: bool,
    id: &str,
) -> Result<PublishReply, Refused> {
    let body = serde_json::value::to_raw_value(told)
        .map_err(|error| Refused::new(ErrorCode::Internal, error.to_string()))?;
    let publication = Publication {
        room: room.clone(),
        id: None,
        kind: Kind::System,
        body,
        target: None,
        reply_to: None,
        mentions: Mentions::default(),
    };
    let outgoing = Outgoing {
        publication: &publication,
        user: FROM_NATTER,
        id,
        after: None,
        original_ts: None,
    };
    let (cursor, ts, dup) = match durable {
        true => {
            let acked = publisher.durable(&outgoing, |_seq| None).await?;
            (Some(acked.cursor), acked.ts, acked.duplicate)
        }
        false => (None, publisher.ephemeral(&outgoing)?, false),
    };
    Ok(PublishReply {
        room: room.clone(),
        id: id.to_owned(),
        cursor,
        ts,
        dup,
    })
}
