//! Turns for those who ask for the newest messages of rooms, or count unread ones.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit},
    time::timeout,
};

use super::error::MarkerError;
use crate::{bus::Reader, config};

/// Maximum number of requests of one user that wait or are being answered. More are refused.
const OF_ONE_USER: usize = 4;

/// Limits how many requests for unread counts are answered at once. One request can need hundreds of reads. So these
/// reads have their own connection, which nothing else waits for, and only a few requests are answered at once, in the
/// order of their arrival.
#[derive(Debug)]
pub(super) struct Counting {
    pub(super) reader: Reader,
    turns: Semaphore,
    /// How many of the turns one user may have.
    of_one_user: usize,
    wait: Duration,
    users: Mutex<HashMap<Box<str>, User>>,
}

/// A user with requests.
#[derive(Debug)]
struct User {
    requests: usize,
    turns: Arc<Semaphore>,
}

/// One request of a user; given back when dropped.
pub(super) struct Asking<'c> {
    counting: &'c Counting,
    user: &'c str,
    /// One of the turns that the user may have.
    own: Option<OwnedSemaphorePermit>,
}

impl Counting {
    /// Counts over `reader`, which is used for nothing else.
    pub(super) fn new(reader: Reader, config: &config::Nats) -> Self {
        Self {
            reader,
            turns: Semaphore::new(config.replay_concurrency),
            // Half of them, so that others do not wait for the requests of one user; at least one.
            of_one_user: config.replay_concurrency.div_ceil(2),
            wait: config.read_timeout,
            users: Mutex::default(),
        }
    }

    /// Waits for a turn, at most for the timeout of a read.
    pub(super) async fn turn<'c>(
        &'c self,
        user: &'c str,
    ) -> Result<(Asking<'c>, SemaphorePermit<'c>), MarkerError> {
        let own = {
            let mut users = self.users.lock();
            let user = users.entry(user.into()).or_insert_with(|| User {
                requests: 0,
                turns: Arc::new(Semaphore::new(self.of_one_user)),
            });
            if user.requests >= OF_ONE_USER {
                return Err(MarkerError::Busy);
            }
            user.requests += 1;
            Arc::clone(&user.turns)
        };
        let mut asking = Asking {
            counting: self,
            user,
            own: None,
        };
        let turns = async {
            // The semaphores are never closed.
            asking.own = own.acquire_owned().await.ok();
            self.turns.acquire().await.ok()
        };
        let turn = timeout(self.wait, turns).await;
        let turn = turn.ok().flatten().ok_or(MarkerError::Busy)?;
        Ok((asking, turn))
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if let Entry::Occupied(mut asking) = self.counting.users.lock().entry(self.user.into()) {
            asking.get_mut().requests -= 1;
            if asking.get().requests == 0 {
                asking.remove();
            }
        }
    }
}
