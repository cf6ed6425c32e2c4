//! What messages of a room are known by, and where each was stored: so that none is shown twice.

use std::collections::{HashMap, VecDeque};

use crate::{
    bus::{Record, message_key},
    model::Class,
};

/// Messages that are remembered.
pub(super) const MAX_REFERENCES: usize = 1024;

/// A track and a sequence.
pub(super) type Spot = (usize, u64);

/// The references of a room's last messages. A publish that is repeated after its stream's duplicate window, or in another region, is
/// stored again: a copy that is not shown, but that a member may have seen elsewhere in place of the first.
#[derive(Debug, Default)]
pub(super) struct References {
    /// Where each was found first.
    first: HashMap<u64, Spot>,
    /// Oldest first.
    order: VecDeque<u64>,
    /// Where some were found again.
    twins: VecDeque<(u64, Spot)>,
}

impl References {
    /// Notes where a reference is stored; whether it is new.
    pub(super) fn note(&mut self, key: u64, at: Spot) -> bool {
        if let Some(first) = self.first.get(&key) {
            if *first != at {
                self.twins.push_back((key, at));
                if self.twins.len() > MAX_REFERENCES {
                    self.twins.pop_front();
                }
            }
            return false;
        }
        self.first.insert(key, at);
        self.order.push_back(key);
        if self.order.len() > MAX_REFERENCES
            && let Some(oldest) = self.order.pop_front()
        {
            self.first.remove(&oldest);
        }
        true
    }

    /// Whether it is one of the last.
    pub(super) fn contains(&self, key: u64) -> bool {
        self.first.contains_key(&key)
    }

    /// Whether the message at `at` is stored at another place too, of which `seen` is true.
    pub(super) fn has_twin(&self, key: u64, at: Spot, seen: impl Fn(Spot) -> bool) -> bool {
        let other = |spot: &Spot| *spot != at && seen(*spot);
        self.first.get(&key).is_some_and(other)
            || self
                .twins
                .iter()
                .any(|(of, spot)| *of == key && other(spot))
    }
}

/// The hash of what a message is known by in its room; `None` for what refers to one.
pub(super) fn reference(record: &Record) -> Option<u64> {
    let is_message = record.class == Class::Msg;
    is_message.then(|| reference_of(&record.from, &record.id))
}

/// The same of a message by its sender and id.
pub(super) fn reference_of(from: &str, id: &str) -> u64 {
    fnv64(message_key("", from, id).as_bytes())
}

fn fnv64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
