//! What the targets fuzz: natter's own files, in the modules in which natter has them.

#![allow(dead_code, reason = "not each item of these files is fuzzed")]

#[path = "../../../src/model/mod.rs"]
pub mod model;
#[path = "../../../src/protocol/mod.rs"]
pub mod protocol;
#[path = "../../../src/codec/mod.rs"]
pub mod codec;
#[path = "../../../src/subject.rs"]
pub mod subject;
pub mod bus;
pub mod checks;
pub mod wire;
