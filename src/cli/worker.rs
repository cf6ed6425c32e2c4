//! `natter worker`: the process that runs the workers, and tools for its operator.

use std::{path::Path, process::ExitCode};

use clap::{Args, Subcommand};
use figment::providers::{Format, Toml};
use serde_json::json;
use tokio::runtime::Builder;

use super::{
    connect::print_line,
    history::{letter_json, letter_line, letter_name},
    run_service,
};
use crate::{
    bus::{Connection, DeadLetters, Reader, WORKER_ROLE},
    config::Config,
    history::dead_letters,
    runtime::Signals,
    telemetry,
    worker::{Retried, Retry, Workers},
};

/// Run the workers of the configuration, or show the messages that they did not accept.
#[derive(Debug, Args)]
pub(super) struct WorkerCommand {
    /// Without a subcommand: run the workers.
    #[command(subcommand)]
    tool: Option<Tool>,
}

#[derive(Debug, Subcommand)]
enum Tool {
    /// List the messages that workers did not accept, with the reasons.
    Dead {
        /// One JSON object per line.
        #[arg(long)]
        json: bool,
        /// Also show the bodies of the messages.
        #[arg(long)]
        body: bool,
    },
    /// Ask workers again about dead letters; exit code 1 if any is left.
    Retry {
        /// Numbers of the letters, as `natter worker dead` shows them; without any: all.
        #[arg(value_name = "NUMBER")]
        numbers: Vec<u64>,
    },
}

impl WorkerCommand {
    pub(super) fn run(self, file: Option<&Path>) -> anyhow::Result<ExitCode> {
        let config = Config::load(file, Toml::string(""))?;
        let Some(tool) = self.tool else {
            return service(config);
        };
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let result = runtime.block_on(tool.run(config));
        runtime.shutdown_background();
        result
    }
}

fn service(config: Config) -> anyhow::Result<ExitCode> {
    telemetry::metrics::name_workers(config.workers.iter().map(|worker| &*worker.name));
    let (telemetry, instance) = (config.telemetry.clone(), ulid::Ulid::new().to_string());
    run_service(&telemetry, ("natter-worker", &instance), serve(config))
}

async fn serve(config: Config) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::install()?;
    let workers = Workers::start(config).await?;
    let code = tokio::select! {
        signal = signals.recv() => {
            tracing::info!(?signal, "stopping");
            ExitCode::SUCCESS
        }
        why = workers.failed() => {
            tracing::error!(why, "the workers can't continue, and end");
            ExitCode::FAILURE
        }
    };
    if let Err(error) = workers.drain().await {
        // Messages that were not acknowledged are delivered again.
        tracing::warn!(%error, "the workers did not stop cleanly");
    }
    Ok(code)
}

impl Tool {
    async fn run(self, config: Config) -> anyhow::Result<ExitCode> {
        match self {
            Self::Dead { json, body } => dead(&config, json, body).await,
            // Boxed, because it is large.
            Self::Retry { numbers } => Box::pin(again(config, &numbers)).await,
        }
    }
}

async fn dead(config: &Config, json: bool, body: bool) -> anyhow::Result<ExitCode> {
    let connection = Connection::open(&config.nats, "natter worker tool").await?;
    let reader = Reader::new(connection.clone(), &config.nats);
    let dead = DeadLetters::of_receivers(WORKER_ROLE, connection, reader, config);
    for letter in dead_letters(&dead).await? {
        let worker = letter.receiver.clone().unwrap_or_default();
        let line = match json {
            true => {
                let mut line = letter_json(&letter, body);
                line["worker"] = json!(worker);
                line.to_string()
            }
            false => format!("{worker}\t{}", letter_line(&letter, body)),
        };
        if !print_line(&line)? {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn again(config: Config, numbers: &[u64]) -> anyhow::Result<ExitCode> {
    let retry = Retry::open(config).await?;
    let mut letters = retry.letters().await?;
    letters.retain(|letter| numbers.is_empty() || numbers.contains(&letter.number));
    for number in numbers {
        if !letters.iter().any(|letter| letter.number == *number) {
            eprintln!("natter: there is no dead letter {number}");
        }
    }
    let (mut done, mut left) = (0, 0);
    for letter in letters {
        let (number, name) = (letter.number, letter_name(&letter));
        let why = match retry.retry(&letter).await {
            Retried::Done => {
                done += 1;
                continue;
            }
            Retried::Gone => {
                done += 1;
                print_line(&format!("{number}\t{name}\tthe message is gone"))?;
                continue;
            }
            Retried::NotRemoved(error) => format!("done, but not removed: {error}"),
            Retried::Refused(reason) => reason,
        };
        left += 1;
        print_line(&format!("{number}\t{name}\t{why}"))?;
    }
    retry.close().await;
    eprintln!("natter: {done} done, {left} left");
    Ok(if left > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
