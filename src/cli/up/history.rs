//! The history service that `natter up` runs: a child of the same binary.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use super::edge::{args_of, common_env, http_check, reachable};
use crate::{config::Config, servers::Spec};

/// Timeout of the start, in which it prepares MongoDB.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// Time that it gets to write what it has fetched, before it is killed.
const STOP_WITHIN: Duration = Duration::from_secs(15);

/// The history service of one `up`.
#[derive(Debug)]
pub(super) struct HistoryTemplate<'a> {
    pub binary: &'a Path,
    pub config: &'a Config,
    /// The file given with `--config`, passed on.
    pub config_file: Option<&'a Path>,
    pub nats_url: &'a str,
    pub mongodb_url: &'a str,
    pub logs: PathBuf,
}

impl HistoryTemplate<'_> {
    /// The service that listens on `listen`.
    pub(super) fn spec(&self, listen: SocketAddr) -> Spec {
        let mut env = common_env(self.config, self.nats_url);
        env.extend([
            ("NATTER__HISTORY__LISTEN", listen.to_string()),
            ("NATTER__MONGODB__URL", self.mongodb_url.to_owned()),
            ("NATTER__MONGODB__URL_FILE", String::new()),
        ]);
        let reachable = reachable(listen);
        let (name, log) = if self.config.regions.is_empty() {
            ("history".to_owned(), "history.log".to_owned())
        } else {
            let region = &self.config.region;
            (format!("history {region}"), format!("history-{region}.log"))
        };
        Spec {
            name,
            program: self.binary.to_owned(),
            args: args_of("history", self.config_file),
            env: env
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect(),
            log: self.logs.join(log),
            ready: http_check(reachable, "/readyz"),
            // Not `/readyz`: a service that waits for NATS must not be killed for that.
            alive: http_check(reachable, "/healthz"),
            ready_within: READY_WITHIN,
            stop_within: STOP_WITHIN,
        }
    }
}
