//! `natter revoke`: revokes tokens and blocks users.

use std::{
    process::ExitCode,
    time::{Duration, UNIX_EPOCH},
};

use anyhow::{Context as _, bail};
use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use crate::{
    auth::{Block, Revocation},
    bus::{Bucket, Connection, KvError, Put, Reader, mesh_regions, newest_elsewhere},
    config::Config,
    model::Region,
    runtime::{unix_ms, unix_s},
    subject::{ControlKey, bucket},
};

/// Timeout of the connection to NATS and of the write.
const WITHIN: Duration = Duration::from_secs(10);

/// How long a region may take to receive what was written here.
const REACHED_WITHIN: Duration = Duration::from_secs(5);

/// Pause between two attempts.
const RETRY: Duration = Duration::from_millis(100);

/// Revoke tokens: their sessions are closed with 4002 in all regions, and they are refused from then on.
///
/// --user revokes all tokens of a user that were issued until now (`iat`), and those without `iat`: the user comes back
/// with a new token. --jti revokes one token. --block refuses all tokens of a user, until --unblock.
///
/// Regions that have not received it yet are named, and the exit code is 1: they follow when they can be reached.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The user (`sub`).
    #[arg(long, required_unless_present = "jti", conflicts_with = "jti")]
    user: Option<String>,
    /// The name of a token (`jti`).
    #[arg(long)]
    jti: Option<String>,
    /// Longest remaining validity of the tokens. Edges keep the revocation until every such token has expired, plus the
    /// leeway and 5 minutes for differences of the clocks. A token that is valid for longer is accepted again then.
    /// Without this flag, the revocation has no end.
    #[arg(long = "for", value_name = "DURATION", value_parser = humantime::parse_duration)]
    time: Option<Duration>,
    /// How far the clock of the token issuer may be ahead: tokens with an `iat` up to that much after now are revoked
    /// too, even new ones. The default is auth.leeway; edges refuse tokens that are further ahead.
    #[arg(long, value_name = "DURATION", requires = "user", value_parser = humantime::parse_duration)]
    leeway: Option<Duration>,
    /// Refuse all tokens of the user, new ones too, until they are unblocked.
    #[arg(long, requires = "user", conflicts_with_all = ["unblock", "time", "leeway"])]
    block: bool,
    /// Let the user in again, with tokens that are not revoked.
    #[arg(long, requires = "user", conflicts_with_all = ["time", "leeway"])]
    unblock: bool,
}

/// What is written.
enum Word {
    /// A revocation of tokens that are valid for this long at most.
    Revoked(Duration),
    Block(Block),
}

/// What was written.
struct Written {
    /// The revocation, merged with the one that existed; `None` if this is about a block.
    rule: Option<Revocation>,
    /// Regions that have not received it yet, with the reason.
    missing: Vec<String>,
}

/// Writes to the configured region, prints what was done, and names the regions that have not received it.
pub(super) fn run(args: Args, config: &Config) -> anyhow::Result<ExitCode> {
    let word = match (args.block || args.unblock, args.time) {
        (true, _) => Word::Block(Block {
            blocked: args.block,
            at: unix_ms(),
        }),
        (false, Some(time)) if time < Duration::from_secs(1) => bail!("--for must be at least 1s"),
        (false, time) => Word::Revoked(time.unwrap_or(Duration::MAX)),
    };
    let (key, mut done) = match (args.user, args.jti) {
        (Some(user), _) => match &word {
            Word::Block(Block { blocked, .. }) => {
                let what = if *blocked { "blocked" } else { "unblocked" };
                let done = format!("{what} the user {user}");
                (ControlKey::BlockedUser(user), done)
            }
            Word::Revoked(_) => {
                let done = format!("revoked the tokens of the user {user}");
                (ControlKey::RevokedUser(user), done)
            }
        },
        (None, Some(jti)) => {
            let done = format!("revoked the token {jti}");
            (ControlKey::RevokedToken(jti), done)
        }
        (None, None) => bail!("neither --user nor --jti was given"),
    };
    let leeway = args.leeway.unwrap_or(config.auth.leeway);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let Written { rule, missing } = runtime
        .block_on(write(config, &key.to_string(), &word, leeway))
        .with_context(|| format!("can't write in region {}", config.region()))?;
    if let Some(rule) = rule {
        if let ControlKey::RevokedUser(_) = key {
            let before = time(rule.before);
            done.push_str(&format!(" issued until {before}, and those without `iat`"));
        }
        done.push_str(&match rule.until {
            u64::MAX => "; without an end".to_owned(),
            until => format!("; for tokens that end by {}", time(until)),
        });
    }
    println!("{done}");
    for missing in &missing {
        eprintln!("natter: not reached: {missing}");
    }
    Ok(if missing.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Unix seconds in RFC 3339.
fn time(seconds: u64) -> String {
    let time = UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    // RFC 3339 ends with the year 9999.
    time.filter(|_| seconds < 253_402_300_800).map_or_else(
        || seconds.to_string(),
        |time| humantime::format_rfc3339_seconds(time).to_string(),
    )
}

async fn write(
    config: &Config,
    key: &str,
    word: &Word,
    leeway: Duration,
) -> anyhow::Result<Written> {
    let connection = Connection::open(&config.nats, "natter revoke").await?;
    let reader = Reader::new(connection.clone(), &config.nats);
    let control = Bucket::new(connection.clone(), reader, config, bucket::CONTROL);
    let deadline = Instant::now() + WITHIN;
    let written = loop {
        match merge(&control, key, word, leeway, config.auth.leeway).await {
            // Another process wrote meanwhile, NATS is not reachable yet, or the outcome is unknown: merging again is
            // harmless.
            Err(
                KvError::Conflict
                | KvError::Unavailable
                | KvError::UnknownOutcome(_)
                | KvError::Read(_),
            ) if Instant::now() < deadline => {
                sleep(RETRY).await;
            }
            written => break written,
        }
    };
    let (rule, revision) = written?;
    let missing = not_reached(config, &control, revision).await;
    connection.close().await;
    Ok(Written { rule, missing })
}

/// Merges with what the key holds: a longer revocation is kept. Returns the resulting rule and its revision.
async fn merge(
    control: &Bucket,
    key: &str,
    word: &Word,
    leeway: Duration,
    leeway_of_edges: Duration,
) -> Result<(Option<Revocation>, u64), KvError> {
    let entries = control.get(&[key.to_owned()]).await?;
    let known = entries.first();
    // A value that can't be parsed is replaced.
    let value = known.and_then(|entry| entry.value.as_deref());
    let (value, ttl, rule) = match word {
        Word::Revoked(time) => {
            // The server's clock, because that of an operator's machine may be wrong. Without permission for it, the
            // own clock.
            let now = control.server_time().await;
            let now = now.map_or_else(|_refused| unix_s(), |now_ms| now_ms / 1000);
            let rule = Revocation::new(now, *time, leeway);
            let known = value.and_then(|value| serde_json::from_slice(value).ok());
            let rule = known.map_or(rule, |known| rule.merge(known));
            let left = rule
                .ends(leeway_of_edges)
                .map(|end| Duration::from_secs(end.saturating_sub(now).max(1)));
            (serde_json::to_vec(&rule), left, Some(rule))
        }
        Word::Block(block) => {
            let known = value.and_then(|value| serde_json::from_slice(value).ok());
            let block = known.map_or(*block, |known| block.after(known));
            (serde_json::to_vec(&block), None, None)
        }
    };
    let value = value.map_err(|error| KvError::Refused(error.to_string()))?;
    let how = Put {
        ttl,
        expected: Some(known.map_or(0, |entry| entry.revision)),
    };
    let revision = control.put(key, value.into(), how).await?;
    Ok((rule, revision))
}

/// The other regions of the mesh whose mirrors do not have `revision` within [`REACHED_WITHIN`], and why.
async fn not_reached(config: &Config, control: &Bucket, revision: u64) -> Vec<String> {
    let (connection, own) = (control.connection(), control.origin());
    let most = config.nats.read_timeout.min(REACHED_WITHIN);
    let regions = match mesh_regions(connection, own, most).await {
        Ok(regions) => regions,
        Err(error) => return vec![format!("other regions, if there are any: {error}")],
    };
    let deadline = Instant::now() + REACHED_WITHIN;
    let others = regions.into_iter().filter(|region| region != own);
    let reach = others.map(async |region: Region| {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let wait = most.min(left.max(RETRY));
            let why = match newest_elsewhere(connection, &region, control.stream(), wait).await {
                Ok(newest) if newest >= revision => return None,
                Ok(_behind) => "its mirror is behind".to_owned(),
                Err(error) => error.to_string(),
            };
            if Instant::now() >= deadline {
                let then = "its edges learn of this when it can be reached";
                return Some(format!("{region} ({why}): {then}"));
            }
            sleep(RETRY).await;
        }
    });
    join_all(reach).await.into_iter().flatten().collect()
}
