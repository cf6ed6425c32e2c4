//! What a session missed, read from the stream: once for all who miss about the same.
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
    rooms::Rooms,
};
use crate::{
    bus::{ReadError, Record, StreamError, StreamState},
    model::{Fingerprint, Position},
    telemetry::metrics::{Counter, Gauge, count, gauge_add},
};

/// Requests of one hub for what lies in the stream.
#[derive(Debug, Default)]
pub(super) struct Backlogs {
    waiting: RefCell<Vec<Waiter>>,
    reading: Cell<bool>,
}

#[derive(Debug)]
struct Waiter {
    since: Position,
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
    fingerprint: Fingerprint,
    pub(super) frame: Bytes,
}

impl Backlog {
    pub(super) fn entries(&self) -> &[Missed] {
        &self.held.entries[self.skip..]
    }
}

impl Hub {
    /// What came after `since`, a position of this hub's origin and epoch.
    pub(super) async fn backlog(self: &Rc<Self>, rooms: &Rc<Rooms>, since: Position) -> Answer {
        let (answer, answered) = oneshot::channel();
        self.backlogs
            .waiting
            .borrow_mut()
            .push(Waiter { since, answer });
        if self.backlogs.reading.replace(true) {
            count(Counter::ReplayCoalesced, 1);
        } else {
            let (hub, rooms) = (Rc::clone(self), Rc::clone(rooms));
            tokio::task::spawn_local(async move { hub.read_backlogs(&rooms).await });
        }
        answered
            .await
            .unwrap_or(Err(Refusal::Failed(JoinError::Unavailable)))
    }

    async fn read_backlogs(&self, rooms: &Rc<Rooms>) {
        loop {
            let mut group = std::mem::take(&mut *self.backlogs.waiting.borrow_mut());
            // Whoever gave up needs no answer.
            group.retain(|waiter| !waiter.answer.is_closed());
            if group.is_empty() {
                break;
            }
            group.sort_by_key(|waiter| waiter.since.seq);
            while !group.is_empty() {
                self.serve_group(rooms, &mut group).await;
            }
        }
        self.backlogs.reading.set(false);
    }

    /// Reads from the oldest cursor of the group and answers as many as that can answer, at least one.
    async fn serve_group(&self, rooms: &Rc<Rooms>, group: &mut Vec<Waiter>) {
        let oldest = group[0].since.clone();
        let answer_oldest = |group: &mut Vec<Waiter>, refusal: &dyn Fn() -> Refusal| {
            let same = group.partition_point(|waiter| waiter.since.seq <= oldest.seq);
            for waiter in group.drain(..same) {
                // A receiver that is gone gave up.
                let _gone = waiter.answer.send(Err(refusal()));
            }
        };
        let span = tracing::debug_span!("replay", room.id = %self.room, position.seq = oldest.seq);
        match self.read_after(rooms, &oldest).instrument(span).await {
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
                    .partition_point(|waiter| waiter.since.seq < boundary)
                    .max(group.partition_point(|waiter| waiter.since.seq <= oldest.seq));
                for waiter in group.drain(..too_far) {
                    let _gone = waiter
                        .answer
                        .send(Err(Refusal::Reset(ResetReason::ReplayMax)));
                }
            }
            Ok(Read::Found(held, upto)) => {
                for waiter in std::mem::take(group) {
                    let answer = self.cut(rooms, &held, upto, &oldest, &waiter.since).await;
                    let _gone = waiter.answer.send(answer);
                }
            }
        }
    }

    /// The part of what was read after `oldest` that comes after `since`, if `since` is a place of this log.
    async fn cut(
        &self,
        rooms: &Rooms,
        held: &Rc<Held>,
        upto: (u64, Fingerprint),
        oldest: &Position,
        since: &Position,
    ) -> Answer {
        let skip = held
            .entries
            .partition_point(|missed| missed.seq <= since.seq);
        let backlog = || {
            Ok(Backlog {
                held: Rc::clone(held),
                skip,
                upto,
            })
        };
        let unchecked = since.fingerprint == Fingerprint(0);
        if unchecked || since == oldest {
            return backlog();
        }
        if since.seq > upto.0 {
            return Err(Refusal::Reset(ResetReason::Future));
        }
        let at = skip
            .checked_sub(1)
            .map(|i| &held.entries[i])
            .filter(|m| m.seq == since.seq);
        match at {
            Some(missed) if missed.fingerprint == since.fingerprint => backlog(),
            Some(_) => Err(Refusal::Reset(ResetReason::Epoch)),
            None => match self.is_erased(rooms, since).await {
                Ok(true) => backlog(),
                Ok(false) => Err(Refusal::Reset(ResetReason::Epoch)),
                Err(_) => Err(Refusal::Failed(JoinError::Unavailable)),
            },
        }
    }

    /// Whether no message is stored at `since` (it was erased, or trimmed); otherwise it is one that the cursor was not made
    /// of, since those that belong to the room have been looked at.
    async fn is_erased(&self, rooms: &Rooms, since: &Position) -> Result<bool, ReadError> {
        let epoch = self.log.borrow().epoch();
        Ok(rooms
            .reader
            .message(&self.stream, epoch, since.seq)
            .await?
            .is_none())
    }

    /// Reads everything after `since`, and makes sure that it is everything.
    async fn read_after(&self, rooms: &Rooms, since: &Position) -> Result<Read, BacklogError> {
        let limits = &rooms.config;
        let most_bytes = usize::try_from(limits.replay_max_bytes.as_u64()).unwrap_or(usize::MAX);
        let mut share = rooms.replay_share(most_bytes).await;
        let epoch = self.log.borrow().epoch();
        let filter = rooms
            .subjects
            .stored_all(rooms.streams.origin(), self.part, &self.room);
        let mut anchored = false;
        let mut entries: Vec<Missed> = Vec::new();
        let mut bytes = 0;
        // From the cursor's own message on: if it is still there, nothing after it has been trimmed.
        let mut next = since.seq.max(1);
        loop {
            let page = rooms
                .reader
                .page(&self.stream, epoch, &filter, next)
                .await?;
            let mut records = page.records.as_slice();
            if next == since.seq.max(1)
                && let [first, rest @ ..] = records
                && first.seq == since.seq
            {
                if since.fingerprint != Fingerprint(0) && first.fingerprint != since.fingerprint {
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
                let boundary = at.checked_sub(1).map_or(since.seq + 1, |i| records[i].seq);
                return Ok(Read::TooFar { boundary });
            }
            for record in records {
                bytes += record.body.len();
                entries.push(self.missed(record));
            }
            if bytes > most_bytes {
                return Ok(Read::TooFar {
                    boundary: since.seq + 1,
                });
            }
            match page.records.last() {
                Some(last) if page.pending > 0 => next = last.seq + 1,
                _ => break,
            }
        }
        if let Some(reason) = self.broken(rooms, since, anchored).await? {
            return Ok(Read::Reset(reason));
        }
        // The frames are a little larger than the bodies; the share is a bound on bodies, like the limit.
        rooms.shrink_share(&mut share, bytes);
        let upto = entries
            .last()
            .map_or((since.seq, since.fingerprint), |m| (m.seq, m.fingerprint));
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
        since: &Position,
        anchored: bool,
    ) -> Result<Option<ResetReason>, BacklogError> {
        let at = rooms
            .reader
            .message(&self.stream, since.epoch, since.seq)
            .await?;
        let names_message = since.fingerprint != Fingerprint(0);
        if anchored && at.is_some() {
            return Ok(None);
        }
        if names_message && at.is_some() {
            // There is a message, but the room's log does not have it: a store that was rolled back and written anew.
            return Ok(Some(ResetReason::Epoch));
        }
        let state: StreamState = rooms.streams.fetch(self.part).await?;
        Ok(if state.epoch != since.epoch {
            Some(ResetReason::Epoch)
        } else if since.seq > state.last_seq {
            Some(ResetReason::Future)
        } else if since.seq + 1 < state.first_seq {
            Some(ResetReason::Trimmed)
        } else {
            None
        })
    }

    fn missed(&self, record: &Record) -> Missed {
        let cursor = self.log.borrow().cursor_at(record.seq, record.fingerprint);
        let frame = encode::message(&self.room, record, Some(&cursor));
        Missed {
            seq: record.seq,
            fingerprint: record.fingerprint,
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
