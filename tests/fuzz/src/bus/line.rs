#[path = "../../../../src/bus/line/protocol.rs"]
pub mod protocol;

pub use protocol::{Arrival, HeaderWriter, Headers};

/// Only named in documentation.
pub struct Line;
