//! Room records, as commands: reading one, changing one.

use super::answers::{admitted, namespace};
use crate::{
    auth::{Identity, Right},
    bus::{Outgoing, Publisher},
    model::{Kind, RoomId},
    people::{Change, Changed, People, Record, Told},
    protocol::{ErrorCode, Mentions, Publication, RecordReply, Refused},
    subject::FROM_NATTER,
};

/// The record of a room.
pub(crate) async fn record(
    people: &People,
    identity: &Identity,
    room: &RoomId,
) -> Result<RecordReply, Refused> {
    namespace(people.config(), room)?;
    admitted(people, identity, Right::Read, room).await?;
    let known = people.of(room).await?;
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
    if let Some(told) = &changed.told
        && let Err(error) = tell(publisher, room, told, durable).await
    {
        // The change is made, and those whom it concerns find it in the record.
        tracing::warn!(room.id = %room, %error, "a room can't be told of a change of its record");
    }
    Ok(changed)
}

/// Publishes what was changed, by whom, as a message of natter's own.
async fn tell(
    publisher: &Publisher,
    room: &RoomId,
    told: &Told,
    durable: bool,
) -> Result<(), Refused> {
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
        id: &ulid::Ulid::new().to_string(),
        after: None,
    };
    match durable {
        true => publisher.durable(&outgoing, |_seq| None).await.map(drop)?,
        false => publisher.ephemeral(&outgoing).map(drop)?,
    }
    Ok(())
}
