//! What `natter up` runs beside the live path: `natter worker`, the reference worker of `--demo-worker`, `natter hooks`,
//! `natter notifier`.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use sha2::{Digest as _, Sha256};

use super::edge::{Child, common_env, http_check, region_of};
use crate::{config::Config, servers::Spec};

/// The reference worker.
const SCRIPT: &str = include_str!("../../../deploy/examples/worker.py");

/// What runs it.
const PYTHON: &str = "python3";

/// Timeout of the start of either.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// Time that the workers get for the jobs in hand, before they are killed.
const STOP_WITHIN: Duration = Duration::from_secs(15);

/// The reference worker, which runs on this machine and needs nothing else.
#[derive(Debug, Clone)]
pub(super) struct Demo {
    script: PathBuf,
    address: SocketAddr,
    secret: String,
    /// `[[workers]]` for it, as an environment variable.
    workers: String,
}

impl Demo {
    /// Writes the script into the folder `data`. `secret` is the development secret.
    ///
    /// # Errors
    /// The configuration has workers, or no room for it; the script can't be written.
    pub(super) fn prepare(
        config: &Config,
        data: &Path,
        secret: &str,
        port: u16,
    ) -> anyhow::Result<Self> {
        ensure!(
            config.workers.is_empty(),
            "--demo-worker: the configuration has [[workers]], which would not run"
        );
        let durable = config.namespaces.iter().filter(|(_, its)| its.durable);
        let rooms: Vec<String> = durable.map(|(name, _)| format!("{name}:*")).collect();
        ensure!(
            !rooms.is_empty(),
            "--demo-worker: no namespace of the configuration is durable"
        );
        let script = data.join("demo-worker.py");
        std::fs::write(&script, SCRIPT)
            .with_context(|| format!("{}: can't be written", script.display()))?;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let key = Sha256::digest(format!("demo worker {secret}"));
        let secret = format!("whsec_{}", STANDARD.encode(key));
        let entry = |name: &str, annotation: &str, more: &str| {
            format!(
                "{{name={name:?}, rooms={rooms:?}, url=\"http://{address}/{name}\", secret={secret:?}, \
                 annotation={annotation:?}, allow=[\"127.0.0.1/32\"]{more}}}"
            )
        };
        let workers = [
            entry("translate", "translation", ""),
            entry("mood", "sentiment", ", alert=\"sentiment.score < -0.5\""),
        ];
        Ok(Self {
            workers: format!("[{}]", workers.join(", ")),
            script,
            address,
            secret,
        })
    }

    pub(super) fn spec(&self, logs: &Path) -> Spec {
        Spec {
            name: "demo worker".to_owned(),
            program: PYTHON.into(),
            args: vec![
                self.script.clone().into(),
                self.address.port().to_string().into(),
            ],
            env: vec![("NATTER_WORKER_SECRET".to_owned(), self.secret.clone())],
            log: logs.join("demo-worker.log"),
            ready: http_check(self.address, "/healthz"),
            alive: http_check(self.address, "/healthz"),
            ready_within: READY_WITHIN,
            stop_within: STOP_WITHIN,
        }
    }
}

/// The child of one region that does one thing beside the live path: `natter worker`, `natter hooks`, `natter notifier`.
#[derive(Debug)]
pub(super) struct ServiceTemplate<'a> {
    pub role: &'static str,
    /// The environment variable for the address on which it listens.
    pub listen: &'static str,
    pub binary: &'a Path,
    pub config: &'a Config,
    /// The file given with `--config`, passed on.
    pub config_file: Option<&'a Path>,
    pub nats_url: &'a str,
    pub logs: PathBuf,
    /// Further environment variables.
    pub env: Vec<(&'static str, String)>,
}

impl ServiceTemplate<'_> {
    /// The process that listens on `listen`.
    pub(super) fn spec(&self, listen: SocketAddr) -> Spec {
        let mut env = common_env(self.config, self.nats_url);
        env.push((self.listen, listen.to_string()));
        env.extend(self.env.iter().cloned());
        let child = Child {
            role: self.role,
            of: region_of(self.config),
            binary: self.binary,
            config_file: self.config_file,
            logs: &self.logs,
            ready_within: READY_WITHIN,
            stop_within: STOP_WITHIN,
        };
        child.spec(env, listen)
    }
}

/// The environment of `natter worker`. `edge`: the URL of an edge, from which receivers get the files of messages.
pub(super) fn worker_env(
    config: &Config,
    demo: Option<&Demo>,
    edge: Option<&str>,
) -> Vec<(&'static str, String)> {
    let workers = demo.map(|demo| ("NATTER__WORKERS", demo.workers.clone()));
    let edge = edge.filter(|_| config.uploads.public_url.is_empty());
    let files = edge.map(|edge| ("NATTER__UPLOADS__PUBLIC_URL", edge.to_owned()));
    workers.into_iter().chain(files).collect()
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format as _, Serialized, Toml};

    use super::*;

    #[test]
    fn the_demo_worker_is_a_valid_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::with_defaults(Toml::string("")).unwrap();
        let demo = Demo::prepare(&config, dir.path(), "a secret", 9000).unwrap();
        assert!(demo.script.exists());
        let value: figment::value::Value = demo.workers.parse().unwrap();
        let config = Config::with_defaults(Serialized::default("workers", value)).unwrap();
        let names: Vec<&str> = config.workers.iter().map(|its| &*its.name).collect();
        assert_eq!(names, ["translate", "mood"]);
        assert!(config.workers[1].alert.is_some());
        let error = Demo::prepare(&config, dir.path(), "a secret", 9000).unwrap_err();
        assert!(error.to_string().contains("[[workers]]"), "{error}");
    }
}
