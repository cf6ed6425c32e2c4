//! All rooms of one shard: opening, comparing with the streams, forgetting.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_local,
    time::{Instant, MissedTickBehavior, interval},
};

use super::{hub::Hub, log::RoomLog};
use crate::{
    bus::{Connection, MAX_HEADS, Reader, Record, StreamState, Streams},
    config::{self, Config},
    model::{Class, RoomId},
    read_marker::Markers,
    subject::Subjects,
    telemetry::metrics::{Gauge, gauge_add},
};

/// How often the shard looks which rooms are due to be compared or forgotten.
const TICK: Duration = Duration::from_millis(500);

/// Age at which a fresh hub is compared for the first time: in a cluster the news of a subscription takes a moment to reach
/// the server that republishes.
const FIRST_CHECK: Duration = Duration::from_secs(2);

/// Deliveries after which a busy room is compared early: what may have to be read again after a loss stays small.
const BUSY: u64 = 1000;

/// Rooms compared in one request.
const ROOMS_A_READ: usize = MAX_HEADS / 2;

/// The rooms of one shard.
#[derive(Debug)]
pub struct Rooms {
    pub(super) connection: Connection,
    pub(super) reader: Reader,
    pub(super) streams: Arc<Streams>,
    pub(super) subjects: Subjects,
    pub(super) config: config::Rooms,
    pub(super) markers: Arc<Markers>,
    /// Members of one room above which none of them is told who has read what.
    pub(super) read_push_max: usize,
    hubs: RefCell<HashMap<RoomId, Rc<Hub>>>,
    replay_memory: Arc<Semaphore>,
    suspecting: Cell<bool>,
    generation: Cell<u64>,
    version: Cell<u64>,
}

impl Rooms {
    /// The rooms of a shard that has `connection` for live messages and `reader` for reading streams.
    #[must_use]
    pub fn new(
        connection: Connection,
        reader: Reader,
        streams: Arc<Streams>,
        subjects: Subjects,
        config: &Config,
        markers: Arc<Markers>,
    ) -> Rc<Self> {
        let read_push_max = config.limits.read_push_max;
        let config = config.rooms.clone();
        let shares = usize::try_from(config.replay_memory.as_u64() / 1024).unwrap_or(usize::MAX);
        Rc::new(Self {
            generation: Cell::new(connection.generation()),
            version: Cell::new(streams.version()),
            connection,
            reader,
            streams,
            subjects,
            config,
            markers,
            read_push_max,
            hubs: RefCell::default(),
            replay_memory: Arc::new(Semaphore::new(shares.min(Semaphore::MAX_PERMITS))),
            suspecting: Cell::new(false),
        })
    }

    /// Reads streams over a connection that is no live one.
    #[must_use]
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    pub(super) fn hub(self: &Rc<Self>, room: &RoomId, durable: bool) -> Rc<Hub> {
        if let Some(hub) = self.hubs.borrow().get(room)
            && !hub.is_gone()
        {
            hub.empty_since
                .set(hub.empty_since.get().map(|_| Instant::now()));
            return Rc::clone(hub);
        }
        let hub = Hub::new(self, room.clone(), durable);
        self.hubs.borrow_mut().insert(room.clone(), Rc::clone(&hub));
        gauge_add(Gauge::RoomActive, 1);
        spawn_local(Rc::clone(&hub).run(Rc::clone(self)));
        hub
    }

    /// A room's hub, if it has one.
    pub(super) fn existing(&self, room: &RoomId) -> Option<Rc<Hub>> {
        self.hubs.borrow().get(room).cloned()
    }

    /// Called by a hub's task when it ends.
    pub(super) fn forget(&self, hub: &Rc<Hub>) {
        gauge_add(Gauge::RoomActive, -1);
        let mut hubs = self.hubs.borrow_mut();
        if hubs
            .get(&hub.room)
            .is_some_and(|current| Rc::ptr_eq(current, hub))
        {
            hubs.remove(&hub.room);
        }
    }

    pub(super) fn new_log(&self, state: StreamState, heads: &[Record]) -> RoomLog {
        RoomLog::new(
            self.streams.origin().clone(),
            state.epoch,
            heads,
            state.last_seq,
            usize::try_from(self.config.ring.as_u64()).unwrap_or(usize::MAX),
        )
    }

    /// A share of `rooms.replay_memory` for a backlog of at most `bytes`.
    pub(super) async fn replay_share(&self, bytes: usize) -> OwnedSemaphorePermit {
        // The configuration bounds sizes to 2 GiB.
        let units = u32::try_from(bytes / 1024).unwrap_or(u32::MAX).max(1);
        Arc::clone(&self.replay_memory)
            .acquire_many_owned(units)
            .await
            .expect("the semaphore is never closed")
    }

    /// Gives back what a backlog of `bytes` does not need.
    pub(super) fn shrink_share(&self, share: &mut OwnedSemaphorePermit, bytes: usize) {
        let spare = share.num_permits().saturating_sub(bytes / 1024 + 1);
        drop(share.split(spare));
    }

    /// Something does not fit what is known of a stream: look at it, once for all who ask meanwhile.
    pub(super) fn suspect(self: &Rc<Self>, part: u16) {
        if !self.suspecting.replace(true) {
            let rooms = Rc::clone(self);
            spawn_local(async move {
                rooms.verify(part).await;
                rooms.suspecting.set(false);
            });
        }
    }

    pub(super) async fn verify(&self, part: u16) {
        if let Err(error) = self.streams.verify(part, Instant::now()).await {
            tracing::debug!(error = %error, "a suspicion could not be checked");
        }
        self.end_outdated();
    }

    /// Ends the hubs whose stream began anew; their members join again and learn from the reply what became of their cursor.
    fn end_outdated(&self) {
        if self.version.replace(self.streams.version()) == self.streams.version() {
            return;
        }
        let hubs: Vec<Rc<Hub>> = self.hubs.borrow().values().cloned().collect();
        for hub in hubs {
            if hub.is_ready() && hub.is_outdated(self) {
                hub.end(Some("reset"));
            }
        }
    }

    /// Compares rooms with their streams and forgets empty ones, for ever. Every room is compared at least every
    /// `rooms.resync`, all of them at once after a reconnect.
    pub async fn keep(self: Rc<Self>) {
        let mut tick = interval(TICK);
        // A look that took long is not made up for by several at once.
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.end_outdated();
            let generation = self.connection.generation();
            let reconnected = self.generation.get() != generation;
            if !self.connection.is_up() {
                continue;
            }
            let mut due: HashMap<u16, Vec<Rc<Hub>>> = HashMap::new();
            {
                let hubs = self.hubs.borrow();
                for hub in hubs.values().filter(|hub| hub.is_ready()) {
                    if hub
                        .empty_since
                        .get()
                        .is_some_and(|since| since.elapsed() >= self.config.idle)
                        && hub.member_count() == 0
                    {
                        hub.end(None);
                    } else if hub.durable && (reconnected || self.is_due(hub)) {
                        if reconnected {
                            hub.receipts_missed(&self);
                        }
                        due.entry(hub.part).or_default().push(Rc::clone(hub));
                    }
                }
            }
            let mut complete = true;
            for (part, hubs) in due {
                for chunk in hubs.chunks(ROOMS_A_READ) {
                    complete &= self.compare(part, chunk).await;
                }
            }
            if complete {
                self.generation.set(generation);
            }
        }
    }

    fn is_due(&self, hub: &Hub) -> bool {
        let age = hub.checked.get().elapsed();
        if hub.log.borrow().deliveries_unverified() >= BUSY {
            return true;
        }
        // Spread over the last third of the interval.
        let wait = if !hub.compared.get() {
            FIRST_CHECK
        } else {
            self.config.resync.mul_f64(rand::random_range(0.6..0.95))
        };
        age >= wait.min(self.config.resync.mul_f64(0.95))
    }

    /// Compares the logs of `hubs` with the heads in their stream; whether that succeeded.
    async fn compare(&self, part: u16, hubs: &[Rc<Hub>]) -> bool {
        let origin = self.streams.origin();
        let subjects: Vec<String> = hubs
            .iter()
            .flat_map(|hub| {
                [Class::Msg, Class::Ev]
                    .map(|class| self.subjects.publish(origin, part, &hub.room, class))
            })
            .collect();
        let Some(first) = hubs.first() else {
            return true;
        };
        let epoch = self.streams.known(part).epoch;
        let heads = match self.reader.heads(&first.stream, epoch, &subjects).await {
            Ok(heads) => heads,
            Err(error) => {
                tracing::debug!(error = %error, "rooms could not be compared with their stream");
                return false;
            }
        };
        let now = Instant::now();
        let by_room: HashMap<&RoomId, &Rc<Hub>> = hubs.iter().map(|hub| (&hub.room, hub)).collect();
        for hub in hubs {
            hub.checked.set(now);
            hub.compared.set(true);
        }
        let mut newest: HashMap<&RoomId, u64> = HashMap::new();
        let mut behind = HashSet::new();
        for head in &heads {
            let Some(hub) = by_room.get(&head.room) else {
                continue;
            };
            if head.record.seq > hub.log.borrow().last(head.record.class) {
                behind.insert(&head.room);
                hub.request_fill();
            }
            let newest = newest.entry(&head.room).or_default();
            *newest = head.record.seq.max(*newest);
        }
        // Each class is complete up to its last message, so a room that has both heads has everything before them.
        for (room, seq) in newest
            .into_iter()
            .filter(|(room, _)| !behind.contains(room))
        {
            if let Some(hub) = by_room.get(room) {
                hub.log.borrow_mut().verify(seq);
            }
        }
        true
    }

    /// Ends all rooms: the edge stops.
    pub fn end(&self) {
        let hubs: Vec<Rc<Hub>> = self.hubs.borrow().values().cloned().collect();
        for hub in hubs {
            hub.end(None);
        }
    }
}
