//! Reading the frames of a client.

use std::{borrow::Cow, collections::HashMap, sync::Arc, time::Duration};

use serde_json::value::RawValue;

use super::{
    Asked, TOPIC, What,
    frame::{Frame, Frames, VERSIONS, Version},
    suffix,
};
use crate::{
    codec::{MAX_COMMANDS, Names, Request, Tag},
    model::RoomId,
    protocol::{
        Beats, Command, Draft, ErrorCode, First, Publication, Refused, ResumeAt, RoomSubscription,
        Since, SubscribedTo, Wants,
    },
};

/// Most frames in the open transactions of a session, and most bytes of them.
const MAX_BUFFERED: usize = 100;
const MAX_BUFFERED_BYTES: usize = 1024 * 1024;

/// Most subscriptions of a session.
const MAX_SUBSCRIPTIONS: usize = 1000;

/// Longest name that a client chooses, in bytes: of a subscription, a receipt or a transaction.
const MAX_NAME: usize = 256;

/// The shortest time between two signs of life, on both sides.
const SHORTEST_BEAT: Duration = Duration::from_secs(1);

/// Reads the frames of one client: cuts them out of its messages, and keeps the names of its subscriptions and its open
/// transactions.
#[derive(Debug)]
pub struct FrameReader {
    frames: Frames,
    /// The version that was agreed on.
    version: Option<Version>,
    subscriptions: HashMap<Box<str>, RoomId>,
    /// What open transactions will do.
    transactions: HashMap<String, Vec<Command>>,
    /// How many those are, and their bytes.
    buffered: (usize, usize),
    /// Whether a frame was refused here. Nothing after it is read.
    is_over: bool,
}

type Read = Result<Command, Refused>;

fn bad(text: impl Into<String>) -> Refused {
    Refused::new(ErrorCode::BadRequest, text)
}

impl FrameReader {
    /// A reader for bodies of up to `most` bytes.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self {
            frames: Frames::new(most),
            version: None,
            subscriptions: HashMap::new(),
            transactions: HashMap::new(),
            buffered: (0, 0),
            is_over: false,
        }
    }

    /// Reads a message. Calls `each` once for each command that it completes, in order. After a refusal nothing is read.
    pub fn read(&mut self, message: &[u8], mut each: impl FnMut(Request)) {
        if self.is_over {
            return;
        }
        self.frames.add(message);
        for count in 0.. {
            match self.frames.next(self.version) {
                Ok(Some(_)) if count == MAX_COMMANDS => {
                    let text = format!("more than {MAX_COMMANDS} frames in one message");
                    let refused = Refused::new(ErrorCode::Limit, text);
                    self.refuse(Tag::None, refused, &mut each);
                }
                Ok(Some(frame)) => self.take(frame, &mut each),
                Ok(None) => break,
                Err(refused) => {
                    self.refuse(Tag::None, refused, &mut each);
                    break;
                }
            }
            if self.is_over {
                break;
            }
        }
        self.frames.compact();
    }

    fn refuse(&mut self, tag: Tag, refused: Refused, each: &mut impl FnMut(Request)) {
        self.is_over = true;
        self.frames = Frames::new(0);
        self.transactions.clear();
        each(Request {
            tag,
            command: Err(refused),
        });
    }

    /// Passes on what a frame means.
    fn take(&mut self, frame: Frame, each: &mut impl FnMut(Request)) {
        let names = ["receipt", "transaction", "id"].into_iter();
        let names = names.filter_map(|name| Some((name, frame.get(name)?)));
        for (name, value) in names {
            // The id of an ACK is not of the client's choice.
            if value.len() > MAX_NAME && (name, &*frame.command) != ("id", "ACK") {
                let text = format!("{name} has {} bytes, the limit is {MAX_NAME}", value.len());
                let refused = Refused::new(ErrorCode::TooLarge, text);
                return self.refuse(Tag::None, refused, each);
            }
        }
        let receipt = frame.get("receipt").map(str::to_owned);
        let is_connect = matches!(&*frame.command, "CONNECT" | "STOMP");
        if self.version.is_none() != is_connect {
            let text = match is_connect {
                true => "the session is connected already",
                false => "the first frame must be CONNECT",
            };
            let refused = Refused::new(ErrorCode::Unauthorized, text);
            return self.refuse(tag(receipt, What::Other), refused, each);
        }
        if let Some(name) = frame.get("transaction").map(str::to_owned) {
            match &*frame.command {
                "COMMIT" => return self.commit(&name, receipt, each),
                "SEND" | "ACK" | "NACK" => {
                    // It is answered when it is buffered.
                    let read = self.buffer(&name, &frame);
                    return self.pass(tag(receipt, What::Other), read, each);
                }
                _ => {}
            }
        }
        let (what, read) = match &*frame.command {
            "CONNECT" | "STOMP" => match self.connect(&frame) {
                Ok((what, command)) => (what, Ok(command)),
                Err(refused) => {
                    let version = Version::V1_2;
                    (What::Connect { version }, Err(refused))
                }
            },
            "SUBSCRIBE" => match self.subscribe(&frame) {
                Ok((what, command)) => (what, Ok(command)),
                Err(refused) => (What::Other, Err(refused)),
            },
            "UNSUBSCRIBE" => (What::Other, Ok(self.unsubscribe(&frame))),
            "SEND" => (What::Other, send(&frame)),
            "ACK" => (What::Other, Ok(ack(&frame))),
            "NACK" => (What::Other, Ok(Command::Ping)),
            "BEGIN" => (What::Other, self.begin(&frame)),
            "ABORT" => (What::Other, self.abort(&frame)),
            "COMMIT" => (What::Other, Err(bad("COMMIT has no transaction"))),
            "DISCONNECT" => (What::Other, Ok(Command::End)),
            other => {
                let shown: String = other.chars().take(80).collect();
                let text = format!("there is no frame {shown:?}");
                (What::Other, Err(Refused::new(ErrorCode::UnknownOp, text)))
            }
        };
        self.pass(tag(receipt, what), read, each);
    }

    fn pass(&mut self, tag: Tag, read: Read, each: &mut impl FnMut(Request)) {
        match read {
            Ok(command) => each(Request {
                tag,
                command: Ok(command),
            }),
            Err(refused) => self.refuse(tag, refused, each),
        }
    }

    fn connect(&mut self, frame: &Frame) -> Result<(What, Command), Refused> {
        let version = match frame.get("accept-version") {
            None => Version::V1_0,
            Some(list) => Version::best(list)
                .ok_or_else(|| bad(format!("the versions that are spoken here are {VERSIONS}")))?,
        };
        let beats = match frame.get("heart-beat") {
            None => Beats::default(),
            Some(text) => beats(text).ok_or_else(|| bad("heart-beat is not two numbers of ms"))?,
        };
        self.version = Some(version);
        let given = |text: &str| Some(text.trim().to_owned()).filter(|text| !text.is_empty());
        let passcode = frame.get("passcode").and_then(given);
        let authorization = || {
            let value = frame.get_in_any_case("authorization")?;
            let (scheme, token) = value.split_once(' ').unwrap_or(("bearer", value));
            scheme
                .eq_ignore_ascii_case("bearer")
                .then(|| given(token))?
        };
        let command = Command::Auth {
            token: passcode.or_else(authorization),
            login: frame.get("login").and_then(given).map(Into::into),
            beats: (beats != Beats::default()).then(|| Box::new(beats)),
            since: Vec::new(),
        };
        Ok((What::Connect { version }, command))
    }

    fn subscribe(&mut self, frame: &Frame) -> Result<(What, Command), Refused> {
        let destination = destination(frame)?;
        let id: Box<str> = match frame.get("id") {
            Some(id) => id.into(),
            // Version 1.0 has subscriptions without a name.
            None if self.version == Some(Version::V1_0) => destination.into(),
            None => return Err(bad("SUBSCRIBE has no id")),
        };
        if let Some(mode) = frame.get("ack")
            && !matches!(mode, "auto" | "client" | "client-individual")
        {
            return Err(bad("ack is not auto, client or client-individual"));
        }
        if self.subscriptions.contains_key(&id) {
            return Err(bad(format!("there is a subscription {id:?} already")));
        }
        if self.subscriptions.len() >= MAX_SUBSCRIPTIONS {
            let text = format!("a session may have {MAX_SUBSCRIPTIONS} subscriptions");
            return Err(Refused::new(ErrorCode::Limit, text));
        }
        let (room, of) = room_of(destination)?;
        let since = match (frame.get("cursor"), frame.get("x-stream-offset")) {
            (Some(cursor), _) => Some(ResumeAt::Cursor(cursor.to_owned())),
            (None, offset) => begins(offset.unwrap_or("next"))?,
        };
        let since = since.map(Since::from);
        if since.is_some() && of != SubscribedTo::Messages {
            return Err(bad("only messages can be resumed"));
        }
        self.subscriptions.insert(id.clone(), room.clone());
        let what = What::Subscribe {
            id: id.clone(),
            resumes: since.is_some(),
        };
        let command = Command::Join {
            room,
            since: since.map(Box::new),
            wants: Wants {
                typing: of == SubscribedTo::Typing,
                presence: of == SubscribedTo::Presence,
                read: false,
            },
            token: None,
            subscription: Some(Box::new(RoomSubscription { id, of })),
        };
        Ok((what, command))
    }

    /// One that is not known has no effect, as clients expect.
    fn unsubscribe(&mut self, frame: &Frame) -> Command {
        let id = frame.get("id").or_else(|| frame.get("destination"));
        let known = id.and_then(|id| self.subscriptions.remove_entry(id));
        match known {
            Some((id, room)) => Command::Unsubscribe { room, id },
            None => Command::Ping,
        }
    }

    fn begin(&mut self, frame: &Frame) -> Read {
        let name = transaction(frame)?;
        if self.transactions.len() >= MAX_BUFFERED {
            return Err(too_many());
        }
        match self.transactions.insert(name.to_owned(), Vec::new()) {
            None => Ok(Command::Ping),
            Some(_) => Err(bad(format!("the transaction {name:?} has begun already"))),
        }
    }

    /// Keeps what a frame will do, and returns what is done at once: a message is checked.
    fn buffer(&mut self, name: &str, frame: &Frame) -> Read {
        let (later, at_once) = match &*frame.command {
            "SEND" => match send(frame)? {
                Command::Send(publication) => {
                    let check = Command::Check(publication.clone());
                    (Command::Send(publication), check)
                }
                other => (other, Command::Ping),
            },
            "ACK" => (ack(frame), Command::Ping),
            _ => (Command::Ping, Command::Ping),
        };
        let (frames, bytes) = (self.buffered.0 + 1, self.buffered.1 + weight(&later));
        if frames > MAX_BUFFERED || bytes > MAX_BUFFERED_BYTES {
            return Err(too_many());
        }
        let transaction = self.transactions.get_mut(name);
        transaction.ok_or_else(|| no_transaction(name))?.push(later);
        self.buffered = (frames, bytes);
        Ok(at_once)
    }

    fn end(&mut self, name: &str) -> Result<Vec<Command>, Refused> {
        let commands = self.transactions.remove(name);
        let commands = commands.ok_or_else(|| no_transaction(name))?;
        let bytes: usize = commands.iter().map(weight).sum();
        self.buffered.0 -= commands.len();
        self.buffered.1 -= bytes;
        Ok(commands)
    }

    fn abort(&mut self, frame: &Frame) -> Read {
        let name = transaction(frame)?;
        self.end(name).map(|_dropped| Command::Ping)
    }

    /// Passes on what a transaction does, and then the answer.
    fn commit(&mut self, name: &str, receipt: Option<String>, each: &mut impl FnMut(Request)) {
        match self.end(name) {
            Ok(commands) => {
                // If one of them is refused, the refusal is the answer.
                for command in commands {
                    each(Request {
                        tag: tag(receipt.clone(), What::Committed),
                        command: Ok(command),
                    });
                }
                each(Request {
                    tag: tag(receipt, What::Other),
                    command: Ok(Command::Ping),
                });
            }
            Err(refused) => self.refuse(tag(receipt, What::Other), refused, each),
        }
    }
}

/// What the answer to a frame needs to know of it.
fn tag(receipt: Option<String>, what: What) -> Tag {
    Tag::Stomp(Arc::new(Asked { receipt, what }))
}

/// Bytes of memory that a command takes, about.
fn weight(command: &Command) -> usize {
    size_of::<Command>()
        + match command {
            Command::Send(publication) => {
                let texts = publication
                    .target
                    .as_ref()
                    .map_or(0, |(text, _)| 2 * text.len());
                let reply_to = publication.reply_to.as_ref().map_or(0, String::len);
                let mentions = publication.mentions.json().map_or(0, str::len);
                size_of::<Publication>()
                    + publication.body.get().len()
                    + texts
                    + reply_to
                    + mentions
            }
            Command::Read { cursor, .. } => cursor.len(),
            _ => 0,
        }
}

fn too_many() -> Refused {
    let text = format!(
        "transactions may have {MAX_BUFFERED} frames and {MAX_BUFFERED_BYTES} bytes at once"
    );
    Refused::new(ErrorCode::Limit, text)
}

fn no_transaction(name: &str) -> Refused {
    bad(format!("there is no transaction {name:?}"))
}

fn transaction(frame: &Frame) -> Result<&str, Refused> {
    let name = frame.get("transaction");
    name.ok_or_else(|| bad(format!("{} has no transaction", frame.command)))
}

/// What a client says of its signs of life: how often it gives one, and how often it wants one, in ms.
fn beats(text: &str) -> Option<Beats> {
    let (gives, wants) = text.split_once(',')?;
    let every = |text: &str| {
        let ms = text.trim().parse().ok()?;
        let every = Duration::from_millis(ms);
        Some((ms > 0).then(|| every.max(SHORTEST_BEAT)))
    };
    Some(Beats {
        client: every(gives)?,
        server: every(wants)?,
    })
}

/// Where a subscription begins, in the words of `x-stream-offset`. `None`: with the next message.
fn begins(offset: &str) -> Result<Option<ResumeAt>, Refused> {
    let number = |text: &str| {
        text.parse::<u64>()
            .map_err(|_detail| bad(format!("x-stream-offset: {offset:?} has no number")))
    };
    let (word, value) = match offset.split_once('=') {
        Some((word, value)) => (word.trim(), Some(value.trim())),
        None => (offset, None),
    };
    let first = match (word, value) {
        ("next", None) => return Ok(None),
        ("cursor", Some(cursor)) => return Ok(Some(ResumeAt::Cursor(cursor.to_owned()))),
        ("first", None) => First::Oldest,
        ("last", None) => First::Last,
        ("offset", Some(seq)) => First::Sequence(number(seq)?),
        ("timestamp", Some(seconds)) => First::Time(number(seconds)?.saturating_mul(1000)),
        _ => {
            return Err(bad(
                "x-stream-offset is not next, first, last, offset=…, timestamp=… or cursor=…",
            ));
        }
    };
    Ok(Some(ResumeAt::Before(first)))
}

fn destination(frame: &Frame) -> Result<&str, Refused> {
    let destination = frame.get("destination");
    destination.ok_or_else(|| bad(format!("{} has no destination", frame.command)))
}

/// The room of a destination, and what of it.
fn room_of(destination: &str) -> Result<(RoomId, SubscribedTo), Refused> {
    let bad = |text: String| Refused::new(ErrorCode::BadRoom, text);
    let Some(name) = destination.strip_prefix(TOPIC) else {
        let shown: String = destination.chars().take(100).collect();
        return Err(bad(format!(
            "{shown:?} is not /topic/ and the name of a room"
        )));
    };
    let events = [SubscribedTo::Typing, SubscribedTo::Presence].into_iter();
    let mut events = events.filter_map(|of| Some((name.strip_suffix(suffix(of))?, of)));
    let (name, of) = events.next().unwrap_or((name, SubscribedTo::Messages));
    let is_wildcard = |word: &str| {
        let mut chars = word.chars().peekable();
        chars.peek().is_some() && chars.all(|char| "*#>".contains(char))
    };
    if name.split(['.', '/', ':']).any(is_wildcard) {
        let shown: String = destination.chars().take(100).collect();
        return Err(bad(format!("{shown:?} is a pattern, not one room")));
    }
    // Brokers separate words by dots. The first word is the namespace, if there is no colon.
    let name = match (name.contains(':'), name.split_once('.')) {
        (false, Some((namespace, name))) => Cow::Owned(format!("{namespace}:{name}")),
        _ => Cow::Borrowed(name),
    };
    Ok((Names::Stomp.room(&name)?, of))
}

fn send(frame: &Frame) -> Read {
    let (room, of) = room_of(destination(frame)?)?;
    match of {
        SubscribedTo::Messages => {}
        SubscribedTo::Typing => return Ok(Command::Typing { room }),
        SubscribedTo::Presence => return Err(bad("presence can't be sent")),
    }
    let text = std::str::from_utf8(&frame.body).map_err(|_at| bad("the body is not UTF-8"))?;
    let is_text = frame
        .get("content-type")
        .is_some_and(|it| it.starts_with("text/"));
    let json = (!is_text && !text.is_empty())
        .then(|| serde_json::from_str::<&RawValue>(text).ok())
        .flatten();
    let body = match json {
        Some(json) => json.to_owned(),
        None => serde_json::value::to_raw_value(text)
            .map_err(|error| Refused::new(ErrorCode::Internal, error.to_string()))?,
    };
    let mentions = frame.get("mentions").map(serde_json::from_str);
    let mentions = mentions.transpose();
    let draft = Draft {
        id: frame.get("idempotency-key"),
        kind: frame.get("kind"),
        body: Some(&body),
        target: frame.get("target"),
        reply_to: frame.get("reply-to"),
        mentions: mentions.map_err(|_detail| bad("mentions is not a JSON array of users"))?,
    };
    Ok(Command::Send(Box::new(Publication::new(room, draft)?)))
}

/// Moves the read marker to the message that is named by its `ack`, or by its `message-id`. Both end with the room and
/// the cursor. Others have no effect.
fn ack(frame: &Frame) -> Command {
    let named = frame.get("id").or_else(|| frame.get("message-id"));
    let read = || {
        let mut parts = named?.rsplit(';');
        let (cursor, room) = (parts.next()?, parts.next()?);
        Some(Command::Read {
            room: RoomId::parse(room).ok()?,
            cursor: cursor.to_owned(),
        })
    };
    read().unwrap_or(Command::Ping)
}
