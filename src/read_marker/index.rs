//! The markers that an edge has in memory, by key and in the order of the keys: pure state.
//!
//! All of them are behind one lock, which each durable send takes. So no operation visits all of them while holding it.
//! The markers of a room are adjacent and are visited one part at a time; so are all markers when idle ones are
//! removed.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    ops::Bound::{Excluded, Included, Unbounded},
    sync::Arc,
};

use tokio::time::Instant;

use super::marker::Marker;

/// A marker's key in the bucket. It names room and user.
pub(super) type Key = Arc<str>;

/// Number of markers that are visited each time the lock is held.
pub(super) const STEP: usize = 512;

/// Markers by key. The order is kept separately: a send finds its marker without it, and changes it only when the
/// marker is new.
#[derive(Debug, Default)]
pub(super) struct Index {
    markers: HashMap<Key, Marker>,
    /// The keys of `markers`, ordered.
    order: BTreeSet<Key>,
    /// The next step of the sweep begins after this key.
    swept: Option<Key>,
}

impl Index {
    pub(super) fn len(&self) -> usize {
        self.markers.len()
    }

    pub(super) fn contains(&self, key: &str) -> bool {
        self.markers.contains_key(key)
    }

    pub(super) fn get(&self, key: &str) -> Option<&Marker> {
        self.markers.get(key)
    }

    pub(super) fn get_mut(&mut self, key: &str) -> Option<&mut Marker> {
        self.markers.get_mut(key)
    }

    /// The marker of `key`. If there is none, inserts a new one of which nothing is known.
    pub(super) fn marker(&mut self, key: &Key) -> &mut Marker {
        match self.markers.entry(Arc::clone(key)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                self.order.insert(Arc::clone(key));
                new.insert(Marker::new())
            }
        }
    }

    /// The markers whose keys begin with `prefix`, after the key `after`. A caller that takes at most [`STEP`] of them
    /// continues after the last one.
    pub(super) fn after<'i>(
        &'i self,
        prefix: &'i str,
        after: Option<&str>,
    ) -> impl Iterator<Item = (&'i Key, &'i Marker)> + use<'i> {
        let from = after.map_or(Included(prefix), Excluded);
        self.order
            .range::<str, _>((from, Unbounded))
            .take_while(move |key| key.starts_with(prefix))
            .filter_map(|key| Some((key, self.markers.get(key)?)))
    }

    /// Removes idle markers among the next [`STEP`] ones. Starts over after the last marker.
    pub(super) fn sweep(&mut self, now: Instant) {
        let from = self.swept.as_deref().map_or(Unbounded, Excluded);
        let mut idle = Vec::new();
        let mut last = None;
        let mut looked_at = 0;
        for key in self.order.range::<str, _>((from, Unbounded)).take(STEP) {
            looked_at += 1;
            last = Some(key);
            if self
                .markers
                .get(key)
                .is_none_or(|marker| marker.is_idle(now))
            {
                idle.push(Arc::clone(key));
            }
        }
        // After the last marker, start over.
        self.swept = last.filter(|_| looked_at == STEP).map(Arc::clone);
        for key in idle {
            self.markers.remove(&key);
            self.order.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, time::Duration};

    use proptest::prelude::*;

    use super::*;
    use crate::{
        model::RoomId,
        read_marker::marker::Phase,
        subject::{marker_key, parse_marker_key},
    };

    /// Rooms and users whose keys are prefixes of each other.
    const ROOMS: [&str; 5] = ["chat:a", "chat:a-", "chat:ab", "chat:A", "cha:t"];
    const USERS: [&str; 6] = ["", "k", "ki", "k.i", "kim", "안녕"];

    /// What is done to the markers.
    #[derive(Debug, Clone)]
    enum Step {
        /// A marker is touched; the flag says whether it has something to do.
        Touch(usize, usize, bool),
        /// All idle markers are removed.
        Sweep,
        /// One step of a sweep.
        SweepSome,
        /// Some seconds pass.
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (0..ROOMS.len(), 0..USERS.len(), any::<bool>()).prop_map(|(r, u, b)| Step::Touch(r, u, b)),
            1 => Just(Step::Sweep),
            1 => Just(Step::SweepSome),
            1 => (0..40_u64).prop_map(Step::Wait),
        ]
    }

    fn key(room: &str, user: &str) -> Key {
        marker_key(&RoomId::parse(room).unwrap(), user).into()
    }

    /// All markers of a room, read a few at a time.
    fn of_room(index: &Index, room: &str, most: usize) -> Vec<String> {
        let prefix = marker_key(&RoomId::parse(room).unwrap(), "");
        let mut found: Vec<Key> = Vec::new();
        loop {
            let after = found.last().cloned();
            let part = index.after(&prefix, after.as_deref());
            let part: Vec<Key> = part.take(most).map(|(key, _)| Arc::clone(key)).collect();
            let is_last = part.len() < most;
            found.extend(part);
            if is_last {
                break;
            }
        }
        let user = |key: Key| parse_marker_key(&key).unwrap().1;
        found.into_iter().map(user).collect()
    }

    proptest! {
        /// Whatever is done: each room has exactly the markers that a plain map has, in their order, however few are
        /// read at once. A sweep removes the idle markers and no others.
        #[test]
        fn it_is_a_map_of_all_markers(steps in prop::collection::vec(step(), 1..60), most in 1..4_usize) {
            let mut index = Index::default();
            let mut model: HashMap<(usize, usize), (bool, Option<Instant>)> = HashMap::new();
            let mut now = Instant::now();
            let idle = |(busy, known): &(bool, Option<Instant>), now: Instant| {
                !busy && known.is_none_or(|known| now - known >= Duration::from_secs(30))
            };
            for step in steps {
                match step {
                    Step::Touch(room, user, busy) => {
                        let marker = index.marker(&key(ROOMS[room], USERS[user]));
                        marker.read(None, 0, 0, now, |_, _| true);
                        marker.set_phase(if busy { Phase::Writing } else { Phase::Resting });
                        model.insert((room, user), (busy, Some(now)));
                    }
                    Step::Sweep => {
                        // Wherever the last sweep stopped: one step to the end, one from the beginning.
                        index.sweep(now);
                        index.sweep(now);
                        model.retain(|_, marker| !idle(marker, now));
                    }
                    Step::SweepSome => {
                        index.sweep(now);
                        // All markers fit in one step.
                        model.retain(|_, marker| !idle(marker, now));
                    }
                    Step::Wait(seconds) => now += Duration::from_secs(seconds),
                }
                prop_assert_eq!((index.len(), index.order.len()), (model.len(), model.len()));
                for (number, room) in ROOMS.iter().enumerate() {
                    let mut expected: Vec<Key> = model.keys()
                        .filter(|(of, _)| *of == number)
                        .map(|(_, user)| key(room, USERS[*user]))
                        .collect();
                    expected.sort();
                    let expected: Vec<String> =
                        expected.into_iter().map(|key| parse_marker_key(&key).unwrap().1).collect();
                    prop_assert_eq!(of_room(&index, room, most), expected);
                }
            }
        }
    }

    #[test]
    fn a_sweep_goes_over_everything_in_bounded_steps() {
        let mut index = Index::default();
        let now = Instant::now();
        for n in 0..3 * STEP + 7 {
            let marker = index.marker(&key("chat:a", &format!("u{n}")));
            marker.read(None, 0, 0, now, |_, _| true);
        }
        let later = now + Duration::from_secs(31);
        // These are busy: they are not removed, and don't keep others from being removed.
        for n in (0..3 * STEP + 7).step_by(2) {
            let marker = index.marker(&key("chat:a", &format!("u{n}")));
            marker.set_phase(Phase::Writing);
        }
        let busy = (3 * STEP + 7).div_ceil(2);
        let mut steps = 0;
        while index.len() > busy {
            let before = index.len();
            index.sweep(later);
            assert!(before - index.len() <= STEP);
            steps += 1;
            assert!(steps <= 4, "{} are left", index.len());
        }
        assert_eq!(index.len(), busy);
        // Once more from the beginning.
        for n in (0..3 * STEP + 7).step_by(2) {
            let marker = index.marker(&key("chat:a", &format!("u{n}")));
            marker.set_phase(Phase::Resting);
        }
        for _ in 0..3 {
            index.sweep(later);
        }
        assert_eq!(index.len(), 0);
    }
}
