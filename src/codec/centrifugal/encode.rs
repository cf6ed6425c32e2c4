//! Encoding replies, pushes and messages.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use prost::Message as _;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    Call, Form, Method, position,
    proto::{
        self, ClientInfo, ConnectResult, DisconnectPush, Empty, HistoryResult, InfoPush,
        PresenceResult, PresenceStatsResult, Publication, Push, RefreshPush, RefreshResult,
        RpcResult, SubRefreshResult, SubscribePush, SubscribeResult, UnsubscribePush,
    },
};
use crate::{
    codec::{Encoded, Names, Tag, put_json_string},
    model::{Cursor, Region, RoomId},
    protocol::{
        Close, ErrorCode, Event, HistoryReply, JoinReply, MessagePush, Obeyed, OrderKind,
        PING_EVERY, PresenceChange, PresenceReply, PresenceState, Refused, Reply, Validity,
    },
    wire::{FrameBuilder, close_frame},
};

/// Initial capacity for the fields of a message besides its body.
const ENVELOPE: usize = 256;

/// Codes of `unsubscribe` pushes: the client does not subscribe again, and it does.
const UNSUBSCRIBED: u32 = 2000;
const RESUBSCRIBE: u32 = 2500;
const EXPIRED: u32 = 2501;

/// The frame of a reply or push.
fn frame(form: Form, reply: &proto::Reply) -> Bytes {
    if form.is_protobuf() {
        let mut bytes = BytesMut::with_capacity(reply.encoded_len() + 10);
        reply
            .encode_length_delimited(&mut bytes)
            .expect("the buffer grows");
        let mut frame = FrameBuilder::new(form.framing(), bytes.len());
        frame.put(&bytes);
        return frame.finish();
    }
    let mut json = serde_json::to_vec(reply).expect("writing plain data to memory");
    // Values that are passed on as they were written may have white space between tokens. The protocol separates objects
    // by line breaks, and a string can't contain one that is not escaped.
    for byte in &mut json {
        if is_break(*byte) {
            *byte = b' ';
        }
    }
    let mut frame = FrameBuilder::new(form.framing(), json.len());
    frame.put(&json);
    frame.finish()
}

fn is_break(byte: u8) -> bool {
    matches!(byte, b'\n' | b'\r')
}

/// The frame of a push to the members of a room.
fn push(form: Form, push: Push) -> Bytes {
    let reply = proto::Reply {
        push: Some(Box::new(push)),
        ..proto::Reply::default()
    };
    frame(form, &reply)
}

/// The frame that pings a client: a reply without content.
pub(in crate::codec) fn ping(form: Form) -> Bytes {
    frame(form, &proto::Reply::default())
}

/// Seconds for which a token is valid, as `expires` and `ttl`.
fn validity(of: Validity) -> (bool, u32) {
    // 0 would mean that nothing was said, and make clients refresh without pause.
    let ttl = |seconds: u64| u32::try_from(seconds).unwrap_or(u32::MAX).max(1);
    (of.ttl.is_some(), of.ttl.map_or(0, ttl))
}

/// The version that clients are told.
fn version() -> String {
    concat!("natter ", env!("CARGO_PKG_VERSION")).to_owned()
}

/// The frame of a reply.
pub(in crate::codec) fn reply(form: Form, tag: &Tag, reply: &Reply) -> Bytes {
    let &Tag::Call(Call { id, method }) = tag else {
        // Commands without a number have no replies but refusals.
        return ping(form);
    };
    let mut answer = proto::Reply {
        id,
        ..proto::Reply::default()
    };
    match (method, reply) {
        (Method::Connect, Reply::Authed(authed)) => {
            let (expires, ttl) = validity(authed.validity);
            let joined = authed.joined.iter();
            let subs = joined.map(|(joined, recovers)| {
                let result = subscribe_result(joined, *recovers);
                (Names::Centrifugal.name(&joined.room).into_owned(), result)
            });
            answer.connect = Some(Box::new(ConnectResult {
                client: authed.session.clone(),
                version: version(),
                expires,
                ttl,
                subs: subs.collect(),
                ping: u32::try_from(PING_EVERY.as_secs()).unwrap_or(u32::MAX),
                pong: true,
                session: authed
                    .stream
                    .as_ref()
                    .map_or_else(String::new, |stream| stream.session.to_string()),
                node: authed
                    .stream
                    .as_ref()
                    .map_or_else(String::new, |stream| stream.node.to_string()),
            }));
        }
        (Method::Refresh, Reply::Refreshed(of)) => {
            let (expires, ttl) = validity(*of);
            answer.refresh = Some(RefreshResult { expires, ttl });
        }
        (Method::SubRefresh, Reply::Refreshed(of)) => {
            let (expires, ttl) = validity(*of);
            answer.sub_refresh = Some(SubRefreshResult { expires, ttl });
        }
        (Method::Subscribe { recovers }, Reply::Joined(joined)) => {
            answer.subscribe = Some(Box::new(subscribe_result(joined, recovers)));
        }
        (Method::Presence, Reply::Presence(presence)) => {
            answer.presence = Some(presence_result(presence));
        }
        (Method::PresenceStats, Reply::Presence(presence)) => {
            answer.presence_stats = Some(presence_stats_result(presence));
        }
        (Method::History { reverse }, Reply::History(page)) => {
            answer.history = Some(Box::new(history_result(page, reverse)));
        }
        (Method::Unsubscribe, _) => answer.unsubscribe = Some(Empty {}),
        (Method::Publish, _) => answer.publish = Some(Empty {}),
        (Method::Ping, _) => answer.ping = Some(Empty {}),
        (_, reply) => {
            let data = Bytes::from(reply.to_json());
            answer.rpc = Some(RpcResult { data });
        }
    }
    frame(form, &answer)
}

/// The frame that tells a client what its back end did to its session.
pub(in crate::codec) fn obeyed(form: Form, obeyed: &Obeyed<'_>) -> Bytes {
    match obeyed {
        Obeyed::Disconnected(code, reason) => end(form, *code, reason),
        Obeyed::Joined(joined, data) => {
            let SubscribeResult {
                recoverable,
                epoch,
                offset,
                positioned,
                ..
            } = subscribe_result(joined, false);
            let data = data.map_or_else(Bytes::new, |data| {
                Bytes::copy_from_slice(data.get().as_bytes())
            });
            let subscribe = Some(Box::new(SubscribePush {
                recoverable,
                epoch,
                offset,
                positioned,
                data,
            }));
            let channel = Names::Centrifugal.name(&joined.room).into_owned();
            push(
                form,
                Push {
                    channel,
                    subscribe,
                    ..Push::default()
                },
            )
        }
        Obeyed::Extended(of) => {
            let (expires, ttl) = validity(*of);
            let refresh = Some(RefreshPush { expires, ttl });
            push(
                form,
                Push {
                    refresh,
                    ..Push::default()
                },
            )
        }
    }
}

fn subscribe_result(joined: &JoinReply, recovers: bool) -> SubscribeResult {
    // Where the client stands before the messages that follow. If there are none, it stands where the room stands.
    let stands = match joined.replay {
        0 => joined.head.as_ref(),
        _ => joined.cursor.as_ref(),
    };
    let position = stands.and_then(|cursor| position::of_cursor(cursor, &joined.own));
    let recoverable = position.is_some();
    let (offset, epoch) = position.unwrap_or_default();
    let (expires, ttl) = joined.validity.map(validity).unwrap_or_default();
    SubscribeResult {
        expires,
        ttl,
        recoverable,
        epoch,
        recovered: recovers && recoverable && !joined.reset,
        offset,
        positioned: recoverable,
        was_recovering: recovers,
    }
}

/// Who is in a room. Users have no connections there, so the name of the user stands for both.
pub(super) fn presence_result(presence: &PresenceReply) -> PresenceResult {
    let users = presence.users.iter().map(|present| {
        let info = info(&present.user, present.info.as_deref());
        (present.user.to_string(), info)
    });
    PresenceResult {
        presence: users.collect(),
    }
}

/// How many are in a room. For the same reason the numbers are the same.
pub(super) fn presence_stats_result(presence: &PresenceReply) -> PresenceStatsResult {
    let users = u32::try_from(presence.count).unwrap_or(u32::MAX);
    PresenceStatsResult {
        num_clients: users,
        num_users: users,
    }
}

fn info(user: &str, conn_info: Option<&RawValue>) -> ClientInfo {
    ClientInfo {
        user: user.to_owned(),
        client: user.to_owned(),
        conn_info: conn_info.map_or_else(Bytes::new, |info| {
            Bytes::copy_from_slice(info.get().as_bytes())
        }),
    }
}

/// Of a message in a page of history, what a publication has.
#[derive(Deserialize)]
struct Past<'a> {
    id: String,
    from: String,
    ts: u64,
    cursor: String,
    #[serde(borrow)]
    body: Option<&'a RawValue>,
    reply_to: Option<String>,
    #[serde(borrow)]
    mentions: Option<&'a RawValue>,
}

pub(super) fn history_result(page: &HistoryReply, reverse: bool) -> HistoryResult {
    let past = page.messages.iter().filter_map(|message| {
        let past = serde_json::from_str::<Past<'_>>(message.get());
        past.inspect_err(|error| tracing::error!(%error, "a message of the history can't be read"))
            .ok()
    });
    let publications = past.map(|past| {
        let cursor: Option<Cursor> = past.cursor.parse().ok();
        let own = page.own.as_ref();
        let own = own.and_then(|own| cursor.as_ref()?.get(own));
        let mut tags = BTreeMap::from([("id".to_owned(), past.id)]);
        tags.extend(past.reply_to.map(|to| ("reply_to".to_owned(), to)));
        let mentions = past.mentions.map(|users| users.get().to_owned());
        tags.extend(mentions.map(|users| ("mentions".to_owned(), users)));
        if own.is_none() {
            tags.insert("cursor".to_owned(), past.cursor);
        }
        // A message that was deleted has no body.
        let body = past.body.map_or("null", RawValue::get);
        Publication {
            data: Bytes::copy_from_slice(body.as_bytes()),
            info: Some(sender(&past.from)),
            offset: own.and_then(position::offset_of).unwrap_or_default(),
            tags,
            time: i64::try_from(past.ts).unwrap_or_default(),
        }
    });
    let mut publications: Vec<Publication> = publications.collect();
    if reverse {
        publications.reverse();
    }
    let at = |own: &Region| position::of_cursor(page.head.as_ref()?, own);
    let (offset, epoch) = page.own.as_ref().and_then(at).unwrap_or_default();
    HistoryResult {
        publications,
        epoch,
        offset,
    }
}

/// The sender of a message. It is not known on which connection it was sent.
fn sender(user: &str) -> ClientInfo {
    ClientInfo {
        user: user.to_owned(),
        ..ClientInfo::default()
    }
}

/// The frame that tells a client that its command was refused. `None` if the command has no reply.
pub(in crate::codec) fn refusal(form: Form, tag: &Tag, refused: &Refused) -> Option<Bytes> {
    let &Tag::Call(Call { id, method }) = tag else {
        return None;
    };
    let mut answer = proto::Reply {
        id,
        ..proto::Reply::default()
    };
    match method {
        Method::Send => return None,
        // Clients take an error as a reason to reconnect. Whatever was wrong, the client is not subscribed.
        Method::Unsubscribe => answer.unsubscribe = Some(Empty {}),
        _ => answer.error = Some(error(method, refused)),
    }
    Some(frame(form, &answer))
}

/// The error of a refusal. A client tries again later if it is temporary, and with a new token after 109.
pub(super) fn error(method: Method, refused: &Refused) -> proto::Error {
    let (code, temporary) = match refused.code {
        ErrorCode::BadCursor if is_of_positions(method) => (112, false),
        ErrorCode::Unauthorized if is_expired(method) => (109, false),
        ErrorCode::Unauthorized => (101, false),
        ErrorCode::UnknownNamespace | ErrorCode::UnknownRoom => (102, false),
        ErrorCode::Forbidden | ErrorCode::Infected | ErrorCode::NotJoined => (103, false),
        ErrorCode::UnknownOp => (104, false),
        ErrorCode::Limit => (106, false),
        ErrorCode::BadJson
        | ErrorCode::BadRequest
        | ErrorCode::BadRoom
        | ErrorCode::BadId
        | ErrorCode::BadCursor
        | ErrorCode::Conflict
        | ErrorCode::TooLarge
        | ErrorCode::Erased => (107, false),
        ErrorCode::StreamFull => (108, false),
        ErrorCode::RateLimited => (111, true),
        ErrorCode::Unavailable
        | ErrorCode::Pending
        | ErrorCode::UnknownOutcome
        | ErrorCode::Timeout
        | ErrorCode::Internal => (100, true),
    };
    proto::Error {
        code,
        message: format!("{}: {}", refused.code.as_str(), refused.message),
        temporary,
    }
}

/// Whether a method is refused as unauthorized only if its token has expired. Other bad tokens close the connection, or
/// are forbidden.
fn is_expired(method: Method) -> bool {
    matches!(method, Method::Connect | Method::Subscribe { .. })
}

/// Whether a cursor of the method is an offset and an epoch.
fn is_of_positions(method: Method) -> bool {
    matches!(method, Method::Subscribe { .. } | Method::History { .. })
}

/// The code and reason of a close. Codes from 3500 to 3999 and 1009 are final; after others clients reconnect. Clients
/// reconnect after any code without a reason, and read a reason that is JSON.
fn close_code(close: Close) -> (u16, &'static str) {
    match close {
        Close::Normal => (1000, "closed"),
        Close::GoingAway | Close::Draining => (3001, "shutdown"),
        Close::Internal => (3004, "internal server error"),
        Close::Expired => (3005, "connection expired"),
        Close::TooSlow => (3008, "slow"),
        Close::PingTimeout => (3012, "no pong"),
        Close::BadToken => (3500, "invalid token"),
        Close::Protocol | Close::Unsupported | Close::InvalidUtf8 | Close::ClientProtocol => {
            (3501, "bad request")
        }
        Close::Stale => (3502, "stale"),
        Close::Revoked | Close::Disconnected => OrderKind::DISCONNECT,
        Close::TooBig => (1009, "message size limit"),
        // Of the codes that Centrifugo leaves to applications.
        Close::TooMany => (4005, "too many sessions or commands"),
    }
}

/// What a session ends with.
pub(in crate::codec) fn close(form: Form, close: Close) -> Bytes {
    let (code, reason) = close_code(close);
    end(form, code, reason)
}

/// A WebSocket close frame. A stream ends with a push.
fn end(form: Form, code: u16, reason: &str) -> Bytes {
    if matches!(form, Form::Json | Form::Protobuf) {
        return close_frame(code, reason);
    }
    let disconnect = Some(DisconnectPush {
        code: u32::from(code),
        reason: reason.to_owned(),
        reconnect: false,
    });
    push(
        form,
        Push {
            disconnect,
            ..Push::default()
        },
    )
}

/// The frame of an event. `None` if the protocol has no such push.
pub(in crate::codec) fn event(form: Form, event: &Event) -> Option<Bytes> {
    let told = |room: &RoomId| Push {
        channel: Names::Centrifugal.name(room).into_owned(),
        ..Push::default()
    };
    let pushed = match event {
        Event::Typing { room, user } => Push {
            publication: Some(notice("typing", &serde_json::json!({ "user": user }))),
            ..told(room)
        },
        Event::Read { room, user, cursor } => {
            let data = serde_json::json!({ "user": user, "cursor": cursor.to_string() });
            Push {
                publication: Some(notice("read", &data)),
                ..told(room)
            }
        }
        Event::Presence {
            room,
            change: PresenceChange::User {
                user, state, info, ..
            },
        } => {
            let info = Some(InfoPush {
                info: Some(self::info(user, info.as_deref())),
            });
            match state {
                PresenceState::Join => Push {
                    join: info,
                    ..told(room)
                },
                PresenceState::Leave => Push {
                    leave: info,
                    ..told(room)
                },
                PresenceState::Unreachable | PresenceState::Reachable => return None,
            }
        }
        Event::Kicked { room, code } => {
            let code_of = match *code {
                "forbidden" | "removed" | "banned" | "closed" => UNSUBSCRIBED,
                "expired" => EXPIRED,
                _ => RESUBSCRIBE,
            };
            Push {
                unsubscribe: Some(UnsubscribePush {
                    code: code_of,
                    reason: (*code).to_owned(),
                }),
                ..told(room)
            }
        }
        // Clients know when their token expires, and the code of the close tells them to reconnect.
        Event::Presence {
            change: PresenceChange::Count(_),
            ..
        }
        | Event::Inbox(_)
        | Event::TokenExpiring { .. }
        | Event::Reconnect { .. } => return None,
    };
    Some(push(form, pushed))
}

/// A publication that is not a message: it has no offset, and the name of its event as a tag.
fn notice(event: &str, data: &serde_json::Value) -> Publication {
    Publication {
        data: Bytes::from(data.to_string()),
        tags: BTreeMap::from([("event".to_owned(), event.to_owned())]),
        ..Publication::default()
    }
}

/// What goes with a message besides what every publication has.
fn tags(message: &MessagePush<'_>) -> [(&'static str, Option<String>); 6] {
    let text = |text: Option<&str>| text.map(str::to_owned);
    // A message of another origin has no offset, so its cursor is the only way to name its place.
    let cursor = match message.place {
        Some(_) => None,
        None => message.cursor.map(ToString::to_string),
    };
    // In the order of a map.
    [
        ("cursor", cursor),
        ("id", Some(message.id.to_owned())),
        ("kind", text(message.kind)),
        ("mentions", text(message.mentions)),
        ("reply_to", text(message.reply_to)),
        ("target", text(message.target)),
    ]
}

/// The frame of a message.
pub(in crate::codec) fn message(form: Form, message: &MessagePush<'_>) -> Encoded {
    let offset = message.place.and_then(position::offset_of);
    match form.is_protobuf() {
        true => protobuf_message(form, message, offset),
        false => json_message(form, message, offset),
    }
}

fn protobuf_message(form: Form, message: &MessagePush<'_>, offset: Option<u64>) -> Encoded {
    let tags = tags(message).into_iter();
    let tags = tags.filter_map(|(name, value)| Some((name.to_owned(), value?)));
    let publication = Publication {
        data: Bytes::copy_from_slice(message.body),
        info: Some(sender(message.from)),
        offset: offset.unwrap_or_default(),
        tags: tags.collect(),
        time: i64::try_from(message.ts).unwrap_or_default(),
    };
    let pushed = Push {
        channel: Names::Centrifugal.name(message.room).into_owned(),
        publication: Some(publication),
        ..Push::default()
    };
    Encoded {
        frame: push(form, pushed),
        body: None,
    }
}

fn json_message(form: Form, message: &MessagePush<'_>, offset: Option<u64>) -> Encoded {
    let mut out = FrameBuilder::new(form.framing(), message.body.len() + ENVELOPE);
    out.put(br#"{"push":{"channel":"#);
    put_json_string(&mut out, &Names::Centrifugal.name(message.room));
    out.put(br#","pub":{"data":"#);
    let body_at = out.len();
    let is_plain = memchr::memchr2(b'\n', b'\r', message.body).is_none();
    if is_plain {
        out.put(message.body);
    } else {
        // Only white space between tokens can be a line break; see `frame`.
        let one_line = |byte: &u8| if is_break(*byte) { b' ' } else { *byte };
        let body: Vec<u8> = message.body.iter().map(one_line).collect();
        out.put(&body);
    }
    let body_end = out.len();
    out.put(br#","info":{"user":"#);
    put_json_string(&mut out, message.from);
    out.put(br#","client":""}"#);
    if let Some(offset) = offset {
        out.put(br#","offset":"#);
        out.put(itoa::Buffer::new().format(offset).as_bytes());
    }
    out.put(br#","tags":{"#);
    let mut first = true;
    for (name, value) in tags(message) {
        if let Some(value) = value {
            out.put(if first { b"\"" } else { b",\"" });
            out.put(name.as_bytes());
            out.put(b"\":");
            put_json_string(&mut out, &value);
            first = false;
        }
    }
    out.put(br#"},"time":"#);
    out.put(itoa::Buffer::new().format(message.ts).as_bytes());
    out.put(b"}}}");
    let header = out.header_len();
    let frame = out.finish();
    Encoded {
        body: is_plain.then(|| header + body_at..header + body_end),
        frame,
    }
}
