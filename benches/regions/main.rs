//! What several regions cost and how long they need: latency within a region and from one to another, what comes after a
//! cut, and what a region does that is cut off. Real processes on this machine, in two regions whose links have a delay and
//! are cut.
//!
//! `cargo bench --bench regions` runs everything and prints the tables. `-- SCENARIO…` runs only some, `--save NAME` puts the
//! tables into `benches/RESULTS.md` as the part of that name. What is received is checked: lost, repeated or reordered
//! messages, and refused commands, are counted in each run, and end it with exit code 1; what never comes ends it at once.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a benchmark prints, and fails as tests do"
)]

mod client;
#[expect(
    clippy::allow_attributes,
    reason = "an expectation is not seen to be met in a trait's file"
)]
#[allow(dead_code, reason = "the benchmark that it comes from uses more")]
#[path = "../load/dialect.rs"]
mod dialect;
#[expect(dead_code, reason = "the benchmark that it comes from uses more")]
#[path = "../load/measure.rs"]
mod measure;
#[path = "../../tests/it/support/mod.rs"]
mod support;
#[expect(dead_code, reason = "the benchmark that it comes from uses more")]
#[path = "../load/swarm.rs"]
mod swarm;
#[path = "../load/table.rs"]
mod table;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use client::{Client, note, now_us, percentiles, until};
use dialect::Natter;
use measure::{Begin, Runs, Server, Tally};
use natter::testing::{
    mesh::provision,
    model::Region,
    servers::Process,
    subject::{api, rooms_stream},
};
use serde_json::{Value, json};
use support::{DedicatedNats, dedicated_nats, mesh::Mesh, regions::Regions, unique};
use swarm::Swarm;
use table::{Table, save};
use tokio::time::sleep;

/// The two regions. The second is the one that is cut off.
const HERE: &str = "a";
const THERE: &str = "b";
/// Limits that a benchmark would run into.
const TOML: &str = "limits.commands_per_second = 10000000\nlimits.commands_burst = 10000000";
/// Messages a second where latency is measured.
const RATE: f64 = 100.0;
/// What is said while nobody is at home in the cut region.
const MISSED: usize = 100_000;
const MISSED_ROOMS: usize = 50;
/// Who says it.
const SPEAKERS: usize = 10;
/// Sessions that come back at once, and messages that each has missed, half of them said in each region.
const RETURNING: usize = 5000;
const MISSED_BY_EACH: usize = 1000;

/// Several regions, and what they cost.
#[derive(Debug, Parser)]
struct Args {
    /// Scenarios; none: all.
    scenarios: Vec<String>,
    /// Runs of each.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// How long latency is measured in each, in seconds.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Puts the tables into benches/RESULTS.md, under this name.
    #[arg(long)]
    save: Option<String>,
    /// What cargo says to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

const ALL: [&str; 6] = [
    "in-region",
    "cross-region",
    "heal",
    "catch-up",
    "resume",
    "alone",
];

#[tokio::main(worker_threads = 2)]
async fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(unknown) = args.scenarios.iter().find(|name| !ALL.contains(&&***name)) {
        eprintln!(
            "there is no scenario {unknown:?}; there are {}",
            ALL.join(", ")
        );
        return ExitCode::from(64);
    }
    let (seconds, before) = (Duration::from_secs(args.seconds), load());
    let (mut faults, mut text) = (0, String::new());
    for name in ALL {
        if args.scenarios.is_empty() || args.scenarios.iter().any(|wanted| wanted == name) {
            let (table, wrong) = match name {
                "in-region" => in_region(args.runs, seconds).await,
                "cross-region" => cross_region(args.runs, seconds).await,
                "heal" => heal(args.runs).await,
                "catch-up" => catch_up(args.runs).await,
                "resume" => tokio::task::block_in_place(|| resume(args.runs)),
                _ => alone(args.runs, seconds).await,
            };
            let table = table.text();
            println!("{table}");
            text.push_str(&table);
            faults += wrong;
        }
    }
    let build = if cfg!(debug_assertions) {
        "debug"
    } else {
        "release"
    };
    let conditions = format!(
        "{} runs, latency over {} s each, {build} build; load average of the machine {before} before and {} after.\n",
        args.runs,
        args.seconds,
        load(),
    );
    println!("{conditions}");
    if let Some(name) = args.save {
        text.insert_str(0, &conditions);
        save("regions", &name, &text);
    }
    if faults > 0 {
        eprintln!("{faults} messages were lost, repeated or reordered, or commands refused");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// How many processes wanted to run, on average over the last minute: this program and its servers are among them.
fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap();
    load.split(' ').next().unwrap().to_owned()
}

/// Counts what was wrong.
fn faults<'c>(clients: impl IntoIterator<Item = &'c Client>) -> u64 {
    clients
        .into_iter()
        .map(|client| client.seen.lock().faults())
        .sum()
}

fn row(name: &str, runs: &Runs) -> Vec<String> {
    std::iter::once(name.to_owned())
        .chain(runs.columns())
        .collect()
}

/// Two regions with so many edges each.
async fn two(edges: [usize; 2], delay: Duration) -> Regions {
    let mut regions = Regions::start_with(&[HERE, THERE], TOML, delay).await;
    for (region, edges) in [HERE, THERE].into_iter().zip(edges) {
        for _ in 0..edges {
            regions.mesh(region).add_edge().await;
        }
    }
    regions
}

/// One who says and one who hears, on these edges, for a while: p50 and p99 in ms, µs of CPU of each of `servers` a message.
async fn measured(
    speaker: (&Mesh, usize),
    ear: (&Mesh, usize),
    servers: &[Server],
    time: Duration,
) -> (Vec<f64>, u64) {
    let room = format!("chat:{}", unique("r"));
    let mut speaker = Client::connect(speaker.0, speaker.1, "speaker").await;
    let mut ear = Client::connect(ear.0, ear.1, "ear").await;
    ear.join(&room, &Value::Null).await;
    // Until routes and caches are as they will be.
    speaker.talk(&room, RATE, Duration::from_secs(1)).await;
    ear.hear(&room, &speaker, speaker.said(&room)).await;
    ear.reset();
    let (before, begin) = (speaker.said(&room), Begin::now(servers));
    speaker.talk(&room, RATE, time).await;
    ear.hear(&room, &speaker, speaker.said(&room)).await;
    let cost = begin.end();
    #[expect(clippy::cast_precision_loss, reason = "some thousand")]
    let said = (speaker.said(&room) - before) as f64;
    let mut figures = ear.latency().to_vec();
    figures.extend(["edge", "nats", "spine", "other"].map(|name| {
        let used = cost.cpu_us.iter().filter(|(server, _)| *server == name);
        used.map(|(_, us)| *us as f64).sum::<f64>() / said
    }));
    eprintln!("{:.2} cores were busy elsewhere", cost.other_cores);
    (figures, faults([&speaker, &ear]))
}

fn server(name: &'static str, pid: u32) -> Server {
    Server { name, pid }
}

fn edges(mesh: &Mesh, name: &'static str) -> Vec<Server> {
    let pid = |process: &Process| process.pid().unwrap();
    mesh.edges
        .iter()
        .map(|edge| server(name, pid(&edge.process)))
        .collect()
}

async fn in_region(runs: usize, time: Duration) -> (Table, u64) {
    let nats: DedicatedNats = dedicated_nats().await;
    let single = Mesh::start(&nats.url(), 2, TOML).await;
    let regions = two([2, 1], Duration::ZERO).await;
    let mut alone = edges(&single, "edge");
    alone.push(server("nats", nats.server.pid().unwrap()));
    let [nats_here, spine] = regions.pids(HERE);
    let mut both = edges(regions.at(HERE), "edge");
    both.extend([server("nats", nats_here), server("spine", spine)]);
    both.extend(edges(regions.at(THERE), "other"));
    both.extend(regions.pids(THERE).map(|pid| server("other", pid)));
    let (mut one, mut mesh, mut ratio) = (Runs::default(), Runs::default(), Runs::default());
    let mut wrong = 0;
    for run in 0..runs {
        let mut figures = [Vec::new(), Vec::new()];
        // Now the one first and now the other.
        for which in [run % 2, 1 - run % 2] {
            let (place, servers) = match which {
                0 => (&single, &alone),
                _ => (regions.at(HERE), &both),
            };
            let (found, faults) = measured((place, 0), (place, 1), servers, time).await;
            figures[which] = found;
            wrong += faults;
        }
        let [single, several] = figures;
        let own = |of: &[f64]| of[2] + of[3];
        let mut ratios: Vec<f64> = (0..4).map(|at| several[at] / single[at]).collect();
        ratios.extend([0.0, 0.0, own(&several) / own(&single)]);
        ratio.add(ratios);
        for (runs, mut figures) in [(&mut one, single), (&mut mesh, several)] {
            figures.push(own(&figures));
            runs.add(figures);
        }
    }
    let mut ratios = row("ratio", &ratio);
    // One region has none of these.
    ratios[5..7].fill_with(String::new);
    let table = Table {
        title: "In one region: 100 messages/s in one room, from one edge to another; CPU in µs a message",
        columns: &[
            "",
            "p50, ms",
            "p99, ms",
            "both edges",
            "nats-server",
            "spine",
            "all of the other region",
            "edges and nats-server",
        ],
        rows: vec![row("one region", &one), row("two regions", &mesh), ratios],
    };
    (table, wrong)
}

async fn cross_region(runs: usize, time: Duration) -> (Table, u64) {
    let (mut rows, mut wrong) = (Vec::new(), 0);
    for delay in [0, 20, 80] {
        let regions = two([1, 1], Duration::from_millis(delay)).await;
        let mut table = Runs::default();
        for _ in 0..runs {
            let (here, there) = (regions.at(HERE), regions.at(THERE));
            let (figures, faults) = measured((here, 0), (there, 0), &[], time).await;
            let [p50, p99] = [figures[0], figures[1]];
            #[expect(clippy::cast_precision_loss, reason = "at most 80")]
            let delay = delay as f64;
            table.add(vec![p50, p99, p50 - delay, p99 - delay]);
            wrong += faults;
        }
        rows.push(row(&format!("{delay} ms"), &table));
    }
    let table = Table {
        title: "From one region to the other: 100 messages/s in one room",
        columns: &[
            "delay of the link",
            "p50, ms",
            "p99, ms",
            "p50 less the delay",
            "p99 less the delay",
        ],
        rows,
    };
    (table, wrong)
}

/// What an edge needs for many sessions that come back to it with cursors of two regions.
fn resume(runs: usize) -> (Table, u64) {
    let runtime = tokio::runtime::Handle::current();
    let toml = format!(
        "{TOML}\nnamespaces.log = {{ durable = true, presence = \"off\", typing = false, history = false }}"
    );
    let (mut table, mut wrong) = (Runs::default(), 0);
    for _ in 0..runs {
        let start = Regions::start_with(&[HERE, THERE], &toml, Duration::ZERO);
        let mut regions = runtime.block_on(start);
        for region in [HERE, THERE] {
            runtime.block_on(regions.mesh(region).add_edge());
        }
        let [here, there] = [HERE, THERE].map(|region| regions.at(region).edges[0].address);
        let rooms = vec![format!("log:{}", unique("r"))];
        let mut swarm = Swarm::new(Box::new(Natter), here, rooms);
        swarm.keep_cursors = true;
        let first = swarm.connect((0..RETURNING).map(|_| Some(0)));
        let returning = first..first + RETURNING;
        let here = [None, Some(0)];
        let speaker = swarm.connect(here.into_iter());
        swarm.go_to(there);
        let other = swarm.connect(here.into_iter());
        swarm.go_to(regions.at(HERE).edges[0].address);
        // So that everybody has a cursor of both regions.
        for speaker in [speaker, other] {
            swarm.say(speaker, 0, Instant::now());
            swarm.until("everybody has it", |swarm| {
                returning
                    .clone()
                    .all(|client| swarm.got(client) == swarm.said(0))
            });
        }
        swarm.cut(returning.clone());
        for speaker in [speaker, other] {
            for _ in 0..MISSED_BY_EACH / 2 {
                swarm.say(speaker, 0, Instant::now());
                swarm.turn(Duration::ZERO);
            }
            // Those of one region after those of the other: their numbers are one row.
            swarm.until("it is said", Swarm::is_settled);
        }
        swarm.reset();
        let servers = edges(regions.at(HERE), "edge");
        let (before, _) = servers[0].memory();
        let (begin, began) = (Begin::now(&servers), Instant::now());
        swarm.back(returning);
        swarm.until("everybody has everything", Swarm::is_settled);
        let took = began.elapsed();
        let cost = begin.end();
        let (_, most) = servers[0].memory();
        let tally = &swarm.tally;
        wrong += tally.lost + tally.repeated;
        wrong += ((RETURNING * MISSED_BY_EACH) as u64).abs_diff(tally.deliveries);
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        table.add(vec![
            took.as_secs_f64(),
            mib(before),
            mib(most),
            cost.cpu_of("edge") / tally.deliveries as f64,
        ]);
    }
    let table = Table {
        title: "5,000 sessions of one room come back to an edge, each with 1,000 missed messages of 256 bytes, half of them said in each of two regions",
        columns: &[
            "s until the last has everything",
            "edge before, MiB",
            "edge at most, MiB",
            "edge, µs a delivery",
        ],
        rows: vec![table.columns()],
    };
    (table, wrong)
}

/// One who says and one who hears in each region, in one room.
struct Pairs {
    speakers: [Client; 2],
    ears: [Client; 2],
    room: String,
}

impl Pairs {
    async fn join(regions: &Regions) -> Self {
        let room = format!("chat:{}", unique("r"));
        let (here, there) = (regions.at(HERE), regions.at(THERE));
        let mut ears = [
            Client::connect(here, 0, "ear").await,
            Client::connect(there, 0, "ear").await,
        ];
        for ear in &mut ears {
            ear.join(&room, &Value::Null).await;
        }
        let speakers = [
            Client::connect(here, 0, "speaker").await,
            Client::connect(there, 0, "speaker").await,
        ];
        Self {
            speakers,
            ears,
            room,
        }
    }

    async fn talk(&mut self, rate: f64, time: Duration) {
        let [here, there] = &mut self.speakers;
        tokio::join!(
            here.talk(&self.room, rate, time),
            there.talk(&self.room, rate, time)
        );
    }

    /// How long it takes until each ear has what was said in the other region up to now, in s: there, and here.
    async fn whole(&self) -> [f64; 2] {
        let begin = Instant::now();
        let heard = async |ear: usize, speaker: usize| {
            let speaker = &self.speakers[speaker];
            self.ears[ear]
                .hear(&self.room, speaker, speaker.said(&self.room))
                .await;
            begin.elapsed().as_secs_f64()
        };
        tokio::join!(heard(1, 0), heard(0, 1)).into()
    }

    /// Waits until everybody has everything, and counts what was wrong.
    async fn end(self) -> u64 {
        self.whole().await;
        for (ear, speaker) in self.ears.iter().zip(&self.speakers) {
            ear.hear(&self.room, speaker, speaker.said(&self.room))
                .await;
            speaker.acknowledged().await;
        }
        faults(self.ears.iter().chain(&self.speakers))
    }
}

async fn heal(runs: usize) -> (Table, u64) {
    let (mut rows, mut wrong) = (Vec::new(), 0);
    let regions = two([1, 1], Duration::ZERO).await;
    for cut in [5, 20, 60] {
        let mut table = Runs::default();
        for _ in 0..runs {
            let mut pairs = Pairs::join(&regions).await;
            pairs.talk(10.0, Duration::from_secs(2)).await;
            pairs.whole().await;
            regions.cut(THERE);
            pairs.talk(10.0, Duration::from_secs(cut)).await;
            regions.heal(THERE);
            let seconds = pairs.whole().await;
            eprintln!("healed after {cut} s: whole after {seconds:.2?} s");
            table.add(seconds.to_vec());
            pairs.talk(10.0, Duration::from_secs(1)).await;
            wrong += pairs.end().await;
        }
        rows.push(row(&format!("{cut} s"), &table));
    }
    let table = Table {
        title: "After a cut, 10 messages/s in each region: s from the heal until the other region's member has all of them",
        columns: &["cut", "in the region that was cut off", "in the other"],
        rows,
    };
    (table, wrong)
}

async fn catch_up(runs: usize) -> (Table, u64) {
    let (mut table, mut wrong) = (Runs::default(), 0);
    for _ in 0..runs {
        let regions = two([1, 1], Duration::ZERO).await;
        let room = |number: usize| format!("chat:missed{number}");
        let (here, there) = (regions.at(HERE), regions.at(THERE));
        let mut speakers = Vec::new();
        for _ in 0..SPEAKERS {
            speakers.push(Client::connect(here, 0, "speaker").await);
        }
        // Who has their cursor from before the cut, comes back at the heal, and once the mirrors are whole.
        let mut early = Client::connect(there, 0, "early").await;
        let mut late = Client::connect(there, 0, "late").await;
        let cursor = early.join(&room(0), &Value::Null).await;
        let other = late.join(&room(1), &Value::Null).await;
        for (client, number) in [(&mut early, 0), (&mut late, 1)] {
            client.ask("leave", json!({"room": room(number)})).await;
        }
        regions.cut(THERE);
        let begin = Instant::now();
        let saying = speakers
            .iter_mut()
            .enumerate()
            .map(async |(first, speaker)| {
                for number in 0..MISSED / SPEAKERS {
                    speaker
                        .say(&room((first + number * SPEAKERS) % MISSED_ROOMS))
                        .await;
                }
                speaker.acknowledged().await;
            });
        futures_util::future::join_all(saying).await;
        let said = begin.elapsed().as_secs_f64();
        let streams = Streams::of(&regions).await;
        let last = streams.last(&streams.here).await;
        regions.heal(THERE);
        let begin = Instant::now();
        let back = async {
            early.join(&room(0), &cursor).await;
            early
                .hear(&room(0), &speakers[0], speakers[0].said(&room(0)))
                .await;
            begin.elapsed().as_secs_f64()
        };
        let whole = async {
            until("whole mirrors", async || {
                streams.last(&streams.there).await == last
            })
            .await;
            begin.elapsed().as_secs_f64()
        };
        let (back, whole) = tokio::join!(back, whole);
        let begin = Instant::now();
        late.join(&room(1), &other).await;
        late.hear(&room(1), &speakers[1], speakers[1].said(&room(1)))
            .await;
        let resumed = begin.elapsed().as_secs_f64() * 1000.0;
        #[expect(clippy::cast_precision_loss, reason = "100,000")]
        let rate = MISSED as f64 / whole;
        eprintln!("said in {said:.1} s; whole after {whole:.2} s, back after {back:.2} s");
        table.add(vec![MISSED as f64 / said, whole, rate, back, resumed]);
        wrong += faults(speakers.iter().chain([&early, &late]));
    }
    let table = Table {
        title: "100,000 messages of 200 bytes in 50 rooms, said in the other region during a cut",
        columns: &[
            "acknowledged/s during the cut",
            "s from the heal until the mirrors have all",
            "messages/s",
            "s until who resumed at the heal has the 2,000 of their room",
            "ms until who resumes then has them",
        ],
        rows: vec![row("", &table).split_off(1)],
    };
    (table, wrong)
}

/// The streams of the first region, in their origin and as mirrors.
struct Streams {
    here: async_nats::Client,
    there: async_nats::Client,
    partitions: u16,
}

impl Streams {
    async fn of(regions: &Regions) -> Self {
        let (here, there) = (regions.at(HERE), regions.at(THERE));
        Self {
            here: provision::connect(&here.config.nats).await.unwrap(),
            there: provision::connect(&there.config.nats).await.unwrap(),
            partitions: here.config.nats.partitions,
        }
    }

    /// The last sequence of each partition, as `client`'s region has it.
    async fn last(&self, client: &async_nats::Client) -> Vec<Option<u64>> {
        let mut last = Vec::new();
        for part in 0..self.partitions {
            let stream = rooms_stream(&Region::parse(HERE).unwrap(), part);
            // A mirror that is busy may answer late: that is no fault, and it is asked again.
            let answer = client
                .request(api::stream_info(&stream), "".into())
                .await
                .ok();
            let info: Option<Value> =
                answer.and_then(|answer| serde_json::from_slice(&answer.payload).ok());
            last.push(info.and_then(|info| info["state"]["last_seq"].as_u64()));
        }
        last
    }
}

/// What is timed in a region alone.
const CALLS: [&str; 5] = [
    "send, until its ack",
    "live, until delivered",
    "join with `since`, 100 ms after leaving",
    "presence",
    "read",
];

async fn alone(runs: usize, time: Duration) -> (Table, u64) {
    let mut wrong = 0;
    // Runs of p50 and p99 before, and p50 and p99 during the cut, of each call.
    let mut tables: [Runs; CALLS.len()] = std::array::from_fn(|_| Runs::default());
    let regions = two([1, 1], Duration::from_millis(20)).await;
    for _ in 0..runs {
        let (here, there) = (regions.at(HERE), regions.at(THERE));
        let room = format!("chat:{}", unique("r"));
        let mut far = Client::connect(here, 0, "far").await;
        let mut ear = Client::connect(there, 0, "ear").await;
        let mut visitor = Client::connect(there, 0, "visitor").await;
        let mut speaker = Client::connect(there, 0, "speaker").await;
        for client in [&mut far, &mut ear, &mut visitor] {
            client.join(&room, &Value::Null).await;
        }
        speaker.talk(&room, 50.0, Duration::from_secs(1)).await;
        let before = calls(&room, &mut speaker, &ear, &mut visitor, time).await;
        regions.cut(THERE);
        let during = calls(&room, &mut speaker, &ear, &mut visitor, time).await;
        regions.heal(THERE);
        for ((runs, before), during) in tables.iter_mut().zip(before).zip(during) {
            let [p50, p99] = before;
            let [p50_cut, p99_cut] = during;
            runs.add(vec![p50, p50_cut, p99, p99_cut, p50_cut / p50]);
        }
        for client in [&far, &ear, &visitor] {
            client.hear(&room, &speaker, speaker.said(&room)).await;
        }
        speaker.acknowledged().await;
        wrong += faults([&far, &ear, &visitor, &speaker]);
    }
    let rows = CALLS.iter().zip(&tables);
    let table = Table {
        title: "A region before and while it is cut off, links of 20 ms, 50 messages/s in a room: ms",
        columns: &[
            "",
            "p50 before",
            "p50 in the cut",
            "p99 before",
            "p99 in the cut",
            "ratio of p50",
        ],
        rows: rows.map(|(name, runs)| row(name, runs)).collect(),
    };
    (table, wrong)
}

/// Times everything that is done in a room while somebody speaks there: p50 and p99 of each of [`CALLS`], in ms.
async fn calls(
    room: &str,
    speaker: &mut Client,
    ear: &Client,
    visitor: &mut Client,
    time: Duration,
) -> [[f64; 2]; CALLS.len()] {
    ear.reset();
    speaker.reset();
    let asks = async {
        let mut took: [Tally; 3] = std::array::from_fn(|_| Tally::default());
        let end = Instant::now() + time;
        while Instant::now() < end {
            visitor.ask("leave", json!({"room": room})).await;
            // What is said meanwhile is the backlog.
            sleep(Duration::from_millis(100)).await;
            let cursor = visitor.seen.lock().cursor.clone();
            let asked = [
                ("join", json!({"room": room, "since": cursor})),
                ("presence", json!({"room": room})),
                ("read", json!({"room": room, "cursor": cursor})),
            ];
            for ((op, fields), took) in asked.into_iter().zip(&mut took) {
                let began = now_us();
                let reply = visitor.ask(op, fields).await;
                note(&mut took.latency, now_us() - began);
                assert!(reply.get("reset").is_none(), "{reply}");
            }
        }
        took.map(|took| percentiles(&took.latency))
    };
    let (joins, ()) = tokio::join!(asks, speaker.talk(room, 50.0, time));
    ear.hear(room, speaker, speaker.said(room)).await;
    speaker.acknowledged().await;
    let sent = percentiles(&speaker.seen.lock().acks.latency);
    let [join, presence, read] = joins;
    [sent, ear.latency(), join, presence, read]
}
