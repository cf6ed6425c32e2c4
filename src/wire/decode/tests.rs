use std::mem::size_of;

use fastwebsockets::{FragmentCollector, Role, WebSocket};
use proptest::prelude::*;
use tokio::io::AsyncWriteExt;

use super::*;

/// An [`Incoming`] that owns its content.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Got {
    Text(String),
    Binary(Vec<u8>),
    Ping(Vec<u8>),
    Pong,
    Close(Option<u16>),
}

impl From<Incoming<'_>> for Got {
    fn from(incoming: Incoming<'_>) -> Self {
        match incoming {
            Incoming::Text(text) => Self::Text(text.to_owned()),
            Incoming::Binary(message) => Self::Binary(message.to_vec()),
            Incoming::Ping(payload) => Self::Ping(payload.to_vec()),
            Incoming::Pong => Self::Pong,
            Incoming::Close { code } => Self::Close(code),
        }
    }
}

const MAX: usize = 70_000;
const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

fn text(text: &str) -> Got {
    Got::Text(text.to_owned())
}

/// One masked client frame, written without any code of the crate.
fn frame(first: u8, mask: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut out = vec![first];
    match payload.len() {
        n @ 0..=125 => out.push(0x80 | u8::try_from(n).unwrap()),
        n @ 126..=65_535 => {
            out.push(0x80 | 126);
            out.extend(u16::try_from(n).unwrap().to_be_bytes());
        }
        n => {
            out.push(0x80 | 127);
            out.extend(u64::try_from(n).unwrap().to_be_bytes());
        }
    }
    out.extend(mask);
    out.extend(payload.iter().enumerate().map(|(i, b)| b ^ mask[i % 4]));
    out
}

#[test]
fn binary_messages_are_passed_on_where_they_are_accepted() {
    let pieces = [
        f(0x82, &[0, 255, 7]),
        f(0x02, &[1, 2]),
        f(0x89, b"p"),
        f(0x80, &[3]),
        f(0x81, b"t"),
        f(0x01, b"a"),
        f(0x80, b"b"),
        f(0x82, &[]),
    ];
    let bytes = pieces.concat();
    for size in [1, 2, 5, bytes.len()] {
        let mut decoder = Decoder::new(MAX, true);
        let mut got: Vec<Got> = Vec::new();
        for chunk in bytes.chunks(size) {
            let fed = decoder.feed(&mut chunk.to_vec(), |incoming| got.push(incoming.into()));
            fed.unwrap();
        }
        let expected = [
            Got::Binary(vec![0, 255, 7]),
            Got::Ping(b"p".to_vec()),
            Got::Binary(vec![1, 2, 3]),
            text("t"),
            text("ab"),
            Got::Binary(vec![]),
        ];
        assert_eq!(got, expected, "{size}");
    }
    let too_big = f(0x82, &vec![0; MAX + 1]);
    let fed = Decoder::new(MAX, true).feed(&mut too_big.clone(), |_| panic!("too big"));
    assert_eq!(fed, Err(Close::TooBig));
}

fn f(first: u8, payload: &[u8]) -> Vec<u8> {
    frame(first, MASK, payload)
}

fn decode_chunks<'a>(
    max: usize,
    chunks: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<Got>, Result<(), Close>, Decoder) {
    let mut decoder = Decoder::new(max, false);
    let mut got = Vec::new();
    for chunk in chunks {
        let result = decoder.feed(&mut chunk.to_vec(), |incoming| got.push(incoming.into()));
        if result.is_err() {
            return (got, result, decoder);
        }
    }
    (got, Ok(()), decoder)
}

/// Checks that the outcome is the same whether the bytes come at once, one by one, or cut in two anywhere near either
/// end.
#[track_caller]
fn check(bytes: &[u8], expected: &[Got], result: Result<(), Close>) {
    let near_an_end = (0..=bytes.len()).filter(|&at| at < 300 || bytes.len() - at < 300);
    for at in near_an_end {
        let (front, back) = bytes.split_at(at);
        let (got, res, decoder) = decode_chunks(MAX, [front, back]);
        assert_eq!((&got[..], res), (expected, result), "cut at {at}");
        if result.is_err() {
            assert_eq!(decoder.held_bytes(), 0);
        }
    }
    let (got, res, _) = decode_chunks(MAX, bytes.chunks(1));
    assert_eq!((&got[..], res), (expected, result), "one by one");
}

#[test]
fn idle_decoder_is_small() {
    println!(
        "Decoder {} bytes, Unfinished {} bytes",
        size_of::<Decoder>(),
        size_of::<Unfinished>()
    );
    assert!(size_of::<Decoder>() <= 48);
    assert!(size_of::<Unfinished>() <= 256);
}

#[test]
fn whole_messages_and_control_frames() {
    check(&f(0x81, b"Hello"), &[text("Hello")], Ok(()));
    check(&f(0x81, b""), &[text("")], Ok(()));
    check(&f(0x81, "안녕".as_bytes()), &[text("안녕")], Ok(()));
    check(&f(0x89, b"x"), &[Got::Ping(b"x".to_vec())], Ok(()));
    check(&f(0x89, &[7; 125]), &[Got::Ping(vec![7; 125])], Ok(()));
    check(&f(0x8A, b"whatever"), &[Got::Pong], Ok(()));
    for length in [125, 126, 127, 65_535, 65_536, MAX] {
        let message = "m".repeat(length);
        check(&f(0x81, message.as_bytes()), &[Got::Text(message)], Ok(()));
    }
}

#[test]
fn fragments_with_control_frames_between() {
    let bytes = [
        f(0x01, b"a"),
        f(0x89, b"p"),
        f(0x00, b""),
        f(0x8A, b""),
        f(0x00, "é".as_bytes()),
        f(0x80, b"z"),
        f(0x81, b"next"),
    ]
    .concat();
    let expected = [
        Got::Ping(b"p".to_vec()),
        Got::Pong,
        text("aéz"),
        text("next"),
    ];
    check(&bytes, &expected, Ok(()));
    // A fragment boundary may cut a character.
    let bytes = [f(0x01, &[0xC3]), f(0x80, &[0xA9])].concat();
    check(&bytes, &[text("é")], Ok(()));
    // All fragments are empty.
    let bytes = [f(0x01, b""), f(0x00, b""), f(0x80, b"")].concat();
    check(&bytes, &[text("")], Ok(()));
}

#[test]
fn a_hundred_frames_in_one_feed() {
    let bytes: Vec<u8> = (0..100)
        .flat_map(|i| f(0x81, format!("message {i}").as_bytes()))
        .collect();
    let (got, result, decoder) = decode_chunks(MAX, [&bytes[..]]);
    assert_eq!(result, Ok(()));
    let expected: Vec<Got> = (0..100).map(|i| text(&format!("message {i}"))).collect();
    assert_eq!(got, expected);
    assert_eq!(decoder.held_bytes(), 0);
}

#[test]
fn violations_close_with_their_code() {
    let unmasked = vec![0x81, 5, b'H', b'e', b'l', b'l', b'o'];
    let long_ping = [&[0x89, 0x80 | 126, 0, 126][..], &MASK, &[0; 126]].concat();
    let raw = |bytes: &[u8]| [bytes, &MASK[..], &[0; 8]].concat();
    let table: Vec<(&str, Vec<u8>, Close)> = vec![
        ("rsv1", f(0xC1, b"x"), Close::Protocol),
        ("rsv2", f(0xA1, b"x"), Close::Protocol),
        ("rsv3", f(0x91, b"x"), Close::Protocol),
        ("rsv on control", f(0xC9, b"x"), Close::Protocol),
        ("opcode 3", f(0x83, b"x"), Close::Protocol),
        ("opcode 7", f(0x87, b"x"), Close::Protocol),
        ("opcode 11", f(0x8B, b"x"), Close::Protocol),
        ("opcode 15", f(0x8F, b"x"), Close::Protocol),
        ("unmasked", unmasked, Close::Protocol),
        ("unmasked ping", vec![0x89, 0], Close::Protocol),
        ("ping of 126", long_ping, Close::Protocol),
        (
            "close of 64-bit length",
            raw(&[0x88, 0xFF, 0, 0, 0, 0, 0, 1, 0, 0]),
            Close::Protocol,
        ),
        ("fragmented ping", f(0x09, b"x"), Close::Protocol),
        ("fragmented close", f(0x08, b""), Close::Protocol),
        ("continuation of nothing", f(0x80, b"x"), Close::Protocol),
        (
            "non-final continuation of nothing",
            f(0x00, b"x"),
            Close::Protocol,
        ),
        (
            "text inside a message",
            [f(0x01, b"a"), f(0x81, b"b")].concat(),
            Close::Protocol,
        ),
        (
            "binary inside a message",
            [f(0x01, b"a"), f(0x82, b"b")].concat(),
            Close::Protocol,
        ),
        ("binary", f(0x82, b"x"), Close::Unsupported),
        ("fragmented binary", f(0x02, b"x"), Close::Unsupported),
        (
            "top bit of the length",
            raw(&[0x81, 0xFF, 0x80, 0, 0, 0, 0, 0, 0, 1]),
            Close::Protocol,
        ),
        (
            "16-bit length of 125",
            raw(&[0x81, 0xFE, 0, 125]),
            Close::Protocol,
        ),
        (
            "64-bit length of 65535",
            raw(&[0x81, 0xFF, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF]),
            Close::Protocol,
        ),
        (
            "64-bit length of 0",
            raw(&[0x81, 0xFF, 0, 0, 0, 0, 0, 0, 0, 0]),
            Close::Protocol,
        ),
        (
            "longer than the limit",
            f(0x81, &vec![b'x'; MAX + 1]),
            Close::TooBig,
        ),
        (
            "sum longer than the limit",
            [f(0x01, &vec![b'x'; MAX]), f(0x80, b"x")].concat(),
            Close::TooBig,
        ),
        (
            "largest length",
            raw(&[0x81, 0xFF, 0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]),
            Close::TooBig,
        ),
        ("not UTF-8", f(0x81, &[b'a', 0xFF]), Close::InvalidUtf8),
        (
            "UTF-8 of a surrogate",
            f(0x81, &[0xED, 0xA0, 0x80]),
            Close::InvalidUtf8,
        ),
        (
            "message ends inside a character",
            [f(0x01, &[0xC3]), f(0x80, b"")].concat(),
            Close::InvalidUtf8,
        ),
        ("close of one byte", f(0x88, &[3]), Close::Protocol),
        (
            "close reason not UTF-8",
            f(0x88, &[3, 0xE8, 0xFF]),
            Close::InvalidUtf8,
        ),
    ];
    for (name, bytes, close) in table {
        println!("{name}");
        check(&bytes, &[], Err(close));
        // What came before it counts, and what comes after it does not.
        let bytes = [f(0x81, b"one"), f(0x81, b"two"), bytes, f(0x81, b"after")].concat();
        check(&bytes, &[text("one"), text("two")], Err(close));
    }
}

#[test]
fn violations_are_seen_at_the_earliest_byte() {
    for (bytes, close) in [
        (&[0xC1][..], Close::Protocol),
        (&[0x82], Close::Unsupported),
        (&[0x80], Close::Protocol),
        (&[0x81, 5], Close::Protocol),
        (&[0x89, 0xFE], Close::Protocol),
        // The length is over the limit; neither mask nor payload has arrived.
        (&[0x81, 0xFF, 0, 0, 0, 0, 0, 1, 0x11, 0x71], Close::TooBig),
    ] {
        let (_, result, _) = decode_chunks(MAX, [bytes]);
        assert_eq!(result, Err(close), "{bytes:?}");
        let (_, result, _) = decode_chunks(MAX, bytes.chunks(1));
        assert_eq!(result, Err(close), "{bytes:?}");
        if bytes.len() > 1 {
            let (_, result, _) = decode_chunks(MAX, [&bytes[..bytes.len() - 1]]);
            assert_eq!(result, Ok(()), "{bytes:?} less one");
        }
    }
}

#[test]
fn close_codes() {
    check(&f(0x88, b""), &[Got::Close(None)], Ok(()));
    let with = |code: u16| [&code.to_be_bytes()[..], "bye é".as_bytes()].concat();
    for code in (1000..=1003)
        .chain(1007..=1014)
        .chain([3000, 3999, 4000, 4001, 4999])
    {
        check(&f(0x88, &with(code)), &[Got::Close(Some(code))], Ok(()));
    }
    for code in [
        0, 1, 999, 1004, 1005, 1006, 1015, 1016, 2000, 2999, 5000, 65_535,
    ] {
        check(&f(0x88, &with(code)), &[], Err(Close::Protocol));
    }
}

#[test]
fn nothing_after_a_close_frame_is_looked_at() {
    let bytes = [
        f(0x81, b"before"),
        f(0x88, &1000_u16.to_be_bytes()),
        f(0x81, b"after"),
        vec![0xFF; 20],
    ]
    .concat();
    check(&bytes, &[text("before"), Got::Close(Some(1000))], Ok(()));
    // Also inside a fragmented message, whose part is dropped.
    let bytes = [f(0x01, b"part"), f(0x88, b"")].concat();
    let (got, result, decoder) = decode_chunks(MAX, [&bytes[..]]);
    assert_eq!((got, result), (vec![Got::Close(None)], Ok(())));
    assert_eq!(decoder.held_bytes(), 0);
}

#[test]
fn number_of_fragments_is_bounded() {
    for payload in [&b""[..], b"x"] {
        let mut bytes = f(0x01, payload);
        for _ in 0..MAX_FRAGMENTS - 2 {
            bytes.extend(f(0x00, payload));
            bytes.extend(f(0x8A, b""));
        }
        let mut good = bytes.clone();
        good.extend(f(0x80, payload));
        good.extend(f(0x81, b"next"));
        let (got, result, _) = decode_chunks(MAX, [&good[..]]);
        assert_eq!(result, Ok(()));
        assert_eq!(got.last(), Some(&text("next")));

        bytes.extend(f(0x00, payload));
        bytes.extend(f(0x00, payload));
        let (_, result, _) = decode_chunks(MAX, [&bytes[..]]);
        assert_eq!(result, Err(Close::TooBig));
    }
}

#[test]
fn memory_grows_with_what_came_and_not_with_what_was_announced() {
    let max = 1 << 20;
    let bytes = f(0x81, &vec![b'x'; max]);
    let (_, _, decoder) = decode_chunks(max, [&bytes[..1000]]);
    assert!(decoder.held_bytes() < 2000, "{}", decoder.held_bytes());

    let mut decoder = Decoder::new(max, false);
    for (i, chunk) in bytes.chunks(1000).enumerate() {
        decoder.feed(&mut chunk.to_vec(), |_| ()).unwrap();
        let small = size_of::<Unfinished>() + 1000;
        assert!(decoder.held_bytes() <= max + small);
        assert!(decoder.held_bytes() <= 2 * (i + 1) * 1000 + small);
    }
    assert_eq!(decoder.held_bytes(), 0, "the message was complete");
}

/// One thing that a client sends: a text cut into fragments, with control frames before some of them.
#[derive(Debug, Clone)]
struct Sent {
    text: String,
    cuts: Vec<prop::sample::Index>,
    control: Vec<(prop::sample::Index, bool, Vec<u8>)>,
    mask: [u8; 4],
}

fn sent() -> impl Strategy<Value = Sent> {
    let text = prop_oneof![
        8 => ".{0,40}",
        2 => (100_usize..300).prop_map(|n| "ü".repeat(n)),
        1 => (65_500_usize..65_600).prop_map(|n| "x".repeat(n)),
    ];
    let control = (
        any::<prop::sample::Index>(),
        any::<bool>(),
        prop::collection::vec(any::<u8>(), 0..=125),
    );
    (
        text,
        prop::collection::vec(any::<prop::sample::Index>(), 0..5),
        prop::collection::vec(control, 0..3),
        any::<[u8; 4]>(),
    )
        .prop_map(|(text, cuts, control, mask)| Sent {
            text,
            cuts,
            control,
            mask,
        })
}

/// The bytes of `all`, and what a server must see.
fn encode(all: &[Sent]) -> (Vec<u8>, Vec<Got>) {
    let (mut bytes, mut expected) = (Vec::new(), Vec::new());
    for sent in all {
        let payload = sent.text.as_bytes();
        let mut ends: Vec<usize> = sent
            .cuts
            .iter()
            .map(|c| c.index(payload.len() + 1))
            .collect();
        ends.push(payload.len());
        ends.sort_unstable();
        let mut from = 0;
        for (i, &end) in ends.iter().enumerate() {
            for (at, ping, payload) in &sent.control {
                if at.index(ends.len()) == i {
                    let first = if *ping { 0x89 } else { 0x8A };
                    bytes.extend(frame(first, sent.mask, payload));
                    expected.push(if *ping {
                        Got::Ping(payload.clone())
                    } else {
                        Got::Pong
                    });
                }
            }
            let fin = if i + 1 == ends.len() { 0x80 } else { 0 };
            let opcode = u8::from(i == 0);
            bytes.extend(frame(fin | opcode, sent.mask, &payload[from..end]));
            from = end;
        }
        expected.push(Got::Text(sent.text.clone()));
    }
    (bytes, expected)
}

/// Cuts `bytes` into chunks of the given lengths, in turn.
fn chunks<'a>(bytes: &'a [u8], lengths: &[usize]) -> Vec<&'a [u8]> {
    let mut rest = bytes;
    let mut out = Vec::new();
    for &length in lengths.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (chunk, more) = rest.split_at(length.min(rest.len()));
        out.push(chunk);
        rest = more;
    }
    out
}

fn chunk_lengths() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(
        prop_oneof![1_usize..8, 1_usize..200, 1_usize..20_000],
        1..12,
    )
}

/// How fastwebsockets reads the same bytes.
async fn fastwebsockets_reads(bytes: Vec<u8>, count: usize) -> Vec<Got> {
    let (mut client, server) = tokio::io::duplex(1024);
    let mut ws = WebSocket::after_handshake(server, Role::Server);
    ws.set_auto_pong(false);
    ws.set_auto_close(false);
    let mut ws = FragmentCollector::new(ws);
    let write = async { client.write_all(&bytes).await.unwrap() };
    let read = async {
        let mut got = Vec::new();
        while got.len() < count {
            let frame = ws.read_frame().await.unwrap();
            got.push(match frame.opcode {
                OpCode::Text => Got::Text(String::from_utf8(frame.payload.to_vec()).unwrap()),
                OpCode::Ping => Got::Ping(frame.payload.to_vec()),
                OpCode::Pong => Got::Pong,
                opcode => panic!("unexpected {opcode:?}"),
            });
        }
        got
    };
    tokio::join!(write, read).1
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn valid_streams_come_out_as_they_were_sent(
        all in prop::collection::vec(sent(), 1..8),
        lengths in chunk_lengths(),
    ) {
        let (bytes, expected) = encode(&all);
        let max = all.iter().map(|s| s.text.len()).max().unwrap_or(0);
        let (got, result, decoder) = decode_chunks(max, chunks(&bytes, &lengths));
        prop_assert_eq!(result, Ok(()));
        prop_assert_eq!(&got, &expected);
        prop_assert_eq!(decoder.held_bytes(), 0);

        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let theirs = runtime.block_on(fastwebsockets_reads(bytes, expected.len()));
        prop_assert_eq!(got, theirs);
    }

    #[test]
    fn arbitrary_bytes_never_panic_nor_hold_much(
        // Half of the first bytes are valid, so that the decoder gets further.
        parts in prop::collection::vec(
            prop_oneof![
                prop::collection::vec(any::<u8>(), 0..40),
                (prop::sample::select(vec![0x01_u8, 0x00, 0x80, 0x81, 0x89, 0x8A, 0x88]),
                    prop::collection::vec(32_u8..127, 0..200)).prop_map(|(first, p)| f(first, &p)),
                (any::<u16>()).prop_map(|n| [&[0x01, 0xFE][..], &n.to_be_bytes(), &MASK].concat()),
            ],
            0..30,
        ),
        max in 0_usize..3000,
        lengths in chunk_lengths(),
    ) {
        let bytes = parts.concat();
        let mut decoder = Decoder::new(max, false);
        let mut ended = false;
        for chunk in chunks(&bytes, &lengths) {
            let result = decoder.feed(&mut chunk.to_vec(), |incoming| {
                assert!(!ended, "something after the end");
                match incoming {
                    Incoming::Text(text) => assert!(text.len() <= max),
                    Incoming::Binary(_) => panic!("not accepted"),
                    Incoming::Ping(payload) => assert!(payload.len() <= MAX_CONTROL),
                    Incoming::Pong => {}
                    Incoming::Close { .. } => ended = true,
                }
            });
            ended |= result.is_err();
            prop_assert!(decoder.held_bytes() <= max + size_of::<Unfinished>());
            prop_assert!(!ended || decoder.held_bytes() == 0);
        }
    }

    /// However the bytes are cut, the outcome is the same.
    #[test]
    fn cuts_change_nothing(
        parts in prop::collection::vec(
            (any::<u8>(), prop::collection::vec(32_u8..127, 0..200)).prop_map(|(first, p)| {
                // Mostly valid first bytes.
                let first = if first < 40 { first } else { [0x81, 0x89, 0x01, 0x80, 0x00][usize::from(first) % 5] };
                f(first, &p)
            }),
            0..12,
        ),
        lengths in chunk_lengths(),
    ) {
        let bytes = parts.concat();
        let (got, result, _) = decode_chunks(1000, [&bytes[..]]);
        let (cut_got, cut_result, _) = decode_chunks(1000, chunks(&bytes, &lengths));
        prop_assert_eq!((got, result), (cut_got, cut_result));
    }
}
