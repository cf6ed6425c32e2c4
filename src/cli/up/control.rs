//! The socket in the data folder at which `natter dev` reaches a running `natter up --regions`.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    time::timeout,
};

use crate::{
    cli::dev::{Answer, LinkState, MAX_LINE, Request, socket},
    model::Region,
    runtime::Tasks,
    servers::{Cut, Relay},
};

/// Timeout of one client, for its request and for reading the answer.
const TALK_WITHIN: Duration = Duration::from_secs(5);

/// The links between the regions, and the socket that controls them. Both end when this is dropped.
#[derive(Debug)]
pub(super) struct Control {
    path: PathBuf,
    tasks: Tasks,
}

impl Control {
    /// Listens in the data folder `data`, which belongs to this process.
    pub(super) fn start(relay: Relay, data: &Path) -> anyhow::Result<Self> {
        let path = socket(data);
        // A process that was killed leaves its socket behind.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            Ok(()) | Err(_) => {}
        }
        let listener = UnixListener::bind(&path).with_context(|| {
            format!(
                "{}: no socket can be made there (its path may be too long; --data names another folder)",
                path.display()
            )
        })?;
        let tasks = Tasks::default();
        let relay = Arc::new(relay);
        tasks.spawn_until_stopping("control", serve(listener, relay, tasks.clone()));
        Ok(Self { path, tasks })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.tasks.stop();
        // A socket file that is left behind refuses connections, which is the correct answer then.
        drop(fs::remove_file(&self.path));
    }
}

async fn serve(listener: UnixListener, relay: Arc<Relay>, tasks: Tasks) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let relay = Arc::clone(&relay);
                tasks.spawn_until_stopping("control client", async move {
                    match timeout(TALK_WITHIN, talk(stream, &relay)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => tracing::debug!(%error, "a client of the socket"),
                        Err(_elapsed) => tracing::debug!("a client of the socket is too slow"),
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the socket can't accept");
                tokio::time::sleep(TALK_WITHIN).await;
            }
        }
    }
}

/// One request, one answer.
async fn talk(stream: UnixStream, relay: &Relay) -> io::Result<()> {
    let (reads, mut writes) = stream.into_split();
    let mut line = String::new();
    BufReader::new(reads.take(MAX_LINE))
        .read_line(&mut line)
        .await?;
    let answer = match serde_json::from_str(&line) {
        Ok(request) => answer(request, relay),
        Err(error) => Answer::Error(format!("the request can't be parsed: {error}")),
    };
    let mut text = serde_json::to_string(&answer)?;
    text.push('\n');
    writes.write_all(text.as_bytes()).await
}

fn answer(request: Request, relay: &Relay) -> Answer {
    let named = |name: &str| -> Result<Region, Answer> {
        let mut known = relay.gates().into_iter().map(|(region, _)| region);
        known.find(|region| region.as_str() == name).ok_or_else(|| {
            let known: Vec<String> = relay
                .gates()
                .iter()
                .map(|(region, _)| region.to_string())
                .collect();
            Answer::Error(format!(
                "there is no region {name:?}: there are {}",
                known.join(", ")
            ))
        })
    };
    match request {
        Request::Links => {}
        Request::Cut { region, close } => match named(&region) {
            Ok(region) => relay.cut(&region, if close { Cut::Close } else { Cut::Stall }),
            Err(error) => return error,
        },
        Request::Heal { region } => match named(&region) {
            Ok(region) => relay.heal(&region),
            Err(error) => return error,
        },
    }
    let links = relay.links().into_iter().map(|link| LinkState {
        from: link.from.to_string(),
        to: link.to.to_string(),
        state: match link.cut {
            None => "up",
            Some(Cut::Stall) => "cut",
            Some(Cut::Close) => "closed",
        }
        .to_owned(),
    });
    Answer::Links(links.collect())
}
