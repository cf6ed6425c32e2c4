//! A room that is watched on this edge: its roster, kept up to date, and the pushes to those who want them. Or, in a
//! process that asks who is online, that list.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::try_join_all;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::{
    sync::{Notify, watch},
    time::sleep_until,
};

use super::{
    Place, Presence, Push,
    announce::{self, Announcer},
    roster::{Alive, Change, Fact, Page, Roster, Seen, Shown},
};
use crate::{
    bus::{Entry, KvError, LiveFeed, ReadError},
    config::PresencePolicy,
    model::{Region, RoomId},
    protocol::{Event, PresenceChange, PresenceState},
    runtime::unix_ms,
    subject,
    telemetry::metrics::{Counter, Gauge, Held, PresencePush, count},
};

/// The lease of the users on this edge: always alive, and never written.
pub(super) const LOCAL: &str = "";

/// Changes taken at once.
const BATCH: usize = 256;

/// How long a roster is kept without users, for the next page of a list or a member who comes back.
const IDLE: Duration = Duration::from_secs(30);

/// Pause before a failed read is retried.
const RETRY: Duration = Duration::from_millis(500);

/// How many times a room is read again if a read does not show everything that is already known.
const AGAIN: u32 = 2;

/// One in this many checks reads the whole room. A comparison of the newest revision does not show a lost change that
/// was followed by another one.
const READ_EVERY: u32 = 4;

/// What to do about a room that was not checked for a while.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Compare these newest revisions, one per origin, with the stored ones.
    Compare(HashMap<Region, u64>),
    Read,
}

/// A watched room.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) place: Place,
    state: Mutex<State>,
    wake: Notify,
    loaded: watch::Sender<bool>,
    /// The limit above which changes are not pushed by name.
    max: usize,
    _active: Held,
}

#[derive(Debug)]
struct State {
    roster: Roster,
    /// Changes to push, at most `max` of them; `total` is the number of all changes.
    changes: Vec<Change>,
    total: usize,
    /// Number of members who want pushes, per shard.
    watchers: Vec<u32>,
    used: Instant,
    /// When the room was last compared with the stored state.
    checked: Instant,
    /// The number of these checks.
    checks: u32,
    resync: bool,
    /// The number of repeated reads because of an incomplete one.
    again: u32,
    /// Newest applied revision of each origin's bucket.
    newest: HashMap<Region, u64>,
    /// The origin of each lease.
    origins: HashMap<Arc<str>, Region>,
}

/// The value of a presence key.
#[derive(Debug, Deserialize)]
struct Value {
    since: u64,
    info: Option<Box<RawValue>>,
}

/// The value of a user's key.
pub(super) fn value(seen: &Seen) -> Bytes {
    let since = seen.since;
    match &seen.info {
        Some(info) => format!(r#"{{"since":{since},"info":{}}}"#, info.get()),
        None => format!(r#"{{"since":{since}}}"#),
    }
    .into()
}

/// The fact in a key.
fn fact(entry: &Entry) -> Option<Fact> {
    let (user, lease) = subject::parse_presence_key(&entry.key)?;
    let seen = entry.value.as_ref().map(|value| {
        // A value written by hand in another form also means that the user is here.
        let value = serde_json::from_slice(value).unwrap_or(Value {
            since: entry.at,
            info: None,
        });
        Seen {
            since: value.since,
            info: value.info.map(Arc::from),
        }
    });
    Some(Fact {
        lease: lease.into(),
        user: user.into(),
        revision: entry.revision,
        seen,
    })
}

impl State {
    /// Applies a change.
    fn apply(&mut self, origin: Region, entry: &Entry) -> Option<Change> {
        let fact = fact(entry);
        if let Some(fact) = &fact
            && !self.origins.contains_key(&fact.lease)
        {
            self.origins.insert(Arc::clone(&fact.lease), origin.clone());
        }
        let newest = self.newest.entry(origin).or_default();
        *newest = (*newest).max(entry.revision);
        self.roster.apply(fact?)
    }

    /// Applies a read of the room's keys at all origins; `None`: that mirror can't be read. An origin that could not be
    /// read, or was answered by a replica that lags behind, removes nothing. Everything is then read again, up to
    /// [`AGAIN`] times.
    fn take(&mut self, read: Vec<(Region, Option<Vec<Entry>>)>, loaded: bool) -> Vec<Change> {
        let last = self.again == AGAIN;
        let (mut kept, mut facts) = (HashSet::new(), Vec::new());
        let known = std::mem::take(&mut self.newest);
        let origins = std::mem::take(&mut self.origins);
        for (origin, entries) in read {
            let known = known.get(&origin).copied().unwrap_or_default();
            let newest = |entries: &Vec<Entry>| entries.last().map_or(0, |entry| entry.revision);
            // A lower revision than the known one may also have another cause: the newest message was purged, or was a
            // marker that has expired. So the last read counts in any case.
            let newest = entries
                .as_ref()
                .map(newest)
                .filter(|newest| *newest >= known || last);
            self.newest.insert(origin.clone(), newest.unwrap_or(known));
            if newest.is_none() {
                kept.insert(origin.clone());
            }
            // Once the room is loaded, an old answer is ignored: it may contain a user whose removal is already
            // forgotten.
            if newest.is_some() || !loaded {
                for fact in entries.iter().flatten().filter_map(fact) {
                    self.origins.insert(Arc::clone(&fact.lease), origin.clone());
                    facts.push(fact);
                }
            }
        }
        self.resync |= !kept.is_empty() && !last;
        self.again = if kept.is_empty() || last {
            0
        } else {
            self.again + 1
        };
        let kept = origins
            .into_iter()
            .filter(|(_, origin)| kept.contains(origin));
        let kept: HashMap<_, _> = kept.collect();
        let changes = self
            .roster
            .replace(facts, |lease| lease != LOCAL && !kept.contains_key(lease));
        self.origins.extend(kept);
        changes
    }

    fn record(&mut self, changes: impl IntoIterator<Item = Change>, max: usize) {
        for change in changes {
            self.total += 1;
            if self.changes.len() < max {
                self.changes.push(change);
            }
        }
    }
}

impl Watched {
    pub(super) fn new(place: Place, alive: Alive, shards: usize, max: usize) -> Arc<Self> {
        let now = Instant::now();
        Arc::new(Self {
            place,
            state: Mutex::new(State {
                roster: Roster::new(alive),
                changes: Vec::new(),
                total: 0,
                watchers: vec![0; shards],
                used: now,
                checked: now,
                checks: rand::random_range(0..READ_EVERY),
                resync: true,
                again: 0,
                newest: HashMap::new(),
                origins: HashMap::new(),
            }),
            wake: Notify::new(),
            loaded: watch::Sender::new(false),
            max,
            _active: Held::new(Gauge::RosterActive),
        })
    }

    /// Applies a change of the users on this edge.
    pub(super) fn apply_local(&self, user: &Arc<str>, revision: u64, seen: Option<Seen>) {
        let mut state = self.state.lock();
        let change = state.roster.apply(Fact {
            lease: Arc::from(LOCAL),
            user: Arc::clone(user),
            revision,
            seen,
        });
        state.record(change, self.max);
        drop(state);
        self.wake.notify_one();
    }

    /// Changes the number of members on `shard` who want pushes.
    pub(super) fn watchers(&self, shard: usize, change: impl FnOnce(u32) -> u32) {
        let mut state = self.state.lock();
        state.used = Instant::now();
        if let Some(watchers) = state.watchers.get_mut(shard) {
            *watchers = change(*watchers);
        }
        drop(state);
        self.wake.notify_one();
    }

    /// Notes that the roster is used.
    pub(super) fn touch(&self) {
        self.state.lock().used = Instant::now();
    }

    /// Makes the task read everything again.
    pub(super) fn resync(&self) {
        self.state.lock().resync = true;
        self.wake.notify_one();
    }

    /// Whether the room is due for a check. If so, it counts as checked.
    pub(super) fn due(&self, interval: Duration) -> Option<Due> {
        let mut state = self.state.lock();
        // Spread, so that rooms opened together are not checked together.
        let wait = interval.mul_f64(rand::random_range(0.6..1.0));
        if state.resync || state.checked.elapsed() < wait {
            return None;
        }
        state.checked = Instant::now();
        state.roster.forget_gone();
        state.checks += 1;
        Some(if state.checks.is_multiple_of(READ_EVERY) {
            Due::Read
        } else {
            Due::Compare(state.newest.clone())
        })
    }

    /// A page of the list, as soon as the room is loaded.
    pub(super) async fn page(&self, after: Option<&str>, limit: usize) -> Page {
        self.loaded().await;
        let mut state = self.state.lock();
        state.used = Instant::now();
        state.roster.page(after, limit)
    }

    /// Keeps the roster up to date until it has been unused for a while, or NATS is closed.
    pub(super) async fn run(self: Arc<Self>, presence: Arc<Presence>) {
        let policy = match &self.place {
            Place::Room(room) => presence.policy(room),
            Place::Online => PresencePolicy::Users,
        };
        let mut announcer = Announcer::new(policy, self.max, Instant::now());
        let mut alive = presence.alive.subscribe();
        {
            let now = Arc::clone(&*alive.borrow_and_update());
            self.state.lock().roster.set_alive(&now);
        }
        let keys = self.place.keys();
        let Ok(mut feed) = presence.bucket.changes(&keys).await else {
            return presence.forget(&self);
        };
        let mut batch = Vec::new();
        let mut retry = None;
        loop {
            self.sync(&presence, &keys, &mut feed, &mut retry).await;
            self.push(&presence, &mut announcer).await;
            let idle_at = {
                let state = self.state.lock();
                let watched = state.watchers.iter().any(|watchers| *watchers > 0);
                let watched = watched || self.place == Place::Online;
                (!watched).then(|| state.used + IDLE)
            };
            if idle_at.is_some_and(|at| at <= Instant::now()) && presence.forget_if_idle(&self) {
                return;
            }
            let due = [announcer.due(), idle_at, retry]
                .into_iter()
                .flatten()
                .min();
            batch.clear();
            // All branches are cancel-safe: a message is only taken when it is pushed to `batch`, and a notification
            // that nobody waits for is kept.
            tokio::select! {
                more = feed.next_batch(&mut batch, BATCH) => if !more {
                    return presence.forget(&self);
                },
                () = self.wake.notified() => {}
                changed = alive.changed() => {
                    let changes = {
                        let alive = Arc::clone(&*alive.borrow_and_update());
                        self.state.lock().roster.set_alive(&alive)
                    };
                    self.state.lock().record(changes, self.max);
                    if changed.is_err() {
                        return presence.forget(&self);
                    }
                }
                () = sleep_until(due.unwrap_or_else(|| Instant::now() + IDLE).into()) => {}
            }
            if feed.is_suspect() {
                self.state.lock().resync = true;
            }
            let mut state = self.state.lock();
            for message in &batch {
                let Some((origin, entry)) = presence.bucket.change(message) else {
                    continue;
                };
                let change = state.apply(origin, &entry);
                state.record(change, self.max);
            }
        }
    }

    /// Reads all stored keys of the room, if that was requested.
    async fn sync(
        &self,
        presence: &Presence,
        keys: &str,
        feed: &mut LiveFeed,
        retry: &mut Option<Instant>,
    ) {
        if !self.state.lock().resync || retry.is_some_and(|at| at > Instant::now()) {
            return;
        }
        // Before the read, so that a new suspicion during the read causes another one.
        feed.settle();
        self.state.lock().resync = false;
        let all = presence.origins.all();
        let buckets = all
            .iter()
            .map(|streams| stored(presence, streams.origin(), keys));
        let stored = match try_join_all(buckets).await {
            Ok(stored) => stored,
            Err(error) => {
                tracing::debug!(place = %self.place, %error, "who is there can't be read");
                self.state.lock().resync = true;
                *retry = Some(Instant::now() + RETRY);
                return;
            }
        };
        *retry = None;
        count(Counter::PresenceScans, 1);
        let mut state = self.state.lock();
        let origins = all.iter().map(|streams| streams.origin().clone());
        state.checked = Instant::now();
        let changes = state.take(origins.zip(stored).collect(), *self.loaded.borrow());
        if state.resync {
            *retry = Some(Instant::now() + RETRY * state.again);
        }
        state.record(changes, self.max);
        if !*self.loaded.borrow() {
            // Members who request the list from now on get all of it, so earlier changes are not pushed.
            state.changes.clear();
            state.total = 0;
            self.loaded.send_replace(true);
        }
    }

    async fn push(&self, presence: &Presence, announcer: &mut Announcer) {
        if self.place == Place::Online {
            // What changed before the first complete list is part of it.
            if *self.loaded.borrow() {
                let changes = std::mem::take(&mut self.state.lock().changes);
                presence.report(changes).await;
            }
            return;
        }
        let (pushes, shards) = {
            let mut state = self.state.lock();
            if !*self.loaded.borrow() {
                return;
            }
            let changes = std::mem::take(&mut state.changes);
            let total = std::mem::take(&mut state.total);
            let count = state.roster.count();
            let pushes = announcer.on(changes, total, count, Instant::now());
            let shards = state.watchers.iter().enumerate();
            let shards: Vec<usize> = shards
                .filter_map(|(shard, watchers)| (*watchers > 0).then_some(shard))
                .collect();
            (pushes, shards)
        };
        let Place::Room(room) = &self.place else {
            return;
        };
        if pushes.is_empty() || shards.is_empty() {
            return;
        }
        let events = pushes.iter().map(|push| event(room, push));
        let events: Arc<[Event]> = events.collect();
        for shard in shards {
            presence
                .push(
                    shard,
                    Push {
                        room: room.clone(),
                        events: Arc::clone(&events),
                    },
                )
                .await;
        }
    }

    /// Whether a user is shown; `None` while nothing is known.
    pub(super) fn shows(&self, user: &str) -> Option<bool> {
        (*self.loaded.borrow()).then(|| self.state.lock().roster.shows(user))
    }

    /// Returns when the room is loaded.
    pub(super) async fn loaded(&self) {
        // The sender is in `self`, so it is not dropped while we wait.
        let mut loaded = self.loaded.subscribe();
        drop(loaded.wait_for(|loaded| *loaded).await);
    }

    /// Whether nobody wants pushes or has used the roster lately.
    pub(super) fn is_idle(&self) -> bool {
        let state = self.state.lock();
        state.watchers.iter().all(|watchers| *watchers == 0) && state.used.elapsed() >= IDLE
    }
}

/// The keys of a room in the bucket of an origin; `None` if that mirror does not exist now.
async fn stored(
    presence: &Presence,
    origin: &Region,
    keys: &str,
) -> Result<Option<Vec<Entry>>, KvError> {
    match presence.bucket.of(origin).scan(keys).await {
        Err(KvError::Read(ReadError::NoStream { .. })) if origin != presence.bucket.origin() => {
            Ok(None)
        }
        stored => stored.map(Some),
    }
}

/// A `presence` push.
fn event(room: &RoomId, push: &announce::Push) -> Event {
    let change = match push {
        announce::Push::Count(users) => {
            count(Counter::PresencePushed(PresencePush::Count), 1);
            PresenceChange::Count(*users)
        }
        announce::Push::User(change) => {
            count(Counter::PresencePushed(PresencePush::User), 1);
            let (state, info, at) = match &change.shown {
                Some(Shown { seen, unreachable }) => {
                    let state = match (unreachable, change.was_shown) {
                        (true, _) => PresenceState::Unreachable,
                        (false, true) => PresenceState::Reachable,
                        (false, false) => PresenceState::Join,
                    };
                    (state, seen.info.clone(), seen.since)
                }
                None => (PresenceState::Leave, None, unix_ms()),
            };
            PresenceChange::User {
                user: Arc::clone(&change.user),
                state,
                info,
                at,
            }
        }
    };
    Event::Presence {
        room: room.clone(),
        change,
    }
}

/// What a policy allows to be shown of a page.
pub(super) fn within(policy: PresencePolicy, page: Page) -> Page {
    match policy {
        PresencePolicy::Users => page,
        PresencePolicy::Counts | PresencePolicy::Off => Page {
            count: page.count,
            ..Page::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presence::roster::Leases;

    const SEOUL: &str = "seoul";
    const VIRGINIA: &str = "virginia";

    fn room() -> RoomId {
        RoomId::parse("chat:a").unwrap()
    }

    /// A room where `a` is a lease of Seoul and `b` one of Virginia.
    fn watched() -> Arc<Watched> {
        let alive = Leases {
            alive: HashSet::from(["a", "b"].map(Arc::from)),
            unreachable: HashSet::new(),
        };
        Watched::new(Place::Room(room()), Arc::new(alive), 1, 9)
    }

    fn region(name: &str) -> Region {
        Region::parse(name).unwrap()
    }

    fn entry(user: &str, lease: &str, revision: u64, here: bool) -> Entry {
        Entry {
            key: subject::presence_key(&room(), user, lease),
            value: here.then(|| Bytes::from_static(b"{}")),
            expired: false,
            revision,
            at: 0,
        }
    }

    fn read(
        state: &mut State,
        seoul: Option<Vec<Entry>>,
        virginia: Option<Vec<Entry>>,
    ) -> Vec<String> {
        state.resync = false;
        let read = vec![(region(SEOUL), seoul), (region(VIRGINIA), virginia)];
        let changes = state.take(read, true);
        changes.iter().map(|c| c.user.to_string()).collect()
    }

    fn shown(state: &State) -> Vec<String> {
        let page = state.roster.page(None, 9);
        page.users
            .iter()
            .map(|(user, _)| user.to_string())
            .collect()
    }

    #[test]
    fn a_replica_that_is_behind_takes_nobody_away() {
        let watched = watched();
        let mut state = watched.state.lock();
        let stale = || Some(vec![entry("gone", "a", 2, true)]);
        let there = |revision| Some(vec![entry("lee", "b", revision, true)]);
        state.apply(region(SEOUL), &entry("gone", "a", 3, false));
        state.apply(region(SEOUL), &entry("kim", "a", 4, true));
        state.apply(region(VIRGINIA), &entry("park", "b", 5, true));
        state.roster.forget_gone();
        // The other region's bucket is applied nevertheless.
        let changes = read(&mut state, stale(), there(9));
        assert_eq!(changes, ["lee", "park"]);
        assert_eq!(shown(&state), ["kim", "lee"]);
        assert!(state.resync);
        let now = || Some(vec![entry("kim", "a", 4, true)]);
        assert_eq!(read(&mut state, now(), there(9)), [""; 0]);
        assert!(!state.resync);
        // Users that stay missing were purged.
        for _ in 0..AGAIN {
            assert_eq!(read(&mut state, Some(vec![]), there(9)), [""; 0]);
            assert!(state.resync);
        }
        assert_eq!(read(&mut state, Some(vec![]), there(9)), ["kim"]);
        assert!(!state.resync);
        assert_eq!(state.newest[&region(SEOUL)], 0);
    }

    #[test]
    fn a_mirror_that_can_not_be_read_takes_nobody_away() {
        let watched = watched();
        let mut state = watched.state.lock();
        state.apply(region(SEOUL), &entry("kim", "a", 4, true));
        state.apply(region(VIRGINIA), &entry("lee", "b", 5, true));
        for more in [true, true, false] {
            let seoul = Some(vec![entry("kim", "a", 6, false)]);
            read(&mut state, seoul, None);
            assert_eq!(shown(&state), ["lee"]);
            assert_eq!(state.resync, more);
        }
        // The region has left the mesh.
        let seoul = (region(SEOUL), Some(vec![entry("kim", "a", 6, false)]));
        state.take(vec![seoul], true);
        assert_eq!(shown(&state), [""; 0]);
    }

    #[test]
    fn a_room_is_read_now_and_then_however_new_its_newest_change_is() {
        let watched = watched();
        watched.state.lock().resync = false;
        let reads = (0..2 * READ_EVERY).filter(|_| watched.due(Duration::ZERO) == Some(Due::Read));
        assert_eq!(reads.count(), 2);
    }
}
