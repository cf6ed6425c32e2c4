//! Edges as processes on a nats-server, for tests that connect to them, kill them and start them again.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use natter::testing::{
    auth::{Claims, Grant, Right, issue},
    client::{Connection, Endpoint},
    config::Config,
    mesh::provision::{self, Options, connect, provision},
    runtime::unix_s,
    servers::{Check, Process, Spec, free_port},
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{LONG, config, launcher, natter, unique};

/// Secret of the tokens of all tests.
pub(crate) const SECRET: &str = "a secret of the tests, long enough for HS256";

/// Some edges of one region, provisioned, with the nats-server of somebody else.
pub(crate) struct Mesh {
    pub(crate) config: Config,
    pub(crate) edges: Vec<Edge>,
    /// History services.
    pub(crate) workers: Vec<Edge>,
    dir: TempDir,
}

/// An edge process, or one of the history service. Its address stays the same over restarts.
pub(crate) struct Edge {
    pub(crate) address: SocketAddr,
    pub(crate) process: Process,
}

impl Mesh {
    /// Provisions a region of its own on the nats-server at `nats_url`, and starts `edges` edges with `toml` on top of the
    /// defaults. The prefix is of its own too, unless `toml` names one.
    pub(crate) async fn start(nats_url: &str, edges: usize, toml: &str) -> Self {
        let mut mesh = Self::without_edges(nats_url, toml).await;
        for _ in 0..edges {
            mesh.add_edge().await;
        }
        mesh
    }

    /// As [`Self::start`], with the edges still to be added.
    pub(crate) async fn without_edges(nats_url: &str, toml: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let name = unique("m");
        let mut values: toml::Table = toml.parse().unwrap();
        values.entry("region").or_insert(name.clone().into());
        let nats = values.entry("nats").or_insert(toml::Table::new().into());
        let nats = nats.as_table_mut().unwrap();
        nats.insert("url".to_owned(), nats_url.into());
        nats.entry("prefix").or_insert(name.clone().into());
        let mongodb = values.entry("mongodb").or_insert(toml::Table::new().into());
        let mongodb = mongodb.as_table_mut().unwrap();
        mongodb.entry("database").or_insert(name.into());
        let auth = values.entry("auth").or_insert(toml::Table::new().into());
        auth.as_table_mut()
            .unwrap()
            .insert("hs256_secret".to_owned(), SECRET.into());
        let text = toml::to_string(&values).unwrap();
        std::fs::write(dir.path().join("natter.toml"), &text).unwrap();
        let mesh = Self {
            config: config(&text),
            edges: Vec::new(),
            workers: Vec::new(),
            dir,
        };
        mesh.provision().await;
        mesh
    }

    /// As [`Self::start`], with `workers` history services that write to the MongoDB at `mongodb_url`.
    pub(crate) async fn with_history(
        nats_url: &str,
        mongodb_url: &str,
        (edges, workers): (usize, usize),
        toml: &str,
    ) -> Self {
        let mut values: toml::Table = toml.parse().unwrap();
        let mongodb = values.entry("mongodb").or_insert(toml::Table::new().into());
        let mongodb = mongodb.as_table_mut().unwrap();
        mongodb.entry("url").or_insert(mongodb_url.into());
        let mut mesh = Self::start(nats_url, edges, &toml::to_string(&values).unwrap()).await;
        for _ in 0..workers {
            mesh.add_worker("/readyz").await;
        }
        mesh
    }

    /// Starts one more history service and waits until a GET of `path` is answered well.
    pub(crate) async fn add_worker(&mut self, path: &'static str) -> usize {
        let number = self.workers.len();
        let address = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
        let mut spec = self.spec(number, address);
        spec.name = format!("history {number}");
        spec.log = self.worker_log(number);
        spec.env = vec![("NATTER__HISTORY__LISTEN".to_owned(), address.to_string())];
        if let Some(role) = spec.args.first_mut() {
            *role = "history".into();
        }
        spec.ready = answers(address, path);
        let mut process = Process::new(launcher(), spec);
        process.start().await.unwrap();
        self.workers.push(Edge { address, process });
        number
    }

    /// Starts the process that runs the workers of the configuration, and waits until it is ready.
    pub(crate) async fn start_workers(&self) -> Edge {
        self.start_service("worker", "NATTER__WORKER__LISTEN", &[])
            .await
    }

    /// Starts a notifier, and waits until it is ready.
    pub(crate) async fn start_notifier(&self, env: &[(&str, String)]) -> Edge {
        self.start_service("notifier", "NATTER__PUSH__LISTEN", env)
            .await
    }

    async fn start_service(&self, role: &str, listen: &str, env: &[(&str, String)]) -> Edge {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
        let mut spec = self.spec(0, address);
        spec.name = role.to_owned();
        spec.log = self
            .dir
            .path()
            .join(format!("{role}-{}.log", address.port()));
        spec.env = vec![(listen.to_owned(), address.to_string())];
        let more = env
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone()));
        spec.env.extend(more);
        if let Some(edge) = self.edges.first() {
            let url = format!("http://{}", edge.address);
            spec.env
                .push(("NATTER__UPLOADS__PUBLIC_URL".to_owned(), url));
        }
        if let Some(first) = spec.args.first_mut() {
            *first = role.into();
        }
        let mut process = Process::new(launcher(), spec);
        process.start().await.unwrap();
        Edge { address, process }
    }

    /// Starts a process that sends the events of the hooks of the configuration, and waits until it is ready.
    pub(crate) async fn start_hooks(&self, number: usize) -> Edge {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
        let mut spec = self.spec(0, address);
        spec.name = format!("hooks {number}");
        spec.log = self.dir.path().join(format!("hooks-{number}.log"));
        spec.env = vec![("NATTER__HOOK__LISTEN".to_owned(), address.to_string())];
        if let Some(role) = spec.args.first_mut() {
            *role = "hooks".into();
        }
        let mut process = Process::new(launcher(), spec);
        process.start().await.unwrap();
        Edge { address, process }
    }

    /// Where a history service writes what it logs.
    pub(crate) fn worker_log(&self, number: usize) -> std::path::PathBuf {
        self.dir.path().join(format!("history-{number}.log"))
    }

    /// A command of `natter` with this mesh's configuration.
    pub(crate) async fn command(&self, args: &[&str]) -> std::process::Command {
        let mut command = super::natter_command(self.dir.path()).await;
        command
            .args(args)
            .arg("--config")
            .arg(self.dir.path().join("natter.toml"));
        command
    }

    /// Creates what is missing of the streams.
    pub(crate) async fn provision(&self) {
        let client = connect(&self.config.nats).await.unwrap();
        let outcomes = provision(&client, &self.config, Options::default())
            .await
            .unwrap();
        assert!(
            !outcomes.iter().any(provision::Outcome::is_incomplete),
            "{outcomes:?}"
        );
    }

    /// Starts one more edge and waits until it is ready.
    pub(crate) async fn add_edge(&mut self) -> usize {
        let number = self.edges.len();
        let address = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
        let spec = self.spec(number, address);
        let mut process = Process::new(launcher(), spec);
        process.start().await.unwrap();
        self.edges.push(Edge { address, process });
        number
    }

    fn spec(&self, number: usize, address: SocketAddr) -> Spec {
        let config = self.dir.path().join("natter.toml");
        let env = [
            ("NATTER__EDGE__LISTEN", address.to_string()),
            ("NATTER__EDGE__ID", format!("edge-{number}")),
        ];
        Spec {
            name: format!("edge {number}"),
            program: natter(),
            args: vec!["edge".into(), "--config".into(), config.into()],
            env: env
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect(),
            log: self.log(number),
            ready: answers(address, "/readyz"),
            alive: Arc::new(|_pid| Box::pin(async { Ok(()) })),
            ready_within: LONG,
            stop_within: LONG,
        }
    }

    /// Where an edge writes what it logs, for the person who looks into a failed test.
    pub(crate) fn log(&self, number: usize) -> std::path::PathBuf {
        self.dir.path().join(format!("edge-{number}.log"))
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The WebSocket of an edge.
    pub(crate) fn endpoint(&self, number: usize) -> Endpoint {
        format!("ws://{}/ws", self.edges[number].address)
            .parse()
            .unwrap()
    }

    /// A connection of `user`, who may do everything everywhere.
    pub(crate) async fn connect(&self, number: usize, user: &str) -> Connection {
        Connection::open(&self.endpoint(number), Some(&token(user)))
            .await
            .unwrap()
    }

    /// What an edge answers to a GET of somebody who may do everything everywhere, unless that is a refusal.
    pub(crate) async fn get(&self, number: usize, path: &str) -> Result<Value, String> {
        let headers = format!("Authorization: Bearer {}\r\n", token("observer"));
        let (status, body) = http(self.edges[number].address, "GET", path, &headers, "")
            .await
            .map_err(|error| error.to_string())?;
        match status {
            200 => serde_json::from_str(&body).map_err(|error| error.to_string()),
            _ => Err(format!("{status}: {body}")),
        }
    }

    /// The value of a counter of an edge, all labels together unless `labels` names one as it stands in the exposition.
    pub(crate) async fn metric(&self, number: usize, name: &str, labels: &str) -> u64 {
        let address = self.edges[number].address;
        let (_, text) = http(address, "GET", "/metrics", "", "").await.unwrap();
        let values = text.lines().filter_map(|line| -> Option<u64> {
            let (series, value) = line.rsplit_once(' ')?;
            let of_metric = series == name || series.starts_with(&format!("{name}{{"));
            (of_metric && series.contains(labels)).then(|| value.parse().ok())?
        });
        values.sum()
    }
}

/// Whether a GET is answered with 200.
pub(crate) fn answers(address: SocketAddr, path: &'static str) -> Check {
    Arc::new(move |_pid| {
        Box::pin(async move {
            let (status, body) = http(address, "GET", path, "", "").await?;
            if status == 200 {
                Ok(())
            } else {
                Err(format!("{status}: {body}").into())
            }
        })
    })
}

/// A token of `user`, who may do everything everywhere, for an hour.
pub(crate) fn token(user: &str) -> String {
    token_with(
        user,
        Duration::from_secs(3600),
        vec![Grant::new("*:*", &Right::ALL)],
    )
}

/// A token of `user`.
pub(crate) fn token_with(user: &str, ttl: Duration, grants: Vec<Grant>) -> String {
    let mut claims = Claims::new(user, unix_s() + ttl.as_secs());
    claims.grants = grants;
    issue(&claims, SECRET).unwrap()
}

/// One HTTP request with a token: status, and the JSON of the answer (`null` where it is none).
pub(crate) async fn ask(
    address: SocketAddr,
    (method, path): (&str, &str),
    token: &str,
    body: &Value,
) -> (u16, Value) {
    let headers = format!("Authorization: Bearer {token}\r\n");
    let body = match body {
        Value::Null => String::new(),
        body => body.to_string(),
    };
    let (status, answer) = http(address, method, path, &headers, &body).await.unwrap();
    (status, serde_json::from_str(&answer).unwrap_or_default())
}

/// One HTTP request on a connection of its own: status and body.
pub(crate) async fn http(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).await?;
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap_or(0);
    Ok((status, body.to_owned()))
}
