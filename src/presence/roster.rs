//! The users in one room, as the union of what edges report. Does no I/O.
//!
//! A fact is "under this lease, this user is (not) here", with a revision, or "this lease lives", "this lease is over".
//! Facts may arrive in any order, late and repeatedly, from any number of regions. Of two facts about the same user and
//! lease, the one with the higher revision counts. A lease that is over never lives again: an edge that comes back
//! takes a new one. So merging commutes, and all rosters with the same facts show the same users.

use std::{
    collections::{BTreeMap, HashSet},
    ops::Bound,
    sync::Arc,
};

use serde_json::value::RawValue;

/// What is known of a user in a room.
#[derive(Debug, Clone)]
pub struct Seen {
    /// When the user entered, in ms since 1970.
    pub since: u64,
    /// The `info` of the user's token: a JSON object.
    pub info: Option<Arc<RawValue>>,
}

/// A user of a room, as shown to clients.
#[derive(Debug, Clone)]
pub struct Shown {
    /// What is known of the user.
    pub seen: Seen,
    /// Whether the user's region is cut off. The user was here when the region was last heard from.
    pub unreachable: bool,
}

/// A user came or went, became unreachable or reachable again.
#[derive(Debug, Clone)]
pub(super) struct Change {
    /// The user.
    pub(super) user: Arc<str>,
    /// What is known of the user; `None` if the user has left.
    pub(super) shown: Option<Shown>,
    /// Whether the user was shown before.
    pub(super) was_shown: bool,
}

/// What one lease says about one user.
#[derive(Debug)]
pub(super) struct Fact {
    pub(super) lease: Arc<str>,
    pub(super) user: Arc<str>,
    /// The fact with the highest revision counts among those of the same lease and user.
    pub(super) revision: u64,
    /// `None`: not here.
    pub(super) seen: Option<Seen>,
}

/// A page of the list of users.
#[derive(Debug, Clone, Default)]
pub struct Page {
    /// Number of users in the room.
    pub count: usize,
    /// The users of the page, ordered by the bytes of their names.
    pub users: Vec<(Arc<str>, Shown)>,
    /// The last of `users`, if there are more after it.
    pub next: Option<Arc<str>>,
}

/// The leases under which users are shown. Users under any other lease are not shown: their edge is gone, or has not
/// been heard of yet.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Leases {
    /// Leases that live.
    pub(super) alive: HashSet<Arc<str>>,
    /// Leases whose state is unknown, since their region is cut off.
    pub(super) unreachable: HashSet<Arc<str>>,
}

/// The [`Leases`] shared by all rosters.
pub(super) type Alive = Arc<Leases>;

/// The users of one room.
#[derive(Debug, Default)]
pub(super) struct Roster {
    users: BTreeMap<Arc<str>, User>,
    alive: Alive,
    shown: usize,
}

#[derive(Debug, Default)]
struct User {
    holds: Vec<Hold>,
    /// Whether the user is shown, and if so, whether as unreachable.
    shown: Option<bool>,
}

/// What one lease says about one user.
#[derive(Debug)]
struct Hold {
    lease: Arc<str>,
    revision: u64,
    /// `None`: not here. Kept as long as an older fact may still arrive.
    seen: Option<Seen>,
}

impl User {
    fn seen(&self, leases: &Leases) -> Option<Shown> {
        let is_alive = |hold: &&Hold| leases.alive.contains(&hold.lease);
        let holds = self
            .holds
            .iter()
            .filter(|hold| is_alive(hold) || leases.unreachable.contains(&hold.lease));
        let here = holds.clone().filter_map(|hold| hold.seen.as_ref());
        // `since` is the earliest time, `info` is the latest one.
        let first = here.clone().map(|seen| seen.since).min()?;
        let last = here.max_by_key(|seen| seen.since)?;
        Some(Shown {
            seen: Seen {
                since: first,
                info: last.info.clone(),
            },
            unreachable: !holds.filter(is_alive).any(|hold| hold.seen.is_some()),
        })
    }

    /// Of two facts of one lease, the one with the higher revision counts.
    fn take(&mut self, fact: Fact) {
        let hold = Hold {
            lease: fact.lease,
            revision: fact.revision,
            seen: fact.seen,
        };
        match self.holds.iter_mut().find(|old| old.lease == hold.lease) {
            Some(old) if old.revision >= hold.revision => {}
            Some(old) => *old = hold,
            None => self.holds.push(hold),
        }
    }
}

impl Roster {
    /// An empty roster.
    #[must_use]
    pub(super) fn new(alive: Alive) -> Self {
        Self {
            alive,
            ..Self::default()
        }
    }

    /// The number of users shown.
    #[must_use]
    pub(super) fn count(&self) -> usize {
        self.shown
    }

    /// Whether a user is shown.
    #[must_use]
    pub(super) fn shows(&self, user: &str) -> bool {
        self.users.get(user).is_some_and(|its| its.shown.is_some())
    }

    /// Applies a fact.
    pub(super) fn apply(&mut self, fact: Fact) -> Option<Change> {
        let user = Arc::clone(&fact.user);
        self.users.entry(Arc::clone(&user)).or_default().take(fact);
        self.look(&user)
    }

    /// Sets which leases live and which are unreachable.
    pub(super) fn set_alive(&mut self, alive: &Alive) -> Vec<Change> {
        self.alive = Arc::clone(alive);
        self.look_at_all()
    }

    /// Replaces the facts by all that the buckets hold of this room; a key may occur twice. `known` says which leases
    /// the buckets cover. Facts of these leases that are not in `facts` are dropped.
    pub(super) fn replace(
        &mut self,
        facts: Vec<Fact>,
        known: impl Fn(&str) -> bool,
    ) -> Vec<Change> {
        for user in self.users.values_mut() {
            user.holds.retain(|hold| !known(&hold.lease));
        }
        for fact in facts {
            let user = Arc::clone(&fact.user);
            self.users.entry(user).or_default().take(fact);
        }
        self.look_at_all()
    }

    /// Drops the facts "not here". Call it when no older fact can arrive any more.
    pub(super) fn forget_gone(&mut self) {
        for user in self.users.values_mut() {
            user.holds.retain(|hold| hold.seen.is_some());
        }
        self.users.retain(|_, user| !user.holds.is_empty());
    }

    /// The users after `after`, at most `limit`.
    #[must_use]
    pub(super) fn page(&self, after: Option<&str>, limit: usize) -> Page {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut users = self
            .users
            .range::<str, _>((from, Bound::Unbounded))
            .filter_map(|(user, entry)| Some((Arc::clone(user), entry.seen(&self.alive)?)));
        let page: Vec<_> = users.by_ref().take(limit).collect();
        let next = users.next().and(page.last());
        Page {
            count: self.shown,
            next: next.map(|(user, _)| Arc::clone(user)),
            users: page,
        }
    }

    /// Updates what is shown of a user.
    fn look(&mut self, user: &Arc<str>) -> Option<Change> {
        let entry = self.users.get_mut(user)?;
        let change = Self::update(&self.alive, user, entry)?;
        self.note(&change);
        Some(change)
    }

    fn look_at_all(&mut self) -> Vec<Change> {
        let alive = &self.alive;
        let changes: Vec<Change> = self
            .users
            .iter_mut()
            .filter_map(|(user, entry)| Self::update(alive, user, entry))
            .collect();
        for change in &changes {
            self.note(change);
        }
        changes
    }

    fn update(leases: &Leases, name: &Arc<str>, user: &mut User) -> Option<Change> {
        let shown = user.seen(leases);
        let state = shown.as_ref().map(|shown| shown.unreachable);
        let before = std::mem::replace(&mut user.shown, state);
        (before != state).then(|| Change {
            user: Arc::clone(name),
            shown,
            was_shown: before.is_some(),
        })
    }

    fn note(&mut self, change: &Change) {
        match (change.was_shown, change.shown.is_some()) {
            (false, true) => self.shown += 1,
            (true, false) => self.shown -= 1,
            (true, true) | (false, false) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};

    use proptest::prelude::*;

    use super::*;

    /// All possible facts: two regions with two edges each, and what they say about some users.
    #[derive(Debug, Clone)]
    enum News {
        Says {
            lease: usize,
            user: usize,
            revision: u64,
            here: bool,
        },
        Lives(usize),
        Over(usize),
    }

    const LEASES: [&str; 4] = ["seoul-a", "seoul-b", "virginia-a", "virginia-b"];
    const USERS: [&str; 3] = ["kim", "lee", "zoë"];

    fn living(alive: HashSet<Arc<str>>) -> Alive {
        let unreachable = HashSet::new();
        Arc::new(Leases { alive, unreachable })
    }

    /// A receiver of facts: a roster, and the leases it has heard of, kept as the lease table does.
    #[derive(Default)]
    struct Receiver {
        roster: Roster,
        lives: BTreeSet<usize>,
        over: BTreeSet<usize>,
        facts: Vec<News>,
        /// The list that results from its pushes.
        pushed: BTreeSet<String>,
    }

    impl Receiver {
        fn hear(&mut self, fact: &News) {
            self.facts.push(fact.clone());
            let changes = match fact {
                News::Says {
                    lease,
                    user,
                    revision,
                    here,
                } => {
                    let seen = here.then(|| Seen {
                        since: *revision,
                        info: None,
                    });
                    let change = self.roster.apply(Fact {
                        lease: LEASES[*lease].into(),
                        user: USERS[*user].into(),
                        revision: *revision,
                        seen,
                    });
                    change.into_iter().collect()
                }
                News::Lives(lease) => {
                    self.lives.insert(*lease);
                    self.leases()
                }
                News::Over(lease) => {
                    self.over.insert(*lease);
                    self.leases()
                }
            };
            for change in changes {
                let news = if change.shown.is_some() {
                    self.pushed.insert(change.user.to_string())
                } else {
                    self.pushed.remove(&*change.user)
                };
                assert!(news, "a push that says nothing new: {change:?}");
            }
        }

        fn leases(&mut self) -> Vec<Change> {
            let alive = self.lives.difference(&self.over);
            let alive: HashSet<Arc<str>> = alive.map(|lease| LEASES[*lease].into()).collect();
            self.roster.set_alive(&living(alive))
        }

        fn shown(&self) -> Vec<(String, u64)> {
            let page = self.roster.page(None, usize::MAX);
            assert_eq!(page.count, page.users.len());
            assert_eq!(page.next, None);
            let names: BTreeSet<String> = page.users.iter().map(|(u, _)| u.to_string()).collect();
            assert_eq!(names, self.pushed, "pushes and list differ");
            page.users
                .iter()
                .map(|(user, shown)| (user.to_string(), shown.seen.since))
                .collect()
        }
    }

    /// The expected list: a user is here if the newest fact under some living lease says so.
    fn model(facts: &[News]) -> Vec<(String, u64)> {
        let mut newest: HashMap<(usize, usize), (u64, bool)> = HashMap::new();
        let (mut lives, mut over) = (BTreeSet::new(), BTreeSet::new());
        for fact in facts {
            match fact {
                News::Says {
                    lease,
                    user,
                    revision,
                    here,
                } => {
                    let entry = newest.entry((*lease, *user)).or_insert((0, false));
                    *entry = (*entry).max((*revision, *here));
                }
                News::Lives(lease) => drop(lives.insert(*lease)),
                News::Over(lease) => drop(over.insert(*lease)),
            }
        }
        let mut users: BTreeMap<String, u64> = BTreeMap::new();
        for ((lease, user), (revision, here)) in newest {
            if here && lives.contains(&lease) && !over.contains(&lease) {
                let since = users.entry(USERS[user].to_owned()).or_insert(revision);
                *since = revision.min(*since);
            }
        }
        users.into_iter().collect()
    }

    fn fact() -> impl Strategy<Value = News> {
        let says =
            (0..LEASES.len(), 0..USERS.len(), 1..12_u64).prop_map(|(lease, user, revision)| {
                News::Says {
                    lease,
                    user,
                    revision,
                    // Only one fact per revision, as in a stream.
                    here: !(revision + user as u64 + lease as u64).is_multiple_of(3),
                }
            });
        prop_oneof![
            6 => says,
            2 => (0..LEASES.len()).prop_map(News::Lives),
            1 => (0..LEASES.len()).prop_map(News::Over),
        ]
    }

    fn hear(facts: &[News]) -> Receiver {
        let mut receiver = Receiver::default();
        facts.iter().for_each(|fact| receiver.hear(fact));
        receiver
    }

    /// What `a` shows after it has received everything that `b` knows.
    fn merged(mut a: Receiver, b: &Receiver) -> Receiver {
        b.facts.iter().for_each(|fact| a.hear(fact));
        a
    }

    proptest! {
        /// Joins, leaves and ends of leases of two regions, late, repeated and out of order: the list equals the
        /// model's, and the pushes lead to it.
        #[test]
        fn the_list_is_that_of_the_model(
            facts in prop::collection::vec(fact(), 0..60),
            order in prop::collection::vec(any::<prop::sample::Index>(), 0..60),
        ) {
            let expected = model(&facts);
            prop_assert_eq!(hear(&facts).shown(), expected.clone());
            let mut shuffled = facts.clone();
            for (at, index) in order.iter().enumerate().take(shuffled.len()) {
                let other = index.index(shuffled.len());
                shuffled.swap(at, other);
            }
            shuffled.extend(facts.iter().rev().take(7).cloned());
            prop_assert_eq!(hear(&shuffled).shown(), expected);
        }

        #[test]
        fn merging_is_commutative_associative_and_idempotent(
            a in prop::collection::vec(fact(), 0..30),
            b in prop::collection::vec(fact(), 0..30),
            c in prop::collection::vec(fact(), 0..30),
        ) {
            let ab = merged(hear(&a), &hear(&b));
            let ba = merged(hear(&b), &hear(&a));
            prop_assert_eq!(ab.shown(), ba.shown());
            let left = merged(merged(hear(&a), &hear(&b)), &hear(&c));
            let right = merged(hear(&a), &merged(hear(&b), &hear(&c)));
            prop_assert_eq!(left.shown(), right.shown());
            let before = ab.shown();
            let again = merged(merged(ab, &hear(&b)), &hear(&a));
            prop_assert_eq!(again.shown(), before);
        }

        /// Losing live changes and then reading everything stored leads to the same list as receiving every change.
        /// Changes that arrive late afterwards have no effect.
        #[test]
        fn reading_everything_makes_up_for_what_was_lost(
            facts in prop::collection::vec(fact(), 0..60),
            heard in prop::collection::vec(any::<bool>(), 60),
        ) {
            let mut lossy = Receiver::default();
            for (fact, heard) in facts.iter().zip(&heard) {
                if *heard || !matches!(fact, News::Says { .. }) {
                    lossy.hear(fact);
                }
            }
            let mut stored: HashMap<(usize, usize), (u64, bool)> = HashMap::new();
            for fact in &facts {
                if let News::Says { lease, user, revision, here } = fact {
                    let entry = stored.entry((*lease, *user)).or_default();
                    *entry = (*entry).max((*revision, *here));
                }
            }
            let stored = stored.into_iter().map(|((lease, user), (revision, here))| Fact {
                lease: LEASES[lease].into(),
                user: USERS[user].into(),
                revision,
                seen: here.then_some(Seen { since: revision, info: None }),
            });
            for change in lossy.roster.replace(stored.collect(), |_| true) {
                let news = if change.shown.is_some() {
                    lossy.pushed.insert(change.user.to_string())
                } else {
                    lossy.pushed.remove(&*change.user)
                };
                prop_assert!(news);
            }
            let expected = model(&facts);
            prop_assert_eq!(lossy.shown(), expected.clone());
            for (fact, heard) in facts.iter().zip(&heard) {
                if !heard {
                    lossy.hear(fact);
                }
            }
            prop_assert_eq!(lossy.shown(), expected.clone());
            lossy.roster.forget_gone();
            prop_assert_eq!(lossy.shown(), expected);
        }
    }

    #[test]
    fn pages_follow_each_other_without_gap_or_repeat() {
        let lease: Arc<str> = "e1".into();
        let mut roster = Roster::new(living(HashSet::from([Arc::clone(&lease)])));
        let mut expected = Vec::new();
        for i in 0..25_u64 {
            let user: Arc<str> = format!("user-{i:02}").into();
            let mut say = |revision, seen| {
                roster.apply(Fact {
                    lease: Arc::clone(&lease),
                    user: Arc::clone(&user),
                    revision,
                    seen,
                })
            };
            say(
                1,
                Some(Seen {
                    since: i,
                    info: None,
                }),
            );
            if i % 5 == 0 {
                say(2, None);
            } else {
                expected.push(user);
            }
        }
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let page = roster.page(after.as_deref(), 7);
            assert_eq!(page.count, 20);
            assert!(page.users.len() <= 7);
            found.extend(page.users.into_iter().map(|(user, _)| user));
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        assert_eq!(found, expected);
        // The page that ends with the last user has no `next`.
        assert_eq!(roster.page(Some("user-18"), 5).next.as_deref(), None);
    }

    #[test]
    fn a_key_that_was_read_twice_is_one() {
        let lease: Arc<str> = "e1".into();
        let mut roster = Roster::new(living(HashSet::from([Arc::clone(&lease)])));
        let said = |revision, here: bool| Fact {
            lease: Arc::clone(&lease),
            user: "kim".into(),
            revision,
            seen: here.then_some(Seen {
                since: revision,
                info: None,
            }),
        };
        // The key was written again while the bucket was read.
        roster.replace(vec![said(3, true), said(1, true)], |_| true);
        let page = roster.page(None, 9);
        assert_eq!((page.count, page.users[0].1.seen.since), (1, 3));
        roster.apply(said(4, false));
        assert_eq!(roster.count(), 0);
    }

    #[test]
    fn who_is_only_under_leases_that_nobody_knows_of_is_unreachable_and_not_gone() {
        let leases = |alive: &[&str], unreachable: &[&str]| {
            let set = |names: &[&str]| names.iter().map(|name| Arc::from(*name)).collect();
            Arc::new(Leases {
                alive: set(alive),
                unreachable: set(unreachable),
            })
        };
        let mut roster = Roster::new(leases(&["seoul-a", "virginia-a"], &[]));
        for (lease, user) in [
            ("seoul-a", "kim"),
            ("virginia-a", "kim"),
            ("virginia-a", "lee"),
        ] {
            let fact = Fact {
                lease: lease.into(),
                user: user.into(),
                revision: 1,
                seen: Some(Seen {
                    since: 1,
                    info: None,
                }),
            };
            roster.apply(fact);
        }
        let told = |changes: Vec<Change>| -> Vec<(String, Option<bool>)> {
            assert!(changes.iter().all(|change| change.was_shown));
            let changes = changes.into_iter();
            changes
                .map(|c| (c.user.to_string(), c.shown.map(|shown| shown.unreachable)))
                .collect()
        };
        let lee = |state| vec![("lee".to_owned(), state)];
        let cut = roster.set_alive(&leases(&["seoul-a"], &["virginia-a"]));
        assert_eq!(told(cut), lee(Some(true)));
        let page = roster.page(None, 9);
        let states: Vec<bool> = page.users.iter().map(|(_, s)| s.unreachable).collect();
        assert_eq!((page.count, states), (2, vec![false, true]));
        let healed = roster.set_alive(&leases(&["seoul-a", "virginia-a"], &[]));
        assert_eq!(told(healed), lee(Some(false)));
        roster.set_alive(&leases(&["seoul-a"], &["virginia-a"]));
        let over = roster.set_alive(&leases(&["seoul-a"], &[]));
        assert_eq!(told(over), lee(None));
        assert_eq!(roster.count(), 1);
    }
}
