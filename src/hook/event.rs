//! The events that an entry of a room's log stands for. Only the entry decides, so each attempt says the same.

use serde::Serialize;
use serde_json::{Map, Value, value::RawValue};
use sha2::{Digest as _, Sha256};

use crate::{
    bus::Stored,
    config::HookEvent,
    history::{entry, shown},
    model::{Cursor, Epoch, Kind, Place, Reference, Region, RoomId},
    store::{Change, What},
    subject::FROM_NATTER,
    uploads::named,
};

/// One event.
#[derive(Debug)]
pub(super) struct Event {
    pub kind: HookEvent,
    /// When it happened, in ms since 1970.
    pub at: u64,
    /// `webhook-id`: the same for each attempt.
    pub id: String,
    pub data: Box<RawValue>,
    pub only: Only,
}

/// What must be true, besides, for an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Only {
    Always,
    /// No earlier entry named the upload with this hash.
    First(String),
    /// The room was ended. Its log is erased then, possibly also the entry that says so: what announces the erasure stands
    /// for it.
    Ended,
}

/// The body of a request.
#[derive(Serialize)]
struct Sent<'a> {
    #[serde(rename = "type")]
    kind: HookEvent,
    at: u64,
    data: &'a RawValue,
}

/// What events about a room say.
#[derive(Serialize)]
struct Data<'a> {
    room: &'a RoomId,
    /// A new message, as history shows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<&'a RawValue>,
    /// The message that a change is about, `<user>/<id>`.
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    moderated: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mentions: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    upload: Option<&'a str>,
    /// Which messages were erased for good.
    #[serde(skip_serializing_if = "Option::is_none")]
    erased: Option<&'a RawValue>,
    /// What an entry about the room says.
    #[serde(flatten)]
    told: Map<String, Value>,
}

impl<'a> Data<'a> {
    fn about(room: &'a RoomId) -> Self {
        Self {
            room,
            message: None,
            target: None,
            id: None,
            by: None,
            cursor: None,
            moderated: false,
            body: None,
            mentions: None,
            key: None,
            annotations: None,
            upload: None,
            erased: None,
            told: Map::new(),
        }
    }
}

/// A short name for a text of any length.
pub(super) fn hash(text: &str) -> String {
    let digest = Sha256::digest(text);
    let first = digest.iter().take(16);
    first.map(|byte| format!("{byte:02x}")).collect()
}

impl Event {
    /// The body of its request.
    pub(super) fn body(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(&Sent {
            kind: self.kind,
            at: self.at,
            data: &self.data,
        })
    }
}

/// The events of an entry of the stream of `origin` and `part`.
///
/// # Errors
/// A part of it is not JSON, which can't be: parts are checked when they are read.
pub(super) fn events(
    stored: &Stored,
    (origin, part): (&Region, u16),
    epoch: Epoch,
) -> serde_json::Result<Vec<Event>> {
    let Stored { room, record } = stored;
    let place = Place {
        ts: record.ts,
        origin: origin.clone(),
        epoch,
        seq: record.seq,
    };
    let cursor = Cursor::single(place.position(record.fingerprint)).to_string();
    let event = |kind: HookEvent, data: &Data<'_>| {
        Ok(Event {
            kind,
            at: record.shown_ts(),
            id: format!("{origin}.{epoch}.{part}.{}", record.seq),
            data: serde_json::value::to_raw_value(data)?,
            only: Only::Always,
        })
    };
    let kind = record.kind.and_then(Kind::parse).unwrap_or_default();
    let body: &RawValue = serde_json::from_slice(&record.body)?;
    let (about, mut told) = (|| Data::about(room), Vec::new());
    let by_natter = record.from == FROM_NATTER;
    if kind == Kind::System && by_natter {
        if let Some((kind, told_of)) = of_room(body) {
            let mut event = event(
                kind,
                &Data {
                    id: Some(&record.id),
                    cursor: Some(cursor),
                    told: told_of,
                    ..about()
                },
            )?;
            if kind == HookEvent::RoomDeleted {
                event.id = ended_id(room);
            }
            told.push(event);
        }
        return Ok(told);
    }
    if kind == Kind::Erase && by_natter {
        let data = Data {
            cursor: Some(cursor),
            erased: Some(body),
            ..about()
        };
        told.push(event(HookEvent::MessageDeleted, &data)?);
        let ended = Map::from_iter([("action".to_owned(), Value::from("closed"))]);
        told.push(Event {
            id: ended_id(room),
            only: Only::Ended,
            ..event(
                HookEvent::RoomDeleted,
                &Data {
                    told: ended,
                    ..about()
                },
            )?
        });
        return Ok(told);
    }
    // It knows what counts: who may edit, and which bodies are reactions.
    let what = entry(stored.clone(), origin, epoch).what;
    let target = record.target.as_deref().map(Reference::parse);
    let target = target.and_then(Result::ok);
    let target = target.map(|its| its.of(&record.from));
    let change = || Data {
        target: target.clone(),
        id: Some(&record.id),
        by: Some(&record.from),
        cursor: Some(cursor.clone()),
        ..about()
    };
    match &what {
        What::Message { .. } => {
            if let Some(message) = shown(stored.clone(), origin, epoch)? {
                let data = Data {
                    message: Some(&message),
                    ..about()
                };
                told.push(event(HookEvent::MessageCreated, &data)?);
            }
        }
        What::Change { change: what, .. } => {
            let (kind, data) = match what {
                Change::Edit { mentions, .. } => {
                    let data = Data {
                        moderated: record.moderated,
                        body: Some(body),
                        mentions: mentions.as_deref(),
                        ..change()
                    };
                    (HookEvent::MessageEdited, data)
                }
                Change::Delete => {
                    let data = Data {
                        moderated: record.moderated,
                        ..change()
                    };
                    (HookEvent::MessageDeleted, data)
                }
                Change::React { key, on } => {
                    let kind = match on {
                        true => HookEvent::ReactionAdded,
                        false => HookEvent::ReactionRemoved,
                    };
                    let data = Data {
                        key: Some(key),
                        ..change()
                    };
                    (kind, data)
                }
                Change::Annotate(_) => {
                    let data = Data {
                        annotations: Some(body),
                        ..change()
                    };
                    (HookEvent::AnnotationAdded, data)
                }
            };
            told.push(event(kind, &data)?);
        }
        What::Nothing(_) => return Ok(told),
    }
    if matches!(kind, Kind::Message | Kind::Edit) {
        let message = match kind {
            Kind::Edit => target.clone(),
            _ => Some(format!("{}/{}", record.from, record.id)),
        };
        // Edges refuse bodies whose attachments can't be read.
        for upload in named(body.get()).unwrap_or_default() {
            let data = Data {
                target: message.clone(),
                by: Some(&record.from),
                cursor: Some(cursor.clone()),
                upload: Some(&upload),
                ..about()
            };
            let hash = hash(&upload);
            told.push(Event {
                id: format!("upload.{hash}"),
                only: Only::First(hash),
                ..event(HookEvent::UploadCompleted, &data)?
            });
        }
    }
    Ok(told)
}

/// A room is ended once.
fn ended_id(room: &RoomId) -> String {
    format!("ended.{}", hash(room.as_str()))
}

/// The event for an entry about a room, and what it says.
fn of_room(body: &RawValue) -> Option<(HookEvent, Map<String, Value>)> {
    let told: Map<String, Value> = serde_json::from_str(body.get()).ok()?;
    let kind = match told.get("action")?.as_str()? {
        "created" => HookEvent::RoomCreated,
        "closed" => HookEvent::RoomDeleted,
        "alert" => HookEvent::RoomAlert,
        "added" => HookEvent::MemberAdded,
        "removed" | "left" => HookEvent::MemberRemoved,
        "banned" => HookEvent::MemberBanned,
        _ => HookEvent::RoomUpdated,
    };
    Some((kind, told))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::model::Class;

    fn stored(from: &str, kind: &str, target: Option<&str>, body: &str) -> Stored {
        let kind = Kind::parse(kind).unwrap();
        let time = ("Nats-Time-Stamp", "2026-11-20T13:31:20Z");
        let mut headers = vec![
            ("Nats-Sequence", "42"),
            time,
            ("Natter-From", from),
            ("Natter-Id", "x1"),
            ("Natter-Kind", kind.as_str()),
        ];
        headers.extend(target.map(|target| ("Natter-Target", target)));
        let body = Bytes::from(body.to_owned());
        let epoch = Epoch::parse("k3").unwrap();
        Stored {
            room: RoomId::parse("chat:a").unwrap(),
            record: crate::bus::Record::stored(headers.into_iter(), body, Class::Ev, epoch)
                .unwrap(),
        }
    }

    fn told(stored: &Stored) -> Vec<(String, Value)> {
        let origin = Region::parse("seoul").unwrap();
        let events = events(stored, (&origin, 2), Epoch::parse("k3").unwrap()).unwrap();
        let shown = |event: &Event| {
            let body: Value = serde_json::from_slice(&event.body().unwrap()).unwrap();
            assert_eq!(body["at"], 1_795_181_480_000_u64);
            assert_eq!(body["data"]["room"], "chat:a");
            (event.id.clone(), body)
        };
        events.iter().map(shown).collect()
    }

    #[test]
    fn each_entry_is_the_event_that_history_makes_of_it() {
        for (from, kind, target, body, expected) in [
            ("kim", "message", None, "{\"text\":1.0}", "message.created"),
            ("kim", "edit", Some("m1"), "1", "message.edited"),
            ("kim", "edit", Some("lee/m1"), "1", ""),
            ("kim", "delete", Some("m1"), "null", "message.deleted"),
            (
                "kim",
                "reaction",
                Some("lee/m1"),
                "\"👍\"",
                "reaction.added",
            ),
            (
                "kim",
                "reaction",
                Some("lee/m1"),
                "{\"key\":\"👍\",\"remove\":true}",
                "reaction.removed",
            ),
            ("kim", "reaction", Some("lee/m1"), "7", ""),
            (
                "$worker.x",
                "annotation",
                Some("kim/m1"),
                "{\"a\":1}",
                "annotation.added",
            ),
            (
                "$natter",
                "erase",
                None,
                "{\"user\":\"kim\"}",
                "message.deleted room.deleted",
            ),
            ("kim", "erase", None, "{\"user\":\"kim\"}", ""),
            (
                "$natter",
                "system",
                None,
                "{\"action\":\"created\"}",
                "room.created",
            ),
            ("kim", "system", None, "{\"action\":\"created\"}", ""),
            (
                "$natter",
                "system",
                None,
                "{\"action\":\"closed\"}",
                "room.deleted",
            ),
            (
                "$natter",
                "system",
                None,
                "{\"action\":\"muted\"}",
                "room.updated",
            ),
            (
                "$natter",
                "system",
                None,
                "{\"action\":\"alert\"}",
                "room.alert",
            ),
            (
                "$natter",
                "system",
                None,
                "{\"action\":\"left\"}",
                "member.removed",
            ),
            (
                "$natter",
                "system",
                None,
                "{\"action\":\"banned\"}",
                "member.banned",
            ),
            ("$natter", "system", None, "7", ""),
        ] {
            let told = told(&stored(from, kind, target, body));
            let kinds: Vec<&str> = told
                .iter()
                .map(|(id, body)| {
                    let kind = body["type"].as_str().unwrap();
                    let is_place = id == "seoul.k3.2.42";
                    let is_end = kind == "room.deleted" && id.starts_with("ended.");
                    assert!(is_place || is_end, "{id}");
                    kind
                })
                .collect();
            let expected: Vec<&str> = expected.split_whitespace().collect();
            assert_eq!(kinds, expected, "{from} {kind} {body}");
        }
    }

    #[test]
    fn a_change_names_its_message_and_what_it_says() {
        let edit = told(&stored("kim", "edit", Some("m1"), "{\"n\":1.50}"));
        let data = &edit[0].1["data"];
        assert_eq!(
            (&data["target"], &data["by"]),
            (&"kim/m1".into(), &"kim".into())
        );
        assert!(data["cursor"].as_str().unwrap().starts_with("seoul.k3.42."));
        let raw = events(
            &stored("kim", "edit", Some("m1"), "{\"n\":1.50}"),
            (&Region::parse("seoul").unwrap(), 2),
            Epoch::parse("k3").unwrap(),
        );
        let raw = String::from_utf8(raw.unwrap()[0].body().unwrap()).unwrap();
        assert!(
            raw.contains("\"body\":{\"n\":1.50}"),
            "as it was sent: {raw}"
        );
        assert!(!raw.contains("moderated"), "{raw}");
    }

    #[test]
    fn an_upload_has_an_id_of_its_own() {
        let body = "{\"attachments\":[{\"upload\":\"u1\"},{\"upload\":\"u2\"}]}";
        let first = told(&stored("kim", "message", None, body));
        let edit = told(&stored("kim", "edit", Some("m1"), body));
        assert_eq!((first.len(), edit.len()), (3, 3));
        assert_eq!(first[1].0, edit[1].0);
        assert_ne!(first[1].0, first[2].0);
        assert_eq!(first[1].1["data"]["upload"], "u1");
        assert_eq!(first[1].1["data"]["target"], "kim/x1");
        assert_eq!(edit[1].1["data"]["target"], "kim/m1");
    }
}
