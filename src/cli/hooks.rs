//! `natter hooks`: the process that sends events, and tools for its operator.

use std::{path::Path, process::ExitCode};

use clap::{Args, Subcommand};
use figment::providers::{Format, Toml};
use tokio::runtime::Builder;

use super::{
    letters::{list_letters, retry_letters},
    run_service, until_end,
};
use crate::{
    bus::HOOK_ROLE,
    config::Config,
    hook::{Hooks, Retry, enable},
    runtime::Signals,
    telemetry,
};

/// Run the event hooks of the configuration, or show the events that they did not accept.
#[derive(Debug, Args)]
pub(super) struct HooksCommand {
    /// Without a subcommand: send events.
    #[command(subcommand)]
    tool: Option<Tool>,
}

#[derive(Debug, Subcommand)]
enum Tool {
    /// List the events that hooks did not accept, with the reasons.
    Dead {
        /// One JSON object per line.
        #[arg(long)]
        json: bool,
        /// Also show the bodies.
        #[arg(long)]
        body: bool,
    },
    /// Send events of dead letters again; exit code 1 if any is left.
    Retry {
        /// Numbers of the letters, as `natter hooks dead` shows them; without any: all.
        #[arg(value_name = "NUMBER")]
        numbers: Vec<u64>,
    },
    /// Send events to a hook again that was disabled because its receiver answered 410.
    Enable {
        /// The hook.
        name: String,
    },
}

impl HooksCommand {
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
    telemetry::metrics::name_hooks(config.hooks.iter().map(|hook| &*hook.name));
    let (telemetry, instance) = (config.telemetry.clone(), ulid::Ulid::new().to_string());
    let serve = serve(config, instance.clone());
    run_service(&telemetry, ("natter-hooks", &instance), serve)
}

async fn serve(config: Config, instance: String) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::install()?;
    let hooks = Hooks::start(config, instance).await?;
    let code = until_end(&mut signals, hooks.failed()).await;
    if let Err(error) = hooks.drain().await {
        // What was not acknowledged is delivered again.
        tracing::warn!(%error, "the hooks did not stop cleanly");
    }
    Ok(code)
}

impl Tool {
    async fn run(self, config: Config) -> anyhow::Result<ExitCode> {
        match self {
            Self::Dead { json, body } => {
                list_letters(&config, (HOOK_ROLE, "natter hooks tool"), json, body).await
            }
            Self::Retry { numbers } => {
                let retry = Retry::open(config).await?;
                let again = async |letter: &_| retry.retry(letter).await;
                let code = retry_letters(retry.dead(), &numbers, again).await;
                retry.close().await;
                code
            }
            Self::Enable { name } => match enable(&config, &name).await? {
                true => Ok(ExitCode::SUCCESS),
                false => {
                    eprintln!("natter: the hook {name} is not disabled");
                    Ok(ExitCode::FAILURE)
                }
            },
        }
    }
}
