//! What a message costs, in counts that a busy machine does not change: calls of the operating system for sockets, messages
//! of nats-server, allocations of the edge. A count that grows beyond its written bound fails.
//!
//! The edge runs in this process, so that its allocations are counted; nats-server is one of its own. Messages are sent one
//! by one: the next one when everybody has the last one. Each count is the smallest of many short rounds, so what happens
//! now and then (ticks, pings, read markers) is in none of them. Clients allocate nothing in a round.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do; the counts are shown"
)]

#[path = "../it/support/mod.rs"]
mod support;

use std::{
    alloc::System,
    fmt,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Instant,
};

use natter::testing::{
    edge::Edge,
    runtime::Phase,
    servers::{Process, free_port},
    telemetry::metrics::{Counter, MarkerWrite, SocketCall, counted},
};
use serde_json::Value;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use support::{
    LONG, launcher,
    mesh::{Mesh, answers, token},
    nats_with,
    raw::{FIN, TEXT, bearer, frame},
};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Messages of a round.
const MESSAGES: u32 = 20;
const ROUNDS: u32 = 25;
const BODY: usize = 256;

/// Counts of a round, or of a message.
#[derive(Debug, Clone, Copy)]
struct Counts {
    /// Reads and writes of clients' sockets.
    client_reads: f64,
    client_writes: f64,
    /// Reads and writes of the connections to NATS that carry messages.
    nats_reads: f64,
    nats_writes: f64,
    /// Messages that nats-server took in, and handed out.
    nats_in: f64,
    nats_out: f64,
    /// Allocations and reallocations, and their bytes.
    allocations: f64,
    bytes: f64,
}

/// Where the counters stand.
#[derive(Debug, Clone, Copy)]
struct Stand {
    calls: [u64; 4],
    nats: [u64; 2],
    allocations: usize,
    bytes: usize,
}

impl Counts {
    fn since(before: &Stand, after: &Stand) -> Self {
        let per = |before: u64, after: u64| {
            f64::from(u32::try_from(after - before).unwrap()) / f64::from(MESSAGES)
        };
        let call = |at: usize| per(before.calls[at], after.calls[at]);
        Self {
            client_reads: call(0),
            client_writes: call(1),
            nats_reads: call(2),
            nats_writes: call(3),
            nats_in: per(before.nats[0], after.nats[0]),
            nats_out: per(before.nats[1], after.nats[1]),
            allocations: per(before.allocations as u64, after.allocations as u64),
            bytes: per(before.bytes as u64, after.bytes as u64),
        }
    }

    fn all(&self) -> [(&'static str, f64); 8] {
        [
            ("reads of clients", self.client_reads),
            ("writes to clients", self.client_writes),
            ("reads of NATS", self.nats_reads),
            ("writes to NATS", self.nats_writes),
            ("messages into nats-server", self.nats_in),
            ("messages out of nats-server", self.nats_out),
            ("allocations", self.allocations),
            ("allocated bytes", self.bytes),
        ]
    }

    fn with(self, other: Self, merge: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            client_reads: merge(self.client_reads, other.client_reads),
            client_writes: merge(self.client_writes, other.client_writes),
            nats_reads: merge(self.nats_reads, other.nats_reads),
            nats_writes: merge(self.nats_writes, other.nats_writes),
            nats_in: merge(self.nats_in, other.nats_in),
            nats_out: merge(self.nats_out, other.nats_out),
            allocations: merge(self.allocations, other.allocations),
            bytes: merge(self.bytes, other.bytes),
        }
    }

    /// What is above its bound.
    fn above(&self, bounds: &Self) -> Vec<String> {
        let pairs = self.all().into_iter().zip(bounds.all());
        let above = pairs.filter(|((_, count), (_, bound))| count > bound);
        above
            .map(|((name, count), (_, bound))| format!("{name}: {count:.2}, at most {bound}"))
            .collect()
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, count) in self.all() {
            write!(f, "{count:.2} {name}; ")?;
        }
        Ok(())
    }
}

/// A member: a blocking socket, which is read into one buffer.
struct Client {
    stream: TcpStream,
    unread: Vec<u8>,
    end: usize,
}

impl Client {
    fn join(address: SocketAddr, user: &str, room: &str) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        let request = format!(
            "GET /ws HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{}\r\n",
            bearer(&token(user))
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.extend(byte);
        }
        assert!(
            head.starts_with(b"HTTP/1.1 101"),
            "{}",
            String::from_utf8_lossy(&head)
        );
        let mut client = Self {
            stream,
            unread: vec![0; 64 * 1024],
            end: 0,
        };
        let join = format!(r#"{{"op":"join","rid":0,"room":"{room}"}}"#);
        client.send(&frame(FIN | TEXT, join.as_bytes()));
        while client.frame(|text| !text.starts_with(br#"{"op":"joined""#)) {}
        client
    }

    fn send(&mut self, frame: &[u8]) {
        self.stream.write_all(frame).unwrap();
    }

    /// Passes the next frame to `look`.
    fn frame<T>(&mut self, look: impl FnOnce(&[u8]) -> T) -> T {
        loop {
            let unread = &self.unread[..self.end];
            let (head, length) = match unread.get(1) {
                Some(126) => match unread.get(2..4) {
                    Some(length) => (
                        4,
                        usize::from(u16::from_be_bytes(length.try_into().unwrap())),
                    ),
                    None => (4, usize::MAX - 4),
                },
                Some(&short) => {
                    assert!(short < 126, "so long a frame is not expected");
                    (2, usize::from(short))
                }
                None => (2, usize::MAX - 2),
            };
            let whole = head + length;
            if whole <= unread.len() {
                let looked = look(&unread[head..whole]);
                self.unread.copy_within(whole..self.end, 0);
                self.end -= whole;
                return looked;
            }
            let read = self.stream.read(&mut self.unread[self.end..]);
            let read = read.expect("a frame comes");
            assert!(read > 0, "the connection has ended");
            self.end += read;
        }
    }

    /// Waits until `count` messages, or acknowledgements, have come.
    fn take(&mut self, count: usize) {
        for _ in 0..count {
            self.frame(|text| {
                let known =
                    text.starts_with(br#"{"op":"msg""#) || text.starts_with(br#"{"op":"ack""#);
                assert!(known, "{}", String::from_utf8_lossy(text));
            });
        }
    }
}

/// An edge with one shard in this process, and a nats-server for it alone.
struct Bench {
    runtime: tokio::runtime::Runtime,
    address: SocketAddr,
    monitor: SocketAddr,
    edge: Option<Edge>,
    _mesh: Mesh,
    _nats: Process,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let local = || SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
        let (server, monitor, address) = (local(), local(), local());
        let conf = dir.path().join("nats.conf");
        let store = dir.path().join("store");
        let text = format!(
            "listen: \"{server}\"\nhttp: \"{monitor}\"\njetstream {{ store_dir: {store:?} }}\n"
        );
        std::fs::write(&conf, text).unwrap();
        let (nats, mesh, edge) = runtime.block_on(async {
            let spec = nats_with("nats-server", &conf, answers(monitor, "/healthz")).await;
            let mut nats = Process::new(launcher(), spec);
            nats.start().await.unwrap();
            let toml = "[edge]\nshards = 1\n[limits]\ncommands_per_second = 1000000\ncommands_burst = 1000000\n\
                 [namespaces.eph]\ndurable = false\ntyping = false\npresence = \"off\"\n\
                 [namespaces.log]\ndurable = true\ntyping = false\npresence = \"off\"\nhistory = false\n";
            let mesh = Mesh::without_edges(&format!("nats://{server}"), toml).await;
            let mut config = mesh.config.clone();
            config.edge.listen = address;
            let edge = Edge::start(config).await.unwrap();
            assert_eq!(edge.lifecycle().reached(Phase::Ready).await, Phase::Ready);
            (nats, mesh, edge)
        });
        Self {
            runtime,
            address,
            monitor,
            edge: Some(edge),
            _mesh: mesh,
            _nats: nats,
            _dir: dir,
        }
    }

    /// What nats-server has taken in and handed out.
    fn nats(&self) -> [u64; 2] {
        let mut stream = TcpStream::connect(self.monitor).unwrap();
        // In this version the answer is not cut into chunks.
        stream.write_all(b"GET /varz HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        let varz: Value = serde_json::from_str(body).unwrap();
        ["in_msgs", "out_msgs"].map(|name| varz[name].as_u64().unwrap())
    }

    /// The counters, those of nats-server apart: to ask it takes calls and allocations.
    fn here() -> Stand {
        let allocated = ALLOCATOR.stats();
        Stand {
            calls: [
                SocketCall::ClientRead,
                SocketCall::ClientWrite,
                SocketCall::NatsRead,
                SocketCall::NatsWrite,
            ]
            .map(|call| counted(Counter::SocketCalls(call))),
            nats: [0; 2],
            allocations: allocated.allocations + allocated.reallocations,
            bytes: allocated.bytes_allocated,
        }
    }

    /// What a message costs in a room with so many members, the sender included.
    fn measure(&self, room: &str, members: usize) -> Counts {
        let join = |number| Client::join(self.address, &format!("user-{number}"), room);
        let mut clients: Vec<Client> = (0..members).map(join).collect();
        let body = "x".repeat(BODY);
        let mut next = 0;
        let mut rounds: Vec<Counts> = Vec::new();
        // The first round warms up.
        for round in 0..=ROUNDS {
            let frames: Vec<Vec<u8>> = (0..MESSAGES)
                .map(|_| {
                    next += 1;
                    let text = format!(
                        r#"{{"op":"send","rid":{next},"room":"{room}","id":"message-{next}","body":"{body}"}}"#
                    );
                    frame(FIN | TEXT, text.as_bytes())
                })
                .collect();
            let nats = self.nats();
            let mut before = Self::here();
            for frame in &frames {
                let (sender, others) = clients.split_first_mut().unwrap();
                sender.send(frame);
                sender.take(2);
                others.iter_mut().for_each(|other| other.take(1));
            }
            let mut after = Self::here();
            (before.nats, after.nats) = (nats, self.nats());
            let counts = Counts::since(&before, &after);
            if round > 0 {
                rounds.push(counts);
            }
        }
        let merged = |merge: fn(f64, f64) -> f64| {
            let rounds = rounds.iter().copied();
            rounds.reduce(|a, b| a.with(b, merge)).unwrap()
        };
        let (smallest, sum) = (merged(f64::min), merged(|a, b| a + b));
        let mean = sum.with(sum, |sum, _| sum / f64::from(ROUNDS));
        println!("{room}, {members} members, a message, at least: {smallest}");
        println!("{room}, {members} members, a message, mean: {mean}");
        smallest
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some(edge) = self.edge.take() {
            let drained = self.runtime.block_on(edge.drain());
            if !std::thread::panicking() {
                drained.unwrap();
            }
        }
    }
}

fn bounds(calls: [f64; 4], nats: [f64; 2], allocations: f64, bytes: f64) -> Counts {
    Counts {
        client_reads: calls[0],
        client_writes: calls[1],
        nats_reads: calls[2],
        nats_writes: calls[3],
        nats_in: nats[0],
        nats_out: nats[1],
        allocations,
        bytes,
    }
}

/// One test, since the counters are those of the process.
#[test]
fn a_message_costs_no_more_than_is_written_here() {
    let bench = Bench::start();
    // A durable message is read back and acknowledged: with two reads of NATS at most, its sender gets what it said and the
    // acknowledgement in two writes at most.
    let loads = [
        (
            "log:two",
            2,
            bounds([1.0, 3.0, 2.0, 1.0], [1.0, 2.0], 30.0, 5_800.0),
        ),
        (
            "log:twenty",
            20,
            bounds([1.0, 21.0, 2.0, 1.0], [1.0, 2.0], 30.0, 5_850.0),
        ),
        (
            "eph:two",
            2,
            bounds([1.0, 3.0, 1.0, 1.0], [1.0, 1.0], 20.0, 4_900.0),
        ),
        (
            "eph:twenty",
            20,
            bounds([1.0, 21.0, 1.0, 1.0], [1.0, 1.0], 20.0, 4_900.0),
        ),
    ];
    let mut above = Vec::new();
    let (began, written) = (Instant::now(), Counter::MarkerWrites(MarkerWrite::Written));
    let before = counted(written);
    for (room, members, bounds) in loads {
        let counts = bench.measure(room, members);
        above.extend(
            counts
                .above(&bounds)
                .into_iter()
                .map(|what| format!("{room}: {what}")),
        );
    }
    // The marker of each of the two senders, at most once in a second.
    let (markers, seconds) = (counted(written) - before, began.elapsed().as_secs() + 1);
    println!("{markers} read markers written in {seconds} s");
    if markers > 2 * (seconds + 1) {
        above.push(format!("{markers} read markers in {seconds} s"));
    }
    assert!(above.is_empty(), "{above:#?}");
}
