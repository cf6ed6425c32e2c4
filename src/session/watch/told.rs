//! What a client was told of rooms, in few bytes: enough to see whether what is stored has changed since.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use crate::{model::RoomId, protocol::RoomSummary};

/// Rooms of which that is kept. Of more it is not known what was told.
const MAX_ROOMS: usize = 512;

/// The rooms and what was told of each, both as 32 bits of a hash, ordered. Two rooms that share a number are told again
/// when they are compared.
#[derive(Debug, Default)]
pub(super) struct Told(Vec<(u32, u32)>);

#[expect(clippy::cast_possible_truncation, reason = "32 bits suffice")]
fn hash(bytes: &[u8]) -> u32 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish() as u32
}

/// The JSON of a summary.
pub(super) fn json(summary: &RoomSummary) -> Vec<u8> {
    serde_json::to_vec(summary).unwrap_or_default()
}

/// What is stored of a summary with this JSON: the newest message of an ephemeral room is not.
fn of(summary: &RoomSummary, its: &[u8]) -> u32 {
    match (&summary.head, &summary.last) {
        (None, Some(_)) => hash(&json(&RoomSummary {
            last: None,
            ..summary.clone()
        })),
        _ => hash(its),
    }
}

impl Told {
    fn find(&self, room: &RoomId) -> Result<usize, (usize, u32)> {
        let number = hash(room.as_str().as_bytes());
        let at = self.0.binary_search_by_key(&number, |(room, _)| *room);
        at.map_err(|at| (at, number))
    }

    /// Whether the client knows of a room.
    pub(super) fn has(&self, room: &RoomId) -> bool {
        self.find(room).is_ok()
    }

    /// Whether the client was told this; `None`: nothing is known.
    pub(super) fn is_told(&self, summary: &RoomSummary) -> Option<bool> {
        let at = self.find(&summary.room).ok()?;
        Some(self.0[at].1 == of(summary, &json(summary)))
    }

    /// The client is told a summary, whose JSON is `its`.
    pub(super) fn tell(&mut self, summary: &RoomSummary, its: &[u8]) {
        let now = of(summary, its);
        match self.find(&summary.room) {
            Ok(at) => self.0[at].1 = now,
            Err((at, number)) if self.0.len() < MAX_ROOMS => self.0.insert(at, (number, now)),
            Err(_) => {}
        }
    }

    /// The client is told that a room is gone.
    pub(super) fn forget(&mut self, room: &RoomId) {
        if let Ok(at) = self.find(room) {
            self.0.remove(at);
        }
    }

    /// Forgets all rooms but these.
    pub(super) fn keep<'r>(&mut self, rooms: impl Iterator<Item = &'r RoomId>) {
        let mut kept: Vec<(u32, u32)> = rooms
            .filter_map(|room| Some(self.0[self.find(room).ok()?]))
            .collect();
        kept.sort_unstable();
        kept.dedup();
        self.0 = kept;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(room: &str, head: u64) -> RoomSummary {
        RoomSummary {
            room: RoomId::parse(room).unwrap(),
            ..super::super::active::tests::summary(head, 0)
        }
    }

    #[test]
    fn what_differs_from_what_was_told_shows() {
        let mut told = Told::default();
        let [a, b] = [summary("chat:a", 3), summary("chat:b", 3)];
        assert_eq!(told.is_told(&a), None);
        for one in [&a, &b, &a] {
            told.tell(one, &json(one));
        }
        assert_eq!((told.0.len(), told.has(&a.room)), (2, true));
        assert_eq!(told.is_told(&a), Some(true));
        assert_eq!(told.is_told(&summary("chat:a", 4)), Some(false));
        told.keep([&b.room].into_iter());
        assert_eq!((told.is_told(&a), told.is_told(&b)), (None, Some(true)));
        told.forget(&b.room);
        assert_eq!(told.is_told(&b), None);
        for number in 0..2 * MAX_ROOMS {
            let one = summary(&format!("chat:{number}"), 1);
            told.tell(&one, &json(&one));
        }
        assert_eq!(told.0.len(), MAX_ROOMS);
        assert!(told.0.is_sorted());
    }

    #[test]
    fn the_newest_message_of_an_ephemeral_room_is_not_stored() {
        let stored = RoomSummary {
            head: None,
            ..summary("chat:a", 0)
        };
        let mut shown = stored.clone();
        shown.last = Some(crate::protocol::LastMessage {
            id: "1".to_owned(),
            from: "lee".to_owned(),
            ts: 1,
            text: None,
        });
        let mut told = Told::default();
        told.tell(&shown, &json(&shown));
        assert_eq!(told.is_told(&stored), Some(true));
    }
}
