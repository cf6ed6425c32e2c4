//! Files that were found clean, so that not each download is a question to the history service.

use std::{collections::HashMap, mem, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{
    history,
    protocol::{ErrorCode, Refused},
    store::UploadState,
    uploads::UploadId,
};

/// Clean files that are remembered.
const MOST: usize = 16_384;

/// How long a file is remembered as clean. A later verdict, or the removal of the file, acts within this time.
const REMEMBERED: Duration = Duration::from_secs(60);

/// When a client should ask again for a file that was not checked yet.
const AGAIN_MS: u64 = 2_000;

/// The files that were clean a short time ago.
///
/// # Invariants
/// - A file is let through only if the history service has said that it is clean, within [`REMEMBERED`].
/// - At most [`MOST`] entries: when half of them are young, the old ones are dropped.
#[derive(Debug, Default)]
pub(super) struct Checked(Mutex<Generations>);

#[derive(Debug, Default)]
struct Generations {
    young: HashMap<UploadId, Instant>,
    old: HashMap<UploadId, Instant>,
}

impl Checked {
    /// Lets a file through, or says why not.
    ///
    /// # Errors
    /// `pending`, `infected`; `bad_id`: it was removed; `unavailable`: it can't be asked.
    pub(super) async fn admit(
        &self,
        history: &history::Client,
        upload: &UploadId,
    ) -> Result<(), Refused> {
        if self.is_clean(upload) {
            return Ok(());
        }
        let refused = |code, text: &str| Err(Refused::new(code, text));
        match history.upload_state(&upload.to_string()).await? {
            UploadState::Clean => {
                self.remember(*upload);
                Ok(())
            }
            UploadState::Pending => refused(ErrorCode::Pending, "the file is not checked yet")
                .map_err(|it| it.after(AGAIN_MS)),
            UploadState::Infected => refused(
                ErrorCode::Infected,
                "the file was checked, and is held back for good",
            ),
            UploadState::Gone => refused(ErrorCode::BadId, "the file was removed"),
        }
    }

    fn is_clean(&self, upload: &UploadId) -> bool {
        let generations = self.0.lock();
        let found = generations.young.get(upload);
        let found = found.or_else(|| generations.old.get(upload));
        found.is_some_and(|at| at.elapsed() < REMEMBERED)
    }

    fn remember(&self, upload: UploadId) {
        let mut generations = self.0.lock();
        let dropped = match generations.young.len() >= MOST / 2 {
            true => {
                let young = mem::take(&mut generations.young);
                mem::replace(&mut generations.old, young)
            }
            false => HashMap::new(),
        };
        generations.young.insert(upload, Instant::now());
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
        assert!(!checked.is_clean(&first));
        checked.remember(first);
        assert!(checked.is_clean(&first));
        for _ in 0..2 * MOST {
            checked.remember(signer.make(&room, "kim"));
            let generations = checked.0.lock();
            assert!(generations.young.len() + generations.old.len() <= MOST);
        }
        assert!(!checked.is_clean(&first));
        checked.remember(first);
        tokio::time::advance(REMEMBERED).await;
        assert!(!checked.is_clean(&first));
    }
}
