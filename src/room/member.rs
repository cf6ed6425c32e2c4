//! A session's membership in one room: where its frames are sent, and how far it has got.

use std::{
    cell::{Cell, RefCell},
    sync::Arc,
};

use bytes::Bytes;

use crate::{
    codec::{Codec, PerCodec},
    model::{Cursor, Position},
    protocol::{Event, RoomSubscription, SubscribedTo, Wants},
    telemetry::metrics::{Gauge, Held},
    wire::Outlet,
};

/// A session that is about to join.
#[derive(Debug)]
pub struct NewMember {
    /// The number of the session on this edge.
    pub session: u64,
    /// The session's user.
    pub user: Arc<str>,
    /// Where its frames are sent.
    pub outlet: Outlet,
    /// The protocol in which its frames are encoded.
    pub codec: Codec,
    /// What it wants to be told besides messages.
    pub wants: Wants,
    /// Its subscription, in a protocol that has several for one room.
    pub subscription: Option<Box<RoomSubscription>>,
}

/// A session's membership in one room.
#[derive(Debug)]
pub struct Member {
    pub(super) session: u64,
    pub(super) user: Arc<str>,
    pub(super) outlet: Outlet,
    pub(super) codec: Codec,
    pub(super) wants: Cell<Wants>,
    /// Whether it gets messages from the fan-out. If not, a task of its own is catching it up.
    pub(super) live: Cell<bool>,
    /// Index in the log of the next message it is to get.
    pub(super) next: Cell<u64>,
    pub(super) left: Cell<bool>,
    /// Positions that the member has seen in another region and this room has not delivered yet. Messages up to them
    /// are withheld from this member, and its cursors contain them already.
    pub(super) ahead: RefCell<Vec<Position>>,
    /// What its subscription gets, and what is sent before each frame; `None` in a protocol that has one subscription for
    /// a room.
    subscription: Option<Box<(SubscribedTo, Bytes)>>,
    _active: Held,
}

impl Member {
    pub(super) fn new(who: NewMember, next: u64) -> Self {
        Self {
            session: who.session,
            user: who.user,
            outlet: who.outlet,
            codec: who.codec,
            wants: Cell::new(who.wants),
            live: Cell::new(false),
            next: Cell::new(next),
            left: Cell::new(false),
            ahead: RefCell::default(),
            subscription: who
                .subscription
                .map(|subscription| Box::new((subscription.of, who.codec.head(&subscription)))),
            _active: Held::new(Gauge::MemberActive),
        }
    }

    /// Whether the membership is over: the session left, or the room ended it.
    #[must_use]
    pub fn has_left(&self) -> bool {
        self.left.get()
    }

    /// Sends frames of one kind: with the head of its subscription, if that is for this kind. Returns how many it sent.
    pub(super) fn send(&self, of: SubscribedTo, frames: &[Bytes]) -> u64 {
        match self.subscription.as_deref() {
            None => self.outlet.send(frames),
            Some((its, head)) if *its == of => {
                let pairs = frames
                    .iter()
                    .flat_map(|frame| [head.clone(), frame.clone()]);
                self.outlet.send(&pairs.collect::<Vec<_>>());
            }
            Some(_) => return 0,
        }
        frames.len() as u64
    }

    pub(super) fn go_live(&self, next: u64) {
        self.next.set(next);
        self.live.set(true);
    }

    pub(super) fn set_ahead(&self, ahead: Vec<Position>) {
        *self.ahead.borrow_mut() = ahead;
    }

    /// `cursor`, raised to what the member has seen beyond it.
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

    /// Sends the events, which are all of one kind, to a member.
    pub(super) fn tell(&self, member: &Member) {
        let codec = member.codec;
        let encode = || {
            let frames = self.events.iter().filter_map(|event| codec.event(event));
            frames.collect()
        };
        let frames = self.frames.get(codec, encode);
        let of = match self.events.first() {
            Some(Event::Typing { .. }) => SubscribedTo::Typing,
            Some(Event::Presence { .. }) => SubscribedTo::Presence,
            _ => SubscribedTo::Messages,
        };
        if !frames.is_empty() {
            member.send(of, frames);
        }
    }
}

/// `cursor`, raised to those of `positions` that lie beyond it.
pub(super) fn raise(cursor: Cursor, positions: &[Position]) -> Cursor {
    if positions.is_empty() {
        return cursor;
    }
    let here = cursor.positions().iter().map(|position| {
        let further = positions.iter().find(|p| p.origin == position.origin);
        let further = further.filter(|p| p.epoch == position.epoch && p.seq > position.seq);
        further.unwrap_or(position)
    });
    // If an origin occurs twice, the first position is kept.
    Cursor::of(here.chain(positions).cloned().collect())
}
