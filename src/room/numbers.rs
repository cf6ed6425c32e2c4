//! Hash maps by numbers that no client chooses: numbers of subscriptions, and hashes whose key is secret. Against those no
//! collisions can be prepared, and one multiplication spreads them.

use std::hash::{BuildHasherDefault, Hasher};

/// The hasher of such a map.
pub(super) type ByNumber = BuildHasherDefault<Multiply>;

/// 2^64 divided by the golden ratio, odd.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// Hashes one number.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Multiply(u64);

impl Hasher for Multiply {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(self.0.rotate_left(8) ^ u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = number.wrapping_mul(FACTOR);
    }

    /// The upper half is the better one, and maps take their place from the lower one.
    fn finish(&self) -> u64 {
        self.0.rotate_left(32)
    }
}
