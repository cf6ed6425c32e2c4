//! The state of a room's log on one shard, without I/O: what was delivered, what is missing, who can resume from memory.

use std::{
    cell::OnceCell,
    collections::{HashMap, VecDeque},
    ops::{Deref, Range},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    memory::{Memory, Share},
    message::{Message, Spotted, TrackId},
    references::{References, Spot, reference},
};
use crate::{
    bus::Record,
    model::{Class, Cursor, Epoch, Fingerprint, Position, Region, RoomId},
};

/// For how many times `rooms.causal_wait` nothing is waited for because of a sender for whose message something was, in vain.
const PATIENCE: u32 = 5;

/// Senders of whom that is known; of others, something is waited for again.
const MAX_IN_VAIN: usize = 1024;

/// Delivered messages of a room and the place they lead to.
///
/// A room's log is the union of one log an origin, its *tracks*. Entries are in the order in which they were delivered here, which
/// keeps that of each track; another edge may have another order of the tracks among each other. So a place in the room is a
/// position a track, and what comes after it are the entries that lie after their track's.
///
/// Entries have an index that counts deliveries since the log was made; a member that has got everything before index `n` is
/// given what comes from `n` on. Entries at the front are forgotten when their bytes exceed the bound, but positions and
/// the index go on.
///
/// # Invariants
/// - A message is delivered once: only if its sequence is above the last one of its class and track, and its reference is new.
/// - A position never goes back. All messages up to it have been delivered, except where a message of the *other* class
///   was lost in silence before (see [`RoomLog::admit`]).
/// - Every message after a track's `floor` is in memory.
/// - A message is delivered after what its sender had seen of other tracks, unless that did not come in time.
#[derive(Debug)]
pub(super) struct RoomLog {
    /// What messages that are not stored are of.
    unlogged: Rc<TrackId>,
    /// The own origin's first; none in a room without a log.
    tracks: Vec<Track>,
    entries: VecDeque<Rc<Message>>,
    /// What the entries take, with the frames that were made of them.
    bytes: usize,
    max_bytes: usize,
    /// Index of the first entry in memory.
    base: u64,
    /// Of each class for itself: reactions don't push messages out.
    references: [References; 2],
    /// Whose messages have waited in vain: for what, and until when no other of theirs waits unless that has come.
    in_vain: HashMap<String, (Cursor, Instant)>,
}

/// A place in a room: sequence and fingerprint, a track each.
pub(super) type Positions = Vec<(u64, Fingerprint)>;

/// Where a track begins.
#[derive(Debug)]
pub(super) struct Start {
    /// Whose stream it is.
    pub(super) origin: Region,
    /// The stream's epoch.
    pub(super) epoch: Epoch,
    /// The newest message of each class that has one.
    pub(super) heads: Vec<Record>,
    /// Where there are none: a sequence of the stream up to which the room is known to be empty.
    pub(super) empty_at: u64,
}

/// One origin's part of a room's log.
#[derive(Debug)]
struct Track {
    id: Rc<TrackId>,
    origin: Region,
    epoch: Epoch,
    /// Last sequence per class.
    last: [u64; 2],
    position: u64,
    fingerprint: Fingerprint,
    /// Everything up to here is known to be complete, and the index that the next delivery had then.
    verified: (u64, u64),
    floor: u64,
    floor_fingerprint: Fingerprint,
    /// Admitted messages that wait for other tracks, and until when.
    held: VecDeque<(Record, Instant)>,
    /// Up to here messages of other tracks have waited in vain, and until when that is reason not to wait again.
    given_up: Option<(u64, Instant)>,
}

/// What is to be done with a message that came live.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// Deliver it.
    Deliver,
    /// It was delivered before, or lies before the log's beginning.
    Old,
    /// Messages before it are missing: read the stream from [`RoomLog::unverified`] on first.
    Gap,
}

/// Where a session with a cursor can go on, as far as one track is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resume {
    /// Everything after the position is in memory.
    Memory,
    /// The position lies before what is in memory.
    Stream,
    /// The position lies beyond what this log has seen.
    Ahead,
    /// The position lies within what is in memory, but not on a message with its fingerprint: the stream has to tell.
    Doubtful,
}

/// A cursor as a place in this log, and what this log does not know of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Since {
    pub(super) positions: Positions,
    /// Positions of origins that are not seen here (yet).
    pub(super) elsewhere: Vec<Position>,
}

/// What a session has missed, in order. Sessions that missed the same share the list.
#[derive(Debug, Clone, Default)]
pub(super) struct Missed {
    pub(super) steps: Rc<Steps>,
    /// Whether the frames that all share have the cursors of this session.
    pub(super) shared: bool,
    /// How many of those that are shown were read from streams.
    pub(super) read: usize,
}

/// Messages on the way of a session to where the room is.
#[derive(Debug, Default)]
pub(super) struct Steps {
    list: Vec<Step>,
    /// What it takes of `rooms.replay_memory`, once a session keeps it.
    kept: OnceCell<Share>,
}

impl Steps {
    pub(super) fn new(list: Vec<Step>) -> Self {
        Self {
            list,
            kept: OnceCell::new(),
        }
    }

    /// Counts it for as long as it is kept: the list, and messages that the ring may forget before they are given.
    pub(super) fn count_in(&self, memory: &Arc<Memory>) {
        let of_ring = self.list.iter().filter(|step| !step.message.is_counted());
        let of_ring: usize = of_ring.map(|step| step.message.bytes()).sum();
        let bytes = of_ring + size_of_val(&self.list[..]);
        self.kept.get_or_init(|| memory.take(bytes));
    }
}

impl Deref for Steps {
    type Target = [Step];

    fn deref(&self) -> &[Step] {
        &self.list
    }
}

/// One message on the way of a session to where the room is.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) message: Rc<Message>,
    /// Otherwise the session has got another copy of it, and only passes it.
    pub(super) is_shown: bool,
}

impl Missed {
    /// How many messages are shown.
    pub(super) fn len(&self) -> usize {
        self.steps.iter().filter(|step| step.is_shown).count()
    }

    /// About how many bytes their frames have.
    pub(super) fn frame_bytes(&self) -> usize {
        let shown = self.steps.iter().filter(|step| step.is_shown);
        shown.map(|step| step.message.frame_bytes()).sum()
    }
}

impl RoomLog {
    /// A log that stands at the heads of its tracks.
    #[must_use]
    pub(super) fn new(room: &RoomId, starts: Vec<Start>, max_bytes: usize) -> Self {
        let track = |start| Track::new(room.clone(), start);
        Self {
            references: [(); 2].map(|()| References::new(starts.len())),
            unlogged: Rc::new(TrackId {
                room: room.clone(),
                origin: None,
            }),
            tracks: starts.into_iter().map(track).collect(),
            entries: VecDeque::new(),
            bytes: 0,
            max_bytes,
            base: 0,
            in_vain: HashMap::new(),
        }
    }

    /// How many origins there are.
    #[must_use]
    pub(super) fn tracks(&self) -> usize {
        self.tracks.len()
    }

    /// The track of an origin.
    #[must_use]
    pub(super) fn track_of(&self, origin: &Region) -> Option<usize> {
        self.tracks.iter().position(|track| track.origin == *origin)
    }

    /// The epoch of a track's stream.
    #[must_use]
    pub(super) fn epoch(&self, track: usize) -> Epoch {
        self.tracks[track].epoch
    }

    /// Whether `epoch` is that of the log of `origin`.
    #[must_use]
    pub(super) fn is_current(&self, origin: &Region, epoch: Epoch) -> bool {
        self.track_of(origin)
            .is_some_and(|track| self.epoch(track) == epoch)
    }

    /// The sequence up to which everything of a track was delivered.
    #[must_use]
    pub(super) fn position(&self, track: usize) -> u64 {
        self.tracks[track].position
    }

    /// Every message of a track after this sequence is in memory.
    #[must_use]
    pub(super) fn floor(&self, track: usize) -> u64 {
        self.tracks[track].floor
    }

    /// The last sequence of a class that was taken in.
    #[must_use]
    pub(super) fn last(&self, track: usize, class: Class) -> u64 {
        self.tracks[track].last[index(class)]
    }

    /// The room's cursor.
    #[must_use]
    pub(super) fn cursor(&self) -> Cursor {
        let positions = self.tracks.iter().map(Track::position_now);
        Cursor::of(positions.collect())
    }

    /// The cursor of a place, and of positions elsewhere.
    #[must_use]
    pub(super) fn cursor_of(&self, place: &Positions, elsewhere: &[Position]) -> Cursor {
        let here = self.tracks.iter().zip(place);
        let here = here.map(|(track, (seq, fingerprint))| track.at(*seq, *fingerprint));
        Cursor::of(here.chain(elsewhere.iter().cloned()).collect())
    }

    /// The cursor of one track's component alone: up to there its sender has read.
    #[must_use]
    pub(super) fn cursor_at(&self, track: usize, seq: u64, fingerprint: Fingerprint) -> Cursor {
        Cursor::single(self.tracks[track].at(seq, fingerprint))
    }

    /// What a member that is up to date has seen of other origins than its own. Where nothing was said there is nothing to be
    /// waited for.
    #[must_use]
    pub(super) fn seen_elsewhere(&self) -> Cursor {
        let others = self.tracks.iter().skip(1).map(Track::position_now);
        Cursor::of(others.filter(Position::names_message).collect())
    }

    /// The place up to which everything was delivered.
    #[must_use]
    pub(super) fn positions(&self) -> Positions {
        let tracks = self.tracks.iter();
        tracks.map(|t| (t.position, t.fingerprint)).collect()
    }

    /// A cursor as a place in this log. An origin that it does not name: nothing seen of that yet.
    ///
    /// # Errors
    /// The first track whose epoch is another: there the cursor means nothing.
    pub(super) fn since_of(&self, cursor: &Cursor) -> Result<Since, usize> {
        let mut positions = vec![(0, Fingerprint::default()); self.tracks.len()];
        let mut elsewhere = Vec::new();
        for position in cursor.positions() {
            match self.track_of(&position.origin) {
                None => elsewhere.push(position.clone()),
                Some(track) if self.tracks[track].epoch != position.epoch => return Err(track),
                Some(track) => positions[track] = (position.seq, position.fingerprint),
            }
        }
        Ok(Since {
            positions,
            elsewhere,
        })
    }

    /// Those components of `since` that lie beyond this log.
    #[must_use]
    pub(super) fn ahead(&self, since: &Since) -> Vec<Position> {
        let ahead = self.not_reached(since);
        ahead.chain(since.elsewhere.iter().cloned()).collect()
    }

    /// Whether a track has not got as far as `since`: some of what it lacks may be a copy of what it has.
    #[must_use]
    pub(super) fn lags(&self, since: &Since) -> bool {
        self.not_reached(since).next().is_some()
    }

    /// The messages of `since` that its tracks have not got to.
    fn not_reached<'a>(&'a self, since: &'a Since) -> impl Iterator<Item = Position> + 'a {
        let tracks = self.tracks.iter().zip(&since.positions);
        let ahead = tracks.filter(|(track, (seq, _))| *seq > track.position);
        let ahead = ahead.map(|(track, (seq, fingerprint))| track.at(*seq, *fingerprint));
        ahead.filter(Position::names_message)
    }

    /// Whether a position lies beyond this log.
    #[must_use]
    pub(super) fn is_ahead(&self, position: &Position) -> bool {
        self.track_of(&position.origin)
            .is_none_or(|track| position.seq > self.tracks[track].position)
    }

    /// The indices of what is in memory.
    #[must_use]
    pub(super) fn indices(&self) -> Range<u64> {
        self.base..self.head_index()
    }

    /// The index that the next delivery will have.
    #[must_use]
    pub(super) fn head_index(&self) -> u64 {
        self.base + self.entries.len() as u64
    }

    /// First sequence of a track that may be missing: where every reading of the stream begins that is to make the log complete.
    ///
    /// Not the place after the last delivery: a message of the other class may be missing before that without anybody
    /// having noticed, and once a later one of its class is delivered it would be taken for old.
    #[must_use]
    pub(super) fn unverified(&self, track: usize) -> u64 {
        self.tracks[track].verified.0 + 1
    }

    /// Deliveries since all tracks were last known to be complete.
    #[must_use]
    pub(super) fn deliveries_unverified(&self) -> u64 {
        let verified = self.tracks.iter().map(|track| track.verified.1).min();
        verified.map_or(0, |index| self.head_index() - index)
    }

    /// Notes that everything of a track up to `seq` has been taken in: the stream was read up to there, or its heads there are
    /// those that were taken in last.
    pub(super) fn verify(&mut self, track: usize, seq: u64) {
        let head = self.head_index();
        let track = &mut self.tracks[track];
        if seq >= track.verified.0 {
            track.verified = (seq, head);
        }
    }

    /// Judges a message by its sequence and its predecessor on the same subject (`None` where it was read from the stream,
    /// in order, and so can't have a gap before it).
    ///
    /// The predecessor is that of the message's own class: if a message of one class is lost in silence and one of the other
    /// class comes, nothing shows. The hub therefore notes all causes of loss on the way from the server, and the periodic
    /// comparison with the stream finds what a server lost; such a message is delivered late.
    #[must_use]
    pub(super) fn admit(
        &self,
        track: usize,
        class: Class,
        seq: u64,
        previous: Option<u64>,
    ) -> Admission {
        let last = self.last(track, class);
        if seq <= last {
            Admission::Old
        } else if previous.is_some_and(|previous| previous > last) {
            Admission::Gap
        } else {
            Admission::Deliver
        }
    }

    /// Whether an admitted message has to wait: for one before it in its track, or for what its sender had seen of others.
    #[must_use]
    pub(super) fn must_wait(&self, track: usize, record: &Record, now: Instant) -> bool {
        !self.tracks[track].held.is_empty() || self.misses(track, record, now)
    }

    /// Whether something that the sender had seen is not delivered, and is worth waiting for.
    fn misses(&self, track: usize, record: &Record, now: Instant) -> bool {
        let mut not_seen = self.not_seen(track, record).peekable();
        if not_seen.peek().is_none() {
            return false;
        }
        if let Some((claimed, end)) = self.in_vain.get(&record.from)
            && now < *end
            && self.lacks(track, claimed).next().is_some()
        {
            return false;
        }
        not_seen.any(|(of, seq)| {
            let waited = of.given_up.filter(|(_, end)| now < *end);
            waited.is_none_or(|(upto, _)| seq > upto)
        })
    }

    /// Whether something that the sender had seen is not delivered.
    #[must_use]
    pub(super) fn is_early(&self, track: usize, record: &Record) -> bool {
        self.not_seen(track, record).next().is_some()
    }

    /// What the sender of a message had seen and is not delivered.
    fn not_seen<'a>(
        &'a self,
        track: usize,
        record: &'a Record,
    ) -> impl Iterator<Item = (&'a Track, u64)> {
        let after = record.after.iter();
        after.flat_map(move |after| self.lacks(track, after))
    }

    /// What of `seen` is not delivered, but for `track` itself. What is of an origin that is not seen here can't be waited for.
    fn lacks<'a>(
        &'a self,
        track: usize,
        seen: &'a Cursor,
    ) -> impl Iterator<Item = (&'a Track, u64)> {
        seen.positions().iter().filter_map(move |seen| {
            let other = self.track_of(&seen.origin)?;
            let of = &self.tracks[other];
            let is_missing = other != track
                && of.epoch == seen.epoch
                && seen.names_message()
                && seen.seq > of.position;
            is_missing.then_some((of, seen.seq))
        })
    }

    /// Keeps an admitted message until what its sender had seen is delivered, or until `until`.
    pub(super) fn hold(&mut self, track: usize, record: Record, until: Instant) {
        let track = &mut self.tracks[track];
        track.last[index(record.class)] = record.seq;
        track.held.push_back((record, until));
    }

    /// How many messages wait.
    #[must_use]
    pub(super) fn held(&self) -> usize {
        self.tracks.iter().map(|track| track.held.len()).sum()
    }

    /// When the first of those that wait has waited long enough.
    #[must_use]
    pub(super) fn held_until(&self) -> Option<Instant> {
        let fronts = self.tracks.iter().filter_map(|track| track.held.front());
        fronts.map(|(_, until)| *until).min()
    }

    /// The next message that need not wait any longer: what its sender had seen has come; or its time, `wait`, is up, or more than
    /// `most` wait.
    ///
    /// What was waited for in vain is not waited for again in as long a time, and neither is anything for the sake of the same
    /// sender in [`PATIENCE`] times as long, or until it has come: whoever claims to have seen what does not exist delays a room
    /// seldom.
    pub(super) fn release(
        &mut self,
        now: Instant,
        most: usize,
        wait: Duration,
    ) -> Option<(usize, Record)> {
        let ready = (0..self.tracks.len()).find(|track| {
            let front = self.tracks[*track].held.front();
            front.is_some_and(|(record, _)| !self.misses(*track, record, now))
        });
        if let Some(track) = ready {
            let (record, _) = self.tracks[track].held.pop_front()?;
            return Some((track, record));
        }
        let crowded = self.held() > most;
        let (until, track) = self
            .tracks
            .iter()
            .enumerate()
            .filter_map(|(at, track)| Some((track.held.front()?.1, at)))
            .min()?;
        if until > now && !crowded {
            return None;
        }
        let (record, _) = self.tracks[track].held.pop_front()?;
        for seen in record.after.iter().flat_map(Cursor::positions) {
            if let Some(other) = self.track_of(&seen.origin) {
                let of = &mut self.tracks[other];
                let before = of.given_up.filter(|(_, end)| now < *end);
                let upto = before.map_or(seen.seq, |(upto, _)| upto.max(seen.seq));
                of.given_up = Some((upto, now + wait));
            }
        }
        self.in_vain.retain(|_, (_, end)| now < *end);
        if self.in_vain.len() < MAX_IN_VAIN
            && let Some(after) = &record.after
        {
            let claim = (after.clone(), now + wait * PATIENCE);
            self.in_vain.insert(record.from.clone(), claim);
        }
        Some((track, record))
    }

    /// Takes note of an admitted message and returns where it stands, or `None` if its reference was delivered before (the
    /// first one wins): then the position moves on and nothing is shown.
    #[must_use]
    pub(super) fn advance(&mut self, track: usize, record: &Record) -> Option<Spotted> {
        let of = &mut self.tracks[track];
        let last = &mut of.last[index(record.class)];
        *last = record.seq.max(*last);
        if record.seq > of.position {
            of.position = record.seq;
            of.fingerprint = record.fingerprint;
        }
        let spot = (track, record.seq);
        let reference = reference(record);
        let fresh =
            reference.is_none_or(|key| self.references[index(record.class)].note(key, spot));
        fresh.then(|| Spotted {
            track,
            position: self.tracks[track].position,
            reference,
        })
    }

    /// Notes references of messages before the beginning of the log: they are not shown again when they come from another origin.
    pub(super) fn remember(&mut self, track: usize, records: &[Record]) {
        let beginning = self.tracks[track].position;
        // What was stored since the heads were read will be delivered.
        for record in records.iter().filter(|record| record.seq <= beginning) {
            if let Some(key) = reference(record) {
                self.references[index(record.class)].note(key, (track, record.seq));
            }
        }
    }

    /// Whether who stands at `place` has got a message by another copy of it.
    #[must_use]
    pub(super) fn has_twin(&self, place: &Positions, reference: Option<u64>, at: Spot) -> bool {
        let seen = |spot: Spot| place.get(spot.0).is_some_and(|of| spot.1 <= of.0);
        let of = |references: &References, key| references.has_twin(key, at, seen);
        reference.is_some_and(|key| self.references.iter().any(|known| of(known, key)))
    }

    /// A message of a track as it is kept for all who have not got it, read from the stream: its cursor names this origin alone.
    pub(super) fn stored(&self, track: usize, record: Record) -> Message {
        let at = Spotted {
            track,
            position: record.seq,
            reference: reference(&record),
        };
        Message::new(&self.tracks[track].id, at, record, None)
    }

    /// Keeps the message that [`Self::advance`] has just taken note of.
    pub(super) fn push(&mut self, at: Spotted, record: Record) -> Rc<Message> {
        let is_alone = self.tracks.len() == 1 && at.position == record.seq;
        let cursor = (!is_alone).then(|| self.cursor());
        let message = Message::new(&self.tracks[at.track].id, at, record, cursor);
        let message = Rc::new(message);
        message.counted.set(Some(0));
        self.entries.push_back(Rc::clone(&message));
        message
    }

    /// Counts what messages have come to take since they were counted last, and forgets the oldest ones where that is too much.
    pub(super) fn recount<'m>(&mut self, messages: impl Iterator<Item = &'m Rc<Message>>) {
        for message in messages {
            if let Some(before) = message.counted.get() {
                let bytes = message.bytes();
                message.counted.set(Some(bytes));
                self.bytes = self.bytes + bytes - before;
            }
        }
        while self.bytes > self.max_bytes
            && let Some(oldest) = self.entries.pop_front()
        {
            self.bytes -= oldest.counted.take().unwrap_or_default();
            self.base += 1;
            let track = &mut self.tracks[oldest.track()];
            if oldest.position() > track.floor {
                track.floor = oldest.position();
                track.floor_fingerprint = if oldest.is_late() {
                    Fingerprint(0)
                } else {
                    oldest.fingerprint
                };
            }
        }
    }

    /// A message of a room without a log, which is counted and not kept.
    pub(super) fn pass(&mut self, record: Record) -> Message {
        self.base += 1;
        Message::new(&self.unlogged, Spotted::default(), record, None)
    }

    /// Forgets all that was delivered: who resumes from before here is sent to the stream. Positions, indices and
    /// what is verified stay.
    pub(super) fn forget(&mut self) {
        self.base = self.head_index();
        for entry in self.entries.drain(..) {
            entry.counted.set(None);
        }
        self.bytes = 0;
        for track in &mut self.tracks {
            track.floor = track.position;
            track.floor_fingerprint = track.fingerprint;
        }
    }

    /// Where a session that stands at `since` of a track can go on.
    #[must_use]
    pub(super) fn resume(&self, track: usize, since: (u64, Fingerprint)) -> Resume {
        let of = &self.tracks[track];
        let (seq, fingerprint) = since;
        if seq > of.position {
            return Resume::Ahead;
        }
        if seq < of.floor {
            return Resume::Stream;
        }
        let expected = if seq == of.position {
            Some(of.fingerprint)
        } else if seq == of.floor {
            Some(of.floor_fingerprint)
        } else {
            let entry = self.find(track, seq);
            // The place of a late entry is the one before it.
            entry.filter(|e| e.position() == seq).map(|e| e.fingerprint)
        };
        let unchecked = fingerprint == Fingerprint(0);
        if unchecked || expected == Some(fingerprint) {
            Resume::Memory
        } else {
            Resume::Doubtful
        }
    }

    /// What is in memory of what lies after `since`: all there is, if `since` lies before no track's [`Self::floor`]. After it
    /// a session stands at [`Self::positions`], or further where `since` was. What has an index below `from` it has got.
    ///
    /// Late entries share the position of the one before them. Whether a cursor there includes them can't be told: they are sent
    /// again, since a repeat can be recognised by its id and a loss can't.
    pub(super) fn after(&self, since: &Since, from: u64) -> Missed {
        // Where the hub stood before the entry that is looked at.
        let mut stood: Vec<u64> = self.tracks.iter().map(|track| track.floor).collect();
        let mut steps = Vec::new();
        let mut as_it_was = true;
        for (index, entry) in (self.base..).zip(&self.entries) {
            let (at, _) = since.positions[entry.track()];
            let after = entry.position() > at || (entry.position() == at && entry.is_late());
            let is_new = || !self.has_twin(&since.positions, entry.reference(), entry.spot());
            if index >= from && after && is_new() {
                if steps.is_empty() {
                    let mut here = stood.iter().zip(&since.positions);
                    as_it_was = here.all(|(a, (b, _))| a == b);
                }
                steps.push(Step {
                    message: Rc::clone(entry),
                    is_shown: true,
                });
            } else if !steps.is_empty() {
                as_it_was = false;
            }
            stood[entry.track()] = entry.position().max(stood[entry.track()]);
        }
        // One track has one order. And who stands where the hub stood then has got the same since.
        let shared = since.elsewhere.is_empty() && (self.tracks.len() == 1 || as_it_was);
        Missed {
            steps: Rc::new(Steps::new(steps)),
            shared,
            read: 0,
        }
    }

    /// What is in memory, in the order of delivery.
    pub(super) fn entries(&self) -> impl Iterator<Item = &Rc<Message>> {
        self.entries.iter()
    }

    /// The message of this reference, if it is in memory and the own stream would not know it: it is of another origin, or the
    /// stream has forgotten all that it stored before the time `forgotten`. Its cursor and its time.
    #[must_use]
    pub(super) fn said_before(
        &self,
        class: Class,
        reference: u64,
        forgotten: u64,
    ) -> Option<(Cursor, u64)> {
        if !self.references[index(class)].contains(reference) {
            return None;
        }
        let mut newest_first = self.entries.iter().rev();
        let entry = newest_first.find(|entry| entry.reference() == Some(reference))?;
        let cursor = self.cursor_at(entry.track(), entry.seq, entry.fingerprint);
        (entry.track() > 0 || entry.ts < forgotten).then_some((cursor, entry.ts))
    }

    /// The time of the message of the own origin at `seq`, if it is in memory.
    #[must_use]
    pub(super) fn time_of(&self, seq: u64) -> Option<u64> {
        self.find(0, seq).map(|entry| entry.ts)
    }

    /// Whether the message at `seq` is in memory with another fingerprint than `fingerprint`.
    #[must_use]
    pub(super) fn contradicts(&self, track: usize, seq: u64, fingerprint: Fingerprint) -> bool {
        self.find(track, seq)
            .is_none_or(|entry| entry.fingerprint != fingerprint)
    }

    fn find(&self, track: usize, seq: u64) -> Option<&Rc<Message>> {
        // Newest first: who asks has usually just published.
        let mut newest_first = self.entries.iter().rev();
        newest_first.find(|entry| entry.seq == seq && entry.track() == track)
    }
}

impl Track {
    fn new(room: RoomId, start: Start) -> Self {
        let Start {
            origin,
            epoch,
            heads,
            empty_at,
        } = start;
        let newest = heads.iter().max_by_key(|record| record.seq);
        let (position, fingerprint) = newest.map_or((empty_at, Fingerprint::default()), |record| {
            (record.seq, record.fingerprint)
        });
        let last = [Class::Msg, Class::Ev].map(|class| {
            heads
                .iter()
                .find(|r| r.class == class)
                .map_or(position, |record| record.seq)
        });
        let id = TrackId {
            room,
            origin: Some((origin.clone(), epoch)),
        };
        Self {
            id: Rc::new(id),
            origin,
            epoch,
            last,
            position,
            fingerprint,
            verified: (position, 0),
            floor: position,
            floor_fingerprint: fingerprint,
            held: VecDeque::new(),
            given_up: None,
        }
    }

    fn at(&self, seq: u64, fingerprint: Fingerprint) -> Position {
        Position {
            origin: self.origin.clone(),
            epoch: self.epoch,
            seq,
            fingerprint,
        }
    }

    fn position_now(&self) -> Position {
        self.at(self.position, self.fingerprint)
    }
}

fn index(class: Class) -> usize {
    match class {
        Class::Msg => 0,
        Class::Ev => 1,
    }
}

#[cfg(test)]
#[path = "log/tests.rs"]
mod tests;
