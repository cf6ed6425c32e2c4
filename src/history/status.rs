//! How far history is behind: asked of NATS alone, so that it can be told while no worker runs.

use std::time::Duration;

use serde::Serialize;

use super::Parts;
use crate::{
    bus::{
        Connection, ConsumerState, DeadLetters, PullError, ReadError, Reader, StreamError,
        consumer_state, count_after, stored_after,
    },
    config::Config,
    mesh::{self, Instance},
    runtime::unix_ms,
    subject::{HISTORY_SERVICE, Subjects, rooms_stream},
    telemetry::metrics::{Gauge, gauge, gauge_add},
};

/// How often the gauges are brought up to date.
const KEEP: Duration = Duration::from_secs(5);

/// How long the instances may take to answer.
const INSTANCES_WITHIN: Duration = Duration::from_millis(500);

/// How far a region's history is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Messages that are not confirmed to be in MongoDB.
    pub lag_messages: u64,
    /// Age of the oldest of them.
    pub lag_seconds: u64,
    /// Messages in the dead-letter stream.
    pub dead_letters: u64,
    /// Each partition.
    pub partitions: Vec<PartStatus>,
}

/// What a running instance of the service says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InstanceStatus {
    /// Its id, as `nats micro ls` shows it.
    pub id: String,
    /// What it has written and answered.
    pub figures: serde_json::Value,
}

/// How far a partition's history is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PartStatus {
    /// The stream.
    pub stream: String,
    /// Whether a worker has ever been there.
    pub consumer: bool,
    /// Messages that no worker was given yet.
    pub pending: u64,
    /// Messages that workers have and did not confirm.
    pub ack_pending: u64,
    /// Everything up to this sequence is in MongoDB.
    pub ack_floor: u64,
    /// Age of the oldest message that is not.
    pub lag_seconds: u64,
}

/// The status can't be known.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// A consumer's state is not known.
    #[error(transparent)]
    Consumer(#[from] PullError),
    /// A stream can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A stream's state is not known.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// Asks NATS.
///
/// # Errors
/// [`StatusError`].
pub async fn status(
    connection: &Connection,
    reader: &Reader,
    config: &Config,
) -> Result<Status, StatusError> {
    let subjects = Subjects::new(&config.nats.prefix);
    let origin = config.region();
    let mut partitions = Vec::new();
    for part in 0..config.nats.partitions {
        let stream = rooms_stream(&origin, part);
        let state = consumer_state(connection, &stream, config.nats.read_timeout).await?;
        let filter = subjects.captured(&origin, part);
        let floor = state.map_or(0, |state| state.floor);
        let consumer = state.is_some();
        let state = match state {
            Some(state) => state,
            None => ConsumerState {
                pending: count_after(reader, &stream, &filter, 0).await?,
                ack_pending: 0,
                floor: 0,
            },
        };
        let oldest = if state.pending + state.ack_pending > 0 {
            stored_after(reader, &stream, &filter, floor).await?
        } else {
            None
        };
        partitions.push(PartStatus {
            stream,
            consumer,
            pending: state.pending,
            ack_pending: state.ack_pending,
            ack_floor: floor,
            lag_seconds: oldest.map_or(0, |ts| unix_ms().saturating_sub(ts) / 1000),
        });
    }
    let dead = DeadLetters::new(connection.clone(), reader.clone(), config);
    let sum = |part: &PartStatus| part.pending + part.ack_pending;
    Ok(Status {
        lag_messages: partitions.iter().map(sum).sum(),
        lag_seconds: partitions
            .iter()
            .map(|part| part.lag_seconds)
            .max()
            .unwrap_or_default(),
        dead_letters: dead.count().await?,
        partitions,
    })
}

/// Asks the running instances; those that don't answer soon are not among them.
pub async fn instances(connection: &Connection) -> Vec<InstanceStatus> {
    let found = mesh::instances(connection, HISTORY_SERVICE, INSTANCES_WITHIN).await;
    let of = |instance: Instance| InstanceStatus {
        figures: instance.figures().cloned().unwrap_or_default(),
        id: instance.id,
    };
    found.into_iter().map(of).collect()
}

/// Keeps the gauges up to date, for ever.
pub(super) async fn keep(parts: Parts) {
    loop {
        match status(&parts.connection, &parts.reader, &parts.config).await {
            Ok(status) => {
                set(Gauge::HistoryPending, status.lag_messages);
                set(Gauge::HistoryLag, status.lag_seconds);
                set(Gauge::HistoryDeadLetters, status.dead_letters);
            }
            Err(error) => tracing::debug!(%error, "the lag is not known"),
        }
        match parts.store.erasures_running().await {
            Ok(erasures) => parts.figures.erasing(erasures),
            Err(error) => tracing::debug!(%error, "erasures under way are not known"),
        }
        tokio::time::sleep(KEEP).await;
    }
}

/// Only [`keep`] moves these gauges.
fn set(which: Gauge, value: u64) {
    let value = i64::try_from(value).unwrap_or(i64::MAX);
    gauge_add(which, value - gauge(which));
}
