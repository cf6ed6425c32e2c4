//! Three regions, and users who roam between them while regions are cut off, links flap, servers and edges are killed or stand still;
//! then [`vectors`](crate::support::vectors) proves that each saw everything, once, each region's messages in order and answers
//! after what they answer.
//!
//! `NATTER_TEST_SEED` repeats the decisions of a run, not its schedule. `NATTER_TEST_REGION_SEEDS=20` runs as many seeds as that after
//! each other, with long faults: a cut of 20 s, a server that stands still for 10 s.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use tokio::{sync::watch, task::JoinSet, time::sleep};

use crate::{
    storm::{
        Seed, caught_up, seed,
        sessions::{Board, Session, Shared, Stage},
    },
    support::{
        checker::{self, Log},
        regions::Regions,
        vectors::{self, Verdict},
    },
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
}

const FAULTS: [Fault; 6] = [
    Fault::Cut,
    Fault::Flap,
    Fault::NatsKilled,
    Fault::NatsStopped,
    Fault::EdgeKilled,
    Fault::SpineKilled,
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
        }
        sleep(Duration::from_millis(rng.random_range(500..2000))).await;
    }
    counted
}

async fn storm(seed: &Seed, measure: &Measure) {
    let started = Instant::now();
    eprintln!("roaming: NATTER_TEST_SEED={}", seed.0);
    let mut rng = StdRng::seed_from_u64(seed.0);
    let toml =
        "rooms.ring = '32KiB'\nlimits.sessions_per_ip = 0\ntelemetry.log = 'natter=debug,info'";
    let delay = Duration::from_millis(rng.random_range(0..40));
    let mut regions = Regions::start_with(&REGIONS, toml, delay).await;
    for region in REGIONS {
        regions.mesh(region).add_edge().await;
    }
    let (stage, watched) = watch::channel(Stage::Storm);
    let shared = Arc::new(Shared {
        endpoints: REGIONS
            .iter()
            .map(|region| regions.mesh(region).endpoint(0))
            .collect(),
        stage: watched,
        board: Mutex::new(Board::new(ROOMS, SESSIONS)),
    });
    let mut tasks = JoinSet::new();
    for number in 0..SESSIONS {
        tasks.spawn(Session::new(number, seed.0, &shared).run());
    }
    let mut timeouts = befall(&mut regions, &mut rng, measure).await;
    stage.send_replace(Stage::Calm);
    let stormy = started.elapsed();
    let caught_up = caught_up(&shared).await;
    let calm = started.elapsed() - stormy;
    stage.send_replace(Stage::Over);
    let mut log = Log::default();
    while let Some(session) = tasks.join_next().await {
        let session = session.unwrap();
        log.sent.extend(session.sent);
        log.acks.extend(session.acks);
        log.sessions.push(checker::Session {
            name: session.user,
            events: session.events,
        });
    }
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
    assert!(
        verdict.roamed > SESSIONS,
        "hardly anybody roamed: {}",
        verdict.roamed
    );
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

/// How many seeds are to be run, with long faults; `None`: one, with short ones.
#[expect(
    clippy::disallowed_methods,
    reason = "how much a test does is no configuration"
)]
fn seeds() -> Option<u64> {
    let seeds = std::env::var("NATTER_TEST_REGION_SEEDS").ok()?;
    Some(seeds.parse().expect("NATTER_TEST_REGION_SEEDS is a number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_roams_between_regions_sees_every_message_once_whatever_befalls_them() {
    let first = seed();
    let Some(seeds) = seeds() else {
        let measure = Measure {
            cut: Duration::from_secs(4),
            stop: Duration::from_secs(3),
        };
        return storm(&Seed(first), &measure).await;
    };
    for number in 0..seeds {
        let measure = Measure {
            cut: Duration::from_secs(20),
            stop: Duration::from_secs(10),
        };
        storm(&Seed(first.wrapping_add(number)), &measure).await;
    }
}
