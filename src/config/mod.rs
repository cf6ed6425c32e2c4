//! Configuration: embedded defaults, file, environment, flags; checked as a whole before anything starts.
//!
//! No other module reads the environment. Secrets print as `***`.

mod hooks;
mod outbound;
mod push;
mod uploads;
mod value;
mod workers;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use bytesize::ByteSize;
use figment::{
    Figment, Provider,
    providers::{Env, Format, Toml},
};
use serde::{Deserialize, Serialize};

pub use hooks::{Hook, HookEvent, HookService, MAX_HOOKS};
pub use outbound::{Network, SigningSecrets};
pub use push::{PUBLIC_KEY_BYTES, Push, PushContent, Quiet};
pub use uploads::{Storage as UploadStorage, Uploads};
pub use value::Secret;
pub use workers::{MAX_WORKERS, Worker, WorkerKind, WorkerService};

use crate::model::{MAX_JSON_DEPTH, MAX_REGIONS, Region, is_token};

/// The commented defaults, as shipped in `config/default.toml`.
pub const DEFAULT_TOML: &str = include_str!("../../config/default.toml");

/// Largest timeout of a durable publish: clients are promised an answer within 5 s.
const MAX_PUBLISH_TIMEOUT: Duration = Duration::from_millis(4900);

/// Shortest lease of an edge.
const MIN_LEASE: Duration = Duration::from_secs(3);

/// Maximum number of rooms of one `unread`.
const MAX_UNREAD_ROOMS: usize = 1000;

/// Most named members of a room: its record is one value of a bucket, with at most twice as many entries.
const MAX_ROOM_MEMBERS: usize = 2000;

/// Maximum number of messages of one batch for MongoDB (its own limit of operations in one command).
const MAX_BATCH: usize = 100_000;

/// Shortest time after which a message may be redelivered to another worker.
const MIN_ACK_WAIT: Duration = Duration::from_secs(3);

/// Longest name of a database (MongoDB's own limit).
const MAX_DATABASE: usize = 63;

/// Shortest HS256 secret, in bytes (RFC 7518 section 3.2: as long as the hash).
const MIN_SECRET: usize = 32;

/// Shortest key of the server API, in bytes.
const MIN_API_KEY: usize = 16;

/// The rights that `everybody` of a namespace may have.
pub const RIGHTS: [&str; 5] = ["read", "write", "presence", "history", "moderate"];

/// Shortest password of STOMP's fixed login, in bytes.
const MIN_PASSCODE: usize = 16;

/// All settings of a process. `config/default.toml` gives the meaning, unit and default of every key.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub region: String,
    pub regions: Vec<String>,
    pub nats: Nats,
    pub mirrors: Mirrors,
    pub streams: Streams,
    pub mongodb: Mongodb,
    pub history: History,
    pub servers: Servers,
    pub doctor: Doctor,
    pub edge: Edge,
    pub http: Http,
    pub auth: Auth,
    pub centrifugal: Centrifugal,
    pub stomp: Stomp,
    pub limits: Limits,
    pub rooms: Rooms,
    pub presence: Presence,
    pub uploads: Uploads,
    pub worker: WorkerService,
    pub hook: HookService,
    /// Boxed: few processes need it, and all carry their configuration around.
    pub push: Box<Push>,
    pub telemetry: Telemetry,
    pub namespaces: BTreeMap<String, Namespace>,
    #[serde(default)]
    pub workers: Vec<Worker>,
    #[serde(default)]
    pub hooks: Vec<Hook>,
}

/// `[nats]`: the connection to the region's cluster.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Nats {
    pub url: String,
    pub user: String,
    pub password: Secret,
    pub password_file: PathBuf,
    pub creds_file: PathBuf,
    pub prefix: String,
    pub partitions: u16,
    #[serde(with = "humantime_serde")]
    pub publish_timeout: Duration,
    #[serde(with = "humantime_serde")]
    pub read_timeout: Duration,
    pub replay_concurrency: usize,
    pub subscription_capacity: usize,
}

/// `[mirrors]`: how stalled mirrors are restarted after a cut.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Mirrors {
    pub leafnodes: String,
    pub user: String,
    pub password: Secret,
    pub password_file: PathBuf,
}

/// `[streams]`: what `natter provision` creates.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Streams {
    pub replicas: usize,
    #[serde(with = "humantime_serde")]
    pub max_age: Duration,
    pub max_bytes: ByteSize,
    pub max_msgs_per_room: u64,
    #[serde(with = "humantime_serde")]
    pub duplicate_window: Duration,
}

/// `[mongodb]`: the database of the history.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Mongodb {
    pub url: Secret,
    pub url_file: PathBuf,
    pub database: String,
    #[serde(with = "humantime_serde")]
    pub read_timeout: Duration,
    #[serde(with = "humantime_serde")]
    pub write_timeout: Duration,
}

/// `[history]`: the service that writes to MongoDB and reads from it.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct History {
    pub listen: SocketAddr,
    pub batch_messages: usize,
    pub batch_bytes: ByteSize,
    #[serde(with = "humantime_serde")]
    pub batch_wait: Duration,
    #[serde(with = "humantime_serde")]
    pub ack_wait: Duration,
    pub max_deliver: u32,
    #[serde(with = "humantime_serde")]
    pub ask_timeout: Duration,
    #[serde(with = "humantime_serde")]
    pub remember_erased: Duration,
}

/// `[servers]`: the programs that `natter up` runs.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Servers {
    pub nats_server: PathBuf,
    pub mongod: PathBuf,
}

/// `[doctor]`: the user and the servers with which `natter doctor` examines the servers themselves.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Doctor {
    pub sys_url: String,
    pub sys_user: String,
    pub sys_password: Secret,
    pub sys_password_file: PathBuf,
}

/// `[edge]`: the process that holds sessions.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Edge {
    pub id: String,
    pub listen: SocketAddr,
    pub shards: usize,
    #[serde(with = "humantime_serde")]
    pub drain_spread: Duration,
    #[serde(with = "humantime_serde")]
    pub drain_timeout: Duration,
    pub web_page: bool,
}

/// `[http]`: connections of edges and history services.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    #[serde(with = "humantime_serde")]
    pub keep_alive: Duration,
    #[serde(with = "humantime_serde")]
    pub header_timeout: Duration,
    #[serde(with = "humantime_serde")]
    pub body_timeout: Duration,
}

/// `[auth]`: which tokens are accepted.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Auth {
    pub hs256_secret: Secret,
    pub hs256_secret_file: PathBuf,
    pub public_key_file: PathBuf,
    pub issuer: String,
    pub audience: String,
    #[serde(with = "humantime_serde")]
    pub leeway: Duration,
    #[serde(with = "humantime_serde")]
    pub first_frame_timeout: Duration,
    #[serde(with = "humantime_serde")]
    pub ticket_ttl: Duration,
}

/// `[centrifugal]`: clients of Centrifugo's protocol.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Centrifugal {
    pub hs256_secret: Secret,
    pub hs256_secret_file: PathBuf,
    pub default_namespace: String,
    pub anonymous: bool,
    pub api_key: Secret,
    pub api_key_file: PathBuf,
}

/// `[stomp]`: clients of STOMP.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Stomp {
    pub login: String,
    pub passcode: Secret,
    pub passcode_file: PathBuf,
    pub default_namespace: String,
}

/// `[limits]`: what one session may use.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    pub body: ByteSize,
    pub json_depth: usize,
    pub frame: ByteSize,
    pub outbox: ByteSize,
    #[serde(with = "humantime_serde")]
    pub outbox_stall: Duration,
    pub rooms_per_session: usize,
    pub commands_per_second: u32,
    pub commands_burst: u32,
    pub sessions_per_user: usize,
    pub sessions_per_ip: usize,
    pub bad_logins_per_second: u32,
    pub presence_push_max: usize,
    pub read_push_max: usize,
    pub room_members: usize,
    pub unread_rooms: usize,
    pub unread_cap: u64,
}

/// `[rooms]`: hubs and replay.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Rooms {
    pub ring: ByteSize,
    pub ring_memory: ByteSize,
    pub replay_max: u64,
    pub replay_max_bytes: ByteSize,
    pub replay_memory: ByteSize,
    #[serde(with = "humantime_serde")]
    pub join_timeout: Duration,
    #[serde(with = "humantime_serde")]
    pub idle: Duration,
    #[serde(with = "humantime_serde")]
    pub resync: Duration,
    #[serde(with = "humantime_serde")]
    pub causal_wait: Duration,
    pub causal_max: usize,
}

/// `[presence]`: leases of edges, and how fast edges write presence.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Presence {
    #[serde(with = "humantime_serde")]
    pub lease: Duration,
    pub writes_per_second: u32,
    pub users: bool,
}

impl Mirrors {
    /// The addresses of `leafnodes`, one by one.
    pub fn leafnodes(&self) -> impl Iterator<Item = &str> {
        let addresses = self.leafnodes.split(',').map(str::trim);
        addresses.filter(|_| !self.leafnodes.is_empty())
    }
}

/// What is shown of the users in the rooms of a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PresencePolicy {
    /// Their names.
    #[default]
    Users,
    /// Only their number.
    Counts,
    /// Nothing.
    Off,
}

/// `[telemetry]`: logs, metrics, traces.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Telemetry {
    pub log_format: LogFormat,
    pub log: String,
    pub otlp_endpoint: String,
    #[serde(with = "humantime_serde")]
    pub otlp_interval: Duration,
}

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Human,
    Json,
}

/// `[namespaces.<name>]`: the policy of a set of rooms.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Namespace {
    pub durable: bool,
    pub typing: bool,
    #[serde(default)]
    pub history: bool,
    /// How long the history service keeps a message in MongoDB; 0: for ever.
    #[serde(default, with = "humantime_serde")]
    pub history_keep: Duration,
    #[serde(default)]
    pub presence: PresencePolicy,
    #[serde(default)]
    pub everybody: Vec<String>,
    /// In place of [`Rooms::replay_max`]; 0: that one.
    #[serde(default)]
    pub replay_max: u64,
    #[serde(default)]
    pub access: Access,
    #[serde(default)]
    pub create: Create,
}

/// Who is let into the rooms of a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// Whoever has a grant.
    #[default]
    Grants,
    /// Members, as far as their grants go.
    Members,
}

/// Who makes rooms of a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Create {
    /// Those who have the right `manage`.
    #[default]
    Manage,
    /// Also users: direct rooms with themselves in them.
    Members,
}

/// The configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A source can't be read or does not have the right shape.
    #[error("configuration: {0}")]
    Source(Box<figment::Error>),
    /// A file named by a key can't be read.
    #[error("configuration: {key} = {}: can't be read", path.display())]
    File {
        key: String,
        path: PathBuf,
        source: std::io::Error,
    },
    /// Values break rules; lists all of them, one per line.
    #[error("configuration:\n  {}", .0.join("\n  "))]
    Invalid(Vec<String>),
}

impl Config {
    /// How many messages a join of a room of this namespace replays at most.
    #[must_use]
    pub fn replay_max(&self, namespace: &str) -> u64 {
        let own = self.namespaces.get(namespace).map(|its| its.replay_max);
        own.filter(|own| *own > 0).unwrap_or(self.rooms.replay_max)
    }

    /// The namespaces whose history is kept for a time only, with that time.
    pub fn kept_for_a_time(&self) -> impl Iterator<Item = (&str, Duration)> {
        let namespaces = self.namespaces.iter();
        let keep = namespaces.map(|(name, its)| (name.as_str(), its.history_keep));
        keep.filter(|(_, keep)| !keep.is_zero())
    }

    /// Reads the defaults, `file` if given, the environment and `overrides` (flags), and checks the result.
    ///
    /// # Errors
    /// [`ConfigError`] with every broken rule.
    pub fn load(file: Option<&Path>, overrides: impl Provider) -> Result<Self, ConfigError> {
        let mut figment = Figment::from(Toml::string(DEFAULT_TOML));
        if let Some(file) = file {
            if let Err(source) = fs::metadata(file) {
                return Err(ConfigError::File {
                    key: "--config".to_owned(),
                    path: file.to_owned(),
                    source,
                });
            }
            figment = figment.merge(Toml::file_exact(file));
        }
        Self::from_figment(
            &figment
                .merge(Env::prefixed("NATTER__").split("__"))
                .merge(overrides),
        )
    }

    /// The defaults with `overrides`, without the environment: for tests and tools.
    ///
    /// # Errors
    /// [`ConfigError`] with every broken rule.
    pub fn with_defaults(overrides: impl Provider) -> Result<Self, ConfigError> {
        Self::from_figment(&Figment::from(Toml::string(DEFAULT_TOML)).merge(overrides))
    }

    fn from_figment(figment: &Figment) -> Result<Self, ConfigError> {
        let mut config: Self = figment
            .extract()
            .map_err(|e| ConfigError::Source(Box::new(e)))?;
        config
            .nats
            .password
            .read_file("nats.password_file", &config.nats.password_file)?;
        config
            .mirrors
            .password
            .read_file("mirrors.password_file", &config.mirrors.password_file)?;
        config
            .doctor
            .sys_password
            .read_file("doctor.sys_password_file", &config.doctor.sys_password_file)?;
        config
            .auth
            .hs256_secret
            .read_file("auth.hs256_secret_file", &config.auth.hs256_secret_file)?;
        config
            .stomp
            .passcode
            .read_file("stomp.passcode_file", &config.stomp.passcode_file)?;
        let file = &config.centrifugal.hs256_secret_file;
        config
            .centrifugal
            .hs256_secret
            .read_file("centrifugal.hs256_secret_file", file)?;
        let file = &config.centrifugal.api_key_file;
        config
            .centrifugal
            .api_key
            .read_file("centrifugal.api_key_file", file)?;
        config
            .mongodb
            .url
            .read_file("mongodb.url_file", &config.mongodb.url_file)?;
        config.uploads.read_files()?;
        for worker in &mut config.workers {
            worker.read_files()?;
        }
        for hook in &mut config.hooks {
            hook.read_files()?;
        }
        config.push.read_files()?;
        let faults = config.faults();
        if faults.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError::Invalid(faults))
        }
    }

    /// The number of shards of an edge: one for each core, unless `edge.shards` says otherwise.
    #[must_use]
    pub fn shards(&self) -> usize {
        match self.edge.shards {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            count => count,
        }
    }

    /// The region, validated.
    #[must_use]
    pub fn region(&self) -> Region {
        Region::parse(&self.region).expect("validated when the configuration was loaded")
    }

    /// All regions of the mesh, validated: `regions`, or only the own region if that is empty.
    #[must_use]
    pub fn regions(&self) -> BTreeSet<Region> {
        let named = self.regions.iter().filter_map(|name| Region::parse(name));
        named.chain([self.region()]).collect()
    }

    /// `[nats]` for the connection that restarts mirrors: with the user of `[mirrors]`, if that is set.
    #[must_use]
    pub fn nats_of_mirrors(&self) -> Nats {
        let mut nats = self.nats.clone();
        if !self.mirrors.user.is_empty() {
            nats.user.clone_from(&self.mirrors.user);
            nats.password = self.mirrors.password.clone();
            nats.creds_file.clear();
        }
        nats
    }

    /// Every broken rule, as `key = value: rule, and why`.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut check = |ok: bool, fault: String| {
            if !ok {
                faults.push(fault);
            }
        };
        check(
            Region::parse(&self.region).is_some(),
            format!(
                "region = {:?}: must match [a-z0-9-]{{1,32}}, cursors contain it",
                self.region
            ),
        );
        for (index, name) in self.regions.iter().enumerate() {
            check(
                Region::parse(name).is_some(),
                format!("regions: {name:?} must match [a-z0-9-]{{1,32}}, cursors contain it"),
            );
            check(
                self.regions.iter().position(|other| other == name) == Some(index),
                format!("regions: {name:?} is named twice"),
            );
        }
        check(
            self.regions.is_empty() || self.regions.contains(&self.region),
            format!(
                "regions = {:?}: must be empty or contain region = {:?}",
                self.regions, self.region
            ),
        );
        check(
            self.regions.len() <= MAX_REGIONS,
            format!(
                "regions: {} of them, at most {MAX_REGIONS}, the limit of a cursor",
                self.regions.len()
            ),
        );
        let nats = &self.nats;
        check(
            is_token(&nats.prefix),
            format!(
                "nats.prefix = {:?}: must match [A-Za-z0-9_-]{{1,64}}, it is a subject token",
                nats.prefix
            ),
        );
        check(
            (1..=1024).contains(&nats.partitions),
            format!(
                "nats.partitions = {}: must be 1 to 1024, each is a stream",
                nats.partitions
            ),
        );
        check(
            nats.publish_timeout <= MAX_PUBLISH_TIMEOUT && !nats.publish_timeout.is_zero(),
            format!(
                "nats.publish_timeout = {:?}: must be above 0 and at most {MAX_PUBLISH_TIMEOUT:?}, clients are promised an answer within 5 s",
                nats.publish_timeout
            ),
        );
        check(
            !nats.read_timeout.is_zero(),
            "nats.read_timeout = 0s: must be above 0, or every read fails".to_owned(),
        );
        check(
            (1..=64).contains(&nats.replay_concurrency),
            format!(
                "nats.replay_concurrency = {}: must be 1 to 64, the server answers them one by one",
                nats.replay_concurrency
            ),
        );
        check(
            (1024..=1_048_576).contains(&nats.subscription_capacity),
            format!(
                "nats.subscription_capacity = {}: must be 1024 to 1048576",
                nats.subscription_capacity
            ),
        );
        check(
            nats.user.is_empty() || nats.creds_file.as_os_str().is_empty(),
            "nats.user and nats.creds_file: only one of them can be used".to_owned(),
        );
        let host_and_port = |address: &str| {
            let address = address.strip_prefix("tls://").unwrap_or(address);
            let parts = address.rsplit_once(':');
            parts.is_some_and(|(host, port)| {
                !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok()
            })
        };
        let mirrors = &self.mirrors;
        check(
            mirrors.leafnodes.is_empty() || mirrors.leafnodes().all(host_and_port),
            format!(
                "mirrors.leafnodes = {:?}: must be empty or host:port or tls://host:port, comma-separated",
                mirrors.leafnodes
            ),
        );
        check(
            (1..=5).contains(&self.streams.replicas),
            format!(
                "streams.replicas = {}: must be 1 to 5, the limit of NATS",
                self.streams.replicas
            ),
        );
        check(
            !self.streams.duplicate_window.is_zero(),
            "streams.duplicate_window = 0s: must be above 0, or a retried publish is shown twice"
                .to_owned(),
        );
        check(
            self.streams.max_age.is_zero() || self.streams.max_age >= self.streams.duplicate_window,
            format!(
                "streams.max_age = {:?}: must be 0 or at least streams.duplicate_window = {:?}, NATS refuses less",
                self.streams.max_age, self.streams.duplicate_window
            ),
        );
        let most = self.streams.max_msgs_per_room;
        let of_namespaces = self.namespaces.iter();
        let of_namespaces = of_namespaces
            .map(|(name, its)| (format!("namespaces.{name}.replay_max"), its.replay_max));
        let of_all = [("rooms.replay_max".to_owned(), self.rooms.replay_max)];
        for (key, replay_max) in of_all.into_iter().chain(of_namespaces) {
            check(
                most == 0 || most > replay_max,
                format!(
                    "streams.max_msgs_per_room = {most}: must be 0 or more than {key} = {replay_max}, or a trimmed room looks like a quiet one",
                ),
            );
        }
        check(
            self.edge.id.is_empty() || is_token(&self.edge.id),
            format!(
                "edge.id = {:?}: must match [A-Za-z0-9_-]{{1,64}}",
                self.edge.id
            ),
        );
        check(
            self.edge.drain_spread < self.edge.drain_timeout,
            format!(
                "edge.drain_spread = {:?}: must be less than edge.drain_timeout = {:?}",
                self.edge.drain_spread, self.edge.drain_timeout
            ),
        );
        for (key, secret) in [
            ("auth", &self.auth.hs256_secret),
            ("centrifugal", &self.centrifugal.hs256_secret),
        ] {
            let bytes = secret.expose().len();
            check(
                bytes == 0 || bytes >= MIN_SECRET,
                format!("{key}.hs256_secret = ***: {bytes} bytes, must be at least {MIN_SECRET}"),
            );
        }
        let key = self.centrifugal.api_key.expose();
        let bytes = key.len();
        check(
            bytes == 0 || bytes >= MIN_API_KEY,
            format!("centrifugal.api_key = ***: {bytes} bytes, must be at least {MIN_API_KEY}"),
        );
        check(
            key.bytes().all(|byte| byte.is_ascii_graphic()),
            "centrifugal.api_key = ***: must be ASCII without spaces, or no header can have it"
                .to_owned(),
        );
        for (key, default) in [
            ("centrifugal", &self.centrifugal.default_namespace),
            ("stomp", &self.stomp.default_namespace),
        ] {
            check(
                default.is_empty() || self.namespaces.contains_key(default),
                format!("{key}.default_namespace = {default:?}: there is no such namespace"),
            );
        }
        let secrets = (&self.auth.hs256_secret, &self.centrifugal.hs256_secret);
        check(
            secrets.0.expose().is_empty() || !secrets.0.is(secrets.1.expose()),
            "centrifugal.hs256_secret = ***: must not be auth.hs256_secret, whose tokens are checked in another way"
                .to_owned(),
        );
        let login = &self.stomp.login;
        check(
            !login.contains(char::is_control) && login.trim() == login && !login.starts_with('$'),
            format!("stomp.login = {login:?}: must be a user name without spaces around it"),
        );
        let passcode = self.stomp.passcode.expose();
        check(
            !passcode.contains(char::is_control) && passcode.trim() == passcode,
            "stomp.passcode = ***: must not have spaces around it, or control characters"
                .to_owned(),
        );
        let passcode = passcode.len();
        check(
            self.stomp.login.is_empty() || passcode >= MIN_PASSCODE,
            format!("stomp.passcode = ***: {passcode} bytes, must be at least {MIN_PASSCODE}"),
        );
        for (name, namespace) in &self.namespaces {
            for right in &namespace.everybody {
                check(
                    RIGHTS.contains(&&**right),
                    format!("namespaces.{name}.everybody: {right:?} is not one of {RIGHTS:?}"),
                );
            }
        }
        check(
            self.presence.lease >= MIN_LEASE,
            format!(
                "presence.lease = {:?}: must be at least {MIN_LEASE:?}, it is renewed every third of that and NATS counts in seconds",
                self.presence.lease
            ),
        );
        let history = &self.history;
        check(
            (1..=MAX_BATCH).contains(&history.batch_messages),
            format!(
                "history.batch_messages = {}: must be 1 to {MAX_BATCH}, the limit of MongoDB",
                history.batch_messages
            ),
        );
        check(
            history.ack_wait >= MIN_ACK_WAIT,
            format!(
                "history.ack_wait = {:?}: must be at least {MIN_ACK_WAIT:?}, it is renewed every third of that",
                history.ack_wait
            ),
        );
        check(
            is_token(&self.mongodb.database) && self.mongodb.database.len() <= MAX_DATABASE,
            format!(
                "mongodb.database = {:?}: must match [A-Za-z0-9_-]{{1,{MAX_DATABASE}}}",
                self.mongodb.database
            ),
        );
        for (name, namespace) in &self.namespaces {
            check(
                namespace.durable || !namespace.history,
                format!("namespaces.{name}.history = true: only a durable namespace has a history"),
            );
            let (keep, max_age) = (namespace.history_keep, self.streams.max_age);
            check(
                keep.is_zero() || namespace.history,
                format!("namespaces.{name}.history_keep = {keep:?}: the namespace has no history"),
            );
            check(
                keep.is_zero() || (!max_age.is_zero() && keep > max_age),
                format!(
                    "namespaces.{name}.history_keep = {keep:?}: must be 0 or more than streams.max_age = {max_age:?}, or the streams still have what is removed"
                ),
            );
        }
        let limits = &self.limits;
        check(
            (1..=MAX_JSON_DEPTH).contains(&limits.json_depth),
            format!(
                "limits.json_depth = {}: must be 1 to {MAX_JSON_DEPTH}, many clients can't read deeper JSON",
                limits.json_depth
            ),
        );
        check(
            (1..=MAX_UNREAD_ROOMS).contains(&limits.unread_rooms),
            format!(
                "limits.unread_rooms = {}: must be 1 to {MAX_UNREAD_ROOMS}, the limit of one request to NATS",
                limits.unread_rooms
            ),
        );
        check(
            (1..=MAX_ROOM_MEMBERS).contains(&limits.room_members),
            format!(
                "limits.room_members = {}: must be 1 to {MAX_ROOM_MEMBERS}, they are all in one value of a bucket; larger rooms are open ones",
                limits.room_members
            ),
        );
        for (key, size, at_least) in [
            ("limits.body", limits.body, 1),
            ("limits.frame", limits.frame, limits.body.as_u64() + 4096),
            ("limits.outbox", limits.outbox, 16 * 1024),
            ("history.batch_bytes", history.batch_bytes, 1),
            (
                "rooms.replay_max_bytes",
                self.rooms.replay_max_bytes,
                limits.body.as_u64(),
            ),
            (
                "rooms.ring_memory",
                self.rooms.ring_memory,
                self.rooms.ring.as_u64(),
            ),
            (
                "rooms.replay_memory",
                self.rooms.replay_memory,
                self.rooms.replay_max_bytes.as_u64(),
            ),
        ] {
            check(
                size.as_u64() >= at_least && size.as_u64() <= 1 << 31,
                format!("{key} = {size}: must be {} to 2 GiB", ByteSize(at_least)),
            );
        }
        for (key, number) in [
            ("limits.rooms_per_session", limits.rooms_per_session as u64),
            (
                "limits.commands_per_second",
                u64::from(limits.commands_per_second),
            ),
            ("limits.commands_burst", u64::from(limits.commands_burst)),
            ("limits.unread_cap", limits.unread_cap),
            (
                "presence.writes_per_second",
                u64::from(self.presence.writes_per_second),
            ),
            ("history.max_deliver", u64::from(history.max_deliver)),
            ("rooms.replay_max", self.rooms.replay_max),
        ] {
            check(number > 0, format!("{key} = 0: must be at least 1"));
        }
        for (key, time) in [
            ("http.keep_alive", self.http.keep_alive),
            ("http.header_timeout", self.http.header_timeout),
            ("http.body_timeout", self.http.body_timeout),
            ("limits.outbox_stall", limits.outbox_stall),
            ("rooms.join_timeout", self.rooms.join_timeout),
            ("rooms.resync", self.rooms.resync),
            ("auth.first_frame_timeout", self.auth.first_frame_timeout),
            ("auth.ticket_ttl", self.auth.ticket_ttl),
            ("telemetry.otlp_interval", self.telemetry.otlp_interval),
            ("mongodb.read_timeout", self.mongodb.read_timeout),
            ("mongodb.write_timeout", self.mongodb.write_timeout),
            ("history.ask_timeout", history.ask_timeout),
        ] {
            check(!time.is_zero(), format!("{key} = 0s: must be above 0"));
        }
        check(
            history.remember_erased >= Duration::from_secs(3600),
            format!(
                "history.remember_erased = {:?}: must be at least 1h, or an erased message comes back",
                history.remember_erased
            ),
        );
        self.uploads.check(&mut check);
        workers::check(
            &self.workers,
            &self.uploads.scan,
            &self.namespaces,
            &mut check,
        );
        hooks::check(
            &self.hooks,
            &self.hook,
            &self.presence,
            &self.namespaces,
            &mut check,
        );
        self.push.check(&mut check);
        for name in self.namespaces.keys() {
            check(
                is_token(name),
                format!("namespaces.{name}: a namespace must match [A-Za-z0-9_-]{{1,64}}"),
            );
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(toml: &str) -> Result<Config, ConfigError> {
        Config::with_defaults(Toml::string(toml))
    }

    #[test]
    fn defaults_are_valid() {
        let config = load("").unwrap();
        assert_eq!(config.limits.body, ByteSize::kib(64));
        assert!(config.namespaces["chat"].durable && !config.namespaces["live"].durable);
    }

    #[test]
    fn every_fault_is_named_at_once() {
        let error = load(
            "region = 'Se oul'\n[nats]\nprefix = 'a.b'\npublish_timeout = '6s'\n[mirrors]\nleafnodes = 'nats-leaf://a:1, b'\n[limits]\nframe = '1KiB'\nroom_members = 2001\n[auth]\nhs256_secret = 'short'",
        )
        .unwrap_err()
        .to_string();
        for key in [
            "region",
            "nats.prefix",
            "nats.publish_timeout",
            "mirrors.leafnodes",
            "limits.frame",
            "limits.room_members = 2001: must be 1 to 2000",
            "auth.hs256_secret",
        ] {
            assert!(error.contains(key), "{key} is missing in: {error}");
        }
        assert!(!error.contains("short"), "a secret is printed: {error}");
    }

    #[test]
    fn mirrors_are_helped_on_as_their_own_user_or_as_that_of_nats() {
        let nats = "[nats]\ncreds_file = '/creds'\n";
        let same = load(nats).unwrap();
        assert_eq!(same.mirrors.leafnodes().count(), 0);
        assert_eq!(same.nats_of_mirrors().creds_file, same.nats.creds_file);
        let own = "[mirrors]\nleafnodes = 'a:1, tls://[::1]:2'\nuser = 'm'\npassword = 'secret'";
        let own = load(&format!("{nats}{own}")).unwrap();
        let addresses: Vec<_> = own.mirrors.leafnodes().collect();
        assert_eq!(addresses, ["a:1", "tls://[::1]:2"]);
        let nats = own.nats_of_mirrors();
        assert_eq!((&*nats.user, nats.password.expose()), ("m", "secret"));
        assert!(nats.creds_file.as_os_str().is_empty());
        assert!(!format!("{:?}", own.mirrors).contains("secret"));
    }

    #[test]
    fn regions_are_valid_distinct_and_contain_the_region() {
        let regions = |toml: &str| load(&format!("region = 'seoul'\n{toml}"));
        assert_eq!(regions("").unwrap().regions().len(), 1);
        let two = regions("regions = ['seoul', 'frankfurt']").unwrap();
        assert_eq!(two.regions().len(), 2);
        let many: Vec<_> = (0..33).map(|n| format!("'r{n}'")).collect();
        let many = format!("regions = ['seoul', {}]", many.join(", "));
        for (toml, told) in [
            ("regions = ['frankfurt']", "contain region = \"seoul\""),
            ("regions = ['seoul', 'seoul']", "\"seoul\" is named twice"),
            ("regions = ['seoul', 'F_1']", "\"F_1\" must match"),
            (&*many, "34 of them, at most 32"),
        ] {
            let error = regions(toml).unwrap_err().to_string();
            assert!(error.contains(told), "{toml}: {error}");
        }
    }

    #[test]
    fn nobody_may_act_as_others_without_a_token_and_a_short_key_opens_no_api() {
        let toml = "[namespaces.chat]\neverybody = ['admin']\n[centrifugal]\napi_key = 'too short'";
        let error = load(toml).unwrap_err().to_string();
        for told in [
            "chat.everybody: \"admin\"",
            "api_key = ***: 9 bytes",
            "ASCII",
        ] {
            assert!(error.contains(told), "{told} is missing in: {error}");
        }
        assert!(!error.contains("too short"), "a secret is printed: {error}");
    }

    #[test]
    fn a_namespace_may_replay_more_or_less() {
        let config = load("rooms.replay_max = 7\nnamespaces.chat.replay_max = 9").unwrap();
        let of = |name| config.replay_max(name);
        assert_eq!((of("chat"), of("live"), of("none")), (9, 7, 7));
        let trimmed =
            "streams.max_msgs_per_room = 8\nrooms.replay_max = 7\nnamespaces.chat.replay_max = 8";
        let error = load(trimmed).unwrap_err().to_string();
        assert!(error.contains("namespaces.chat.replay_max = 8"), "{error}");
    }

    #[test]
    fn unknown_keys_are_refused_by_name() {
        let error = load("[rooms]\nrign = '1KiB'").unwrap_err().to_string();
        assert!(error.contains("rign"), "{error}");
    }

    #[test]
    fn wrong_types_name_the_key() {
        let error = load("[limits]\nbody = 'much'").unwrap_err().to_string();
        assert!(error.contains("body"), "{error}");
    }
}
