//! Members, and how frames reach them.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
};

use bytes::Bytes;
use tokio::task::yield_now;

use super::{encode, hub::Hub, references::Spot, rooms::Rooms};
use crate::{
    model::{Cursor, Position, RoomId},
    protocol::{Close, native::Wants},
    telemetry::metrics::{Counter, Gauge, Held, count},
    wire::Conn,
};

/// Members written to before other tasks of the shard get a turn.
pub(super) const MEMBERS_A_TURN: usize = 128;

/// A session's membership in one room: where its frames go, and up to where it has got them.
#[derive(Debug)]
pub struct Member {
    pub(super) session: u64,
    user: Arc<str>,
    pub(super) conn: Rc<Conn>,
    pub(super) wants: Cell<Wants>,
    /// Whether it is fed by the fan-out; otherwise it is catching up by a task of its own.
    live: Cell<bool>,
    /// Index in the log of the next frame it is to get.
    pub(super) next: Cell<u64>,
    pub(super) left: Cell<bool>,
    /// What it has seen, in another region, of what this room has not delivered yet: it is withheld, and stands in the member's
    /// cursors all the same.
    ahead: RefCell<Vec<Position>>,
    _active: Held,
}

impl Member {
    pub(super) fn new(
        session: u64,
        user: Arc<str>,
        conn: Rc<Conn>,
        wants: Wants,
        next: u64,
        live: bool,
    ) -> Self {
        Self {
            session,
            user,
            conn,
            wants: Cell::new(wants),
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

    /// The frames of a pass as they are for this member, when it is ahead of the room.
    fn for_one_ahead(&self, hub: &Hub, pass: &Pass, skip: usize) -> Option<Vec<Bytes>> {
        let mut ahead = self.ahead.borrow_mut();
        if ahead.is_empty() {
            return None;
        }
        let log = hub.log.borrow();
        let withheld = |(track, seq): &Spot| {
            let mut ahead = ahead.iter();
            ahead.any(|seen| log.track_of(&seen.origin) == Some(*track) && *seq <= seen.seq)
        };
        let frames = pass.frames.iter().zip(&pass.spots).skip(skip);
        let frames = frames.filter(|(_, spot)| !withheld(spot));
        let frames = frames.map(|(frame, _)| match encode::cursor_of(frame) {
            Some(cursor) => encode::with_cursor(frame, &raise(cursor, &ahead)),
            None => frame.clone(),
        });
        let frames = frames.collect();
        ahead.retain(|seen| log.is_ahead(seen));
        Some(frames)
    }
}

/// Frames to be fanned out, and the index of the first one in the log.
#[derive(Default)]
pub(super) struct Pass {
    pub(super) first: u64,
    pub(super) frames: Vec<Bytes>,
    /// Where each is stored; none in a room without a log.
    pub(super) spots: Vec<Spot>,
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

impl Rooms {
    /// Tells the members of a room that want to know who comes and goes.
    pub async fn push_presence(&self, room: &RoomId, frames: &[Bytes]) {
        if let Some(hub) = self.existing(room) {
            hub.push_presence(frames).await;
        }
    }
}

impl Hub {
    /// Tells all members but the user's own sessions.
    pub(super) fn push_typing(&self, user: &str) {
        let frame = encode::typing(&self.room, user);
        let mut told = 0;
        for member in self
            .members
            .borrow()
            .values()
            .filter(|member| &*member.user != user)
        {
            member.conn.send(std::slice::from_ref(&frame));
            told += 1;
        }
        count(Counter::TypingDelivered, told);
    }

    /// Tells the members that want to know who comes and goes.
    async fn push_presence(&self, frames: &[Bytes]) {
        // Whoever joins during a pause asks for the list themselves; whoever leaves is looked at again.
        let members: Vec<Rc<Member>> = {
            let members = self.members.borrow();
            let want = members
                .values()
                .filter(|member| member.wants.get().presence);
            want.cloned().collect()
        };
        let mut told = 0;
        for group in members.chunks(MEMBERS_A_TURN) {
            for member in group.iter().filter(|member| !member.has_left()) {
                member.conn.send(frames);
                told += frames.len() as u64;
            }
            yield_now().await;
        }
        count(Counter::PresenceDelivered, told);
    }

    /// Gives the frames of a pass to every member that is live. Yields between groups of members; who joins meanwhile stands
    /// behind the pass already, and who leaves makes the order of members change, so the pass looks again until it found
    /// nobody left to serve.
    pub(super) async fn fan_out(&self, pass: Pass) {
        if pass.frames.is_empty() {
            return;
        }
        let mut delivered = 0;
        loop {
            let membership = self.membership.get();
            let mut at = 0;
            loop {
                delivered += self.serve(&pass, at);
                at += MEMBERS_A_TURN;
                if at >= self.member_count() {
                    break;
                }
                yield_now().await;
            }
            if membership == self.membership.get() {
                break;
            }
        }
        count(Counter::MessageDelivered, delivered);
    }

    /// The same at once, for a room whose members are one group.
    pub(super) fn fan_out_now(&self, pass: &Pass) {
        debug_assert!(self.member_count() <= MEMBERS_A_TURN, "they are one group");
        if !pass.frames.is_empty() {
            count(Counter::MessageDelivered, self.serve(pass, 0));
        }
    }

    /// Gives the frames of a pass to the members of one group, those from `at` on; how many deliveries that were.
    fn serve(&self, pass: &Pass, at: usize) -> u64 {
        let Pass { first, frames, .. } = pass;
        let target = first + frames.len() as u64;
        let mut delivered = 0;
        let members = self.members.borrow();
        let end = members.len().min(at + MEMBERS_A_TURN);
        for member in members.as_slice()[at.min(end)..end].values() {
            if !member.live.get() || member.next.get() >= target {
                continue;
            }
            let Some(skip) = member.next.get().checked_sub(*first) else {
                // It missed a pass, which can't be. Its cursor makes it whole.
                debug_assert!(false, "a live member stands before the pass");
                member.conn.close(Close::Internal);
                continue;
            };
            let skip = usize::try_from(skip).unwrap_or(frames.len());
            if let Some(its_own) = member.for_one_ahead(self, pass, skip) {
                member.conn.send(&its_own);
                delivered += its_own.len() as u64;
            } else {
                let rest = &frames[skip..];
                member.conn.send(rest);
                delivered += rest.len() as u64;
            }
            member.next.set(target);
        }
        delivered
    }
}
