//! The memory for the rings of all rooms of a shard: the messages that their logs keep for sessions that resume.

use std::{cell::Cell, rc::Rc};

use crate::telemetry::metrics::{Gauge, gauge_add};

/// Bounds of the rings of a shard, and what they hold. Each log reports its changes.
#[derive(Debug)]
pub(super) struct Rings {
    /// Most bytes of one room.
    pub(super) of_room: usize,
    /// Most bytes of all of them: the shard's part of `rooms.ring_memory`.
    most: usize,
    held: Cell<usize>,
    /// How often rings were used so far.
    uses: Cell<u64>,
}

impl Rings {
    /// Rings of at most `of_room` bytes each, and at most `most` all together.
    pub(super) fn new(of_room: usize, most: usize) -> Rc<Self> {
        Rc::new(Self {
            of_room,
            most,
            held: Cell::new(0),
            uses: Cell::new(0),
        })
    }

    /// The number of this use. A ring that was used later has a higher one.
    pub(super) fn mark(&self) -> u64 {
        self.uses.set(self.uses.get() + 1);
        self.uses.get()
    }

    /// A ring took `before` bytes, and takes `after` bytes now.
    pub(super) fn change(&self, before: usize, after: usize) {
        self.held.set(self.held.get() + after - before);
        let by = |bytes| i64::try_from(bytes).unwrap_or(i64::MAX);
        gauge_add(Gauge::RingBytes, by(after) - by(before));
    }

    /// Whether rings must be emptied.
    pub(super) fn are_full(&self) -> bool {
        self.held.get() > self.most
    }

    /// Whether enough of them are empty. Some more than is needed, because to find those that were used least recently
    /// takes a look at all of them.
    pub(super) fn have_room(&self) -> bool {
        self.held.get() <= self.most - self.most / 8
    }
}
