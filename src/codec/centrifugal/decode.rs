//! Decoding commands.

use bytes::Bytes;
use prost::Message as _;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    Call, Method, position,
    proto::{self, ChannelRequest, HistoryRequest, SubscribeRequest},
};
use crate::{
    codec::{MAX_COMMANDS, Names, Request, Tag, native},
    model::RoomId,
    protocol::{Anchor, Command, Draft, ErrorCode, HistoryOf, PageOf, Publication, Refused, Wants},
};

/// The bit of `flag` in a subscribe that asks for an error if the position can't be recovered.
const REJECT_UNRECOVERED: i64 = 2;

/// Decodes a text message: JSON objects, with white space between them.
pub(in crate::codec) fn decode_json(text: &str, mut each: impl FnMut(Request)) {
    let values = serde_json::Deserializer::from_str(text).into_iter::<&RawValue>();
    for (count, value) in values.enumerate() {
        let command = value.ok().and_then(|value| {
            // Otherwise the fields could be given as an array.
            let is_object = value.get().starts_with('{');
            is_object.then(|| serde_json::from_str::<proto::Command>(value.get()).ok())?
        });
        match command {
            Some(command) if count < MAX_COMMANDS => {
                if !take(command, &mut each) {
                    return;
                }
            }
            _ => return each(Request::unreadable("this JSON")),
        }
    }
}

/// Decodes a binary message: Protobuf messages, each after its length.
pub(in crate::codec) fn decode_protobuf(mut message: &[u8], mut each: impl FnMut(Request)) {
    for count in 0.. {
        if message.is_empty() {
            return;
        }
        if count == MAX_COMMANDS {
            return each(Request::unreadable("one command too many"));
        }
        match proto::Command::decode_length_delimited(&mut message) {
            Ok(command) => {
                if !take(command, &mut each) {
                    return;
                }
            }
            Err(_detail) => {
                each(Request::unreadable("this Protobuf"));
                return;
            }
        }
    }
}

/// Passes on what a command means. One without content is the answer to a ping. Returns whether it is a command: nothing is
/// read after what is not.
fn take(command: proto::Command, each: &mut impl FnMut(Request)) -> bool {
    let id = command.id;
    let request = match meaning(command) {
        Some((method, command)) if id != 0 || method == Method::Send => Request {
            tag: Tag::Call(Call { id, method }),
            command,
        },
        Some(_) => Request::unreadable("a method without an id"),
        None if id == 0 => Request {
            tag: Tag::None,
            command: Ok(Command::Pong),
        },
        None => Request::unreadable("an id without a method"),
    };
    let is_command = request.tag != Tag::None || request.command.is_ok();
    each(request);
    is_command
}

/// The method of a command, and what it means. `None` if it has no method.
fn meaning(command: proto::Command) -> Option<(Method, Result<Command, Refused>)> {
    let proto::Command {
        id: _,
        connect,
        subscribe,
        unsubscribe,
        publish,
        presence,
        presence_stats,
        history,
        ping,
        send,
        rpc,
        refresh,
        sub_refresh,
    } = command;
    if let Some(connect) = connect {
        // A channel that can't be read is not one that the token subscribes to.
        let subs = connect.subs.into_iter().filter(|(_, sub)| sub.recover);
        let since = subs.filter_map(|(channel, sub)| {
            let since = position::since(sub.offset, &sub.epoch, false);
            Some((room(&channel).ok()?, since))
        });
        let command = Command::Auth {
            token: Some(connect.token).filter(|token| !token.is_empty()),
            login: None,
            beats: None,
            since: since.collect(),
        };
        return Some((Method::Connect, Ok(command)));
    }
    if let Some(request) = subscribe {
        let method = Method::Subscribe {
            recovers: request.recover,
        };
        return Some((method, self::subscribe(*request)));
    }
    if let Some(ChannelRequest { channel }) = unsubscribe {
        let leave = room(&channel).map(|room| Command::Leave { room });
        return Some((Method::Unsubscribe, leave));
    }
    if let Some(request) = publish {
        return Some((Method::Publish, self::publish(&request)));
    }
    if let Some(ChannelRequest { channel }) = presence {
        let presence = self::presence(&channel, PageOf::MAX);
        return Some((Method::Presence, presence));
    }
    if let Some(ChannelRequest { channel }) = presence_stats {
        return Some((Method::PresenceStats, self::presence(&channel, 1)));
    }
    if let Some(request) = history {
        let method = Method::History {
            reverse: request.reverse,
        };
        return Some((method, self::history(&request)));
    }
    if let Some(rpc) = rpc {
        return Some((Method::Rpc, call(&rpc.method, &rpc.data)));
    }
    if let Some(refresh) = refresh {
        let token = refresh.token;
        return Some((Method::Refresh, Ok(Command::Refresh { token })));
    }
    if let Some(request) = sub_refresh {
        let token = request.token;
        let refresh = room(&request.channel).map(|room| Command::RefreshJoin { room, token });
        return Some((Method::SubRefresh, refresh));
    }
    if ping.is_some() {
        return Some((Method::Ping, Ok(Command::Ping)));
    }
    send.map(|_nobody_takes_it| {
        let text = "a message to the server has no receiver: publish, or call by rpc";
        (Method::Send, Err(Refused::new(ErrorCode::UnknownOp, text)))
    })
}

pub(super) fn room(channel: &str) -> Result<RoomId, Refused> {
    Names::Centrifugal.room(channel)
}

fn bad(text: &str) -> Refused {
    Refused::new(ErrorCode::BadRequest, text)
}

/// What natter understands of the `data` of a subscribe. Applications may send data of their own.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Options {
    typing: bool,
    read: bool,
}

fn subscribe(request: SubscribeRequest) -> Result<Command, Refused> {
    if request.tf.is_some() {
        return Err(bad("filters by tags are not supported"));
    }
    if request.kind != 0 {
        return Err(bad("only subscriptions to streams (type 0) are supported"));
    }
    // Otherwise the options could be given as an array.
    let data = Some(&request.data).filter(|data| data.starts_with(b"{"));
    let options = data.and_then(|data| serde_json::from_slice::<Options>(data).ok());
    let options = options.unwrap_or_default();
    let or_refuse = request.flag & REJECT_UNRECOVERED != 0;
    let since = request.recover;
    Ok(Command::Join {
        room: room(&request.channel)?,
        since: since.then(|| Box::new(position::since(request.offset, &request.epoch, or_refuse))),
        wants: Wants {
            typing: options.typing,
            presence: request.join_leave,
            read: options.read,
        },
        token: Some(request.token)
            .filter(|token| !token.is_empty())
            .map(Into::into),
        subscription: None,
    })
}

/// JSON text in `data`.
fn json(data: &Bytes) -> Result<&RawValue, Refused> {
    serde_json::from_slice(data).map_err(|error| {
        let text = format!("data is not JSON: {error}");
        Refused::new(ErrorCode::BadJson, text)
    })
}

fn publish(request: &proto::PublishRequest) -> Result<Command, Refused> {
    if request.kind != 0 {
        return Err(bad("only publications to streams (type 0) are supported"));
    }
    let room = room(&request.channel)?;
    if request.data.is_empty() {
        return Err(bad("data is missing"));
    }
    let draft = Draft {
        body: Some(json(&request.data)?),
        ..Draft::default()
    };
    let publication = Publication::new(room, draft)?;
    Ok(Command::Send(Box::new(publication)))
}

fn presence(channel: &str, limit: usize) -> Result<Command, Refused> {
    Ok(Command::Presence {
        room: room(channel)?,
        page: PageOf { after: None, limit },
    })
}

pub(super) fn history(request: &HistoryRequest) -> Result<Command, Refused> {
    let HistoryRequest {
        channel,
        limit,
        since,
        reverse,
    } = request;
    let limit = match usize::try_from(*limit) {
        Ok(limit) => limit.min(HistoryOf::MAX),
        // All, which means as much as a page has.
        Err(_negative) => HistoryOf::MAX,
    };
    let at = |since: &proto::StreamPosition| {
        position::cursor_at(since.offset, &since.epoch).ok_or_else(|| {
            let text = "since has an epoch that is not of this room";
            Refused::new(ErrorCode::BadCursor, text)
        })
    };
    let anchor = match (since, reverse) {
        (None, false) => Anchor::After(String::new()),
        (None, true) => Anchor::Newest,
        (Some(since), false) if since.offset == 0 => Anchor::After(String::new()),
        (Some(since), true) if since.offset == 0 => Anchor::Newest,
        (Some(since), false) => Anchor::After(at(since)?),
        (Some(since), true) => Anchor::Before(at(since)?),
    };
    Ok(Command::History {
        room: room(channel)?,
        page: HistoryOf {
            anchor,
            limit,
            thread: None,
        },
    })
}

/// A call of a method that natter has: the commands of `natter.v1` besides those that are methods of this protocol.
fn call(method: &str, data: &Bytes) -> Result<Command, Refused> {
    const METHODS: [&str; 15] = [
        "send", "typing", "read", "readers", "presence", "unread", "history", "search", "create",
        "room", "inbox", "settings", "member", "arrange", "block",
    ];
    let op = method
        .strip_prefix("room.")
        .filter(|op| METHODS.contains(op));
    let Some(op) = op else {
        let shown: String = method.chars().take(80).collect();
        let text = format!("there is no method {shown:?}");
        return Err(Refused::new(ErrorCode::UnknownOp, text));
    };
    let fields = match &**data {
        b"" | b"null" => "{}",
        data => std::str::from_utf8(data)
            .map_err(|error| Refused::new(ErrorCode::BadJson, error.to_string()))?,
    };
    native::decode_command(op, fields)
}
