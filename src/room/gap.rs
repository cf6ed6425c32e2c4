//! Filling gaps: reading from the stream what did not come live.

use std::time::Duration;

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
    pub(super) async fn fill_before(&self, rooms: &Rooms, record: &Record) {
        let previous = record.previous.unwrap_or_default();
        for _ in 0..GAP_READS {
            self.fill_in(rooms, GapCause::Sequence).await;
            if self.is_gone() || self.log.borrow().last(record.class) >= previous {
                return;
            }
            self.pause().await;
        }
        tracing::warn!(room.id = %self.room, seq = previous, "a message is not in the stream any more");
        count(Counter::MessageDropped(Dropped::Erased), 1);
    }

    /// Reads the stream from where the log was last known to be complete to its end and delivers what was not delivered. Repeats until it succeeds: live messages
    /// wait in the subscription, and what that drops is read here later.
    pub(super) async fn fill_in(&self, rooms: &Rooms, cause: GapCause) {
        let from = self.log.borrow().unverified();
        let filter = rooms
            .subjects
            .stored_all(rooms.streams.origin(), self.part, &self.room);
        let epoch = self.log.borrow().epoch();
        let mut next = from;
        let mut found = 0;
        while !self.is_gone() {
            let page = match rooms.reader.page(&self.stream, epoch, &filter, next).await {
                Ok(page) => page,
                Err(error) => {
                    tracing::debug!(error = %error, room.id = %self.room, "a read is repeated");
                    self.pause().await;
                    continue;
                }
            };
            let mut ready = Pass::default();
            for record in &page.records {
                next = record.seq + 1;
                let admission = self.log.borrow().admit(record.class, record.seq, None);
                if admission == Admission::Deliver {
                    rooms.streams.note(self.part, record.seq);
                    self.deliver(record, &mut ready);
                    found += 1;
                }
            }
            self.fan_out(ready).await;
            if page.pending == 0 || page.records.is_empty() {
                // Not the position: the replica that answered may not have got that far.
                self.log.borrow_mut().verify(next - 1);
                break;
            }
        }
        self.checked.set(Instant::now());
        if found > 0 {
            count(Counter::GapDetected(cause), 1);
            count(Counter::GapFilled, found);
        }
        self.check_beginning(rooms, from).await;
    }

    /// If the stream was trimmed beyond the place from which a gap was read, messages may be lost to the members here. They
    /// are told to join again: their cursors tell them what became of it.
    async fn check_beginning(&self, rooms: &Rooms, from: u64) {
        while !self.is_gone() {
            match rooms.streams.fetch(self.part).await {
                Ok(state) if state.incarnation != self.incarnation.get() => return,
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
