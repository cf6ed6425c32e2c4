//! A shard: one thread with its own NATS connections, rooms and sessions.
//!
//! A shard that has lost a part of itself (a task panicked, a NATS connection ended for good) or stands still ends the process:
//! what it holds is shared by its tasks, so nobody could say what of it is still right, and its clients resume elsewhere by
//! cursor. Until then its sessions are told to, as far as it still can.

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
use tokio::{
    runtime::Builder,
    sync::{mpsc, oneshot},
    task::{JoinHandle, LocalSet, spawn_local},
    time::{MissedTickBehavior, interval, sleep, timeout_at},
};

use tracing::Instrument as _;

use super::{EdgeError, Shared};
use crate::{
    bus::{ConnectError, Connection, Line, Origins, Publisher, Reader},
    config::Config,
    history,
    model::{RoomId, partition_of},
    presence::{Presence, Push},
    protocol::Close,
    read_marker::Markers,
    room::Rooms,
    runtime::{Tasks, on_panic},
    session::{Carried, Context, Departure, Home, Session, UserSlot},
    subject::Subjects,
    telemetry::metrics::{Gauge, gauge_add},
    wire::{Conn, ConnLimits},
};

/// New connections that wait for a shard; the acceptor waits when it is full.
const WAITING: usize = 1024;

/// How often a shard looks after its sessions, and somebody after the shards.
const TICK: Duration = Duration::from_secs(1);

/// Looks without a sign of life after which a shard gets no more connections, and the edge is not ready.
const SILENT: u32 = 5;

/// Looks without a sign of life after which the edge ends. Counted and not timed: this process may have stood still itself.
const HUNG: u32 = 30;

/// How long after the deadline of a drain a shard may take to say how many sessions are left.
const ANSWER_WITHIN: Duration = Duration::from_millis(200);

/// How long a shard may take to take a connection.
const TAKE_WITHIN: Duration = Duration::from_secs(5);

/// A connection on its way to a shard.
#[derive(Debug)]
pub(super) struct NewSession {
    pub(super) stream: TcpStream,
    /// What the client sent right behind its handshake.
    pub(super) first: Bytes,
    /// Set for a connection that is accepted only to be told why it is not wanted.
    pub(super) close: Option<Close>,
    /// What it has besides.
    pub(super) carried: Carried,
}

/// The way to a shard.
pub(super) type ToShard = mpsc::Sender<NewSession>;

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
    live: Line,
    replay: Connection,
}

/// The order to drain.
#[derive(Debug)]
struct Drain {
    spread: Duration,
    deadline: tokio::time::Instant,
    /// How many sessions were left in the end.
    done: oneshot::Sender<usize>,
    /// Dropped when its connections are closed.
    _ended: oneshot::Sender<()>,
}

/// What became of a drain.
#[derive(Debug, Default)]
pub(super) struct Drained {
    /// Sessions that were left at the deadline.
    pub(super) left: usize,
    /// Shards that had not answered by then.
    pub(super) stuck: Vec<usize>,
    /// Tells when each of the others has closed its connections.
    pub(super) ends: Vec<oneshot::Receiver<()>>,
}

/// A shard, as the others see it.
#[derive(Debug)]
struct Neighbour {
    sessions: ToShard,
    /// How many sessions it has.
    load: AtomicUsize,
    /// Its ticks.
    beats: AtomicU64,
    /// Looks in a row that found no new one.
    silent: AtomicU32,
}

impl Neighbour {
    fn new() -> (Self, mpsc::Receiver<NewSession>) {
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

/// Looks after all shards, for ever: who gives no sign of life is not well, and in the end makes the edge fail.
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

/// Where a session belongs whose first room is `room`, as seen from the shard `here`: its room's shard, unless that has much
/// more to do than the others.
fn home(
    neighbours: &[Neighbour],
    here: usize,
    room: &RoomId,
) -> Option<mpsc::OwnedPermit<NewSession>> {
    let shards = u16::try_from(neighbours.len()).ok()?;
    let there = usize::from(partition_of(room, shards));
    let load = |neighbour: &Neighbour| neighbour.load.load(Ordering::Relaxed);
    let total: usize = neighbours.iter().map(load).sum();
    let neighbour = neighbours.get(there).filter(|_| there != here)?;
    if neighbour.is_silent() || load(neighbour) > fair_share(total, neighbours.len()) {
        return None;
    }
    neighbour.sessions.clone().try_reserve_owned().ok()
}

/// The way of sessions from the shard `here` to where their rooms are.
fn way_home(neighbours: Arc<[Neighbour]>, here: usize) -> Home {
    Box::new(move |room| {
        let place = home(&neighbours, here, room)?;
        let go = move |stream, carried| {
            place.send(NewSession {
                stream,
                first: Bytes::new(),
                close: None,
                carried,
            });
        };
        Some(Box::new(go) as Departure)
    })
}

/// Sessions that a shard may have and still be given those of its rooms: a room that is larger than that is spread.
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
    history: Arc<history::Client>,
    part: Part,
}

/// A shard's own name, and whom it tells when it can't go on.
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

/// Starts the thread of a shard, which does what `run` makes. The thread ends with that; nobody waits for it.
fn start_thread<F: Future<Output = ()>>(
    part: Part,
    run: impl FnOnce() -> F + Send + 'static,
) -> io::Result<()> {
    let thread = thread::Builder::new().name(format!("shard-{}", part.number));
    let body = move || {
        let told = part.clone();
        on_panic(move || told.fail("it panicked"));
        match Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => LocalSet::new().block_on(&runtime, run()),
            Err(error) => part.fail(&format!("it has no runtime: {error}")),
        }
    };
    thread.spawn(body).map(drop)
}

impl Shards {
    /// How many there are.
    pub(super) fn count(config: &Config) -> usize {
        match config.edge.shards {
            0 => thread::available_parallelism().map_or(1, usize::from),
            count => count,
        }
    }

    /// Starts the threads, one for each of `pushes`, and waits until each has its connections. `tasks` fail when a shard can't go on.
    pub(super) async fn start(
        tasks: &Tasks,
        shared: &Arc<Shared>,
        origins: &Arc<Origins>,
        (presence, pushes): (&Arc<Presence>, Vec<mpsc::Receiver<Push>>),
        markers: &Arc<Markers>,
        history: &Arc<history::Client>,
    ) -> Result<Self, EdgeError> {
        let mut shards = Vec::new();
        let (ways, arrivals): (Vec<_>, Vec<_>) = pushes.iter().map(|_| Neighbour::new()).unzip();
        let neighbours: Arc<[Neighbour]> = ways.into();
        for (number, (pushes, new_sessions)) in pushes.into_iter().zip(arrivals).enumerate() {
            let (drain, drains) = mpsc::channel(1);
            let (started, start) = oneshot::channel();
            let common = Common {
                neighbours: Arc::clone(&neighbours),
                shared: Arc::clone(shared),
                origins: Arc::clone(origins),
                presence: Arc::clone(presence),
                markers: Arc::clone(markers),
                history: Arc::clone(history),
                part: Part {
                    number,
                    tasks: tasks.clone(),
                },
            };
            start_thread(common.part.clone(), move || {
                run(common, pushes, new_sessions, drains, started)
            })
            .map_err(EdgeError::Shard)?;
            let ended = |_dropped| EdgeError::Shard(io::Error::other("the thread ended"));
            let (live, replay) = start.await.map_err(ended)??;
            shards.push(Handle {
                drain,
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

    /// The shard for the next connection: in turn, of those that give signs of life.
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

    /// Why clients can't be served now, if a shard can't serve them.
    pub(super) fn trouble(&self) -> Option<String> {
        let silent = self.neighbours.iter().position(Neighbour::is_silent);
        if let Some(number) = silent {
            return Some(format!("shard {number} gives no sign of life"));
        }
        let up = |shard: &Handle| shard.live.is_up() && shard.replay.is_up();
        (!self.shards.iter().all(up)).then(|| "NATS is away".to_owned())
    }

    /// Drains all shards. A shard that has not answered by the deadline is left alone.
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
            // There is room for the one order that it ever gets. A shard that has ended has no sessions.
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

/// Hands a connection over to a shard. A shard that is gone is draining, and one that does not take it stands still: the
/// connection is closed by being dropped, as for any client that comes late.
pub(super) async fn hand_over(shard: ToShard, session: NewSession) -> bool {
    shard.send_timeout(session, TAKE_WITHIN).await.is_ok()
}

/// What a shard owns.
struct Shard {
    context: Rc<Context>,
    limits: Rc<ConnLimits>,
    sessions: RefCell<HashMap<u64, Rc<Session>>>,
    number: u64,
    made: Cell<u64>,
    neighbours: Arc<[Neighbour]>,
    /// What all outboxes held at the last tick.
    queued: Cell<i64>,
}

/// The connections of a shard that has started.
type Started = Result<(Line, Connection), EdgeError>;

async fn run(
    common: Common,
    mut pushes: mpsc::Receiver<Push>,
    mut new_sessions: mpsc::Receiver<NewSession>,
    mut drains: mpsc::Receiver<Drain>,
    started: oneshot::Sender<Started>,
) {
    let part = common.part.clone();
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
    let mut revoked = shard.context.verifier.revocations().changes();
    let drain = loop {
        tokio::select! {
            // All four are cancel-safe.
            Some(new) = new_sessions.recv() => shard.open_session(new),
            _ = tick.tick() => shard.tick(),
            // Who is not let in any more does not wait for the tick. The sender lives as long as the verifier.
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
        new_sessions.close();
        while let Some(late) = new_sessions.recv().await {
            shard.open_session(late);
        }
        let left = shard.drain(spread, deadline).await;
        // The edge may have given up waiting.
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
        part.keep_running(
            "its NATS connection for live messages",
            driver.run(rooms.listener()),
        );
        let ending = replay.clone();
        part.keep_running("its NATS connection for replay", async move {
            ending.ended().await
        });
        live.ready().await;
        let publisher = Publisher::new(
            live.clone(),
            reader,
            Arc::clone(origins.own()),
            Arc::clone(&shared.remembered),
            &config.nats,
            &shared.id,
        );
        let admission = Arc::clone(&shared.admission);
        let limits = ConnLimits {
            outbox_bytes: usize::try_from(config.limits.outbox.as_u64()).unwrap_or(usize::MAX),
            stall: config.limits.outbox_stall,
        };
        let context = Context {
            rooms,
            publisher,
            markers,
            presence,
            history,
            shard: number,
            verifier: Arc::clone(&shared.verifier),
            config,
            buffer: RefCell::default(),
            admit_user: Box::new(move |user| {
                admission
                    .user(user)
                    .map(|place| Box::new(place) as UserSlot)
            }),
            home: way_home(Arc::clone(&neighbours), number),
        };
        let shard = Rc::new(Self {
            context: Rc::new(context),
            limits: Rc::new(limits),
            sessions: RefCell::default(),
            number: number as u64,
            made: Cell::new(0),
            neighbours,
            queued: Cell::new(0),
        });
        Ok((shard, live, replay))
    }

    fn open_session(self: &Rc<Self>, new: NewSession) {
        let stream = match tokio::net::TcpStream::from_std(new.stream) {
            Ok(stream) => stream,
            Err(error) => return tracing::debug!(%error, "a connection was lost"),
        };
        let conn = Conn::new(stream, Rc::clone(&self.limits));
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
        // A copy, of nothing as a rule: `first` is the end of the buffer of the whole handshake, which is to go.
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

    /// Closes the sessions whose tokens are revoked.
    fn close_revoked(&self) {
        for session in self.sessions.borrow().values() {
            session.close_if_revoked();
        }
    }

    /// Tells the sessions to come back elsewhere, spread over time, and waits until they are gone. How many are left.
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

    use figment::providers::{Format as _, Toml};
    use tokio::time::timeout;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// Why the tasks fail when a shard does this.
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
                // Who looks at the end of a task can't hide it.
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
        // Nobody listens there.
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
        // It comes back.
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
            let (live, _driver) = Line::new(&config.nats, "live").unwrap();
            let replay = Connection::open(&config.nats, "replay").await.unwrap();
            handles.push(Handle {
                drain,
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
        // The first has ended, the second dies of its order, the third answers, and the fourth stands still.
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
