//! A message as it is shown to clients.

use std::{borrow::Cow, cmp::Reverse, collections::BTreeMap};

use serde::Serialize;
use serde_json::value::RawValue;

use super::entry;
use crate::{
    bus::Stored,
    model::{
        Cursor, Epoch, Fingerprint, Kind, MAX_JSON_DEPTH, Place, Region, RoomId, header_unescape,
        json_flaw,
    },
    store::{Base, Folded, Replies},
    subject::FROM_NATTER,
};

/// How much of a message is shown.
struct Most {
    /// Reactions: those with the most users.
    reactions: usize,
    /// Users listed per reaction, and bytes of user names per message. Further users are only counted.
    named: usize,
    names: usize,
    /// Bytes of annotations, smallest first.
    annotations: usize,
}

/// What a page shows.
const PAGE: Most = Most {
    reactions: 100,
    named: 100,
    names: 32 << 10,
    annotations: 256 << 10,
};

/// What an export shows.
const EVERYTHING: Most = Most {
    reactions: usize::MAX,
    named: usize::MAX,
    names: usize::MAX,
    annotations: usize::MAX,
};

/// Largest JSON of one message: what NATS carries, with room for the rest of an answer.
const MAX_BYTES: usize = 900 * 1024;

#[derive(Serialize)]
struct ShownMessage<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    room: Option<&'a RoomId>,
    id: &'a str,
    from: &'a str,
    ts: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<Cow<'a, RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply_to: Option<&'a str>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    mentions: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    edited_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deleted_at: Option<u64>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    reactions: BTreeMap<&'a str, Reaction<'a>>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<&'a str, Cow<'a, RawValue>>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotated_by: BTreeMap<&'a str, &'a str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    truncated: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    replies: Option<ShownReplies<'a>>,
}

/// The answers to a message.
#[derive(Serialize)]
struct ShownReplies<'a> {
    count: usize,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    capped: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    last: Option<LastReply<'a>>,
}

#[derive(Serialize)]
struct LastReply<'a> {
    id: &'a str,
    from: Cow<'a, str>,
    ts: u64,
}

#[derive(Serialize)]
struct Reaction<'a> {
    count: usize,
    users: Vec<&'a str>,
}

/// The cursor of a message.
pub(super) fn cursor(base: &Base) -> Cursor {
    let fingerprint = Fingerprint(base.said.fingerprint);
    Cursor::single(base.place.position(fingerprint))
}

/// The JSON of a message. If it is too large, annotations are left out, and then reactions. `room`: for messages of
/// several rooms.
pub(super) fn message(
    room: Option<&RoomId>,
    base: &Base,
    folded: &Folded,
    replies: Option<&Replies>,
) -> serde_json::Result<Box<RawValue>> {
    let (reactions, more_reactions) = reactions(folded, &PAGE);
    let (annotations, more_annotations) = annotations(folded, &PAGE);
    let truncated = folded.truncated || more_reactions || more_annotations;
    let mut shown = ShownMessage {
        room,
        cursor: Some(cursor(base).to_string()),
        reactions,
        annotations: annotations
            .into_iter()
            .map(|(name, (_by, value))| (name, value))
            .collect(),
        truncated,
        replies: replies.map(shown_replies),
        ..plain(base, folded)
    };
    let mut json = serde_json::value::to_raw_value(&shown)?;
    if json.get().len() > MAX_BYTES {
        shown.truncated = true;
        shown.annotations.clear();
        json = serde_json::value::to_raw_value(&shown)?;
    }
    if json.get().len() > MAX_BYTES {
        shown.reactions.clear();
        json = serde_json::value::to_raw_value(&shown)?;
    }
    Ok(json)
}

/// The JSON of a message of the stream of `origin` that nothing has changed yet; `None` if it is no message.
///
/// # Errors
/// A part of it is not JSON, which can't be: parts are checked when they are read.
pub fn shown(
    stored: Stored,
    origin: &Region,
    epoch: Epoch,
) -> serde_json::Result<Option<Box<RawValue>>> {
    let mut folded = Folded::default();
    folded.apply(&entry(stored, origin, epoch));
    let base = folded.base.as_ref();
    base.map(|base| message(None, base, &folded, None))
        .transpose()
}

fn shown_replies(replies: &Replies) -> ShownReplies<'_> {
    ShownReplies {
        count: replies.count,
        capped: replies.capped,
        last: replies.last.as_ref().and_then(last_reply),
    }
}

fn last_reply((place, key): &(Place, String)) -> Option<LastReply<'_>> {
    // `<room>/<user>/<id>`: only a user may contain `/`.
    let (from, id) = key.split_once('/')?.1.rsplit_once('/')?;
    Some(LastReply {
        id,
        from: header_unescape(from),
        ts: place.ts,
    })
}

/// The JSON of a message for an export: everything that is kept, without the cursor, which has a meaning only here.
pub(super) fn line(
    room: &RoomId,
    base: &Base,
    folded: &Folded,
) -> serde_json::Result<Box<RawValue>> {
    let (annotations, _) = annotations(folded, &EVERYTHING);
    let by = annotations.iter().map(|(name, (by, _))| (*name, *by));
    serde_json::value::to_raw_value(&ShownMessage {
        room: Some(room),
        reactions: reactions(folded, &EVERYTHING).0,
        annotated_by: by.collect(),
        annotations: annotations
            .into_iter()
            .map(|(name, (_by, value))| (name, value))
            .collect(),
        truncated: folded.truncated,
        ..plain(base, folded)
    })
}

/// A message without reactions and annotations.
fn plain<'a>(base: &'a Base, folded: &'a Folded) -> ShownMessage<'a> {
    ShownMessage {
        room: None,
        id: &base.said.id,
        from: &base.from,
        ts: base.ts,
        cursor: None,
        // What natter itself says is about the room; nobody else has this name.
        kind: (base.from == FROM_NATTER).then_some(Kind::System.as_str()),
        body: folded.body().map(raw),
        reply_to: base.said.reply_to.as_deref(),
        mentions: folded.mentions(),
        edited_at: folded.edit.as_ref().map(|edit| edit.ts),
        deleted_at: folded.deleted.as_ref().map(|deleted| deleted.ts),
        reactions: BTreeMap::new(),
        annotations: BTreeMap::new(),
        annotated_by: BTreeMap::new(),
        truncated: false,
        replies: None,
    }
}

/// JSON text as it is; it was checked when it was stored. Text stored by an older version that clients can't read
/// becomes a JSON string, as it is in the room.
fn raw(json: &str) -> Cow<'_, RawValue> {
    if json_flaw(json.as_bytes(), MAX_JSON_DEPTH).is_some() {
        return serde_json::value::to_raw_value(json)
            .map_or(Cow::Borrowed(RawValue::NULL), Cow::Owned);
    }
    serde_json::from_str(json).map_or(Cow::Borrowed(RawValue::NULL), Cow::Borrowed)
}

/// Reactions in their first spelling, and whether there are more.
fn reactions<'a>(folded: &'a Folded, most: &Most) -> (BTreeMap<&'a str, Reaction<'a>>, bool) {
    let mut found = Vec::new();
    for said in folded.reactions.by_name().into_values() {
        let count = said.iter().filter(|(_, said)| said.on).count();
        let first = said.iter().map(|(_, said)| *said);
        if let Some(first) = first.min_by_key(|said| &said.first)
            && count > 0
        {
            found.push((Reverse(count), &first.first, first.key.as_str(), said));
        }
    }
    found.sort_unstable_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
    let more = found.len() > most.reactions;
    let mut bytes = 0;
    let shown = found.into_iter().take(most.reactions);
    let shown = shown.map(|(Reverse(count), _, key, said)| {
        let there = said.into_iter().filter(|(_, said)| said.on);
        let named = there
            .map(|(user, _)| user)
            .take(most.named)
            .take_while(|user| {
                bytes += user.len();
                bytes <= most.names
            });
        let users = named.collect();
        (key, Reaction { count, users })
    });
    (shown.collect(), more)
}

/// Annotations, the last one of each name with its user, and whether there are more.
fn annotations<'a>(
    folded: &'a Folded,
    most: &Most,
) -> (BTreeMap<&'a str, (&'a str, Cow<'a, RawValue>)>, bool) {
    let by_name = folded.annotations.by_name().into_iter();
    let last = by_name.filter_map(|(name, said)| {
        let (user, last) = said.into_iter().max_by_key(|(_, said)| &said.at)?;
        Some((last.json.as_str(), name, user))
    });
    let mut last: Vec<(&str, &str, &str)> = last.collect();
    last.sort_by_key(|(json, name, _)| (json.len(), *name));
    let (all, mut bytes) = (last.len(), 0);
    let shown = last.into_iter().take_while(|(json, name, _)| {
        bytes += json.len() + name.len();
        bytes <= most.annotations
    });
    let shown: BTreeMap<_, _> = shown
        .map(|(json, name, user)| (name, (user, raw(json))))
        .collect();
    let more = shown.len() < all;
    (shown, more)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_older_version_stored_can_be_read() {
        let deep = format!("{}1{}", "[".repeat(20_000), "]".repeat(20_000));
        for (stored, as_text) in [
            ("{ \"a\" : [1.0e3, \"\\ud83d\\udc4b\"] }", false),
            (deep.as_str(), true),
            (r#"{"text":"\ud83d"}"#, true),
            (r#"{"\udc4b\ud83d":1}"#, true),
        ] {
            let shown = raw(stored);
            if as_text {
                assert_eq!(serde_json::from_str::<String>(shown.get()).unwrap(), stored);
            } else {
                assert_eq!(shown.get(), stored);
            }
        }
        assert_eq!(raw("{").get(), "null");
    }
}
