//! Which users have a session anywhere, for a process that is no edge.
//!
//! Edges write a key for each of their users if `presence.users` is on. The list is the roster of all those keys, made
//! and judged like that of a room: over all edges and regions, and a user in a region that is cut off is still there.
//!
//! This process has no lease whose renewal would tell that NATS stands still. It asks NATS for the time instead.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

use super::{Place, Presence, Unavailable, lease::renewed_every, roster::Change, watch::Watched};
use crate::{
    bus::{Origins, Reader},
    config::Config,
    runtime::Tasks,
};

/// Changes that wait for the one who asked for them. When this queue is full, the list waits.
const WAITING: usize = 1024;

/// How long it is remembered when a user went offline.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// Most users of whom it is remembered.
const MOST_REMEMBERED: usize = 100_000;

/// A user came online, or went offline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turned {
    /// The user.
    pub user: Arc<str>,
    /// Whether the user is online now.
    pub online: bool,
}

/// Which users are online, over all edges and regions. Memory: a few hundred bytes for each.
#[derive(Debug)]
pub struct Online {
    watched: Arc<Watched>,
    gone: Arc<Mutex<Gone>>,
}

/// Where changes of the list go.
#[derive(Debug)]
pub(super) struct Sink {
    gone: Arc<Mutex<Gone>>,
    changes: mpsc::Sender<Turned>,
}

/// Since when users are offline.
#[derive(Debug)]
struct Gone {
    since: HashMap<Arc<str>, Instant>,
    /// Everybody who is not in `since` and not online is offline since this time or earlier.
    others: Instant,
    pruned: Instant,
}

impl Gone {
    fn new(now: Instant) -> Self {
        Self {
            since: HashMap::new(),
            others: now,
            pruned: now,
        }
    }

    fn take(&mut self, turned: &Turned, now: Instant) {
        if turned.online {
            self.since.remove(&turned.user);
            return;
        }
        self.since.insert(Arc::clone(&turned.user), now);
        let due = now >= self.pruned + REMEMBERED / 4 || self.since.len() > MOST_REMEMBERED;
        if due {
            self.prune(now);
        }
    }

    /// Forgets those who are offline for long; if there are too many, also those who are not, the longer half first.
    fn prune(&mut self, now: Instant) {
        self.pruned = now;
        self.since.retain(|_, since| now < *since + REMEMBERED);
        if let Some(limit) = now.checked_sub(REMEMBERED) {
            self.others = self.others.max(limit);
        }
        if self.since.len() > MOST_REMEMBERED {
            let mut all: Vec<Instant> = self.since.values().copied().collect();
            let half = all.len() / 2;
            let (_, median, _) = all.select_nth_unstable(half);
            let median = *median;
            self.since.retain(|_, since| *since > median);
            self.others = self.others.max(median);
        }
    }

    fn since(&self, user: &str) -> Instant {
        self.since.get(user).copied().unwrap_or(self.others)
    }
}

impl Online {
    /// Begins to follow who is online. Also returns the changes, in order, from the first complete list on: a reader
    /// that wants none of them drops the receiver, and one that reads slowly makes the list wait. The tasks run on the
    /// current runtime and end with `tasks`.
    #[must_use]
    pub fn follow(
        config: &Arc<Config>,
        reader: &Reader,
        origins: &Arc<Origins>,
        tasks: &Tasks,
    ) -> (Arc<Self>, mpsc::Receiver<Turned>) {
        let (changes, turned) = mpsc::channel(WAITING);
        let gone = Arc::new(Mutex::new(Gone::new(Instant::now())));
        let sink = Sink {
            gone: Arc::clone(&gone),
            changes,
        };
        // Without a name: it takes no lease, and never purges.
        let (edge, pushed) = (Arc::from(""), (Vec::new(), Some(sink)));
        let presence = Presence::new(config, &edge, reader, origins, pushed, tasks);
        tasks.keep_running("ask whether NATS answers", Arc::clone(&presence).probe());
        // All changes are wanted by name. There are never more waiting than there are users.
        let watched = presence.watched(&Place::Online, usize::MAX);
        (Arc::new(Self { watched, gone }), turned)
    }

    /// Waits for the first complete list.
    ///
    /// # Errors
    /// [`Unavailable`] if there was none by `deadline`.
    pub async fn ready(&self, deadline: Instant) -> Result<(), Unavailable> {
        tokio::time::timeout_at(deadline, self.watched.loaded())
            .await
            .map_err(|_elapsed| Unavailable)
    }

    /// Whether a user has a session anywhere; `None` before the first complete list. A user in a region that can't be
    /// reached counts as there.
    #[must_use]
    pub fn is_online(&self, user: &str) -> Option<bool> {
        self.watched.shows(user)
    }

    /// Since when a user has no session, as far as it is known: the user may be offline for longer. `None`: the user is
    /// online, or nothing is known yet.
    #[must_use]
    pub fn offline_since(&self, user: &str) -> Option<Instant> {
        // In this order: a user who comes online in between is not found offline since long ago.
        let since = self.gone.lock().since(user);
        (self.is_online(user) == Some(false)).then_some(since)
    }

    /// The users after `after` who are online, at most `limit`, ordered by the bytes of their names.
    pub async fn page(&self, after: Option<&str>, limit: usize) -> Vec<Arc<str>> {
        let page = self.watched.page(after, limit).await;
        page.users.into_iter().map(|(user, _)| user).collect()
    }
}

impl Presence {
    /// Takes the changes of the list of who is online.
    pub(super) async fn report(&self, changes: Vec<Change>) {
        let Some(sink) = &self.online else {
            return;
        };
        for change in changes {
            let online = change.shown.is_some();
            if online == change.was_shown {
                // The user's region can't be reached, or can again.
                continue;
            }
            let turned = Turned {
                user: change.user,
                online,
            };
            sink.gone.lock().take(&turned, Instant::now());
            // A receiver that was dropped wants none.
            drop(sink.changes.send(turned).await);
        }
    }

    /// Asks NATS for the time, forever, as often as an edge renews its lease: without answers, other leases may have
    /// expired because NATS stood still.
    async fn probe(self: Arc<Self>) {
        let every = renewed_every(self.config.presence.lease);
        loop {
            match self.edges.server_time().await {
                Ok(_time) => self.set_renewed(),
                Err(error) => tracing::debug!(%error, "NATS does not tell the time"),
            }
            sleep(every).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turned(user: &str, online: bool) -> Turned {
        Turned {
            user: user.into(),
            online,
        }
    }

    #[tokio::test]
    async fn who_went_offline_is_remembered_within_bounds() {
        let start = Instant::now();
        let mut gone = Gone::new(start);
        let second = Duration::from_secs(1);
        gone.take(&turned("kim", false), start + second);
        assert_eq!(gone.since("kim"), start + second);
        // Nobody saw this user online.
        assert_eq!(gone.since("lee"), start);
        gone.take(&turned("kim", true), start + 2 * second);
        gone.take(&turned("kim", false), start + 3 * second);
        assert_eq!(gone.since("kim"), start + 3 * second);
        // Long ago.
        let late = start + REMEMBERED + 3 * second;
        gone.take(&turned("lee", false), late);
        assert_eq!(gone.since.len(), 1);
        assert_eq!(gone.since("kim"), late - REMEMBERED);
        // Too many: those who are forgotten are never said to be offline for longer than they are.
        for user in 0..=MOST_REMEMBERED as u64 {
            let at = late + Duration::from_millis(user + 1);
            gone.take(&turned(&user.to_string(), false), at);
        }
        assert!(gone.since.len() <= MOST_REMEMBERED);
        let first = gone.since("0");
        assert!(first > late && first <= late + Duration::from_millis(MOST_REMEMBERED as u64));
    }
}
