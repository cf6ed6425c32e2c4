//! Joining a room: finding out how a session can go on, beginning its membership, catching up.

use std::{mem::size_of, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::try_join_all;
use tokio::{
    task::spawn_local,
    time::{Instant, timeout, timeout_at},
};

use super::{
    backlog::{Backlog, Refusal},
    encode,
    fan_out::{Member, raise},
    hub::{Hub, Phase},
    log::{Place, Resume, RoomLog, Since},
    memory::{Memory, Share, weight},
    merge::{Frames, is_complete, missed},
    references::reference_of,
    rooms::Rooms,
};
use crate::{
    model::{Class, Cursor, Fingerprint, RoomId},
    protocol::{Close, native::Wants},
    runtime::unix_ms,
    telemetry::metrics::{self, Counter, Histogram, Source, count},
    wire::Conn,
};

/// Backlog is handed to a connection in pieces of this size, or a quarter of the outbox where that is less: its bound is not
/// reached by our own doing.
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

    /// The message that `user` has published under `id` in another region, or longer ago than the own one's stream knows
    /// (`window`), if the room has it in memory: its cursor and its time, in ms since 1970.
    #[must_use]
    pub fn said_before(
        &self,
        class: Class,
        (user, id): (&str, &str),
        window: Duration,
    ) -> Option<(Cursor, u64)> {
        let window = u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
        let forgotten = unix_ms().saturating_sub(window);
        let log = self.hub.log.borrow();
        log.said_before(class, reference_of(class, user, id), forgotten)
    }

    /// Where the room stands, as far as its members were told; `None`: it keeps no log.
    #[must_use]
    pub fn head(&self) -> Option<Cursor> {
        let head = || self.hub.log.borrow().cursor();
        self.hub.durable.then(|| self.member.raised(head()))
    }

    /// What the member has seen of other origins than the own; `None`: nothing.
    #[must_use]
    pub fn seen_elsewhere(&self) -> Option<Cursor> {
        let seen = self.hub.log.borrow().seen_elsewhere();
        let seen = self.member.raised(seen);
        (!seen.positions().is_empty()).then_some(seen)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.hub.remove(&self.member);
    }
}

impl Hub {
    /// Where a session that stands at `since` of a track can go on.
    fn resume(&self, track: usize, since: (u64, Fingerprint)) -> Resume {
        let (seq, fingerprint) = since;
        let of = &self.sources[track].streams;
        match self.log.borrow().resume(track, since) {
            // It was told by another edge up to where the room is empty, which did not have to be the same.
            Resume::Ahead if fingerprint == Fingerprint(0) && seq <= of.newest(self.part) => {
                Resume::Memory
            }
            resume => resume,
        }
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
        let mut read: Option<Vec<Option<Backlog>>> = None;
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
            let place = hub.log.borrow().place_of(cursor);
            let since = match place {
                Ok(since) => since,
                Err(track) => {
                    // Before the client is sent to history: is it we who have not noticed that the stream began anew?
                    let streams = &hub.sources[track].streams;
                    Box::pin(self.verify(streams, hub.part)).await;
                    if hub.is_gone() {
                        continue;
                    }
                    return Ok((hub, Plan::Reset(ResetReason::Epoch)));
                }
            };
            if since.elsewhere.len() == cursor.positions().len() {
                // It says nothing of any origin that is seen here.
                return Ok((hub, Plan::Reset(ResetReason::Epoch)));
            }
            // If the room ran on further than memory reaches while we read, read again, until the join's time is up.
            if let Some(backlogs) = read.take()
                && is_complete(&hub.log.borrow(), &since, &backlogs)
            {
                return Ok((hub, Plan::Backlog(cursor.clone(), since, backlogs)));
            }
            let resumes: Vec<Resume> = {
                let tracks = since.place.iter().enumerate();
                tracks.map(|(t, at)| hub.resume(t, *at)).collect()
            };
            if resumes[0] == Resume::Ahead && !filled {
                filled = true;
                hub.fill(self).await;
                continue;
            }
            // Beyond what this region has of another is not beyond what there is.
            let is_elsewhere = |track: usize| track > 0 && resumes[track] == Resume::Ahead;
            if (0..resumes.len()).all(|t| resumes[t] == Resume::Memory || is_elsewhere(t)) {
                return Ok((hub, Plan::Memory(cursor.clone(), since)));
            }
            let wanted = (0..resumes.len()).map(|t| !is_elsewhere(t)).collect();
            match self.read_backlogs(&hub, &since, wanted).await {
                Ok(backlogs) => read = Some(backlogs),
                Err(Refusal::Reset(reason)) => return Ok((hub, Plan::Reset(reason))),
                Err(Refusal::Failed(error)) => return Err(error),
            }
        }
    }

    /// Reads what came after `since` of the tracks that are wanted.
    async fn read_backlogs(
        self: &Rc<Self>,
        hub: &Rc<Hub>,
        since: &Since,
        wanted: Vec<bool>,
    ) -> Result<Vec<Option<Backlog>>, Refusal> {
        // For all tracks at once: who waited for one while it holds another could wait for someone who does the same.
        let most = usize::try_from(self.config.replay_max_bytes.as_u64()).unwrap_or(usize::MAX);
        let _room = match hub.sources.len() {
            1 => None,
            _ => {
                let tracks = wanted.iter().filter(|wanted| **wanted).count();
                Some(self.memory.share(most.saturating_mul(tracks)).await)
            }
        };
        let tracks = wanted.into_iter().zip(&since.place).enumerate();
        let reads = tracks.map(|(track, (wanted, at))| async move {
            match wanted {
                true => hub.backlog(self, track, *at).await.map(Some),
                false => Ok(None),
            }
        });
        let backlogs = try_join_all(reads).await?;
        let messages = backlogs.iter().flatten().map(|read| read.entries().len());
        if messages.sum::<usize>() as u64 > self.config.replay_max {
            return Err(Refusal::Reset(ResetReason::ReplayMax));
        }
        Ok(backlogs)
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
        // What it has seen elsewhere may come here under another name: it is waited for, for a while.
        let lags = match &plan {
            Plan::Fresh | Plan::Reset(_) => false,
            Plan::Memory(_, since) | Plan::Backlog(_, since, _) => hub.log.borrow().lags(since),
        };
        let (frames, joined, from, since, result) = {
            let log = hub.log.borrow();
            let head = || hub.durable.then(|| log.cursor());
            let here = || Since {
                place: log.place(),
                elsewhere: Vec::new(),
            };
            let joined = |cursor: Option<Cursor>, reset| Joined {
                head: cursor.clone(),
                cursor,
                replay: 0,
                reset,
            };
            // It stands where the room stands, or further, where it has seen more elsewhere.
            let resumed = |cursor: Cursor, since: &Since, frames: &[Bytes]| {
                let ahead = log.ahead(since);
                let place = since.place.iter().zip(log.place());
                let place = place.map(|(was, now)| if was.0 > now.0 { *was } else { now });
                let since = Since {
                    place: place.collect(),
                    elsewhere: since.elsewhere.clone(),
                };
                let joined = Joined {
                    cursor: Some(cursor),
                    head: head().map(|head| raise(head, &ahead)),
                    replay: frames.len() as u64,
                    reset: None,
                };
                (joined, since)
            };
            match plan {
                Plan::Memory(cursor, since) | Plan::Backlog(cursor, since, _) if lags => {
                    let (joined, _) = resumed(cursor, &since, &[]);
                    let from = since.clone();
                    (Vec::new(), joined, from, since, metrics::Joined::Stream)
                }
                Plan::Fresh => (
                    Vec::new(),
                    joined(head(), None),
                    here(),
                    here(),
                    metrics::Joined::Live,
                ),
                Plan::Reset(reason) => (
                    Vec::new(),
                    joined(head(), Some(reason)),
                    here(),
                    here(),
                    reason.result(),
                ),
                Plan::Memory(cursor, since) => {
                    let frames = log.frames_after(&since, 0);
                    count(Counter::MessageReplayed(Source::Ring), frames.len() as u64);
                    let (joined, upto) = resumed(cursor, &since, &frames);
                    (frames, joined, since, upto, metrics::Joined::Ring)
                }
                Plan::Backlog(cursor, since, backlogs) => {
                    let Frames { frames, read } = missed(&log, &since, &backlogs, &self.memory);
                    count(Counter::MessageReplayed(Source::Stream), read as u64);
                    let (joined, upto) = resumed(cursor, &since, &frames);
                    (frames, joined, since, upto, metrics::Joined::Stream)
                }
            }
        };
        count(Counter::JoinResult(result), 1);
        conn.send(&[reply(&joined)]);
        let head = hub.log.borrow().head_index();
        let bytes: usize = frames.iter().map(Bytes::len).sum();
        // A client that joins many rooms at once gets their backlogs one after the other, not all into its outbox.
        let piece = piece_of(&conn);
        let fits = !lags && bytes <= piece && (bytes == 0 || conn.queued_bytes() <= piece);
        let member = Rc::new(Member::new(
            who.session,
            who.user,
            Rc::clone(&conn),
            who.wants,
            head,
            fits,
        ));
        member.set_ahead(hub.log.borrow().ahead(&since));
        hub.add(Rc::clone(&member));
        hub.follow_receipts(self);
        if fits {
            count(Counter::MessageDelivered, joined.replay);
            conn.send(&frames);
        } else {
            let (rooms, hub, member) = (Rc::clone(self), Rc::clone(&hub), Rc::clone(&member));
            let frames = match result {
                metrics::Joined::Ring => self.counted(frames),
                _ => frames,
            };
            let mut behind = Behind::new(&self.memory, frames, (from, since), head);
            spawn_local(async move {
                if lags {
                    let most = rooms.config.causal_wait;
                    hub.when_delivered(most, |log| !log.lags(&behind.upto))
                        .await;
                    // Nothing that the room has in memory was given to it.
                    behind.index = 0;
                }
                rooms.catch_up(&hub, &member, behind).await;
            });
        }
        Membership { hub, member }
    }

    /// Frames of the ring, for a session that may keep them for longer than the ring does.
    fn counted(&self, frames: Vec<Bytes>) -> Vec<Bytes> {
        let frames = frames.into_iter();
        frames.map(|frame| self.memory.count(frame)).collect()
    }

    /// Hands a large backlog over at the pace at which the client reads, then what has come to the room meanwhile (from
    /// memory, or from the streams where memory does not reach back), until there is nothing more: then the member is fed
    /// live. A client that falls further behind than `rooms.replay_max` is closed as too slow.
    ///
    /// What is read for a slow client is given up when others wait for the memory, and read again, in parts, from where it got to.
    async fn catch_up(self: &Rc<Self>, hub: &Rc<Hub>, member: &Rc<Member>, mut behind: Behind) {
        let conn = &member.conn;
        let piece = piece_of(conn);
        let is_over = || member.has_left() || hub.is_gone() || conn.is_over();
        let mut in_parts = false;
        loop {
            let mut given = 0;
            let mut given_up = false;
            for part in pieces(&behind.frames, piece) {
                // The last one is not worth another read.
                let is_last = given + part.len() == behind.frames.len();
                let bytes: usize = part.iter().map(weight).sum();
                let below = piece.min((conn.outbox_bytes() / 2).saturating_sub(bytes));
                given_up = tokio::select! {
                    biased;
                    () = conn.drained(below) => false,
                    () = self.memory.is_short(), if !is_last => true,
                };
                if is_over() {
                    return;
                }
                if given_up {
                    break;
                }
                conn.send(part);
                count(Counter::MessageDelivered, part.len() as u64);
                given += part.len();
            }
            let (since, index) = match given_up {
                true => match behind.reached(&hub.log.borrow(), given) {
                    Some(since) => (since, 0),
                    None => return conn.close(Close::TooSlow),
                },
                false => (behind.upto.clone(), behind.index),
            };
            in_parts |= given_up;
            drop(behind);
            conn.drained(piece).await;
            if is_over() {
                return;
            }
            let from_memory = {
                let log = hub.log.borrow();
                let mut tracks = since.place.iter().enumerate();
                let reaches = tracks.all(|(track, (seq, _))| *seq >= log.floor(track));
                reaches.then(|| log.frames_after(&since, index))
            };
            behind = match from_memory {
                Some(frames) => {
                    let log = hub.log.borrow();
                    let mut upto = since.clone();
                    reach(&mut upto, &log.place());
                    if frames.iter().map(Bytes::len).sum::<usize>() <= piece {
                        count(Counter::MessageDelivered, frames.len() as u64);
                        conn.send(&frames);
                        member.set_ahead(log.ahead(&upto));
                        member.go_live(log.head_index());
                        return;
                    }
                    let frames = self.counted(frames);
                    Behind::new(&self.memory, frames, (since, upto), log.head_index())
                }
                None => match self.read_on(hub, &since, in_parts).await {
                    Ok(backlogs) => {
                        let log = hub.log.borrow();
                        let found = missed(&log, &since, &backlogs, &self.memory);
                        let mut reached = log.place();
                        if !is_complete(&log, &since, &backlogs) {
                            // The room has run on, or this is a part: what was read is all that is given now.
                            let read = backlogs.iter().zip(&since.place);
                            for (at, (backlog, was)) in reached.iter_mut().zip(read) {
                                let upto = backlog.as_ref().map_or(*was, |read| read.upto);
                                *at = if upto.0 < at.0 { upto } else { *at };
                            }
                        }
                        let mut upto = since.clone();
                        reach(&mut upto, &reached);
                        Behind::new(&self.memory, found.frames, (since, upto), 0)
                    }
                    Err(Refusal::Reset(_)) => return conn.close(Close::TooSlow),
                    Err(Refusal::Failed(_)) => {
                        // NATS is away, and nothing comes live either; or others have had the memory all the time.
                        hub.pause().await;
                        Behind::new(&self.memory, Vec::new(), (since.clone(), since), index)
                    }
                },
            };
        }
    }

    /// What came after `since`, for a member that is behind; only the beginning of it where one stream has all and memory is short.
    /// As long as a join takes at most: whoever waits longer looks again whether the client is still there.
    async fn read_on(
        self: &Rc<Self>,
        hub: &Rc<Hub>,
        since: &Since,
        in_parts: bool,
    ) -> Result<Vec<Option<Backlog>>, Refusal> {
        let wanted: Vec<bool> = {
            let log = hub.log.borrow();
            let tracks = since.place.iter().enumerate();
            tracks
                .map(|(t, (seq, _))| *seq <= log.position(t))
                .collect()
        };
        let read = async {
            match (in_parts, &wanted[..], &since.place[..]) {
                (true, [true], [at]) => Ok(vec![Some(hub.backlog_part(self, 0, *at).await?)]),
                _ => self.read_backlogs(hub, since, wanted.clone()).await,
            }
        };
        timeout(self.config.join_timeout, read)
            .await
            .unwrap_or(Err(Refusal::Failed(JoinError::Unavailable)))
    }
}

/// What a session has yet to be given.
struct Behind {
    frames: Vec<Bytes>,
    /// Where it stands before and after them.
    from: Since,
    upto: Since,
    /// Index in the log of what follows, where they reach to what is in memory.
    index: u64,
    /// What the list takes, besides the frames.
    _list: Share,
}

impl Behind {
    fn new(
        memory: &Arc<Memory>,
        frames: Vec<Bytes>,
        (from, upto): (Since, Since),
        index: u64,
    ) -> Self {
        Self {
            _list: memory.take(frames.len() * size_of::<Bytes>()),
            frames,
            from,
            upto,
            index,
        }
    }

    /// Where the session stands that was given the first `given` frames: it is what their cursors say.
    fn reached(&self, log: &RoomLog, given: usize) -> Option<Since> {
        match self.frames[..given].last() {
            Some(frame) => log.place_of(&encode::cursor_of(frame)?).ok(),
            None => Some(self.from.clone()),
        }
    }
}

/// Bytes that are handed to a connection at a time.
fn piece_of(conn: &Conn) -> usize {
    PIECE.min(conn.outbox_bytes() / 4)
}

/// Moves a place on to another, where that is further.
fn reach(since: &mut Since, place: &Place) {
    for (at, reached) in since.place.iter_mut().zip(place) {
        if reached.0 > at.0 {
            *at = *reached;
        }
    }
}

/// Cuts frames into pieces of at most `most` bytes; a frame that is larger is one of its own.
fn pieces(frames: &[Bytes], most: usize) -> impl Iterator<Item = &[Bytes]> {
    let mut rest = frames;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fit = rest.iter().take_while(|frame| {
            bytes += frame.len();
            bytes <= most
        });
        let cut = fit.count().max(1).min(rest.len());
        let (piece, after) = rest.split_at(cut);
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
    /// With what is in memory.
    Memory(Cursor, Since),
    /// With what was read from the streams, then from memory.
    Backlog(Cursor, Since, Vec<Option<Backlog>>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_all_frames_in_order_and_no_larger_than_they_may_be() {
        let frames: Vec<Bytes> = [10, 40, 50, 1, 200, 99, 1, 1, 100, 100, 7]
            .into_iter()
            .enumerate()
            .map(|(number, bytes)| Bytes::from(vec![u8::try_from(number).unwrap(); bytes]))
            .collect();
        for most in [0, 1, 7, 50, 100, 1000] {
            let parts: Vec<&[Bytes]> = pieces(&frames, most).collect();
            assert_eq!(parts.concat(), frames, "{most}");
            for part in parts {
                let bytes: usize = part.iter().map(Bytes::len).sum();
                assert!(bytes <= most || part.len() == 1, "{most}: {bytes}");
            }
        }
        assert_eq!(pieces(&[], 100).count(), 0);
    }
}
