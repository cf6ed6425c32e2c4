//! Repairs the index of users by the room records.
//!
//! An edge writes a record, and then the index of those whom the change concerns. If it dies in between, the record says
//! who is in the room, and the index does not. So each service compares the two, for each record some seconds after it
//! has changed, and for all of them at its start and from time to time, and writes what is missing to the index of its
//! own region. Several services may do the same at once: what they write is merged, so it is written once.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::{Instant, sleep};

use super::{Parts, worker::Backoff};
use crate::{
    bus::KvError,
    model::RoomId,
    people::Sweep,
    protocol::Refused,
    telemetry::metrics::{Counter, count},
};

/// Pause between two looks for changes.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long an edge of the own region has for the index after it has written a record.
const SETTLED: Duration = Duration::from_secs(3);

/// The same for other regions, whose index comes over another mirror. It is repaired by their own services, unless they
/// are not running.
const SETTLED_ELSEWHERE: Duration = Duration::from_secs(30);

/// How often all records are compared again; the shortest pause is half of it.
const ALL_EVERY: Duration = Duration::from_secs(3600);

/// Rooms that are compared at once.
const AT_ONCE: usize = 200;

/// The index can't be compared, or not be written.
#[derive(Debug, thiserror::Error)]
enum RepairError {
    #[error(transparent)]
    Records(#[from] KvError),
    #[error("{0}")]
    Index(Refused),
}

/// Compares and repairs, forever. It needs no MongoDB.
pub(super) async fn keep(parts: Parts) {
    let mut sweep = Sweep::new(&parts.people);
    // When each room that has changed is to be compared.
    let mut due: BTreeMap<RoomId, Instant> = BTreeMap::new();
    let mut all_at = Instant::now();
    let mut pause = Backoff::default();
    let mut told = String::new();
    loop {
        let begun = Instant::now();
        if all_at <= begun {
            sweep.restart();
            all_at = begun + ALL_EVERY.mul_f64(rand::random_range(0.5..1.0));
        }
        match step(&parts, &mut sweep, &mut due).await {
            Ok(more) => {
                (pause, told) = (Backoff::default(), String::new());
                // It pauses as long as it works, so it uses at most half of the time.
                let busy = begun.elapsed();
                sleep(if more { busy } else { busy.max(LOOK_EVERY) }).await;
            }
            Err(error) => {
                let text = error.to_string();
                if text != told {
                    tracing::warn!(error = %text, "the index of users can't be repaired now");
                    told = text;
                }
                sleep(pause.next()).await;
            }
        }
    }
}

/// Takes up what has changed, and compares what is due. Returns whether there is more to do now.
async fn step(
    parts: &Parts,
    sweep: &mut Sweep,
    due: &mut BTreeMap<RoomId, Instant>,
) -> Result<bool, RepairError> {
    let mut more = false;
    let own = parts.streams.origin();
    for swept in sweep.next().await? {
        more |= swept.more;
        let settled = match swept.origin == *own {
            true => SETTLED,
            false => SETTLED_ELSEWHERE,
        };
        let now = Instant::now();
        for (room, age) in swept.rooms {
            due.insert(room, now + settled.saturating_sub(age));
        }
    }
    let mut failed = None;
    let now = Instant::now();
    let rooms = due.iter().filter(|(_, at)| **at <= now);
    let rooms: Vec<RoomId> = rooms.map(|(room, _)| room.clone()).collect();
    for rooms in rooms.chunks(AT_ONCE) {
        let keys: BTreeSet<RoomId> = rooms.iter().cloned().collect();
        let records = parts.people.records_of(&keys).await?;
        let repaired = match parts.people.repair_index(&records).await {
            Ok(repaired) => repaired,
            Err(refused) => {
                // The others are not to wait for these.
                let again = Instant::now() + SETTLED_ELSEWHERE;
                due.extend(rooms.iter().map(|room| (room.clone(), again)));
                failed = Some(RepairError::Index(refused));
                continue;
            }
        };
        if repaired > 0 {
            count(Counter::IndexRepaired, repaired);
            parts.figures.repaired(repaired);
            tracing::info!(repaired, "entries of the index of users were repaired");
        }
        for room in rooms {
            due.remove(room);
        }
    }
    failed.map_or(Ok(more), Err)
}
