//! The rooms of a user, with what is new in them.
//!
//! Nothing is kept for it: the index names the rooms, the records say what they are, and the streams have the newest
//! messages and count what is unread. So it works without MongoDB, and costs nothing while nobody asks.

use std::{cmp::Reverse, collections::HashMap, sync::Arc};

use futures_util::future::try_join_all;
use serde_json::Value;

use super::{
    index,
    known::People,
    record::{Record, is_on},
};
use crate::{
    auth::{Identity, Right},
    bus,
    model::{Class, RoomId},
    protocol::{ErrorCode, InboxReply, Refused, RoomSummary},
    read_marker::{Counted, Latest, Markers, Unread},
    runtime::unix_ms,
};

/// Rooms on a page: the default, and the maximum.
const PAGE: usize = 50;
const MAX_PAGE: usize = 200;

/// Bytes of the rooms on a page, if there are several.
const PAGE_BYTES: usize = 256 * 1024;

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
        Ok(Self {
            after: after.transpose()?,
            limit: page_limit(limit)?,
            archived,
        })
    }
}

/// How many rooms are on a page.
///
/// # Errors
/// `bad_request`.
pub fn page_limit(limit: Option<u64>) -> Result<usize, Refused> {
    match limit.map(usize::try_from) {
        None => Ok(PAGE),
        Some(Ok(limit @ 1..=MAX_PAGE)) => Ok(limit),
        Some(_) => {
            let text = format!("limit must be 1 to {MAX_PAGE}");
            Err(Refused::new(ErrorCode::BadRequest, text))
        }
    }
}

/// How many of the first summaries fit on a page; at least one.
#[must_use]
pub fn fitting(summaries: &[RoomSummary]) -> usize {
    let mut bytes = 0;
    let fits = |summary: &&RoomSummary| {
        bytes += serde_json::to_vec(summary).map_or(0, |json| json.len());
        bytes <= PAGE_BYTES
    };
    let fitting = summaries.iter().take_while(fits).count();
    fitting.max(1)
}

/// The text of a message, if it has one.
#[must_use]
pub fn text_of(body: &[u8]) -> Option<String> {
    match serde_json::from_slice(body).ok()? {
        Value::String(text) => Some(text),
        Value::Object(mut fields) => match fields.remove("text")? {
            Value::String(text) => Some(text),
            _ => None,
        },
        _ => None,
    }
}

/// The beginning of the text of a message, if it has one.
#[must_use]
pub fn preview(body: &[u8]) -> Option<String> {
    let mut text = text_of(body)?;
    if let Some((end, _)) = text.char_indices().nth(TEXT) {
        text.truncate(end);
    }
    Some(text)
}

/// What a summary shows of a message.
pub(super) fn shown(record: &bus::Record) -> (Option<String>, Option<u64>) {
    (preview(&record.body), Some(0))
}

/// A room, before it is summarized for a user.
pub(super) struct Seen {
    pub(super) room: RoomId,
    /// The user's entry of it; empty if the user is not in it.
    pub(super) entry: index::Entry,
    pub(super) record: Option<Arc<Record>>,
    /// Its newest message, if it is durable and has one.
    pub(super) latest: Option<Latest>,
}

impl Seen {
    /// `unread`: `None` if the user has not read there, and it was not counted.
    pub(super) fn summary(&self, user: &str, unread: Option<Unread>) -> RoomSummary {
        let (room, latest, record) = (&self.room, self.latest.as_ref(), self.record.as_deref());
        let peers = record.into_iter().flat_map(Record::present);
        let peers = peers
            .map(|(name, _)| name)
            .filter(|name| *name != user)
            .take(PEERS);
        RoomSummary {
            room: room.clone(),
            kind: record.map(|record| record.kind.as_str()),
            about: record.and_then(|record| record.about.clone()),
            title: record.and_then(Record::title),
            info: record.and_then(Record::info),
            peers: peers.map(str::to_owned).collect(),
            head: latest.map(|latest| latest.head.clone()),
            last: latest.map(|latest| latest.last.clone()),
            unread: unread.as_ref().map(|unread| unread.count),
            capped: unread.as_ref().is_some_and(|unread| unread.capped),
            mentions: unread.as_ref().and_then(|unread| unread.mentions),
            marker: unread.and_then(|unread| unread.marker),
            muted: is_on(self.entry.muted.as_ref()),
            pinned: is_on(self.entry.pinned.as_ref()),
            archived: is_on(self.entry.archived.as_ref()),
            assignee: record.and_then(Record::assignee),
            alert: record.and_then(Record::alert),
        }
    }

    fn order(&self) -> Order {
        let made = || self.record.as_ref().map_or(0, |record| record.made.created);
        Order {
            pinned: Reverse(is_on(self.entry.pinned.as_ref())),
            active_at: Reverse(self.latest.as_ref().map_or_else(made, |its| its.last.ts)),
            room: self.room.clone(),
        }
    }
}

/// Which rooms are summarized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// Those that the user is in.
    Mine,
    /// All that the user may read.
    Readable,
}

/// No unread messages.
const NOTHING: Unread = Unread {
    count: 0,
    capped: false,
    mentions: Some(0),
    marker: None,
};

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
        let mut indexed = self.rooms_of(&identity.user).await?;
        indexed.retain(|(room, entry)| {
            identity.may(Right::Read, room) && is_on(entry.archived.as_ref()) == page.archived
        });
        let mine = self.look(markers, identity, indexed, Whose::Mine).await?;
        let mut mine: Vec<(Order, Seen)> = mine.into_iter().map(|one| (one.order(), one)).collect();
        mine.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        let start = page
            .after
            .as_ref()
            .map_or(0, |after| mine.partition_point(|(order, _)| order <= after));
        let shown = &mine[start..mine.len().min(start + page.limit)];
        let rooms = shown.iter().map(|(_, one)| one);
        let mut rooms = self.summarize(markers, &identity.user, rooms).await?;
        rooms.truncate(fitting(&rooms));
        let end = start + rooms.len();
        let next = mine[start..end].last().filter(|_| end < mine.len());
        Ok(InboxReply {
            rooms,
            next: next.map(|(order, _)| order.to_string()),
        })
    }

    /// Summaries of rooms; without those that the user is not in, or may not read. `false`: messages came while it was
    /// read, so the number of unread ones may be too high.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn summaries(
        &self,
        markers: &Markers,
        identity: &Identity,
        rooms: &[RoomId],
        whose: Whose,
    ) -> Result<HashMap<RoomId, (RoomSummary, bool)>, Refused> {
        let user = &identity.user;
        let mut indexed = self.entries_of(user, rooms).await?;
        if whose == Whose::Readable {
            let mut entries: HashMap<RoomId, index::Entry> = indexed.into_iter().collect();
            let all = rooms.iter().map(|room| {
                let entry = entries.remove(room).unwrap_or_default();
                (room.clone(), entry)
            });
            indexed = all.collect();
        }
        let seen = self.look(markers, identity, indexed, whose).await?;
        let summaries = self.summarize(markers, user, seen.iter()).await?;
        let durable: Vec<&RoomId> = seen
            .iter()
            .filter(|one| one.latest.is_some())
            .map(|one| &one.room)
            .collect();
        let after = markers.latest(user, &durable, Class::Msg, &shown).await?;
        let summaries = summaries.into_iter().map(|summary| {
            let head = after.get(&summary.room).map(|latest| &latest.head);
            let is_exact = head == summary.head.as_ref();
            (summary.room.clone(), (summary, is_exact))
        });
        Ok(summaries.collect())
    }

    async fn summarize<'s>(
        &self,
        markers: &Markers,
        user: &str,
        rooms: impl Iterator<Item = &'s Seen> + Clone + Send,
    ) -> Result<Vec<RoomSummary>, Refused> {
        let durable: Vec<&RoomId> = rooms
            .clone()
            .filter(|one| one.latest.is_some())
            .map(|one| &one.room)
            .collect();
        let unread = markers.unread(user, durable, Counted::Mentions).await?;
        let rooms = rooms.map(|one| {
            let unread = unread.get(&one.room).cloned().unwrap_or(NOTHING);
            one.summary(user, Some(unread))
        });
        Ok(rooms.collect())
    }

    /// Those of the rooms whose messages are kept in streams.
    pub(super) fn durable<'r>(&self, rooms: impl Iterator<Item = &'r RoomId>) -> Vec<&'r RoomId> {
        let namespaces = &self.config().namespaces;
        rooms
            .filter(|room| {
                namespaces
                    .get(room.namespace())
                    .is_some_and(|its| its.durable)
            })
            .collect()
    }

    /// Looks at rooms: those that the user is in, or may read.
    async fn look(
        &self,
        markers: &Markers,
        identity: &Identity,
        mut rooms: Vec<(RoomId, index::Entry)>,
        whose: Whose,
    ) -> Result<Vec<Seen>, Refused> {
        rooms.retain(|(room, entry)| match whose {
            // For all sessions of the user, whose tokens may differ.
            Whose::Mine => entry.is_in(),
            Whose::Readable => identity.may(Right::Read, room),
        });
        let known = try_join_all(rooms.iter().map(|(room, _)| self.of(room))).await?;
        let durable = self.durable(rooms.iter().map(|(room, _)| room));
        let mut latest: HashMap<RoomId, Latest> = markers
            .latest(&identity.user, &durable, Class::Msg, &shown)
            .await?;
        let mut seen = Vec::with_capacity(rooms.len());
        for ((room, entry), known) in rooms.into_iter().zip(known) {
            // The record is right where the index is behind.
            let is_out = known.standing(self.config(), &room, |standing| match whose {
                Whose::Mine => standing.removal(identity, &room).is_some(),
                Whose::Readable => standing
                    .check(identity, Right::Read, &room, unix_ms())
                    .is_err(),
            });
            let record = known.record();
            if is_out || whose == Whose::Mine && record.is_none() {
                continue;
            }
            seen.push(Seen {
                latest: latest.remove(&room),
                room,
                entry,
                record,
            });
        }
        Ok(seen)
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
    fn pages_end_at_their_bytes_but_have_a_room() {
        let nothing = Seen {
            room: RoomId::parse("chat:a").unwrap(),
            entry: index::Entry::default(),
            record: None,
            latest: None,
        };
        let of = |bytes: usize| RoomSummary {
            title: Some("x".repeat(bytes)),
            ..nothing.summary("kim", None)
        };
        assert_eq!(fitting(&[of(PAGE_BYTES), of(1)]), 1);
        let small: Vec<_> = (0..400).map(|_| of(1000)).collect();
        assert!((200..262).contains(&fitting(&small)));
        assert_eq!(fitting(&small[..9]), 9);
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
