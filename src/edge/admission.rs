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
    users: Arc<Places<String>>,
    addresses: Arc<Places<IpAddr>>,
}

#[derive(Debug)]
struct Places<K> {
    /// 0 means no limit; then nothing is counted.
    limit: usize,
    taken: Mutex<HashMap<K, usize>>,
}

/// One counted session; given back when dropped.
#[derive(Debug)]
pub(super) struct Place<K: Eq + Hash>(Option<(Arc<Places<K>>, K)>);

impl Admission {
    pub(super) fn new(limits: &config::Limits) -> Self {
        Self {
            users: Arc::new(Places::new(limits.sessions_per_user)),
            addresses: Arc::new(Places::new(limits.sessions_per_ip)),
        }
    }

    pub(super) fn user(&self, user: &str) -> Option<Place<String>> {
        let place = take(&self.users, || user.to_owned());
        if place.is_none() {
            count(Counter::SessionRefused(metrics::Admission::PerUser), 1);
        }
        place
    }

    pub(super) fn address(&self, address: IpAddr) -> Option<Place<IpAddr>> {
        let place = take(&self.addresses, || address);
        if place.is_none() {
            count(Counter::SessionRefused(metrics::Admission::PerAddress), 1);
        }
        place
    }
}

impl<K> Places<K> {
    fn new(limit: usize) -> Self {
        Self {
            limit,
            taken: Mutex::new(HashMap::new()),
        }
    }
}

fn take<K: Eq + Hash + Clone>(
    places: &Arc<Places<K>>,
    key: impl FnOnce() -> K,
) -> Option<Place<K>> {
    if places.limit == 0 {
        return Some(Place(None));
    }
    let key = key();
    let mut taken = places.taken.lock();
    let count = taken.entry(key.clone()).or_default();
    if *count >= places.limit {
        return None;
    }
    *count += 1;
    Some(Place(Some((Arc::clone(places), key))))
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        if let Some((places, key)) = self.0.take() {
            let mut taken = places.taken.lock();
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
    fn places_are_given_back() {
        let places = Arc::new(Places::new(2));
        let first = take(&places, || "kim").unwrap();
        let _second = take(&places, || "kim").unwrap();
        assert!(take(&places, || "kim").is_none());
        assert!(take(&places, || "lee").is_some());
        drop(first);
        assert!(take(&places, || "kim").is_some());
        assert_eq!(places.taken.lock().len(), 1);
    }
}
