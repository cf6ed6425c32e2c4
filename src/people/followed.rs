//! Rooms as those see them who follow a pattern: without being in them, and only those that match a filter.
//!
//! The streams say in which rooms something was said, and the buckets which rooms have records, so this works without
//! MongoDB. Rooms are listed by their names.

use std::collections::{BTreeSet, HashMap};

use futures_util::future::{join_all, try_join_all};

use super::{
    filter::Filter,
    inbox::{Seen, fitting, preview},
    index,
    known::People,
};
use crate::{
    auth::{Identity, Right},
    bus,
    model::{Class, Cursor, RoomId},
    protocol::{Refused, RoomSummary},
    read_marker::{Counted, Latest, Markers},
    subject::{parse_record_key, record_keys},
};

/// Rooms of a namespace that are listed. If there are more, pages are partial.
const MAX_LISTED: usize = 20_000;

/// Rooms that are looked at for one page. If fewer of them match than the page may have, it is short.
const MAX_LOOKED_AT: usize = 512;

/// Rooms that are looked at in one request. So many may be on a page after its bytes are full.
const AT_ONCE: usize = 64;

/// What a room is to one who follows.
#[derive(Debug)]
pub struct Look {
    /// The newest message, if the room has one.
    pub head: Option<Cursor>,
    /// What is to be told.
    pub found: Found,
    /// Whether nothing keeps its messages.
    pub is_ephemeral: bool,
}

/// What is told of a room.
#[derive(Debug)]
pub enum Found {
    /// It matches.
    Room(Box<RoomSummary>),
    /// It will match at this time, in ms since 1970, if nothing happens until then.
    Later(u64),
    /// It does not match.
    Nothing,
    /// The user may not see it.
    Hidden,
}

/// A page of the rooms that match.
#[derive(Debug, Default)]
pub struct Page {
    /// The rooms.
    pub rooms: Vec<RoomSummary>,
    /// Rooms that will match later, and when.
    pub later: Vec<(RoomId, u64)>,
    /// The last room that was looked at, if there are more.
    pub next: Option<RoomId>,
    /// Whether there may be rooms that are not listed.
    pub partial: bool,
}

impl People {
    /// The live rooms of these namespaces, and whether these are all.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn live_rooms(
        &self,
        markers: &Markers,
        identity: &Identity,
        namespaces: &[Box<str>],
    ) -> Result<(BTreeSet<RoomId>, bool), Refused> {
        let (mut rooms, mut all) = (BTreeSet::new(), true);
        for name in namespaces {
            let its = self.config().namespaces.get(&**name);
            if its.is_some_and(|its| its.durable) {
                let listed = markers.live_rooms(&identity.user, name, MAX_LISTED);
                let (found, complete) = listed.await?;
                rooms.extend(found);
                all &= complete;
            } else {
                // Nothing keeps the rooms of an ephemeral namespace.
                all = false;
            }
        }
        Ok((rooms, all))
    }

    /// The rooms of these namespaces that are live or have a record, and whether these are all.
    async fn listed_rooms(
        &self,
        markers: &Markers,
        identity: &Identity,
        namespaces: &[Box<str>],
    ) -> Result<(BTreeSet<RoomId>, bool), Refused> {
        let (mut rooms, mut all) = self.live_rooms(markers, identity, namespaces).await?;
        let origins = self.origins.all();
        let asked = namespaces.iter().flat_map(|name| {
            origins.iter().map(async move |origin| {
                let (bucket, keys) = (self.records.of(origin.origin()), record_keys(name));
                bucket.rooms(&keys, parse_record_key, MAX_LISTED).await
            })
        });
        for found in join_all(asked).await {
            match found {
                Ok(found) => {
                    all &= found.len() < MAX_LISTED;
                    rooms.extend(found);
                }
                Err(error) => {
                    tracing::debug!(%error, "the records of a region are not listed");
                    all = false;
                }
            }
        }
        Ok((rooms, all))
    }

    /// A page of the rooms of these namespaces that match, after the room `after`. `holds`: whether a condition on
    /// annotations is fulfilled in a room.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn followed_page(
        &self,
        markers: &Markers,
        identity: &Identity,
        (namespaces, filter): (&[Box<str>], &Filter),
        (after, limit): (Option<&RoomId>, usize),
        holds: impl Fn(&RoomId) -> bool,
        now: u64,
    ) -> Result<Page, Refused> {
        let (mut all, complete) = self.listed_rooms(markers, identity, namespaces).await?;
        if let Some(after) = after {
            all = all.split_off(after);
            all.remove(after);
        }
        let mut page = Page {
            partial: !complete,
            ..Page::default()
        };
        let mut rest = all.into_iter().peekable();
        let mut looked_at = 0;
        while page.rooms.len() < limit
            && looked_at < MAX_LOOKED_AT
            && rest.peek().is_some()
            && (page.rooms.is_empty() || fitting(&page.rooms) == page.rooms.len())
        {
            let at_once = AT_ONCE.min(limit - page.rooms.len());
            let rooms: Vec<RoomId> = rest.by_ref().take(at_once).collect();
            looked_at += rooms.len();
            let mut looks = self
                .followed(markers, identity, (&rooms, filter), &holds, now)
                .await?;
            page.next = rooms.last().cloned();
            for room in rooms {
                let Some(look) = looks.remove(&room) else {
                    continue;
                };
                match look.found {
                    // What was said there is not known.
                    Found::Room(_) if look.is_ephemeral && filter.needs_message() => {}
                    Found::Room(summary) => page.rooms.push(*summary),
                    Found::Later(at) => page.later.push((room, at)),
                    Found::Nothing | Found::Hidden => {}
                }
            }
        }
        page.next = page.next.filter(|_| rest.peek().is_some());
        Ok(page)
    }

    /// Looks at rooms that a user follows.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn followed(
        &self,
        markers: &Markers,
        identity: &Identity,
        (rooms, filter): (&[RoomId], &Filter),
        holds: impl Fn(&RoomId) -> bool,
        now: u64,
    ) -> Result<HashMap<RoomId, Look>, Refused> {
        let user = &identity.user;
        let known = try_join_all(rooms.iter().map(|room| self.of(room))).await?;
        let durable = self.durable(rooms.iter());
        let look = |record: &bus::Record| (preview(&record.body), filter.of_message(record));
        let mut latest: HashMap<RoomId, Latest> =
            markers.latest(user, &durable, Class::Msg, &look).await?;
        let mut looks = HashMap::with_capacity(rooms.len());
        let mut seen = Vec::new();
        for (room, known) in rooms.iter().zip(known) {
            let latest = latest.remove(room);
            let (record, head) = (known.record(), latest.as_ref().map(|it| it.head.clone()));
            let visible = known.standing(self.config(), room, |standing| {
                identity.may(Right::Follow, room) && standing.may_be_followed(identity)
            });
            let matches = visible
                && filter.of_record(record.as_deref())
                && (!filter.has_annotation() || holds(room));
            // What was said in an ephemeral room is not kept anywhere: whoever has heard it knows whether it matches.
            let is_ephemeral = !durable.contains(&room);
            let is_enough = is_ephemeral || record.is_some() && !filter.needs_message();
            let without = is_enough.then_some(0);
            let wanted = latest.as_ref().map_or(without, |latest| latest.wanted);
            let found = match wanted.filter(|_| matches) {
                Some(at) if at > now => Found::Later(at),
                Some(_) => {
                    let one = Seen {
                        room: room.clone(),
                        entry: index::Entry::default(),
                        record,
                        latest,
                    };
                    seen.push((one, is_ephemeral));
                    continue;
                }
                None if visible => Found::Nothing,
                None => Found::Hidden,
            };
            let look = Look {
                head,
                found,
                is_ephemeral,
            };
            looks.insert(room.clone(), look);
        }
        let names: Vec<RoomId> = seen.iter().map(|(one, _)| one.room.clone()).collect();
        let entries = self.entries_of(user, &names).await?;
        let mut entries: HashMap<RoomId, index::Entry> = entries.into_iter().collect();
        for (one, _) in &mut seen {
            one.entry = entries.remove(&one.room).unwrap_or_default();
        }
        let durable = seen.iter().filter(|(one, _)| one.latest.is_some());
        let unread = markers
            .unread(user, durable.map(|(one, _)| &one.room), Counted::Marked)
            .await?;
        for (one, is_ephemeral) in &seen {
            let summary = one.summary(user, unread.get(&one.room).cloned());
            let look = Look {
                head: summary.head.clone(),
                found: Found::Room(Box::new(summary)),
                is_ephemeral: *is_ephemeral,
            };
            looks.insert(one.room.clone(), look);
        }
        Ok(looks)
    }
}
