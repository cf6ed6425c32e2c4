//! Who is where: kept per edge, written to NATS under the edge's lease, read from there where somebody looks.
//!
//! ```text
//! sessions ─► Local ─► writer ─► bucket `presence` ─► RePublish ─► Watched (of every edge where somebody looks)
//!               └────────────────── at once ─────────────────────────┘   └─► pushes ─► shards ─► members
//! lease ─► bucket `edges` (TTL) ─► RePublish, or its absence ─► which leases live ─► Watched
//! ```
//!
//! All of it runs beside the shards, over a NATS connection of its own: if it is slow, or NATS refuses it, messages are
//! delivered as ever. Shards share one `Presence`, behind a lock that is held for the change of a map.
//!
//! # Invariants
//! - A key says "this user is here" only under the lease of the edge that wrote it, and counts only while that lease lives.
//! - Who is on this edge is shown by it without NATS.
//! - Pushes of a room go out in the order of its changes; the list is never older than a push that went out before it was
//!   asked for.

mod announce;
mod elsewhere;
mod lease;
mod local;
mod roster;
mod watch;
mod writer;

use std::{
    collections::HashSet,
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
    protocol::native::PageOf,
    runtime::{Tasks, unix_ms},
    subject::bucket,
    telemetry::metrics::{Gauge, Held},
};
use local::Local;
pub use roster::Page;
use roster::{Alive, Leases};
use watch::{Due, LOCAL, Watched};

/// The state of a user whose region is cut off, as clients are told.
pub const UNREACHABLE: &str = "unreachable";

/// Pushes that wait for a shard; rooms wait with theirs when it is full.
const WAITING: usize = 1024;

/// How long a shard may take to take a push: one that takes longer is about to be given up.
const PUSH_WITHIN: Duration = Duration::from_secs(5);

/// How often rooms that are looked at are looked after.
const TICK: Duration = Duration::from_secs(1);

/// How long the users of an edge that drains have to come back elsewhere after the last of them was let go.
const COME_BACK: Duration = Duration::from_millis(500);

/// Rooms compared with what is stored at once.
const COMPARED_AT_ONCE: usize = 8;

/// Frames for the members of a room who want to know who is there.
#[derive(Debug)]
pub struct Push {
    /// Which room.
    pub room: RoomId,
    /// `presence` frames.
    pub frames: Vec<Bytes>,
}

/// Who is where, of one edge; shared by its shards.
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
    /// Whether this edge is the one of its region to clean up.
    first: AtomicBool,
    /// A new lease is to be taken.
    anew: Notify,
    /// This edge's lease, and those it had before.
    own: Mutex<Vec<Arc<str>>>,
    /// When NATS last acknowledged that lease.
    renewed: Mutex<Instant>,
    shards: Vec<mpsc::Sender<Push>>,
    runtime: Handle,
    tasks: Tasks,
}

/// Who is in a room can't be told now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("who is in the room can't be read now")]
pub struct Unavailable;

/// A session that is in a room. Dropped when it leaves.
#[derive(Debug)]
pub struct Present {
    presence: Arc<Presence>,
    room: RoomId,
    user: Arc<str>,
    _active: Held,
}

/// A member that wants to be told who comes and goes. Dropped when it does not.
#[derive(Debug)]
pub struct Watch {
    watched: Arc<Watched>,
    shard: usize,
}

impl Drop for Present {
    fn drop(&mut self) {
        self.presence.local.lock().leave(&self.room, &self.user);
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
    /// Begins to keep who is where, read by `reader` and written over its connection, for an edge of `shards` shards; what each of them is to push comes
    /// out of its receiver. The tasks run on the current runtime and end with `tasks`.
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
        let of = |name| Bucket::new(reader.connection().clone(), reader.clone(), config, name);
        let writes_per_second = config.presence.writes_per_second;
        let presence = Arc::new(Self {
            edge: Arc::clone(edge),
            since: unix_ms(),
            bucket: of(bucket::PRESENCE),
            // Several attempts must fit into a lease.
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
            runtime: Handle::current(),
            tasks: tasks.clone(),
            config: Arc::clone(config),
        });
        let (this, edges) = (Arc::clone(&presence), presence.edges.clone());
        tasks.keep_running("lease", lease::hold(this, edges));
        let (this, edges) = (Arc::clone(&presence), presence.edges.clone());
        tasks.keep_running("leases", lease::follow(this, edges));
        let this = Arc::clone(&presence);
        tasks.keep_running("leases of other regions", elsewhere::follow(this));
        tasks.keep_running("presence writer", writer::run(Arc::clone(&presence)));
        tasks.keep_running("presence", Arc::clone(&presence).keep());
        (presence, pushes)
    }

    /// Runs a task until it ends or the edge does.
    fn background(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        // Rosters are opened from the shards, and live here.
        let _guard = self.runtime.enter();
        self.tasks.spawn_until_stopping(name, task);
    }

    /// What is told of the users of a room.
    #[must_use]
    pub fn policy(&self, room: &RoomId) -> PresencePolicy {
        self.config
            .namespaces
            .get(room.namespace())
            .map_or(PresencePolicy::Off, |namespace| namespace.presence)
    }

    /// A session of `user` is in `room` from now on; `None` where the namespace has no presence.
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
        self.local
            .lock()
            .enter(room, user, info, unix_ms(), Instant::now());
        self.changed.notify_one();
        Some(Present {
            presence: Arc::clone(self),
            room: room.clone(),
            user: Arc::clone(user),
            _active: Held::new(Gauge::PresenceSessions),
        })
    }

    /// A member on `shard` wants to be told who comes to `room` and leaves it.
    #[must_use]
    pub fn watch(self: &Arc<Self>, room: &RoomId, shard: usize) -> Watch {
        let watched = self.watched(room);
        watched.watchers(shard, |watchers| watchers + 1);
        Watch { watched, shard }
    }

    /// A page of who is in a room.
    ///
    /// # Errors
    /// [`Unavailable`] when it could not be read within `rooms.join_timeout`.
    pub async fn page(self: &Arc<Self>, room: &RoomId, page: &PageOf) -> Result<Page, Unavailable> {
        let deadline = tokio::time::Instant::now() + self.config.rooms.join_timeout;
        let watched = self.watched(room);
        let page = timeout_at(deadline, watched.page(page.after.as_deref(), page.limit))
            .await
            .map_err(|_elapsed| Unavailable)?;
        Ok(watch::within(self.policy(room), page))
    }

    fn watched(self: &Arc<Self>, room: &RoomId) -> Arc<Watched> {
        let mut local = self.local.lock();
        if let Some(watched) = local.watched(room) {
            watched.touch();
            return Arc::clone(watched);
        }
        let alive = Arc::clone(&self.alive.borrow());
        let max = self.config.limits.presence_push_max;
        let watched = Watched::new(room.clone(), alive, self.shards.len(), max);
        local.watch(room, &watched);
        drop(local);
        self.background("roster", Arc::clone(&watched).run(Arc::clone(self)));
        watched
    }

    /// Called by a roster's task when it ends.
    fn forget(&self, watched: &Arc<Watched>) {
        let mut local = self.local.lock();
        if local
            .watched(&watched.room)
            .is_some_and(|current| Arc::ptr_eq(current, watched))
        {
            local.unwatch(&watched.room);
        }
    }

    /// As [`Self::forget`], unless somebody has come to look meanwhile; whether it was forgotten.
    fn forget_if_idle(&self, watched: &Arc<Watched>) -> bool {
        let mut local = self.local.lock();
        // Whoever begins to look holds the lock while they take hold of it.
        let idle = watched.is_idle();
        if idle {
            local.unwatch(&watched.room);
        }
        idle
    }

    /// Looks after the rooms that are looked at, for ever: each is compared with what is stored once in `rooms.resync`, since
    /// a republish can be lost, and read every few times.
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
                        let keys = crate::subject::presence_keys(&watched.room);
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

    /// Everything is to be read again: NATS was away.
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

    /// Whether the lease was given up: the edge ends.
    fn has_given_up(&self) -> bool {
        !self.local.lock().has_lease()
    }

    /// NATS has just acknowledged this edge's lease.
    fn set_renewed(&self) {
        *self.renewed.lock() = Instant::now();
    }

    /// Whether NATS has not acknowledged this edge's own lease for so long that others' may have ended for the same reason.
    fn is_renewal_overdue(&self) -> bool {
        self.renewed.lock().elapsed() > 2 * lease::renewed_every(self.config.presence.lease)
    }

    fn is_own(&self, lease: &str) -> bool {
        self.own.lock().iter().any(|own| **own == *lease)
    }

    fn lease_value(&self) -> Bytes {
        lease::value(&self.edge, self.since)
    }

    /// Takes in which leases of the own region live.
    fn set_alive<'a>(&self, leases: impl Iterator<Item = &'a Arc<str>>) {
        // Who is here is shown without a lease.
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

    /// Takes in what is known of the leases of other regions; rosters are told with the next look at those of the own one.
    fn set_elsewhere(&self, alive: HashSet<Arc<str>>, unreachable: HashSet<Arc<str>>) {
        *self.elsewhere.lock() = Leases { alive, unreachable };
    }

    /// The regions that are mirrored here.
    fn others(&self) -> Vec<Region> {
        let all = self.origins.all();
        let others = all.iter().skip(1);
        others.map(|streams| streams.origin().clone()).collect()
    }

    /// Takes a new lease, and writes who is here under that.
    fn announce_anew(&self) {
        self.anew.notify_one();
    }

    /// Notes whether this edge is the one to clean up: of those of its region that live, the first by name.
    fn set_first<'a>(&self, mut leases: impl Iterator<Item = &'a Arc<str>>) {
        let own = self.own.lock().last().cloned();
        let first = own.is_some_and(|own| leases.all(|lease| own <= *lease));
        self.first.store(first, Ordering::Relaxed);
    }

    fn is_first(&self) -> bool {
        self.first.load(Ordering::Relaxed)
    }

    /// From now on who leaves is kept: the edge drains, and its users have until its lease is given up to come back
    /// elsewhere without anybody seeing them gone.
    pub fn drain(&self) {
        self.local.lock().drain();
    }

    /// Gives up the lease: who has not come back elsewhere is gone, at once. The end of a drain.
    pub async fn give_up(&self, deadline: tokio::time::Instant) {
        let own = self.own.lock().last().cloned();
        let Some(own) = own.filter(|_| self.edges.connection().is_up()) else {
            return;
        };
        // Who was told to leave a moment ago is still on the way.
        if self.local.lock().keeps_anybody() {
            let now = tokio::time::Instant::now();
            let half = deadline.saturating_duration_since(now) / 2;
            tokio::time::sleep(COME_BACK.min(half)).await;
        }
        // No more writes: those under way come before the purge.
        self.local.lock().set_lease(None);
        if timeout_at(deadline, lease::give_up(self, &self.edges, &own))
            .await
            .is_err()
        {
            tracing::debug!("there was no time to give up the lease: it will end");
        }
    }
}
