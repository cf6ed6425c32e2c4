#[path = "../../../src/wire/decode.rs"]
mod decode;

pub use decode::{Decoder, Incoming, MAX_FRAGMENTS};
