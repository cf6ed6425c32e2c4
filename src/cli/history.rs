//! `natter history`: the service that writes messages to MongoDB, and tools for its operator.

use std::{path::Path, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use figment::providers::{Format, Toml};
use serde_json::json;
use tokio::runtime::Builder;

use super::{connect::print_line, export, run_service};
use crate::{
    bus::{Connection, DeadLetter, DeadLetters, Reader},
    config::Config,
    history::{self, History, Retried, dead_letters, retry},
    runtime::{Phase, Signals},
    store::Store,
};

/// Run the service that keeps the messages of durable rooms in MongoDB, or show its state.
#[derive(Debug, Args)]
pub(super) struct HistoryCommand {
    /// Without a subcommand: run the service.
    #[command(subcommand)]
    tool: Option<Tool>,
}

#[derive(Debug, Subcommand)]
enum Tool {
    Export(export::Export),
    #[command(flatten)]
    Ask(Ask),
}

/// Tools that ask NATS and MongoDB.
#[derive(Debug, Subcommand)]
enum Ask {
    /// How far MongoDB is behind, according to NATS, and what the running instances report.
    Status {
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// List the messages that MongoDB refused, with the reasons.
    Dead {
        /// One JSON object per line.
        #[arg(long)]
        json: bool,
        /// Also show the bodies of the messages.
        #[arg(long)]
        body: bool,
    },
    /// Try again to write dead letters; exit code 1 if any is left.
    Retry {
        /// Numbers of the letters, as `natter history dead` shows them; without any: all.
        #[arg(value_name = "NUMBER")]
        numbers: Vec<u64>,
    },
}

impl HistoryCommand {
    pub(super) fn run(self, file: Option<&Path>) -> anyhow::Result<ExitCode> {
        let load = || Config::load(file, Toml::string(""));
        let (ask, config) = match self.tool {
            None => return service(load()?),
            Some(Tool::Export(export)) => return export::run(export, load),
            Some(Tool::Ask(ask)) => (ask, load()?),
        };
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let result = runtime.block_on(ask.run(&config));
        runtime.shutdown_background();
        result
    }
}

fn service(config: Config) -> anyhow::Result<ExitCode> {
    let (telemetry, instance) = (config.telemetry.clone(), ulid::Ulid::new().to_string());
    run_service(&telemetry, ("natter-history", &instance), serve(config))
}

async fn serve(config: Config) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::install()?;
    let history = History::start(config).await?;
    let lifecycle = history.lifecycle().clone();
    let code = tokio::select! {
        signal = signals.recv() => {
            tracing::info!(?signal, "stopping");
            ExitCode::SUCCESS
        }
        why = history.failed() => {
            tracing::error!(why, "the service can't continue, and ends");
            ExitCode::FAILURE
        }
        _ = lifecycle.reached(Phase::Stopped) => return Ok(ExitCode::FAILURE),
    };
    if let Err(error) = history.drain().await {
        // Messages that were not acknowledged are delivered again.
        tracing::warn!(%error, "the service did not stop cleanly");
    }
    Ok(code)
}

/// The connection of the tools.
struct Nats {
    connection: Connection,
    reader: Reader,
    dead: DeadLetters,
}

impl Nats {
    async fn open(config: &Config) -> anyhow::Result<Self> {
        let connection = Connection::open(&config.nats, "natter history tool").await?;
        let reader = Reader::new(connection.clone(), &config.nats);
        Ok(Self {
            dead: DeadLetters::of_history(connection.clone(), reader.clone(), config),
            connection,
            reader,
        })
    }
}

impl Ask {
    async fn run(self, config: &Config) -> anyhow::Result<ExitCode> {
        let nats = Nats::open(config).await?;
        match self {
            Self::Status { json } => status(&nats, config, json).await,
            Self::Dead { json, body } => dead(&nats, json, body).await,
            Self::Retry { numbers } => again(&nats, config, &numbers).await,
        }
    }
}

async fn status(nats: &Nats, config: &Config, json: bool) -> anyhow::Result<ExitCode> {
    let status = history::status(&nats.connection, &nats.reader, config).await?;
    let instances = history::instances(&nats.connection).await;
    if json {
        let mut status = serde_json::to_value(&status)?;
        if let Some(fields) = status.as_object_mut() {
            fields.insert("instances".to_owned(), serde_json::to_value(&instances)?);
        }
        print_line(&status.to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut lines = vec![
        format!(
            "behind        {} messages, {} s",
            status.lag_messages, status.lag_seconds
        ),
        format!("dead letters  {}", status.dead_letters),
        String::new(),
        format!(
            "{:<24} {:>12} {:>12} {:>12} {:>8}",
            "stream", "waiting", "in hand", "done up to", "lag s"
        ),
    ];
    for part in &status.partitions {
        lines.push(format!(
            "{:<24} {:>12} {:>12} {:>12} {:>8}{}",
            part.stream,
            part.pending,
            part.ack_pending,
            part.ack_floor,
            part.lag_seconds,
            if part.consumer {
                ""
            } else {
                "  no worker has run here"
            }
        ));
    }
    for instance in &instances {
        lines.push(format!("\ninstance {}", instance.id));
        lines.extend(figures(&instance.figures));
    }
    print_line(&lines.join("\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// What an instance reports: a line each for its answers, its writes, running erasures and the last error.
fn figures(figures: &serde_json::Value) -> Vec<String> {
    let writing = &figures["writing"];
    let number = |of: &serde_json::Value, name: &str| of[name].as_u64().unwrap_or_default();
    let (batches, messages) = (number(writing, "batches"), number(writing, "messages"));
    let mut lines = vec![
        format!(
            "  written     {messages} messages in {batches} batches, {} each, {} in the last",
            messages.checked_div(batches).unwrap_or_default(),
            number(writing, "last_batch"),
        ),
        format!(
            "  answered    {} pages, {} partial ones, {} searches, {} directory pages, {} erasures, {} refusals",
            number(figures, "pages"),
            number(figures, "partial_pages"),
            number(figures, "searches"),
            number(figures, "directory"),
            number(figures, "erasures"),
            number(figures, "refused"),
        ),
    ];
    let (listed, repaired) = (
        number(writing, "rooms_listed"),
        number(writing, "index_repaired"),
    );
    lines.push(format!(
        "  rooms       {listed} listed in the directory, {repaired} entries of the index repaired"
    ));
    let erasing = number(writing, "erasures_running");
    if erasing > 0 {
        lines.push(format!("  under way   {erasing} erasures"));
    }
    if let Some(error) = writing["last_error"].as_str() {
        let at = Duration::from_millis(number(writing, "last_error_at"));
        let at = humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + at);
        lines.push(format!("  last error  {at} {error}"));
    }
    lines
}

async fn dead(nats: &Nats, json: bool, body: bool) -> anyhow::Result<ExitCode> {
    for letter in dead_letters(&nats.dead).await? {
        let line = match json {
            true => letter_json(&letter, body).to_string(),
            false => letter_line(&letter, body),
        };
        if !print_line(&line)? {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn body_of(letter: &DeadLetter) -> String {
    String::from_utf8_lossy(&letter.payload).into_owned()
}

/// A dead letter as a JSON object, with the body of the message if `body`.
pub(super) fn letter_json(letter: &DeadLetter, body: bool) -> serde_json::Value {
    let record = letter.stored.as_ref();
    json!({
        "number": letter.number,
        "room": record.map(|stored| stored.room.to_string()),
        "from": record.map(|stored| stored.record.from.clone()),
        "id": record.map(|stored| stored.record.id.clone()),
        "subject": letter.subject,
        "seq": letter.seq,
        "ts": letter.ts,
        "at": letter.at,
        "reason": letter.reason,
        "body": body.then(|| body_of(letter)),
    })
}

/// A dead letter as a line, with the body of the message if `body`.
pub(super) fn letter_line(letter: &DeadLetter, body: bool) -> String {
    let at =
        humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + Duration::from_millis(letter.ts));
    let mut line = format!(
        "{}\t{at}\t{}\t{}\t{}",
        letter.number,
        letter_name(letter),
        letter.seq,
        letter.reason
    );
    if body {
        line.push('\t');
        line.push_str(&body_of(letter));
    }
    one_line(&line)
}

/// Text of others must neither add lines nor contain control characters for the terminal.
fn one_line(text: &str) -> String {
    let shown = |c: char| match c {
        '\t' => c,
        c if c.is_control() => '\u{fffd}',
        c => c,
    };
    text.chars().map(shown).collect()
}

/// A letter as `<room> <user>/<id>`.
pub(super) fn letter_name(letter: &DeadLetter) -> String {
    match &letter.stored {
        Some(stored) => format!(
            "{} {}/{}",
            stored.room, stored.record.from, stored.record.id
        ),
        None => letter.subject.clone(),
    }
}

async fn again(nats: &Nats, config: &Config, numbers: &[u64]) -> anyhow::Result<ExitCode> {
    let store = Store::open(&config.mongodb).await?;
    store
        .prepare()
        .await
        .context("MongoDB can't be written to")?;
    let mut letters = dead_letters(&nats.dead).await?;
    letters.retain(|letter| numbers.is_empty() || numbers.contains(&letter.number));
    for number in numbers {
        if !letters.iter().any(|letter| letter.number == *number) {
            eprintln!("natter: there is no dead letter {number}");
        }
    }
    let (mut written, mut left) = (0, 0);
    for letter in letters {
        let (number, name) = (letter.number, letter_name(&letter));
        let why = match retry(letter, &nats.dead, &store, &config.region()).await? {
            Retried::Written => {
                written += 1;
                continue;
            }
            Retried::NotRemoved(error) => format!("written, but not removed: {error}"),
            Retried::Refused(reason) => reason,
        };
        left += 1;
        print_line(&format!("{number}\t{name}\t{why}"))?;
    }
    eprintln!("natter: {written} written, {left} left");
    Ok(if left > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
