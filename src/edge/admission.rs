//! Limits the sessions of a user and of an address on this edge.

use std::{collections::HashMap, hash::Hash, net::IpAddr, sync::Arc};

use parking_lot::Mutex;

use crate::{
    config,
    telemetry::metrics::{self, Counter, count},
};

/// Counts sessions by user and by address.
#[derive(Debug)]
pub(super) struct Admission {
    users: Arc<Slots<String>>,
    addresses: Arc<Slots<IpAddr>>,
}

#[derive(Debug)]
struct Slots<K> {
    /// 0 means no limit; then nothing is counted.
    limit: usize,
    taken: Mutex<HashMap<K, usize>>,
}

/// One counted session; given back when dropped.
#[derive(Debug)]
pub(super) struct Slot<K: Eq + Hash>(Option<(Arc<Slots<K>>, K)>);

impl Admission {
    pub(super) fn new(limits: &config::Limits) -> Self {
        Self {
            users: Arc::new(Slots::new(limits.sessions_per_user)),
            addresses: Arc::new(Slots::new(limits.sessions_per_ip)),
        }
    }

    pub(super) fn user(&self, user: &str) -> Option<Slot<String>> {
        let slot = take(&self.users, || user.to_owned());
        if slot.is_none() {
            count(Counter::SessionRefused(metrics::Admission::PerUser), 1);
        }
        slot
    }

    pub(super) fn address(&self, address: IpAddr) -> Option<Slot<IpAddr>> {
        let slot = take(&self.addresses, || address);
        if slot.is_none() {
            count(Counter::SessionRefused(metrics::Admission::PerAddress), 1);
        }
        slot
    }
}

impl<K> Slots<K> {
    fn new(limit: usize) -> Self {
        Self {
            limit,
            taken: Mutex::new(HashMap::new()),
        }
    }
}

fn take<K: Eq + Hash + Clone>(slots: &Arc<Slots<K>>, key: impl FnOnce() -> K) -> Option<Slot<K>> {
    if slots.limit == 0 {
        return Some(Slot(None));
    }
    let key = key();
    let mut taken = slots.taken.lock();
    let count = taken.entry(key.clone()).or_default();
    if *count >= slots.limit {
        return None;
    }
    *count += 1;
    Some(Slot(Some((Arc::clone(slots), key))))
}

impl<K: Eq + Hash> Drop for Slot<K> {
    fn drop(&mut self) {
        if let Some((slots, key)) = self.0.take() {
            let mut taken = slots.taken.lock();
            if let Some(count) = taken.get_mut(&key) {
                *count -= 1;
                if *count == 0 {
                    taken.remove(&key);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_given_back() {
        let slots = Arc::new(Slots::new(2));
        let first = take(&slots, || "kim").unwrap();
        let _second = take(&slots, || "kim").unwrap();
        assert!(take(&slots, || "kim").is_none());
        assert!(take(&slots, || "lee").is_some());
        drop(first);
        assert!(take(&slots, || "kim").is_some());
        assert_eq!(slots.taken.lock().len(), 1);
    }
}
