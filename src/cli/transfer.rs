//! `natter import` and `natter export`: a deployment's messages, as JSON lines.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Args;

use super::connect::{print_line, room, run_tool};
use crate::{
    config::Config,
    history::{Deployment, Export, Import, Options, Report},
    model::{RoomId, RoomScope},
};

/// Bad lines that are shown. The others are only counted, unless the good lines are imported.
const SHOWN: u64 = 20;

/// How often an import says how far it is.
const PROGRESS: Duration = Duration::from_secs(5);

/// Import messages from a file of JSON lines, with their original times. May be repeated: what is there is left alone.
///
/// Every line is checked first. If one is bad, nothing is imported. Exit code 1 if a line is bad.
#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// The file. One message per line: {"room", "from", "id", "ts" (ms since 1970), "body", …}; the oldest first.
    file: PathBuf,
    /// The room of lines that name none.
    #[arg(long, value_parser = room)]
    room: Option<RoomId>,
    /// Only check the file.
    #[arg(long)]
    check: bool,
    /// Import the good lines although others are bad.
    #[arg(long, conflicts_with = "check")]
    skip_bad: bool,
    /// Write to MongoDB only: nothing becomes unread, and members who are connected are not told.
    #[arg(long)]
    history_only: bool,
}

/// Print the messages of rooms as JSON lines that `natter import` takes: room after room, the oldest message first.
///
/// If it fails, it names the last room that is complete; continue with --after.
#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// Rooms (namespace:name) and namespaces (namespace:*). Without any: everything.
    #[arg(value_name = "ROOMS", value_parser = rooms)]
    rooms: Vec<Which>,
    /// Only the rooms after this one, in the order of their names.
    #[arg(long, value_name = "ROOM", value_parser = room)]
    after: Option<RoomId>,
}

/// A part of what is exported.
#[derive(Debug, Clone)]
enum Which {
    Room(RoomId),
    Namespace(String),
}

fn rooms(text: &str) -> Result<Which, String> {
    match text.strip_suffix(":*") {
        Some(namespace) => Ok(Which::Namespace(namespace.to_owned())),
        None => room(text).map(Which::Room),
    }
}

/// Imports the file, and prints what was done.
pub(super) fn import(args: ImportArgs, config: Config) -> anyhow::Result<ExitCode> {
    let ImportArgs {
        file,
        room,
        check,
        skip_bad,
        history_only,
    } = args;
    let options = Options {
        room,
        skip_bad,
        history_only,
    };
    let mut bad = 0;
    let checked = Import::check(&file, &config, options, |line, problem| {
        bad += 1;
        if skip_bad || bad <= SHOWN {
            eprintln!("natter: line {line}: {problem}");
        }
    });
    let checked = checked.with_context(|| format!("can't import {}", file.display()))?;
    let found = checked.checked();
    if found.bad > SHOWN && !skip_bad {
        eprintln!("natter: and {} more bad lines", found.bad - SHOWN);
    }
    if found.unordered > 0 {
        eprintln!(
            "natter: {} messages stand after an older one of their room; in the streams they are in the order of the file",
            found.unordered
        );
    }
    let is_good = found.bad == 0;
    if check || !(is_good || skip_bad) {
        let done = if check { "checked" } else { "nothing imported" };
        print_line(&format!("{done}: {} lines, {} bad", found.lines, found.bad))?;
        return Ok(exit(is_good));
    }
    let mut report = None;
    run_tool(async {
        report = Some(run_import(checked, &file, config).await?);
        Ok(())
    })?;
    let Some(report) = report else {
        // Ctrl-C.
        eprintln!("natter: stopped; run the same command again to continue");
        return Ok(ExitCode::FAILURE);
    };
    let Report {
        lines,
        imported,
        known,
        erased,
        bad,
        ..
    } = report;
    print_line(&format!(
        "{lines} lines: {imported} imported, {known} already there, {erased} erased before, {bad} bad"
    ))?;
    Ok(exit(is_good))
}

async fn run_import(import: Import, file: &Path, config: Config) -> anyhow::Result<Report> {
    let deployment = Deployment::open(config, "natter import").await?;
    let mut told = Instant::now();
    let report = import.run(file, &deployment, |report| {
        if told.elapsed() >= PROGRESS {
            told = Instant::now();
            let done = report.imported + report.known + report.erased;
            eprintln!("natter: {done} of {} lines", report.lines);
        }
    });
    report
        .await
        .context("the import stopped; run the same command again to continue")
}

fn exit(is_good: bool) -> ExitCode {
    if is_good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Prints the rooms' messages.
pub(super) fn export(args: ExportArgs, config: Config) -> anyhow::Result<()> {
    let mut scope = RoomScope {
        all: args.rooms.is_empty(),
        ..RoomScope::default()
    };
    for which in args.rooms {
        match which {
            Which::Room(room) => {
                known_namespace(&config, room.namespace())?;
                scope.rooms.push(room);
            }
            Which::Namespace(namespace) => {
                known_namespace(&config, &namespace)?;
                scope.namespaces.push(namespace);
            }
        }
    }
    let after = args.after;
    run_tool(async {
        let deployment = Deployment::open(config, "natter export").await?;
        let export = Export::new(&deployment);
        let mut done = after.clone();
        for room in export.rooms(&scope, after.as_ref()).await? {
            let mut print = |line: &str| print_line(line);
            let printed = export.room(&room, &mut print).await;
            let printed = printed.with_context(|| match &done {
                Some(done) => format!("{room} is not complete; continue with --after {done}"),
                None => format!("{room} is not complete"),
            });
            if !printed? {
                // The reader has gone.
                break;
            }
            done = Some(room);
        }
        Ok(())
    })
}

fn known_namespace(config: &Config, name: &str) -> anyhow::Result<()> {
    let namespace = config.namespaces.get(name);
    let is_durable = namespace
        .with_context(|| format!("the namespace {name} is not configured"))?
        .durable;
    anyhow::ensure!(
        is_durable,
        "the namespace {name} is not durable: nothing of it is stored"
    );
    Ok(())
}
