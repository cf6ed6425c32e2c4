//! A region of three servers with three copies of each stream, whose leader is killed while people talk: then
//! [`checker`](crate::support::checker) proves that everybody saw everything, once, in order.
//!
//! It also looks at what only copies bring about: a leader that stored a message and died before it republished it, and reads
//! that are answered by a copy that is behind. How long nobody was acknowledged, and how late a message came that nobody
//! republished, is printed and not judged.

use std::{
    collections::HashMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use natter::testing::{
    client::{CallError, Connection},
    mesh::provision::{connect, ping},
    servers::{Check, Process, free_port},
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    task::JoinSet,
    time::{interval, sleep},
};

use crate::support::{
    self, LONG,
    calls::reply,
    checker, eventually,
    mesh::Mesh,
    sessions::{Session, Shared, Stage, logs},
    storm::{Seed, caught_up, keep, seed, told},
};

const REGION: &str = "trio";
const SERVERS: usize = 3;
const EDGES: usize = 2;
const ROOMS: usize = 5;
const SESSIONS: usize = 12;
const KILLS: usize = 2;

/// Messages of the sessions before a kill, while the server is away, and after it is back.
const SHARE: usize = 40;

/// Rooms for each kill in which one message is sent about then, and nothing else ever: nothing after it shows that it was lost.
const QUIET_ROOMS: usize = 60;

/// Messages sent from outside a room before the storm: some of them meet a copy that is behind.
const OUTSIDE: usize = 400;

/// The servers of one region.
struct Cluster {
    dir: TempDir,
    servers: Vec<Process>,
    ports: Vec<u16>,
}

impl Cluster {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ports = std::array::from_fn::<u16, SERVERS, _>(|_| free_port().unwrap());
        let routes = std::array::from_fn::<u16, SERVERS, _>(|_| free_port().unwrap());
        let mut servers = Vec::new();
        for (number, port) in ports.into_iter().enumerate() {
            let conf = conf(dir.path(), number, port, &routes);
            let path = dir.path().join(format!("n{number}.conf"));
            std::fs::write(&path, conf).unwrap();
            // Answered only where the cluster has a leader.
            let ready: Check = Arc::new(move |_pid| {
                Box::pin(async move {
                    let config = support::config(&format!("nats.url = 'nats://127.0.0.1:{port}'"));
                    Ok(ping(&connect(&config.nats).await?).await?)
                })
            });
            let spec = support::nats_with(&format!("n{number}"), &path, ready).await;
            servers.push(Process::new(support::launcher(), spec));
        }
        // One alone is never ready.
        for started in join_all(servers.iter_mut().map(Process::start)).await {
            started.unwrap();
        }
        Self {
            dir,
            servers,
            ports: ports.to_vec(),
        }
    }

    fn url(&self) -> String {
        let urls: Vec<String> = self
            .ports
            .iter()
            .map(|port| format!("nats://127.0.0.1:{port}"))
            .collect();
        urls.join(",")
    }

    /// Which server leads the stream of the rooms, once all copies have everything.
    async fn leader(&self, mesh: &Mesh) -> usize {
        eventually("all copies are current", LONG, async || {
            let client = connect(&mesh.config.nats)
                .await
                .map_err(|e| e.to_string())?;
            let subject = format!("$JS.API.STREAM.INFO.ROOMS_{REGION}_0");
            let answer = client.request(subject, "".into()).await;
            let answer = answer.map_err(|error| error.to_string())?;
            let info: Value = serde_json::from_slice(&answer.payload).unwrap();
            let cluster = &info["cluster"];
            let followers = cluster["replicas"].as_array().map_or(0, |copies| {
                copies.iter().filter(|c| c["current"] == true).count()
            });
            let leader = cluster["leader"]
                .as_str()
                .and_then(|name| name.strip_prefix('n'));
            match leader.and_then(|number| number.parse().ok()) {
                Some(number) if followers == SERVERS - 1 => Ok(number),
                _ => Err(cluster.to_string()),
            }
        })
        .await
    }
}

fn conf(dir: &Path, number: usize, port: u16, routes: &[u16]) -> String {
    let store = dir.join(format!("store-{number}"));
    let listen = routes[number];
    let routes: Vec<String> = routes
        .iter()
        .map(|port| format!("nats-route://127.0.0.1:{port}"))
        .collect();
    format!(
        "server_name: n{number}\nlisten: \"127.0.0.1:{port}\"\njetstream {{\n store_dir: {store:?}\n domain: {REGION}\n}}\ncluster {{\n name: {REGION}\n listen: \"127.0.0.1:{listen}\"\n routes: {routes:?}\n}}\n"
    )
}

/// One message in each of many rooms: when it was acknowledged, and when who was there before got it.
#[derive(Default)]
struct Quiet {
    acked: HashMap<String, Instant>,
    /// Acknowledgements that did not tell a time.
    timeless: usize,
    arrived: HashMap<String, Vec<Instant>>,
}

fn quiet_room(kill: usize, number: usize) -> String {
    format!("chat:quiet-{kill}-{number}")
}

/// Joins all quiet rooms and notes what comes, for ever.
async fn listen(mut connection: Connection, quiet: Arc<Mutex<Quiet>>) {
    while let Some(frame) = connection.next().await {
        let frame = frame.json();
        if frame["op"] == "msg" {
            let room = frame["room"].as_str().unwrap().to_owned();
            let mut quiet = quiet.lock();
            quiet.arrived.entry(room).or_default().push(Instant::now());
        }
    }
    panic!("an edge let a listener go: {:?}", connection.end());
}

/// Sends one message until it is acknowledged, from outside the room.
async fn speak(connection: Arc<Connection>, room: String, quiet: Arc<Mutex<Quiet>>) {
    let message = json!({"room": room, "id": "only", "body": "안녕"});
    loop {
        match connection.commands().call("send", &message).await {
            Ok(ack) => {
                let mut quiet = quiet.lock();
                quiet.acked.insert(room, Instant::now());
                quiet.timeless += usize::from(ack.json()["ts"] == 0);
                return;
            }
            Err(CallError::Refused(refusal)) if refusal.retry => {
                // A client's backoff.
                sleep(Duration::from_millis(100)).await;
            }
            Err(error) => panic!("{room}: {error}"),
        }
    }
}

/// Whoever is not in a room is told when their message was stored, too: that is read, also from a copy that has not got it yet.
async fn acks_tell_the_time(speakers: &[Arc<Connection>]) {
    for number in 0..OUTSIDE {
        let commands = speakers[number % speakers.len()].commands();
        let message = json!({"room": "chat:outside", "body": number});
        let ack = commands.call("send", message).await.unwrap().json();
        assert_ne!(ack["ts"], 0, "message {number}: {ack}");
    }
}

/// The longest time of the storm in which nothing was acknowledged.
async fn longest_pause(shared: Arc<Shared>) -> Duration {
    let mut look = interval(Duration::from_millis(5));
    let (mut acked, mut since, mut longest) = (0, Instant::now(), Duration::ZERO);
    while *shared.stage.borrow() == Stage::Storm {
        look.tick().await;
        let now = shared.board.lock().acked;
        // Before the first there is no pause, only a beginning.
        if now == acked && acked > 0 {
            longest = longest.max(since.elapsed());
        } else {
            (acked, since) = (now, Instant::now());
        }
    }
    longest
}

async fn acked(shared: &Shared, more: usize) {
    let goal = shared.board.lock().acked + more;
    eventually("people talk", LONG, async || {
        let acked = shared.board.lock().acked;
        if acked >= goal {
            Ok(())
        } else {
            Err(format!("{acked} of {goal} messages are acknowledged"))
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_acknowledged_is_heard_by_all_when_the_leader_of_three_copies_is_killed() {
    let seed = Seed(seed());
    let mut cluster = Cluster::start().await;
    let toml = format!(
        "region = '{REGION}'\nnats.partitions = 1\nstreams.replicas = {SERVERS}\nrooms.ring = '4KiB'\nrooms.resync = '10m'\ntelemetry.log = 'natter=debug,info'"
    );
    let mesh = Mesh::start(&cluster.url(), EDGES, &toml).await;

    let quiet = Arc::new(Mutex::new(Quiet::default()));
    let mut listeners = JoinSet::new();
    let mut speakers = Vec::new();
    for edge in 0..EDGES {
        let mut connection = mesh.connect(edge, "listener").await;
        for room in (0..KILLS).flat_map(|k| (0..QUIET_ROOMS).map(move |n| quiet_room(k, n))) {
            let joined = reply(&mut connection, "join", json!({"room": room})).await;
            assert_eq!(joined["op"], "joined", "{joined}");
        }
        listeners.spawn(listen(connection, Arc::clone(&quiet)));
        speakers.push(Arc::new(mesh.connect(edge, "speaker").await));
    }

    acks_tell_the_time(&speakers).await;

    let endpoints = (0..EDGES).map(|edge| mesh.endpoint(edge)).collect();
    let (stage, shared) = Shared::new(endpoints, ROOMS, SESSIONS);
    let pause = tokio::spawn(longest_pause(Arc::clone(&shared)));
    let mut tasks = JoinSet::new();
    for number in 0..SESSIONS {
        tasks.spawn(Session::new(number, seed.0, &shared).run());
    }
    let mut speaking = JoinSet::new();
    for kill in 0..KILLS {
        let leader = cluster.leader(&mesh).await;
        acked(&shared, SHARE).await;
        for number in 0..QUIET_ROOMS {
            let speaker = Arc::clone(&speakers[number % EDGES]);
            let room = quiet_room(kill, number);
            speaking.spawn(speak(speaker, room, Arc::clone(&quiet)));
            // In the middle of them, and of what they wait for.
            if number == QUIET_ROOMS / 2 {
                eprintln!("replicas: n{leader} leads and is killed");
                cluster.servers[leader].kill().await;
            }
            // Spread over some time, so that the kill meets each at another point of its way.
            sleep(Duration::from_micros(300)).await;
        }
        // Two of three go on.
        acked(&shared, SHARE).await;
        cluster.servers[leader].start().await.unwrap();
    }
    cluster.leader(&mesh).await;
    acked(&shared, SHARE).await;
    stage.send_replace(Stage::Calm);
    let caught_up = caught_up(&shared).await;
    stage.send_replace(Stage::Over);
    let pause = pause.await.unwrap();
    while let Some(spoken) = speaking.join_next().await {
        spoken.unwrap();
    }
    let log = logs(tasks).await;

    let late = eventually("the quiet rooms have got their message", LONG, async || {
        let quiet = quiet.lock();
        let mut late = Vec::new();
        for (room, acked) in &quiet.acked {
            let arrived = quiet.arrived.get(room).map_or(&[][..], Vec::as_slice);
            if arrived.len() < EDGES {
                return Err(format!("{} of {EDGES} in {room}", arrived.len()));
            }
            late.extend(
                arrived
                    .iter()
                    .map(|at| at.saturating_duration_since(*acked)),
            );
        }
        Ok(late)
    })
    .await;
    assert_eq!(
        late.len(),
        KILLS * QUIET_ROOMS * EDGES,
        "a message came twice"
    );
    let unseen = late
        .iter()
        .filter(|late| **late > Duration::from_millis(500));
    let (unseen, latest) = (
        unseen.count(),
        late.iter().max().copied().unwrap_or_default(),
    );

    let mut failed = [0, 0];
    for edge in 0..EDGES {
        for (sum, reason) in failed.iter_mut().zip(["unavailable", "unknown_outcome"]) {
            *sum += mesh
                .metric(edge, "natter_publish_failed_total", reason)
                .await;
        }
    }
    let (summary, violations) = checker::check(&log);
    let timeless = quiet.lock().timeless;
    eprintln!(
        "replicas: seed {}, {KILLS} leaders killed, longest pause {pause:.1?}: {} acked, {} unacked seen, {} received; {} joins, {} replayed; \
         publishes answered unavailable {}, unknown_outcome {}; quiet rooms: {unseen} of {} came more than 500 ms after the ack, the latest {latest:.1?} after; \
         {timeless} acks without a time; {} violations",
        seed.0,
        summary.acked,
        summary.unacked_seen,
        summary.received,
        summary.joins,
        summary.replayed,
        failed[0],
        failed[1],
        late.len(),
        violations.len(),
    );
    if caught_up.is_err() || !violations.is_empty() {
        let kept = keep(seed.0, &mesh, &log, &violations);
        for number in 0..SERVERS {
            let name = format!("n{number}.log");
            std::fs::copy(cluster.dir.path().join(&name), kept.join(name)).unwrap();
        }
        panic!("{caught_up:?}\n{}", told(&violations, &kept));
    }
}
