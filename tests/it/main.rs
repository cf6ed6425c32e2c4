//! Tests against real servers, one binary.

#![expect(
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do, and tell progress"
)]

mod acks;
mod alone;
mod architecture;
mod centrifugal;
mod codes;
mod deploy;
mod directory;
mod docs;
mod doctor;
mod drain;
mod erase;
mod events;
mod frames;
mod frozen;
mod history;
mod hooks;
mod hostile;
mod http;
mod inbox;
mod lease;
mod limits;
mod line;
mod mesh_state;
mod online;
mod pages;
mod passes;
mod placement;
mod presence;
mod provision;
mod provision_mesh;
mod push;
mod read;
mod regions;
mod regions_up;
mod repeats;
mod replicas;
mod resume;
mod resync;
mod roam;
mod roaming;
mod rooms;
mod server_api;
mod servers;
mod shards;
mod slow;
mod stomp;
mod store;
mod storm;
mod support;
mod tokens;
mod tools;
mod transfer;
mod unread;
mod up;
mod uploads;
mod workers;
