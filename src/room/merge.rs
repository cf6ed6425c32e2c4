//! Merges the backlogs of several origins into one order.

use std::{
    cell::RefCell,
    collections::{HashSet, VecDeque},
    rc::{Rc, Weak},
};

use super::{
    backlog::{Backlog, Part},
    log::{Positions, RoomLog, Since},
    message::Message,
    missed::{Missed, Step, Steps},
};
use crate::model::Cursor;

/// What a session at `since` has missed of what the room has delivered. These are the messages that were read from each
/// track's stream, followed by the ones in memory if the reads reach up to them on all tracks. `backlogs` has one entry
/// for each track; it is `None` if the session had seen more of that track than the room when the others were read.
///
/// Messages are ordered by time, except that none comes before what its sender had seen.
fn missed(log: &RoomLog, since: &Since, backlogs: &[Option<Backlog>]) -> Missed {
    let in_memory = is_complete(log, since, backlogs);
    let mut tracks: Vec<VecDeque<&Rc<Message>>> = Vec::with_capacity(backlogs.len());
    let mut references = HashSet::new();
    for (track, backlog) in backlogs.iter().enumerate() {
        let mut items = VecDeque::new();
        let delivered = log.position(track);
        if let Some(backlog) = backlog {
            // What the room has not delivered yet will come live.
            items.extend(backlog.entries().iter().filter(|m| m.seq <= delivered));
        }
        let upto = upto(track, since, backlog.as_ref());
        items.extend(log.entries().filter(|entry| {
            let is_after = entry.position() > upto && entry.seq > upto;
            in_memory && entry.track() == track && is_after
        }));
        tracks.push(items);
    }
    let mut place = since.positions.clone();
    let (mut steps, mut read) = (Vec::new(), 0);
    while let Some(track) = next(log, &tracks, &place) {
        let Some(message) = tracks[track].pop_front() else {
            break;
        };
        if !message.is_late() {
            place[track] = (message.seq, message.fingerprint);
        }
        let reference = message.reference();
        let is_new = reference.is_none_or(|key| references.insert(key));
        let is_shown = is_new && !log.has_twin(&since.positions, reference, message.spot());
        read += usize::from(is_shown && message.is_counted());
        steps.push(Step {
            message: Rc::clone(message),
            is_shown,
        });
    }
    Missed {
        steps: Rc::new(Steps::new(steps)),
        // With one track there is only one order, so the cursors of the shared frames are right for the session.
        shared: log.tracks() == 1 && since.elsewhere.is_empty(),
        read,
    }
}

/// The last result of [`missed`], and its inputs. Sessions that reconnect together have usually missed the same.
#[derive(Debug, Default)]
pub(super) struct LastMissed(RefCell<Option<Box<Known>>>);

#[derive(Debug)]
struct Known {
    since: Since,
    /// The state of the log then.
    version: (u64, u64),
    /// The part that was read of each track.
    read: Vec<Option<Part>>,
    steps: Weak<Steps>,
    shared: bool,
    read_shown: usize,
}

impl LastMissed {
    /// Same as [`missed`], but reuses the last result if the inputs are the same and a session still keeps it.
    pub(super) fn find(
        &self,
        log: &RoomLog,
        since: &Since,
        backlogs: &[Option<Backlog>],
    ) -> Missed {
        let read = || backlogs.iter().map(|it| it.as_ref().map(Backlog::part));
        let is_same = |known: &Known| {
            known.version == log.version()
                && known.since == *since
                && known
                    .read
                    .iter()
                    .zip(read())
                    .all(|(known, now)| *known == now)
        };
        if let Some(known) = self.0.borrow().as_deref().filter(|known| is_same(known))
            && let Some(steps) = known.steps.upgrade()
        {
            return Missed {
                steps,
                shared: known.shared,
                read: known.read_shown,
            };
        }
        let found = missed(log, since, backlogs);
        self.0.replace(Some(Box::new(Known {
            since: since.clone(),
            version: log.version(),
            read: read().collect(),
            steps: Rc::downgrade(&found.steps),
            shared: found.shared,
            read_shown: found.read,
        })));
        found
    }
}

/// Whether the reads reach up to what is in memory on all tracks.
pub(super) fn is_complete(log: &RoomLog, since: &Since, backlogs: &[Option<Backlog>]) -> bool {
    let mut tracks = backlogs.iter().enumerate();
    tracks.all(|(track, backlog)| upto(track, since, backlog.as_ref()) >= log.floor(track))
}

/// The position up to which a session has a track, including what was read.
fn upto(track: usize, since: &Since, backlog: Option<&Backlog>) -> u64 {
    backlog.map_or(since.positions[track].0, |backlog| backlog.upto.0)
}

/// The track that gives the next message: the one with the oldest first message, among those whose sender had seen
/// nothing that is still to come.
fn next(log: &RoomLog, tracks: &[VecDeque<&Rc<Message>>], place: &Positions) -> Option<usize> {
    let fronts = || {
        let fronts = tracks.iter().enumerate();
        fronts.filter_map(|(track, items)| Some((track, items.front()?)))
    };
    let waits = |track: usize, item: &Message| {
        let seen = item.after().into_iter().flat_map(Cursor::positions);
        seen.filter_map(|seen| Some((log.track_of(&seen.origin)?, seen.seq)))
            .any(|(other, seq)| {
                let to_come = tracks[other].front().is_some_and(|front| front.seq <= seq);
                other != track && place[other].0 < seq && to_come
            })
    };
    let ready = fronts().filter(|(track, item)| !waits(*track, item));
    let oldest = ready.min_by_key(|(track, item)| (item.ts, *track));
    // Messages that wait for each other were not made by natter. Take any.
    let (track, _) = oldest.or_else(|| fronts().next())?;
    Some(track)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        bus::Record,
        model::{Class, Epoch, Fingerprint, Region, RoomId},
        room::{log::Start, rings::Rings},
    };

    fn record(seq: u64, ts: u64) -> Record {
        Record {
            seq,
            previous: None,
            class: Class::Msg,
            ts,
            original_ts: None,
            fingerprint: Fingerprint(1),
            id: format!("{ts}"),
            from: "kim".to_owned(),
            kind: None,
            target: None,
            moderated: false,
            reply_to: None,
            mentions: None,
            after: None,
            body: Bytes::from_static(b"1"),
        }
    }

    fn read(log: &RoomLog, track: usize, records: &[(u64, u64)]) -> Backlog {
        let stored = |(seq, ts): &(u64, u64)| Rc::new(log.stored(track, record(*seq, *ts)));
        let upto = records.last().map_or(0, |(seq, _)| *seq);
        Backlog {
            read: Rc::new(records.iter().map(stored).collect()),
            skip: 0,
            upto: (upto, Fingerprint(1)),
        }
    }

    #[test]
    fn what_was_merged_is_found_again_only_where_all_is_as_it_was() {
        let start = |origin| Start {
            origin: Region::parse(origin).unwrap(),
            epoch: Epoch::parse("k3").unwrap(),
            heads: Vec::new(),
            empty_at: 0,
        };
        let room = RoomId::parse("chat:a").unwrap();
        // The log keeps nothing in memory, so everything comes from the streams.
        let mut log = RoomLog::new(
            &room,
            vec![start("a"), start("b")],
            &Rings::new(0, usize::MAX),
        );
        let deliver = |log: &mut RoomLog, track, seq, ts| {
            let at = log.advance(track, &record(seq, ts)).unwrap();
            let message = log.push(at, record(seq, ts));
            log.recount([message].iter());
        };
        for (track, seq, ts) in [(0, 1, 10), (1, 1, 20), (0, 2, 30)] {
            deliver(&mut log, track, seq, ts);
        }
        let since = |a, b| Since {
            positions: vec![(a, Fingerprint(0)), (b, Fingerprint(0))],
            elsewhere: Vec::new(),
        };
        let backlogs = [
            Some(read(&log, 0, &[(1, 10), (2, 30)])),
            Some(read(&log, 1, &[(1, 20)])),
        ];
        let spots = |missed: &Missed| -> Vec<_> {
            missed
                .steps
                .iter()
                .map(|step| step.message.spot())
                .collect()
        };
        let last = LastMissed::default();
        let first = last.find(&log, &since(0, 0), &backlogs);
        assert_eq!(spots(&first), [(0, 1), (1, 1), (0, 2)]);
        let again = last.find(&log, &since(0, 0), &backlogs);
        assert!(Rc::ptr_eq(&first.steps, &again.steps) && !again.shared);
        // Another read of the same, another cursor, and a room that has advanced.
        let other = [Some(read(&log, 0, &[(1, 10), (2, 30)])), None];
        assert_eq!(
            spots(&last.find(&log, &since(0, 1), &other)),
            [(0, 1), (0, 2)]
        );
        let mut found = last.find(&log, &since(0, 0), &backlogs);
        assert!(!Rc::ptr_eq(&first.steps, &found.steps));
        deliver(&mut log, 1, 2, 40);
        let newer = last.find(&log, &since(0, 0), &backlogs);
        assert!(!Rc::ptr_eq(&newer.steps, &found.steps));
        // When no session keeps a result, it is not kept here either.
        found = newer;
        let weak = Rc::downgrade(&found.steps);
        drop(found);
        assert!(weak.upgrade().is_none());
    }
}
