//! What the watches of a shard hear, and when they tell it.
//!
//! A subject is subscribed once for all watches of the shard that need it: the signals to a user, the messages of a room,
//! or those of a namespace. With the last watch the subscription ends.

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::{HashMap, VecDeque},
    pin::pin,
    rc::{Rc, Weak},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{
    StreamExt as _,
    stream::{self, FuturesUnordered},
};
use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval, sleep},
};

use super::{
    follow::Follow,
    follower::{self, Said},
    list::List,
    sources::{FIRST_RESYNC, Sources},
};
use crate::{
    bus::{Arrival, Line, Listener, News, Origins, Record, Signal},
    model::{Class, Cursor, Kind, Position, Region, RoomId, partition_of},
    people::{self, Filter, MemberState, People, preview},
    protocol::LastMessage,
    read_marker::Markers,
    runtime::unix_ms,
    subject::{LogSubject, Subjects, header},
    telemetry::metrics::{Counter, Gauge, Held, count},
};

/// Summaries of the rooms of a list are sent at most this often.
const INTERVAL: Duration = Duration::from_millis(250);

/// Lists that are read at once.
const READ_AT_ONCE: usize = 8;

/// How often it is checked whether the rooms of a list have to be compared.
const TICK: Duration = Duration::from_secs(1);

/// How often a list is compared after that.
const RESYNC: Duration = Duration::from_secs(300);

/// How long it may take, in ms, until it is noticed that NATS is gone.
const NOTICED_MS: u64 = 60_000;

/// Serves the watches of a shard.
pub struct Desk {
    line: Line,
    subjects: Subjects,
    region: Region,
    origins: Arc<Origins>,
    pub(super) sources: Sources,
    by_sid: RefCell<HashMap<u64, Rc<Source>>>,
    by_subject: RefCell<HashMap<Box<str>, u64>>,
    lists: RefCell<Vec<Weak<List>>>,
    dirty: RefCell<Vec<Rc<List>>>,
    wake: Notify,
    /// When NATS was last seen to be there, in ms since 1970.
    up_at: Cell<u64>,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").finish_non_exhaustive()
    }
}

/// A subscription.
struct Source {
    subject: Box<str>,
    of: Of,
    heard_by: RefCell<Vec<Ear>>,
    _counted: Held,
}

/// What a subscription brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    /// Signals to a user.
    Signals,
    /// What streams have stored.
    Log,
    /// Messages of ephemeral rooms.
    Ephemeral,
}

/// One watch.
#[derive(Clone)]
pub(super) enum Ear {
    List(Rc<List>),
    Follow(Rc<Follow>),
}

impl Ear {
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::List(one), Self::List(other)) => Rc::ptr_eq(one, other),
            (Self::Follow(one), Self::Follow(other)) => Rc::ptr_eq(one, other),
            (Self::List(_), Self::Follow(_)) | (Self::Follow(_), Self::List(_)) => false,
        }
    }
}

/// The subscriptions of a watch. They end when this is dropped.
pub(super) struct Hearing {
    desk: Rc<Desk>,
    ear: Ear,
    sids: Vec<u64>,
}

impl Drop for Hearing {
    fn drop(&mut self) {
        for sid in &self.sids {
            self.desk.detach(*sid, &self.ear);
        }
        self.desk.lists.borrow_mut().retain(|list| match &self.ear {
            Ear::List(ended) => !std::ptr::eq(list.as_ptr(), Rc::as_ptr(ended)),
            Ear::Follow(_) => true,
        });
    }
}

impl Desk {
    /// The desk of a shard whose line for live messages is `line`.
    #[must_use]
    pub fn new(
        line: Line,
        subjects: Subjects,
        origins: Arc<Origins>,
        people: Arc<People>,
        markers: Arc<Markers>,
    ) -> Rc<Self> {
        Rc::new(Self {
            region: people.config().region(),
            line,
            subjects,
            origins,
            sources: Sources { people, markers },
            by_sid: RefCell::default(),
            by_subject: RefCell::default(),
            lists: RefCell::default(),
            dirty: RefCell::default(),
            wake: Notify::new(),
            up_at: Cell::new(unix_ms()),
        })
    }

    /// Begins to hear what a list needs. The subscriptions are made when this returns; the caller reads what is there
    /// after that.
    pub(super) async fn hear_list(self: &Rc<Self>, user: &str, list: &Rc<List>) -> Hearing {
        let mut subjects = vec![(self.subjects.signals(user), Of::Signals)];
        for room in list.named().unwrap_or_default() {
            subjects.push(match self.is_durable(room.namespace()) {
                true => (self.subject_of(&room), Of::Log),
                false => (self.subjects.ephemeral(&room), Of::Ephemeral),
            });
        }
        self.lists.borrow_mut().push(Rc::downgrade(list));
        self.hear(Ear::List(Rc::clone(list)), subjects).await
    }

    /// Begins to hear what is said in the namespaces of a pattern.
    pub(super) async fn hear_all(self: &Rc<Self>, user: &str, follow: &Rc<Follow>) -> Hearing {
        let mut subjects = vec![(self.subjects.signals(user), Of::Signals)];
        for name in &follow.namespaces {
            if !self.is_durable(name) {
                let subject = self.subjects.ephemeral_namespace(name);
                subjects.push((subject, Of::Ephemeral));
                continue;
            }
            let live = |class| self.subjects.live_namespace(&self.region, name, class);
            subjects.push((live(Class::Msg), Of::Log));
            if follow.filter.has_annotation() {
                subjects.push((live(Class::Ev), Of::Log));
            }
        }
        self.hear(Ear::Follow(Rc::clone(follow)), subjects).await
    }

    async fn hear(self: &Rc<Self>, ear: Ear, subjects: Vec<(String, Of)>) -> Hearing {
        let sids = subjects
            .into_iter()
            .map(|(subject, of)| self.attach(subject, of, ear.clone()));
        let hearing = Hearing {
            sids: sids.collect(),
            desk: Rc::clone(self),
            ear,
        };
        // If the line is down, the subscriptions are made when it is up again, and the rooms are compared then.
        let _down = self.line.round_trip().await;
        hearing
    }

    fn attach(&self, subject: String, of: Of, ear: Ear) -> u64 {
        let known = self.by_subject.borrow().get(&*subject).copied();
        if let Some(sid) = known
            && let Some(source) = self.by_sid.borrow().get(&sid)
        {
            source.heard_by.borrow_mut().push(ear);
            return sid;
        }
        let sid = self.line.new_sid();
        self.line.subscribe(&subject, sid);
        let subject: Box<str> = subject.into();
        self.by_subject.borrow_mut().insert(subject.clone(), sid);
        let source = Source {
            subject,
            of,
            heard_by: RefCell::new(vec![ear]),
            _counted: Held::new(Gauge::WatchSubscription),
        };
        self.by_sid.borrow_mut().insert(sid, Rc::new(source));
        sid
    }

    fn detach(&self, sid: u64, ear: &Ear) {
        let mut by_sid = self.by_sid.borrow_mut();
        let Some(source) = by_sid.get(&sid) else {
            return;
        };
        let mut heard_by = source.heard_by.borrow_mut();
        heard_by.retain(|it| !it.is(ear));
        if heard_by.is_empty() {
            drop(heard_by);
            self.line.unsubscribe(sid);
            self.by_subject.borrow_mut().remove(&source.subject);
            by_sid.remove(&sid);
        }
    }

    fn is_durable(&self, namespace: &str) -> bool {
        let its = self.sources.people.config().namespaces.get(namespace);
        its.is_some_and(|its| its.durable)
    }

    /// The subject of the messages of a durable room.
    fn subject_of(&self, room: &RoomId) -> String {
        let part = partition_of(room, self.origins.own().partitions());
        self.subjects
            .live_class(&self.region, part, room, Class::Msg)
    }

    /// What arrives over the line goes here first, and to `rooms` if it is not for the desk.
    pub fn listener<L: Listener>(self: &Rc<Self>, rooms: L) -> impl Listener + use<L> {
        Listening {
            desk: Rc::clone(self),
            rooms,
        }
    }

    /// The record of a room has changed. `record`: what it is now; `None` if it was only read for the first time.
    pub fn on_record(&self, room: &RoomId, record: Option<&people::Record>) {
        // A record may have a thousand members, and mostly nobody watches.
        if self.by_subject.borrow().is_empty() {
            return;
        }
        for (user, member) in record.iter().flat_map(|record| &record.members) {
            let is_in = member.state == MemberState::In;
            self.heard_by(&self.subjects.signals(user), |ear| {
                if let Ear::List(list) = ear
                    && list.mine().is_some()
                    && (is_in || list.may_leave(room, member.stamp.at))
                {
                    self.mark_if(list, list.changed(room));
                }
            });
        }
        let namespace = room.namespace();
        let subjects = match self.is_durable(namespace) {
            true => {
                let all = self
                    .subjects
                    .live_namespace(&self.region, namespace, Class::Msg);
                [self.subject_of(room), all]
            }
            false => [
                self.subjects.ephemeral(room),
                self.subjects.ephemeral_namespace(namespace),
            ],
        };
        for subject in subjects {
            self.heard_by(&subject, |ear| match ear {
                Ear::List(list) => self.mark_if(list, list.changed(room)),
                Ear::Follow(follow) => follow.changed(room),
            });
        }
    }

    /// Changes of records may have been missed.
    pub fn on_missed(&self) {
        for source in self.by_sid.borrow().values() {
            for ear in source.heard_by.borrow().iter() {
                if let Ear::Follow(follow) = ear {
                    follow.doubt();
                }
            }
        }
        for list in self.lists.borrow().iter().filter_map(Weak::upgrade) {
            list.compare_soon(FIRST_RESYNC.mul_f64(rand::random_range(0.3..1.0)));
        }
    }

    /// Does something with each watch that hears this subject.
    fn heard_by(&self, subject: &str, mut each: impl FnMut(&Ear)) {
        let sid = self.by_subject.borrow().get(subject).copied();
        let source = sid.and_then(|sid| self.by_sid.borrow().get(&sid).cloned());
        if let Some(source) = source {
            source.heard_by.borrow().iter().for_each(&mut each);
        }
    }

    fn arrived(&self, source: &Source, arrival: &Arrival) {
        match source.of {
            Of::Signals => self.signalled(source, arrival),
            Of::Log => self.stored(source, arrival),
            Of::Ephemeral => self.said(source, arrival),
        }
    }

    fn signalled(&self, source: &Source, arrival: &Arrival) {
        count(Counter::SignalReceived, 1);
        let Some(signal) = Signal::parse(&arrival.payload()) else {
            return;
        };
        for ear in source.heard_by.borrow().iter() {
            match ear {
                Ear::List(list) => self.mark_if(list, list.signalled(&signal, self.sources.caps())),
                Ear::Follow(follow) => match &signal.what {
                    // Messages are heard themselves.
                    News::Message { .. } => {}
                    News::Read(marker) => follow.arranged(&signal.room, Some(marker)),
                    News::Changed => follow.arranged(&signal.room, None),
                },
            }
        }
    }

    /// A stream has stored a message of a durable room. What is not needed of it is not parsed.
    fn stored(&self, source: &Source, arrival: &Arrival) {
        count(Counter::WatchReceived, 1);
        let Some(subject) = self.subjects.parse_live(arrival.subject()) else {
            return;
        };
        let LogSubject {
            origin,
            part,
            room,
            class,
        } = subject;
        let Some(streams) = self.origins.get(&origin) else {
            return;
        };
        let parsed: OnceCell<Option<(Record, Cursor)>> = OnceCell::new();
        let record = || {
            let parse = || {
                let epoch = streams.known(part).epoch;
                let headers = arrival.headers().iter();
                let record = Record::stored(headers, arrival.payload(), class, epoch).ok()?;
                let cursor = Cursor::single(Position {
                    origin: origin.clone(),
                    epoch,
                    seq: record.seq,
                    fingerprint: record.fingerprint,
                });
                Some((record, cursor))
            };
            parsed.get_or_init(parse).as_ref()
        };
        let matches = |filter: &Filter| {
            let known = filter
                .has_assignee()
                .then(|| self.sources.people.known(&room));
            let its = known.flatten().and_then(|known| known.record());
            its.is_none_or(|its| filter.of_record(Some(&its)))
        };
        for ear in source.heard_by.borrow().iter() {
            match ear {
                Ear::List(list) => {
                    if let Some((record, cursor)) = record() {
                        let tells = list.heard(&room, record, Some(cursor), self.sources.caps());
                        self.mark_if(list, tells);
                    }
                }
                Ear::Follow(follow) if class == Class::Ev => {
                    let holds = record().and_then(|(it, _)| follow.filter.of_annotation(it));
                    if let Some(holds) = holds {
                        follow.annotated(&room, holds);
                    }
                }
                Ear::Follow(follow) => {
                    let headers = arrival.headers();
                    let seq = headers.last(header::SEQUENCE);
                    let seq = seq.and_then(|seq| seq.parse().ok());
                    // Sending moves the sender's marker.
                    let is_own = headers.last(header::FROM) == Some(&*follow.from);
                    let own = is_own.then(&record).flatten();
                    let news = follower::News {
                        place: seq.map(|seq| (origin.clone(), seq)),
                        marker: own.map(|(_, cursor)| cursor.clone()),
                        ..follower::News::default()
                    };
                    let wanted = |filter: &Filter| {
                        record().and_then(|(record, _)| filter.of_message(record))
                    };
                    follow.heard(&room, news, wanted, matches);
                }
            }
        }
    }

    /// Something was published in an ephemeral room.
    fn said(&self, source: &Source, arrival: &Arrival) {
        let headers = arrival.headers();
        let kind = headers.last(header::KIND);
        // Who is typing, and what refers to a message, is not told.
        let is_message = kind.is_none_or(|kind| kind == Kind::Message.as_str());
        let room = self.subjects.parse_ephemeral(arrival.subject());
        let Some(room) = room.filter(|_| is_message) else {
            return;
        };
        count(Counter::WatchReceived, 1);
        let record = Record::ephemeral(headers.iter(), arrival.payload(), unix_ms());
        for ear in source.heard_by.borrow().iter() {
            match ear {
                Ear::List(list) => {
                    self.mark_if(list, list.heard(&room, &record, None, self.sources.caps()));
                }
                Ear::Follow(follow) => {
                    let wanted = follow.filter.of_message(&record);
                    let said = match wanted {
                        None => Said::Other,
                        Some(_) => Said::Message(LastMessage {
                            id: record.id.clone(),
                            from: record.from.clone(),
                            ts: record.ts,
                            text: preview(&record.body),
                        }),
                    };
                    let news = follower::News {
                        said,
                        ..follower::News::default()
                    };
                    follow.heard(&room, news, |_| wanted, |_| true);
                }
            }
        }
    }

    /// Has the session of a list told what is new, if there is something.
    pub(super) fn mark_if(&self, list: &Rc<List>, tells: bool) {
        if tells && !list.is_dirty.replace(true) && !list.is_telling.get() {
            self.dirty.borrow_mut().push(Rc::clone(list));
            self.wake.notify_one();
        }
    }

    /// Tells the session of a list what is new.
    async fn tell(&self, list: Rc<List>) {
        list.is_dirty.set(false);
        list.is_telling.set(true);
        let again = list.tell(&self.sources).await;
        list.is_telling.set(false);
        // What happened while it was told did not put it among the others.
        let again = list.is_dirty.replace(false) || again;
        self.mark_if(&list, again);
    }

    /// Tells the sessions what is new in their lists, forever. Lists of which nothing has to be read do not wait for the
    /// others.
    async fn tell_all(&self) {
        let round = async || {
            self.wake.notified().await;
            // What comes meanwhile is told together.
            sleep(INTERVAL).await;
        };
        let mut next = pin!(round());
        let mut waiting = VecDeque::new();
        let mut reading = FuturesUnordered::new();
        loop {
            tokio::select! {
                () = &mut next => {
                    next.set(round());
                    for list in self.dirty.take() {
                        match list.has_to_read() {
                            true => waiting.push_back(list),
                            false => reading.push(self.tell(list)),
                        }
                    }
                }
                Some(()) = reading.next() => {}
            }
            while reading.len() < READ_AT_ONCE
                && let Some(list) = waiting.pop_front()
            {
                reading.push(self.tell(list));
            }
        }
    }

    /// Tells the sessions what is new in their lists, and compares those, forever.
    pub async fn run(self: Rc<Self>) {
        let telling = self.tell_all();
        let comparing = async {
            let mut tick = interval(TICK);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                if self.line.is_up() {
                    self.up_at.set(unix_ms());
                }
                let now = Instant::now();
                let due: Vec<Rc<List>> = {
                    let lists = self.lists.borrow();
                    let lists = lists.iter().filter_map(Weak::upgrade);
                    lists.filter(|list| list.due.get() <= now).collect()
                };
                let compare = async |list: Rc<List>| {
                    let again = RESYNC.mul_f64(rand::random_range(0.8..1.2));
                    list.due.set(now + again);
                    match list.compare(&self.sources).await {
                        Ok(differs) => self.mark_if(&list, differs),
                        Err(refused) => {
                            tracing::debug!(%refused, "watched rooms can't be compared");
                            list.due.set(Instant::now() + FIRST_RESYNC);
                        }
                    }
                };
                stream::iter(due)
                    .for_each_concurrent(READ_AT_ONCE, compare)
                    .await;
            }
        };
        tokio::join!(telling, comparing);
    }
}

/// Listens for the desk and for the rooms of a shard.
struct Listening<L> {
    desk: Rc<Desk>,
    rooms: L,
}

impl<L: Listener> Listener for Listening<L> {
    fn up(&mut self) {
        // What was sent meanwhile may be lost.
        let missed_since = self.desk.up_at.get().saturating_sub(NOTICED_MS);
        for (sid, source) in self.desk.by_sid.borrow().iter() {
            self.desk.line.subscribe(&source.subject, *sid);
            for ear in source.heard_by.borrow().iter() {
                match ear {
                    Ear::List(list) => {
                        let soon = FIRST_RESYNC.mul_f64(rand::random_range(0.3..1.0));
                        list.due.set(Instant::now() + soon);
                    }
                    Ear::Follow(follow) => {
                        follow.suspect(missed_since);
                        follow.doubt();
                    }
                }
            }
        }
        self.rooms.up();
    }

    fn arrived(&mut self, arrival: Arrival) {
        let source = self.desk.by_sid.borrow().get(&arrival.sid()).cloned();
        match source {
            Some(source) => self.desk.arrived(&source, &arrival),
            None => self.rooms.arrived(arrival),
        }
    }

    fn turn(&mut self) {
        self.rooms.turn();
    }
}
