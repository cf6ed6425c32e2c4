//! Three regions, and users who roam between them while regions are cut off, links flap, servers and edges are killed or stand still;
//! then [`vectors`](crate::support::vectors) proves that each saw everything, once, each region's messages in order and answers
//! after what they answer.
//!
//! `NATTER_TEST_SEED` repeats the decisions of a run, not its schedule. `NATTER_TEST_REGION_SEEDS=20` runs as many seeds as that, one
//! after the other and whatever becomes of them; with `NATTER_TEST_REGION_FAULTS=long` a cut takes 20 s, and a server stands still
//! for 10 s.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use serde_json::Value;
use tokio::{task::JoinSet, time::sleep};

use crate::support::{
    LONG,
    checker::{self, Log},
    eventually,
    mesh::Mesh,
    mongodb_url,
    regions::Regions,
    sessions::{Session, Shared, Stage, logs, room_name},
    storm::{Seed, caught_up, seed},
    vectors::{self, Verdict},
};

const REGIONS: [&str; 3] = ["seoul", "frankfurt", "virginia"];
const ROOMS: usize = 30;
const SESSIONS: usize = 150;

/// What befalls a region.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// It is cut off from the others.
    Cut,
    /// So it is, again and again, for moments.
    Flap,
    NatsKilled,
    NatsStopped,
    EdgeKilled,
    SpineKilled,
    HistoryKilled,
}

const FAULTS: [Fault; 7] = [
    Fault::Cut,
    Fault::Flap,
    Fault::NatsKilled,
    Fault::NatsStopped,
    Fault::EdgeKilled,
    Fault::SpineKilled,
    Fault::HistoryKilled,
];

/// How long faults last: in the suite they are to be survived, not waited for.
struct Measure {
    cut: Duration,
    stop: Duration,
}

/// Answers that an edge showed without what they answer.
async fn causal_timeouts(regions: &mut Regions, region: &str) -> u64 {
    let mesh = regions.mesh(region);
    mesh.metric(0, "natter_message_causal_timeout_total", "")
        .await
}

/// One fault after the other, each on a region of its own choice; what edges counted before they were killed.
async fn befall(regions: &mut Regions, rng: &mut StdRng, measure: &Measure) -> u64 {
    let mut counted = 0;
    let mut faults = FAULTS;
    faults.shuffle(rng);
    for fault in faults {
        let region = REGIONS[rng.random_range(0..REGIONS.len())];
        eprintln!("roaming: {fault:?} in {region}");
        match fault {
            Fault::Cut => {
                regions.cut(region);
                // Models the time that an outage takes.
                sleep(measure.cut).await;
                regions.heal(region);
            }
            Fault::Flap => {
                for _ in 0..5 {
                    regions.cut(region);
                    sleep(Duration::from_millis(rng.random_range(50..1500))).await;
                    regions.heal(region);
                    sleep(Duration::from_millis(rng.random_range(50..1500))).await;
                }
            }
            Fault::NatsKilled => {
                regions.kill(region).await;
                sleep(Duration::from_millis(rng.random_range(0..3000))).await;
                regions.restart(region).await;
            }
            Fault::NatsStopped => {
                regions.pause(region);
                sleep(measure.stop).await;
                regions.resume(region);
            }
            Fault::EdgeKilled => {
                counted += causal_timeouts(regions, region).await;
                let edge = &mut regions.mesh(region).edges[0].process;
                edge.kill().await;
                sleep(Duration::from_millis(rng.random_range(0..3000))).await;
                edge.start().await.unwrap();
            }
            Fault::SpineKilled => regions.restart_spine(region).await,
            Fault::HistoryKilled => {
                let history = &mut regions.mesh(region).workers[0].process;
                history.kill().await;
                sleep(Duration::from_millis(rng.random_range(0..3000))).await;
                history.start().await.unwrap();
            }
        }
        sleep(Duration::from_millis(rng.random_range(500..2000))).await;
    }
    counted
}

async fn storm(seed: &Seed, measure: &Measure) {
    let started = Instant::now();
    eprintln!("roaming: NATTER_TEST_SEED={}", seed.0);
    let mut rng = StdRng::seed_from_u64(seed.0);
    let mongodb = mongodb_url();
    let toml = format!(
        "rooms.ring = '32KiB'\ntelemetry.log = 'natter=debug,info'\nmongodb.url = '{mongodb}'"
    );
    let delay = Duration::from_millis(rng.random_range(0..40));
    let mut regions = Regions::start_with(&REGIONS, &toml, delay).await;
    for region in REGIONS {
        regions.mesh(region).add_edge().await;
        regions.mesh(region).add_worker("/readyz").await;
    }
    let endpoints = REGIONS.map(|region| regions.mesh(region).endpoint(0));
    let (stage, shared) = Shared::new(endpoints.to_vec(), ROOMS, SESSIONS);
    let mut tasks = JoinSet::new();
    let mut users = vec![BTreeSet::new(); ROOMS];
    for number in 0..SESSIONS {
        let session = Session::new(number, seed.0, &shared);
        for room in session.rooms() {
            users[room].insert(session.user.clone());
        }
        tasks.spawn(session.run());
    }
    let mut timeouts = befall(&mut regions, &mut rng, measure).await;
    stage.send_replace(Stage::Calm);
    let stormy = started.elapsed();
    let caught_up = caught_up(&shared).await;
    let calm = started.elapsed() - stormy;
    if caught_up.is_ok() {
        everybody_is_there(&mut regions, &users).await;
    }
    stage.send_replace(Stage::Over);
    let log = logs(tasks).await;
    for region in REGIONS {
        timeouts += causal_timeouts(&mut regions, region).await;
    }

    let verdict = vectors::check(&log);
    eprintln!(
        "roaming: seed {}, {stormy:.1?} of storm and {calm:.1?} of calm, {delay:?} from region to region: {} acked, {} in two regions, {} copies seen where the first was not known; \
         {} received in {SESSIONS} sessions, {} joins in another region; {timeouts} shown without what they answer, {} answers seen so; \
         {} violations",
        seed.0,
        verdict.acked,
        verdict.twins,
        verdict.copies,
        verdict.received,
        verdict.roamed,
        verdict.early.len(),
        verdict.violations.len(),
    );
    let counted = verdict.early.is_empty() || timeouts > 0;
    if let Err(behind) = &caught_up {
        let kept = keep(seed.0, &mut regions, &log, &verdict);
        panic!("not caught up: {behind}\n{}", told(&verdict, &kept));
    }
    if !verdict.violations.is_empty() || !counted {
        let kept = keep(seed.0, &mut regions, &log, &verdict);
        panic!("{}", told(&verdict, &kept));
    }
    histories_are_equal(&mut regions, &log).await;
    assert!(
        verdict.roamed > SESSIONS,
        "hardly anybody roamed: {}",
        verdict.roamed
    );
}

/// All regions agree on who is in each room: everybody who is.
async fn everybody_is_there(regions: &mut Regions, users: &[BTreeSet<String>]) {
    for region in REGIONS {
        let mesh = regions.mesh(region);
        for (room, users) in users.iter().enumerate() {
            let path = format!("/v1/rooms/{}/presence?limit=1000", room_name(room));
            eventually("all are shown", LONG, async || {
                let list = mesh.get(0, &path).await?;
                let list = list["users"].as_array().ok_or("no list")?;
                let shown = list.iter().map(|user| match user.get("state") {
                    None => user["user"].as_str().unwrap_or_default().to_owned(),
                    Some(state) => format!("{} is {state}", user["user"]),
                });
                let shown: BTreeSet<String> = shown.collect();
                let differ: Vec<&String> = shown.symmetric_difference(users).collect();
                match differ.is_empty() {
                    true => Ok(()),
                    false => Err(format!("{region}, room {room}: {differ:?}")),
                }
            })
            .await;
        }
    }
}

/// The history of each room is the same in all regions, and each message that was acknowledged or seen is in it once.
async fn histories_are_equal(regions: &mut Regions, log: &Log) {
    let mut expected: BTreeMap<&str, BTreeSet<(String, String)>> = BTreeMap::new();
    for ack in &log.acks {
        let of = expected.entry(&ack.room).or_default();
        of.insert((ack.from.clone(), ack.id.clone()));
    }
    for event in log.sessions.iter().flat_map(|session| &session.events) {
        if let checker::Event::Pushed { room, from, id, .. } = event {
            let of = expected.entry(room).or_default();
            of.insert((from.clone(), id.clone()));
        }
    }
    for (room, expected) in expected {
        let mut orders: Vec<Vec<(String, String)>> = Vec::new();
        for region in REGIONS {
            let mesh = regions.mesh(region);
            let order = Mutex::new(Vec::new());
            eventually("the history is whole", LONG, async || {
                let messages = history(mesh, room).await?;
                let said: BTreeSet<_> = messages.iter().cloned().collect();
                let once = said.len() == messages.len();
                *order.lock() = messages;
                if !once {
                    return Err(format!("{region}, {room}: a message is there twice"));
                }
                match expected.difference(&said).next() {
                    None => Ok(()),
                    Some(missing) => Err(format!("{region}, {room}: {missing:?} is missing")),
                }
            })
            .await;
            orders.push(order.into_inner());
        }
        assert!(
            orders.windows(2).all(|two| two[0] == two[1]),
            "{room}: {orders:?}"
        );
    }
}

/// Sender and id of all messages of a room, oldest first.
async fn history(mesh: &Mesh, room: &str) -> Result<Vec<(String, String)>, String> {
    let mut messages = Vec::new();
    let mut query = "limit=200".to_owned();
    loop {
        let path = format!("/v1/rooms/{room}/messages?{query}");
        let page = mesh.get(0, &path).await?;
        if page.get("partial").is_some() {
            return Err("a page is partial".to_owned());
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let of_page = page["messages"].as_array().ok_or("no messages")?.iter();
        let mut of_page: Vec<_> = of_page
            .map(|m| (text(&m["from"]), text(&m["id"])))
            .collect();
        of_page.append(&mut messages);
        messages = of_page;
        match page["prev"].as_str() {
            Some(prev) => query = format!("limit=200&before={prev}"),
            None => return Ok(messages),
        }
    }
}

fn told(verdict: &Verdict, kept: &Path) -> String {
    let violations = &verdict.violations;
    let mut text = format!(
        "{} violations, {} early answers (all of it is in {}):",
        violations.len(),
        verdict.early.len(),
        kept.display()
    );
    for violation in violations.iter().take(20) {
        write!(text, "\n  {violation}").unwrap();
    }
    for early in verdict.early.iter().take(5) {
        write!(text, "\n  early: {early}").unwrap();
    }
    text
}

/// Writes down what is needed to find out what happened.
fn keep(seed: u64, regions: &mut Regions, log: &Log, verdict: &Verdict) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("roaming-{seed}"));
    std::fs::create_dir_all(&folder).unwrap();
    for region in REGIONS {
        let log = regions.mesh(region).log(0);
        std::fs::copy(log, folder.join(format!("{region}.log"))).unwrap();
    }
    let lines: String = verdict
        .violations
        .iter()
        .map(|v| format!("{v}\n"))
        .collect();
    let early: String = verdict
        .early
        .iter()
        .map(|e| format!("early: {e}\n"))
        .collect();
    std::fs::write(folder.join("violations.txt"), lines + &early).unwrap();
    let mut text = String::new();
    for ack in &log.acks {
        writeln!(text, "{ack:?}").unwrap();
    }
    for session in &log.sessions {
        for event in &session.events {
            writeln!(text, "{:?} {event:?}", session.name).unwrap();
        }
    }
    std::fs::write(folder.join("operations.txt"), text).unwrap();
    folder
}

/// What the environment says of how much is to be tested.
#[expect(
    clippy::disallowed_methods,
    reason = "how much a test does is no configuration"
)]
fn asked_for(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_roams_between_regions_sees_every_message_once_whatever_befalls_them() {
    let first = seed();
    let seeds = asked_for("NATTER_TEST_REGION_SEEDS").map_or(1, |seeds| {
        let seeds = seeds.parse::<u64>();
        seeds.expect("NATTER_TEST_REGION_SEEDS is a number")
    });
    let (cut, stop) = match asked_for("NATTER_TEST_REGION_FAULTS").as_deref() {
        None | Some("short") => (4, 3),
        Some("long") => (20, 10),
        Some(other) => panic!("NATTER_TEST_REGION_FAULTS is short or long, not {other:?}"),
    };
    let measure = Measure {
        cut: Duration::from_secs(cut),
        stop: Duration::from_secs(stop),
    };
    let mut failed = Vec::new();
    for number in 0..seeds {
        let seed = first.wrapping_add(number);
        // Where one fails, the next is run all the same.
        let run = async { storm(&Seed(seed), &measure).await };
        if let Err(payload) = AssertUnwindSafe(run).catch_unwind().await {
            let text = payload.downcast_ref::<String>().cloned();
            let text = text.unwrap_or_else(|| "see above".to_owned());
            failed.push(format!("NATTER_TEST_SEED={seed}: {text}"));
        }
    }
    let count = failed.len();
    assert!(
        failed.is_empty(),
        "{count} of {seeds} seeds failed:\n{}",
        failed.join("\n")
    );
}
