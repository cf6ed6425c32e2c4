//! nats-server.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_nats::subject::ToSubject;
use serde_json::{Value, json};

use super::{
    process::{Check, CheckError, Launcher, Process, Spec, StartError},
    spine::SpineOptions,
    template::{Part, quoted, render},
};
use crate::{config::Config, model::Region, subject::Subjects, subject::api};

/// The configuration of a laptop's server; lines marked `# @name` are replaced.
const TEMPLATE: &str = include_str!("../../nats/server.conf");

/// Smallest `max_payload` we set: the server's own default.
const MIN_MAX_PAYLOAD: u64 = 1024 * 1024;

/// What headers may need on top of the largest body.
const HEADER_ROOM: u64 = 64 * 1024;

/// Recovering a store of some gigabytes takes seconds.
const READY_WITHIN: Duration = Duration::from_secs(30);
const STOP_WITHIN: Duration = Duration::from_secs(10);

/// What a region's server on this machine is told.
#[derive(Debug, Clone)]
pub struct NatsOptions {
    /// The program.
    pub binary: PathBuf,
    /// Its folder: configuration, JetStream's store, log.
    pub dir: PathBuf,
    /// Where its output goes; `None`: `nats-server.log` in `dir`.
    pub log: Option<PathBuf>,
    /// Port on loopback; 0: any that is free.
    pub port: u16,
    /// Names the server and its JetStream domain.
    pub region: Region,
    /// `None`: the region is alone.
    pub spine: Option<SpineLink>,
    /// First token of the subjects.
    pub prefix: String,
    /// For the mapping of `<prefix>.pub.<namespace>.<room>`.
    pub partitions: u16,
    /// Namespaces, and whether they are durable.
    pub namespaces: Vec<(String, bool)>,
    /// Largest message with its headers, in bytes.
    pub max_payload: u64,
}

/// What joins a region's server to others.
#[derive(Debug, Clone)]
pub struct SpineLink {
    /// Where the region's spine listens for leaf nodes.
    pub spine: SocketAddr,
    /// Where the server itself does: `mirrors.leafnodes` of its region.
    pub leafnodes: SocketAddr,
}

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

    /// Where the configuration is written to.
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

    /// The one it was told; 0: any.
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

impl NatsOptions {
    /// What `config` says about a region's server.
    #[must_use]
    pub fn new(config: &Config, binary: PathBuf, dir: PathBuf, port: u16) -> Self {
        Self {
            binary,
            dir,
            log: None,
            port,
            region: config.region(),
            spine: None,
            prefix: config.nats.prefix.clone(),
            partitions: config.nats.partitions,
            namespaces: config
                .namespaces
                .iter()
                .map(|(name, namespace)| (name.clone(), namespace.durable))
                .collect(),
            max_payload: (config.limits.body.as_u64() + HEADER_ROOM).max(MIN_MAX_PAYLOAD),
        }
    }

    /// The text of the server's configuration.
    fn render(&self, port: Option<u16>) -> String {
        let subjects = Subjects::new(&self.prefix);
        let region = &self.region;
        let by_hand = subjects.by_hand_durable(region);
        // -1 lets the server choose; it tells in the ports file.
        let port = port.map_or_else(|| "-1".to_owned(), |port| port.to_string());
        let mappings = || {
            let namespaces = self.namespaces.iter().map(|(n, durable)| (&**n, *durable));
            subjects
                .mappings(region, self.partitions, namespaces)
                .into_iter()
                .map(|(from, to)| format!("{}: {}", quoted(&from), quoted(&to)))
        };
        let spine = || match &self.spine {
            None => vec!["remotes: [ ]".to_owned()],
            Some(SpineLink { spine, leafnodes }) => {
                let listen = quoted(&leafnodes.to_string());
                let url = quoted(&format!("nats-leaf://natter:natter@{spine}"));
                vec![
                    format!("listen: {listen}"),
                    format!("remotes: [ {{ url: {url}, account: natter }} ]"),
                ]
            }
        };
        render(TEMPLATE, |name| {
            Some(Part::Line(match name {
                "server_name" => format!("server_name: {}", quoted(&format!("natter-{region}"))),
                "listen" => format!("listen: {}", quoted(&format!("127.0.0.1:{port}"))),
                "store_dir" => format!("store_dir: {}", quoted(&self.dir.to_string_lossy())),
                "domain" => format!("domain: {}", quoted(region.as_str())),
                "spine" => return Some(Part::Block(spine())),
                "max_payload" => format!("max_payload: {}", self.max_payload),
                "exports" => format!(
                    "exports: [ {{ service: {}, accounts: [ natter ] }} ]",
                    quoted(&by_hand)
                ),
                "imports" => format!(
                    "imports: [ {{ service: {{ account: natter, subject: {} }} }} ]",
                    quoted(&by_hand)
                ),
                "mappings" => return Some(Part::Block(mappings().collect())),
                _ => return None,
            }))
        })
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

    /// Starts a spine and waits until it takes connections. Whether it reaches the others is another question.
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

    /// Starts it (again), after a [`Self::kill`], [`Self::stop`] or end of its own: same port, same data.
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
        // From here on it is told the port it got.
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

    /// SIGKILL; returns when it is gone.
    pub async fn kill(&mut self) {
        self.process.kill().await;
    }

    /// SIGTERM; returns when it is gone.
    pub async fn stop(&mut self) {
        self.process.stop().await;
    }

    /// The process alone, for who supervises it; it restarts with the same port and data.
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

/// Connects, and asks a JetStream.
pub(super) async fn asks(url: &str, subject: impl ToSubject) -> Result<(), CheckError> {
    let client = connects(url).await?;
    let answer = client.request(subject, "".into()).await;
    // Closes the connection now rather than whenever the client's task notices.
    drop(client.drain().await);
    let answer: Value = serde_json::from_slice(&answer?.payload)?;
    match answer.get("error") {
        None => Ok(()),
        Some(error) => Err(json!({ "JetStream": error }).to_string().into()),
    }
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format, Toml};

    use super::*;

    fn options(toml: &str) -> NatsOptions {
        let config = Config::with_defaults(Toml::string(toml)).unwrap();
        NatsOptions::new(
            &config,
            PathBuf::from("nats-server"),
            PathBuf::from(".natter/nats"),
            4222,
        )
    }

    #[test]
    fn the_file_is_what_the_defaults_render_to() {
        assert_eq!(options("").render(Some(4222)), TEMPLATE);
    }

    #[test]
    fn the_configuration_follows_region_prefix_and_namespaces() {
        let text = options(
            "region = 'seoul'\n[nats]\nprefix = 'm2'\npartitions = 2\n[namespaces.games]\ndurable = true\ntyping = false",
        )
        .render(None);
        for part in [
            "listen: \"127.0.0.1:-1\"",
            "domain: \"seoul\"",
            "\"m2.put.seoul.*.*\": \"m2.in.seoul.{{partition(2,1,2)}}.{{wildcard(1)}}.{{wildcard(2)}}.msg\"",
            "\"m2.pub.games.*\": \"m2.put.seoul.games.{{wildcard(1)}}\"",
            "\"m2.pub.live.*\": \"m2.eph.live.{{wildcard(1)}}\"",
            "service: \"m2.put.seoul.*.*\"",
        ] {
            assert!(text.contains(part), "{part} is missing in:\n{text}");
        }
        let rules = text
            .lines()
            .filter(|line| !line.trim_start().starts_with('#'));
        assert!(
            rules.clone().all(|line| !line.contains("natter.")),
            "{text}"
        );
    }
}
