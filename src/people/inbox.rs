//! The rooms of a user, with what is new in them.
//!
//! Nothing is kept for it: the index names the rooms, the records say what they are, and the streams have the newest
//! messages and count what is unread. So it works without MongoDB, and costs nothing while nobody asks.

use std::{cmp::Reverse, collections::HashMap};

use futures_util::future::try_join_all;
use serde_json::Value;

use super::{
    index,
    known::People,
    record::{Record, is_on},
};
use crate::{
    auth::{Identity, Right},
    model::RoomId,
    protocol::{ErrorCode, InboxReply, Refused, RoomSummary},
    read_marker::{Latest, Markers, Unread},
};

/// Rooms on a page: the default, and the maximum.
const PAGE: usize = 50;
const MAX_PAGE: usize = 200;

/// Other members that a summary names.
const PEERS: usize = 10;

/// Characters of a message that a summary shows.
const TEXT: usize = 200;

/// A part of a user's rooms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InboxOf {
    after: Option<Order>,
    limit: usize,
    archived: bool,
}

/// Where a room stands in the list: pinned ones first, then the newest. Its text is the `after` of the next page.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Order {
    pinned: Reverse<bool>,
    active_at: Reverse<u64>,
    room: RoomId,
}

impl Order {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, '.');
        let pinned = match parts.next()? {
            "1" => true,
            "0" => false,
            _ => return None,
        };
        Some(Self {
            pinned: Reverse(pinned),
            active_at: Reverse(parts.next()?.parse().ok()?),
            room: RoomId::parse(parts.next()?).ok()?,
        })
    }
}

impl std::fmt::Display for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}.{}.{}",
            u8::from(self.pinned.0),
            self.active_at.0,
            self.room
        )
    }
}

impl InboxOf {
    /// The page after `after`, of those that are archived, or of the others.
    ///
    /// # Errors
    /// `bad_request`.
    pub fn new(after: Option<&str>, limit: Option<u64>, archived: bool) -> Result<Self, Refused> {
        let bad = |text: String| Refused::new(ErrorCode::BadRequest, text);
        let after = after.map(|text| {
            Order::parse(text).ok_or_else(|| bad("after is no next of an inbox".to_owned()))
        });
        let limit = match limit.map(usize::try_from) {
            None => PAGE,
            Some(Ok(limit @ 1..=MAX_PAGE)) => limit,
            Some(_) => return Err(bad(format!("limit must be 1 to {MAX_PAGE}"))),
        };
        Ok(Self {
            after: after.transpose()?,
            limit,
            archived,
        })
    }
}

/// The beginning of the text of a message, if it has one.
#[must_use]
pub fn preview(body: &[u8]) -> Option<String> {
    let text = match serde_json::from_slice(body).ok()? {
        Value::String(text) => text,
        Value::Object(mut fields) => match fields.remove("text")? {
            Value::String(text) => text,
            _ => return None,
        },
        _ => return None,
    };
    Some(text.chars().take(TEXT).collect())
}

/// A room of a user, before it is summarized.
struct Mine {
    entry: index::Entry,
    record: std::sync::Arc<Record>,
    latest: Option<Latest>,
    order: Order,
}

impl Mine {
    fn summary(&self, user: &str, markers: &Markers, unread: Unread) -> RoomSummary {
        let (room, latest) = (&self.order.room, self.latest.as_ref());
        let peers = self.record.present().map(|(name, _)| name);
        let peers = peers.filter(|name| *name != user).take(PEERS);
        let record = &self.record;
        RoomSummary {
            room: room.clone(),
            kind: Some(record.kind.as_str()),
            about: record.about.clone(),
            title: record.title(),
            info: record.info(),
            peers: peers.map(str::to_owned).collect(),
            head: latest.map(|latest| latest.head.clone()),
            last: latest.map(|latest| latest.last.clone()),
            unread: unread.count,
            capped: unread.capped,
            marker: markers.marker(room, user),
            muted: is_on(self.entry.muted.as_ref()),
            pinned: is_on(self.entry.pinned.as_ref()),
            archived: is_on(self.entry.archived.as_ref()),
            assignee: record.assignee(),
            alert: record.alert(),
        }
    }
}

impl People {
    /// A page of the user's rooms.
    ///
    /// # Errors
    /// `unavailable` if the index, the records, the streams or the markers can't be read.
    pub async fn inbox(
        &self,
        markers: &Markers,
        identity: &Identity,
        page: &InboxOf,
    ) -> Result<InboxReply, Refused> {
        let mut mine = self.mine(markers, identity).await?;
        mine.retain(|one| is_on(one.entry.archived.as_ref()) == page.archived);
        mine.sort_unstable_by(|a, b| a.order.cmp(&b.order));
        let start = page
            .after
            .as_ref()
            .map_or(0, |after| mine.partition_point(|one| one.order <= *after));
        let shown = &mine[start..mine.len().min(start + page.limit)];
        let more = start + shown.len() < mine.len();
        let next = shown
            .last()
            .filter(|_| more)
            .map(|one| one.order.to_string());
        let durable = shown.iter().filter(|one| one.latest.is_some());
        let user = &identity.user;
        let unread = markers
            .unread(user, durable.map(|one| &one.order.room))
            .await?;
        let rooms = shown.iter().map(|one| {
            let unread = unread.get(&one.order.room).copied().unwrap_or_default();
            one.summary(user, markers, unread)
        });
        Ok(InboxReply {
            rooms: rooms.collect(),
            next,
        })
    }

    /// Summaries of rooms of the user; without those that the user is not in. `false`: messages came while it was read,
    /// so the number of unread ones may be too high.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn summaries(
        &self,
        markers: &Markers,
        identity: &Identity,
        rooms: &[RoomId],
    ) -> Result<HashMap<RoomId, (RoomSummary, bool)>, Refused> {
        let user = &identity.user;
        let indexed = self.entries_of(user, rooms).await?;
        // For all sessions of the user, whose tokens may differ.
        let mine = self.look(markers, identity, indexed).await?;
        let durable: Vec<&RoomId> = mine
            .iter()
            .filter(|one| one.latest.is_some())
            .map(|one| &one.order.room)
            .collect();
        let unread = markers.unread(user, durable.iter().copied()).await?;
        let after = markers.latest(user, &durable, preview).await?;
        let summaries = mine.iter().map(|one| {
            let room = &one.order.room;
            let head = |latest: Option<&Latest>| latest.map(|latest| latest.head.clone());
            let is_exact = head(after.get(room)) == head(one.latest.as_ref());
            let unread = unread.get(room).copied().unwrap_or_default();
            (room.clone(), (one.summary(user, markers, unread), is_exact))
        });
        Ok(summaries.collect())
    }

    /// The rooms that the user is in and may read.
    async fn mine(&self, markers: &Markers, identity: &Identity) -> Result<Vec<Mine>, Refused> {
        let mut indexed = self.rooms_of(&identity.user).await?;
        indexed.retain(|(room, _)| identity.may(Right::Read, room));
        self.look(markers, identity, indexed).await
    }

    /// Looks at rooms of the user: those that the user is in.
    async fn look(
        &self,
        markers: &Markers,
        identity: &Identity,
        indexed: Vec<(RoomId, index::Entry)>,
    ) -> Result<Vec<Mine>, Refused> {
        let indexed: Vec<_> = indexed
            .into_iter()
            .filter(|(_, entry)| entry.is_in())
            .collect();
        let known = try_join_all(indexed.iter().map(|(room, _)| self.of(room))).await?;
        let durable: Vec<&RoomId> = indexed
            .iter()
            .map(|(room, _)| room)
            .filter(|room| {
                let namespace = self.config().namespaces.get(room.namespace());
                namespace.is_some_and(|its| its.durable)
            })
            .collect();
        let mut latest: HashMap<RoomId, Latest> =
            markers.latest(&identity.user, &durable, preview).await?;
        let mut mine = Vec::with_capacity(indexed.len());
        for ((room, entry), known) in indexed.into_iter().zip(known) {
            // The record is right where the index is behind.
            let removed = known.standing(self.config(), &room, |standing| {
                standing.removal(identity, &room).is_some()
            });
            let Some(record) = known.record().filter(|_| !removed) else {
                continue;
            };
            let latest = latest.remove(&room);
            let active_at = latest
                .as_ref()
                .map_or(record.made.created, |its| its.last.ts);
            let order = Order {
                pinned: Reverse(is_on(entry.pinned.as_ref())),
                active_at: Reverse(active_at),
                room,
            };
            mine.push(Mine {
                entry,
                record,
                latest,
                order,
            });
        }
        Ok(mine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_its_text() {
        let room = RoomId::parse("chat:a").unwrap();
        for text in ["1.1763600000123.chat:a", "0.0.chat:=2Ex"] {
            assert_eq!(Order::parse(text).unwrap().to_string(), text);
        }
        for text in ["", "2.1.chat:a", "1.x.chat:a", "1.1", "1.1.chat"] {
            assert_eq!(Order::parse(text), None, "{text}");
        }
        let order = |pinned, active_at| Order {
            pinned: Reverse(pinned),
            active_at: Reverse(active_at),
            room: room.clone(),
        };
        assert!(order(true, 1) < order(false, 9) && order(false, 9) < order(false, 8));
    }

    #[test]
    fn texts_are_shortened_at_characters() {
        assert_eq!(preview(br#"{"text":"hi"}"#).as_deref(), Some("hi"));
        assert_eq!(preview(br#""hi""#).as_deref(), Some("hi"));
        for body in [&b"1"[..], b"{}", br#"{"text":1}"#, b"{"] {
            assert_eq!(preview(body), None);
        }
        let long = format!("{{\"text\":\"{}\"}}", "한".repeat(300));
        assert_eq!(preview(long.as_bytes()).unwrap(), "한".repeat(200));
    }
}
