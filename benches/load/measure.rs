//! What a run is: what was received, what it cost, and what else the machine did meanwhile.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::support::cpu_time;

/// Runs during which everything else on the machine took more than this many cores are repeated.
pub(crate) const NOISE: f64 = 0.25;

/// Longest latency that is told apart, in µs.
pub(crate) const MOST_US: u64 = 60_000_000;

/// What was received.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) deliveries: u64,
    pub(crate) lost: u64,
    /// Repeated, or out of order.
    pub(crate) repeated: u64,
    pub(crate) acked: u64,
    pub(crate) joined: u64,
    /// Latency in µs, from when a message was due.
    pub(crate) latency: Histogram<u64>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            deliveries: 0,
            lost: 0,
            repeated: 0,
            acked: 0,
            joined: 0,
            latency: Histogram::new_with_bounds(1, MOST_US, 3)
                .expect("bounds and digits are possible"),
        }
    }
}

/// A process whose cost is measured.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    pub(crate) name: &'static str,
    pub(crate) pid: u32,
}

impl Server {
    /// Resident memory now and at most, in bytes.
    pub(crate) fn memory(&self) -> (u64, u64) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let of = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let digits = line.and_then(|line| line.split_whitespace().next());
            digits
                .and_then(|digits| digits.parse::<u64>().ok())
                .unwrap_or_default()
                * 1024
        };
        (of("VmRSS:"), of("VmHWM:"))
    }
}

/// CPU time that the whole machine has used.
fn machine() -> Duration {
    let stat = std::fs::read_to_string("/proc/stat").unwrap();
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .unwrap()
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    // user, nice, system, idle, iowait, irq, softirq, steal
    let busy: u64 = fields[..3].iter().sum::<u64>() + fields[5] + fields[6];
    Duration::from_millis(busy * 10)
}

/// Clocks at the beginning of what is measured.
pub(crate) struct Begin {
    servers: Vec<(Server, Duration)>,
    own: Duration,
    machine: Duration,
    at: Instant,
}

/// What it took since then.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Cost {
    /// CPU time of each server, in µs.
    pub(crate) cpu_us: Vec<(&'static str, u64)>,
    /// Resident memory at most, in bytes.
    pub(crate) memory: Vec<(&'static str, u64)>,
    pub(crate) seconds: f64,
    /// Cores that this program took, and everything else but the servers.
    pub(crate) generator_cores: f64,
    pub(crate) other_cores: f64,
}

impl Begin {
    pub(crate) fn now(servers: &[Server]) -> Self {
        Self {
            servers: servers
                .iter()
                .map(|server| (server.clone(), cpu_time(server.pid)))
                .collect(),
            own: cpu_time(std::process::id()),
            machine: machine(),
            at: Instant::now(),
        }
    }

    pub(crate) fn end(self) -> Cost {
        let seconds = self.at.elapsed().as_secs_f64();
        let machine_used = machine() - self.machine;
        let own = cpu_time(std::process::id()) - self.own;
        let used: Vec<(&'static str, Duration)> = self
            .servers
            .iter()
            .map(|(server, before)| (server.name, cpu_time(server.pid) - *before))
            .collect();
        let known: Duration = own + used.iter().map(|(_, used)| *used).sum::<Duration>();
        Cost {
            cpu_us: used
                .into_iter()
                .map(|(name, used)| (name, used.as_micros() as u64))
                .collect(),
            memory: self
                .servers
                .iter()
                .map(|(server, _)| (server.name, server.memory().1))
                .collect(),
            seconds,
            generator_cores: own.as_secs_f64() / seconds,
            other_cores: machine_used.saturating_sub(known).as_secs_f64() / seconds,
        }
    }
}

impl Cost {
    pub(crate) fn cpu_of(&self, name: &str) -> f64 {
        let found = self.cpu_us.iter().find(|(server, _)| *server == name);
        found.map_or(0.0, |(_, used)| *used as f64)
    }
}

/// One line of JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Line<'l> {
    pub(crate) scenario: &'l str,
    pub(crate) server: &'l str,
    pub(crate) deliveries: u64,
    pub(crate) expected: u64,
    pub(crate) lost: u64,
    pub(crate) repeated: u64,
    /// p50, p90, p99, p99.9 and the longest, in ms.
    pub(crate) latency_ms: [f64; 5],
    pub(crate) cost: &'l Cost,
}

/// Prints what was received as a line of JSON; gives how many messages did not come as they should have.
pub(crate) fn print(
    scenario: &str,
    server: &str,
    tally: &Tally,
    expected: u64,
    cost: &Cost,
) -> u64 {
    let line = Line {
        scenario,
        server,
        deliveries: tally.deliveries,
        expected,
        lost: tally.lost,
        repeated: tally.repeated,
        latency_ms: latency(tally),
        cost,
    };
    println!("{}", serde_json::to_string(&line).unwrap());
    // What is lost at the end is followed by nothing that would show it.
    expected
        .abs_diff(tally.deliveries)
        .max(tally.lost + tally.repeated)
}

/// p50, p90, p99, p99.9 and the longest, in ms.
pub(crate) fn latency(tally: &Tally) -> [f64; 5] {
    [0.5, 0.9, 0.99, 0.999, 1.0].map(|q| tally.latency.value_at_quantile(q) as f64 / 1000.0)
}

/// Figures of the runs of one line of the table: smallest, median, largest of each.
#[derive(Debug, Default)]
pub(crate) struct Runs(Vec<Vec<f64>>);

impl Runs {
    pub(crate) fn add(&mut self, figures: Vec<f64>) {
        self.0.push(figures);
    }

    /// `smallest / median / largest` of each figure.
    pub(crate) fn columns(&self) -> Vec<String> {
        let columns = self.0.first().map_or(0, Vec::len);
        let column = |at: usize| {
            let mut values: Vec<f64> = self.0.iter().map(|run| run[at]).collect();
            values.sort_by(f64::total_cmp);
            let [first, .., last] = values[..] else {
                return values.first().map(|one| shown(*one)).unwrap_or_default();
            };
            format!(
                "{} / {} / {}",
                shown(first),
                shown(values[values.len() / 2]),
                shown(last)
            )
        };
        (0..columns).map(column).collect()
    }
}

/// Two to three digits that count.
fn shown(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 100_000.0 => format!("{:.0}k", value / 1000.0),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// A memory cgroup of its own, while it lasts; on machines that have none, or do not let us make one, nothing.
#[derive(Debug)]
pub(crate) struct MemoryGroup {
    path: PathBuf,
    /// Where version 1 and version 2 have the most that was used.
    peak: &'static str,
}

impl MemoryGroup {
    /// Moves `servers` into a new group with a limit in bytes.
    pub(crate) fn around(servers: &[Server], limit: u64) -> Option<Self> {
        let versions = [
            (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.max_usage_in_bytes",
            ),
            ("/sys/fs/cgroup", "memory.max", "memory.peak"),
        ];
        versions.into_iter().find_map(|(root, max, peak)| {
            let path = Path::new(root).join(format!("natter-bench-{}", std::process::id()));
            std::fs::create_dir(&path).ok()?;
            let group = Self { path, peak };
            std::fs::write(group.path.join(max), limit.to_string()).ok()?;
            for server in servers {
                std::fs::write(group.path.join("cgroup.procs"), server.pid.to_string()).ok()?;
            }
            Some(group)
        })
    }

    /// The most that was used, in bytes: memory of the processes, files and sockets.
    pub(crate) fn peak(&self) -> u64 {
        let text = std::fs::read_to_string(self.path.join(self.peak)).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // It can only go when it is empty.
        let root = self.path.parent().map(|root| root.join("cgroup.procs"));
        let inside = std::fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        for pid in inside.lines() {
            root.as_ref()
                .and_then(|root| std::fs::write(root, pid).ok());
        }
        if let Err(error) = std::fs::remove_dir(&self.path) {
            eprintln!("{}: {error}", self.path.display());
        }
    }
}
