//! One nats-server and one mongod for all tests of this binary, and what tests share.
//!
//! The servers are started by the first test that needs them, and die with the test process (`natter guard`). Tests keep
//! apart by names: [`unique`]. A test that kills its server, or needs subject mappings, starts a [`dedicated_nats`].

#![allow(
    dead_code,
    reason = "shared by test modules that come and go; not each uses everything"
)]

pub(crate) mod browser;
pub(crate) mod calls;
pub(crate) mod centrifugal;
pub(crate) mod checker;
pub(crate) mod endpoint;
pub(crate) mod events;
pub(crate) mod mesh;
pub(crate) mod overheard;
pub(crate) mod presence;
pub(crate) mod raw;
pub(crate) mod regions;
pub(crate) mod relay;
pub(crate) mod s3;
pub(crate) mod sessions;
pub(crate) mod star;
pub(crate) mod storm;
pub(crate) mod up;
pub(crate) mod vectors;

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use figment::providers::{Format, Toml};
use natter::testing::{
    config::Config,
    servers::{
        Binaries, Check, Launcher, Mongod, MongodOptions, NatsOptions, NatsServer, Sources, Spec,
        StartError,
    },
};
use tempfile::TempDir;
use tokio::sync::OnceCell;

/// Pause between two looks of [`eventually`].
const POLL: Duration = Duration::from_millis(20);

/// Deadline of tests for what takes well under a second on an idle machine.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// The binary under test.
pub(crate) fn natter() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_natter"))
}

/// A command of the binary under test, in `folder`, with the servers that were found for the tests and without what the
/// machine's environment says to natter.
pub(crate) async fn natter_command(folder: &Path) -> Command {
    let binaries = binaries().await;
    let mut command = Command::new(natter());
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("NATTER_") {
            command.env_remove(key);
        }
    }
    command
        .current_dir(folder)
        .env("NATTER__SERVERS__NATS_SERVER", &binaries.nats_server)
        .env(
            "NATTER__SERVERS__MONGOD",
            binaries.mongod.as_ref().expect("asked for"),
        );
    command
}

/// nats-server and mongod, fetched into the repository's `.natter/bin` where the machine has none.
pub(crate) async fn binaries() -> &'static Binaries {
    static BINARIES: OnceCell<Binaries> = OnceCell::const_new();
    BINARIES
        .get_or_init(|| async {
            let sources = Sources {
                nats_server: PathBuf::new(),
                mongod: PathBuf::new(),
                cache: Path::new(env!("CARGO_MANIFEST_DIR")).join(".natter/bin"),
                guard: natter(),
            };
            Binaries::locate(&sources, true, &|text| eprintln!("{text}"))
                .await
                .unwrap()
        })
        .await
}

/// What starts servers that die with this process.
pub(crate) fn launcher() -> Launcher {
    Launcher {
        guard: natter(),
        held: None,
    }
}

/// URL of the nats-server (with JetStream) that all tests share. It has mappings for the default configuration only.
pub(crate) fn nats_url() -> &'static str {
    static URL: OnceLock<String> = OnceLock::new();
    URL.get_or_init(|| {
        shared(async || {
            let nats = dedicated_nats().await;
            (nats.url(), nats)
        })
    })
}

/// URL of the mongod that all tests share.
pub(crate) fn mongodb_url() -> &'static str {
    static URL: OnceLock<String> = OnceLock::new();
    URL.get_or_init(|| {
        shared(async || {
            let mongod = dedicated_mongod().await;
            (mongod.url(), mongod)
        })
    })
}

/// Starts a server on a thread of its own with a runtime of its own (each test's runtime ends with its test), and gives its
/// URL.
fn shared<Server>(start: impl AsyncFnOnce() -> (String, Server) + Send + 'static) -> String {
    let (started, url) = std::sync::mpsc::sync_channel(1);
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (url, _server) = start().await;
            started.send(url).unwrap();
            // For ever: the server ends when the process does.
            std::future::pending::<()>().await;
        });
    });
    url.recv().expect("the shared server starts")
}

/// A nats-server of one test, with its data; killed when it is dropped.
pub(crate) struct DedicatedNats {
    pub(crate) server: NatsServer,
    _dir: TempDir,
}

impl DedicatedNats {
    pub(crate) fn url(&self) -> String {
        self.server.url()
    }
}

/// A mongod of one test, with its data; killed when it is dropped.
pub(crate) struct DedicatedMongod {
    pub(crate) server: Mongod,
    _dir: TempDir,
}

impl DedicatedMongod {
    pub(crate) fn url(&self) -> String {
        self.server.url()
    }
}

/// A nats-server for one test, configured as `natter up` would for the default configuration.
pub(crate) async fn dedicated_nats() -> DedicatedNats {
    dedicated_nats_for(&config("")).await
}

/// A nats-server for one test, configured as `natter up` would for `config`.
pub(crate) async fn dedicated_nats_for(config: &Config) -> DedicatedNats {
    let dir = tempfile::tempdir().unwrap();
    let binary = binaries().await.nats_server.clone();
    let options = NatsOptions::new(config, binary, dir.path().join("nats"), 0);
    let server = NatsServer::start(launcher(), options)
        .await
        .map_err(|error| error_chain(&error))
        .unwrap();
    DedicatedNats { server, _dir: dir }
}

/// A mongod for one test.
pub(crate) async fn dedicated_mongod() -> DedicatedMongod {
    let dir = tempfile::tempdir().unwrap();
    let options = MongodOptions {
        binary: binaries().await.mongod.clone().expect("asked for"),
        dir: dir.path().join("mongo"),
        log: None,
        port: 0,
    };
    let server = Mongod::start(launcher(), options)
        .await
        .map_err(|error| error_chain(&error))
        .unwrap();
    DedicatedMongod { server, _dir: dir }
}

/// A nats-server with the configuration file `conf`, to be started; its log stands beside that.
pub(crate) async fn nats_with(name: &str, conf: &Path, ready: Check) -> Spec {
    Spec {
        name: name.to_owned(),
        program: binaries().await.nats_server.clone(),
        args: vec!["--config".into(), conf.into()],
        env: Vec::new(),
        log: conf.with_extension("log"),
        ready,
        alive: Arc::new(|_pid| Box::pin(async { Ok(()) })),
        ready_within: LONG,
        stop_within: LONG,
    }
}

fn error_chain(error: &StartError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

/// The defaults with `toml` on top.
pub(crate) fn config(toml: &str) -> Config {
    Config::with_defaults(Toml::string(toml)).unwrap()
}

/// A configuration of its own region and prefix on the shared nats-server, with `toml` on top.
pub(crate) fn config_on_shared(name: &str, toml: &str) -> Config {
    let name = unique(name);
    let mut config = config(toml);
    config.nats.url = nats_url().to_owned();
    config.nats.prefix.clone_from(&name);
    config.region = name;
    config
}

/// A name that no other test, and no other run, has: valid as a region and as a prefix.
pub(crate) fn unique(prefix: &str) -> String {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    format!(
        "{prefix}-{}-{}",
        std::process::id(),
        COUNTER.fetch_add(1, Ordering::Relaxed)
    )
}

/// Waits until `look` answers `Ok`, and gives what it found; panics with its last answer at the deadline.
pub(crate) async fn eventually<T>(
    what: &str,
    deadline: Duration,
    mut look: impl AsyncFnMut() -> Result<T, String>,
) -> T {
    let started = Instant::now();
    loop {
        match look().await {
            Ok(found) => return found,
            Err(last) if started.elapsed() >= deadline => {
                panic!("not within {deadline:?}: {what}; last seen: {last}")
            }
            Err(_not_yet) => tokio::time::sleep(POLL).await,
        }
    }
}

/// Whether a process of this id runs (a zombie does not).
pub(crate) fn is_running(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
    })
}

/// CPU time that a process has used, in clock ticks of 10 ms.
pub(crate) fn cpu_time(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    let fields: Vec<&str> = rest.split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

/// Sends a signal to a process that the test has started.
pub(crate) fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("a process id");
    rustix::process::kill_process(pid, signal).unwrap();
    // The call returns before the threads on other cores have stopped: until they have, the process still answers.
    while signal == rustix::process::Signal::STOP && !stands_still(pid) {
        std::thread::yield_now();
    }
}

/// Whether each thread of the process is stopped; one that is gone stands still too.
fn stands_still(pid: rustix::process::Pid) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())) else {
        return true;
    };
    threads.filter_map(Result::ok).all(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // The name before the state is in parentheses, and may hold any character.
        stat.rsplit_once(") ")
            .is_none_or(|(_, rest)| rest.starts_with(['T', 't', 'Z', 'X']))
    })
}
