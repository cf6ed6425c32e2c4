//! natter: an edge messaging mesh on NATS.
//!
//! Dependencies point down only:
//!
//! ```text
//! cli                      roles and tools; the only place that exits or prints
//! edge                     accepts: sockets, requests
//! session                  one connection: frames, commands, outbox
//! room   presence          one hub a room: members, live + replay merge, fan-out; who is there
//! read_marker   history    who has read up to where, how much is new; what was said, in MongoDB and the streams
//! mesh                     NATS for operators: streams, accounts, mirrors, what is wrong with a deployment
//! auth   bus   store   servers   client   wire   http1   web
//! config   telemetry   runtime
//! model   protocol   subject
//! ```
//!
//! - Only `bus` and `mesh` (and `servers`, to see whether a server it started is ready) import async-nats.
//! - Only `store` (and `servers`, likewise) imports mongodb.
//! - Only `auth` imports jsonwebtoken.
//! - Only `subject` spells a subject, stream or header name.

pub mod auth;
pub mod bus;
pub mod cli;
pub mod client;
pub mod config;
pub mod edge;
pub mod history;
pub mod http1;
pub mod mesh;
pub mod model;
pub mod presence;
pub mod protocol;
pub mod read_marker;
pub mod room;
pub mod runtime;
pub mod servers;
pub mod session;
pub mod store;
pub mod subject;
pub mod telemetry;
pub mod web;
pub mod wire;

#[cfg(test)]
#[expect(unreachable_pub, reason = "the fuzzer's crate exports them")]
#[path = "../tests/fuzz/src/checks.rs"]
mod checks;
