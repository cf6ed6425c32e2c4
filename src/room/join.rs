//! Joining a room: finding out how a session can resume, starting its membership, catching up.

use std::{rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::try_join_all;
use tokio::{
    task::spawn_local,
    time::{Instant, timeout, timeout_at},
};

use super::{
    backlog::{Backlog, NoBacklog},
    hub::{Hub, Phase},
    joined::{JoinAt, JoinError, Joined, ResetReason},
    log::{Positions, Resume, RoomLog, Since},
    member::{Member, NewMember, raise},
    memory::{Memory, weight},
    merge::is_complete,
    missed::{Missed, Step, Steps},
    references::reference_of,
    rooms::Rooms,
};
use crate::{
    codec::Codec,
    model::{Class, Cursor, Fingerprint, Region, RoomId},
    protocol::{Close, SubscribedTo, Wants},
    runtime::unix_ms,
    telemetry::metrics::{self, Counter, Histogram, Source, count},
    wire::Outlet,
};

/// About how large the pieces are in which a backlog is encoded and queued on a connection; at most a quarter of the
/// outbox. So a backlog never overflows the outbox by itself.
const PIECE: usize = 64 * 1024;

/// A session's membership in a room. Dropping it leaves the room.
#[derive(Debug)]
pub struct Membership {
    hub: Rc<Hub>,
    member: Rc<Member>,
}

impl Membership {
    /// Whether the room has ended this membership. The client was told so by `kicked`.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.member.has_left()
    }

    /// Stops telling the member who joins and leaves.
    pub fn ignore_presence(&self) {
        let wants = Wants {
            presence: false,
            ..self.member.wants.get()
        };
        self.member.wants.set(wants);
    }

    /// The time, in ms since 1970, of the own origin's message at `seq`, if the room has it in memory.
    #[must_use]
    pub fn time_of(&self, seq: u64) -> Option<u64> {
        self.hub.log.borrow().time_of(0, seq)
    }

    /// The message that `user` has already published under `id`, if the room has it in memory and the own stream would
    /// not detect the duplicate: the message is of another region, or older than the duplicate window `window`. Returns
    /// its cursor, and its time in ms since 1970.
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

    /// The cursor of the room's head, raised to what the member has seen in other regions; `None` in a room without a
    /// log.
    #[must_use]
    pub fn head(&self) -> Option<Cursor> {
        let head = || self.hub.log.borrow().cursor();
        self.hub.durable.then(|| self.member.raised(head()))
    }

    /// Where the member stands, if it has got everything that the room has; `None` otherwise, and in a room without a log.
    #[must_use]
    pub fn reached(&self) -> Option<Cursor> {
        let log = self.hub.log.borrow();
        let has_all = self.member.live.get() && self.member.next.get() >= log.head_index();
        (self.hub.durable && has_all).then(|| self.member.raised(log.cursor()))
    }

    /// What the member has seen of origins other than the own; `None` if nothing.
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
    /// Whether `missed` has messages to show besides those of the own origin, or `only` is not the own origin and there
    /// are any.
    fn has_more_than(&self, only: &Region, missed: &Missed) -> bool {
        let is_own = self.sources[0].streams.origin() == only;
        let mut shown = missed.steps.iter().filter(|step| step.is_shown);
        shown.any(|step| !is_own || step.message.track() != 0)
    }

    /// How a session that stands at `since` in a track can resume.
    fn resume(&self, track: usize, since: (u64, Fingerprint)) -> Resume {
        let (seq, fingerprint) = since;
        let of = &self.sources[track].streams;
        match self.log.borrow().resume(track, since) {
            // The cursor names no message. Another edge has found the room empty up to a later sequence than this one
            // has.
            Resume::Ahead if fingerprint == Fingerprint(0) && seq <= of.newest(self.part) => {
                Resume::Memory
            }
            resume => resume,
        }
    }
}

impl Rooms {
    /// Starts to open a room that is about to be joined.
    pub fn open(self: &Rc<Self>, room: &RoomId, durable: bool) {
        self.hub(room, durable);
    }

    /// Joins a room. `only`: see [`Since::only`](crate::protocol::Since::only). `reply` makes the frame of the reply, if
    /// there is one. The reply is sent, followed by the backlog, in the same
    /// synchronous step that starts the membership, so there is neither a gap nor a repeat between backlog and live
    /// messages. A large backlog is sent by a task, and the member goes live after it.
    ///
    /// # Errors
    /// [`JoinError`] if the stream could not be read within `rooms.join_timeout`. Then nothing was sent.
    pub async fn join(
        self: &Rc<Self>,
        room: &RoomId,
        durable: bool,
        since: Option<JoinAt>,
        only: Option<Region>,
        who: NewMember,
        reply: impl FnOnce(Joined) -> Option<Bytes>,
    ) -> Result<Membership, JoinError> {
        let started = Instant::now();
        let deadline = started + self.config.join_timeout;
        let prepared = timeout_at(deadline, self.prepare(room, durable, since)).await;
        let (hub, plan) = prepared.map_err(|_elapsed| JoinError::Unavailable)??;
        let membership = self.begin(hub, plan, only.as_ref(), who, reply);
        metrics::record(Histogram::JoinDuration, started.elapsed());
        Ok(membership)
    }

    /// Finds out how the session can resume. The plan is valid only until something else runs on the shard.
    async fn prepare(
        self: &Rc<Self>,
        room: &RoomId,
        durable: bool,
        mut since: Option<JoinAt>,
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
                // The hub could not start, and has logged why. Or it has just ended, and a new one may succeed.
                attempts += 1;
                if attempts > 1 || !self.line.is_up() {
                    return Err(JoinError::Unavailable);
                }
                continue;
            }
            let cursor = match &since {
                None => return Ok((hub, Plan::Fresh)),
                Some(_) if !durable => return Ok((hub, Plan::Reset(ResetReason::Ephemeral))),
                Some(JoinAt::After(cursor)) => cursor,
                Some(JoinAt::Before(first)) => {
                    // Once: later attempts begin at the same place.
                    match Box::pin(self.before(&hub, *first)).await? {
                        Ok(cursor) => since = Some(JoinAt::After(cursor)),
                        Err(_) if hub.is_gone() => {}
                        Err(reason) => return Ok((hub, Plan::Reset(reason))),
                    }
                    continue;
                }
            };
            let place = hub.log.borrow().since_of(cursor);
            let since = match place {
                Ok(since) => since,
                Err(track) => {
                    // Before the client is sent to history: has the stream a new incarnation that this edge has not
                    // noticed yet?
                    let streams = &hub.sources[track].streams;
                    Box::pin(self.verify(streams, hub.part)).await;
                    if hub.is_gone() {
                        continue;
                    }
                    return Ok((hub, Plan::Reset(ResetReason::Epoch)));
                }
            };
            let named = cursor.positions().len();
            let cursor = match named {
                // Before the first message.
                0 => &hub.log.borrow().cursor_of(&since.positions, &[]),
                _ => cursor,
            };
            if named > 0 && since.elsewhere.len() == named {
                // The cursor names no origin that this region sees.
                return Ok((hub, Plan::Reset(ResetReason::Epoch)));
            }
            // If the room has advanced beyond what memory still holds during the read, read again, until the join times
            // out.
            if let Some(backlogs) = read.take()
                && is_complete(&hub.log.borrow(), &since, &backlogs)
            {
                return Ok((hub, Plan::Backlog(cursor.clone(), since, backlogs)));
            }
            let resumes: Vec<Resume> = {
                let tracks = since.positions.iter().enumerate();
                tracks.map(|(t, at)| hub.resume(t, *at)).collect()
            };
            if resumes[0] == Resume::Ahead && !filled {
                filled = true;
                hub.fill(self).await;
                continue;
            }
            // A position of another region that is beyond this region's mirror is not in the future: the mirror may be
            // behind.
            let is_elsewhere = |track: usize| track > 0 && resumes[track] == Resume::Ahead;
            if (0..resumes.len()).all(|t| resumes[t] == Resume::Memory || is_elsewhere(t)) {
                return Ok(
                    match hub.log.borrow().has_more_after(&since, hub.replay_max) {
                        true => (Rc::clone(&hub), Plan::Reset(ResetReason::ReplayMax)),
                        false => (Rc::clone(&hub), Plan::Memory(cursor.clone(), since)),
                    },
                );
            }
            let wanted = (0..resumes.len()).map(|t| !is_elsewhere(t)).collect();
            match self.read_backlogs(&hub, &since, wanted).await {
                Ok(backlogs) => read = Some(backlogs),
                Err(NoBacklog::Reset(reason)) => return Ok((hub, Plan::Reset(reason))),
                Err(NoBacklog::Failed(error)) => return Err(error),
            }
        }
    }

    /// Reads the messages after `since` in the tracks that are wanted.
    async fn read_backlogs(
        self: &Rc<Self>,
        hub: &Rc<Hub>,
        since: &Since,
        wanted: Vec<bool>,
    ) -> Result<Vec<Option<Backlog>>, NoBacklog> {
        // Memory for all tracks is taken at once: two tasks that each hold one share and wait for the next could block
        // each other.
        let most = usize::try_from(self.config.replay_max_bytes.as_u64()).unwrap_or(usize::MAX);
        let _room = match hub.sources.len() {
            1 => None,
            _ => {
                let tracks = wanted.iter().filter(|wanted| **wanted).count();
                Some(self.memory.share(most.saturating_mul(tracks)).await)
            }
        };
        let tracks = wanted.into_iter().zip(&since.positions).enumerate();
        let reads = tracks.map(|(track, (wanted, at))| async move {
            match wanted {
                true => hub.backlog(self, track, *at).await.map(Some),
                false => Ok(None),
            }
        });
        let backlogs = try_join_all(reads).await?;
        let messages = backlogs.iter().flatten().map(|read| read.entries().len());
        if messages.sum::<usize>() as u64 > hub.replay_max {
            return Err(NoBacklog::Reset(ResetReason::ReplayMax));
        }
        Ok(backlogs)
    }

    /// Starts the membership, in one step without `.await`.
    fn begin(
        self: &Rc<Self>,
        hub: Rc<Hub>,
        plan: Plan,
        only: Option<&Region>,
        who: NewMember,
        reply: impl FnOnce(Joined) -> Option<Bytes>,
    ) -> Membership {
        let outlet = who.outlet.clone();
        // A message that the session has seen elsewhere may be a copy of one that is delivered here. So the mirrors are
        // given some time to reach the session's cursor.
        let lags = match &plan {
            Plan::Fresh | Plan::Reset(_) => false,
            Plan::Memory(_, since) | Plan::Backlog(_, since, _) => hub.log.borrow().lags(since),
        };
        let (missed, joined, from, since, result, is_blind) = {
            let log = hub.log.borrow();
            let missed = match &plan {
                Plan::Memory(_, since) if !lags => log.after(since, 0),
                Plan::Backlog(_, since, backlogs) if !lags => {
                    hub.last_missed.find(&log, since, backlogs)
                }
                _ => Missed::default(),
            };
            let is_blind = match &plan {
                Plan::Memory(..) | Plan::Backlog(..) => {
                    only.is_some_and(|only| lags || hub.has_more_than(only, &missed))
                }
                Plan::Fresh | Plan::Reset(_) => false,
            };
            let head = || hub.durable.then(|| log.cursor());
            let here = || Since {
                positions: log.positions(),
                elsewhere: Vec::new(),
            };
            let joined = |cursor: Option<Cursor>, reset| Joined {
                head: cursor.clone(),
                cursor,
                replay: 0,
                reset,
            };
            // After the backlog the session stands where the room stands, or further in the tracks where it has seen
            // more elsewhere.
            let resumed = |cursor: Cursor, since: &Since, missed: &Missed| {
                let ahead = log.ahead(since);
                let place = since.positions.iter().zip(log.positions());
                let place = place.map(|(was, now)| if was.0 > now.0 { *was } else { now });
                let since = Since {
                    positions: place.collect(),
                    elsewhere: since.elsewhere.clone(),
                };
                let joined = Joined {
                    cursor: Some(cursor),
                    head: head().map(|head| raise(head, &ahead)),
                    replay: missed.len() as u64,
                    reset: None,
                };
                (joined, since)
            };
            let (missed, joined, from, since, result) = match plan {
                Plan::Memory(cursor, since) | Plan::Backlog(cursor, since, _) if is_blind => {
                    // It does not get what it has seen of the origin that it followed once more.
                    let none = Missed::default();
                    let (resumed, upto) = resumed(cursor, &since, &none);
                    let reason = ResetReason::OtherOrigin;
                    let joined = joined(resumed.head, Some(reason));
                    (none, joined, upto.clone(), upto, reason.result())
                }
                Plan::Memory(cursor, since) | Plan::Backlog(cursor, since, _) if lags => {
                    let (joined, _) = resumed(cursor, &since, &missed);
                    let from = since.clone();
                    (missed, joined, from, since, metrics::Joined::Stream)
                }
                Plan::Fresh => (
                    missed,
                    joined(head(), None),
                    here(),
                    here(),
                    metrics::Joined::Live,
                ),
                Plan::Reset(reason) => (
                    missed,
                    joined(head(), Some(reason)),
                    here(),
                    here(),
                    reason.result(),
                ),
                Plan::Memory(cursor, since) => {
                    count(Counter::MessageReplayed(Source::Ring), missed.len() as u64);
                    let (joined, upto) = resumed(cursor, &since, &missed);
                    (missed, joined, since, upto, metrics::Joined::Ring)
                }
                Plan::Backlog(cursor, since, _) => {
                    count(Counter::MessageReplayed(Source::Stream), missed.read as u64);
                    let (joined, upto) = resumed(cursor, &since, &missed);
                    (missed, joined, since, upto, metrics::Joined::Stream)
                }
            };
            (missed, joined, from, since, result, is_blind)
        };
        // Such a member begins with what comes from now on.
        let lags = lags && !is_blind;
        count(Counter::JoinResult(result), 1);
        if let Some(reply) = reply(joined) {
            outlet.send(&[reply]);
        }
        let head = hub.log.borrow().head_index();
        let bytes = missed.frame_bytes();
        // A client that joins many rooms at once gets their backlogs one after the other, not all at once into its
        // outbox.
        let piece = piece_of(&outlet);
        let seems_to_fit =
            !lags && bytes <= piece && (bytes == 0 || outlet.queued_bytes() <= piece);
        let member = Rc::new(Member::new(who, head));
        member.set_ahead(hub.log.borrow().ahead(&since));
        hub.add(Rc::clone(&member));
        hub.follow_receipts(self);
        let mut behind = Behind::new(&self.memory, missed, (from, since), head);
        if seems_to_fit {
            let frames = behind.piece(&hub, member.codec, piece);
            count(
                Counter::MessageDelivered,
                member.send(SubscribedTo::Messages, &frames),
            );
        }
        if seems_to_fit && behind.is_done() {
            member.go_live(head);
        } else {
            behind.steps.count_in(&self.memory);
            let (rooms, hub, member) = (Rc::clone(self), Rc::clone(&hub), Rc::clone(&member));
            spawn_local(async move {
                if lags {
                    let most = rooms.config.causal_wait;
                    hub.when_delivered(most, |log| !log.lags(&behind.upto))
                        .await;
                    // The session was not given anything that the room has in memory.
                    behind.index = 0;
                }
                rooms.catch_up(&hub, &member, behind).await;
            });
        }
        Membership { hub, member }
    }

    /// Sends a large backlog at the pace at which the client reads. Then sends what has come to the room meanwhile,
    /// from memory, or from the streams if memory does not reach back far enough. Repeats this until nothing is left,
    /// and then the member goes live. A client that falls further behind than `replay_max` is closed as too slow.
    ///
    /// If others wait for memory, a backlog that was read for a slow client is dropped. The rest is read again later,
    /// in parts, from where the client has got to.
    async fn catch_up(self: &Rc<Self>, hub: &Rc<Hub>, member: &Rc<Member>, mut behind: Behind) {
        let outlet = &member.outlet;
        let piece = piece_of(outlet);
        let is_over = || member.has_left() || hub.is_gone() || outlet.is_over();
        // Whether the memory is short before at most so many bytes are queued.
        let wait = async |below: usize, is_last: bool| {
            tokio::select! {
                biased;
                () = outlet.drained(below) => false,
                () = self.memory.is_short(), if !is_last => true,
            }
        };
        let mut in_parts = false;
        loop {
            let mut given_up = false;
            while !behind.is_done() {
                // Wait before encoding: frames for this member alone are not kept for a client that does not read. The
                // last piece is not worth another read.
                let is_last = behind.rest_bytes(piece) < piece;
                given_up = wait(piece, is_last).await;
                if is_over() {
                    return;
                }
                if given_up {
                    break;
                }
                let reached = (behind.next, behind.at.clone());
                let part = behind.piece(hub, member.codec, piece);
                // The rest of the way, for a piece that weighs more than its bytes or is one large message.
                let bytes: usize = part.iter().map(weight).sum();
                let below = piece.min((outlet.outbox_bytes() / 2).saturating_sub(bytes));
                given_up = wait(below, is_last).await;
                if is_over() {
                    return;
                }
                if given_up {
                    (behind.next, behind.at) = reached;
                    break;
                }
                let sent = member.send(SubscribedTo::Messages, &part);
                count(Counter::MessageDelivered, sent);
            }
            let (since, index) = match given_up {
                true => match behind.reached(&hub.log.borrow()) {
                    Some(since) => (since, 0),
                    None => return outlet.close(Close::TooSlow),
                },
                false => (behind.upto.clone(), behind.index),
            };
            in_parts |= given_up;
            drop(behind);
            outlet.drained(piece).await;
            if is_over() {
                return;
            }
            let from_memory = {
                let log = hub.log.borrow();
                let mut tracks = since.positions.iter().enumerate();
                let reaches = tracks.all(|(track, (seq, _))| *seq >= log.floor(track));
                reaches.then(|| log.after(&since, index))
            };
            behind = match from_memory {
                Some(missed) => {
                    let (upto, ahead, head) = {
                        let log = hub.log.borrow();
                        let mut upto = since.clone();
                        reach(&mut upto, &log.positions());
                        let ahead = log.ahead(&upto);
                        (upto, ahead, log.head_index())
                    };
                    let seems_little = missed.frame_bytes() <= piece;
                    let mut behind = Behind::new(&self.memory, missed, (since, upto), head);
                    if seems_little {
                        let frames = behind.piece(hub, member.codec, piece);
                        let sent = member.send(SubscribedTo::Messages, &frames);
                        count(Counter::MessageDelivered, sent);
                        if behind.is_done() {
                            member.set_ahead(ahead);
                            member.go_live(head);
                            return;
                        }
                    }
                    behind.steps.count_in(&self.memory);
                    behind
                }
                None => match self.read_on(hub, &since, in_parts).await {
                    Ok(backlogs) => {
                        let log = hub.log.borrow();
                        let found = hub.last_missed.find(&log, &since, &backlogs);
                        let mut reached = log.positions();
                        if !is_complete(&log, &since, &backlogs) {
                            // The room has advanced, or this was a partial read. For now the session gets only what was
                            // read.
                            let read = backlogs.iter().zip(&since.positions);
                            for (at, (backlog, was)) in reached.iter_mut().zip(read) {
                                let upto = backlog.as_ref().map_or(*was, |read| read.upto);
                                *at = if upto.0 < at.0 { upto } else { *at };
                            }
                        }
                        let mut upto = since.clone();
                        reach(&mut upto, &reached);
                        found.steps.count_in(&self.memory);
                        Behind::new(&self.memory, found, (since, upto), 0)
                    }
                    Err(NoBacklog::Reset(_)) => return outlet.close(Close::TooSlow),
                    Err(NoBacklog::Failed(_)) => {
                        // NATS is unreachable, so nothing comes live either. Or others have used all the memory the
                        // whole time.
                        hub.pause().await;
                        let nothing = Missed::default();
                        Behind::new(&self.memory, nothing, (since.clone(), since), index)
                    }
                },
            };
        }
    }

    /// Reads what came after `since`, for a member that is behind. Reads only the beginning of it if `in_parts` is set
    /// and there is only one stream. Waits at most `rooms.join_timeout`; after that the caller checks whether the
    /// client is still connected.
    async fn read_on(
        self: &Rc<Self>,
        hub: &Rc<Hub>,
        since: &Since,
        in_parts: bool,
    ) -> Result<Vec<Option<Backlog>>, NoBacklog> {
        let wanted: Vec<bool> = {
            let log = hub.log.borrow();
            let tracks = since.positions.iter().enumerate();
            tracks
                .map(|(t, (seq, _))| *seq <= log.position(t))
                .collect()
        };
        let read = async {
            match (in_parts, &wanted[..], &since.positions[..]) {
                (true, [true], [at]) => Ok(vec![Some(hub.backlog_part(self, 0, *at).await?)]),
                _ => self.read_backlogs(hub, since, wanted.clone()).await,
            }
        };
        timeout(self.config.join_timeout, read)
            .await
            .unwrap_or(Err(NoBacklog::Failed(JoinError::Unavailable)))
    }
}

/// What a session is still to be sent.
struct Behind {
    steps: Rc<Steps>,
    /// Index in `steps` of the first one that was not sent.
    next: usize,
    /// Whether the session gets the shared frames: their cursors are right for it.
    shared: bool,
    /// Where the session stands after the last step that it was sent. Written into each frame that is made for this
    /// session alone.
    at: Since,
    /// Where the session stands after all steps.
    upto: Since,
    /// Index in the log of the message that follows the steps, if the steps reach up to what is in memory.
    index: u64,
    memory: Arc<Memory>,
}

impl Behind {
    fn new(memory: &Arc<Memory>, missed: Missed, (at, upto): (Since, Since), index: u64) -> Self {
        let Missed { steps, shared, .. } = missed;
        Self {
            memory: Arc::clone(memory),
            steps,
            next: 0,
            shared,
            at,
            upto,
            index,
        }
    }

    fn is_done(&self) -> bool {
        self.next == self.steps.len()
    }

    /// About how many bytes the frames have that are still to be sent. Stops counting at `most`.
    fn rest_bytes(&self, most: usize) -> usize {
        let mut bytes = 0;
        for step in &self.steps[self.next..] {
            bytes += step.message.frame_bytes();
            if bytes >= most {
                break;
            }
        }
        bytes
    }

    /// The next frames: at most `most` bytes, or one frame that is larger.
    fn piece(&mut self, hub: &Hub, codec: Codec, most: usize) -> Vec<Bytes> {
        let (mut frames, mut bytes) = (Vec::new(), 0);
        let began = self.next;
        {
            let log = hub.log.borrow();
            while let Some(Step { message, is_shown }) = self.steps.get(self.next) {
                let track = message.track();
                let before = self.at.positions[track];
                if !message.is_late() {
                    self.at.positions[track] = (message.seq, message.fingerprint);
                }
                if *is_shown {
                    let frame = if self.shared {
                        message.frame(codec)
                    } else {
                        let cursor = log.cursor_of(&self.at.positions, &self.at.elsewhere);
                        self.memory.count(message.frame_at(codec, &cursor))
                    };
                    bytes += frame.len();
                    if bytes > most && !frames.is_empty() {
                        // It begins the next piece.
                        self.at.positions[track] = before;
                        break;
                    }
                    frames.push(frame);
                }
                self.next += 1;
            }
        }
        let given = self.steps[began..self.next].iter();
        let mut log = hub.log.borrow_mut();
        log.recount(given.map(|step| &step.message));
        frames
    }

    /// Where the session stands after what it was sent, as the cursors in its frames say.
    fn reached(&self, log: &RoomLog) -> Option<Since> {
        let mut given = self.steps[..self.next].iter().rev();
        match given.find(|step| step.is_shown) {
            Some(last) if self.shared => log.since_of(&last.message.cursor()?).ok(),
            Some(_) | None => Some(self.at.clone()),
        }
    }
}

/// Size of the pieces for a connection.
fn piece_of(outlet: &Outlet) -> usize {
    PIECE.min(outlet.outbox_bytes() / 4)
}

/// Advances each position of `since` to that of `place`, if that is further.
fn reach(since: &mut Since, place: &Positions) {
    for (at, reached) in since.positions.iter_mut().zip(place) {
        if reached.0 > at.0 {
            *at = *reached;
        }
    }
}

/// How a session resumes.
enum Plan {
    /// With live messages.
    Fresh,
    /// With live messages, although the session asked to resume.
    Reset(ResetReason),
    /// With the messages in memory.
    Memory(Cursor, Since),
    /// With the messages that were read from the streams, then the ones in memory.
    Backlog(Cursor, Since, Vec<Option<Backlog>>),
}
