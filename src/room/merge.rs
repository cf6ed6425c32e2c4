//! Backlogs of several origins in one order.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    backlog::Backlog,
    encode,
    log::{Place, RoomLog, Since},
    memory::Memory,
    references::Spot,
};
use crate::model::{Cursor, Fingerprint};

/// What a session missed: frames in order, of which `read` came from streams.
#[derive(Debug, Default)]
pub(super) struct Frames {
    pub(super) frames: Vec<Bytes>,
    pub(super) read: usize,
}

/// One message on its way into the order.
struct Item<'a> {
    seq: u64,
    /// The track's place after it; `None`: it came late, and the place stays.
    place: Option<(u64, Fingerprint)>,
    ts: u64,
    reference: Option<u64>,
    after: Option<&'a Cursor>,
    frame: &'a Bytes,
    read: bool,
}

/// What a session that stands at `since` has missed of what the room has delivered: what was read of each track, and, where that
/// reaches to what is in memory, what is there. `backlogs` has one a track; none where the session had seen more than the room when the
/// others were read.
///
/// The order is that of time, except that none comes before what its sender had seen.
///
/// Frames that are not those that were read are counted in `memory`.
pub(super) fn missed(
    log: &RoomLog,
    since: &Since,
    backlogs: &[Option<Backlog>],
    memory: &Arc<Memory>,
) -> Frames {
    let in_memory = is_complete(log, since, backlogs);
    let mut tracks: Vec<VecDeque<Item<'_>>> = Vec::with_capacity(backlogs.len());
    let mut references = HashSet::new();
    for (track, backlog) in backlogs.iter().enumerate() {
        let mut items = VecDeque::new();
        let delivered = log.position(track);
        if let Some(backlog) = backlog {
            // What the room has not delivered yet will come live.
            let read = backlog.entries().iter().filter(|m| m.seq <= delivered);
            items.extend(read.map(|missed| Item {
                seq: missed.seq,
                place: Some((missed.seq, missed.fingerprint)),
                ts: missed.ts,
                reference: missed.reference,
                after: missed.after.as_ref(),
                frame: &missed.frame,
                read: true,
            }));
        }
        let upto = upto(track, since, backlog.as_ref());
        let entries = log.entries().filter(|entry| {
            in_memory && entry.track == track && entry.position > upto && entry.seq > upto
        });
        items.extend(entries.map(|entry| Item {
            seq: entry.seq,
            place: (entry.seq == entry.position).then_some((entry.seq, entry.fingerprint)),
            ts: entry.ts,
            reference: entry.reference,
            after: entry.after.as_ref(),
            frame: &entry.frame,
            read: false,
        }));
        tracks.push(items);
    }
    let mut place = since.place.clone();
    let mut missed = Frames::default();
    while let Some(track) = next(log, &tracks, &place) {
        let Some(item) = tracks[track].pop_front() else {
            break;
        };
        if let Some(after) = item.place {
            place[track] = after;
        }
        let spot: Spot = (track, item.seq);
        let is_new = item.reference.is_none_or(|key| references.insert(key));
        if !is_new || log.has_twin(&since.place, item.reference, spot) {
            continue;
        }
        missed.read += usize::from(item.read);
        // One track has one order, and the cursor in the frame is the session's.
        let as_it_is = log.tracks() == 1 && since.elsewhere.is_empty();
        missed.frames.push(match (as_it_is, item.read) {
            (true, true) => item.frame.clone(),
            (true, false) => memory.count(item.frame.clone()),
            (false, _) => {
                let cursor = log.cursor_of(&place, &since.elsewhere);
                memory.count(encode::with_cursor(item.frame, &cursor))
            }
        });
    }
    missed
}

/// Whether what was read reaches to what is in memory, in all tracks.
pub(super) fn is_complete(log: &RoomLog, since: &Since, backlogs: &[Option<Backlog>]) -> bool {
    let mut tracks = backlogs.iter().enumerate();
    tracks.all(|(track, backlog)| upto(track, since, backlog.as_ref()) >= log.floor(track))
}

/// Up to where a session has a track with what was read.
fn upto(track: usize, since: &Since, backlog: Option<&Backlog>) -> u64 {
    backlog.map_or(since.place[track].0, |backlog| backlog.upto.0)
}

/// The track whose next message comes next: the oldest of those whose sender had seen nothing that is still to come.
fn next(log: &RoomLog, tracks: &[VecDeque<Item<'_>>], place: &Place) -> Option<usize> {
    let fronts = || {
        let fronts = tracks.iter().enumerate();
        fronts.filter_map(|(track, items)| Some((track, items.front()?)))
    };
    let waits = |track: usize, item: &Item<'_>| {
        let seen = item.after.into_iter().flat_map(Cursor::positions);
        seen.filter_map(|seen| Some((log.track_of(&seen.origin)?, seen.seq)))
            .any(|(other, seq)| {
                let to_come = tracks[other].front().is_some_and(|front| front.seq <= seq);
                other != track && place[other].0 < seq && to_come
            })
    };
    let ready = fronts().filter(|(track, item)| !waits(*track, item));
    let oldest = ready.min_by_key(|(track, item)| (item.ts, *track));
    // Two that wait for each other are none of ours.
    let (track, _) = oldest.or_else(|| fronts().next())?;
    Some(track)
}
