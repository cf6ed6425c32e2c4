//! Joining a room: finding out how a session can go on, beginning its membership, catching up.

use std::{rc::Rc, sync::Arc};

use bytes::Bytes;
use tokio::{
    task::spawn_local,
    time::{Instant, timeout_at},
};

use super::{
    backlog::{Backlog, Refusal},
    fan_out::Member,
    hub::{Hub, Phase},
    log::Resume,
    rooms::Rooms,
};
use crate::{
    model::{Cursor, Position, RoomId},
    protocol::{Close, native::Wants},
    telemetry::metrics::{self, Counter, Histogram, Source, count},
    wire::Conn,
};

/// Backlog is handed to a connection in pieces of this size, so that the outbox' bound is not reached by our own doing.
const PIECE: usize = 64 * 1024;

/// Who joins.
#[derive(Debug)]
pub struct NewMember {
    /// The session's number on this edge.
    pub session: u64,
    /// Its user.
    pub user: Arc<str>,
    /// Its connection.
    pub conn: Rc<Conn>,
    /// What it is to be told besides messages.
    pub wants: Wants,
}

/// What the reply to a join says.
#[derive(Debug)]
pub struct Joined {
    /// Where the session stands before the backlog; `None` in an ephemeral room.
    pub cursor: Option<Cursor>,
    /// The room's newest place; `None` in an ephemeral room.
    pub head: Option<Cursor>,
    /// Messages that follow.
    pub replay: u64,
    /// Why the session can't go on where it was.
    pub reset: Option<ResetReason>,
}

/// Why a session can't go on at its cursor and has to load history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetReason {
    /// Messages after the cursor are not in the stream any more.
    Trimmed,
    /// The cursor is of another incarnation of the stream.
    Epoch,
    /// The cursor is beyond the newest message.
    Future,
    /// More messages or bytes than are replayed.
    ReplayMax,
    /// The room keeps no log.
    Ephemeral,
}

impl ResetReason {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Trimmed => "trimmed",
            Self::Epoch => "epoch",
            Self::Future => "future",
            Self::ReplayMax => "replay_max",
            Self::Ephemeral => "ephemeral",
        }
    }

    fn result(self) -> metrics::Joined {
        match self {
            Self::Trimmed => metrics::Joined::ResetTrimmed,
            Self::Epoch => metrics::Joined::ResetEpoch,
            Self::Future => metrics::Joined::ResetFuture,
            Self::ReplayMax => metrics::Joined::ResetReplayMax,
            Self::Ephemeral => metrics::Joined::Ephemeral,
        }
    }
}

/// A room can't be joined now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// NATS does not answer.
    #[error("the room's stream can't be read now")]
    Unavailable,
}

/// A session's place in a room. Dropping it leaves the room.
#[derive(Debug)]
pub struct Membership {
    hub: Rc<Hub>,
    member: Rc<Member>,
}

impl Membership {
    /// Whether the room has let the session go (it was told so by `kicked`).
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.member.has_left()
    }

    /// Tells the member no more who comes and goes.
    pub fn ignore_presence(&self) {
        let wants = Wants {
            presence: false,
            ..self.member.wants.get()
        };
        self.member.wants.set(wants);
    }

    /// The time of a message that the room holds in memory, in ms since 1970.
    #[must_use]
    pub fn time_of(&self, seq: u64) -> Option<u64> {
        self.hub.log.borrow().time_of(seq)
    }

    /// Where the room stands, as far as its members were told; `None`: it keeps no log.
    #[must_use]
    pub fn head(&self) -> Option<Cursor> {
        self.hub.durable.then(|| self.hub.log.borrow().cursor())
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.hub.remove(&self.member);
    }
}

impl Rooms {
    /// Begins to open a room that is about to be joined.
    pub fn open(self: &Rc<Self>, room: &RoomId, durable: bool) {
        self.hub(room, durable);
    }

    /// Joins a room. `reply` makes the frame of the reply; it is sent, followed by the backlog, in the same step in which the
    /// membership begins: between backlog and live there is neither a gap nor a repeat.
    ///
    /// # Errors
    /// [`JoinError`] when the stream could not be read within `rooms.join_timeout`; then nothing was sent.
    pub async fn join(
        self: &Rc<Self>,
        room: &RoomId,
        durable: bool,
        since: Option<Cursor>,
        who: NewMember,
        reply: impl FnOnce(&Joined) -> Bytes,
    ) -> Result<Membership, JoinError> {
        let started = Instant::now();
        let deadline = started + self.config.join_timeout;
        let prepared = timeout_at(deadline, self.prepare(room, durable, since)).await;
        let (hub, plan) = prepared.map_err(|_elapsed| JoinError::Unavailable)??;
        let membership = self.begin(hub, plan, who, reply);
        metrics::record(Histogram::JoinDuration, started.elapsed());
        Ok(membership)
    }

    /// Finds out how the session can go on. What it returns is true as long as nothing else runs on the shard.
    async fn prepare(
        self: &Rc<Self>,
        room: &RoomId,
        durable: bool,
        since: Option<Cursor>,
    ) -> Result<(Rc<Hub>, Plan), JoinError> {
        let mut attempts = 0;
        let mut filled = false;
        let mut backlog: Option<Backlog> = None;
        loop {
            let hub = self.hub(room, durable);
            if !hub.is_ready() && !self.line.is_up() {
                return Err(JoinError::Unavailable);
            }
            if hub.started().await == Phase::Gone {
                // It could not start, and said so in the log; or it has just ended, and the next one does better.
                attempts += 1;
                if attempts > 1 || !self.line.is_up() {
                    return Err(JoinError::Unavailable);
                }
                continue;
            }
            let Some(cursor) = &since else {
                return Ok((hub, Plan::Fresh));
            };
            if !durable {
                return Ok((hub, Plan::Reset(ResetReason::Ephemeral)));
            }
            // A cursor with components of other origins comes from a larger mesh than this edge knows.
            let [position] = cursor.positions() else {
                return Ok((hub, Plan::Reset(ResetReason::Epoch)));
            };
            let here = {
                let log = hub.log.borrow();
                position.origin == *log.origin() && position.epoch == log.epoch()
            };
            if !here {
                // Before the client is sent to history: is it we who have not noticed that the stream began anew?
                Box::pin(self.verify(hub.part)).await;
                if hub.is_gone() {
                    continue;
                }
                return Ok((hub, Plan::Reset(ResetReason::Epoch)));
            }
            // If the room ran on further than memory reaches while we read, read again, until the join's time is up.
            if let Some(found) = backlog.take()
                && found.upto.0 >= hub.log.borrow().floor()
            {
                return Ok((hub, Plan::Backlog(cursor.clone(), found)));
            }
            let resume = hub.log.borrow().resume(position);
            match resume {
                Resume::Memory(index) => {
                    return Ok((hub, Plan::Memory(cursor.clone(), index)));
                }
                Resume::Ahead if !filled => {
                    filled = true;
                    hub.fill(self).await;
                }
                Resume::Ahead | Resume::Stream | Resume::Doubtful => {
                    match hub.backlog(self, position.clone()).await {
                        Ok(found) => backlog = Some(found),
                        Err(Refusal::Reset(reason)) => return Ok((hub, Plan::Reset(reason))),
                        Err(Refusal::Failed(error)) => return Err(error),
                    }
                }
            }
        }
    }

    /// Begins the membership: one step, without waiting.
    fn begin(
        self: &Rc<Self>,
        hub: Rc<Hub>,
        plan: Plan,
        who: NewMember,
        reply: impl FnOnce(&Joined) -> Bytes,
    ) -> Membership {
        let conn = who.conn;
        let (frames, joined, result) = {
            let log = hub.log.borrow();
            let head = hub.durable.then(|| log.cursor());
            let from_memory = |index: u64| -> Vec<Bytes> {
                log.entries_from(index)
                    .into_iter()
                    .flatten()
                    .map(|e| e.frame.clone())
                    .collect()
            };
            let joined = |cursor: Option<Cursor>, frames: &[Bytes], reset| Joined {
                cursor,
                head: head.clone(),
                replay: frames.len() as u64,
                reset,
            };
            match plan {
                Plan::Fresh => (
                    Vec::new(),
                    joined(head.clone(), &[], None),
                    metrics::Joined::Live,
                ),
                Plan::Reset(reason) => (
                    Vec::new(),
                    joined(head.clone(), &[], Some(reason)),
                    reason.result(),
                ),
                Plan::Memory(cursor, index) => {
                    let frames = from_memory(index);
                    count(Counter::MessageReplayed(Source::Ring), frames.len() as u64);
                    let joined = joined(Some(cursor), &frames, None);
                    (frames, joined, metrics::Joined::Ring)
                }
                Plan::Backlog(cursor, backlog) => {
                    let position = log.position();
                    let read = backlog
                        .entries()
                        .iter()
                        .filter(|missed| missed.seq <= position);
                    let mut frames: Vec<Bytes> = read.map(|missed| missed.frame.clone()).collect();
                    count(
                        Counter::MessageReplayed(Source::Stream),
                        frames.len() as u64,
                    );
                    frames.extend(log.frames_after(backlog.upto.0));
                    let joined = joined(Some(cursor), &frames, None);
                    (frames, joined, metrics::Joined::Stream)
                }
            }
        };
        count(Counter::JoinResult(result), 1);
        conn.send(&[reply(&joined)]);
        let head = hub.log.borrow().head_index();
        let bytes: usize = frames.iter().map(Bytes::len).sum();
        // A client that joins many rooms at once gets their backlogs one after the other, not all into its outbox.
        let fits = bytes <= PIECE && (bytes == 0 || conn.queued_bytes() <= PIECE);
        let member = Rc::new(Member::new(
            who.session,
            who.user,
            Rc::clone(&conn),
            who.wants,
            head,
            fits,
        ));
        hub.add(Rc::clone(&member));
        hub.follow_receipts(self);
        if fits {
            conn.send(&frames);
        } else {
            let place = hub.log.borrow().position_now();
            let (rooms, hub, member) = (Rc::clone(self), Rc::clone(&hub), Rc::clone(&member));
            spawn_local(async move { rooms.catch_up(&hub, &member, frames, place).await });
        }
        count(Counter::MessageDelivered, joined.replay);
        Membership { hub, member }
    }

    /// Hands a large backlog over at the pace at which the client reads, then what has come to the room meanwhile (from
    /// memory, or from the stream where memory does not reach back), until there is nothing more: then the member is fed
    /// live. A client that falls further behind than `rooms.replay_max` is closed as too slow.
    async fn catch_up(
        self: &Rc<Self>,
        hub: &Rc<Hub>,
        member: &Rc<Member>,
        frames: Vec<Bytes>,
        place: Position,
    ) {
        let conn = &member.conn;
        let mut place = place;
        let mut frames = frames;
        loop {
            for piece in pieces(&frames) {
                conn.drained(PIECE).await;
                if member.has_left() || hub.is_gone() || conn.closing().is_some() {
                    return;
                }
                conn.send(piece);
            }
            conn.drained(PIECE).await;
            if member.has_left() || hub.is_gone() || conn.closing().is_some() {
                return;
            }
            let from_memory = {
                let log = hub.log.borrow();
                (place.seq >= log.floor()).then(|| log.frames_after(place.seq).collect::<Vec<_>>())
            };
            frames = match from_memory {
                Some(frames) => {
                    let log = hub.log.borrow();
                    place = log.position_now();
                    if frames.iter().map(Bytes::len).sum::<usize>() <= PIECE {
                        count(Counter::MessageDelivered, frames.len() as u64);
                        conn.send(&frames);
                        member.go_live(log.head_index());
                        return;
                    }
                    frames
                }
                None => match hub.backlog(self, place.clone()).await {
                    Ok(found) => {
                        // What the hub has not delivered yet will come live.
                        let delivered = hub.log.borrow().position_now();
                        let entries = found.entries().iter().filter(|m| m.seq <= delivered.seq);
                        let frames = entries.map(|missed| missed.frame.clone()).collect();
                        if found.upto.0 < delivered.seq {
                            (place.seq, place.fingerprint) = found.upto;
                        } else {
                            place = delivered;
                        }
                        frames
                    }
                    Err(Refusal::Reset(_)) => return conn.close(Close::TooSlow),
                    Err(Refusal::Failed(_)) => {
                        // NATS is away. Nothing comes live either.
                        hub.pause().await;
                        Vec::new()
                    }
                },
            };
            count(Counter::MessageDelivered, frames.len() as u64);
        }
    }
}

/// Cuts frames into pieces of about [`PIECE`] bytes.
fn pieces(frames: &[Bytes]) -> impl Iterator<Item = &[Bytes]> {
    let mut bytes = 0;
    let mut rest = frames;
    std::iter::from_fn(move || {
        let cut = rest.iter().position(|frame| {
            bytes += frame.len();
            bytes >= PIECE
        });
        bytes = 0;
        let (piece, after) = rest.split_at(cut.map_or(rest.len(), |at| at + 1));
        rest = after;
        (!piece.is_empty()).then_some(piece)
    })
}

/// How a session goes on.
enum Plan {
    /// From now on.
    Fresh,
    /// From now on, though it wanted more.
    Reset(ResetReason),
    /// From an index in memory.
    Memory(Cursor, u64),
    /// With what was read from the stream, then from memory.
    Backlog(Cursor, Backlog),
}
