//! What `tail` and `send` share: which edges, which token, and how output ends.

use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::Args;
use tokio::{io::Interest, net::unix::pipe};

use crate::{
    client::{Endpoint, Target, Token},
    config::{Config, ConfigError},
    model::RoomId,
};

/// Life of the tokens that `tail` and `send` make for themselves; they make a new one when it ends.
const TOKEN_TTL: Duration = Duration::from_secs(3600);
/// The file of a `natter up` data folder with the secret of its development tokens.
const DEV_SECRET: &str = "dev-secret";

/// Where to connect, and as whom.
#[derive(Debug, Args)]
pub(super) struct Connect {
    /// The edge, as ws://host:port; give it several times to name edges to fall back to.
    #[arg(long, value_name = "URL", default_value = "ws://127.0.0.1:8080/ws")]
    url: Vec<Endpoint>,
    /// A token; without it one is made with the secret of the configuration or of a `natter up` on this machine.
    #[arg(long)]
    token: Option<String>,
    /// User of the token that is made.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "dev",
        conflicts_with = "token"
    )]
    user: String,
    /// Data folder of the `natter up` whose secret is used where the configuration has none.
    #[arg(
        long,
        value_name = "DIR",
        default_value = ".natter",
        conflicts_with = "token"
    )]
    data: PathBuf,
}

impl Connect {
    /// The edges and the token to use for `room`.
    pub(super) fn target(
        &self,
        room: &RoomId,
        config: impl FnOnce() -> Result<Config, ConfigError>,
    ) -> anyhow::Result<Target> {
        let token = match &self.token {
            Some(token) => Token::Fixed(token.clone()),
            None => self.made(room, config)?,
        };
        Ok(Target::new(self.url.clone(), token))
    }

    fn made(
        &self,
        room: &RoomId,
        config: impl FnOnce() -> Result<Config, ConfigError>,
    ) -> anyhow::Result<Token> {
        let configured = config()?.auth.hs256_secret;
        let secret = if configured.expose().is_empty() {
            let file = self.data.join(DEV_SECRET);
            fs::read_to_string(&file)
                .with_context(|| {
                    format!(
                        "no token: give --token, set auth.hs256_secret, or name the folder of a running `natter up` with --data ({} can't be read)",
                        file.display()
                    )
                })?
                .trim_end()
                .to_owned()
        } else {
            configured.expose().to_owned()
        };
        // Once here, so that a secret that can't be used is an error of the command and not of the first connection.
        token_for(&self.user, room, TOKEN_TTL, &secret)?;
        let (user, room) = (self.user.clone(), room.clone());
        Ok(Token::Made(Arc::new(move || {
            token_for(&user, &room, TOKEN_TTL, &secret).map_err(|error| format!("{error:#}"))
        })))
    }
}

/// SEAM: a token of `user` that may read and write in `room`, valid for `ttl`, signed with the HS256 `secret`.
/// To be connected to `auth::issue`.
fn token_for(user: &str, room: &RoomId, ttl: Duration, secret: &str) -> anyhow::Result<String> {
    let _to_be_used = (user, room, ttl, secret);
    bail!("making tokens is not connected yet: give --token")
}

/// Parses a room for clap.
pub(super) fn room(text: &str) -> Result<RoomId, String> {
    RoomId::parse(text).map_err(|error| error.to_string())
}

/// Runs a tool on a runtime of one thread until it is done or Ctrl-C is pressed, which is a clean end.
pub(super) fn run_tool(tool: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("can't start the runtime")?;
    let ended = runtime.block_on(async {
        tokio::select! {
            ended = tool => ended,
            pressed = tokio::signal::ctrl_c() => pressed.context("can't wait for Ctrl-C"),
        }
    });
    // What is left are tasks of connections; nobody waits for them.
    runtime.shutdown_background();
    ended
}

/// Writes one line to stdout at once. `false`: nobody reads any more (`natter tail … | head`), which is a clean end.
pub(super) fn print_line(line: &str) -> anyhow::Result<bool> {
    let mut stdout = io::stdout().lock();
    let written = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    match written {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("can't write to stdout"),
    }
}

/// Ends when nobody can read stdout any more, also while nothing is printed; never where stdout is no pipe.
pub(super) async fn stdout_closed() {
    // Opened anew, since watching a file makes it non-blocking for everybody who shares it.
    let pipe = pipe::OpenOptions::new().open_sender("/proc/self/fd/1");
    // On a pipe without readers the kernel reports an error condition; nothing else is asked for.
    if let Ok(pipe) = pipe
        && pipe.ready(Interest::ERROR).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}
