//! Keeps the directory of rooms in MongoDB: a copy of the records, with the time at which somebody last spoke.
//!
//! Each service of each region lists what changes in the buckets that it can read. What they write is the merge of what
//! is there already with what they have read, so it does not matter who is first, or how often it is done.
//!
//! **Activity.** Workers note in memory where somebody spoke. Every [`FLUSH`] that is written, one statement a room,
//! however many messages there were. What a service had not written when it was killed is looked up in the messages when
//! all rooms are listed again: at the start, and from time to time.

use std::{
    collections::{BTreeSet, HashMap},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use super::{Parts, question::RoomsAnswer, worker::Backoff};
use crate::{
    bus::KvError,
    model::RoomId,
    people::{MemberState, Record, RoomKind, Sweep},
    protocol::{ErrorCode, Refused},
    runtime::Phase,
    store::{ListedRoom, StoreError, WhichRooms},
};

/// Pause between two looks for changes.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Pause between two writes of activity.
const FLUSH: Duration = Duration::from_secs(2);

/// How often all rooms are listed again; the shortest pause is half of it.
const ALL_EVERY: Duration = Duration::from_secs(3600);

/// Rooms that are listed at once.
const AT_ONCE: usize = 200;

/// Attempts to list a room that others list at the same time.
const ATTEMPTS: usize = 20;

/// Rooms of which it is noted at most that somebody spoke there, while that can't be written. Of others it is looked up
/// when all rooms are listed again.
const MAX_SPOKEN: usize = 65_536;

/// The most rooms on a page.
const MAX_PAGE: usize = 200;

/// What the parts of the service share of the directory.
#[derive(Debug, Default)]
pub(super) struct Directory {
    /// Where somebody spoke since that was last written, and when, in ms since 1970.
    spoken: Mutex<HashMap<RoomId, u64>>,
    /// Whether all rooms are in the directory.
    filled: AtomicBool,
}

/// Rooms can't be listed now.
#[derive(Debug, thiserror::Error)]
enum ListError {
    #[error(transparent)]
    Records(#[from] KvError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Directory {
    /// Notes that somebody spoke in rooms.
    pub(super) fn spoke<'r>(&self, rooms: impl Iterator<Item = (&'r RoomId, u64)>) {
        let mut spoken = self.spoken.lock();
        for (room, at) in rooms {
            let is_full = spoken.len() >= MAX_SPOKEN;
            match spoken.get_mut(room) {
                Some(last) => *last = at.max(*last),
                None if !is_full => drop(spoken.insert(room.clone(), at)),
                None => {}
            }
        }
    }
}

/// Writes where somebody spoke, forever.
pub(super) async fn note_activity(parts: Parts) {
    if parts.lifecycle.reached(Phase::Ready).await != Phase::Ready {
        return;
    }
    loop {
        sleep(FLUSH).await;
        let spoken = std::mem::take(&mut *parts.directory.spoken.lock());
        let spoken: Vec<(RoomId, u64)> = spoken.into_iter().collect();
        if let Err(error) = parts.store.note_activity(&spoken).await {
            parts.figures.failed(&error, "activity is not noted yet");
            let again = spoken.iter().map(|(room, at)| (room, *at));
            parts.directory.spoke(again);
        }
    }
}

/// Lists all rooms, and then those whose records change, forever.
pub(super) async fn list(parts: Parts) {
    if parts.lifecycle.reached(Phase::Ready).await != Phase::Ready {
        return;
    }
    let mut sweep = Sweep::new(&parts.people);
    let mut pause = Backoff::default();
    // What was read and is not listed yet.
    let mut rooms: BTreeSet<RoomId> = BTreeSet::new();
    let mut all = true;
    let mut all_at = Instant::now();
    // Whether the last sweep left something; known also if what it brought could not be listed at once.
    let mut more = true;
    loop {
        let begun = Instant::now();
        if all_at <= begun {
            sweep.restart();
            (all, more) = (true, true);
            all_at = begun + ALL_EVERY.mul_f64(rand::random_range(0.5..1.0));
        }
        let step = async {
            if !parts.directory.filled.load(Ordering::Relaxed) {
                let filled = parts.store.is_directory_filled().await?;
                parts.directory.filled.store(filled, Ordering::Relaxed);
            }
            if rooms.is_empty() {
                let swept = sweep.next().await?;
                more = swept.iter().any(|swept| swept.more);
                let swept = swept.into_iter().flat_map(|swept| swept.rooms);
                rooms.extend(swept.map(|(room, _age)| room));
            }
            while !rooms.is_empty() {
                let part: BTreeSet<RoomId> = rooms.iter().take(AT_ONCE).cloned().collect();
                list_some(&parts, &part, all).await?;
                rooms.retain(|room| !part.contains(room));
            }
            if all && !more {
                all = false;
                parts.store.note_directory_filled().await?;
                parts.directory.filled.store(true, Ordering::Relaxed);
            }
            Ok::<_, ListError>(())
        };
        match step.await {
            Ok(()) => {
                pause = Backoff::default();
                // It pauses as long as it works, so it uses at most half of the time.
                let busy = begun.elapsed();
                sleep(if more { busy } else { busy.max(LOOK_EVERY) }).await;
            }
            Err(error) => {
                let what = "rooms are not listed now";
                match error {
                    ListError::Store(error) => parts.figures.failed(&error, what),
                    // The repair of the index reads the same, and says so.
                    ListError::Records(error) => tracing::debug!(%error, "{what}"),
                }
                sleep(pause.next()).await;
            }
        }
    }
}

/// Lists rooms as their records are now. `all`: when somebody last spoke there is looked up, also where the room is
/// listed already.
async fn list_some(parts: &Parts, rooms: &BTreeSet<RoomId>, all: bool) -> Result<(), ListError> {
    let mut left = rooms.clone();
    let mut look_up: BTreeSet<RoomId> = BTreeSet::new();
    let mut listed = BTreeSet::new();
    for attempt in 0..ATTEMPTS {
        let records = parts.people.records_of(&left).await?;
        let keys: Vec<RoomId> = records.iter().map(|(room, _)| room.clone()).collect();
        let known = parts.store.known_records(&keys).await?;
        let mut changed = Vec::new();
        for (room, record) in records {
            let known = known.get(&room);
            if attempt == 0 && (all || known.is_none()) {
                look_up.insert(room.clone());
            }
            let merged = known.map_or(record.clone(), |known| record.merged_with(&known.record));
            let version = known.and_then(|known| known.version.clone());
            let new = listed_room(room, &merged);
            if version.as_ref() != Some(&new.version) {
                changed.push((new, version));
            }
        }
        if changed.is_empty() {
            // After the room was written: whoever notes activity finds it then, so nothing falls between the two.
            parts.store.look_up_activity(&look_up).await?;
            parts.figures.listed(listed.len());
            return Ok(());
        }
        parts.store.list_rooms(&changed).await?;
        left = changed.into_iter().map(|(room, _)| room.room).collect();
        listed.extend(left.iter().cloned());
    }
    let problem = "rooms are listed by too many at once";
    Err(StoreError::Unavailable(problem.to_owned()).into())
}

fn listed_room(room: RoomId, record: &Record) -> ListedRoom {
    let names = |state: MemberState| {
        let of_state = record.members.iter();
        let of_state = of_state.filter(move |(_, member)| member.state == state);
        of_state.map(|(user, _)| user.clone()).collect()
    };
    ListedRoom {
        kind: record.kind.as_str(),
        about: record.about.clone(),
        title: record.title(),
        archived: record.is_archived(),
        closed: record.is_closed(),
        anybody: record.kind == RoomKind::Open,
        members: names(MemberState::In),
        banned: names(MemberState::Banned),
        created: record.made.created,
        record: record.to_json(),
        version: record.version(),
        room,
    }
}

/// Answers a question to the directory.
pub(super) async fn answer(parts: &Parts, which: &WhichRooms) -> Result<RoomsAnswer, Refused> {
    let away = |text: String| Refused::new(ErrorCode::Unavailable, text);
    if !(1..=MAX_PAGE).contains(&which.limit) {
        let text = format!("limit must be 1 to {MAX_PAGE}");
        return Err(Refused::new(ErrorCode::BadRequest, text));
    }
    if !parts.directory.filled.load(Ordering::Relaxed) {
        let text = "the directory of rooms is not filled yet";
        return Err(away(text.to_owned()));
    }
    let found = parts.store.rooms_where(which).await;
    let (rooms, more) = found.map_err(|error| {
        tracing::debug!(%error, "the directory of rooms can't be asked");
        away(format!("the directory of rooms does not answer: {error}"))
    })?;
    Ok(RoomsAnswer { rooms, more })
}
