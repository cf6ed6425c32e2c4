//! A watch of rooms that are known by name: those that the user is in, or those that the client has named.
//!
//! A summary is read once, and then kept up from what is heard, which says where in the log its message stands; so nothing
//! is counted twice. What that can't say is read again.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    rc::Weak,
    sync::Arc,
    time::Instant,
};

use super::{
    super::Session,
    active::{Active, Caps, Heard},
    desk::Desk,
};
use crate::{
    auth::Right,
    bus::{News, Record, Signal},
    model::{Cursor, RoomId},
    people::{InboxOf, Known, Whose, preview},
    protocol::{LastMessage, Refused, RoomSummary, WatchPush},
    runtime::unix_ms,
};

/// Rooms whose summaries are kept of a list. Above it, those that are up to date are dropped, and read again when
/// something happens.
const MAX_KEPT: usize = 500;

/// How much clocks may differ, in ms, when it is told whether a message came since then.
pub(super) const CLOCKS_MS: u64 = 10_000;

/// A watch of a list of rooms.
pub(super) struct List {
    session: Weak<Session>,
    number: u64,
    user: Arc<str>,
    /// The rooms that the client has named; `None`: those that the user is in.
    named: Option<RefCell<BTreeMap<RoomId, Named>>>,
    rooms: RefCell<HashMap<RoomId, Active>>,
    /// Whether it is among those that have something to be told.
    pub(super) is_dirty: Cell<bool>,
    /// Whether the client knows of the watch. Nothing is told before.
    pub(super) has_begun: Cell<bool>,
    /// When its rooms are compared with what is stored.
    pub(super) due: Cell<Instant>,
    /// When they were compared last, or the watch began; in ms since 1970.
    compared_at: Cell<u64>,
}

/// A room that the client has named.
struct Named {
    /// Held, so that the record is followed.
    _known: Arc<Known>,
    /// Whether the client knows that it may not see it any more.
    is_out: bool,
}

impl List {
    /// A watch of the rooms of a user, or of those that are named.
    pub(super) fn new(
        session: Weak<Session>,
        number: u64,
        user: &Arc<str>,
        named: Option<Vec<(RoomId, Arc<Known>)>>,
        due: Instant,
    ) -> Self {
        let named = named.map(|named| {
            let named = named.into_iter().map(|(room, known)| {
                let named = Named {
                    _known: known,
                    is_out: false,
                };
                (room, named)
            });
            RefCell::new(named.collect())
        });
        Self {
            session,
            number,
            user: Arc::clone(user),
            named,
            rooms: RefCell::default(),
            is_dirty: Cell::new(false),
            has_begun: Cell::new(false),
            due: Cell::new(due),
            compared_at: Cell::new(unix_ms()),
        }
    }

    /// The rooms that the client has named; `None`: it has named none.
    pub(super) fn named(&self) -> Option<Vec<RoomId>> {
        let named = self.named.as_ref()?;
        Some(named.borrow().keys().cloned().collect())
    }

    /// Changes what is known of a room. Returns whether there is something to tell.
    fn change(&self, room: &RoomId, change: impl FnOnce(&mut Active)) -> bool {
        let is_named = |named: &RefCell<BTreeMap<RoomId, Named>>| named.borrow().contains_key(room);
        if !self.named.as_ref().is_none_or(is_named) {
            return false;
        }
        let mut rooms = self.rooms.borrow_mut();
        if rooms.len() >= MAX_KEPT && !rooms.contains_key(room) {
            rooms.retain(|_, active| active.is_stale || active.is_new);
        }
        let active = rooms.entry(room.clone()).or_default();
        change(active);
        active.is_stale || active.is_new
    }

    /// Takes in a signal to the user.
    pub(super) fn signalled(&self, Signal { room, what }: &Signal, caps: Caps) -> bool {
        match what {
            // Messages of rooms that the client has named are heard themselves.
            News::Message { .. } if self.named.is_some() => false,
            News::Message {
                last,
                cursor,
                mentions,
            } => self.change(room, |active| {
                let heard = Heard {
                    last: last.clone(),
                    cursor,
                    previous: None,
                    mentions: mentions.iter().any(|user| **user == *self.user),
                };
                active.message(&self.user, heard, caps);
            }),
            News::Read(marker) => self.change(room, |active| active.read(marker)),
            News::Changed {} => self.changed(room),
        }
    }

    /// Takes in a message of a room that the client has named. `cursor`: `None` if the room is ephemeral.
    pub(super) fn heard(
        &self,
        room: &RoomId,
        record: &Record,
        cursor: Option<&Cursor>,
        caps: Caps,
    ) -> bool {
        let last = LastMessage {
            id: record.id.clone(),
            from: record.from.clone(),
            ts: record.ts,
            text: preview(&record.body),
        };
        self.change(room, |active| match cursor {
            None => active.ephemeral(last),
            Some(cursor) => {
                let heard = Heard {
                    last,
                    cursor,
                    previous: record.previous,
                    mentions: record.mentions_user(&self.user),
                };
                active.message(&self.user, heard, caps);
            }
        })
    }

    /// The record of a room, or the user's entry of it, has changed.
    pub(super) fn changed(&self, room: &RoomId) -> bool {
        self.change(room, Active::changed)
    }

    /// What the token allows has changed.
    pub(super) fn judge(&self) -> bool {
        let named = self.named().unwrap_or_default();
        // Each of them, not only up to the first.
        named.iter().filter(|room| self.changed(room)).count() > 0
    }

    /// Reads what has to be read, and tells the session what is new. Returns whether something has to be read again.
    pub(super) async fn tell(&self, desk: &Desk) -> bool {
        let Some((session, identity)) = self.session.upgrade().and_then(|session| {
            let identity = session.who()?;
            Some((session, identity))
        }) else {
            return false;
        };
        if !self.has_begun.get() {
            return true;
        }
        let whose = self.whose();
        let stale: Vec<RoomId> = {
            let mut rooms = self.rooms.borrow_mut();
            let stale = rooms.iter_mut().filter(|(_, active)| active.is_stale);
            let begin = stale.map(|(room, active)| {
                active.begin_read();
                room.clone()
            });
            begin.collect()
        };
        let mut again = false;
        if !stale.is_empty() {
            let read = desk
                .people
                .summaries(&desk.markers, &identity, &stale, whose)
                .await;
            let mut rooms = self.rooms.borrow_mut();
            match read {
                Ok(mut read) => {
                    for room in stale {
                        if let Some(active) = rooms.get_mut(&room) {
                            active.end_read(read.remove(&room));
                        }
                    }
                }
                Err(refused) => {
                    tracing::debug!(%refused, "what is new in rooms can't be read");
                }
            }
            again = rooms.values().any(|active| active.is_stale);
        }
        let mut push = WatchPush {
            watch: self.number,
            ..WatchPush::default()
        };
        self.rooms.borrow_mut().retain(|room, active| {
            if std::mem::take(&mut active.is_new) {
                // The token may have changed since it was read.
                let summary = active.summary.as_ref();
                match summary.filter(|_| identity.may(Right::Read, room)) {
                    Some(summary) => {
                        self.set_out(room, false);
                        push.rooms.push(summary.clone());
                    }
                    None if self.set_out(room, true) => push.gone.push(room.clone()),
                    None => {}
                }
            }
            active.summary.is_some() || active.is_stale
        });
        if whose == Whose::Mine {
            push.gone.retain(|room| identity.may(Right::Read, room));
        }
        session.tell_watch(push);
        again
    }

    /// Notes whether the client may see a room. Returns whether that is new.
    fn set_out(&self, room: &RoomId, is_out: bool) -> bool {
        let Some(named) = &self.named else {
            return true;
        };
        let mut named = named.borrow_mut();
        let known = named.get_mut(room);
        known.is_some_and(|known| std::mem::replace(&mut known.is_out, is_out) != is_out)
    }

    fn whose(&self) -> Whose {
        match self.named {
            Some(_) => Whose::Readable,
            None => Whose::Mine,
        }
    }

    /// What is stored: of the user's rooms the first page.
    async fn stored(&self, desk: &Desk) -> Result<Vec<RoomSummary>, Refused> {
        let identity = self.session.upgrade().and_then(|session| session.who());
        let Some(identity) = identity else {
            return Ok(Vec::new());
        };
        let (people, markers) = (&desk.people, &desk.markers);
        match self.named() {
            Some(named) => {
                let whose = self.whose();
                let read = people.summaries(markers, &identity, &named, whose).await?;
                Ok(read.into_values().map(|(summary, _)| summary).collect())
            }
            None => {
                let page = InboxOf::new(None, None, false)?;
                Ok(people.inbox(markers, &identity, &page).await?.rooms)
            }
        }
    }

    /// Compares what the session was told with what is stored. Returns whether there is something to tell.
    pub(super) async fn compare(&self, desk: &Desk) -> Result<bool, Refused> {
        let before = unix_ms();
        let stored = self.stored(desk).await?;
        let since = self.compared_at.replace(before).saturating_sub(CLOCKS_MS);
        let mut rooms = self.rooms.borrow_mut();
        let mut differs = false;
        for summary in stored {
            let told = rooms.get(&summary.room).and_then(|it| it.summary.as_ref());
            let same = match told {
                Some(told) => {
                    (&told.head, told.unread, told.mentions)
                        == (&summary.head, summary.unread, summary.mentions)
                }
                // Nothing was told of it, and there was nothing to tell.
                None => summary.last.as_ref().is_none_or(|last| last.ts < since),
            };
            if !same {
                differs = true;
                rooms.entry(summary.room).or_default().changed();
            }
        }
        Ok(differs)
    }
}
