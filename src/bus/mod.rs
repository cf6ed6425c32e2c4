//! Everything that speaks to NATS.

pub mod provision;
