//! The order of a room's history.

use std::{cmp::Ordering, fmt, str::FromStr};

use super::{Epoch, Fingerprint, Position, Region};

/// The place of a message in the history of its room, across all origins and all incarnations of their streams. Places
/// are ordered by the time at which the stream stored the message, then by origin, epoch and sequence.
///
/// Sequences of two origins, or of two epochs, can't be compared. Times can, as far as the clocks of the servers agree.
/// Within one stream both orders are the same, unless its server's clock was set back.
///
/// Wire form: `<ts, 11 hex digits>.<origin>.<epoch>.<seq>`. The sequence is written in hexadecimal after one hex digit,
/// which is the number of its digits minus one: `1042` is `2412`. The bytes of this form have the same order as the
/// places. MongoDB stores it as one indexed field, several times per message, hence no padding with zeros.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Place {
    /// When the stream stored the message, in ms since 1970.
    pub ts: u64,
    /// The region of that stream.
    pub origin: Region,
    /// The epoch of the stream.
    pub epoch: Epoch,
    /// The message's sequence in the stream.
    pub seq: u64,
}

/// Not a [`Place`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a place in a history")]
pub struct BadPlace(pub String);

impl Place {
    /// The position of the message in its stream.
    #[must_use]
    pub fn position(&self, fingerprint: Fingerprint) -> Position {
        Position {
            origin: self.origin.clone(),
            epoch: self.epoch,
            seq: self.seq,
            fingerprint,
        }
    }
}

impl Ord for Place {
    fn cmp(&self, other: &Self) -> Ordering {
        // Compared including the dot that follows in the text: `a.` is greater than `a-b.`, although `a` is less than
        // `a-b`.
        let name = |place: &Self| {
            let (origin, epoch) = (place.origin.as_str(), place.epoch.as_str());
            let bytes = origin.bytes().chain(*b".").chain(epoch.bytes());
            bytes.chain(*b".").collect::<Vec<u8>>()
        };
        let by_name = || match (&self.origin, self.epoch) == (&other.origin, other.epoch) {
            true => Ordering::Equal,
            false => name(self).cmp(&name(other)),
        };
        let by_ts = self.ts.cmp(&other.ts);
        by_ts.then_with(by_name).then(self.seq.cmp(&other.seq))
    }
}

impl PartialOrd for Place {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The number of hexadecimal digits of a number.
fn digits(number: u64) -> usize {
    let bits = u64::BITS - number.leading_zeros();
    bits.div_ceil(4).max(1) as usize
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            ts,
            origin,
            epoch,
            seq,
        } = self;
        write!(
            f,
            "{ts:011x}.{origin}.{epoch}.{:x}{seq:x}",
            digits(*seq) - 1
        )
    }
}

impl FromStr for Place {
    type Err = BadPlace;

    fn from_str(text: &str) -> Result<Self, BadPlace> {
        let read = || {
            let mut parts = text.split('.');
            let hex = |digits: &str, width: usize| {
                let plain = digits.len() == width && digits.bytes().all(|b| b.is_ascii_hexdigit());
                u64::from_str_radix(digits, 16).ok().filter(|_| plain)
            };
            let place = Self {
                ts: hex(parts.next()?, 11)?,
                origin: Region::parse(parts.next()?)?,
                epoch: Epoch::parse(parts.next()?)?,
                seq: {
                    let (length, digits) = parts.next()?.split_at_checked(1)?;
                    let length = usize::try_from(hex(length, 1)?).ok()? + 1;
                    hex(digits, length).filter(|seq| self::digits(*seq) == length)?
                },
            };
            parts.next().is_none().then_some(place)
        };
        read().ok_or_else(|| BadPlace(text.chars().take(80).collect()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn places() -> impl Strategy<Value = Place> {
        (0..1_u64 << 44, "a|b|a-b|ab", "k3|q8", any::<u64>()).prop_map(
            |(ts, origin, epoch, seq)| Place {
                ts,
                origin: Region::parse(&origin).unwrap(),
                epoch: Epoch::parse(&epoch).unwrap(),
                seq,
            },
        )
    }

    proptest! {
        #[test]
        fn the_text_leads_back_and_orders_as_the_place_does(a in places(), b in places()) {
            prop_assert_eq!(a.to_string().parse::<Place>().unwrap(), a.clone());
            // Few different times, so that many are equal.
            let b = Place { ts: if b.ts % 2 == 0 { a.ts } else { b.ts }, ..b };
            prop_assert_eq!(a.to_string().cmp(&b.to_string()), a.cmp(&b));
        }

        #[test]
        fn any_text_is_a_place_or_refused(text in "\\PC{0,60}") {
            if let Ok(place) = text.parse::<Place>() {
                prop_assert_eq!(place.to_string(), text.to_lowercase());
            }
        }
    }
}
