//! Documents of the collection `messages`: how they are written first, and how they are read.
//!
//! ```text
//! {_id: "<room>/<user>/<id>", room, id, from, origin, epoch, seq, fp, ts, place, body, reply_to?, reply_key?, mentions?, terms?,
//!  edited?, edited_at?, deleted?, deleted_at?, reactions?: {<key>: {<user>: {at, on}}}, annotations?: {<name>: {at, from, json}}}
//! ```
//! - `place` orders a room. `edited`, `deleted` and every `at` are places too: updates compare them as text.
//! - `body` is JSON text, that of the last edit where there was one: what an edit replaced is not kept.
//! - A *stub* is what is known of a message before the message is: it has `_id`, `room` and what was said about it, and no
//!   `place`; so no page and no search finds it.
//! - A *tombstone* is what is left of a deleted message: where it stood, who said it, what it answered, and `deleted`.
//! - Reactions, users and names of annotations are names of fields here, see [`field_name`].

use std::{borrow::Cow, fmt::Write};

use mongodb::bson::{
    RawArrayBuf, RawDocument, RawDocumentBuf,
    raw::{CString, RawBsonRef, cstr},
};

use super::{Base, Document, Edit, Folded, Said, StoreError, text::Text};
use crate::model::{Place, RoomId, header_unescape};

/// The document of a message that was not known before.
pub(super) fn new(key: &str, room: &RoomId, folded: &Folded, base: &Base) -> RawDocumentBuf {
    let mut document = RawDocumentBuf::new();
    document.append(cstr!("_id"), key);
    document.append(cstr!("room"), room.as_str());
    let Base { place, from, said } = base;
    document.append(cstr!("id"), said.id.as_str());
    document.append(cstr!("from"), from.as_str());
    document.append(cstr!("origin"), place.origin.as_str());
    document.append(cstr!("epoch"), place.epoch.as_str());
    document.append(cstr!("seq"), number(place.seq));
    document.append(cstr!("fp"), i32::from(said.fingerprint));
    document.append(cstr!("ts"), number(place.ts));
    document.append(cstr!("place"), place.to_string());
    if let Some(reference) = &said.reply_to {
        document.append(cstr!("reply_to"), reference.as_str());
    }
    if let Some(key) = &said.reply_key {
        document.append(cstr!("reply_key"), key.as_str());
    }
    if let Some(deleted) = &folded.deleted {
        document.append(cstr!("deleted"), deleted.to_string());
        document.append(cstr!("deleted_at"), number(deleted.ts));
        return document;
    }
    if !said.mentions.is_empty() {
        let mentions: RawArrayBuf = said.mentions.iter().map(String::as_str).collect();
        document.append(cstr!("mentions"), mentions);
    }
    let body = folded.body().unwrap_or_default();
    document.append(cstr!("body"), body);
    let text = Text::of(body);
    let terms = text.terms();
    if !terms.is_empty() {
        let terms: RawArrayBuf = terms.into_iter().collect();
        document.append(cstr!("terms"), terms);
    }
    if let Some(edit) = &folded.edit {
        document.append(cstr!("edited"), edit.place.to_string());
        document.append(cstr!("edited_at"), number(edit.place.ts));
    }
    if !folded.reactions.is_empty() {
        let mut reactions = RawDocumentBuf::new();
        for (key, users) in &folded.reactions {
            let mut said = RawDocumentBuf::new();
            for (user, (place, on)) in users {
                let mut one = RawDocumentBuf::new();
                one.append(cstr!("at"), place.to_string());
                one.append(cstr!("on"), *on);
                append(&mut said, user, one);
            }
            append(&mut reactions, key, said);
        }
        document.append(cstr!("reactions"), reactions);
    }
    if !folded.annotations.is_empty() {
        let mut annotations = RawDocumentBuf::new();
        for (name, (place, from, json)) in &folded.annotations {
            let mut one = RawDocumentBuf::new();
            one.append(cstr!("at"), place.to_string());
            one.append(cstr!("from"), from.as_str());
            one.append(cstr!("json"), json.as_str());
            append(&mut annotations, name, one);
        }
        document.append(cstr!("annotations"), annotations);
    }
    document
}

fn append(document: &mut RawDocumentBuf, name: &str, value: RawDocumentBuf) {
    let name = field_name(name).into_owned();
    document.append(
        CString::try_from(name).expect("a field name has no NUL"),
        value,
    );
}

/// A number that is a 64-bit integer in MongoDB. Sequences and times do not get that large.
pub(super) fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A text as the name of a field in a dotted path: `.`, `$`, NUL and `=` as `=XX`, nothing at all as `=`. Reversible, and
/// readable where the text is.
pub(super) fn field_name(text: &str) -> Cow<'_, str> {
    if text.is_empty() {
        return Cow::Borrowed("=");
    }
    let special = |c: char| matches!(c, '.' | '$' | '\0' | '=');
    if !text.contains(special) {
        return Cow::Borrowed(text);
    }
    let mut name = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if special(c) {
            // Writing to a String can't fail.
            let _infallible = write!(name, "={:02X}", u32::from(c));
        } else {
            name.push(c);
        }
    }
    Cow::Owned(name)
}

fn field_text(name: &str) -> String {
    match name {
        "=" => String::new(),
        name => header_unescape(name).into_owned(),
    }
}

/// Reads a document.
pub(super) fn read(document: &RawDocument) -> Result<Document, StoreError> {
    let key = document.get_str("_id").unwrap_or_default();
    read_fields(key, document).map_err(|problem| StoreError::Document {
        key: key.to_owned(),
        problem,
    })
}

fn read_fields(key: &str, document: &RawDocument) -> Result<Document, String> {
    let problem = |error: mongodb::bson::error::Error| error.to_string();
    let mut folded = Folded::default();
    let (mut base, mut said) = (None, Said::default());
    let (mut room, mut from, mut edited) = (None, String::new(), None);
    for field in document {
        let (name, value) = field.map_err(problem)?;
        let text = || value.as_str().ok_or_else(|| format!("{name} is no text"));
        let object = || {
            let object = value.as_document();
            object.ok_or_else(|| format!("{name} is no object"))
        };
        match name.as_str() {
            "room" => room = Some(RoomId::parse(text()?).map_err(|error| error.to_string())?),
            "id" => text()?.clone_into(&mut said.id),
            "from" => text()?.clone_into(&mut from),
            "fp" => {
                let number = value.as_i32().and_then(|number| u16::try_from(number).ok());
                said.fingerprint = number.ok_or("fp is no fingerprint")?;
            }
            "place" => base = Some(place(text()?)?),
            "body" => text()?.clone_into(&mut said.body),
            "reply_to" => said.reply_to = Some(text()?.to_owned()),
            "reply_key" => said.reply_key = Some(text()?.to_owned()),
            "mentions" => {
                for user in value.as_array().ok_or("mentions are no array")? {
                    let user = user.map_err(problem)?;
                    said.mentions
                        .push(user.as_str().ok_or("a mention is no text")?.to_owned());
                }
            }
            "edited" => edited = Some(place(text()?)?),
            "deleted" => folded.deleted = Some(place(text()?)?),
            "reactions" => {
                for reaction in object()? {
                    let (key, users) = reaction.map_err(problem)?;
                    let users = users.as_document().ok_or("a reaction is no object")?;
                    let known = folded
                        .reactions
                        .entry(field_text(key.as_str()))
                        .or_default();
                    for user in users {
                        let (user, said) = user.map_err(problem)?;
                        let said = said.as_document().ok_or("a reaction is no object")?;
                        let at = place(said.get_str("at").map_err(problem)?)?;
                        let on = said.get_bool("on").map_err(problem)?;
                        known.insert(field_text(user.as_str()), (at, on));
                    }
                }
            }
            "annotations" => {
                for annotation in object()? {
                    let (name, said) = annotation.map_err(problem)?;
                    let said = said.as_document().ok_or("an annotation is no object")?;
                    let get = |name| said.get_str(name).map_err(problem);
                    let annotation = (
                        place(get("at")?)?,
                        get("from")?.to_owned(),
                        get("json")?.to_owned(),
                    );
                    folded
                        .annotations
                        .insert(field_text(name.as_str()), annotation);
                }
            }
            _ => {}
        }
    }
    folded.edit = edited.map(|place| Edit {
        place,
        body: said.body.clone(),
    });
    folded.base = base.map(|place| Base { place, from, said });
    Ok(Document {
        key: key.to_owned(),
        room: room.ok_or("it has no room")?,
        folded,
    })
}

/// The place of a document of which nothing else was asked for.
pub(super) fn read_place(document: &RawDocument) -> Result<Place, StoreError> {
    let text = document
        .get("place")
        .ok()
        .flatten()
        .and_then(RawBsonRef::as_str);
    place(text.unwrap_or_default()).map_err(|problem| StoreError::Document {
        key: String::new(),
        problem,
    })
}

fn place(text: &str) -> Result<Place, String> {
    text.parse::<Place>().map_err(|error| error.to_string())
}
