//! Many clients in one thread: raw sockets, `epoll`, frames found by scanning. What it costs is not counted, but it shares the
//! machine with what is measured.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{Timespec, epoll},
    net::sockopt,
};

use super::{
    dialect::{Dialect, Seen, body},
    measure::Tally,
};

/// Bytes read at once, and the largest frame.
const BUFFER: usize = 512 * 1024;
/// Handshakes under way at once.
const OPENING: usize = 128;
/// How long anything may take before the benchmark gives up.
const LONG: Duration = Duration::from_secs(120);

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The handshake is on its way.
    Opening,
    /// It waits for the answer to the join.
    Joining,
    /// It is in its room, or publishes.
    In,
    /// It is over.
    Closed,
}

#[derive(Debug)]
struct Client {
    stream: TcpStream,
    stage: Stage,
    /// `None`: only publishes.
    room: Option<usize>,
    user: String,
    /// An unfinished frame.
    rest: Vec<u8>,
    carry: Vec<u8>,
    /// What the socket did not take yet.
    out: Vec<u8>,
    /// Number of the message that comes next.
    next: Option<u64>,
    cursor: String,
    /// It does not read.
    paused: bool,
    /// What ends each piece of its stream; `None`: it has a WebSocket.
    piece_end: Option<&'static [u8]>,
}

/// Clients of one server.
pub(crate) struct Swarm {
    dialect: Box<dyn Dialect>,
    address: SocketAddr,
    rooms: Vec<String>,
    epoll: OwnedFd,
    clients: Vec<Client>,
    buffer: Vec<u8>,
    epoch: Instant,
    /// Messages said so far, by room.
    said: Vec<u64>,
    rid: u64,
    /// What is said whatever else is done.
    load: Option<Load>,
    /// Whether cursors are kept, to resume with.
    pub(crate) keep_cursors: bool,
    /// Whose latency counts.
    pub(crate) observed: std::ops::Range<usize>,
    pub(crate) tally: Tally,
}

/// Messages that are due at a pace.
#[derive(Debug, Clone)]
struct Load {
    publishers: std::ops::Range<usize>,
    rooms: usize,
    pause: Duration,
    start: Instant,
    /// How many there are, and have been said.
    total: u32,
    said: u32,
}

impl Load {
    fn next_due(&self) -> Option<Instant> {
        (self.said < self.total).then(|| self.start + self.pause * self.said)
    }
}

impl Swarm {
    pub(crate) fn new(dialect: Box<dyn Dialect>, address: SocketAddr, rooms: Vec<String>) -> Self {
        Self {
            dialect,
            address,
            said: vec![0; rooms.len()],
            rooms,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC).unwrap(),
            clients: Vec::new(),
            buffer: vec![0; BUFFER],
            epoch: Instant::now(),
            rid: 0,
            load: None,
            keep_cursors: false,
            observed: 0..usize::MAX,
            tally: Tally::default(),
        }
    }

    /// Who connects from now on does so to `address`.
    pub(crate) fn go_to(&mut self, address: SocketAddr) {
        self.address = address;
    }

    /// Connects one client for each of `rooms` (`None`: it only publishes), with users of their own, and waits until all are
    /// in. Gives the index of the first.
    pub(crate) fn connect(&mut self, rooms: impl Iterator<Item = Option<usize>>) -> usize {
        let first = self.clients.len();
        let mut opening = 0;
        for room in rooms {
            let index = self.clients.len();
            let client = self.open(index, format!("user-{index}"), room);
            self.clients.push(client);
            opening += 1;
            if opening >= OPENING {
                let done = self.clients.len() - OPENING / 2;
                self.until("clients are in", |swarm| swarm.all_in(first..done));
                opening = OPENING / 2;
            }
        }
        let all = first..self.clients.len();
        self.until("clients are in", |swarm| swarm.all_in(all.clone()));
        first
    }

    fn open(&self, index: usize, user: String, room: Option<usize>) -> Client {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_nonblocking(true).unwrap();
        let (path, headers) = self.dialect.handshake(&user);
        let streamed = room.and_then(|room| self.dialect.stream(&user, &self.rooms[room]));
        let piece_end = streamed.as_ref().map(|(_, end)| *end);
        let upgrade = || {
            format!(
                "GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n",
                self.address
            )
        };
        let request = streamed.map_or_else(upgrade, |(request, _)| request);
        // A fresh socket takes it at once.
        (&stream).write_all(request.as_bytes()).unwrap();
        self.watch(&stream, index, false);
        Client {
            stream,
            stage: Stage::Opening,
            room,
            user,
            rest: Vec::new(),
            carry: Vec::new(),
            out: Vec::new(),
            next: None,
            cursor: String::new(),
            paused: false,
            piece_end,
        }
    }

    fn watch(&self, stream: &TcpStream, index: usize, writing: bool) {
        let mut flags = epoll::EventFlags::IN;
        if writing {
            flags |= epoll::EventFlags::OUT;
        }
        let data = epoll::EventData::new_u64(index as u64);
        match epoll::add(&self.epoll, stream, data, flags) {
            Err(rustix::io::Errno::EXIST) => {
                epoll::modify(&self.epoll, stream, data, flags).unwrap();
            }
            added => added.unwrap(),
        }
    }

    fn all_in(&self, mut clients: std::ops::Range<usize>) -> bool {
        clients.all(|index| self.clients[index].stage == Stage::In)
    }

    /// These clients are cut off at once.
    pub(crate) fn cut(&mut self, clients: std::ops::Range<usize>) {
        for client in &mut self.clients[clients] {
            client.stage = Stage::Closed;
            // With a reset, as when a network goes away.
            let gone = epoll::delete(&self.epoll, &client.stream);
            gone.unwrap();
            client.stream.shutdown(std::net::Shutdown::Both).unwrap();
        }
    }

    /// They come back with the cursors that they have.
    pub(crate) fn back(&mut self, clients: std::ops::Range<usize>) {
        let mut done = clients.start;
        for index in clients.clone() {
            let old = &mut self.clients[index];
            let (user, room) = (std::mem::take(&mut old.user), old.room);
            let (next, cursor) = (old.next, std::mem::take(&mut old.cursor));
            self.clients[index] = Client {
                next,
                cursor,
                ..self.open(index, user, room)
            };
            if index - done >= OPENING {
                done += OPENING / 2;
                self.until("clients are back", |swarm| {
                    swarm.all_in(clients.start..done)
                });
            }
        }
        self.until("clients are back", |swarm| swarm.all_in(clients.clone()));
    }

    /// A client enters more rooms; each entered one is counted in the tally.
    pub(crate) fn join(&mut self, client: usize, rooms: std::ops::Range<usize>) {
        for room in rooms {
            let enter = self.dialect.enter(&self.rooms[room], None);
            self.send(client, &enter);
        }
        self.turn(Duration::ZERO);
    }

    /// Publishes into the first `rooms` rooms for `time`, with `in_flight` that are not acknowledged yet.
    pub(crate) fn publish(
        &mut self,
        publishers: std::ops::Range<usize>,
        rooms: usize,
        in_flight: u64,
        time: Duration,
    ) {
        let end = Instant::now() + time;
        let (mut said, already) = (0, self.tally.acked);
        while Instant::now() < end {
            while said < self.tally.acked - already + in_flight {
                let n = usize::try_from(said).unwrap();
                let publisher = publishers.start + n % publishers.len();
                self.say(publisher, n % rooms, Instant::now());
                said += 1;
            }
            self.turn(Duration::from_millis(5));
        }
        self.until("all is acknowledged", |swarm| {
            swarm.tally.acked - already >= said
        });
    }

    /// Publishes one message; how long its acknowledgement took.
    pub(crate) fn publish_one(&mut self, publisher: usize, room: usize) -> Duration {
        let (began, already) = (Instant::now(), self.tally.acked);
        self.say(publisher, room, began);
        self.until("it is acknowledged", |swarm| swarm.tally.acked > already);
        began.elapsed()
    }

    /// Ends all connections.
    pub(crate) fn leave(&mut self) {
        self.clients.clear();
    }

    /// These clients stop reading; the kernel holds little for them.
    pub(crate) fn stop_reading(&mut self, clients: impl Iterator<Item = usize>) {
        for index in clients {
            self.clients[index].paused = true;
            sockopt::set_socket_recv_buffer_size(&self.clients[index].stream, 4096).unwrap();
            epoll::delete(&self.epoll, &self.clients[index].stream).unwrap();
        }
    }

    /// And begin again.
    pub(crate) fn go_on(&mut self, clients: impl Iterator<Item = usize>) {
        for index in clients {
            self.clients[index].paused = false;
            self.watch(&self.clients[index].stream, index, false);
        }
    }

    /// The number of messages that a client has got in a row.
    pub(crate) fn got(&self, client: usize) -> u64 {
        self.clients[client].next.unwrap_or_default()
    }

    /// Messages said so far in a room.
    pub(crate) fn said(&self, room: usize) -> u64 {
        self.said[room]
    }

    pub(crate) fn reset(&mut self) {
        self.tally = Tally::default();
    }

    /// Says the next message of a room, which was due at `due`.
    pub(crate) fn say(&mut self, client: usize, room: usize, due: Instant) {
        let t = due.saturating_duration_since(self.epoch).as_micros() as u64;
        let body = body(t, self.said[room]);
        self.said[room] += 1;
        self.rid += 1;
        let command = self.dialect.publish(&self.rooms[room], self.rid, &body);
        self.send(client, &command);
    }

    /// Says `rate` messages a second in each of the first `rooms` rooms, evenly spread, for `time`; then waits until every
    /// message has reached everybody, at most 5 s. `publishers`: the clients that say them, in turn.
    pub(crate) fn load(
        &mut self,
        publishers: std::ops::Range<usize>,
        rooms: usize,
        rate: f64,
        time: Duration,
    ) {
        self.begin(publishers, rooms, rate, time);
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.turn(end.saturating_duration_since(Instant::now()));
        }
        self.end();
        self.settle();
    }

    /// Begins to say what [`Self::load`] says, at most for `time`; it is said while other things are done.
    pub(crate) fn begin(
        &mut self,
        publishers: std::ops::Range<usize>,
        rooms: usize,
        rate: f64,
        time: Duration,
    ) {
        let pause = Duration::from_secs_f64(1.0 / (rate * rooms as f64));
        self.load = Some(Load {
            publishers,
            rooms,
            pause,
            start: Instant::now(),
            total: (time.as_secs_f64() / pause.as_secs_f64()).round() as u32,
            said: 0,
        });
    }

    /// Ends it; what was due is said.
    pub(crate) fn end(&mut self) {
        self.say_due();
        self.load = None;
    }

    /// Says what is due, a few messages at most before what has arrived is looked at.
    fn say_due(&mut self) {
        for _ in 0..8 {
            let now = Instant::now();
            let Some(load) = &mut self.load else { return };
            let Some(due) = load.next_due().filter(|due| *due <= now) else {
                return;
            };
            let room = load.said as usize % load.rooms;
            load.said += 1;
            let publisher = load.publishers.start + room % load.publishers.len();
            self.say(publisher, room, due);
        }
    }

    /// Waits until everybody in a room has everything, or for 5 s.
    pub(crate) fn settle(&mut self) {
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end && !self.is_settled() {
            self.turn(Duration::from_millis(20));
        }
    }

    /// Whether everybody who reads has everything.
    pub(crate) fn is_settled(&self) -> bool {
        let reading = |client: &&Client| client.stage == Stage::In && !client.paused;
        self.clients.iter().filter(reading).all(|client| {
            let has = |room: usize| client.next.is_none_or(|next| next >= self.said[room]);
            client.room.is_none_or(has)
        })
    }

    /// Keeps `window` messages of the first room under way to its `members` for `time`.
    pub(crate) fn saturate(&mut self, publisher: usize, members: u64, window: u64, time: Duration) {
        let end = Instant::now() + time;
        let (before, already) = (self.said[0], self.tally.deliveries);
        while Instant::now() < end {
            let through = (self.tally.deliveries - already) / members;
            if self.said[0] - before < through + window {
                self.say(publisher, 0, Instant::now());
            } else {
                self.turn(Duration::from_millis(5));
            }
        }
    }

    /// Goes on until `done`.
    pub(crate) fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let end = Instant::now() + LONG;
        while !done(self) {
            assert!(Instant::now() < end, "not within {LONG:?}: {what}");
            self.turn(Duration::from_millis(20));
        }
    }

    /// Handles what is there, or what comes within `wait`.
    pub(crate) fn turn(&mut self, wait: Duration) {
        self.say_due();
        let due = self.load.as_ref().and_then(Load::next_due);
        let wait = due.map_or(wait, |due| {
            wait.min(due.saturating_duration_since(Instant::now()))
        });
        let mut events = Vec::with_capacity(1024);
        let wait = Timespec {
            tv_sec: wait.as_secs().cast_signed(),
            tv_nsec: wait.subsec_nanos().into(),
        };
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            Some(&wait),
        ) {
            Err(rustix::io::Errno::INTR) => return,
            waited => waited.unwrap(),
        };
        for event in events {
            let index = usize::try_from(event.data.u64()).unwrap();
            let flags = event.flags;
            if flags.contains(epoll::EventFlags::OUT) {
                self.send(index, &[]);
            }
            if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP) {
                self.read(index);
            }
        }
    }

    fn read(&mut self, index: usize) {
        let client = &mut self.clients[index];
        let kept = client.rest.len();
        self.buffer[..kept].copy_from_slice(&client.rest);
        client.rest.clear();
        let read = match client.stream.read(&mut self.buffer[kept..]) {
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            Err(_) => return self.over(index),
        };
        if read == 0 {
            return self.over(index);
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut at = 0;
        let end = kept + read;
        if self.clients[index].stage == Stage::Opening {
            let Some(head) = buffer[..end].windows(4).position(|w| w == b"\r\n\r\n") else {
                self.clients[index].rest.extend_from_slice(&buffer[..end]);
                self.buffer = buffer;
                return;
            };
            let line = String::from_utf8_lossy(&buffer[..head]);
            at = head + 4;
            let client = &mut self.clients[index];
            client.stage = Stage::Joining;
            let is_stream = client.piece_end.is_some();
            let status = if is_stream { "200" } else { "101" };
            assert!(line.starts_with(&format!("HTTP/1.1 {status} ")), "{line}");
            let hello = self.dialect.hello(&client.user);
            if !is_stream {
                self.send(index, &hello);
            }
            let client = &mut self.clients[index];
            match client.room {
                // The request had it all.
                _ if is_stream => {}
                Some(room) => {
                    let since = (!client.cursor.is_empty()).then_some(client.cursor.as_str());
                    let enter = self.dialect.enter(&self.rooms[room], since);
                    self.send(index, &enter);
                }
                None => match self.dialect.alone() {
                    None => client.stage = Stage::In,
                    Some(alone) => self.send(index, &alone),
                },
            }
        }
        let now = self.epoch.elapsed().as_micros() as u64;
        if let Some(piece_end) = self.clients[index].piece_end {
            while let Some(length) = memchr::memmem::find(&buffer[at..end], piece_end) {
                self.on_payload(index, &buffer[at..at + length], now);
                at += length + piece_end.len();
            }
        }
        while self.clients[index].piece_end.is_none()
            && let Some((opcode, payload)) = frame(&buffer[at..end])
        {
            let payload = at + payload.start..at + payload.end;
            at = payload.end;
            let payload = &mut buffer[payload];
            match opcode {
                // Fragments are looked at one by one.
                0..=2 => self.on_payload(index, payload, now),
                8 => self.over(index),
                9 => {
                    let pong = masked(0x8a, payload);
                    self.send_raw(index, &pong);
                }
                _ => panic!("a frame with opcode {opcode}"),
            }
        }
        self.clients[index].rest.extend_from_slice(&buffer[at..end]);
        self.buffer = buffer;
    }

    fn on_payload(&mut self, index: usize, payload: &[u8], now: u64) {
        let Self {
            dialect,
            clients,
            tally,
            keep_cursors,
            observed,
            ..
        } = self;
        let client = &mut clients[index];
        let mut carry = std::mem::take(&mut client.carry);
        let mut answer = None;
        dialect.take(payload, &mut carry, &mut |seen| match seen {
            Seen::Message(t, n, cursor) => {
                tally.deliveries += 1;
                if observed.contains(&index) {
                    let latency = now.saturating_sub(t).max(1);
                    tally.latency.saturating_record(latency);
                }
                let expected = client.next.unwrap_or(n);
                if n < expected {
                    tally.repeated += 1;
                } else {
                    tally.lost += n - expected;
                    client.next = Some(n + 1);
                }
                if *keep_cursors && let Some(cursor) = cursor {
                    client.cursor.clear();
                    client.cursor.push_str(cursor);
                }
            }
            Seen::Joined => {
                client.stage = Stage::In;
                tally.joined += 1;
            }
            Seen::Acked => tally.acked += 1,
            Seen::Answer(text) => answer = Some(text),
            Seen::Refused(text) => panic!("not expected: {}", String::from_utf8_lossy(text)),
        });
        client.carry = carry;
        // A stream would have to answer with a request; no load takes so long that it must.
        if let Some(answer) = answer.filter(|_| client.piece_end.is_none()) {
            self.send(index, answer);
        }
    }

    fn over(&mut self, index: usize) {
        let client = &mut self.clients[index];
        if client.stage != Stage::Closed {
            client.stage = Stage::Closed;
            // One that does not read was taken off already.
            epoll::delete(&self.epoll, &client.stream).ok();
        }
    }

    fn send(&mut self, index: usize, payload: &[u8]) {
        let first = if self.dialect.is_text() { 0x81 } else { 0x82 };
        let frame = if payload.is_empty() {
            Vec::new()
        } else {
            masked(first, payload)
        };
        self.send_raw(index, &frame);
    }

    fn send_raw(&mut self, index: usize, frame: &[u8]) {
        let client = &mut self.clients[index];
        let was_behind = !client.out.is_empty();
        client.out.extend_from_slice(frame);
        while !client.out.is_empty() {
            match client.stream.write(&client.out) {
                Ok(written) => {
                    client.out.drain(..written);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return self.over(index),
            }
        }
        let is_behind = !client.out.is_empty();
        if was_behind != is_behind {
            self.watch(&self.clients[index].stream, index, is_behind);
        }
    }
}

/// The first frame, if it is all there: opcode and where its payload is.
fn frame(bytes: &[u8]) -> Option<(u8, std::ops::Range<usize>)> {
    let [first, second, rest @ ..] = bytes else {
        return None;
    };
    let (head, length) = match second & 0x7f {
        126 => (4, u16::from_be_bytes(*rest.first_chunk()?).into()),
        127 => (
            10,
            usize::try_from(u64::from_be_bytes(*rest.first_chunk()?)).unwrap(),
        ),
        length => (2, length.into()),
    };
    assert!(head + length <= BUFFER, "a frame of {length} bytes");
    (bytes.len() >= head + length).then(|| (first & 0x0f, head..head + length))
}

/// A client's frame, with a mask of zeros: what it costs the server to take it off is the same.
fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + 14);
    out.push(first);
    match payload.len() {
        length @ ..126 => out.push(0x80 | length as u8),
        length @ ..65536 => {
            out.push(0xfe);
            out.extend_from_slice(&(length as u16).to_be_bytes());
        }
        length => {
            out.push(0xff);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(payload);
    out
}
