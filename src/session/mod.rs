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
//! The socket's bytes are `wire`'s business, how a client protocol spells its words is `codec`'s; here is what they mean. A session
//! reads only while it has no command to work on: a client that sends faster than it is served is slowed down by TCP.
//!
//! # Invariants
//! - Every command gets exactly one reply, in order, except that acks of different rooms may overtake each other
//!   (`Replies`).
//! - What is queued for the client is counted, and bounded: no command is taken while its replies to earlier ones are not read.
//! - Pushes of a room begin after the reply to its join and end with the reply to its leave.

pub(crate) mod answers;
mod commands;
mod replies;

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    auth::{Identity, Verifier},
    bus::Publisher,
    codec::{Codec, Request},
    config::Config,
    model::RoomId,
    presence::{Presence, Present, Watch},
    protocol::{Close, Command, Event},
    read_marker::Markers,
    room::{Membership, Rooms},
    runtime::{Pace, unix_s},
    telemetry::metrics::{self, Counter, Gauge, Held, count},
    wire::{Conn, Decoder, Incoming, Outlet, pong_frame},
};
use replies::Replies;

/// How often a peer is pinged.
const PING_EVERY: Duration = Duration::from_secs(25);

/// A peer that gave no sign of life for this long is closed; with the grace of a close it is gone within 60 s.
const DEAD_AFTER: Duration = Duration::from_secs(45);

/// How long before its end a client is told that its token runs out, in seconds.
const EXPIRY_NOTICE_S: u64 = 60;

/// Undecodable frames in a row after which the peer is taken for something that does not speak the protocol.
const MAX_UNDECODABLE: u32 = 32;

/// Refusals for rate in a row after which a session is closed.
const MAX_RATE_STRIKES: u32 = 1000;

/// What all sessions of a shard share.
pub struct Context {
    /// The shard's rooms.
    pub rooms: Rc<Rooms>,
    /// Publishes over the shard's connection.
    pub publisher: Publisher,
    /// The edge's read markers.
    pub markers: Arc<Markers>,
    /// Who is where, on all shards.
    pub presence: Arc<Presence>,
    /// What was said before.
    pub history: Arc<crate::history::Client>,
    /// The shard's number.
    pub shard: usize,
    /// Checks tokens.
    pub verifier: Arc<Verifier>,
    /// The process' configuration.
    pub config: Arc<Config>,
    /// Bytes just read; nobody keeps any between two reads.
    pub buffer: RefCell<Vec<u8>>,
    /// Counts a user's sessions; `None` means that there are too many.
    pub admit_user: AdmitUser,
    /// Where a session with this first room belongs, if that is not here.
    pub home: Home,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").finish_non_exhaustive()
    }
}

/// Gives a user a place, if there is one.
pub type AdmitUser = Box<dyn Fn(&str) -> Option<UserSlot>>;

/// A user's place among `limits.sessions_per_user`, or an address' among `limits.sessions_per_ip`; given back when dropped.
pub type UserSlot = Box<dyn std::any::Any + Send>;

/// Says to which other shard a session goes whose first room this is.
pub type Home = Box<dyn Fn(&RoomId) -> Option<Departure>>;

/// A place on another shard that waits for a session: takes its socket and what it has.
pub type Departure = Box<dyn FnOnce(std::net::TcpStream, Carried)>;

/// What a session has besides its socket, before it is in any room.
#[derive(Debug)]
pub struct Carried {
    codec: Codec,
    identity: Option<Arc<Identity>>,
    user_slot: Option<UserSlot>,
    address_slot: Option<UserSlot>,
    decoder: Decoder,
    inbox: VecDeque<Inbound>,
    expiry_told: bool,
    /// It has been on another shard, and stays here.
    moved: bool,
}

impl Carried {
    /// What a new connection has: its protocol, and perhaps the identity of a token that came with the handshake.
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
            address_slot,
            decoder: Decoder::new(limit),
            inbox: VecDeque::new(),
            expiry_told: false,
            moved: false,
        }
    }
}

/// One connection of a user.
pub struct Session {
    id: u64,
    context: Rc<Context>,
    conn: Rc<Conn>,
    codec: Codec,
    identity: RefCell<Option<Arc<Identity>>>,
    user_slot: RefCell<Option<UserSlot>>,
    address_slot: RefCell<Option<UserSlot>>,
    /// It stays on this shard: it has come here for a room, or was in one.
    settled: Cell<bool>,
    rooms: RefCell<HashMap<RoomId, Seat>>,
    replies: Rc<Replies>,
    opened: Instant,
    /// The last sign of life, while it is listened to. What waits for a client to read is the business of the outbox' stall.
    last_seen: Cell<Option<Instant>>,
    next_ping: Cell<Instant>,
    expiry_told: Cell<bool>,
    pace: Cell<Pace>,
    rate_strikes: Cell<u32>,
    undecodable: Cell<u32>,
    draining: Cell<bool>,
    _active: Held,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// A session's place in one room.
#[derive(Debug)]
struct Seat {
    membership: Membership,
    /// Shown to others for as long as it is held.
    _present: Option<Present>,
    watch: Option<Watch>,
}

/// What a session has read and not worked on.
#[derive(Debug)]
pub struct Work {
    decoder: Decoder,
    inbox: VecDeque<Inbound>,
}

/// What was read and waits for its turn.
#[derive(Debug)]
enum Inbound {
    Request(Request),
    Close,
}

impl Session {
    /// A session on `conn`, and the work that it has to begin with.
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
            address_slot,
            decoder,
            inbox,
            expiry_told,
            moved,
        } = carried;
        let opened = if moved {
            Counter::SessionMoved
        } else {
            Counter::SessionOpened
        };
        count(opened, 1);
        let now = Instant::now();
        let session = Rc::new(Self {
            id,
            replies: Replies::new(Outlet::Socket(Rc::clone(&conn))),
            conn,
            codec,
            identity: RefCell::new(identity),
            user_slot: RefCell::new(user_slot),
            address_slot: RefCell::new(address_slot),
            settled: Cell::new(moved),
            rooms: RefCell::default(),
            opened: now,
            last_seen: Cell::new(None),
            // Spread over the interval: sessions that came back together are not pinged together.
            next_ping: Cell::new(now + PING_EVERY.mul_f64(rand::random_range(0.5..1.0))),
            expiry_told: Cell::new(expiry_told),
            pace: Cell::new(Pace::new(now)),
            rate_strikes: Cell::new(0),
            undecodable: Cell::new(0),
            draining: Cell::new(false),
            context,
            _active: Held::new(Gauge::SessionActive),
        });
        (session, Work { decoder, inbox })
    }

    /// Serves the connection until it is gone, or goes on on another shard. `first`: bytes that came with the handshake.
    pub async fn run(self: Rc<Self>, work: Work, mut first: Vec<u8>) {
        let Work {
            mut decoder,
            mut inbox,
        } = work;
        self.tell_expiry(unix_s());
        let mut violation = self.take_in(&mut decoder, &mut inbox, &mut first).err();
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
                            return departure(stream, self.carried(Work { decoder, inbox }));
                        }
                        // Apart: an idle session has no use for the room that a command takes.
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
            self.last_seen.set(Some(Instant::now()));
            let read = self.conn.read_with(&self.context.buffer, |bytes| {
                self.take_in(&mut decoder, &mut inbox, bytes)
            });
            let read = read.await;
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
        // Out of the rooms at once, whatever the end of the connection takes.
        self.rooms.borrow_mut().clear();
        self.user_slot.borrow_mut().take();
        self.conn.close(Close::Normal);
        count(
            Counter::SessionClosed(self.conn.closing().unwrap_or(Close::Normal)),
            1,
        );
        self.conn.closed().await;
    }

    /// The way to the shard of its first room, before it is in any: members that are together are woken together, and their
    /// room needs one hub and one subscription. Only once, and only with nothing under way.
    async fn departure(&self, request: &Request) -> Option<Departure> {
        let Ok(Command::Join { room, .. }) = &request.command else {
            return None;
        };
        let may_go = !self.settled.replace(true)
            && !self.draining.get()
            && self.identity.borrow().is_some()
            && self.replies.is_idle();
        if !may_go {
            return None;
        }
        // First: a place that is held for a peer that does not read would be one that others wait for.
        self.conn.drained(0).await;
        (self.context.home)(room)
    }

    fn carried(&self, Work { decoder, inbox }: Work) -> Carried {
        Carried {
            codec: self.codec,
            identity: self.identity.take(),
            user_slot: self.user_slot.take(),
            address_slot: self.address_slot.take(),
            decoder,
            inbox,
            expiry_told: self.expiry_told.get(),
            moved: true,
        }
    }

    /// Decodes what was read. Pings are answered at once: they need no turn.
    fn take_in(
        &self,
        decoder: &mut Decoder,
        inbox: &mut VecDeque<Inbound>,
        bytes: &mut [u8],
    ) -> Result<(), Close> {
        decoder.feed(bytes, |incoming| match incoming {
            Incoming::Text(text) => {
                let codec = self.codec;
                codec.decode(text, |request| inbox.push_back(Inbound::Request(request)));
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

    /// Whether one more command keeps within `limits.commands_per_second`.
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

    /// The shard's tick, about once a second.
    pub fn tick(self: &Rc<Self>, now: Instant) {
        if self.conn.closing().is_some() {
            return;
        }
        self.conn.check_stall(now);
        let first_frame = self.context.config.auth.first_frame_timeout;
        if self.identity.borrow().is_none() && now.duration_since(self.opened) >= first_frame {
            count(Counter::SessionRefused(metrics::Admission::FirstFrame), 1);
            return self.conn.close(Close::BadToken);
        }
        let last_seen = self.last_seen.get();
        if last_seen.is_some_and(|seen| now.duration_since(seen) >= DEAD_AFTER) {
            return self.conn.close(Close::PingTimeout);
        }
        if now >= self.next_ping.get() {
            self.next_ping.set(now + PING_EVERY);
            self.conn.send(&[self.codec.ping()]);
        }
        self.tell_expiry(unix_s());
        // Who was let go by a room and has not come back is not there any more.
        self.rooms
            .borrow_mut()
            .retain(|_, seat| !seat.membership.has_ended());
    }

    /// Closes the connection if its token is revoked.
    pub(crate) fn close_if_revoked(&self) {
        let revoked = self
            .identity
            .borrow()
            .as_ref()
            .is_some_and(|identity| self.context.verifier.is_revoked(identity, unix_s()));
        if revoked {
            self.conn.close(Close::Revoked);
        }
    }

    /// Tells the client that its token runs out, and closes when it has or is revoked.
    fn tell_expiry(&self, now_s: u64) {
        let Some(identity) = self.identity.borrow().clone() else {
            return;
        };
        if self.context.verifier.is_revoked(&identity, now_s) {
            // It may have come to this shard after that was told.
            self.conn.close(Close::Revoked);
        } else if now_s >= self.context.verifier.deadline(&identity) {
            self.conn.close(Close::BadToken);
        } else if !self.expiry_told.get() && now_s + EXPIRY_NOTICE_S >= identity.exp {
            self.expiry_told.set(true);
            self.push(&Event::TokenExpiring { exp: identity.exp });
        }
    }

    /// Tells the client to come back elsewhere, and closes once every command taken so far is answered.
    pub async fn drain(self: Rc<Self>) {
        // What is read from here on is not taken: without a reply the client repeats it elsewhere.
        self.draining.set(true);
        // Nor does it wait for a client that does not read: its queue takes what it can.
        self.replies.hurry();
        self.replies.idle().await;
        let after_ms = rand::random_range(0..500);
        self.push(&Event::Reconnect { after_ms });
        self.conn.close(Close::Draining);
    }

    /// Bytes that wait for the client to read: in its connection's queue, and replies that are to go there.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.conn.queued_bytes() + self.replies.held_bytes()
    }

    fn push(&self, event: &Event) {
        self.conn.send(&[self.codec.event(event)]);
    }
}
