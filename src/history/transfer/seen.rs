//! Which messages of an import are already in the streams.

use std::collections::{BTreeSet, HashMap, HashSet};

use sha2::{Digest as _, Sha256};

use super::{Deployment, TransferError};
use crate::{
    bus::{Eraser, Scan},
    model::{RoomId, partition_of},
};

/// Rooms of a partition that are read one by one. If an import has more, the whole partition is read.
const FEW_ROOMS: usize = 64;

/// Half of the SHA-256 of a message's key. With 10 million messages on each side, one in 10^24 imports would take a new
/// message for an existing one.
pub(super) type KeyHash = [u8; 16];

/// The hash of a key, `<room>/<user>/<id>`.
pub(super) fn hash(key: &str) -> KeyHash {
    let digest = Sha256::digest(key);
    let mut half = [0; 16];
    half.iter_mut()
        .zip(digest)
        .for_each(|(to, from)| *to = from);
    half
}

/// The messages of an import, by hash, with the number of the first line of each.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub(super) lines: HashMap<KeyHash, u64>,
    pub(super) rooms: BTreeSet<RoomId>,
}

/// Those of the wanted messages that a stream of any origin has.
pub(super) async fn in_streams(
    deployment: &Deployment,
    wanted: &Wanted,
) -> Result<HashSet<KeyHash>, TransferError> {
    let mut there = HashSet::new();
    for streams in deployment.origins.all() {
        let partitions = streams.partitions();
        let reader = Eraser::new(
            deployment.connection.clone(),
            deployment.reader.clone(),
            streams,
            &deployment.config.nats,
        );
        let mut by_part: HashMap<u16, Vec<&RoomId>> = HashMap::new();
        for room in &wanted.rooms {
            let part = partition_of(room, partitions);
            by_part.entry(part).or_default().push(room);
        }
        for (part, rooms) in by_part {
            let mut scans: Vec<Scan> = Vec::new();
            if rooms.len() > FEW_ROOMS {
                scans.push(reader.scan(part).await?);
            } else {
                for room in rooms {
                    scans.push(reader.scan_room(room).await?);
                }
            }
            for mut scan in scans {
                while let Some(found) = reader.candidates(&mut scan).await? {
                    let found = found.iter().map(|one| hash(&one.key()));
                    there.extend(found.filter(|hash| wanted.lines.contains_key(hash)));
                }
            }
        }
    }
    Ok(there)
}
