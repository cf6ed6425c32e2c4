//! Watching: sessions that are told what is new in rooms that they have not joined.
//!
//! A desk serves the sessions of one shard. It has one subscription per user who watches, and keeps a summary of a room
//! only after something has happened there. A summary is read once, and then kept up from the signals, which say where in
//! the log their message stands; so nothing is counted twice. What a signal can't say is read again.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::{Rc, Weak},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval, sleep},
};

use super::{
    Session,
    commands::{Answered, now},
};
use crate::{
    auth::{Identity, Right},
    bus::{Arrival, Line, Listener, News, Signal},
    model::{Cursor, RoomId},
    people::{InboxOf, People},
    protocol::{ErrorCode, Event, LastMessage, Refused, Reply, RoomSummary, WatchReply},
    read_marker::Markers,
    runtime::unix_ms,
    subject::Subjects,
    telemetry::metrics::{Counter, Gauge, Held, count},
};

/// The number of a session's watch: it has one, of the user's own rooms.
pub(super) const WATCH: u64 = 1;

/// Summaries are sent at most this often.
const INTERVAL: Duration = Duration::from_millis(250);

/// Rooms whose summaries are kept per user. Above it, those that are up to date are dropped, and read again when
/// something happens.
const MAX_KEPT: usize = 500;

/// How often it is checked whether the rooms of a user have to be compared.
const TICK: Duration = Duration::from_secs(1);

/// How long after its start a watch is compared with what is stored: a signal that was sent just when the subscription
/// was made may be lost.
const FIRST_RESYNC: Duration = Duration::from_secs(3);

/// How much clocks may differ, in ms, when it is told whether a message came since then.
const CLOCKS_MS: u64 = 10_000;

/// How often it is compared after that.
const RESYNC: Duration = Duration::from_secs(300);

/// Serves the watches of a shard.
pub struct Desk {
    line: Line,
    subjects: Subjects,
    people: Arc<People>,
    markers: Arc<Markers>,
    by_user: RefCell<HashMap<Arc<str>, Rc<Watched>>>,
    by_sid: RefCell<HashMap<u64, Rc<Watched>>>,
    dirty: RefCell<Vec<Rc<Watched>>>,
    wake: Notify,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").finish_non_exhaustive()
    }
}

/// A user who watches.
struct Watched {
    user: Arc<str>,
    sid: u64,
    sessions: RefCell<Vec<Weak<Session>>>,
    rooms: RefCell<HashMap<RoomId, Active>>,
    /// Whether it is in the list of those who have something to be told.
    is_dirty: Cell<bool>,
    /// When its rooms are compared with what is stored.
    due: Cell<Instant>,
    /// When they were compared last, or the watch began; in ms since 1970.
    compared_at: Cell<u64>,
}

/// A room in which something has happened.
#[derive(Debug, Default)]
struct Active {
    /// `None` if it must be read, or if the user is not in the room.
    summary: Option<RoomSummary>,
    /// The head of the room when the summary was read.
    read_at: Option<Cursor>,
    /// Whether it must be read.
    is_stale: bool,
    /// Whether the sessions have to be told.
    is_new: bool,
}

/// A session's watch. It ends when it is dropped.
pub struct Watching {
    desk: Rc<Desk>,
    user: Arc<str>,
    session: Weak<Session>,
    _counted: Held,
}

impl std::fmt::Debug for Watching {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watching").finish_non_exhaustive()
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let mut by_user = self.desk.by_user.borrow_mut();
        let Some(watched) = by_user.get(&self.user) else {
            return;
        };
        let mut sessions = watched.sessions.borrow_mut();
        let at = sessions.iter().position(|it| it.ptr_eq(&self.session));
        if let Some(at) = at {
            sessions.swap_remove(at);
        }
        if sessions.is_empty() {
            drop(sessions);
            self.desk.line.unsubscribe(watched.sid);
            self.desk.by_sid.borrow_mut().remove(&watched.sid);
            by_user.remove(&self.user);
        }
    }
}

impl Active {
    /// Takes in a message. Without a summary, or if the message may be of another log, the room has to be read.
    fn message(&mut self, user: &str, last: LastMessage, cursor: &Cursor) {
        let Some(summary) = self.summary.as_mut().filter(|_| !self.is_stale) else {
            self.is_stale = true;
            return;
        };
        let Some(position) = cursor.positions().first() else {
            return;
        };
        let known = summary
            .head
            .as_ref()
            .and_then(|head| head.get(&position.origin));
        match known {
            Some(known) if known.epoch != position.epoch => {
                self.is_stale = true;
                return;
            }
            Some(known) if known.seq >= position.seq => {
                // It was counted when the summary was read, or comes late: signals have no order.
                let read = self
                    .read_at
                    .as_ref()
                    .and_then(|read| read.get(&position.origin));
                self.is_stale |= read.is_none_or(|read| read.seq < position.seq);
                return;
            }
            Some(_) => {}
            None if summary.head.is_some() => {
                // The first message of another region: what else is there is not known.
                self.is_stale = true;
                return;
            }
            None => {}
        }
        let head = match &summary.head {
            Some(head) => head.merge(cursor, |_, _| true),
            None => cursor.clone(),
        };
        let only_origin = head.positions().len() == 1;
        summary.head = Some(head);
        if last.from == user {
            // Sending moves the sender's marker. What is unread of other regions stays so.
            if only_origin {
                (summary.unread, summary.capped) = (0, false);
                summary.marker = Some(cursor.clone());
            } else if summary.unread > 0 {
                self.is_stale = true;
            }
        } else if !summary.capped {
            summary.unread += 1;
        }
        if summary
            .last
            .as_ref()
            .is_none_or(|known| known.ts <= last.ts)
        {
            summary.last = Some(last);
        }
        self.is_new = true;
    }

    /// Takes in that the user has read.
    fn read(&mut self, marker: Cursor) {
        let Some(summary) = self.summary.as_mut().filter(|_| !self.is_stale) else {
            self.is_stale = true;
            return;
        };
        let covers = |head: &Cursor| {
            head.positions().iter().all(|at| {
                let marked = marker.get(&at.origin);
                marked.is_some_and(|marked| marked.epoch == at.epoch && marked.seq >= at.seq)
            })
        };
        if summary.head.as_ref().is_some_and(covers) {
            (summary.unread, summary.capped) = (0, false);
            summary.marker = Some(marker);
            self.is_new = true;
        } else {
            self.is_stale = true;
        }
    }
}

impl Desk {
    /// The desk of a shard whose line for live messages is `line`.
    #[must_use]
    pub fn new(
        line: Line,
        subjects: Subjects,
        people: Arc<People>,
        markers: Arc<Markers>,
    ) -> Rc<Self> {
        Rc::new(Self {
            line,
            subjects,
            people,
            markers,
            by_user: RefCell::default(),
            by_sid: RefCell::default(),
            dirty: RefCell::default(),
            wake: Notify::new(),
        })
    }

    /// Begins to tell a session what happens in the rooms of its user. The subscription is made when this returns; the
    /// caller reads what is there after that.
    pub(super) async fn watch(self: &Rc<Self>, session: &Rc<Session>, user: &Arc<str>) -> Watching {
        let existing = self.by_user.borrow().get(user).cloned();
        let watched = match existing {
            Some(watched) => watched,
            None => {
                let sid = self.line.new_sid();
                let watched = Rc::new(Watched {
                    user: Arc::clone(user),
                    sid,
                    sessions: RefCell::default(),
                    rooms: RefCell::default(),
                    is_dirty: Cell::new(false),
                    due: Cell::new(Instant::now() + FIRST_RESYNC),
                    compared_at: Cell::new(unix_ms()),
                });
                self.by_sid.borrow_mut().insert(sid, Rc::clone(&watched));
                self.by_user
                    .borrow_mut()
                    .insert(Arc::clone(user), Rc::clone(&watched));
                self.line.subscribe(&self.subjects.signals(user), sid);
                watched
            }
        };
        watched.sessions.borrow_mut().push(Rc::downgrade(session));
        let watching = Watching {
            desk: Rc::clone(self),
            user: Arc::clone(user),
            session: Rc::downgrade(session),
            _counted: Held::new(Gauge::Watching),
        };
        // If the line is down, the subscription is made when it is up again, and the rooms are compared then.
        let _down = self.line.round_trip().await;
        watching
    }

    /// What arrives over the line goes here first, and to `rooms` if it is not for the desk.
    pub fn listener<L: Listener>(self: &Rc<Self>, rooms: L) -> impl Listener + use<L> {
        Ear {
            desk: Rc::clone(self),
            rooms,
        }
    }

    fn arrived(&self, watched: &Rc<Watched>, arrival: &Arrival) {
        count(Counter::SignalReceived, 1);
        let Some(Signal { room, what }) = Signal::parse(&arrival.payload()) else {
            return;
        };
        let mut rooms = watched.rooms.borrow_mut();
        if rooms.len() >= MAX_KEPT && !rooms.contains_key(&room) {
            rooms.retain(|_, active| active.is_stale || active.is_new);
        }
        let active = rooms.entry(room).or_default();
        match what {
            News::Message { last, cursor } => active.message(&watched.user, last, &cursor),
            News::Read(marker) => active.read(marker),
            News::Changed {} => active.is_stale = true,
        }
        if active.is_stale || active.is_new {
            self.mark(watched);
        }
    }

    fn mark(&self, watched: &Rc<Watched>) {
        if !watched.is_dirty.replace(true) {
            self.dirty.borrow_mut().push(Rc::clone(watched));
            self.wake.notify_one();
        }
    }

    /// Tells the sessions what is new, forever.
    pub async fn run(self: Rc<Self>) {
        let telling = async {
            loop {
                self.wake.notified().await;
                // What comes meanwhile is told together.
                sleep(INTERVAL).await;
                let dirty = self.dirty.take();
                for watched in dirty {
                    watched.is_dirty.set(false);
                    if !watched.sessions.borrow().is_empty() {
                        self.tell(&watched).await;
                    }
                }
            }
        };
        let comparing = async {
            let mut tick = interval(TICK);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                let now = Instant::now();
                let due: Vec<_> = {
                    let by_user = self.by_user.borrow();
                    by_user
                        .values()
                        .filter(|it| it.due.get() <= now)
                        .cloned()
                        .collect()
                };
                for watched in due {
                    let again = RESYNC.mul_f64(rand::random_range(0.8..1.2));
                    watched.due.set(now + again);
                    self.compare(&watched).await;
                }
            }
        };
        tokio::join!(telling, comparing);
    }

    /// The sessions of a user that watch, and have not ended.
    fn sessions(watched: &Watched) -> Vec<Rc<Session>> {
        let sessions = watched.sessions.borrow();
        sessions.iter().filter_map(Weak::upgrade).collect()
    }

    /// Reads what has to be read, and tells the sessions of a user what is new.
    async fn tell(&self, watched: &Rc<Watched>) {
        let stale: Vec<RoomId> = {
            let mut rooms = watched.rooms.borrow_mut();
            let stale = rooms.iter_mut().filter(|(_, active)| active.is_stale);
            stale.map(|(room, _)| room.clone()).collect()
        };
        let sessions = Self::sessions(watched);
        if !stale.is_empty()
            && let Some(identity) = sessions.iter().find_map(|session| session.who())
        {
            let read = self
                .people
                .summaries(&self.markers, &identity, &stale)
                .await;
            let mut rooms = watched.rooms.borrow_mut();
            match read {
                Ok(mut read) => {
                    for room in stale {
                        let Some(active) = rooms.get_mut(&room) else {
                            continue;
                        };
                        let summary = read.remove(&room);
                        // A room in which messages come all the time is read again with the next ones.
                        let is_exact = summary.as_ref().is_none_or(|(_, exact)| *exact);
                        active.summary = summary.map(|(summary, _)| summary);
                        let read = active.summary.as_ref();
                        active.read_at = read.and_then(|summary| summary.head.clone());
                        active.is_stale = !is_exact;
                        active.is_new = true;
                    }
                }
                Err(refused) => {
                    tracing::debug!(%refused, "what is new in rooms can't be read");
                }
            }
            if rooms.values().any(|active| active.is_stale) {
                self.mark(watched);
            }
        }
        let (mut news, mut gone) = (Vec::new(), Vec::new());
        watched.rooms.borrow_mut().retain(|room, active| {
            if std::mem::take(&mut active.is_new) {
                match &active.summary {
                    Some(summary) => news.push(summary.clone()),
                    None => gone.push(room.clone()),
                }
            }
            active.summary.is_some() || active.is_stale
        });
        for session in sessions {
            session.tell_inbox(&news, &gone);
        }
    }

    /// Compares what the sessions of a user were told with what is stored.
    async fn compare(&self, watched: &Rc<Watched>) {
        let sessions = Self::sessions(watched);
        let Some(identity) = sessions.iter().find_map(|session| session.who()) else {
            return;
        };
        let Ok(page) = InboxOf::new(None, None, false) else {
            return;
        };
        match self.people.inbox(&self.markers, &identity, &page).await {
            Ok(inbox) => {
                let since = watched.compared_at.replace(unix_ms());
                let since = since.saturating_sub(CLOCKS_MS);
                let mut rooms = watched.rooms.borrow_mut();
                let mut differs = false;
                for summary in inbox.rooms {
                    let told = rooms.get(&summary.room).and_then(|it| it.summary.as_ref());
                    let same = match told {
                        Some(told) => (&told.head, told.unread) == (&summary.head, summary.unread),
                        // Nothing was told of it, and there was nothing to tell.
                        None => summary.last.as_ref().is_none_or(|last| last.ts < since),
                    };
                    if !same {
                        differs = true;
                        rooms.entry(summary.room).or_default().is_stale = true;
                    }
                }
                drop(rooms);
                if differs {
                    self.mark(watched);
                }
            }
            Err(refused) => {
                tracing::debug!(%refused, "the rooms of a user can't be compared");
                watched.due.set(Instant::now() + FIRST_RESYNC);
            }
        }
    }
}

impl Session {
    /// Is told what happens in the user's rooms, from the reply on.
    pub(super) async fn watch(self: &Rc<Self>, identity: &Identity) -> Answered {
        if identity.is_anonymous {
            let text = "users without a token are in no rooms";
            return Err(Refused::new(ErrorCode::BadRequest, text));
        }
        let context = &self.context;
        if self.watching.borrow().is_none() {
            // Before the rooms are read, so that nothing is missed in between.
            let watching = context.desk.watch(self, &identity.user).await;
            *self.watching.borrow_mut() = Some(Box::new(watching));
        }
        let page = InboxOf::new(None, None, false)?;
        let inbox = context
            .people
            .inbox(&context.markers, identity, &page)
            .await;
        if inbox.is_err() {
            self.watching.borrow_mut().take();
        }
        now(Reply::Watching(WatchReply {
            watch: WATCH,
            inbox: inbox?,
        }))
    }

    /// The user, if the session is open.
    fn who(&self) -> Option<Arc<Identity>> {
        self.identity.borrow().clone()
    }

    /// Tells the client what is new in rooms that it watches.
    fn tell_inbox(&self, news: &[RoomSummary], gone: &[RoomId]) {
        let Some(identity) = self.who() else { return };
        let may = |room: &RoomId| identity.may(Right::Read, room);
        let rooms: Vec<_> = news.iter().filter(|it| may(&it.room)).cloned().collect();
        let gone: Vec<_> = gone.iter().filter(|room| may(room)).cloned().collect();
        if rooms.is_empty() && gone.is_empty() {
            return;
        }
        count(Counter::SummaryDelivered, rooms.len() as u64);
        self.push(&Event::Inbox {
            watch: WATCH,
            rooms,
            gone,
        });
    }
}

/// Listens for the desk and for the rooms of a shard.
struct Ear<L> {
    desk: Rc<Desk>,
    rooms: L,
}

impl<L: Listener> Listener for Ear<L> {
    fn up(&mut self) {
        for watched in self.desk.by_user.borrow().values() {
            let subject = self.desk.subjects.signals(&watched.user);
            self.desk.line.subscribe(&subject, watched.sid);
            // Signals may be lost that were sent meanwhile.
            let soon = FIRST_RESYNC.mul_f64(rand::random_range(0.3..1.0));
            watched.due.set(Instant::now() + soon);
        }
        self.rooms.up();
    }

    fn arrived(&mut self, arrival: Arrival) {
        let watched = self.desk.by_sid.borrow().get(&arrival.sid()).cloned();
        match watched {
            Some(watched) => self.desk.arrived(&watched, &arrival),
            None => self.rooms.arrived(arrival),
        }
    }

    fn turn(&mut self) {
        self.rooms.turn();
    }
}
