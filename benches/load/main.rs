//! What the fan-out costs, beside nats-server's own WebSocket: CPU time per delivery, latency, memory per connection, and how
//! all that grows. Real processes on this machine, one load generator for all.
//!
//! `cargo bench --bench load` runs everything, prints a line of JSON a run and then the tables. `-- SCENARIO…` runs only some,
//! `--save NAME` puts the tables into `benches/RESULTS.md` as the part of that name. What is received is checked: lost, repeated
//! or reordered messages are counted in each run, and end it with exit code 1.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a benchmark prints, fails as tests do, and has small numbers"
)]

mod dialect;
mod measure;
mod scenarios;
#[path = "../../tests/it/support/mod.rs"]
mod support;
mod swarm;
mod table;

use std::{process::ExitCode, time::Duration};

use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use table::{Table, save};

/// Load, and what it costs.
#[derive(Debug, Parser)]
struct Args {
    /// Scenarios; none: all.
    scenarios: Vec<String>,
    /// Runs of each.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// How long each lasts, in seconds.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Of `fan-out`, only loads whose name has this.
    #[arg(long, default_value = "")]
    only: String,
    /// Puts the tables into benches/RESULTS.md, under this name.
    #[arg(long)]
    save: Option<String>,
    /// What cargo says to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let known: Vec<&str> = scenarios::ALL.iter().map(|(name, _)| *name).collect();
    if let Some(unknown) = args
        .scenarios
        .iter()
        .find(|name| !known.contains(&name.as_str()))
    {
        eprintln!(
            "there is no scenario {unknown:?}; there are {}",
            known.join(", ")
        );
        return ExitCode::from(64);
    }
    raise_file_limit();
    let mut bench = scenarios::Bench::new(args.runs, Duration::from_secs(args.seconds), args.only);
    let mut text = String::new();
    for (name, scenario) in scenarios::ALL {
        if args.scenarios.is_empty() || args.scenarios.iter().any(|wanted| wanted == name) {
            let table = scenario(&mut bench).text();
            println!("{table}");
            text.push_str(&table);
        }
    }
    if let Some(name) = args.save {
        save("load", &name, &text);
    }
    if bench.faults > 0 {
        eprintln!("{} messages were lost or repeated", bench.faults);
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// A connection is a file.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}
