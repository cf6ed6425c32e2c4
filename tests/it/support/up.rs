//! `natter up` as a process of its own.

use std::{
    io::BufReader,
    path::Path,
    process::{Child, ChildStdout, ExitStatus, Stdio},
};

use natter::testing::mesh::provision;
use rustix::process::Signal;
use serde_json::Value;

use super::{LONG, natter_command};

/// Edges that are started unless a test says otherwise.
pub(crate) const EDGES: &str = "2";

/// A process that is killed, when a test fails, with all its children.
pub(crate) struct KilledOnDrop(pub(crate) Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        // Both do nothing when it has ended.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A running `natter up --json`.
pub(crate) struct Up {
    pub(crate) child: KilledOnDrop,
    pub(crate) lines: BufReader<ChildStdout>,
    /// The latest line.
    pub(crate) report: Value,
}

impl Up {
    /// Starts one on ports of its own, and waits for its first line.
    pub(crate) async fn start(data: &Path, flags: &[&str]) -> Self {
        let mut child = Self::command(data, flags).await.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let report = next_line(&mut lines);
        Self {
            child: KilledOnDrop(child),
            lines,
            report,
        }
    }

    pub(crate) async fn command(data: &Path, flags: &[&str]) -> std::process::Command {
        let mut command = natter_command(data).await;
        command
            .args(["up", "--json", "--data"])
            .arg(data)
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let defaults = [
            ("--port", "0"),
            ("--nats-port", "0"),
            ("--mongodb-port", "0"),
            ("--edges", EDGES),
        ];
        for (flag, value) in defaults {
            if !flags.contains(&flag) {
                command.args([flag, value]);
            }
        }
        command
    }

    pub(crate) fn next_line(&mut self) {
        self.report = next_line(&mut self.lines);
    }

    /// All processes: itself first.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let own = [&self.report["pid"], &self.report["mongod_pid"]];
        let regions = self.report["regions"].as_array().unwrap().iter();
        let of_regions = regions.flat_map(|region| {
            let edges = region["edges"].as_array().unwrap().iter();
            let history = region["history"].as_array().unwrap();
            [&region["nats_pid"], &region["spine_pid"]]
                .into_iter()
                .chain(edges.chain(history).map(|child| &child["pid"]))
        });
        own.into_iter()
            .chain(of_regions)
            .filter_map(Value::as_u64)
            .map(|pid| u32::try_from(pid).unwrap())
            .collect()
    }

    pub(crate) fn nats(&self) -> &str {
        self.report["regions"][0]["nats"].as_str().unwrap()
    }

    pub(crate) fn nats_pid(&self) -> u32 {
        u32::try_from(self.report["regions"][0]["nats_pid"].as_u64().unwrap()).unwrap()
    }

    pub(crate) async fn end(mut self, signal: Signal) -> ExitStatus {
        super::signal(self.child.0.id(), signal);
        let status = tokio::task::spawn_blocking(move || self.child.0.wait().unwrap());
        tokio::time::timeout(LONG, status).await.unwrap().unwrap()
    }
}

pub(crate) fn next_line(lines: &mut impl std::io::BufRead) -> Value {
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error} in {line:?}"))
}

/// Publishes as a person would, and gives the sequence in the stream.
pub(crate) async fn publish(url: &str, text: &'static str) -> u64 {
    let mut config = super::config("");
    config.nats.url = url.to_owned();
    let client = provision::connect(&config.nats).await.unwrap();
    let answer = client
        .request("natter.pub.chat.lobby", text.into())
        .await
        .unwrap();
    let ack: Value = serde_json::from_slice(&answer.payload).unwrap();
    ack["seq"]
        .as_u64()
        .unwrap_or_else(|| panic!("not stored: {ack}"))
}
