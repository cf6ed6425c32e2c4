//! What of one partition is in the hand of this process: which entry of a room is next, and what was done already.
//!
//! # Invariants
//! - If the hook is ordered, of each room at most one entry is being sent, and no later one begins before it is done.
//! - A bounded number is in hand: the consumer delivers no more ([`IN_HAND`]), and as many may be read of rooms apart.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
};

/// Most entries of one partition in hand that the consumer has delivered, and that were read of rooms apart.
pub(super) const IN_HAND: usize = 128;

/// Entries that are remembered after they were done. Their acknowledgement may have been lost.
const REMEMBERED: usize = 1024;

/// The entries in hand, by their sequence.
#[derive(Debug)]
pub(super) struct Hand<T> {
    ordered: bool,
    entries: BTreeMap<u64, Held<T>>,
    rooms: HashMap<Arc<str>, Room>,
    /// Rooms in which something may begin.
    look: BTreeSet<Arc<str>>,
    done: HashSet<u64>,
    /// The sequences in `done`, oldest first.
    order: VecDeque<u64>,
}

#[derive(Debug)]
struct Held<T> {
    room: Arc<str>,
    item: T,
}

#[derive(Debug, Default)]
struct Room {
    waiting: BTreeSet<u64>,
    /// The entry that is being sent; without an order, one of them.
    open: Option<u64>,
}

/// What a delivery is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    New,
    /// It is in hand, and now has the newer item.
    Again,
    /// It was done.
    Done,
}

impl<T> Hand<T> {
    pub(super) fn new(ordered: bool) -> Self {
        Self {
            ordered,
            entries: BTreeMap::new(),
            rooms: HashMap::new(),
            look: BTreeSet::new(),
            done: HashSet::new(),
            order: VecDeque::new(),
        }
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.entries.len()
    }

    /// Takes a delivery of a room, or of whatever else has an order of its own.
    pub(super) fn take(&mut self, seq: u64, room: &str, item: T) -> Taken {
        if self.done.contains(&seq) {
            return Taken::Done;
        }
        if let Some(held) = self.entries.get_mut(&seq) {
            held.item = item;
            return Taken::Again;
        }
        let room: Arc<str> = room.into();
        self.rooms
            .entry(room.clone())
            .or_default()
            .waiting
            .insert(seq);
        self.look.insert(room.clone());
        self.entries.insert(seq, Held { room, item });
        Taken::New
    }

    /// The entries that may begin now.
    pub(super) fn begin(&mut self) -> Vec<u64> {
        let mut begun = Vec::new();
        for room in std::mem::take(&mut self.look) {
            let Some(room) = self.rooms.get_mut(&room) else {
                continue;
            };
            while !(self.ordered && room.open.is_some())
                && let Some(seq) = room.waiting.pop_first()
            {
                room.open = Some(seq);
                begun.push(seq);
            }
        }
        begun
    }

    /// An entry is done: removes and returns it.
    pub(super) fn finish(&mut self, seq: u64) -> Option<T> {
        let Held { room, item } = self.entries.remove(&seq)?;
        if let Some(its) = self.rooms.get_mut(&room) {
            its.open = None;
            match its.waiting.is_empty() {
                true => drop(self.rooms.remove(&room)),
                false => drop(self.look.insert(room)),
            }
        }
        if self.done.insert(seq) {
            self.order.push_back(seq);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.done.remove(&oldest);
        }
        Some(item)
    }

    /// The rooms in which entries wait: the one that is being sent, and how many wait for it.
    pub(super) fn behind(&self) -> impl Iterator<Item = (&Arc<str>, u64, usize)> {
        self.rooms.iter().filter_map(|(name, room)| {
            let waiting = room.waiting.len();
            room.open
                .filter(|_| waiting > 0)
                .map(|seq| (name, seq, waiting))
        })
    }

    /// The sequences of the entries of a room that wait: the first and the last.
    pub(super) fn waiting(&self, room: &str) -> Option<(u64, u64)> {
        let waiting = &self.rooms.get(room)?.waiting;
        Some((*waiting.first()?, *waiting.last()?))
    }

    /// Gives the entries of a room out of hand that wait. They are not done.
    pub(super) fn put_off(&mut self, room: &str) -> Vec<T> {
        let waiting = self.rooms.get_mut(room).map(|room| &mut room.waiting);
        let waiting = waiting.map(std::mem::take).unwrap_or_default();
        let put_off = waiting
            .into_iter()
            .filter_map(|seq| self.entries.remove(&seq));
        put_off.map(|held| held.item).collect()
    }

    /// Whether something of a room is in hand.
    pub(super) fn has(&self, room: &str) -> bool {
        self.rooms.contains_key(room)
    }

    pub(super) fn get(&self, seq: u64) -> Option<&T> {
        self.entries.get(&seq).map(|held| &held.item)
    }

    pub(super) fn items(&self) -> impl Iterator<Item = &T> {
        self.entries.values().map(|held| &held.item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_room_waits_for_its_own_entries_only() {
        let mut hand = Hand::new(true);
        for (seq, of) in [(1, "a"), (2, "b"), (3, "a"), (4, "b"), (5, "c")] {
            assert_eq!(hand.take(seq, of, "first"), Taken::New);
        }
        assert_eq!(hand.begin(), [1, 2, 5]);
        assert_eq!(hand.begin(), [0; 0]);
        // A redelivery changes nothing but how it is answered.
        assert_eq!(hand.take(1, "a", "again"), Taken::Again);
        assert_eq!(hand.begin(), [0; 0]);
        assert_eq!(hand.finish(2), Some("first"));
        assert_eq!(hand.begin(), [4]);
        assert_eq!(hand.finish(1), Some("again"));
        assert_eq!(hand.take(1, "a", "late"), Taken::Done);
        assert_eq!(hand.begin(), [3]);
        assert_eq!(hand.len(), 3);
        for seq in [3, 4, 5] {
            hand.finish(seq);
        }
        assert_eq!((hand.len(), hand.rooms.len()), (0, 0));
    }

    #[test]
    fn what_waits_in_a_room_can_be_put_off_and_come_again() {
        let mut hand = Hand::new(true);
        for (seq, of) in [(1, "a"), (2, "b"), (3, "a"), (4, "a")] {
            hand.take(seq, of, seq);
        }
        hand.begin();
        assert_eq!(hand.behind().collect::<Vec<_>>(), [(&"a".into(), 1, 2)]);
        assert_eq!(hand.waiting("a"), Some((3, 4)));
        assert_eq!(hand.put_off("a"), [3, 4]);
        assert_eq!((hand.len(), hand.waiting("a")), (2, None));
        hand.finish(1);
        assert!(!hand.has("a") && hand.has("b"));
        assert_eq!(hand.take(3, "a", 3), Taken::New);
        assert_eq!(hand.begin(), [3]);
    }

    #[test]
    fn what_comes_late_begins_in_its_place() {
        let mut hand = Hand::new(true);
        for seq in [9, 7, 8] {
            hand.take(seq, "a", ());
        }
        let mut order = Vec::new();
        while let [seq] = hand.begin()[..] {
            order.push(seq);
            hand.finish(seq);
        }
        assert_eq!(order, [7, 8, 9]);
    }

    #[test]
    fn without_order_nothing_waits() {
        let mut hand = Hand::new(false);
        for seq in [3, 1, 2] {
            hand.take(seq, "a", ());
        }
        assert_eq!(hand.begin(), [1, 2, 3]);
        hand.take(4, "a", ());
        assert_eq!(hand.begin(), [4]);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut hand = Hand::new(true);
        for seq in 0..3 * REMEMBERED as u64 {
            hand.take(seq, "a", ());
            hand.begin();
            hand.finish(seq);
        }
        assert_eq!(
            (hand.done.len(), hand.order.len()),
            (REMEMBERED, REMEMBERED)
        );
    }
}
