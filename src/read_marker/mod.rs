//! Read markers: up to where each user has read in each room, and the messages that are unread.
//!
//! A marker is a [`Cursor`](crate::model::Cursor) that only grows ([`merge`](crate::model::Cursor::merge)). It is
//! stored under a key of the bucket `lastread_<region>`. [`Markers`] is what one edge knows of the markers. They are
//! read when needed and written soon after they grew, with compare-and-set, so that edges that write the same key merge
//! their values and don't overwrite each other. Receipts tell the members of a room at once. [`Table`] makes sure that
//! no member is told of a marker that goes back.
//!
//! Nothing here is on the path of a message: while the bucket does not answer, messages are delivered as usual.
//!
//! # What is lost, and when
//! A marker that was answered with `ok` is stored, except in two cases: it waits (at most
//! [`WRITE_PAUSE`](queue::WRITE_PAUSE)) because the same key was just written, or NATS does not answer. If the edge dies
//! in that time, every other edge with members in the room has heard the receipt. Some seconds later it finds that the
//! bucket has less, and writes the marker. If there is no such edge, the marker stays where it was written last.
//!
//! A marker that was moved by a send alone waits at most [`SENT_PAUSE`](queue::SENT_PAUSE). If the edge dies in that
//! time, it stays behind the sender's own last messages, until the sender reads or sends again.

mod counting;
mod error;
mod index;
mod keeper;
mod latest;
mod marker;
mod markers;
mod queue;
mod table;
mod unread;

pub use latest::Latest;
pub use markers::Markers;
pub use table::Table;
pub use unread::{Counted, Unread};
