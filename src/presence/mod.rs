//! Presence: which users are in which rooms. Kept per edge, written to NATS under the edge's lease, and read from there
//! for rooms that somebody watches.
//!
//! ```text
//! sessions ─► Local ─► writer ─► bucket `presence` ─► RePublish ─► Watched (on every edge where the room is watched)
//!               └────────────────── at once ─────────────────────────┘   └─► pushes ─► shards ─► members
//! lease ─► bucket `edges` (TTL) ─► RePublish, or its absence ─► which leases live ─► Watched
//! ```
//!
//! All of it runs beside the shards, over a NATS connection that live messages do not use. If presence is slow, or NATS
//! refuses its writes, messages are delivered as usual. The shards share one `Presence`, behind a lock that is held
//! only to change a map.
//!
//! # Invariants
//! - A key says "this user is here" only under the lease of the edge that wrote it, and counts only while that lease
//!   lives.
//! - The users on this edge are shown by this edge without NATS.
//! - The pushes of a room are sent in the order of its changes. A list is never older than a push that was sent before
//!   the list was requested.

mod announce;
mod elsewhere;
mod lease;
mod local;
mod online;
mod roster;
mod watch;
mod writer;

use std::{
    collections::HashSet,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use parking_lot::Mutex;
use serde_json::value::RawValue;
use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc, watch as channel},
    time::{MissedTickBehavior, interval, timeout_at},
};

use crate::{
    bus::{Bucket, Origins, Reader},
    config::{Config, PresencePolicy},
    model::{Region, RoomId},
    protocol::{Event, PageOf},
    runtime::{Tasks, unix_ms},
    subject::{self, bucket},
    telemetry::metrics::{Gauge, Held},
};
use local::Local;
pub use online::{Online, Turned};
pub use roster::Page;
use roster::{Alive, Leases};
use watch::{Due, LOCAL, Watched};

/// Pushes waiting for a shard. When this queue is full, the rooms' tasks wait.
const WAITING: usize = 1024;

/// Timeout for handing a push to a shard. A shard that takes longer is about to be closed.
const PUSH_WITHIN: Duration = Duration::from_secs(5);

/// Interval at which watched rooms are checked.
const TICK: Duration = Duration::from_secs(1);

/// Time for the users of a draining edge to come back elsewhere, after the last of them was told to leave.
const COME_BACK: Duration = Duration::from_millis(500);

/// Rooms compared with the stored state at once.
const COMPARED_AT_ONCE: usize = 8;

/// Frames for the members of a room who watch its presence.
#[derive(Debug)]
pub struct Push {
    /// The room.
    pub room: RoomId,
    /// What has changed, in order.
    pub events: Arc<[Event]>,
}

/// The presence of one edge, shared by its shards.
#[derive(Debug)]
pub struct Presence {
    config: Arc<Config>,
    edge: Arc<str>,
    since: u64,
    bucket: Bucket,
    edges: Bucket,
    local: Mutex<Local>,
    /// Wakes the writer.
    changed: Notify,
    alive: channel::Sender<Alive>,
    origins: Arc<Origins>,
    /// The leases of other regions.
    elsewhere: Mutex<Leases>,
    /// Whether this edge is the one that cleans up in its region.
    first: AtomicBool,
    /// Notified when a new lease must be taken.
    anew: Notify,
    /// This edge's lease and its earlier ones, oldest first.
    own: Mutex<Vec<Arc<str>>>,
    /// When NATS last acknowledged the current lease.
    renewed: Mutex<Instant>,
    shards: Vec<mpsc::Sender<Push>>,
    /// In a process that is no edge: who wants to know who is online.
    online: Option<online::Sink>,
    runtime: Handle,
    tasks: Tasks,
}

/// Presence can't be read now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("who is in the room can't be read now")]
pub struct Unavailable;

/// A session in a room, or on the edge. Drop it when the session leaves.
#[derive(Debug)]
pub struct Present {
    presence: Arc<Presence>,
    place: Place,
    user: Arc<str>,
    /// Counts a session in a room.
    _active: Option<Held>,
}

/// Where users are.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Place {
    /// Anywhere: those with a session.
    Online,
    /// In a room.
    Room(RoomId),
}

impl Place {
    /// The key of a user who is there.
    fn key(&self, user: &str, lease: &str) -> String {
        match self {
            Self::Online => subject::online_key(user, lease),
            Self::Room(room) => subject::presence_key(room, user, lease),
        }
    }

    /// The keys of all users who are there.
    fn keys(&self) -> String {
        match self {
            Self::Online => subject::ONLINE_KEYS.to_owned(),
            Self::Room(room) => subject::presence_keys(room),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Online => f.write_str("online"),
            Self::Room(room) => room.fmt(f),
        }
    }
}

/// A member who gets the presence pushes of a room. Drop it to stop them.
#[derive(Debug)]
pub struct Watch {
    watched: Arc<Watched>,
    shard: usize,
}

impl Drop for Present {
    fn drop(&mut self) {
        self.presence.local.lock().leave(&self.place, &self.user);
        self.presence.changed.notify_one();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.watched
            .watchers(self.shard, |watchers| watchers.saturating_sub(1));
    }
}

impl Presence {
    /// Starts presence for an edge with `shards` shards. It is read with `reader` and written over the reader's
    /// connection. Returns one receiver of pushes per shard. The tasks run on the current runtime and end with `tasks`.
    #[must_use]
    pub fn start(
        config: &Arc<Config>,
        edge: &Arc<str>,
        reader: &Reader,
        origins: &Arc<Origins>,
        shards: usize,
        tasks: &Tasks,
    ) -> (Arc<Self>, Vec<mpsc::Receiver<Push>>) {
        let (shards, pushes) = (0..shards).map(|_| mpsc::channel(WAITING)).unzip();
        let presence = Self::new(config, edge, reader, origins, (shards, None), tasks);
        let (this, edges) = (Arc::clone(&presence), presence.edges.clone());
        tasks.keep_running("lease", lease::hold(this, edges));
        tasks.keep_running("presence writer", writer::run(Arc::clone(&presence)));
        (presence, pushes)
    }

    /// Begins to follow leases. Who is here goes to `pushed`: to shards, or to somebody who asks who is online.
    fn new(
        config: &Arc<Config>,
        edge: &Arc<str>,
        reader: &Reader,
        origins: &Arc<Origins>,
        (shards, online): (Vec<mpsc::Sender<Push>>, Option<online::Sink>),
        tasks: &Tasks,
    ) -> Arc<Self> {
        let of = |name| Bucket::new(reader.connection().clone(), reader.clone(), config, name);
        let writes_per_second = config.presence.writes_per_second;
        let presence = Arc::new(Self {
            edge: Arc::clone(edge),
            since: unix_ms(),
            bucket: of(bucket::PRESENCE),
            // Several attempts must fit into the time of a lease.
            edges: of(bucket::EDGES).with_timeout(config.presence.lease / 5),
            local: Mutex::new(Local::new(writes_per_second, Instant::now())),
            changed: Notify::new(),
            alive: channel::Sender::new(Arc::new(Leases {
                alive: HashSet::from([Arc::from(LOCAL)]),
                unreachable: HashSet::new(),
            })),
            origins: Arc::clone(origins),
            elsewhere: Mutex::default(),
            first: AtomicBool::new(false),
            anew: Notify::new(),
            own: Mutex::default(),
            renewed: Mutex::new(Instant::now()),
            shards,
            online,
            runtime: Handle::current(),
            tasks: tasks.clone(),
            config: Arc::clone(config),
        });
        let (this, edges) = (Arc::clone(&presence), presence.edges.clone());
        tasks.keep_running("leases", lease::follow(this, edges));
        let this = Arc::clone(&presence);
        tasks.keep_running("leases of other regions", elsewhere::follow(this));
        tasks.keep_running("presence", Arc::clone(&presence).keep());
        presence
    }

    /// Runs a task until it ends or the edge stops.
    fn background(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        // Shards open rosters, but the rosters' tasks run on this runtime.
        let _guard = self.runtime.enter();
        self.tasks.spawn_until_stopping(name, task);
    }

    /// The presence policy of a room.
    #[must_use]
    pub fn policy(&self, room: &RoomId) -> PresencePolicy {
        self.config
            .namespaces
            .get(room.namespace())
            .map_or(PresencePolicy::Off, |namespace| namespace.presence)
    }

    /// A session of `user` enters `room`; `None` if the namespace has no presence.
    #[must_use]
    pub fn enter(
        self: &Arc<Self>,
        room: &RoomId,
        user: &Arc<str>,
        info: Option<&Arc<RawValue>>,
    ) -> Option<Present> {
        if self.policy(room) == PresencePolicy::Off {
            return None;
        }
        let active = Held::new(Gauge::PresenceSessions);
        Some(self.enter_place(Place::Room(room.clone()), user, info, Some(active)))
    }

    /// A session of `user` begins on this edge; `None` if `presence.users` is off.
    #[must_use]
    pub fn arrive(self: &Arc<Self>, user: &Arc<str>) -> Option<Present> {
        let is_on = self.config.presence.users;
        is_on.then(|| self.enter_place(Place::Online, user, None, None))
    }

    fn enter_place(
        self: &Arc<Self>,
        place: Place,
        user: &Arc<str>,
        info: Option<&Arc<RawValue>>,
        active: Option<Held>,
    ) -> Present {
        self.local
            .lock()
            .enter(&place, user, info, unix_ms(), Instant::now());
        self.changed.notify_one();
        Present {
            presence: Arc::clone(self),
            place,
            user: Arc::clone(user),
            _active: active,
        }
    }

    /// Sends the presence changes of `room` to a member on `shard`.
    #[must_use]
    pub fn watch(self: &Arc<Self>, room: &RoomId, shard: usize) -> Watch {
        let watched = self.watched(
            &Place::Room(room.clone()),
            self.config.limits.presence_push_max,
        );
        watched.watchers(shard, |watchers| watchers + 1);
        Watch { watched, shard }
    }

    /// A page of the users in a room.
    ///
    /// # Errors
    /// [`Unavailable`] if the room could not be read within `rooms.join_timeout`.
    pub async fn page(self: &Arc<Self>, room: &RoomId, page: &PageOf) -> Result<Page, Unavailable> {
        let deadline = tokio::time::Instant::now() + self.config.rooms.join_timeout;
        let watched = self.watched(
            &Place::Room(room.clone()),
            self.config.limits.presence_push_max,
        );
        let page = timeout_at(deadline, watched.page(page.after.as_deref(), page.limit))
            .await
            .map_err(|_elapsed| Unavailable)?;
        Ok(watch::within(self.policy(room), page))
    }

    /// The roster of a place, which pushes at most `max` changes at once by name.
    fn watched(self: &Arc<Self>, place: &Place, max: usize) -> Arc<Watched> {
        let mut local = self.local.lock();
        if let Some(watched) = local.watched(place) {
            watched.touch();
            return Arc::clone(watched);
        }
        let alive = Arc::clone(&self.alive.borrow());
        let watched = Watched::new(place.clone(), alive, self.shards.len(), max);
        local.watch(place, &watched);
        drop(local);
        self.background("roster", Arc::clone(&watched).run(Arc::clone(self)));
        watched
    }

    /// Called by a roster's task when it ends.
    fn forget(&self, watched: &Arc<Watched>) {
        let mut local = self.local.lock();
        if local
            .watched(&watched.place)
            .is_some_and(|current| Arc::ptr_eq(current, watched))
        {
            local.unwatch(&watched.place);
        }
    }

    /// Like [`Self::forget`], unless somebody has started to use the roster meanwhile. Returns whether it was
    /// forgotten.
    fn forget_if_idle(&self, watched: &Arc<Watched>) -> bool {
        let mut local = self.local.lock();
        // A new user of the roster holds this lock while taking a reference.
        let idle = watched.is_idle();
        if idle {
            local.unwatch(&watched.place);
        }
        idle
    }

    /// Checks the watched rooms, forever. Since a republish can be lost, each room is compared with the stored state
    /// once per `rooms.resync`; every few times it is read completely instead.
    async fn keep(self: Arc<Self>) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            if !self.bucket.connection().is_up() {
                continue;
            }
            let due: Vec<_> = self
                .all_watched()
                .into_iter()
                .filter_map(|watched| Some((watched.due(self.config.rooms.resync)?, watched)))
                .collect();
            stream::iter(due)
                .for_each_concurrent(COMPARED_AT_ONCE, async |(due, watched)| {
                    let Due::Compare(newest) = due else {
                        return watched.resync();
                    };
                    for streams in self.origins.all() {
                        let bucket = self.bucket.of(streams.origin());
                        let known = newest.get(streams.origin()).copied().unwrap_or_default();
                        let keys = watched.place.keys();
                        match bucket.newest(&keys).await {
                            Ok(stored) if stored == known => {}
                            Ok(_other) => return watched.resync(),
                            Err(error) => tracing::debug!(%error, "a roster can't be compared"),
                        }
                    }
                })
                .await;
        }
    }

    fn all_watched(&self) -> Vec<Arc<Watched>> {
        self.local.lock().all_watched()
    }

    /// Makes all rosters read everything again, after a reconnect or a change of the regions.
    fn resync_all(&self) {
        for watched in self.all_watched() {
            watched.resync();
        }
    }

    async fn push(&self, shard: usize, push: Push) {
        if let Some(shard) = self.shards.get(shard)
            && shard.send_timeout(push, PUSH_WITHIN).await.is_err()
        {
            tracing::debug!("a shard that has ended, or does not answer, gets no pushes");
        }
    }

    fn set_lease(&self, lease: &Arc<str>) {
        self.own.lock().push(Arc::clone(lease));
        self.local.lock().set_lease(Some(Arc::clone(lease)));
        self.changed.notify_one();
    }

    /// Whether the lease was given up, because the edge ends.
    fn has_given_up(&self) -> bool {
        !self.local.lock().has_lease()
    }

    /// Notes that NATS has just acknowledged this edge's lease.
    fn set_renewed(&self) {
        *self.renewed.lock() = Instant::now();
    }

    /// Whether NATS has not acknowledged this edge's own lease for so long that other leases may have expired for the
    /// same reason.
    fn is_renewal_overdue(&self) -> bool {
        self.renewed.lock().elapsed() > 2 * lease::renewed_every(self.config.presence.lease)
    }

    /// The number of edges that are known to live, in all regions that can be reached, with this one.
    #[must_use]
    pub fn edges(&self) -> usize {
        self.alive.borrow().alive.len()
    }

    fn is_own(&self, lease: &str) -> bool {
        self.own.lock().iter().any(|own| **own == *lease)
    }

    fn lease_value(&self) -> Bytes {
        lease::value(&self.edge, self.since)
    }

    /// Sets which leases of the own region live.
    fn set_alive<'a>(&self, leases: impl Iterator<Item = &'a Arc<str>>) {
        // The users on this edge are shown without a lease.
        let others = leases.filter(|lease| !self.is_own(lease)).cloned();
        let mut alive: HashSet<Arc<str>> = others.chain([Arc::from(LOCAL)]).collect();
        let elsewhere = self.elsewhere.lock();
        alive.extend(elsewhere.alive.iter().cloned());
        let leases = Leases {
            alive,
            unreachable: elsewhere.unreachable.clone(),
        };
        drop(elsewhere);
        self.alive.send_if_modified(|current| {
            let changed = **current != leases;
            if changed {
                *current = Arc::new(leases);
            }
            changed
        });
    }

    /// Sets the leases of other regions. Rosters get them with the next update of the own region's leases.
    fn set_elsewhere(&self, alive: HashSet<Arc<str>>, unreachable: HashSet<Arc<str>>) {
        *self.elsewhere.lock() = Leases { alive, unreachable };
    }

    /// The other regions that are mirrored here.
    fn others(&self) -> Vec<Region> {
        let all = self.origins.all();
        let others = all.iter().skip(1);
        others.map(|streams| streams.origin().clone()).collect()
    }

    /// Takes a new lease and writes this edge's users under it.
    fn announce_anew(&self) {
        self.anew.notify_one();
    }

    /// Determines whether this edge is the one that cleans up: the one with the first name among its region's living
    /// leases.
    fn set_first<'a>(&self, mut leases: impl Iterator<Item = &'a Arc<str>>) {
        let own = self.own.lock().last().cloned();
        let first = own.is_some_and(|own| leases.all(|lease| own <= *lease));
        self.first.store(first, Ordering::Relaxed);
    }

    fn is_first(&self) -> bool {
        self.first.load(Ordering::Relaxed)
    }

    /// From now on users who leave are kept. The edge drains, and until its lease is given up its users can come back
    /// elsewhere without being seen as gone.
    pub fn drain(&self) {
        self.local.lock().drain();
    }

    /// Gives up the lease: users who have not come back elsewhere are gone at once. This is the end of a drain.
    pub async fn give_up(&self, deadline: tokio::time::Instant) {
        let own = self.own.lock().last().cloned();
        let Some(own) = own.filter(|_| self.edges.connection().is_up()) else {
            return;
        };
        // Users who were told to leave a moment ago are still reconnecting.
        if self.local.lock().keeps_anybody() {
            let now = tokio::time::Instant::now();
            let half = deadline.saturating_duration_since(now) / 2;
            tokio::time::sleep(COME_BACK.min(half)).await;
        }
        // No more writes. Writes in flight arrive before the purge.
        self.local.lock().set_lease(None);
        if timeout_at(deadline, lease::give_up(self, &self.edges, &own))
            .await
            .is_err()
        {
            tracing::debug!("there was no time to give up the lease: it will end");
        }
    }
}
