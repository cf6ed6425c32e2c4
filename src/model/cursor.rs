//! Positions in a room's log.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::partition::fnv1a;

/// Maximum number of regions in a mesh, and of origins in a cursor. A cursor comes from outside, so its size must be
/// bounded.
pub const MAX_REGIONS: usize = 32;

/// A region's name: `[a-z0-9-]{1,32}`, so that it is valid in a subject, a stream name and a cursor.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Region(Arc<str>);

/// The identity of one incarnation of a stream: `[a-z0-9]{1,8}`. After a change of the epoch, old sequences have no
/// meaning.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch {
    bytes: [u8; 8],
    len: u8,
}

/// A short hash of the message at a position. It reveals that a store was rolled back and then written again.
///
/// It is computed from the message's identity (its `Nats-Msg-Id`, or its payload if a plain NATS client set none), and
/// does not depend on when or how many times the message was sent. So every retry of a publish gets the same cursor.
/// Zero means "no message": the position of a room without messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub u16);

/// One component of a [`Cursor`]: the last message seen of one origin.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Position {
    /// The region whose stream assigned the sequence.
    pub origin: Region,
    /// The epoch of that stream.
    pub epoch: Epoch,
    /// Stream sequence, 0 before the first message.
    pub seq: u64,
    /// Fingerprint of the message at `seq`; 0 if there is none.
    pub fingerprint: Fingerprint,
}

/// A position in a room: one [`Position`] per origin, ordered by origin. Opaque to clients.
///
/// Wire form: `origin.epoch.seq.fingerprint` joined with `_`, e.g. `seoul.k3.1042.7f02_virginia.q8.77.a1c4`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Cursor(Vec<Position>);

/// A cursor that can't be parsed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cursor {text:?}: {what}")]
pub struct BadCursor {
    /// The beginning of the given text.
    pub text: String,
    /// What is wrong with it.
    pub what: &'static str,
}

impl Region {
    /// Parses a region's name; `None` if it does not match `[a-z0-9-]{1,32}`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let valid = (1..=32).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        valid.then(|| Self(Arc::from(text)))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Serialize for Region {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Region {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| D::Error::custom("not the name of a region"))
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({})", self.0)
    }
}

impl Epoch {
    /// Parses an epoch; `None` if it does not match `[a-z0-9]{1,8}`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let valid = text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if text.is_empty() || !valid {
            return None;
        }
        let mut bytes = [0; 8];
        bytes
            .get_mut(..text.len())?
            .copy_from_slice(text.as_bytes());
        Some(Self {
            bytes,
            len: u8::try_from(text.len()).ok()?,
        })
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.bytes
            .get(..usize::from(self.len))
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .unwrap_or_default()
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Epoch({self})")
    }
}

impl Position {
    /// Whether there is a message at this position. In a room without messages a position is only a sequence up to
    /// which the room is empty, and all such sequences are equivalent.
    #[must_use]
    pub fn names_message(&self) -> bool {
        self.fingerprint != Fingerprint(0)
    }
}

impl Fingerprint {
    /// The fingerprint of a message: 32-bit FNV-1a of `identity`, folded to 16 bits, never zero.
    #[must_use]
    pub fn of(identity: &[u8]) -> Self {
        let hash = fnv1a(identity.iter().copied());
        #[expect(
            clippy::cast_possible_truncation,
            reason = "folding 32 bits to 16 is the point"
        )]
        let folded = (hash ^ (hash >> 16)) as u16;
        Self(folded.max(1))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}.{}.{}.{}",
            self.origin, self.epoch, self.seq, self.fingerprint
        )
    }
}

impl Cursor {
    /// A cursor with one component, as used in a mesh of one region.
    #[must_use]
    pub fn single(position: Position) -> Self {
        Self(vec![position])
    }

    /// A cursor with these components, in any order. If an origin occurs twice, its first component is kept.
    #[must_use]
    pub fn of(mut positions: Vec<Position>) -> Self {
        positions.sort_by(|a, b| a.origin.cmp(&b.origin));
        positions.dedup_by(|later, first| later.origin == first.origin);
        Self(positions)
    }

    /// The components, ordered by origin, at most one per origin.
    #[must_use]
    pub fn positions(&self) -> &[Position] {
        &self.0
    }

    /// The component of `origin`.
    #[must_use]
    pub fn get(&self, origin: &Region) -> Option<&Position> {
        self.0.iter().find(|position| position.origin == *origin)
    }

    /// The smallest cursor that is not before either of the two: the later of the two positions of each origin. Read
    /// markers grow in this way.
    ///
    /// Sequences of two epochs can't be compared. `is_current` tells whether an epoch is the current one of an origin's
    /// stream: that position wins, since the other has no meaning any more. If neither is current, any choice is
    /// acceptable, as long as everybody makes the same one.
    ///
    /// The result is the maximum of a total order per origin. So the operation is commutative, associative and
    /// idempotent, and can be repeated in any order on any edge of any region.
    #[must_use]
    pub fn merge(&self, other: &Self, is_current: impl Fn(&Region, &Epoch) -> bool) -> Self {
        let rank = |position: &Position| {
            (
                is_current(&position.origin, &position.epoch),
                position.epoch,
                position.seq,
                position.fingerprint,
            )
        };
        let mut positions: Vec<Position> = self.0.iter().chain(&other.0).cloned().collect();
        // The latest position of each origin first, since the first one is kept.
        positions.sort_by(|a, b| {
            let by_origin = a.origin.cmp(&b.origin);
            by_origin.then_with(|| rank(b).cmp(&rank(a)))
        });
        positions.dedup_by(|later, first| later.origin == first.origin);
        Self(positions)
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, position) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("_")?;
            }
            position.fmt(f)?;
        }
        Ok(())
    }
}

impl FromStr for Cursor {
    type Err = BadCursor;

    fn from_str(text: &str) -> Result<Self, BadCursor> {
        let bad = |what| BadCursor {
            text: text.chars().take(80).collect(),
            what,
        };
        let mut positions: Vec<Position> = Vec::new();
        for component in text.split('_') {
            if positions.len() == MAX_REGIONS {
                return Err(bad("too many origins"));
            }
            let mut parts = component.split('.');
            let (Some(origin), Some(epoch), Some(seq), Some(fingerprint), None) = (
                parts.next(),
                parts.next(),
                parts.next(),
                parts.next(),
                parts.next(),
            ) else {
                return Err(bad("a component is not origin.epoch.seq.fingerprint"));
            };
            let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_hexdigit());
            let position = Position {
                origin: Region::parse(origin).ok_or_else(|| bad("the origin is not a region"))?,
                epoch: Epoch::parse(epoch).ok_or_else(|| bad("the epoch is malformed"))?,
                seq: Some(seq)
                    .filter(|s| digits(s))
                    .and_then(|s| s.parse().ok())
                    .ok_or_else(|| bad("the sequence is not a number"))?,
                fingerprint: Some(fingerprint)
                    .filter(|s| digits(s))
                    .and_then(|s| u16::from_str_radix(s, 16).ok())
                    .map(Fingerprint)
                    .ok_or_else(|| bad("the fingerprint is not a hexadecimal number"))?,
            };
            if positions
                .last()
                .is_some_and(|last| last.origin >= position.origin)
            {
                return Err(bad("the origins are not in order"));
            }
            positions.push(position);
        }
        Ok(Self(positions))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EPOCHS: [&str; 2] = ["k3", "q8"];

    fn cursors() -> impl Strategy<Value = Cursor> {
        let position = (0..2_usize, 0..4_u64, 0..2_u16);
        prop::collection::btree_map("seoul|virginia|frankfurt", position, 1..3).prop_map(|parts| {
            let positions = parts
                .into_iter()
                .map(|(origin, (epoch, seq, fp))| Position {
                    origin: Region::parse(&origin).unwrap(),
                    epoch: Epoch::parse(EPOCHS[epoch]).unwrap(),
                    seq,
                    fingerprint: Fingerprint(fp),
                });
            Cursor(positions.collect())
        })
    }

    #[test]
    fn malformed_cursors_are_refused() {
        for text in [
            "",
            "_",
            "seoul",
            "seoul.k3.1",
            "seoul.k3.1.a.b",
            "SEOUL.k3.1.a",
            "seoul.K3.1.a",
            "seoul.k3.-1.a",
            "seoul.k3.+1.a",
            "seoul.k3.1.zz",
            "seoul.k3.1.12345",
            "seoul.k3..a",
            "seoul.k3.99999999999999999999.a",
            "b.k.1.1_a.k.1.1",
            "a.k.1.1_a.k.2.1",
            "a.k.1.1_",
            "a.123456789.1.1",
            "a..1.1",
            ".k.1.1",
            "a.k.1.",
            "안.k.1.1",
        ] {
            assert!(text.parse::<Cursor>().is_err(), "{text:?} was accepted");
        }
        let many = (0..=MAX_REGIONS)
            .map(|i| format!("r{i:03}.k.1.1"))
            .collect::<Vec<_>>();
        assert!(many.join("_").parse::<Cursor>().is_err());
    }

    proptest! {
        #[test]
        fn display_and_parse_are_inverse(
            parts in prop::collection::btree_map("[a-z0-9-]{1,32}", ("[a-z0-9]{1,8}", any::<u64>(), any::<u16>()), 1..8)
        ) {
            let cursor = Cursor(parts.iter().map(|(origin, (epoch, seq, fp))| Position {
                origin: Region::parse(origin).unwrap(),
                epoch: Epoch::parse(epoch).unwrap(),
                seq: *seq,
                fingerprint: Fingerprint(*fp),
            }).collect());
            prop_assert_eq!(cursor.to_string().parse::<Cursor>().unwrap(), cursor);
        }

        /// Two origins (and a third that only some cursors contain), with two epochs each, of which at most one is
        /// current.
        #[test]
        fn merging_commutes_is_associative_idempotent_and_monotone(
            a in cursors(), b in cursors(), c in cursors(), current in prop::option::of(0..2_usize)
        ) {
            let is_current = |_: &Region, epoch: &Epoch| {
                current.is_some_and(|at| epoch.as_str() == EPOCHS[at])
            };
            let merge = |x: &Cursor, y: &Cursor| x.merge(y, is_current);
            let ab = merge(&a, &b);
            prop_assert_eq!(&ab, &merge(&b, &a));
            prop_assert_eq!(merge(&ab, &c), merge(&a, &merge(&b, &c)));
            prop_assert_eq!(&merge(&ab, &b), &ab);
            prop_assert_eq!(&merge(&a, &a), &a);
            // No component is lost or goes back, and none is invented.
            for position in ab.positions() {
                let of = |cursor: &Cursor| cursor.get(&position.origin).cloned();
                prop_assert!(of(&a).as_ref() == Some(position) || of(&b).as_ref() == Some(position));
                for given in [of(&a), of(&b)].into_iter().flatten() {
                    let comparable = given.epoch == position.epoch;
                    prop_assert!(!comparable || given.seq <= position.seq);
                    let loses = is_current(&given.origin, &given.epoch)
                        && !is_current(&position.origin, &position.epoch);
                    prop_assert!(!loses);
                }
            }
            for given in a.positions().iter().chain(b.positions()) {
                prop_assert!(ab.get(&given.origin).is_some());
            }
            prop_assert_eq!(ab.to_string().parse::<Cursor>().unwrap(), ab);
        }

        #[test]
        fn any_text_parses_or_is_refused(text in ".{0,200}") {
            if let Ok(cursor) = text.parse::<Cursor>() {
                prop_assert!(!cursor.positions().is_empty());
            }
        }
    }
}
