//! How much is new: counted by the stream, after the reader's marker.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{MarkerError, Markers, markers::Key};
use crate::{
    bus::{MAX_HEADS, Newer, Reader},
    model::{Class, Cursor, RoomId, partition_of},
    subject::{marker_key, rooms_stream},
    telemetry::metrics::{Counter, count},
};

/// How many messages of a room are new to a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Unread {
    /// At most `limits.unread_cap`.
    pub count: u64,
    /// Whether there are more.
    pub capped: bool,
}

impl Markers {
    /// How many messages of each durable room are new to `user`: those after their marker that the stream still holds. Read
    /// over `reader`.
    ///
    /// The markers are read in one request, the heads in one a partition; only rooms whose head lies after the marker are
    /// counted, in a request each.
    ///
    /// # Errors
    /// [`MarkerError`].
    pub async fn unread<'r>(
        &self,
        user: &str,
        rooms: impl IntoIterator<Item = &'r RoomId>,
        reader: &Reader,
    ) -> Result<HashMap<&'r RoomId, Unread>, MarkerError> {
        let keys: BTreeMap<&RoomId, Key> = rooms
            .into_iter()
            .map(|room| (room, Key::from(marker_key(room, user))))
            .collect();
        let mut unread: HashMap<&RoomId, Unread> =
            keys.keys().map(|room| (*room, Unread::default())).collect();
        if keys.is_empty() {
            return Ok(unread);
        }
        if !reader.connection().is_up() || !self.bucket.connection().is_up() {
            return Err(MarkerError::Unavailable);
        }
        let requests = keys.len().div_ceil(MAX_HEADS);
        // What another edge wrote a moment ago counts too.
        self.load(keys.values().map(Arc::clone).collect()).await?;
        let markers: HashMap<&RoomId, Cursor> = keys
            .iter()
            .filter_map(|(room, key)| Some((*room, self.known(room, key)?)))
            .collect();
        let mut by_part: BTreeMap<u16, Vec<&RoomId>> = BTreeMap::new();
        for room in keys.keys() {
            let part = partition_of(room, self.streams.partitions());
            by_part.entry(part).or_default().push(room);
        }
        let mut asked = requests;
        let mut behind = Vec::new();
        let origin = self.streams.origin();
        for (part, rooms) in by_part {
            let stream = rooms_stream(origin, part);
            let epoch = self.streams.known(part).epoch;
            for rooms in rooms.chunks(MAX_HEADS) {
                let subject = |room: &RoomId| self.subjects.publish(origin, part, room, Class::Msg);
                let subjects: Vec<String> = rooms.iter().copied().map(subject).collect();
                asked += 1;
                let heads = reader.heads(&stream, epoch, &subjects).await?;
                let heads: HashMap<&RoomId, u64> = heads
                    .iter()
                    .map(|head| (&head.room, head.record.seq))
                    .collect();
                for (room, subject) in rooms.iter().zip(subjects) {
                    // A marker of another epoch is as good as none: everything that is there is new.
                    let position = markers.get(*room).and_then(|marker| marker.get(origin));
                    let after = position
                        .filter(|position| position.epoch == epoch)
                        .map_or(0, |position| position.seq);
                    if heads.get(*room).is_some_and(|head| *head > after) {
                        let stream = stream.clone();
                        let newer = Newer {
                            stream,
                            subject,
                            after,
                        };
                        behind.push((*room, newer));
                    }
                }
            }
        }
        asked += behind.len();
        count(
            Counter::UnreadRequests,
            u64::try_from(asked).unwrap_or(u64::MAX),
        );
        let (rooms, newer): (Vec<&RoomId>, Vec<Newer>) = behind.into_iter().unzip();
        for (room, count) in rooms.into_iter().zip(reader.count_newer(&newer).await?) {
            unread.insert(
                room,
                Unread {
                    count: count.min(self.unread_cap),
                    capped: count > self.unread_cap,
                },
            );
        }
        Ok(unread)
    }
}
