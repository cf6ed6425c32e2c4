//! [`Folded::apply`](super::Folded::apply) as an update of a document that may not exist yet.
//!
//! # Invariants
//! - The effect of a statement is that of its entries, whatever the document already contains. It may be repeated, and
//!   statements about one document may be executed in any order. Every value that it sets depends on a comparison of
//!   places.
//! - Text of clients is used only in `$literal`, or in a path in the form of [`field_name`]: never as an expression.

use mongodb::bson::{Bson, Document as Fields, RawDocumentBuf, doc, raw::RawBson};

use super::{
    Base, Folded,
    document::{self, annotator, date, field_name, number},
    json::Stored,
    slots::{Annotation, Reaction},
    text::Text,
};
use crate::model::RoomId;

/// Greater than every place, since places begin with a hexadecimal digit.
const AFTER_ALL: &str = "~";

/// Bytes of reactions and annotations that may be added to a document before it is rewritten without those that are not
/// kept ([`Slots`](super::slots::Slots)).
pub(super) const MAX_SLACK: i32 = 32 << 10;

/// The fields of a tombstone.
const KEPT: [&str; 15] = [
    "_id",
    "room",
    "id",
    "from",
    "origin",
    "epoch",
    "seq",
    "fp",
    "at",
    "ts",
    "place",
    "reply_to",
    "reply_key",
    "deleted",
    "deleted_at",
];

/// One statement of an `update` command that adds `folded` to the document. With `bounded` it does not match a document
/// that must be rewritten first; it then fails with a duplicate key, as if another worker had just created the
/// document.
pub(super) fn statement(key: &str, room: &RoomId, folded: &Folded, bounded: bool) -> Fields {
    let mut set = Fields::new();
    if let Some(base) = &folded.base {
        said(&mut set, base);
    }
    if let Some(edit) = &folded.edit {
        let place = edit.place.to_string();
        let last = later("edited", &place);
        take(&mut set, &last, "edited", Some(place.into()));
        take(&mut set, &last, "edited_at", Some(date(edit.ts).into()));
        body(&mut set, &last, &edit.body);
    } else if let Some(base) = &folded.base {
        let unedited = doc! { "$lte": ["$edited", Bson::Null] };
        body(
            &mut set,
            &doc! { "$and": [first(base), unedited] },
            &base.said.body,
        );
    }
    if let Some((place, users)) = &folded.mentioned {
        let place = place.to_string();
        let last = later("mentioned", &place);
        take(&mut set, &last, "mentioned", Some(place.into()));
        mentions(&mut set, &last, users);
    } else if let Some(base) = &folded.base {
        let unsaid = doc! { "$lte": ["$mentioned", Bson::Null] };
        mentions(
            &mut set,
            &doc! { "$and": [first(base), unsaid] },
            &base.said.mentions,
        );
    }
    if let Some(deleted) = &folded.deleted {
        let place = deleted.place.to_string();
        let first = doc! { "$lt": [&place, { "$ifNull": ["$deleted", AFTER_ALL] }] };
        take(&mut set, &first, "deleted", Some(place.into()));
        take(
            &mut set,
            &first,
            "deleted_at",
            Some(date(deleted.ts).into()),
        );
    }
    let mut added = Vec::new();
    for (user, name, said) in folded.reactions.iter() {
        let path = format!("reactions.{}.{}", field_name(name), field_name(user));
        added.push(reaction(&mut set, &path, name, said));
    }
    for (user, name, said) in folded.annotations.iter() {
        let path = format!("annotations.{}.{}", field_name(name), annotator(user));
        added.push(annotation(&mut set, &path, said));
    }
    if folded.truncated {
        set.insert("truncated", true);
    }
    // The room is the shard key.
    let mut which = doc! { "_id": key, "room": room.as_str() };
    if !added.is_empty() {
        if bounded {
            which.insert("slack", doc! { "$not": { "$gte": MAX_SLACK } });
        }
        let sum = doc! { "$add": added };
        let slack = doc! { "$add": [{ "$ifNull": ["$slack", 0] }, "$$added"] };
        let changed = doc! { "$cond": [{ "$gt": ["$$added", 0] }, slack, "$slack"] };
        set.insert(
            "slack",
            doc! { "$let": { "vars": { "added": sum }, "in": changed } },
        );
    }
    let kept: Fields = KEPT
        .into_iter()
        .map(|name| (name.to_owned(), format!("${name}").into()))
        .collect();
    let buried = doc! { "$cond": [{ "$gt": ["$deleted", Bson::Null] }, kept, "$$ROOT"] };
    let mut stages = vec![doc! { "$replaceWith": buried }];
    if !set.is_empty() {
        stages.insert(0, doc! { "$set": set });
    }
    doc! { "q": which, "u": stages, "upsert": true }
}

/// Whether a place is later than the one in a field.
fn later(field: &str, place: &str) -> Fields {
    doc! { "$gt": [place, { "$ifNull": [format!("${field}"), ""] }] }
}

/// Whether there is no message yet, or only a later one with the same key.
fn first(base: &Base) -> Fields {
    doc! { "$lt": [base.place.to_string(), { "$ifNull": ["$place", AFTER_ALL] }] }
}

fn said(set: &mut Fields, base: &Base) {
    let (first, place, said) = (first(base), &base.place, &base.said);
    let fields: [(&str, Option<Bson>); 11] = [
        ("id", Some(said.id.as_str().into())),
        ("from", Some(base.from.as_str().into())),
        ("origin", Some(place.origin.as_str().into())),
        ("epoch", Some(place.epoch.as_str().into())),
        ("seq", Some(number(place.seq).into())),
        ("fp", Some(i32::from(said.fingerprint).into())),
        ("at", Some(date(base.ts).into())),
        // Written by an earlier version in place of `at`.
        ("ts", None),
        ("place", Some(place.to_string().into())),
        ("reply_to", said.reply_to.as_deref().map(Bson::from)),
        ("reply_key", said.reply_key.as_deref().map(Bson::from)),
    ];
    for (name, value) in fields {
        take(set, &first, name, value);
    }
}

fn mentions(set: &mut Fields, condition: &Fields, users: &[String]) {
    let users: Vec<Bson> = users.iter().map(Bson::from).collect();
    let users = (!users.is_empty()).then(|| users.into());
    take(set, condition, "mentions", users);
}

fn body(set: &mut Fields, condition: &Fields, body: &str) {
    let Stored { value, text } = Stored::of(body);
    take(set, condition, "body", value.and_then(bson));
    take(set, condition, "body_json", text.map(Bson::from));
    let terms: Vec<Bson> = Text::of(body).terms().into_iter().map(Bson::from).collect();
    let terms = (!terms.is_empty()).then(|| terms.into());
    take(set, condition, "terms", terms);
}

/// Values made here are always well-formed.
fn bson(value: RawBson) -> Option<Bson> {
    Bson::try_from(value).ok()
}

/// Sets a field (or removes it) if the condition is met.
fn take(set: &mut Fields, condition: &Fields, name: &str, value: Option<Bson>) {
    let value = value.map_or("$$REMOVE".into(), literal);
    let kept = format!("${name}");
    set.insert(name, doc! { "$cond": [condition.clone(), value, kept] });
}

/// Adds a user's reaction in the way of [`Slot::join`](super::Slot::join). Returns the number of bytes that this adds.
fn reaction(set: &mut Fields, path: &str, normal: &str, said: &Reaction) -> Bson {
    let known = format!("${path}");
    let known_at = format!("{known}.at");
    let known_first = doc! { "$ifNull": [format!("{known}.first"), &known_at] };
    let (at, first) = (said.at.to_string(), said.first.to_string());
    let later = doc! { "$gt": [&at, &known_at] };
    let earlier = doc! { "$lt": [&first, known_first.clone()] };
    let last = doc! { "at": { "$literal": at }, "on": said.on, "first": known_first };
    let begun = doc! { "$literal": { "first": first, "key": &said.key } };
    let joined = doc! { "$mergeObjects": [
        &known,
        { "$cond": [later, last, {}] },
        { "$cond": [earlier, begun, {}] },
    ] };
    let new = document::reaction(normal, said);
    let bytes = size(path, &new);
    let new = literal(bson(new.into()).unwrap_or(Bson::Null));
    let is_new = is_new(&known_at);
    set.insert(path, doc! { "$cond": [is_new.clone(), new, joined] });
    doc! { "$cond": [is_new, bytes, 0] }.into()
}

/// Sets a user's annotation if it is later than the existing one. Returns the number of bytes that this adds.
fn annotation(set: &mut Fields, path: &str, said: &Annotation) -> Bson {
    let known = format!("${path}");
    let last = later(&format!("{path}.at"), &said.at.to_string());
    let new = document::annotation(said);
    let bytes = size(path, &new);
    let new = literal(bson(new.into()).unwrap_or(Bson::Null));
    // The replaced value makes room. In version 1 another type may be there.
    let is_one = doc! { "$eq": [{ "$type": &known }, "object"] };
    let replaced = doc! { "$cond": [is_one, { "$bsonSize": &known }, 0] };
    let more = doc! { "$max": [0, { "$subtract": [bytes, replaced] }] };
    set.insert(path, doc! { "$cond": [last.clone(), new, known] });
    doc! { "$cond": [last, more, 0] }.into()
}

/// Whether there is nothing at a path.
fn is_new(path: &str) -> Fields {
    doc! { "$lte": [path, Bson::Null] }
}

fn size(path: &str, said: &RawDocumentBuf) -> i32 {
    i32::try_from(path.len() + said.as_bytes().len()).unwrap_or(i32::MAX)
}

fn literal(value: Bson) -> Bson {
    doc! { "$literal": value }.into()
}
