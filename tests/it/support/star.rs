//! Several regions on this machine, joined as leaf nodes of one hub without JetStream: enough for what goes over the API.

use std::{path::Path, sync::Arc};

use natter::testing::{
    config::Config,
    mesh::provision::{connect, ping},
    model::Region,
    servers::{Check, Process, free_port},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{LONG, eventually};

pub(crate) struct Star {
    dir: TempDir,
    /// Of the leaf nodes, at the hub.
    hub: u16,
    _hub: Process,
    servers: Vec<Server>,
    toml: String,
}

struct Server {
    region: Region,
    port: u16,
    process: Process,
}

/// What stands in `jetstream { … }` of all regions.
pub(crate) const SYNC_ALWAYS: &str = "sync_interval: always";

/// Everything but the address. There are a user of the system account, and one that may do as little as `edge` says.
fn accounts(edge: &str) -> String {
    format!(
        "accounts {{\n natter {{\n  jetstream: enabled\n  users: [ {{ user: natter, password: natter }}, {{ user: edge, password: edge{edge} }} ]\n }}\n SYS {{\n  users: [ {{ user: sys, password: sys }} ]\n }}\n}}\nsystem_account: SYS\nno_auth_user: natter\n"
    )
}

impl Star {
    /// Regions of these names, whose configuration has `toml` on top.
    pub(crate) async fn start(regions: &[&str], toml: &str) -> Self {
        Self::start_with(regions, toml, SYNC_ALWAYS, "").await
    }

    /// As [`Self::start`], with what stands in `jetstream { … }` and after the password of the user `edge`.
    pub(crate) async fn start_with(
        regions: &[&str],
        toml: &str,
        jetstream: &str,
        edge: &str,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (port, hub) = (free_port().unwrap(), free_port().unwrap());
        let conf = format!(
            "server_name: hub\nlisten: \"127.0.0.1:{port}\"\nleafnodes {{ listen: \"127.0.0.1:{hub}\" }}\n{}",
            accounts("").replace("jetstream: enabled\n", "\n")
        );
        let process = start(dir.path(), "hub", &conf, port, None).await;
        let mut star = Self {
            dir,
            hub,
            _hub: process,
            servers: Vec::new(),
            toml: toml.to_owned(),
        };
        for region in regions {
            star.add(region, jetstream, edge).await;
        }
        star
    }

    /// Starts one more region.
    pub(crate) async fn add(&mut self, region: &str, jetstream: &str, edge: &str) {
        let port = free_port().unwrap();
        let store = self.dir.path().join(format!("store-{region}"));
        let conf = format!(
            "server_name: {region}-1\nlisten: \"127.0.0.1:{port}\"\njetstream {{\n store_dir: {store:?}\n domain: {region}\n {jetstream}\n}}\nleafnodes {{\n reconnect: 1\n remotes: [ {{ url: \"nats-leaf://natter:natter@127.0.0.1:{}\", account: natter }} ]\n}}\n{}",
            self.hub,
            accounts(edge)
        );
        let process = start(self.dir.path(), region, &conf, port, Some(region)).await;
        self.servers.push(Server {
            region: Region::parse(region).unwrap(),
            port,
            process,
        });
        let newcomer = self.config(region);
        for server in &self.servers {
            reachable(&newcomer, &server.region).await;
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn server(&mut self, region: &str) -> &mut Server {
        let found = self
            .servers
            .iter_mut()
            .find(|s| s.region.as_str() == region);
        found.expect("it was started")
    }

    /// The configuration of `region`; `regions` is not set.
    pub(crate) fn config(&self, region: &str) -> Config {
        let server = self
            .servers
            .iter()
            .find(|s| s.region.as_str() == region)
            .expect("it was started");
        let mut config = super::config(&self.toml);
        region.clone_into(&mut config.region);
        config.nats.url = format!("nats://127.0.0.1:{}", server.port);
        config
    }

    pub(crate) async fn kill(&mut self, region: &str) {
        self.server(region).process.kill().await;
    }

    /// Starts a killed region again, and waits until the others reach it.
    pub(crate) async fn revive(&mut self, region: &str) {
        self.server(region).process.start().await.unwrap();
        let back = Region::parse(region).unwrap();
        for server in &self.servers {
            reachable(&self.config(server.region.as_str()), &back).await;
        }
    }

    /// A command of `natter` as somebody at `region` would give it.
    pub(crate) async fn command(&self, region: &str, args: &[&str]) -> std::process::Command {
        let config = self.config(region);
        let mut command = super::natter_command(self.dir()).await;
        command
            .args(args)
            .env("NATTER__REGION", region)
            .env("NATTER__NATS__URL", &config.nats.url)
            .env(
                "NATTER__NATS__PARTITIONS",
                config.nats.partitions.to_string(),
            );
        command
    }
}

async fn start(dir: &Path, name: &str, conf: &str, port: u16, jetstream: Option<&str>) -> Process {
    let path = dir.join(format!("{name}.conf"));
    std::fs::write(&path, conf).unwrap();
    let with_jetstream = jetstream.is_some();
    let ready: Check = Arc::new(move |_pid| {
        Box::pin(async move {
            let config = super::config(&format!("nats.url = 'nats://127.0.0.1:{port}'"));
            let client = connect(&config.nats).await?;
            if with_jetstream {
                ping(&client).await?;
            }
            Ok(())
        })
    });
    let spec = super::nats_with(name, &path, ready).await;
    let mut process = Process::new(super::launcher(), spec);
    process.start().await.unwrap();
    process
}

async fn reachable(from: &Config, region: &Region) {
    eventually("the regions see each other", LONG, async || {
        match api(from, region.as_str(), "INFO", json!({})).await {
            Some(answer) if answer["error"].is_null() => Ok(()),
            answer => Err(format!("{region}: {answer:?}")),
        }
    })
    .await;
}

/// Asks JetStream in the domain of `region`; `None`: nobody answers.
pub(crate) async fn api(
    from: &Config,
    region: &str,
    request: &str,
    payload: Value,
) -> Option<Value> {
    let client = connect(&from.nats).await.unwrap();
    let answer = client
        .request(
            format!("$JS.{region}.API.{request}"),
            payload.to_string().into(),
        )
        .await
        .ok()?;
    Some(serde_json::from_slice(&answer.payload).unwrap())
}

/// What a stream in the domain of `region` tells of itself; null fields where it is not there.
pub(crate) async fn stream(from: &Config, region: &str, name: &str) -> Value {
    api(from, region, &format!("STREAM.INFO.{name}"), json!({}))
        .await
        .unwrap()
}
