//! One user's marker in one room, as an edge knows it: pure state.

use std::time::Duration;

use tokio::time::Instant;

use crate::model::{Cursor, Epoch, Region};

/// How long a marker is kept in memory after its key was read or written: longer than any operation that has just read
/// it. The key is read again on each request, since other edges write too.
const REMEMBERED: Duration = Duration::from_secs(30);

/// A marker, what is known of its key in the bucket, and its way there.
///
/// # Invariants
/// - The cursor only grows.
/// - What is known of the key is never replaced by an older value of the key.
/// - A marker that this edge has to write is not removed before it is written.
#[derive(Debug)]
pub(super) struct Marker {
    cursor: Option<Cursor>,
    /// When the cursor was reached, in ms since 1970.
    at: u64,
    key: Option<Key>,
    phase: Phase,
    /// Whether it grew by a command to this edge, and not by a receipt of another edge.
    own: bool,
    /// Whether a client was told that it has read this far, so that the write is not put off longer than a round.
    promised: bool,
}

/// What the key held when this edge last wrote or read it.
#[derive(Debug)]
struct Key {
    cursor: Option<Cursor>,
    /// 0 if there was no key.
    revision: u64,
    known: Instant,
}

/// How far the write of a marker has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// There is nothing to do.
    Resting,
    /// Announced by another edge, which writes it. This edge checks later whether it did.
    Checking,
    /// To be written with others, at the end of the round.
    Gathering,
    /// To be written as soon as there is capacity.
    Queued,
    /// Being written.
    Writing,
    /// Just written.
    Pausing,
}

impl Marker {
    /// A marker of which nothing is known.
    pub(super) fn new() -> Self {
        Self {
            cursor: None,
            at: 0,
            key: None,
            phase: Phase::Resting,
            own: false,
            promised: false,
        }
    }

    /// The marker, as far as this edge knows.
    pub(super) fn cursor(&self) -> Option<&Cursor> {
        self.cursor.as_ref()
    }

    /// When the cursor was reached, in ms since 1970.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) fn set_phase(&mut self, phase: Phase) {
        self.phase = phase;
    }

    /// Notes that the write must not be put off longer than a round.
    pub(super) fn promise(&mut self) {
        self.promised = true;
    }

    pub(super) fn is_promised(&self) -> bool {
        self.promised
    }

    /// Whether `cursor` would move the marker.
    pub(super) fn would_grow(
        &self,
        cursor: &Cursor,
        is_current: impl Fn(&Region, &Epoch) -> bool,
    ) -> bool {
        match &self.cursor {
            Some(own) => own.merge(cursor, is_current) != *own,
            None => true,
        }
    }

    /// Raises the marker, because of a command to this edge (`own`) or a receipt of another edge. Returns whether it
    /// grew.
    pub(super) fn raise(
        &mut self,
        cursor: &Cursor,
        at: u64,
        own: bool,
        is_current: impl Fn(&Region, &Epoch) -> bool,
    ) -> bool {
        let merged = match &self.cursor {
            Some(before) => before.merge(cursor, is_current),
            None => cursor.clone(),
        };
        let grew = self.cursor.as_ref() != Some(&merged);
        if grew {
            self.cursor = Some(merged);
            self.at = at;
        }
        // Also if another edge, or this edge's own receipt that comes back, was faster: this edge writes what it has
        // promised.
        self.own |= own && self.is_ahead() != Some(false);
        grew
    }

    /// Notes what the key holds.
    pub(super) fn read(
        &mut self,
        cursor: Option<Cursor>,
        at: u64,
        revision: u64,
        now: Instant,
        is_current: impl Fn(&Region, &Epoch) -> bool,
    ) {
        // This read began before the last write, or was answered by a replica that is behind.
        if self.key.as_ref().is_some_and(|key| key.revision > revision) {
            return;
        }
        if let Some(cursor) = &cursor {
            self.raise(cursor, at, false, is_current);
        }
        self.key = Some(Key {
            cursor,
            revision,
            known: now,
        });
        self.own &= self.is_ahead() != Some(false);
    }

    /// Whether the key has to be written; `None` if it must be read first.
    pub(super) fn is_ahead(&self) -> Option<bool> {
        let key = self.key.as_ref()?;
        Some(self.cursor.is_some() && self.cursor != key.cursor)
    }

    /// Whether this edge has to write the marker.
    pub(super) fn is_owed(&self) -> bool {
        self.own && self.is_ahead() != Some(false)
    }

    /// What to write, and the revision that is expected.
    pub(super) fn to_write(&self) -> Option<(Cursor, u64)> {
        let key = self.key.as_ref()?;
        let cursor = self.cursor.clone()?;
        (key.cursor.as_ref() != Some(&cursor)).then_some((cursor, key.revision))
    }

    /// Whether the write does what another edge should have done.
    pub(super) fn is_repair(&self) -> bool {
        !self.own
    }

    /// Notes that the key holds `cursor` under `revision`.
    pub(super) fn written(&mut self, cursor: Cursor, revision: u64, now: Instant) {
        if self.cursor.as_ref() == Some(&cursor) {
            self.own = false;
            self.promised = false;
        }
        self.key = Some(Key {
            cursor: Some(cursor),
            revision,
            known: now,
        });
    }

    /// Forgets what is known of the key. It may be wrong: another edge wrote the key, or the outcome of a write is
    /// unknown.
    pub(super) fn doubt(&mut self) {
        self.key = None;
    }

    /// Whether the marker can be removed from memory.
    pub(super) fn is_idle(&self, now: Instant) -> bool {
        let key = self.key.as_ref();
        let recent = key.is_some_and(|key| now.duration_since(key.known) < REMEMBERED);
        self.phase == Phase::Resting && !recent && !self.is_owed()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{Fingerprint, Position};

    const EDGES: usize = 2;
    const ORIGINS: [&str; 2] = ["seoul", "virginia"];

    fn cursor(seqs: [Option<u64>; 2]) -> Cursor {
        let mut cursor: Option<Cursor> = None;
        for (origin, seq) in ORIGINS.iter().zip(seqs) {
            let Some(seq) = seq else { continue };
            let position = Cursor::single(Position {
                origin: Region::parse(origin).unwrap(),
                epoch: Epoch::parse("k3").unwrap(),
                seq,
                fingerprint: Fingerprint(1),
            });
            cursor = Some(cursor.map_or(position.clone(), |c| c.merge(&position, |_, _| true)));
        }
        cursor.unwrap()
    }

    /// What happens to the marker of one user in one room.
    #[derive(Debug, Clone)]
    enum Event {
        /// A device tells an edge that it has read this. The other edge gets a receipt, now or later.
        Read { edge: usize, seqs: [Option<u64>; 2] },
        /// The oldest (or newest) receipt on its way to an edge arrives.
        Hear { edge: usize, newest: bool },
        /// An edge reads the key, and gets the answer later.
        Ask { edge: usize },
        /// The answer to a read arrives, however late.
        Answer { edge: usize, newest: bool },
        /// An edge writes the key; `known` says whether it learns the outcome.
        Write { edge: usize, known: bool },
        /// The edge dies and restarts without any state.
        Die { edge: usize },
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let edge = 0..EDGES;
        let seqs = prop_oneof![
            (0..20_u64, prop::option::of(0..20_u64)).prop_map(|(a, b)| [Some(a), b]),
            (prop::option::of(0..20_u64), 0..20_u64).prop_map(|(a, b)| [a, Some(b)]),
        ];
        let event = prop_oneof![
            4 => (edge.clone(), seqs).prop_map(|(edge, seqs)| Event::Read { edge, seqs }),
            3 => (edge.clone(), any::<bool>()).prop_map(|(edge, newest)| Event::Hear { edge, newest }),
            2 => edge.clone().prop_map(|edge| Event::Ask { edge }),
            3 => (edge.clone(), any::<bool>()).prop_map(|(edge, newest)| Event::Answer { edge, newest }),
            4 => (edge.clone(), prop::bool::weighted(0.8)).prop_map(|(edge, known)| Event::Write { edge, known }),
            1 => edge.prop_map(|edge| Event::Die { edge }),
        ];
        prop::collection::vec(event, 0..60)
    }

    /// The bucket's key: compare-and-set on the revision.
    #[derive(Debug, Clone, Default)]
    struct Stored {
        cursor: Option<Cursor>,
        revision: u64,
    }

    struct Edge {
        marker: Marker,
        /// Receipts and answers on their way to it.
        receipts: Vec<Cursor>,
        answers: Vec<Stored>,
    }

    impl Edge {
        fn new() -> Self {
            Self {
                marker: Marker::new(),
                receipts: Vec::new(),
                answers: Vec::new(),
            }
        }

        fn read(&mut self, stored: Stored) {
            let Stored { cursor, revision } = stored;
            self.marker
                .read(cursor, 1, revision, Instant::now(), |_, _| true);
        }

        /// Writes the key as the keeper does: with the revision that it knows. If that was wrong, it reads before the
        /// next write.
        fn write(&mut self, key: &mut Stored, known: bool) {
            let Some((cursor, revision)) = self.marker.to_write() else {
                return;
            };
            if revision != key.revision {
                return self.marker.doubt();
            }
            *key = Stored {
                cursor: Some(cursor.clone()),
                revision: revision + 1,
            };
            if known {
                self.marker.written(cursor, key.revision, Instant::now());
            } else {
                self.marker.doubt();
            }
        }
    }

    fn take<T>(queue: &mut Vec<T>, newest: bool) -> Option<T> {
        let at = if newest {
            queue.len().checked_sub(1)?
        } else {
            0
        };
        (!queue.is_empty()).then(|| queue.remove(at))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Several devices read through two edges, in the sequences of two regions. Everything may be late or out of
        /// order, and edges may die. In the end the key holds the maximum of what has reached a living edge, and
        /// neither an edge nor the key has ever gone back.
        #[test]
        fn the_key_ends_at_the_maximum_and_nothing_goes_back(events in events()) {
            let mut key = Stored::default();
            let mut edges: Vec<Edge> = (0..EDGES).map(|_| Edge::new()).collect();
            // The model: for each edge, the maximum of what it was told since its start; and the maximum that was ever
            // in the key.
            let mut told: Vec<Option<Cursor>> = vec![None; EDGES];
            let max = |a: &mut Option<Cursor>, b: &Cursor| {
                *a = Some(a.as_ref().map_or(b.clone(), |a| a.merge(b, |_, _| true)));
            };
            let grows = |before: &Option<Cursor>, after: &Option<Cursor>| match (before, after) {
                (None, _) => true,
                (Some(before), Some(after)) => before.merge(after, |_, _| true) == *after,
                (Some(_), None) => false,
            };
            for event in events {
                let key_before = key.cursor.clone();
                let before: Vec<Option<Cursor>> =
                    edges.iter().map(|edge| edge.marker.cursor.clone()).collect();
                let mut died = None;
                match event {
                    Event::Read { edge, seqs } => {
                        let cursor = cursor(seqs);
                        let grew = edges[edge].marker.would_grow(&cursor, |_, _| true);
                        prop_assert_eq!(edges[edge].marker.raise(&cursor, 1, true, |_, _| true), grew);
                        max(&mut told[edge], &cursor);
                        if grew {
                            edges[1 - edge].receipts.push(cursor);
                        }
                    }
                    Event::Hear { edge, newest } => {
                        if let Some(cursor) = take(&mut edges[edge].receipts, newest) {
                            edges[edge].marker.raise(&cursor, 1, false, |_, _| true);
                            max(&mut told[edge], &cursor);
                        }
                    }
                    Event::Ask { edge } => edges[edge].answers.push(key.clone()),
                    Event::Answer { edge, newest } => {
                        if let Some(stored) = take(&mut edges[edge].answers, newest) {
                            edges[edge].read(stored);
                        }
                    }
                    Event::Write { edge, known } => edges[edge].write(&mut key, known),
                    Event::Die { edge } => {
                        edges[edge] = Edge::new();
                        told[edge] = None;
                        died = Some(edge);
                    }
                }
                prop_assert!(grows(&key_before, &key.cursor), "the key went back");
                for (number, edge) in edges.iter().enumerate() {
                    let back = grows(&before[number], &edge.marker.cursor);
                    prop_assert!(back || died == Some(number), "an edge went back");
                    let idle = edge.marker.is_idle(Instant::now() + REMEMBERED * 2);
                    prop_assert!(!idle || !edge.marker.is_owed(), "forgotten before it was written");
                }
            }
            let mut expected = key.cursor.clone();
            for cursor in told.iter().flatten() {
                max(&mut expected, cursor);
            }
            for receipt in edges.iter().flat_map(|edge| &edge.receipts) {
                max(&mut expected, receipt);
            }
            // Everything in flight arrives. Then every edge reads and writes until there is nothing left to write.
            for _ in 0..2 {
                for edge in &mut edges {
                    for receipt in std::mem::take(&mut edge.receipts) {
                        edge.marker.raise(&receipt, 1, false, |_, _| true);
                    }
                    edge.read(key.clone());
                    edge.write(&mut key, true);
                }
            }
            prop_assert_eq!(&key.cursor, &expected);
            for edge in &mut edges {
                edge.read(key.clone());
                prop_assert_eq!(edge.marker.is_ahead(), Some(false));
                prop_assert!(!edge.marker.is_owed());
                prop_assert_eq!(&edge.marker.cursor, &expected);
            }
        }
    }

    #[test]
    fn a_late_answer_does_not_hide_a_later_write() {
        let now = Instant::now();
        let current = |_: &Region, _: &Epoch| true;
        let mut marker = Marker::new();
        marker.read(None, 0, 0, now, current);
        assert!(marker.raise(&cursor([Some(5), None]), 1, true, current));
        let (to_write, over) = marker.to_write().unwrap();
        assert_eq!((to_write.to_string().as_str(), over), ("seoul.k3.5.1", 0));
        marker.written(to_write, 9, now);
        // The answer to a read that began before the write.
        marker.read(None, 0, 0, now, current);
        assert_eq!(marker.is_ahead(), Some(false));
        assert!(!marker.raise(&cursor([Some(4), None]), 2, true, current));
        assert!(!marker.is_owed());
    }
}
