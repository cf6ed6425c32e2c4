//! What the log of a room already has of an earlier attempt.
//!
//! A stream drops a second message with the same id, but only within its duplicate window. A message can be redelivered
//! later than that: after a long cut, or as a dead letter. So an attempt that is not the first one reads the changes in
//! the room after the message.

use bytes::Bytes;

use super::Parts;
use crate::{
    bus::{ReadError, Stored},
    model::{Class, Epoch, partition_of},
    subject::{FROM_NATTER, Subjects, rooms_stream},
};

/// What an earlier attempt has stored.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// The body of the annotation.
    pub annotation: Option<Bytes>,
    /// Whether the room was told of the alert.
    pub alert: bool,
}

/// Looks for the annotation of `user` with the id `annotation`, and for the entry with the id `alert`.
///
/// # Errors
/// [`ReadError`].
pub(super) async fn look(
    parts: &Parts,
    stored: &Stored,
    epoch: Epoch,
    user: &str,
    (annotation, alert): (&str, &str),
) -> Result<Seen, ReadError> {
    let room = &stored.room;
    let origin = parts.streams.origin();
    let part = partition_of(room, parts.streams.partitions());
    let subjects = Subjects::new(&parts.config.nats.prefix);
    let filter = subjects.publish(origin, part, room, Class::Ev);
    let stream = rooms_stream(origin, part);
    let mut seen = Seen::default();
    let mut from = stored.record.seq + 1;
    loop {
        let page = parts.reader.page(&stream, epoch, &filter, from).await?;
        for record in &page.records {
            if record.from == user && record.id == annotation {
                seen.annotation = Some(record.body.clone());
            }
            seen.alert |= record.from == FROM_NATTER && record.id == alert;
        }
        match page.records.last() {
            Some(last) if page.pending > 0 => from = last.seq + 1,
            _ => return Ok(seen),
        }
    }
}
