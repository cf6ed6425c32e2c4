//! Decoding commands.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::{
    codec::{Request, Tag},
    model::{RoomId, without_mark},
    protocol::{
        Command, Draft, ErrorCode, HistoryOf, NewRoom, PageOf, Publication, Refused, ResumeAt,
        SearchFor, Wants, WatchOf, Watched,
    },
};

/// Length in characters to which a parser's error message is cut for the client: it may quote input of any length.
const MAX_COMPLAINT: usize = 200;

/// The fields of all commands, and of the JSON bodies of HTTP requests.
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
    q: Option<Cow<'a, str>>,
    #[serde(borrow)]
    from: Option<Cow<'a, str>>,
    #[serde(borrow)]
    after: Option<Cow<'a, str>>,
    #[serde(borrow)]
    before: Option<Cow<'a, str>>,
    #[serde(borrow)]
    around: Option<Cow<'a, str>>,
    #[serde(borrow)]
    thread: Option<Cow<'a, str>>,
    limit: Option<u64>,
    rooms: Option<Vec<String>>,
    archived: Option<bool>,
    mine: Option<bool>,
    watch: Option<u64>,
    #[serde(borrow)]
    pattern: Option<Cow<'a, str>>,
    filter: Option<serde_json::Value>,
    namespace: Option<String>,
    #[serde(rename = "ref")]
    about: Option<String>,
    key: Option<String>,
    name: Option<String>,
    members: Option<Vec<String>>,
    title: Option<String>,
    info: Option<serde_json::Map<String, serde_json::Value>>,
}

/// A field that is present is `Some`, even if it is `null`: any JSON is a valid body.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// Only the `rid`, for the refusal of a command whose other fields have the wrong type.
#[derive(Deserialize)]
struct Envelope {
    rid: Option<serde_json::Value>,
}

/// Decodes one text message. A byte order mark at the beginning is skipped.
///
/// The refusals are `bad_json`, `bad_request`, `unknown_op`, `bad_room`, `bad_id` and `too_large`.
pub fn decode(text: &str) -> Request {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let fields: Fields<'_> = match serde_json::from_str(text) {
        Ok(fields) => fields,
        Err(error) => {
            let rid = serde_json::from_str::<Envelope>(text)
                .ok()
                .and_then(|envelope| envelope.rid?.as_u64());
            return Request {
                tag: rid.map_or(Tag::None, Tag::Number),
                command: Err(json_refusal(&error)),
            };
        }
    };
    let Some(rid) = fields.rid else {
        let text = "rid is missing: a non-negative integer of the client's";
        return Request {
            tag: Tag::None,
            command: Err(Refused::new(ErrorCode::BadRequest, text)),
        };
    };
    Request {
        tag: Tag::Number(rid),
        command: command(fields, text),
    }
}

/// Decodes a command that is named apart from its fields.
///
/// # Errors
/// The refusal for the client.
pub fn decode_command(op: &str, text: &str) -> Result<Command, Refused> {
    let mut fields: Fields<'_> = fields_of(text)?;
    fields.op = Some(op.into());
    command(fields, text)
}

/// Decodes the body of an HTTP publish to `room`: the fields of a `send` without `op`, `rid` and `room`.
///
/// # Errors
/// The refusal for the client.
pub fn decode_publication(room: RoomId, json: &[u8]) -> Result<Publication, Refused> {
    decode_body(json, |fields| publication(room, fields))
}

fn fields_of<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, Refused> {
    serde_json::from_str(text).map_err(|error| json_refusal(&error))
}

fn json_refusal(error: &serde_json::Error) -> Refused {
    let message: String = error.to_string().chars().take(MAX_COMPLAINT).collect();
    match error.classify() {
        serde_json::error::Category::Data => Refused::new(ErrorCode::BadRequest, message),
        serde_json::error::Category::Syntax
        | serde_json::error::Category::Eof
        | serde_json::error::Category::Io => Refused::new(ErrorCode::BadJson, message),
    }
}

/// `text`: what the fields were read from. The fields that only one command has are read from it when it is that one.
fn command(fields: Fields<'_>, text: &str) -> Result<Command, Refused> {
    let missing = |what: &str| Refused::new(ErrorCode::BadRequest, format!("{what} is missing"));
    let room = || {
        let room = fields.room.as_deref().ok_or_else(|| missing("room"))?;
        RoomId::parse(room).map_err(|error| Refused::new(ErrorCode::BadRoom, error.to_string()))
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
        Some("ping") => Command::Ping,
        Some("auth") => Command::Auth {
            token: Some(token()?),
            login: None,
            beats: None,
            since: Vec::new(),
        },
        Some("refresh") => Command::Refresh { token: token()? },
        Some("join") => Command::Join {
            room: room()?,
            since: fields
                .since
                .map(|cursor| Box::new(ResumeAt::Cursor(cursor.into_owned()).into())),
            token: None,
            subscription: None,
            wants: Wants {
                typing: true,
                presence: fields.presence.unwrap_or_default(),
                read: fields.read.unwrap_or_default(),
            },
        },
        Some("leave") => Command::Leave { room: room()? },
        Some("typing") => Command::Typing { room: room()? },
        Some("read") => Command::Read {
            room: room()?,
            cursor: cursor(fields.cursor)?,
        },
        Some("presence") => Command::Presence {
            room: room()?,
            page: PageOf::new(fields.after.map(Cow::into_owned), fields.limit)?,
        },
        Some("readers") => Command::Readers {
            room: room()?,
            page: PageOf::new(fields.after.map(Cow::into_owned), fields.limit)?,
        },
        Some("unread") => Command::Unread {
            rooms: rooms(fields.rooms)?,
        },
        Some("history") => Command::History {
            room: room()?,
            page: HistoryOf::new(
                fields.before.map(Cow::into_owned),
                fields.after.map(Cow::into_owned),
                fields.around.map(Cow::into_owned),
                fields.limit,
                fields.thread.map(Cow::into_owned),
            )?,
        },
        Some("search") => Command::Search {
            room: match fields.room {
                Some(_) => Some(room()?),
                None => None,
            },
            query: Box::new(SearchFor {
                text: fields.q.unwrap_or_default().into_owned(),
                from: fields.from.map(Cow::into_owned),
                mentions: match fields.mentions.as_deref() {
                    None | Some([]) => None,
                    Some([user]) => Some(user.clone()),
                    Some(_) => {
                        let text = "mentions: a search can be for one user";
                        return Err(Refused::new(ErrorCode::BadRequest, text));
                    }
                },
                reply_to: fields.reply_to.map(Cow::into_owned),
                before: fields.before.map(Cow::into_owned),
                limit: fields.limit,
            }),
        },
        Some("create") => Command::Create(Box::new(NewRoom {
            namespace: fields.namespace.ok_or_else(|| missing("namespace"))?,
            kind: fields.kind.ok_or_else(|| missing("kind"))?.into_owned(),
            about: fields.about,
            key: fields.key,
            name: fields.name,
            members: fields.members.unwrap_or_default(),
            title: fields.title,
            info: fields.info,
        })),
        Some("room") => Command::Room { room: room()? },
        Some("settings") => {
            let OfChange { version, .. } = fields_of(text)?;
            Command::Settings {
                room: room()?,
                settings: Box::new(fields_of(text)?),
                version,
            }
        }
        Some("member") => {
            let OfChange { user, .. } = fields_of(text)?;
            Command::Member {
                room: room()?,
                user: user.ok_or_else(|| missing("user"))?,
                what: fields_of(text)?,
            }
        }
        Some("arrange") => Command::Arrange {
            room: room()?,
            how: fields_of(text)?,
        },
        Some("block") => {
            let OfChange { user, blocked, .. } = fields_of(text)?;
            Command::Block {
                user: user.ok_or_else(|| missing("user"))?,
                blocked: blocked.ok_or_else(|| missing("blocked"))?,
            }
        }
        Some("inbox") => Command::Inbox {
            after: fields.after.map(Cow::into_owned),
            limit: fields.limit,
            archived: fields.archived.unwrap_or_default(),
        },
        Some("watch") => Command::Watch(Box::new(watch(fields)?)),
        Some("unwatch") => Command::Unwatch {
            watch: fields.watch.ok_or_else(|| missing("watch"))?,
        },
        Some("send") => Command::Send(Box::new(publication(room()?, fields)?)),
        Some(other) => {
            let shown: String = other.chars().take(80).collect();
            let text = format!("there is no op {shown:?}");
            return Err(Refused::new(ErrorCode::UnknownOp, text));
        }
    })
}

/// What `settings`, `member` and `block` have besides what changes.
#[derive(Deserialize)]
struct OfChange {
    user: Option<String>,
    blocked: Option<bool>,
    version: Option<String>,
}

fn watch(fields: Fields<'_>) -> Result<WatchOf, Refused> {
    let bad = |text: &str| Refused::new(ErrorCode::BadRequest, text);
    let Fields {
        mine,
        rooms: named,
        pattern,
        filter,
        watch,
        after,
        limit,
        ..
    } = fields;
    let filter = match filter {
        Some(_) if pattern.is_none() => return Err(bad("filter goes with pattern only")),
        Some(serde_json::Value::Object(filter)) => filter,
        Some(_) => return Err(bad("filter must be an object")),
        None => serde_json::Map::new(),
    };
    let what = match (mine == Some(true), named, pattern, watch) {
        (true, None, None, None) => Watched::Mine,
        (false, Some(named), None, None) => Watched::Rooms(rooms(Some(named))?),
        (false, None, Some(pattern), None) => Watched::Pattern {
            pattern: pattern.into_owned(),
            filter,
        },
        (false, None, None, Some(watch)) => Watched::Page {
            watch,
            after: after
                .map(Cow::into_owned)
                .ok_or_else(|| bad("after is missing: the next of the page before"))?,
        },
        (false, None, None, None) => {
            return Err(bad(
                "what to watch is missing: mine: true, rooms, pattern, or watch with after",
            ));
        }
        _ => return Err(bad("only one of mine, rooms, pattern and watch")),
    };
    Ok(WatchOf { what, limit })
}

fn cursor(cursor: Option<Cow<'_, str>>) -> Result<String, Refused> {
    cursor
        .map(Cow::into_owned)
        .ok_or_else(|| Refused::new(ErrorCode::BadRequest, "cursor is missing"))
}

fn rooms(names: Option<Vec<String>>) -> Result<Vec<RoomId>, Refused> {
    let names = names.ok_or_else(|| Refused::new(ErrorCode::BadRequest, "rooms is missing"))?;
    names
        .iter()
        .map(|name| RoomId::parse(name))
        .collect::<Result<_, _>>()
        .map_err(|error| Refused::new(ErrorCode::BadRoom, error.to_string()))
}

/// Decodes the body of an HTTP request that moves a read marker: `{"cursor"}`. The cursor is not parsed yet.
///
/// # Errors
/// The refusal for the client.
pub fn decode_read(json: &[u8]) -> Result<String, Refused> {
    decode_body(json, |fields| cursor(fields.cursor))
}

/// Decodes the body of an HTTP request for unread counts: `{"rooms"}`.
///
/// # Errors
/// The refusal for the client.
pub fn decode_unread(json: &[u8]) -> Result<Vec<RoomId>, Refused> {
    decode_body(json, |fields| rooms(fields.rooms))
}

fn decode_body<T>(
    json: &[u8],
    read: impl FnOnce(Fields<'_>) -> Result<T, Refused>,
) -> Result<T, Refused> {
    serde_json::from_slice::<Fields<'_>>(without_mark(json))
        .map_err(|error| json_refusal(&error))
        .and_then(read)
}

fn publication(room: RoomId, fields: Fields<'_>) -> Result<Publication, Refused> {
    let draft = Draft {
        id: fields.id.as_deref(),
        kind: fields.kind.as_deref(),
        body: fields.body,
        target: fields.target.as_deref(),
        reply_to: fields.reply_to.as_deref(),
        mentions: fields.mentions,
    };
    Publication::new(room, draft)
}
