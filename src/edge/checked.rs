//! What is known of files that are checked, so that not each download is a question to the history service.

use std::{collections::HashMap, mem, ops::RangeInclusive, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};

use crate::{
    history,
    protocol::{ErrorCode, Refused},
    store::UploadState,
    uploads::UploadId,
};

/// Files that are remembered.
const MOST: usize = 16_384;

/// How long a file is remembered as clean. A later verdict, or the removal of the file, acts within this time.
const REMEMBERED: Duration = Duration::from_secs(60);

/// How long it is remembered that a file is held back: many may wait for the same one.
const HELD_BACK: Duration = Duration::from_secs(1);

/// When a client should ask again for a file that was not checked yet. Not all at the same time.
const AGAIN_MS: RangeInclusive<u64> = 2_000..=4_000;

/// Questions to the history service at once. Few, so that they leave it time for pages of history.
const AT_ONCE: usize = 16;

/// What the history service has said of files a short time ago.
///
/// # Invariants
/// - A file is let through only if the history service has said that it is clean, within [`REMEMBERED`].
/// - At most [`MOST`] entries: when half of them are young, the old ones are dropped.
#[derive(Debug)]
pub(super) struct Checked {
    known: Mutex<Generations>,
    turns: Semaphore,
}

type Known = HashMap<UploadId, (Instant, UploadState)>;

#[derive(Debug, Default)]
struct Generations {
    young: Known,
    old: Known,
}

impl Default for Checked {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            turns: Semaphore::new(AT_ONCE),
        }
    }
}

impl Checked {
    /// Lets a file through, or says why not.
    ///
    /// # Errors
    /// `pending`, `infected`; `bad_id`: it was removed; `unavailable`: it can't be asked.
    pub(super) async fn admit(
        &self,
        history: &history::Client,
        wait: Duration,
        upload: &UploadId,
    ) -> Result<(), Refused> {
        let state = match self.known(upload) {
            Some(state) => state,
            None => self.ask(history, wait, upload).await?,
        };
        let refused = |code, text: &str| Err(Refused::new(code, text));
        match state {
            UploadState::Clean => Ok(()),
            UploadState::Pending => refused(ErrorCode::Pending, "the file is not checked yet")
                .map_err(|it| it.after(rand::random_range(AGAIN_MS))),
            UploadState::Infected => refused(
                ErrorCode::Infected,
                "the file was checked, and is held back for good",
            ),
            UploadState::Gone => refused(ErrorCode::BadId, "the file was removed"),
        }
    }

    /// Asks, unless somebody else has asked the same while this one waited for a turn.
    async fn ask(
        &self,
        history: &history::Client,
        wait: Duration,
        upload: &UploadId,
    ) -> Result<UploadState, Refused> {
        // The semaphore is never closed.
        let Ok(Ok(_turn)) = timeout(wait, self.turns.acquire()).await else {
            let text = "too many questions for files at once";
            return Err(Refused::new(ErrorCode::Unavailable, text));
        };
        if let Some(state) = self.known(upload) {
            return Ok(state);
        }
        let state = history.upload_state(&upload.to_string()).await?;
        self.remember(*upload, state);
        Ok(state)
    }

    fn known(&self, upload: &UploadId) -> Option<UploadState> {
        let generations = self.known.lock();
        let found = generations.young.get(upload);
        let (at, state) = found.or_else(|| generations.old.get(upload))?;
        let remembered = match state {
            UploadState::Clean => REMEMBERED,
            UploadState::Pending | UploadState::Infected | UploadState::Gone => HELD_BACK,
        };
        (at.elapsed() < remembered).then_some(*state)
    }

    fn remember(&self, upload: UploadId, state: UploadState) {
        let mut generations = self.known.lock();
        let dropped = match generations.young.len() >= MOST / 2 {
            true => {
                let young = mem::take(&mut generations.young);
                mem::replace(&mut generations.old, young)
            }
            false => HashMap::new(),
        };
        generations.young.insert(upload, (Instant::now(), state));
        drop(generations);
        drop(dropped); // perhaps thousands of entries: not under the lock
    }
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format as _, Toml};

    use super::*;
    use crate::{config::Config, model::RoomId, uploads::Signer};

    #[tokio::test(start_paused = true)]
    async fn what_is_remembered_is_bounded_in_number_and_in_time() {
        let config = Config::with_defaults(Toml::string("")).unwrap();
        let signer = Signer::new(&config.uploads);
        let room = RoomId::parse("chat:x").unwrap();
        let checked = Checked::default();
        let first = signer.make(&room, "kim");
        let clean = Some(UploadState::Clean);
        assert_eq!(checked.known(&first), None);
        checked.remember(first, UploadState::Pending);
        assert_eq!(checked.known(&first), Some(UploadState::Pending));
        checked.remember(first, UploadState::Clean);
        assert_eq!(checked.known(&first), clean);
        for _ in 0..2 * MOST {
            checked.remember(signer.make(&room, "kim"), UploadState::Clean);
            let generations = checked.known.lock();
            assert!(generations.young.len() + generations.old.len() <= MOST);
        }
        assert_eq!(checked.known(&first), None);
        checked.remember(first, UploadState::Clean);
        let other = signer.make(&room, "kim");
        checked.remember(other, UploadState::Pending);
        tokio::time::advance(HELD_BACK).await;
        assert_eq!(
            (checked.known(&first), checked.known(&other)),
            (clean, None)
        );
        tokio::time::advance(REMEMBERED).await;
        assert_eq!(checked.known(&first), None);
    }
}
