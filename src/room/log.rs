//! The state of a room's log on one shard, without I/O: what was delivered, what is missing, who can resume from memory.

use std::collections::{HashSet, VecDeque};

use bytes::Bytes;

use crate::{
    bus::{Record, message_key},
    model::{Class, Cursor, Epoch, Fingerprint, Position, Region},
};

/// Messages whose reference is remembered, so that a publish repeated after the stream's duplicate window is not shown again.
const MAX_REFERENCES: usize = 1024;

/// Delivered messages of a room and the position they lead to.
///
/// Entries have an index that counts deliveries since the log was made; a member that has got everything before index `n` is
/// given what comes from `n` on. Entries at the front are forgotten when their bytes exceed the bound, but the position and
/// the index go on.
///
/// # Invariants
/// - A message is delivered once: only if its sequence is above the last one of its class.
/// - The position never goes back. All messages up to it have been delivered, except where a message of the *other* class
///   was lost in silence before (see [`RoomLog::admit`]).
/// - Every message after `floor` is in memory.
#[derive(Debug)]
pub(super) struct RoomLog {
    origin: Region,
    epoch: Epoch,
    /// Last sequence per class.
    last: [u64; 2],
    position: u64,
    fingerprint: Fingerprint,
    /// Everything up to here is known to be complete, and the index that the next delivery had then.
    verified: (u64, u64),
    entries: VecDeque<Entry>,
    bytes: usize,
    max_bytes: usize,
    /// Index of the first entry in memory.
    base: u64,
    floor: u64,
    floor_fingerprint: Fingerprint,
    references: HashSet<u64>,
    reference_order: VecDeque<u64>,
}

/// One delivered message.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// Its sequence.
    pub(super) seq: u64,
    /// Its fingerprint.
    pub(super) fingerprint: Fingerprint,
    /// The room's position after it: its own sequence, or a higher one where it came late.
    pub(super) position: u64,
    /// Its time, ms since 1970.
    pub(super) ts: u64,
    /// The complete frame for every receiver.
    pub(super) frame: Bytes,
}

/// What is to be done with a message that came live.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// Deliver it.
    Deliver,
    /// It was delivered before, or lies before the log's beginning.
    Old,
    /// Messages before it are missing: read the stream from [`RoomLog::unverified`] on first.
    Gap,
}

/// Where a session with a cursor can go on.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Resume {
    /// Everything after the cursor is in memory, from this index on.
    Memory(u64),
    /// The cursor lies before what is in memory.
    Stream,
    /// The cursor lies beyond what this log has seen.
    Ahead,
    /// The cursor lies within what is in memory, but not on a message with its fingerprint: the stream has to tell.
    Doubtful,
}

impl RoomLog {
    /// A log that stands at the heads of its classes; where there are none, at `empty_at`: a sequence of the stream up to
    /// which the room is known to be empty.
    #[must_use]
    pub(super) fn new(
        origin: Region,
        epoch: Epoch,
        heads: &[Record],
        empty_at: u64,
        max_bytes: usize,
    ) -> Self {
        let newest = heads.iter().max_by_key(|record| record.seq);
        let (position, fingerprint) = newest.map_or((empty_at, Fingerprint::default()), |record| {
            (record.seq, record.fingerprint)
        });
        let last = [Class::Msg, Class::Ev].map(|class| {
            heads
                .iter()
                .find(|r| r.class == class)
                .map_or(position, |record| record.seq)
        });
        Self {
            origin,
            epoch,
            last,
            position,
            fingerprint,
            verified: (position, 0),
            entries: VecDeque::new(),
            bytes: 0,
            max_bytes,
            base: 0,
            floor: position,
            floor_fingerprint: fingerprint,
            references: HashSet::new(),
            reference_order: VecDeque::new(),
        }
    }

    /// The epoch of the stream.
    #[must_use]
    pub(super) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The region whose stream this is.
    #[must_use]
    pub(super) fn origin(&self) -> &Region {
        &self.origin
    }

    /// The sequence up to which everything was delivered.
    #[must_use]
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Every message after this sequence is in memory.
    #[must_use]
    pub(super) fn floor(&self) -> u64 {
        self.floor
    }

    /// The last sequence of a class.
    #[must_use]
    pub(super) fn last(&self, class: Class) -> u64 {
        self.last[index(class)]
    }

    /// The room's cursor.
    #[must_use]
    pub(super) fn cursor(&self) -> Cursor {
        self.cursor_at(self.position, self.fingerprint)
    }

    /// A cursor of this log.
    #[must_use]
    pub(super) fn cursor_at(&self, seq: u64, fingerprint: Fingerprint) -> Cursor {
        Cursor::single(Position {
            seq,
            fingerprint,
            ..self.position_now()
        })
    }

    /// The index that the next delivery will have.
    #[must_use]
    pub(super) fn head_index(&self) -> u64 {
        self.base + self.entries.len() as u64
    }

    /// First sequence that may be missing: where every reading of the stream begins that is to make the log complete.
    ///
    /// Not the place after the last delivery: a message of the other class may be missing before that without anybody
    /// having noticed, and once a later one of its class is delivered it would be taken for old.
    #[must_use]
    pub(super) fn unverified(&self) -> u64 {
        self.verified.0 + 1
    }

    /// Deliveries since the log was last known to be complete.
    #[must_use]
    pub(super) fn deliveries_unverified(&self) -> u64 {
        self.head_index() - self.verified.1
    }

    /// Notes that everything up to `seq` has been delivered: the stream was read up to there, or its heads there are
    /// those that were delivered last.
    pub(super) fn verify(&mut self, seq: u64) {
        if seq >= self.verified.0 {
            self.verified = (seq, self.head_index());
        }
    }

    /// Judges a message by its sequence and its predecessor on the same subject (`None` where it was read from the stream,
    /// in order, and so can't have a gap before it).
    ///
    /// The predecessor is that of the message's own class: if a message of one class is lost in silence and one of the other
    /// class comes, nothing shows. The hub therefore notes all causes of loss on the way from the server, and the periodic
    /// comparison with the stream finds what a server lost; such a message is delivered late.
    #[must_use]
    pub(super) fn admit(&self, class: Class, seq: u64, previous: Option<u64>) -> Admission {
        let last = self.last(class);
        if seq <= last {
            Admission::Old
        } else if previous.is_some_and(|previous| previous > last) {
            Admission::Gap
        } else {
            Admission::Deliver
        }
    }

    /// Takes note of an admitted message and returns the cursor of its frame, or `None` if its reference was delivered
    /// before (the first one wins): then the position moves on and there is no frame.
    #[must_use]
    pub(super) fn advance(&mut self, record: &Record) -> Option<Cursor> {
        self.last[index(record.class)] = record.seq;
        if record.seq > self.position {
            self.position = record.seq;
            self.fingerprint = record.fingerprint;
        }
        let fresh = record.class == Class::Ev || self.remember(record);
        fresh.then(|| self.cursor())
    }

    /// Whether the reference is new.
    fn remember(&mut self, record: &Record) -> bool {
        let key = fnv64(message_key("", &record.from, &record.id).as_bytes());
        if !self.references.insert(key) {
            return false;
        }
        self.reference_order.push_back(key);
        if self.reference_order.len() > MAX_REFERENCES
            && let Some(oldest) = self.reference_order.pop_front()
        {
            self.references.remove(&oldest);
        }
        true
    }

    /// Keeps the frame of the message that [`Self::advance`] has just taken note of.
    pub(super) fn push(&mut self, record: &Record, frame: Bytes) {
        self.bytes += frame.len();
        self.entries.push_back(Entry {
            seq: record.seq,
            fingerprint: record.fingerprint,
            position: self.position,
            ts: record.ts,
            frame,
        });
        while self.bytes > self.max_bytes
            && let Some(oldest) = self.entries.pop_front()
        {
            self.bytes -= oldest.frame.len();
            self.base += 1;
            if oldest.position > self.floor {
                self.floor = oldest.position;
                self.floor_fingerprint = if oldest.seq == oldest.position {
                    oldest.fingerprint
                } else {
                    Fingerprint(0)
                };
            }
        }
    }

    /// Forgets the frames of all that was delivered: who resumes from before here is sent to the stream. Position, indices and
    /// what is verified stay.
    pub(super) fn forget(&mut self) {
        self.base = self.head_index();
        self.entries.clear();
        self.bytes = 0;
        self.floor = self.position;
        self.floor_fingerprint = self.fingerprint;
    }

    /// Where a session with the component `since` of this log's origin and epoch can go on.
    #[must_use]
    pub(super) fn resume(&self, since: &Position) -> Resume {
        if since.seq > self.position {
            return Resume::Ahead;
        }
        if since.seq < self.floor {
            return Resume::Stream;
        }
        // Late entries share the position of the one before them. Whether a cursor there includes them can't be told: they
        // are sent again, since a repeat can be recognised by its id and a loss can't.
        let later = self.entries.partition_point(|entry| {
            entry.position < since.seq || (entry.position == since.seq && entry.seq == since.seq)
        });
        let expected = if since.seq == self.position {
            Some(self.fingerprint)
        } else if since.seq == self.floor {
            Some(self.floor_fingerprint)
        } else {
            later
                .checked_sub(1)
                .and_then(|i| self.entries.get(i))
                .filter(|entry| entry.seq == since.seq)
                .map(|entry| entry.fingerprint)
        };
        let unchecked = since.fingerprint == Fingerprint(0);
        if unchecked || expected == Some(since.fingerprint) {
            Resume::Memory(self.base + later as u64)
        } else {
            Resume::Doubtful
        }
    }

    /// The frames in memory of messages after `seq`: all there are, if `seq` is not below [`Self::floor`].
    pub(super) fn frames_after(&self, seq: u64) -> impl Iterator<Item = Bytes> {
        let later = self.entries.partition_point(|entry| entry.position <= seq);
        self.entries
            .iter()
            .skip(later)
            .filter(move |entry| entry.seq > seq)
            .map(|e| e.frame.clone())
    }

    /// The place up to which everything was delivered.
    #[must_use]
    pub(super) fn position_now(&self) -> Position {
        Position {
            origin: self.origin.clone(),
            epoch: self.epoch,
            seq: self.position,
            fingerprint: self.fingerprint,
        }
    }

    /// The entries from `index` on; `None` if some of them have been forgotten.
    pub(super) fn entries_from(&self, index: u64) -> Option<impl Iterator<Item = &Entry>> {
        let skip = usize::try_from(index.checked_sub(self.base)?).ok()?;
        Some(self.entries.iter().skip(skip))
    }

    /// The time of the message at `seq`, if it is in memory.
    #[must_use]
    pub(super) fn time_of(&self, seq: u64) -> Option<u64> {
        self.find(seq).map(|entry| entry.ts)
    }

    /// Whether the message at `seq` is in memory with another fingerprint than `fingerprint`.
    #[must_use]
    pub(super) fn contradicts(&self, seq: u64, fingerprint: Fingerprint) -> bool {
        self.find(seq)
            .is_none_or(|entry| entry.fingerprint != fingerprint)
    }

    fn find(&self, seq: u64) -> Option<&Entry> {
        // Newest first: who asks has usually just published.
        self.entries.iter().rev().find(|entry| entry.seq == seq)
    }
}

fn index(class: Class) -> usize {
    match class {
        Class::Msg => 0,
        Class::Ev => 1,
    }
}

fn fnv64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(seq: u64, class: Class, id: &str) -> Record {
        Record {
            seq,
            previous: None,
            class,
            ts: seq,
            fingerprint: Fingerprint::of(id.as_bytes()),
            id: id.to_owned(),
            from: "kim".to_owned(),
            kind: None,
            target: None,
            moderated: false,
            reply_to: None,
            mentions: None,
            body: Bytes::from_static(b"1"),
        }
    }

    fn log(heads: &[Record], empty_at: u64, max_bytes: usize) -> RoomLog {
        let (origin, epoch) = (Region::parse("seoul").unwrap(), Epoch::parse("k3").unwrap());
        RoomLog::new(origin, epoch, heads, empty_at, max_bytes)
    }

    fn deliver(log: &mut RoomLog, record: &Record) -> bool {
        let fresh = log.advance(record).is_some();
        if fresh {
            log.push(record, Bytes::from(vec![0; 10]));
        }
        fresh
    }

    fn since(seq: u64, id: &str) -> Position {
        Position {
            origin: Region::parse("seoul").unwrap(),
            epoch: Epoch::parse("k3").unwrap(),
            seq,
            fingerprint: if id.is_empty() {
                Fingerprint(0)
            } else {
                Fingerprint::of(id.as_bytes())
            },
        }
    }

    #[test]
    fn gaps_are_seen_per_class() {
        let mut log = log(
            &[record(5, Class::Msg, "a"), record(9, Class::Ev, "b")],
            20,
            1000,
        );
        assert_eq!(log.position(), 9);
        assert_eq!(log.admit(Class::Msg, 5, Some(3)), Admission::Old);
        assert_eq!(log.admit(Class::Msg, 12, Some(11)), Admission::Gap);
        assert_eq!(log.admit(Class::Msg, 12, Some(5)), Admission::Deliver);
        // The predecessor was erased: nothing between it and us.
        assert_eq!(log.admit(Class::Msg, 12, Some(2)), Admission::Deliver);
        assert!(deliver(&mut log, &record(12, Class::Msg, "c")));
        // Late: lost by the server, found by the comparison with the stream.
        assert_eq!(log.admit(Class::Ev, 11, None), Admission::Deliver);
        assert!(deliver(&mut log, &record(11, Class::Ev, "d")));
        assert_eq!(log.position(), 12);
        assert_eq!(log.admit(Class::Ev, 11, Some(9)), Admission::Old);
    }

    #[test]
    fn a_reference_is_delivered_once() {
        let mut log = log(&[], 0, 1000);
        assert!(deliver(&mut log, &record(1, Class::Msg, "a")));
        assert!(!deliver(&mut log, &record(2, Class::Msg, "a")));
        assert_eq!(log.position(), 2);
        assert!(deliver(&mut log, &record(3, Class::Msg, "b")));
    }

    #[test]
    fn resume_is_judged_by_place_and_fingerprint() {
        let mut log = log(&[record(10, Class::Msg, "m10")], 0, 30);
        for seq in [12, 14, 16, 18] {
            deliver(&mut log, &record(seq, Class::Msg, &format!("m{seq}")));
        }
        assert_eq!(log.floor(), 12);
        assert_eq!(log.resume(&since(10, "m10")), Resume::Stream);
        assert_eq!(log.resume(&since(12, "m12")), Resume::Memory(1));
        assert_eq!(log.resume(&since(12, "other")), Resume::Doubtful);
        assert_eq!(log.resume(&since(14, "m14")), Resume::Memory(2));
        assert_eq!(log.resume(&since(15, "m15")), Resume::Doubtful);
        assert_eq!(log.resume(&since(15, "")), Resume::Memory(2));
        assert_eq!(log.resume(&since(18, "m18")), Resume::Memory(4));
        assert_eq!(log.resume(&since(18, "other")), Resume::Doubtful);
        assert_eq!(log.resume(&since(19, "m19")), Resume::Ahead);
        assert!(log.entries_from(0).is_none());
        assert_eq!(
            log.entries_from(2)
                .unwrap()
                .map(|e| e.seq)
                .collect::<Vec<_>>(),
            [16, 18]
        );
    }

    #[test]
    fn what_was_forgotten_is_resumed_from_the_stream() {
        let mut log = log(&[], 0, 1000);
        for seq in [2, 4, 6] {
            deliver(&mut log, &record(seq, Class::Msg, &format!("m{seq}")));
        }
        log.verify(4);
        let (index, unverified) = (log.head_index(), log.unverified());
        log.forget();
        assert_eq!((log.head_index(), log.unverified()), (index, unverified));
        assert_eq!((log.position(), log.floor()), (6, 6));
        assert_eq!(log.time_of(4), None);
        assert_eq!(log.resume(&since(4, "m4")), Resume::Stream);
        assert_eq!(log.resume(&since(6, "m6")), Resume::Memory(3));
        deliver(&mut log, &record(8, Class::Ev, "erasure"));
        assert_eq!(log.resume(&since(4, "")), Resume::Stream);
        assert_eq!(log.resume(&since(6, "m6")), Resume::Memory(3));
        assert_eq!(
            log.entries_from(3)
                .unwrap()
                .map(|e| e.seq)
                .collect::<Vec<_>>(),
            [8]
        );
        assert!(log.entries_from(2).is_none());
        assert_eq!(log.admit(Class::Msg, 4, Some(2)), Admission::Old);
    }

    #[test]
    fn an_empty_room_stands_where_the_stream_stood() {
        let log = log(&[], 77, 30);
        assert_eq!(log.cursor().to_string(), "seoul.k3.77.0");
        assert_eq!(log.resume(&since(77, "")), Resume::Memory(0));
        assert_eq!(log.admit(Class::Msg, 70, Some(0)), Admission::Old);
    }

    proptest! {
        /// Whatever is lost, repeated or late on the live path: with gaps filled from the stream every message is delivered
        /// exactly once, in order, and every position within memory resumes to exactly what follows it.
        #[test]
        fn delivery_is_exactly_once_and_in_order(
            classes in prop::collection::vec(prop::bool::weighted(0.8), 1..60),
            drops in prop::collection::vec(prop::bool::weighted(0.3), 60),
            repeats in prop::collection::vec(prop::bool::weighted(0.3), 60),
            max_bytes in 10_usize..400,
        ) {
            let stream: Vec<Record> = classes.iter().enumerate().map(|(i, msg)| {
                record(i as u64 * 3 + 3, if *msg { Class::Msg } else { Class::Ev }, &format!("m{i}"))
            }).collect();
            let mut log = log(&[], 0, max_bytes);
            let mut delivered = Vec::new();
            let mut previous = [0_u64; 2];
            for (i, live) in stream.iter().enumerate() {
                let before = std::mem::replace(&mut previous[index(live.class)], live.seq);
                if drops[i] {
                    continue;
                }
                for _ in 0..=usize::from(repeats[i]) {
                    match log.admit(live.class, live.seq, Some(before)) {
                        Admission::Old => {}
                        Admission::Deliver => {
                            deliver(&mut log, live);
                            delivered.push(live.seq);
                        }
                        Admission::Gap => {
                            let from = log.unverified();
                            for filled in stream.iter().filter(|r| r.seq >= from && r.seq <= live.seq) {
                                if log.admit(filled.class, filled.seq, None) == Admission::Deliver {
                                    deliver(&mut log, filled);
                                    delivered.push(filled.seq);
                                }
                            }
                            log.verify(live.seq);
                        }
                    }
                }
            }
            // The comparison with the stream's heads at the end.
            let from = log.unverified();
            for filled in stream.iter().filter(|r| r.seq >= from) {
                if log.admit(filled.class, filled.seq, None) == Admission::Deliver {
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
                if in_order && let Resume::Memory(index) = log.resume(&since(r.seq, &format!("m{i}"))) {
                    let rest: Vec<u64> = log.entries_from(index).unwrap().map(|e| e.seq).collect();
                    prop_assert_eq!(rest, stream[i + 1..].iter().map(|r| r.seq).collect::<Vec<_>>());
                }
            }
        }
    }
}
