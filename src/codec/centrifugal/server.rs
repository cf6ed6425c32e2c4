//! Centrifugo's API for back ends (`POST /api/<method>`): what a call means, and its answer.
//!
//! Fields that natter does not know are ignored, as in Centrifugo. A known field that it can't honour is refused where
//! ignoring it would do something else than was asked for.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Deserializer, Serialize, de::IgnoredAny};
use serde_json::value::{RawValue, to_raw_value};

use super::{
    Method, decode as client, encode, position,
    proto::{HistoryRequest, HistoryResult},
};
use crate::{
    auth::{LAST_SECOND, user_flaw},
    model::{MessageId, Region, RoomId},
    protocol::{
        Command, Draft, ErrorCode, HistoryOf, HistoryReply, Order, OrderKind, PresenceReply,
        Publication, PublishReply, Refused,
    },
};

/// Most rooms of one broadcast, and most commands of one batch.
pub const MAX_AT_ONCE: usize = 1000;

/// Longest reason of a disconnect, in bytes: what fits into a close frame.
const MAX_REASON: usize = 123;

/// The methods that there are.
const METHODS: [&str; 10] = [
    "publish",
    "broadcast",
    "history",
    "presence",
    "presence_stats",
    "disconnect",
    "unsubscribe",
    "subscribe",
    "refresh",
    "batch",
];

/// A call of a back end.
#[derive(Debug)]
pub enum Call {
    /// Publishes to one room.
    Publish {
        /// Where.
        channel: String,
        /// What.
        post: Post,
    },
    /// Publishes to many rooms.
    Broadcast {
        /// Where.
        channels: Vec<String>,
        /// What.
        post: Post,
    },
    /// Reads a part of a room's history.
    History {
        /// The room.
        room: RoomId,
        /// Which part.
        page: HistoryOf,
        /// Whether the newest is wanted first.
        reverse: bool,
    },
    /// Asks who is in a room.
    Presence(RoomId),
    /// Asks how many are in a room.
    PresenceStats(RoomId),
    /// Does something to the sessions of a user.
    Order(Order),
    /// Does many things.
    Batch {
        /// The method of each, and what is to be done.
        calls: Vec<(&'static str, Result<Call, Refused>)>,
        /// Whether no call has to wait for the one before it.
        parallel: bool,
    },
}

/// What is published.
#[derive(Debug)]
pub struct Post {
    data: Box<RawValue>,
    id: Option<String>,
    /// In whose name, if a user's.
    pub user: Option<String>,
    /// Whether it must not be kept.
    pub skip_history: bool,
}

/// A body that can't be read: not JSON, or a field of another type.
#[derive(Debug, thiserror::Error)]
#[error("the body is not the JSON of this method: {0}")]
pub struct Unreadable(#[from] serde_json::Error);

impl Unreadable {
    /// Whether it is JSON.
    #[must_use]
    pub fn is_json(&self) -> bool {
        self.0.is_data()
    }
}

/// The answer to a call.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// What was found or done.
    Result(Box<RawValue>),
    /// Nothing was done.
    Error(Failure),
    /// The answers to the calls of a batch.
    Replies(Vec<Box<RawValue>>),
}

/// Why nothing was done.
#[derive(Debug, Serialize)]
pub struct Failure {
    code: u32,
    message: String,
}

/// The fields of all methods but `history`.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Fields {
    channel: Option<String>,
    channels: Option<Vec<String>>,
    #[serde(deserialize_with = "present")]
    data: Option<Box<RawValue>>,
    b64data: Option<String>,
    tags: Option<serde_json::Map<String, serde_json::Value>>,
    skip_history: Option<bool>,
    idempotency_key: Option<String>,
    version: Option<u64>,
    user: Option<String>,
    client: Option<String>,
    session: Option<String>,
    whitelist: Option<Vec<String>>,
    disconnect: Option<Disconnect>,
    expired: Option<bool>,
    expire_at: Option<i64>,
    recover_since: Option<IgnoredAny>,
}

/// The fields of `batch`: in each command one method with its fields.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Batch {
    commands: Option<Vec<BTreeMap<String, Box<RawValue>>>>,
    parallel: Option<bool>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Disconnect {
    code: Option<u16>,
    reason: Option<String>,
}

/// A field that is present is `Some`, even if it is `null`: any JSON can be published.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Box<RawValue>>, D::Error> {
    Box::<RawValue>::deserialize(deserializer).map(Some)
}

fn bad(text: impl Into<String>) -> Refused {
    Refused::new(ErrorCode::BadRequest, text)
}

/// The method of that name, if there is one.
#[must_use]
pub fn method(name: &str) -> Option<&'static str> {
    METHODS.into_iter().find(|known| *known == name)
}

/// What a call of `method`, one of [`method`], means.
///
/// # Errors
/// [`Unreadable`]. What can be read and means nothing is the inner refusal.
pub fn decode(method: &'static str, json: &[u8]) -> Result<Result<Call, Refused>, Unreadable> {
    if method == "history" {
        return Ok(history(&serde_json::from_slice(json)?));
    }
    if method == "batch" {
        let Batch { commands, parallel } = serde_json::from_slice(json)?;
        return Ok(batch(commands.unwrap_or_default(), parallel == Some(true)));
    }
    let fields: Fields = serde_json::from_slice(json)?;
    Ok(meaning(method, fields))
}

fn meaning(method: &'static str, fields: Fields) -> Result<Call, Refused> {
    match method {
        "publish" => Ok(Call::Publish {
            channel: fields.channel.clone().unwrap_or_default(),
            post: post(fields)?,
        }),
        "broadcast" => {
            let channels = fields.channels.clone().unwrap_or_default();
            if channels.is_empty() {
                return Err(bad("channels is missing"));
            }
            at_once("channels", channels.len())?;
            let post = post(fields)?;
            Ok(Call::Broadcast { channels, post })
        }
        "presence" => Ok(Call::Presence(room(fields.channel)?)),
        "presence_stats" => Ok(Call::PresenceStats(room(fields.channel)?)),
        _ => order(method, fields).map(Call::Order),
    }
}

fn at_once(what: &str, number: usize) -> Result<(), Refused> {
    if number <= MAX_AT_ONCE {
        return Ok(());
    }
    let text = format!("{what}: {number} of them, the limit is {MAX_AT_ONCE}");
    Err(Refused::new(ErrorCode::Limit, text))
}

fn room(channel: Option<String>) -> Result<RoomId, Refused> {
    match channel.as_deref() {
        None | Some("") => Err(bad("channel is missing")),
        Some(channel) => client::room(channel),
    }
}

fn user(user: Option<String>) -> Result<String, Refused> {
    let user = user.unwrap_or_default();
    match user_flaw(&user) {
        None => Ok(user),
        Some(rule) => Err(bad(format!("user {rule}"))),
    }
}

fn post(fields: Fields) -> Result<Post, Refused> {
    let data = match (fields.b64data.filter(|data| !data.is_empty()), fields.data) {
        (Some(data), _) => {
            let decoded = STANDARD.decode(data).map_err(|error| error.to_string());
            let json = decoded.and_then(|data| {
                serde_json::from_slice::<Box<RawValue>>(&data).map_err(|error| error.to_string())
            });
            json.map_err(|error| bad(format!("b64data is not JSON text in base64: {error}")))?
        }
        (None, Some(data)) => data,
        (None, None) => return Err(bad("data is missing")),
    };
    if fields.tags.is_some_and(|tags| !tags.is_empty()) {
        return Err(bad("tags of publications are not kept: put them into data"));
    }
    if fields.version.is_some_and(|version| version != 0) {
        return Err(bad("version is not supported"));
    }
    let id = fields.idempotency_key.filter(|id| !id.is_empty());
    if let Some(id) = &id {
        MessageId::parse(id).map_err(|error| {
            let text = format!("idempotency_key is the id of the message: {error}");
            Refused::new(ErrorCode::BadId, text)
        })?;
    }
    let named = fields.user.filter(|user| !user.is_empty());
    Ok(Post {
        data,
        id,
        user: named.map(|name| user(Some(name))).transpose()?,
        skip_history: fields.skip_history == Some(true),
    })
}

impl Post {
    /// The publication in one room.
    ///
    /// # Errors
    /// The refusal for the back end.
    pub fn to(&self, channel: &str) -> Result<Publication, Refused> {
        let draft = Draft {
            id: self.id.as_deref(),
            body: Some(&self.data),
            ..Draft::default()
        };
        Publication::new(room(Some(channel.to_owned()))?, draft)
    }
}

/// What is done to the sessions of a user. The fields that pick one of them can't be honoured: an edge does not know
/// sessions by their names.
fn order(method: &str, fields: Fields) -> Result<Order, Refused> {
    let picks = [
        ("client", fields.client.is_some_and(|it| !it.is_empty())),
        ("session", fields.session.is_some_and(|it| !it.is_empty())),
        (
            "whitelist",
            fields.whitelist.is_some_and(|it| !it.is_empty()),
        ),
    ];
    if let Some((name, _)) = picks.iter().find(|(_, is_given)| *is_given) {
        return Err(bad(format!(
            "{name} is not supported: this is for all sessions of the user"
        )));
    }
    let user = user(fields.user)?;
    let at = |seconds: i64| u64::try_from(seconds).unwrap_or_default();
    // 0 is the same as nothing, and means no end.
    let until = fields.expire_at.filter(|at| *at != 0);
    let until = until.map_or(LAST_SECOND, |seconds| at(seconds).min(LAST_SECOND));
    let what = match method {
        "disconnect" => match fields.disconnect {
            None => OrderKind::disconnect(),
            Some(disconnect) => disconnect.checked()?,
        },
        "unsubscribe" => OrderKind::Leave {
            room: room(fields.channel)?,
        },
        "subscribe" => {
            if fields.recover_since.is_some() {
                return Err(bad("recover_since is not supported"));
            }
            if fields.b64data.is_some_and(|data| !data.is_empty()) {
                return Err(bad("b64data is not supported here: use data"));
            }
            OrderKind::Join {
                room: room(fields.channel)?,
                until,
                data: fields.data.filter(|data| data.get() != "null"),
            }
        }
        _ if fields.expired == Some(true) => OrderKind::Expire,
        _ => OrderKind::Extend { exp: until },
    };
    Ok(Order {
        user: user.into(),
        what,
    })
}

impl Disconnect {
    fn checked(self) -> Result<OrderKind, Refused> {
        let code = self.code.unwrap_or_default();
        if !(3000..5000).contains(&code) {
            return Err(bad(format!(
                "disconnect.code is {code}, must be 3000 to 4999"
            )));
        }
        let reason = self.reason.unwrap_or_default();
        if reason.len() > MAX_REASON {
            let text = format!(
                "disconnect.reason has {} bytes, the limit is {MAX_REASON}",
                reason.len()
            );
            return Err(bad(text));
        }
        // Without a reason, some clients take it for a broken connection.
        let reason = match reason.as_str() {
            "" => "disconnected".to_owned(),
            _ => reason,
        };
        Ok(OrderKind::Disconnect { code, reason })
    }
}

fn history(request: &HistoryRequest) -> Result<Call, Refused> {
    if request.channel.is_empty() {
        return Err(bad("channel is missing"));
    }
    match client::history(request)? {
        Command::History { room, page } => Ok(Call::History {
            room,
            page,
            reverse: request.reverse,
        }),
        _ => Err(Refused::new(ErrorCode::Internal, "this is not a history")),
    }
}

fn batch(commands: Vec<BTreeMap<String, Box<RawValue>>>, parallel: bool) -> Result<Call, Refused> {
    at_once("commands", commands.len())?;
    let calls = commands.into_iter().map(|command| {
        let known = command
            .iter()
            .find_map(|(name, fields)| Some((method(name)?, fields)));
        match known {
            None => (
                "error",
                Err(Refused::new(ErrorCode::UnknownOp, "no known method")),
            ),
            Some(("batch", _)) => ("batch", Err(bad("a batch can't be in a batch"))),
            Some((method, fields)) => {
                let call = decode(method, fields.get().as_bytes());
                let call = call.unwrap_or_else(|error| Err(bad(error.to_string())));
                (method, call)
            }
        }
    });
    Ok(Call::Batch {
        calls: calls.collect(),
        parallel,
    })
}

fn raw(value: &impl Serialize) -> Box<RawValue> {
    to_raw_value(value).expect("writing plain data to memory")
}

/// A position, or nothing in a room that keeps no log.
#[derive(Serialize)]
struct Position {
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<String>,
}

/// The result of a publish on an edge of the region `own`.
#[must_use]
pub fn published(published: &PublishReply, own: &Region) -> Box<RawValue> {
    let cursor = published.cursor.as_ref();
    let position = cursor.and_then(|cursor| position::of_cursor(cursor, own));
    let (offset, epoch) = position.unzip();
    raw(&Position { offset, epoch })
}

/// The result of a broadcast.
#[must_use]
pub fn broadcast(responses: Vec<Answer>) -> Box<RawValue> {
    raw(&BTreeMap::from([("responses", responses)]))
}

/// A page of history.
#[must_use]
pub fn page(page: &HistoryReply, reverse: bool) -> Box<RawValue> {
    let result: HistoryResult = encode::history_result(page, reverse);
    raw(&result)
}

/// Who is in a room.
#[must_use]
pub fn presence(presence: &PresenceReply) -> Box<RawValue> {
    raw(&encode::presence_result(presence))
}

/// How many are in a room.
#[must_use]
pub fn presence_stats(presence: &PresenceReply) -> Box<RawValue> {
    raw(&encode::presence_stats_result(presence))
}

/// The result of what has none.
#[must_use]
pub fn done() -> Box<RawValue> {
    raw(&BTreeMap::<&str, u8>::new())
}

impl Answer {
    /// The answer to one call.
    #[must_use]
    pub fn of(result: Result<Box<RawValue>, Refused>) -> Self {
        match result {
            Ok(result) => Self::Result(result),
            Err(refused) => Self::Error(Failure::of(&refused)),
        }
    }

    /// The answer to the calls of a batch, each with its method.
    #[must_use]
    pub fn of_all(results: Vec<(&'static str, Result<Box<RawValue>, Refused>)>) -> Self {
        let replies = results.into_iter().map(|(method, result)| match result {
            Ok(result) => raw(&BTreeMap::from([(method, result)])),
            Err(refused) => raw(&BTreeMap::from([("error", Failure::of(&refused))])),
        });
        Self::Replies(replies.collect())
    }
}

impl Failure {
    fn of(refused: &Refused) -> Self {
        // A cursor is a position wherever a back end gives one.
        let error = encode::error(Method::History { reverse: false }, refused);
        Self {
            code: error.code,
            message: error.message,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(name: &str, json: &str) -> String {
        let call = decode(method(name).unwrap(), json.as_bytes()).unwrap();
        call.map(|call| panic!("{name} {json}: {call:?}"))
            .unwrap_err()
            .to_string()
    }

    fn order_of(name: &str, json: &str) -> OrderKind {
        match decode(method(name).unwrap(), json.as_bytes()) {
            Ok(Ok(Call::Order(order))) => order.what,
            other => panic!("{name} {json}: {other:?}"),
        }
    }

    #[test]
    fn nothing_and_null_are_the_same() {
        let null = r#"{"user":"kim","channel":"a:b","client":null,"session":null,"expire_at":null,"data":null,"disconnect":null,"expired":null,"whitelist":null}"#;
        for json in [null, r#"{"user":"kim","channel":"a:b"}"#] {
            let what = order_of("subscribe", json);
            let OrderKind::Join { until, data, .. } = what else {
                panic!("{what:?}")
            };
            assert_eq!((until, data.is_none()), (LAST_SECOND, true));
            let what = order_of("refresh", json);
            assert!(matches!(what, OrderKind::Extend { exp: LAST_SECOND }));
            let what = order_of("disconnect", json);
            assert!(matches!(what, OrderKind::Disconnect { code: 3503, .. }));
        }
    }

    #[test]
    fn codes_and_reasons_fit_into_a_close_frame() {
        let json = |code: u16, reason: &str| {
            format!(r#"{{"user":"kim","disconnect":{{"code":{code},"reason":"{reason}"}}}}"#)
        };
        for code in [0, 1000, 2999, 5000, u16::MAX] {
            assert!(refusal("disconnect", &json(code, "x")).contains("3000 to 4999"));
        }
        let longest = "x".repeat(MAX_REASON);
        for (code, given, expected) in [(3000, "", "disconnected"), (4999, &*longest, &*longest)] {
            let what = order_of("disconnect", &json(code, given));
            let OrderKind::Disconnect { code: its, reason } = what else {
                panic!("{what:?}")
            };
            assert_eq!((its, &*reason), (code, expected));
        }
        assert!(refusal("disconnect", &json(4000, &format!("{longest}x"))).contains("123"));
    }

    #[test]
    fn times_before_1970_and_after_9999_are_the_first_and_the_last() {
        for (given, exp) in [(-1, 0), (7, 7), (i64::MAX, LAST_SECOND)] {
            let json = format!(r#"{{"user":"kim","expire_at":{given}}}"#);
            let what = order_of("refresh", &json);
            assert!(
                matches!(what, OrderKind::Extend { exp: its } if its == exp),
                "{what:?}"
            );
        }
    }

    #[test]
    fn a_batch_has_a_limit() {
        let json = |count: usize| {
            let commands = vec![r#"{"publish":{}}"#; count].join(",");
            format!(r#"{{"commands":[{commands}]}}"#)
        };
        assert!(refusal("batch", &json(MAX_AT_ONCE + 1)).contains("1000"));
        let Ok(Ok(Call::Batch { calls, parallel })) = decode("batch", json(MAX_AT_ONCE).as_bytes())
        else {
            panic!("it is refused")
        };
        assert_eq!((calls.len(), parallel), (MAX_AT_ONCE, false));
        assert!(
            calls
                .iter()
                .all(|(method, call)| *method == "publish" && call.is_err())
        );
    }

    #[test]
    fn data_is_what_was_sent() {
        let body = r#"{ "b" :1.0, "a":12345678901234567890 }"#;
        let json = format!(r#"{{"channel":"a:b","data":{body}}}"#);
        let Ok(Ok(Call::Publish { channel, post })) = decode("publish", json.as_bytes()) else {
            panic!("it is refused")
        };
        assert_eq!(post.to(&channel).unwrap().body.get(), body);
        assert!(
            decode("publish", br#"{"channel":"a:b","data":null}"#)
                .unwrap()
                .is_ok()
        );
    }
}
