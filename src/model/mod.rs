//! Ids and values: parsing is validation, `Display` is the wire form.
//!
//! No I/O, no clock, no framework: everything here can be tested as plain data.

#![warn(missing_docs, clippy::indexing_slicing)]

mod condition;
mod cursor;
mod json;
mod message;
mod partition;
mod place;
mod remark;
mod room;

pub use condition::Condition;
pub use cursor::{BadCursor, Cursor, Epoch, Fingerprint, MAX_REGIONS, Position, Region};
pub use json::{Flaw, MAX_JSON_DEPTH, json_flaw, without_mark};
pub use message::{
    Class, Kind, MAX_MESSAGE_ID, MAX_USER, MessageId, Reference, header_escape, header_unescape,
    key_escape,
};
pub use partition::partition_of;
pub use place::Place;
pub use remark::{
    BadRemark, MAX_ANNOTATION, MAX_ANNOTATION_NAME, MAX_ANNOTATIONS, annotations, normal_reaction,
    reaction,
};
pub use room::{BadRoom, RoomId, RoomScope, is_room_name, is_token};
