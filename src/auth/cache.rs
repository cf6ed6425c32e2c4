//! Cache of verified tokens.

use std::{collections::HashMap, mem, sync::Arc};

use jsonwebtoken::{crypto::rust_crypto::DEFAULT_PROVIDER, jwk::ThumbprintHash};
use parking_lot::Mutex;

use super::Identity;

/// SHA-256 of a whole token: header, payload and signature.
pub(super) type Digest = [u8; 32];

/// Identities of verified tokens by digest. Makes a storm of reconnects cheap.
///
/// It has two generations. New entries go to the young one. When that holds half of the capacity, it becomes the old
/// one, and the previous old one is dropped. An entry found in the old generation moves to the young one, so entries in
/// use stay.
///
/// # Invariants
/// - At most `capacity` entries.
/// - Only verified tokens are added: a client without a valid token can't evict others.
/// - The caller checks, on every use, whether an entry has expired.
pub(super) struct Cache {
    generations: Mutex<Generations>,
    half: usize,
}

#[derive(Default)]
struct Generations {
    young: HashMap<Digest, Arc<Identity>>,
    old: HashMap<Digest, Arc<Identity>>,
}

impl Cache {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            generations: Mutex::default(),
            half: (capacity / 2).max(1),
        }
    }

    /// The digest of `token`; `None` (then nothing is cached) only if the provider has no SHA-256.
    pub(super) fn digest(token: &str) -> Option<Digest> {
        let digest = DEFAULT_PROVIDER.key_utils.compute_digest;
        digest(token.as_bytes(), ThumbprintHash::SHA256)
            .ok()?
            .try_into()
            .ok()
    }

    pub(super) fn get(&self, digest: &Digest) -> Option<Arc<Identity>> {
        let mut generations = self.generations.lock();
        if let Some(identity) = generations.young.get(digest) {
            return Some(Arc::clone(identity));
        }
        let identity = generations.old.remove(digest)?;
        let dropped = generations.insert(self.half, *digest, Arc::clone(&identity));
        drop(generations);
        drop(dropped); // perhaps thousands of entries: not under the lock
        Some(identity)
    }

    pub(super) fn insert(&self, digest: Digest, identity: Arc<Identity>) {
        let dropped = self.generations.lock().insert(self.half, digest, identity);
        drop(dropped);
    }

    pub(super) fn remove(&self, digest: &Digest) {
        let mut generations = self.generations.lock();
        generations.young.remove(digest);
        generations.old.remove(digest);
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        let generations = self.generations.lock();
        generations.young.len() + generations.old.len()
    }
}

impl Generations {
    /// Adds an entry, and returns the generation that was dropped, if one was.
    fn insert(
        &mut self,
        half: usize,
        digest: Digest,
        identity: Arc<Identity>,
    ) -> Option<HashMap<Digest, Arc<Identity>>> {
        let dropped = (self.young.len() >= half && !self.young.contains_key(&digest))
            .then(|| mem::replace(&mut self.old, mem::take(&mut self.young)));
        self.young.insert(digest, identity);
        dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Claims;

    fn identity(user: &str) -> Arc<Identity> {
        Arc::new(Identity::from_claims(&Claims::new(user, 1)).unwrap())
    }

    #[test]
    fn never_holds_more_than_its_capacity_and_keeps_what_is_used() {
        let cache = Cache::new(100);
        let kept = Cache::digest("kept").unwrap();
        cache.insert(kept, identity("kept"));
        for n in 0..1000 {
            cache.insert(Cache::digest(&n.to_string()).unwrap(), identity("kim"));
            assert!(cache.len() <= 100, "{} entries", cache.len());
            assert_eq!(&*cache.get(&kept).unwrap().user, "kept", "lost at {n}");
        }
        cache.remove(&kept);
        assert!(cache.get(&kept).is_none());
    }

    #[test]
    fn tokens_that_differ_have_other_digests() {
        // The known SHA-256 of "abc" (FIPS 180-2, appendix B.1).
        let abc = Cache::digest("abc").unwrap();
        assert_eq!(abc[..4], [0xba, 0x78, 0x16, 0xbf]);
        assert_ne!(abc, Cache::digest("abd").unwrap());
    }
}
