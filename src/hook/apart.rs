//! Rooms that wait apart: an event of theirs is refused again and again, and they go on talking.
//!
//! If all that such a room says stayed in hand, it would soon fill the hand, and other rooms would wait. So only the event
//! that is refused stays there. A key of the bucket `hooks` says where the room's next entry stands, later entries are
//! acknowledged as they come, and when the event is done they are read from the stream again, a few at a time, in their
//! order. When nothing is left to read, the key is removed, and the room is like any other.
//!
//! # Invariants
//! - An entry of a room is acknowledged without being sent only after the key says to begin at it, or before it.
//! - While entries of a room are in hand, nothing of it is read.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use super::{Hook, Parts};
use crate::{
    bus::{KvError, Put, Stored},
    model::{Epoch, RoomId},
    outbound::pause,
    subject::{Subjects, hook_apart_key, hook_apart_keys, parse_hook_apart_key},
    taking::STREAM_PAUSES,
};

/// Entries of a room that wait in hand behind one that is refused, before the room waits apart.
pub(super) const WAITING: usize = 8;

/// Entries of a room that are read at once.
pub(super) const READ: usize = 8;

/// Pause after a read that has failed, or has found nothing.
const AGAIN: Duration = Duration::from_secs(1);

/// How much a replica of the stream may lag behind: another process may have acknowledged what is not there yet.
const REPLICAS_LAG: Duration = Duration::from_secs(3);

/// After this time without a find, entries that were acknowledged are not in the stream any more.
const GONE_AFTER: Duration = Duration::from_secs(30);

/// Where the rooms apart of one partition go on.
#[derive(Debug, Default)]
pub(super) struct Apart {
    rooms: HashMap<Arc<str>, Place>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    /// The entries before it are done, or in hand.
    next: u64,
    /// The newest entry that was acknowledged unsent.
    newest: u64,
    /// Whether its entries are being read.
    is_reading: bool,
    /// Of its key.
    revision: u64,
    /// Since when reads find nothing, although something was acknowledged.
    empty_since: Option<Instant>,
}

/// What is to be done with what was read.
#[derive(Debug)]
pub(super) enum Next {
    /// These entries are taken in hand.
    Take(Vec<Stored>),
    /// The room is as any other, and its key of this revision is removed.
    Remove(u64),
}

/// What was read of a room.
#[derive(Debug)]
pub(super) struct Page {
    pub room: Arc<str>,
    /// The next entries and the revision of the key, or why they can't be read. No entries: there are no more.
    pub read: Result<(Vec<Stored>, Option<u64>), String>,
}

impl Apart {
    /// Reads which rooms wait apart, of those that this process does not know yet.
    pub(super) async fn load(
        &mut self,
        parts: &Parts,
        hook: &Hook,
        part: u16,
        epoch: Epoch,
    ) -> Result<(), KvError> {
        for entry in parts
            .bucket
            .scan(&hook_apart_keys(hook.name(), part))
            .await?
        {
            let Some(value) = entry.value else { continue };
            let room = parse_hook_apart_key(&entry.key);
            let place = std::str::from_utf8(&value).ok().and_then(|text| {
                let (its, seq) = text.split_once('.')?;
                Some((its.to_owned(), seq.parse::<u64>().ok()?))
            });
            match room.zip(place) {
                Some((room, (its, next))) if its == epoch.to_string() => {
                    let place = Place {
                        next,
                        newest: next.saturating_sub(1),
                        is_reading: false,
                        revision: entry.revision,
                        empty_since: None,
                    };
                    self.rooms.entry(room.as_str().into()).or_insert(place);
                }
                // What stood there is gone with the stream.
                _ => drop(parts.bucket.remove_at(&entry.key, entry.revision).await?),
            }
        }
        Ok(())
    }

    /// Whether an entry of a room is one of those that are read later. It is noted.
    pub(super) fn takes(&mut self, room: &str, seq: u64) -> bool {
        let Some(place) = self.rooms.get_mut(room) else {
            return false;
        };
        place.newest = place.newest.max(seq);
        seq >= place.next
    }

    pub(super) fn has(&self, room: &str) -> bool {
        self.rooms.contains_key(room)
    }

    /// A room waits apart from now on: its entries from `next` to `newest` may be acknowledged. `revision`: of its key;
    /// `None` if it has waited apart before.
    pub(super) fn begin(
        &mut self,
        room: Arc<str>,
        (next, newest): (u64, u64),
        revision: Option<u64>,
    ) {
        let before = self.rooms.get(&room);
        let place = Place {
            next,
            newest: before.map_or(newest, |before| before.newest.max(newest)),
            is_reading: false,
            revision: revision
                .or(before.map(|before| before.revision))
                .unwrap_or_default(),
            empty_since: None,
        };
        self.rooms.insert(room, place);
    }

    /// The rooms of which nothing is in hand, and nothing is being read. They are now: so many that there is room for
    /// `free` entries.
    pub(super) fn begin_reads(
        &mut self,
        free: usize,
        is_in_hand: impl Fn(&str) -> bool,
    ) -> Vec<(Arc<str>, u64)> {
        let reading = self.rooms.values().filter(|place| place.is_reading).count();
        let may = (free / READ).saturating_sub(reading);
        let all = self.rooms.iter_mut();
        let all = all.filter(|(room, place)| !place.is_reading && !is_in_hand(room));
        let begun = all.take(may).map(|(room, place)| {
            place.is_reading = true;
            (Arc::clone(room), place.next)
        });
        begun.collect()
    }

    /// Takes in what was read.
    pub(super) fn took(&mut self, Page { room, read }: Page) -> Result<Next, String> {
        let Some(place) = self.rooms.get_mut(&room) else {
            return Ok(Next::Take(Vec::new()));
        };
        place.is_reading = false;
        let (stored, revision) = read?;
        place.revision = revision.unwrap_or(place.revision);
        if let Some(last) = stored.last() {
            (place.next, place.empty_since) = (last.record.seq + 1, None);
            return Ok(Next::Take(stored));
        }
        // What was acknowledged may not have come to the replica that was read, or was erased since.
        let since = *place.empty_since.get_or_insert_with(Instant::now);
        let enough = match place.newest < place.next {
            true => REPLICAS_LAG,
            false => GONE_AFTER,
        };
        if since.elapsed() >= enough {
            let revision = place.revision;
            self.rooms.remove(&room);
            return Ok(Next::Remove(revision));
        }
        Ok(Next::Take(stored))
    }
}

/// Writes down where a room goes on.
pub(super) async fn keep(
    parts: &Parts,
    hook: &Hook,
    part: u16,
    room: &RoomId,
    (epoch, next): (Epoch, u64),
) -> Result<u64, KvError> {
    let key = hook_apart_key(hook.name(), part, room);
    let value = format!("{epoch}.{next}");
    parts.bucket.put(&key, value.into(), Put::default()).await
}

/// Removes the key of a room that is as any other, unless it was written anew.
pub(super) async fn forget(
    parts: Parts,
    hook: Arc<Hook>,
    part: u16,
    (room, revision): (Arc<str>, u64),
) {
    let Ok(id) = RoomId::parse(&room) else { return };
    let key = hook_apart_key(hook.name(), part, &id);
    let mut failures = 0;
    loop {
        match parts.bucket.remove_at(&key, revision).await {
            Ok(_) | Err(KvError::Conflict) => return,
            // If it stays, the next process sends the room's events again from there.
            Err(error) => {
                tracing::debug!(hook = hook.name(), %room, %error, "a key can't be removed");
            }
        }
        failures += 1;
        sleep(pause(failures, STREAM_PAUSES, None)).await;
    }
}

/// Reads the next entries of a room apart, after writing down that what is before them is done.
pub(super) async fn read(
    parts: Parts,
    hook: Arc<Hook>,
    (stream, part, epoch): (String, u16, Epoch),
    (room, next): (Arc<str>, u64),
) -> Page {
    let read = async {
        let id = RoomId::parse(&room).map_err(|error| error.to_string())?;
        let subjects = Subjects::new(&parts.config.nats.prefix);
        let filter = subjects.stored_all(parts.streams.origin(), part, &id);
        let page = parts.reader.log(&stream, epoch, &filter, next).await;
        let (mut stored, _) = page.map_err(|error| error.to_string())?;
        stored.truncate(READ);
        let mut revision = None;
        if !stored.is_empty() {
            let kept = keep(&parts, &hook, part, &id, (epoch, next)).await;
            revision = Some(kept.map_err(|error| error.to_string())?);
        }
        Ok((stored, revision))
    };
    let read = read.await;
    if !matches!(&read, Ok((stored, _)) if !stored.is_empty()) {
        sleep(AGAIN).await;
    }
    Page { room, read }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(apart: &Apart) -> Option<(u64, u64)> {
        apart
            .rooms
            .get("chat:a")
            .map(|place| (place.next, place.newest))
    }

    fn nothing() -> Page {
        Page {
            room: "chat:a".into(),
            read: Ok((Vec::new(), None)),
        }
    }

    #[tokio::test]
    async fn a_room_is_read_when_nothing_of_it_is_in_hand() {
        let mut apart = Apart::default();
        assert!(!apart.takes("chat:a", 5));
        apart.begin("chat:a".into(), (5, 9), Some(1));
        // The one that is refused stays in hand.
        assert!(!apart.takes("chat:a", 4));
        assert!(apart.takes("chat:a", 12) && !apart.takes("chat:b", 12));
        assert!(apart.begin_reads(128, |room| room == "chat:a").is_empty());
        assert!(apart.begin_reads(READ - 1, |_| false).is_empty());
        assert_eq!(apart.begin_reads(READ, |_| false), [("chat:a".into(), 5)]);
        assert!(
            apart.begin_reads(128, |_| false).is_empty(),
            "it is being read"
        );
        let failed = Page {
            read: Err("no answer".to_owned()),
            ..nothing()
        };
        apart.took(failed).unwrap_err();
        assert_eq!(
            apart.begin_reads(128, |_| false).len(),
            1,
            "it is read again"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_erased_is_not_looked_for_without_end() {
        let mut apart = Apart::default();
        apart.begin("chat:a".into(), (5, 9), Some(7));
        let taken = apart.took(nothing()).unwrap();
        assert!(matches!(taken, Next::Take(stored) if stored.is_empty()));
        sleep(GONE_AFTER).await;
        assert!(matches!(apart.took(nothing()), Ok(Next::Remove(7))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_room_waits_apart_until_all_that_has_come_was_read() {
        let mut apart = Apart::default();
        apart.begin("chat:a".into(), (5, 4), Some(7));
        apart.begin_reads(128, |_| false);
        // It comes after the read.
        assert!(apart.takes("chat:a", 6));
        let taken = apart.took(nothing()).unwrap();
        assert!(matches!(taken, Next::Take(stored) if stored.is_empty()));
        assert_eq!(place(&apart), Some((5, 6)));
        // The next refused one stays where it is, and nothing of what has come is forgotten.
        apart.begin("chat:a".into(), (5, 5), None);
        assert_eq!(place(&apart), Some((5, 6)));
        apart.begin("chat:a".into(), (7, 6), None);
        assert!(matches!(apart.took(nothing()), Ok(Next::Take(_))));
        sleep(REPLICAS_LAG).await;
        assert!(matches!(apart.took(nothing()), Ok(Next::Remove(7))));
        assert!(!apart.has("chat:a"));
    }
}
