//! The records of all rooms, and the repair of the index by them: what the history service does with them.
//!
//! A [`Sweep`] reads the buckets of all regions in parts, from the first revision on, and then again and again what has
//! changed since. That needs no subscription: a bucket has each key once, at the revision of its last change, so what
//! comes after a revision is all that has changed since. Nothing is lost by a reconnect, and a restart begins anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    index,
    known::People,
    record::{Member, Record, merged},
    write::refusal,
};
use crate::{
    bus::KvError,
    model::{Region, RoomId},
    protocol::Refused,
    runtime::unix_ms,
    subject::{RECORD_KEYS, inbox_key, parse_record_key, record_key},
};

/// How long a bucket must seem older than what was read of it before it is read from the beginning. A replica may lag
/// behind for a moment; a bucket that was made anew stays.
const OLDER_FOR: Duration = Duration::from_secs(10);

/// Entries of the index that are compared at once.
const COMPARED: usize = 1000;

/// Reads the records of all rooms, and then what changes.
#[derive(Debug)]
pub struct Sweep {
    people: Arc<People>,
    places: BTreeMap<Region, Place>,
}

/// How far the bucket of one region was read.
#[derive(Debug, Default)]
struct Place {
    /// Everything up to this revision.
    revision: u64,
    /// Since when its newest revision has been less than that.
    older_since: Option<Instant>,
}

/// A part of what has changed.
#[derive(Debug)]
pub struct Swept {
    /// The rooms, each with the time since its last change, in the bucket of `origin`.
    pub rooms: Vec<(RoomId, Duration)>,
    /// The region whose bucket it is.
    pub origin: Region,
    /// Whether there is more now.
    pub more: bool,
}

impl Sweep {
    /// A sweep that begins with all rooms.
    #[must_use]
    pub fn new(people: &Arc<People>) -> Self {
        Self {
            people: Arc::clone(people),
            places: BTreeMap::new(),
        }
    }

    /// Begins with all rooms again.
    pub fn restart(&mut self) {
        self.places.clear();
    }

    /// The next part of each region's bucket; none if nothing has changed. Only that of the own region must be readable.
    ///
    /// # Errors
    /// [`KvError`]. Nothing was taken of the own region's bucket.
    pub async fn next(&mut self) -> Result<Vec<Swept>, KvError> {
        let mut all = Vec::new();
        // The own region's first, so that nothing was taken if it fails.
        for streams in self.people.origins.all() {
            let origin = streams.origin();
            match self.read(origin).await {
                Ok(swept) => all.extend(swept),
                Err(error) if origin == self.people.records.origin() => return Err(error),
                Err(error) => {
                    tracing::debug!(%origin, %error, "the records of another region can't be read");
                }
            }
        }
        Ok(all)
    }

    async fn read(&mut self, origin: &Region) -> Result<Option<Swept>, KvError> {
        let bucket = self.people.records.of(origin);
        let newest = bucket.newest(RECORD_KEYS).await?;
        let place = self.places.entry(origin.clone()).or_default();
        if newest >= place.revision {
            place.older_since = None;
        } else if place.older_since.get_or_insert_with(Instant::now).elapsed() > OLDER_FOR {
            tracing::info!(%origin, "the bucket of room records was made anew, and is read from the beginning");
            *place = Place::default();
        }
        if newest <= place.revision {
            return Ok(None);
        }
        let (entries, next) = bucket.scan_from(RECORD_KEYS, place.revision + 1).await?;
        let Some(last) = entries.last() else {
            return Ok(None);
        };
        place.revision = last.revision;
        let now = unix_ms();
        let rooms = entries.iter().filter_map(|entry| {
            let age = now.saturating_sub(entry.at);
            Some((parse_record_key(&entry.key)?, Duration::from_millis(age)))
        });
        Ok(Some(Swept {
            rooms: rooms.collect(),
            origin: origin.clone(),
            more: next.is_some(),
        }))
    }
}

impl People {
    /// The records of these rooms, as all regions that can be read have them now. Rooms without one are left out.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn records_of(
        &self,
        rooms: &BTreeSet<RoomId>,
    ) -> Result<Vec<(RoomId, Record)>, KvError> {
        let keys: Vec<String> = rooms.iter().map(record_key).collect();
        let entries = self.get(&self.records, &keys).await?;
        let records: BTreeMap<&str, Record> = merged(entries.iter().map(|(_, entry)| entry));
        let records = records.into_iter();
        Ok(records
            .filter_map(|(key, record)| Some((parse_record_key(key)?, record)))
            .collect())
    }

    /// Compares the index with what these records say of their members, and writes to the own region's what is missing
    /// or older there. Returns how many entries were written. Users' own settings stay.
    ///
    /// # Errors
    /// `unavailable`, or that an entry can't be written. Others may have been written.
    pub async fn repair_index(&self, rooms: &[(RoomId, Record)]) -> Result<u64, Refused> {
        let mut members: Vec<(String, &Member)> = Vec::new();
        for (room, record) in rooms {
            let of_room = record.members.iter();
            members.extend(of_room.map(|(user, member)| (inbox_key(user, room), member)));
        }
        let mut repaired = 0;
        for members in members.chunks(COMPARED) {
            let keys: Vec<String> = members.iter().map(|(key, _)| key.clone()).collect();
            let found = self.get(&self.index, &keys).await.map_err(refusal)?;
            let known: BTreeMap<&str, index::Entry> =
                merged(found.iter().map(|(_own, entry)| entry));
            let wrong = members.iter().filter(|(key, member)| {
                let known = known.get(key.as_str());
                known.is_none_or(|known| known.is_behind(member))
            });
            let wrong: Vec<&(String, &Member)> = wrong.collect();
            for (key, member) in wrong {
                repaired += u64::from(self.write_entry(key, member).await?);
            }
        }
        Ok(repaired)
    }
}
