//! The history service that `natter up` runs: a child of the same binary.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use super::edge::{Child, common_env, region_of};
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
        let child = Child {
            role: "history",
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
