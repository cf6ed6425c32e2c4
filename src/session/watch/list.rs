//! A watch of rooms that are known by name: those that the user is in, or those that the client has named.
//!
//! A summary is read once, and then kept up from what is heard, which says where in the log its message stands; so nothing
//! is counted twice. What that can't say is read again.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap, HashSet},
    rc::Weak,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    super::Session,
    active::{Active, Caps, Heard},
    sources::{FIRST_RESYNC, Sources},
    told::{Told, json},
};
use crate::{
    auth::Right,
    bus::{News, Record, Signal},
    model::{Cursor, RoomId},
    people::{InboxOf, Known, Whose, preview},
    protocol::{LastMessage, Refused, RoomSummary, WatchPush},
    runtime::unix_ms,
};

/// Rooms that are read before those are told that are ready. The longer a read takes, the more rooms have new messages when
/// it ends, and must be read again.
const READ_AT_ONCE: usize = 50;

/// Rooms whose summaries are kept of a list. Above it, those that are up to date are dropped, and read again when
/// something happens.
const MAX_KEPT: usize = 500;

/// Bytes of the rooms in one push, if there are several. A client that has as many still to receive is told nothing more,
/// so that a list alone never fills its outbox.
const MAX_BYTES: usize = 64 * 1024;

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
    /// Whether it is being told. It is not told twice at once.
    pub(super) is_telling: Cell<bool>,
    /// Whether the client knows of the watch. Nothing is told before.
    pub(super) has_begun: Cell<bool>,
    /// When its rooms are compared with what is stored.
    pub(super) due: Cell<Instant>,
    /// When they were compared last, or the watch began; in ms since 1970.
    compared_at: Cell<u64>,
    /// When the watch began, in ms since 1970.
    began_at: u64,
    /// What the client was told of the rooms that are compared.
    told: RefCell<Told>,
    /// How many of the user's rooms are compared: as many as were on the first page.
    compared: Cell<usize>,
    /// Whether the token has changed since they were compared.
    is_judged: Cell<bool>,
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
            is_telling: Cell::new(false),
            has_begun: Cell::new(false),
            due: Cell::new(due),
            compared_at: Cell::new(unix_ms()),
            began_at: unix_ms(),
            told: RefCell::default(),
            compared: Cell::new(0),
            is_judged: Cell::new(false),
        }
    }

    /// The user, if the rooms are those that the user is in.
    pub(super) fn mine(&self) -> Option<&str> {
        self.named.is_none().then_some(&*self.user)
    }

    /// Whether the client may have to be told that the user is out of a room, since this time in ms since 1970. If that is
    /// older than the watch, only of a room that it was told of: it may have been heard late, from another region.
    pub(super) fn may_leave(&self, room: &RoomId, since: u64) -> bool {
        since.saturating_add(CLOCKS_MS) >= self.began_at
            || self.rooms.borrow().contains_key(room)
            || self.told.borrow().has(room)
    }

    /// The client is told a page of at most `limit` rooms. `is_first`: whether none is before it.
    pub(super) fn tell_page(&self, rooms: &[RoomSummary], limit: usize, is_first: bool) {
        if is_first {
            self.compared.set(limit);
        }
        if is_first || self.named.is_some() {
            let mut told = self.told.borrow_mut();
            rooms.iter().for_each(|it| told.tell(it, &json(it)));
        }
    }

    /// Whether something has to be read before it can be told.
    pub(super) fn has_to_read(&self) -> bool {
        let now = Instant::now();
        self.rooms
            .borrow()
            .values()
            .any(|active| active.is_due(now))
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
            News::Changed => self.changed(room),
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
        let rooms = self.named().unwrap_or_else(|| {
            self.due.set(Instant::now());
            self.is_judged.set(true);
            self.rooms.borrow().keys().cloned().collect()
        });
        // Each of them, not only up to the first.
        rooms.iter().filter(|room| self.changed(room)).count() > 0
    }

    /// Reads what has to be read, and tells the session what is new. Returns whether something has to be read again, or
    /// could not be told yet.
    pub(super) async fn tell(&self, sources: &Sources) -> bool {
        let Some((session, identity)) = self.session.upgrade().and_then(|session| {
            let identity = session.who()?;
            Some((session, identity))
        }) else {
            return false;
        };
        if !self.has_begun.get() || session.queued_bytes() >= MAX_BYTES {
            return true;
        }
        let whose = self.whose();
        let stale: Vec<RoomId> = {
            let (mut rooms, now) = (self.rooms.borrow_mut(), Instant::now());
            let stale = rooms.iter_mut().filter(|(_, active)| active.is_due(now));
            let stale = stale.take(READ_AT_ONCE);
            let begin = stale.map(|(room, active)| {
                active.begin_read();
                room.clone()
            });
            begin.collect()
        };
        if !stale.is_empty() {
            let read = sources
                .people
                .summaries(&sources.markers, &identity, &stale, whose)
                .await;
            let mut rooms = self.rooms.borrow_mut();
            match read {
                Ok(mut read) => {
                    let (now, mut all_show) = (Instant::now(), true);
                    let caps = sources.caps();
                    for room in stale {
                        if let Some(active) = rooms.get_mut(&room) {
                            all_show &= active.end_read(read.remove(&room), now);
                            active.catch_up(&self.user, caps);
                        }
                    }
                    if !all_show {
                        // It was erased, or a replica lags behind for longer.
                        self.compare_soon(FIRST_RESYNC);
                    }
                }
                Err(refused) => {
                    tracing::debug!(%refused, "what is new in rooms can't be read");
                    let now = Instant::now();
                    for room in stale {
                        if let Some(active) = rooms.get_mut(&room) {
                            active.fail_read(now);
                        }
                    }
                }
            }
        }
        let mut push = WatchPush {
            watch: self.number,
            ..WatchPush::default()
        };
        let (mut again, mut bytes) = (false, 0);
        let mut told = self.told.borrow_mut();
        self.rooms.borrow_mut().retain(|room, active| {
            if active.is_new {
                // The token may have changed since it was read.
                active.summary.take_if(|_| !identity.may(Right::Read, room));
                let its = active.summary.as_ref().map(json);
                let size = its.as_ref().map_or(room.as_str().len() + 3, Vec::len);
                if bytes > 0 && bytes + size > MAX_BYTES {
                    again = true;
                    return true;
                }
                bytes += size;
                active.is_new = false;
                match active.summary.as_ref().zip(its) {
                    Some((summary, its)) => {
                        self.set_out(room, false);
                        told.tell(summary, &its);
                        push.rooms.push(summary.clone());
                    }
                    None if self.set_out(room, true) => push.gone.push(room.clone()),
                    None => {}
                }
            }
            again |= active.is_stale;
            active.summary.is_some() || active.is_stale
        });
        if whose == Whose::Mine {
            // A room that another token of the user covers is not named.
            push.gone
                .retain(|room| told.has(room) || identity.may(Right::Read, room));
        }
        push.gone.iter().for_each(|room| told.forget(room));
        drop(told);
        session.tell_watch(push);
        again
    }

    /// Has the list compared after this time at the latest.
    pub(super) fn compare_soon(&self, after: Duration) {
        self.due.set(self.due.get().min(Instant::now() + after));
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

    /// What is stored: of the user's rooms as many as were on the first page.
    async fn stored(&self, sources: &Sources) -> Result<Vec<RoomSummary>, Refused> {
        let identity = self.session.upgrade().and_then(|session| session.who());
        let Some(identity) = identity else {
            return Ok(Vec::new());
        };
        let (people, markers) = (&sources.people, &sources.markers);
        match self.named() {
            Some(named) => {
                let whose = self.whose();
                let read = people.summaries(markers, &identity, &named, whose).await?;
                Ok(read.into_values().map(|(summary, _)| summary).collect())
            }
            None => {
                let page = InboxOf::new(None, Some(self.compared.get() as u64), false)?;
                Ok(people.inbox(markers, &identity, &page).await?.rooms)
            }
        }
    }

    /// Compares what the session was told with what is stored. Returns whether there is something to tell.
    pub(super) async fn compare(&self, sources: &Sources) -> Result<bool, Refused> {
        let before = unix_ms();
        let stored = self.stored(sources).await?;
        let hidden = self.hidden(sources).await?;
        let since = self.compared_at.replace(before).saturating_sub(CLOCKS_MS);
        Ok(self.differs(stored, &hidden, since))
    }

    /// The user's rooms that the client was told of and that a new token does not cover.
    async fn hidden(&self, sources: &Sources) -> Result<Vec<RoomId>, Refused> {
        let identity = self.session.upgrade().and_then(|session| session.who());
        let Some(identity) = identity.filter(|_| self.is_judged.replace(false)) else {
            return Ok(Vec::new());
        };
        let mine = sources.people.rooms_of(&identity.user).await;
        let mine = mine.inspect_err(|_refused| self.is_judged.set(true))?;
        let told = self.told.borrow();
        let hidden = mine.into_iter().map(|(room, _)| room);
        Ok(hidden
            .filter(|room| told.has(room) && !identity.may(Right::Read, room))
            .collect())
    }

    /// Marks the rooms that are not as they are stored, and those that are hidden now. `since`: when that was compared
    /// before, in ms since 1970.
    fn differs(&self, stored: Vec<RoomSummary>, hidden: &[RoomId], since: u64) -> bool {
        let mut rooms = self.rooms.borrow_mut();
        // They have ended, the user is not in them any more, or they are not on the first page.
        let mut missing: HashSet<RoomId> = rooms.keys().cloned().collect();
        if let Some(named) = &self.named {
            let named = named.borrow();
            let seen = named.iter().filter(|(_, named)| !named.is_out);
            missing.extend(seen.map(|(room, _)| room.clone()));
        }
        let mut changed = Vec::new();
        let mut told = self.told.borrow_mut();
        if self.named.is_none() {
            let stored = stored.iter().map(|summary| &summary.room);
            told.keep(stored.chain(hidden));
        }
        missing.extend(hidden.iter().cloned());
        for summary in stored {
            missing.remove(&summary.room);
            let kept = rooms.get(&summary.room);
            let same = match kept.filter(|active| active.summary.is_some()) {
                Some(active) => Some(!active.differs(&summary)),
                None => told.is_told(&summary),
            };
            // One that was on no page yet is told when something happens in it. Of the user's rooms all that are compared
            // were on a page, or are new there.
            let is_same = same.unwrap_or_else(|| {
                let is_old = summary.last.as_ref().is_none_or(|last| last.ts < since);
                self.named.is_some() && is_old
            });
            if !is_same {
                changed.push(summary.room);
            }
        }
        changed.extend(missing);
        let differs = !changed.is_empty();
        for room in changed {
            rooms.entry(room).or_default().changed();
        }
        differs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(name: &str) -> RoomId {
        RoomId::parse(&format!("chat:{name}")).unwrap()
    }

    fn summary(name: &str, title: &str) -> RoomSummary {
        RoomSummary {
            room: room(name),
            title: Some(title.to_owned()),
            head: None,
            ..super::super::active::tests::summary(0, 0)
        }
    }

    fn list(kept: &[&str], named: Option<&[&str]>) -> List {
        let named = named.map(|named| {
            let named = named.iter();
            named
                .map(|name| (room(name), Arc::new(Known::default())))
                .collect()
        });
        let list = List::new(Weak::new(), 1, &Arc::from("kim"), named, Instant::now());
        for name in kept {
            let mut active = Active::default();
            active.end_read(Some((summary(name, "old"), true)), Instant::now());
            list.rooms.borrow_mut().insert(room(name), active);
        }
        list
    }

    fn stale(list: &List) -> Vec<String> {
        let rooms = list.rooms.borrow();
        let stale = rooms.iter().filter(|(_, active)| active.is_stale);
        let mut stale: Vec<String> = stale.map(|(room, _)| room.to_string()).collect();
        stale.sort_unstable();
        stale
    }

    #[test]
    fn a_comparison_finds_rooms_that_are_gone_and_records_that_have_changed() {
        let stored = || vec![summary("a", "old"), summary("b", "new"), summary("d", "x")];
        let mine = list(&["a", "b", "c"], None);
        mine.tell_page(&[summary("d", "x")], 50, true);
        assert!(mine.differs(stored(), &[], 0));
        assert_eq!(stale(&mine), ["chat:b", "chat:c"]);
        // One that is new on the page, and one of which something else was told.
        let mine = list(&["a"], None);
        mine.tell_page(&[summary("d", "w")], 50, true);
        assert!(mine.differs(stored(), &[], 0));
        assert_eq!(stale(&mine), ["chat:b", "chat:d"]);
        let mine = list(&["a"], None);
        mine.tell_page(&stored(), 50, true);
        assert!(!mine.differs(stored(), &[], 0));
        // A new token does not cover one that the client knows of: it stays known until that is told.
        assert!(mine.differs(stored(), &[room("e")], 0));
        assert_eq!(stale(&mine), ["chat:e"]);

        let named = list(&["a"], Some(&["a", "b", "c", "d"]));
        assert!(named.differs(stored(), &[], 0));
        assert_eq!(stale(&named), ["chat:c"]);
        named.set_out(&room("c"), true);
        named.rooms.borrow_mut().remove(&room("c"));
        assert!(!named.differs(stored(), &[], 0));
    }
}
