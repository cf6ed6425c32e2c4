//! What every edge must obey: follows the control buckets of all regions.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use crate::{
    auth::{Revocations, Whose},
    bus::{Bucket, Entry, LiveFeed, Origins},
    runtime::unix_s,
    subject::{ControlKey, parse_control_key},
};

/// Pause before a read that failed is repeated, and how often is looked whether one is due.
const TICK: Duration = Duration::from_secs(1);

/// How often the buckets are read although nothing is amiss: a republish can be lost.
const RESYNC: Duration = Duration::from_secs(30);

/// The control buckets, followed.
#[derive(Debug)]
pub(super) struct Control {
    bucket: Bucket,
    origins: Arc<Origins>,
    revocations: Arc<Revocations>,
    feed: LiveFeed,
}

impl Control {
    /// Learns what stands in the buckets: nobody is let in before the own one was read. `None`: NATS was closed.
    pub(super) async fn open(
        bucket: Bucket,
        origins: Arc<Origins>,
        revocations: Arc<Revocations>,
    ) -> Option<Self> {
        // Subscribed first, read then: what changes in between is seen.
        let feed = bucket.changes(">").await.ok()?;
        let control = Self {
            bucket,
            origins,
            revocations,
            feed,
        };
        let mut told = false;
        while !control.read().await {
            if !std::mem::replace(&mut told, true) {
                tracing::warn!("waiting for the list of what is revoked");
            }
            sleep(TICK).await;
        }
        Some(control)
    }

    /// Learns what is said from now on, for ever.
    pub(super) async fn follow(mut self) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut seen = (
            self.bucket.connection().generation(),
            self.origins.members_version(),
        );
        let (mut due, mut batch) = (Instant::now() + RESYNC, Vec::new());
        loop {
            batch.clear();
            tokio::select! {
                more = self.feed.next_batch(&mut batch, 64) => if !more { return },
                _ = tick.tick() => {}
            }
            for message in &batch {
                if let Some((_origin, entry)) = self.bucket.change(message) {
                    self.learn(&entry);
                }
            }
            let now = (
                self.bucket.connection().generation(),
                self.origins.members_version(),
            );
            if self.feed.is_suspect() || seen != now || due <= Instant::now() {
                self.feed.settle();
                seen = now;
                let wait = if self.read().await { RESYNC } else { TICK };
                due = Instant::now() + wait;
                self.revocations.forget(unix_s());
            }
        }
    }

    /// Reads all buckets; whether that of the own region could be read. A mirror that can't be is read again later.
    async fn read(&self) -> bool {
        let all = self.origins.all();
        let reads = all.iter().map(async |streams| {
            let entries = self.bucket.of(streams.origin()).scan(">").await;
            entries.inspect_err(|error| {
                tracing::debug!(origin = %streams.origin(), %error, "what is revoked can't be read");
            })
        });
        let read = join_all(reads).await;
        for entry in read.iter().flatten().flatten() {
            self.learn(entry);
        }
        read.first().is_some_and(Result::is_ok)
    }

    fn learn(&self, entry: &Entry) {
        // A rule that was removed by hand holds until it ends: other regions may not hear of the removal.
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
