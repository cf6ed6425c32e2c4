//! Centrifugo's positions, `(offset, epoch)`, for natter's cursors.
//!
//! A cursor has a position for each origin; Centrifugo's clients keep one number and one text. The number, `offset`, is
//! the position in the log of the origin that the client's edge belongs to: its sequence, and below it the 16 bits of
//! its fingerprint, so that a log that was rolled back is noticed as with a cursor. JavaScript's numbers are exact up to
//! 2^53, so sequences up to 2^37 fit. The text, `epoch`, names that origin and its epoch, and has the positions of
//! the other origins at the time of the subscription: `origin.epoch` or `origin.epoch_<cursor of the others>`.
//!
//! A client keeps the `epoch` of its subscription and the last `offset`. So natter does not know what it has seen of other
//! origins since it subscribed; see [`Since::only`].

use crate::{
    model::{Cursor, Epoch, Fingerprint, Position, Region},
    protocol::{ResumeAt, Since},
};

/// Bits of an offset that hold the fingerprint.
const FINGERPRINT_BITS: u32 = 16;

/// The largest number that every client keeps exactly.
const MAX_OFFSET: u64 = 1 << 53;

/// A cursor that no room can resume at.
const NOWHERE: &str = "-.0.0.0";

/// The offset of a position; `None` if its sequence is too large.
pub(super) fn offset_of(position: &Position) -> Option<u64> {
    let offset = position.seq.checked_shl(FINGERPRINT_BITS)? | u64::from(position.fingerprint.0);
    (position.seq < MAX_OFFSET >> FINGERPRINT_BITS).then_some(offset)
}

/// The offset and epoch of a cursor for a client of the region `own`; `None` if it can't be expressed.
pub(super) fn of_cursor(cursor: &Cursor, own: &Region) -> Option<(u64, String)> {
    let position = cursor.get(own)?;
    let mut epoch = format!("{own}.{}", position.epoch);
    let others = cursor.positions().iter().filter(|it| it.origin != *own);
    for other in others {
        epoch.push('_');
        epoch.push_str(&other.to_string());
    }
    Some((offset_of(position)?, epoch))
}

/// The single position at `offset`, in the log that `epoch` names first.
fn position(offset: u64, epoch: &str) -> Option<(Position, &str)> {
    let (first, others) = epoch.split_once('_').unwrap_or((epoch, ""));
    let (origin, epoch) = first.split_once('.')?;
    let position = Position {
        origin: Region::parse(origin)?,
        epoch: Epoch::parse(epoch)?,
        seq: offset >> FINGERPRINT_BITS,
        fingerprint: Fingerprint(u16::try_from(offset & 0xffff).ok()?),
    };
    Some((position, others))
}

/// Where a client stands that was given `offset` and `epoch`. Nothing given means: before the first message.
pub(super) fn since(offset: u64, epoch: &str, or_refuse: bool) -> Since {
    let read = || {
        let (position, others) = position(offset, epoch)?;
        let mut positions = vec![position.clone()];
        if !others.is_empty() {
            positions.extend_from_slice(others.parse::<Cursor>().ok()?.positions());
        }
        Some((Cursor::of(positions).to_string(), position.origin))
    };
    let (at, only) = match (offset, epoch) {
        (0, "") => (ResumeAt::Beginning, None),
        _ => match read() {
            Some((cursor, origin)) => (ResumeAt::Cursor(cursor), Some(origin)),
            None => (ResumeAt::Cursor(NOWHERE.to_owned()), None),
        },
    };
    Since {
        at,
        only,
        or_refuse,
    }
}

/// The cursor of the message at `offset`; `None` if `epoch` is not one that natter gave.
pub(super) fn cursor_at(offset: u64, epoch: &str) -> Option<String> {
    position(offset, epoch).map(|(position, _)| position.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cursor(text: &str) -> Cursor {
        text.parse().unwrap()
    }

    #[test]
    fn positions_survive_there_and_back() {
        for text in [
            "seoul.k3.1042.7f02",
            "seoul.k3.0.0",
            "seoul.k3.137438953471.ffff",
            "seoul.k3.1042.7f02_virginia.q8.77.a1c4",
            "frankfurt.q8.77.a1c4_seoul.k3.1042.7f02_virginia.q8.9.1",
        ] {
            let own = Region::parse("seoul").unwrap();
            let (offset, epoch) = of_cursor(&cursor(text), &own).unwrap();
            assert!(offset < MAX_OFFSET, "{text}");
            let back = since(offset, &epoch, true);
            assert_eq!(back.at, ResumeAt::Cursor(text.to_owned()));
            assert_eq!(back.only, Some(own));
            assert!(back.or_refuse);
        }
    }

    #[test]
    fn what_can_not_be_expressed_has_no_offset() {
        let own = Region::parse("seoul").unwrap();
        assert_eq!(of_cursor(&cursor("seoul.k3.137438953472.1"), &own), None);
        assert_eq!(of_cursor(&cursor("virginia.k3.1.1"), &own), None);
        let far = cursor("seoul.k3.18446744073709551615.1");
        assert_eq!(of_cursor(&far, &own), None);
    }

    fn nowhere() -> ResumeAt {
        ResumeAt::Cursor(NOWHERE.to_owned())
    }

    #[test]
    fn epochs_of_others_resume_nowhere() {
        for epoch in [
            "_",
            "x",
            "abcd",
            "seoul.",
            "seoul.k3_x",
            "SEOUL.k3",
            "seoul.k3_a.b.c",
            ".",
        ] {
            let since = since(7, epoch, false);
            assert_eq!(since.at, nowhere(), "{epoch}");
            assert_eq!(since.only, None, "{epoch}");
        }
        assert_eq!(since(7, "", false).at, nowhere());
        assert_eq!(since(0, "", false).at, ResumeAt::Beginning);
        assert!(NOWHERE.parse::<Cursor>().is_ok());
    }
}
