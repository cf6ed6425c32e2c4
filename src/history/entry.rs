//! Translates a message of a stream into an entry of history.

use crate::{
    bus::{Record, Stored, message_key},
    model::{BadRemark, Epoch, Kind, Place, Reference, Region, RoomId, annotations, reaction},
    store::{Base, Change, Entry, Said, What},
    subject::FROM_NATTER,
};

/// The history entry for a message of the stream of `origin` with the given `epoch`.
#[must_use]
pub fn entry(stored: Stored, origin: &Region, epoch: Epoch) -> Entry {
    let Stored { room, record } = stored;
    let what = what(&room, &record);
    Entry {
        place: place(&record, origin, epoch),
        original_ts: record.original_ts,
        from: record.from,
        room,
        what,
    }
}

/// The place in history of a message of the stream of `origin` with the given `epoch`.
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
    // A body is JSON text, or was converted to it when it was read.
    let Ok(body) = std::str::from_utf8(&record.body) else {
        return What::Nothing("the body is not UTF-8");
    };
    if kind == Kind::Message || (kind == Kind::System && record.from == FROM_NATTER) {
        let reply_key = record.reply_to.as_deref().and_then(|reference| {
            let reference = Reference::parse(reference).ok()?;
            Some(key_of(room, &record.from, &reference))
        });
        return What::Message {
            key: message_key(room.as_str(), &record.from, &record.id),
            said: Said {
                id: record.id.clone(),
                fingerprint: record.fingerprint.0,
                body: body.to_owned(),
                reply_to: record.reply_to.clone(),
                reply_key,
                mentions: mentions(record).unwrap_or_default(),
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
        Kind::Edit => Ok(Change::Edit {
            body: body.to_owned(),
            mentions: mentions(record),
        }),
        Kind::Delete => Ok(Change::Delete),
        Kind::Reaction => reaction(body).map(|(key, on)| Change::React { key, on }),
        Kind::Annotation => annotations(body).map(Change::Annotate),
        Kind::Message | Kind::Pin | Kind::Unpin | Kind::Erase | Kind::System => {
            Err(BadRemark::OtherForm)
        }
    };
    match change {
        Ok(change) => What::Change {
            target: key_of(room, &record.from, &target),
            change,
        },
        Err(BadRemark::OtherForm) => {
            What::Nothing("the body says nothing that history understands")
        }
        Err(BadRemark::TooLarge(_)) => What::Nothing("it is larger than what history keeps"),
    }
}

/// The mentioned users, if the message has the field.
fn mentions(record: &Record) -> Option<Vec<String>> {
    serde_json::from_str(record.mentions.as_deref()?).ok()
}

/// The key of a message.
pub(super) fn key_of_base(room: &RoomId, base: &Base) -> String {
    message_key(room.as_str(), &base.from, &base.said.id)
}

/// The key of the message that `from` refers to by `reference`.
#[must_use]
pub fn key_of(room: &RoomId, from: &str, reference: &Reference) -> String {
    let user = reference.user.as_deref().unwrap_or(from);
    message_key(room.as_str(), user, reference.id.as_str())
}
