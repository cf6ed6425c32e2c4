//! One room on one shard, from subscription to end.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use futures_util::future::try_join_all;
use indexmap::IndexMap;
use tokio::{
    sync::Notify,
    task::spawn_local,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    backlog::Backlogs,
    fan_out::{MEMBERS_A_TURN, Pass},
    log::{Admission, RoomLog, Start},
    member::{Member, News},
    merge::LastMissed,
    receipts::Receipts,
    rooms::Rooms,
};
use crate::{
    bus::{Arrival, ReadError, Record, Streams},
    model::{Cursor, Kind, RoomId, partition_of},
    protocol::{Close, Event},
    runtime::unix_ms,
    subject::{FROM_NATTER, KIND_READ, KIND_TYPING, header},
    telemetry::metrics::{Counter, Dropped, GapCause, Suppressed, count},
};

/// Maximum number of messages fanned out at once. Messages that arrive meanwhile form the next batch, so batches grow
/// with the load.
const BATCH: usize = 64;

/// Pause before a room is opened again after its connection broke while it was opened.
const OPEN_AGAIN: Duration = Duration::from_millis(20);

/// A room's hub. It has a task only while it opens, and while it does something that has to wait.
#[derive(Debug)]
pub struct Hub {
    pub(super) room: RoomId,
    pub(super) part: u16,
    /// Where its log is stored: one stream for each origin, the own origin's first. The indices are the tracks of the
    /// log. Empty if the room has no log.
    pub(super) sources: Box<[Source]>,
    /// Version of the set of origins that `sources` was made from.
    origins_version: u64,
    /// Whether the room has a log. If not, messages only pass through.
    pub(super) durable: bool,
    /// Its subscriptions: to the subject that the stream republishes to (only in a durable room), and to the ephemeral
    /// subject.
    pub(super) live_sid: Option<u64>,
    pub(super) passing_sid: u64,
    pub(super) log: RefCell<RoomLog>,
    pub(super) members: RefCell<IndexMap<u64, Rc<Member>>>,
    /// Changes when a member joins or leaves. A fan-out pass that has yielded then starts over.
    pub(super) membership: Cell<u64>,
    phase: Cell<Phase>,
    /// Notified when `phase`, `busy` or `filled` changes, and on deliveries that somebody waits for.
    changed: Notify,
    /// Arrivals that are not processed yet.
    inbox: RefCell<VecDeque<Arrival>>,
    /// Whether a task is running that processes everything that arrives until it ends.
    busy: Cell<bool>,
    /// Why messages may be missing before the ones in the inbox, if any may be.
    loss: Cell<Option<GapCause>>,
    /// Number of the last comparison with the stream that was requested. It is done when `filled` has reached it.
    wanted: Cell<u64>,
    filled: Cell<u64>,
    /// When the log was last compared with the stream.
    pub(super) checked: Cell<Instant>,
    /// Whether that comparison counts. It does not right after the opening, or if a mirror did not answer, or if the
    /// copy that answered may have been behind. Then the log is compared again soon.
    pub(super) compared: Cell<bool>,
    /// Since when the room has no members.
    pub(super) empty_since: Cell<Option<Instant>>,
    pub(super) receipts: Receipts,
    pub(super) last_missed: LastMissed,
    /// Whether a task is running that releases held messages when their wait is over.
    pub(super) holding: Cell<bool>,
    /// Number of tasks that wait for a delivery.
    awaiting: Cell<usize>,
    /// Most messages that a join replays.
    pub(super) replay_max: u64,
}

/// Where one origin's part of the room's log is stored.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) streams: Arc<Streams>,
    pub(super) stream: Arc<str>,
    /// The incarnation of the stream that the log belongs to.
    pub(super) incarnation: Cell<u32>,
    pub(super) backlogs: Backlogs,
}

/// The state of a hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Subscribing and reading the heads.
    Starting,
    /// Members can join.
    Ready,
    /// Ended. For example it could not start, it had no members for a while, or its stream has a new incarnation.
    Gone,
}

/// The result of processing a batch of arrivals.
#[derive(Default)]
struct Taken {
    /// Messages for the members.
    pass: Pass,
    typing: Vec<String>,
    receipts: IndexMap<String, Cursor>,
    /// A message with a gap before it in its track.
    gap: Option<(usize, Record)>,
}

impl Hub {
    /// A hub that has subscribed but is not started yet.
    pub(super) fn new(rooms: &Rooms, room: RoomId, durable: bool) -> Rc<Self> {
        let part = partition_of(&room, rooms.streams.partitions());
        let origins_version = rooms.origins.members_version();
        let origins = if durable {
            rooms.origins.all()
        } else {
            Vec::new()
        };
        let sources = origins.into_iter().map(|streams| Source {
            stream: Arc::clone(streams.stream(part)),
            incarnation: Cell::new(streams.known(part).incarnation),
            backlogs: Backlogs::default(),
            streams,
        });
        let hub = Rc::new(Self {
            part,
            sources: sources.collect(),
            origins_version,
            durable,
            live_sid: durable.then(|| rooms.line.new_sid()),
            passing_sid: rooms.line.new_sid(),
            log: RefCell::new(rooms.new_log(&room, Vec::new())),
            members: RefCell::default(),
            membership: Cell::new(0),
            phase: Cell::new(Phase::Starting),
            changed: Notify::new(),
            inbox: RefCell::default(),
            busy: Cell::new(false),
            loss: Cell::new(None),
            wanted: Cell::new(0),
            filled: Cell::new(0),
            checked: Cell::new(Instant::now()),
            compared: Cell::new(false),
            empty_since: Cell::new(Some(Instant::now())),
            receipts: Receipts::new(rooms.read_push_max),
            last_missed: LastMissed::default(),
            holding: Cell::new(false),
            awaiting: Cell::new(0),
            replay_max: rooms.replay_max(&room),
            room,
        });
        hub.subscribe(rooms);
        hub
    }

    /// Subscribes on the line's current connection.
    pub(super) fn subscribe(&self, rooms: &Rooms) {
        let Rooms { line, subjects, .. } = rooms;
        if let Some(sid) = self.live_sid {
            line.subscribe(
                &subjects.live(rooms.streams.origin(), self.part, &self.room),
                sid,
            );
        }
        line.subscribe(&subjects.ephemeral(&self.room), self.passing_sid);
    }

    /// Waits until the hub is ready or gone.
    pub(super) async fn started(&self) -> Phase {
        self.when(|| self.phase.get() != Phase::Starting).await;
        self.phase.get()
    }

    pub(super) async fn when(&self, is_so: impl Fn() -> bool) {
        loop {
            let changed = self.changed.notified();
            if is_so() {
                return;
            }
            changed.await;
        }
    }

    /// Waits until a delivery makes `is_so` true or the hub is gone, for at most `most`.
    pub(super) async fn when_delivered(&self, most: Duration, is_so: impl Fn(&RoomLog) -> bool) {
        self.awaiting.set(self.awaiting.get() + 1);
        let reached = self.when(|| self.is_gone() || is_so(&self.log.borrow()));
        let in_time = timeout(most, reached).await.is_ok();
        self.awaiting.set(self.awaiting.get() - 1);
        tracing::trace!(room.id = %self.room, in_time, "waited for a region");
    }

    /// Waits until the hub is gone.
    pub(super) async fn gone(&self) {
        self.when(|| self.is_gone()).await;
    }

    pub(super) fn is_gone(&self) -> bool {
        self.phase.get() == Phase::Gone
    }

    pub(super) fn is_ready(&self) -> bool {
        self.phase.get() == Phase::Ready
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

    /// Ends the hub. With a `code`, members are told (`kicked`) that they must join again.
    pub(super) fn end(&self, rooms: &Rooms, code: Option<&'static str>) {
        if self.phase.replace(Phase::Gone) == Phase::Gone {
            return;
        }
        self.changed.notify_waiters();
        rooms.forget(self);
        self.inbox.take();
        let members = std::mem::take(&mut *self.members.borrow_mut());
        let kicked = code.map(|code| Event::Kicked {
            room: self.room.clone(),
            code,
        });
        let news = News::of(kicked.as_slice());
        for member in members.values() {
            member.left.set(true);
            match &kicked {
                Some(kicked) if member.codec.event(kicked).is_none() => {
                    // The client has to come back to be in the room again.
                    member.outlet.close(Close::Draining);
                }
                Some(_) => news.tell(member),
                None => {}
            }
        }
    }

    /// Whether a stream has a new incarnation since the log was made, or an origin was added or removed.
    pub(super) fn is_outdated(&self, rooms: &Rooms) -> bool {
        let anew = |source: &Source| {
            source.streams.known(self.part).incarnation != source.incarnation.get()
        };
        self.durable
            && (rooms.origins.members_version() != self.origins_version
                || self.sources.iter().any(anew))
    }

    /// The subjects of this room in the stream of one origin, as the filter of a read.
    pub(super) fn filter(&self, rooms: &Rooms, track: usize) -> String {
        let origin = self.sources[track].streams.origin();
        rooms.subjects.stored_all(origin, self.part, &self.room)
    }

    pub(super) fn is_busy(&self) -> bool {
        self.busy.get()
    }

    /// Requests a comparison of the log with its streams and returns its number. Only for durable rooms: an ephemeral
    /// one has no stream.
    pub(super) fn request_fill(self: &Rc<Self>, rooms: &Rc<Rooms>) -> u64 {
        self.wanted.set(self.wanted.get() + 1);
        self.work(rooms);
        self.wanted.get()
    }

    /// Compares the log with its streams. Returns when everything that the streams had at the call is delivered, or the
    /// hub is gone.
    pub(super) async fn fill(self: &Rc<Self>, rooms: &Rc<Rooms>) {
        let wanted = self.request_fill(rooms);
        self.when(|| self.filled.get() >= wanted || self.is_gone())
            .await;
    }

    /// Reads the heads over the connection that carries the subscriptions. When the server answers, it has processed
    /// the subscriptions before, so every message stored after the heads arrives live. Then members can join.
    pub(super) async fn start(self: Rc<Self>, rooms: Rc<Rooms>) {
        let deadline = Instant::now() + rooms.config.join_timeout;
        match timeout_at(deadline, self.open(&rooms)).await {
            Ok(Ok(())) if self.is_outdated(&rooms) => {
                // An origin was added meanwhile, or a stream has a new incarnation. The next hub takes it into account.
                self.end(&rooms, None);
            }
            Ok(Ok(())) => {
                if self.phase.get() == Phase::Starting {
                    self.phase.set(Phase::Ready);
                    self.changed.notify_waiters();
                    self.work(&rooms);
                }
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, room.id = %self.room, "a room could not be opened");
                self.end(&rooms, None);
            }
            Err(_elapsed) => {
                tracing::warn!(room.id = %self.room, "a room could not be opened in time");
                self.end(&rooms, None);
            }
        }
    }

    async fn open(self: &Rc<Self>, rooms: &Rc<Rooms>) -> Result<(), Rc<ReadError>> {
        let mut again = false;
        loop {
            // A line that is up but fails every request must not be retried in a busy loop.
            if std::mem::replace(&mut again, true) {
                sleep(OPEN_AGAIN).await;
            }
            // On a new connection the line subscribes again before it sends anything else.
            if !rooms.line.ready().await {
                return Err(Rc::new(ReadError::Closed));
            }
            if self.durable {
                let heads = self.sources.iter().map(|source| rooms.heads(self, source));
                match try_join_all(heads).await {
                    Ok(heads) => {
                        let starts = self.sources.iter().zip(heads).map(|(source, heads)| {
                            let (state, settled, heads) = heads;
                            source.incarnation.set(state.incarnation);
                            Start {
                                origin: source.streams.origin().clone(),
                                epoch: state.epoch,
                                heads,
                                empty_at: settled,
                            }
                        });
                        *self.log.borrow_mut() = rooms.new_log(&self.room, starts.collect());
                        self.remember_earlier(rooms).await?;
                    }
                    Err(error) if matches!(*error, ReadError::Closed) && !self.is_gone() => {
                        continue;
                    }
                    Err(error) => return Err(error),
                }
            } else if rooms.line.round_trip().await.is_err() && !self.is_gone() {
                continue;
            }
            // Whatever was missed so far lies before the heads that were just read.
            self.loss.set(None);
            self.checked.set(Instant::now());
            return Ok(());
        }
    }

    /// Queues an arrival.
    pub(super) fn arrived(&self, rooms: &Rooms, arrival: Arrival) {
        let mut inbox = self.inbox.borrow_mut();
        if inbox.capacity() == 0 {
            *inbox = rooms.spare_inbox.take();
        }
        if inbox.len() < rooms.inbox_capacity {
            inbox.push_back(arrival);
        } else if self.loss.replace(Some(GapCause::Overflow)).is_none() {
            // In a durable room, the dropped messages are read from the stream before the next ones are processed.
            count(Counter::NatsSlowConsumer, 1);
            tracing::warn!(room.id = %self.room, "a room dropped messages that came faster than it sends them");
        }
    }

    /// Called on a new connection. Messages may have been missed.
    pub(super) fn reconnected(self: &Rc<Self>, rooms: &Rc<Rooms>) {
        self.subscribe(rooms);
        self.loss.set(Some(GapCause::Reconnect));
        self.receipts_missed(rooms);
    }

    /// Processes what is pending: right away if nothing has to wait, which is the usual case, otherwise in a task.
    pub(super) fn work(self: &Rc<Self>, rooms: &Rc<Rooms>) {
        if self.busy.get() || !self.is_ready() {
            return;
        }
        let mut taken = Taken::default();
        while !self.must_read() {
            taken = self.take_in(rooms);
            if taken.gap.is_some() || self.member_count() > MEMBERS_A_TURN {
                break;
            }
            self.fan_out_now(&taken.pass);
            self.push_signals(&mut taken);
            if self.inbox.borrow().is_empty() {
                return;
            }
        }
        self.busy.set(true);
        spawn_local(Rc::clone(self).at_work(Rc::clone(rooms), taken));
    }

    /// Whether the stream must be read before anything else is done.
    fn must_read(&self) -> bool {
        self.loss.get().is_some() || self.filled.get() < self.wanted.get()
    }

    async fn at_work(self: Rc<Self>, rooms: Rc<Rooms>, mut taken: Taken) {
        loop {
            self.fan_out(std::mem::take(&mut taken.pass)).await;
            self.push_signals(&mut taken);
            if let Some((track, record)) = taken.gap.take() {
                // Rare futures are boxed, here and below, to keep this one small: a large room spawns it for each
                // batch.
                Box::pin(self.fill_before(&rooms, track, &record)).await;
                let mut late = Pass::default();
                // The read has usually delivered this message too.
                let admission = self
                    .log
                    .borrow()
                    .admit(track, record.class, record.seq, None);
                if admission == Admission::Deliver {
                    self.take(&rooms, track, record, &mut late);
                }
                self.fan_out(late).await;
            }
            // Both are read before the stream is: a cause that is noted during the read requires another read.
            if let Some(cause) = self.loss.take() {
                if self.durable {
                    Box::pin(self.fill_in(&rooms, cause)).await;
                }
                self.receipts_missed(&rooms);
            }
            let wanted = self.wanted.get();
            if self.filled.get() < wanted {
                Box::pin(self.fill_in(&rooms, GapCause::Resync)).await;
                self.filled.set(wanted);
                self.changed.notify_waiters();
            }
            rooms.bound_rings();
            let idle = self.inbox.borrow().is_empty() && !self.must_read() && !self.has_waited();
            if self.is_gone() || idle {
                break;
            }
            if !self.must_read() {
                taken = self.take_in(&rooms);
            }
        }
        self.busy.set(false);
        self.changed.notify_waiters();
    }

    /// Processes arrivals: at most a batch, and only up to a message with a gap before it.
    fn take_in(self: &Rc<Self>, rooms: &Rc<Rooms>) -> Taken {
        let mut taken = Taken::default();
        self.release(rooms, &mut taken.pass);
        let mut inbox = self.inbox.take();
        while taken.pass.messages.len() < BATCH
            && taken.gap.is_none()
            && let Some(arrival) = inbox.pop_front()
        {
            if self.live_sid == Some(arrival.sid()) {
                self.take_stored(rooms, &arrival, &mut taken);
            } else {
                self.take_passing(rooms, &arrival, &mut taken);
            }
        }
        if !inbox.is_empty() && !self.is_gone() {
            // Nothing was added to the inbox meanwhile.
            self.inbox.replace(inbox);
        } else if inbox.is_empty() && inbox.capacity() <= BATCH {
            // An idle room keeps no memory for it; the next room that gets a message takes it.
            rooms.spare_inbox.replace(inbox);
        }
        taken
    }

    fn push_signals(&self, taken: &mut Taken) {
        for user in taken.typing.drain(..) {
            self.push_typing(&user);
        }
        if !taken.receipts.is_empty() {
            self.push_receipts(std::mem::take(&mut taken.receipts));
        }
    }

    fn take_stored(self: &Rc<Self>, rooms: &Rc<Rooms>, arrival: &Arrival, taken: &mut Taken) {
        let Some((track, record)) = self.record(rooms, arrival) else {
            return;
        };
        let admission = self
            .log
            .borrow()
            .admit(track, record.class, record.seq, record.previous);
        match admission {
            Admission::Deliver => self.take(rooms, track, record, &mut taken.pass),
            Admission::Old => self.on_old(rooms, track, &record),
            Admission::Gap => taken.gap = Some((track, record)),
        }
    }

    fn record(&self, rooms: &Rooms, arrival: &Arrival) -> Option<(usize, Record)> {
        let dropped = |why: Dropped| {
            count(Counter::MessageDropped(why), 1);
            tracing::debug!(room.id = %self.room, reason = ?why, "a message was dropped");
        };
        let Some((origin, class)) = rooms.subjects.origin_and_class(arrival.subject()) else {
            dropped(Dropped::BadSubject);
            return None;
        };
        let Some(track) = self.log.borrow().track_named(origin) else {
            dropped(Dropped::UnknownOrigin);
            return None;
        };
        let epoch = self.log.borrow().epoch(track);
        let headers = arrival.headers().iter();
        match Record::stored(headers, arrival.payload(), class, epoch) {
            Ok(record) => {
                self.sources[track].streams.note(self.part, record.seq);
                Some((track, record))
            }
            Err(_) => {
                dropped(Dropped::BadMessage);
                None
            }
        }
    }

    /// Handles a message that lies before the log's position. Either it was republished again, or it was already read
    /// from the stream. Or the stream has a new incarnation, and no message will be admitted until that is noticed.
    fn on_old(&self, rooms: &Rc<Rooms>, track: usize, record: &Record) {
        count(Counter::MessageSuppressed(Suppressed::Old), 1);
        if self
            .log
            .borrow()
            .contradicts(track, record.seq, record.fingerprint)
        {
            rooms.suspect(&self.sources[track].streams, self.part);
        }
    }

    /// Adds an admitted message to the log and to the pass, unless it is a duplicate.
    pub(super) fn deliver(&self, track: usize, record: Record, ready: &mut Pass) {
        let mut log = self.log.borrow_mut();
        if is_erasure(&record) {
            // The erased messages are not in the stream any more, and must not be served from memory either.
            log.forget();
        }
        if log.is_early(track, &record) {
            count(Counter::MessageCausalTimeout, 1);
            tracing::debug!(room.id = %self.room, seq = record.seq, "what a message answers has not come");
        }
        let first = log.head_index();
        match log.advance(track, &record) {
            Some(at) => {
                self.receipts.spoke(track, &record, &log);
                ready.push(first, log.push(at, record));
            }
            None => count(Counter::MessageSuppressed(Suppressed::Duplicate), 1),
        }
        if self.awaiting.get() > 0 {
            self.changed.notify_waiters();
        }
    }

    fn take_passing(&self, rooms: &Rooms, arrival: &Arrival, taken: &mut Taken) {
        let headers = arrival.headers();
        let kind = headers.last(header::KIND);
        if kind != Some(KIND_TYPING) && kind != Some(KIND_READ) && self.durable {
            // Only what the stream has stored is shown in a durable room.
            return count(Counter::MessageDropped(Dropped::NotStored), 1);
        }
        let record = Record::ephemeral(headers.iter(), arrival.payload(), unix_ms());
        if kind == Some(KIND_TYPING) {
            taken.typing.push(record.from);
        } else if kind == Some(KIND_READ) {
            self.take_receipt(rooms, &record.from, &arrival.payload(), &mut taken.receipts);
        } else {
            let mut log = self.log.borrow_mut();
            let index = log.head_index();
            taken
                .pass
                .push(index, Rc::new(log.unlogged(&self.room, record)));
        }
    }
}

/// Whether this is natter's own announcement that messages of the room were erased.
fn is_erasure(record: &Record) -> bool {
    record.kind == Some(Kind::Erase.as_str()) && record.from == FROM_NATTER
}
