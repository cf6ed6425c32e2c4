//! `natter worker`: the process that runs the workers, and tools for its operator.

use std::{path::Path, process::ExitCode};

use clap::{Args, Subcommand};
use figment::providers::{Format, Toml};
use tokio::runtime::Builder;

use super::{
    letters::{list_letters, retry_letters},
    run_service, until_end,
};
use crate::{
    bus::WORKER_ROLE,
    config::Config,
    runtime::Signals,
    telemetry,
    worker::{Retry, Workers},
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
    let code = until_end(&mut signals, workers.failed()).await;
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
    list_letters(config, (WORKER_ROLE, "natter worker tool"), json, body).await
}

async fn again(config: Config, numbers: &[u64]) -> anyhow::Result<ExitCode> {
    let retry = Retry::open(config).await?;
    let code = retry_letters(retry.dead(), numbers, async |letter| {
        retry.retry(letter).await
    })
    .await;
    retry.close().await;
    code
}
