//! Roles and tools: arguments in, exit code out. The only module that prints.
//!
//! Exit codes: 0 clean, 1 failed, 64 wrong usage or configuration.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command line's business"
)]

mod connect;
mod dev;
mod doctor;
mod edge;
mod export;
mod guard;
mod history;
mod hooks;
mod letters;
mod notifier;
mod provision;
mod revoke;
mod room;
mod send;
mod tail;
mod token;
mod transfer;
mod up;
mod worker;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};
use figment::providers::{Format, Toml};
use tokio::runtime::Builder;

use crate::{
    auth::{AuthConfigError, Verifier},
    config::{self, Config, ConfigError},
    mesh,
    runtime::Signals,
    telemetry::{self, InitError},
};

/// Exit code of wrong usage or configuration (`EX_USAGE` of sysexits.h).
const EX_USAGE: u8 = 64;

/// Timeout of sending the remaining telemetry at the end.
const TELEMETRY_FLUSH: Duration = Duration::from_secs(2);

/// Threads of a service; the shards of an edge have threads of their own.
const THREADS: usize = 2;

/// Runs a service with its telemetry, which names it and this instance of it.
fn run_service(
    config: &config::Telemetry,
    (name, instance): (&'static str, &str),
    serve: impl Future<Output = anyhow::Result<ExitCode>>,
) -> anyhow::Result<ExitCode> {
    let telemetry = telemetry::init(config, name, instance)?;
    let runtime = Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()?;
    let result = runtime.block_on(serve);
    runtime.shutdown_timeout(Duration::from_millis(100));
    telemetry.shutdown(TELEMETRY_FLUSH);
    result
}

/// Waits until a service is told to end, or can't continue.
async fn until_end(signals: &mut Signals, failed: impl Future<Output = String>) -> ExitCode {
    tokio::select! {
        signal = signals.recv() => {
            tracing::info!(?signal, "stopping");
            ExitCode::SUCCESS
        }
        why = failed => {
            tracing::error!(why, "the process can't continue, and ends");
            ExitCode::FAILURE
        }
    }
}

/// An edge messaging mesh on NATS.
#[derive(Debug, Parser)]
#[command(name = "natter", version)]
struct Cli {
    /// Configuration file (TOML); its keys are those of config/default.toml.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run everything for a laptop: nats-server, mongod, streams and edges, until Ctrl-C.
    Up(up::Args),
    /// Cut, heal and show the links between the regions of a running `natter up --regions`.
    Dev(dev::Args),
    /// Create or update the streams and buckets of the region, or of all regions of a mesh.
    Provision(provision::Args),
    /// Look at a deployment, and say what is wrong with it and what to do.
    Doctor(doctor::Args),
    #[command(hide = true)]
    Guard(guard::Args),
    /// Check the configuration and name everything that is wrong with it.
    CheckConfig,
    /// Print the configuration that results from file, environment and flags; secrets are hidden.
    ShowConfig,
    /// Print the accounts of a region's nats-servers: users with their permissions, and subject mappings.
    NatsAccounts,
    Token(token::Token),
    Edge(edge::EdgeCommand),
    History(history::HistoryCommand),
    Worker(worker::WorkerCommand),
    Hooks(hooks::HooksCommand),
    Notifier(notifier::NotifierCommand),
    Import(transfer::ImportArgs),
    Export(transfer::ExportArgs),
    Revoke(revoke::Args),
    /// Follow a room in the terminal; reconnects and resumes by itself.
    Tail(tail::Tail),
    /// Send a message to a room, and wait until it is stored.
    Send(send::Send),
    Room(room::RoomCommand),
    Inbox(room::Inbox),
    Follow(room::Follow),
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // clap reports help and version as errors too; those go to stdout.
            let code = if error.use_stderr() { EX_USAGE } else { 0 };
            return match error.print() {
                Ok(()) => ExitCode::from(code),
                Err(_closed_terminal) => ExitCode::FAILURE,
            };
        }
    };
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("natter: {error:#}");
            let usage = error.chain().any(|cause| {
                cause.is::<ConfigError>()
                    || cause.is::<AuthConfigError>()
                    || cause.is::<InitError>()
            });
            if usage {
                ExitCode::from(EX_USAGE)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let load = || Config::load(cli.config.as_deref(), Toml::string(""));
    match cli.command {
        Command::Dev(args) => dev::run(args)?,
        Command::Up(args) => return up::run(&args, cli.config.as_deref()),
        Command::Provision(args) => return provision::run(&args, &load()?),
        Command::Doctor(args) => return doctor::run(args, load()?),
        Command::Guard(args) => return guard::run(&args),
        Command::CheckConfig => {
            // Also checks the keys: an edge does not start without those that are configured.
            let config = load()?;
            Verifier::from_config(&config.auth)?;
            println!("the configuration is valid");
            if config.push.is_on() && !config.presence.users {
                eprintln!(
                    "natter: push is configured, and presence.users is off: with edges of this configuration \
                     everybody would be taken for away (natter up switches it on)"
                );
            }
        }
        Command::Edge(edge) => return edge.run(cli.config.as_deref()),
        Command::History(history) => return history.run(cli.config.as_deref()),
        Command::Notifier(notifier) => return notifier.run(cli.config.as_deref()),
        Command::Worker(worker) => return worker.run(cli.config.as_deref()),
        Command::Hooks(hooks) => return hooks.run(cli.config.as_deref()),
        Command::Import(args) => return transfer::import(args, load()?),
        Command::Export(args) => transfer::export(args, load()?)?,
        Command::NatsAccounts => print!("{}", mesh::accounts(&load()?)),
        Command::Token(token) => println!("{}", token.make(cli.config.as_deref())?),
        Command::ShowConfig => println!("{}", toml::to_string_pretty(&load()?)?),
        Command::Revoke(args) => return revoke::run(args, &load()?),
        Command::Tail(tail) => tail::run(tail, load)?,
        Command::Send(send) => send::run(send, load)?,
        Command::Room(command) => room::run(command, load)?,
        Command::Inbox(inbox) => room::inbox(&inbox, load)?,
        Command::Follow(follow) => room::follow(follow, load)?,
    }
    Ok(ExitCode::SUCCESS)
}
