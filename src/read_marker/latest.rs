//! The newest messages of many rooms at once.

use std::collections::{BTreeMap, HashMap};

use futures_util::future::try_join_all;

use super::{MarkerError, Markers};
use crate::{
    bus::Streams,
    model::{Class, Cursor, Position, RoomId},
    protocol::LastMessage,
    subject::{marker_key, rooms_stream},
};

/// Rooms whose newest messages are read in one request, so that they fit into memory however large they are.
const AT_ONCE: usize = 128;

/// The newest message of a room, over all origins.
#[derive(Debug, Clone)]
pub struct Latest {
    /// A cursor with the newest message of each origin.
    pub head: Cursor,
    /// What a summary shows of it; `text` has made its text of its body.
    pub last: LastMessage,
}

impl Markers {
    /// The newest messages of durable rooms. Rooms without one are left out. `text` takes from a body what is needed: the
    /// bodies are not kept.
    ///
    /// # Errors
    /// [`MarkerError`].
    pub async fn latest(
        &self,
        user: &str,
        rooms: &[&RoomId],
        text: fn(&[u8]) -> Option<String>,
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
                    reads.push(self.latest_of(streams, part, rooms, text));
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
        text: fn(&[u8]) -> Option<String>,
    ) -> Result<Vec<(RoomId, Latest)>, MarkerError> {
        let origin = streams.origin();
        let epoch = streams.known(part).epoch;
        let subjects: Vec<String> = rooms
            .iter()
            .map(|room| self.subjects.publish(origin, part, room, Class::Msg))
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
            let latest = Latest {
                head: head_cursor,
                last: LastMessage {
                    text: text(&record.body),
                    id: record.id,
                    from: record.from,
                    ts: record.ts,
                },
            };
            (head.room, latest)
        });
        Ok(latest.collect())
    }

    /// The marker of a user, as it was read last.
    #[must_use]
    pub fn marker(&self, room: &RoomId, user: &str) -> Option<Cursor> {
        self.known(room, &marker_key(room, user))
    }
}
