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

use std::{fmt::Write as _, process::ExitCode, time::Duration};

use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const RESULTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/RESULTS.md");

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
    /// Puts the tables into benches/RESULTS.md, under this name.
    #[arg(long)]
    save: Option<String>,
    /// What cargo says to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A table of results.
#[derive(Debug)]
struct Table {
    title: &'static str,
    columns: &'static [&'static str],
    rows: Vec<Vec<String>>,
}

impl Table {
    fn text(&self) -> String {
        let mut text = format!("\n{}\n\n", self.title);
        let line = |text: &mut String, cells: &[String]| {
            writeln!(text, "| {} |", cells.join(" | ")).unwrap();
        };
        let head: Vec<String> = self.columns.iter().map(|&name| name.to_owned()).collect();
        line(&mut text, &head);
        line(&mut text, &vec!["---".to_owned(); head.len()]);
        for row in &self.rows {
            line(&mut text, row);
        }
        text
    }
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
    let mut bench = scenarios::Bench::new(args.runs, Duration::from_secs(args.seconds));
    let mut text = String::new();
    for (name, scenario) in scenarios::ALL {
        if args.scenarios.is_empty() || args.scenarios.iter().any(|wanted| wanted == name) {
            let table = scenario(&mut bench).text();
            println!("{table}");
            text.push_str(&table);
        }
    }
    if let Some(name) = args.save {
        save(&name, &text);
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

/// Replaces the part of the results between the marks of this name.
fn save(name: &str, text: &str) {
    let results = std::fs::read_to_string(RESULTS).unwrap();
    let (begin, end) = (
        format!("<!-- load {name} -->"),
        format!("<!-- end of load {name} -->"),
    );
    let (before, rest) = results
        .split_once(&begin)
        .unwrap_or_else(|| panic!("{RESULTS} has no mark {begin}"));
    let (_, after) = rest
        .split_once(&end)
        .unwrap_or_else(|| panic!("{RESULTS} has no mark {end}"));
    std::fs::write(RESULTS, format!("{before}{begin}\n{text}\n{end}{after}")).unwrap();
}
