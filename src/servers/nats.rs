//! nats-server.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_nats::subject::ToSubject;
use serde_json::{Value, json};

use super::{
    options::{NatsOptions, SpineOptions},
    process::{Check, CheckError, Launcher, Process, Spec, StartError},
};
use crate::subject::api;

/// Timeout of the start. Recovering a store of some gigabytes takes seconds.
const READY_WITHIN: Duration = Duration::from_secs(30);
const STOP_WITHIN: Duration = Duration::from_secs(10);

/// A running nats-server: a region's, with JetStream, or a spine.
#[derive(Debug)]
pub struct NatsServer {
    process: Process,
    options: Options,
    port: Arc<OnceLock<u16>>,
}

#[derive(Debug)]
enum Options {
    Region(NatsOptions),
    Spine(SpineOptions),
}

impl Options {
    /// For messages and logs.
    fn name(&self) -> String {
        match self {
            Self::Region(options) if options.spine.is_none() => "nats-server".to_owned(),
            Self::Region(options) => format!("nats-server {}", options.region),
            Self::Spine(options) => format!("spine {}", options.region),
        }
    }

    fn dir(&self) -> &Path {
        match self {
            Self::Region(options) => &options.dir,
            Self::Spine(options) => &options.dir,
        }
    }

    /// Path of the configuration file.
    fn conf(&self) -> PathBuf {
        match self {
            Self::Region(options) => options.dir.join("server.conf"),
            Self::Spine(options) => options.dir.join("spine.conf"),
        }
    }

    fn log(&self) -> PathBuf {
        match self {
            Self::Region(NatsOptions { log, .. }) | Self::Spine(SpineOptions { log, .. }) => log
                .clone()
                .unwrap_or_else(|| self.dir().join("nats-server.log")),
        }
    }

    /// The configured port; 0: any.
    fn port(&self) -> u16 {
        match self {
            Self::Region(NatsOptions { port, .. }) | Self::Spine(SpineOptions { port, .. }) => {
                *port
            }
        }
    }

    fn binary(&self) -> PathBuf {
        match self {
            Self::Region(NatsOptions { binary, .. }) | Self::Spine(SpineOptions { binary, .. }) => {
                binary.clone()
            }
        }
    }

    fn render(&self, port: Option<u16>) -> String {
        match self {
            Self::Region(options) => options.render(port),
            Self::Spine(options) => options.render(port),
        }
    }
}

impl NatsServer {
    /// Starts a region's server and waits until JetStream answers on a real connection.
    ///
    /// # Errors
    /// [`StartError`]
    pub async fn start(launcher: Launcher, options: NatsOptions) -> Result<Self, StartError> {
        Self::start_with(launcher, Options::Region(options)).await
    }

    /// Starts a spine and waits until it accepts connections. It may not have reached the others yet.
    ///
    /// # Errors
    /// [`StartError`]
    pub async fn start_spine(
        launcher: Launcher,
        options: SpineOptions,
    ) -> Result<Self, StartError> {
        Self::start_with(launcher, Options::Spine(options)).await
    }

    async fn start_with(launcher: Launcher, options: Options) -> Result<Self, StartError> {
        let mut server = Self::new(launcher, options);
        server.restart().await?;
        Ok(server)
    }

    fn new(launcher: Launcher, options: Options) -> Self {
        let port = Arc::new(OnceLock::new());
        if options.port() != 0 {
            port.get_or_init(|| options.port());
        }
        let jetstream = matches!(options, Options::Region(_));
        let check = check(Arc::clone(&port), ports_dir(options.dir()), jetstream);
        let spec = Spec {
            name: options.name(),
            program: options.binary(),
            args: vec![
                "--config".into(),
                options.conf().into(),
                "--ports_file_dir".into(),
                ports_dir(options.dir()).into(),
            ],
            env: Vec::new(),
            log: options.log(),
            ready: Arc::clone(&check),
            alive: check,
            ready_within: READY_WITHIN,
            stop_within: STOP_WITHIN,
        };
        Self {
            process: Process::new(launcher, spec),
            options,
            port,
        }
    }

    /// Starts it (again), after a [`Self::kill`], a [`Self::stop`] or its own end: same port, same data.
    ///
    /// # Errors
    /// [`StartError`]
    pub async fn restart(&mut self) -> Result<(), StartError> {
        self.kill().await;
        self.clear_ports_dir()
            .map_err(|source| self.file_error(source))?;
        self.write_conf()
            .map_err(|source| self.file_error(source))?;
        self.process.start().await?;
        // From now on the configuration contains the port that the server got.
        self.write_conf().map_err(|source| self.file_error(source))
    }

    fn file_error(&self, source: io::Error) -> StartError {
        StartError::File {
            name: self.options.name(),
            path: self.options.dir().to_owned(),
            source,
        }
    }

    /// A server that was killed leaves its file behind, and a later one may have the same process id.
    fn clear_ports_dir(&self) -> io::Result<()> {
        let dir = ports_dir(self.options.dir());
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        fs::create_dir_all(dir)
    }

    fn write_conf(&self) -> io::Result<()> {
        let text = self.options.render(self.port.get().copied());
        fs::write(self.options.conf(), text)
    }

    /// `nats://127.0.0.1:<port>`
    #[must_use]
    pub fn url(&self) -> String {
        url(self.port())
    }

    /// The port it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.get().copied().unwrap_or(self.options.port())
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

fn url(port: u16) -> String {
    format!("nats://127.0.0.1:{port}")
}

fn ports_dir(dir: &Path) -> PathBuf {
    dir.join("ports")
}

fn check(port: Arc<OnceLock<u16>>, ports_dir: PathBuf, jetstream: bool) -> Check {
    Arc::new(move |pid| {
        let port = Arc::clone(&port);
        let ports_dir = ports_dir.clone();
        Box::pin(async move {
            let known = match port.get() {
                Some(port) => *port,
                None => *port.get_or_init_from(&ports_dir, pid)?,
            };
            if jetstream {
                asks(&url(known), api::INFO).await
            } else {
                Ok(connects(&url(known)).await?.drain().await?)
            }
        })
    })
}

/// Reads the port that the server chose; it writes `<program>_<pid>.ports` when it listens.
trait PortFromFile {
    fn get_or_init_from(&self, ports_dir: &Path, pid: u32) -> Result<&u16, CheckError>;
}

impl PortFromFile for OnceLock<u16> {
    fn get_or_init_from(&self, ports_dir: &Path, pid: u32) -> Result<&u16, CheckError> {
        let suffix = format!("_{pid}.ports");
        for entry in fs::read_dir(ports_dir)? {
            let path = entry?.path();
            if !path.to_string_lossy().ends_with(&suffix) {
                continue;
            }
            let ports: Value = serde_json::from_slice(&fs::read(&path)?)?;
            let port = ports["nats"][0]
                .as_str()
                .and_then(|url| url.rsplit_once(':'))
                .and_then(|(_, port)| port.parse().ok());
            if let Some(port) = port {
                return Ok(self.get_or_init(|| port));
            }
        }
        Err("it does not listen yet".into())
    }
}

/// Connects.
async fn connects(url: &str) -> Result<async_nats::Client, CheckError> {
    let options = async_nats::ConnectOptions::new().name("natter health check");
    Ok(options.max_reconnects(1).connect(url).await?)
}

/// Connects, and sends a request to a JetStream.
pub(super) async fn asks(url: &str, subject: impl ToSubject) -> Result<(), CheckError> {
    let client = connects(url).await?;
    let answer = client.request(subject, "".into()).await;
    // Closes the connection now, and not only when the client's task notices.
    drop(client.drain().await);
    let answer: Value = serde_json::from_slice(&answer?.payload)?;
    match answer.get("error") {
        None => Ok(()),
        Some(error) => Err(json!({ "JetStream": error }).to_string().into()),
    }
}
