//! NATS for operators: the streams and accounts of a mesh, what is wrong with a deployment, mirrors after a cut.
//!
//! No message of a room passes through here. Tools and the start of a role come here, and the task that helps mirrors on.
//!
//! It names async-nats, as [`bus`](crate::bus) does, and for other connections than that: a tool's ends with its first failure
//! and is told what it was refused, and what is forwarded for a mirror is forwarded byte for byte.

mod accounts;
pub mod doctor;
mod instances;
pub mod mirrors;
pub mod provision;

pub use accounts::accounts;
pub use instances::{Instance, instances};
