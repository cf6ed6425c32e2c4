//! What a session missed of one origin, read from the stream: once for all who miss about the same.
//!
//! Requests that arrive while a read is in flight are answered together by the next one, which begins at the oldest of their
//! cursors. So a reconnect storm costs NATS some reads a room, however many clients come back.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tracing::Instrument as _;

use super::{
    encode,
    hub::Hub,
    join::{JoinError, ResetReason},
    references::reference,
    rooms::Rooms,
};
use crate::{
    bus::{ReadError, Record, StreamError, StreamState},
    model::{Cursor, Fingerprint},
    telemetry::metrics::{Counter, Gauge, count, gauge_add},
};

/// Requests of one hub for what lies in one stream.
#[derive(Debug, Default)]
pub(super) struct Backlogs {
    waiting: RefCell<Vec<Waiter>>,
    reading: Cell<bool>,
}

#[derive(Debug)]
struct Waiter {
    since: (u64, Fingerprint),
    answer: oneshot::Sender<Answer>,
}

type Answer = Result<Backlog, Refusal>;

/// Why there is no backlog.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The session can't go on where it was.
    Reset(ResetReason),
    /// The stream could not be read.
    Failed(JoinError),
}

/// What was missed can't be read now.
#[derive(Debug, thiserror::Error)]
enum BacklogError {
    /// The messages can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Where the stream begins can't be read.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// The messages after a cursor, up to the end of the stream at the time of the read.
#[derive(Debug)]
pub(super) struct Backlog {
    held: Rc<Held>,
    skip: usize,
    /// Everything up to this place is in it.
    pub(super) upto: (u64, Fingerprint),
}

#[derive(Debug)]
struct Held {
    entries: Vec<Missed>,
    /// Its share of `rooms.replay_memory`.
    _share: OwnedSemaphorePermit,
    bytes: i64,
}

impl Drop for Held {
    fn drop(&mut self) {
        gauge_add(Gauge::ReplayBytes, -self.bytes);
    }
}

/// One missed message.
#[derive(Debug)]
pub(super) struct Missed {
    pub(super) seq: u64,
    pub(super) fingerprint: Fingerprint,
    /// Its time, ms since 1970.
    pub(super) ts: u64,
    /// The hash of its reference.
    pub(super) reference: Option<u64>,
    /// What its sender had seen of other origins.
    pub(super) after: Option<Cursor>,
    /// Its frame; the cursor in it names this origin alone.
    pub(super) frame: Bytes,
}

impl Backlog {
    pub(super) fn entries(&self) -> &[Missed] {
        &self.held.entries[self.skip..]
    }
}

impl Hub {
    /// What came after `since`, a position in a track of this hub's log.
    pub(super) async fn backlog(
        self: &Rc<Self>,
        rooms: &Rc<Rooms>,
        track: usize,
        since: (u64, Fingerprint),
    ) -> Answer {
        let (answer, answered) = oneshot::channel();
        let backlogs = &self.sources[track].backlogs;
        backlogs.waiting.borrow_mut().push(Waiter { since, answer });
        if backlogs.reading.replace(true) {
            count(Counter::ReplayCoalesced, 1);
        } else {
            let (hub, rooms) = (Rc::clone(self), Rc::clone(rooms));
            tokio::task::spawn_local(async move { hub.read_backlogs(&rooms, track).await });
        }
        answered
            .await
            .unwrap_or(Err(Refusal::Failed(JoinError::Unavailable)))
    }

    async fn read_backlogs(&self, rooms: &Rc<Rooms>, track: usize) {
        let backlogs = &self.sources[track].backlogs;
        loop {
            let mut group = std::mem::take(&mut *backlogs.waiting.borrow_mut());
            // Whoever gave up needs no answer.
            group.retain(|waiter| !waiter.answer.is_closed());
            if group.is_empty() {
                break;
            }
            group.sort_by_key(|waiter| waiter.since.0);
            while !group.is_empty() {
                self.serve_group(rooms, track, &mut group).await;
            }
        }
        backlogs.reading.set(false);
    }

    /// Reads from the oldest cursor of the group and answers as many as that can answer, at least one.
    async fn serve_group(&self, rooms: &Rc<Rooms>, track: usize, group: &mut Vec<Waiter>) {
        let oldest = group[0].since;
        let answer_oldest = |group: &mut Vec<Waiter>, refusal: &dyn Fn() -> Refusal| {
            let same = group.partition_point(|waiter| waiter.since.0 <= oldest.0);
            for waiter in group.drain(..same) {
                // A receiver that is gone gave up.
                let _gone = waiter.answer.send(Err(refusal()));
            }
        };
        let span = tracing::debug_span!("replay", room.id = %self.room, position.seq = oldest.0);
        match self.read_after(rooms, track, oldest).instrument(span).await {
            Err(error) => {
                tracing::debug!(error = %error, room.id = %self.room, "a backlog could not be read");
                for waiter in group.drain(..) {
                    let _gone = waiter
                        .answer
                        .send(Err(Refusal::Failed(JoinError::Unavailable)));
                }
            }
            Ok(Read::Reset(reason)) => answer_oldest(group, &|| Refusal::Reset(reason)),
            Ok(Read::TooFar { boundary }) => {
                // Everybody before the boundary is too far behind as well.
                let too_far = group
                    .partition_point(|waiter| waiter.since.0 < boundary)
                    .max(group.partition_point(|waiter| waiter.since.0 <= oldest.0));
                for waiter in group.drain(..too_far) {
                    let _gone = waiter
                        .answer
                        .send(Err(Refusal::Reset(ResetReason::ReplayMax)));
                }
            }
            Ok(Read::Found(held, upto)) => {
                for waiter in std::mem::take(group) {
                    let ends = (oldest, waiter.since);
                    let answer = self.cut(rooms, track, &held, upto, ends).await;
                    let _gone = waiter.answer.send(answer);
                }
            }
        }
    }

    /// The part of what was read after `oldest` that comes after `since`, if `since` is a place of this log.
    async fn cut(
        &self,
        rooms: &Rooms,
        track: usize,
        held: &Rc<Held>,
        upto: (u64, Fingerprint),
        (oldest, since): ((u64, Fingerprint), (u64, Fingerprint)),
    ) -> Answer {
        let (seq, fingerprint) = since;
        let skip = held.entries.partition_point(|missed| missed.seq <= seq);
        let backlog = || {
            Ok(Backlog {
                held: Rc::clone(held),
                skip,
                upto,
            })
        };
        let unchecked = fingerprint == Fingerprint(0);
        if unchecked || since == oldest {
            return backlog();
        }
        if seq > upto.0 {
            return Err(Refusal::Reset(ResetReason::Future));
        }
        let at = skip
            .checked_sub(1)
            .map(|i| &held.entries[i])
            .filter(|m| m.seq == seq);
        match at {
            Some(missed) if missed.fingerprint == fingerprint => backlog(),
            Some(_) => Err(Refusal::Reset(ResetReason::Epoch)),
            None => match self.is_erased(rooms, track, seq).await {
                Ok(true) => backlog(),
                Ok(false) => Err(Refusal::Reset(ResetReason::Epoch)),
                Err(_) => Err(Refusal::Failed(JoinError::Unavailable)),
            },
        }
    }

    /// Whether no message is stored at `since` (it was erased, or trimmed); otherwise it is one that the cursor was not made
    /// of, since those that belong to the room have been looked at.
    async fn is_erased(&self, rooms: &Rooms, track: usize, seq: u64) -> Result<bool, ReadError> {
        let epoch = self.log.borrow().epoch(track);
        let stream = &self.sources[track].stream;
        Ok(rooms.reader.message(stream, epoch, seq).await?.is_none())
    }

    /// Reads everything after `since`, and makes sure that it is everything.
    async fn read_after(
        &self,
        rooms: &Rooms,
        track: usize,
        since: (u64, Fingerprint),
    ) -> Result<Read, BacklogError> {
        let (after, fingerprint) = since;
        let limits = &rooms.config;
        let most_bytes = usize::try_from(limits.replay_max_bytes.as_u64()).unwrap_or(usize::MAX);
        let mut share = rooms.replay_share(most_bytes).await;
        let epoch = self.log.borrow().epoch(track);
        let stream = &self.sources[track].stream;
        let filter = self.filter(rooms, track);
        let mut anchored = false;
        let mut entries: Vec<Missed> = Vec::new();
        let mut bytes = 0;
        // From the cursor's own message on: if it is still there, nothing after it has been trimmed.
        let mut next = after.max(1);
        loop {
            let page = rooms.reader.page(stream, epoch, &filter, next).await?;
            let mut records = page.records.as_slice();
            if next == after.max(1)
                && let [first, rest @ ..] = records
                && first.seq == after
            {
                if fingerprint != Fingerprint(0) && first.fingerprint != fingerprint {
                    return Ok(Read::Reset(ResetReason::Epoch));
                }
                anchored = true;
                records = rest;
            }
            let total = entries.len() as u64 + records.len() as u64 + page.pending;
            if let Some(excess) = total
                .checked_sub(limits.replay_max)
                .filter(|excess| *excess > 0)
            {
                // The first `excess` of them would have to be left out: whoever is before the last of those is too far.
                let at = usize::try_from(excess)
                    .map_or(records.len(), |excess| excess.min(records.len()));
                let boundary = at.checked_sub(1).map_or(after + 1, |i| records[i].seq);
                return Ok(Read::TooFar { boundary });
            }
            for record in records {
                bytes += record.body.len();
                entries.push(self.missed(track, record));
            }
            if bytes > most_bytes {
                return Ok(Read::TooFar {
                    boundary: after + 1,
                });
            }
            match page.records.last() {
                Some(last) if page.pending > 0 => next = last.seq + 1,
                _ => break,
            }
        }
        if let Some(reason) = self.broken(rooms, track, since, anchored).await? {
            return Ok(Read::Reset(reason));
        }
        // The frames are a little larger than the bodies; the share is a bound on bodies, like the limit.
        rooms.shrink_share(&mut share, bytes);
        let upto = entries.last().map_or(since, |m| (m.seq, m.fingerprint));
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        gauge_add(Gauge::ReplayBytes, bytes);
        let held = Held {
            entries,
            _share: share,
            bytes,
        };
        Ok(Read::Found(Rc::new(held), upto))
    }

    /// After the read: whether anything between the cursor and what was read may have been trimmed, before or meanwhile.
    ///
    /// Streams and subjects are trimmed from their beginning. So while the cursor's own message is there, everything after it
    /// is. Where it is not, or the cursor names none, the stream's first sequence tells.
    async fn broken(
        &self,
        rooms: &Rooms,
        track: usize,
        (seq, fingerprint): (u64, Fingerprint),
        anchored: bool,
    ) -> Result<Option<ResetReason>, BacklogError> {
        let epoch = self.log.borrow().epoch(track);
        let source = &self.sources[track];
        let at = rooms.reader.message(&source.stream, epoch, seq).await?;
        let names_message = fingerprint != Fingerprint(0);
        if anchored && at.is_some() {
            return Ok(None);
        }
        if names_message && at.is_some() {
            // There is a message, but the room's log does not have it: a store that was rolled back and written anew.
            return Ok(Some(ResetReason::Epoch));
        }
        let state: StreamState = source.streams.fetch(self.part).await?;
        Ok(if state.epoch != epoch {
            Some(ResetReason::Epoch)
        } else if seq > state.last_seq {
            Some(ResetReason::Future)
        } else if seq + 1 < state.first_seq {
            Some(ResetReason::Trimmed)
        } else {
            None
        })
    }

    fn missed(&self, track: usize, record: &Record) -> Missed {
        let cursor = self
            .log
            .borrow()
            .cursor_at(track, record.seq, record.fingerprint);
        let frame = encode::message(&self.room, record, Some(&cursor));
        Missed {
            seq: record.seq,
            fingerprint: record.fingerprint,
            ts: record.ts,
            reference: reference(record),
            after: record.after.clone(),
            frame,
        }
    }
}

enum Read {
    Found(Rc<Held>, (u64, Fingerprint)),
    Reset(ResetReason),
    TooFar {
        /// Every cursor before this sequence has more than `replay_max` messages after it.
        boundary: u64,
    },
}
