//! A child process with a check that tells when it is ready.

use std::{
    ffi::OsString,
    fmt, fs,
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    pin::Pin,
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use super::spawner;
use crate::model::Region;

/// A log file that is larger than this when the process starts is renamed to `<name>.log.1`, which replaces an earlier
/// one.
const LOG_ROTATE_BYTES: u64 = 10 * 1024 * 1024;

/// Number of lines at the end of a log that are shown when a process fails to start.
const LOG_TAIL_LINES: usize = 15;
const LOG_TAIL_BYTES: u64 = 8 * 1024;

/// Pause between two checks whether a process is ready.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// Timeout of one check.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a check failed.
pub type CheckError = Box<dyn std::error::Error + Send + Sync>;

/// Checks once whether the process with this id works. It is dropped when it takes too long.
pub type Check =
    Arc<dyn Fn(u32) -> Pin<Box<dyn Future<Output = Result<(), CheckError>> + Send>> + Send + Sync>;

/// Starts processes such that they can't outlive this one.
#[derive(Debug, Clone)]
pub struct Launcher {
    /// The natter binary, whose `guard` subcommand every child goes through.
    pub guard: PathBuf,
    /// Becomes the standard input of every child, so that a lock on it is held until the last child has ended. It must
    /// be an empty file. `None`: `/dev/null`.
    pub held: Option<Arc<File>>,
}

/// What to run.
#[derive(Clone)]
pub struct Spec {
    /// For messages and logs.
    pub name: String,
    pub program: PathBuf,
    pub args: Vec<OsString>,
    /// Variables in addition to this process's environment.
    pub env: Vec<(String, String)>,
    /// The file for its output.
    pub log: PathBuf,
    /// Checks whether it can be used.
    pub ready: Check,
    /// Checks whether it still works, after it was ready.
    pub alive: Check,
    /// Timeout of the start until it is ready.
    pub ready_within: Duration,
    /// Time from SIGTERM until it is killed.
    pub stop_within: Duration,
}

impl fmt::Debug for Spec {
    /// Without the environment, which contains secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spec")
            .field("name", &self.name)
            .field("program", &self.program)
            .field("args", &self.args)
            .finish_non_exhaustive()
    }
}

/// A process did not become ready.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file it needs can't be written.
    #[error("{name}: {} can't be written", path.display())]
    File {
        name: String,
        path: PathBuf,
        source: io::Error,
    },
    /// There is no free port for it.
    #[error("{name}: no free port")]
    Port { name: String, source: io::Error },
    /// It can't be started.
    #[error("{name}: {} can't be started", program.display())]
    Spawn {
        name: String,
        program: PathBuf,
        source: io::Error,
    },
    /// It ended before it was ready.
    #[error("{name} ended with {status} before it was ready{log}")]
    Exited {
        name: String,
        status: ExitStatus,
        log: LogTail,
    },
    /// It ran, but did not become ready, and was killed.
    #[error("{name} was not ready within {waited:?}{log}")]
    NotReady {
        name: String,
        waited: Duration,
        source: CheckError,
        log: LogTail,
    },
    /// A region does not reach another one.
    #[error("region {from} did not reach region {to} within {waited:?}")]
    Apart {
        from: Region,
        to: Region,
        waited: Duration,
        source: CheckError,
    },
    /// One of its settings can't be used.
    #[error("{name}: its settings can't be used")]
    Settings { name: String, source: CheckError },
}

/// The end of a log, for the message that says why a process did not start.
#[derive(Debug)]
pub struct LogTail {
    path: PathBuf,
    lines: Vec<String>,
}

/// A child process: not started, running, or ended.
///
/// Dropping it kills the process.
#[derive(Debug)]
pub struct Process {
    spec: Spec,
    launcher: Launcher,
    child: Option<Child>,
}

impl Process {
    /// A process that is not started yet.
    #[must_use]
    pub fn new(launcher: Launcher, spec: Spec) -> Self {
        Self {
            spec,
            launcher,
            child: None,
        }
    }

    /// Its specification.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Its id, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().and_then(Child::id)
    }

    /// Starts it and waits until it is ready. A process that still runs is killed first. If this future is dropped, the
    /// process may be running: [`Self::stop`] and dropping `self` still end it.
    ///
    /// # Errors
    /// [`StartError`]; then the process has ended.
    pub async fn start(&mut self) -> Result<(), StartError> {
        self.kill().await;
        let child = self.spawn().await?;
        let pid = child.id().unwrap_or(0);
        let child = self.child.insert(child);
        let spec = &self.spec;
        let started = Instant::now();
        loop {
            let check = timeout(CHECK_TIMEOUT, (spec.ready)(pid));
            // Both branches are cancel-safe: a check has no state, and waiting for a child can be repeated.
            let failed: CheckError = tokio::select! {
                status = child.wait() => {
                    let status = status.map_err(|source| spec.spawn_error(source))?;
                    return Err(StartError::Exited {
                        name: spec.name.clone(),
                        status,
                        log: LogTail::read(&spec.log),
                    });
                }
                result = check => match result {
                    Ok(Ok(())) => return Ok(()),
                    Ok(Err(error)) => error,
                    Err(elapsed) => elapsed.into(),
                },
            };
            if started.elapsed() >= spec.ready_within {
                let error = StartError::NotReady {
                    name: spec.name.clone(),
                    waited: spec.ready_within,
                    source: failed,
                    log: LogTail::read(&spec.log),
                };
                self.kill().await;
                return Err(error);
            }
            sleep(CHECK_INTERVAL).await;
        }
    }

    async fn spawn(&self) -> Result<Child, StartError> {
        let spec = &self.spec;
        let file_error = |source| StartError::File {
            name: spec.name.clone(),
            path: spec.log.clone(),
            source,
        };
        let log = open_log(&spec.log).map_err(file_error)?;
        let errors = log.try_clone().map_err(file_error)?;
        let stdin = match &self.launcher.held {
            Some(held) => Stdio::from(held.try_clone().map_err(file_error)?),
            None => Stdio::null(),
        };
        let mut command = Command::new(&self.launcher.guard);
        command
            .args(["guard", "--parent", &std::process::id().to_string(), "--"])
            .arg(&spec.program)
            .args(&spec.args)
            .envs(spec.env.iter().map(|(key, value)| (key, value)))
            .stdin(stdin)
            .stdout(log)
            .stderr(errors)
            // Ctrl-C in the terminal goes to its foreground group. Children must not get it, because they are stopped
            // in order.
            .process_group(0)
            .kill_on_drop(true);
        spawner::spawn(command)
            .await
            .map_err(|source| spec.spawn_error(source))
    }

    /// Waits until it has ended; returns at once if it does not run. Cancel-safe.
    pub async fn exited(&mut self) -> Option<ExitStatus> {
        let child = self.child.as_mut()?;
        // An error means that its status was already collected elsewhere: it has ended.
        child.wait().await.ok()
    }

    /// Ends it with SIGKILL, and waits until it has ended.
    pub async fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Fails only if it has already ended.
            drop(child.kill().await);
        }
    }

    /// Ends it with SIGTERM, or with SIGKILL if that takes longer than [`Spec::stop_within`]. Returns its status if it
    /// ended by itself.
    pub async fn stop(&mut self) -> Option<ExitStatus> {
        self.terminate();
        let child = self.child.as_mut()?;
        let status = timeout(self.spec.stop_within, child.wait()).await;
        self.kill().await;
        status.ok()?.ok()
    }

    /// Sends SIGTERM, and does not wait.
    pub fn terminate(&self) {
        // `pid` is `None` once the child was reaped, so this can't hit another process.
        if let Some(pid) = self.pid().and_then(|pid| Pid::from_raw(pid.cast_signed()))
            && let Err(error) = kill_process(pid, Signal::TERM)
        {
            tracing::debug!(%error, process = self.spec.name, "SIGTERM was not sent");
        }
    }

    /// Checks once whether it works, with a timeout.
    ///
    /// # Errors
    /// The error of [`Spec::alive`], or that the check took too long.
    pub fn check_alive(
        &self,
    ) -> impl Future<Output = Result<(), CheckError>> + Send + 'static + use<> {
        let alive = Arc::clone(&self.spec.alive);
        let pid = self.pid().unwrap_or(0);
        async move { timeout(CHECK_TIMEOUT, alive(pid)).await? }
    }
}

impl Spec {
    fn spawn_error(&self, source: io::Error) -> StartError {
        StartError::Spawn {
            name: self.name.clone(),
            program: self.program.clone(),
            source,
        }
    }
}

impl LogTail {
    /// The last lines of a log; none if it can't be read.
    #[must_use]
    pub fn read(path: &Path) -> Self {
        let tail = || -> io::Result<String> {
            let mut file = File::open(path)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
            let mut bytes = Vec::new();
            file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let text = tail().unwrap_or_default();
        let lines: Vec<_> = text.lines().map(str::to_owned).collect();
        let skip = lines.len().saturating_sub(LOG_TAIL_LINES);
        Self {
            path: path.to_owned(),
            lines: lines.into_iter().skip(skip).collect(),
        }
    }
}

impl fmt::Display for LogTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "; the end of {}:", self.path.display())?;
        for line in &self.lines {
            write!(f, "\n  {line}")?;
        }
        Ok(())
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    if fs::metadata(path).is_ok_and(|log| log.len() > LOG_ROTATE_BYTES) {
        let mut aside = path.as_os_str().to_owned();
        aside.push(".1");
        fs::rename(path, aside)?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}
