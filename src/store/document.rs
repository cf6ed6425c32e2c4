//! Documents of the collection `messages`: how they are first written, and how they are read.
//!
//! ```text
//! {_id: "<room>/<user>/<id>", room, id, from, origin, epoch, seq, fp, at, place, reply_to?, reply_key?, mentions?, mentioned?,
//!  body?, body_json?, terms?, edited?, edited_at?, deleted?, deleted_at?, reactions?: {<reaction>: {<user>: {at, on, first?, key?}}},
//!  annotations?: {<name>: {<user>: {at, value?, json?}}}, truncated?, slack?}
//! ```
//! - `place` orders a room. `edited`, `mentioned`, `deleted`, and every `at` and `first` of a reaction or annotation,
//!   are places too: updates compare them as text. `at`, `edited_at` and `deleted_at` of the message are dates, as they
//!   are shown: those of the places, or in an imported message the original ones.
//! - `body` is the value of the body's JSON, after the last edit if there was one; replaced bodies are not kept.
//!   `body_json` is the text, if `body` does not give it back exactly, see [`json`]. Annotations likewise.
//! - A reaction is named by its normal form. `first` and `key` are the place and spelling of its first use, if they
//!   differ from `at` or from the normal form.
//! - A *stub* holds what is known of a message before the message itself is known: `_id`, `room` and its changes, but
//!   no `place`. So no page and no search finds it.
//! - A *tombstone* is the rest of a deleted message: its place, its sender, what it answered, and `deleted`.
//! - Reactions, users and names of annotations are field names here, see [`field_name`] and [`annotator`].
//! - A document may hold more reactions and annotations than are kept. Readers leave out the surplus. `slack`,
//!   approximately its bytes, says when the document must be rewritten, see [`renew`](super::renew).
//!
//! # Before version 2
//! Documents had the milliseconds `ts`, `edited_at` and `deleted_at`, the JSON text as `body`, reactions as they were
//! written, and annotations `{<name>: {at, from, json}}`. They are read and updated in that form until they are
//! rewritten.

use std::{borrow::Cow, fmt::Write};

use mongodb::bson::{
    DateTime, RawArrayBuf, RawDocument, RawDocumentBuf,
    raw::{CStr, CString, RawBsonRef, cstr},
};

use super::{
    Base, Deletion, Document, Edit, Folded, Said, StoreError,
    json::{self, Stored},
    slots::{Annotation, Reaction},
    text::Text,
};
use crate::model::{Place, RoomId, header_unescape, normal_reaction};

/// An annotation with more bytes than this is not stored as both value and text.
const MAX_ANNOTATION: usize = 9 << 10;

/// The document for a message in a known state.
pub(super) fn new(key: &str, room: &RoomId, folded: &Folded) -> RawDocumentBuf {
    let mut document = RawDocumentBuf::new();
    document.append(cstr!("_id"), key);
    document.append(cstr!("room"), room.as_str());
    if let Some(Base {
        place,
        ts,
        from,
        said,
    }) = &folded.base
    {
        document.append(cstr!("id"), said.id.as_str());
        document.append(cstr!("from"), from.as_str());
        document.append(cstr!("origin"), place.origin.as_str());
        document.append(cstr!("epoch"), place.epoch.as_str());
        document.append(cstr!("seq"), number(place.seq));
        document.append(cstr!("fp"), i32::from(said.fingerprint));
        document.append(cstr!("at"), date(*ts));
        document.append(cstr!("place"), place.to_string());
        if let Some(reference) = &said.reply_to {
            document.append(cstr!("reply_to"), reference.as_str());
        }
        if let Some(key) = &said.reply_key {
            document.append(cstr!("reply_key"), key.as_str());
        }
    }
    if let Some(deleted) = &folded.deleted {
        document.append(cstr!("deleted"), deleted.place.to_string());
        document.append(cstr!("deleted_at"), date(deleted.ts));
        return document;
    }
    if !folded.mentions().is_empty() {
        let mentions: RawArrayBuf = folded.mentions().iter().map(String::as_str).collect();
        document.append(cstr!("mentions"), mentions);
    }
    if let Some((place, _)) = &folded.mentioned {
        document.append(cstr!("mentioned"), place.to_string());
    }
    if let Some(body) = folded.body() {
        append_json(&mut document, cstr!("body"), cstr!("body_json"), body);
        let text = Text::of(body);
        let terms = text.terms();
        if !terms.is_empty() {
            let terms: RawArrayBuf = terms.into_iter().collect();
            document.append(cstr!("terms"), terms);
        }
    }
    if let Some(edit) = &folded.edit {
        document.append(cstr!("edited"), edit.place.to_string());
        document.append(cstr!("edited_at"), date(edit.ts));
    }
    append_slots(
        &mut document,
        cstr!("reactions"),
        folded.reactions.by_name(),
        field_name,
        reaction,
    );
    append_slots(
        &mut document,
        cstr!("annotations"),
        folded.annotations.by_name(),
        annotator,
        |_name, said| annotation(said),
    );
    if folded.truncated {
        document.append(cstr!("truncated"), true);
    }
    document
}

/// A reaction with the given normal form.
pub(super) fn reaction(normal: &str, said: &Reaction) -> RawDocumentBuf {
    let mut one = RawDocumentBuf::new();
    one.append(cstr!("at"), said.at.to_string());
    one.append(cstr!("on"), said.on);
    if said.first != said.at {
        one.append(cstr!("first"), said.first.to_string());
    }
    if said.key != normal {
        one.append(cstr!("key"), said.key.as_str());
    }
    one
}

pub(super) fn annotation(said: &Annotation) -> RawDocumentBuf {
    let mut one = RawDocumentBuf::new();
    one.append(cstr!("at"), said.at.to_string());
    append_json(&mut one, cstr!("value"), cstr!("json"), &said.json);
    if one.as_bytes().len() <= MAX_ANNOTATION || !matches!(one.get("json"), Ok(Some(_))) {
        return one;
    }
    // Value and text together are too large; the text is sufficient.
    let mut one = RawDocumentBuf::new();
    one.append(cstr!("at"), said.at.to_string());
    one.append(cstr!("json"), said.json.as_str());
    one
}

fn append_slots<T>(
    document: &mut RawDocumentBuf,
    field: &'static CStr,
    slots: std::collections::BTreeMap<&str, Vec<(&str, &T)>>,
    user_field: fn(&str) -> Cow<'_, str>,
    one: impl Fn(&str, &T) -> RawDocumentBuf,
) {
    if slots.is_empty() {
        return;
    }
    let mut by_name = RawDocumentBuf::new();
    for (name, users) in slots {
        let mut by_user = RawDocumentBuf::new();
        for (user, said) in users {
            append(&mut by_user, user_field(user), one(name, said));
        }
        append(&mut by_name, field_name(name), by_user);
    }
    document.append(field, by_name);
}

fn append_json(document: &mut RawDocumentBuf, value: &CStr, text: &CStr, json: &str) {
    let stored = Stored::of(json);
    if let Some(stored) = stored.value {
        document.append(value, stored);
    }
    if let Some(stored) = stored.text {
        document.append(text, stored);
    }
}

/// Milliseconds since 1970 as a date.
pub(super) fn date(ts: u64) -> DateTime {
    DateTime::from_millis(number(ts))
}

fn append(document: &mut RawDocumentBuf, field: Cow<'_, str>, value: RawDocumentBuf) {
    document.append(
        CString::try_from(field.into_owned()).expect("a field name has no NUL"),
        value,
    );
}

/// A number as MongoDB's 64-bit integer. Sequences and times never exceed its range.
pub(super) fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A text as a field name in a dotted path: `.`, `$`, NUL and `=` become `=XX`, the empty text becomes `=`. Reversible,
/// and readable if the text is.
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

/// A user as a field name in an annotation. Names that version 1 uses there itself are escaped.
pub(super) fn annotator(user: &str) -> Cow<'_, str> {
    match user {
        "at" => Cow::Borrowed("=61t"),
        "from" => Cow::Borrowed("=66rom"),
        "json" => Cow::Borrowed("=6Ason"),
        user => field_name(user),
    }
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
    let mut folded = Folded::default();
    let (mut base, mut said) = (None, Said::default());
    let (mut room, mut from) = (None, String::new());
    let (mut edited, mut deleted) = (None, None);
    let (mut body, mut body_json) = (None, None);
    let (mut mentioned, mut truncated) = (None, false);
    let mut texts = Texts::default();
    // The times that are shown.
    let (mut at, mut edited_at, mut deleted_at) = (None, None, None);
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
            "ts" => texts.said = true,
            "at" => at = shown(value),
            "place" => base = Some(place(text()?)?),
            "body" => body = Some(value),
            "body_json" => body_json = Some(text()?),
            "reply_to" => said.reply_to = Some(text()?.to_owned()),
            "reply_key" => said.reply_key = Some(text()?.to_owned()),
            "mentions" => {
                for user in value.as_array().ok_or("mentions are no array")? {
                    let user = user.map_err(problem)?;
                    said.mentions
                        .push(user.as_str().ok_or("a mention is no text")?.to_owned());
                }
            }
            "mentioned" => mentioned = Some(place(text()?)?),
            "edited" => edited = Some(place(text()?)?),
            "edited_at" => {
                edited_at = shown(value);
                texts.edited = edited_at.is_none();
            }
            "deleted" => deleted = Some(place(text()?)?),
            "deleted_at" => deleted_at = shown(value),
            "reactions" => read_reactions(&mut folded, object()?)?,
            "annotations" => read_annotations(&mut folded, object()?)?,
            "truncated" => truncated = true,
            _ => {}
        }
    }
    // In version 1 a string was the JSON text itself. Any other type was written by a version that stores values.
    let is_text = if edited.is_some() {
        texts.edited
    } else {
        texts.said
    };
    said.body = match (body, body_json) {
        (Some(RawBsonRef::String(text)), _) if is_text => text.to_owned(),
        (_, Some(text)) => text.to_owned(),
        (Some(value), None) => json::write(value),
        (None, None) => String::new(),
    };
    folded.truncated |= truncated;
    folded.deleted = deleted.map(|place| Deletion {
        ts: deleted_at.unwrap_or(place.ts),
        place,
    });
    folded.edit = edited.map(|place| Edit {
        ts: edited_at.unwrap_or(place.ts),
        place,
        body: said.body.clone(),
    });
    folded.mentioned = mentioned.map(|place| (place, said.mentions.clone()));
    folded.base = base.map(|place| Base {
        ts: at.unwrap_or(place.ts),
        place,
        from,
        said,
    });
    Ok(Document {
        key: key.to_owned(),
        room: room.ok_or("it has no room")?,
        folded,
    })
}

/// The milliseconds of a date. `None` for the numbers of version 1, which are the times of the places.
fn shown(value: RawBsonRef<'_>) -> Option<u64> {
    u64::try_from(value.as_datetime()?.timestamp_millis()).ok()
}

/// Whether a string body is a JSON text: true if the message or the edit was written with numbers for times.
#[derive(Default)]
struct Texts {
    said: bool,
    edited: bool,
}

fn read_reactions(folded: &mut Folded, reactions: &RawDocument) -> Result<(), String> {
    for reaction in reactions {
        let (name, users) = reaction.map_err(problem)?;
        let name = field_text(name.as_str());
        let normal = normal_reaction(&name);
        for user in users.as_document().ok_or("a reaction is no object")? {
            let (user, said) = user.map_err(problem)?;
            let said = said.as_document().ok_or("a reaction is no object")?;
            let at = place(said.get_str("at").map_err(problem)?)?;
            let first = optional(said, "first").map(place).transpose()?;
            let one = Reaction {
                on: said.get_bool("on").map_err(problem)?,
                first: first.unwrap_or_else(|| at.clone()),
                key: optional(said, "key").unwrap_or(&name).to_owned(),
                at,
            };
            let user = field_text(user.as_str());
            folded.truncated |= folded.reactions.add(&user, &normal, one);
        }
    }
    Ok(())
}

fn read_annotations(folded: &mut Folded, annotations: &RawDocument) -> Result<(), String> {
    for annotation in annotations {
        let (name, users) = annotation.map_err(problem)?;
        let name = field_text(name.as_str());
        let users = users.as_document().ok_or("an annotation is no object")?;
        // Version 1: each name had one user.
        if let (Some(at), Some(json)) = (optional(users, "at"), optional(users, "json")) {
            let user = optional(users, "from").unwrap_or_default();
            let one = Annotation {
                at: place(at)?,
                json: json.to_owned(),
            };
            folded.truncated |= folded.annotations.add(user, &name, one);
        }
        for user in users {
            let (user, said) = user.map_err(problem)?;
            let Some(said) = said.as_document() else {
                continue;
            };
            let at = place(said.get_str("at").map_err(problem)?)?;
            let json = match (optional(said, "json"), said.get("value").map_err(problem)?) {
                (Some(json), _) => json.to_owned(),
                (None, Some(value)) => json::write(value),
                (None, None) => return Err("an annotation has no value".to_owned()),
            };
            let user = field_text(user.as_str());
            let one = Annotation { at, json };
            folded.truncated |= folded.annotations.add(&user, &name, one);
        }
    }
    Ok(())
}

/// Whether a document must be rewritten because an earlier version wrote it, or a part of it.
pub(super) fn is_old(document: &RawDocument) -> bool {
    let get = |name: &str| document.get(name).ok().flatten();
    let number = |name: &str| get(name).is_some_and(|at| at.as_datetime().is_none());
    let fields = |name: &str| {
        let fields = get(name).and_then(RawBsonRef::as_document);
        fields.into_iter().flatten().flatten()
    };
    get("ts").is_some()
        || number("edited_at")
        || number("deleted_at")
        || fields("reactions").any(|(name, _)| {
            let name = field_text(name.as_str());
            normal_reaction(&name) != name
        })
        || fields("annotations").any(|(_, said)| {
            let said = said.as_document();
            said.is_some_and(|said| optional(said, "at").is_some())
        })
}

/// Whether a field is written by this or an earlier version. Other fields were added by people.
pub(super) fn is_own(name: &str) -> bool {
    const OWN: &str = " _id room id from origin epoch seq fp at ts place reply_to reply_key mentions mentioned body body_json \
        terms edited edited_at deleted deleted_at reactions annotations truncated slack ";
    OWN.split_whitespace().any(|own| own == name)
}

fn optional<'d>(document: &'d RawDocument, name: &str) -> Option<&'d str> {
    document
        .get(name)
        .ok()
        .flatten()
        .and_then(RawBsonRef::as_str)
}

#[expect(clippy::needless_pass_by_value, reason = "it stands in `map_err`")]
fn problem(error: mongodb::bson::error::Error) -> String {
    error.to_string()
}

/// The place in a document of which only that was read.
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
