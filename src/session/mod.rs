//! One client connection: frames in, commands in order, replies and pushes out.
//!
//! ```text
//!            token in the handshake
//!  CONNECTED ─────────────────────────► OPEN ──► CLOSING ──► gone
//!      │  `auth` frame in time            ▲ │        ▲
//!      └──────────────────────────────────┘ └────────┘ peer's close, error, expiry, too slow, drain
//!      └── first_frame_timeout ──────────────────────►
//! ```
//!
//! `wire` handles the bytes of the socket, and `codec` the encoding of a client protocol. This module gives commands
//! their meaning. A session reads only while it has no command to process, so TCP slows down a client that sends faster
//! than it is served.
//!
//! # Invariants
//! - Every command gets exactly one reply, in order, except that acks of different rooms may overtake each other
//!   (`Replies`).
//! - What is queued for the client is counted and bounded: no command is taken while the client has not read the
//!   replies to earlier ones.
//! - Pushes of a room begin after the reply to its join and end with the reply to its leave.

pub(crate) mod answers;
mod checks;
mod commands;
pub(crate) mod directory;
mod join;
mod orders;
mod poll;
pub(crate) mod records;
mod replies;
mod stream;
mod watch;

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::{HashMap, VecDeque},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    auth::{Identity, Verifier},
    bus::Publisher,
    codec::{Codec, CommandReader, Request, stomp},
    config::Config,
    model::RoomId,
    people::{Known, People},
    presence::{Presence, Present, Watch},
    protocol::{Beats, Close, Command, Event, PING_EVERY},
    read_marker::Markers,
    room::{Membership, Rooms},
    runtime::{Pace, unix_s},
    telemetry::metrics::{self, Counter, Gauge, Held, count},
    wire::{Conn, Decoder, Incoming, Outlet, pong_frame},
};
pub use poll::Poll;
use replies::Replies;
pub use stream::Stream;
use stream::{Further, Streamed};
pub use watch::Desk;
use watch::Watches;

/// A peer that was silent for this long is closed. With the grace time of a close, it is gone within 60 s.
const DEAD_AFTER: Duration = Duration::from_secs(45);

/// How much earlier than agreed the server may give a sign of life: it looks about once a second.
const BEAT_TOLERANCE: Duration = Duration::from_millis(500);

/// How much longer than twice the agreed time a client may be silent.
const BEAT_GRACE: Duration = Duration::from_secs(2);

/// How long before its end the expiry of a token is announced to the client, in seconds.
const EXPIRY_NOTICE_S: u64 = 60;

/// Undecodable frames in a row after which the peer is assumed not to speak the protocol.
const MAX_UNDECODABLE: u32 = 32;

/// Commands in a row refused for their rate, after which a session is closed.
const MAX_RATE_STRIKES: u32 = 1000;

/// What all sessions of a shard share.
pub struct Context {
    /// The shard's rooms.
    pub rooms: Rc<Rooms>,
    /// Publishes over the shard's connection.
    pub publisher: Publisher,
    /// The edge's read markers.
    pub markers: Arc<Markers>,
    /// Presence, shared by all shards.
    pub presence: Arc<Presence>,
    /// Room records, shared by all shards.
    pub people: Arc<People>,
    /// Serves those sessions of the shard that watch rooms.
    pub desk: Rc<Desk>,
    /// The client of the history service.
    pub history: Arc<crate::history::Client>,
    /// The shard's number.
    pub shard: usize,
    /// Checks tokens.
    pub verifier: Arc<Verifier>,
    /// The process' configuration.
    pub config: Arc<Config>,
    /// Buffer for bytes just read. No session keeps anything in it between two reads.
    pub buffer: RefCell<Vec<u8>>,
    /// Takes one of a user's places; `None` if the user has too many sessions.
    pub admit_user: AdmitUser,
    /// How long the answer to a bad login waits.
    pub bad_login: BadLogin,
    /// Returns the shard to which a session with this first room should move, if it is another one.
    pub home: Home,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").finish_non_exhaustive()
    }
}

/// Gives a user a place, if one is left.
pub type AdmitUser = Box<dyn Fn(&str) -> Option<UserSlot>>;

/// Counts a bad login from an address, and returns how long its answer waits.
pub type BadLogin = Box<dyn Fn(std::net::IpAddr) -> Duration>;

/// One of the places of a user (`limits.sessions_per_user`) or of an address (`limits.sessions_per_ip`). Given back
/// when dropped.
pub type UserSlot = Box<dyn std::any::Any + Send>;

/// Returns a place on another shard, if a session whose first room this is should move there.
pub type Home = Box<dyn Fn(&RoomId) -> Option<Departure>>;

/// A reserved place on another shard. It takes the session's socket and its state.
pub type Departure = Box<dyn FnOnce(std::net::TcpStream, Carried)>;

/// The state of a session that is in no room yet, besides its socket.
#[derive(Debug)]
pub struct Carried {
    codec: Codec,
    identity: Option<Arc<Identity>>,
    user_slot: Option<UserSlot>,
    online: Option<Present>,
    address_slot: Option<UserSlot>,
    decoder: Decoder,
    reader: CommandReader,
    inbox: VecDeque<Inbound>,
    beats: Option<Beats>,
    pinged: u8,
    expiry_told: bool,
    /// Whether it has moved from another shard. Then it stays.
    moved: bool,
    /// Set if its frames go into the response of an HTTP request. Then it stays, too.
    stream: Option<Box<Stream>>,
}

impl Carried {
    /// The protocol of the client.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// The state of a new connection: its protocol, and the identity if a token came with the handshake.
    #[must_use]
    pub fn new(
        config: &Config,
        codec: Codec,
        identity: Option<Arc<Identity>>,
        user_slot: Option<UserSlot>,
        address_slot: Option<UserSlot>,
    ) -> Self {
        let limit = usize::try_from(config.limits.frame.as_u64()).unwrap_or(usize::MAX);
        Self {
            codec,
            identity,
            user_slot,
            online: None,
            address_slot,
            decoder: Decoder::new(limit, codec.is_binary()),
            reader: CommandReader::new(codec, limit),
            inbox: VecDeque::new(),
            beats: None,
            pinged: 0,
            expiry_told: false,
            moved: false,
            stream: None,
        }
    }
}

/// One connection of a user.
pub struct Session {
    id: u64,
    context: Rc<Context>,
    conn: Rc<Conn>,
    codec: Cell<Codec>,
    identity: RefCell<Option<Arc<Identity>>>,
    user_slot: RefCell<Option<UserSlot>>,
    /// The user is online as long as this is held.
    online: RefCell<Option<Present>>,
    address_slot: RefCell<Option<UserSlot>>,
    /// Whether the session stays on this shard: it has moved here for a room, or has tried to join one.
    settled: Cell<bool>,
    rooms: RefCell<HashMap<RoomId, Box<Seat>>>,
    replies: Rc<Replies>,
    opened: Instant,
    /// When the session began to wait for input; `None` while it does not. Whether the client reads is checked by the
    /// outbox ([`Conn::check_stall`]).
    last_seen: Cell<Option<Instant>>,
    next_ping: Cell<Instant>,
    expiry_told: Cell<bool>,
    pace: Cell<Pace>,
    rate_strikes: Cell<u32>,
    undecodable: Cell<u32>,
    draining: Cell<bool>,
    /// How many pings of the protocol are not answered yet.
    pinged: Cell<u8>,
    /// Whether the first command has come, and its rooms are being joined.
    connecting: Cell<bool>,
    /// The signs of life that were agreed on.
    beats: OnceCell<Box<Beating>>,
    streamed: Option<Box<Streamed>>,
    watching: RefCell<Watches>,
    /// Counts the session under its protocol.
    active: Cell<Held>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// The signs of life that were agreed on.
#[derive(Debug)]
struct Beating {
    beats: Beats,
    /// When the server gives the next one.
    next: Cell<Instant>,
}

impl Beating {
    fn new(beats: Beats, now: Instant) -> Self {
        Self {
            beats,
            next: Cell::new(now),
        }
    }

    /// Whether the server has to give a sign of life now.
    fn is_due(&self, now: Instant) -> bool {
        let due = |every: &Duration| {
            let is_due = now + BEAT_TOLERANCE >= self.next.get();
            if is_due {
                self.next.set(now + *every);
            }
            is_due
        };
        self.beats.server.as_ref().is_some_and(due)
    }
}

/// A session's place in one room.
#[derive(Debug)]
struct Seat {
    membership: Membership,
    /// The name of its subscription, in a protocol that has several for one room.
    subscription: Option<Box<str>>,
    /// The other subscriptions of the room.
    more: Vec<(Box<str>, Membership)>,
    /// The user is shown as present as long as this is held.
    _present: Option<Present>,
    watch: Option<Watch>,
    /// The token of the join, if it came with one.
    token: RefCell<Option<Arc<Identity>>>,
    /// What is known of the room's record. Held, so that it is followed.
    known: Arc<Known>,
}

/// What a session has read and not processed yet.
#[derive(Debug)]
pub struct Work {
    decoder: Decoder,
    reader: CommandReader,
    inbox: VecDeque<Inbound>,
    /// Further commands of a session whose frames go into the response of an HTTP request.
    commands: Option<Box<Further>>,
}

/// Something that was read and waits to be processed.
#[derive(Debug)]
enum Inbound {
    Request(Request),
    Close,
}

impl Session {
    /// Makes a session on `conn`. Also returns the work to begin with.
    #[must_use]
    pub fn new(
        id: u64,
        context: Rc<Context>,
        conn: Rc<Conn>,
        carried: Carried,
    ) -> (Rc<Self>, Work) {
        let Carried {
            codec,
            identity,
            user_slot,
            online,
            address_slot,
            decoder,
            reader,
            inbox,
            beats,
            pinged,
            expiry_told,
            moved,
            stream,
        } = carried;
        let (streamed, commands) = match stream {
            Some(stream) => {
                let (streamed, commands) = Streamed::new(*stream, &conn);
                (Some(Box::new(streamed)), Some(Box::new(commands)))
            }
            None => (None, None),
        };
        let opened = if moved {
            Counter::SessionMoved
        } else {
            Counter::SessionOpened(codec)
        };
        count(opened, 1);
        let now = Instant::now();
        let presence = &context.presence;
        let arrives = || presence.arrive(&identity.as_ref()?.user);
        let online = online.or_else(arrives);
        let session = Rc::new(Self {
            id,
            replies: Replies::new(Outlet::Socket(Rc::clone(&conn))),
            conn,
            codec: Cell::new(codec),
            identity: RefCell::new(identity),
            user_slot: RefCell::new(user_slot),
            online: RefCell::new(online),
            address_slot: RefCell::new(address_slot),
            settled: Cell::new(moved || streamed.is_some()),
            rooms: RefCell::default(),
            opened: now,
            last_seen: Cell::new(None),
            // Spread over the interval, so that sessions that reconnected together are not pinged together.
            next_ping: Cell::new(now + PING_EVERY.mul_f64(rand::random_range(0.5..1.0))),
            expiry_told: Cell::new(expiry_told),
            pace: Cell::new(Pace::new(now)),
            rate_strikes: Cell::new(0),
            undecodable: Cell::new(0),
            draining: Cell::new(false),
            pinged: Cell::new(pinged),
            connecting: Cell::new(false),
            beats: match beats {
                Some(beats) => OnceCell::from(Box::new(Beating::new(beats, now))),
                None => OnceCell::new(),
            },
            streamed,
            watching: RefCell::default(),
            context,
            active: Cell::new(Held::new(Gauge::SessionActive(codec))),
        });
        let work = Work {
            decoder,
            reader,
            inbox,
            commands,
        };
        (session, work)
    }

    /// Serves the connection until it is gone, or moves to another shard. `first` are bytes that came with the
    /// handshake, or the commands of a request whose response it is.
    pub async fn run(self: Rc<Self>, work: Work, mut first: Vec<u8>) {
        let Work {
            mut decoder,
            mut reader,
            mut inbox,
            mut commands,
        } = work;
        self.tell_expiry(unix_s());
        let taken = match &commands {
            // Here and not where the request came in: only a shard knows what the names in it mean.
            Some(_) if !first.is_empty() => self.take_commands(&mut reader, &mut inbox, &first),
            Some(_) => Ok(()),
            None => self.take_in(&mut decoder, &mut reader, &mut inbox, &mut first),
        };
        let mut violation = taken.err();
        drop(first);
        loop {
            while self.conn.closing().is_none()
                && let Some(inbound) = inbox.pop_front()
            {
                match inbound {
                    Inbound::Request(request) => {
                        if violation.is_none()
                            && let Some(departure) = self.departure(&request).await
                            && let Some(stream) = self.conn.release()
                        {
                            inbox.push_front(Inbound::Request(request));
                            let work = Work {
                                decoder,
                                reader,
                                inbox,
                                commands,
                            };
                            return departure(stream, self.carried(work));
                        }
                        // Boxed, so that an idle session does not take up the memory of a command.
                        Box::pin(self.on_request(request)).await;
                    }
                    Inbound::Close => self.conn.close(Close::Normal),
                }
            }
            if let Some(close) = violation {
                self.conn.close(close);
            }
            if self.conn.closing().is_some() {
                break;
            }
            if self.codec.get() != Codec::Events {
                // From that one nothing is expected.
                self.last_seen.set(Some(Instant::now()));
            }
            let read = match &mut commands {
                // Boxed, so that it takes up no memory in other sessions.
                Some(more) => Box::pin(self.further(more, &mut reader, &mut inbox)).await,
                None => {
                    let read = self.conn.read_with(&self.context.buffer, |bytes| {
                        self.take_in(&mut decoder, &mut reader, &mut inbox, bytes)
                    });
                    read.await
                }
            };
            self.last_seen.set(None);
            violation = match read {
                Ok(Some(fed)) => fed.err(),
                Ok(None) => break,
                Err(error) => {
                    tracing::debug!(session.id = self.id, %error, "a connection broke");
                    break;
                }
            };
        }
        // What was not processed is dropped, and the rooms are left, however long the connection takes to end.
        drop((decoder, reader, inbox));
        self.rooms.borrow_mut().clear();
        drop(self.watching.take());
        self.user_slot.borrow_mut().take();
        drop(self.online.take());
        self.conn.close(Close::Normal);
        count(
            Counter::SessionClosed(self.conn.closing().unwrap_or(Close::Normal)),
            1,
        );
        self.conn.closed().await;
    }

    /// The place on the home shard of the first room that the session joins, if the session can move there. Members on
    /// one shard are woken together, and their room needs only one hub and one subscription. A session moves at most
    /// once, and only while it has no reply pending.
    async fn departure(&self, request: &Request) -> Option<Departure> {
        let Ok(Command::Join { room, .. }) = &request.command else {
            return None;
        };
        let may_go = !self.settled.replace(true)
            && !self.draining.get()
            && self.identity.borrow().is_some()
            && self.rooms.borrow().is_empty()
            && self.watching.borrow().is_empty()
            && self.replies.is_idle();
        if !may_go {
            return None;
        }
        // Before a place is taken: otherwise a peer that does not read would hold a place that others wait for.
        self.conn.drained(0).await;
        (self.context.home)(room)
    }

    fn carried(&self, work: Work) -> Carried {
        let Work {
            decoder,
            reader,
            inbox,
            commands: _,
        } = work;
        Carried {
            codec: self.codec.get(),
            identity: self.identity.take(),
            user_slot: self.user_slot.take(),
            online: self.online.take(),
            address_slot: self.address_slot.take(),
            decoder,
            reader,
            inbox,
            beats: self.beats.get().map(|beating| beating.beats),
            pinged: self.pinged.get(),
            expiry_told: self.expiry_told.get(),
            moved: true,
            // One with a stream does not move.
            stream: None,
        }
    }

    /// Decodes what was read. Pings are answered right away; they need not wait for commands.
    fn take_in(
        &self,
        decoder: &mut Decoder,
        reader: &mut CommandReader,
        inbox: &mut VecDeque<Inbound>,
        bytes: &mut [u8],
    ) -> Result<(), Close> {
        decoder.feed(bytes, |incoming| match incoming {
            Incoming::Text(text) => {
                reader.text(text, |request| inbox.push_back(Inbound::Request(request)));
            }
            Incoming::Binary(message) => {
                reader.binary(message, |request| {
                    inbox.push_back(Inbound::Request(request))
                });
            }
            Incoming::Ping(payload) => {
                if self.within_pace() {
                    self.conn.send(&[pong_frame(payload)]);
                }
            }
            Incoming::Pong => {}
            Incoming::Close { .. } => inbox.push_back(Inbound::Close),
        })
    }

    /// Whether one more command is within `limits.commands_per_second`. Counts it.
    fn within_pace(&self) -> bool {
        let limits = &self.context.config.limits;
        let mut pace = self.pace.get();
        let within = pace.take(
            Instant::now(),
            limits.commands_per_second,
            limits.commands_burst,
        );
        self.pace.set(pace);
        within
    }

    /// Called by the shard about once a second.
    pub fn tick(self: &Rc<Self>, now: Instant) {
        if self.conn.closing().is_some() {
            return;
        }
        self.conn.check_stall(now);
        let first_frame = self.context.config.auth.first_frame_timeout;
        if self.identity.borrow().is_none()
            && !self.connecting.get()
            && now.duration_since(self.opened) >= first_frame
        {
            count(Counter::SessionRefused(metrics::Admission::FirstFrame), 1);
            return self.conn.close(Close::Stale);
        }
        let last_seen = self.last_seen.get();
        let beating = self.beats.get();
        let client = beating.and_then(|beating| beating.beats.client);
        // Clients look at the time only now and then.
        let dead_after =
            client.map_or(DEAD_AFTER, |every| (2 * every + BEAT_GRACE).min(DEAD_AFTER));
        if last_seen.is_some_and(|seen| now.duration_since(seen) >= dead_after) {
            return self.conn.close(Close::PingTimeout);
        }
        if now >= self.next_ping.get() {
            self.next_ping.set(now + PING_EVERY);
            self.pinged.set(self.pinged.get().saturating_add(1));
            self.conn.send(&[self.codec.get().ping()]);
        }
        if beating.is_some_and(|beating| beating.is_due(now)) {
            self.conn.send(&[stomp::sign_of_life()]);
        }
        let now_s = unix_s();
        self.tell_expiry(now_s);
        self.end_expired(now_s);
        // Give up the places in rooms that have ended the membership: a client that has not joined again is not present
        // there.
        let mut rooms = self.rooms.borrow_mut();
        let before = rooms.len();
        rooms.retain(|_, seat| !seat.membership.has_ended());
        if rooms.len() < before && self.codec.get() == Codec::Events {
            // The client joins with a request only.
            self.conn.close(Close::GoingAway);
        }
    }

    /// Closes the connection if its token is revoked.
    pub(crate) fn close_if_revoked(&self) {
        let now_s = unix_s();
        let revoked = self
            .identity
            .borrow()
            .as_ref()
            .is_some_and(|identity| self.context.verifier.is_revoked(identity, now_s));
        if revoked {
            self.conn.close(Close::Revoked);
        }
        self.end_expired(now_s);
    }

    /// Tells the client when its token is about to expire. Closes the connection when the token has expired or is
    /// revoked.
    fn tell_expiry(&self, now_s: u64) {
        let Some(identity) = self.identity.borrow().clone() else {
            return;
        };
        if self.context.verifier.is_revoked(&identity, now_s) {
            // The session may have moved to this shard after the revocation was announced.
            self.conn.close(Close::Revoked);
        } else if now_s >= self.context.verifier.deadline(&identity) {
            self.conn.close(Close::Expired);
        } else if !self.expiry_told.get() && now_s + EXPIRY_NOTICE_S >= identity.exp {
            self.expiry_told.set(true);
            self.push(&Event::TokenExpiring { exp: identity.exp });
        }
    }

    /// Leaves the rooms that the session joined with a token which has expired or is revoked.
    fn end_expired(&self, now_s: u64) {
        let verifier = &self.context.verifier;
        let is_over = |seat: &Seat| {
            let token = seat.token.borrow();
            token.as_ref().is_some_and(|token| {
                now_s >= verifier.deadline(token) || verifier.is_revoked(token, now_s)
            })
        };
        let over: Vec<RoomId> = {
            let rooms = self.rooms.borrow();
            let over = rooms.iter().filter(|(_, seat)| is_over(seat));
            over.map(|(room, _)| room.clone()).collect()
        };
        for room in over {
            self.rooms.borrow_mut().remove(&room);
            let code = "expired";
            self.push(&Event::Kicked { room, code });
        }
    }

    /// Tells the client to reconnect elsewhere, and closes the connection after every command taken so far is answered.
    pub async fn drain(self: Rc<Self>) {
        // Commands that arrive from now on are not taken. They get no reply, so the client retries them elsewhere.
        self.draining.set(true);
        // Replies don't wait for a client that does not read either. They are queued as far as the outbox allows.
        self.replies.hurry();
        self.replies.idle().await;
        let after_ms = rand::random_range(0..500);
        self.push(&Event::Reconnect { after_ms });
        self.conn.close(Close::Draining);
    }

    /// Bytes that wait for the client to read: the queue of its connection, and the replies that wait here.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.conn.queued_bytes() + self.replies.held_bytes()
    }

    fn push(&self, event: &Event) {
        if let Some(frame) = self.codec.get().event(event) {
            self.conn.send(&[frame]);
        }
    }
}
