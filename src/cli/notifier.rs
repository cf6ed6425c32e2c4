//! `natter notifier`: the process that notifies users who are away, and a tool that makes its key.

use std::{path::Path, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use figment::providers::{Format, Toml};

use super::{connect::print_line, run_service, until_end};
use crate::{
    config::Config,
    notifier::{Notifier, new_keys},
    runtime::Signals,
};

/// Notify users who are away, or make the key for that.
#[derive(Debug, Args)]
pub(super) struct NotifierCommand {
    /// Without a subcommand: notify.
    #[command(subcommand)]
    tool: Option<Tool>,
}

#[derive(Debug, Subcommand)]
enum Tool {
    /// Print a new pair of keys for Web Push: the private one as PEM, and the public one as a line after it.
    Key,
}

impl NotifierCommand {
    pub(super) fn run(self, file: Option<&Path>) -> anyhow::Result<ExitCode> {
        if let Some(Tool::Key) = self.tool {
            let (private, public) = new_keys().context("a key can't be made")?;
            print_line(&format!("{private}{public}"))?;
            return Ok(ExitCode::SUCCESS);
        }
        let config = Config::load(file, Toml::string(""))?;
        let (telemetry, instance) = (config.telemetry.clone(), ulid::Ulid::new().to_string());
        run_service(&telemetry, ("natter-notifier", &instance), serve(config))
    }
}

async fn serve(config: Config) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::install()?;
    let notifier = Notifier::start(config).await?;
    let code = until_end(&mut signals, notifier.failed()).await;
    if let Err(error) = notifier.drain().await {
        // Messages that were not acknowledged are delivered again.
        tracing::warn!(%error, "the notifier did not stop cleanly");
    }
    Ok(code)
}
