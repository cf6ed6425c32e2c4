//! Filling gaps: reading from the stream what did not come live.

use std::{ops::Range, rc::Rc, time::Duration};

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use super::{fan_out::Pass, hub::Hub, log::Admission, rooms::Rooms};
use crate::{
    bus::Record,
    telemetry::metrics::{Counter, Dropped, GapCause, count},
};

/// Reads for a gap after which what is missing is taken for erased.
const GAP_READS: usize = 20;

/// Reads of a mirror after which it is given up, until rooms are compared again.
const MIRROR_READS: u32 = 10;

/// Pause before a read that failed is repeated.
const RETRY: Duration = Duration::from_millis(100);

/// One stream on the way to its end.
struct Reading {
    track: usize,
    from: u64,
    next: u64,
    /// Reads in a row that failed.
    failures: u32,
    is_over: bool,
}

/// What was read of several streams in the order of time, each stream in its own order.
fn by_time(pages: Vec<(usize, Vec<Record>)>) -> Vec<(usize, Record)> {
    let mut timed: Vec<(u64, usize, Record)> = Vec::new();
    for (track, records) in pages {
        let mut now = 0;
        for record in records {
            // Also where the server's clock was set back.
            now = record.ts.max(now);
            timed.push((now, track, record));
        }
    }
    timed.sort_by_key(|(ts, _, _)| *ts);
    timed
        .into_iter()
        .map(|(_, track, record)| (track, record))
        .collect()
}

impl Hub {
    /// Fills the gap before `record`. A replica that is behind does not have what is missing yet: then it is read again. What
    /// stays missing was erased.
    pub(super) async fn fill_before(
        self: &Rc<Self>,
        rooms: &Rc<Rooms>,
        track: usize,
        record: &Record,
    ) {
        let previous = record.previous.unwrap_or_default();
        for _ in 0..GAP_READS {
            self.fill_tracks(rooms, track..track + 1, GapCause::Sequence)
                .await;
            if self.is_gone() || self.log.borrow().last(track, record.class) >= previous {
                return;
            }
            self.pause().await;
        }
        tracing::warn!(room.id = %self.room, seq = previous, "a message is not in the stream any more");
        count(Counter::MessageDropped(Dropped::Erased), 1);
    }

    /// Reads the streams of all origins from where the log was last known to be complete to their ends and delivers what was not
    /// delivered.
    pub(super) async fn fill_in(self: &Rc<Self>, rooms: &Rc<Rooms>, cause: GapCause) {
        self.fill_tracks(rooms, 0..self.sources.len(), cause).await;
    }

    /// The same for some origins, a page of each at a time, so that what answers and what is answered come together. Repeats until
    /// it succeeds: live messages wait in the inbox, and what that drops is read here later. Only the mirror of another region is
    /// given up, when it does not answer: the own one must not stand still for it. Its log is not complete then, and the next
    /// comparison finds that.
    async fn fill_tracks(
        self: &Rc<Self>,
        rooms: &Rc<Rooms>,
        tracks: Range<usize>,
        cause: GapCause,
    ) {
        let mut readings: Vec<Reading> = tracks
            .map(|track| {
                let from = self.log.borrow().unverified(track);
                Reading {
                    track,
                    from,
                    next: from,
                    failures: 0,
                    is_over: false,
                }
            })
            .collect();
        let mut found = 0;
        while !self.is_gone() && readings.iter().any(|reading| !reading.is_over) {
            let reads = readings
                .iter_mut()
                .filter(|reading| !reading.is_over)
                .map(|reading| self.read_on(rooms, reading));
            let pages = join_all(reads).await;
            let failed = pages.iter().any(Option::is_none);
            let mut ready = Pass::default();
            for (track, record) in by_time(pages.into_iter().flatten().collect()) {
                let admission = self
                    .log
                    .borrow()
                    .admit(track, record.class, record.seq, None);
                if admission == Admission::Deliver {
                    self.sources[track].streams.note(self.part, record.seq);
                    self.take(rooms, track, record, &mut ready);
                    found += 1;
                }
            }
            self.fan_out(ready).await;
            if failed {
                self.pause().await;
            }
        }
        self.checked.set(Instant::now());
        if found > 0 {
            count(Counter::GapDetected(cause), 1);
            count(Counter::GapFilled, found);
        }
        for reading in readings {
            if reading.failures < MIRROR_READS {
                // Not the position: the replica that answered may not have got that far.
                self.log
                    .borrow_mut()
                    .verify(reading.track, reading.next - 1);
                self.check_beginning(rooms, reading.track, reading.from)
                    .await;
            } else {
                self.compared.set(false);
            }
        }
    }

    /// The next page of one stream; `None`: it could not be read.
    async fn read_on(&self, rooms: &Rooms, reading: &mut Reading) -> Option<(usize, Vec<Record>)> {
        let track = reading.track;
        let filter = self.filter(rooms, track);
        let epoch = self.log.borrow().epoch(track);
        let stream = &self.sources[track].stream;
        match rooms
            .reader
            .page(stream, epoch, &filter, reading.next)
            .await
        {
            Ok(page) => {
                reading.failures = 0;
                reading.is_over = page.pending == 0 || page.records.is_empty();
                if let Some(last) = page.records.last() {
                    reading.next = last.seq + 1;
                }
                Some((track, page.records))
            }
            Err(error) => {
                tracing::debug!(error = %error, room.id = %self.room, "a read is repeated");
                reading.failures += 1;
                // The own origin's comes first.
                reading.is_over = track > 0 && reading.failures >= MIRROR_READS;
                None
            }
        }
    }

    /// If the stream was trimmed beyond the place from which a gap was read, messages may be lost to the members here. They
    /// are told to join again: their cursors tell them what became of it.
    async fn check_beginning(&self, rooms: &Rooms, track: usize, from: u64) {
        let source = &self.sources[track];
        while !self.is_gone() {
            match source.streams.fetch(self.part).await {
                Ok(state) if state.incarnation != source.incarnation.get() => return,
                Ok(state) if state.first_seq <= from => return,
                Ok(state) => {
                    tracing::warn!(
                        room.id = %self.room, from, first_seq = state.first_seq,
                        "the stream was trimmed while the room was behind",
                    );
                    count(Counter::MessageDropped(Dropped::Trimmed), 1);
                    return self.end(rooms, Some("reset"));
                }
                Err(error) => {
                    tracing::debug!(error = %error, room.id = %self.room, "a look is repeated");
                    self.pause().await;
                }
            }
        }
    }

    /// Waits a little before a read is repeated; ends at once when the hub does.
    pub(super) async fn pause(&self) {
        tokio::select! {
            () = sleep(RETRY.mul_f64(rand::random_range(1.0..3.0))) => {}
            () = self.gone() => {}
        }
    }
}
