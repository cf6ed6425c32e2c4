//! How far a hook is behind, and its dead letters, as NATS says.

use std::{sync::Arc, time::Duration};

use super::{Hook, Parts, source::Source};
use crate::{
    subject::hook_consumer,
    taking::{Behind, behind, rooms_of, set_gauge},
    telemetry::metrics::Gauge,
};

/// Interval at which the gauges are updated.
const KEEP: Duration = Duration::from_secs(5);

/// Updates the gauges of a hook, forever.
pub(super) async fn keep(parts: Parts, hook: Arc<Hook>) {
    let Some(label) = hook.label else {
        return std::future::pending().await;
    };
    loop {
        match look(&parts, &hook).await {
            Ok((Behind { pending, lag }, dead)) => {
                set_gauge(Gauge::HookPending(label), pending);
                set_gauge(Gauge::HookLag(label), lag);
                set_gauge(Gauge::HookDeadLetters(label), dead);
            }
            Err(error) => tracing::debug!(%error, "the lag of a hook is not known"),
        }
        tokio::time::sleep(KEEP).await;
    }
}

async fn look(
    parts: &Parts,
    hook: &Hook,
) -> Result<(Behind, u64), Box<dyn std::error::Error + Send + Sync>> {
    let consumer = hook_consumer(hook.name());
    let mut streams = rooms_of(&parts.streams, &parts.config);
    let presence = Source::Presence;
    let filters = presence.filters(parts, hook).into_iter();
    streams.extend(
        filters
            .take(1)
            .map(|filter| (presence.stream(parts), filter)),
    );
    let wait = parts.config.nats.read_timeout;
    let behind = behind(&parts.connection, &parts.reader, wait, &streams, &consumer).await?;
    Ok((behind, parts.dead.count(hook.name()).await?))
}
