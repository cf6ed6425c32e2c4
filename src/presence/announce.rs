//! What the members of a room are told about users who come and go: every change in small rooms, counts in large or
//! very busy ones.
//!
//! A push of a count means that a member's list is out of date. After the last count, every change is pushed by name
//! again. So a list that is requested after a count push and then updated with the following pushes is correct.

use std::time::{Duration, Instant};

use super::roster::Change;
use crate::config::PresencePolicy;

/// Minimum time between two counts, and the window in which changes are counted.
const WINDOW: Duration = Duration::from_secs(1);

/// A push to the members who watch a room.
#[derive(Debug, Clone)]
pub(super) enum Push {
    User(Change),
    Count(usize),
}

/// Decides what is pushed. Does no I/O.
#[derive(Debug)]
pub(super) struct Announcer {
    /// Above this number of users in the room, or of changes per window, counts are pushed instead of names.
    max: usize,
    policy: PresencePolicy,
    counting: bool,
    window: Instant,
    changes: usize,
    /// The last count pushed, and when.
    told: Option<(usize, Instant)>,
    pending: bool,
}

impl Announcer {
    pub(super) fn new(policy: PresencePolicy, max: usize, now: Instant) -> Self {
        Self {
            max,
            policy,
            counting: policy != PresencePolicy::Users,
            window: now,
            changes: 0,
            told: None,
            pending: false,
        }
    }

    /// The pushes for `changes`, after which the room has `count` users. `total` is the number of changes, of which
    /// `changes` may contain only some.
    pub(super) fn on(
        &mut self,
        changes: Vec<Change>,
        total: usize,
        count: usize,
        now: Instant,
    ) -> Vec<Push> {
        let mut pushes: Vec<Push> = self.tick(count, now).into_iter().collect();
        if total == 0 {
            return pushes;
        }
        self.changes += total;
        self.counting |= count > self.max || self.changes > self.max || changes.len() < total;
        if self.counting {
            self.pending = true;
            pushes.extend(self.tick(count, now));
        } else {
            pushes.extend(changes.into_iter().map(Push::User));
        }
        pushes
    }

    /// When [`Self::tick`] must be called, if nothing else happens before.
    pub(super) fn due(&self) -> Option<Instant> {
        let count_due = self.told.map_or(self.window, |(_, at)| at + WINDOW);
        match (
            self.pending,
            self.counting && self.policy == PresencePolicy::Users,
        ) {
            (true, _) => Some(count_due),
            // The room may be able to return to names.
            (false, true) if self.changes > 0 => Some(self.window + WINDOW),
            (false, _) => None,
        }
    }

    /// Called when time has passed.
    pub(super) fn tick(&mut self, count: usize, now: Instant) -> Option<Push> {
        let mut push = None;
        if self.pending && self.told.is_none_or(|(_, at)| now >= at + WINDOW) {
            self.pending = false;
            // Pushed even if the number is the same: other users may be behind it, whose names are not pushed.
            self.told = Some((count, now));
            push = Some(Push::Count(count));
        }
        if now >= self.window + WINDOW {
            let quiet = self.changes <= self.max / 2;
            // Below the limit by a margin, so that a room around the limit does not switch with every user.
            let small = count <= self.max - self.max / 5;
            if self.policy == PresencePolicy::Users && !self.pending && quiet && small {
                self.counting = false;
            }
            self.window = now;
            self.changes = 0;
        }
        push
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::Arc};

    use proptest::prelude::*;

    use super::{
        super::roster::{Seen, Shown},
        *,
    };

    fn change(user: usize, here: bool) -> Change {
        Change {
            user: Arc::from(user.to_string()),
            shown: here.then_some(Shown {
                seen: Seen {
                    since: 0,
                    info: None,
                },
                unreachable: false,
            }),
            was_shown: !here,
        }
    }

    proptest! {
        /// Whatever comes and goes: the number of pushes per second is bounded. A client that requests the list after
        /// each count push and applies the names that follow has the correct list in the end.
        #[test]
        fn who_follows_the_pushes_has_the_right_list(
            steps in prop::collection::vec((0..40_usize, 0..1500_u64), 1..300),
        ) {
            let max = 10;
            let start = Instant::now();
            let mut now = start;
            let mut announcer = Announcer::new(PresencePolicy::Users, max, now);
            let (mut truth, mut client) = (BTreeSet::new(), BTreeSet::new());
            let mut sent = Vec::new();
            let mut take = |pushes: Vec<Push>, truth: &BTreeSet<usize>, now: Instant| {
                for push in pushes {
                    sent.push(now);
                    match push {
                        Push::User(change) => {
                            let user = change.user.parse::<usize>().unwrap();
                            if change.shown.is_some() { client.insert(user); } else { client.remove(&user); }
                        }
                        Push::Count(count) => {
                            assert_eq!(count, truth.len());
                            client.clone_from(truth);
                        }
                    }
                }
                client.clone()
            };
            for (user, wait) in steps {
                // The task wakes when `due` says so.
                let then = now + Duration::from_millis(wait / 10);
                while let Some(due) = announcer.due().filter(|due| *due <= then) {
                    now = due.max(now);
                    let push = announcer.tick(truth.len(), now);
                    take(push.into_iter().collect(), &truth, now);
                }
                now = then;
                let here = truth.insert(user);
                if !here { truth.remove(&user); }
                let pushes = announcer.on(vec![change(user, here)], 1, truth.len(), now);
                take(pushes, &truth, now);
            }
            while let Some(due) = announcer.due() {
                now = due.max(now);
                let push = announcer.tick(truth.len(), now);
                take(push.into_iter().collect(), &truth, now);
            }
            let client = take(Vec::new(), &truth, now);
            prop_assert_eq!(client, truth);
            for (i, at) in sent.iter().enumerate() {
                let second = sent[i..].iter().take_while(|t| **t < *at + WINDOW).count();
                // Two windows of names and a count may fall within one second.
                prop_assert!(second <= 2 * max + 2, "{second} pushes in a second");
            }
        }
    }

    #[test]
    fn a_large_room_pushes_one_count_a_second() {
        let start = Instant::now();
        let mut announcer = Announcer::new(PresencePolicy::Users, 200, start);
        let mut pushes = 0;
        for i in 0..10_000_usize {
            let now = start + Duration::from_micros(400) * u32::try_from(i).unwrap();
            pushes += announcer.on(vec![change(i, true)], 1, i + 1, now).len();
        }
        // 200 names, then at most one count per second, for 4 s.
        assert!((200..=206).contains(&pushes), "{pushes}");
    }

    #[test]
    fn a_small_room_in_a_hurry_pushes_counts_and_then_names_again() {
        let start = Instant::now();
        let mut announcer = Announcer::new(PresencePolicy::Users, 200, start);
        let mut pushes = 0;
        let mut now = start;
        for i in 0..10_000_usize {
            now = start + Duration::from_micros(400) * u32::try_from(i).unwrap();
            let changes = vec![change(i / 2 % 10, i % 2 == 0)];
            pushes += announcer.on(changes, 1, 1 - i % 2, now).len();
        }
        assert!((200..=206).contains(&pushes), "{pushes}");
        // After a quiet time the last count is pushed, and then the next user is pushed by name.
        while let Some(due) = announcer.due() {
            now = due.max(now);
            announcer.tick(0, now);
        }
        let named = announcer.on(vec![change(1, true)], 1, 1, now + WINDOW);
        assert!(matches!(named[..], [Push::User(_)]), "{named:?}");
    }

    #[test]
    fn a_namespace_of_counts_names_nobody() {
        let start = Instant::now();
        let mut announcer = Announcer::new(PresencePolicy::Counts, 200, start);
        let first = announcer.on(vec![change(1, true)], 1, 1, start);
        assert!(matches!(first[..], [Push::Count(1)]));
        assert!(announcer.on(vec![change(2, true)], 1, 2, start).is_empty());
        let due = announcer.due().unwrap();
        assert_eq!(due, start + WINDOW);
        assert!(matches!(announcer.tick(2, due), Some(Push::Count(2))));
        assert_eq!(announcer.due(), None);
    }
}
