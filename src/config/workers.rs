//! `[[workers]]` and `[worker]`: receivers of messages whose answers become annotations.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    ConfigError, Namespace, Network, SigningSecrets,
    outbound::{Common, check_common, check_patterns},
};
use crate::model::{Condition, MAX_ANNOTATION_NAME, RoomScope};

/// Most workers of a region: history keeps annotations of as many users of a message, and each worker is one. Each also has
/// a consumer on every stream of rooms, and metrics of its own.
pub const MAX_WORKERS: usize = 8;

/// `[worker]`: the process that runs the workers.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerService {
    pub listen: SocketAddr,
}

/// An entry of `[[workers]]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Worker {
    /// Its durable consumer, its user and its label in metrics are named after it.
    pub name: String,
    /// `namespace:name`, `namespace:*` or `*:*`.
    pub rooms: Vec<String>,
    /// What it gets.
    #[serde(default = "Worker::kinds")]
    pub kinds: Vec<WorkerKind>,
    pub url: String,
    #[serde(default)]
    pub secret: SigningSecrets,
    #[serde(default)]
    pub secret_file: PathBuf,
    /// The field of a message's annotations that the answer becomes.
    pub annotation: String,
    /// Most requests of a process that are open at once.
    #[serde(default = "Worker::concurrency")]
    pub concurrency: usize,
    #[serde(default = "Worker::timeout", with = "humantime_serde")]
    pub timeout: Duration,
    /// Attempts before a message becomes a dead letter.
    #[serde(default = "Worker::max_deliver")]
    pub max_deliver: u32,
    /// Older messages are skipped.
    #[serde(default = "Worker::max_age", with = "humantime_serde")]
    pub max_age: Duration,
    /// Whether messages of a room are worked on one after the other.
    #[serde(default)]
    pub ordered: bool,
    /// Whether it gets only what names uploads.
    #[serde(default)]
    pub attachments: bool,
    /// An annotation that fulfils it marks the room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alert: Option<Condition>,
    /// Ranges of addresses that `url` may lead to although they are not public.
    #[serde(default)]
    pub allow: Vec<Network>,
}

/// What a worker gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerKind {
    /// New messages.
    Message,
    /// Edits of messages.
    Edit,
}

impl Worker {
    fn kinds() -> Vec<WorkerKind> {
        vec![WorkerKind::Message, WorkerKind::Edit]
    }

    fn concurrency() -> usize {
        32
    }

    fn timeout() -> Duration {
        Duration::from_secs(2)
    }

    fn max_deliver() -> u32 {
        5
    }

    fn max_age() -> Duration {
        Duration::from_secs(600)
    }

    /// Its rooms, validated.
    #[must_use]
    pub fn scope(&self) -> RoomScope {
        RoomScope::of_patterns(self.rooms.iter().map(String::as_str)).unwrap_or_default()
    }

    pub(super) fn read_files(&mut self) -> Result<(), ConfigError> {
        let key = format!("workers.{}.secret_file", self.name);
        self.secret.read_file(&key, &self.secret_file)
    }
}

/// Checks all entries. `scan`: the worker that judges uploads; an edge names it, and has no entry for it.
pub(super) fn check(
    workers: &[Worker],
    scan: &str,
    namespaces: &BTreeMap<String, Namespace>,
    check: &mut impl FnMut(bool, String),
) {
    check(
        workers.len() <= MAX_WORKERS,
        format!("workers: {} of them, at most {MAX_WORKERS}", workers.len()),
    );
    let common = workers.iter().map(|worker| Common {
        name: &worker.name,
        url: &worker.url,
        secret: &worker.secret,
        concurrency: worker.concurrency,
        timeout: worker.timeout,
    });
    check_common("workers", &common.collect::<Vec<_>>(), check);
    for worker in workers {
        let key = format!("workers.{}", worker.name);
        check_patterns(&key, &worker.rooms, true, namespaces, check);
        check(
            !worker.kinds.is_empty(),
            format!("{key}.kinds is empty: the worker would get nothing"),
        );
        let annotation = &worker.annotation;
        check(
            (1..=MAX_ANNOTATION_NAME).contains(&annotation.len()),
            format!(
                "{key}.annotation = {annotation:?}: must have 1 to {MAX_ANNOTATION_NAME} bytes"
            ),
        );
        check(
            worker.name != scan
                || (worker.attachments
                    && Worker::kinds()
                        .iter()
                        .all(|kind| worker.kinds.contains(kind))),
            format!(
                "{key}: uploads.scan is this worker, so it must have attachments = true, and both kinds: files stay back until it has seen them"
            ),
        );
        if let Some(alert) = &worker.alert {
            check(
                alert.name() == annotation,
                format!(
                    "{key}.alert begins with {:?}: must be the annotation, {annotation:?}",
                    alert.name()
                ),
            );
        }
        for (field, is_zero) in [
            ("max_deliver", worker.max_deliver == 0),
            ("max_age", worker.max_age.is_zero()),
        ] {
            check(!is_zero, format!("{key}.{field} = 0: must be above 0"));
        }
    }
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format as _, Toml};

    use super::*;
    use crate::config::Config;

    const GOOD: &str = "[[workers]]\nname = 'translate'\nrooms = ['chat:*']\nurl = 'http://127.0.0.1:9000/translate'\nsecret = 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw'\nannotation = 'translation'\n";

    fn load(toml: &str) -> Result<Config, String> {
        Config::with_defaults(Toml::string(toml)).map_err(|error| error.to_string())
    }

    #[test]
    fn an_entry_has_the_documented_defaults() {
        assert!(load("").unwrap().workers.is_empty());
        let all = load(GOOD).unwrap().workers;
        let [worker] = &all[..] else { panic!() };
        assert_eq!(worker.kinds, [WorkerKind::Message, WorkerKind::Edit]);
        assert_eq!((worker.concurrency, worker.max_deliver), (32, 5));
        assert_eq!(worker.timeout, Duration::from_secs(2));
        assert_eq!(worker.max_age, Duration::from_secs(600));
        assert!(!worker.ordered && !worker.attachments && worker.alert.is_none());
        assert!(worker.allow.is_empty());
        let scan = "[uploads]\nscan = 'translate'\n";
        for (more, is_good) in [
            ("attachments = true\n", true),
            ("", false),
            ("attachments = true\nkinds = ['message']\n", false),
        ] {
            let loaded = load(&format!("{scan}{GOOD}{more}"));
            assert_eq!(loaded.is_ok(), is_good, "{more}: {:?}", loaded.err());
        }
        let shown = toml::to_string_pretty(&load(GOOD).unwrap()).unwrap();
        assert!(shown.contains("secret = \"***\"") && !shown.contains("MfKQ"));
        let more = format!("{GOOD}alert = 'translation.score < -0.5'\nallow = ['127.0.0.0/8']\n");
        load(&more).unwrap();
        let error = load(&format!("{GOOD}alert = 'sentiment.score < 0'\n")).unwrap_err();
        assert!(
            error.contains("must be the annotation, \"translation\""),
            "{error}"
        );
    }

    #[test]
    fn every_fault_of_an_entry_is_named() {
        let bad = "[[workers]]\nname = 'a b'\nrooms = ['chat:a*']\nkinds = []\nurl = 'ftp://x/?key=hidden'\nannotation = ''\nconcurrency = 0\ntimeout = '6m'\nmax_deliver = 0\nmax_age = '0s'\n";
        let error = load(bad).unwrap_err();
        for told in [
            "name = \"a b\"",
            "workers.a b.rooms: \"chat:a*\"",
            "workers.a b.kinds",
            "workers.a b.url",
            "workers.a b.secret is empty",
            "workers.a b.annotation",
            "workers.a b.concurrency = 0",
            "workers.a b.timeout = 360s",
            "workers.a b.max_deliver = 0",
            "workers.a b.max_age = 0",
        ] {
            assert!(error.contains(told), "{told} is missing in: {error}");
        }
        assert!(!error.contains("hidden"), "{error}");
        for (from, to, told) in [
            ("chat:*", "live:*", "live is not durable"),
            ("chat:*", "none:a", "there is no namespace none"),
            ("http://127", "http://me:pw@127", "without user or password"),
            ("whsec_M", "whsec-M", "must begin with whsec_"),
            ("'translation'", "'t'\nkind = 1", "kind"),
            ("'translation'", "'t'\nalert = 'x'", "must be like"),
            (
                "'translation'",
                "'t'\nallow = ['10/8']",
                "\"10/8\" is not a range",
            ),
            ("'translation'", "'t'\nkinds = ['typing']", "typing"),
            (
                "'translation'",
                "'t'\nsecret_file = '/no/such'",
                "workers.translate.secret_file",
            ),
        ] {
            let error = load(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.contains(told), "{told} is missing in: {error}");
            assert!(!error.contains("MfKQ"), "{error}");
        }
        let error = load(&GOOD.repeat(2)).unwrap_err();
        assert!(error.contains("\"translate\" is used twice"), "{error}");
    }

    #[test]
    fn secrets_come_from_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secrets");
        let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        std::fs::write(&path, format!("{secret}\n{secret}\n")).unwrap();
        let toml = GOOD.replace("'translation'", &format!("'t'\nsecret_file = {path:?}"));
        let config = load(&toml).unwrap();
        assert_eq!(config.workers[0].secret.keys().unwrap().len(), 2);
    }
}
