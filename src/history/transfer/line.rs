//! One line of an import or export: a message with what was said about it, or one entry of a room's log.
//!
//! ```text
//! {"room","from","id","ts","body","reply_to"?,"mentions"?,"edited_at"?,"deleted_at"?,
//!  "reactions"?: {<reaction>: {"count","users"}}, "annotations"?: {<name>: <value>}, "annotated_by"?: {<name>: <user>}}
//! {"room","from","ts","kind","target","id"?,"body"?,"mentions"?}
//! ```
//!
//! The first form is that of a page. What it says about the message becomes changes with ids of their own, always the
//! same ones for the same line, so that a repeated import finds them.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, de::IgnoredAny};
use serde_json::value::{RawValue, to_raw_value};
use sha2::{Digest as _, Sha256};

use crate::{
    bus::{Outgoing, Record, Stored, message_key},
    model::{Epoch, Fingerprint, Kind, MAX_JSON_DEPTH, MAX_USER, Region, RoomId, json_flaw},
    protocol::{Draft, Publication},
    store::Entry,
    subject::FROM_NATTER,
};

use super::super::entry::entry;

/// The limits of a line.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    /// Maximum bytes of a body.
    pub(super) body: u64,
    /// The current time, in ms since 1970. Nothing is later.
    pub(super) now: u64,
    /// The room of lines without one.
    pub(super) room: Option<RoomId>,
}

/// A line that was checked.
#[derive(Debug)]
pub(super) struct Line {
    /// The message or the change.
    pub(super) first: Item,
    /// What a message line says about its message.
    pub(super) rest: Vec<Item>,
}

/// One entry of a room's log.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) publication: Publication,
    pub(super) from: String,
    pub(super) id: String,
    /// When it was sent, in ms since 1970.
    pub(super) ts: u64,
}

/// The fields of a line. Those that a page has besides are accepted and have no effect.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields<'a> {
    room: Option<String>,
    from: String,
    id: Option<String>,
    ts: u64,
    #[serde(borrow, default, deserialize_with = "present")]
    body: Option<&'a RawValue>,
    kind: Option<String>,
    target: Option<String>,
    reply_to: Option<String>,
    mentions: Option<Vec<String>>,
    edited_at: Option<u64>,
    deleted_at: Option<u64>,
    #[serde(default)]
    reactions: BTreeMap<String, Users>,
    #[serde(borrow, default)]
    annotations: BTreeMap<String, &'a RawValue>,
    #[serde(default)]
    annotated_by: BTreeMap<String, String>,
    #[serde(rename = "cursor")]
    _cursor: Option<IgnoredAny>,
    #[serde(rename = "truncated")]
    _truncated: Option<IgnoredAny>,
    #[serde(rename = "replies")]
    _replies: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Users {
    users: Vec<String>,
    #[serde(rename = "count")]
    _count: Option<IgnoredAny>,
}

/// A field that is there, also if it is `null`.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// Checks one line.
///
/// # Errors
/// What is wrong with it.
pub(super) fn parse(text: &str, rules: &Rules) -> Result<Line, String> {
    let fields: Fields<'_> = serde_json::from_str(text).map_err(|error| {
        // There is only one line, so its number says nothing.
        let text = error.to_string();
        let end = text.find(" at line ").unwrap_or(text.len());
        text.get(..end).unwrap_or(&text).to_owned()
    })?;
    let room = match (&fields.room, &rules.room) {
        (Some(room), _) => RoomId::parse(room).map_err(|error| error.to_string())?,
        (None, Some(room)) => room.clone(),
        (None, None) => return Err("room is missing, and --room was not given".to_owned()),
    };
    user("from", &fields.from)?;
    for (name, ts) in [
        ("ts", Some(fields.ts)),
        ("edited_at", fields.edited_at),
        ("deleted_at", fields.deleted_at),
    ] {
        if let Some(ts) = ts.filter(|ts| *ts == 0 || *ts > rules.now) {
            return Err(format!(
                "{name} = {ts}: must be milliseconds since 1970, and not in the future"
            ));
        }
    }
    if let Some(body) = fields.body {
        check_body(body, rules)?;
    }
    let is_change = fields.kind.as_deref().is_some_and(|kind| kind != "message");
    let has_more = fields.edited_at.is_some()
        || fields.deleted_at.is_some()
        || !fields.reactions.is_empty()
        || !fields.annotations.is_empty();
    if is_change && has_more {
        return Err(
            "only a message has edited_at, deleted_at, reactions or annotations".to_owned(),
        );
    }
    let body = match (fields.body, fields.deleted_at) {
        // A tombstone.
        (None, Some(_)) => Some(RawValue::NULL),
        (body, _) => body,
    };
    let id = match (&fields.id, is_change) {
        (Some(id), _) => id.clone(),
        (None, true) => {
            let text = body.map_or("", RawValue::get);
            let kind = fields.kind.as_deref().unwrap_or_default();
            let target = fields.target.as_deref().unwrap_or_default();
            made_id(&[kind, &fields.from, target, &fields.ts.to_string(), text])
        }
        (None, false) => return Err("id is missing".to_owned()),
    };
    let publication = Publication::new(
        room,
        Draft {
            id: Some(&id),
            kind: fields.kind.as_deref(),
            body,
            target: fields.target.as_deref(),
            reply_to: fields.reply_to.as_deref(),
            mentions: fields.mentions.clone(),
        },
    )
    .map_err(|refusal| refusal.message)?;
    if publication.kind.pins().is_some() {
        return Err("pins are not imported: pin the message when it is there".to_owned());
    }
    let first = Item {
        publication,
        from: fields.from.clone(),
        id,
        ts: fields.ts,
    };
    let rest = rest(&fields, &first)?;
    Ok(Line { first, rest })
}

fn user(name: &str, user: &str) -> Result<(), String> {
    match user.len() {
        0 => Err(format!("{name} is empty")),
        bytes if bytes > MAX_USER => {
            Err(format!("{name} has {bytes} bytes, the limit is {MAX_USER}"))
        }
        _ => Ok(()),
    }
}

fn check_body(body: &RawValue, rules: &Rules) -> Result<(), String> {
    let (bytes, most) = (body.get().len() as u64, rules.body);
    if bytes > most {
        return Err(format!("body has {bytes} bytes, limits.body is {most}"));
    }
    match json_flaw(body.get().as_bytes(), MAX_JSON_DEPTH) {
        Some(flaw) => Err(format!("body {flaw}")),
        None => Ok(()),
    }
}

/// What a message line says about its message.
fn rest(fields: &Fields<'_>, message: &Item) -> Result<Vec<Item>, String> {
    let target = format!("{}/{}", message.from, message.id);
    let change = |kind: Kind, from: &str, ts: u64, body: Option<&RawValue>| {
        let text = body.map_or("", RawValue::get);
        let id = made_id(&[kind.as_str(), from, &target, &ts.to_string(), text]);
        let draft = Draft {
            id: Some(&id),
            kind: Some(kind.as_str()),
            body,
            target: Some(&target),
            ..Draft::default()
        };
        let room = message.publication.room.clone();
        let publication = Publication::new(room, draft).map_err(|refusal| refusal.message)?;
        Ok::<Item, String>(Item {
            publication,
            from: from.to_owned(),
            id,
            ts,
        })
    };
    let mut rest = Vec::new();
    if let Some(at) = fields.edited_at {
        let body = Some(&*message.publication.body);
        rest.push(change(Kind::Edit, &message.from, at, body)?);
    }
    if let Some(at) = fields.deleted_at {
        rest.push(change(Kind::Delete, &message.from, at, None)?);
    }
    let json = |error: serde_json::Error| error.to_string();
    for (key, Users { users, .. }) in &fields.reactions {
        let body = to_raw_value(key).map_err(json)?;
        for from in users {
            user("a user in reactions", from)?;
            rest.push(change(Kind::Reaction, from, message.ts, Some(&body))?);
        }
    }
    for (name, value) in &fields.annotations {
        let body = to_raw_value(&BTreeMap::from([(name, value)])).map_err(json)?;
        let by = fields.annotated_by.get(name);
        let by = by.map_or(FROM_NATTER, String::as_str);
        user("a user in annotated_by", by)?;
        rest.push(change(Kind::Annotation, by, message.ts, Some(&body))?);
    }
    Ok(rest)
}

/// The id of a change whose line has none.
fn made_id(parts: &[&str]) -> String {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update(part);
        digest.update([0]);
    }
    let digest = digest.finalize();
    let bytes = digest.iter().take(12);
    std::iter::once("i".to_owned())
        .chain(bytes.map(|byte| format!("{byte:02x}")))
        .collect()
}

impl Line {
    /// The entries, the message first.
    pub(super) fn items(&self) -> impl Iterator<Item = &Item> {
        std::iter::once(&self.first).chain(&self.rest)
    }

    pub(super) fn room(&self) -> &RoomId {
        &self.first.publication.room
    }
}

impl Item {
    pub(super) fn key(&self) -> String {
        message_key(self.publication.room.as_str(), &self.from, &self.id)
    }

    pub(super) fn is_message(&self) -> bool {
        self.publication.kind == Kind::Message
    }

    /// As it is published. It has its original time, and the rights of the operator.
    pub(super) fn outgoing(&self) -> Outgoing<'_> {
        Outgoing {
            publication: &self.publication,
            user: &self.from,
            id: &self.id,
            after: None,
            original_ts: Some(self.ts),
        }
    }

    /// As history keeps it, at a place that has its original time.
    pub(super) fn entry(&self, origin: &Region, epoch: Epoch, seq: u64) -> Entry {
        let Publication {
            room,
            kind,
            body,
            target,
            reply_to,
            mentions,
            ..
        } = &self.publication;
        let by_other = |(_, reference): &(_, crate::model::Reference)| !reference.is_by(&self.from);
        let record = Record {
            seq,
            previous: None,
            class: kind.class(),
            ts: self.ts,
            original_ts: None,
            fingerprint: Fingerprint::of(self.key().as_bytes()),
            id: self.id.clone(),
            from: self.from.clone(),
            kind: (!self.is_message()).then_some(kind.as_str()),
            target: target.as_ref().map(|(text, _)| text.clone()),
            moderated: target.as_ref().is_some_and(by_other),
            reply_to: reply_to.clone(),
            mentions: mentions.json().map(str::to_owned),
            after: None,
            body: Bytes::copy_from_slice(body.get().as_bytes()),
        };
        let room = room.clone();
        entry(Stored { room, record }, origin, epoch)
    }
}

/// An entry of a log, as an export shows it.
#[derive(Serialize)]
struct Shown<'a> {
    room: &'a RoomId,
    id: &'a str,
    from: &'a str,
    ts: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<&'a str>,
    body: &'a RawValue,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply_to: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mentions: Option<&'a RawValue>,
}

/// The line of an entry of a log.
pub(super) fn of_record(room: &RoomId, record: &Record) -> serde_json::Result<String> {
    let raw = |text: &str| RawValue::from_string(text.to_owned());
    let body = raw(&String::from_utf8_lossy(&record.body))?;
    let mentions = record.mentions.as_deref().map(raw).transpose()?;
    let json = serde_json::to_string(&Shown {
        room,
        id: &record.id,
        from: &record.from,
        ts: record.shown_ts(),
        kind: record.kind,
        target: record.target.as_deref(),
        body: &body,
        reply_to: record.reply_to.as_deref(),
        mentions: mentions.as_deref(),
    })?;
    Ok(on_one_line(&json))
}

/// JSON text on one line. Line breaks in it are white space between tokens: inside a string they are escaped.
pub(super) fn on_one_line(json: &str) -> String {
    json.replace(['\r', '\n'], "")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::super::show;
    use super::*;
    use crate::store::{Folded, What};

    fn rules() -> Rules {
        Rules {
            body: 1 << 20,
            now: 2_000,
            room: None,
        }
    }

    fn place() -> (Region, Epoch) {
        let (origin, epoch) = (Region::parse("a"), Epoch::parse("i1"));
        (origin.unwrap(), epoch.unwrap())
    }

    /// The line that an export has of what a line imports.
    fn exported(text: &str) -> String {
        let line = parse(text, &rules()).unwrap();
        let (origin, epoch) = place();
        let mut folded = Folded::default();
        for item in line.items() {
            let entry = item.entry(&origin, epoch, 1);
            assert!(!matches!(entry.what, What::Nothing(_)), "{entry:?}");
            folded.apply(&entry);
        }
        let base = folded.base.as_ref().unwrap();
        let json = show::line(line.room(), base, &folded).unwrap();
        on_one_line(json.get())
    }

    fn users() -> impl Strategy<Value = Vec<String>> {
        prop::collection::btree_set("[a-c]|\\PC{1,3}|[$./ ]{1,2}", 1..5)
            .prop_map(|users| users.into_iter().collect())
    }

    /// A message line in the form and order of an export.
    fn lines() -> impl Strategy<Value = String> {
        let body = prop_oneof![
            Just("null".to_owned()),
            Just("{ \"a\" : 1.0, \"a\" : [-0, 1e2] }".to_owned()),
            "\\PC{0,20}".prop_map(|text| serde_json::to_string(&text).unwrap()),
        ];
        let reactions = prop::collection::btree_map("👍|❤|ok", users(), 0..3);
        let annotations = prop::collection::btree_map("a|b[.]c|[$]", (0..9_u32, users()), 0..3);
        let words = (
            users(),
            prop::option::of(users()),
            prop::option::of(1_000..2_000_u64),
            prop::option::of(1_000..2_000_u64),
        );
        (body, reactions, annotations, words).prop_map(
            |(body, reactions, annotations, (from, mentions, edited, deleted))| {
                let text = |text: &String| serde_json::to_string(text).unwrap();
                let list = |users: &Vec<String>| serde_json::to_string(users).unwrap();
                let mut line = format!(
                    r#"{{"room":"chat:x","id":"1","from":{},"ts":1000"#,
                    text(&from[0])
                );
                if let Some(deleted) = deleted {
                    return format!(r#"{line},"reply_to":"kim/1","deleted_at":{deleted}}}"#);
                }
                line.push_str(&format!(r#","body":{body}"#));
                if let Some(users) = &mentions {
                    line.push_str(&format!(r#","mentions":{}"#, list(users)));
                }
                if let Some(edited) = edited {
                    line.push_str(&format!(r#","edited_at":{edited}"#));
                }
                let object = |name: &str, fields: Vec<String>| match fields.is_empty() {
                    true => String::new(),
                    false => format!(r#","{name}":{{{}}}"#, fields.join(",")),
                };
                let fields = reactions.iter().map(|(key, users)| {
                    format!(
                        r#"{}:{{"count":{},"users":{}}}"#,
                        text(key),
                        users.len(),
                        list(users)
                    )
                });
                line.push_str(&object("reactions", fields.collect()));
                let fields = annotations
                    .iter()
                    .map(|(name, (n, _))| format!("{}:{n}", text(name)));
                line.push_str(&object("annotations", fields.collect()));
                let by = annotations.iter();
                let by = by.map(|(name, (_, by))| format!("{}:{}", text(name), text(&by[0])));
                line.push_str(&object("annotated_by", by.collect()));
                line + "}"
            },
        )
    }

    proptest! {
        #[test]
        fn a_line_of_an_export_is_imported_as_it_was(line in lines()) {
            prop_assert_eq!(exported(&line), line);
        }

        #[test]
        fn any_text_is_a_line_or_refused(text in "\\PC{0,60}") {
            if let Ok(line) = parse(&text, &rules()) {
                prop_assert!(!line.first.id.is_empty());
            }
        }
    }

    #[test]
    fn a_pin_is_refused() {
        let text = r#"{"room":"chat:x","from":"kim","ts":1,"kind":"pin","target":"1"}"#;
        let refusal = parse(text, &rules()).unwrap_err();
        assert!(refusal.contains("pins are not imported"), "{refusal}");
    }

    #[test]
    fn a_line_without_an_id_always_gets_the_same_one() {
        let line = |ts: u64| {
            let text = format!(
                r#"{{"room":"chat:x","from":"kim","ts":{ts},"kind":"reaction","target":"1","body":"👍"}}"#
            );
            parse(&text, &rules()).unwrap().first.id
        };
        assert_eq!(line(1), line(1));
        assert_ne!(line(1), line(2));
    }
}
