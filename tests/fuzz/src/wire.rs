#[path = "../../../src/wire/decode.rs"]
mod decode;

#[path = "../../../src/wire/encode.rs"]
mod encode;

pub use decode::{Decoder, Incoming, MAX_FRAGMENTS};
pub use encode::{FrameBuilder, ping_frame};
