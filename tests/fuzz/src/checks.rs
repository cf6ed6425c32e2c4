//! What must hold of any bytes. `tests/fuzz` compiles this file for the fuzzer, and natter's unit tests do to replay the
//! corpus.

use bytes::{Bytes, BytesMut};
use serde_json::Value;

use crate::{
    bus::{
        Record,
        line::protocol::{Op, next_op},
    },
    codec::{
        Codec, Request, Tag,
        centrifugal::Form,
        native::{decode, decode_publication, decode_read, decode_unread},
        stomp::FrameReader,
    },
    model::{
        Class, Cursor, Epoch, Flaw, MAX_JSON_DEPTH, Reference, RoomId, header_escape,
        header_unescape, json_flaw, key_escape,
    },
    protocol::{Command, Publication, Refused},
    wire::{Decoder, Incoming},
};

/// Longest input that is cut at every place: the work grows with its square.
const CUT_EVERYWHERE: usize = 256;

/// The places at which an input is cut in two.
fn cuts(length: usize) -> impl Iterator<Item = usize> {
    (0..=length).step_by(length / CUT_EVERYWHERE + 1)
}

/// Messages and the end of the stream are the same, wherever reads cut it, and nothing is held beyond the limit.
pub fn decoder(data: &[u8]) {
    const MOST: usize = 4096;
    let run = |pieces: &[&[u8]]| {
        let mut decoder = Decoder::new(MOST, false);
        let mut seen = Vec::new();
        for piece in pieces {
            let fed = decoder.feed(&mut piece.to_vec(), |incoming| {
                if let Incoming::Text(text) = incoming {
                    assert!(text.len() <= MOST);
                }
                seen.push(format!("{incoming:?}"));
            });
            assert!(decoder.held_bytes() <= 2 * MOST + 256, "{decoder:?}");
            if let Err(close) = fed {
                seen.push(format!("{close:?}"));
                assert_eq!(decoder.held_bytes(), 0);
                break;
            }
        }
        seen
    };
    let whole = run(&[data]);
    for at in cuts(data.len()) {
        let (first, second) = data.split_at(at);
        assert_eq!(run(&[first, second]), whole, "cut at {at}");
    }
    let bytes: Vec<&[u8]> = data.chunks(1).collect();
    assert_eq!(run(&bytes), whole, "byte by byte");
}

/// Operations are the same, wherever reads cut what the server says.
pub fn line(data: &[u8]) {
    let run = |pieces: &[&[u8]]| {
        let (mut buffer, mut seen) = (BytesMut::new(), Vec::new());
        for piece in pieces {
            buffer.extend_from_slice(piece);
            loop {
                match next_op(&mut buffer) {
                    Ok(Some(Op::Message(arrival))) => {
                        let headers: Vec<_> = arrival.headers().iter().collect();
                        for (name, value) in &headers {
                            assert_eq!(value.trim(), *value);
                            assert!(!name.contains("\r\n") && !value.contains("\r\n"));
                        }
                        let payload = arrival.payload();
                        assert!(data.len() >= arrival.subject().len() + payload.len());
                        let status = arrival.headers().status();
                        let subject = arrival.subject();
                        seen.push(format!("{subject} {headers:?} {status:?} {payload:?}"));
                    }
                    Ok(Some(op)) => seen.push(format!("{op:?}")),
                    Ok(None) => break,
                    Err(error) => {
                        seen.push(error.to_string());
                        return seen;
                    }
                }
            }
        }
        seen
    };
    let whole = run(&[data]);
    for at in cuts(data.len()) {
        let (first, second) = data.split_at(at);
        assert_eq!(run(&[first, second]), whole, "cut at {at}");
    }
}

/// Any text is a command or refused with a short word; what is taken fits its bounds, and its body is the client's.
pub fn native(data: &[u8]) {
    let room = || RoomId::from_parts("chat", "a").expect("a room");
    let short = |refusal: Refused| {
        assert!(refusal.message.len() < 1000, "{refusal:?}");
    };
    let check = |publication: Publication| {
        let body = publication.body.get();
        assert!(serde_json::from_str::<serde::de::IgnoredAny>(body).is_ok());
        let at = data
            .windows(body.len())
            .any(|window| window == body.as_bytes());
        assert!(at || body == "null", "not the client's: {body}");
        if let Some(mentions) = publication.mentions.json() {
            let users: Vec<String> = serde_json::from_str(mentions).expect("users");
            assert!(users.len() <= 100 && mentions.len() <= 32 * 1024);
        }
        for text in [
            publication.target.map(|(text, _)| text),
            publication.reply_to,
        ] {
            assert!(text.is_none_or(|text| text.len() <= 321 && Reference::parse(&text).is_ok()));
        }
    };
    match decode_publication(room(), data) {
        Ok(publication) => check(publication),
        Err(refusal) => short(refusal),
    }
    decode_read(data).err().into_iter().for_each(short);
    decode_unread(data).err().into_iter().for_each(short);
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Request { tag, command } = decode(text);
    match command {
        Ok(Command::Send(publication)) => check(*publication),
        Ok(_) => {}
        Err(refusal) => {
            let frame = Codec::Native.refusal(&tag, &refusal).expect("a frame");
            let begin = frame.windows(6).position(|window| window == b"{\"op\":");
            let payload = &frame[begin.expect("a frame of natter.v1")..];
            assert!(serde_json::from_slice::<Value>(payload).is_ok());
            short(refusal);
        }
    }
}

/// What a request of any protocol is: a command with the client's JSON in it, or a short refusal with a frame.
fn sound(codec: Codec, Request { tag, command }: Request) {
    match command {
        Ok(Command::Send(publication)) => {
            let body = publication.body.get();
            assert!(serde_json::from_str::<serde::de::IgnoredAny>(body).is_ok());
        }
        Ok(_) => {}
        Err(refused) => {
            assert!(refused.message.len() < 1000, "{refused:?}");
            if let Some(frame) = codec.refusal(&tag, &refused) {
                assert!(frame.len() < 8000, "{refused:?}");
            }
        }
    }
}

/// Any message is commands or refused, in text and in binary. A refusal without a number is the last.
pub fn centrifugal(data: &[u8]) {
    let mut seen = Vec::new();
    Codec::Centrifugal(Form::Protobuf).decode_binary(data, |request| seen.push(request));
    all_sound(Codec::Centrifugal(Form::Protobuf), seen.drain(..));
    if let Ok(text) = std::str::from_utf8(data) {
        Codec::Centrifugal(Form::Json).decode(text, |request| seen.push(request));
        all_sound(Codec::Centrifugal(Form::Json), seen.drain(..));
    }
}

/// Requests of which one that can't be answered is the last.
fn all_sound(codec: Codec, requests: impl Iterator<Item = Request>) {
    let mut is_over = false;
    for request in requests {
        assert!(!is_over, "something after the end");
        is_over = request.tag == Tag::None && request.command.is_err();
        sound(codec, request);
    }
}

/// Commands are the same wherever messages cut the stream, and a refusal is the last.
pub fn stomp(data: &[u8]) {
    let run = |pieces: &[&[u8]]| {
        let mut reader = FrameReader::new(4096);
        let mut seen = Vec::new();
        let mut is_over = false;
        for piece in pieces {
            reader.read(piece, |request| {
                assert!(!is_over, "something after the end");
                is_over = request.command.is_err();
                seen.push(format!("{request:?}"));
                sound(Codec::Stomp, request);
            });
        }
        seen
    };
    let whole = run(&[data]);
    // A message is refused for the number of its frames, and a body for what has come of it.
    if whole.len() > 900 || data.len() > 4096 {
        return;
    }
    for at in cuts(data.len()) {
        let (first, second) = data.split_at(at);
        assert_eq!(run(&[first, second]), whole, "cut at {at}");
    }
}

/// Whatever headers and payload are, a record has what a frame needs: JSON in `body` and `mentions`. The input is a block
/// of headers, an empty line and the payload.
pub fn record(data: &[u8]) {
    let end = data.windows(4).position(|window| window == b"\r\n\r\n");
    let (head, payload) = data.split_at(end.unwrap_or_default());
    let payload = payload.strip_prefix(b"\r\n\r\n").unwrap_or(payload);
    let Ok(head) = std::str::from_utf8(head) else {
        return;
    };
    let pairs = || head.split("\r\n").filter_map(|line| line.split_once(':'));
    let pairs = || pairs().map(|(name, value)| (name, value.trim()));
    let payload = Bytes::copy_from_slice(payload);
    let epoch = Epoch::parse("k3").expect("an epoch");
    let stored = Record::stored(pairs(), payload.clone(), Class::Msg, epoch);
    let passing = Record::ephemeral(pairs(), payload.clone(), 7);
    for record in stored.into_iter().chain([passing]) {
        assert!(!record.id.is_empty() && record.id.len() <= 64);
        let body: Value = serde_json::from_slice(&record.body).or_number(&record.body);
        let text = String::from_utf8_lossy(&payload);
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        // As it is, or the text of it.
        assert!(record.body == text || body.as_str() == Some(text), "{body}");
        assert_eq!(json_flaw(&record.body, MAX_JSON_DEPTH), None);
        if let Some(mentions) = &record.mentions {
            assert!(serde_json::from_str::<Vec<String>>(mentions).is_ok());
        }
        let after = record.after.map(|after| after.to_string());
        assert!(after.is_none_or(|after| after.parse::<Cursor>().is_ok()));
    }
}

/// Numbers beyond any float are JSON, and no [`Value`].
trait OrNumber {
    fn or_number(self, text: &[u8]) -> Value;
}

impl OrNumber for serde_json::Result<Value> {
    fn or_number(self, text: &[u8]) -> Value {
        match self {
            Ok(value) => value,
            Err(error) => {
                assert!(error.to_string().contains("number out of range"), "{error}");
                assert!(serde_json::from_slice::<serde::de::IgnoredAny>(text).is_ok());
                Value::Null
            }
        }
    }
}

/// Texts of cursors, separated by spaces: each is refused or written as it was meant, and merging obeys its laws.
pub fn cursor(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let cursors: Vec<Cursor> = text
        .split(' ')
        .filter_map(|text| text.parse().ok())
        .collect();
    for cursor in &cursors {
        assert_eq!(cursor.to_string().parse().as_ref(), Ok(cursor));
    }
    let [a, b, c, ..] = &*cursors else { return };
    let currents: [Option<Epoch>; 2] = [None, a.positions().first().map(|position| position.epoch)];
    for current in currents {
        let merge = |x: &Cursor, y: &Cursor| x.merge(y, |_, epoch| Some(*epoch) == current);
        assert_eq!(merge(a, b), merge(b, a));
        assert_eq!(merge(&merge(a, b), c), merge(a, &merge(b, c)));
        assert_eq!(merge(&merge(a, b), b), merge(a, b));
        assert_eq!(merge(a, a), *a);
        for position in a.positions().iter().chain(b.positions()) {
            assert!(merge(a, b).get(&position.origin).is_some());
        }
    }
}

/// Any text comes back from a header and from a key; any other text is taken without trouble.
pub fn escape(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let escaped = header_escape(text);
    assert!(!escaped.chars().any(char::is_control));
    assert_eq!(escaped.trim(), escaped);
    assert_eq!(header_unescape(&escaped), text);
    let key = key_escape(text);
    assert!(
        key.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_-=".contains(&b))
    );
    assert_eq!(header_unescape(&key), text);
    let unescaped = header_unescape(text);
    assert!(unescaped.len() <= text.len());
    if let Ok(reference) = Reference::parse(text) {
        let user = reference.user.map_or_else(String::new, |user| user + "/");
        assert_eq!(format!("{user}{}", reference.id), text);
    }
    if let Ok(room) = RoomId::parse(text) {
        assert_eq!(room.as_str(), text);
        let named = RoomId::named(room.namespace(), &room.text());
        assert_eq!(named.as_ref(), Ok(&room));
    }
}

/// JSON without a flaw can be read by a parser that makes text of all strings; with one, it can't, or is deep.
pub fn json(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let flaw = json_flaw(data, MAX_JSON_DEPTH);
    if serde_json::from_str::<serde::de::IgnoredAny>(text).is_err() {
        return;
    }
    match serde_json::from_str::<Value>(text) {
        Ok(value) => {
            // Of two fields of one name the value has one: it may be less deep.
            assert!(matches!(flaw, None | Some(Flaw::Deep(_))), "{flaw:?}");
            assert!(flaw.is_some() || levels(&value) <= MAX_JSON_DEPTH);
        }
        Err(error) => {
            let number = error.to_string().contains("number out of range");
            assert!(flaw.is_some() || number, "{error}");
        }
    }
}

fn levels(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(levels).max().unwrap_or_default(),
        Value::Object(fields) => 1 + fields.values().map(levels).max().unwrap_or_default(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use proptest::prelude::*;

    use super::*;

    type Check = fn(&[u8]);

    const CHECKS: [(&str, Check); 9] = [
        ("centrifugal", centrifugal),
        ("stomp", stomp),
        ("decoder", decoder),
        ("line", line),
        ("native", native),
        ("record", record),
        ("cursor", cursor),
        ("escape", escape),
        ("json", json),
    ];

    fn corpus(name: &str) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fuzz/corpus")
            .join(name);
        let mut files: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|file| file.unwrap().path())
            .collect();
        files.sort();
        files.iter().map(|file| fs::read(file).unwrap()).collect()
    }

    #[test]
    fn the_corpus_holds() {
        for (name, check) in CHECKS {
            let inputs = corpus(name);
            assert!(inputs.len() > 4, "{name} has a corpus");
            for input in inputs {
                check(&input);
            }
        }
    }

    /// An input of the corpus with some of its bytes replaced by others, of it or any, and cut.
    fn near(name: &'static str) -> impl Strategy<Value = Vec<u8>> {
        let changes = prop::collection::vec(
            (
                any::<prop::sample::Index>(),
                any::<u8>(),
                any::<prop::sample::Index>(),
                0..3,
            ),
            0..8,
        );
        (prop::sample::select(corpus(name)), changes).prop_map(|(mut input, changes)| {
            for (at, byte, other, how) in changes {
                if input.is_empty() {
                    break;
                }
                let (at, other) = (at.index(input.len()), other.index(input.len()));
                match how {
                    0 => input[at] = byte,
                    1 => input[at] = input[other],
                    _ => drop(input.drain(at.min(other)..at.max(other))),
                }
            }
            input
        })
    }

    #[test]
    fn what_is_near_the_corpus_holds() {
        let config = ProptestConfig::with_cases(200);
        for (name, check) in CHECKS {
            let mut runner = proptest::test_runner::TestRunner::new(config.clone());
            runner
                .run(&near(name), |input| {
                    check(&input);
                    Ok(())
                })
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}
