//! A shard: one thread with its own NATS connections, rooms and sessions.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::TcpStream,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{
    runtime::Builder,
    sync::{mpsc, oneshot},
    task::{LocalSet, spawn_local},
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
    session::{Carried, Context, Departure, Home, Session, UserSlot},
    subject::Subjects,
    telemetry::metrics::{Gauge, gauge_add},
    wire::{Conn, ConnLimits},
};

/// New connections that wait for a shard; the acceptor waits when it is full.
const WAITING: usize = 1024;

/// How often a shard looks after its sessions.
const TICK: Duration = Duration::from_secs(1);

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
    turn: AtomicUsize,
}

#[derive(Debug)]
struct Handle {
    sessions: ToShard,
    drain: mpsc::Sender<Drain>,
}

/// The order to drain.
#[derive(Debug)]
struct Drain {
    spread: Duration,
    deadline: tokio::time::Instant,
    /// How many sessions were left in the end.
    done: oneshot::Sender<usize>,
}

/// A shard, as the others see it.
#[derive(Debug)]
struct Neighbour {
    sessions: ToShard,
    /// How many sessions it has.
    load: AtomicUsize,
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
    if load(neighbour) > fair_share(total, neighbours.len()) {
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
}

impl Shards {
    /// How many there are.
    pub(super) fn count(config: &Config) -> usize {
        match config.edge.shards {
            0 => thread::available_parallelism().map_or(1, usize::from),
            count => count,
        }
    }

    /// Starts the threads, one for each of `pushes`, and waits until each has its connections.
    pub(super) async fn start(
        shared: &Arc<Shared>,
        origins: &Arc<Origins>,
        (presence, pushes): (&Arc<Presence>, Vec<mpsc::Receiver<Push>>),
        markers: &Arc<Markers>,
        history: &Arc<history::Client>,
    ) -> Result<Self, EdgeError> {
        let mut shards = Vec::new();
        let (ways, arrivals): (Vec<_>, Vec<_>) = pushes
            .iter()
            .map(|_| {
                let (sessions, new_sessions) = mpsc::channel(WAITING);
                let load = AtomicUsize::new(0);
                (Neighbour { sessions, load }, new_sessions)
            })
            .unzip();
        let neighbours: Arc<[Neighbour]> = ways.into();
        for (number, (pushes, new_sessions)) in pushes.into_iter().zip(arrivals).enumerate() {
            let sessions = neighbours[number].sessions.clone();
            let (drain, drains) = mpsc::channel(1);
            let (started, start) = oneshot::channel();
            let common = Common {
                neighbours: Arc::clone(&neighbours),
                shared: Arc::clone(shared),
                origins: Arc::clone(origins),
                presence: Arc::clone(presence),
                markers: Arc::clone(markers),
                history: Arc::clone(history),
            };
            thread::Builder::new()
                .name(format!("shard-{number}"))
                .spawn(move || {
                    let runtime = match Builder::new_current_thread().enable_all().build() {
                        Ok(runtime) => runtime,
                        Err(error) => {
                            // Nobody waits for it any more if the edge is stopping.
                            let _stopping = started.send(Err(EdgeError::Shard(error)));
                            return;
                        }
                    };
                    let shard = run(number, common, pushes, new_sessions, drains, started);
                    LocalSet::new().block_on(&runtime, shard);
                })
                .map_err(EdgeError::Shard)?;
            let ended = |_dropped| EdgeError::Shard(io::Error::other("the thread ended"));
            start.await.map_err(ended)??;
            shards.push(Handle { sessions, drain });
        }
        Ok(Self {
            shards,
            turn: AtomicUsize::new(0),
        })
    }

    /// The shard for the next connection.
    pub(super) fn next(&self) -> ToShard {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        self.shards[turn % self.shards.len()].sessions.clone()
    }

    /// Drains all shards; how many sessions were left at the deadline.
    pub(super) async fn drain(&self, spread: Duration, deadline: tokio::time::Instant) -> usize {
        let mut waits = Vec::new();
        for shard in &self.shards {
            let (done, wait) = oneshot::channel();
            // A shard that has ended has no sessions.
            if shard
                .drain
                .send(Drain {
                    spread,
                    deadline,
                    done,
                })
                .await
                .is_ok()
            {
                waits.push(wait);
            }
        }
        let mut left = 0;
        for wait in waits {
            left += wait.await.unwrap_or(0);
        }
        left
    }
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

async fn run(
    number: usize,
    common: Common,
    mut pushes: mpsc::Receiver<Push>,
    mut new_sessions: mpsc::Receiver<NewSession>,
    mut drains: mpsc::Receiver<Drain>,
    started: oneshot::Sender<Result<(), EdgeError>>,
) {
    let (shard, live, replay) = match Shard::open(number, common).await {
        Ok(parts) => parts,
        Err(error) => {
            let _stopping = started.send(Err(error.into()));
            return;
        }
    };
    let keeper = spawn_local(Rc::clone(&shard.context.rooms).keep());
    let rooms = Rc::clone(&shard.context.rooms);
    let pusher = spawn_local(async move {
        while let Some(Push { room, frames }) = pushes.recv().await {
            rooms.push_presence(&room, &frames).await;
        }
    });
    if started.send(Ok(())).is_err() {
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
    }) = drain
    {
        new_sessions.close();
        while let Some(late) = new_sessions.recv().await {
            shard.open_session(late);
        }
        let left = shard.drain(spread, deadline).await;
        shard.context.rooms.end();
        live.close().await;
        replay.close().await;
        // The edge may have given up waiting.
        let _gave_up = done.send(left);
    }
    keeper.abort();
    pusher.abort();
}

impl Shard {
    async fn open(
        number: usize,
        common: Common,
    ) -> Result<(Rc<Self>, Line, Connection), ConnectError> {
        let Common {
            neighbours,
            shared,
            origins,
            presence,
            markers,
            history,
        } = common;
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
        spawn_local(driver.run(rooms.listener()));
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
        // There are as many neighbours as shards.
        &self.neighbours[usize::try_from(self.number).unwrap_or_default()].load
    }

    fn tick(&self) {
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
