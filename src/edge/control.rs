//! The rules that every edge must obey: follows the control buckets of all regions.

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::{
    FutureExt as _,
    future::{Fuse, FusedFuture as _, join_all},
};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use crate::{
    auth::{Revocations, Whose},
    bus::{Bucket, Entry, LiveFeed, Origins},
    runtime::unix_s,
    subject::{CONTROL_RULES, ControlKey, parse_control_key},
};

/// Pause before a failed read of a bucket is retried, and how often it is checked whether a read is due.
const TICK: Duration = Duration::from_secs(1);

/// How often the buckets are read without any cause: a republished change can be lost.
const RESYNC: Duration = Duration::from_secs(30);

/// Follows the control buckets.
#[derive(Debug)]
pub(super) struct Control {
    rules: Rules,
    feed: LiveFeed,
    /// When the buckets are to be read again.
    due: Instant,
}

/// The buckets with the rules, and what was learned from them.
#[derive(Debug)]
struct Rules {
    bucket: Bucket,
    origins: Arc<Origins>,
    revocations: Arc<Revocations>,
}

/// The outcome of a read of the buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// All buckets were read.
    All,
    /// The own bucket was read, but at least one mirror could not be.
    Own,
    /// The own bucket could not be read.
    Failed,
}

impl Control {
    /// Reads the buckets. Returns when the own one was read, so that no client is let in before. `None` if NATS was
    /// closed.
    pub(super) async fn open(
        bucket: Bucket,
        origins: Arc<Origins>,
        revocations: Arc<Revocations>,
    ) -> Option<Self> {
        // Subscribe first and then read, so that no change in between is missed.
        let feed = bucket.changes(CONTROL_RULES).await.ok()?;
        let rules = Rules {
            bucket,
            origins,
            revocations,
        };
        let mut told = false;
        let read = loop {
            match rules.read().await {
                Reading::Failed => {}
                read => break read,
            }
            if !std::mem::replace(&mut told, true) {
                tracing::warn!("waiting for the list of what is revoked");
            }
            sleep(TICK).await;
        };
        let due = Instant::now() + read.pause();
        Some(Self { rules, feed, due })
    }

    /// Applies changes, forever; also while the buckets are read, which may take long.
    pub(super) async fn follow(self) {
        let Self {
            rules,
            mut feed,
            mut due,
        } = self;
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut seen = rules.seen();
        let mut batch = Vec::new();
        let mut reading = pin!(Fuse::terminated());
        loop {
            batch.clear();
            tokio::select! {
                more = feed.next_batch(&mut batch, 64) => if !more { return },
                read = &mut reading, if !reading.is_terminated() => {
                    due = Instant::now() + Reading::pause(read);
                    rules.revocations.forget(unix_s());
                }
                _ = tick.tick() => {}
            }
            for message in &batch {
                if let Some((_origin, entry)) = rules.bucket.change(message) {
                    rules.learn(&entry);
                }
            }
            let now = rules.seen();
            let wanted = feed.is_suspect() || seen != now || due <= Instant::now();
            // A suspicion that arises during a read leads to another read.
            if wanted && reading.is_terminated() {
                feed.settle();
                seen = now;
                reading.set(rules.read().fuse());
            }
        }
    }
}

impl Reading {
    /// How long after a read the buckets are read again. Soon, if one of them could not be read.
    fn pause(self) -> Duration {
        match self {
            Self::All => RESYNC,
            Self::Own | Self::Failed => TICK,
        }
    }
}

impl Rules {
    /// A change of this value requires a read.
    fn seen(&self) -> (u64, u64) {
        let connection = self.bucket.connection();
        (connection.generation(), self.origins.members_version())
    }

    /// Reads all buckets, and applies each as soon as it is read.
    async fn read(&self) -> Reading {
        let all = self.origins.all();
        let reads = all.iter().map(async |streams| {
            match self.bucket.of(streams.origin()).scan(CONTROL_RULES).await {
                Ok(entries) => {
                    entries.iter().for_each(|entry| self.learn(entry));
                    true
                }
                Err(error) => {
                    tracing::debug!(origin = %streams.origin(), %error, "what is revoked can't be read");
                    false
                }
            }
        });
        match &join_all(reads).await[..] {
            // The own bucket is the first.
            [false, ..] => Reading::Failed,
            read if read.contains(&false) => Reading::Own,
            _ => Reading::All,
        }
    }

    fn learn(&self, entry: &Entry) {
        // A rule that was removed by hand stays in force until it expires: other regions may not get the removal.
        let Some(value) = &entry.value else { return };
        let whose = match parse_control_key(&entry.key) {
            Some(ControlKey::RevokedUser(user)) => Whose::User(user),
            Some(ControlKey::RevokedToken(jti)) => Whose::Token(jti),
            Some(ControlKey::BlockedUser(user)) => Whose::Blocked(user),
            None => return,
        };
        if let Err(error) = self.revocations.learn(whose, value) {
            tracing::warn!(%error, "a key of the control bucket is not understood");
        }
    }
}
