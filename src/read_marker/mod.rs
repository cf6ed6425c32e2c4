//! Read markers: up to where each user has read in each room; and what is new after it.
//!
//! A marker is a [`Cursor`](crate::model::Cursor) that only grows ([`merge`](crate::model::Cursor::merge)). Its home is a key
//! of the bucket `lastread_<region>`; [`Markers`] is what one edge knows of them: read when needed, written soon after they
//! grew, with compare-and-set, so that edges that write the same key merge instead of overwriting each other. Receipts tell
//! the members of a room at once; [`Table`] sees to it that nobody is told of a marker that goes back.
//!
//! Nothing here is on the path of a message: while the bucket does not answer, messages flow as ever.
//!
//! # What is lost, and when
//! A marker that was answered with `ok` is stored, or waits at most [`WRITE_PAUSE`](keeper::WRITE_PAUSE) behind an earlier write of the same key,
//! or NATS is away. One that was moved by sending waits at most that long as well. If the edge dies meanwhile, every other edge with members in that room has heard the receipt, sees some
//! seconds later that the bucket has less, and writes it. If there is none, the marker stays where it was written last.

mod index;
mod keeper;
mod marker;
mod markers;
mod table;
mod unread;

pub use markers::{MarkerError, Markers, Reading};
pub use table::Table;
pub use unread::Unread;
