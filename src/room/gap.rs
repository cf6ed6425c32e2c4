//! Filling gaps: reading from the stream what did not arrive live.

use std::{ops::Range, rc::Rc, time::Duration};

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use super::{fan_out::Pass, hub::Hub, log::Admission, rooms::Rooms};
use crate::{
    bus::Record,
    telemetry::metrics::{Counter, Dropped, GapCause, count},
};

/// How often a gap is read. What is still missing after that is assumed to be erased.
const GAP_READS: usize = 20;

/// Failed reads in a row after which a mirror is given up until the next comparison.
const MIRROR_READS: u32 = 10;

/// Base of the pause before a read is retried, see [`Hub::pause`].
const RETRY: Duration = Duration::from_millis(100);

/// Progress of reading one stream up to its end.
struct Reading {
    track: usize,
    from: u64,
    next: u64,
    /// Failed reads in a row.
    failures: u32,
    is_over: bool,
}

/// Merges what was read from several streams by time. The order within each stream is kept.
fn by_time(pages: Vec<(usize, Vec<Record>)>) -> Vec<(usize, Record)> {
    let mut timed: Vec<(u64, usize, Record)> = Vec::new();
    for (track, records) in pages {
        let mut now = 0;
        for record in records {
            // Keeps the order even if the server's clock was set back.
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
    /// Fills the gap before `record`. A replica that is behind may not have the missing messages yet, so the read is
    /// repeated. What is missing after [`GAP_READS`] reads was erased.
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

    /// Reads the streams of all origins, from where the log was last known to be complete to their ends, and delivers
    /// what was not delivered before.
    pub(super) async fn fill_in(self: &Rc<Self>, rooms: &Rc<Rooms>, cause: GapCause) {
        self.fill_tracks(rooms, 0..self.sources.len(), cause).await;
    }

    /// The same for some of the origins. Reads one page of each at a time, so that a message and the answers to it are
    /// read together. Retries until it succeeds. Live messages wait in the inbox meanwhile; the ones that the inbox
    /// drops are read here later. Only the mirror of another region is given up if it does not answer, since the own
    /// origin must not wait for it. The log is then incomplete, and the next comparison detects that.
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
                // Not up to the log's position: the replica that answered may not have got that far.
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

    /// Reads the next page of one stream; `None` if that failed.
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
                // Only mirrors are given up, never the own stream.
                reading.is_over = track > 0 && reading.failures >= MIRROR_READS;
                None
            }
        }
    }

    /// If the stream was trimmed beyond the position from which a gap was read, the members here may have lost
    /// messages. They are told to join again; the replies then say whether their cursors are still valid.
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

    /// Waits a little before a read is retried. Returns at once when the hub ends.
    pub(super) async fn pause(&self) {
        tokio::select! {
            () = sleep(RETRY.mul_f64(rand::random_range(1.0..3.0))) => {}
            () = self.gone() => {}
        }
    }
}
