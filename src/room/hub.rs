//! One room on one shard: its task, from subscription to end.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use indexmap::IndexMap;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout_at},
};

use super::{
    backlog::Backlogs,
    encode,
    fan_out::{Member, Pass},
    log::{Admission, RoomLog},
    receipts::Receipts,
    rooms::Rooms,
};
use crate::{
    bus::{LiveFeed, Message, ReadError, Record, Suspicion},
    model::{Class, Kind, RoomId, partition_of},
    runtime::unix_ms,
    subject::{FROM_NATTER, KIND_READ, KIND_TYPING, header, rooms_stream},
    telemetry::metrics::{Counter, Dropped, GapCause, Suppressed, count},
};

/// Live messages taken in one go. What arrives while they are fanned out forms the next batch: batching that adapts to load.
const BATCH: usize = 64;

/// A room's hub.
#[derive(Debug)]
pub struct Hub {
    pub(super) room: RoomId,
    pub(super) part: u16,
    pub(super) stream: String,
    /// Whether the room has a log; else messages only pass through.
    pub(super) durable: bool,
    /// The stream's incarnation that the log belongs to.
    pub(super) incarnation: Cell<u32>,
    pub(super) log: RefCell<RoomLog>,
    pub(super) members: RefCell<IndexMap<u64, Rc<Member>>>,
    /// Changes when a member joins or leaves, so that a fan-out pass that yielded looks again.
    pub(super) membership: Cell<u64>,
    pub(super) phase: watch::Sender<Phase>,
    /// Wakes the task: `wanted` has changed, or the hub is to end.
    wake: Notify,
    /// Number of the read that somebody wants; the log is compared with the stream until `filled` has reached it.
    wanted: Cell<u64>,
    filled: watch::Sender<u64>,
    /// When the log was last compared with the stream.
    pub(super) checked: Cell<Instant>,
    /// Whether that was done since it was opened.
    pub(super) compared: Cell<bool>,
    /// Since when nobody is here.
    pub(super) empty_since: Cell<Option<Instant>>,
    pub(super) backlogs: Backlogs,
    pub(super) receipts: Receipts,
}

/// A hub's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Subscribing and reading the heads.
    Starting,
    /// Members can join.
    Ready,
    /// Over: it could not start, nobody was there for a while, or its stream began anew.
    Gone,
}

impl Hub {
    pub(super) fn new(rooms: &Rooms, room: RoomId, durable: bool) -> Rc<Self> {
        let part = partition_of(&room, rooms.streams.partitions());
        let known = rooms.streams.known(part);
        let log = rooms.new_log(known, &[]);
        Rc::new(Self {
            part,
            stream: rooms_stream(rooms.streams.origin(), part),
            durable,
            incarnation: Cell::new(known.incarnation),
            log: RefCell::new(log),
            members: RefCell::default(),
            membership: Cell::new(0),
            phase: watch::Sender::new(Phase::Starting),
            wake: Notify::new(),
            wanted: Cell::new(0),
            filled: watch::Sender::new(0),
            checked: Cell::new(Instant::now()),
            compared: Cell::new(false),
            empty_since: Cell::new(Some(Instant::now())),
            backlogs: Backlogs::default(),
            receipts: Receipts::new(rooms.read_push_max),
            room,
        })
    }

    /// Waits until the hub is ready or gone.
    pub(super) async fn started(&self) -> Phase {
        // The sender is in `self`: it can't be dropped while we wait.
        self.phase
            .subscribe()
            .wait_for(|phase| *phase != Phase::Starting)
            .await
            .map_or(Phase::Gone, |phase| *phase)
    }

    pub(super) fn is_gone(&self) -> bool {
        *self.phase.borrow() == Phase::Gone
    }

    pub(super) fn is_ready(&self) -> bool {
        *self.phase.borrow() == Phase::Ready
    }

    pub(super) fn member_count(&self) -> usize {
        self.members.borrow().len()
    }

    pub(super) fn add(&self, member: Rc<Member>) {
        self.receipts.joined(&member);
        let replaced = self.members.borrow_mut().insert(member.session, member);
        if let Some(replaced) = replaced {
            replaced.left.set(true);
            self.receipts.left(&replaced);
        }
        self.membership.set(self.membership.get() + 1);
        self.empty_since.set(None);
    }

    /// Ends a membership. A late leave of an older membership does not end a newer one of the same session.
    pub(super) fn remove(&self, member: &Rc<Member>) {
        member.left.set(true);
        let mut members = self.members.borrow_mut();
        if members
            .get(&member.session)
            .is_some_and(|current| Rc::ptr_eq(current, member))
        {
            members.swap_remove(&member.session);
            self.receipts.left(member);
            self.membership.set(self.membership.get() + 1);
            if members.is_empty() {
                self.empty_since.set(Some(Instant::now()));
            }
            drop(members);
            self.tell_missed();
        }
    }

    /// Ends the hub; members are told that they must join again.
    pub(super) fn end(&self, code: Option<&'static str>) {
        self.phase.send_replace(Phase::Gone);
        self.wake.notify_one();
        let members = std::mem::take(&mut *self.members.borrow_mut());
        for member in members.values() {
            member.left.set(true);
            if let Some(code) = code {
                member.conn.send(&[encode::kicked(&self.room, code)]);
            }
        }
    }

    /// Whether the stream has begun anew since the log was made.
    pub(super) fn is_outdated(&self, rooms: &Rooms) -> bool {
        self.durable && rooms.streams.known(self.part).incarnation != self.incarnation.get()
    }

    /// Makes the task compare the log with the stream.
    pub(super) fn request_fill(&self) -> u64 {
        self.wanted.set(self.wanted.get() + 1);
        self.wake.notify_one();
        self.wanted.get()
    }

    /// Compares the log with the stream and waits until everything that the stream had when this was called is delivered.
    pub(super) async fn fill(&self) {
        let wanted = self.request_fill();
        let mut filled = self.filled.subscribe();
        let mut phase = self.phase.subscribe();
        tokio::select! {
            // Neither sender can be dropped while we wait.
            _ = filled.wait_for(|filled| *filled >= wanted) => {}
            _ = phase.wait_for(|phase| *phase == Phase::Gone) => {}
        }
    }

    /// The hub's task.
    pub(super) async fn run(self: Rc<Self>, rooms: Rc<Rooms>) {
        let deadline = Instant::now() + rooms.config.join_timeout;
        // What happens seldom is apart, here and below: there are many hubs that wait.
        match timeout_at(deadline, Box::pin(self.start(&rooms))).await {
            Ok(Ok(mut feeds)) => {
                self.phase.send_if_modified(|phase| {
                    let starting = *phase == Phase::Starting;
                    if starting {
                        *phase = Phase::Ready;
                    }
                    starting
                });
                self.serve(&rooms, &mut feeds).await;
            }
            Ok(Err(error)) => {
                tracing::warn!(error = %error, room.id = %self.room, "a room could not be opened");
                self.end(None);
            }
            Err(_elapsed) => {
                tracing::warn!(room.id = %self.room, "a room could not be opened in time");
                self.end(None);
            }
        }
        rooms.forget(&self);
    }

    /// Subscribes, then reads the heads over the same connection, never the other way round: the server has processed the
    /// subscription when it answers, so whatever is stored after the heads comes live.
    async fn start(&self, rooms: &Rooms) -> Result<Feeds, ReadError> {
        let closed = |_error| ReadError::Closed;
        let subjects = &rooms.subjects;
        let live = if self.durable {
            let subject = subjects.live(rooms.streams.origin(), self.part, &self.room);
            Some(
                LiveFeed::open(&rooms.connection, subject)
                    .await
                    .map_err(closed)?,
            )
        } else {
            None
        };
        let ephemeral = LiveFeed::open(&rooms.connection, subjects.ephemeral(&self.room))
            .await
            .map_err(closed)?;
        if self.durable {
            loop {
                let before = rooms.streams.known(self.part);
                let classes = [Class::Msg, Class::Ev].map(|class| {
                    subjects.publish(rooms.streams.origin(), self.part, &self.room, class)
                });
                let heads = rooms
                    .reader
                    .heads_over(&rooms.connection, &self.stream, before.epoch, &classes)
                    .await?;
                // A head that nobody has seen yet is the usual case; one that contradicts what is known would be read under
                // the wrong epoch.
                let records: Vec<Record> = heads.into_iter().map(|head| head.record).collect();
                let after = rooms.streams.known(self.part);
                if after.incarnation == before.incarnation {
                    for record in &records {
                        rooms.streams.note(self.part, record.seq);
                    }
                    *self.log.borrow_mut() = rooms.new_log(before, &records);
                    self.incarnation.set(before.incarnation);
                    break;
                }
            }
        } else {
            rooms.connection.round_trip(&rooms.subjects.nobody()).await;
        }
        self.checked.set(Instant::now());
        Ok(Feeds { live, ephemeral })
    }

    async fn serve(self: &Rc<Self>, rooms: &Rc<Rooms>, feeds: &mut Feeds) {
        let mut stored = Vec::new();
        let mut passing = Vec::new();
        while !self.is_gone() {
            stored.clear();
            passing.clear();
            // Both feeds take messages only when they put them into the batch, and a notification that is not waited for is
            // kept: all branches are cancel-safe.
            let alive = tokio::select! {
                alive = next(feeds.live.as_mut(), &mut stored) => alive,
                alive = feeds.ephemeral.next_batch(&mut passing, BATCH) => alive,
                () = self.wake.notified() => true,
            };
            if !alive {
                // The client was closed: the edge stops.
                return self.end(None);
            }
            self.on_stored(rooms, feeds.live.as_mut(), &stored).await;
            if feeds.ephemeral.suspicion().is_some() {
                feeds.ephemeral.settle();
                self.receipts_missed(rooms);
            }
            self.on_passing(rooms, &passing).await;
        }
    }

    async fn on_stored(&self, rooms: &Rc<Rooms>, live: Option<&mut LiveFeed>, batch: &[Message]) {
        let Some(live) = live else {
            // A room without a log has nothing to compare.
            self.filled.send_replace(self.wanted.get());
            return;
        };
        if let Some(suspicion) = live.suspicion() {
            let cause = match suspicion {
                Suspicion::Reconnect => GapCause::Reconnect,
                Suspicion::Overflow => GapCause::Overflow,
            };
            // Before the read: what comes to be suspect after it must raise a new suspicion.
            live.settle();
            Box::pin(self.fill_in(rooms, cause)).await;
        }
        let wanted = self.wanted.get();
        if *self.filled.borrow() < wanted {
            Box::pin(self.fill_in(rooms, GapCause::Resync)).await;
            self.filled.send_replace(wanted);
        }
        let mut ready = Pass::default();
        for message in batch {
            let Some(record) = self.record(rooms, message) else {
                continue;
            };
            let admission = self
                .log
                .borrow()
                .admit(record.class, record.seq, record.previous);
            match admission {
                Admission::Deliver => self.deliver(&record, &mut ready),
                Admission::Old => self.on_old(rooms, &record),
                Admission::Gap => {
                    self.fan_out(std::mem::take(&mut ready)).await;
                    Box::pin(self.fill_before(rooms, &record)).await;
                    // The read usually brought it too.
                    if self.log.borrow().admit(record.class, record.seq, None) == Admission::Deliver
                    {
                        self.deliver(&record, &mut ready);
                    }
                }
            }
            if self.is_gone() {
                return;
            }
        }
        self.fan_out(ready).await;
    }

    fn record(&self, rooms: &Rooms, message: &Message) -> Option<Record> {
        let dropped = |why: Dropped| {
            count(Counter::MessageDropped(why), 1);
            tracing::debug!(room.id = %self.room, reason = ?why, "a message was dropped");
        };
        let Some(subject) = rooms.subjects.parse_live(&message.subject) else {
            dropped(Dropped::BadSubject);
            return None;
        };
        if subject.origin != *rooms.streams.origin() {
            dropped(Dropped::UnknownOrigin);
            return None;
        }
        let epoch = self.log.borrow().epoch();
        let headers = message.headers.as_ref();
        let record = headers
            .map(|headers| Record::stored(headers, message.payload.clone(), subject.class, epoch));
        match record {
            Some(Ok(record)) => {
                rooms.streams.note(self.part, record.seq);
                Some(record)
            }
            Some(Err(_)) | None => {
                dropped(Dropped::BadMessage);
                None
            }
        }
    }

    /// A message that lies before our position: republished again, or live twin of one that was read from the stream. Or the
    /// stream began anew, and nothing will fit until that is noticed.
    fn on_old(&self, rooms: &Rc<Rooms>, record: &Record) {
        count(Counter::MessageSuppressed(Suppressed::Old), 1);
        if self
            .log
            .borrow()
            .contradicts(record.seq, record.fingerprint)
        {
            rooms.suspect(self.part);
        }
    }

    /// Takes an admitted message into the log and its frame into the pass.
    pub(super) fn deliver(&self, record: &Record, ready: &mut Pass) {
        let mut log = self.log.borrow_mut();
        if is_erasure(record) {
            // What it speaks of is not in the stream any more, and nobody shall get it from memory.
            log.forget();
        }
        let first = log.head_index();
        match log.advance(record) {
            Some(cursor) => {
                let frame = encode::message(&self.room, record, Some(&cursor));
                if ready.frames.is_empty() {
                    ready.first = first;
                }
                ready.frames.push(frame.clone());
                log.push(record, frame);
                self.receipts.spoke(record, &log);
            }
            None => count(Counter::MessageSuppressed(Suppressed::Duplicate), 1),
        }
    }

    async fn on_passing(&self, rooms: &Rooms, batch: &[Message]) {
        let mut ready = Pass::default();
        let mut receipts = IndexMap::new();
        for message in batch {
            let headers = message.headers.as_ref();
            let kind = headers
                .and_then(|h| h.get_last(header::KIND))
                .map(|v| v.as_str());
            let record = Record::ephemeral(headers, message.payload.clone(), unix_ms());
            if kind == Some(KIND_TYPING) {
                self.push_typing(&record.from);
            } else if kind == Some(KIND_READ) {
                self.take_receipt(rooms, &record.from, &message.payload, &mut receipts);
            } else if self.durable {
                // Only what the stream has stored is shown in a durable room.
                count(Counter::MessageDropped(Dropped::NotStored), 1);
            } else {
                let frame = encode::message(&self.room, &record, None);
                let mut log = self.log.borrow_mut();
                if ready.frames.is_empty() {
                    ready.first = log.head_index();
                }
                ready.frames.push(frame.clone());
                log.push(&record, frame);
            }
        }
        self.push_receipts(receipts);
        self.fan_out(ready).await;
    }
}

/// Whether natter itself says that messages of the room were erased.
fn is_erasure(record: &Record) -> bool {
    record.kind == Some(Kind::Erase.as_str()) && record.from == FROM_NATTER
}

/// What a hub listens to.
struct Feeds {
    live: Option<LiveFeed>,
    ephemeral: LiveFeed,
}

async fn next(feed: Option<&mut LiveFeed>, batch: &mut Vec<Message>) -> bool {
    match feed {
        Some(feed) => feed.next_batch(batch, BATCH).await,
        None => std::future::pending().await,
    }
}
