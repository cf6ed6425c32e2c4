//! Removes single messages from the region's streams and mirrors: duplicates, and erased messages that were stored
//! again. Removals are recorded in MongoDB. Each region carries them out for itself, at once or when it can be reached
//! again.
//!
//! The unread count is made by the stream, so a message that pages do not show must not be in the stream either.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;

use super::Parts;
use crate::{
    bus::{Candidate, EraseError, Eraser, Streams},
    model::{Place, partition_of},
    runtime::{Phase, unix_ms},
    store::{Removal, StoreError},
    telemetry::metrics::{Counter, count},
};

/// Pause between two checks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Removals read at once. Removals that wait for a mirror that is cut off are among them.
const AT_ONCE: usize = 10_000;

/// Carries out recorded removals, forever.
pub(super) async fn keep(parts: Parts) {
    if parts.lifecycle.reached(Phase::Ready).await != Phase::Ready {
        return;
    }
    loop {
        if let Err(error) = look(&parts).await {
            tracing::debug!(%error, "what is to be taken out of the streams is not known");
        }
        sleep(LOOK_EVERY.mul_f64(rand::random_range(0.5..1.0))).await;
    }
}

async fn look(parts: &Parts) -> Result<(), StoreError> {
    let own = parts.streams.origin();
    for removal in parts.store.removals_of(own, AT_ONCE).await? {
        match take_out(parts, &removal).await {
            Ok(true) => {
                let regions = parts.streams.regions();
                parts.store.removed(&removal, own, &regions).await?;
            }
            // It is retried later.
            Ok(false) => {}
            Err(error) => {
                tracing::debug!(%error, place = %removal.place, "a message is not taken out yet");
            }
        }
    }
    Ok(())
}

/// Removes a message from its stream, or from this region's mirror of it. Returns whether nothing is left to do.
async fn take_out(parts: &Parts, removal: &Removal) -> Result<bool, EraseError> {
    let Removal { place, room, .. } = removal;
    let own = parts.streams.origin();
    let Some(streams) = parts.origins.get(&place.origin) else {
        // The origin is not mirrored here yet, or it has left the mesh.
        return Ok(!parts.streams.regions().contains(&place.origin));
    };
    let part = partition_of(room, streams.partitions());
    let mut state = streams.known(part);
    if state.epoch != place.epoch || state.last_seq < place.seq {
        state = streams.fetch(part).await?;
    }
    if state.epoch != place.epoch {
        return Ok(true);
    }
    if state.last_seq < place.seq {
        // For a mirror: it has not received the message yet.
        return Ok(place.origin == *own);
    }
    if let Some(first) = &removal.first {
        if first.origin != place.origin && unix_ms().saturating_sub(place.ts) < window(parts) {
            // A member who has only seen this copy may resume with a cursor that names it. Within this time rooms
            // recognise both copies.
            return Ok(false);
        }
        match has_first(parts, removal, first).await? {
            Some(true) => {}
            // This copy is all that is left of the message.
            Some(false) => return Ok(true),
            None => return Ok(false),
        }
    }
    let is_meant = |one: &Candidate| removal.means(&one.key());
    let eraser = eraser(parts, streams);
    if eraser.remove_one(room, place.seq, is_meant).await? && place.origin == *own {
        count(Counter::HistoryRemoved, 1);
    }
    Ok(true)
}

/// How far rooms look back for duplicates when they open, in ms.
fn window(parts: &Parts) -> u64 {
    let window = parts.config.streams.duplicate_window.as_millis();
    u64::try_from(window).unwrap_or(u64::MAX)
}

/// Whether the first copy of a duplicate is stored at `first`, or was stored there and has been trimmed. It is `false`
/// if the first copy's stream has lost its end or was re-created: then members who were away must get the duplicate.
/// `None` if it can't be decided yet.
async fn has_first(
    parts: &Parts,
    removal: &Removal,
    first: &Place,
) -> Result<Option<bool>, EraseError> {
    let Some(streams) = parts.origins.get(&first.origin) else {
        let named = parts.streams.regions().contains(&first.origin);
        return Ok((!named).then_some(false));
    };
    let part = partition_of(&removal.room, streams.partitions());
    let state = streams.fetch(part).await?;
    if state.epoch != first.epoch {
        return Ok(Some(false));
    }
    if first.seq < state.first_seq {
        return Ok(Some(true));
    }
    if first.seq > state.last_seq && first.origin != *parts.streams.origin() {
        // The mirror has not received it yet.
        return Ok(None);
    }
    let found = eraser(parts, streams).at(&removal.room, first.seq).await?;
    Ok(Some(found.is_some_and(|found| removal.means(&found.key()))))
}

fn eraser(parts: &Parts, streams: Arc<Streams>) -> Eraser {
    Eraser::new(
        parts.connection.clone(),
        parts.reader.clone(),
        streams,
        &parts.config.nats,
    )
}
