//! The notifier that `natter up` runs: a child of the same binary.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use super::edge::{Child, common_env, region_of};
use crate::{config::Config, servers::Spec};

/// Timeout of the start.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// Time that it gets for the notifications in hand, before it is killed.
const STOP_WITHIN: Duration = Duration::from_secs(15);

/// `natter notifier` of one region.
#[derive(Debug)]
pub(super) struct NotifierTemplate<'a> {
    pub binary: &'a Path,
    pub config: &'a Config,
    /// The file given with `--config`, passed on.
    pub config_file: Option<&'a Path>,
    pub nats_url: &'a str,
    pub logs: PathBuf,
}

impl NotifierTemplate<'_> {
    /// The process that listens on `listen`.
    pub(super) fn spec(&self, listen: SocketAddr) -> Spec {
        let mut env = common_env(self.config, self.nats_url);
        env.push(("NATTER__PUSH__LISTEN", listen.to_string()));
        let child = Child {
            role: "notifier",
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
