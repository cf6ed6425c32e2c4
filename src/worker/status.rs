//! How far a worker is behind, and its dead letters, as NATS says.

use std::{sync::Arc, time::Duration};

use super::{Parts, Worker};
use crate::{
    bus::{consumer_state, stored_after},
    runtime::unix_ms,
    subject::{Subjects, rooms_stream, worker_consumer},
    telemetry::metrics::{Gauge, gauge, gauge_add},
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
            Ok((pending, lag, dead)) => {
                set(Gauge::WorkerPending(label), pending);
                set(Gauge::WorkerLag(label), lag);
                set(Gauge::WorkerDeadLetters(label), dead);
            }
            Err(error) => tracing::debug!(%error, "the lag of a worker is not known"),
        }
        tokio::time::sleep(KEEP).await;
    }
}

/// Messages that are not done, the age of the oldest of them in seconds, and dead letters.
async fn look(
    parts: &Parts,
    worker: &Worker,
) -> Result<(u64, u64, u64), Box<dyn std::error::Error + Send + Sync>> {
    let (mut pending, mut oldest) = (0, u64::MAX);
    let origin = parts.streams.origin();
    let subjects = Subjects::new(&parts.config.nats.prefix);
    let consumer = worker_consumer(worker.name());
    for part in 0..parts.streams.partitions() {
        let stream = rooms_stream(origin, part);
        let wait = parts.config.nats.read_timeout;
        let state = consumer_state(&parts.connection, &stream, &consumer, wait).await?;
        // None: it is about to be created.
        let Some(state) = state else { continue };
        let waiting = state.pending + state.ack_pending;
        pending += waiting;
        if waiting > 0 {
            // Of any room: the first message after what is done is not later than the first of this worker.
            let filter = subjects.captured(origin, part);
            let ts = stored_after(&parts.reader, &stream, &filter, state.floor).await?;
            oldest = oldest.min(ts.unwrap_or(u64::MAX));
        }
    }
    let lag = match oldest {
        u64::MAX => 0,
        oldest => unix_ms().saturating_sub(oldest) / 1000,
    };
    let dead = parts.dead.count(worker.name()).await?;
    Ok((pending, lag, dead))
}

/// Only [`keep`] changes these gauges.
fn set(which: Gauge, value: u64) {
    let value = i64::try_from(value).unwrap_or(i64::MAX);
    gauge_add(which, value - gauge(which));
}
