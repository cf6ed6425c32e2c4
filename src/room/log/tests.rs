use proptest::prelude::*;

use bytes::Bytes;

use super::{super::references::reference_of, *};
use crate::codec::Codec;

fn record(seq: u64, class: Class, id: &str) -> Record {
    Record {
        seq,
        previous: None,
        class,
        ts: seq,
        original_ts: None,
        fingerprint: Fingerprint::of(id.as_bytes()),
        id: id.to_owned(),
        from: "kim".to_owned(),
        kind: None,
        target: None,
        moderated: false,
        reply_to: None,
        mentions: None,
        after: None,
        body: Bytes::from_static(b"1"),
    }
}

fn room() -> RoomId {
    RoomId::parse("chat:a").unwrap()
}

fn log(heads: &[Record], empty_at: u64, max_bytes: usize) -> RoomLog {
    RoomLog::new(
        &room(),
        vec![start("seoul", heads, empty_at)],
        &Rings::new(max_bytes, usize::MAX),
    )
}

/// What the log counts for a message with an id of three bytes and no frame.
fn one() -> usize {
    let mut log = log(&[], 0, 1 << 20);
    assert!(deliver(&mut log, &record(1, Class::Msg, "m10")));
    log.bytes
}

fn start(origin: &str, heads: &[Record], empty_at: u64) -> Start {
    Start {
        origin: Region::parse(origin).unwrap(),
        epoch: Epoch::parse("k3").unwrap(),
        heads: heads.to_vec(),
        empty_at,
    }
}

fn deliver(log: &mut RoomLog, record: &Record) -> bool {
    deliver_in(log, 0, record)
}

fn deliver_in(log: &mut RoomLog, track: usize, record: &Record) -> bool {
    let fresh = log.advance(track, record);
    if let Some(at) = fresh {
        let message = log.push(at, record.clone());
        log.recount([message].iter());
        return true;
    }
    false
}

/// The sequences of the entries in memory after a place.
fn after(log: &RoomLog, place: (u64, Fingerprint)) -> Vec<u64> {
    let frames = log.after(&here(vec![place]), 0).len();
    let mut newest: Vec<u64> = log.entries().map(|entry| entry.seq).collect();
    newest.split_off(newest.len() - frames)
}

fn here(place: Positions) -> Since {
    Since {
        positions: place,
        elsewhere: Vec::new(),
    }
}

fn since(seq: u64, id: &str) -> (u64, Fingerprint) {
    match id {
        "" => (seq, Fingerprint(0)),
        id => (seq, Fingerprint::of(id.as_bytes())),
    }
}

#[test]
fn gaps_are_seen_per_class() {
    let mut log = log(
        &[record(5, Class::Msg, "a"), record(9, Class::Ev, "b")],
        20,
        1 << 20,
    );
    assert_eq!(log.position(0), 9);
    assert_eq!(log.admit(0, Class::Msg, 5, Some(3)), Admission::Old);
    assert_eq!(log.admit(0, Class::Msg, 12, Some(11)), Admission::Gap);
    assert_eq!(log.admit(0, Class::Msg, 12, Some(5)), Admission::Deliver);
    // The predecessor was erased: nothing is missing in between.
    assert_eq!(log.admit(0, Class::Msg, 12, Some(2)), Admission::Deliver);
    assert!(deliver(&mut log, &record(12, Class::Msg, "c")));
    // Late: lost by the server, found by the comparison with the stream.
    assert_eq!(log.admit(0, Class::Ev, 11, None), Admission::Deliver);
    assert!(deliver(&mut log, &record(11, Class::Ev, "d")));
    assert_eq!(log.position(0), 12);
    assert_eq!(log.admit(0, Class::Ev, 11, Some(9)), Admission::Old);
}

#[test]
fn a_reference_is_delivered_once() {
    let mut log = log(&[], 0, 1 << 20);
    assert!(deliver(&mut log, &record(1, Class::Msg, "a")));
    assert!(!deliver(&mut log, &record(2, Class::Msg, "a")));
    assert_eq!(log.position(0), 2);
    assert!(deliver(&mut log, &record(3, Class::Msg, "b")));
}

#[test]
fn a_change_is_delivered_once_and_an_announcement_each_time() {
    let mut log = log(&[], 0, 1 << 20);
    assert!(deliver(&mut log, &record(1, Class::Msg, "a")));
    // An event's id is not a message's id.
    assert!(deliver(&mut log, &record(2, Class::Ev, "a")));
    assert!(!deliver(&mut log, &record(3, Class::Ev, "a")));
    assert_eq!(log.position(0), 3);
    for seq in [4, 5] {
        let erase = Record {
            kind: Some(crate::model::Kind::Erase.as_str()),
            ..record(seq, Class::Ev, "erasure")
        };
        assert!(deliver(&mut log, &erase));
    }
}

#[test]
fn what_the_own_stream_knows_itself_is_left_to_it() {
    let mut log = RoomLog::new(
        &room(),
        vec![start("seoul", &[], 0), start("virginia", &[], 0)],
        &Rings::new(1 << 20, usize::MAX),
    );
    // Each message's time equals its sequence.
    for (track, seq, class, id) in [
        (0, 10, Class::Msg, "old"),
        (0, 20, Class::Msg, "new"),
        (1, 30, Class::Msg, "elsewhere"),
        (0, 11, Class::Ev, "change"),
    ] {
        assert!(deliver_in(&mut log, track, &record(seq, class, id)));
    }
    let said = |class, id| {
        let found = log.said_before(class, reference_of(class, "kim", id), 20);
        found.map(|(_, ts)| ts)
    };
    assert_eq!(said(Class::Msg, "old"), Some(10));
    assert_eq!(said(Class::Msg, "new"), None);
    assert_eq!(said(Class::Msg, "elsewhere"), Some(30));
    assert_eq!(said(Class::Ev, "change"), Some(11));
    assert_eq!(said(Class::Ev, "old"), None);
    assert_eq!(said(Class::Msg, "change"), None);
}

#[test]
fn resume_is_judged_by_place_and_fingerprint() {
    let mut log = log(&[record(10, Class::Msg, "m10")], 0, 3 * one());
    for seq in [12, 14, 16, 18] {
        deliver(&mut log, &record(seq, Class::Msg, &format!("m{seq}")));
    }
    assert_eq!(log.floor(0), 12);
    assert_eq!(log.resume(0, since(10, "m10")), Resume::Stream);
    assert_eq!(log.resume(0, since(12, "m12")), Resume::Memory);
    assert_eq!(log.resume(0, since(12, "other")), Resume::Doubtful);
    assert_eq!(log.resume(0, since(14, "m14")), Resume::Memory);
    assert_eq!(log.resume(0, since(15, "m15")), Resume::Doubtful);
    assert_eq!(log.resume(0, since(15, "")), Resume::Memory);
    assert_eq!(log.resume(0, since(18, "m18")), Resume::Memory);
    assert_eq!(log.resume(0, since(18, "other")), Resume::Doubtful);
    assert_eq!(log.resume(0, since(19, "m19")), Resume::Ahead);
    assert_eq!(after(&log, since(14, "m14")), [16, 18]);
    assert_eq!(after(&log, since(12, "m12")), [14, 16, 18]);
}

#[test]
fn what_was_forgotten_is_resumed_from_the_stream() {
    let mut log = log(&[], 0, 1 << 20);
    for seq in [2, 4, 6] {
        deliver(&mut log, &record(seq, Class::Msg, &format!("m{seq}")));
    }
    log.verify(0, 4);
    let (index, unverified) = (log.head_index(), log.unverified(0));
    log.forget();
    assert_eq!((log.head_index(), log.unverified(0)), (index, unverified));
    assert_eq!((log.position(0), log.floor(0)), (6, 6));
    assert_eq!(log.time_of(0, 4), None);
    assert_eq!(log.resume(0, since(4, "m4")), Resume::Stream);
    assert_eq!(log.resume(0, since(6, "m6")), Resume::Memory);
    deliver(&mut log, &record(8, Class::Ev, "erasure"));
    assert_eq!(log.resume(0, since(4, "")), Resume::Stream);
    assert_eq!(log.resume(0, since(6, "m6")), Resume::Memory);
    assert_eq!(after(&log, since(6, "m6")), [8]);
    assert_eq!(log.admit(0, Class::Msg, 4, Some(2)), Admission::Old);
}

#[test]
fn an_empty_room_stands_where_the_stream_stood() {
    let log = log(&[], 77, 30);
    assert_eq!(log.cursor().to_string(), "seoul.k3.77.0");
    assert_eq!(log.resume(0, since(77, "")), Resume::Memory);
    assert_eq!(log.admit(0, Class::Msg, 70, Some(0)), Admission::Old);
}

proptest! {
    /// Whatever is lost, repeated or late on the live path: if gaps are filled from the stream, every message is
    /// delivered exactly once and in order. Resuming at any position in memory gives exactly what follows it.
    #[test]
    fn delivery_is_exactly_once_and_in_order(
        classes in prop::collection::vec(prop::bool::weighted(0.8), 1..60),
        drops in prop::collection::vec(prop::bool::weighted(0.3), 60),
        repeats in prop::collection::vec(prop::bool::weighted(0.3), 60),
        max_messages in 1_usize..40,
    ) {
        let stream: Vec<Record> = classes.iter().enumerate().map(|(i, msg)| {
            record(i as u64 * 3 + 3, if *msg { Class::Msg } else { Class::Ev }, &format!("m{i}"))
        }).collect();
        let mut log = log(&[], 0, max_messages * one());
        let mut delivered = Vec::new();
        let mut previous = [0_u64; 2];
        for (i, live) in stream.iter().enumerate() {
            let before = std::mem::replace(&mut previous[index(live.class)], live.seq);
            if drops[i] {
                continue;
            }
            for _ in 0..=usize::from(repeats[i]) {
                match log.admit(0, live.class, live.seq, Some(before)) {
                    Admission::Old => {}
                    Admission::Deliver => {
                        deliver(&mut log, live);
                        delivered.push(live.seq);
                    }
                    Admission::Gap => {
                        let from = log.unverified(0);
                        for filled in stream.iter().filter(|r| r.seq >= from && r.seq <= live.seq) {
                            if log.admit(0, filled.class, filled.seq, None) == Admission::Deliver {
                                deliver(&mut log, filled);
                                delivered.push(filled.seq);
                            }
                        }
                        log.verify(0, live.seq);
                    }
                }
            }
        }
        // The comparison with the stream's heads at the end.
        let from = log.unverified(0);
        for filled in stream.iter().filter(|r| r.seq >= from) {
            if log.admit(0, filled.class, filled.seq, None) == Admission::Deliver {
                deliver(&mut log, filled);
                delivered.push(filled.seq);
            }
        }
        let mut sorted = delivered.clone();
        sorted.sort_unstable();
        prop_assert_eq!(&sorted, &stream.iter().map(|r| r.seq).collect::<Vec<_>>());
        for class in [Class::Msg, Class::Ev] {
            let of_class: Vec<u64> = delivered.iter().copied()
                .filter(|seq| stream.iter().any(|r| r.seq == *seq && r.class == class)).collect();
            prop_assert!(of_class.is_sorted());
        }
        let in_order = delivered.is_sorted();
        for (i, r) in stream.iter().enumerate() {
            let since = since(r.seq, &format!("m{i}"));
            if in_order && log.resume(0, since) == Resume::Memory {
                let rest = after(&log, since);
                prop_assert_eq!(rest, stream[i + 1..].iter().map(|r| r.seq).collect::<Vec<_>>());
            }
        }
    }
}

/// The logs of two regions, as an edge of either region has them.
fn two_tracks(max_bytes: usize) -> RoomLog {
    RoomLog::new(
        &room(),
        vec![start("seoul", &[], 0), start("virginia", &[], 0)],
        &Rings::new(max_bytes, usize::MAX),
    )
}

/// A message of a track. Its sender had seen the other track up to `seen`.
fn said(track: usize, seq: u64, seen: u64) -> Record {
    let other = ["virginia", "seoul"][track];
    let after = (seen > 0).then(|| format!("{other}.k3.{seen}.1").parse().unwrap());
    let mut record = record(seq, Class::Msg, &format!("{track}-{seq}"));
    record.after = after;
    record
}

/// How long a message waits.
const WAIT: Duration = Duration::from_secs(2);

/// Takes a message in as a hub does. Its frame has the room's cursor and, as the body, track and sequence.
fn take(log: &mut RoomLog, track: usize, record: Record, now: Instant, until: Instant) {
    if log.must_wait(track, &record, now) {
        log.hold(track, record, until);
    } else {
        show(log, track, &record);
    }
    while let Some((track, record)) = log.release(now, usize::MAX, WAIT) {
        show(log, track, &record);
    }
}

fn show(log: &mut RoomLog, track: usize, record: &Record) {
    if let Some(at) = log.advance(track, record) {
        let mut record = record.clone();
        record.body = Bytes::from(format!("[{track},{}]", record.seq));
        let message = log.push(at, record);
        log.recount([message].iter());
    }
}

/// The frames that a session at `since` gets.
fn frames_after(log: &RoomLog, since: &Since) -> Vec<(usize, u64, Cursor)> {
    let missed = log.after(since, 0);
    let mut place = since.positions.clone();
    let frames = missed.steps.iter().map(|Step { message, is_shown }| {
        assert!(is_shown, "in memory nothing else is told");
        if !message.is_late() {
            place[message.track()] = (message.seq, message.fingerprint);
        }
        let own = log.cursor_of(&place, &since.elsewhere);
        let frame = match missed.shared {
            true => message.frame(Codec::Native),
            false => message.frame_at(Codec::Native, &own),
        };
        shown(&frame)
    });
    frames.collect()
}

/// The content of a frame: track, sequence, cursor.
fn shown(frame: &Bytes) -> (usize, u64, Cursor) {
    let json: serde_json::Value =
        serde_json::from_slice(crate::wire::text_of(frame)).expect("a frame");
    let number = |at: usize| json["body"][at].as_u64().unwrap();
    let cursor = json["cursor"].as_str().unwrap().parse().unwrap();
    (usize::try_from(number(0)).unwrap(), number(1), cursor)
}

#[test]
fn an_answer_waits_for_what_it_answers_and_no_longer_than_it_should() {
    let now = Instant::now();
    let later = now + std::time::Duration::from_secs(2);
    let mut log = two_tracks(1 << 20);
    // Virginia's second message answers Seoul's first, which has not come.
    take(&mut log, 1, said(1, 1, 0), now, later);
    take(&mut log, 1, said(1, 2, 5), now, later);
    take(&mut log, 1, said(1, 3, 0), now, later);
    assert_eq!(
        (log.position(1), log.last(1, Class::Msg), log.held()),
        (1, 3, 2)
    );
    assert_eq!(log.held_until(), Some(later));
    take(&mut log, 0, said(0, 5, 0), now, later);
    assert_eq!((log.position(0), log.position(1), log.held()), (5, 3, 0));
    // After a wait in vain, other messages don't wait for the same position.
    take(&mut log, 1, said(1, 4, 9), now, later);
    assert!(log.release(now, 10, WAIT).is_none());
    let (track, record) = log.release(later, 10, WAIT).unwrap();
    assert_eq!((track, record.seq), (1, 4));
    assert!(log.is_early(1, &record));
    show(&mut log, track, &record);
    let by = |from: &str, seen| Record {
        from: from.to_owned(),
        ..said(1, 5, seen)
    };
    assert!(!log.must_wait(1, &by("lee", 8), later) && log.is_early(1, &by("lee", 8)));
    assert!(log.must_wait(1, &by("lee", 10), later));
    assert!(log.must_wait(1, &by("lee", 8), later + WAIT));
    // For a while, nothing waits because of the sender whose claim was in vain.
    assert!(!log.must_wait(1, &by("kim", 10), later + WAIT));
    assert!(log.must_wait(1, &by("kim", 10), later + WAIT * PATIENCE));
    // Unless the message comes: then the sender had really seen it.
    show(&mut log, 0, &said(0, 9, 0));
    assert!(log.must_wait(1, &by("kim", 10), later));
    // Too many are held: the first is released.
    take(&mut log, 1, by("lee", 10), now, later + WAIT);
    assert!(matches!(log.release(later, 0, WAIT), Some((1, _))));
    // Nothing waits for an unknown origin, another epoch, or a position without a message.
    for after in ["mars.k3.7.1", "seoul.q8.99.1", "seoul.k3.99.0"] {
        let mut record = by("park", 0);
        record.after = Some(after.parse().unwrap());
        assert!(!log.must_wait(1, &record, later), "{after}");
        assert!(!log.is_early(1, &record), "{after}");
    }
}

#[test]
fn where_nothing_was_said_nobody_is_behind() {
    // Two edges that opened the room at different times. There is no message in Virginia.
    let head = record(7, Class::Msg, "m7");
    let opened = |empty_at| {
        let heads = std::slice::from_ref(&head);
        RoomLog::new(
            &room(),
            vec![start("seoul", heads, 0), start("virginia", &[], empty_at)],
            &Rings::new(1 << 20, usize::MAX),
        )
    };
    let (early, late) = (opened(3000), opened(5000));
    assert_eq!(late.seen_elsewhere(), Cursor::default());
    let since = early.since_of(&late.cursor()).unwrap();
    assert!(!early.lags(&since));
    assert_eq!(early.ahead(&since), []);
    // A session that has seen a message there is ahead.
    let cursor = "seoul.k3.7.1_virginia.k3.5000.1".parse().unwrap();
    let since = early.since_of(&cursor).unwrap();
    assert!(early.lags(&since));
    assert_eq!(early.ahead(&since).len(), 1);
}

#[test]
fn what_is_stored_while_a_room_is_opened_is_shown() {
    let twin = |track: usize, seq, id: &str| {
        let mut record = said(track, seq, 0);
        record.id = id.to_owned();
        record
    };
    let head = twin(0, 3, "head");
    let mut log = RoomLog::new(
        &room(),
        vec![
            start("seoul", std::slice::from_ref(&head), 0),
            start("virginia", &[], 0),
        ],
        &Rings::new(1 << 20, usize::MAX),
    );
    let (known, newer) = (twin(0, 1, "known"), twin(0, 4, "newer"));
    log.remember(0, &[known, head, newer.clone()]);
    assert!(log.advance(0, &newer).is_some());
    assert!(log.advance(1, &twin(1, 1, "known")).is_none());
    assert!(log.advance(1, &twin(1, 2, "newer")).is_none());
    assert!(log.advance(1, &twin(1, 3, "other")).is_some());
}

#[test]
fn a_message_that_was_stored_in_two_regions_is_shown_once() {
    let now = Instant::now();
    let mut log = two_tracks(1 << 20);
    let twin = |track: usize, seq| {
        let mut record = said(track, seq, 0);
        record.id = "twice".to_owned();
        record
    };
    take(&mut log, 0, twin(0, 1), now, now);
    take(&mut log, 1, twin(1, 1), now, now);
    take(&mut log, 1, said(1, 2, 0), now, now);
    let frames = |seoul, virginia| {
        let place = vec![(seoul, Fingerprint(0)), (virginia, Fingerprint(0))];
        let frames = frames_after(&log, &here(place)).into_iter();
        frames.map(|(t, seq, _)| (t, seq)).collect::<Vec<_>>()
    };
    assert_eq!(frames(0, 0), [(0, 1), (1, 2)]);
    // A session that has seen the other copy, in Virginia, does not get this one.
    assert_eq!(frames(0, 1), [(1, 2)]);
    assert_eq!(frames(1, 0), [(1, 2)]);
}

proptest! {
    /// Edges of two regions deliver the same messages in different orders, each message after its causes. A session
    /// leaves one edge with the cursor of any frame and resumes at the other. It gets the rest, each message once and
    /// in the order of each region. The cursors in those frames can be resumed from in the same way.
    #[test]
    fn a_cursor_of_one_edge_is_good_at_another(
        says in prop::collection::vec((any::<bool>(), any::<bool>()), 1..24),
        arrivals in prop::collection::vec(prop::collection::vec(any::<bool>(), 24), 2),
        leaves in any::<prop::sample::Index>(), leaves_again in any::<prop::sample::Index>(),
    ) {
        let now = Instant::now();
        let never = now + std::time::Duration::from_secs(3600);
        // The sender has seen everything of its own region, and of the other region either everything so far or
        // nothing.
        let mut streams: [Vec<Record>; 2] = Default::default();
        for (virginia, has_seen) in says {
            let track = usize::from(virginia);
            let seen = if has_seen { streams[1 - track].len() as u64 } else { 0 };
            let seq = streams[track].len() as u64 + 1;
            streams[track].push(said(track, seq, seen));
        }
        let edges: Vec<RoomLog> = arrivals.iter().map(|arrivals| {
            let mut log = two_tracks(1 << 20);
            let mut at = [0; 2];
            let turns = arrivals.iter().map(|v| usize::from(*v)).chain([0, 1].repeat(24));
            for track in turns {
                if let Some(record) = streams[track].get(at[track]) {
                    at[track] += 1;
                    take(&mut log, track, record.clone(), now, never);
                }
            }
            log
        }).collect();
        let total = streams[0].len() + streams[1].len();
        let ends = edges[0].cursor();
        for log in &edges {
            prop_assert_eq!(log.held(), 0);
            prop_assert_eq!(log.entries().count(), total);
            prop_assert_eq!(log.cursor().to_string(), ends.to_string());
        }
        let first: Vec<_> = edges[0].entries().map(|entry| shown(&entry.frame(Codec::Native))).collect();
        let stays = leaves.index(first.len());
        let mut seen: Vec<(usize, u64)> = first[..=stays].iter().map(|(t, s, _)| (*t, *s)).collect();
        let mut cursor = first[stays].2.clone();
        // To the second edge, away from it in the middle, and back to the first.
        for log in [&edges[1], &edges[0]] {
            let since = log.since_of(&cursor).unwrap();
            let rest = frames_after(log, &since);
            prop_assert_eq!(rest.len() + seen.len(), total);
            let stays = match rest.len() {
                0 => 0,
                n if std::ptr::eq(log, &edges[1]) => leaves_again.index(n + 1),
                n => n,
            };
            seen.extend(rest[..stays].iter().map(|(t, s, _)| (*t, *s)));
            if let Some((_, _, last)) = rest[..stays].last() {
                cursor = last.clone();
            }
        }
        prop_assert_eq!(cursor.to_string(), ends.to_string());
        let mut sorted = seen.clone();
        sorted.sort_unstable();
        sorted.dedup();
        prop_assert_eq!(sorted.len(), total);
        for (track, stream) in streams.iter().enumerate() {
            let of_one: Vec<u64> = seen.iter().filter(|(t, _)| *t == track).map(|(_, s)| *s).collect();
            prop_assert!(of_one.is_sorted());
            for (i, record) in stream.iter().enumerate() {
                let at = seen.iter().position(|s| *s == (track, i as u64 + 1)).unwrap();
                for cause in record.after.iter().flat_map(Cursor::positions) {
                    let cause = seen.iter().position(|s| *s == (1 - track, cause.seq)).unwrap();
                    prop_assert!(cause < at, "an answer came before what it answers");
                }
            }
        }
    }
}
