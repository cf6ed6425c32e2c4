//! Client ↔ server frames, error codes, close reasons. No I/O and no framework.
//!
//! Each client protocol is a codec over the same session core; so far there is one, [`native`] (`natter.v1`).

#![warn(missing_docs, clippy::indexing_slicing)]

mod codes;
pub mod native;

pub use codes::{Close, ErrorCode};
