//! A session's membership in one room: where its frames go, and up to where it has got them.

use std::{
    cell::{Cell, RefCell},
    sync::Arc,
};

use bytes::Bytes;

use crate::{
    codec::{Codec, PerCodec},
    model::{Cursor, Position},
    protocol::{Event, Wants},
    telemetry::metrics::{Gauge, Held},
    wire::Outlet,
};

/// Who joins.
#[derive(Debug)]
pub struct NewMember {
    /// The session's number on this edge.
    pub session: u64,
    /// Its user.
    pub user: Arc<str>,
    /// Where its frames go.
    pub outlet: Outlet,
    /// How they are written.
    pub codec: Codec,
    /// What it is to be told besides messages.
    pub wants: Wants,
}

/// A session's membership in one room.
#[derive(Debug)]
pub struct Member {
    pub(super) session: u64,
    pub(super) user: Arc<str>,
    pub(super) outlet: Outlet,
    pub(super) codec: Codec,
    pub(super) wants: Cell<Wants>,
    /// Whether it is fed by the fan-out; otherwise it is catching up by a task of its own.
    pub(super) live: Cell<bool>,
    /// Index in the log of the next message it is to get.
    pub(super) next: Cell<u64>,
    pub(super) left: Cell<bool>,
    /// What it has seen, in another region, of what this room has not delivered yet: it is withheld, and stands in the member's
    /// cursors all the same.
    pub(super) ahead: RefCell<Vec<Position>>,
    _active: Held,
}

impl Member {
    pub(super) fn new(who: NewMember, next: u64, live: bool) -> Self {
        Self {
            session: who.session,
            user: who.user,
            outlet: who.outlet,
            codec: who.codec,
            wants: Cell::new(who.wants),
            live: Cell::new(live),
            next: Cell::new(next),
            left: Cell::new(false),
            ahead: RefCell::default(),
            _active: Held::new(Gauge::MemberActive),
        }
    }

    /// Whether it is no member any more: it left, or the room let it go.
    #[must_use]
    pub fn has_left(&self) -> bool {
        self.left.get()
    }

    pub(super) fn go_live(&self, next: u64) {
        self.next.set(next);
        self.live.set(true);
    }

    pub(super) fn set_ahead(&self, ahead: Vec<Position>) {
        *self.ahead.borrow_mut() = ahead;
    }

    /// `cursor`, and what the member has seen beyond it.
    pub(super) fn raised(&self, cursor: Cursor) -> Cursor {
        raise(cursor, &self.ahead.borrow())
    }
}

/// Events for the members of a room, encoded once for each protocol.
#[derive(Debug)]
pub(super) struct News<'a> {
    events: &'a [Event],
    frames: PerCodec<Vec<Bytes>>,
}

impl<'a> News<'a> {
    pub(super) fn of(events: &'a [Event]) -> Self {
        Self {
            events,
            frames: PerCodec::default(),
        }
    }

    /// Tells a member.
    pub(super) fn tell(&self, member: &Member) {
        let codec = member.codec;
        let encode = || self.events.iter().map(|event| codec.event(event)).collect();
        member.outlet.send(self.frames.get(codec, encode));
    }
}

/// `cursor` with those of `positions` that lie beyond it.
pub(super) fn raise(cursor: Cursor, positions: &[Position]) -> Cursor {
    if positions.is_empty() {
        return cursor;
    }
    let here = cursor.positions().iter().map(|position| {
        let further = positions.iter().find(|p| p.origin == position.origin);
        let further = further.filter(|p| p.epoch == position.epoch && p.seq > position.seq);
        further.unwrap_or(position)
    });
    // Of two of one origin the first counts.
    Cursor::of(here.chain(positions).cloned().collect())
}
