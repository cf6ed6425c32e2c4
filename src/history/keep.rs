//! Removes messages from MongoDB that their namespace does not keep any longer (`history_keep`).
//!
//! Every instance does it, each at its own times: what one has removed the others do not find. Pages and searches leave
//! out what is too old, whether it has been removed or not.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Parts, worker::Backoff};
use crate::{
    runtime::{Phase, unix_ms},
    store::StoreError,
    telemetry::metrics::{Counter, count},
};

/// Longest pause between two passes; the shortest is half of it.
const EVERY: Duration = Duration::from_secs(600);

/// Removes what is too old, forever.
pub(super) async fn keep(parts: Parts) {
    if parts.config.kept_for_a_time().next().is_none()
        || parts.lifecycle.reached(Phase::Ready).await != Phase::Ready
    {
        return;
    }
    let mut pause = Backoff::default();
    loop {
        match pass(&parts).await {
            Ok(()) => {
                pause = Backoff::default();
                sleep(EVERY.mul_f64(rand::random_range(0.5..1.0))).await;
            }
            Err(error) => {
                parts
                    .figures
                    .failed(&error, "old messages wait to be removed");
                sleep(pause.next()).await;
            }
        }
    }
}

/// Removes what is too old now. It pauses as long as it works, so it uses at most half of the time.
async fn pass(parts: &Parts) -> Result<(), StoreError> {
    for (namespace, keep) in parts.config.kept_for_a_time() {
        let keep = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX);
        let before = unix_ms().saturating_sub(keep);
        let mut more = true;
        let mut removed = 0;
        while more {
            let begun = Instant::now();
            let now;
            (now, more) = parts.store.remove_before(namespace, before).await?;
            count(Counter::HistoryExpired, now);
            removed += now;
            sleep(begun.elapsed()).await;
        }
        parts.store.remove_stubs_before(namespace, before).await?;
        if removed > 0 {
            tracing::info!(
                namespace,
                removed,
                "messages older than `history_keep` were removed"
            );
        }
    }
    Ok(())
}
