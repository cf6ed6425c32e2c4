//! How far a worker is behind, and its dead letters, as NATS says.

use std::{sync::Arc, time::Duration};

use super::{Parts, Worker};
use crate::{
    subject::worker_consumer,
    taking::{Behind, behind, rooms_of, set_gauge},
    telemetry::metrics::Gauge,
};

/// Interval at which the gauges are updated.
const KEEP: Duration = Duration::from_secs(5);

/// Updates the gauges of a worker, forever.
pub(super) async fn keep(parts: Parts, worker: Arc<Worker>) {
    let Some(label) = worker.label else {
        return std::future::pending().await;
    };
    loop {
        match look(&parts, &worker).await {
            Ok((Behind { pending, lag }, dead)) => {
                set_gauge(Gauge::WorkerPending(label), pending);
                set_gauge(Gauge::WorkerLag(label), lag);
                set_gauge(Gauge::WorkerDeadLetters(label), dead);
            }
            Err(error) => tracing::debug!(%error, "the lag of a worker is not known"),
        }
        tokio::time::sleep(KEEP).await;
    }
}

async fn look(
    parts: &Parts,
    worker: &Worker,
) -> Result<(Behind, u64), Box<dyn std::error::Error + Send + Sync>> {
    let consumer = worker_consumer(worker.name());
    let streams = rooms_of(&parts.streams, &parts.config);
    let wait = parts.config.nats.read_timeout;
    let behind = behind(&parts.connection, &parts.reader, wait, &streams, &consumer).await?;
    Ok((behind, parts.dead.count(worker.name()).await?))
}
