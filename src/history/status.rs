//! How far history lags behind. It is read from NATS alone, so that it is known while no worker runs.

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
    subject::{HISTORY_CONSUMER, HISTORY_SERVICE, Subjects, rooms_stream},
    telemetry::metrics::{Gauge, gauge, gauge_add},
};

/// Interval at which the gauges are updated.
const KEEP: Duration = Duration::from_secs(5);

/// How long to wait for the answers of the instances.
const INSTANCES_WITHIN: Duration = Duration::from_millis(500);

/// The progress of a region's history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Messages not yet acknowledged, i.e. not certainly in MongoDB.
    pub lag_messages: u64,
    /// Age of the oldest of them.
    pub lag_seconds: u64,
    /// Messages in the dead-letter stream.
    pub dead_letters: u64,
    /// Each partition.
    pub partitions: Vec<PartStatus>,
}

/// The report of a running instance of the service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InstanceStatus {
    /// Its id, as `nats micro ls` shows it.
    pub id: String,
    /// What it has written and answered.
    pub figures: serde_json::Value,
}

/// The progress of a partition's history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PartStatus {
    pub stream: String,
    /// Whether a worker has ever opened its consumer.
    pub consumer: bool,
    /// Messages not yet delivered to a worker.
    pub pending: u64,
    /// Messages delivered and not acknowledged.
    pub ack_pending: u64,
    /// Every message up to this sequence is acknowledged.
    pub ack_floor: u64,
    /// Age of the oldest message that is not acknowledged.
    pub lag_seconds: u64,
}

/// The status is not known.
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

/// Reads the status from NATS.
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
        let wait = config.nats.read_timeout;
        let state = consumer_state(connection, &stream, HISTORY_CONSUMER, wait).await?;
        let filter = subjects.captured(&origin, part);
        let floor = state.map_or(0, |state| state.floor);
        let consumer = state.is_some();
        let state = match state {
            Some(state) => state,
            None => ConsumerState {
                pending: count_after(reader, &stream, &filter, 0).await?,
                ack_pending: 0,
                floor: 0,
                delivered: 0,
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
    let dead = DeadLetters::of_history(connection.clone(), reader.clone(), config);
    let sum = |part: &PartStatus| part.pending + part.ack_pending;
    Ok(Status {
        lag_messages: partitions.iter().map(sum).sum(),
        lag_seconds: partitions
            .iter()
            .map(|part| part.lag_seconds)
            .max()
            .unwrap_or_default(),
        dead_letters: dead.count("*").await?,
        partitions,
    })
}

/// Asks the running instances. Those that do not answer in time are left out.
pub async fn instances(connection: &Connection) -> Vec<InstanceStatus> {
    let found = mesh::instances(connection, HISTORY_SERVICE, INSTANCES_WITHIN).await;
    let of = |instance: Instance| InstanceStatus {
        figures: instance.figures().cloned().unwrap_or_default(),
        id: instance.id,
    };
    found.into_iter().map(of).collect()
}

/// Updates the gauges, forever.
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

/// Only [`keep`] changes these gauges.
fn set(which: Gauge, value: u64) {
    let value = i64::try_from(value).unwrap_or(i64::MAX);
    gauge_add(which, value - gauge(which));
}
