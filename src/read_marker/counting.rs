//! Turns for those who ask for the newest messages of rooms, or count unread ones.

use std::{
    collections::{HashMap, hash_map::Entry},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

use super::error::MarkerError;
use crate::{bus::Reader, config};

/// Maximum number of requests of one user that wait or are being answered. More are refused, so that one user can't
/// occupy all turns.
const OF_ONE_USER: usize = 4;

/// Limits how many requests for unread counts are answered at once. One request can need hundreds of reads. So these
/// reads have their own connection, which nothing else waits for, and only a few requests are answered at once, in the
/// order of their arrival.
#[derive(Debug)]
pub(super) struct Counting {
    pub(super) reader: Reader,
    turns: Semaphore,
    wait: Duration,
    /// The number of requests of each user.
    users: Mutex<HashMap<Box<str>, usize>>,
}

/// One request of a user; given back when dropped.
pub(super) struct Asking<'c> {
    counting: &'c Counting,
    user: &'c str,
}

impl Counting {
    /// Counts over `reader`, which is used for nothing else.
    pub(super) fn new(reader: Reader, config: &config::Nats) -> Self {
        Self {
            reader,
            turns: Semaphore::new(config.replay_concurrency),
            wait: config.read_timeout,
            users: Mutex::default(),
        }
    }

    /// Waits for a turn, at most for the timeout of a read.
    pub(super) async fn turn<'c>(
        &'c self,
        user: &'c str,
    ) -> Result<(Asking<'c>, SemaphorePermit<'c>), MarkerError> {
        match self.users.lock().entry(user.into()) {
            Entry::Occupied(asking) if *asking.get() >= OF_ONE_USER => {
                return Err(MarkerError::Busy);
            }
            entry => *entry.or_default() += 1,
        }
        let asking = Asking {
            counting: self,
            user,
        };
        let turn = timeout(self.wait, self.turns.acquire()).await;
        // The semaphore is never closed.
        let turn = turn.ok().and_then(Result::ok).ok_or(MarkerError::Busy)?;
        Ok((asking, turn))
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if let Entry::Occupied(mut asking) = self.counting.users.lock().entry(self.user.into()) {
            *asking.get_mut() -= 1;
            if *asking.get() == 0 {
                asking.remove();
            }
        }
    }
}
