//! Unread messages: counted by the stream, from the reader's marker on.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use futures_util::future::try_join_all;

use super::{error::MarkerError, index::Key, markers::Markers};
use crate::{
    bus::{MAX_HEADS, Newer, Reader, Streams},
    model::{Class, Cursor, RoomId},
    subject::{marker_key, rooms_stream},
    telemetry::metrics::{Counter, count},
};

/// The number of a user's unread messages in a room.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Unread {
    /// At most `limits.unread_cap`.
    pub count: u64,
    /// Whether there are more.
    pub capped: bool,
    /// How many of them mention the user; `None` if that was not counted.
    pub mentions: Option<u64>,
    /// The marker from which they were counted.
    pub marker: Option<Cursor>,
}

/// Unread messages up to which those are counted that mention the user: they have to be read.
const MENTIONS_COUNTED: u64 = 200;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// Unread messages.
    Unread,
    /// Also those of them that mention the user.
    Mentions,
    /// Unread messages, only in rooms where the user has a marker. Without one, the stream would be searched from its
    /// beginning.
    Marked,
}

impl Markers {
    /// The numbers of `user`'s unread messages in durable rooms: those after the marker that the stream still holds.
    ///
    /// First the markers are read, with one request for each origin; then the heads, with one for each origin and
    /// partition. More than `MAX_HEADS` rooms need several. Only rooms whose head lies after the marker are counted,
    /// with one request for each room and origin.
    ///
    /// # Errors
    /// [`MarkerError`].
    pub async fn unread<'r>(
        &self,
        user: &str,
        rooms: impl IntoIterator<Item = &'r RoomId>,
        counted: Counted,
    ) -> Result<HashMap<&'r RoomId, Unread>, MarkerError> {
        let keys: BTreeMap<&RoomId, Key> = rooms
            .into_iter()
            .map(|room| (room, Key::from(marker_key(room, user))))
            .collect();
        if keys.is_empty() {
            return Ok(HashMap::new());
        }
        let reader = &self.counting.reader;
        if !reader.connection().is_up() || !self.bucket.connection().is_up() {
            return Err(MarkerError::Unavailable);
        }
        let _turn = self.counting.turn(user).await?;
        let requests = keys.len().div_ceil(MAX_HEADS);
        // Includes what another edge has just written.
        self.load(keys.values().map(Arc::clone).collect()).await?;
        let markers: HashMap<&RoomId, Cursor> = keys
            .iter()
            .filter_map(|(room, key)| Some((*room, self.known(room, key)?)))
            .collect();
        let keys = keys.keys().copied();
        let rooms: Vec<&RoomId> = match counted {
            Counted::Marked => keys.filter(|room| markers.contains_key(room)).collect(),
            Counted::Unread | Counted::Mentions => keys.collect(),
        };
        let none = |room: &&'r RoomId| Unread {
            mentions: (counted == Counted::Mentions).then_some(0),
            marker: markers.get(*room).cloned(),
            ..Unread::default()
        };
        let none = rooms.iter().map(|room| (*room, none(room)));
        let mut unread: HashMap<&RoomId, Unread> = none.collect();
        let mut by_part: BTreeMap<u16, Vec<&RoomId>> = BTreeMap::new();
        for room in rooms {
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
        for (room, count) in rooms.iter().zip(reader.count_newer(&newer).await?) {
            *counts.entry(room).or_default() += count;
        }
        let few = |room: &RoomId| {
            counts
                .get(room)
                .is_some_and(|its| *its <= self.mentions_cap())
        };
        let read = rooms.iter().zip(&newer).filter(|(room, _)| few(room));
        let read = read.map(async |(room, newer)| {
            Ok::<_, MarkerError>((*room, self.mentions(user, room, newer).await?))
        });
        let mentions = match counted {
            Counted::Mentions => try_join_all(read).await?,
            Counted::Unread | Counted::Marked => Vec::new(),
        };
        for (room, count) in &counts {
            let its = mentions.iter().filter(|(of, _)| of == room);
            let all = its.map(|(_, mentions)| *mentions).sum::<Option<u64>>();
            let is_counted = counted == Counted::Mentions && few(room);
            unread.insert(
                room,
                Unread {
                    count: (*count).min(self.unread_cap),
                    capped: *count > self.unread_cap,
                    mentions: all.filter(|_| is_counted),
                    marker: markers.get(*room).cloned(),
                },
            );
        }
        Ok(unread)
    }

    /// Unread messages up to which mentions are counted.
    #[must_use]
    pub fn mentions_cap(&self) -> u64 {
        self.unread_cap.min(MENTIONS_COUNTED)
    }

    /// How many of few messages mention the user; `None` if they are too large to be read at once.
    async fn mentions(
        &self,
        user: &str,
        room: &RoomId,
        newer: &Newer,
    ) -> Result<Option<u64>, MarkerError> {
        let Newer {
            stream,
            subject,
            after,
        } = newer;
        let part = self.part(room);
        let epoch = self.origins.own().known(part).epoch;
        let (messages, more) = self
            .counting
            .reader
            .log(stream, epoch, subject, after + 1)
            .await?;
        let mentions = messages.iter().filter(|it| it.record.mentions_user(user));
        Ok((more == 0).then(|| mentions.count() as u64))
    }

    /// Which of `rooms`, all of one partition, have messages of one origin after the marker, and from which position
    /// they are to be counted.
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
            // A marker of another epoch, or without this origin, counts as no marker: everything in the stream is
            // unread.
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
