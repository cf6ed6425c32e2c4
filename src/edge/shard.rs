//! A shard: one thread with its own NATS connections, rooms and sessions.
//!
//! A shard ends the process if a part of it has failed (a task panicked, a NATS connection ended for good) or if it
//! hangs. Its tasks share their state, so after a failure nobody can know which part of the state is still valid.
//! Clients resume on another edge with their cursors. Before the end, sessions are told to reconnect, as far as the
//! shard is still able to.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::TcpStream,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::{
    runtime::{Builder, LocalOptions},
    sync::{broadcast::error::RecvError, mpsc, oneshot},
    task::{JoinHandle, spawn_local},
    time::{MissedTickBehavior, interval, sleep, timeout, timeout_at},
};

use tracing::Instrument as _;

use super::{EdgeError, Shared};
use crate::{
    bus::{ConnectError, Connection, Line, Origins, Publisher, Reader},
    codec::{Codec, Names, PerCodec},
    config::Config,
    history,
    model::{Cursor, RoomId, partition_of},
    people::{People, RecordChange},
    presence::{Presence, Push},
    protocol::{Close, Order, PollReply, Refused},
    read_marker::Markers,
    room::Rooms,
    runtime::{Tasks, on_panic},
    session::{Carried, Context, Departure, Desk, Home, Poll, Session, UserSlot},
    subject::Subjects,
    telemetry::metrics::{Admission, Counter, Gauge, count, gauge_add},
    wire::{Conn, ConnSettings},
};

/// Capacity of a shard's queues of new connections and of questions. If one is full, a handover waits for up to
/// [`TAKE_WITHIN`].
const WAITING: usize = 1024;

/// How often a shard checks its sessions, and how often the shards are checked.
const TICK: Duration = Duration::from_secs(1);

/// Checks in a row without a tick of a shard, after which it gets no more connections and the edge is not ready.
const SILENT: u32 = 5;

/// Checks in a row without a tick of a shard, after which the edge ends. Checks are counted instead of measuring time,
/// since the whole process may have been stopped.
const HUNG: u32 = 30;

/// How long after the deadline of a drain a shard may take to report how many sessions are left.
const ANSWER_WITHIN: Duration = Duration::from_millis(200);

/// How long a shard may take to accept a connection. After that the connection is dropped.
const TAKE_WITHIN: Duration = Duration::from_secs(5);

/// How long the head of a room may take to be read.
const HEAD_WITHIN: Duration = Duration::from_secs(4);

/// A connection on its way to a shard.
#[derive(Debug)]
pub(super) struct NewSession {
    pub(super) stream: TcpStream,
    /// What the client sent right after its handshake.
    pub(super) first: Bytes,
    /// Set for a connection that is accepted only to be closed with this reason.
    pub(super) close: Option<Close>,
    /// The state of its session.
    pub(super) carried: Carried,
}

/// What a shard is given.
#[derive(Debug)]
pub(super) enum Arrival {
    /// A connection.
    Session(Box<NewSession>),
    /// A poll, and where its answer goes.
    Poll(Box<Poll>, oneshot::Sender<Result<PollReply, Refused>>),
}

/// The queue of what a shard is given.
pub(super) type ToShard = mpsc::Sender<Arrival>;

/// All shards of an edge.
#[derive(Debug)]
pub(super) struct Shards {
    shards: Vec<Handle>,
    neighbours: Arc<[Neighbour]>,
    turn: AtomicUsize,
}

#[derive(Debug)]
struct Handle {
    drain: mpsc::Sender<Drain>,
    asks: mpsc::Sender<Ask>,
    live: Line,
    replay: Connection,
}

/// What a shard is asked for, and where it answers.
#[derive(Debug)]
enum Ask {
    /// To give an order to the sessions of a user. The answer is the number of those that had something to do.
    Order(Arc<Order>, oneshot::Sender<usize>),
    /// For the head of a durable room, `None` if it can't be read now.
    Head(RoomId, oneshot::Sender<Option<Cursor>>),
}

/// The order to drain.
#[derive(Debug)]
struct Drain {
    spread: Duration,
    deadline: tokio::time::Instant,
    /// Receives the number of sessions that were left.
    done: oneshot::Sender<usize>,
    /// Dropped when the shard's NATS connections are closed.
    _ended: oneshot::Sender<()>,
}

/// The outcome of a drain.
#[derive(Debug, Default)]
pub(super) struct Drained {
    /// Sessions that were left at the deadline.
    pub(super) left: usize,
    /// Shards that had not answered by then.
    pub(super) stuck: Vec<usize>,
    /// For each of the other shards, resolves when its NATS connections are closed.
    pub(super) ends: Vec<oneshot::Receiver<()>>,
}

/// A shard, as the others see it.
#[derive(Debug)]
struct Neighbour {
    sessions: ToShard,
    /// The number of its sessions.
    load: AtomicUsize,
    /// The number of its ticks.
    beats: AtomicU64,
    /// Checks in a row without a new tick.
    silent: AtomicU32,
}

impl Neighbour {
    fn new() -> (Self, mpsc::Receiver<Arrival>) {
        let (sessions, new_sessions) = mpsc::channel(WAITING);
        let neighbour = Self {
            sessions,
            load: AtomicUsize::new(0),
            beats: AtomicU64::new(0),
            silent: AtomicU32::new(0),
        };
        (neighbour, new_sessions)
    }

    fn is_silent(&self) -> bool {
        self.silent.load(Ordering::Relaxed) >= SILENT
    }
}

/// Checks all shards, forever. A shard without ticks is first reported as silent, and later makes the edge fail.
async fn watch(neighbours: Arc<[Neighbour]>, tasks: Tasks) {
    let mut seen = vec![0; neighbours.len()];
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        for (number, (neighbour, seen)) in neighbours.iter().zip(&mut seen).enumerate() {
            let beats = neighbour.beats.load(Ordering::Relaxed);
            if beats != std::mem::replace(seen, beats) {
                neighbour.silent.store(0, Ordering::Relaxed);
                continue;
            }
            match neighbour.silent.fetch_add(1, Ordering::Relaxed) + 1 {
                SILENT => tracing::error!(shard = number, "a shard gives no sign of life"),
                HUNG => tasks.fail(format!("shard {number} stands still")),
                _ => {}
            }
        }
    }
}

/// Reserves a place for a session on the shard of its first room. `None` if the session is there already (`here`), or
/// if that shard is silent, full, or has many more sessions than the others.
fn home(
    neighbours: &[Neighbour],
    here: usize,
    room: &RoomId,
) -> Option<mpsc::OwnedPermit<Arrival>> {
    let (there, neighbour) = of_room(neighbours, room)?;
    let neighbour = Some(neighbour).filter(|_| there != here)?;
    neighbour.sessions.clone().try_reserve_owned().ok()
}

/// The shard of a room and its number. `None` if it is silent or has many more sessions than the others.
fn of_room<'n>(neighbours: &'n [Neighbour], room: &RoomId) -> Option<(usize, &'n Neighbour)> {
    let shards = u16::try_from(neighbours.len()).ok()?;
    let there = usize::from(partition_of(room, shards));
    let load = |neighbour: &Neighbour| neighbour.load.load(Ordering::Relaxed);
    let total: usize = neighbours.iter().map(load).sum();
    let neighbour = neighbours.get(there)?;
    let takes = !neighbour.is_silent() && load(neighbour) <= fair_share(total, neighbours.len());
    takes.then_some((there, neighbour))
}

/// Moves sessions from the shard `here` to the shards of their rooms.
fn way_home(neighbours: Arc<[Neighbour]>, here: usize) -> Home {
    Box::new(move |room| {
        let place = home(&neighbours, here, room)?;
        let go = move |stream, carried| {
            place.send(Arrival::Session(Box::new(NewSession {
                stream,
                first: Bytes::new(),
                close: None,
                carried,
            })));
        };
        Some(Box::new(go) as Departure)
    })
}

/// Number of sessions up to which a shard takes in the sessions of its rooms. So a very large room is spread over
/// shards.
fn fair_share(total: usize, shards: usize) -> usize {
    let mean = total / shards.max(1);
    mean + mean / 8 + 16
}

/// What all shards share.
struct Common {
    neighbours: Arc<[Neighbour]>,
    shared: Arc<Shared>,
    origins: Arc<Origins>,
    presence: Arc<Presence>,
    markers: Arc<Markers>,
    people: Arc<People>,
    history: Arc<history::Client>,
    part: Part,
}

/// The number of a shard, and where it reports that it can't go on.
#[derive(Debug, Clone)]
struct Part {
    number: usize,
    tasks: Tasks,
}

impl Part {
    /// Runs a task that the shard can't do without.
    fn keep_running<T>(
        &self,
        what: &'static str,
        task: impl Future<Output = T> + 'static,
    ) -> JoinHandle<()> {
        let part = self.clone();
        spawn_local(async move {
            task.await;
            part.fail(&format!("{what} ended"));
        })
    }

    fn fail(&self, what: &str) {
        self.tasks.fail(format!("shard {}: {what}", self.number));
    }
}

/// Starts the thread of a shard, which runs the future that `run` makes. The thread ends with the future and is not
/// joined.
fn start_thread<F: Future<Output = ()>>(
    part: Part,
    run: impl FnOnce() -> F + Send + 'static,
) -> io::Result<()> {
    let thread = thread::Builder::new().name(format!("shard-{}", part.number));
    let body = move || {
        let told = part.clone();
        on_panic(move || told.fail("it panicked"));
        match Builder::new_current_thread()
            .enable_all()
            .build_local(LocalOptions::default())
        {
            Ok(runtime) => runtime.block_on(run()),
            Err(error) => part.fail(&format!("it has no runtime: {error}")),
        }
    };
    thread.spawn(body).map(drop)
}

impl Shards {
    /// The number of shards.
    pub(super) fn count(config: &Config) -> usize {
        config.shards()
    }

    /// Starts the threads, one for each of `pushes`, and waits until each has its connections. `tasks` fail if a shard
    /// can't go on later.
    pub(super) async fn start(
        tasks: &Tasks,
        shared: &Arc<Shared>,
        origins: &Arc<Origins>,
        (presence, pushes): (&Arc<Presence>, Vec<mpsc::Receiver<Push>>),
        (markers, people): (&Arc<Markers>, &Arc<People>),
        history: &Arc<history::Client>,
    ) -> Result<Self, EdgeError> {
        let mut shards = Vec::new();
        let (ways, arrivals): (Vec<_>, Vec<_>) = pushes.iter().map(|_| Neighbour::new()).unzip();
        let neighbours: Arc<[Neighbour]> = ways.into();
        for (number, (pushes, new)) in pushes.into_iter().zip(arrivals).enumerate() {
            let (drain, drains) = mpsc::channel(1);
            let (asks, asked) = mpsc::channel(WAITING);
            let (started, start) = oneshot::channel();
            let common = Common {
                neighbours: Arc::clone(&neighbours),
                shared: Arc::clone(shared),
                origins: Arc::clone(origins),
                presence: Arc::clone(presence),
                markers: Arc::clone(markers),
                people: Arc::clone(people),
                history: Arc::clone(history),
                part: Part {
                    number,
                    tasks: tasks.clone(),
                },
            };
            start_thread(common.part.clone(), move || {
                run(common, pushes, (new, asked), drains, started)
            })
            .map_err(EdgeError::Shard)?;
            let ended = |_dropped| EdgeError::Shard(io::Error::other("the thread ended"));
            let (live, replay) = start.await.map_err(ended)??;
            shards.push(Handle {
                drain,
                asks,
                live,
                replay,
            });
        }
        tasks.keep_running(
            "watch shards",
            watch(Arc::clone(&neighbours), tasks.clone()),
        );
        Ok(Self {
            shards,
            neighbours,
            turn: AtomicUsize::new(0),
        })
    }

    /// The shard for the next connection: in turn, without the silent ones.
    pub(super) fn next(&self) -> ToShard {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.neighbours.len();
        let mut from_here = self.neighbours.iter().cycle().skip(turn);
        let living = from_here
            .by_ref()
            .take(self.neighbours.len())
            .find(|neighbour| !neighbour.is_silent());
        let chosen = living.unwrap_or(&self.neighbours[turn]);
        chosen.sessions.clone()
    }

    /// The shard for a session or poll whose first room this is.
    pub(super) fn of_room(&self, room: &RoomId) -> ToShard {
        match of_room(&self.neighbours, room) {
            Some((_, neighbour)) => neighbour.sessions.clone(),
            None => self.next(),
        }
    }

    /// The reason why clients can't be served now, if a shard can't serve them.
    pub(super) fn trouble(&self) -> Option<String> {
        let silent = self.neighbours.iter().position(Neighbour::is_silent);
        if let Some(number) = silent {
            return Some(format!("shard {number} gives no sign of life"));
        }
        let up = |shard: &Handle| shard.live.is_up() && shard.replay.is_up();
        (!self.shards.iter().all(up)).then(|| "NATS is away".to_owned())
    }

    /// Gives an order to all shards. Each will answer with the number of its sessions that had something to do.
    pub(super) async fn order(&self, order: &Arc<Order>) -> Vec<oneshot::Receiver<usize>> {
        let mut waits = Vec::with_capacity(self.shards.len());
        for shard in &self.shards {
            let (done, wait) = oneshot::channel();
            let ask = Ask::Order(Arc::clone(order), done);
            // A shard that does not take it has ended, or is about to be ended.
            if shard.asks.send_timeout(ask, TAKE_WITHIN).await.is_ok() {
                waits.push(wait);
            }
        }
        waits
    }

    /// The head of a durable room; `None` if it can't be read now. Its own shard is asked, which may know it.
    pub(super) async fn head(&self, room: &RoomId) -> Option<Cursor> {
        let shards = u16::try_from(self.shards.len()).ok()?;
        let shard = self.shards.get(usize::from(partition_of(room, shards)))?;
        let (answer, head) = oneshot::channel();
        let ask = Ask::Head(room.clone(), answer);
        shard.asks.send_timeout(ask, TAKE_WITHIN).await.ok()?;
        head.await.ok().flatten()
    }

    /// Drains all shards. Does not wait for a shard that has not answered [`ANSWER_WITHIN`] after the deadline.
    pub(super) async fn drain(&self, spread: Duration, deadline: tokio::time::Instant) -> Drained {
        let mut drained = Drained::default();
        let mut waits = Vec::new();
        for (number, shard) in self.shards.iter().enumerate() {
            let (done, wait) = oneshot::channel();
            let (_ended, end) = oneshot::channel();
            let drain = Drain {
                spread,
                deadline,
                done,
                _ended,
            };
            // The channel has capacity for the only order that a shard gets. If sending fails, the shard has ended and
            // has no sessions.
            if shard.drain.try_send(drain).is_ok() {
                waits.push((number, wait, end));
            }
        }
        for (number, wait, end) in waits {
            match timeout_at(deadline + ANSWER_WITHIN, wait).await {
                Ok(left) => {
                    drained.left += left.unwrap_or(0);
                    drained.ends.push(end);
                }
                Err(_elapsed) => drained.stuck.push(number),
            }
        }
        drained
    }
}

/// Hands the connection of a new session over to a shard, and counts it if the shard does not accept it.
pub(super) async fn hand_over_connection(
    shard: ToShard,
    stream: tokio::net::TcpStream,
    (first, close, carried): (Bytes, Option<Close>, Carried),
) {
    let stream = match stream.into_std() {
        Ok(stream) => stream,
        Err(error) => return tracing::debug!(%error, "a connection was lost"),
    };
    let session = Box::new(NewSession {
        stream,
        first,
        close,
        carried,
    });
    if !hand_over(shard, Arrival::Session(session)).await {
        count(Counter::SessionRefused(Admission::Draining), 1);
    }
}

/// Hands something over to a shard. Returns whether the shard has accepted it. If not, the shard is draining or
/// hangs. It is then dropped, which closes a connection.
pub(super) async fn hand_over(shard: ToShard, arrival: Arrival) -> bool {
    shard.send_timeout(arrival, TAKE_WITHIN).await.is_ok()
}

/// What a shard owns.
struct Shard {
    context: Rc<Context>,
    /// For connections of the default protocol.
    settings: ConnSettings,
    settings_of: PerCodec<Rc<ConnSettings>>,
    sessions: RefCell<HashMap<u64, Rc<Session>>>,
    number: u64,
    made: Cell<u64>,
    neighbours: Arc<[Neighbour]>,
    /// Bytes in all outboxes at the last tick.
    queued: Cell<i64>,
}

/// The connections of a shard that has started.
type Started = Result<(Line, Connection), EdgeError>;

async fn run(
    common: Common,
    mut pushes: mpsc::Receiver<Push>,
    (mut arrivals, mut asks): (mpsc::Receiver<Arrival>, mpsc::Receiver<Ask>),
    mut drains: mpsc::Receiver<Drain>,
    started: oneshot::Sender<Started>,
) {
    let part = common.part.clone();
    let config = &common.shared.config;
    Names::Centrifugal.set_default(&config.centrifugal.default_namespace);
    Names::Stomp.set_default(&config.stomp.default_namespace);
    let (shard, live, replay) = match Shard::open(common).await {
        Ok(parts) => parts,
        Err(error) => {
            let _stopping = started.send(Err(error.into()));
            return;
        }
    };
    let keeper = part.keep_running(
        "looking after rooms",
        Rc::clone(&shard.context.rooms).keep(),
    );
    let rooms = Rc::clone(&shard.context.rooms);
    let pusher = part.keep_running("pushing presence", async move {
        while let Some(Push { room, events }) = pushes.recv().await {
            rooms.push_presence(&room, &events).await;
        }
    });
    if started.send(Ok((live.clone(), replay.clone()))).is_err() {
        return;
    }
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut changed_records = shard.context.people.changes();
    let mut revoked = shard.context.verifier.revocations().changes();
    let drain = loop {
        tokio::select! {
            // All branches are cancel-safe.
            Some(arrival) = arrivals.recv() => shard.take(arrival),
            Some(ask) = asks.recv() => {
                // An order is for the sessions that are on their way here, too.
                while let Ok(arrival) = arrivals.try_recv() {
                    shard.take(arrival);
                }
                shard.on_ask(ask);
            }
            _ = tick.tick() => shard.tick(),
            changed = changed_records.recv() => shard.on_record(changed),
            // Revoked sessions are closed without waiting for the tick. The sender lives as long as the verifier.
            Ok(()) = revoked.changed() => shard.close_revoked(),
            drain = drains.recv() => break drain,
        }
    };
    if let Some(Drain {
        spread,
        deadline,
        done,
        _ended,
    }) = drain
    {
        arrivals.close();
        while let Some(late) = arrivals.recv().await {
            shard.take(late);
        }
        let left = shard.drain(spread, deadline).await;
        // The edge may have stopped waiting.
        let _gave_up = done.send(left);
        shard.context.rooms.end();
        tokio::join!(live.close(), replay.close());
    }
    keeper.abort();
    pusher.abort();
}

impl Shard {
    async fn open(common: Common) -> Result<(Rc<Self>, Line, Connection), ConnectError> {
        let Common {
            neighbours,
            shared,
            origins,
            presence,
            markers,
            people,
            history,
            part,
        } = common;
        let number = part.number;
        let config = Arc::clone(&shared.config);
        let name = |what: &str| format!("natter edge {} shard {number} {what}", shared.id);
        let (live, driver) = Line::new(&config.nats, &name("live"))?;
        let replay = Connection::open(&config.nats, &name("replay")).await?;
        let subjects = Subjects::new(&config.nats.prefix);
        replay.round_trip(&subjects.nobody()).await;
        let reader = Reader::new(replay.clone(), &config.nats);
        let rooms = Rooms::new(
            live.clone(),
            reader.clone(),
            Arc::clone(&origins),
            subjects,
            &config,
            Arc::clone(&markers),
        );
        let ending = replay.clone();
        part.keep_running("its NATS connection for replay", async move {
            ending.ended().await
        });
        let publisher = Publisher::new(
            live.clone(),
            reader,
            Arc::clone(origins.own()),
            Arc::clone(&shared.remembered),
            &config.nats,
            &shared.id,
        );
        let admission = Arc::clone(&shared.admission);
        let of_logins = Arc::clone(&shared.admission);
        let settings = ConnSettings {
            close_frame: Codec::default().close_frame(),
            outbox_bytes: usize::try_from(config.limits.outbox.as_u64()).unwrap_or(usize::MAX),
            stall: config.limits.outbox_stall,
        };
        let desk = Desk::new(
            live.clone(),
            Subjects::new(&config.nats.prefix),
            Arc::clone(&origins),
            Arc::clone(&people),
            Arc::clone(&markers),
        );
        part.keep_running("telling those who watch", Rc::clone(&desk).run());
        part.keep_running(
            "its NATS connection for live messages",
            driver.run(desk.listener(rooms.listener())),
        );
        live.ready().await;
        let context = Context {
            desk,
            rooms,
            publisher,
            markers,
            presence,
            people,
            history,
            shard: number,
            verifier: Arc::clone(&shared.verifier),
            config,
            buffer: RefCell::default(),
            admit_user: Box::new(move |user| {
                admission.user(user).map(|slot| Box::new(slot) as UserSlot)
            }),
            bad_login: Box::new(move |address| of_logins.bad_login(address, Instant::now())),
            home: way_home(Arc::clone(&neighbours), number),
        };
        let shard = Rc::new(Self {
            context: Rc::new(context),
            settings,
            settings_of: PerCodec::default(),
            sessions: RefCell::default(),
            number: number as u64,
            made: Cell::new(0),
            neighbours,
            queued: Cell::new(0),
        });
        Ok((shard, live, replay))
    }

    fn take(self: &Rc<Self>, arrival: Arrival) {
        match arrival {
            Arrival::Session(new) => self.open_session(*new),
            Arrival::Poll(poll, mut answer) => {
                let context = Rc::clone(&self.context);
                spawn_local(async move {
                    tokio::select! {
                        answered = context.poll(*poll) => {
                            // The one who asked may have gone just now.
                            let _gone = answer.send(answered);
                        }
                        () = answer.closed() => {}
                    }
                });
            }
        }
    }

    fn open_session(self: &Rc<Self>, new: NewSession) {
        let stream = match tokio::net::TcpStream::from_std(new.stream) {
            Ok(stream) => stream,
            Err(error) => return tracing::debug!(%error, "a connection was lost"),
        };
        let codec = new.carried.codec();
        let settings = || {
            Rc::new(ConnSettings {
                close_frame: codec.close_frame(),
                ..self.settings
            })
        };
        let conn = Conn::new(stream, Rc::clone(self.settings_of.get(codec, settings)));
        if let Some(close) = new.close {
            spawn_local(async move {
                conn.close(close);
                conn.closed().await;
            });
            return;
        }
        let id = (self.number << 48) | self.made.replace(self.made.get() + 1);
        let (session, work) = Session::new(id, Rc::clone(&self.context), conn, new.carried);
        self.sessions.borrow_mut().insert(id, Rc::clone(&session));
        self.load().fetch_add(1, Ordering::Relaxed);
        let shard = Rc::clone(self);
        // A copy, usually of nothing: `first` is a slice of the buffer of the whole handshake, which should be freed.
        let first = new.first.to_vec();
        spawn_local(async move {
            let span = tracing::debug_span!("session", session.id = id);
            session.run(work, first).instrument(span).await;
            shard.sessions.borrow_mut().remove(&id);
            shard.load().fetch_sub(1, Ordering::Relaxed);
        });
    }

    fn load(&self) -> &AtomicUsize {
        &self.here().load
    }

    /// This shard, as the others see it.
    fn here(&self) -> &Neighbour {
        // There are as many neighbours as shards.
        &self.neighbours[usize::try_from(self.number).unwrap_or_default()]
    }

    fn tick(&self) {
        self.here().beats.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        let mut queued = 0;
        for session in self.sessions.borrow().values() {
            session.tick(now);
            queued += session.queued_bytes();
        }
        let queued = i64::try_from(queued).unwrap_or(i64::MAX);
        gauge_add(Gauge::OutboxBytes, queued - self.queued.replace(queued));
    }

    /// Lets a change of a room's record act on the sessions that are in it.
    fn on_record(&self, changed: Result<RecordChange, RecvError>) {
        let sessions = self.sessions.borrow();
        match &changed {
            Ok(RecordChange { room, record }) => {
                self.context.desk.on_record(room, record.as_deref());
            }
            Err(_lagged) => self.context.desk.on_missed(),
        }
        match changed {
            Ok(RecordChange { room, .. }) if self.context.rooms.is_open(&room) => {
                sessions
                    .values()
                    .for_each(|session| session.on_record(&room));
            }
            Ok(_) => {}
            // There were too many changes at once.
            Err(_lagged) => sessions.values().for_each(Session::judge_rooms),
        }
    }

    /// Closes the sessions whose tokens are revoked.
    fn close_revoked(&self) {
        for session in self.sessions.borrow().values() {
            session.close_if_revoked();
        }
    }

    /// Answers in the background.
    fn on_ask(&self, ask: Ask) {
        match ask {
            Ask::Order(order, done) => {
                let sessions = self.sessions.borrow();
                let of_user = sessions.values().filter(|it| it.is_of(&order.user));
                let of_user: Vec<_> = of_user.cloned().collect();
                spawn_local(async move {
                    let all = of_user.into_iter().map(|it| it.follow(&order.what));
                    let obeyed = join_all(all).await;
                    let count = obeyed.into_iter().filter(|obeyed| *obeyed).count();
                    // The edge may have stopped waiting.
                    let _gave_up = done.send(count);
                });
            }
            Ask::Head(room, answer) => {
                let rooms = Rc::clone(&self.context.rooms);
                spawn_local(async move {
                    let head = timeout(HEAD_WITHIN, rooms.head(&room)).await;
                    let _gave_up = answer.send(head.ok().flatten());
                });
            }
        }
    }

    /// Tells the sessions to reconnect elsewhere, spread over time, and waits until they are gone. Returns how many are
    /// left at the deadline.
    async fn drain(self: &Rc<Self>, spread: Duration, deadline: tokio::time::Instant) -> usize {
        let sessions: Vec<Rc<Session>> = self.sessions.borrow().values().cloned().collect();
        for session in sessions {
            let wait = spread.mul_f64(rand::random_range(0.0..1.0));
            spawn_local(async move {
                sleep(wait).await;
                session.drain().await;
            });
        }
        let gone = async {
            let mut look = interval(Duration::from_millis(10));
            while !self.sessions.borrow().is_empty() {
                look.tick().await;
                self.tick();
            }
        };
        // What is left at the deadline is counted below.
        let _in_time = timeout_at(deadline, gone).await;
        self.sessions.borrow().len()
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;
    use figment::providers::{Format as _, Toml};

    const LONG: Duration = Duration::from_secs(60);

    /// The reason with which the tasks fail if a shard does this.
    async fn why<F: Future<Output = ()>>(run: impl FnOnce(Part) -> F + Send + 'static) -> String {
        let tasks = Tasks::default();
        let part = Part {
            number: 3,
            tasks: tasks.clone(),
        };
        let its = part.clone();
        start_thread(part, move || run(its)).unwrap();
        timeout(LONG, tasks.failed())
            .await
            .expect("nobody misses it")
    }

    #[tokio::test]
    async fn a_shard_that_has_lost_a_part_of_itself_is_told_of() {
        let panicked = "shard 3: it panicked";
        let itself = why(|_| async { panic!("on purpose") });
        assert_eq!(itself.await, panicked);
        let task = why(|_| async {
            spawn_local(async { panic!("on purpose") });
            pending().await
        });
        assert_eq!(task.await, panicked);
        let later = why(|_| async {
            spawn_local(async {
                let inner = spawn_local(async { panic!("on purpose") });
                // Code that handles the end of a task can't hide a panic.
                assert!(inner.await.is_err());
                pending::<()>().await;
            });
            pending().await
        });
        assert_eq!(later.await, panicked);
        let line = why(|part| async move {
            let (line, driver) = Line::new(&config().nats, "live").unwrap();
            part.keep_running("its line", driver.run(()));
            line.close().await;
            pending().await
        });
        assert_eq!(line.await, "shard 3: its line ended");
    }

    fn config() -> Config {
        // Nothing listens at this address.
        Config::with_defaults(Toml::string("nats.url = 'nats://127.0.0.1:1'")).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_shard_that_stands_still_gets_no_more_sessions_and_makes_the_edge_fail() {
        let tasks = Tasks::default();
        let (neighbours, _arrivals): (Vec<_>, Vec<_>) = (0..3).map(|_| Neighbour::new()).unzip();
        let neighbours: Arc<[Neighbour]> = neighbours.into();
        tasks.keep_running("watch", watch(Arc::clone(&neighbours), tasks.clone()));
        let beating = Arc::clone(&neighbours);
        tasks.keep_running("beat", async move {
            let mut tick = interval(TICK / 2);
            loop {
                tick.tick().await;
                for living in [0, 2] {
                    beating[living].beats.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let shards = Shards {
            shards: Vec::new(),
            neighbours: Arc::clone(&neighbours),
            turn: AtomicUsize::new(0),
        };
        let chosen = || {
            let next = shards.next();
            let same = |neighbour: &Neighbour| neighbour.sessions.same_channel(&next);
            neighbours.iter().position(same).unwrap()
        };
        assert_eq!([chosen(), chosen(), chosen()], [0, 1, 2]);
        assert_eq!(shards.trouble(), None);
        sleep(TICK * (SILENT + 2)).await;
        assert_eq!([chosen(), chosen(), chosen()], [0, 2, 2]);
        assert_eq!(shards.trouble().unwrap(), "shard 1 gives no sign of life");
        // The shard ticks again.
        neighbours[1].beats.fetch_add(1, Ordering::Relaxed);
        sleep(TICK * 2).await;
        assert_eq!(shards.trouble(), None);
        let failed = timeout(TICK * (HUNG - 5), tasks.failed()).await;
        assert!(failed.is_err(), "{failed:?}");
        let failed = timeout(TICK * 10, tasks.failed()).await;
        assert_eq!(failed.unwrap(), "shard 1 stands still");
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_waits_for_no_shard_beyond_its_deadline() {
        let config = config();
        let mut handles = Vec::new();
        let mut orders = Vec::new();
        for _ in 0..4 {
            let (drain, drains) = mpsc::channel(1);
            let (asks, _asked) = mpsc::channel(1);
            let (live, _driver) = Line::new(&config.nats, "live").unwrap();
            let replay = Connection::open(&config.nats, "replay").await.unwrap();
            handles.push(Handle {
                drain,
                asks,
                live,
                replay,
            });
            orders.push(drains);
        }
        let shards = Shards {
            shards: handles,
            neighbours: Arc::new([]),
            turn: AtomicUsize::new(0),
        };
        // The first has ended, the second dies when it gets its order, the third answers, and the fourth hangs.
        let _fourth = orders.pop();
        let mut third = orders.pop().unwrap();
        let mut second = orders.pop().unwrap();
        drop(orders);
        tokio::spawn(async move { drop(second.recv().await) });
        tokio::spawn(async move {
            let Drain { done, _ended, .. } = third.recv().await.unwrap();
            done.send(7).unwrap();
        });
        let begun = tokio::time::Instant::now();
        let deadline = begun + Duration::from_secs(5);
        let drained = shards.drain(Duration::ZERO, deadline).await;
        assert_eq!((drained.left, &*drained.stuck), (7, &[3][..]));
        assert!(
            begun.elapsed() <= Duration::from_secs(6),
            "{:?}",
            begun.elapsed()
        );
        for end in drained.ends {
            assert!(end.await.is_err(), "it is told by being dropped");
        }
    }
}
