//! Edges that die, freeze, or lose NATS: who is shown, and for how long. Bounds are measured and printed.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use natter::testing::{
    client::Connection,
    servers::free_port,
    subject::{bucket, presence_keys_of},
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::support::{
    self, LONG,
    calls::reply,
    dedicated_nats, eventually,
    mesh::Mesh,
    presence::{Follower, bucket_of, living},
    signal,
};

const ROOM: &str = "chat:all";
/// Users of each edge, one of which follows the room.
const USERS: usize = 100;
/// Everybody is told by name.
const NAMED: &str = "edge.shards = 1\nlimits.presence_push_max = 1000";

fn name(edge: usize, user: usize) -> String {
    format!("edge{edge}-user{user:02}")
}

/// Three edges with a hundred users each, and a follower on each of them.
struct Crowd {
    mesh: Mesh,
    followers: Vec<Follower>,
    /// The other users of each edge.
    users: Vec<Vec<Connection>>,
}

async fn join(mesh: &Mesh, edge: usize, user: &str) -> Connection {
    let mut connection = mesh.connect(edge, user).await;
    let joined = reply(&mut connection, "join", json!({"room": ROOM})).await;
    assert_eq!(joined["op"], "joined", "{joined}");
    connection
}

impl Crowd {
    async fn gather(nats: &str) -> Self {
        let mesh = Mesh::start(nats, 3, NAMED).await;
        let mut followers = Vec::new();
        let mut users = Vec::new();
        for edge in 0..3 {
            followers.push(Follower::join(&mesh, edge, &name(edge, 0), ROOM).await);
            let mut here = Vec::new();
            for user in 1..USERS {
                here.push(join(&mesh, edge, &name(edge, user)).await);
            }
            users.push(here);
        }
        let everybody = everybody();
        for follower in &mut followers {
            until(follower, &everybody).await;
            follower.pushed().await;
        }
        Self {
            mesh,
            followers,
            users,
        }
    }
}

fn everybody() -> BTreeSet<String> {
    (0..3)
        .flat_map(|edge| (0..USERS).map(move |user| name(edge, user)))
        .collect()
}

async fn until(follower: &mut Follower, users: &BTreeSet<String>) {
    let users: Vec<&str> = users.iter().map(String::as_str).collect();
    follower.until(&users).await;
}

/// Users whose leaving was pushed.
async fn left(follower: &mut Follower) -> BTreeSet<String> {
    let pushes = follower.pushed().await;
    let left = pushes.iter().filter(|push| push["state"] == "leave");
    left.map(|push| push["user"].as_str().unwrap().to_owned())
        .collect()
}

/// The lease that an edge holds now.
async fn lease_of(mesh: &Mesh, edge: usize) -> String {
    let edges = bucket_of(mesh, bucket::EDGES).await;
    let prefix = format!("edge-{edge}-");
    eventually("the edge has a lease", LONG, async || {
        let keys = living(&edges, ">").await;
        let found = keys
            .into_iter()
            .find(|entry| entry.key.starts_with(&prefix));
        found.map(|entry| entry.key).ok_or_else(String::new)
    })
    .await
}

async fn purged(mesh: &Mesh, lease: &str) {
    let presence = bucket_of(mesh, bucket::PRESENCE).await;
    let edges = bucket_of(mesh, bucket::EDGES).await;
    eventually("the keys are purged", LONG, async || {
        let keys = living(&presence, &presence_keys_of(lease)).await;
        let used = living(&edges, &format!("used.{lease}")).await;
        if keys.is_empty() && used.is_empty() {
            Ok(())
        } else {
            Err(format!("{} keys, {} records", keys.len(), used.len()))
        }
    })
    .await;
}

#[tokio::test]
async fn users_of_a_killed_edge_are_gone_when_its_lease_is() {
    let mut crowd = Crowd::gather(support::nats_url()).await;
    let lease = lease_of(&crowd.mesh, 0).await;
    let killed = Instant::now();
    crowd.mesh.edges[0].process.kill().await;
    // Half of them come back elsewhere, within the lease.
    let mut moved = Vec::new();
    for user in 0..USERS / 2 {
        moved.push(join(&crowd.mesh, 1 + user % 2, &name(0, user)).await);
    }
    let back = killed.elapsed();
    let mut expected = everybody();
    let gone: BTreeSet<String> = (USERS / 2..USERS).map(|user| name(0, user)).collect();
    expected.retain(|user| !gone.contains(user));
    for (edge, follower) in crowd.followers.iter_mut().enumerate().skip(1) {
        until(follower, &expected).await;
        println!(
            "SIGKILL of an edge with {USERS} users: {} gone on edge {edge} after {:.2?} (lease 10 s); the others were back after {back:.2?}",
            gone.len(),
            killed.elapsed(),
        );
        assert_eq!(
            left(follower).await,
            gone,
            "somebody was shown as gone who was not"
        );
    }
    purged(&crowd.mesh, &lease).await;
    // The edge comes back under the same name.
    crowd.mesh.edges[0].process.start().await.unwrap();
    let last = name(0, USERS - 1);
    let _again = join(&crowd.mesh, 0, &last).await;
    expected.insert(last);
    until(&mut crowd.followers[2], &expected).await;
    drop((moved, crowd.users));
}

#[tokio::test]
async fn users_of_a_frozen_edge_are_gone_and_come_back() {
    let mut crowd = Crowd::gather(support::nats_url()).await;
    let lease = lease_of(&crowd.mesh, 1).await;
    let pid = crowd.mesh.edges[1].process.pid().unwrap();
    let stopped = Instant::now();
    signal(pid, Signal::STOP);
    let gone: BTreeSet<String> = (0..USERS).map(|user| name(1, user)).collect();
    let expected: BTreeSet<String> = everybody().difference(&gone).cloned().collect();
    for edge in [0, 2] {
        let follower = &mut crowd.followers[edge];
        until(follower, &expected).await;
        println!(
            "SIGSTOP of an edge with {USERS} users: gone on edge {edge} after {:.2?} (lease 10 s)",
            stopped.elapsed(),
        );
        assert_eq!(left(follower).await, gone);
    }
    purged(&crowd.mesh, &lease).await;
    // How long it stays frozen is what is to be tried, not a condition to wait for.
    sleep_until(stopped + Duration::from_secs(30)).await;
    signal(pid, Signal::CONT);
    let thawed = Instant::now();
    for edge in [0, 2] {
        let follower = &mut crowd.followers[edge];
        until(follower, &everybody()).await;
        println!(
            "SIGCONT after 30 s: all {USERS} users shown again on edge {edge} after {:.2?}",
            thawed.elapsed(),
        );
    }
    // Those on the frozen edge never saw anybody go, and nobody goes now that it lives.
    purged(&crowd.mesh, &lease).await;
    for follower in &mut crowd.followers {
        assert_eq!(left(follower).await, BTreeSet::new());
        follower.load().await;
        assert!(follower.users.keys().eq(everybody().iter()));
    }
}

#[tokio::test]
async fn nobody_is_gone_because_nats_was() {
    let mut nats = dedicated_nats().await;
    let mut crowd = Crowd::gather(&nats.url()).await;
    let edges = bucket_of(&crowd.mesh, bucket::EDGES).await;
    let mut leases = Vec::new();
    for edge in 0..3 {
        leases.push(lease_of(&crowd.mesh, edge).await);
    }
    let down = Instant::now();
    nats.server.kill().await;
    nats.server.restart().await.unwrap();
    let before = eventually("the bucket can be read", LONG, async || {
        edges.newest(">").await.map_err(|error| error.to_string())
    })
    .await;
    eventually("all leases are renewed", LONG, async || {
        let found = edges
            .get(&leases)
            .await
            .map_err(|error| error.to_string())?;
        let renewed = found
            .iter()
            .filter(|e| e.value.is_some() && e.revision > before);
        match renewed.count() {
            3 => Ok(()),
            count => Err(format!("{count} renewed")),
        }
    })
    .await;
    println!(
        "nats-server killed and restarted: all leases renewed after {:.2?}",
        down.elapsed()
    );
    let visitor = join(&crowd.mesh, 0, "visitor").await;
    let mut expected = everybody();
    expected.insert("visitor".to_owned());
    for follower in &mut crowd.followers {
        until(follower, &expected).await;
        assert_eq!(left(follower).await, BTreeSet::new());
    }
    drop(visitor);

    // Away for longer than a lease: all of them are lost, and yet nobody was.
    for follower in &mut crowd.followers {
        until(follower, &everybody()).await;
        follower.pushed().await;
    }
    let down = Instant::now();
    nats.server.kill().await;
    sleep_until(down + Duration::from_secs(11)).await;
    nats.server.restart().await.unwrap();
    // A server that comes back takes its time to look which keys are too old, and edges may renew theirs before. So that all
    // are lost in every run, the test removes what the server would have removed.
    for lease in &leases {
        eventually("the lease is removed", LONG, async || {
            edges.remove(lease).await.map_err(|error| error.to_string())
        })
        .await;
    }
    // Until the old leases count as over everywhere, which is when users could be taken for gone.
    for edge in 0..3 {
        eventually("the edge has seen the old leases end", LONG, async || {
            let ended = async |whose| {
                let mesh = &crowd.mesh;
                mesh.metric(edge, "natter_lease_ended_total", whose).await
            };
            match (ended("own").await, ended("other").await) {
                (1, 2) => Ok(()),
                (own, others) => Err(format!("{own} own, {others} others")),
            }
        })
        .await;
    }
    println!(
        "nats-server away for 11 s: new leases, the old ones over everywhere after {:.2?}",
        down.elapsed()
    );
    for follower in &mut crowd.followers {
        assert_eq!(left(follower).await, BTreeSet::new());
        follower.load().await;
        assert!(follower.users.keys().eq(everybody().iter()));
    }
}

/// A server that stood still lets leases end whose edges could not renew them, and no connection tells of it.
#[tokio::test]
async fn nobody_is_gone_because_nats_stood_still() {
    let nats = dedicated_nats().await;
    let toml = format!("{NAMED}\npresence.lease = '3s'");
    let mesh = Mesh::start(&nats.url(), 2, &toml).await;
    let mut followers = [
        Follower::join(&mesh, 0, "kim", ROOM).await,
        Follower::join(&mesh, 1, "lee", ROOM).await,
    ];
    for follower in &mut followers {
        follower.until(&["kim", "lee"]).await;
        follower.pushed().await;
    }
    let edges = bucket_of(&mesh, bucket::EDGES).await;
    let connects = mesh.metric(0, "natter_nats_connects_total", "").await;
    let pid = nats.server.pid().unwrap();
    let before = edges.newest(">").await.unwrap();
    signal(pid, Signal::STOP);
    // As long as is to be tried: longer than a lease, and too short for a connection to be given up.
    sleep_until(Instant::now() + Duration::from_secs(4)).await;
    signal(pid, Signal::CONT);
    let lost = eventually("the edges agree which leases are over", LONG, async || {
        let living = living(&edges, "*").await;
        let renewed = living.iter().filter(|entry| entry.revision > before + 4);
        if renewed.count() != 2 {
            return Err(format!("{living:?}"));
        }
        let (mut own, mut others) = (Vec::new(), Vec::new());
        for edge in [0, 1] {
            let ended = async |whose| mesh.metric(edge, "natter_lease_ended_total", whose).await;
            own.push(ended("own").await);
            others.push(ended("other").await);
        }
        if own[0] == others[1] && own[1] == others[0] {
            Ok(own[0] + own[1])
        } else {
            Err(format!("{own:?} own, {others:?} others"))
        }
    })
    .await;
    println!("nats-server stood still for 4 s (lease 3 s): {lost} of 2 leases lost");
    assert_eq!(
        mesh.metric(0, "natter_nats_connects_total", "").await,
        connects
    );
    for follower in &mut followers {
        assert_eq!(left(follower).await, BTreeSet::new());
    }
}

/// Nobody survived that could have purged what a killed edge left: the next one that starts does it.
#[tokio::test]
async fn what_an_edge_that_died_alone_left_is_purged_by_the_next() {
    let toml = format!("{NAMED}\npresence.lease = '3s'");
    let mut mesh = Mesh::start(support::nats_url(), 1, &toml).await;
    let mut kim = Follower::join(&mesh, 0, "kim", ROOM).await;
    kim.until(&["kim"]).await;
    let lease = lease_of(&mesh, 0).await;
    let presence = bucket_of(&mesh, bucket::PRESENCE).await;
    eventually("the key is written", LONG, async || {
        match living(&presence, &presence_keys_of(&lease)).await.len() {
            1 => Ok(()),
            count => Err(format!("{count} keys")),
        }
    })
    .await;
    mesh.edges[0].process.kill().await;
    mesh.edges[0].process.start().await.unwrap();
    let mut lee = Follower::join(&mesh, 0, "lee", ROOM).await;
    // Gone when the lease is, and then without a trace.
    lee.until(&["lee"]).await;
    purged(&mesh, &lease).await;
    assert_eq!(living(&presence, ">").await.len(), 1);
}

/// A TCP relay between an edge and NATS that can be cut: the network, simulated.
struct Relay {
    address: SocketAddr,
    open: watch::Sender<bool>,
    _task: JoinSet<()>,
}

impl Relay {
    async fn start(to: &str) -> Self {
        let to = to.trim_start_matches("nats://").to_owned();
        let address = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
        let listener = TcpListener::bind(address).await.unwrap();
        let open = watch::Sender::new(true);
        let mut task = JoinSet::new();
        let state = open.clone();
        task.spawn(async move {
            let mut relayed = JoinSet::new();
            while let Ok((mut inner, _)) = listener.accept().await {
                if !*state.borrow() {
                    continue;
                }
                let (to, mut state) = (to.clone(), state.subscribe());
                relayed.spawn(async move {
                    let mut outer = TcpStream::connect(to).await.unwrap();
                    tokio::select! {
                        _ended = copy_bidirectional(&mut inner, &mut outer) => {}
                        _cut = state.wait_for(|open| !open) => {}
                    }
                });
            }
        });
        Self {
            address,
            open,
            _task: task,
        }
    }
}

#[tokio::test]
async fn users_of_an_edge_that_is_cut_off_are_gone_elsewhere_and_come_back() {
    let relay = Relay::start(support::nats_url()).await;
    let region = support::unique("cut");
    let toml =
        format!("{NAMED}\nregion = '{region}'\nnats.prefix = '{region}'\npresence.lease = '3s'");
    let inside = Mesh::start(support::nats_url(), 1, &toml).await;
    let outside = Mesh::start(&format!("nats://{}", relay.address), 1, &toml).await;
    let mut sees = Follower::join(&inside, 0, "inside", ROOM).await;
    let mut cut_off = Follower::join(&outside, 0, "outside", ROOM).await;
    let mut moves = join(&outside, 0, "moves").await;
    for follower in [&mut sees, &mut cut_off] {
        follower.until(&["inside", "moves", "outside"]).await;
        follower.pushed().await;
    }
    let cut = Instant::now();
    relay.open.send_replace(false);
    let moved = join(&inside, 0, "moves").await;
    sees.until(&["inside", "moves"]).await;
    println!(
        "cut off from NATS: gone elsewhere after {:.2?} (lease 3 s)",
        cut.elapsed()
    );
    let pushes = sees.pushed().await;
    assert_eq!(pushes.len(), 1, "{pushes:?}");
    // Behind the cut nobody is gone: who is there is there.
    let list = reply(&mut moves, "presence", json!({"room": ROOM})).await;
    assert_eq!(list["count"], 3, "{list}");
    // A change meanwhile is told when the link is back.
    reply(&mut moves, "leave", json!({"room": ROOM})).await;
    let late = join(&outside, 0, "late").await;

    relay.open.send_replace(true);
    let healed = Instant::now();
    sees.until(&["inside", "late", "moves", "outside"]).await;
    println!(
        "the link is back: shown again after {:.2?}",
        healed.elapsed()
    );
    cut_off.until(&["inside", "late", "moves", "outside"]).await;
    let left = |pushes: Vec<Value>| pushes.iter().filter(|p| p["state"] == "leave").count();
    assert_eq!(left(sees.pushed().await), 0);
    drop((moved, late));
}
