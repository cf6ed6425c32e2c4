//! The newest messages of many rooms at once.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures_util::future::try_join_all;

use super::{error::MarkerError, markers::Markers};
use crate::{
    bus::{Record, Streams, rooms_of},
    model::{Class, Cursor, Position, RoomId},
    protocol::LastMessage,
    subject::rooms_stream,
};

/// Rooms whose newest messages are read in one request, so that they fit into memory however large they are.
const AT_ONCE: usize = 128;

/// The newest message of a room, over all origins.
#[derive(Debug, Clone)]
pub struct Latest {
    /// A cursor with the newest message of each origin.
    pub head: Cursor,
    /// What a summary shows of it.
    pub last: LastMessage,
    /// From when on it is wanted, in ms since 1970; `None`: never.
    pub wanted: Option<u64>,
}

/// Looks at the newest message of a room: gives the text that a summary shows, and from when on it is wanted, in ms since
/// 1970. Bodies are not kept.
pub type Look<'l> = &'l (dyn Fn(&Record) -> (Option<String>, Option<u64>) + Sync);

impl Markers {
    /// The newest messages, or what refers to them, of durable rooms. Rooms without one are left out.
    ///
    /// # Errors
    /// [`MarkerError`].
    pub async fn latest(
        &self,
        user: &str,
        rooms: &[&RoomId],
        class: Class,
        look: Look<'_>,
    ) -> Result<HashMap<RoomId, Latest>, MarkerError> {
        if rooms.is_empty() {
            return Ok(HashMap::new());
        }
        let _turn = self.counting.turn(user).await?;
        let mut by_part: BTreeMap<u16, Vec<&RoomId>> = BTreeMap::new();
        for room in rooms {
            by_part.entry(self.part(room)).or_default().push(room);
        }
        let origins = self.origins.all();
        // One position of each origin: they never meet.
        let together = |one: &Cursor, other: &Cursor| one.merge(other, |_, _| true);
        let mut all: HashMap<RoomId, Latest> = HashMap::new();
        for (part, rooms) in by_part {
            for rooms in rooms.chunks(AT_ONCE) {
                let mut reads = Vec::with_capacity(origins.len());
                for streams in &origins {
                    reads.push(self.latest_of(streams, part, rooms, (class, look)));
                }
                for (room, one) in try_join_all(reads).await?.into_iter().flatten() {
                    match all.get_mut(&room) {
                        None => drop(all.insert(room, one)),
                        Some(known) => {
                            let head = together(&known.head, &one.head);
                            if one.last.ts > known.last.ts {
                                *known = one;
                            }
                            known.head = head;
                        }
                    }
                }
            }
        }
        Ok(all)
    }

    async fn latest_of(
        &self,
        streams: &Streams,
        part: u16,
        rooms: &[&RoomId],
        (class, look): (Class, Look<'_>),
    ) -> Result<Vec<(RoomId, Latest)>, MarkerError> {
        let origin = streams.origin();
        let epoch = streams.known(part).epoch;
        let subjects: Vec<String> = rooms
            .iter()
            .map(|room| self.subjects.publish(origin, part, room, class))
            .collect();
        let stream = rooms_stream(origin, part);
        let heads = self
            .counting
            .reader
            .heads(&stream, epoch, &subjects)
            .await?;
        let latest = heads.into_iter().map(|head| {
            let record = head.record;
            let head_cursor = Cursor::single(Position {
                origin: origin.clone(),
                epoch,
                seq: record.seq,
                fingerprint: record.fingerprint,
            });
            let (text, wanted) = look(&record);
            let latest = Latest {
                head: head_cursor,
                wanted,
                last: LastMessage {
                    text,
                    id: record.id,
                    from: record.from,
                    ts: record.ts,
                },
            };
            (head.room, latest)
        });
        Ok(latest.collect())
    }

    /// The rooms of a durable namespace of which the streams hold messages, and whether these are all: about `most` are
    /// listed.
    ///
    /// # Errors
    /// [`MarkerError`].
    pub async fn live_rooms(
        &self,
        user: &str,
        namespace: &str,
        most: usize,
    ) -> Result<(BTreeSet<RoomId>, bool), MarkerError> {
        let _turn = self.counting.turn(user).await?;
        let mut rooms = BTreeSet::new();
        for streams in self.origins.all() {
            for part in 0..streams.partitions() {
                let left = most.saturating_sub(rooms.len());
                if left == 0 {
                    return Ok((rooms, false));
                }
                let filter = self
                    .subjects
                    .stored_messages(streams.origin(), part, namespace);
                let connection = self.counting.reader.connection();
                let (stream, wait) = (streams.stream(part), self.timeout);
                let found = rooms_of(connection, &self.subjects, stream, &filter, wait, left);
                let found = found
                    .await
                    .map_err(|error| MarkerError::Refused(error.to_string()))?;
                rooms.extend(found);
            }
        }
        let all = rooms.len() < most;
        Ok((rooms, all))
    }

    /// Most unread messages that are counted (`limits.unread_cap`).
    #[must_use]
    pub fn unread_cap(&self) -> u64 {
        self.unread_cap
    }
}
