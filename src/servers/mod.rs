//! nats-server and mongod as child processes: found or fetched, started, watched, stopped.
//!
//! For `natter up` and the integration tests; a deployment runs its own servers. Nothing here prints: progress is
//! reported to the caller.
//!
//! # Invariants
//! - A child never outlives this process, even if it is killed with SIGKILL: every child goes through `natter guard`.
//! - A handle that is dropped kills its process.
//! - A restarted server keeps its port and its data.

mod binaries;
mod mongod;
mod nats;
mod options;
mod port;
mod process;
mod relay;
mod spawner;
mod spine;
pub(crate) mod template;

pub use binaries::{Binaries, Sources};
pub use mongod::{Mongod, MongodOptions};
pub use nats::NatsServer;
pub use options::{NatsOptions, SpineLink};
pub use port::{free_port, free_port_from};
pub use process::{Check, CheckError, Launcher, Process, Spec, StartError};
pub use relay::{Cut, Relay};
pub use spine::{Spine, SpineFiles, Spines, joined};
