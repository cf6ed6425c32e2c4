//! Writes to NATS what [`super::local::Local`] says.

use std::{sync::Arc, time::Instant};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::time::{Duration, sleep, sleep_until};

use super::{Presence, local::Next, watch::value};
use crate::{
    bus::Put,
    telemetry::metrics::{Counter, count},
};

/// Writes waiting for their acknowledgement.
const IN_FLIGHT: usize = 256;

/// How often the connection is checked while it is down.
const AWAY: Duration = Duration::from_millis(100);

/// How long the marker of a removed key is kept if other regions mirror the bucket. They learn of the removal if a cut
/// is not longer than this.
pub(super) const REMOVED_FOR: Duration = Duration::from_secs(600);

/// Writes, forever.
pub(super) async fn run(presence: Arc<Presence>) {
    let mut writes = FuturesUnordered::new();
    loop {
        if !presence.bucket.connection().is_up() && writes.is_empty() {
            sleep(AWAY).await;
            continue;
        }
        let next = if writes.len() < IN_FLIGHT {
            presence.local.lock().next_write(Instant::now())
        } else {
            Next::Idle
        };
        let wait = match next {
            Next::Write(write) => {
                let bucket = presence.bucket.clone();
                let alone = presence.others().is_empty();
                writes.push(async move {
                    let key = write.place.key(&write.user, &write.lease);
                    let written = match &write.seen {
                        Some(seen) => bucket.put(&key, value(seen), Put::default()).await,
                        None if alone => bucket.remove(&key).await,
                        None => bucket.remove_for(&key, REMOVED_FOR).await,
                    };
                    (write, written)
                });
                continue;
            }
            Next::At(at) => Some(at),
            Next::Idle => None,
        };
        tokio::select! {
            Some((write, written)) = writes.next() => {
                count(Counter::PresenceWrites, 1);
                if let Err(error) = &written {
                    count(Counter::PresenceWriteFailed, 1);
                    tracing::debug!(%error, "who is in a room could not be written yet");
                }
                presence.local.lock().written(&write, written.is_ok(), Instant::now());
            }
            () = presence.changed.notified() => {}
            () = async {
                match wait {
                    Some(at) => sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            } => {}
        }
    }
}
