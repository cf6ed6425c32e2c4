//! Filling gaps: reading from the stream what did not come live.

use std::{rc::Rc, time::Duration};

use tokio::time::{Instant, sleep};

use super::{fan_out::Pass, hub::Hub, log::Admission, rooms::Rooms};
use crate::{
    bus::Record,
    telemetry::metrics::{Counter, Dropped, GapCause, count},
};

/// Reads for a gap after which what is missing is taken for erased.
const GAP_READS: usize = 20;

/// Pause before a read that failed is repeated.
const RETRY: Duration = Duration::from_millis(100);

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
            self.fill_track(rooms, track, GapCause::Sequence).await;
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
        for track in 0..self.sources.len() {
            self.fill_track(rooms, track, cause).await;
        }
    }

    /// The same for one origin. Repeats until it succeeds: live messages wait in the inbox, and what that drops is read here
    /// later.
    async fn fill_track(self: &Rc<Self>, rooms: &Rc<Rooms>, track: usize, cause: GapCause) {
        let source = &self.sources[track];
        let from = self.log.borrow().unverified(track);
        let filter = self.filter(rooms, track);
        let epoch = self.log.borrow().epoch(track);
        let mut next = from;
        let mut found = 0;
        while !self.is_gone() {
            let page = match rooms
                .reader
                .page(&source.stream, epoch, &filter, next)
                .await
            {
                Ok(page) => page,
                Err(error) => {
                    tracing::debug!(error = %error, room.id = %self.room, "a read is repeated");
                    self.pause().await;
                    continue;
                }
            };
            let mut ready = Pass::default();
            let is_last = page.pending == 0 || page.records.is_empty();
            for record in page.records {
                next = record.seq + 1;
                let admission = self
                    .log
                    .borrow()
                    .admit(track, record.class, record.seq, None);
                if admission == Admission::Deliver {
                    source.streams.note(self.part, record.seq);
                    self.take(rooms, track, record, &mut ready);
                    found += 1;
                }
            }
            self.fan_out(ready).await;
            if is_last {
                // Not the position: the replica that answered may not have got that far.
                self.log.borrow_mut().verify(track, next - 1);
                break;
            }
        }
        self.checked.set(Instant::now());
        if found > 0 {
            count(Counter::GapDetected(cause), 1);
            count(Counter::GapFilled, found);
        }
        self.check_beginning(rooms, track, from).await;
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
