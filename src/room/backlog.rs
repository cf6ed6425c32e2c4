//! Reads what a session has missed of one origin from the stream: once for all sessions that have missed about the
//! same.
//!
//! Requests that arrive during a read are answered together by the next read, which begins at the oldest of their
//! cursors. So a reconnect storm costs NATS a few reads for each room, however many clients come back.

use std::{
    cell::{Cell, RefCell},
    rc::{Rc, Weak},
};

use tokio::sync::oneshot;
use tracing::Instrument as _;

use super::{
    hub::Hub,
    joined::{JoinError, ResetReason},
    message::Message,
    rooms::Rooms,
};
use crate::{
    bus::{ReadError, StreamError, StreamState},
    model::Fingerprint,
    telemetry::metrics::{Counter, count},
};

/// How often a read is repeated because the copy of the stream that answered seems to be behind. After that its answer
/// is believed. This takes about two seconds.
const BEHIND_READS: u32 = 10;

/// Requests of one hub for backlogs from one stream.
#[derive(Debug, Default)]
pub(super) struct Backlogs {
    waiting: RefCell<Vec<Waiter>>,
    reading: Cell<bool>,
}

#[derive(Debug)]
struct Waiter {
    since: (u64, Fingerprint),
    /// How many reads were answered by a copy of the stream that may have been behind.
    tries: u32,
    answer: oneshot::Sender<Answer>,
}

type Answer = Result<Backlog, NoBacklog>;

/// Why there is no backlog.
#[derive(Debug)]
pub(super) enum NoBacklog {
    /// The session can't resume at its cursor.
    Reset(ResetReason),
    /// The stream could not be read.
    Failed(JoinError),
}

/// The backlog can't be read now.
#[derive(Debug, thiserror::Error)]
enum BacklogError {
    /// The messages can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The state of the stream can't be read.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// The messages after a cursor, up to the end of the stream at the time of the read.
#[derive(Debug)]
pub(super) struct Backlog {
    /// What was read. If the read began at an older cursor, the first `skip` messages are not part of this backlog.
    pub(super) read: Rc<Vec<Rc<Message>>>,
    pub(super) skip: usize,
    /// Everything up to this position is included.
    pub(super) upto: (u64, Fingerprint),
}

/// Bytes of memory that are reserved to read a part of a backlog.
const PART_BYTES: usize = 1 << 20;

/// How much of a backlog is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// All of it.
    Whole,
    /// Its beginning: what one request returns.
    Part,
}

impl Backlog {
    pub(super) fn entries(&self) -> &[Rc<Message>] {
        &self.read[self.skip..]
    }

    /// Identifies this backlog without keeping it in memory.
    pub(super) fn part(&self) -> Part {
        Part {
            read: Rc::downgrade(&self.read),
            skip: self.skip,
        }
    }
}

/// Which part of which read a backlog is.
#[derive(Debug)]
pub(super) struct Part {
    /// A list in a box of its own: it is freed though this handle stays.
    read: Weak<Vec<Rc<Message>>>,
    skip: usize,
}

impl PartialEq for Part {
    fn eq(&self, other: &Self) -> bool {
        // The weak handle keeps the allocation, so no other read can have its address.
        self.skip == other.skip && self.read.ptr_eq(&other.read)
    }
}

impl Hub {
    /// The messages after `since`, a position in a track of this hub's log.
    pub(super) async fn backlog(
        self: &Rc<Self>,
        rooms: &Rc<Rooms>,
        track: usize,
        since: (u64, Fingerprint),
    ) -> Answer {
        let (answer, answered) = oneshot::channel();
        let backlogs = &self.sources[track].backlogs;
        backlogs.waiting.borrow_mut().push(Waiter {
            since,
            tries: 0,
            answer,
        });
        if backlogs.reading.replace(true) {
            count(Counter::ReplayCoalesced, 1);
        } else {
            let (hub, rooms) = (Rc::clone(self), Rc::clone(rooms));
            tokio::task::spawn_local(async move { hub.read_backlogs(&rooms, track).await });
        }
        answered
            .await
            .unwrap_or(Err(NoBacklog::Failed(JoinError::Unavailable)))
    }

    /// The beginning of what came after `since`, for a slow session: reads no more than the session can be sent soon.
    pub(super) async fn backlog_part(
        &self,
        rooms: &Rc<Rooms>,
        track: usize,
        since: (u64, Fingerprint),
    ) -> Answer {
        let mut tries = 0;
        loop {
            let is_last = tries >= BEHIND_READS || !self.is_replicated(track);
            let read = self.read_after(rooms, track, since, (Extent::Part, is_last));
            return match read.await {
                Ok(Read::Found(read, upto)) => Ok(Backlog {
                    read,
                    skip: 0,
                    upto,
                }),
                Ok(Read::Behind) => {
                    self.pause().await;
                    tries += 1;
                    continue;
                }
                Ok(Read::Reset(reason)) => Err(NoBacklog::Reset(reason)),
                Ok(Read::TooFar { .. }) => Err(NoBacklog::Reset(ResetReason::ReplayMax)),
                Err(error) => {
                    tracing::debug!(error = %error, room.id = %self.room, "a backlog could not be read");
                    Err(NoBacklog::Failed(JoinError::Unavailable))
                }
            };
        }
    }

    /// Whether the stream has several copies. If it has only one, no other copy can have more.
    fn is_replicated(&self, track: usize) -> bool {
        self.sources[track].streams.known(self.part).replicated
    }

    async fn read_backlogs(&self, rooms: &Rc<Rooms>, track: usize) {
        let backlogs = &self.sources[track].backlogs;
        loop {
            let mut group = std::mem::take(&mut *backlogs.waiting.borrow_mut());
            // A waiter whose join has timed out is gone.
            group.retain(|waiter| !waiter.answer.is_closed());
            if group.is_empty() {
                break;
            }
            if group.iter().all(|waiter| waiter.tries > 0) {
                // Requests that arrive during the pause are served together with these.
                self.pause().await;
                group.append(&mut backlogs.waiting.borrow_mut());
            }
            group.sort_by_key(|waiter| waiter.since.0);
            while !group.is_empty() {
                self.serve_group(rooms, track, &mut group).await;
            }
        }
        backlogs.reading.set(false);
    }

    /// Reads from the oldest cursor of the group and answers every waiter that this read can answer, at least the
    /// oldest. Or returns the oldest to the queue if the read has to be repeated.
    async fn serve_group(&self, rooms: &Rc<Rooms>, track: usize, group: &mut Vec<Waiter>) {
        let (oldest, tries) = (group[0].since, group[0].tries);
        let same = |group: &[Waiter]| group.partition_point(|waiter| waiter.since.0 <= oldest.0);
        let span = tracing::debug_span!("replay", room.id = %self.room, position.seq = oldest.0);
        let source = &self.sources[track];
        let is_last = tries >= BEHIND_READS || !self.is_replicated(track);
        let read = self.read_after(rooms, track, oldest, (Extent::Whole, is_last));
        match read.instrument(span).await {
            Err(error) => {
                tracing::debug!(error = %error, room.id = %self.room, "a backlog could not be read");
                for waiter in group.drain(..) {
                    let _gone = waiter
                        .answer
                        .send(Err(NoBacklog::Failed(JoinError::Unavailable)));
                }
            }
            Ok(Read::Behind) => {
                let again = group.drain(..same(group)).map(|waiter| Waiter {
                    tries: waiter.tries + 1,
                    ..waiter
                });
                let mut waiting = source.backlogs.waiting.borrow_mut();
                waiting.extend(again);
            }
            Ok(Read::Reset(reason)) => {
                for waiter in group.drain(..same(group)) {
                    // A send fails if the receiver has given up.
                    let _gone = waiter.answer.send(Err(NoBacklog::Reset(reason)));
                }
            }
            Ok(Read::TooFar { boundary }) => {
                // Every cursor before the boundary is too far behind as well.
                let too_far = group
                    .partition_point(|waiter| waiter.since.0 < boundary)
                    .max(same(group));
                for waiter in group.drain(..too_far) {
                    let _gone = waiter
                        .answer
                        .send(Err(NoBacklog::Reset(ResetReason::ReplayMax)));
                }
            }
            Ok(Read::Found(read, upto)) => {
                for waiter in std::mem::take(group) {
                    let ends = (oldest, waiter.since);
                    match self.cut(rooms, track, &read, upto, ends).await {
                        Some(answer) => drop(waiter.answer.send(answer)),
                        None => group.push(waiter),
                    }
                }
            }
        }
    }

    /// The part of what was read after `oldest` that comes after `since`, if `since` is a position of this log. `None`
    /// if this read can't tell: then `since` needs a read of its own.
    async fn cut(
        &self,
        rooms: &Rooms,
        track: usize,
        read: &Rc<Vec<Rc<Message>>>,
        upto: (u64, Fingerprint),
        (oldest, since): ((u64, Fingerprint), (u64, Fingerprint)),
    ) -> Option<Answer> {
        let (seq, fingerprint) = since;
        let skip = read.partition_point(|message| message.seq <= seq);
        let backlog = || {
            Some(Ok(Backlog {
                read: Rc::clone(read),
                skip,
                upto,
            }))
        };
        let unchecked = fingerprint == Fingerprint(0);
        if unchecked || since == oldest {
            return backlog();
        }
        if seq > upto.0 {
            // The cursor is in the future, or the copy that was read is behind.
            return None;
        }
        let at = skip
            .checked_sub(1)
            .map(|i| &read[i])
            .filter(|m| m.seq == seq);
        match at {
            Some(message) if message.fingerprint == fingerprint => backlog(),
            Some(_) => Some(Err(NoBacklog::Reset(ResetReason::Epoch))),
            None => match self.stored_at(rooms, track, since).await {
                Ok(At::Nothing) => backlog(),
                Ok(At::Same) => None,
                Ok(At::Other) => Some(Err(NoBacklog::Reset(ResetReason::Epoch))),
                Err(_) => Some(Err(NoBacklog::Failed(JoinError::Unavailable))),
            },
        }
    }

    /// What is stored at the position of a cursor.
    async fn stored_at(
        &self,
        rooms: &Rooms,
        track: usize,
        (seq, fingerprint): (u64, Fingerprint),
    ) -> Result<At, ReadError> {
        let epoch = self.log.borrow().epoch(track);
        let stream = &self.sources[track].stream;
        let stored = rooms.reader.message(stream, epoch, seq).await?;
        Ok(match stored {
            None => At::Nothing,
            Some(at) if at.room == self.room && at.record.fingerprint == fingerprint => At::Same,
            Some(_) => At::Other,
        })
    }

    /// Reads what came after `since` and checks that nothing of it is missing. With `is_last`, what the copy does not
    /// have is taken as not stored.
    async fn read_after(
        &self,
        rooms: &Rooms,
        track: usize,
        since: (u64, Fingerprint),
        (extent, is_last): (Extent, bool),
    ) -> Result<Read, BacklogError> {
        let (after, fingerprint) = since;
        let limits = &rooms.config;
        let most_bytes = usize::try_from(limits.replay_max_bytes.as_u64()).unwrap_or(usize::MAX);
        let mut share = match extent {
            // The caller already holds a share for all tracks.
            _ if self.sources.len() > 1 => rooms.memory.take(0),
            Extent::Whole => rooms.memory.share(most_bytes).await,
            Extent::Part => rooms.memory.share(PART_BYTES.min(most_bytes)).await,
        };
        let epoch = self.log.borrow().epoch(track);
        let stream = &self.sources[track].stream;
        let filter = self.filter(rooms, track);
        let delivered = self.log.borrow().positions()[track];
        let mut anchored = false;
        let mut entries: Vec<Rc<Message>> = Vec::new();
        let mut bytes = 0;
        let mut is_whole = true;
        // Starts at the cursor's own message: if it is still stored, nothing after it has been trimmed.
        let mut next = after.max(1);
        loop {
            let page = rooms.reader.page(stream, epoch, &filter, next).await?;
            let mut records = page.records;
            let end = records.last().map(|record| record.seq);
            if next == after.max(1)
                && let Some(first) = records.first()
                && first.seq == after
            {
                if fingerprint != Fingerprint(0) && first.fingerprint != fingerprint {
                    return Ok(Read::Reset(ResetReason::Epoch));
                }
                anchored = true;
                records.remove(0);
            }
            let total = entries.len() as u64 + records.len() as u64 + page.pending;
            if let Some(excess) = total
                .checked_sub(self.replay_max)
                .filter(|excess| *excess > 0)
            {
                // The first `excess` messages would have to be left out. Every cursor before the last of them is too
                // far behind.
                let at = usize::try_from(excess)
                    .map_or(records.len(), |excess| excess.min(records.len()));
                let boundary = at.checked_sub(1).map_or(after + 1, |i| records[i].seq);
                return Ok(Read::TooFar { boundary });
            }
            for record in records {
                bytes += record.body.len();
                let message = self.log.borrow().stored(track, record);
                entries.push(Rc::new(message.counted_in(&mut share)));
            }
            if bytes > most_bytes {
                return Ok(Read::TooFar {
                    boundary: after + 1,
                });
            }
            match end {
                Some(_) if page.pending > 0 && extent == Extent::Part && !entries.is_empty() => {
                    is_whole = false;
                    break;
                }
                Some(last) if page.pending > 0 => next = last + 1,
                _ => break,
            }
        }
        if let Some(broken) = self.broken(rooms, track, since, anchored, is_last).await? {
            return Ok(broken);
        }
        let mut upto = entries.last().map_or(since, |m| (m.seq, m.fingerprint));
        if is_whole && upto.0 < delivered.0 {
            // The room has delivered more. Either the copy that was read is behind, or the messages were erased. If the
            // room has delivered nothing, it is known to be empty up to `delivered`.
            if delivered.1 != Fingerprint(0) && !is_last {
                return Ok(Read::Behind);
            }
            upto = delivered;
        }
        // The unused rest of the share is released here.
        Ok(Read::Found(Rc::new(entries), upto))
    }

    /// Whether anything between the cursor and what was read may have been trimmed, before or during the read. Called
    /// after the read.
    ///
    /// Streams and subjects are trimmed from the beginning. So while the cursor's own message is stored, everything
    /// after it is too. If it is not stored, or the cursor names no message, the first sequence of the stream decides.
    async fn broken(
        &self,
        rooms: &Rooms,
        track: usize,
        (seq, fingerprint): (u64, Fingerprint),
        anchored: bool,
        is_last: bool,
    ) -> Result<Option<Read>, BacklogError> {
        let epoch = self.log.borrow().epoch(track);
        let source = &self.sources[track];
        let at = self.stored_at(rooms, track, (seq, fingerprint)).await?;
        let names_message = fingerprint != Fingerprint(0);
        match at {
            At::Nothing => {}
            _ if anchored => return Ok(None),
            // Another copy has the message, but not the one that was read.
            At::Same if names_message && !is_last => return Ok(Some(Read::Behind)),
            // There is a message, but the room's log does not contain it: the store was rolled back and written again.
            At::Same | At::Other if names_message => {
                return Ok(Some(Read::Reset(ResetReason::Epoch)));
            }
            At::Same | At::Other => {}
        }
        let state: StreamState = source.streams.fetch(self.part).await?;
        Ok(if state.epoch != epoch {
            Some(Read::Reset(ResetReason::Epoch))
        } else if seq > state.last_seq && !is_last {
            Some(Read::Behind)
        } else if seq > state.last_seq {
            Some(Read::Reset(ResetReason::Future))
        } else if seq + 1 < state.first_seq {
            Some(Read::Reset(ResetReason::Trimmed))
        } else {
            None
        })
    }
}

/// What is stored at the position of a cursor.
#[derive(Clone, Copy)]
enum At {
    /// The message that the cursor names.
    Same,
    /// Another message.
    Other,
    /// Nothing: it was erased or trimmed.
    Nothing,
}

enum Read {
    Found(Rc<Vec<Rc<Message>>>, (u64, Fingerprint)),
    Reset(ResetReason),
    /// The copy of the stream that answered seems to be behind the others.
    Behind,
    TooFar {
        /// Every cursor before this sequence has more than `replay_max` messages after it.
        boundary: u64,
    },
}
