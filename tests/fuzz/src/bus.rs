pub mod line;
#[path = "../../../src/bus/record.rs"]
mod record;

pub use record::{BY_HAND, BadRecord, Record, message_key};
