//! Everything at once: 200 sessions in 20 rooms on two edges, which leave, rejoin and reconnect at random while edges and
//! nats-server are killed and restarted; then [`checker`](crate::support::checker) proves that each saw everything, once,
//! in order.
//!
//! Two runs with one seed make the same decisions, not the same schedule: a seed narrows a failure down, it need not repeat
//! it. What a failed run leaves for analysis is in the folder that its panic names.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use natter::{
    client::{Connection, Endpoint, Frame},
    model::Cursor,
};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde::{Deserialize, Serialize};
use serde_json::{json, value::RawValue};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant as TokioInstant, sleep, sleep_until},
};

use crate::support::{
    DedicatedNats,
    checker::{self, Ack, Event, Log, Sent, Violation},
    dedicated_nats, eventually,
    mesh::{Mesh, token},
    nats_url,
};

const EDGES: usize = 2;
const ROOMS: usize = 20;
const SESSIONS: usize = 200;
const ROOMS_A_SESSION: usize = 3;
/// Messages acknowledged before the storm may end.
const MESSAGES: usize = 4200;
const EDGE_KILLS: usize = 3;
const NATS_KILLS: usize = 1;
/// Messages of one session that wait for their ack.
const MOST_PENDING: usize = 3;

/// For the whole storm, and for everybody to have caught up after it.
const PATIENCE: Duration = Duration::from_secs(240);

/// Where all are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Storm,
    /// No more publishing, leaving and reconnecting: everybody reconnects once more and catches up.
    Calm,
    Over,
}

/// What the sessions tell the test, and what they share.
struct Shared {
    endpoints: Vec<Endpoint>,
    stage: watch::Receiver<Stage>,
    board: Mutex<Board>,
}

#[derive(Default)]
struct Board {
    acked: usize,
    /// Highest sequence of each room that anybody has heard of.
    newest: [u64; ROOMS],
    standing: Vec<Standing>,
    reconnects: usize,
}

/// How far a session is.
#[derive(Debug, Default, Clone)]
struct Standing {
    /// Reconnected since the storm is over, in all its rooms, and nothing waits for an ack.
    settled: bool,
    /// Room and the sequence it has reached there.
    reached: [(usize, u64); ROOMS_A_SESSION],
    doing: String,
}

impl Board {
    fn heard(&mut self, room: usize, seq: u64) {
        self.newest[room] = self.newest[room].max(seq);
    }

    /// What keeps the sessions from having caught up.
    fn behind(&self) -> Result<(), String> {
        let mut count = 0;
        let mut first = None;
        for (session, standing) in self.standing.iter().enumerate() {
            let short = standing
                .reached
                .iter()
                .find(|(room, reached)| *reached < self.newest[*room]);
            if standing.settled && short.is_none() {
                continue;
            }
            count += 1;
            first.get_or_insert_with(|| {
                let heads = standing.reached.map(|(room, _)| self.newest[room]);
                format!("session {session}: {standing:?}, newest {heads:?}")
            });
        }
        match first {
            None => Ok(()),
            Some(first) => Err(format!("{count} sessions are not done, e.g. {first}")),
        }
    }
}

/// One user with one connection at a time.
struct Session {
    number: usize,
    user: String,
    token: String,
    rng: StdRng,
    shared: Arc<Shared>,
    stage: watch::Receiver<Stage>,
    places: [Place; ROOMS_A_SESSION],
    pending: Vec<Pending>,
    published: usize,
    /// Connected since the calm began.
    last_connection: bool,
    events: Vec<Event>,
    sent: Vec<Sent>,
    acks: Vec<Ack>,
}

struct Place {
    room: usize,
    /// Cursor of the last message, or of the join reply.
    cursor: Option<String>,
    seq: u64,
    state: State,
}

/// In the room, out of it, or waiting for the reply with this `rid`.
#[derive(Debug, PartialEq, Eq)]
enum State {
    Out,
    Joining(u64),
    In,
    Leaving(u64),
}

/// Published and not acknowledged.
struct Pending {
    place: usize,
    id: String,
    body: Box<RawValue>,
    /// `None`: refused for now, or the connection was lost; to be sent again.
    rid: Option<u64>,
}

/// Why a session goes to its next connection.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// It wants to, or lost the one it had.
    Reconnect,
    Over,
}

#[derive(Serialize)]
struct SendFields<'a> {
    room: &'a str,
    id: &'a str,
    body: &'a RawValue,
}

#[derive(Serialize)]
struct JoinFields<'a> {
    room: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<&'a str>,
}

#[derive(Deserialize)]
struct Joined {
    room: String,
    cursor: String,
    head: String,
    replay: u64,
    #[serde(default)]
    reset: bool,
    #[serde(default)]
    reason: Option<String>,
}

#[derive(Deserialize)]
struct Pushed {
    room: String,
    id: String,
    from: String,
    cursor: String,
    body: Box<RawValue>,
}

#[derive(Deserialize)]
struct Acked {
    room: String,
    id: String,
    cursor: String,
}

#[derive(Deserialize)]
struct Kicked {
    room: String,
    code: String,
}

fn room_name(room: usize) -> String {
    format!("chat:room-{room}")
}

fn room_number(name: &str) -> Option<usize> {
    name.strip_prefix("chat:room-")?.parse().ok()
}

fn seq_of(cursor: &str) -> u64 {
    let parsed = cursor.parse::<Cursor>().ok();
    parsed.map_or(0, |cursor| cursor.positions().first().map_or(0, |p| p.seq))
}

impl Session {
    fn new(number: usize, seed: u64, shared: &Arc<Shared>) -> Self {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_add(number as u64 + 1));
        // Names that need escaping on NATS, too.
        let user = match number % 4 {
            0 => format!("김 {number}"),
            1 => format!("kim.{number}>*"),
            _ => format!("user-{number}"),
        };
        let rooms = rand::seq::index::sample(&mut rng, ROOMS, ROOMS_A_SESSION);
        Self {
            number,
            token: token(&user),
            user,
            shared: Arc::clone(shared),
            stage: shared.stage.clone(),
            places: std::array::from_fn(|at| Place {
                room: rooms.index(at),
                cursor: None,
                seq: 0,
                state: State::Out,
            }),
            rng,
            pending: Vec::new(),
            published: 0,
            last_connection: false,
            events: Vec::new(),
            sent: Vec::new(),
            acks: Vec::new(),
        }
    }

    async fn run(mut self) -> Self {
        loop {
            let Some(mut connection) = self.connect().await else {
                return self;
            };
            let next = self.attend(&mut connection).await;
            if next == Next::Over {
                return self;
            }
            // One half says goodbye, the other is simply gone.
            if self.rng.random_bool(0.5) {
                connection.close().await;
            } else {
                drop(connection);
            }
            self.shared.board.lock().reconnects += 1;
            let stormy = self.stage() == Stage::Storm;
            for place in &mut self.places {
                place.state = State::Out;
            }
            for pending in &mut self.pending {
                pending.rid = None;
            }
            if stormy {
                // Some never learn what became of what they sent.
                let rng = &mut self.rng;
                self.pending.retain(|_| !rng.random_bool(0.1));
                // Models a user's time without a network; mostly short, and at times long enough to miss a lot.
                let away = if self.rng.random_bool(0.2) { 4000 } else { 300 };
                let away = self.rng.random_range(0..away);
                self.pause_in_storm(Duration::from_millis(away)).await;
            }
        }
    }

    fn stage(&self) -> Stage {
        *self.stage.borrow()
    }

    /// Models a user who does nothing; a user does not stay away when the storm is over.
    async fn pause_in_storm(&mut self, pause: Duration) {
        let mut stage = self.shared.stage.clone();
        tokio::select! {
            () = sleep(pause) => {}
            _ = stage.wait_for(|stage| *stage != Stage::Storm) => {}
        }
    }

    /// To a random edge, and when that does not answer to another random one.
    async fn connect(&mut self) -> Option<Connection> {
        loop {
            if self.stage() == Stage::Over {
                return None;
            }
            self.stand("connecting");
            self.last_connection = self.stage() == Stage::Calm;
            let edge = self.rng.random_range(0..EDGES);
            match Connection::open(&self.shared.endpoints[edge], Some(&self.token)).await {
                Ok(connection) => {
                    let to = format!("edge-{edge}");
                    self.events.push(Event::Connected { to });
                    return Some(connection);
                }
                // An edge that is down refuses at once: the pause of a client's backoff.
                Err(_down) => {
                    let pause = self.rng.random_range(20..200);
                    sleep(Duration::from_millis(pause)).await;
                }
            }
        }
    }

    /// One connection, from its first join to its end.
    async fn attend(&mut self, connection: &mut Connection) -> Next {
        let mut stage = self.shared.stage.clone();
        let mut act_at = TokioInstant::now();
        loop {
            if self.stage() == Stage::Calm && !self.last_connection {
                return Next::Reconnect;
            }
            // Receiving from a channel, sleeping and watching are all cancel-safe.
            tokio::select! {
                frame = connection.next() => match frame {
                    Some(frame) => self.on_frame(&frame),
                    None => return Next::Reconnect,
                },
                () = sleep_until(act_at) => {
                    if self.act(connection).await == Some(Next::Reconnect) {
                        return Next::Reconnect;
                    }
                    // A user's think time.
                    let think = self.rng.random_range(20..500);
                    act_at = TokioInstant::now() + Duration::from_millis(think);
                }
                _ = stage.changed() => {
                    if self.stage() == Stage::Over {
                        return Next::Over;
                    }
                }
            }
            self.stand("connected");
        }
    }

    /// One step of a user. A command that can't be sent is one that the end of the connection answers.
    async fn act(&mut self, connection: &Connection) -> Option<Next> {
        let stormy = self.stage() == Stage::Storm;
        let roll = self.rng.random_range(0..100);
        if stormy && roll < 3 {
            return Some(Next::Reconnect);
        }
        if stormy && roll < 15 {
            self.leave(connection).await;
        } else if stormy && roll < 70 && self.pending.len() < MOST_PENDING {
            self.publish();
        }
        let eager = !stormy || self.events.len() < 2;
        for at in 0..ROOMS_A_SESSION {
            if self.places[at].state == State::Out && (eager || self.rng.random_bool(0.4)) {
                let room = room_name(self.places[at].room);
                let since = self.places[at].cursor.as_deref();
                let fields = JoinFields { room: &room, since };
                if let Ok(rid) = connection.commands().send("join", fields).await {
                    self.places[at].state = State::Joining(rid);
                }
            }
        }
        for pending in self.pending.iter_mut().filter(|p| p.rid.is_none()) {
            let room = room_name(self.places[pending.place].room);
            let fields = SendFields {
                room: &room,
                id: &pending.id,
                body: &pending.body,
            };
            pending.rid = connection.commands().send("send", fields).await.ok();
        }
        // At times the connection goes just after something was said.
        (stormy && roll >= 98).then_some(Next::Reconnect)
    }

    async fn leave(&mut self, connection: &Connection) {
        let at = self.rng.random_range(0..ROOMS_A_SESSION);
        if self.places[at].state != State::In {
            return;
        }
        let room = room_name(self.places[at].room);
        let fields = JoinFields {
            room: &room,
            since: None,
        };
        if let Ok(rid) = connection.commands().send("leave", fields).await {
            self.places[at].state = State::Leaving(rid);
        }
    }

    fn publish(&mut self) {
        let place = self.rng.random_range(0..ROOMS_A_SESSION);
        self.published += 1;
        let id = format!("{}-{}", self.number, self.published);
        let body = RawValue::from_string(speech(&mut self.rng)).unwrap();
        self.sent.push(Sent {
            room: room_name(self.places[place].room),
            from: self.user.clone(),
            id: id.clone(),
            body: body.get().to_owned(),
        });
        self.pending.push(Pending {
            place,
            id,
            body,
            rid: None,
        });
    }

    fn on_frame(&mut self, frame: &Frame) {
        let understood = match frame.op() {
            "msg" => frame.fields().map(|pushed| self.on_pushed(pushed)),
            "ack" => frame.fields().map(|acked| self.on_acked(frame, acked)),
            "joined" => frame.fields().map(|joined| self.on_joined(frame, joined)),
            "left" => {
                let rid = frame.rid().unwrap_or_default();
                let left = |place: &&mut Place| place.state == State::Leaving(rid);
                match self.places.iter_mut().find(left) {
                    Some(place) => {
                        place.state = State::Out;
                        let room = room_name(place.room);
                        self.events.push(Event::Left { room });
                    }
                    None => self.fault(frame, "nobody asked"),
                }
                Ok(())
            }
            "error" => {
                self.on_refused(frame);
                Ok(())
            }
            "kicked" => frame.fields().map(|Kicked { room, code }| {
                let number = room_number(&room);
                if let Some(place) = self.places.iter_mut().find(|p| Some(p.room) == number) {
                    place.state = State::Out;
                }
                self.events.push(Event::Kicked { room, code });
            }),
            _ => {
                self.fault(frame, "not expected");
                Ok(())
            }
        };
        if let Err(error) = understood {
            self.fault(frame, &error.to_string());
        }
    }

    fn fault(&mut self, frame: &Frame, what: &str) {
        let what = format!("{what}: {}", frame.text());
        self.events.push(Event::Fault(what));
    }

    fn on_joined(&mut self, frame: &Frame, joined: Joined) {
        let Joined {
            room,
            cursor,
            head,
            replay,
            reset,
            reason,
        } = joined;
        let rid = frame.rid().unwrap_or_default();
        let number = room_number(&room);
        let asked =
            |place: &&mut Place| place.state == State::Joining(rid) && Some(place.room) == number;
        let Some(place) = self.places.iter_mut().find(asked) else {
            return self.fault(frame, "nobody asked");
        };
        place.state = State::In;
        let since = place.cursor.replace(cursor.clone());
        place.seq = seq_of(&cursor);
        let mut board = self.shared.board.lock();
        board.heard(place.room, seq_of(&head));
        drop(board);
        self.events.push(Event::Joined {
            room,
            since,
            cursor,
            head,
            replay,
            reset: reset.then(|| reason.unwrap_or_default()),
        });
    }

    fn on_pushed(&mut self, pushed: Pushed) {
        let number = room_number(&pushed.room);
        if let Some(place) = self.places.iter_mut().find(|p| Some(p.room) == number) {
            place.cursor = Some(pushed.cursor.clone());
            place.seq = seq_of(&pushed.cursor);
            self.shared.board.lock().heard(place.room, place.seq);
        }
        self.events.push(Event::Pushed {
            room: pushed.room,
            id: pushed.id,
            from: pushed.from,
            cursor: pushed.cursor,
            body: pushed.body.get().to_owned(),
        });
    }

    fn on_acked(&mut self, frame: &Frame, acked: Acked) {
        let waits = |pending: &Pending| pending.rid == frame.rid() && pending.id == acked.id;
        let Some(at) = self.pending.iter().position(waits) else {
            return self.fault(frame, "nobody asked");
        };
        let pending = self.pending.swap_remove(at);
        let room = self.places[pending.place].room;
        if acked.room != room_name(room) {
            self.fault(frame, "of another room");
        }
        let mut board = self.shared.board.lock();
        board.heard(room, seq_of(&acked.cursor));
        board.acked += 1;
        drop(board);
        self.acks.push(Ack {
            room: acked.room,
            from: self.user.clone(),
            id: acked.id,
            cursor: acked.cursor,
        });
    }

    /// What may succeed later is tried again with the next step.
    fn on_refused(&mut self, frame: &Frame) {
        let retry = frame.refusal().is_some_and(|refusal| refusal.retry);
        let rid = frame.rid();
        let joining = |place: &&mut Place| rid.map(State::Joining).as_ref() == Some(&place.state);
        if !retry {
            self.fault(frame, "refused for good");
        } else if let Some(pending) = self.pending.iter_mut().find(|p| p.rid == rid) {
            pending.rid = None;
        } else if let Some(place) = self.places.iter_mut().find(joining) {
            place.state = State::Out;
        } else {
            self.fault(frame, "nobody asked");
        }
    }

    /// Tells the board where this session stands.
    fn stand(&self, doing: &str) {
        let all_in = self.places.iter().all(|place| place.state == State::In);
        let mut board = self.shared.board.lock();
        let standing = &mut board.standing[self.number];
        standing.settled = self.last_connection && all_in && self.pending.is_empty();
        for (reached, place) in standing.reached.iter_mut().zip(&self.places) {
            *reached = (place.room, place.seq);
        }
        if standing.settled {
            standing.doing.clear();
        } else {
            let states = self.places.each_ref().map(|place| &place.state);
            let waiting: Vec<_> = self.pending.iter().map(|p| (&p.id, p.rid)).collect();
            standing.doing = format!("{doing}, {states:?}, waits for {waiting:?}");
        }
    }
}

/// A body as clients write it: with all that JSON allows.
fn speech(rng: &mut StdRng) -> String {
    const WORDS: [&str; 12] = [
        "안녕하세요",
        "👋🏽",
        "잘 지내요?",
        "👨‍👩‍👧‍👦",
        "네,",
        "hello",
        "ㅋㅋㅋ",
        "\\\"quoted\\\"",
        "\\u0041\\ud83d\\ude00",
        "a\\nb",
        "🇰🇷",
        "ünïcödé",
    ];
    // Mostly a line, at times an essay: so that replays do not fit into one piece or into memory.
    let words = if rng.random_bool(0.05) { 900 } else { 25 };
    let words = rng.random_range(1..words);
    let mut text = String::new();
    for _ in 0..words {
        text.push_str(WORDS.choose(rng).unwrap());
        text.push(' ');
    }
    match rng.random_range(0..4) {
        0 => format!("\"{text}\""),
        1 => format!("[1.0e3, \"{text}\" , null]"),
        2 => format!("{{ \"text\" : \"{text}\",\t\"n\":-0}}"),
        _ => format!("{{\"text\":\"{text}\"}}"),
    }
}

/// What is killed, in which order; each waits for its share of the messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    Edge,
    Nats,
    /// An edge dies while nats-server is away.
    Both,
}

/// Kills and restarts, spread over the storm.
async fn blows(rng: &mut StdRng, shared: &Shared, mesh: &mut Mesh, nats: &mut DedicatedNats) {
    let mut plan = [Blow::Edge; EDGE_KILLS + NATS_KILLS].to_vec();
    plan[rng.random_range(0..=EDGE_KILLS)] = Blow::Nats;
    if rng.random_bool(0.3) {
        plan.pop();
        let at = plan.iter().position(|blow| *blow == Blow::Nats);
        let at = at.unwrap_or(plan.len() - 1);
        plan[at] = Blow::Both;
    }
    let share = MESSAGES / (plan.len() + 1);
    for (number, blow) in plan.into_iter().enumerate() {
        let moment = number * share + rng.random_range(share / 3..share);
        eventually("the moment of the next kill", PATIENCE, async || {
            let acked = shared.board.lock().acked;
            if acked >= moment {
                Ok(())
            } else {
                Err(format!("{acked} of {moment} messages are acknowledged"))
            }
        })
        .await;
        let edge = rng.random_range(0..EDGES);
        eprintln!("storm: kill {blow:?} (edge {edge}) after {moment} messages");
        if blow != Blow::Edge {
            nats.server.kill().await;
            outage(rng).await;
        }
        if blow != Blow::Nats {
            mesh.edges[edge].process.kill().await;
            outage(rng).await;
        }
        if blow != Blow::Edge {
            nats.server.restart().await.unwrap();
        }
        if blow != Blow::Nats {
            mesh.edges[edge].process.start().await.unwrap();
        }
    }
}

/// How long something stays dead, as an operator's supervisor may have it.
async fn outage(rng: &mut StdRng) {
    let pause = if rng.random_bool(0.3) { 5500 } else { 800 };
    sleep(Duration::from_millis(rng.random_range(0..pause))).await;
}

#[expect(
    clippy::disallowed_methods,
    reason = "the seed of a test is no configuration"
)]
fn seed() -> u64 {
    std::env::var("NATTER_TEST_SEED").map_or_else(
        |_absent| rand::random(),
        |text| text.parse().expect("NATTER_TEST_SEED is a number"),
    )
}

/// Says the seed when the test fails, wherever that is.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("storm: failed with NATTER_TEST_SEED={}", self.0);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_session_sees_every_message_once_in_order_through_kills_of_edges_and_nats() {
    let seed = Seed(seed());
    let started = Instant::now();
    eprintln!("storm: NATTER_TEST_SEED={}", seed.0);
    let mut rng = StdRng::seed_from_u64(seed.0);
    // Small rings make resumes read the stream.
    let ring = ["4KiB", "32KiB", "128KiB"].choose(&mut rng).unwrap();
    let toml = format!("rooms.ring = '{ring}'\ntelemetry.log = 'natter=debug,info'");
    let mut nats = dedicated_nats().await;
    let mut mesh = Mesh::start(&nats.url(), EDGES, &toml).await;

    let (stage, watched) = watch::channel(Stage::Storm);
    let shared = Arc::new(Shared {
        endpoints: (0..EDGES).map(|edge| mesh.endpoint(edge)).collect(),
        stage: watched,
        board: Mutex::new(Board {
            standing: vec![Standing::default(); SESSIONS],
            ..Board::default()
        }),
    });
    let mut tasks = JoinSet::new();
    for number in 0..SESSIONS {
        tasks.spawn(Session::new(number, seed.0, &shared).run());
    }
    blows(&mut rng, &shared, &mut mesh, &mut nats).await;
    eventually("all messages are acknowledged", PATIENCE, async || {
        let acked = shared.board.lock().acked;
        if acked >= MESSAGES {
            Ok(())
        } else {
            Err(format!("{acked} of {MESSAGES}"))
        }
    })
    .await;
    stage.send_replace(Stage::Calm);
    let caught_up = caught_up(&shared).await;
    stage.send_replace(Stage::Over);
    let reconnects = shared.board.lock().reconnects;
    let mut log = Log::default();
    while let Some(session) = tasks.join_next().await {
        let session = session.unwrap();
        log.sent.extend(session.sent);
        log.acks.extend(session.acks);
        log.sessions.push(checker::Session {
            name: session.user,
            events: session.events,
        });
    }

    let (summary, violations) = checker::check(&log);
    eprintln!(
        "storm: seed {}, {} s, ring {ring}: {} sent, {} acked, {} unacked seen; {} received in {} sessions; {} joins, \
         {} replayed, {reconnects} reconnects; kills: {EDGE_KILLS} of edges, {NATS_KILLS} of nats-server; {} violations",
        seed.0,
        started.elapsed().as_secs(),
        summary.sent,
        summary.acked,
        summary.unacked_seen,
        summary.received,
        log.sessions.len(),
        summary.joins,
        summary.replayed,
        violations.len(),
    );
    if let Err(last) = &caught_up {
        let kept = keep(seed.0, &mesh, &log, &violations);
        panic!(
            "seed {}: not caught up: {last}\n{}",
            seed.0,
            told(&violations, &kept)
        );
    }
    if !violations.is_empty() {
        let kept = keep(seed.0, &mesh, &log, &violations);
        panic!("seed {}: {}", seed.0, told(&violations, &kept));
    }
    assert!(summary.acked >= MESSAGES, "seed {}: {summary:?}", seed.0);
}

/// Waits until all have everything; does not panic, so that the checker can say what is missing.
async fn caught_up(shared: &Shared) -> Result<(), String> {
    let started = Instant::now();
    loop {
        let behind = shared.board.lock().behind();
        if behind.is_ok() || started.elapsed() > PATIENCE {
            return behind;
        }
        // The pause of a poll.
        sleep(Duration::from_millis(50)).await;
    }
}

fn told(violations: &[Violation], kept: &Path) -> String {
    let mut text = format!(
        "{} violations (all of it is in {}):",
        violations.len(),
        kept.display()
    );
    for violation in violations.iter().take(20) {
        write!(text, "\n  {violation}").unwrap();
    }
    text
}

/// Writes down what is needed to find out what happened.
fn keep(seed: u64, mesh: &Mesh, log: &Log, violations: &[Violation]) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("storm-{seed}"));
    fs::create_dir_all(&folder).unwrap();
    for edge in 0..EDGES {
        fs::copy(mesh.log(edge), folder.join(format!("edge-{edge}.log"))).unwrap();
    }
    let lines: String = violations.iter().map(|v| format!("{v}\n")).collect();
    fs::write(folder.join("violations.txt"), lines).unwrap();
    let mut text = String::new();
    for ack in &log.acks {
        writeln!(text, "{ack:?}").unwrap();
    }
    for session in &log.sessions {
        for event in &session.events {
            writeln!(text, "{:?} {event:?}", session.name).unwrap();
        }
    }
    fs::write(folder.join("operations.txt"), text).unwrap();
    folder
}

/// Found by a storm: a session that joined before the stream's first message, and came back when the room's memory did not
/// reach that far, was refused with `unavailable` for ever, and whoever shared the read with it, too.
#[tokio::test]
async fn a_cursor_from_before_the_first_message_of_the_stream_resumes() {
    const MISSED: u64 = 30;
    let mesh = Mesh::start(nats_url(), 1, "rooms.ring = '1KiB'").await;
    let connection = mesh.connect(0, "kim").await;
    let commands = connection.commands();
    let place = json!({"room": "chat:room-0"});
    let joined: Joined = commands
        .call("join", &place)
        .await
        .unwrap()
        .fields()
        .unwrap();
    assert_eq!(seq_of(&joined.cursor), 0);
    commands.call("leave", &place).await.unwrap();
    for _ in 0..MISSED {
        let message = json!({"room": "chat:room-0", "body": "안녕".repeat(20)});
        commands.call("send", message).await.unwrap();
    }
    let place = json!({"room": "chat:room-0", "since": joined.cursor});
    let joined: Joined = commands
        .call("join", place)
        .await
        .unwrap()
        .fields()
        .unwrap();
    assert_eq!((joined.replay, joined.reset), (MISSED, false));
}
