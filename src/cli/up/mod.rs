//! `natter up`: everything for a laptop.
//!
//! nats-server, mongod, the edges and the history service are children. Each can be killed alone and is restarted. They
//! are stopped in this order: the edges (a drain), then history (which writes what they still published to MongoDB),
//! then the servers that both need.

mod control;
pub(super) mod data_dir;
mod edge;
mod history;
mod report;
mod stack;
mod start;
mod supervise;
mod token;
mod worker;

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::ensure;
use figment::providers::{Format as _, Toml};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use self::{
    report::Report,
    stack::{Name, Stack},
    start::start,
    supervise::{Event, What},
};
use crate::config::Config;

/// Events that may wait to be printed. When full, the tasks that watch the children wait.
const EVENT_QUEUE: usize = 64;

/// Flags of `natter up`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folder for data and logs.
    #[arg(long, value_name = "DIR", default_value = ".natter")]
    data: PathBuf,
    /// Port of the first edge [default: that of edge.listen]; the others follow. A port in use: the next free one. 0: any.
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Port of nats-server; in use: the next free one. 0: any.
    #[arg(long, value_name = "PORT", default_value_t = 4222)]
    nats_port: u16,
    /// Port of mongod; in use: the next free one. 0: any.
    #[arg(long, value_name = "PORT", default_value_t = 27017)]
    mongodb_port: u16,
    /// Run without MongoDB.
    #[arg(long)]
    no_mongodb: bool,
    /// Also run a worker that translates and scores what is said, to see how workers do it. Needs python3.
    #[arg(long)]
    demo_worker: bool,
    /// Number of edges; with --regions, of each region.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(0..=64))]
    edges: u16,
    /// Print one line of JSON when ready, and after every restart of a child; nothing else on stdout.
    #[arg(long)]
    json: bool,
    /// Do not restart a child that died.
    #[arg(long)]
    no_restart: bool,
    /// Name of the region, instead of the one in the configuration.
    #[arg(long, value_name = "NAME", conflicts_with = "regions")]
    region: Option<String>,
    /// Several regions, each with its own nats-server, edges and history service, which continue when they are cut off
    /// from each other (natter dev cut).
    #[arg(long, value_name = "NAME,NAME,…", value_delimiter = ',')]
    regions: Vec<String>,
    /// One-way delay from one region to another.
    #[arg(long, value_name = "TIME", requires = "regions")]
    link_delay: Option<humantime::Duration>,
}

/// Runs until a signal. The exit code is 1 if something could not be started.
pub(super) fn run(args: &Args, config_file: Option<&Path>) -> anyhow::Result<ExitCode> {
    let configs = configs(args, config_file)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(up(args, &configs, config_file))
}

/// The configuration of each region.
fn configs(args: &Args, config_file: Option<&Path>) -> anyhow::Result<Vec<Config>> {
    let load = |region: Option<&String>| {
        let mut overrides = format!("regions = {:?}\n", args.regions);
        if let Some(region) = region {
            overrides.push_str(&format!("region = {region:?}\n"));
        }
        Config::load(config_file, Toml::string(&overrides))
    };
    if args.regions.is_empty() {
        return Ok(vec![load(args.region.as_ref())?]);
    }
    ensure!(
        args.regions.len() > 1,
        "--regions {}: at least two, separated by commas; --region names a single one",
        args.regions.join(",")
    );
    let regions = args.regions.iter();
    Ok(regions
        .map(|region| load(Some(region)))
        .collect::<Result<_, _>>()?)
}

async fn up(
    args: &Args,
    configs: &[Config],
    config_file: Option<&Path>,
) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    let (events, mut incoming) = mpsc::channel(EVENT_QUEUE);
    let mut stack = Stack::new(!args.no_restart, events);
    let started = tokio::select! {
        started = start(args, configs, config_file, &mut stack) => Some(started),
        () = signals.next() => None,
    };
    let result = match started {
        None => Ok(()),
        Some(Err(error)) => Err(error),
        Some(Ok(report)) => {
            watch(args.json, report, &stack.names, &mut incoming, &mut signals).await;
            Ok(())
        }
    };
    // Children that are being stopped must not wait for events to be read.
    drop(incoming);
    if result.is_ok() {
        say("stopping");
    }
    tokio::select! {
        () = stack.stop() => {}
        () = signals.next() => say("killing what has not stopped"),
    }
    result.map(|()| ExitCode::SUCCESS)
}

/// Prints the report, and prints it again after each restart, until a signal arrives.
async fn watch(
    json: bool,
    mut report: Report,
    names: &[Name],
    incoming: &mut mpsc::Receiver<Event>,
    signals: &mut Signals,
) {
    if json {
        print_json(&report);
    } else {
        print(&report.for_people());
    }
    loop {
        // Both branches are cancel-safe.
        let event = tokio::select! {
            () = signals.next() => return,
            event = incoming.recv() => event,
        };
        // The stack holds a sender, so the channel can't end.
        let Some(Event { child, what }) = event else {
            return signals.next().await;
        };
        let Some(name) = names.get(child) else {
            continue;
        };
        match what {
            What::Died(Some(status)) => say(&format!("{} died: {status}", name.shown)),
            What::Died(None) => say(&format!("{} died", name.shown)),
            What::Hung(error) => say(&format!("{} hangs and is killed: {error}", name.shown)),
            What::RestartFailed { error, pause } => say(&format!(
                "{:#}; the next attempt is in {pause:?}",
                anyhow::Error::from(error)
            )),
            What::Restarted { pid } => {
                say(&format!("{} runs again, process {pid}", name.shown));
                name.role.set_pid(&mut report, pid);
                if json {
                    print_json(&report);
                }
            }
        }
    }
}

/// Ctrl-C, SIGTERM, and SIGHUP (the terminal is gone).
struct Signals([Signal; 3]);

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self([
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ]))
    }

    /// Returns when one of them arrives. Cancel-safe.
    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

fn say(text: &str) {
    eprintln!("natter: {text}");
}

fn print_json(report: &Report) {
    match serde_json::to_string(report) {
        Ok(line) => print(&format!("{line}\n")),
        Err(error) => say(&format!("the report can't be written: {error}")),
    }
}

/// Writes to stdout. A reader that has gone is not a reason to stop.
fn print(text: &str) {
    let mut stdout = io::stdout().lock();
    if let Err(error) = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        say(&format!("stdout: {error}"));
    }
}
