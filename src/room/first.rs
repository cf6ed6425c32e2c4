//! Where a session begins that names the first message it wants, instead of a cursor.
//!
//! The answer is the place before that message. The place names no message of its own, so nothing but the sequence is
//! compared with the stream.

use std::rc::Rc;

use futures_util::future::try_join_all;

use super::{
    hub::Hub,
    joined::{JoinError, ResetReason},
    log::Positions,
    rooms::Rooms,
};
use crate::{
    bus::{ReadError, StreamError, StreamState},
    model::{Class, Cursor, Fingerprint},
    protocol::First,
    runtime::unix_ms,
};

/// The streams can't be read now.
#[derive(Debug, thiserror::Error)]
enum Unknown {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// A place in one track.
type At = (u64, Fingerprint);

/// The place before a sequence. It names no message.
fn before(seq: u64) -> At {
    (seq.saturating_sub(1), Fingerprint::default())
}

impl Rooms {
    /// The place before the first message that a session wants from a durable room whose hub has started. Or why there is
    /// none: the stream does not reach back so far.
    pub(super) async fn before(
        &self,
        hub: &Rc<Hub>,
        first: First,
    ) -> Result<Result<Cursor, ResetReason>, JoinError> {
        let places = match first {
            First::Oldest => self.before_oldest(hub).await.map(Some),
            First::Last => self.before_last(hub).await.map(Some),
            First::Sequence(seq) => self.before_sequence(hub, seq).await,
            First::Time(ms) => self.before_time(hub, ms.min(unix_ms())).await,
        };
        let places = places.map_err(|error| {
            tracing::debug!(%error, room.id = %hub.room, "the first message could not be found");
            JoinError::Unavailable
        })?;
        let cursor = |places| hub.log.borrow().cursor_of(&places, &[]);
        Ok(places.map(cursor).ok_or(ResetReason::Trimmed))
    }

    async fn before_oldest(&self, hub: &Hub) -> Result<Positions, Unknown> {
        let states = hub.sources.iter().map(|it| it.streams.fetch(hub.part));
        let states: Vec<StreamState> = try_join_all(states).await?;
        Ok(states.iter().map(|state| before(state.first_seq)).collect())
    }

    /// The last message is the newest one over all origins. What changes it comes after it.
    async fn before_last(&self, hub: &Hub) -> Result<Positions, Unknown> {
        let tracks = 0..hub.sources.len();
        let lasts = try_join_all(tracks.map(|track| self.last_message(hub, track))).await?;
        let lasts = lasts.into_iter().enumerate();
        let lasts = lasts.filter_map(|(track, last)| last.map(|(ts, seq)| (ts, track, seq)));
        match lasts.max() {
            None => Ok(hub.log.borrow().positions()),
            Some((ts, track, seq)) => self.around(hub, (track, before(seq)), ts).await,
        }
    }

    /// The time and sequence of a track's last message that is still stored.
    async fn last_message(&self, hub: &Hub, track: usize) -> Result<Option<(u64, u64)>, Unknown> {
        let (seq, in_memory, epoch) = {
            let log = hub.log.borrow();
            let seq = log.last(track, Class::Msg);
            (seq, log.time_of(track, seq), log.epoch(track))
        };
        if let Some(ts) = in_memory {
            return Ok(Some((ts, seq)));
        }
        let stream = &hub.sources[track].stream;
        let stored = self.reader.message(stream, epoch, seq).await?;
        // Without a message, the sequence is one at which the room was known to be empty.
        let of_room =
            stored.filter(|it| it.room == hub.room && matches!(it.record.class, Class::Msg));
        Ok(of_room.map(|it| (it.record.ts, seq)))
    }

    /// The sequence counts in the own track. The others begin at the time of the first message from there on.
    async fn before_sequence(&self, hub: &Hub, seq: u64) -> Result<Option<Positions>, Unknown> {
        let own = before(seq);
        if hub.sources.len() == 1 {
            return Ok(Some(vec![own]));
        }
        let epoch = hub.log.borrow().epoch(0);
        let (stream, filter) = (&hub.sources[0].stream, hub.filter(self, 0));
        let next = self.reader.next(stream, epoch, &filter, seq).await?;
        let Some(next) = next else {
            let mut places = hub.log.borrow().positions();
            places[0] = own;
            return Ok(Some(places));
        };
        if !self.reach_back(hub, 1, next.ts).await? {
            return Ok(None);
        }
        self.around(hub, (0, own), next.ts).await.map(Some)
    }

    async fn before_time(&self, hub: &Hub, ms: u64) -> Result<Option<Positions>, Unknown> {
        if !self.reach_back(hub, 0, ms).await? {
            return Ok(None);
        }
        let tracks = 0..hub.sources.len();
        let places = try_join_all(tracks.map(|track| self.since(hub, track, ms))).await?;
        Ok(Some(places))
    }

    /// One track at a place, and the others before their first messages of a time or later.
    async fn around(
        &self,
        hub: &Hub,
        (at, place): (usize, At),
        ms: u64,
    ) -> Result<Positions, Unknown> {
        let tracks = (0..hub.sources.len()).map(async |track| match track == at {
            true => Ok(place),
            false => self.since(hub, track, ms).await,
        });
        try_join_all(tracks).await
    }

    /// The place before a track's first message that was stored at `ms` or later.
    async fn since(&self, hub: &Hub, track: usize, ms: u64) -> Result<At, Unknown> {
        // Before the read. What is delivered meanwhile comes after it, and a copy of the stream that is behind has at
        // most lost what is in memory.
        let (in_memory, epoch) = {
            let log = hub.log.borrow();
            let newest = log.positions()[track];
            let first = log.first_since(track, ms);
            (first.map_or(newest, before), log.epoch(track))
        };
        let (stream, filter) = (&hub.sources[track].stream, hub.filter(self, track));
        let stored = self.reader.next_since(stream, epoch, &filter, ms).await?;
        Ok(stored.map_or(in_memory, |record| before(record.seq)))
    }

    /// Whether the streams from `track` on still hold everything that was stored at `ms` or later: nothing was trimmed
    /// yet, or their first message is older.
    async fn reach_back(&self, hub: &Hub, track: usize, ms: u64) -> Result<bool, Unknown> {
        let reaches = (track..hub.sources.len()).map(async |track| {
            let source = &hub.sources[track];
            let state = source.streams.fetch(hub.part).await?;
            if state.first_seq <= 1 {
                return Ok(true);
            }
            let first = self
                .reader
                .message(&source.stream, state.epoch, state.first_seq)
                .await?;
            Ok::<bool, Unknown>(first.is_some_and(|first| first.record.ts <= ms))
        });
        Ok(try_join_all(reaches).await?.into_iter().all(|it| it))
    }
}
