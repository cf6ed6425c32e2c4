//! `natter edge`: serves clients until it is told to stop.

use std::{path::Path, process::ExitCode, time::Duration};

use clap::Args;
use figment::providers::{Format, Toml};
use tokio::runtime::Builder;

use crate::{
    config::Config,
    edge::Edge,
    runtime::{Phase, Signals},
    telemetry,
};

/// How long what telemetry still holds may take to be sent at the end.
const TELEMETRY_FLUSH: Duration = Duration::from_secs(2);

/// Serve WebSocket and HTTP clients.
#[derive(Debug, Args)]
pub(super) struct EdgeCommand {}

impl EdgeCommand {
    pub(super) fn run(&self, file: Option<&Path>) -> anyhow::Result<ExitCode> {
        let config = Config::load(file, Toml::string(""))?;
        let telemetry = telemetry::init(&config.telemetry, "natter-edge", &config.edge.id)?;
        // Accepting, handshakes and HTTP; the shards have threads of their own.
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let result = runtime.block_on(serve(config));
        runtime.shutdown_timeout(Duration::from_millis(100));
        telemetry.shutdown(TELEMETRY_FLUSH);
        result
    }
}

async fn serve(config: Config) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::install()?;
    let edge = Edge::start(config).await?;
    let lifecycle = edge.lifecycle().clone();
    tokio::select! {
        signal = signals.recv() => tracing::info!(?signal, "stopping"),
        _ = lifecycle.reached(Phase::Stopped) => return Ok(ExitCode::FAILURE),
    }
    match edge.drain().await {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            tracing::warn!(%error, "the edge did not drain in time");
            Ok(ExitCode::FAILURE)
        }
    }
}
