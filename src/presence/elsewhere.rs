//! The leases of other regions, as they appear in their mirrors here.
//!
//! A mirror removes a lease when its TTL has passed, even if its region has renewed it: during a cut all leases of a
//! region disappear from the mirror without a marker (only an origin leaves markers). So a lease that is missing here
//! has ended only in two cases: its end was announced, or the mirror has kept up with its origin for the whole time in
//! which the lease should have been renewed. While the mirror hears nothing, the state is unknown and the users are
//! shown as unreachable.
//!
//! Mirrors are independent of each other: the mirror of the leases may advance while the mirror of the keys does not.
//! So a region counts as cut off while either hears nothing. A lease that has ended is kept until the keys written
//! before its end have arrived here, e.g. those that its users have under another lease.
//!
//! A lease may also expire because NATS in its region stalled; then many leases expire. The edges take new leases, and
//! get time for that ([`counts_from`]).
//!
//! A mirror does not repeat a purge at its origin. So the keys left under an ended lease are purged in every region.
//!
//! A mirror also does not learn that a key was removed during a cut, if the marker of the removal expired before the
//! end of the cut. So after a long cut ([`LONG_CUT`]) an edge takes a new lease: keys under the old one then mean
//! nothing, wherever they still exist.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join;
use tokio::{sync::mpsc, time::interval};

use super::{
    Presence,
    lease::{REMEMBERED, TICK, USED, purge, renewed_every},
    writer::REMOVED_FOR,
};
use crate::{
    bus::{Bucket, Entry, Heard},
    model::Region,
    telemetry::metrics::{Counter, LeaseEnd, count},
};

/// A mirror that has not heard from its origin for this long is cut off: an origin sends a sign of life every second.
const SILENT: Duration = Duration::from_secs(5);

/// Interval at which a region's mirror is read while nothing is in doubt.
const LOOK: Duration = Duration::from_secs(10);

/// How long an ended lease is kept at most while the mirror of the keys is not cut off but does not confirm that it has
/// all keys. Such a mirror may report forever that it is behind, if its origin has purged the missing messages.
const KEPT: Duration = Duration::from_secs(30);

/// Pause before a purge is repeated that has left keys, e.g. because it was refused.
const PURGED_AGAIN: Duration = Duration::from_secs(60);

/// Waiting purges. Further ones are dropped and found again at a later look.
const PURGES: usize = 256;

/// After a cut of this length other regions may have missed removals: half of the time a removal is kept.
const LONG_CUT: Duration = Duration::from_secs(REMOVED_FOR.as_secs() / 2);

/// The state of a region's mirrors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    /// The mirror of the leases has everything that the origin had at `leases`, the mirror of the keys what it had at
    /// `keys`; `None` if that mirror is behind or does not answer.
    Up {
        leases: Instant,
        keys: Option<Instant>,
    },
    /// One of the mirrors does not hear from its origin.
    Cut,
    /// NATS here was not reachable a moment ago, or does not answer.
    Unknown,
}

/// What is known of the leases of one other region. Does no I/O.
#[derive(Debug, Default)]
struct Table {
    leases: HashMap<Arc<str>, Lease>,
    over: HashMap<Arc<str>, Over>,
    /// Since when the mirror has kept up.
    up: Option<Instant>,
    /// Since when the mirror has been cut off.
    cut: Option<Instant>,
    /// The time up to which all keys had arrived at the last look. Rosters have applied those keys by the next look.
    keys: Option<Instant>,
}

/// A lease that is over.
#[derive(Debug)]
struct Over {
    since: Instant,
    /// Whether its origin announced the end. Otherwise the end was concluded from a missing renewal, and a later
    /// renewal refutes it.
    told: bool,
    /// Revision of its last renewal.
    revision: u64,
    /// When it was last handed out for a purge.
    purged: Option<Instant>,
}

#[derive(Debug, Default)]
struct Lease {
    /// Revision of its last renewal.
    revision: u64,
    /// When that renewal was seen; `None` if only the key `used.…` is known.
    renewed: Option<Instant>,
    unreachable: bool,
    end: Option<End>,
}

/// The end of a lease whose users are still shown.
#[derive(Debug)]
struct End {
    /// When the end counts: when it was announced or concluded, or a little later.
    since: Instant,
    /// As in [`Over::told`].
    told: bool,
    /// The latest time at which it counts.
    latest: Instant,
}

/// The result of a look at a mirror.
#[derive(Debug, Default, PartialEq, Eq)]
struct Look {
    /// Leases that are over now, as announced by their origin.
    ended: Vec<Arc<str>>,
    /// Leases that are over now, as concluded from missing renewals.
    missed: Vec<Arc<str>>,
    /// Leases that were over before and have left keys.
    left: Vec<Arc<str>>,
    /// Whether a long cut has ended.
    healed: bool,
}

impl Lease {
    fn is_overdue(&self, lease: Duration, now: Instant) -> bool {
        self.renewed
            .is_none_or(|renewed| now >= renewed + lease + TICK)
    }
}

impl Over {
    /// Whether the keys it left should be purged. If so, the purge counts as started.
    fn is_to_be_purged(&mut self, now: Instant) -> bool {
        // A concluded end may be wrong, and a mirror does not receive purged keys again.
        let surely = self.told || now >= self.since + REMEMBERED / 2;
        let is = surely && self.purged.is_none_or(|at| now >= at + PURGED_AGAIN);
        if is {
            self.purged = Some(now);
        }
        is
    }
}

impl End {
    fn new(since: Instant) -> Self {
        Self {
            since,
            told: false,
            latest: since + KEPT,
        }
    }
}

/// When an announced end counts. If the lease expired because NATS stalled there, its edge notices that at the next
/// renewal and takes another lease; it gets the time for that.
fn counts_from(end: &Entry, lease: Duration, now: Instant) -> Instant {
    if end.expired {
        now + renewed_every(lease)
    } else {
        now
    }
}

impl Table {
    /// A lease was taken or renewed. Revisions seen before have no effect.
    fn renewed(&mut self, lease: &str, revision: u64, now: Instant) {
        if let Some(over) = self.over.get(lease) {
            if over.told || revision <= over.revision {
                return;
            }
            self.over.remove(lease);
        }
        let known = self.leases.entry(lease.into()).or_default();
        let told = known.end.as_ref().is_some_and(|end| end.told);
        if revision > known.revision && !told {
            *known = Lease {
                revision,
                renewed: Some(now),
                ..Lease::default()
            };
        }
    }

    /// The origin has announced the end of a lease, which counts from `on`. The lease is over once the keys written
    /// before have arrived.
    fn ended(&mut self, lease: &str, on: Instant) {
        if let Some(known) = self.leases.get_mut(lease) {
            let end = known.end.get_or_insert(End::new(on));
            end.told = true;
            return;
        }
        let over = self.over.entry(lease.into()).or_insert(Over {
            since: on,
            told: true,
            revision: 0,
            purged: None,
        });
        over.told = true;
    }

    /// The pause until the next look at the mirror.
    fn every(&self, lease: Duration, now: Instant) -> Duration {
        let mut leases = self.leases.values();
        if self.cut.is_none() && leases.clone().any(|one| one.end.is_some()) {
            return TICK / 2;
        }
        let doubtful = leases.any(|one| one.end.is_some() || one.is_overdue(lease, now));
        if doubtful { lease / 5 } else { LOOK }
    }

    /// Applies a look at the mirror.
    fn looked(&mut self, found: &[Entry], link: Link, lease: Duration, now: Instant) -> Look {
        let mut look = Look::default();
        self.over.retain(|_, over| now < over.since + REMEMBERED);
        match link {
            Link::Up { .. } => {
                self.up.get_or_insert(now);
                let cut = self.cut.take();
                look.healed = cut.is_some_and(|since| now >= since + LONG_CUT);
            }
            Link::Cut => {
                self.up = None;
                self.cut.get_or_insert(now);
            }
            Link::Unknown => self.up = None,
        }
        for entry in found {
            match (entry.key.strip_prefix(USED), &entry.value) {
                (Some(lease), Some(_)) if self.over.contains_key(lease) => {
                    let over = self.over.get_mut(lease);
                    if over.is_some_and(|over| over.is_to_be_purged(now)) {
                        look.left.push(lease.into());
                    }
                }
                (Some(lease), Some(_)) => {
                    self.leases.entry(lease.into()).or_default();
                }
                (None, Some(_)) => self.renewed(&entry.key, entry.revision, now),
                (None, None) => self.ended(&entry.key, counts_from(entry, lease, now)),
                (Some(_), None) => {}
            }
        }
        for known in self.leases.values_mut() {
            let overdue = known.is_overdue(lease, now);
            known.unreachable |= link == Link::Cut && (overdue || known.end.is_some());
            // A renewal was due after this time, and the mirror would have received it.
            let since = self.up.max(known.renewed.filter(|_| self.up.is_some()));
            if let (Link::Up { leases, .. }, Some(since)) = (link, since)
                && overdue
                && leases >= since + lease + TICK
            {
                known.end.get_or_insert(End::new(now));
            }
        }
        self.settle(link, now, &mut look);
        look
    }

    /// Ends count once the keys written before them had arrived already at the previous look.
    fn settle(&mut self, link: Link, now: Instant, look: &mut Look) {
        let keys = match link {
            Link::Up { keys, .. } => keys,
            Link::Cut | Link::Unknown => None,
        };
        let before = std::mem::replace(&mut self.keys, keys).filter(|_| keys.is_some());
        let Self { leases, over, .. } = self;
        leases.retain(|name, known| {
            let Some(end) = &mut known.end else {
                return true;
            };
            if link == Link::Cut {
                end.latest = now + KEPT;
            }
            if before.is_none_or(|keys| keys < end.since) && now < end.latest {
                return true;
            }
            let list = if end.told {
                &mut look.ended
            } else {
                &mut look.missed
            };
            list.push(Arc::clone(name));
            let ended = Over {
                since: now,
                told: end.told,
                revision: known.revision,
                purged: end.told.then_some(now),
            };
            over.insert(Arc::clone(name), ended);
            false
        });
    }

    fn alive(&self) -> impl Iterator<Item = &Arc<str>> {
        let leases = self.leases.iter();
        leases.filter_map(|(name, lease)| {
            (!lease.unreachable && lease.renewed.is_some()).then_some(name)
        })
    }

    fn unreachable(&self) -> impl Iterator<Item = &Arc<str>> {
        let leases = self.leases.iter();
        leases.filter_map(|(name, lease)| lease.unreachable.then_some(name))
    }
}

/// A region whose leases are followed.
#[derive(Debug)]
struct Followed {
    edges: Bucket,
    presence: Bucket,
    table: Table,
    looked: Option<Instant>,
}

impl Followed {
    /// The state of the mirrors, requested after `now`.
    async fn link(&self, now: Instant) -> Link {
        let (leases, keys) = join(self.edges.heard(), self.presence.heard()).await;
        let origin = self.edges.origin();
        let is_cut = |heard: Option<Heard>| heard.is_none_or(|heard| heard.ago >= SILENT);
        let caught_up = |heard: Option<Heard>| {
            let heard = heard.filter(|heard| !heard.behind)?;
            Some(now.checked_sub(heard.ago).unwrap_or(now))
        };
        let keys = match keys {
            Ok(keys) if is_cut(keys) => return Link::Cut,
            Ok(keys) => caught_up(keys),
            Err(error) => {
                tracing::debug!(%origin, %error, "the mirror of the keys does not tell how it stands");
                None
            }
        };
        match leases {
            Ok(leases) if is_cut(leases) => Link::Cut,
            Ok(leases) => caught_up(leases).map_or(Link::Cut, |leases| Link::Up { leases, keys }),
            Err(error) => {
                tracing::debug!(%origin, %error, "the mirror of the leases does not tell how it stands");
                Link::Unknown
            }
        }
    }
}

/// Follows the leases of all other regions, forever, and reports them to rosters. Does nothing while there are none.
pub(super) async fn follow(presence: Arc<Presence>) {
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // Read before the first region appears, since open rosters do not include that region.
    let mut members = presence.origins.members_version();
    while presence.others().is_empty() {
        tick.tick().await;
    }
    let own = &presence.edges;
    let Ok(mut feed) = own.changes(">").await else {
        return;
    };
    // One after the other, in their own task, so that they do not delay what is shown.
    let (purges, mut purged) = mpsc::channel::<(Bucket, Bucket, Arc<str>)>(PURGES);
    presence.background("purges", async move {
        while let Some((keys, edges, lease)) = purged.recv().await {
            purge(&keys, &edges, &lease).await;
        }
    });
    let lease = presence.config.presence.lease;
    let keys = presence.bucket.clone().with_timeout(lease / 5);
    let mut regions: HashMap<Region, Followed> = HashMap::new();
    let mut generation = own.connection().generation();
    let mut grace = None;
    let mut batch = Vec::new();
    loop {
        batch.clear();
        tokio::select! {
            more = feed.next_batch(&mut batch, 64) => if !more { return },
            _ = tick.tick() => {}
        }
        let now = Instant::now();
        let others = presence.others();
        regions.retain(|region, _| others.contains(region));
        for region in others {
            regions.entry(region).or_insert_with_key(|region| Followed {
                edges: own.of(region),
                presence: keys.of(region),
                table: Table::default(),
                looked: None,
            });
        }
        if members != presence.origins.members_version() {
            members = presence.origins.members_version();
            presence.resync_all();
        }
        let established = own.connection().generation();
        if generation != established || presence.is_renewal_overdue() {
            generation = established;
            grace = Some(now + lease);
        }
        grace = grace.filter(|until| now < *until);
        for message in &batch {
            let Some((origin, entry)) = own.change(message) else {
                continue;
            };
            let Some(followed) = regions.get_mut(&origin) else {
                continue;
            };
            if entry.key.starts_with(USED) {
                continue;
            }
            if entry.value.is_some() {
                followed.table.renewed(&entry.key, entry.revision, now);
            } else {
                let on = counts_from(&entry, lease, now);
                followed.table.ended(&entry.key, on);
            }
        }
        let suspect = feed.is_suspect();
        if suspect {
            feed.settle();
        }
        for (region, followed) in &mut regions {
            let every = followed.table.every(lease, now);
            let due = followed.looked.is_none_or(|at| now >= at + every);
            if !due && !suspect {
                continue;
            }
            followed.looked = Some(now);
            let link = if grace.is_some() {
                Link::Unknown
            } else {
                followed.link(now).await
            };
            let found = match followed.edges.scan(">").await {
                Ok(found) => found,
                Err(error) => {
                    tracing::debug!(origin = %region, %error, "the leases of a region can't be read");
                    continue;
                }
            };
            let was_cut = followed.table.cut.is_some();
            let look = followed.table.looked(&found, link, lease, now);
            if was_cut != followed.table.cut.is_some() {
                tracing::warn!(origin = %region, cut = !was_cut, "the way to another region has changed");
            }
            if look.healed {
                presence.announce_anew();
            }
            over(region, &look.ended, true);
            over(region, &look.missed, false);
            if presence.is_first() {
                for lease in look.ended.into_iter().chain(look.left) {
                    let purge = (presence.bucket.of(region), followed.edges.clone(), lease);
                    if purges.try_send(purge).is_err() {
                        tracing::debug!(origin = %region, "too many leases are to be purged");
                    }
                }
            }
        }
        let tables = || regions.values().map(|followed| &followed.table);
        let alive: HashSet<Arc<str>> = tables().flat_map(Table::alive).cloned().collect();
        let unreachable = tables().flat_map(Table::unreachable).cloned().collect();
        presence.set_elsewhere(alive, unreachable);
    }
}

/// Counts and logs leases of another region that are over.
fn over(origin: &Region, leases: &[Arc<str>], told: bool) {
    for lease in leases {
        count(Counter::LeaseEnded(LeaseEnd::Seen), 1);
        tracing::info!(lease = %lease, %origin, told, "a lease is over");
    }
}

#[cfg(test)]
#[path = "elsewhere/tests.rs"]
mod tests;
