//! Limits the sessions of a user and of an address on this edge, and slows down logins that go wrong again and again.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::{
    config,
    runtime::Pace,
    telemetry::metrics::{self, Counter, count},
};

/// Bad logins of one address that are answered at once.
const BURST: u32 = 20;

/// Longest wait of one of the others.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// Most addresses whose bad logins are remembered. If all of them go on, further addresses share one pace.
const MAX_ADDRESSES: usize = 10_000;

/// Counts sessions by user and by address.
#[derive(Debug)]
pub(super) struct Admission {
    users: Arc<Slots<String>>,
    addresses: Arc<Slots<IpAddr>>,
    /// `limits.bad_logins_per_second`; 0: no limit.
    bad_logins_per_second: u32,
    bad_logins: Mutex<HashMap<IpAddr, Pace>>,
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
            bad_logins_per_second: limits.bad_logins_per_second,
            bad_logins: Mutex::default(),
        }
    }

    /// How long the answer to a bad login from an address waits. Good ones never wait: others may have the same address.
    pub(super) fn bad_login(&self, address: IpAddr, now: Instant) -> Duration {
        let per_second = self.bad_logins_per_second;
        if per_second == 0 {
            return Duration::ZERO;
        }
        let mut paces = self.bad_logins.lock();
        if paces.len() >= MAX_ADDRESSES {
            paces.retain(|_, pace| !pace.is_idle(now));
        }
        let is_full = paces.len() >= MAX_ADDRESSES && !paces.contains_key(&address);
        let address = if is_full {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            address
        };
        let pace = paces.entry(address).or_insert_with(|| Pace::new(now));
        let wait = pace.wait(now, per_second, BURST, LONGEST_WAIT);
        if !wait.is_zero() {
            count(Counter::LoginDelayed, 1);
        }
        wait
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
    use figment::providers::{Format as _, Toml};

    use super::*;

    #[test]
    fn bad_logins_of_an_address_wait_and_memory_is_bounded() {
        let limits = |toml| {
            let toml = Toml::string(toml);
            config::Config::with_defaults(toml).unwrap().limits
        };
        let now = Instant::now();
        let admission = Admission::new(&limits("limits.bad_logins_per_second = 2"));
        let address = |n: usize| IpAddr::from(u128::try_from(n).unwrap().to_be_bytes());
        let waits = |of: usize, times: usize| -> Vec<u128> {
            let one = |_| admission.bad_login(address(of), now).as_millis();
            (0..times).map(one).collect()
        };
        assert!(waits(1, 20).iter().all(|wait| *wait == 0));
        assert_eq!(waits(1, 3), [500, 1000, 1500]);
        assert_eq!(waits(1, 100).last(), Some(&10_000));
        assert_eq!(waits(2, 1), [0]);
        for n in 3..2 * MAX_ADDRESSES {
            admission.bad_login(address(n), now);
        }
        assert!(admission.bad_logins.lock().len() <= MAX_ADDRESSES + 1);
        // The others share one pace, and those that are known keep theirs.
        assert_eq!(waits(3 * MAX_ADDRESSES, 1), [10_000]);
        assert_eq!(waits(2, 1), [0]);
        let later = now + Duration::from_secs(3600);
        assert!(admission.bad_login(address(1), later).is_zero());
        assert_eq!(admission.bad_logins.lock().len(), 1);
        let unlimited = Admission::new(&limits("limits.bad_logins_per_second = 0"));
        assert!((0..1000).all(|_| unlimited.bad_login(address(1), now).is_zero()));
    }

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
