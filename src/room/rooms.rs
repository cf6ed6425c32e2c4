//! All rooms of one shard: opening them, comparing them with the streams, removing idle ones.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet, VecDeque},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytesize::ByteSize;
use tokio::{
    sync::oneshot,
    task::spawn_local,
    time::{Instant, MissedTickBehavior, interval},
};

use super::{
    hub::{Hub, Phase, Source},
    log::{RoomLog, Start},
    memory::Memory,
    numbers::ByNumber,
    rings::Rings,
};
use crate::{
    bus::{
        Arrival, Line, Listener, MAX_HEADS, Origins, ReadError, Reader, Record, StreamState,
        Streams,
    },
    config::{self, Config},
    model::{Class, Cursor, RoomId},
    read_marker::Markers,
    subject::Subjects,
    telemetry::metrics::{Gauge, gauge_add},
};

/// How often the shard checks which rooms are due to be compared or removed.
const TICK: Duration = Duration::from_millis(500);

/// Age at which a new hub is compared for the first time. In a cluster it takes a moment until the server that
/// republishes knows of a new subscription.
const FIRST_CHECK: Duration = Duration::from_secs(2);

/// Number of deliveries after which a busy room is compared early, so that little has to be read again after a loss.
const BUSY: u64 = 1000;

/// Number of rooms that are compared in one request.
const ROOMS_A_READ: usize = MAX_HEADS / 2;

/// The rooms of one shard.
#[derive(Debug)]
pub struct Rooms {
    pub(super) line: Line,
    pub(super) reader: Reader,
    pub(super) origins: Arc<Origins>,
    /// The streams of the own origin.
    pub(super) streams: Arc<Streams>,
    pub(super) subjects: Subjects,
    pub(super) config: config::Rooms,
    /// By namespace: how many messages a join replays at most.
    replay_max: HashMap<String, u64>,
    pub(super) markers: Arc<Markers>,
    /// Number of members that want receipts in a room, above which none of them gets any.
    pub(super) read_push_max: usize,
    /// Capacity of the inbox of each room, in messages.
    pub(super) inbox_capacity: usize,
    /// How long after a publish a retry is still detected as a duplicate.
    pub(super) retried_within: Duration,
    hubs: RefCell<HashMap<RoomId, Rc<Hub>>>,
    /// The hubs by their subscriptions.
    by_sid: RefCell<HashMap<u64, Rc<Hub>, ByNumber>>,
    touched: RefCell<Vec<Rc<Hub>>>,
    /// An empty inbox, for the next hub that needs one.
    pub(super) spare_inbox: RefCell<VecDeque<Arrival>>,
    /// For each stream: the rooms that wait for their heads.
    openings: RefCell<HashMap<Arc<str>, Rc<Opening>>>,
    pub(super) memory: Arc<Memory>,
    rings: Rc<Rings>,
    suspecting: Cell<bool>,
    generation: Cell<u64>,
    version: Cell<u64>,
    /// For each partition: the number of leader elections at the last comparison.
    elections: RefCell<Vec<u64>>,
}

impl Rooms {
    /// The rooms of a shard that uses `line` for live messages and `reader` to read streams. [`Self::listener`] must be
    /// registered for what arrives over the line.
    #[must_use]
    pub fn new(
        line: Line,
        reader: Reader,
        origins: Arc<Origins>,
        subjects: Subjects,
        config: &Config,
        markers: Arc<Markers>,
    ) -> Rc<Self> {
        let streams = Arc::clone(origins.own());
        let read_push_max = config.limits.read_push_max;
        let inbox_capacity = config.nats.subscription_capacity;
        let retried_within = config.streams.duplicate_window;
        let elections = (0..streams.partitions()).map(|part| origins.elections(part));
        let elections = RefCell::new(elections.collect());
        let names = config.namespaces.keys();
        let replay_max = names.map(|name| (name.clone(), config.replay_max(name)));
        let replay_max = replay_max.collect();
        let shards = config.shards();
        let config = config.rooms.clone();
        let bytes = |size: ByteSize| usize::try_from(size.as_u64()).unwrap_or(usize::MAX);
        let rings = Rings::new(bytes(config.ring), bytes(config.ring_memory) / shards);
        let memory = usize::try_from(config.replay_memory.as_u64()).unwrap_or(usize::MAX);
        Rc::new(Self {
            generation: Cell::new(line.generation()),
            version: Cell::new(origins.version()),
            elections,
            inbox_capacity,
            retried_within,
            openings: RefCell::default(),
            by_sid: RefCell::default(),
            touched: RefCell::default(),
            spare_inbox: RefCell::default(),
            line,
            reader,
            origins,
            streams,
            subjects,
            config,
            replay_max,
            markers,
            read_push_max,
            hubs: RefCell::default(),
            memory: Memory::new(memory),
            rings,
            suspecting: Cell::new(false),
        })
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
        for sid in hub.live_sid.into_iter().chain([hub.passing_sid]) {
            self.by_sid.borrow_mut().insert(sid, Rc::clone(&hub));
        }
        gauge_add(Gauge::RoomActive, 1);
        spawn_local(Rc::clone(&hub).start(Rc::clone(self)));
        hub
    }

    /// How many messages a join of `room` replays at most.
    pub(super) fn replay_max(&self, room: &RoomId) -> u64 {
        let of_namespace = self.replay_max.get(room.namespace());
        of_namespace.copied().unwrap_or(self.config.replay_max)
    }

    /// The head of a durable room, which is opened for this if nobody is in it. `None` if it could not be opened.
    pub async fn head(self: &Rc<Self>, room: &RoomId) -> Option<Cursor> {
        let hub = self.hub(room, true);
        let is_open = hub.started().await != Phase::Gone;
        is_open.then(|| hub.log.borrow().cursor())
    }

    /// The listener for what arrives over the line.
    #[must_use]
    pub fn listener(self: &Rc<Self>) -> impl Listener + use<> {
        Ear(Rc::clone(self))
    }

    /// Reads the state of one stream and the heads of `hub`'s room in it. The request goes over the line, so the server
    /// has processed the earlier subscriptions when it answers. Rooms of one stream that request this during a read are
    /// answered together by the next one.
    pub(super) async fn heads(
        self: &Rc<Self>,
        hub: &Hub,
        source: &Source,
    ) -> Result<Heads, Rc<ReadError>> {
        let (answer, answered) = oneshot::channel();
        let opening = {
            let mut openings = self.openings.borrow_mut();
            Rc::clone(openings.entry(Arc::clone(&source.stream)).or_default())
        };
        opening
            .waiting
            .borrow_mut()
            .push_back((hub.room.clone(), answer));
        if !opening.reading.replace(true) {
            let (rooms, part) = (Rc::clone(self), hub.part);
            let streams = Arc::clone(&source.streams);
            spawn_local(async move { rooms.read_heads(&streams, part, &opening).await });
        }
        answered
            .await
            .unwrap_or_else(|_ended| Err(Rc::new(ReadError::Closed)))
    }

    async fn read_heads(&self, streams: &Streams, part: u16, opening: &Opening) {
        loop {
            let group: Vec<_> = {
                let mut waiting = opening.waiting.borrow_mut();
                let count = waiting.len().min(ROOMS_A_READ);
                waiting.drain(..count).collect()
            };
            if group.is_empty() {
                break;
            }
            let (before, settled) = (streams.known(part), streams.settled(part));
            let rooms = group.iter().map(|(room, _)| room);
            let subjects = self.log_subjects(streams, part, rooms);
            let read = self
                .reader
                .heads_over(&self.line, streams.stream(part), before.epoch, &subjects)
                .await;
            match read {
                // The streams were found to have a new incarnation during the read. These heads would get the wrong
                // epoch: read them again.
                Ok(_) if streams.known(part).incarnation != before.incarnation => {
                    opening.waiting.borrow_mut().extend(group);
                }
                Ok(heads) => {
                    let mut by_room: HashMap<RoomId, Vec<Record>> = HashMap::new();
                    for head in heads {
                        streams.note(part, head.record.seq);
                        by_room.entry(head.room).or_default().push(head.record);
                    }
                    for (room, answer) in group {
                        let records = by_room.remove(&room).unwrap_or_default();
                        // A send fails if the receiver has given up.
                        let _gone = answer.send(Ok((before, settled, records)));
                    }
                }
                Err(error) => {
                    let error = Rc::new(error);
                    for (_, answer) in group {
                        let _gone = answer.send(Err(Rc::clone(&error)));
                    }
                }
            }
        }
        opening.reading.set(false);
    }

    /// The subjects of both classes of some rooms of a partition, in the stream of one origin.
    fn log_subjects<'a>(
        &self,
        streams: &Streams,
        part: u16,
        rooms: impl Iterator<Item = &'a RoomId>,
    ) -> Vec<String> {
        let origin = streams.origin();
        rooms
            .flat_map(|room| {
                [Class::Msg, Class::Ev]
                    .map(|class| self.subjects.publish(origin, part, room, class))
            })
            .collect()
    }

    /// A room's hub, if it has one.
    pub(super) fn existing(&self, room: &RoomId) -> Option<Rc<Hub>> {
        self.hubs.borrow().get(room).cloned()
    }

    /// Removes a hub that has ended.
    pub(super) fn forget(&self, hub: &Hub) {
        gauge_add(Gauge::RoomActive, -1);
        for sid in hub.live_sid.into_iter().chain([hub.passing_sid]) {
            self.line.unsubscribe(sid);
            self.by_sid.borrow_mut().remove(&sid);
        }
        let mut hubs = self.hubs.borrow_mut();
        if hubs
            .get(&hub.room)
            .is_some_and(|current| current.passing_sid == hub.passing_sid)
        {
            hubs.remove(&hub.room);
        }
    }

    pub(super) fn new_log(&self, room: &RoomId, starts: Vec<Start>) -> RoomLog {
        RoomLog::new(room, starts, &self.rings)
    }

    /// Empties the rings of the rooms that were used least recently, if all of them together take more than the shard's
    /// part of `rooms.ring_memory`. Who resumes there is served from the stream.
    pub(super) fn bound_rings(&self) {
        if !self.rings.are_full() {
            return;
        }
        let hubs = self.hubs.borrow();
        let mut kept: Vec<(u64, &Rc<Hub>)> = hubs
            .values()
            .filter_map(|hub| {
                let (bytes, used) = hub.log.borrow().kept();
                (bytes > 0).then_some((used, hub))
            })
            .collect();
        kept.sort_unstable_by_key(|(used, _)| *used);
        for (_, hub) in kept {
            if self.rings.have_room() {
                break;
            }
            hub.log.borrow_mut().forget();
        }
    }

    /// Called when something contradicts what is known of a stream. Starts a check of the stream, unless one is
    /// running.
    pub(super) fn suspect(self: &Rc<Self>, streams: &Arc<Streams>, part: u16) {
        if !self.suspecting.replace(true) {
            let (rooms, streams) = (Rc::clone(self), Arc::clone(streams));
            spawn_local(async move {
                rooms.verify(&streams, part).await;
                rooms.suspecting.set(false);
            });
        }
    }

    pub(super) async fn verify(&self, streams: &Streams, part: u16) {
        if let Err(error) = streams.verify(part, Instant::now()).await {
            tracing::debug!(error = %error, "a suspicion could not be checked");
        }
        self.end_outdated();
    }

    /// Whether somebody is, or was just now, in a room.
    #[must_use]
    pub fn is_open(&self, room: &RoomId) -> bool {
        self.hubs.borrow().contains_key(room)
    }

    /// Ends the hubs that are outdated. Their members join again and learn from the reply whether their cursors are
    /// still valid.
    fn end_outdated(&self) {
        let version = self.origins.version();
        if self.version.replace(version) == version {
            return;
        }
        let hubs: Vec<Rc<Hub>> = self.hubs.borrow().values().cloned().collect();
        for hub in hubs {
            if hub.is_ready() && hub.is_outdated(self) {
                hub.end(self, Some("reset"));
            }
        }
    }

    /// Runs forever: compares durable rooms with their streams and ends idle rooms. Every durable room is compared at
    /// least every `rooms.resync`, all of them at once after a reconnect, and those of a partition when one of its
    /// streams has a new leader.
    pub async fn keep(self: Rc<Self>) {
        let mut tick = interval(TICK);
        // A slow pass must not be followed by several at once.
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.end_outdated();
            self.bound_rings();
            let generation = self.line.generation();
            let reconnected = self.generation.get() != generation;
            if !self.line.is_up() {
                continue;
            }
            let elections: Vec<u64> = (0..self.streams.partitions())
                .map(|part| self.origins.elections(part))
                .collect();
            let elected = |part: u16| {
                let part = usize::from(part);
                self.elections.borrow()[part] != elections[part]
            };
            let mut due: HashMap<u16, Vec<Rc<Hub>>> = HashMap::new();
            let mut idle = Vec::new();
            {
                let hubs = self.hubs.borrow();
                for hub in hubs.values().filter(|hub| hub.is_ready()) {
                    if hub
                        .empty_since
                        .get()
                        .is_some_and(|since| since.elapsed() >= self.config.idle)
                        && hub.member_count() == 0
                    {
                        idle.push(Rc::clone(hub));
                    } else if hub.durable && (reconnected || elected(hub.part) || self.is_due(hub))
                    {
                        due.entry(hub.part).or_default().push(Rc::clone(hub));
                    }
                }
            }
            idle.iter().for_each(|hub| hub.end(&self, None));
            let mut complete = true;
            for (part, hubs) in due {
                let again = reconnected || elected(part);
                for streams in self.origins.all() {
                    for chunk in hubs.chunks(ROOMS_A_READ) {
                        complete &= self.compare(&streams, part, chunk).await;
                    }
                }
                if again {
                    // The copy that answered may have been behind.
                    hubs.iter().for_each(|hub| hub.compared.set(false));
                }
            }
            if complete {
                self.generation.set(generation);
                self.elections.replace(elections);
            }
        }
    }

    fn is_due(&self, hub: &Hub) -> bool {
        let age = hub.checked.get().elapsed();
        if hub.log.borrow().deliveries_unverified() >= BUSY {
            return true;
        }
        // Spread out, so that not all rooms are due at once.
        let wait = if !hub.compared.get() {
            FIRST_CHECK
        } else {
            self.config.resync.mul_f64(rand::random_range(0.6..0.95))
        };
        age >= wait.min(self.config.resync.mul_f64(0.95))
    }

    /// Compares the logs of `hubs` with the heads in one of their streams. Returns whether the heads could be read.
    async fn compare(self: &Rc<Self>, streams: &Arc<Streams>, part: u16, hubs: &[Rc<Hub>]) -> bool {
        let subjects = self.log_subjects(streams, part, hubs.iter().map(|hub| &hub.room));
        let epoch = streams.known(part).epoch;
        let stream = streams.stream(part);
        let heads = match self.reader.heads(stream, epoch, &subjects).await {
            Ok(heads) => heads,
            Err(error) => {
                tracing::debug!(error = %error, "rooms could not be compared with their stream");
                return false;
            }
        };
        let now = Instant::now();
        // A hub that is older than the origin does not have it, and will be ended soon.
        let track = |hub: &Rc<Hub>| {
            let mut sources = hub.sources.iter();
            sources.position(|source| Arc::ptr_eq(&source.streams, streams))
        };
        let by_room: HashMap<&RoomId, (&Rc<Hub>, usize)> = hubs
            .iter()
            .filter_map(|hub| Some((&hub.room, (hub, track(hub)?))))
            .collect();
        for hub in hubs {
            hub.checked.set(now);
            hub.compared.set(true);
        }
        let mut newest: HashMap<&RoomId, u64> = HashMap::new();
        let mut behind = HashSet::new();
        for head in &heads {
            let Some((hub, track)) = by_room.get(&head.room) else {
                continue;
            };
            if head.record.seq > hub.log.borrow().last(*track, head.record.class) {
                behind.insert(&head.room);
                hub.request_fill(self);
            }
            let newest = newest.entry(&head.room).or_default();
            *newest = head.record.seq.max(*newest);
        }
        // Each class is complete up to its last message. So a room whose heads have both been taken in is complete up
        // to the newer one.
        for (room, seq) in newest
            .into_iter()
            .filter(|(room, _)| !behind.contains(room))
        {
            if let Some((hub, track)) = by_room.get(room) {
                hub.log.borrow_mut().verify(*track, seq);
            }
        }
        true
    }

    /// Ends all rooms: the edge stops.
    pub fn end(&self) {
        let hubs: Vec<Rc<Hub>> = self.hubs.borrow().values().cloned().collect();
        for hub in hubs {
            hub.end(self, None);
        }
    }
}

/// The answer of a stream for one room: the stream's state, a sequence up to which the answer is complete, and the
/// room's last message of each class.
type Heads = (StreamState, u64, Vec<Record>);

/// The caller that waits for the heads.
type Asking = oneshot::Sender<Result<Heads, Rc<ReadError>>>;

/// The rooms that wait for their heads in one stream.
#[derive(Debug, Default)]
struct Opening {
    waiting: RefCell<VecDeque<(RoomId, Asking)>>,
    reading: Cell<bool>,
}

/// Passes what arrives over the line to the hubs.
struct Ear(Rc<Rooms>);

impl Listener for Ear {
    fn up(&mut self) {
        let hubs: Vec<Rc<Hub>> = self.0.hubs.borrow().values().cloned().collect();
        for hub in hubs {
            hub.reconnected(&self.0);
        }
    }

    fn arrived(&mut self, arrival: Arrival) {
        let by_sid = self.0.by_sid.borrow();
        // The room may have just ended.
        if let Some(hub) = by_sid.get(&arrival.sid()) {
            let mut touched = self.0.touched.borrow_mut();
            // Consecutive messages are mostly of the same room. If a hub is listed twice, it has nothing to do the
            // second time.
            if touched.last().is_none_or(|last| !Rc::ptr_eq(last, hub)) {
                touched.push(Rc::clone(hub));
            }
            hub.arrived(&self.0, arrival);
        }
    }

    fn turn(&mut self) {
        let mut touched = self.0.touched.take();
        for hub in touched.drain(..) {
            hub.work(&self.0);
        }
        // Keeps the allocation.
        self.0.touched.replace(touched);
        self.0.bound_rings();
    }
}
