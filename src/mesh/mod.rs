//! NATS for operators: the streams and accounts of a mesh, the examination of a deployment, and mirrors after a cut.
//!
//! No message of a room passes through this module. It is used by tools, at the start of a role, and by the task that
//! restarts stalled mirrors.
//!
//! Like [`bus`](crate::bus) it uses async-nats, but for other connections: a tool's connection ends with the first
//! failure and reports what was denied, and the requests of mirrors are forwarded byte for byte.

mod accounts;
pub mod doctor;
mod instances;
pub mod mirrors;
pub mod provision;

pub use accounts::accounts;
pub use instances::{Instance, instances};
