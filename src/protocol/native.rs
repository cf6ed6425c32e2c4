//! `natter.v1`: JSON text frames.
//!
//! Decoding reads one command from one text message without copying the body's text; encoding appends a frame's payload to
//! a buffer. The server writes JSON without needless white space, `op` first and `rid` next.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::ErrorCode;
use crate::model::{
    self, BadRemark, Kind, MAX_MESSAGE_ID, MAX_USER, MessageId, Reference, RoomId, without_mark,
};

/// The WebSocket subprotocol.
pub const SUBPROTOCOL: &str = "natter.v1";

/// Most users one message may mention.
pub const MAX_MENTIONS: usize = 100;

/// Longest reference, in bytes: a user, `/` and an id.
const MAX_REFERENCE: usize = MAX_USER + 1 + MAX_MESSAGE_ID;

/// Mentions as they stand in a header, a JSON array, in bytes. 100 users of 256 bytes fit, unless most of their characters have to
/// be escaped. With it all headers of a message are well below the 64 KiB that a stream takes.
const MAX_MENTIONS_JSON: usize = 32 * 1024;

/// Characters of a parser's complaint that are told to the client: it may quote what was sent, of whatever length.
const MAX_COMPLAINT: usize = 200;

/// A command was refused: the code and a text for people, and the `rid` if it could be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The command's `rid`.
    pub rid: Option<u64>,
    /// Why.
    pub code: ErrorCode,
    /// What was wrong, for people.
    pub message: String,
}

/// One decoded command with its request id.
#[derive(Debug)]
pub struct Command {
    /// The client's number for the reply.
    pub rid: u64,
    /// What is wanted.
    pub op: Op,
}

/// What a command wants.
#[derive(Debug)]
pub enum Op {
    /// Hand over a token, as the first frame.
    Auth {
        /// The JWT.
        token: String,
    },
    /// Become a member of a room.
    Join {
        /// Which.
        room: RoomId,
        /// The client's last cursor, not yet parsed.
        since: Option<String>,
        /// What else than messages is to be pushed.
        wants: Wants,
    },
    /// Stop being a member.
    Leave {
        /// Of which room.
        room: RoomId,
    },
    /// Publish a message.
    Send(Box<Publication>),
    /// Show that the user is typing.
    Typing {
        /// Where.
        room: RoomId,
    },
    /// Move the user's read marker.
    Read {
        /// Where.
        room: RoomId,
        /// Up to what, not yet parsed.
        cursor: String,
    },
    /// Ask who is in a room.
    Presence {
        /// Which.
        room: RoomId,
        /// Which part of the list.
        page: PageOf,
    },
    /// Ask who has read up to where.
    Readers {
        /// In which room.
        room: RoomId,
        /// Which part of the list.
        page: PageOf,
    },
    /// Ask how much is new.
    Unread {
        /// In which rooms, in the order of the answer.
        rooms: Vec<RoomId>,
    },
    /// Ask for a page of what was said.
    History {
        /// In which room.
        room: RoomId,
        /// Which part of it.
        page: HistoryOf,
    },
    /// Replace the session's token.
    Refresh {
        /// The new JWT.
        token: String,
    },
    /// Ask for a `pong`.
    Ping,
}

/// What a member wants to be told besides messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wants {
    /// Who comes and goes.
    pub presence: bool,
    /// Who has read up to where.
    pub read: bool,
}

/// A part of a list of users, which is ordered by the bytes of their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageOf {
    /// The user before the first one wanted.
    pub after: Option<String>,
    /// At most this many.
    pub limit: usize,
}

impl PageOf {
    /// Users on a page where the client does not say how many.
    pub const DEFAULT: usize = 100;
    /// Most users on one page.
    pub const MAX: usize = 1000;

    /// A page after `after` of `limit` users.
    ///
    /// # Errors
    /// `bad_request` when `limit` is not 1 to [`Self::MAX`].
    pub fn new(after: Option<String>, limit: Option<u64>) -> Result<Self, (ErrorCode, String)> {
        let limit = limit.map_or(Some(Self::DEFAULT), |limit| usize::try_from(limit).ok());
        match limit {
            Some(limit @ 1..=Self::MAX) => Ok(Self { after, limit }),
            _ => Err((
                ErrorCode::BadRequest,
                format!("limit must be 1 to {}", Self::MAX),
            )),
        }
    }
}

/// A part of a room's history. What anchors it is a cursor or a message reference, not yet parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryOf {
    /// Where it lies.
    pub anchor: Anchor,
    /// At most this many messages.
    pub limit: usize,
}

/// Where a page of a room's history lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Anchor {
    /// At the end.
    Newest,
    /// Before a message, which is not in it.
    Before(String),
    /// After a message, which is not in it; empty: from the first message on.
    After(String),
    /// Around a message, which is in it.
    Around(String),
}

impl HistoryOf {
    /// Messages on a page where the client does not say how many.
    pub const DEFAULT: usize = 50;
    /// Most messages on one page.
    pub const MAX: usize = 200;

    /// The page that is named by at most one of `before`, `after` and `around`.
    ///
    /// # Errors
    /// `bad_request` when more than one is given, or `limit` is not 1 to [`Self::MAX`].
    pub fn new(
        before: Option<String>,
        after: Option<String>,
        around: Option<String>,
        limit: Option<u64>,
    ) -> Result<Self, (ErrorCode, String)> {
        let bad = |text: String| (ErrorCode::BadRequest, text);
        let anchor = match (before, after, around) {
            (None, None, None) => Anchor::Newest,
            (Some(at), None, None) => Anchor::Before(at),
            (None, Some(at), None) => Anchor::After(at),
            (None, None, Some(at)) => Anchor::Around(at),
            _ => return Err(bad("only one of before, after and around".to_owned())),
        };
        let limit = limit.map_or(Some(Self::DEFAULT), |limit| usize::try_from(limit).ok());
        match limit {
            Some(limit @ 1..=Self::MAX) => Ok(Self { anchor, limit }),
            _ => Err(bad(format!("limit must be 1 to {}", Self::MAX))),
        }
    }
}

/// What a `send` or an HTTP publish carries.
#[derive(Debug, Clone)]
pub struct Publication {
    /// Where to.
    pub room: RoomId,
    /// The sender's id; the edge makes one where it is absent.
    pub id: Option<MessageId>,
    /// What it is.
    pub kind: Kind,
    /// The body's JSON text as the client sent it.
    pub body: Box<RawValue>,
    /// What an edit, delete, reaction or annotation is about, as it was sent and as it was read.
    pub target: Option<(String, Reference)>,
    /// What it answers, as it was sent.
    pub reply_to: Option<String>,
    /// Mentioned users; an edit without any leaves them as they are.
    pub mentions: Mentions,
}

/// The users that a message mentions, as they stand in its header: a JSON array.
#[derive(Debug, Clone, Default)]
pub struct Mentions(Option<Box<str>>);

/// The fields of a `send` and of the body of an HTTP publish.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Fields<'a> {
    #[serde(borrow)]
    op: Option<Cow<'a, str>>,
    rid: Option<u64>,
    #[serde(borrow)]
    room: Option<Cow<'a, str>>,
    #[serde(borrow)]
    since: Option<Cow<'a, str>>,
    #[serde(borrow)]
    token: Option<Cow<'a, str>>,
    #[serde(borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow, deserialize_with = "present")]
    body: Option<&'a RawValue>,
    #[serde(borrow)]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow)]
    target: Option<Cow<'a, str>>,
    #[serde(borrow)]
    reply_to: Option<Cow<'a, str>>,
    mentions: Option<Vec<String>>,
    #[serde(borrow)]
    cursor: Option<Cow<'a, str>>,
    presence: Option<bool>,
    read: Option<bool>,
    #[serde(borrow)]
    after: Option<Cow<'a, str>>,
    #[serde(borrow)]
    before: Option<Cow<'a, str>>,
    #[serde(borrow)]
    around: Option<Cow<'a, str>>,
    limit: Option<u64>,
    rooms: Option<Vec<String>>,
}

/// A field that is there is `Some`, also where it is `null`: any JSON is a body.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// Only what names a command, for the reply to one whose other fields have the wrong type.
#[derive(Deserialize)]
struct Envelope {
    rid: Option<serde_json::Value>,
}

type Refused = (ErrorCode, String);

/// Decodes one text message. A byte order mark before it is dropped.
///
/// # Errors
/// [`Refusal`] with `bad_json`, `bad_request`, `unknown_op`, `bad_room` or `bad_id`; it becomes an `error` reply.
pub fn decode(text: &str) -> Result<Command, Refusal> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let fields: Fields<'_> = match serde_json::from_str(text) {
        Ok(fields) => fields,
        Err(error) => {
            let rid = serde_json::from_str::<Envelope>(text)
                .ok()
                .and_then(|envelope| envelope.rid?.as_u64());
            let (code, message) = json_refusal(&error);
            return Err(Refusal { rid, code, message });
        }
    };
    let Some(rid) = fields.rid else {
        let message = "rid is missing: a non-negative integer of the client's".to_owned();
        return Err(Refusal {
            rid: None,
            code: ErrorCode::BadRequest,
            message,
        });
    };
    op(fields)
        .map(|op| Command { rid, op })
        .map_err(|(code, message)| Refusal {
            rid: Some(rid),
            code,
            message,
        })
}

/// Decodes the body of an HTTP publish to `room`: the fields of a `send` without `op`, `rid` and `room`.
///
/// # Errors
/// [`Refusal`] without a `rid`.
pub fn decode_publication(room: RoomId, json: &[u8]) -> Result<Publication, Refusal> {
    decode_body(json, |fields| publication(room, fields))
}

fn json_refusal(error: &serde_json::Error) -> Refused {
    let message = error.to_string().chars().take(MAX_COMPLAINT).collect();
    match error.classify() {
        serde_json::error::Category::Data => (ErrorCode::BadRequest, message),
        serde_json::error::Category::Syntax
        | serde_json::error::Category::Eof
        | serde_json::error::Category::Io => (ErrorCode::BadJson, message),
    }
}

fn op(fields: Fields<'_>) -> Result<Op, Refused> {
    let missing = |what: &str| (ErrorCode::BadRequest, format!("{what} is missing"));
    let room = || {
        let room = fields.room.as_deref().ok_or_else(|| missing("room"))?;
        RoomId::parse(room).map_err(|error| (ErrorCode::BadRoom, error.to_string()))
    };
    let token = || {
        fields
            .token
            .as_deref()
            .map(str::to_owned)
            .ok_or_else(|| missing("token"))
    };
    Ok(match fields.op.as_deref() {
        None => return Err(missing("op")),
        Some("ping") => Op::Ping,
        Some("auth") => Op::Auth { token: token()? },
        Some("refresh") => Op::Refresh { token: token()? },
        Some("join") => Op::Join {
            room: room()?,
            since: fields.since.map(Cow::into_owned),
            wants: Wants {
                presence: fields.presence.unwrap_or_default(),
                read: fields.read.unwrap_or_default(),
            },
        },
        Some("leave") => Op::Leave { room: room()? },
        Some("typing") => Op::Typing { room: room()? },
        Some("read") => Op::Read {
            room: room()?,
            cursor: cursor(fields.cursor)?,
        },
        Some("presence") => Op::Presence {
            room: room()?,
            page: PageOf::new(fields.after.map(Cow::into_owned), fields.limit)?,
        },
        Some("readers") => Op::Readers {
            room: room()?,
            page: PageOf::new(fields.after.map(Cow::into_owned), fields.limit)?,
        },
        Some("unread") => Op::Unread {
            rooms: rooms(fields.rooms)?,
        },
        Some("history") => Op::History {
            room: room()?,
            page: HistoryOf::new(
                fields.before.map(Cow::into_owned),
                fields.after.map(Cow::into_owned),
                fields.around.map(Cow::into_owned),
                fields.limit,
            )?,
        },
        Some("send") => Op::Send(Box::new(publication(room()?, fields)?)),
        Some(other) => {
            let shown: String = other.chars().take(80).collect();
            return Err((ErrorCode::UnknownOp, format!("there is no op {shown:?}")));
        }
    })
}

fn cursor(cursor: Option<Cow<'_, str>>) -> Result<String, Refused> {
    cursor
        .map(Cow::into_owned)
        .ok_or_else(|| (ErrorCode::BadRequest, "cursor is missing".to_owned()))
}

fn rooms(names: Option<Vec<String>>) -> Result<Vec<RoomId>, Refused> {
    let names = names.ok_or_else(|| (ErrorCode::BadRequest, "rooms is missing".to_owned()))?;
    names
        .iter()
        .map(|name| RoomId::parse(name))
        .collect::<Result<_, _>>()
        .map_err(|error| (ErrorCode::BadRoom, error.to_string()))
}

/// Decodes the body of an HTTP request that moves a read marker: `{"cursor"}`; the cursor is not yet parsed.
///
/// # Errors
/// [`Refusal`] without a `rid`.
pub fn decode_read(json: &[u8]) -> Result<String, Refusal> {
    decode_body(json, |fields| cursor(fields.cursor))
}

/// Decodes the body of an HTTP request for unread counts: `{"rooms"}`.
///
/// # Errors
/// [`Refusal`] without a `rid`.
pub fn decode_unread(json: &[u8]) -> Result<Vec<RoomId>, Refusal> {
    decode_body(json, |fields| rooms(fields.rooms))
}

fn decode_body<T>(
    json: &[u8],
    read: impl FnOnce(Fields<'_>) -> Result<T, Refused>,
) -> Result<T, Refusal> {
    serde_json::from_slice::<Fields<'_>>(without_mark(json))
        .map_err(|error| json_refusal(&error))
        .and_then(read)
        .map_err(|(code, message)| Refusal {
            rid: None,
            code,
            message,
        })
}

fn publication(room: RoomId, fields: Fields<'_>) -> Result<Publication, Refused> {
    let bad = |message: String| (ErrorCode::BadRequest, message);
    let kind = match fields.kind.as_deref() {
        None => Kind::Message,
        Some(word) => Kind::parse(word)
            .filter(|kind| *kind != Kind::Erase)
            .ok_or_else(|| {
                bad("kind is not one of message, edit, delete, reaction, annotation".to_owned())
            })?,
    };
    let reference = |name: &str, text: &str| {
        fits(name, text.len(), MAX_REFERENCE)?;
        Reference::parse(text).map_err(|error| (ErrorCode::BadId, error.to_string()))
    };
    let target = match (kind, fields.target) {
        (Kind::Message, None) => None,
        (Kind::Message, Some(_)) => {
            return Err(bad(
                "a message has no target; reply_to names what it answers".to_owned(),
            ));
        }
        (_, None) => {
            return Err(bad(format!(
                "target is missing: a {} has one",
                kind.as_str()
            )));
        }
        (_, Some(text)) => {
            let parsed = reference("target", &text)?;
            Some((text.into_owned(), parsed))
        }
    };
    let reply_to = fields
        .reply_to
        .map(|text| reference("reply_to", &text).map(|_valid| text.into_owned()));
    let body = match (kind, fields.body) {
        (_, Some(body)) => body.to_owned(),
        (Kind::Delete, None) => RawValue::NULL.to_owned(),
        (_, None) => return Err(bad("body is missing".to_owned())),
    };
    let remark = match kind {
        Kind::Reaction => model::reaction(body.get()).map(|_reaction| ()),
        Kind::Annotation => model::annotations(body.get()).map(|_annotations| ()),
        Kind::Message | Kind::Edit | Kind::Delete | Kind::Erase => Ok(()),
    };
    // What has another form is carried all the same.
    if let Err(BadRemark::TooLarge(message)) = remark {
        return Err((ErrorCode::TooLarge, message));
    }
    let mentions = Mentions::of(fields.mentions, kind)?;
    Ok(Publication {
        room,
        id: fields
            .id
            .map(|id| MessageId::parse(&id))
            .transpose()
            .map_err(|error| (ErrorCode::BadId, error.to_string()))?,
        kind,
        body,
        target,
        reply_to: reply_to.transpose()?,
        mentions,
    })
}

/// Refuses what has more than so many bytes.
fn fits(name: &str, bytes: usize, most: usize) -> Result<(), Refused> {
    if bytes <= most {
        return Ok(());
    }
    let text = format!("{name} has {bytes} bytes, the limit is {most}");
    Err((ErrorCode::TooLarge, text))
}

impl Mentions {
    /// The mentions of `users`, who may be named more than once. An edit takes mentions away with an empty list; in a message
    /// it says nothing.
    fn of(users: Option<Vec<String>>, kind: Kind) -> Result<Self, Refused> {
        let says = |users: &Vec<String>| !users.is_empty() || kind == Kind::Edit;
        let Some(users) = users.filter(says) else {
            return Ok(Self::default());
        };
        if users.len() > MAX_MENTIONS {
            let text = format!(
                "mentions has {} users, the limit is {MAX_MENTIONS}",
                users.len()
            );
            return Err((ErrorCode::TooLarge, text));
        }
        for user in &users {
            fits("a user in mentions", user.len(), MAX_USER)?;
        }
        let json = serde_json::to_string(&users)
            .map_err(|error| (ErrorCode::Internal, error.to_string()))?;
        fits("mentions, as JSON,", json.len(), MAX_MENTIONS_JSON)?;
        Ok(Self(Some(json.into())))
    }

    /// The users as a JSON array; `None` where nothing is said of them.
    #[must_use]
    pub fn json(&self) -> Option<&str> {
        self.0.as_deref()
    }
}

/// Appends frames' payloads. `out` receives JSON text; nothing else is in it.
#[derive(Debug)]
pub struct Writer<'a> {
    out: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    /// Begins an object with `op`.
    pub fn new(out: &'a mut Vec<u8>, op: &str) -> Self {
        out.extend_from_slice(b"{\"op\":\"");
        out.extend_from_slice(op.as_bytes());
        out.push(b'"');
        Self { out }
    }

    /// Begins the reply to `rid`.
    pub fn reply(out: &'a mut Vec<u8>, op: &str, rid: u64) -> Self {
        let mut writer = Self::new(out, op);
        writer.number("rid", rid);
        writer
    }

    fn key(&mut self, key: &str) {
        if self.out.last() != Some(&b'{') {
            self.out.push(b',');
        }
        self.out.push(b'"');
        self.out.extend_from_slice(key.as_bytes());
        self.out.extend_from_slice(b"\":");
    }

    /// A number.
    pub fn number(&mut self, key: &str, value: u64) -> &mut Self {
        self.key(key);
        self.out
            .extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
        self
    }

    /// Any text, escaped.
    pub fn string(&mut self, key: &str, value: &str) -> &mut Self {
        self.key(key);
        if value.bytes().all(|b| b >= 0x20 && b != b'"' && b != b'\\') {
            self.out.push(b'"');
            self.out.extend_from_slice(value.as_bytes());
            self.out.push(b'"');
        } else {
            serde_json::to_writer(&mut *self.out, value).expect("writing a string to memory");
        }
        self
    }

    /// JSON text that is already valid.
    pub fn raw(&mut self, key: &str, json: &[u8]) -> &mut Self {
        self.key(key);
        self.out.extend_from_slice(json);
        self
    }

    /// `true` or `false`.
    pub fn boolean(&mut self, key: &str, value: bool) -> &mut Self {
        self.raw(key, if value { b"true" } else { b"false" })
    }

    /// A list of objects; `write` gives the fields of each.
    pub fn list<T>(
        &mut self,
        key: &str,
        items: &[T],
        mut write: impl FnMut(&mut Writer<'_>, &T),
    ) -> &mut Self {
        self.key(key);
        self.out.push(b'[');
        for (i, item) in items.iter().enumerate() {
            self.out
                .extend_from_slice(if i == 0 { b"{" } else { b",{" });
            write(&mut Writer { out: self.out }, item);
            self.out.push(b'}');
        }
        self.out.push(b']');
        self
    }

    /// Ends the object.
    pub fn end(&mut self) {
        self.out.push(b'}');
    }
}

/// Appends an `error` reply.
pub fn write_error(out: &mut Vec<u8>, refusal: &Refusal) {
    let mut writer = Writer::new(out, "error");
    match refusal.rid {
        Some(rid) => writer.number("rid", rid),
        None => writer.raw("rid", b"null"),
    }
    .string("code", refusal.code.as_str())
    .string("message", &refusal.message)
    .boolean("retry", refusal.code.retry())
    .end();
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn refusal(text: &str) -> (Option<u64>, &'static str) {
        let refusal = decode(text).expect_err(text);
        (refusal.rid, refusal.code.as_str())
    }

    #[test]
    fn refusals_name_the_code_and_keep_the_rid() {
        for (text, expected) in [
            ("", (None, "bad_json")),
            ("{", (None, "bad_json")),
            ("nonsense", (None, "bad_json")),
            ("[]", (None, "bad_request")),
            ("5", (None, "bad_request")),
            (r#"{"op":"ping"}"#, (None, "bad_request")),
            (r#"{"op":"ping","rid":-1}"#, (None, "bad_request")),
            (r#"{"op":"ping","rid":1.5}"#, (None, "bad_request")),
            (r#"{"rid":7}"#, (Some(7), "bad_request")),
            (r#"{"op":"sing","rid":7}"#, (Some(7), "unknown_op")),
            (r#"{"op":5,"rid":7}"#, (Some(7), "bad_request")),
            (r#"{"op":"join","rid":7}"#, (Some(7), "bad_request")),
            (
                r#"{"op":"join","rid":7,"room":5}"#,
                (Some(7), "bad_request"),
            ),
            (
                r#"{"op":"join","rid":7,"room":"chat.x"}"#,
                (Some(7), "bad_room"),
            ),
            (r#"{"op":"auth","rid":7}"#, (Some(7), "bad_request")),
            (
                r#"{"op":"send","rid":7,"room":"chat:x"}"#,
                (Some(7), "bad_request"),
            ),
            (
                r#"{"op":"send","rid":7,"room":"chat:x","body":1,"id":"a b"}"#,
                (Some(7), "bad_id"),
            ),
            (
                r#"{"op":"send","rid":7,"room":"chat:x","body":1,"kind":"shout"}"#,
                (Some(7), "bad_request"),
            ),
            (
                r#"{"op":"send","rid":7,"room":"chat:x","body":1,"kind":"edit"}"#,
                (Some(7), "bad_request"),
            ),
            (
                r#"{"op":"send","rid":7,"room":"chat:x","body":1,"kind":"edit","target":"a b"}"#,
                (Some(7), "bad_id"),
            ),
            (
                r#"{"op":"send","rid":7,"room":"chat:x","body":1,"target":"a"}"#,
                (Some(7), "bad_request"),
            ),
            (
                r#"{"op":"send","rid":7,"room":"chat:x","body":1,"reply_to":"/"}"#,
                (Some(7), "bad_id"),
            ),
            (
                r#"{"op":"read","rid":7,"room":"chat:x"}"#,
                (Some(7), "bad_request"),
            ),
            (
                r#"{"op":"read","rid":7,"cursor":"a.b.1.1"}"#,
                (Some(7), "bad_request"),
            ),
            (
                r#"{"op":"presence","rid":7,"room":"chat:x","limit":0}"#,
                (Some(7), "bad_request"),
            ),
            (
                r#"{"op":"readers","rid":7,"room":"chat:x","limit":1001}"#,
                (Some(7), "bad_request"),
            ),
            (
                r#"{"op":"join","rid":7,"room":"chat:x","presence":"yes"}"#,
                (Some(7), "bad_request"),
            ),
            (
                r#"{"op":"history","rid":7,"room":"chat:x","limit":201}"#,
                (Some(7), "bad_request"),
            ),
            (
                r#"{"op":"history","rid":7,"room":"chat:x","before":"a","after":"b"}"#,
                (Some(7), "bad_request"),
            ),
            (r#"{"op":"unread","rid":7}"#, (Some(7), "bad_request")),
            (
                r#"{"op":"unread","rid":7,"rooms":["chat:x","chat.y"]}"#,
                (Some(7), "bad_room"),
            ),
            (
                r#"{"op":"send","rid":7,"room":"chat:x","body":1,"mentions":"kim"}"#,
                (Some(7), "bad_request"),
            ),
        ] {
            assert_eq!(refusal(text), expected, "{text}");
        }
    }

    #[test]
    fn what_is_too_long_is_named_with_the_limit() {
        let long = "u".repeat(257);
        let longest = format!("{}/{}", "u".repeat(256), "i".repeat(64));
        for (fields, named) in [
            (
                json!({"reply_to": format!("{longest}i")}),
                "reply_to has 322 bytes, the limit is 321",
            ),
            (
                json!({"reply_to": format!("{}/1", "x".repeat(900_000))}),
                "reply_to has 900002 bytes",
            ),
            (
                json!({"kind": "edit", "target": format!("{longest}i")}),
                "target has 322 bytes",
            ),
            (
                json!({"kind": "delete", "target": "안".repeat(300_000)}),
                "target has 900000 bytes",
            ),
            (
                json!({"mentions": vec!["a"; 101]}),
                "mentions has 101 users, the limit is 100",
            ),
            (
                json!({"mentions": ["a", long]}),
                "a user in mentions has 257 bytes, the limit is 256",
            ),
            (
                json!({"mentions": vec!["\u{1}".repeat(120); 100]}),
                "mentions, as JSON, has 72301 bytes, the limit is 32768",
            ),
            (
                json!({"mentions": vec!["\\".repeat(256); 100]}),
                "mentions, as JSON, has 51501 bytes",
            ),
        ] {
            let mut fields = fields_with_body(fields);
            let room = RoomId::parse("chat:x").unwrap();
            let over_http = decode_publication(room, fields.to_string().as_bytes()).unwrap_err();
            fields["op"] = json!("send");
            let refusal = decode(&fields.to_string()).unwrap_err();
            for refusal in [over_http, refusal] {
                assert_eq!(refusal.code, ErrorCode::TooLarge, "{refusal:?}");
                assert!(refusal.message.starts_with(named), "{refusal:?}");
            }
        }
        let mentions = vec!["안".repeat(85); 100];
        for fits in [
            json!({"reply_to": longest, "mentions": mentions}),
            json!({"kind": "edit", "target": longest, "mentions": vec!["\u{1f}".repeat(50); 100]}),
        ] {
            let mut fields = fields_with_body(fits);
            fields["op"] = json!("send");
            decode(&fields.to_string()).unwrap();
        }
    }

    fn fields_with_body(mut fields: serde_json::Value) -> serde_json::Value {
        for (key, value) in [
            ("body", json!(1)),
            ("rid", json!(1)),
            ("room", json!("chat:x")),
        ] {
            fields[key] = value;
        }
        fields
    }

    /// What a client sent is not sent back to it at full length.
    #[test]
    fn complaints_are_short() {
        let long = "x".repeat(500_000);
        for text in [
            json!({"op": "ping", "rid": long}),
            json!({"op": long, "rid": 1}),
            json!({"op": "join", "rid": 1, "room": long}),
            json!({"op": "join", "rid": 1, "room": "chat:x", "presence": long}),
            json!({"op": "send", "rid": 1, "room": "chat:x", "body": 1, "id": long}),
            json!({"op": "send", "rid": 1, "room": "chat:x", "body": 1, "kind": long}),
            json!({"op": "send", "rid": 1, "room": "chat:x", "body": 1, "reply_to": long}),
            json!({"op": "unread", "rid": 1, "rooms": [long]}),
            json!(long),
        ] {
            let refusal = decode(&text.to_string()).unwrap_err();
            assert!(refusal.message.len() < 1000, "{}", refusal.message.len());
        }
    }

    #[test]
    fn a_byte_order_mark_before_json_is_dropped() {
        let send = "{\"op\":\"send\",\"rid\":1,\"room\":\"chat:x\",\"body\":\"\u{feff}\",\"cursor\":\"c\",\"rooms\":[\"chat:x\"]}";
        let marked = format!("\u{feff}{send}");
        let Op::Send(publication) = decode(&marked).unwrap().op else {
            panic!("not a send")
        };
        assert_eq!(publication.body.get(), "\"\u{feff}\"");
        let bytes = marked.as_bytes();
        let room = RoomId::parse("chat:x").unwrap();
        assert_eq!(
            decode_publication(room, bytes).unwrap().body.get(),
            "\"\u{feff}\""
        );
        assert_eq!(decode_read(bytes).unwrap(), "c");
        assert_eq!(decode_unread(bytes).unwrap().len(), 1);
        // One is a mark; what is elsewhere is not.
        for text in [
            format!("\u{feff}{marked}"),
            format!(" {marked}"),
            format!("{send}\u{feff}"),
        ] {
            assert_eq!(refusal(&text), (None, "bad_json"), "{text:?}");
        }
    }

    #[test]
    fn null_is_a_body_and_nothing_is_not() {
        let null = r#"{"op":"send","rid":1,"room":"chat:x","body":null}"#;
        let Op::Send(publication) = decode(null).unwrap().op else {
            panic!("not a send")
        };
        assert_eq!(publication.body.get(), "null");
    }

    #[test]
    fn a_send_keeps_its_body_to_the_letter() {
        let body = "{ \"text\" : \"안녕 👋 \\u0041\" ,\"n\":1.0e3}";
        let text = format!(
            r#"{{"body":{body},"op":"send","unknown":[1],"rid":0,"room":"chat:x","reply_to":"kim/1","mentions":["a","b"]}}"#
        );
        let Op::Send(publication) = decode(&text).unwrap().op else {
            panic!("not a send")
        };
        assert_eq!(publication.body.get(), body);
        assert_eq!(publication.reply_to.as_deref(), Some("kim/1"));
        assert_eq!(publication.mentions.json(), Some(r#"["a","b"]"#));
        let delete = r#"{"op":"send","rid":1,"room":"chat:x","kind":"delete","target":"1"}"#;
        let Op::Send(publication) = decode(delete).unwrap().op else {
            panic!("not a send")
        };
        assert_eq!(publication.body.get(), "null");
    }

    proptest! {
        #[test]
        fn whatever_is_written_is_json(text in "\\PC*|[\\x00-\\x7f]*", number: u64) {
            let mut out = Vec::new();
            Writer::reply(&mut out, "x", number)
                .string("s", &text)
                .boolean("b", true)
                .list("none", &[0_u64; 0], |_, _| {})
                .list("some", &[number, 7], |item, n| {
                    item.number("n", *n).string("s", &text);
                })
                .end();
            let value: serde_json::Value = serde_json::from_slice(&out).unwrap();
            prop_assert_eq!(value["s"].as_str().unwrap(), &text);
            prop_assert_eq!(value["rid"].as_u64().unwrap(), number);
            prop_assert_eq!(value["some"][1]["n"].as_u64().unwrap(), 7);
            prop_assert_eq!(value["some"][0]["s"].as_str().unwrap(), value["s"].as_str().unwrap());
            prop_assert_eq!(value["none"].as_array().unwrap().len(), 0);
        }

        #[test]
        fn any_text_is_decoded_or_refused(text in "\\PC{0,200}|\\{(\"[a-z_]{1,8}\":(\"[a-z:]*\"|[0-9]{1,3}|null),?){0,6}\\}") {
            if let Err(refusal) = decode(&text) {
                prop_assert!(!refusal.message.is_empty());
            }
        }
    }
}
