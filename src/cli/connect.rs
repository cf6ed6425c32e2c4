//! What `tail`, `send` and `history export` share: which edges, which token, and how output ends.

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

/// Life of the tokens that these tools make for themselves; they make a new one when it ends.
const TOKEN_TTL: Duration = Duration::from_secs(3600);

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
    /// The edges and the token to use for `room`; one that is made has `rights` there.
    pub(super) fn target(
        &self,
        room: &RoomId,
        rights: &[Right],
        config: impl FnOnce() -> Result<Config, ConfigError>,
    ) -> anyhow::Result<Target> {
        let token = match &self.token {
            Some(token) => Token::Fixed(token.clone()),
            None => self.made(room, rights, config)?,
        };
        Ok(Target::new(self.url.clone(), token))
    }

    fn made(
        &self,
        room: &RoomId,
        rights: &[Right],
        config: impl FnOnce() -> Result<Config, ConfigError>,
    ) -> anyhow::Result<Token> {
        let config = config()?;
        let secret = secret(&config, &self.data)?;
        let auth = config.auth;
        // Once here, so that a secret that can't be used is an error of the command and not of the first connection.
        let grant = Grant::new(room.as_str(), rights);
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

/// JSON text on one line. Ends of lines are white space between its parts: in a string they are escaped.
pub(super) fn on_one_line(json: &str) -> String {
    json.replace(['\r', '\n'], "")
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
