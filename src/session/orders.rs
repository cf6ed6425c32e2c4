//! What a session does when a back end says so.

use std::{rc::Rc, sync::Arc};

use super::Session;
use crate::{
    auth::Right,
    codec::Tag,
    model::RoomId,
    people::Removal,
    protocol::{Close, ErrorCode, Event, Obeyed, OrderKind, Refused},
    runtime::{unix_ms, unix_s},
};

impl Session {
    /// Whether it is a session of `user` that has not ended.
    pub(crate) fn is_of(&self, user: &str) -> bool {
        let identity = self.identity.borrow();
        let is_of = identity.as_ref().is_some_and(|it| *it.user == *user);
        is_of && self.conn.closing().is_none()
    }

    /// Leaves a room that its record does not let the user be in any more, and stops what it does not allow.
    pub(crate) fn on_record(self: &Rc<Self>, room: &RoomId) {
        let Some(identity) = self.identity.borrow().clone() else {
            return;
        };
        let (removal, sees) = {
            let rooms = self.rooms.borrow();
            let Some(seat) = rooms.get(room).filter(|seat| !seat.membership.has_ended()) else {
                return;
            };
            seat.known.standing(&self.context.config, room, |standing| {
                let sees = standing.check(&identity, Right::Presence, room, unix_ms());
                (standing.removal(&identity, room), sees.is_ok())
            })
        };
        if let Some(removal) = removal {
            self.rooms.borrow_mut().remove(room);
            return self.tell_removal(room, removal);
        }
        if !sees && let Some(seat) = self.rooms.borrow_mut().get_mut(room) {
            seat.membership.ignore_presence();
            seat.watch = None;
        }
    }

    /// Looks at the records of all its rooms, since the identity has changed.
    pub(crate) fn judge_rooms(self: &Rc<Self>) {
        for room in self.rooms() {
            self.on_record(&room);
        }
        self.judge_watches();
    }

    /// The rooms that it is in.
    pub(crate) fn rooms(&self) -> Vec<RoomId> {
        self.rooms.borrow().keys().cloned().collect()
    }

    fn tell_removal(self: &Rc<Self>, room: &RoomId, removal: Removal) {
        let (room, code) = (room.clone(), removal.as_str());
        if self.codec.get().is_stomp() {
            // The end of one subscription can't be told, and must not go unnoticed.
            let text = match removal {
                Removal::Removed => format!("this session was removed from {room}"),
                Removal::Banned => format!("this user was banned from {room}"),
                Removal::Closed => format!("{room} was closed"),
            };
            self.refuse(&Tag::None, &Refused::new(ErrorCode::Forbidden, text));
        } else {
            self.push(&Event::Kicked { room, code });
        }
    }

    /// Carries out an order. Returns whether there was anything to do.
    pub(crate) async fn follow(self: Rc<Self>, what: &OrderKind) -> bool {
        let Some(identity) = self.identity.borrow().clone() else {
            return false;
        };
        let codec = self.codec.get();
        match what {
            _ if self.conn.closing().is_some() => false,
            OrderKind::Disconnect { code, reason } => {
                match codec.obeyed(&Obeyed::Disconnected(*code, reason)) {
                    Some(frame) => self.conn.close_with(Close::Disconnected, frame),
                    None => self.conn.close(Close::Disconnected),
                }
                true
            }
            OrderKind::Expire => {
                self.conn.close(Close::Expired);
                true
            }
            OrderKind::Extend { exp } => {
                *self.identity.borrow_mut() = Some(Arc::new(identity.until(*exp)));
                self.expiry_told.set(false);
                if let Some(frame) = codec.obeyed(&Obeyed::Extended(self.validity(*exp))) {
                    self.conn.send(&[frame]);
                }
                self.tell_expiry(unix_s());
                true
            }
            OrderKind::Leave { room } => {
                let seat = self.rooms.borrow_mut().remove(room);
                if seat.is_none_or(|seat| seat.membership.has_ended()) {
                    return false;
                }
                self.tell_removal(room, Removal::Removed);
                true
            }
            // Without a frame that says so, the client would get messages of a room that it knows nothing of.
            OrderKind::Join { .. } if !codec.is_strict() => false,
            OrderKind::Join { room, until, data } => {
                let tell = |joined| codec.obeyed(&Obeyed::Joined(&joined, data.as_deref()));
                let joined = self.join_for_back_end(&identity, room.clone(), *until, tell);
                joined.await.unwrap_or_else(|refused| {
                    tracing::debug!(session.id = self.id, room.id = %room, %refused, "not joined");
                    false
                })
            }
        }
    }
}
