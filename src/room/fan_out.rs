//! How messages and events reach the members of a room.

use std::rc::Rc;

use bytes::Bytes;
use tokio::task::yield_now;

use super::{
    hub::Hub,
    member::{Member, News, raise},
    message::Message,
    rooms::Rooms,
};
use crate::{
    codec::{Codec, PerCodec},
    model::RoomId,
    protocol::{Close, Event, SubscribedTo},
    telemetry::metrics::{Counter, count},
};

/// Number of members that are written to before other tasks of the shard get a turn.
pub(super) const MEMBERS_A_TURN: usize = 128;

/// Messages to be fanned out, and the index of the first one in the log.
#[derive(Default)]
pub(super) struct Pass {
    pub(super) first: u64,
    pub(super) messages: Vec<Rc<Message>>,
    frames: PerCodec<Vec<Bytes>>,
}

impl Pass {
    /// Adds a message, which has `index` in the log.
    pub(super) fn push(&mut self, index: u64, message: Rc<Message>) {
        debug_assert!(self.frames.made().next().is_none(), "nobody was served yet");
        if self.messages.is_empty() {
            self.first = index;
        }
        self.messages.push(message);
    }

    /// The frames that all receivers of a protocol share.
    fn frames(&self, codec: Codec) -> &[Bytes] {
        // Mostly there is one.
        if let [message] = &*self.messages {
            return std::slice::from_ref(message.shared_frame(codec));
        }
        let encode = || self.messages.iter().map(|it| it.frame(codec)).collect();
        self.frames.get(codec, encode)
    }

    /// The frames for a member that is ahead of the room: with its own cursors, and without the messages that it has
    /// already seen. `None` if the member is not ahead.
    fn for_one_ahead(&self, hub: &Hub, member: &Member, skip: usize) -> Option<Vec<Bytes>> {
        let mut ahead = member.ahead.borrow_mut();
        if ahead.is_empty() {
            return None;
        }
        let log = hub.log.borrow();
        let withheld = |message: &Message| {
            let mut ahead = ahead.iter();
            ahead.any(|seen| {
                log.track_of(&seen.origin) == Some(message.track()) && message.seq <= seen.seq
            })
        };
        let messages = self.messages.iter().skip(skip);
        let frames = messages.filter(|message| !withheld(message));
        let frames = frames.map(|message| match message.cursor() {
            Some(cursor) => message.frame_at(member.codec, &raise(cursor, &ahead)),
            None => message.frame(member.codec),
        });
        let frames = frames.collect();
        ahead.retain(|seen| log.is_ahead(seen));
        Some(frames)
    }
}

impl Rooms {
    /// Sends events to the members of a room that want presence.
    pub async fn push_presence(&self, room: &RoomId, events: &[Event]) {
        if let Some(hub) = self.existing(room) {
            hub.push_presence(events).await;
        }
    }
}

impl Hub {
    /// Sends a typing event to the members that want it, except the user's own sessions.
    pub(super) fn push_typing(&self, user: &str) {
        let event = Event::Typing {
            room: self.room.clone(),
            user: user.to_owned(),
        };
        let news = News::of(std::slice::from_ref(&event));
        let mut told = 0;
        for member in self
            .members
            .borrow()
            .values()
            .filter(|member| member.wants.get().typing && &*member.user != user)
        {
            news.tell(member);
            told += 1;
        }
        count(Counter::TypingDelivered, told);
    }

    /// Sends events to the members that want presence.
    async fn push_presence(&self, events: &[Event]) {
        let news = News::of(events);
        // A session that joins during a yield requests the presence list itself. A member that leaves is checked for
        // below.
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
                news.tell(member);
                told += events.len() as u64;
            }
            yield_now().await;
        }
        count(Counter::PresenceDelivered, told);
    }

    /// Sends the messages of a pass to every live member. Yields between groups of members. A member that joins
    /// meanwhile starts after the pass. A member that leaves changes the order of members, so the pass starts over
    /// until the membership has not changed. Members that were already served are skipped.
    pub(super) async fn fan_out(&self, pass: Pass) {
        if pass.messages.is_empty() {
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
        self.log.borrow_mut().recount(pass.messages.iter());
    }

    /// The same without yielding, for a room whose members fit in one group.
    pub(super) fn fan_out_now(&self, pass: &Pass) {
        debug_assert!(self.member_count() <= MEMBERS_A_TURN, "they are one group");
        if !pass.messages.is_empty() {
            count(Counter::MessageDelivered, self.serve(pass, 0));
            self.log.borrow_mut().recount(pass.messages.iter());
        }
    }

    /// Sends the messages of a pass to the members of one group, which begins at index `at`. Returns the number of
    /// deliveries.
    fn serve(&self, pass: &Pass, at: usize) -> u64 {
        let Pass {
            first, messages, ..
        } = pass;
        let target = first + messages.len() as u64;
        let mut delivered = 0;
        let members = self.members.borrow();
        let end = members.len().min(at + MEMBERS_A_TURN);
        for member in members.as_slice()[at.min(end)..end].values() {
            if !member.live.get() || member.next.get() >= target {
                continue;
            }
            let Some(skip) = member.next.get().checked_sub(*first) else {
                // The member missed a pass, which is a bug. It can resume with its cursor.
                debug_assert!(false, "a live member stands before the pass");
                member.outlet.close(Close::Internal);
                continue;
            };
            let skip = usize::try_from(skip).unwrap_or(messages.len());
            if let Some(its_own) = pass.for_one_ahead(self, member, skip) {
                delivered += member.send(SubscribedTo::Messages, &its_own);
            } else {
                let rest = &pass.frames(member.codec)[skip..];
                delivered += member.send(SubscribedTo::Messages, rest);
            }
            member.next.set(target);
        }
        delivered
    }
}
