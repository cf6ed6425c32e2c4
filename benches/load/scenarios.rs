//! What is measured.

mod push;
mod uploads;
mod watch;
mod workers;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use async_nats::{HeaderMap, jetstream};
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use natter::testing::{
    model::{Class, RoomId, partition_of},
    servers::{Process, free_port},
    subject::{Subjects, header},
};
use rand::{SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::{
    Table, dialect,
    measure::{Begin, Cost, MemoryGroup, NOISE, Runs, Server, latency, print},
    support::{
        DedicatedNats, LONG, dedicated_nats, launcher,
        mesh::{Mesh, answers},
        nats_with,
    },
    swarm::Swarm,
};

/// Not counted at the beginning of a run.
const WARM_UP: Duration = Duration::from_secs(2);
/// How often a run is repeated because of what else the machine did.
const TRIES: usize = 3;

type Scenario = fn(&mut Bench) -> Table;

pub(crate) const ALL: &[(&str, Scenario)] = &[
    ("fan-out", fan_out),
    ("saturated", saturated),
    ("protocols", protocols),
    ("idle", idle),
    ("handshakes", handshakes),
    ("publish", publish),
    ("members", members),
    ("rooms", rooms),
    ("hubs", hubs),
    ("storm", storm),
    ("slow", slow),
    ("small", small),
    ("uploads", uploads::uploads),
    ("inbox", watch::inbox),
    ("inbox-memory", watch::inbox_memory),
    ("watch", watch::watch_rooms),
    ("follow", watch::follow),
    ("workers", workers::workers),
    ("push", push::push),
];

/// What all scenarios share.
pub(crate) struct Bench {
    runtime: Runtime,
    runs: usize,
    time: Duration,
    /// Loads whose name has this; empty: all.
    only: String,
    nats: DedicatedNats,
    /// Messages lost or repeated so far, in all runs.
    pub(crate) faults: u64,
}

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    /// nats-server's own WebSocket.
    Nats,
    /// natter, rooms without a log.
    Ephemeral,
    /// natter, rooms with one.
    Durable,
    /// The same, with other client protocols.
    CentrifugalJson,
    CentrifugalProtobuf,
    Stomp,
    Events,
    CentrifugalStream,
}

impl Peer {
    const ALL: [Self; 3] = [Self::Nats, Self::Ephemeral, Self::Durable];

    const PROTOCOLS: [Self; 6] = [
        Self::Durable,
        Self::CentrifugalJson,
        Self::CentrifugalProtobuf,
        Self::Stomp,
        Self::Events,
        Self::CentrifugalStream,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Nats => "nats-server",
            Self::Ephemeral => "natter, ephemeral",
            Self::Durable => "natter, durable",
            Self::CentrifugalJson => "the same, Centrifugo's JSON",
            Self::CentrifugalProtobuf => "the same, Centrifugo's Protobuf",
            Self::Stomp => "the same, STOMP",
            Self::Events => "the same, text/event-stream",
            Self::CentrifugalStream => "the same, Centrifugo's http_stream",
        }
    }
}

/// Running servers of a peer.
struct Target {
    peer: Peer,
    /// One address an edge.
    addresses: Vec<SocketAddr>,
    /// The first is what clients connect to.
    servers: Vec<Server>,
    mesh: Option<Mesh>,
    /// nats-server with its WebSocket.
    _process: Option<(Process, TempDir)>,
}

impl Target {
    fn swarm(&self, rooms: usize) -> Swarm {
        let name = |room| match self.peer {
            Peer::Nats => format!("bench.r{room}"),
            Peer::Ephemeral => format!("eph:r{room}"),
            _ => format!("log:r{room}"),
        };
        let dialect: Box<dyn dialect::Dialect> = match self.peer {
            Peer::Nats => Box::new(dialect::Nats),
            Peer::Ephemeral | Peer::Durable => Box::new(dialect::Natter),
            Peer::CentrifugalJson => Box::new(dialect::CentrifugalJson),
            Peer::CentrifugalProtobuf => Box::new(dialect::CentrifugalProtobuf),
            Peer::Stomp => Box::new(dialect::Stomp),
            Peer::Events => Box::new(dialect::Events),
            Peer::CentrifugalStream => Box::new(dialect::CentrifugalStream),
        };
        Swarm::new(dialect, self.addresses[0], (0..rooms).map(name).collect())
    }

    fn edge(&self) -> &Server {
        &self.servers[0]
    }
}

/// A load of rooms with members.
#[derive(Debug, Clone, Copy)]
struct Load {
    rooms: usize,
    members: usize,
    /// Messages a second in each room.
    rate: f64,
}

impl Bench {
    pub(crate) fn new(runs: usize, time: Duration, only: String) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let nats = runtime.block_on(dedicated_nats());
        Self {
            runtime,
            runs,
            time,
            only,
            nats,
            faults: 0,
        }
    }

    fn target(&self, peer: Peer) -> Target {
        self.runtime.block_on(async {
            match peer {
                Peer::Nats => nats_websocket().await,
                _ => self.natter(peer, 1, "").await,
            }
        })
    }

    /// `limits`: more lines of that section of the configuration.
    async fn natter(&self, peer: Peer, edges: usize, limits: &str) -> Target {
        let toml = format!(
            "[limits]\n{limits}\ncommands_per_second = 10000000\ncommands_burst = 10000000\n\
             [namespaces.eph]\ndurable = false\ntyping = false\npresence = \"off\"\n\
             [namespaces.log]\ndurable = true\ntyping = false\npresence = \"off\"\nhistory = false\n"
        );
        let mesh = Mesh::start(&self.nats.url(), edges, &toml).await;
        let pid = mesh.edges[0].process.pid().unwrap();
        let nats = self.nats.server.pid().unwrap();
        Target {
            peer,
            addresses: mesh.edges.iter().map(|edge| edge.address).collect(),
            servers: vec![
                Server { name: "edge", pid },
                Server {
                    name: "nats",
                    pid: nats,
                },
            ],
            mesh: Some(mesh),
            _process: None,
        }
    }

    /// Runs `run` until nothing else took too much of the machine, a bounded number of times.
    fn quiet(&self, mut run: impl FnMut() -> (Cost, Vec<f64>)) -> Vec<f64> {
        for left in (0..TRIES).rev() {
            let (cost, figures) = run();
            if cost.other_cores <= NOISE || left == 0 {
                return figures;
            }
            eprintln!(
                "{:.2} cores were busy elsewhere: once more",
                cost.other_cores
            );
        }
        Vec::new()
    }

    /// A load on a peer that was just started: µs of the edge and of NATS a delivery, p50 and p99 in ms.
    fn load(&mut self, scenario: &str, peer: Peer, load: Load) -> Vec<f64> {
        let mut faults = 0;
        let figures = self.quiet(|| {
            let target = self.target(peer);
            let mut swarm = target.swarm(load.rooms);
            let mut members: Vec<_> = (0..load.rooms * load.members)
                .map(|i| Some(i % load.rooms))
                .collect();
            let publishers = if scenario == MEMBERS_SPEAK {
                // The first member of each room.
                0..load.rooms
            } else {
                // In an order that has nothing to do with the rooms, as people come.
                members.shuffle(&mut StdRng::seed_from_u64(7));
                publishers(&mut swarm, load.rooms)
            };
            swarm.connect(members.into_iter());
            swarm.load(publishers.clone(), load.rooms, load.rate, WARM_UP);
            swarm.reset();
            let said = |swarm: &Swarm| (0..load.rooms).map(|room| swarm.said(room)).sum::<u64>();
            let before = said(&swarm);
            let begin = Begin::now(&target.servers);
            swarm.load(publishers, load.rooms, load.rate, self.time);
            let cost = begin.end();
            let expected = (said(&swarm) - before) * load.members as u64;
            faults += print(scenario, peer.name(), &swarm.tally, expected, &cost);
            let each = |server| cost.cpu_of(server) / swarm.tally.deliveries.max(1) as f64;
            let [p50, _, p99, ..] = latency(&swarm.tally);
            let figures = vec![each("edge"), each("nats"), p50, p99];
            (cost, figures)
        });
        self.faults += faults;
        figures
    }

    fn load_row(&mut self, scenario: &str, peer: Peer, load: Load) -> Vec<String> {
        let mut runs = Runs::default();
        for _ in 0..self.runs {
            let figures = self.load(scenario, peer, load);
            runs.add(figures);
        }
        row(&[scenario, peer.name()], &runs)
    }
}

/// Clients that only say something: as many as there are rooms, up to 8.
fn publishers(swarm: &mut Swarm, rooms: usize) -> std::ops::Range<usize> {
    let count = rooms.min(8);
    let first = swarm.connect((0..count).map(|_| None));
    first..first + count
}

fn row(names: &[&str], runs: &Runs) -> Vec<String> {
    let names = names.iter().map(|&name| name.to_owned());
    names.chain(runs.columns()).collect()
}

/// A nats-server with nothing but its WebSocket.
async fn nats_websocket() -> Target {
    let dir = tempfile::tempdir().unwrap();
    let [port, web, monitor] = [(); 3].map(|()| free_port().unwrap());
    let config = format!(
        "listen: 127.0.0.1:{port}\nhttp: 127.0.0.1:{monitor}\nwebsocket {{ listen: \"127.0.0.1:{web}\", no_tls: true }}\n"
    );
    let file = dir.path().join("nats.conf");
    std::fs::write(&file, config).unwrap();
    let monitor = SocketAddr::from(([127, 0, 0, 1], monitor));
    let spec = nats_with("nats-server", &file, answers(monitor, "/healthz")).await;
    let mut process = Process::new(launcher(), spec);
    process.start().await.unwrap();
    Target {
        peer: Peer::Nats,
        addresses: vec![SocketAddr::from(([127, 0, 0, 1], web))],
        servers: vec![Server {
            name: "edge",
            pid: process.pid().unwrap(),
        }],
        mesh: None,
        _process: Some((process, dir)),
    }
}

const LOAD_COLUMNS: &[&str] = &[
    "load",
    "server",
    "edge, µs a delivery",
    "NATS, µs a delivery",
    "p50, ms",
    "p99, ms",
];

fn fan_out(bench: &mut Bench) -> Table {
    let mut rows = Vec::new();
    for (name, rooms, members, rate) in [
        ("1 x 1,000 at 20/s", 1, 1000, 20.0),
        ("1 x 1,000 at 100/s", 1, 1000, 100.0),
        ("100 x 20 at 10/s", 100, 20, 10.0),
        ("1,000 x 2 at 1/s", 1000, 2, 1.0),
        ("1,000 x 2 at 5/s", 1000, 2, 5.0),
        (MEMBERS_SPEAK, 1000, 2, 5.0),
    ] {
        let wanted = |peer: &&Peer| format!("{name}, {}", peer.name()).contains(&bench.only);
        for peer in Peer::ALL.iter().filter(wanted).copied().collect::<Vec<_>>() {
            rows.push(bench.load_row(
                name,
                peer,
                Load {
                    rooms,
                    members,
                    rate,
                },
            ));
        }
    }
    Table {
        title: "Fan-out: rooms x members, messages a second in each room",
        columns: LOAD_COLUMNS,
        rows,
    }
}

/// The one load in which it is a member that says something, and gets it, too.
const MEMBERS_SPEAK: &str = "1,000 x 2 at 5/s, said by members";

/// Messages under way at once in the saturated room.
const WINDOW: u64 = 64;

fn saturated(bench: &mut Bench) -> Table {
    let mut rows = Vec::new();
    for peer in Peer::ALL {
        let mut runs = Runs::default();
        for _ in 0..bench.runs {
            let mut faults = 0;
            let figures = bench.quiet(|| {
                let target = bench.target(peer);
                let mut swarm = target.swarm(1);
                let publisher = publishers(&mut swarm, 1).start;
                swarm.connect((0..1000).map(|_| Some(0)));
                swarm.saturate(publisher, 1000, WINDOW, WARM_UP);
                swarm.settle();
                swarm.reset();
                let before = swarm.said(0);
                let begin = Begin::now(&target.servers);
                swarm.saturate(publisher, 1000, WINDOW, bench.time);
                swarm.settle();
                let cost = begin.end();
                let expected = (swarm.said(0) - before) * 1000;
                faults += print("saturated", peer.name(), &swarm.tally, expected, &cost);
                let deliveries = swarm.tally.deliveries as f64;
                let figures = vec![
                    deliveries / cost.seconds,
                    cost.cpu_of("edge") / deliveries,
                    cost.cpu_of("nats") / deliveries,
                    cost.generator_cores,
                ];
                (cost, figures)
            });
            bench.faults += faults;
            runs.add(figures);
        }
        rows.push(row(&[peer.name()], &runs));
    }
    Table {
        title: "Saturated: one room of 1,000, 64 messages under way",
        columns: &[
            "server",
            "deliveries/s",
            "edge, µs a delivery",
            "NATS, µs a delivery",
            "generator, cores",
        ],
        rows,
    }
}

/// Bytes of the edge for each of `count` idle members of a room.
fn idle_bytes(bench: &Bench, peer: Peer, count: usize) -> f64 {
    let target = bench.target(peer);
    let mut swarm = target.swarm(1);
    // What the first connections bring with them is not theirs.
    swarm.connect((0..100).map(|_| Some(0)));
    let (before, _) = target.edge().memory();
    swarm.connect((100..count).map(|_| Some(0)));
    let (after, _) = target.edge().memory();
    after.saturating_sub(before) as f64 / (count - 100) as f64
}

fn protocols(bench: &mut Bench) -> Table {
    let mut runs = Peer::PROTOCOLS.map(|_| [Runs::default(), Runs::default(), Runs::default()]);
    // In turn, so that all of them meet the same noise.
    for _ in 0..bench.runs {
        for (peer, runs) in Peer::PROTOCOLS.into_iter().zip(&mut runs) {
            for (load, runs) in [(1, 1000, 100.0), (100, 20, 10.0)]
                .into_iter()
                .zip(runs.iter_mut())
            {
                let (rooms, members, rate) = load;
                let load = Load {
                    rooms,
                    members,
                    rate,
                };
                let figures = bench.load(&format!("{rooms} x {members}"), peer, load);
                runs.add(figures[..1].to_vec());
            }
            runs[2].add(vec![idle_bytes(bench, peer, 5000)]);
        }
    }
    let rows = Peer::PROTOCOLS.into_iter().zip(&runs).map(|(peer, runs)| {
        let figures = runs.iter().flat_map(Runs::columns);
        std::iter::once(peer.name().to_owned())
            .chain(figures)
            .collect()
    });
    Table {
        title: "Client protocols, durable rooms",
        columns: &[
            "server",
            "1 x 1,000 at 100/s: edge, µs a delivery",
            "100 x 20 at 10/s: edge, µs a delivery",
            "5,000 idle members: bytes each",
        ],
        rows: rows.collect(),
    }
}

fn idle(bench: &mut Bench) -> Table {
    let mut rows = Vec::new();
    for peer in Peer::ALL {
        for count in [10_000_usize, 19_000] {
            let mut runs = Runs::default();
            for _ in 0..bench.runs {
                runs.add(vec![idle_bytes(bench, peer, count)]);
            }
            rows.push(row(&[peer.name(), &count.to_string()], &runs));
        }
    }
    Table {
        title: "Idle members of one room: resident memory",
        columns: &["server", "connections", "bytes a connection"],
        rows,
    }
}

fn handshakes(bench: &mut Bench) -> Table {
    const CLIENTS: usize = 2000;
    let mut rows = Vec::new();
    for peer in Peer::ALL {
        let mut runs = Runs::default();
        for _ in 0..bench.runs {
            runs.add(bench.quiet(|| {
                let target = bench.target(peer);
                let mut swarm = target.swarm(10);
                swarm.connect((0..CLIENTS).map(|i| Some(i % 10)));
                let begin = Begin::now(&target.servers);
                let end = Instant::now() + bench.time;
                let mut count = 0;
                while Instant::now() < end {
                    swarm.leave();
                    swarm.connect((0..CLIENTS).map(|i| Some(i % 10)));
                    count += CLIENTS;
                }
                let cost = begin.end();
                let cpu = cost.cpu_of("edge") / 1e6;
                let figures = vec![count as f64 / cpu, count as f64 / cost.seconds];
                (cost, figures)
            }));
        }
        rows.push(row(&[peer.name()], &runs));
    }
    Table {
        title: "Connect, join one of ten rooms, leave",
        columns: &["server", "a CPU-second of the edge", "a second"],
        rows,
    }
}

/// Publishes that wait for their acknowledgement.
const IN_FLIGHT: u64 = 512;

fn publish(bench: &mut Bench) -> Table {
    let mut rows = Vec::new();
    let mut bare = Runs::default();
    let mut edge = Runs::default();
    for _ in 0..bench.runs {
        bare.add(bench.bare_publish());
        edge.add(bench.quiet(|| {
            let target = bench.target(Peer::Durable);
            let mut swarm = target.swarm(100);
            // Each is in the room to which it publishes, and gets its own messages.
            let first = swarm.connect((0..100).map(Some));
            let publishers = first..first + 100;
            swarm.publish(publishers.clone(), 100, IN_FLIGHT, WARM_UP);
            swarm.settle();
            swarm.reset();
            let begin = Begin::now(&target.servers);
            swarm.publish(publishers.clone(), 100, IN_FLIGHT, bench.time);
            let cost = begin.end();
            let acked = swarm.tally.acked as f64;
            let mut waits = Vec::new();
            for room in 0..1000 {
                waits.push(swarm.publish_one(publishers.start + room % 100, room % 100));
            }
            let figures = vec![
                acked / cost.seconds,
                cost.cpu_of("edge") / acked,
                cost.cpu_of("nats") / acked,
                median(waits),
            ];
            (cost, figures)
        }));
    }
    rows.push(row(&["async-nats, Nats-Msg-Id"], &bare));
    rows.push(row(&["natter, durable"], &edge));
    Table {
        title: "Publishing into 100 rooms, 512 waiting for their acknowledgement; then one by one",
        columns: &[
            "publisher",
            "acknowledged/s",
            "edge (publisher), µs each",
            "NATS, µs each",
            "p50 of one, µs",
        ],
        rows,
    }
}

fn median(mut waits: Vec<Duration>) -> f64 {
    waits.sort();
    waits[waits.len() / 2].as_secs_f64() * 1e6
}

impl Bench {
    /// What a program gets that publishes to the same streams itself, on a thread of its own.
    fn bare_publish(&self) -> Vec<f64> {
        let target = self.target(Peer::Durable);
        let mesh = target.mesh.as_ref().unwrap();
        let config = mesh.config.clone();
        let nats = target.servers[1].clone();
        let time = self.time;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let client = async_nats::connect(&config.nats.url).await.unwrap();
            let mut jetstream = jetstream::new(client);
            jetstream.set_timeout(LONG);
            let subjects = Subjects::new(&config.nats.prefix);
            let origin = config.region();
            let subjects: Vec<String> = (0..100)
                .map(|n| {
                    let room = RoomId::parse(&format!("log:r{n}")).unwrap();
                    let part = partition_of(&room, config.nats.partitions);
                    subjects.publish(&origin, part, &room, Class::Msg)
                })
                .collect();
            let mut count = 0_u64;
            let mut send = async || {
                count += 1;
                let mut headers = HeaderMap::new();
                headers.insert(header::MSG_ID, format!("log:r/user/{count}"));
                headers.insert(header::FROM, "user");
                headers.insert(header::ID, count.to_string());
                let subject = subjects[count as usize % 100].clone();
                let body = dialect::body(0, count).into();
                let sent = jetstream.publish_with_headers(subject, headers, body).await;
                sent.unwrap()
            };
            let mut acks = FuturesUnordered::new();
            let begin = Begin::now(&[nats]);
            let end = Instant::now() + time;
            let mut acked = 0_u64;
            while Instant::now() < end {
                while (acks.len() as u64) < IN_FLIGHT {
                    acks.push(send().await.into_future());
                }
                acks.next().await.unwrap().unwrap();
                acked += 1;
            }
            let cost = begin.end();
            while acks.next().await.is_some() {}
            let mut waits = Vec::new();
            for _ in 0..1000 {
                let begun = Instant::now();
                send().await.await.unwrap();
                waits.push(begun.elapsed());
            }
            let acked = acked as f64;
            vec![
                acked / cost.seconds,
                cost.generator_cores * cost.seconds * 1e6 / acked,
                cost.cpu_of("nats") / acked,
                median(waits),
            ]
        })
    }
}

fn members(bench: &mut Bench) -> Table {
    let mut rows = Vec::new();
    for peer in [Peer::Ephemeral, Peer::Durable] {
        for (name, members, rate) in [
            ("1 x 1,000 at 50/s", 1000, 50.0),
            ("1 x 10,000 at 5/s", 10_000, 5.0),
            ("1 x 19,000 at 2.6/s", 19_000, 2.6),
        ] {
            let load = Load {
                rooms: 1,
                members,
                rate,
            };
            rows.push(bench.load_row(name, peer, load));
        }
    }
    Table {
        title: "More members, as many deliveries a second",
        columns: LOAD_COLUMNS,
        rows,
    }
}

fn rooms(bench: &mut Bench) -> Table {
    let mut rows = Vec::new();
    for peer in [Peer::Ephemeral, Peer::Durable] {
        for (name, rooms, rate) in [
            ("10 x 10 at 100/s", 10, 100.0),
            ("100 x 10 at 10/s", 100, 10.0),
            ("1,000 x 10 at 1/s", 1000, 1.0),
        ] {
            let load = Load {
                rooms,
                members: 10,
                rate,
            };
            rows.push(bench.load_row(name, peer, load));
        }
    }
    Table {
        title: "More rooms, as many deliveries a second",
        columns: LOAD_COLUMNS,
        rows,
    }
}

fn hubs(bench: &mut Bench) -> Table {
    const SESSIONS: usize = 200;
    const EACH: usize = 500;
    let mut rows = Vec::new();
    for peer in [Peer::Ephemeral, Peer::Durable] {
        let mut runs = Runs::default();
        for _ in 0..bench.runs {
            runs.add(bench.quiet(|| {
                let target = bench.target(peer);
                let mut swarm = target.swarm(SESSIONS * EACH);
                let first = swarm.connect((0..SESSIONS).map(|_| None));
                let (before, _) = target.edge().memory();
                let begin = Begin::now(&target.servers);
                for session in 0..SESSIONS {
                    swarm.join(first + session, session * EACH..(session + 1) * EACH);
                }
                swarm.until("all rooms are entered", |swarm| {
                    swarm.tally.joined == (SESSIONS * EACH) as u64
                });
                let cost = begin.end();
                let (after, _) = target.edge().memory();
                let rooms = (SESSIONS * EACH) as f64;
                let figures = vec![
                    (after.saturating_sub(before)) as f64 / rooms,
                    rooms / cost.seconds,
                    cost.cpu_of("edge") / rooms,
                    cost.cpu_of("nats") / rooms,
                ];
                (cost, figures)
            }));
        }
        rows.push(row(&[peer.name()], &runs));
    }
    Table {
        title: "100,000 rooms of one member each, in 200 sessions",
        columns: &[
            "server",
            "bytes a room",
            "joins/s",
            "edge, µs a join",
            "NATS, µs a join",
        ],
        rows,
    }
}

/// 10,000 sessions dropped at once, and back with their cursors, while others talk on; and what a session of another edge sees
/// of it.
fn storm(bench: &mut Bench) -> Table {
    const CLIENTS: usize = 10_000;
    const ROOMS: usize = 100;
    let mut runs = Runs::default();
    for _ in 0..bench.runs {
        let mut faults = 0;
        let figures = bench.quiet(|| {
            let target = bench.runtime.block_on(bench.natter(Peer::Durable, 2, ""));
            let mut swarm = target.swarm(ROOMS);
            swarm.keep_cursors = true;
            let publishers = publishers(&mut swarm, ROOMS);
            let first = swarm.connect((0..CLIENTS).map(|i| Some(i % ROOMS)));
            let clients = first..first + CLIENTS;
            swarm.go_to(target.addresses[1]);
            let others = swarm.connect((0..ROOMS).map(Some));
            swarm.go_to(target.addresses[0]);
            swarm.observed = others..others + ROOMS;
            swarm.load(publishers.clone(), ROOMS, 2.0, WARM_UP);
            swarm.reset();
            swarm.load(publishers.clone(), ROOMS, 2.0, WARM_UP);
            let [_, _, calm, ..] = latency(&swarm.tally);
            swarm.reset();
            let metric = |name: &'static str| {
                let mesh = target.mesh.as_ref().unwrap();
                bench.runtime.block_on(mesh.metric(0, name, ""))
            };
            let before = metric("natter_replay_requests_total");
            let said: u64 = (0..ROOMS).map(|room| swarm.said(room)).sum();
            let begin = Begin::now(&target.servers);
            let began = Instant::now();
            swarm.cut(clients.clone());
            // What they miss at once; and their rooms stay busy.
            for n in 0..ROOMS * 10 {
                let room = n % ROOMS;
                // Always the same one in a room: messages of several have no order before they are stored.
                let publisher = publishers.start + room % publishers.len();
                swarm.say(publisher, room, Instant::now());
            }
            swarm.begin(publishers.clone(), ROOMS, 2.0, LONG);
            swarm.back(clients.clone());
            swarm.end();
            swarm.until("everybody has everything", Swarm::is_settled);
            let took = began.elapsed();
            let cost = begin.end();
            let [_, _, busy, ..] = latency(&swarm.tally);
            let said = (0..ROOMS).map(|room| swarm.said(room)).sum::<u64>() - said;
            let expected = said * ((CLIENTS + ROOMS) / ROOMS) as u64;
            faults += print("storm", target.peer.name(), &swarm.tally, expected, &cost);
            let reads = metric("natter_replay_requests_total") - before;
            let figures = vec![
                took.as_secs_f64(),
                reads as f64,
                target.edge().memory().1 as f64 / f64::from(1 << 20),
                cost.cpu_of("edge") / CLIENTS as f64,
                calm,
                busy,
            ];
            (cost, figures)
        });
        bench.faults += faults;
        runs.add(figures);
    }
    Table {
        title: "10,000 sessions of 100 rooms cut off at once, and back with their cursors while their rooms are busy: 10 messages a room at once, then 2/s",
        columns: &[
            "s until the last has everything",
            "reads of streams",
            "edge at most, MiB",
            "edge, µs a session",
            "p99 on another edge before, ms",
            "meanwhile",
        ],
        rows: vec![row(&[], &runs)],
    }
}

fn slow(bench: &mut Bench) -> Table {
    const MEMBERS: usize = 100;
    const RATE: f64 = 1000.0;
    // The kernel holds up to 4 MiB (`net.ipv4.tcp_wmem`) for each before the edge has to.
    const TIME: Duration = Duration::from_secs(15);
    let mut rows = Vec::new();
    let mut runs = [Runs::default(), Runs::default()];
    for _ in 0..bench.runs {
        for (which, slow) in [(0, 0), (1, MEMBERS / 10)] {
            let mut faults = 0;
            let figures = bench.quiet(|| {
                // Small enough that it is reached within the run.
                let limits = "outbox = \"128KiB\"";
                let target = bench
                    .runtime
                    .block_on(bench.natter(Peer::Ephemeral, 1, limits));
                let mut swarm = target.swarm(1);
                let publishers = publishers(&mut swarm, 1);
                let first = swarm.connect((0..MEMBERS).map(|_| Some(0)));
                swarm.load(publishers.clone(), 1, RATE, WARM_UP);
                swarm.reset();
                swarm.stop_reading(first..first + slow);
                let before = swarm.said(0);
                let begin = Begin::now(&target.servers);
                swarm.load(publishers, 1, RATE, TIME);
                let cost = begin.end();
                let [p50, _, p99, ..] = latency(&swarm.tally);
                let mesh = target.mesh.as_ref().unwrap();
                let too_slow = "code=\"too_slow\"";
                let closed = mesh.metric(0, "natter_session_closed_total", too_slow);
                let closed = bench.runtime.block_on(closed);
                // What they still get is whole frames, in order; whoever does not read within 10 s of the close is reset.
                swarm.go_on(first..first + slow);
                swarm.until("the slow ones are closed or have everything", |swarm| {
                    swarm.is_settled()
                });
                let expected = (swarm.said(0) - before) * (MEMBERS - slow) as u64;
                faults += swarm.tally.lost + swarm.tally.repeated;
                let fast = (first + slow..first + MEMBERS).map(|i| swarm.got(i)).min();
                assert_eq!(fast, Some(swarm.said(0)), "who reads misses something");
                let _counted = print("slow", target.peer.name(), &swarm.tally, expected, &cost);
                let figures = vec![
                    p50,
                    p99,
                    cost.cpu_of("edge") / swarm.tally.deliveries as f64,
                    target.edge().memory().1 as f64 / f64::from(1 << 20),
                    closed as f64,
                ];
                (cost, figures)
            });
            bench.faults += faults;
            runs[which].add(figures);
        }
    }
    for (name, runs) in ["all read", "10 stop reading"].iter().zip(&runs) {
        rows.push(row(&[name], runs));
    }
    Table {
        title: "One room of 100 at 1,000/s for 15 s, outbox of 128 KiB, alternating",
        columns: &[
            "members",
            "p50 of the others, ms",
            "p99 of the others, ms",
            "edge, µs a delivery",
            "edge at most, MiB",
            "closed with 4003",
        ],
        rows,
    }
}

fn small(bench: &mut Bench) -> Table {
    const LIMIT: u64 = 1 << 30;
    let mut rows = Vec::new();
    // With nothing in its memory from what was measured before.
    bench.nats = bench.runtime.block_on(dedicated_nats());
    for (name, rooms, rate) in [
        ("1,000 users in rooms of 10, 1,800 messages/s", 100, 18.0),
        ("2,000 users in rooms of 10, 200 messages/s", 200, 1.0),
    ] {
        let mut runs = Runs::default();
        for _ in 0..bench.runs {
            let mut faults = 0;
            let figures = bench.quiet(|| {
                let target = bench.target(Peer::Durable);
                let group = MemoryGroup::around(&target.servers, LIMIT);
                let mut swarm = target.swarm(rooms);
                let publishers = publishers(&mut swarm, rooms);
                swarm.connect((0..rooms * 10).map(|i| Some(i % rooms)));
                swarm.load(publishers.clone(), rooms, rate, WARM_UP);
                swarm.reset();
                let begin = Begin::now(&target.servers);
                swarm.load(publishers, rooms, rate, bench.time);
                let cost = begin.end();
                let expected =
                    (rate * bench.time.as_secs_f64()).round() as u64 * (rooms * 10) as u64;
                faults += print(name, target.peer.name(), &swarm.tally, expected, &cost);
                let tally = &swarm.tally;
                let p95 = tally.latency.value_at_quantile(0.95) as f64 / 1000.0;
                let mib = |server: &Server| server.memory().1 as f64 / f64::from(1 << 20);
                let cores = |server| cost.cpu_of(server) / cost.seconds / 1e6;
                let figures = vec![
                    p95,
                    cores("edge"),
                    cores("nats"),
                    mib(&target.servers[0]),
                    mib(&target.servers[1]),
                    group.map_or(0.0, |group| group.peak() as f64 / f64::from(1 << 20)),
                ];
                (cost, figures)
            });
            bench.faults += faults;
            runs.add(figures);
        }
        rows.push(row(&[name], &runs));
    }
    Table {
        title: "A small machine: durable rooms, edge and nats-server in a memory cgroup of 1 GiB (0 in the last column: there was none)",
        columns: &[
            "load",
            "p95, ms",
            "edge, cores",
            "NATS, cores",
            "edge at most, MiB",
            "NATS at most, MiB",
            "both with files and sockets, MiB",
        ],
        rows,
    }
}
