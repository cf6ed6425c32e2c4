//! Leases of other regions, as their mirrors here tell of them.
//!
//! A mirror removes a lease when its time to live has passed, whether or not its region has renewed it: behind a cut all
//! leases of a region vanish from the mirror without a word (only an origin leaves markers). So a lease that is missing here
//! has ended if its end was told, or if the mirror has kept up with its origin all the time in which it should have been
//! renewed: it heard from it later than that. While the mirror hears nothing, nobody knows: its users are unreachable.
//!
//! Mirrors are independent of each other: that of the leases may go on while that of the keys still stands. So a region
//! counts as cut off while either hears nothing, and a lease that has ended is kept until the keys are here that were written
//! before its end: what its users have under another lease, for one.
//!
//! An end by its time to live may be one of many because the region's NATS stood still: then its edges take new leases, and
//! have time for that ([`counts_from`]).
//!
//! A mirror does not repeat what its origin removes by a purge either: what was left under a lease that is over is purged in
//! every region.
//!
//! Nor does it learn of a key that was removed during a cut if the mark of the removal was gone before the cut was over. So
//! an edge that was cut off for long ([`LONG_CUT`]) takes a new lease when the cut is over: what stands under the old one means
//! nothing then, wherever it still stands.

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

/// A mirror that has not heard from its origin for this long is cut off from it: an origin gives a sign of life every second.
const SILENT: Duration = Duration::from_secs(5);

/// How often a region's mirror is looked at when nothing is amiss.
const LOOK: Duration = Duration::from_secs(10);

/// Longest that a lease that has ended is kept because the mirror of the keys does not tell that it has them all, and is not
/// cut off: it may go on saying that it is behind when its origin purges what was still to come.
const KEPT: Duration = Duration::from_secs(30);

/// When a purge is repeated that has left something: it may be refused.
const PURGED_AGAIN: Duration = Duration::from_secs(60);

/// Purges that wait for others; beyond that they are left to the next time.
const PURGES: usize = 256;

/// After a cut this long others may have missed who has left: half of what a removal is remembered.
const LONG_CUT: Duration = Duration::from_secs(REMOVED_FOR.as_secs() / 2);

/// How the mirrors of a region stand to their origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    /// The mirror of the leases has all that the origin had at `leases`, that of the keys what it had at `keys`; `None`: it
    /// is behind, or does not tell.
    Up {
        leases: Instant,
        keys: Option<Instant>,
    },
    /// One of them hears nothing.
    Cut,
    /// NATS here was away a moment ago, or does not answer.
    Unknown,
}

/// What is known of the leases of one other region: pure state.
#[derive(Debug, Default)]
struct Table {
    leases: HashMap<Arc<str>, Lease>,
    over: HashMap<Arc<str>, Over>,
    /// Since when the mirror has kept up.
    up: Option<Instant>,
    /// Since when it has heard nothing.
    cut: Option<Instant>,
    /// As of when all keys were here at the last look: whoever shows them has taken them in by the next.
    keys: Option<Instant>,
}

/// A lease that is over.
#[derive(Debug)]
struct Over {
    since: Instant,
    /// Whether its origin said so; otherwise that was concluded from what a mirror did not say, and a renewal refutes it.
    told: bool,
    /// Of its last renewal.
    revision: u64,
    /// When it was last to be purged.
    purged: Option<Instant>,
}

#[derive(Debug, Default)]
struct Lease {
    /// Of its last renewal.
    revision: u64,
    /// When that was seen; `None`: only that it was taken once is known.
    renewed: Option<Instant>,
    unreachable: bool,
    end: Option<End>,
}

/// The end of a lease that is still shown.
#[derive(Debug)]
struct End {
    /// From when on it counts: when it was told, or concluded, or a little later.
    since: Instant,
    /// As [`Over::told`].
    told: bool,
    /// When it counts at the latest.
    latest: Instant,
}

/// What a look at a mirror shows.
#[derive(Debug, Default, PartialEq, Eq)]
struct Look {
    /// Leases that are over now, as was told.
    ended: Vec<Arc<str>>,
    /// As is concluded.
    missed: Vec<Arc<str>>,
    /// Leases that were over before, and have left something.
    left: Vec<Arc<str>>,
    /// A long cut is over.
    healed: bool,
}

impl Lease {
    fn is_overdue(&self, lease: Duration, now: Instant) -> bool {
        self.renewed
            .is_none_or(|renewed| now >= renewed + lease + TICK)
    }
}

impl Over {
    /// Whether what was found of it is to be purged; if so, that is taken for begun.
    fn is_to_be_purged(&mut self, now: Instant) -> bool {
        // What only seems to be over may come back, and a mirror gets nothing twice.
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

/// From when on the end of a lease counts that is told `now`: if its edge could not renew it because NATS stood still there,
/// the edge finds that out with the next renewal, and takes another.
fn counts_from(end: &Entry, lease: Duration, now: Instant) -> Instant {
    if end.expired {
        now + renewed_every(lease)
    } else {
        now
    }
}

impl Table {
    /// A lease was renewed, or taken. What was seen before says nothing new.
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

    /// The origin has told that a lease has ended, which counts from then `on`. It is over when the keys are here that were
    /// written before.
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

    /// How long after a look the mirror is looked at again.
    fn every(&self, lease: Duration, now: Instant) -> Duration {
        let mut leases = self.leases.values();
        if self.cut.is_none() && leases.clone().any(|one| one.end.is_some()) {
            return TICK / 2;
        }
        let doubtful = leases.any(|one| one.end.is_some() || one.is_overdue(lease, now));
        if doubtful { lease / 5 } else { LOOK }
    }

    /// The mirror was read.
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
            // It should have been renewed since then, and the mirror would have heard of that.
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

    /// Ends count once the keys that were written before them are here, and were at the look before.
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

/// A region that is followed.
#[derive(Debug)]
struct Followed {
    edges: Bucket,
    presence: Bucket,
    table: Table,
    looked: Option<Instant>,
}

impl Followed {
    /// How the mirrors stand; asked after `now`.
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

/// Follows the leases of all other regions for ever, and tells rosters of them. Costs nothing while there are none.
pub(super) async fn follow(presence: Arc<Presence>) {
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // Before the first has come: rosters do not have it yet.
    let mut members = presence.origins.members_version();
    while presence.others().is_empty() {
        tick.tick().await;
    }
    let own = &presence.edges;
    let Ok(mut feed) = own.changes(">").await else {
        return;
    };
    // One after the other, beside what is shown.
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

/// Leases of another region are over.
fn over(origin: &Region, leases: &[Arc<str>], told: bool) {
    for lease in leases {
        count(Counter::LeaseEnded(LeaseEnd::Seen), 1);
        tracing::info!(lease = %lease, %origin, told, "a lease is over");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(10);

    fn entry(key: &str, revision: u64, here: bool) -> Entry {
        Entry {
            key: key.to_owned(),
            value: here.then(bytes::Bytes::new),
            expired: false,
            revision,
            at: 0,
        }
    }

    fn names<'a>(leases: impl Iterator<Item = &'a Arc<str>>) -> Vec<&'a str> {
        leases.map(|lease| &**lease).collect()
    }

    /// Both mirrors have what the origin had then.
    fn up(at: Instant) -> Link {
        let keys = Some(at);
        Link::Up { leases: at, keys }
    }

    #[test]
    fn a_lease_that_vanished_behind_a_cut_is_unreachable_until_it_is_renewed() {
        let start = Instant::now();
        let mut table = Table::default();
        table.looked(&[entry("a", 5, true)], up(start), LEASE, start);
        assert_eq!(names(table.alive()), ["a"]);
        let late = start + LEASE + TICK;
        let look = table.looked(&[], Link::Cut, LEASE, late);
        assert_eq!(look, Look::default());
        assert_eq!(names(table.unreachable()), ["a"]);
        assert_eq!(names(table.alive()), [""; 0]);
        // The cut is over, and the edge has time to be heard of.
        let healed = late + LEASE;
        let look = table.looked(&[], up(healed), LEASE, healed);
        assert_eq!(look, Look::default());
        assert_eq!(names(table.unreachable()), ["a"]);
        table.renewed("a", 9, healed + TICK);
        assert_eq!(names(table.alive()), ["a"]);
        assert_eq!(names(table.unreachable()), [""; 0]);
    }

    #[test]
    fn a_lease_whose_end_was_not_told_is_over_when_the_mirror_has_kept_up_for_long_enough() {
        let start = Instant::now();
        let mut table = Table::default();
        table.looked(&[entry("a", 5, true)], up(start), LEASE, start);
        let late = start + LEASE + TICK;
        table.looked(&[], Link::Cut, LEASE, late);
        table.looked(&[], up(late + TICK), LEASE, late + TICK);
        // A look that shows nothing of the mirror begins the wait anew.
        table.looked(&[], Link::Unknown, LEASE, late + LEASE);
        let heals = late + LEASE + TICK;
        table.looked(&[], up(heals), LEASE, heals);
        let look = table.looked(&[], up(heals + LEASE), LEASE, heals + LEASE);
        assert_eq!(look.missed, [""; 0].map(Arc::from));
        let over = heals + LEASE + TICK;
        let look = table.looked(&[], up(over), LEASE, over);
        assert_eq!(look.missed, [""; 0].map(Arc::from));
        // With all keys that were written before.
        let over = over + TICK;
        let look = table.looked(&[], up(over), LEASE, over);
        assert_eq!(look.missed, [Arc::from("a")]);
        // What it has left is found when it has been over for long; what was known before does not bring it back.
        table.renewed("a", 5, over);
        let found = [entry("used.a", 1, true)];
        let look = table.looked(&found, up(over + LEASE), LEASE, over + LEASE);
        assert_eq!(look.left, [""; 0].map(Arc::from));
        assert_eq!(names(table.alive()), [""; 0]);
        let long = over + REMEMBERED / 2;
        let look = table.looked(&found, up(long), LEASE, long);
        assert_eq!(look.left, [Arc::from("a")]);
        // A renewal refutes the conclusion, and not what the origin has said.
        table.renewed("a", 99, long);
        assert_eq!(names(table.alive()), ["a"]);
        table.ended("a", long);
        table.renewed("a", 100, long);
        let look = table.looked(&[], up(long + TICK), LEASE, long + TICK);
        assert_eq!(look.ended, [Arc::from("a")]);
        assert_eq!(names(table.alive()), [""; 0]);
    }

    #[test]
    fn a_mirror_that_was_silent_while_a_lease_became_overdue_does_not_say_that_it_is_over() {
        let start = Instant::now();
        let mut table = Table::default();
        table.looked(&[entry("a", 5, true)], up(start), LEASE, start);
        table.renewed("a", 6, start + 2 * LEASE);
        // The cut begins right after the renewal; the mirror is not known to be silent yet.
        let heard = start + 2 * LEASE + TICK;
        let late = start + 3 * LEASE + TICK;
        let look = table.looked(&[], up(heard), LEASE, late);
        assert_eq!(look, Look::default());
        let look = table.looked(&[], Link::Cut, LEASE, late + SILENT);
        assert_eq!(look, Look::default());
        assert_eq!(names(table.unreachable()), ["a"]);
    }

    #[test]
    fn an_end_that_was_told_counts_when_the_keys_are_here_that_were_written_before() {
        let start = Instant::now();
        let mut table = Table::default();
        let found = [entry("used.a", 1, true), entry("a", 5, true)];
        table.looked(&found, up(start), LEASE, start);
        // The edge has taken another lease, and of what it has written under that nothing is here yet.
        let told = start + TICK;
        table.ended("a", told);
        table.renewed("b", 8, told);
        let look_at = |table: &mut Table, after: Duration, keys: Option<Instant>| {
            let now = told + after;
            let leases = now;
            table.looked(&[], Link::Up { leases, keys }, LEASE, now)
        };
        let shown = |table: &Table| {
            let mut alive = names(table.alive()).join(" ").into_bytes();
            alive.sort_unstable();
            (alive, names(table.unreachable()).join(" "))
        };
        for keys in [Some(start), None] {
            assert_eq!(look_at(&mut table, TICK, keys), Look::default());
            assert_eq!(shown(&table), (b" ab".to_vec(), String::new()));
        }
        assert_eq!(table.every(LEASE, told + TICK), TICK / 2);
        let look = table.looked(&[], Link::Cut, LEASE, told + SILENT);
        assert_eq!(look, Look::default());
        assert_eq!(shown(&table), (b"b".to_vec(), "a".to_owned()));
        let caught_up = Some(told + LEASE);
        let look = look_at(&mut table, LEASE, caught_up);
        assert_eq!(look, Look::default());
        let look = look_at(&mut table, LEASE + TICK, caught_up);
        assert_eq!(look.ended, [Arc::from("a")]);
        assert_eq!(shown(&table), (b"b".to_vec(), String::new()));
    }

    #[test]
    fn an_edge_has_time_to_take_another_lease_when_one_expired() {
        let start = Instant::now();
        let mut table = Table::default();
        let found = [entry("a", 5, true), entry("b", 6, true)];
        table.looked(&found, up(start), LEASE, start);
        let expired = Entry {
            expired: true,
            ..entry("a", 7, false)
        };
        let found = [expired, entry("b", 8, false)];
        let told = start + TICK;
        table.looked(&found, up(told), LEASE, told);
        // What was given up was meant to be.
        let mut look_at = |after| {
            let now = told + after;
            table.looked(&found, up(now), LEASE, now).ended
        };
        assert_eq!(look_at(TICK), [Arc::from("b")]);
        let late = renewed_every(LEASE);
        assert_eq!(look_at(late - TICK / 2), [""; 0].map(Arc::from));
        assert_eq!(look_at(late), [""; 0].map(Arc::from));
        assert_eq!(look_at(late + TICK), [Arc::from("a")]);
    }

    #[test]
    fn a_purge_that_has_left_something_is_not_repeated_at_every_look() {
        let start = Instant::now();
        let mut table = Table::default();
        let found = [entry("used.a", 1, true), entry("a", 5, true)];
        table.looked(&found, up(start), LEASE, start);
        table.ended("a", start);
        let mut look_at = |after| {
            let now = start + after;
            table.looked(&found[..1], up(now), LEASE, now)
        };
        let [a, nothing] = [vec![Arc::from("a")], vec![]];
        let look = look_at(TICK);
        assert_eq!((&look.ended, &look.left), (&a, &nothing));
        assert_eq!(look_at(LOOK).left, nothing);
        let again = TICK + PURGED_AGAIN;
        assert_eq!(look_at(again).left, a);
        assert_eq!(look_at(again + LOOK).left, nothing);
        assert_eq!(look_at(again + PURGED_AGAIN).left, a);
    }

    #[test]
    fn a_mirror_of_keys_that_stays_behind_keeps_an_end_for_a_while() {
        let start = Instant::now();
        let mut table = Table::default();
        table.looked(&[entry("a", 5, true)], up(start), LEASE, start);
        table.ended("a", start);
        let look_at = |table: &mut Table, now: Instant| {
            let behind = Link::Up {
                leases: now,
                keys: None,
            };
            table.looked(&[], behind, LEASE, now).ended
        };
        let heals = start + KEPT;
        table.looked(&[], Link::Cut, LEASE, heals);
        assert_eq!(
            look_at(&mut table, heals + KEPT - TICK),
            [""; 0].map(Arc::from)
        );
        assert_eq!(look_at(&mut table, heals + KEPT), [Arc::from("a")]);
    }

    #[test]
    fn an_end_that_was_told_counts_also_if_it_was_found() {
        let start = Instant::now();
        let mut table = Table::default();
        let found = [entry("used.a", 1, true), entry("a", 5, true)];
        table.looked(&found, up(start), LEASE, start);
        table.looked(&found[..1], Link::Cut, LEASE, start + LEASE + TICK);
        let found = [entry("used.a", 1, true), entry("a", 8, false)];
        let healed = start + 2 * LEASE;
        assert_eq!(
            table.looked(&found, up(healed), LEASE, healed),
            Look::default()
        );
        assert_eq!(names(table.unreachable()), ["a"]);
        let later = healed + TICK;
        let look = table.looked(&found, up(later), LEASE, later);
        assert_eq!(look.ended, [Arc::from("a")]);
        assert_eq!(names(table.unreachable()), [""; 0]);
    }

    #[test]
    fn who_begins_behind_a_cut_knows_the_leases_that_were_taken_before() {
        let start = Instant::now();
        let mut table = Table::default();
        let found = [entry("used.a", 1, true)];
        table.looked(&found, Link::Unknown, LEASE, start);
        assert_eq!(names(table.unreachable()), [""; 0]);
        table.looked(&found, Link::Cut, LEASE, start + TICK);
        assert_eq!(names(table.unreachable()), ["a"]);
        assert_eq!(names(table.alive()), [""; 0]);
    }

    #[test]
    fn only_a_long_cut_makes_an_edge_announce_its_users_anew() {
        let start = Instant::now();
        let mut table = Table::default();
        table.looked(&[], Link::Cut, LEASE, start);
        let look = table.looked(&[], up(start + LONG_CUT / 2), LEASE, start + LONG_CUT / 2);
        assert!(!look.healed);
        let cut = start + LONG_CUT;
        table.looked(&[], Link::Cut, LEASE, cut);
        table.looked(&[], Link::Unknown, LEASE, cut + LONG_CUT);
        let look = table.looked(&[], up(cut + LONG_CUT), LEASE, cut + LONG_CUT);
        assert!(look.healed);
        let look = table.looked(&[], up(cut + 2 * LONG_CUT), LEASE, cut + 2 * LONG_CUT);
        assert!(!look.healed);
    }
}
