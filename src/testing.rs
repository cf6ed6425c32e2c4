//! What the tests and benchmarks beside the crate use of its inside. Not an interface: it changes with what it shows.
//!
//! Name by name, so that the compiler still reports what nobody uses. Each module is that of the same name.

pub mod auth {
    pub use crate::auth::{Block, Claims, Grant, MAX_TOKEN, Revocation, Right, issue};
}

pub mod bus {
    pub use crate::bus::{
        Bucket, Connection, Entry, Line, LineError, Origins, Publisher, Put, Reader, Stored,
        StreamState, Streams, consumer_state, message_key,
    };
}

pub mod client {
    pub use crate::client::{
        Backoff, CallError, Commands, ConnectError, Connection, Draft, Endpoint, Event, Frame,
        PublishError, Room, Silence, Stop, Target, Token,
    };
}

pub mod codec {
    pub use crate::codec::Codec;
}

pub mod config {
    pub use crate::config::{Config, DEFAULT_TOML, Secret};
}

pub mod edge {
    pub use crate::edge::{Edge, openapi_json};
}

pub mod history {
    pub use crate::history::{
        At, PageAnchor, PageAnswer, PageRequest, Pages, Status, entry, status,
    };
}

pub mod mesh {
    pub use crate::mesh::accounts;

    pub mod doctor {
        pub use crate::mesh::doctor::{Check, Examination, Finding, Level, examine};
    }

    pub mod mirrors {
        pub use crate::mesh::mirrors::{NudgeError, keep, nudge};
    }

    pub mod provision {
        pub use crate::mesh::provision::{
            Action, Options, Outcome, Provisioned, Verdict, connect, ping, provision,
            provision_mesh, remove_region,
        };
    }
}

pub mod model {
    /// For the checks of the fuzzer.
    pub use crate::model::Flaw;
    pub use crate::model::{
        Class, Cursor, Epoch, Fingerprint, MAX_REGIONS, MAX_USER, Place, Position, Region, RoomId,
        RoomScope, partition_of,
    };
}

pub mod presence {
    pub use crate::presence::{Online, Turned};
}

pub mod protocol {
    pub use crate::protocol::{Close, ErrorCode, HistoryOf, PageOf, Wants};
}

pub mod read_marker {
    pub use crate::read_marker::Markers;
}

pub mod room {
    pub use crate::room::{JoinError, NewMember, Rooms};
}

pub mod runtime {
    pub use crate::runtime::{Phase, Tasks, unix_ms, unix_s};
}

pub mod servers {
    pub use crate::servers::{
        Binaries, Check, Cut, Launcher, Mongod, MongodOptions, NatsOptions, NatsServer, Process,
        Relay, Sources, Spec, Spine, SpineFiles, SpineLink, Spines, StartError, free_port,
        free_port_from, joined,
    };
}

pub mod store {
    pub use crate::store::{
        Annotation, Change, Claim, Document, End, Entry, Erased, Erasure, Folded, MAX_QUERY,
        Migrated, Reaction, RefusedEntry, Removal, Replies, Said, Search, Slot, Span, Store,
        StoreError, Upload, UploadState, Verdict, What,
    };
}

pub mod subject {
    pub use crate::subject::{
        ControlKey, EPOCH_METADATA, HISTORY_CONSUMER, REGIONS_METADATA, Subjects, bucket,
        bucket_name, bucket_stream, direct_get, header, marker_key, presence_keys,
        presence_keys_of, rooms_stream, worker_consumer,
    };

    pub mod api {
        pub use crate::subject::api::{
            CONSUMER_ANSWERS, CONSUMER_REQUESTS, INFO, PING_SERVERS, in_domain, stream_create,
            stream_info,
        };
    }
}

pub mod telemetry {
    pub mod metrics {
        pub use crate::telemetry::metrics::{
            Counter, Gauge, Histogram, Label, MarkerWrite, Op, SocketCall, counted,
        };
    }
}

pub mod wire {
    pub use crate::wire::{Conn, ConnSettings, MAX_FRAGMENTS, Outlet};
}
