//! `natter edge`: serves clients until it is told to stop.

use std::{
    path::Path,
    process::{self, ExitCode},
    thread,
    time::Duration,
};

use clap::Args;
use figment::providers::{Format, Toml};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::run_service;
use crate::{
    config::Config,
    edge::Edge,
    runtime::{Phase, Signals},
};

/// How long after `edge.drain_timeout` the process is ended, whatever still runs.
const CUT_AFTER: Duration = Duration::from_secs(5);

/// Serve WebSocket and HTTP clients.
#[derive(Debug, Args)]
pub(super) struct EdgeCommand {}

impl EdgeCommand {
    pub(super) fn run(&self, file: Option<&Path>) -> anyhow::Result<ExitCode> {
        let config = Config::load(file, Toml::string(""))?;
        let (telemetry, id) = (config.telemetry.clone(), config.edge.id.clone());
        run_service(&telemetry, ("natter-edge", &id), serve(config))
    }
}

/// Each connection needs an open file: raises the limit to the maximum that this process may have.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => tracing::info!(files = ?limit.maximum, "open files allowed"),
        Err(error) => {
            tracing::warn!(%error, files = ?limit.current, "the limit of open files can't be raised");
        }
    }
}

/// Ends the process if it still runs after `time`. Uses its own thread, because the runtime may be stuck too.
fn end_after(time: Duration) {
    let end = move || {
        #[expect(
            clippy::disallowed_methods,
            reason = "a thread of its own, which has nothing else to do"
        )]
        thread::sleep(time);
        #[expect(clippy::exit, reason = "the last resort of a role")]
        process::exit(1);
    };
    if let Err(error) = thread::Builder::new()
        .name("last resort".to_owned())
        .spawn(end)
    {
        tracing::warn!(%error, "the process is not ended if its drain hangs");
    }
}

async fn serve(config: Config) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::install()?;
    raise_file_limit();
    let drain_timeout = config.edge.drain_timeout;
    let edge = Edge::start(config).await?;
    let lifecycle = edge.lifecycle().clone();
    let code = tokio::select! {
        signal = signals.recv() => {
            tracing::info!(?signal, "stopping");
            ExitCode::SUCCESS
        }
        why = edge.failed() => {
            tracing::error!(why, "the edge can't continue: it drains and exits");
            ExitCode::FAILURE
        }
        _ = lifecycle.reached(Phase::Stopped) => return Ok(ExitCode::FAILURE),
    };
    end_after(drain_timeout + CUT_AFTER);
    match edge.drain().await {
        Ok(()) => Ok(code),
        Err(error) => {
            tracing::warn!(%error, "the edge did not drain in time");
            Ok(ExitCode::FAILURE)
        }
    }
}
