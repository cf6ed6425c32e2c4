//! `natter dev`: cuts and heals links between the regions of a running `natter up --regions`.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, test_kill_process};
use serde::{Deserialize, Serialize};

use super::up::data_dir::lock_file;

/// Longest request or answer, in bytes.
pub(super) const MAX_LINE: u64 = 256 * 1024;

/// Timeout of an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Arguments of `natter dev`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
    /// Data folder of the running natter up.
    #[arg(long, global = true, value_name = "DIR", default_value = ".natter")]
    data: PathBuf,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Cut a region off from all others, both ways; it continues alone.
    Cut {
        region: String,
        /// Close its connections. Otherwise they hang, as when the network is gone.
        #[arg(long)]
        close: bool,
    },
    /// End the cut of a region.
    Heal { region: String },
    /// Show the links between the regions.
    Links,
}

/// A request: one line of JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Request {
    Cut { region: String, close: bool },
    Heal { region: String },
    Links,
}

/// The answer: one line of JSON. It is sent when the request has been carried out.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    Links(Vec<LinkState>),
    Error(String),
}

/// One direction between two regions.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct LinkState {
    pub from: String,
    pub to: String,
    /// `up`, `cut` (it hangs) or `closed`.
    pub state: String,
}

/// Socket of the `natter up` with this data folder.
pub(super) fn socket(data: &Path) -> PathBuf {
    data.join("dev.sock")
}

/// Sends the request and prints the links as they are afterwards.
pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let request = match args.what {
        What::Cut { region, close } => Request::Cut { region, close },
        What::Heal { region } => Request::Heal { region },
        What::Links => Request::Links,
    };
    match ask(&args.data, &request)? {
        Answer::Error(error) => bail!(error),
        Answer::Links(links) => {
            let width = links.iter().map(|link| link.from.len()).max().unwrap_or(0);
            for LinkState { from, to, state } in links {
                println!("{from:<width$} -> {to:<width$}  {state}");
            }
        }
    }
    Ok(())
}

fn ask(data: &Path, request: &Request) -> anyhow::Result<Answer> {
    let shown = data.display();
    let mut stream = match UnixStream::connect(socket(data)) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            match running(data) {
                Some(pid) => bail!(
                    "the natter up of {shown} (process {pid}) has no links: it was started without --regions, or is not ready yet"
                ),
                None => {
                    bail!("no natter up runs with data folder {shown}; --data names another one")
                }
            }
        }
        Err(error) => {
            return Err(error)
                .with_context(|| format!("{} can't be reached", socket(data).display()));
        }
    };
    stream.set_read_timeout(Some(ANSWER_WITHIN))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream.take(MAX_LINE))
        .read_line(&mut answer)
        .with_context(|| format!("the natter up of {shown} did not answer"))?;
    serde_json::from_str(&answer)
        .with_context(|| format!("the answer of the natter up of {shown} can't be parsed"))
}

/// The process that owns a data folder, if it runs.
fn running(data: &Path) -> Option<u32> {
    let pid: u32 = fs::read_to_string(lock_file(data))
        .ok()?
        .trim()
        .parse()
        .ok()?;
    test_kill_process(Pid::from_raw(pid.cast_signed())?).ok()?;
    Some(pid)
}
