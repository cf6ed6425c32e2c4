//! mongod, as a replica set of one node, so that majority writes work.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use mongodb::{
    Client, Database,
    bson::{Document, doc},
    options::ClientOptions,
};

use super::{
    port::free_port,
    process::{Check, CheckError, Launcher, Process, Spec, StartError},
};

/// Name of the replica set.
const REPLICA_SET: &str = "natter";

/// Timeout of the start. Recovery after a kill, and the first election, take seconds on a slow disk.
const READY_WITHIN: Duration = Duration::from_secs(60);
const STOP_WITHIN: Duration = Duration::from_secs(20);

/// Timeout of one command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(2);

/// Cache of a laptop's database, in GB; the smallest that mongod accepts.
const CACHE_GB: &str = "0.25";

/// How much of that cache may be changed and not yet written. The index of words is written to in many places at once.
/// MongoDB's defaults (5 and 20 % of the cache) are made for a large cache. With them each page of that index is
/// written out after a few changes, and a message costs five times the CPU. The journal has every change, so only the
/// duration of a recovery depends on this.
const EVICTION: &str = "eviction_dirty_target=60,eviction_dirty_trigger=80,\
                        eviction_updates_target=40,eviction_updates_trigger=60";

/// Size of the replication log, in MB. No node replicates from it.
const OPLOG_MB: &str = "128";

/// How many ports are tried when the chosen one was taken meanwhile.
const PORT_ATTEMPTS: usize = 5;

/// `NotYetInitialized` of MongoDB.
const NOT_YET_INITIALIZED: i32 = 94;

/// Options of a mongod on this machine.
#[derive(Debug, Clone)]
pub struct MongodOptions {
    /// The program.
    pub binary: PathBuf,
    /// Its data folder.
    pub dir: PathBuf,
    /// The file for its output; `None`: `mongod.log` in `dir`.
    pub log: Option<PathBuf>,
    /// Port on loopback; 0: any free one.
    pub port: u16,
}

/// A running mongod that accepts writes.
#[derive(Debug)]
pub struct Mongod {
    process: Process,
    port: u16,
}

impl Mongod {
    /// Starts a server and waits until it is the primary of its replica set. The replica set is created, or corrected
    /// if the port has changed.
    ///
    /// # Errors
    /// [`StartError`]
    pub async fn start(launcher: Launcher, options: MongodOptions) -> Result<Self, StartError> {
        let mut attempt = 1;
        loop {
            let port = match options.port {
                0 => free_port().map_err(|source| StartError::Port {
                    name: "mongod".to_owned(),
                    source,
                })?,
                port => port,
            };
            let mut server = Self::new(launcher.clone(), &options, port)?;
            match server.restart().await {
                Ok(()) => return Ok(server),
                // mongod does not support "any port", and a port that was free may have been taken meanwhile.
                Err(StartError::Exited { .. }) if options.port == 0 && attempt < PORT_ATTEMPTS => {
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn new(launcher: Launcher, options: &MongodOptions, port: u16) -> Result<Self, StartError> {
        let name = "mongod".to_owned();
        fs::create_dir_all(&options.dir).map_err(|source| StartError::File {
            name: name.clone(),
            path: options.dir.clone(),
            source,
        })?;
        let check = check(port).map_err(|source| StartError::Settings {
            name: name.clone(),
            source,
        })?;
        let mut args: Vec<std::ffi::OsString> = [
            "--bind_ip",
            "127.0.0.1",
            "--replSet",
            REPLICA_SET,
            "--wiredTigerCacheSizeGB",
            CACHE_GB,
            "--wiredTigerEngineConfigString",
            EVICTION,
            "--oplogSize",
            OPLOG_MB,
            "--nounixsocket",
            // Megabytes of statistics that are not used here.
            "--setParameter",
            "diagnosticDataCollectionEnabled=false",
            "--port",
        ]
        .map(Into::into)
        .into();
        args.extend([
            port.to_string().into(),
            "--dbpath".into(),
            options.dir.clone().into(),
        ]);
        let spec = Spec {
            name,
            program: options.binary.clone(),
            args,
            env: Vec::new(),
            log: options
                .log
                .clone()
                .unwrap_or_else(|| options.dir.join("mongod.log")),
            ready: Arc::clone(&check),
            alive: check,
            ready_within: READY_WITHIN,
            stop_within: STOP_WITHIN,
        };
        Ok(Self {
            process: Process::new(launcher, spec),
            port,
        })
    }

    /// Starts it (again), after a [`Self::kill`], a [`Self::stop`] or its own end: same port, same data.
    ///
    /// # Errors
    /// [`StartError`]
    pub async fn restart(&mut self) -> Result<(), StartError> {
        self.process.start().await
    }

    /// `mongodb://127.0.0.1:<port>/?replicaSet=natter`
    #[must_use]
    pub fn url(&self) -> String {
        format!(
            "mongodb://127.0.0.1:{}/?replicaSet={REPLICA_SET}",
            self.port
        )
    }

    /// The port it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its process id, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.process.pid()
    }

    /// Sends SIGKILL, and returns when the process has ended.
    pub async fn kill(&mut self) {
        self.process.kill().await;
    }

    /// Sends SIGTERM, and returns when the process has ended.
    pub async fn stop(&mut self) {
        self.process.stop().await;
    }

    /// The process alone, for supervision; it restarts with the same port and data.
    #[must_use]
    pub fn into_process(self) -> Process {
        self.process
    }
}

/// Ready means that this node is a primary. The first check of a new node makes it one.
fn check(port: u16) -> Result<Check, CheckError> {
    let host = format!("127.0.0.1:{port}");
    let mut options = ClientOptions::builder()
        .hosts(vec![mongodb::options::ServerAddress::Tcp {
            host: "127.0.0.1".to_owned(),
            port: Some(port),
        }])
        .direct_connection(true)
        .server_selection_timeout(COMMAND_TIMEOUT)
        .connect_timeout(COMMAND_TIMEOUT)
        .build();
    options.app_name = Some("natter health check".to_owned());
    let admin = Client::with_options(options)?.database("admin");
    Ok(Arc::new(move |_pid| {
        let (admin, host) = (admin.clone(), host.clone());
        Box::pin(async move { primary(&admin, &host).await })
    }))
}

async fn primary(admin: &Database, host: &str) -> Result<(), CheckError> {
    let hello = admin.run_command(doc! { "hello": 1 }).await?;
    if hello.get_bool("isWritablePrimary").unwrap_or(false) {
        return Ok(());
    }
    if hello.contains_key("setName") {
        return Err("it is not the primary yet".into());
    }
    // Without a set name: the node has no configuration, or one with another port, in which it does not find itself.
    let member = doc! { "_id": 0, "host": host };
    match admin.run_command(doc! { "replSetGetConfig": 1 }).await {
        Ok(answer) => {
            let mut config = answer.get_document("config")?.clone();
            if names_host(&config, host) {
                return Err("it is still reading its configuration".into());
            }
            let version = config
                .get_i32("version")
                .map(i64::from)
                .or_else(|_not_i32| config.get_i64("version"))?;
            config.insert("version", version + 1);
            config.insert("members", vec![member]);
            admin
                .run_command(doc! { "replSetReconfig": config, "force": true })
                .await?;
        }
        Err(error) if is_not_initialized(&error) => {
            let config = doc! { "_id": REPLICA_SET, "members": [member] };
            admin
                .run_command(doc! { "replSetInitiate": config })
                .await?;
        }
        Err(error) => return Err(error.into()),
    }
    Err("its replica set has just been configured".into())
}

fn names_host(config: &Document, host: &str) -> bool {
    config.get_array("members").is_ok_and(|members| {
        members.iter().any(|member| {
            member
                .as_document()
                .is_some_and(|member| member.get_str("host").is_ok_and(|h| h == host))
        })
    })
}

fn is_not_initialized(error: &mongodb::error::Error) -> bool {
    matches!(
        error.kind.as_ref(),
        mongodb::error::ErrorKind::Command(command) if command.code == NOT_YET_INITIALIZED
    )
}
