//! The users on this edge, and which of their keys must be written to NATS, and when. Does no I/O.
//!
//! A user's key is written when the user's first session enters a place (a room, or the edge itself), and removed when the last one leaves. Changes
//! of a key while an earlier write is in flight, or too soon after it, are merged into one write or none. All keys
//! together are written at most `presence.writes_per_second`. So a burst is bounded, and a single change is written at
//! once.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::value::RawValue;

use super::{Place, roster::Seen, watch::Watched};
use crate::runtime::Pace;

/// Writes of one key: this many at once, then one per second.
const KEY_BURST: u32 = 2;

/// Pause before a key is checked again that was written too recently, or whose write failed.
const LATER: Duration = Duration::from_millis(250);

/// All users of an edge, in all places.
#[derive(Debug)]
pub(super) struct Local {
    places: HashMap<Place, There>,
    /// Keys to check. Each is here or in `later` at most once.
    queue: VecDeque<Key>,
    later: BinaryHeap<Reverse<(Instant, Key)>>,
    /// The number of the last change, as the revision for rosters.
    revision: u64,
    /// The lease under which keys are written; without one, nothing is written.
    lease: Option<Arc<str>>,
    pace: Pace,
    writes_per_second: u32,
    /// Whether users who leave are kept: the edge drains, and gives up its lease after a time in which users can come
    /// back elsewhere.
    draining: bool,
}

type Key = (Place, Arc<str>);

#[derive(Debug, Default)]
struct There {
    users: HashMap<Arc<str>, Here>,
    watched: Option<Arc<Watched>>,
}

/// A user in a place on this edge, or one who has left and whose key is not yet removed.
#[derive(Debug)]
struct Here {
    sessions: u32,
    seen: Seen,
    /// Whether there was a change since the last write started.
    dirty: bool,
    /// Whether the key is in `queue` or `later`.
    queued: bool,
    in_flight: bool,
    /// Whether the key may exist.
    stored: bool,
    pace: Pace,
}

/// A write of a key, or its removal (`seen` is `None`).
#[derive(Debug)]
pub(super) struct Write {
    pub(super) place: Place,
    pub(super) user: Arc<str>,
    pub(super) lease: Arc<str>,
    pub(super) seen: Option<Seen>,
}

/// The writer's next step.
#[derive(Debug)]
pub(super) enum Next {
    Write(Write),
    /// Nothing before this time.
    At(Instant),
    /// Nothing until something changes.
    Idle,
}

impl Local {
    pub(super) fn new(writes_per_second: u32, now: Instant) -> Self {
        Self {
            places: HashMap::new(),
            queue: VecDeque::new(),
            later: BinaryHeap::new(),
            revision: 0,
            lease: None,
            pace: Pace::new(now),
            writes_per_second,
            draining: false,
        }
    }

    /// A session of `user` has entered `place`.
    pub(super) fn enter(
        &mut self,
        place: &Place,
        user: &Arc<str>,
        info: Option<&Arc<RawValue>>,
        at: u64,
        now: Instant,
    ) {
        let there = self.places.entry(place.clone()).or_default();
        let here = there
            .users
            .entry(Arc::clone(user))
            .or_insert_with(|| Here::new(now));
        here.sessions += 1;
        let same_info = here.seen.info.as_deref().map(RawValue::get) == info.map(|i| i.get());
        if here.sessions > 1 && same_info {
            return;
        }
        if here.sessions == 1 {
            here.seen.since = at;
        }
        here.seen.info = info.cloned();
        self.revision += 1;
        if let Some(watched) = &there.watched {
            watched.apply_local(user, self.revision, Some(here.seen.clone()));
        }
        Self::mark(&mut self.queue, here, place, user);
    }

    /// A session of `user` has left `place`.
    pub(super) fn leave(&mut self, place: &Place, user: &Arc<str>) {
        let Some(there) = self.places.get_mut(place) else {
            return;
        };
        let Some(here) = there.users.get_mut(user) else {
            return;
        };
        here.sessions = here.sessions.saturating_sub(1);
        if here.sessions > 0 || self.draining {
            return;
        }
        self.revision += 1;
        if let Some(watched) = &there.watched {
            watched.apply_local(user, self.revision, None);
        }
        Self::mark(&mut self.queue, here, place, user);
    }

    fn mark(queue: &mut VecDeque<Key>, here: &mut Here, place: &Place, user: &Arc<str>) {
        here.dirty = true;
        if !here.queued && !here.in_flight {
            here.queued = true;
            queue.push_back((place.clone(), Arc::clone(user)));
        }
    }

    /// From now on users who leave are kept.
    pub(super) fn drain(&mut self) {
        self.draining = true;
    }

    /// Sets a new lease. All keys are written again, since those of the old lease no longer count.
    pub(super) fn set_lease(&mut self, lease: Option<Arc<str>>) {
        self.lease = lease;
        for (place, there) in &mut self.places {
            for (user, here) in &mut there.users {
                here.stored = false;
                Self::mark(&mut self.queue, here, place, user);
            }
        }
    }

    /// Whether any users are on this edge, or are kept by the drain.
    pub(super) fn keeps_anybody(&self) -> bool {
        self.places.values().any(|there| !there.users.is_empty())
    }

    /// Whether there is a lease.
    pub(super) fn has_lease(&self) -> bool {
        self.lease.is_some()
    }

    /// The next key to write, if one may be written now.
    pub(super) fn next_write(&mut self, now: Instant) -> Next {
        let Some(lease) = self.lease.clone() else {
            return Next::Idle;
        };
        while let Some(Reverse((at, _))) = self.later.peek()
            && *at <= now
        {
            let Some(Reverse((_, key))) = self.later.pop() else {
                break;
            };
            self.queue.push_back(key);
        }
        // A quarter of a second's worth at once.
        let burst = (self.writes_per_second / 4).max(1);
        while let Some((place, user)) = self.queue.pop_front() {
            let Some(here) = self
                .places
                .get_mut(&place)
                .and_then(|there| there.users.get_mut(&user))
            else {
                continue;
            };
            here.queued = false;
            if !here.dirty || here.in_flight {
                continue;
            }
            let wanted = here.sessions > 0;
            if !wanted && !here.stored {
                // The user came and went without a write. The entry is dropped once it is no longer needed for the
                // key's pace.
                if here.pace.is_idle(now) {
                    self.forget(&place, &user);
                } else {
                    here.queued = true;
                    self.later.push(Reverse((now + LATER, (place, user))));
                }
                continue;
            }
            let mut pace = here.pace;
            if !pace.take(now, 1, KEY_BURST) {
                here.queued = true;
                self.later.push(Reverse((now + LATER, (place, user))));
                continue;
            }
            if !self.pace.take(now, self.writes_per_second, burst) {
                here.queued = true;
                self.queue.push_front((place, user));
                return Next::At(now + Duration::from_secs(1) / self.writes_per_second.max(1));
            }
            here.pace = pace;
            here.dirty = false;
            here.in_flight = true;
            let seen = wanted.then(|| here.seen.clone());
            return Next::Write(Write {
                place,
                user,
                lease,
                seen,
            });
        }
        match self.later.peek() {
            Some(Reverse((at, _))) => Next::At(*at),
            None => Next::Idle,
        }
    }

    /// A write has ended.
    pub(super) fn written(&mut self, write: &Write, ok: bool, now: Instant) {
        let Some(here) = self
            .places
            .get_mut(&write.place)
            .and_then(|there| there.users.get_mut(&write.user))
        else {
            return;
        };
        here.in_flight = false;
        if self.lease.as_ref() != Some(&write.lease) {
            // It was marked when the lease changed.
            here.stored = false;
        } else if ok {
            here.stored = write.seen.is_some();
        } else {
            // The key may or may not have been written.
            here.stored = true;
            here.dirty = true;
            here.queued = true;
            let key = (write.place.clone(), Arc::clone(&write.user));
            self.later.push(Reverse((now + LATER, key)));
            return;
        }
        if here.dirty || (here.sessions == 0 && !here.stored) {
            Self::mark(&mut self.queue, here, &write.place, &write.user);
        }
    }

    fn forget(&mut self, place: &Place, user: &Arc<str>) {
        if let Some(there) = self.places.get_mut(place) {
            there.users.remove(user);
            if there.users.is_empty() && there.watched.is_none() {
                self.places.remove(place);
            }
        }
    }

    /// The roster of a place, if there is one.
    pub(super) fn watched(&self, place: &Place) -> Option<&Arc<Watched>> {
        self.places.get(place)?.watched.as_ref()
    }

    /// All rosters.
    pub(super) fn all_watched(&self) -> Vec<Arc<Watched>> {
        self.places
            .values()
            .filter_map(|there| there.watched.clone())
            .collect()
    }

    /// Starts to report this edge's users to `watched`.
    pub(super) fn watch(&mut self, place: &Place, watched: &Arc<Watched>) {
        let there = self.places.entry(place.clone()).or_default();
        for (user, here) in &there.users {
            if here.sessions > 0 {
                self.revision += 1;
                watched.apply_local(user, self.revision, Some(here.seen.clone()));
            }
        }
        there.watched = Some(Arc::clone(watched));
    }

    /// Removes the roster of a place.
    pub(super) fn unwatch(&mut self, place: &Place) {
        if let Some(there) = self.places.get_mut(place) {
            there.watched = None;
            if there.users.is_empty() {
                self.places.remove(place);
            }
        }
    }
}

impl Here {
    fn new(now: Instant) -> Self {
        Self {
            sessions: 0,
            seen: Seen {
                since: 0,
                info: None,
            },
            dirty: false,
            queued: false,
            in_flight: false,
            stored: false,
            pace: Pace::new(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::model::RoomId;

    const SECOND: Duration = Duration::from_secs(1);

    fn room() -> Place {
        Place::Room(RoomId::parse("chat:lobby").unwrap())
    }

    fn user(number: usize) -> Arc<str> {
        Arc::from(format!("user-{number}"))
    }

    /// Local state with a bucket that keeps what is written. Some writes fail or take time.
    struct Edge {
        local: Local,
        bucket: BTreeSet<(Arc<str>, Arc<str>)>,
        in_flight: Vec<Write>,
        writes: usize,
        now: Instant,
    }

    impl Edge {
        fn new(writes_per_second: u32) -> Self {
            let now = Instant::now();
            let mut local = Local::new(writes_per_second, now);
            local.set_lease(Some("lease-1".into()));
            Self {
                local,
                bucket: BTreeSet::new(),
                in_flight: Vec::new(),
                writes: 0,
                now,
            }
        }

        /// Starts all writes that may start now.
        fn begin(&mut self) {
            while let Next::Write(write) = self.local.next_write(self.now) {
                self.writes += 1;
                self.in_flight.push(write);
            }
        }

        /// Ends the oldest write in flight: it reached the bucket or not, and the edge knows the outcome or not.
        fn end(&mut self, reached: bool, known: bool) {
            if self.in_flight.is_empty() {
                return;
            }
            let write = self.in_flight.remove(0);
            if reached {
                let key = (Arc::clone(&write.lease), Arc::clone(&write.user));
                if write.seen.is_some() {
                    self.bucket.insert(key);
                } else {
                    self.bucket.remove(&key);
                }
            }
            self.local.written(&write, reached && known, self.now);
        }

        /// Runs until nothing is left to do.
        fn settle(&mut self) {
            for _ in 0..100_000 {
                self.begin();
                if self.in_flight.is_empty() {
                    match self.local.next_write(self.now) {
                        Next::Idle => return,
                        Next::At(at) => self.now = at,
                        Next::Write(write) => self.in_flight.push(write),
                    }
                }
                while !self.in_flight.is_empty() {
                    self.end(true, true);
                }
            }
            panic!("it never comes to rest");
        }
    }

    proptest! {
        /// Whatever comes and goes, however writes end and the lease changes: in the end the bucket holds exactly the
        /// current users under the current lease, and no memory is used for others.
        #[test]
        fn the_bucket_ends_up_with_who_is_here(
            steps in prop::collection::vec((0..8_u8, 0..4_usize, 0..600_u64), 1..200),
        ) {
            let mut edge = Edge::new(50);
            let mut sessions: Vec<Arc<str>> = Vec::new();
            let mut leases = 1;
            for (what, who, wait) in steps {
                edge.now += Duration::from_millis(wait / 4);
                match what {
                    0..3 => {
                        edge.local.enter(&room(), &user(who), None, 1, edge.now);
                        sessions.push(user(who));
                    }
                    3..5 => {
                        if let Some(at) = sessions.iter().position(|u| *u == user(who)) {
                            sessions.remove(at);
                            edge.local.leave(&room(), &user(who));
                        }
                    }
                    5 => edge.begin(),
                    6 => edge.end(wait % 3 > 0, wait % 2 > 0),
                    _ if wait < 60 => {
                        // Other edges purge the keys of the old lease; a write in flight may arrive after that.
                        leases += 1;
                        edge.bucket.clear();
                        edge.local.set_lease(Some(format!("lease-{leases}").into()));
                    }
                    _ => {}
                }
            }
            edge.settle();
            let lease: Arc<str> = format!("lease-{leases}").into();
            let here: BTreeSet<Arc<str>> = sessions.iter().cloned().collect();
            let stored: BTreeSet<Arc<str>> = edge.bucket.iter()
                .filter(|(l, _)| *l == lease).map(|(_, u)| Arc::clone(u)).collect();
            prop_assert_eq!(stored, here);
            for user in sessions {
                edge.local.leave(&room(), &user);
            }
            edge.settle();
            edge.now += 10 * SECOND;
            edge.settle();
            prop_assert!(edge.local.places.is_empty());
        }
    }

    #[test]
    fn a_storm_is_bounded_and_one_change_is_written_at_once() {
        let mut edge = Edge::new(1000);
        // 10,000 entries and leaves within two seconds, by 250 users.
        for i in 0..10_000 {
            edge.local.enter(&room(), &user(i % 250), None, 1, edge.now);
            edge.begin();
            edge.end(true, true);
            edge.local.leave(&room(), &user(i % 250));
            edge.begin();
            edge.end(true, true);
            edge.now += Duration::from_micros(200);
        }
        edge.settle();
        // Two writes at once and then one per second, for each user.
        assert!((500..=250 * 5).contains(&edge.writes), "{}", edge.writes);
        assert!(edge.bucket.is_empty());

        edge.now += 10 * SECOND;
        edge.local.enter(&room(), &user(0), None, 1, edge.now);
        assert!(matches!(edge.local.next_write(edge.now), Next::Write(_)));
    }

    #[test]
    fn all_keys_together_keep_the_rate() {
        let mut edge = Edge::new(1000);
        let start = edge.now;
        for i in 0..10_000 {
            edge.local.enter(&room(), &user(i), None, 1, edge.now);
        }
        edge.begin();
        assert_eq!(edge.writes, 250);
        edge.settle();
        assert_eq!(edge.writes, 10_000);
        let took = edge.now - start;
        assert!((9.7..=9.8).contains(&took.as_secs_f64()), "{took:?}");
    }

    #[test]
    fn tabs_are_one_person_and_a_drain_keeps_who_leaves() {
        let mut edge = Edge::new(1000);
        for _ in 0..3 {
            edge.local.enter(&room(), &user(1), None, 1, edge.now);
        }
        edge.settle();
        assert_eq!(edge.writes, 1);
        edge.local.leave(&room(), &user(1));
        edge.local.leave(&room(), &user(1));
        edge.settle();
        assert_eq!((edge.writes, edge.bucket.len()), (1, 1));
        edge.local.drain();
        edge.local.leave(&room(), &user(1));
        edge.settle();
        assert_eq!((edge.writes, edge.bucket.len()), (1, 1));
    }
}
