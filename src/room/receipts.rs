//! Read receipts: telling the members that want them who has read up to where.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use indexmap::IndexMap;
use tokio::task::spawn_local;

use super::{
    hub::Hub,
    log::RoomLog,
    member::{Member, News},
    rooms::Rooms,
};
use crate::{
    bus::Record,
    model::{Class, Cursor, Epoch, MAX_USER, Region},
    protocol::Event,
    read_marker::Table,
    telemetry::metrics::{Counter, ReceiptFault, count},
};

/// What the members of a room were told about read markers. The table exists as long as a member wants receipts.
#[derive(Debug)]
pub(super) struct Receipts {
    /// Number of members that want receipts. If it is above `most`, none of them gets any.
    wanted: Cell<usize>,
    most: usize,
    table: RefCell<Option<Box<Table>>>,
    /// Whether the bucket must be read (again), and whether a task is reading it.
    stale: Cell<bool>,
    reading: Cell<bool>,
}

/// Tells which positions are valid: those of the room's current log.
fn is_current(log: &RoomLog) -> impl Fn(&Region, &Epoch) -> bool {
    |origin, epoch| log.is_current(origin, *epoch)
}

impl Receipts {
    /// Receipts of a room in which at most `most` members get them.
    pub(super) fn new(most: usize) -> Self {
        Self {
            wanted: Cell::new(0),
            most,
            table: RefCell::default(),
            stale: Cell::new(false),
            reading: Cell::new(false),
        }
    }

    /// Counts a member that has joined.
    pub(super) fn joined(&self, member: &Member) {
        if member.wants.get().read {
            self.wanted.set(self.wanted.get() + 1);
        }
    }

    /// Uncounts a member that has left. When no member wants receipts any more, the table is dropped.
    pub(super) fn left(&self, member: &Member) {
        if member.wants.get().read {
            self.wanted.set(self.wanted.get() - 1);
            if self.wanted.get() == 0 {
                self.table.take();
            }
        }
    }

    /// Notes a delivered message. Every member that gets it knows that its sender has read up to it.
    pub(super) fn spoke(&self, track: usize, record: &Record, log: &RoomLog) {
        if let (Some(table), Class::Msg) = (&mut *self.table.borrow_mut(), record.class) {
            let cursor = log.cursor_at(track, record.seq, record.fingerprint);
            table.spoke(&record.from, &cursor, is_current(log));
        }
    }
}

impl Hub {
    /// Called after a member has joined: starts to follow read markers, if a member wants receipts.
    pub(super) fn follow_receipts(self: &Rc<Self>, rooms: &Rc<Rooms>) {
        let receipts = &self.receipts;
        if self.durable && receipts.wanted.get() > 0 && receipts.table.borrow().is_none() {
            *receipts.table.borrow_mut() = Some(Box::default());
            self.receipts_missed(rooms);
        }
    }

    /// Called after a member has left. If there were too many members for receipts and now there are not, they get the
    /// receipts they missed.
    pub(super) fn tell_missed(&self) {
        if let Some(table) = &mut *self.receipts.table.borrow_mut() {
            self.tell(table, Vec::new());
        }
    }

    /// Called when receipts may be missing: reads the markers from the bucket, and retries until that succeeds.
    pub(super) fn receipts_missed(self: &Rc<Self>, rooms: &Rc<Rooms>) {
        let receipts = &self.receipts;
        if receipts.table.borrow().is_none() {
            return;
        }
        receipts.stale.set(true);
        if receipts.reading.replace(true) {
            return;
        }
        let (hub, rooms) = (Rc::clone(self), Rc::clone(rooms));
        spawn_local(async move {
            let receipts = &hub.receipts;
            while !hub.is_gone()
                && receipts.table.borrow().is_some()
                && receipts.stale.replace(false)
            {
                match rooms.markers.all(&hub.room).await {
                    Ok(readings) => {
                        let stored = readings.into_iter().map(|r| (r.user, r.cursor));
                        let log = hub.log.borrow();
                        let is_current = is_current(&log);
                        let mut table = receipts.table.borrow_mut();
                        let Some(table) = &mut *table else { break };
                        let news = table.seed(stored, is_current);
                        hub.tell(table, news);
                    }
                    Err(error) => {
                        tracing::debug!(error = %error, room.id = %hub.room, "read markers are read again");
                        receipts.stale.set(true);
                        hub.pause().await;
                    }
                }
            }
            receipts.reading.set(false);
        });
    }

    /// Parses a receipt and merges it into those of its batch.
    pub(super) fn take_receipt(
        &self,
        rooms: &Rooms,
        user: &str,
        payload: &[u8],
        receipts: &mut IndexMap<String, Cursor>,
    ) {
        let dropped = |why| count(Counter::ReceiptDropped(why), 1);
        if !self.durable {
            return dropped(ReceiptFault::Ephemeral);
        }
        let cursor = std::str::from_utf8(payload)
            .ok()
            .and_then(|text| text.parse::<Cursor>().ok());
        let (Some(cursor), true) = (cursor, names_a_user(user)) else {
            return dropped(ReceiptFault::Malformed);
        };
        let log = self.log.borrow();
        let is_current = is_current(&log);
        // An origin that this region does not see has no log to compare with.
        let stale = cursor.positions().iter().any(|position| {
            log.track_of(&position.origin).is_some()
                && !is_current(&position.origin, &position.epoch)
        });
        if stale {
            return dropped(ReceiptFault::Epoch);
        }
        rooms.markers.heard(&self.room, user, &cursor);
        match receipts.get_mut(user) {
            Some(heard) => *heard = heard.merge(&cursor, is_current),
            None => {
                receipts.insert(user.to_owned(), cursor);
            }
        }
    }

    /// Sends what is new in a batch of receipts to the members that want them.
    pub(super) fn push_receipts(&self, receipts: IndexMap<String, Cursor>) {
        let mut table = self.receipts.table.borrow_mut();
        let Some(table) = &mut *table else { return };
        let log = self.log.borrow();
        let is_current = is_current(&log);
        let mut news = Vec::new();
        for (user, heard) in receipts {
            if let Some(cursor) = table.hear(&user, &heard, &is_current) {
                news.push((user, cursor));
            }
        }
        self.tell(table, news);
    }

    /// Sends receipts to every member that wants them. If there are too many of these members, the receipts are kept
    /// until there are fewer.
    fn tell(&self, table: &mut Table, news: Vec<(String, Cursor)>) {
        if self.receipts.wanted.get() > self.receipts.most {
            count(
                Counter::ReceiptDropped(ReceiptFault::PushMax),
                news.len() as u64,
            );
            news.into_iter().for_each(|(user, _)| table.miss(user));
            return;
        }
        let read = table.missed().into_iter().chain(news);
        let read = read.map(|(user, cursor)| Event::Read {
            room: self.room.clone(),
            user,
            cursor,
        });
        let events: Vec<Event> = read.collect();
        if events.is_empty() {
            return;
        }
        let news = News::of(&events);
        let mut told = 0;
        for member in self
            .members
            .borrow()
            .values()
            .filter(|m| m.wants.get().read)
        {
            news.tell(member);
            told += events.len() as u64;
        }
        count(Counter::ReceiptDelivered, told);
    }
}

/// Whether `user` can be the subject of a token.
fn names_a_user(user: &str) -> bool {
    (1..=MAX_USER).contains(&user.len()) && !user.starts_with('$')
}
