//! Names of rooms that need no coordination: two regions that make the same room while they are cut off from each other
//! give it the same name. And ids of entries in a room's log that a repeat must not store twice.

use sha2::{Digest as _, Sha256};

use crate::model::{BadRoom, RoomId};

/// Bytes of the hash in a name. 15 bytes are 24 characters, and nobody finds two rooms with the same name.
const HASH: usize = 15;

/// The digits of base 32 of RFC 4648, in lower case.
const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// The direct room of `members` about `about`.
///
/// # Errors
/// [`BadRoom`] if `namespace` is not valid.
pub fn direct<'m>(
    namespace: &str,
    about: Option<&str>,
    members: impl IntoIterator<Item = &'m str>,
) -> Result<RoomId, BadRoom> {
    let mut members: Vec<&str> = members.into_iter().collect();
    members.sort_unstable();
    members.dedup();
    let parts = [namespace, about.unwrap_or_default()].into_iter();
    named(namespace, "dm", parts.chain(members))
}

/// The group that the application knows by `key`.
///
/// # Errors
/// [`BadRoom`] if `namespace` is not valid.
pub fn group(namespace: &str, about: Option<&str>, key: &str) -> Result<RoomId, BadRoom> {
    let parts = [namespace, about.unwrap_or_default(), key];
    named(namespace, "group", parts.into_iter())
}

/// The id of the entry in a room's log that a user causes by pinning (`on`) or unpinning `message` with the id `id`.
#[must_use]
pub fn entry_id(user: &str, id: &str, message: &str, on: bool) -> String {
    let what = if on { "pin" } else { "unpin" };
    hashed("pin", [user, id, what, message].into_iter())
}

fn named<'p>(
    namespace: &str,
    prefix: &str,
    parts: impl Iterator<Item = &'p str>,
) -> Result<RoomId, BadRoom> {
    RoomId::from_parts(namespace, &hashed(prefix, parts))
}

/// `prefix` with a hash of it and of `parts`.
fn hashed<'p>(prefix: &str, parts: impl Iterator<Item = &'p str>) -> String {
    let mut hash = Sha256::new();
    hash.update(prefix);
    for part in parts {
        // With its length, so that no two lists of parts are the same bytes.
        hash.update(part.len().to_be_bytes());
        hash.update(part);
    }
    let digest = hash.finalize();
    let mut name = format!("{prefix}-");
    for group in digest[..HASH].chunks(5) {
        let bits = group
            .iter()
            .fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
        for digit in (0..8).rev() {
            let value = usize::try_from(bits >> (5 * digit) & 31).unwrap_or_default();
            name.push(char::from(DIGITS[value]));
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_in_any_order_have_one_room() {
        let room = direct("dm", Some("item/1"), ["lee", "kim"]).unwrap();
        assert_eq!(
            direct("dm", Some("item/1"), ["kim", "lee", "kim"]).unwrap(),
            room
        );
        assert_eq!(room.as_str(), "dm:dm-2z4jphfioxz626osbtjjomac");
        let others = [
            direct("dm", None, ["lee", "kim"]),
            direct("dm", Some("item/2"), ["lee", "kim"]),
            direct("dm", Some("item/1"), ["lee", "kim", "ann"]),
            direct("dm", Some("item/1"), ["leekim"]),
            direct("dm2", Some("item/1"), ["lee", "kim"]),
            group("dm", Some("item/1"), "kim"),
        ];
        for other in others {
            assert_ne!(other.unwrap(), room);
        }
        assert!(direct("a.b", None, ["kim"]).is_err());
    }
}
