//! References of a room's messages and where each was stored, so that no message is shown twice.

use std::{
    collections::{HashMap, VecDeque, hash_map::RandomState},
    hash::BuildHasher as _,
    sync::LazyLock,
};

use super::numbers::ByNumber;
use crate::{
    bus::Record,
    model::{Class, Kind},
};

/// How many messages are remembered for each origin, and as many events.
pub(super) const MAX_REFERENCES: usize = 1024;

/// A track and a sequence.
pub(super) type Spot = (usize, u64);

/// The references of a room's latest messages. If a publish is retried after the duplicate window of its stream, or in
/// another region, the message is stored a second time. Such a copy is not shown. But on another edge a member may have
/// seen the copy instead of the first, so the places of copies are remembered too.
#[derive(Debug)]
pub(super) struct References {
    most: usize,
    /// Where each reference was found first.
    first: HashMap<u64, Spot, ByNumber>,
    /// The keys of `first`, oldest first.
    order: VecDeque<u64>,
    /// Where copies were found.
    twins: VecDeque<(u64, Spot)>,
}

impl References {
    /// No references yet, with room for this number of origins.
    pub(super) fn new(origins: usize) -> Self {
        Self {
            most: MAX_REFERENCES * origins.max(1),
            first: HashMap::default(),
            order: VecDeque::new(),
            twins: VecDeque::new(),
        }
    }

    /// Notes where a reference is stored. Returns whether the reference is new.
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

    /// Whether the reference is one of the latest.
    pub(super) fn contains(&self, key: u64) -> bool {
        self.first.contains_key(&key)
    }

    /// Whether a copy of the message at `at` is stored at another place for which `seen` is true.
    pub(super) fn has_twin(&self, key: u64, at: Spot, seen: impl Fn(Spot) -> bool) -> bool {
        let other = |spot: &Spot| *spot != at && seen(*spot);
        self.first.get(&key).is_some_and(other)
            || self
                .twins
                .iter()
                .any(|(of, spot)| *of == key && other(spot))
    }
}

/// The hash of the reference of a message or event in its room; `None` for natter's own announcements, each of which
/// takes effect.
pub(super) fn reference(record: &Record) -> Option<u64> {
    let announced = record.kind == Some(Kind::Erase.as_str());
    (!announced).then(|| reference_of(record.class, &record.from, &record.id))
}

/// The hash of a reference, from class, sender and id. Its key is random for each process. So a client can't choose ids
/// that collide, which would make another user's message look like a copy.
pub(super) fn reference_of(class: Class, from: &str, id: &str) -> u64 {
    static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    KEY.hash_one((class == Class::Msg, from, id))
}
