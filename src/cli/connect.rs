//! What `tail`, `send` and `history export` share: edges, token, and how output ends.

use std::{
    io::{self, Write},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use tokio::{io::Interest, net::unix::pipe};

use super::token::{secret, sign};
use crate::{
    auth::{Grant, Right},
    client::{Endpoint, Target, Token},
    config::{self, Config, ConfigError},
    model::RoomId,
};

/// Lifetime of the tokens that these tools make for themselves. A new one is made when it ends.
const TOKEN_TTL: Duration = Duration::from_secs(3600);

/// Where to connect, and as whom.
#[derive(Debug, Args)]
pub(super) struct Connect {
    /// The edge, as ws://host:port; may be repeated to name fallback edges.
    #[arg(long, value_name = "URL", default_value = "ws://127.0.0.1:8080/ws")]
    url: Vec<Endpoint>,
    /// The token; without it, one is made with the secret of the configuration or of a `natter up` on this machine.
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
    /// The edges and the token for `room`. A token that is made here has `rights` in that room.
    pub(super) fn target(
        &self,
        room: &RoomId,
        rights: &[Right],
        config: impl FnOnce() -> Result<Config, ConfigError>,
    ) -> anyhow::Result<Target> {
        self.target_in(room.as_str(), rights, config)
    }

    /// The edges and the token for the rooms of a pattern.
    pub(super) fn target_in(
        &self,
        rooms: &str,
        rights: &[Right],
        config: impl FnOnce() -> Result<Config, ConfigError>,
    ) -> anyhow::Result<Target> {
        let token = match &self.token {
            Some(token) => Token::Fixed(token.clone()),
            None => self.made(rooms, rights, config)?,
        };
        Ok(Target::new(self.url.clone(), token))
    }

    fn made(
        &self,
        rooms: &str,
        rights: &[Right],
        config: impl FnOnce() -> Result<Config, ConfigError>,
    ) -> anyhow::Result<Token> {
        let config = config()?;
        let secret = secret(&config, &self.data)?;
        let auth = config.auth;
        // Checked here, so that an unusable secret is an error of the command and not of the first connection.
        let grant = Grant::new(rooms, rights);
        let user = self.user.clone();
        token_for(&auth, &user, &grant, &secret)?;
        Ok(Token::Made(Arc::new(move || {
            token_for(&auth, &user, &grant, &secret).map_err(|error| format!("{error:#}"))
        })))
    }
}

/// A token of `user` for one grant.
fn token_for(
    auth: &config::Auth,
    user: &str,
    grant: &Grant,
    secret: &str,
) -> anyhow::Result<String> {
    sign(auth, user, vec![grant.clone()], TOKEN_TTL, None, secret)
}

/// Parses a room for clap.
pub(super) fn room(text: &str) -> Result<RoomId, String> {
    RoomId::parse(text).map_err(|error| error.to_string())
}

/// Runs a tool on a single-threaded runtime until it is done or Ctrl-C is pressed. Ctrl-C is a clean end.
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
    // Only tasks of connections are left; nothing waits for them.
    runtime.shutdown_background();
    ended
}

/// Writes one line to stdout and flushes it. `false`: stdout is closed (`natter tail … | head`), which is a clean end.
pub(super) fn print_line(line: &str) -> anyhow::Result<bool> {
    let mut stdout = io::stdout().lock();
    let written = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    match written {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("can't write to stdout"),
    }
}

/// JSON text on one line. Line breaks in it are white space between tokens: inside a string they are escaped.
pub(super) fn on_one_line(json: &str) -> String {
    json.replace(['\r', '\n'], "")
}

/// Returns when the reader of stdout has gone, even if nothing is printed. Never returns if stdout is not a pipe.
pub(super) async fn stdout_closed() {
    // Opened again: watching a file makes it non-blocking for every process that shares it.
    let pipe = pipe::OpenOptions::new().open_sender("/proc/self/fd/1");
    // On a pipe without readers the kernel reports an error condition; no other condition is requested.
    if let Ok(pipe) = pipe
        && pipe.ready(Interest::ERROR).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}
