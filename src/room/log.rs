//! The state of a room's log on one shard, without I/O: what was delivered, what is missing, who can resume from
//! memory.

use std::{
    cell::{Cell, OnceCell},
    collections::{HashMap, VecDeque},
    rc::Rc,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    message::{LogPlace, Message, TrackId},
    missed::{Missed, Step, Steps},
    references::{References, Spot, reference},
    rings::Rings,
};
use crate::{
    bus::Record,
    model::{Class, Cursor, Epoch, Fingerprint, Position, Region, RoomId},
};

/// For this many times `rooms.causal_wait` after a message has waited in vain, other messages of its sender don't wait.
const PATIENCE: u32 = 5;

/// How many such senders are remembered.
const MAX_IN_VAIN: usize = 1024;

/// Delivered messages of a room, and the position to which they lead.
///
/// A room's log is the union of one log for each origin, its *tracks*. Entries are in the order in which they were
/// delivered here. Within a track this is the order of the stream; across tracks it may differ from edge to edge. So a
/// place in the room is one position for each track. The entries after a place are those that lie after the position of
/// their own track.
///
/// Entries have an index that counts deliveries since the log was made. A member that has got everything before index
/// `n` gets the entries from `n` on. When the entries exceed their bound in bytes, the oldest are dropped; positions
/// and indices go on.
///
/// # Invariants
/// - A message is delivered once: only if its sequence is above the last one of its class and track, and its reference
///   is new.
/// - A position never goes back. All messages up to it have been delivered, except that an earlier message of the
///   *other* class may have been lost unnoticed (see [`RoomLog::admit`]).
/// - Every message after a track's `floor` is in memory.
/// - A message is delivered after what its sender had seen of other tracks, unless that did not come in time.
#[derive(Debug)]
pub(super) struct RoomLog {
    /// The track of messages that are not stored.
    unlogged: OnceCell<Rc<TrackId>>,
    /// The own origin's first; empty in a room without a log.
    tracks: Vec<Track>,
    entries: VecDeque<Rc<Message>>,
    /// Bytes of the entries, with the frames that were made of them.
    bytes: usize,
    rings: Rc<Rings>,
    /// When the entries were last used, see [`Rings::mark`].
    used: Cell<u64>,
    /// Index of the first entry in memory.
    base: u64,
    /// How many messages were taken in, repeats included.
    taken: u64,
    /// One for each class, so that many reactions don't displace messages.
    references: [References; 2],
    /// Senders with a message that waited in vain: the cursor that it waited for, and until when other messages of the
    /// sender don't wait, unless that cursor is reached.
    in_vain: HashMap<String, (Cursor, Instant)>,
}

/// A place in a room: sequence and fingerprint of each track.
pub(super) type Positions = Vec<(u64, Fingerprint)>;

/// Where a track begins.
#[derive(Debug)]
pub(super) struct Start {
    /// The origin of the stream.
    pub(super) origin: Region,
    /// The stream's epoch.
    pub(super) epoch: Epoch,
    /// The newest message of each class that has one.
    pub(super) heads: Vec<Record>,
    /// If there are none: a sequence of the stream up to which the room is known to be empty.
    pub(super) empty_at: u64,
}

/// One origin's part of a room's log.
#[derive(Debug)]
struct Track {
    id: Rc<TrackId>,
    origin: Region,
    epoch: Epoch,
    /// Last sequence of each class.
    last: [u64; 2],
    position: u64,
    fingerprint: Fingerprint,
    /// The sequence up to which the track is known to be complete, and the index of the next delivery at that time.
    verified: (u64, u64),
    floor: u64,
    floor_fingerprint: Fingerprint,
    /// Admitted messages that wait for other tracks, each with the end of its wait.
    held: VecDeque<(Record, Instant)>,
    /// A sequence of this track for which a message of another track has waited in vain, and until when no message
    /// waits for positions up to it.
    given_up: Option<(u64, Instant)>,
}

/// What is to be done with a message that arrived live.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// Deliver it.
    Deliver,
    /// It was delivered before, or lies before the log's beginning.
    Old,
    /// Messages before it are missing: read the stream from [`RoomLog::unverified`] on first.
    Gap,
}

/// How a session can resume at a position in one track.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resume {
    /// Everything after the position is in memory.
    Memory,
    /// The position lies before what is in memory.
    Stream,
    /// The position lies beyond what this log has seen.
    Ahead,
    /// The position lies within what is in memory, but there is no message with its fingerprint there: the stream has
    /// to be read.
    Doubtful,
}

/// A cursor as a place in this log, and the components that this log does not know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Since {
    pub(super) positions: Positions,
    /// Positions of origins that this region does not see (yet).
    pub(super) elsewhere: Vec<Position>,
}

impl RoomLog {
    /// A log that stands at the heads of its tracks.
    #[must_use]
    pub(super) fn new(room: &RoomId, starts: Vec<Start>, rings: &Rc<Rings>) -> Self {
        let track = |start| Track::new(room.clone(), start);
        Self {
            references: [(); 2].map(|()| References::new(starts.len())),
            unlogged: OnceCell::new(),
            tracks: starts.into_iter().map(track).collect(),
            entries: VecDeque::new(),
            bytes: 0,
            rings: Rc::clone(rings),
            used: Cell::new(0),
            base: 0,
            taken: 0,
            in_vain: HashMap::new(),
        }
    }

    /// The number of origins.
    #[must_use]
    pub(super) fn tracks(&self) -> usize {
        self.tracks.len()
    }

    /// The track of an origin.
    #[must_use]
    pub(super) fn track_of(&self, origin: &Region) -> Option<usize> {
        self.tracks.iter().position(|track| track.origin == *origin)
    }

    /// The track of the origin with this name.
    #[must_use]
    pub(super) fn track_named(&self, origin: &str) -> Option<usize> {
        let mut tracks = self.tracks.iter();
        tracks.position(|track| track.origin.as_str() == origin)
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

    /// The sequence up to which a track was delivered.
    #[must_use]
    pub(super) fn position(&self, track: usize) -> u64 {
        self.tracks[track].position
    }

    /// Every message of a track after this sequence is in memory.
    #[must_use]
    pub(super) fn floor(&self, track: usize) -> u64 {
        self.tracks[track].floor
    }

    /// The last sequence of a class that was taken in: delivered or held.
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

    /// The cursor of a place, with additional positions of other origins.
    #[must_use]
    pub(super) fn cursor_of(&self, place: &Positions, elsewhere: &[Position]) -> Cursor {
        let here = self.tracks.iter().zip(place);
        let here = here.map(|(track, (seq, fingerprint))| track.at(*seq, *fingerprint));
        Cursor::of(here.chain(elsewhere.iter().cloned()).collect())
    }

    /// A cursor with the component of one track only.
    #[must_use]
    pub(super) fn cursor_at(&self, track: usize, seq: u64, fingerprint: Fingerprint) -> Cursor {
        Cursor::single(self.tracks[track].at(seq, fingerprint))
    }

    /// What a member that is up to date has seen of origins other than the own. Tracks without any message are left
    /// out: there is nothing to wait for.
    #[must_use]
    pub(super) fn seen_elsewhere(&self) -> Cursor {
        let others = self.tracks.iter().skip(1).map(Track::position_now);
        Cursor::of(others.filter(Position::names_message).collect())
    }

    /// The place up to which messages were delivered.
    #[must_use]
    pub(super) fn positions(&self) -> Positions {
        let tracks = self.tracks.iter();
        tracks.map(|t| (t.position, t.fingerprint)).collect()
    }

    /// A cursor as a place in this log. For an origin that the cursor does not name, nothing was seen.
    ///
    /// # Errors
    /// The first track whose epoch differs: the cursor has no meaning there.
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

    /// The components of `since` that lie beyond this log.
    #[must_use]
    pub(super) fn ahead(&self, since: &Since) -> Vec<Position> {
        let ahead = self.not_reached(since);
        ahead.chain(since.elsewhere.iter().cloned()).collect()
    }

    /// Whether a track has not reached its position in `since`. Messages that it lacks may be copies of messages that
    /// are here.
    #[must_use]
    pub(super) fn lags(&self, since: &Since) -> bool {
        self.not_reached(since).next().is_some()
    }

    /// The positions of `since` that name a message and that their tracks have not reached.
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

    /// Changes with everything that is taken in or forgotten.
    #[must_use]
    pub(super) fn version(&self) -> (u64, u64) {
        (self.taken, self.base)
    }

    /// The index that the next delivery will have.
    #[must_use]
    pub(super) fn head_index(&self) -> u64 {
        self.base + self.entries.len() as u64
    }

    /// First sequence of a track that may be missing. Every read of the stream that is to complete the log begins here.
    ///
    /// It does not begin after the last delivery: an earlier message of the other class may be missing unnoticed. Once
    /// a later one of its class is delivered, it would be rejected as old.
    #[must_use]
    pub(super) fn unverified(&self, track: usize) -> u64 {
        self.tracks[track].verified.0 + 1
    }

    /// Number of deliveries since all tracks were last known to be complete.
    #[must_use]
    pub(super) fn deliveries_unverified(&self) -> u64 {
        let verified = self.tracks.iter().map(|track| track.verified.1).min();
        verified.map_or(0, |index| self.head_index() - index)
    }

    /// Notes that everything of a track up to `seq` has been taken in: either the stream was read up to there, or its
    /// heads are the messages that were taken in last.
    pub(super) fn verify(&mut self, track: usize, seq: u64) {
        let head = self.head_index();
        let track = &mut self.tracks[track];
        if seq >= track.verified.0 {
            track.verified = (seq, head);
        }
    }

    /// Judges a message by its sequence and by its predecessor on the same subject. `previous` is `None` if the message
    /// was read from the stream, in order, and so can't have a gap before it.
    ///
    /// The predecessor is of the message's own class. If a message of the other class was lost unnoticed, this check
    /// does not detect it. Therefore the hub notes every possible cause of loss between the server and itself, and the
    /// periodic comparison with the stream finds what a server lost. Such a message is delivered late.
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

    /// Whether an admitted message has to wait: for held messages before it in its track, or for what its sender had
    /// seen of other tracks.
    #[must_use]
    pub(super) fn must_wait(&self, track: usize, record: &Record, now: Instant) -> bool {
        !self.tracks[track].held.is_empty() || self.misses(track, record, now)
    }

    /// Whether something that the sender had seen is not delivered yet, and is worth waiting for.
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

    /// Whether something that the sender had seen is not delivered yet.
    #[must_use]
    pub(super) fn is_early(&self, track: usize, record: &Record) -> bool {
        self.not_seen(track, record).next().is_some()
    }

    /// The positions that the sender of a message had seen and that are not delivered yet.
    fn not_seen<'a>(
        &'a self,
        track: usize,
        record: &'a Record,
    ) -> impl Iterator<Item = (&'a Track, u64)> {
        let after = record.after.iter();
        after.flat_map(move |after| self.lacks(track, after))
    }

    /// The positions of `seen` that are not delivered yet, except that of `track` itself. An origin that this region
    /// does not see can't be waited for.
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

    /// Holds an admitted message until what its sender had seen is delivered, or until `until`.
    pub(super) fn hold(&mut self, track: usize, record: Record, until: Instant) {
        let track = &mut self.tracks[track];
        track.last[index(record.class)] = record.seq;
        track.held.push_back((record, until));
    }

    /// The number of held messages.
    #[must_use]
    pub(super) fn held(&self) -> usize {
        self.tracks.iter().map(|track| track.held.len()).sum()
    }

    /// When the first wait of a held message ends.
    #[must_use]
    pub(super) fn held_until(&self) -> Option<Instant> {
        let fronts = self.tracks.iter().filter_map(|track| track.held.front());
        fronts.map(|(_, until)| *until).min()
    }

    /// The next held message that need not wait any longer: because what its sender had seen has come, or its wait is
    /// over, or more than `most` messages are held. In the last case the one whose wait ends first is released.
    ///
    /// After a message has waited in vain, no message waits for the same positions during another `wait`. During
    /// [`PATIENCE`] times `wait`, other messages of the same sender don't wait at all, unless what was missing has
    /// come. So a client that claims to have seen what does not exist can delay a room only rarely.
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

    /// Notes an admitted message and returns where it is in the log. Returns `None` if its reference was delivered
    /// before (the first one wins): then the position advances and nothing is shown.
    #[must_use]
    pub(super) fn advance(&mut self, track: usize, record: &Record) -> Option<LogPlace> {
        self.taken += 1;
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
        fresh.then(|| LogPlace {
            track,
            position: self.tracks[track].position,
            reference,
        })
    }

    /// Notes the references of messages before the beginning of the log, so that copies from another origin are not
    /// shown.
    pub(super) fn remember(&mut self, track: usize, records: &[Record]) {
        let beginning = self.tracks[track].position;
        // Messages that were stored after the heads were read will be delivered.
        for record in records.iter().filter(|record| record.seq <= beginning) {
            if let Some(key) = reference(record) {
                self.references[index(record.class)].note(key, (track, record.seq));
            }
        }
    }

    /// Whether a session that stands at `place` has already got another copy of a message.
    #[must_use]
    pub(super) fn has_twin(&self, place: &Positions, reference: Option<u64>, at: Spot) -> bool {
        let seen = |spot: Spot| place.get(spot.0).is_some_and(|of| spot.1 <= of.0);
        let of = |references: &References, key| references.has_twin(key, at, seen);
        reference.is_some_and(|key| self.references.iter().any(|known| of(known, key)))
    }

    /// Makes a message that was read from the stream. Its cursor names only this origin.
    pub(super) fn stored(&self, track: usize, record: Record) -> Message {
        let at = LogPlace {
            track,
            position: record.seq,
            reference: reference(&record),
        };
        let message = Message::new(&self.tracks[track].id, at, record, None);
        message.settle();
        message
    }

    /// Keeps the message that [`Self::advance`] has just noted.
    pub(super) fn push(&mut self, at: LogPlace, record: Record) -> Rc<Message> {
        let is_alone = self.tracks.len() == 1 && at.position == record.seq;
        let cursor = (!is_alone).then(|| self.cursor());
        let message = Message::new(&self.tracks[at.track].id, at, record, cursor);
        let message = Rc::new(message);
        message.counted.set(Some(0));
        self.entries.push_back(Rc::clone(&message));
        message
    }

    /// Updates the bytes of messages whose frames may have been made meanwhile, and drops the oldest entries if the
    /// bound is exceeded.
    pub(super) fn recount<'m>(&mut self, messages: impl Iterator<Item = &'m Rc<Message>>) {
        let mut all = self.bytes;
        for message in messages {
            if let Some(before) = message.counted.get() {
                message.settle();
                let bytes = message.bytes();
                message.counted.set(Some(bytes));
                all = all + bytes - before;
            }
        }
        while all > self.rings.of_room
            && let Some(oldest) = self.entries.pop_front()
        {
            all -= oldest.counted.take().unwrap_or_default();
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
        self.rings.change(self.bytes, all);
        self.bytes = all;
        self.used.set(self.rings.mark());
    }

    /// How much its entries take, and when they were last used.
    #[must_use]
    pub(super) fn kept(&self) -> (usize, u64) {
        (self.bytes, self.used.get())
    }

    /// Makes a message of a room without a log. It takes up an index, but is not kept.
    pub(super) fn unlogged(&mut self, room: &RoomId, record: Record) -> Message {
        self.base += 1;
        let of = self.unlogged.get_or_init(|| {
            Rc::new(TrackId {
                room: room.clone(),
                origin: None,
            })
        });
        Message::new(of, LogPlace::default(), record, None)
    }

    /// Drops all entries: sessions that resume from before here have to read the stream. Positions, indices and what is
    /// verified stay.
    pub(super) fn forget(&mut self) {
        self.base = self.head_index();
        for entry in self.entries.drain(..) {
            entry.counted.set(None);
        }
        self.rings.change(self.bytes, 0);
        self.bytes = 0;
        for track in &mut self.tracks {
            track.floor = track.position;
            track.floor_fingerprint = track.fingerprint;
        }
    }

    /// How a session that stands at `since` in a track can resume.
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
            // A late entry has the position of the one before it.
            entry.filter(|e| e.position() == seq).map(|e| e.fingerprint)
        };
        let unchecked = fingerprint == Fingerprint(0);
        if unchecked || expected == Some(fingerprint) {
            Resume::Memory
        } else {
            Resume::Doubtful
        }
    }

    /// The entries in memory after `since`. That is everything, if `since` lies before no track's [`Self::floor`].
    /// After them the session stands at [`Self::positions`], or further where `since` was further. Entries with an
    /// index below `from` are left out: the session has got them.
    ///
    /// Late entries have the position of the one before them. A cursor at that position does not tell whether it
    /// includes them. They are sent again: a client can detect a repeat by its id, but it can't detect a loss.
    pub(super) fn after(&self, since: &Since, from: u64) -> Missed {
        self.used.set(self.rings.mark());
        // Where the log stood before the current entry.
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
        // One track has one order. With several, a session that stood where the log stood before the first step has got
        // the same messages since, so the shared cursors are right for it.
        let shared = since.elsewhere.is_empty() && (self.tracks.len() == 1 || as_it_was);
        Missed {
            steps: Rc::new(Steps::new(steps)),
            shared,
            read: 0,
        }
    }

    /// Whether a session at `since` missed more than `most` of the messages in memory. `false` where this log lags behind
    /// it: what it gets then is found as it arrives.
    pub(super) fn has_more_after(&self, since: &Since, most: u64) -> bool {
        // Mostly there are not so many at all.
        self.entries.len() as u64 > most
            && !self.lags(since)
            && self.after(since, 0).len() as u64 > most
    }

    /// The entries in memory, in the order of delivery.
    pub(super) fn entries(&self) -> impl Iterator<Item = &Rc<Message>> {
        self.entries.iter()
    }

    /// The cursor and the time of the message with this reference, if it is in memory and the own stream would not
    /// detect the duplicate: it is of another origin, or older than `forgotten`, before which the stream remembers no
    /// ids.
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
        (entry.track() > 0 || entry.ts < forgotten).then_some((cursor, entry.shown_ts()))
    }

    /// The time of a track's message at `seq`, if it is in memory.
    #[must_use]
    pub(super) fn time_of(&self, track: usize, seq: u64) -> Option<u64> {
        self.find(track, seq).map(|entry| entry.shown_ts())
    }

    /// The sequence of a track's first message in memory that was stored at `ms` or later.
    #[must_use]
    pub(super) fn first_since(&self, track: usize, ms: u64) -> Option<u64> {
        let mut entries = self.entries.iter();
        let first = entries.find(|entry| entry.track() == track && entry.ts >= ms);
        first.map(|entry| entry.seq)
    }

    /// Whether memory does not confirm that the message at `seq` has this fingerprint: it is not in memory, or its
    /// fingerprint differs.
    #[must_use]
    pub(super) fn contradicts(&self, track: usize, seq: u64, fingerprint: Fingerprint) -> bool {
        self.find(track, seq)
            .is_none_or(|entry| entry.fingerprint != fingerprint)
    }

    fn find(&self, track: usize, seq: u64) -> Option<&Rc<Message>> {
        // Newest first: the caller has usually just published the message.
        let mut newest_first = self.entries.iter().rev();
        newest_first.find(|entry| entry.seq == seq && entry.track() == track)
    }
}

impl Drop for RoomLog {
    fn drop(&mut self) {
        self.rings.change(self.bytes, 0);
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
