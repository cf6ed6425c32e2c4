//! Everything at once: 200 sessions in 20 rooms on two edges, which leave, rejoin and reconnect at random while edges and
//! nats-server are killed and restarted; then [`checker`](crate::support::checker) proves that each saw everything, once,
//! in order.
//!
//! Two runs with one seed make the same decisions, not the same schedule: a seed narrows a failure down, it need not repeat
//! it. What a failed run leaves for analysis is in the folder that its panic names.

use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde_json::json;
use tokio::{task::JoinSet, time::sleep};

use crate::support::{
    DedicatedNats, checker, dedicated_nats, eventually,
    mesh::Mesh,
    nats_url,
    sessions::{Joined, Reached, Session, Shared, Stage, logs, raise},
    storm::{PATIENCE, Seed, caught_up, keep, seed, told},
};

const EDGES: usize = 2;
const ROOMS: usize = 20;
const SESSIONS: usize = 200;
/// Messages acknowledged before the storm may end.
const MESSAGES: usize = 4200;
const EDGE_KILLS: usize = 3;
const NATS_KILLS: usize = 1;

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
        let killed = Instant::now();
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
        eprintln!("storm: all are back after {:.1?}", killed.elapsed());
    }
}

/// How long something stays dead, as an operator's supervisor may have it.
async fn outage(rng: &mut StdRng) {
    let pause = if rng.random_bool(0.3) { 5500 } else { 800 };
    sleep(Duration::from_millis(rng.random_range(0..pause))).await;
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

    let endpoints = (0..EDGES).map(|edge| mesh.endpoint(edge)).collect();
    let (stage, shared) = Shared::new(endpoints, ROOMS, SESSIONS);
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
    let stormy = started.elapsed();
    let caught_up = caught_up(&shared).await;
    stage.send_replace(Stage::Over);
    let calm = started.elapsed() - stormy;
    let reconnects = shared.board.lock().reconnects;
    let log = logs(tasks).await;

    let (summary, violations) = checker::check(&log);
    eprintln!(
        "storm: seed {}, {stormy:.1?} of storm and {calm:.1?} of calm, ring {ring}: {} sent, {} acked, {} unacked seen; {} received in {} sessions; {} joins, \
         {} replayed, {reconnects} reconnects; kills: {EDGE_KILLS} of edges, {NATS_KILLS} of nats-server; {} violations",
        seed.0,
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
    let mut start = Reached::new();
    raise(&mut start, &joined.cursor);
    assert_eq!(start.into_values().collect::<Vec<_>>(), [0]);
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
