//! Leases: which edges live.
//!
//! An edge's lease is a key of the bucket `edges` with a TTL, renewed by compare-and-set. Each lease has a new name,
//! `<edge id>-<random>`: a lease that is over never lives again, and everything written under it can be purged at any
//! time. Beside it there is a key `used.<lease>` without a TTL. If that key exists without the lease, there may be keys
//! left to purge.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future;
use rand::Rng as _;
use tokio::time::{interval, sleep};

use super::Presence;
use crate::{
    bus::{Bucket, Entry, KvError, Put},
    subject,
    telemetry::metrics::{Counter, LeaseEnd, count},
};

/// Prefix of the keys that say that a lease may have been used.
pub(super) const USED: &str = "used.";

/// Pause before a failed write is retried.
const RETRY: Duration = Duration::from_millis(250);

/// Interval at which leases are checked.
pub(super) const TICK: Duration = Duration::from_millis(500);

/// How long a lease is remembered after its end: longer than news about it can be late.
pub(super) const REMEMBERED: Duration = Duration::from_secs(600);

/// Interval of the search for keys that were left behind.
const SWEEP: Duration = Duration::from_secs(30);

/// Interval of renewals: three attempts fit into the time of a lease.
pub(super) fn renewed_every(lease: Duration) -> Duration {
    lease.mul_f64(0.3)
}

fn is_overdue(renewed: Instant, lease: Duration, now: Instant) -> bool {
    now >= renewed + lease + TICK
}

/// What is known of the leases of the own region. Does no I/O.
#[derive(Debug, Default)]
struct Table {
    /// When each was last seen renewed.
    alive: HashMap<Arc<str>, Instant>,
    over: HashMap<Arc<str>, Instant>,
    /// Until this time no lease counts as over: NATS was not reachable, so edges could not renew.
    grace: Option<Instant>,
}

impl Table {
    /// A lease was taken or renewed. Returns whether it is new.
    fn renewed(&mut self, lease: &str, now: Instant) -> bool {
        if self.over.contains_key(lease) {
            return false;
        }
        self.alive.insert(lease.into(), now).is_none()
    }

    /// A lease has ended. Returns whether that is new.
    fn ended(&mut self, lease: &str, now: Instant) -> bool {
        if self.grace.is_some() {
            return false;
        }
        self.over.insert(lease.into(), now);
        self.alive.remove(lease).is_some()
    }

    /// Applies a read of all leases and returns those that have ended since. A lease renewed lately is not over if it
    /// is missing: a replica that lags behind may have answered.
    fn read(&mut self, found: &[Entry], lease: Duration, now: Instant) -> Vec<Arc<str>> {
        let found: HashMap<&str, bool> = found
            .iter()
            .map(|entry| (&*entry.key, entry.value.is_some()))
            .collect();
        for (name, _) in found.iter().filter(|(_, here)| **here) {
            self.renewed(name, now);
        }
        let is_over = |name: &str, renewed| match found.get(name) {
            Some(here) => !here,
            None => is_overdue(renewed, lease, now),
        };
        let alive = self.alive.iter();
        let over: Vec<Arc<str>> = alive
            .filter(|(name, renewed)| is_over(name, **renewed))
            .map(|(name, _)| Arc::clone(name))
            .collect();
        over.into_iter()
            .filter(|name| self.ended(name, now))
            .collect()
    }

    /// Whether some lease should have been renewed and was not: its end may have been missed.
    fn is_doubtful(&self, lease: Duration, now: Instant) -> bool {
        let mut alive = self.alive.values();
        alive.any(|renewed| is_overdue(*renewed, lease, now))
    }

    fn tick(&mut self, now: Instant) {
        self.over.retain(|_, at| now < *at + REMEMBERED);
        if self.grace.is_some_and(|until| now >= until) {
            self.grace = None;
        }
    }
}

/// Holds this edge's lease until it is given up: takes one, renews it, and takes another when it is lost.
pub(super) async fn hold(presence: Arc<Presence>, edges: Bucket) {
    let mut before: Option<Arc<str>> = None;
    loop {
        let (lease, mut revision) = take(&presence, &edges).await;
        tracing::info!(lease = %lease, "lease taken");
        presence.set_lease(&lease);
        if let Some(before) = before.replace(Arc::clone(&lease)) {
            // Nothing is written under the old lease any more. Its keys are purged only after everything has been
            // written under the new one; before that, a reader of a room would find nobody. If another edge has purged
            // them earlier, this purge removes a last write that arrived after that.
            let (presence, edges) = (Arc::clone(&presence), edges.clone());
            let later = 2 * presence.config.presence.lease;
            Arc::clone(&presence).background("purge", async move {
                sleep(later).await;
                purge(&presence.bucket, &edges, &before).await;
            });
        }
        presence.set_renewed();
        let every = renewed_every(presence.config.presence.lease);
        let mut pause = every;
        let lost = loop {
            tokio::select! {
                () = sleep(pause) => {}
                () = presence.anew.notified() => break false,
            }
            if presence.has_given_up() {
                return;
            }
            let how = Put {
                ttl: Some(presence.config.presence.lease),
                expected: Some(revision),
            };
            pause = every;
            match edges.put(&lease, presence.lease_value(), how).await {
                Ok(renewed) => {
                    revision = renewed;
                    presence.set_renewed();
                }
                // The conflict may come from our own renewal whose answer was lost.
                Err(KvError::Conflict) => match current(&edges, &lease).await {
                    Ok(Some(renewed)) => revision = renewed,
                    Ok(None) => break true,
                    Err(_unknown) => pause = RETRY,
                },
                Err(error) => {
                    tracing::debug!(%error, "the lease could not be renewed");
                    pause = RETRY;
                }
            }
        };
        // The lease may have been given up while it was renewed.
        if presence.has_given_up() {
            return;
        }
        if lost {
            count(Counter::LeaseEnded(LeaseEnd::Lost), 1);
            tracing::warn!(lease = %lease, "the lease is lost: who is here is announced anew");
        } else {
            tracing::info!(lease = %lease, "after a long cut who is here is announced anew");
        }
    }
}

async fn current(edges: &Bucket, lease: &str) -> Result<Option<u64>, KvError> {
    let entries = edges.get(&[lease.to_owned()]).await?;
    let living = entries.iter().find(|entry| entry.value.is_some());
    Ok(living.map(|entry| entry.revision))
}

/// Takes a new lease. Returns its name and revision.
async fn take(presence: &Presence, edges: &Bucket) -> (Arc<str>, u64) {
    let how = Put {
        ttl: Some(presence.config.presence.lease),
        expected: Some(0),
    };
    loop {
        let number: u32 = rand::rng().random();
        let lease: Arc<str> = format!("{}-{number:08x}", presence.edge).into();
        let taken = async {
            let used = format!("{USED}{lease}");
            edges
                .put(&used, presence.lease_value(), Put::default())
                .await?;
            edges.put(&lease, presence.lease_value(), how).await
        };
        match taken.await {
            Ok(revision) => return (lease, revision),
            Err(error) => tracing::debug!(%error, "a lease could not be taken"),
        }
        sleep(RETRY).await;
    }
}

/// Gives up a lease: users under it are gone at once.
pub(super) async fn give_up(presence: &Presence, edges: &Bucket, lease: &str) {
    match edges.remove(lease).await {
        Ok(_revision) => purge(&presence.bucket, edges, lease).await,
        Err(error) => tracing::debug!(%error, "the lease could not be given up: it will end"),
    }
}

/// Removes the keys written under an ended lease, in the buckets of one origin.
pub(super) async fn purge(presence: &Bucket, edges: &Bucket, lease: &str) {
    let purged = async {
        let keys = subject::presence_keys_of(lease);
        let purged = presence.purge(&keys).await?;
        edges.purge(&format!("{USED}{lease}")).await?;
        Ok::<_, KvError>(purged)
    };
    match purged.await {
        Ok(keys) => tracing::info!(lease, keys, "keys of a lease that is over purged"),
        // The key `used.…` still exists, so the next sweep finds it.
        Err(error) => tracing::debug!(lease, %error, "keys could not be purged yet"),
    }
}

/// Follows all leases of the own region, forever: reports to rosters which ones live, and purges what ended ones left.
pub(super) async fn follow(presence: Arc<Presence>, edges: Bucket) {
    let lease = presence.config.presence.lease;
    let mut table = Table::default();
    let mut generation = edges.connection().generation();
    let Ok(mut feed) = edges.changes(">").await else {
        return;
    };
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut batch = Vec::new();
    let (mut unread, mut swept) = (true, Instant::now());
    // Since when keys of a lease that does not live have been seen.
    let mut left: HashMap<Arc<str>, Instant> = HashMap::new();
    loop {
        batch.clear();
        tokio::select! {
            more = feed.next_batch(&mut batch, 64) => if !more { return },
            _ = tick.tick() => {}
        }
        let now = Instant::now();
        // Before the batch is applied: what the server reports right after a reconnect must be under grace too.
        let established = edges.connection().generation();
        let reconnected = generation != established;
        if reconnected {
            generation = established;
            presence.resync_all();
        }
        // NATS may also have stalled without a lost connection.
        if reconnected || presence.is_renewal_overdue() {
            table.grace = Some(now + lease);
            unread = true;
        }
        let mut ended = Vec::new();
        let changes = batch
            .iter()
            .filter_map(|message| edges.change(message))
            .filter(|(origin, entry)| origin == edges.origin() && !entry.key.starts_with(USED));
        for (_origin, entry) in changes {
            if entry.value.is_some() {
                table.renewed(&entry.key, now);
            } else if table.ended(&entry.key, now) {
                ended.push(Arc::from(entry.key));
            }
        }
        let had_grace = table.grace.is_some();
        table.tick(now);
        unread |= had_grace && table.grace.is_none();
        unread |= feed.is_suspect() || table.is_doubtful(lease, now);
        let sweep = now >= swept + SWEEP;
        if unread || sweep {
            feed.settle();
            match edges.scan(">").await {
                // The request was sent before the outage and answered after it: leases missing in the answer get their
                // grace first.
                Ok(_)
                    if edges.connection().generation() != generation
                        || presence.is_renewal_overdue() =>
                {
                    unread = true;
                }
                Ok(entries) => {
                    unread = false;
                    let (used, found): (Vec<Entry>, Vec<Entry>) = entries
                        .into_iter()
                        .partition(|entry| entry.key.starts_with(USED));
                    ended.extend(table.read(&found, lease, now));
                    if sweep {
                        swept = now;
                    }
                    let used: HashSet<Arc<str>> = used
                        .iter()
                        .filter(|entry| entry.value.is_some())
                        .filter_map(|entry| entry.key.strip_prefix(USED).map(Arc::from))
                        .filter(|lease| !table.alive.contains_key(lease))
                        .collect();
                    left.retain(|lease, _| used.contains(lease));
                    for lease in used {
                        left.entry(lease).or_insert(now);
                    }
                }
                Err(error) => tracing::debug!(%error, "the leases can't be read"),
            }
        }
        presence.set_alive(table.alive.keys());
        presence.set_first(table.alive.keys());
        // The end of the own lease is handled by `hold`.
        ended.retain(|lease: &Arc<str>| !presence.is_own(lease));
        for lease in &ended {
            count(Counter::LeaseEnded(LeaseEnd::Seen), 1);
            tracing::info!(lease = %lease, "a lease is over");
        }
        // A lease that is being taken has its key `used.…` a moment earlier, and may live by now.
        left.retain(|lease, _| !table.alive.contains_key(lease));
        let old = left
            .iter()
            .filter(|(old, since)| now >= **since + 2 * lease && !presence.is_own(old))
            .map(|(lease, _)| Arc::clone(lease));
        let to_purge: HashSet<Arc<str>> = ended.into_iter().chain(old).collect();
        if !to_purge.is_empty() && presence.is_first() {
            let purges = to_purge.iter();
            let purges = purges.map(|lease| purge(&presence.bucket, &edges, lease));
            future::join_all(purges).await;
            left.retain(|lease, _| !to_purge.contains(lease));
        }
    }
}

/// The value of a lease's key.
pub(super) fn value(edge: &str, since: u64) -> Bytes {
    serde_json::json!({ "edge": edge, "since": since })
        .to_string()
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(10);

    #[test]
    fn a_lease_that_is_over_never_lives_again() {
        let now = Instant::now();
        let mut table = Table::default();
        assert!(table.renewed("a", now));
        assert!(!table.renewed("a", now));
        assert!(table.ended("a", now));
        assert!(!table.ended("a", now));
        // A late renewal.
        assert!(!table.renewed("a", now));
        assert!(table.alive.is_empty());
        // The end may arrive before the start.
        assert!(!table.ended("b", now));
        assert!(!table.renewed("b", now));
        assert!(table.alive.is_empty());
    }

    fn entry(key: &str, here: bool) -> Entry {
        Entry {
            key: key.to_owned(),
            value: here.then(Bytes::new),
            expired: false,
            revision: 1,
            at: 0,
        }
    }

    #[test]
    fn a_lease_that_a_read_does_not_show_is_not_over_before_it_is_overdue() {
        let now = Instant::now();
        let mut table = Table::default();
        table.renewed("a", now);
        assert!(table.read(&[], LEASE, now + LEASE).is_empty());
        assert!(!table.renewed("a", now + LEASE));
        assert!(table.alive.contains_key("a"));
        // A lease that was removed is over at once.
        let found = [entry("a", false)];
        assert_eq!(table.read(&found, LEASE, now + LEASE), [Arc::from("a")]);
        assert!(table.read(&found, LEASE, now + LEASE).is_empty());
    }

    #[test]
    fn an_end_that_nobody_told_is_found() {
        let now = Instant::now();
        let mut table = Table::default();
        table.renewed("a", now);
        table.renewed("b", now + LEASE / 2);
        assert!(!table.is_doubtful(LEASE, now + LEASE));
        assert!(table.is_doubtful(LEASE, now + LEASE + TICK));
        let found = [entry("b", true), entry("c", true)];
        let ended = table.read(&found, LEASE, now + LEASE + TICK);
        assert_eq!(ended, [Arc::from("a")]);
        assert_eq!(table.alive.len(), 2);
    }

    #[test]
    fn after_nats_was_away_edges_get_time_to_renew() {
        let now = Instant::now();
        let mut table = Table::default();
        table.renewed("a", now);
        table.renewed("b", now);
        table.grace = Some(now + LEASE);
        assert!(!table.ended("a", now));
        assert!(table.read(&[], LEASE, now).is_empty());
        table.tick(now + LEASE / 2);
        assert!(!table.ended("a", now + LEASE / 2));
        table.tick(now + LEASE);
        let found = [entry("a", false), entry("b", true)];
        let ended = table.read(&found, LEASE, now + LEASE);
        assert_eq!(ended, [Arc::from("a")]);
    }

    #[test]
    fn what_is_over_is_forgotten_in_time() {
        let now = Instant::now();
        let mut table = Table::default();
        table.renewed("a", now);
        table.ended("a", now);
        table.tick(now + REMEMBERED - TICK);
        assert_eq!(table.over.len(), 1);
        table.tick(now + REMEMBERED);
        assert!(table.over.is_empty());
    }
}
