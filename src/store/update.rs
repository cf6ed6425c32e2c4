//! What [`Folded::apply`](super::Folded::apply) does, as an update of a document that may or may not be there.
//!
//! # Invariants
//! - A statement says what some entries say, whatever the document says already: it may be repeated, and statements about one
//!   document may come in any order. Everything it takes over depends on a comparison of places.
//! - What comes from clients stands in `$literal`, or in a path as [`field_name`] writes it: never as an expression.

use mongodb::bson::{Bson, Document as Fields, doc};

use super::{
    Base, Folded,
    document::{field_name, number},
    text::Text,
};
use crate::model::RoomId;

/// After every place: they begin with a hexadecimal digit.
const AFTER_ALL: &str = "~";

/// What a tombstone keeps.
const KEPT: [&str; 14] = [
    "_id",
    "room",
    "id",
    "from",
    "origin",
    "epoch",
    "seq",
    "fp",
    "ts",
    "place",
    "reply_to",
    "reply_key",
    "deleted",
    "deleted_at",
];

/// One statement of an `update` command, which adds `folded` to what the document says.
pub(super) fn statement(key: &str, room: &RoomId, folded: &Folded) -> Fields {
    let mut set = Fields::new();
    if let Some(base) = &folded.base {
        said(&mut set, base);
    }
    if let Some(edit) = &folded.edit {
        let place = edit.place.to_string();
        let last = doc! { "$gt": [&place, { "$ifNull": ["$edited", ""] }] };
        take(&mut set, &last, "edited", Some(place.into()));
        take(
            &mut set,
            &last,
            "edited_at",
            Some(number(edit.place.ts).into()),
        );
        body(&mut set, &last, &edit.body);
    } else if let Some(base) = &folded.base {
        let unedited = doc! { "$lte": ["$edited", Bson::Null] };
        body(
            &mut set,
            &doc! { "$and": [first(base), unedited] },
            &base.said.body,
        );
    }
    if let Some(deleted) = &folded.deleted {
        set.insert(
            "deleted",
            doc! { "$min": ["$deleted", deleted.to_string()] },
        );
        set.insert(
            "deleted_at",
            doc! { "$min": ["$deleted_at", number(deleted.ts)] },
        );
    }
    for (reaction, users) in &folded.reactions {
        for (user, (place, on)) in users {
            let path = format!("reactions.{}.{}", field_name(reaction), field_name(user));
            let said = doc! { "at": place.to_string(), "on": *on };
            newest(&mut set, &path, said);
        }
    }
    for (name, (place, from, json)) in &folded.annotations {
        let path = format!("annotations.{}", field_name(name));
        let said = doc! { "at": place.to_string(), "from": from, "json": json };
        newest(&mut set, &path, said);
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
    doc! {
        // The room is the shard key.
        "q": { "_id": key, "room": room.as_str() },
        "u": stages,
        "upsert": true,
    }
}

/// Whether this is the message, or what is there is another one with the same key, and later.
fn first(base: &Base) -> Fields {
    doc! { "$lt": [base.place.to_string(), { "$ifNull": ["$place", AFTER_ALL] }] }
}

fn said(set: &mut Fields, base: &Base) {
    let (first, place, said) = (first(base), &base.place, &base.said);
    let mentions: Vec<Bson> = said.mentions.iter().map(Bson::from).collect();
    let fields: [(&str, Option<Bson>); 11] = [
        ("id", Some(said.id.as_str().into())),
        ("from", Some(base.from.as_str().into())),
        ("origin", Some(place.origin.as_str().into())),
        ("epoch", Some(place.epoch.as_str().into())),
        ("seq", Some(number(place.seq).into())),
        ("fp", Some(i32::from(said.fingerprint).into())),
        ("ts", Some(number(place.ts).into())),
        ("place", Some(place.to_string().into())),
        ("reply_to", said.reply_to.as_deref().map(Bson::from)),
        ("reply_key", said.reply_key.as_deref().map(Bson::from)),
        ("mentions", (!mentions.is_empty()).then(|| mentions.into())),
    ];
    for (name, value) in fields {
        take(set, &first, name, value);
    }
}

fn body(set: &mut Fields, condition: &Fields, body: &str) {
    let terms: Vec<Bson> = Text::of(body).terms().into_iter().map(Bson::from).collect();
    take(set, condition, "body", Some(body.into()));
    let terms = (!terms.is_empty()).then(|| terms.into());
    take(set, condition, "terms", terms);
}

/// Sets a field (or takes it away) if the condition is met.
fn take(set: &mut Fields, condition: &Fields, name: &str, value: Option<Bson>) {
    let value = value.map_or("$$REMOVE".into(), literal);
    let kept = format!("${name}");
    set.insert(name, doc! { "$cond": [condition.clone(), value, kept] });
}

/// Sets what was said at a path, if that is later than what is there.
fn newest(set: &mut Fields, path: &str, said: Fields) {
    let at = said.get("at").cloned().unwrap_or(Bson::Null);
    let known = doc! { "$ifNull": [format!("${path}.at"), ""] };
    let value = literal(said.into());
    set.insert(
        path,
        doc! { "$cond": [{ "$gt": [at, known] }, value, format!("${path}")] },
    );
}

fn literal(value: Bson) -> Bson {
    doc! { "$literal": value }.into()
}
