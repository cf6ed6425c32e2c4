//! What a user does in a storm: sessions that join, speak, leave, reconnect anywhere, and write down all they see.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use natter::testing::{
    client::{Connection, Endpoint, Frame},
    model::Cursor,
};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant as TokioInstant, sleep, sleep_until},
};

use super::{
    checker::{self, Ack, Event, Log, Sent},
    mesh::token,
};

/// Rooms that each session is in.
pub(crate) const ROOMS_A_SESSION: usize = 3;
/// Messages of one session that wait for their ack.
const MOST_PENDING: usize = 3;

/// The highest sequence of each origin.
pub(crate) type Reached = BTreeMap<String, u64>;

/// Where all are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Storm,
    /// No more publishing, leaving and reconnecting: everybody reconnects once more and catches up.
    Calm,
    Over,
}

/// What the sessions tell the test, and what they share.
pub(crate) struct Shared {
    endpoints: Vec<Endpoint>,
    pub(crate) stage: watch::Receiver<Stage>,
    pub(crate) board: Mutex<Board>,
}

impl Shared {
    /// What so many sessions share in so many rooms, in a storm, and what tells them the stages after it.
    pub(crate) fn new(
        endpoints: Vec<Endpoint>,
        rooms: usize,
        sessions: usize,
    ) -> (watch::Sender<Stage>, Arc<Self>) {
        let (stage, watched) = watch::channel(Stage::Storm);
        let shared = Self {
            endpoints,
            stage: watched,
            board: Mutex::new(Board::new(rooms, sessions)),
        };
        (stage, Arc::new(shared))
    }
}

/// What all have done and seen, once they are over.
pub(crate) async fn logs(mut tasks: JoinSet<Session>) -> Log {
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
    log
}

pub(crate) struct Board {
    pub(crate) acked: usize,
    /// What anybody has heard of in each room.
    newest: Vec<Reached>,
    standing: Vec<Standing>,
    pub(crate) reconnects: usize,
}

/// How far a session is.
#[derive(Debug, Default, Clone)]
struct Standing {
    /// Reconnected since the storm is over, in all its rooms, and nothing waits for an ack.
    settled: bool,
    /// Room and where it stands there.
    reached: [(usize, Reached); ROOMS_A_SESSION],
    doing: String,
}

impl Board {
    fn new(rooms: usize, sessions: usize) -> Self {
        Self {
            acked: 0,
            newest: vec![Reached::new(); rooms],
            standing: vec![Standing::default(); sessions],
            reconnects: 0,
        }
    }

    fn heard(&mut self, room: usize, cursor: &str) {
        raise(&mut self.newest[room], cursor);
    }

    /// What keeps the sessions from having caught up.
    pub(crate) fn behind(&self) -> Result<(), String> {
        let mut count = 0;
        let mut first = None;
        for (session, standing) in self.standing.iter().enumerate() {
            let short = standing
                .reached
                .iter()
                .find(|(room, reached)| !covers(reached, &self.newest[*room]));
            if standing.settled && short.is_none() {
                continue;
            }
            count += 1;
            first.get_or_insert_with(|| {
                let heads = standing.reached.each_ref();
                let heads = heads.map(|(room, _)| &self.newest[*room]);
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
pub(crate) struct Session {
    number: usize,
    pub(crate) user: String,
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
    reached: Reached,
    /// What the join was told to expect, and where it leads.
    to_come: u64,
    head: String,
    /// The last message here, to be answered.
    last: Option<String>,
    /// Up to where the user has read, and the `read` that is under way.
    marker: Reached,
    reading: Option<u64>,
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
    reply_to: Option<String>,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    reply_to: Option<&'a str>,
}

#[derive(Serialize)]
struct ReadFields<'a> {
    room: &'a str,
    cursor: &'a str,
}

#[derive(Deserialize)]
struct Marker {
    cursor: String,
}

#[derive(Serialize)]
struct JoinFields<'a> {
    room: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<&'a str>,
}

#[derive(Deserialize)]
pub(crate) struct Joined {
    room: String,
    pub(crate) cursor: String,
    head: String,
    pub(crate) replay: u64,
    #[serde(default)]
    pub(crate) reset: bool,
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
    #[serde(default)]
    reply_to: Option<String>,
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

pub(crate) fn room_name(room: usize) -> String {
    format!("chat:room-{room}")
}

fn room_number(name: &str) -> Option<usize> {
    name.strip_prefix("chat:room-")?.parse().ok()
}

/// Raises `reached` to `cursor`, each component for itself.
pub(crate) fn raise(reached: &mut Reached, cursor: &str) {
    let cursor = cursor.parse::<Cursor>().unwrap_or_default();
    for position in cursor.positions() {
        let origin = position.origin.as_str().to_owned();
        let seq = reached.entry(origin).or_default();
        *seq = position.seq.max(*seq);
    }
}

/// Whether `reached` lies before `other` in no component.
pub(crate) fn covers(reached: &Reached, other: &Reached) -> bool {
    let mut other = other.iter();
    other.all(|(origin, seq)| reached.get(origin).is_some_and(|at| at >= seq) || *seq == 0)
}

impl Session {
    pub(crate) fn new(number: usize, seed: u64, shared: &Arc<Shared>) -> Self {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_add(number as u64 + 1));
        // Names that need escaping on NATS, too.
        let user = match number % 4 {
            0 => format!("김 {number}"),
            1 => format!("kim.{number}>*"),
            _ => format!("user-{number}"),
        };
        let rooms = shared.board.lock().newest.len();
        let rooms = rand::seq::index::sample(&mut rng, rooms, ROOMS_A_SESSION);
        Self {
            number,
            token: token(&user),
            user,
            shared: Arc::clone(shared),
            stage: shared.stage.clone(),
            places: std::array::from_fn(|at| Place {
                room: rooms.index(at),
                cursor: None,
                reached: Reached::new(),
                to_come: 0,
                head: String::new(),
                last: None,
                marker: Reached::new(),
                reading: None,
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

    pub(crate) async fn run(mut self) -> Self {
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
                place.reading = None;
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
            let edge = self.rng.random_range(0..self.shared.endpoints.len());
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
        // Who only misses a copy that is not shown finds out by joining again.
        if (stormy && roll < 3) || (!stormy && roll < 20 && self.is_behind()) {
            return Some(Next::Reconnect);
        }
        if stormy && roll < 15 {
            self.leave(connection).await;
        } else if stormy && roll < 70 && self.pending.len() < MOST_PENDING {
            self.publish();
        }
        if stormy && (70..80).contains(&roll) {
            self.read(connection).await;
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
                reply_to: pending.reply_to.as_deref(),
            };
            pending.rid = connection.commands().send("send", fields).await.ok();
        }
        // At times the connection goes just after something was said.
        (stormy && roll >= 98).then_some(Next::Reconnect)
    }

    /// Whether others have heard of more.
    fn is_behind(&self) -> bool {
        let board = self.shared.board.lock();
        let mut places = self.places.iter();
        places.any(|place| {
            place.state == State::In && !covers(&place.reached, &board.newest[place.room])
        })
    }

    async fn read(&mut self, connection: &Connection) {
        let at = self.rng.random_range(0..ROOMS_A_SESSION);
        let place = &mut self.places[at];
        let room = room_name(place.room);
        if place.reading.is_none()
            && let (State::In, Some(cursor)) = (&place.state, &place.cursor)
            && let Ok(rid) = connection
                .commands()
                .send(
                    "read",
                    ReadFields {
                        room: &room,
                        cursor,
                    },
                )
                .await
        {
            place.reading = Some(rid);
            raise(&mut place.marker, cursor);
        }
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
        // Every third answers the last message that was seen.
        let last = &self.places[place].last;
        let reply_to = last.clone().filter(|_| self.rng.random_bool(0.3));
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
            reply_to,
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
            "ok" => frame.fields().map(|marker| self.on_marker(frame, &marker)),
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

    /// A marker lies before nothing that the user has read, wherever that was.
    fn on_marker(&mut self, frame: &Frame, Marker { cursor }: &Marker) {
        let asked = |place: &&mut Place| place.reading.is_some() && place.reading == frame.rid();
        let Some(place) = self.places.iter_mut().find(asked) else {
            return self.fault(frame, "nobody asked");
        };
        place.reading = None;
        let mut now = Reached::new();
        raise(&mut now, cursor);
        if !covers(&now, &place.marker) {
            let read = place.marker.clone();
            self.fault(frame, &format!("read up to {read:?}"));
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
        place.reached.clear();
        raise(&mut place.reached, &cursor);
        place.to_come = replay;
        place.head.clone_from(&head);
        // A copy of a message that is not shown moves the room on without a push.
        if replay == 0 {
            raise(&mut place.reached, &head);
        }
        self.shared.board.lock().heard(place.room, &head);
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
            raise(&mut place.reached, &pushed.cursor);
            place.last = Some(format!("{}/{}", pushed.from, pushed.id));
            if place.to_come == 1 {
                raise(&mut place.reached, &place.head);
            }
            place.to_come = place.to_come.saturating_sub(1);
            let mut board = self.shared.board.lock();
            board.heard(place.room, &pushed.cursor);
        }
        self.events.push(Event::Pushed {
            room: pushed.room,
            id: pushed.id,
            from: pushed.from,
            cursor: pushed.cursor,
            body: pushed.body.get().to_owned(),
            reply_to: pushed.reply_to,
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
        board.heard(room, &acked.cursor);
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
        } else if let Some(place) = self.places.iter_mut().find(|p| p.reading == rid) {
            place.reading = None;
        } else {
            self.fault(frame, "nobody asked");
        }
    }

    /// The rooms the session is in.
    pub(crate) fn rooms(&self) -> [usize; ROOMS_A_SESSION] {
        self.places.each_ref().map(|place| place.room)
    }

    /// Tells the board where this session stands.
    fn stand(&self, doing: &str) {
        let all_in = self.places.iter().all(|place| place.state == State::In);
        let mut board = self.shared.board.lock();
        let standing = &mut board.standing[self.number];
        standing.settled = self.last_connection && all_in && self.pending.is_empty();
        for (reached, place) in standing.reached.iter_mut().zip(&self.places) {
            *reached = (place.room, place.reached.clone());
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
