//! nats-servers as a deployment has them, and natter on them.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use async_nats::{Client, ConnectOptions};
use natter::testing::{
    mesh::accounts,
    servers::{Process, Spec, free_port, free_port_from},
};
use serde_json::json;
use tempfile::TempDir;

use crate::support::{
    self, LONG, config, launcher,
    mesh::{SECRET, answers},
    mongodb_url, nats_with, natter_command,
};

/// The regions of the examples.
pub(super) const REGIONS: [&str; 3] = ["seoul", "frankfurt", "virginia"];
const USERS: [&str; 9] = [
    "edge",
    "history",
    "worker",
    "notifier",
    "mirrors",
    "provision",
    "operator",
    "admin",
    "sys",
];
/// Of the mesh that is started: each is a stream of three copies, in both regions.
pub(super) const PARTITIONS: u16 = 2;

pub(super) fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/nats")
}

/// What `natter.toml` of a region in deploy/ says about its accounts.
pub(super) fn example(region: &str, partitions: u16) -> natter::testing::config::Config {
    config(&format!(
        "region = '{region}'\nregions = {REGIONS:?}\n[nats]\npartitions = {partitions}"
    ))
}

pub(super) fn password(user: &str) -> String {
    format!("pw-of-{user}")
}

/// A nats-server with a file of deploy/nats.
pub(super) struct Server {
    /// Ends with it.
    pub(super) process: Process,
    pub(super) log: PathBuf,
    pub(super) client: u16,
    leaf: u16,
}

/// Ports of a server; each is free.
pub(super) struct Ports {
    pub(super) client: u16,
    pub(super) monitor: u16,
    pub(super) route: u16,
    pub(super) gateway: u16,
    pub(super) leaf: u16,
}

impl Ports {
    pub(super) fn free() -> Self {
        // Below those that outgoing connections get: servers are told of each other's ports before they have them.
        let port =
            || free_port_from([127, 0, 0, 1].into(), rand::random_range(10_000..30_000)).unwrap();
        Self {
            client: port(),
            monitor: port(),
            route: port(),
            gateway: port(),
            leaf: port(),
        }
    }
}

/// What differs from what is in deploy/nats.
pub(super) struct Setting<'a> {
    pub(super) dir: &'a Path,
    pub(super) name: &'a str,
    pub(super) file: &'a str,
    pub(super) accounts: String,
    pub(super) ports: &'a Ports,
    pub(super) env: Vec<(&'a str, String)>,
    /// The folder of its certificate.
    pub(super) tls: PathBuf,
    /// Addresses by the names in `gateways.conf`.
    pub(super) gateways: Vec<(String, u16)>,
}

/// Copies the configuration with ports, folders and addresses of this machine, and starts the server.
pub(super) async fn start(setting: Setting<'_>) -> Server {
    let place = setting.dir.join(setting.name);
    let home = place.join("conf");
    fs::create_dir_all(home.join("parts")).unwrap();
    let ports = setting.ports;
    let mut replaced = vec![
        (
            "0.0.0.0:4222".to_owned(),
            format!("127.0.0.1:{}", ports.client),
        ),
        (
            "127.0.0.1:4222".to_owned(),
            format!("127.0.0.1:{}", ports.client),
        ),
        (
            "0.0.0.0:8222".to_owned(),
            format!("127.0.0.1:{}", ports.monitor),
        ),
        (
            "0.0.0.0:6222".to_owned(),
            format!("127.0.0.1:{}", ports.route),
        ),
        (
            "0.0.0.0:7222".to_owned(),
            format!("127.0.0.1:{}", ports.gateway),
        ),
        (
            "0.0.0.0:7422".to_owned(),
            format!("127.0.0.1:{}", ports.leaf),
        ),
        (
            "/etc/nats/tls".to_owned(),
            setting.tls.display().to_string(),
        ),
        ("/data/".to_owned(), format!("{}/", home.display())),
    ];
    for (name, port) in &setting.gateways {
        replaced.push((format!("{name}:7222"), format!("127.0.0.1:{port}")));
    }
    for folder in ["", "parts"] {
        for entry in fs::read_dir(deploy().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "conf") {
                continue;
            }
            let mut text = fs::read_to_string(&path).unwrap();
            for (from, to) in &replaced {
                text = text.replace(from, to);
            }
            fs::write(home.join(folder).join(path.file_name().unwrap()), text).unwrap();
        }
    }
    fs::write(place.join("accounts.conf"), &setting.accounts).unwrap();
    let log = place.join("log");
    let monitor = SocketAddr::from(([127, 0, 0, 1], ports.monitor));
    let passwords = USERS.iter().chain(["leaf"].iter()).map(|user| {
        let key = format!("NATTER_{}_PASSWORD", user.to_uppercase());
        (key, password(user))
    });
    let env = setting
        .env
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value));
    let conf = home.join(setting.file);
    let spec = Spec {
        env: passwords.chain(env).collect(),
        log: log.clone(),
        ..nats_with(setting.name, &conf, answers(monitor, "/healthz")).await
    };
    let mut process = Process::new(launcher(), spec);
    process.start().await.unwrap();
    Server {
        process,
        log,
        client: ports.client,
        leaf: ports.leaf,
    }
}

/// natter on such servers.
#[derive(Clone)]
pub(super) struct Natter<'a> {
    pub(super) dir: &'a Path,
    pub(super) region: &'a str,
    pub(super) url: String,
    pub(super) replicas: u8,
    pub(super) partitions: u16,
    /// All of the mesh.
    pub(super) regions: &'a [&'a str],
    /// CA of the servers.
    pub(super) ca: Option<PathBuf>,
    pub(super) database: String,
    /// Where its servers take leaf nodes: for whoever helps mirrors on.
    pub(super) leafnodes: String,
    /// `workers` of the configuration.
    pub(super) workers: String,
    /// Further keys of the configuration.
    pub(super) keys: Vec<(&'static str, String)>,
}

impl Natter<'_> {
    fn environment(&self, user: &str) -> Vec<(String, String)> {
        let mut env = vec![
            ("NATTER__REGION", self.region.to_owned()),
            ("NATTER__REGIONS", json!(self.regions).to_string()),
            ("NATTER__NATS__URL", self.url.clone()),
            ("NATTER__NATS__USER", user.to_owned()),
            ("NATTER__NATS__PASSWORD", password(user)),
            ("NATTER__NATS__PARTITIONS", self.partitions.to_string()),
            ("NATTER__STREAMS__REPLICAS", self.replicas.to_string()),
            ("NATTER__MONGODB__URL", mongodb_url().to_owned()),
            ("NATTER__MONGODB__DATABASE", self.database.clone()),
            ("NATTER__PRESENCE__LEASE", "3s".to_owned()),
            ("NATTER__AUTH__HS256_SECRET", SECRET.to_owned()),
        ];
        // Not for edges, as in deploy/.
        if user != "edge" && !self.leafnodes.is_empty() {
            env.extend([
                ("NATTER__MIRRORS__LEAFNODES", self.leafnodes.clone()),
                ("NATTER__MIRRORS__USER", "mirrors".to_owned()),
                ("NATTER__MIRRORS__PASSWORD", password("mirrors")),
            ]);
        }
        if !self.workers.is_empty() {
            env.push(("NATTER__WORKERS", self.workers.clone()));
        }
        env.extend(self.keys.iter().cloned());
        if let Some(ca) = &self.ca {
            env.push(("SSL_CERT_FILE", ca.display().to_string()));
        }
        let owned = |(key, value): (&str, String)| (key.to_owned(), value);
        env.into_iter().map(owned).collect()
    }

    /// Runs a tool to its end; what it said.
    pub(super) async fn tool(&self, user: &str, arguments: &[&str]) -> String {
        self.try_tool(user, arguments).await.unwrap()
    }

    /// The same, with all that it said where it fails.
    pub(super) async fn try_tool(&self, user: &str, arguments: &[&str]) -> Result<String, String> {
        self.try_tool_with(user, arguments, &[]).await
    }

    /// The same, with more in its environment.
    pub(super) async fn try_tool_with(
        &self,
        user: &str,
        arguments: &[&str],
        more: &[(&str, &str)],
    ) -> Result<String, String> {
        let mut command = natter_command(self.dir).await;
        command.args(arguments).envs(self.environment(user));
        command.envs(more.iter().copied());
        let output = tokio::task::spawn_blocking(move || command.output());
        let output = output.await.unwrap().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            Ok(said)
        } else {
            Err(format!("{arguments:?}: {said}{errors}"))
        }
    }

    /// Starts an edge, a history service, workers, hooks or a notifier, and waits until it is ready.
    pub(super) async fn start(&self, role: &str, name: &str) -> (Process, SocketAddr) {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
        // Hooks have the user of workers.
        let mut env = self.environment(match role {
            "hooks" => "worker",
            role => role,
        });
        let table = match role {
            "notifier" => "PUSH".to_owned(),
            "hooks" => "HOOK".to_owned(),
            role => role.to_uppercase(),
        };
        let listen = format!("NATTER__{table}__LISTEN");
        env.push((listen, address.to_string()));
        let spec = Spec {
            name: name.to_owned(),
            program: support::natter(),
            args: vec![role.into()],
            env,
            log: self.dir.join(format!("{name}.log")),
            ready: answers(address, "/readyz"),
            alive: Arc::new(|_pid| Box::pin(async { Ok(()) })),
            ready_within: LONG,
            stop_within: LONG,
        };
        let mut process = Process::new(launcher(), spec);
        process.start().await.unwrap();
        (process, address)
    }
}

/// A client of a user, below whose inbox the answers come.
pub(super) async fn client(url: &str, user: &str, ca: Option<&Path>) -> Client {
    let mut options = ConnectOptions::new()
        .user_and_password(user.to_owned(), password(user))
        .custom_inbox_prefix(format!("_INBOX.{user}"));
    if let Some(ca) = ca {
        options = options.add_root_certificates(ca.to_owned());
    }
    options.connect(url).await.unwrap()
}

/// What the servers complained about: users who may not do what they tried.
pub(super) fn violations(servers: &[Server]) -> Vec<String> {
    let logs = servers
        .iter()
        .map(|server| fs::read_to_string(&server.log).unwrap());
    let logs: String = logs.collect();
    let lines = logs.lines().filter(|line| line.contains("Violation"));
    lines.map(str::to_owned).collect()
}

/// The servers of some regions and their spines, with TLS and one certificate a server.
pub(super) struct Mesh {
    pub(super) dir: TempDir,
    /// Of each region, the spine last.
    pub(super) regions: Vec<Vec<Server>>,
    file: &'static str,
}

impl Mesh {
    /// Regions with three servers each.
    pub(super) async fn of_three(regions: &[&str]) -> Self {
        Self::start(regions, "three-of-mesh.conf", 3).await
    }

    /// Regions with one server each, which has no TLS for clients.
    pub(super) async fn of_one(regions: &[&str]) -> Self {
        Self::start(regions, "one-of-mesh.conf", 1).await
    }

    async fn start(regions: &[&str], file: &'static str, servers: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let certs = dir.path().join("certs");
        let names: Vec<String> = regions
            .iter()
            .flat_map(|region| {
                let servers = (0..servers).map(move |n| format!("nats-{region}-{n}"));
                servers.chain([format!("spine-{region}")])
            })
            .collect();
        let made = Command::new(deploy().join("make-certs"))
            .arg(&certs)
            .args(&names)
            .output();
        let made = made.expect("bash and openssl");
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let spines: Vec<(String, Ports)> = regions
            .iter()
            .map(|region| (format!("spine-{region}"), Ports::free()))
            .collect();
        let gateways: Vec<(String, u16)> = spines
            .iter()
            .map(|(name, ports)| (name.clone(), ports.gateway))
            .collect();
        let mut of_all = Vec::new();
        for (region, (spine, spine_ports)) in regions.iter().zip(&spines) {
            let all: Vec<Ports> = (0..servers).map(|_| Ports::free()).collect();
            let routes: Vec<String> = all
                .iter()
                .map(|ports| format!("nats-route://127.0.0.1:{}", ports.route))
                .collect();
            let routes = format!("[{}]", routes.join(","));
            let leaf = format!(
                "[\"tls://leaf:{}@127.0.0.1:{}\"]",
                password("leaf"),
                spine_ports.leaf
            );
            let names: Vec<String> = (0..servers).map(|n| format!("nats-{region}-{n}")).collect();
            let starts = names.iter().zip(&all).map(|(name, ports)| {
                start(Setting {
                    dir: dir.path(),
                    name,
                    file,
                    accounts: accounts(&example(region, PARTITIONS)),
                    ports,
                    env: vec![
                        ("SERVER_NAME", name.clone()),
                        ("REGION", (*region).to_owned()),
                        ("ROUTES", routes.clone()),
                        ("SPINE", leaf.clone()),
                    ],
                    tls: certs.join(name),
                    gateways: Vec::new(),
                })
            });
            let setting = Setting {
                dir: dir.path(),
                name: spine,
                file: "spine.conf",
                accounts: String::new(),
                ports: spine_ports,
                env: vec![("SPINE_NAME", spine.clone())],
                tls: certs.join(spine),
                gateways: gateways.clone(),
            };
            // A server of three is healthy only with the others.
            let (mut servers, spine) =
                tokio::join!(futures_util::future::join_all(starts), start(setting));
            servers.push(spine);
            of_all.push(servers);
        }
        Self {
            dir,
            regions: of_all,
            file,
        }
    }

    /// Without the spine.
    fn servers(&self, region: usize) -> &[Server] {
        let (_spine, servers) = self.regions[region].split_last().unwrap();
        servers
    }

    pub(super) fn ca(&self) -> PathBuf {
        self.dir.path().join("certs/ca.crt")
    }

    pub(super) fn url(&self, region: usize) -> String {
        let scheme = if self.file.starts_with("three") {
            "tls"
        } else {
            "nats"
        };
        let servers = self.servers(region).iter();
        let urls: Vec<String> = servers
            .map(|server| format!("{scheme}://127.0.0.1:{}", server.client))
            .collect();
        urls.join(",")
    }

    /// Where the region's servers take leaf nodes.
    pub(super) fn leafnodes(&self, region: usize) -> String {
        let servers = self.servers(region).iter();
        let addresses: Vec<String> = servers
            .map(|server| format!("tls://127.0.0.1:{}", server.leaf))
            .collect();
        addresses.join(",")
    }
}
