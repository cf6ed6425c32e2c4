//! What messages of a room are known by, and where each was stored: so that none is shown twice.

use std::{
    collections::{HashMap, VecDeque, hash_map::RandomState},
    hash::BuildHasher as _,
    sync::LazyLock,
};

use crate::{
    bus::Record,
    model::{Class, Kind},
};

/// Messages, and as many changes, of each origin that are remembered.
pub(super) const MAX_REFERENCES: usize = 1024;

/// A track and a sequence.
pub(super) type Spot = (usize, u64);

/// The references of a room's last messages. A publish that is repeated after its stream's duplicate window, or in another region, is
/// stored again: a copy that is not shown, but that a member may have seen elsewhere in place of the first.
#[derive(Debug)]
pub(super) struct References {
    most: usize,
    /// Where each was found first.
    first: HashMap<u64, Spot>,
    /// Oldest first.
    order: VecDeque<u64>,
    /// Where some were found again.
    twins: VecDeque<(u64, Spot)>,
}

impl References {
    /// None yet, of so many origins.
    pub(super) fn new(origins: usize) -> Self {
        Self {
            most: MAX_REFERENCES * origins.max(1),
            first: HashMap::new(),
            order: VecDeque::new(),
            twins: VecDeque::new(),
        }
    }

    /// Notes where a reference is stored; whether it is new.
    pub(super) fn note(&mut self, key: u64, at: Spot) -> bool {
        if let Some(first) = self.first.get(&key) {
            if *first != at {
                self.twins.push_back((key, at));
                if self.twins.len() > self.most {
                    self.twins.pop_front();
                }
            }
            return false;
        }
        self.first.insert(key, at);
        self.order.push_back(key);
        if self.order.len() > self.most
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

/// The hash of what a message is known by in its room; `None` for what natter itself announces, which is heeded each time.
pub(super) fn reference(record: &Record) -> Option<u64> {
    let announced = record.kind == Some(Kind::Erase.as_str());
    (!announced).then(|| reference_of(record.class, &record.from, &record.id))
}

/// The same of a message, or of what refers to one, by its sender and id. The hash has a key of this process: who chooses ids can't choose two that collide,
/// and so make another's message look like a copy.
pub(super) fn reference_of(class: Class, from: &str, id: &str) -> u64 {
    static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    KEY.hash_one((class == Class::Msg, from, id))
}
