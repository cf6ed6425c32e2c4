//! `natter revoke`: tokens and users that are not let in any more.

use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::time::{Instant, sleep};

use crate::{
    auth::{Block, Revocation},
    bus::{Bucket, Connection, KvError, Put, Reader},
    config::Config,
    runtime::{unix_ms, unix_s},
    subject::{ControlKey, bucket},
};

/// How long NATS may take to be there.
const WITHIN: Duration = Duration::from_secs(10);

/// Pause between two attempts.
const RETRY: Duration = Duration::from_millis(100);

/// Revoke tokens: their sessions are closed with 4002 in all regions, and they are refused from then on.
///
/// With --user all tokens of a user that were issued until now (`iat`), and those that don't say when: the user comes back
/// with a new token. With --jti one token. With --block a user is not let in by any token, until --unblock.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The user (`sub`).
    #[arg(long, required_unless_present = "jti", conflicts_with = "jti")]
    user: Option<String>,
    /// The name of a token (`jti`).
    #[arg(long)]
    jti: Option<String>,
    /// How long it holds: at least as long as the tokens are valid. Whole seconds.
    #[arg(long = "for", value_name = "DURATION", default_value = "30d", value_parser = humantime::parse_duration)]
    time: Duration,
    /// Refuse all tokens of the user, new ones too, until they are unblocked.
    #[arg(long, requires = "user", conflicts_with_all = ["unblock", "time"])]
    block: bool,
    /// Let the user in again, with tokens that are not revoked.
    #[arg(long, requires = "user", conflicts_with = "time")]
    unblock: bool,
}

/// What is written down.
enum Word {
    Revoked(Revocation),
    Block(Block),
}

/// Writes it down in the configured region, and says what was done.
pub(super) fn run(args: Args, config: &Config) -> anyhow::Result<()> {
    let before = unix_s();
    let until = before + args.time.as_secs();
    let revoked = Word::Revoked(Revocation { before, until });
    let (key, word, done) = match (args.user, args.jti) {
        (Some(user), None) if args.block || args.unblock => {
            let (blocked, at) = (args.block, unix_ms());
            let what = if blocked { "blocked" } else { "unblocked" };
            let done = format!("{what} the user {user}");
            let word = Word::Block(Block { blocked, at });
            (ControlKey::BlockedUser(user), word, done)
        }
        (user, jti) => {
            if args.time < Duration::from_secs(1) {
                bail!("--for must be at least 1s");
            }
            let (key, done) = match (user, jti) {
                (Some(user), _) => {
                    let done = format!("revoked the tokens of the user {user} issued until now");
                    (ControlKey::RevokedUser(user), done)
                }
                (None, Some(jti)) => {
                    let done = format!("revoked the token {jti}");
                    (ControlKey::RevokedToken(jti), done)
                }
                (None, None) => bail!("neither --user nor --jti was given"),
            };
            (key, revoked, done)
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let write = write(config, key.to_string(), &word);
    runtime
        .block_on(write)
        .with_context(|| format!("nothing was revoked in region {}", config.region()))?;
    println!("{done}");
    Ok(())
}

async fn write(config: &Config, key: String, word: &Word) -> anyhow::Result<()> {
    let connection = Connection::open(&config.nats, "natter revoke").await?;
    let reader = Reader::new(connection.clone(), &config.nats);
    let control = Bucket::new(connection.clone(), reader, config, bucket::CONTROL);
    let deadline = Instant::now() + WITHIN;
    let written = loop {
        match merge(&control, &key, word).await {
            // Another has written it meanwhile, or NATS is not there yet.
            Err(KvError::Conflict | KvError::Unavailable | KvError::Read(_))
                if Instant::now() < deadline =>
            {
                sleep(RETRY).await;
            }
            written => break written,
        }
    };
    connection.close().await;
    written?;
    Ok(())
}

/// Writes over what the key holds: what was revoked for longer stays so.
async fn merge(control: &Bucket, key: &str, word: &Word) -> Result<u64, KvError> {
    let entries = control.get(&[key.to_owned()]).await?;
    let known = entries.first();
    // What is no rule is replaced.
    let value = known.and_then(|entry| entry.value.as_deref());
    let (value, ttl) = match word {
        Word::Revoked(rule) => {
            let known = value.and_then(|value| serde_json::from_slice(value).ok());
            let rule = known.map_or(*rule, |known| rule.merge(known));
            let left = rule.until.saturating_sub(unix_s()).max(1);
            (serde_json::to_vec(&rule), Some(Duration::from_secs(left)))
        }
        Word::Block(block) => {
            let known = value.and_then(|value| serde_json::from_slice(value).ok());
            let block = known.map_or(*block, |known| block.after(known));
            (serde_json::to_vec(&block), None)
        }
    };
    let value = value.map_err(|error| KvError::Refused(error.to_string()))?;
    let how = Put {
        ttl,
        expected: Some(known.map_or(0, |entry| entry.revision)),
    };
    control.put(key, value.into(), how).await
}
