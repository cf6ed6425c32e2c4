//! The partition hash of nats-server.

use super::RoomId;

/// The partition of a room among `partitions`: the result of the NATS subject mapping function `partition(n, 1, 2)` for
/// the tokens `<namespace>.<name>`.
///
/// nats-server (`subject_transform.go`, `getHashPartition`) hashes the chosen tokens, joined without a separator, with
/// 32-bit FNV-1a and takes the remainder. A test compares this function with a running server.
#[must_use]
pub fn partition_of(room: &RoomId, partitions: u16) -> u16 {
    let hash = fnv1a(room.namespace().bytes().chain(room.name().bytes()));
    u16::try_from(hash % u32::from(partitions.max(1))).unwrap_or(0)
}

/// 32-bit FNV-1a.
pub(super) fn fnv1a(bytes: impl Iterator<Item = u8>) -> u32 {
    bytes.fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}
