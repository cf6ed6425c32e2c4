//! All rooms of one shard: joining, comparing with the streams, forgetting.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_local,
    time::{Instant, interval, timeout_at},
};

use super::{
    backlog::{Backlog, Refusal},
    hub::{Hub, Member, Phase},
    log::{Resume, RoomLog},
};
use crate::{
    bus::{Connection, MAX_HEADS, Reader, Record, StreamState, Streams},
    config,
    model::{Class, Cursor, Position, RoomId},
    protocol::Close,
    subject::Subjects,
    telemetry::metrics::{self, Counter, Gauge, Histogram, Source, count, gauge_add},
    wire::Conn,
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

/// Backlog is handed to a connection in pieces of this size, so that the outbox' bound is not reached by our own doing.
const PIECE: usize = 64 * 1024;

/// The rooms of one shard.
#[derive(Debug)]
pub struct Rooms {
    pub(super) connection: Connection,
    pub(super) reader: Reader,
    pub(super) streams: Arc<Streams>,
    pub(super) subjects: Subjects,
    pub(super) config: config::Rooms,
    hubs: RefCell<HashMap<RoomId, Rc<Hub>>>,
    replay_memory: Arc<Semaphore>,
    suspecting: Cell<bool>,
    generation: Cell<u64>,
    version: Cell<u64>,
}

/// Who joins.
#[derive(Debug)]
pub struct NewMember {
    /// The session's number on this edge.
    pub session: u64,
    /// Its user.
    pub user: Arc<str>,
    /// Its connection.
    pub conn: Rc<Conn>,
}

/// What the reply to a join says.
#[derive(Debug)]
pub struct Joined {
    /// Where the session stands before the backlog; `None` in an ephemeral room.
    pub cursor: Option<Cursor>,
    /// The room's newest place; `None` in an ephemeral room.
    pub head: Option<Cursor>,
    /// Messages that follow.
    pub replay: u64,
    /// Why the session can't go on where it was.
    pub reset: Option<ResetReason>,
}

/// Why a session can't go on at its cursor and has to load history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetReason {
    /// Messages after the cursor are not in the stream any more.
    Trimmed,
    /// The cursor is of another incarnation of the stream.
    Epoch,
    /// The cursor is beyond the newest message.
    Future,
    /// More messages or bytes than are replayed.
    ReplayMax,
    /// The room keeps no log.
    Ephemeral,
}

impl ResetReason {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Trimmed => "trimmed",
            Self::Epoch => "epoch",
            Self::Future => "future",
            Self::ReplayMax => "replay_max",
            Self::Ephemeral => "ephemeral",
        }
    }

    fn result(self) -> metrics::Joined {
        match self {
            Self::Trimmed => metrics::Joined::ResetTrimmed,
            Self::Epoch => metrics::Joined::ResetEpoch,
            Self::Future => metrics::Joined::ResetFuture,
            Self::ReplayMax => metrics::Joined::ResetReplayMax,
            Self::Ephemeral => metrics::Joined::Ephemeral,
        }
    }
}

/// A room can't be joined now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// NATS does not answer.
    #[error("the room's stream can't be read now")]
    Unavailable,
}

/// A session's place in a room. Dropping it leaves the room.
#[derive(Debug)]
pub struct Membership {
    hub: Rc<Hub>,
    member: Rc<Member>,
}

impl Membership {
    /// Whether the room has let the session go (it was told so by `kicked`).
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.member.has_left()
    }

    /// The time of a message that the room holds in memory, in ms since 1970.
    #[must_use]
    pub fn time_of(&self, seq: u64) -> Option<u64> {
        self.hub.log.borrow().time_of(seq)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.hub.remove(&self.member);
    }
}

impl Rooms {
    /// The rooms of a shard that has `connection` for live messages and `reader` for reading streams.
    #[must_use]
    pub fn new(
        connection: Connection,
        reader: Reader,
        streams: Arc<Streams>,
        subjects: Subjects,
        config: config::Rooms,
    ) -> Rc<Self> {
        let shares = usize::try_from(config.replay_memory.as_u64() / 1024).unwrap_or(usize::MAX);
        Rc::new(Self {
            generation: Cell::new(connection.generation()),
            version: Cell::new(streams.version()),
            connection,
            reader,
            streams,
            subjects,
            config,
            hubs: RefCell::default(),
            replay_memory: Arc::new(Semaphore::new(shares.min(Semaphore::MAX_PERMITS))),
            suspecting: Cell::new(false),
        })
    }

    /// Joins a room. `reply` makes the frame of the reply; it is sent, followed by the backlog, in the same step in which the
    /// membership begins: between backlog and live there is neither a gap nor a repeat.
    ///
    /// # Errors
    /// [`JoinError`] when the stream could not be read within `rooms.join_timeout`; then nothing was sent.
    pub async fn join(
        self: &Rc<Self>,
        room: &RoomId,
        durable: bool,
        since: Option<Cursor>,
        who: NewMember,
        reply: impl FnOnce(&Joined) -> Bytes,
    ) -> Result<Membership, JoinError> {
        let started = Instant::now();
        let deadline = started + self.config.join_timeout;
        let prepared = timeout_at(deadline, self.prepare(room, durable, since)).await;
        let (hub, plan) = prepared.map_err(|_elapsed| JoinError::Unavailable)??;
        let membership = self.begin(hub, plan, who, reply);
        metrics::record(Histogram::JoinDuration, started.elapsed());
        Ok(membership)
    }

    /// Finds out how the session can go on. What it returns is true as long as nothing else runs on the shard.
    async fn prepare(
        self: &Rc<Self>,
        room: &RoomId,
        durable: bool,
        since: Option<Cursor>,
    ) -> Result<(Rc<Hub>, Plan), JoinError> {
        let mut attempts = 0;
        let mut filled = false;
        let mut backlog: Option<Backlog> = None;
        loop {
            let hub = self.hub(room, durable);
            if !hub.is_ready() && !self.connection.is_up() {
                return Err(JoinError::Unavailable);
            }
            if hub.started().await == Phase::Gone {
                // It could not start, and said so in the log; or it has just ended, and the next one does better.
                attempts += 1;
                if attempts > 1 || !self.connection.is_up() {
                    return Err(JoinError::Unavailable);
                }
                continue;
            }
            let Some(cursor) = &since else {
                return Ok((hub, Plan::Fresh));
            };
            if !durable {
                return Ok((hub, Plan::Reset(ResetReason::Ephemeral)));
            }
            // A cursor with components of other origins comes from a larger mesh than this edge knows.
            let [position] = cursor.positions() else {
                return Ok((hub, Plan::Reset(ResetReason::Epoch)));
            };
            let here = {
                let log = hub.log.borrow();
                position.origin == *log.origin() && position.epoch == log.epoch()
            };
            if !here {
                // Before the client is sent to history: is it we who have not noticed that the stream began anew?
                self.verify(hub.part).await;
                if hub.is_gone() {
                    continue;
                }
                return Ok((hub, Plan::Reset(ResetReason::Epoch)));
            }
            // If the room ran on further than memory reaches while we read, read again, until the join's time is up.
            if let Some(found) = backlog.take()
                && found.upto.0 >= hub.log.borrow().floor()
            {
                return Ok((hub, Plan::Backlog(cursor.clone(), found)));
            }
            let resume = hub.log.borrow().resume(position);
            match resume {
                Resume::Memory(index) => {
                    return Ok((hub, Plan::Memory(cursor.clone(), index)));
                }
                Resume::Ahead if !filled => {
                    filled = true;
                    hub.fill().await;
                }
                Resume::Ahead | Resume::Stream | Resume::Doubtful => {
                    match hub.backlog(self, position.clone()).await {
                        Ok(found) => backlog = Some(found),
                        Err(Refusal::Reset(reason)) => return Ok((hub, Plan::Reset(reason))),
                        Err(Refusal::Failed(error)) => return Err(error),
                    }
                }
            }
        }
    }

    /// Begins the membership: one step, without waiting.
    fn begin(
        self: &Rc<Self>,
        hub: Rc<Hub>,
        plan: Plan,
        who: NewMember,
        reply: impl FnOnce(&Joined) -> Bytes,
    ) -> Membership {
        let conn = who.conn;
        let (frames, joined, result) = {
            let log = hub.log.borrow();
            let head = hub.durable.then(|| log.cursor());
            let from_memory = |index: u64| -> Vec<Bytes> {
                log.entries_from(index)
                    .into_iter()
                    .flatten()
                    .map(|e| e.frame.clone())
                    .collect()
            };
            let joined = |cursor: Option<Cursor>, frames: &[Bytes], reset| Joined {
                cursor,
                head: head.clone(),
                replay: frames.len() as u64,
                reset,
            };
            match plan {
                Plan::Fresh => (
                    Vec::new(),
                    joined(head.clone(), &[], None),
                    metrics::Joined::Live,
                ),
                Plan::Reset(reason) => (
                    Vec::new(),
                    joined(head.clone(), &[], Some(reason)),
                    reason.result(),
                ),
                Plan::Memory(cursor, index) => {
                    let frames = from_memory(index);
                    count(Counter::MessageReplayed(Source::Ring), frames.len() as u64);
                    let joined = joined(Some(cursor), &frames, None);
                    (frames, joined, metrics::Joined::Ring)
                }
                Plan::Backlog(cursor, backlog) => {
                    let position = log.position();
                    let read = backlog
                        .entries()
                        .iter()
                        .filter(|missed| missed.seq <= position);
                    let mut frames: Vec<Bytes> = read.map(|missed| missed.frame.clone()).collect();
                    count(
                        Counter::MessageReplayed(Source::Stream),
                        frames.len() as u64,
                    );
                    frames.extend(log.frames_after(backlog.upto.0));
                    let joined = joined(Some(cursor), &frames, None);
                    (frames, joined, metrics::Joined::Stream)
                }
            }
        };
        count(Counter::JoinResult(result), 1);
        conn.send(&[reply(&joined)]);
        let head = hub.log.borrow().head_index();
        let bytes: usize = frames.iter().map(Bytes::len).sum();
        // A client that joins many rooms at once gets their backlogs one after the other, not all into its outbox.
        let fits = bytes <= PIECE && (bytes == 0 || conn.queued_bytes() <= PIECE);
        let member = Rc::new(Member::new(
            who.session,
            who.user,
            Rc::clone(&conn),
            head,
            fits,
        ));
        hub.add(Rc::clone(&member));
        if fits {
            conn.send(&frames);
        } else {
            let place = hub.log.borrow().position_now();
            let (rooms, hub, member) = (Rc::clone(self), Rc::clone(&hub), Rc::clone(&member));
            spawn_local(async move { rooms.catch_up(&hub, &member, frames, place).await });
        }
        count(Counter::MessageDelivered, joined.replay);
        Membership { hub, member }
    }

    /// Hands a large backlog over at the pace at which the client reads, then what has come to the room meanwhile (from
    /// memory, or from the stream where memory does not reach back), until there is nothing more: then the member is fed
    /// live. A client that falls further behind than `rooms.replay_max` is closed as too slow.
    async fn catch_up(
        self: &Rc<Self>,
        hub: &Rc<Hub>,
        member: &Rc<Member>,
        frames: Vec<Bytes>,
        place: Position,
    ) {
        let conn = member.conn();
        let mut place = place;
        let mut frames = frames;
        loop {
            for piece in pieces(&frames) {
                conn.drained(PIECE).await;
                if member.has_left() || hub.is_gone() || conn.closing().is_some() {
                    return;
                }
                conn.send(piece);
            }
            conn.drained(PIECE).await;
            if member.has_left() || hub.is_gone() || conn.closing().is_some() {
                return;
            }
            let from_memory = {
                let log = hub.log.borrow();
                (place.seq >= log.floor()).then(|| log.frames_after(place.seq).collect::<Vec<_>>())
            };
            frames = match from_memory {
                Some(frames) => {
                    let log = hub.log.borrow();
                    place = log.position_now();
                    if frames.iter().map(Bytes::len).sum::<usize>() <= PIECE {
                        count(Counter::MessageDelivered, frames.len() as u64);
                        conn.send(&frames);
                        member.go_live(log.head_index());
                        return;
                    }
                    frames
                }
                None => match hub.backlog(self, place.clone()).await {
                    Ok(found) => {
                        // What the hub has not delivered yet will come live.
                        let delivered = hub.log.borrow().position_now();
                        let entries = found.entries().iter().filter(|m| m.seq <= delivered.seq);
                        let frames = entries.map(|missed| missed.frame.clone()).collect();
                        if found.upto.0 < delivered.seq {
                            (place.seq, place.fingerprint) = found.upto;
                        } else {
                            place = delivered;
                        }
                        frames
                    }
                    Err(Refusal::Reset(_)) => return conn.close(Close::TooSlow),
                    Err(Refusal::Failed(_)) => {
                        // NATS is away. Nothing comes live either.
                        hub.pause().await;
                        Vec::new()
                    }
                },
            };
            count(Counter::MessageDelivered, frames.len() as u64);
        }
    }

    fn hub(self: &Rc<Self>, room: &RoomId, durable: bool) -> Rc<Hub> {
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
    pub(super) async fn replay_share(&self, bytes: usize) -> anyhow::Result<OwnedSemaphorePermit> {
        let units = u32::try_from(bytes / 1024)?.max(1);
        Ok(Arc::clone(&self.replay_memory)
            .acquire_many_owned(units)
            .await?)
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

    async fn verify(&self, part: u16) {
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

/// Cuts frames into pieces of about [`PIECE`] bytes.
fn pieces(frames: &[Bytes]) -> impl Iterator<Item = &[Bytes]> {
    let mut bytes = 0;
    let mut rest = frames;
    std::iter::from_fn(move || {
        let cut = rest.iter().position(|frame| {
            bytes += frame.len();
            bytes >= PIECE
        });
        bytes = 0;
        let (piece, after) = rest.split_at(cut.map_or(rest.len(), |at| at + 1));
        rest = after;
        (!piece.is_empty()).then_some(piece)
    })
}

/// How a session goes on.
enum Plan {
    /// From now on.
    Fresh,
    /// From now on, though it wanted more.
    Reset(ResetReason),
    /// From an index in memory.
    Memory(Cursor, u64),
    /// With what was read from the stream, then from memory.
    Backlog(Cursor, Backlog),
}
