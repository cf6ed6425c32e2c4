//! What the state of a room costs: time, CPU of the edge, and messages that reach NATS. Real processes on this machine, two
//! edges of one shard; run with `cargo bench --bench state`. Results stand in `benches/RESULTS.md`.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a benchmark prints, and fails as tests do"
)]

#[path = "../tests/it/support/mod.rs"]
mod support;

use std::{
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use natter::testing::{
    client::Commands,
    servers::{Process, free_port},
};
use serde_json::{Value, json};
use support::{
    cpu_time, launcher,
    mesh::{Mesh, answers, http},
    nats_with,
};
use tokio::task::JoinHandle;

/// Members of the large room.
const MEMBERS: usize = 10_000;
/// Joins that are timed in each scenario.
const JOINS: usize = 2_000;
/// Rooms of one `unread`.
const ROOMS: usize = 500;
/// Repetitions of what is timed; the median is printed, with the fastest and the slowest.
const RUNS: usize = 9;

/// A nats-server that counts what reaches it.
struct Nats {
    _process: Process,
    url: String,
    monitor: SocketAddr,
}

impl Nats {
    async fn start(dir: &Path) -> Self {
        let [port, monitor] = [free_port().unwrap(), free_port().unwrap()];
        let config = format!(
            "listen: 127.0.0.1:{port}\nhttp: 127.0.0.1:{monitor}\njetstream {{ store_dir: {:?}, domain: bench }}\n",
            dir.join("store")
        );
        let file = dir.join("nats.conf");
        std::fs::write(&file, config).unwrap();
        let monitor = SocketAddr::from(([127, 0, 0, 1], monitor));
        let spec = nats_with("nats-server", &file, answers(monitor, "/healthz")).await;
        let mut process = Process::new(launcher(), spec);
        process.start().await.unwrap();
        Self {
            _process: process,
            url: format!("nats://127.0.0.1:{port}"),
            monitor,
        }
    }

    /// Messages that clients have sent to the server: requests and publishes.
    async fn received(&self) -> u64 {
        let (_, body) = http(self.monitor, "GET", "/varz", "", "").await.unwrap();
        // The answer comes in chunks: not JSON as a whole.
        let (_, after) = body.split_once("\"in_msgs\": ").unwrap();
        let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    }
}

/// A connected user whose pushes are taken and thrown away.
struct User {
    commands: Commands,
    reads: JoinHandle<()>,
}

impl User {
    async fn connect(mesh: &Mesh, edge: usize, name: &str) -> Self {
        let mut connection = mesh.connect(edge, name).await;
        Self {
            commands: connection.commands().clone(),
            reads: tokio::spawn(async move { while connection.next().await.is_some() {} }),
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.reads.abort();
    }
}

async fn call(user: &User, op: &str, fields: Value) -> Value {
    user.commands.call(op, fields).await.unwrap().json()
}

/// Users on the first edge, connected some at a time.
async fn connect(mesh: &Mesh, users: usize, prefix: &str) -> Vec<User> {
    let mut connections = Vec::with_capacity(users);
    while connections.len() < users {
        let some = (users - connections.len()).min(200);
        let opening = (0..some).map(|i| {
            let user = format!("{prefix}{:05}", connections.len() + i);
            async move { User::connect(mesh, 0, &user).await }
        });
        connections.extend(futures_util::future::join_all(opening).await);
    }
    connections
}

struct Timed {
    times: Vec<Duration>,
    wall: Duration,
    cpu: Duration,
    nats: u64,
}

/// Times one call after the other, and the CPU of the edge that answers them.
async fn time(
    nats: &Nats,
    mesh: &Mesh,
    edge: usize,
    calls: usize,
    mut call: impl AsyncFnMut(usize),
) -> Timed {
    let pid = mesh.edges[edge].process.pid().unwrap();
    let (before, cpu_before, started) = (nats.received().await, cpu_time(pid), Instant::now());
    let mut times = Vec::with_capacity(calls);
    for i in 0..calls {
        let started = Instant::now();
        call(i).await;
        times.push(started.elapsed());
    }
    let wall = started.elapsed();
    let cpu = cpu_time(pid) - cpu_before;
    let nats = nats.received().await - before;
    times.sort_unstable();
    Timed {
        times,
        wall,
        cpu,
        nats,
    }
}

impl Timed {
    fn at(&self, part: f64) -> Duration {
        let last = self.times.len() - 1;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a place in a short list"
        )]
        let index = (part * last as f64).round() as usize;
        self.times[index]
    }

    fn print(&self, what: &str) {
        let calls = u32::try_from(self.times.len()).unwrap();
        let per_call = f64::from(u32::try_from(self.nats).unwrap()) / f64::from(calls);
        println!(
            "{what:<58} p50 {:>9.1?} p99 {:>9.1?} min {:>9.1?} max {:>9.1?}  CPU {:>8.1?}  NATS {per_call:>7.2}  ({calls} calls in {:.2?})",
            self.at(0.5),
            self.at(0.99),
            self.at(0.0),
            self.at(1.0),
            self.cpu / calls,
            self.wall,
        );
    }
}

fn main() {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(run());
}

async fn run() {
    let dir = tempfile::tempdir().unwrap();
    let nats = Nats::start(dir.path()).await;
    let toml = "edge.shards = 1\nlimits.commands_per_second = 1000000\nlimits.commands_burst = 1000000\n\
        namespaces.quiet = {durable = true, typing = true, presence = 'off'}";
    let mesh = Mesh::start(&nats.url, 2, toml).await;
    println!(
        "a call: time as the client sees it, CPU of the edge, messages that reached NATS from whomever"
    );
    joins(&nats, &mesh).await;
    snapshots(&nats, &mesh).await;
    unread(&nats, &mesh).await;
}

/// Joins, one after the other: without presence, shown to others, and told of others; in a room that is open, and in a new
/// room each.
async fn joins(nats: &Nats, mesh: &Mesh) {
    let users = connect(mesh, JOINS, "join").await;
    let watcher = User::connect(mesh, 0, "watcher").await;
    for (what, room, presence) in [
        ("presence off", "quiet:a", false),
        ("shown", "chat:b", false),
        ("shown and told", "chat:c", true),
    ] {
        call(
            &watcher,
            "join",
            json!({"room": room, "presence": presence}),
        )
        .await;
        let timed = time(nats, mesh, 0, JOINS, async |i: usize| {
            call(
                &users[i],
                "join",
                json!({"room": room, "presence": presence}),
            )
            .await;
        })
        .await;
        timed.print(&format!("join of an open room, {what}"));
        let timed = time(nats, mesh, 0, JOINS, async |i: usize| {
            let room = format!("{room}{i}");
            call(
                &users[i],
                "join",
                json!({"room": room, "presence": presence}),
            )
            .await;
        })
        .await;
        timed.print(&format!("join of a new room, {what}"));
    }
    drop(users);
}

/// The list of a room of 10,000, asked for on the edge where nobody of them is.
async fn snapshots(nats: &Nats, mesh: &Mesh) {
    let users = connect(mesh, MEMBERS, "member").await;
    for user in &users {
        call(user, "join", json!({"room": "chat:big"})).await;
    }
    let asks = User::connect(mesh, 1, "asks").await;
    let list = async |room: &str| {
        let (mut listed, mut after) = (0, Value::Null);
        loop {
            let fields = json!({"room": room, "limit": 1000, "after": after});
            let page = call(&asks, "presence", fields).await;
            listed += page["users"].as_array().unwrap().len();
            after = page["next"].clone();
            if after.is_null() {
                return listed;
            }
        }
    };
    // The first list reads the keys from NATS, the others come from memory.
    let timed = time(nats, mesh, 1, 1, async |_i: usize| {
        assert_eq!(list("chat:big").await, MEMBERS);
    })
    .await;
    timed.print("list of 10,000 in 10 pages, the first time");
    let timed = time(nats, mesh, 1, RUNS, async |_i: usize| {
        assert_eq!(list("chat:big").await, MEMBERS);
    })
    .await;
    timed.print("list of 10,000 in 10 pages, again");
    let timed = time(nats, mesh, 1, 200, async |_i: usize| {
        let page = call(&asks, "presence", json!({"room": "chat:big"})).await;
        assert_eq!(page["users"].as_array().unwrap().len(), 100);
    })
    .await;
    timed.print("one page of 100 of them");
    drop(users);
}

/// Counts of 500 rooms with 20 messages each.
async fn unread(nats: &Nats, mesh: &Mesh) {
    let (writer, reader) = (
        User::connect(mesh, 0, "writer").await,
        User::connect(mesh, 0, "reader").await,
    );
    let rooms: Vec<String> = (0..ROOMS).map(|i| format!("chat:u{i}")).collect();
    let mut cursors = Vec::new();
    for room in &rooms {
        let mut here = Vec::new();
        for n in 0..20 {
            let ack = call(&writer, "send", json!({"room": room, "body": n})).await;
            here.push(ack["cursor"].clone());
        }
        cursors.push(here);
    }
    // How many of the rooms have something new.
    for new in [ROOMS, ROOMS / 2, 0] {
        for (room, here) in rooms.iter().zip(&cursors).skip(new) {
            let ok = call(&reader, "read", json!({"room": room, "cursor": here[19]})).await;
            assert_eq!(ok["op"], "ok", "{ok}");
        }
        let timed = time(nats, mesh, 0, RUNS, async |_i: usize| {
            let answer = call(&reader, "unread", json!({"rooms": rooms})).await;
            let counts = answer["rooms"].as_array().unwrap();
            let sum: u64 = counts.iter().map(|r| r["count"].as_u64().unwrap()).sum();
            assert_eq!(sum, 20 * new as u64);
        })
        .await;
        timed.print(&format!("unread of 500 rooms, {new} with news"));
    }
}
