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

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

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

/// After this time without a find, entries that were acknowledged are not in the stream any more.
const GONE_AFTER: Duration = Duration::from_secs(30);

/// Where the rooms apart of one partition go on.
#[derive(Debug, Default)]
pub(super) struct Apart {
    rooms: HashMap<Arc<str>, Place>,
    /// All of `rooms`, in the order in which they are read.
    turns: VecDeque<Arc<str>>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    /// The entries before it are done, or in hand.
    next: u64,
    /// The newest entry that was acknowledged unsent.
    newest: u64,
    doing: Doing,
    /// Of its key.
    revision: u64,
    /// Since when reads find nothing, although something was acknowledged.
    empty_since: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Nothing,
    /// Its entries are being read.
    Reading,
    /// Its key is being removed: it is as any other room, but a key that is found is its old one.
    Removing,
}

/// What is to be done for a room of which nothing is in hand.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// Its entries are read from there on.
    Read(Arc<str>, u64),
    /// It is as any other, and its key of this revision is removed.
    Remove(Arc<str>, u64),
}

/// What was read of a room.
#[derive(Debug)]
pub(super) struct Page {
    pub room: Arc<str>,
    /// The next entries and the revision of the key, or why they can't be read.
    pub read: Result<(Vec<Stored>, Option<u64>), String>,
}

impl Apart {
    /// Reads which rooms wait apart, of those that this process does not know yet. [`Self::delivered`] has to follow.
    pub(super) async fn load(
        &mut self,
        parts: &Parts,
        hook: &Hook,
        part: u16,
        epoch: Epoch,
    ) -> Result<(), KvError> {
        let keys = hook_apart_keys(hook.name(), part);
        for entry in parts.bucket.scan(&keys).await? {
            let Some(value) = entry.value else { continue };
            let room = parse_hook_apart_key(&entry.key);
            let place = std::str::from_utf8(&value).ok().and_then(|text| {
                let (its, seq) = text.split_once('.')?;
                Some((its.to_owned(), seq.parse::<u64>().ok()?))
            });
            match room.zip(place) {
                Some((room, (its, next))) if its == epoch.to_string() => {
                    let room: Arc<str> = room.as_str().into();
                    if !self.rooms.contains_key(&room) {
                        self.begin(room, (next, 0), Some(entry.revision));
                    }
                }
                // What stood there is gone with the stream.
                _ => drop(parts.bucket.remove_at(&entry.key, entry.revision).await?),
            }
        }
        Ok(())
    }

    /// The consumer has delivered everything up to there, to whichever process: of rooms apart it is acknowledged.
    pub(super) fn delivered(&mut self, seq: u64) {
        for place in self.rooms.values_mut() {
            place.newest = place.newest.max(seq);
        }
    }

    /// Whether an entry of a room is one of those that are read later. It is noted.
    pub(super) fn takes(&mut self, room: &str, seq: u64) -> bool {
        let place = self.rooms.get_mut(room);
        let Some(place) = place.filter(|place| place.doing != Doing::Removing) else {
            return false;
        };
        if seq < place.next {
            return false;
        }
        (place.newest, place.empty_since) = (place.newest.max(seq), None);
        true
    }

    /// Whether a room waits apart.
    pub(super) fn has(&self, room: &str) -> bool {
        let place = self.rooms.get(room);
        place.is_some_and(|place| place.doing != Doing::Removing)
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
            doing: Doing::Nothing,
            revision: revision
                .or(before.map(|before| before.revision))
                .unwrap_or_default(),
            empty_since: None,
        };
        if self.rooms.insert(Arc::clone(&room), place).is_none() {
            self.turns.push_back(room);
        }
    }

    /// What is to be done for rooms of which nothing is in hand, in turn. So many are read that there is room for `free`
    /// entries.
    pub(super) fn acts(&mut self, free: usize, is_in_hand: impl Fn(&str) -> bool) -> Vec<Act> {
        let all = self.rooms.values();
        let reading = all.filter(|place| place.doing == Doing::Reading).count();
        let mut may = (free / READ).saturating_sub(reading);
        let (mut acts, mut read) = (Vec::new(), Vec::new());
        for _ in 0..self.turns.len() {
            let Some(room) = self.turns.pop_front() else {
                break;
            };
            let Some(place) = self.rooms.get_mut(&room) else {
                continue;
            };
            if place.doing == Doing::Nothing && !is_in_hand(&room) {
                if place.newest < place.next {
                    place.doing = Doing::Removing;
                    acts.push(Act::Remove(Arc::clone(&room), place.revision));
                } else if may > 0 {
                    may -= 1;
                    place.doing = Doing::Reading;
                    acts.push(Act::Read(Arc::clone(&room), place.next));
                    // The others come before it next time.
                    read.push(room);
                    continue;
                }
            }
            self.turns.push_back(room);
        }
        self.turns.extend(read);
        acts
    }

    /// Takes in what was read. Returns what is to be taken in hand: nothing that the consumer has not delivered yet.
    pub(super) fn took(&mut self, Page { room, read }: Page) -> Result<Vec<Stored>, String> {
        let Some(place) = self.rooms.get_mut(&room) else {
            return Ok(Vec::new());
        };
        place.doing = Doing::Nothing;
        let (mut stored, revision) = read.inspect_err(|_| place.empty_since = None)?;
        place.revision = revision.unwrap_or(place.revision);
        let is_empty = stored.is_empty();
        stored.retain(|stored| stored.record.seq <= place.newest);
        match stored.last() {
            Some(last) => (place.next, place.empty_since) = (last.record.seq + 1, None),
            // The others are newer: everything was read.
            None if !is_empty => place.next = place.newest + 1,
            // What was acknowledged may not have come to the replica that was read, or was erased since.
            None => {
                let since = *place.empty_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= GONE_AFTER {
                    place.next = place.newest + 1;
                }
            }
        }
        Ok(stored)
    }

    /// The key of a room with this revision is removed, or another one is there.
    pub(super) fn forgotten(&mut self, room: &str, revision: u64) {
        let place = self.rooms.get(room);
        if place.is_some_and(|its| its.doing == Doing::Removing && its.revision == revision) {
            self.rooms.remove(room);
            self.turns.retain(|its| **its != *room);
        }
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
        let page = parts
            .reader
            .some(&stream, epoch, &filter, (next, READ))
            .await;
        let stored = page.map_err(|error| error.to_string())?;
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

    fn nothing() -> Page {
        Page {
            room: "chat:a".into(),
            read: Ok((Vec::new(), None)),
        }
    }

    fn read(next: u64) -> [Act; 1] {
        [Act::Read("chat:a".into(), next)]
    }

    fn remove(revision: u64) -> [Act; 1] {
        [Act::Remove("chat:a".into(), revision)]
    }

    #[tokio::test(start_paused = true)]
    async fn a_room_is_read_when_nothing_of_it_is_in_hand() {
        let mut apart = Apart::default();
        assert!(!apart.takes("chat:a", 5));
        apart.begin("chat:a".into(), (5, 9), Some(1));
        // The one that is refused stays in hand.
        assert!(!apart.takes("chat:a", 4));
        assert!(apart.takes("chat:a", 12) && !apart.takes("chat:b", 12));
        assert!(apart.acts(128, |room| room == "chat:a").is_empty());
        assert!(apart.acts(READ - 1, |_| false).is_empty());
        assert_eq!(apart.acts(READ, |_| false), read(5));
        assert!(apart.acts(128, |_| false).is_empty(), "it is being read");
        let failed = Page {
            read: Err("no answer".to_owned()),
            ..nothing()
        };
        apart.took(failed).unwrap_err();
        assert_eq!(apart.acts(128, |_| false), read(5), "it is read again");
        apart.begin("chat:b".into(), (1, 1), Some(2));
        apart.took(nothing()).unwrap();
        let turn = |apart: &mut Apart| match apart.acts(READ, |_| false).pop() {
            Some(Act::Read(room, _)) => room,
            other => panic!("{other:?}"),
        };
        let first = turn(&mut apart);
        apart
            .took(Page {
                room: first.clone(),
                ..nothing()
            })
            .unwrap();
        assert_ne!(turn(&mut apart), first, "they are read in turn");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_acknowledged_and_can_not_be_found_is_looked_for_so_long() {
        let mut apart = Apart::default();
        apart.begin("chat:a".into(), (5, 9), Some(7));
        apart.took(nothing()).unwrap();
        sleep(GONE_AFTER).await;
        // Another one is waited for anew: a replica may lag behind.
        assert!(apart.takes("chat:a", 12));
        apart.took(nothing()).unwrap();
        assert_eq!(apart.acts(128, |_| false), read(5));
        sleep(GONE_AFTER).await;
        apart.took(nothing()).unwrap();
        assert_eq!(apart.acts(128, |_| false), remove(7));
    }

    #[test]
    fn a_room_of_which_all_was_read_is_as_any_other() {
        let mut apart = Apart::default();
        // From its key: what was acknowledged says the consumer.
        apart.begin("chat:a".into(), (5, 0), Some(7));
        apart.delivered(9);
        assert_eq!(apart.acts(128, |_| false), read(5));
        apart.begin("chat:a".into(), (10, 0), None);
        assert_eq!(apart.acts(128, |_| false), remove(7));
        // While the key is being removed, its entries are taken in hand.
        assert!(!apart.takes("chat:a", 11) && !apart.has("chat:a"));
        // It is refused again meanwhile: the old key is gone, and the room is not.
        apart.begin("chat:a".into(), (12, 13), Some(8));
        apart.forgotten("chat:a", 7);
        assert!(apart.has("chat:a"));
        assert_eq!(apart.acts(128, |_| false), read(12));
        apart.begin("chat:a".into(), (14, 0), None);
        assert_eq!(apart.acts(128, |_| false), remove(8));
        apart.forgotten("chat:a", 8);
        assert!(apart.rooms.is_empty() && apart.acts(128, |_| false).is_empty());
        assert!(apart.turns.is_empty());
    }
}
