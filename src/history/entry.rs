//! From a message of a stream to what history makes of it.

use crate::{
    bus::{Record, Stored, message_key},
    model::{Epoch, Kind, Place, Reference, Region, RoomId},
    store::{Change, Entry, Said, What, annotations, reaction},
};

/// What history makes of a message that the stream of `origin` has in its incarnation `epoch`.
#[must_use]
pub fn entry(stored: Stored, origin: &Region, epoch: Epoch) -> Entry {
    let Stored { room, record } = stored;
    let what = what(&room, &record);
    Entry {
        place: place(&record, origin, epoch),
        from: record.from,
        room,
        what,
    }
}

/// Where a message of the stream of `origin`, in its incarnation `epoch`, stands in history.
pub(super) fn place(record: &Record, origin: &Region, epoch: Epoch) -> Place {
    Place {
        ts: record.ts,
        origin: origin.clone(),
        epoch,
        seq: record.seq,
    }
}

fn what(room: &RoomId, record: &Record) -> What {
    let kind = record.kind.and_then(Kind::parse).unwrap_or_default();
    // A body is JSON text, or was made one when it was read.
    let Ok(body) = std::str::from_utf8(&record.body) else {
        return What::Nothing("the body is not UTF-8");
    };
    if kind == Kind::Message {
        let reply_key = record.reply_to.as_deref().and_then(|reference| {
            let reference = Reference::parse(reference).ok()?;
            Some(key_of(room, &record.from, &reference))
        });
        let mentions = record.mentions.as_deref().unwrap_or("[]");
        return What::Message {
            key: message_key(room.as_str(), &record.from, &record.id),
            said: Said {
                id: record.id.clone(),
                fingerprint: record.fingerprint.0,
                body: body.to_owned(),
                reply_to: record.reply_to.clone(),
                reply_key,
                mentions: serde_json::from_str(mentions).unwrap_or_default(),
            },
        };
    }
    let target = record.target.as_deref().map(Reference::parse);
    let Some(Ok(target)) = target else {
        return What::Nothing(match kind {
            Kind::Erase => "what it announces was done elsewhere",
            _ => "it does not say which message it is about",
        });
    };
    let may = target.is_by(&record.from) || record.moderated;
    let change = match kind {
        Kind::Edit | Kind::Delete if !may => {
            return What::Nothing("only the author or a moderator may do that");
        }
        Kind::Edit => Some(Change::Edit(body.to_owned())),
        Kind::Delete => Some(Change::Delete),
        Kind::Reaction => reaction(body),
        Kind::Annotation => annotations(body),
        Kind::Message | Kind::Erase => None,
    };
    match change {
        Some(change) => What::Change {
            target: key_of(room, &record.from, &target),
            change,
        },
        None => What::Nothing("the body says nothing that history understands"),
    }
}

/// The key of the message that `from` means by `reference`.
#[must_use]
pub fn key_of(room: &RoomId, from: &str, reference: &Reference) -> String {
    let user = reference.user.as_deref().unwrap_or(from);
    message_key(room.as_str(), user, reference.id.as_str())
}
