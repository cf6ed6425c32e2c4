//! natter: an edge messaging mesh on NATS.
//!
//! Dependencies point down only:
//!
//! ```text
//! cli                      roles and tools; the only place that exits or prints
//! edge   worker   hook   notifier   accepts: sockets, requests; asks receivers; tells receivers of events; notifies users
//! session                  one connection: frames, commands, outbox
//! room   presence          one hub a room: members, live + replay merge, fan-out; who is there
//! taking                   processes that take what was stored to receivers
//! history                  what was said, in MongoDB and the streams; the directory of rooms
//! people                   room records: members, settings, and what they allow
//! read_marker              who has read up to where, how much is new
//! codec                    how client protocols spell the words of `protocol`
//! mesh                     NATS for operators: streams, accounts, mirrors, what is wrong with a deployment
//! auth   bus   store   servers   client   wire   http1   web   uploads   outbound
//! config   telemetry   runtime
//! model   protocol   subject
//! ```
//!
//! - Only `bus` and `mesh` (and `servers`, to see whether a server it started is ready) import async-nats.
//! - Only `store` (and `servers`, likewise) imports mongodb.
//! - Only `auth` imports jsonwebtoken.
//! - Only `subject` spells a subject, stream or header name.
//!
//! All of it is private but the entry of the program, and [`testing`] for the tests and benchmarks: so the compiler sees what
//! nobody uses. `pub` inside a module says that another module uses it.

mod auth;
mod bus;
mod cli;
mod client;
mod codec;
mod config;
mod edge;
mod history;
mod hook;
mod http1;
mod mesh;
mod model;
mod notifier;
mod outbound;
mod people;
mod presence;
mod protocol;
mod read_marker;
mod room;
mod runtime;
mod servers;
mod session;
mod store;
mod subject;
mod taking;
mod telemetry;
pub mod testing;
mod uploads;
mod web;
mod wire;
mod worker;

pub use cli::main;

#[cfg(test)]
#[path = "../tests/fuzz/src/checks.rs"]
mod checks;
