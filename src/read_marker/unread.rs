//! How much is new: counted by the stream, after the reader's marker.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use futures_util::future::try_join_all;

use super::{MarkerError, Markers, markers::Key};
use crate::{
    bus::{MAX_HEADS, Newer, Reader, Streams},
    model::{Class, Cursor, RoomId},
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
    /// Of each origin: the markers are read in one request, the heads in one a partition; only rooms whose head lies after
    /// the marker are counted, in a request each.
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
            let part = self.part(room);
            by_part.entry(part).or_default().push(room);
        }
        let origins = self.origins.all();
        let asks: Vec<(u16, &[&RoomId], &Streams)> = by_part
            .iter()
            .flat_map(|(part, rooms)| rooms.chunks(MAX_HEADS).map(|rooms| (*part, rooms)))
            .flat_map(|(part, rooms)| origins.iter().map(move |of| (part, rooms, &**of)))
            .collect();
        let behind = asks.iter().map(async |(part, rooms, streams)| {
            self.behind(streams, *part, rooms, &markers, reader).await
        });
        let behind = try_join_all(behind).await?.concat();
        let asked = requests * origins.len() + asks.len() + behind.len();
        count(
            Counter::UnreadRequests,
            u64::try_from(asked).unwrap_or(u64::MAX),
        );
        let (rooms, newer): (Vec<&RoomId>, Vec<Newer>) = behind.into_iter().unzip();
        let mut counts: HashMap<&RoomId, u64> = HashMap::new();
        for (room, count) in rooms.into_iter().zip(reader.count_newer(&newer).await?) {
            *counts.entry(room).or_default() += count;
        }
        for (room, count) in counts {
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

    /// Which of `rooms`, all of one partition, have messages of one origin after the marker, and from where on they are to
    /// be counted.
    async fn behind<'r>(
        &self,
        streams: &Streams,
        part: u16,
        rooms: &[&'r RoomId],
        markers: &HashMap<&RoomId, Cursor>,
        reader: &Reader,
    ) -> Result<Vec<(&'r RoomId, Newer)>, MarkerError> {
        let origin = streams.origin();
        let stream = rooms_stream(origin, part);
        let epoch = streams.known(part).epoch;
        let subjects: Vec<String> = rooms
            .iter()
            .map(|room| self.subjects.publish(origin, part, room, Class::Msg))
            .collect();
        let heads = reader.heads(&stream, epoch, &subjects).await?;
        let heads: HashMap<&RoomId, u64> = heads
            .iter()
            .map(|head| (&head.room, head.record.seq))
            .collect();
        let rooms = rooms.iter().zip(subjects).filter_map(|(room, subject)| {
            // A marker of another epoch, or without this origin, is as good as none: everything that is there is new.
            let position = markers.get(*room).and_then(|marker| marker.get(origin));
            let after = position
                .filter(|position| position.epoch == epoch)
                .map_or(0, |position| position.seq);
            let newer = Newer {
                stream: stream.clone(),
                subject,
                after,
            };
            (*heads.get(*room)? > after).then_some((*room, newer))
        });
        Ok(rooms.collect())
    }
}
