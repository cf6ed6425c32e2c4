//! Joining and leaving rooms.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures_util::future::try_join_all;
use tokio::time::timeout;

use super::{
    Seat, Session,
    answers::{cursor_of, granted, may_see_presence, namespace},
    commands::{ANSWER_WITHIN, Answer, Answered, not_joined, now},
};
use crate::{
    auth::{AuthError, Identity, Right},
    codec::{Names, Tag},
    model::{Cursor, RoomId},
    protocol::{ErrorCode, JoinReply, Refused, Reply, ResumeAt, RoomSubscription, Since, Wants},
    room::{JoinAt, Joined, NewMember, ResetReason},
    runtime::unix_s,
    telemetry::metrics::{self, Counter, count},
    wire::{Gate, Outlet},
};

/// Rooms of a token that are joined at once.
const JOINS_AT_ONCE: usize = 16;

/// Subscriptions of one room, in a protocol that has several: each gets a copy of every message.
const MAX_SUBSCRIPTIONS_OF_ROOM: usize = 16;

/// The fields of a join: where the client stands, what it wants, a token for the room, and the name of its subscription.
type Wanted = (
    Option<Box<Since>>,
    Wants,
    Option<Box<str>>,
    Option<Box<RoomSubscription>>,
);

/// How a session joins a room.
struct Joining {
    since: Option<Box<Since>>,
    wants: Wants,
    outlet: Outlet,
    /// The token of the join, if it came with one.
    token: Option<Arc<Identity>>,
    /// The subscription, in a protocol that has several for one room.
    subscription: Option<Box<RoomSubscription>>,
}

/// A number for a member that is not a session. No session and no other member has it.
pub(super) fn lone_member() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1 << 63);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Session {
    /// Joins the rooms that the token names, several at once. Rooms that the user may not join, or that do not exist, are
    /// left out.
    pub(super) async fn join_channels(
        self: &Rc<Self>,
        identity: &Identity,
        mut since: Vec<(RoomId, Since)>,
        gate: &Rc<Gate>,
    ) -> Result<Vec<(JoinReply, bool)>, Refused> {
        let mut rooms = Vec::new();
        for channel in &identity.channels {
            match Names::Centrifugal.room(channel) {
                Ok(room) => rooms.push(room),
                Err(refused) => {
                    tracing::debug!(session.id = self.id, channel, %refused, "not joined");
                }
            }
        }
        rooms.sort_unstable();
        rooms.dedup();
        let mut all = Vec::with_capacity(rooms.len());
        for group in rooms.chunks(JOINS_AT_ONCE) {
            let joins = group.iter().map(|room| {
                let asked = since.iter().position(|(named, _)| named == room);
                let since = asked.map(|at| since.swap_remove(at).1);
                self.join_channel(identity, room.clone(), since, gate)
            });
            let joins: Vec<_> = joins.collect();
            all.extend(try_join_all(joins).await?.into_iter().flatten());
            if self.conn.is_over() {
                break;
            }
        }
        Ok(all)
    }

    /// Joins a room that the token names. Returns the reply, and whether the client asked to resume.
    async fn join_channel(
        self: &Rc<Self>,
        identity: &Identity,
        room: RoomId,
        since: Option<Since>,
        gate: &Rc<Gate>,
    ) -> Result<Option<(JoinReply, bool)>, Refused> {
        let recovers = since.is_some();
        let joining = Joining {
            since: since.map(Box::new),
            wants: Wants::default(),
            outlet: Outlet::Gate(Rc::clone(gate)),
            token: None,
            subscription: None,
        };
        let mut reply = None;
        let entered = self.enter(identity, room.clone(), joining, |joined| {
            reply = Some((joined, recovers));
            None
        });
        match entered.await {
            Ok(()) => Ok(reply),
            Err(refused) if refused.code.retry() => Err(refused),
            Err(refused) => {
                tracing::debug!(session.id = self.id, room.id = %room, %refused, "not joined");
                Ok(None)
            }
        }
    }

    /// Checks the token of a join.
    fn check_subscription(
        &self,
        identity: &Identity,
        room: &RoomId,
        token: &str,
    ) -> Result<Arc<Identity>, Refused> {
        let channel = Names::Centrifugal.name(room);
        let of = (&*identity.user, &*channel);
        let checked = self
            .context
            .verifier
            .verify_subscription(token, of, unix_s());
        checked.map_err(|error| {
            // For an expired one, the client gets a new one.
            let code = match error {
                AuthError::Expired { .. } => ErrorCode::Unauthorized,
                _ => ErrorCode::Forbidden,
            };
            Refused::new(code, error.to_string())
        })
    }

    pub(super) fn refresh_join(&self, identity: &Identity, room: &RoomId, token: &str) -> Answered {
        let token = self.check_subscription(identity, room, token)?;
        let rooms = self.rooms.borrow();
        let seat = rooms.get(room).filter(|seat| !seat.membership.has_ended());
        let seat = seat.ok_or_else(|| not_joined(room))?;
        let validity = self.validity(token.exp);
        *seat.token.borrow_mut() = Some(token);
        now(Reply::Refreshed(validity))
    }

    /// Joins a room. The room sends the reply, followed by the backlog, in the same step that starts the membership.
    pub(super) async fn join(
        self: &Rc<Self>,
        tag: Tag,
        identity: &Identity,
        room: RoomId,
        (since, mut wants, token, subscription): Wanted,
    ) -> Answered {
        let check = |token: &str| self.check_subscription(identity, &room, token);
        let token = token.as_deref().map(check).transpose()?;
        if self.codec.get().is_strict() {
            // In this protocol it is a wish.
            let people = &self.context.people;
            wants.presence &= may_see_presence(people, identity, &room).await.is_ok();
        }
        let or_refuse = since.as_ref().is_some_and(|since| since.or_refuse);
        let joining = Joining {
            since,
            wants,
            outlet: self.outlet_of(&room),
            token,
            subscription,
        };
        let reply = |joined: JoinReply| {
            if or_refuse && joined.reset {
                let text = "the messages since then can't be sent";
                return self.refusal(&tag, &Refused::new(ErrorCode::BadCursor, text));
            }
            self.codec.get().reply(&tag, &Reply::Joined(joined))
        };
        let entered = self.enter(identity, room, joining, reply);
        if self.codec.get().is_strict() {
            let entered = timeout(ANSWER_WITHIN, Box::pin(entered)).await;
            entered.unwrap_or_else(|_elapsed| {
                let text = "the room can't be joined now";
                Err(Refused::new(ErrorCode::Unavailable, text))
            })?;
        } else {
            entered.await?;
        }
        Ok(Answer::Apart)
    }

    /// The number of a member. A session is in a room once, but for a protocol that has several subscriptions of a room:
    /// there the others have numbers that no session has.
    fn member_id(&self, room: &RoomId) -> u64 {
        let rooms = self.rooms.borrow();
        match rooms
            .get(room)
            .is_some_and(|seat| seat.subscription.is_some())
        {
            true => lone_member(),
            false => self.id,
        }
    }

    /// Ends a subscription, and leaves the room with the last one.
    pub(super) fn unsubscribe(&self, room: &RoomId, id: &str) -> Answer {
        let mut rooms = self.rooms.borrow_mut();
        if let Some(seat) = rooms.get_mut(room) {
            seat.more.retain(|(its, _)| **its != *id);
            if seat.subscription.as_deref() == Some(id) {
                match seat.more.pop() {
                    Some((subscription, membership)) => {
                        seat.subscription = Some(subscription);
                        seat.membership = membership;
                    }
                    None => drop(rooms.remove(room)),
                }
            }
        }
        Answer::Now(Reply::Done)
    }

    /// Becomes a member of a room. `reply` makes the frame that is sent before the backlog.
    async fn enter(
        self: &Rc<Self>,
        identity: &Identity,
        room: RoomId,
        joining: Joining,
        reply: impl FnOnce(JoinReply) -> Option<Bytes>,
    ) -> Result<(), Refused> {
        let Joining {
            since,
            wants,
            outlet,
            token,
            subscription,
        } = joining;
        let config = &self.context.config;
        let durable = namespace(config, &room)?.durable;
        if token.is_none() {
            granted(identity, Right::Read, &room)?;
        }
        let people = &self.context.people;
        let known = people.check(identity, Right::Read, &room).await?;
        if wants.presence {
            may_see_presence(people, identity, &room).await?;
        }
        let or_refuse = since.as_ref().is_some_and(|since| since.or_refuse);
        let (since, only) = match since {
            None => (None, None),
            Some(since) => {
                let at = match &since.at {
                    ResumeAt::Cursor(text) => JoinAt::After(cursor_of(text)?),
                    ResumeAt::Beginning => JoinAt::After(Cursor::default()),
                    ResumeAt::Before(first) => JoinAt::Before(*first),
                };
                (Some(at), since.only)
            }
        };
        let limit = config.limits.rooms_per_session;
        {
            let mut rooms = self.rooms.borrow_mut();
            rooms.retain(|_, seat| !seat.membership.has_ended());
            let more = rooms.get(&room).map_or(0, |seat| seat.more.len() + 1);
            if subscription.is_some() && more >= MAX_SUBSCRIPTIONS_OF_ROOM {
                let text = format!(
                    "a session may have {MAX_SUBSCRIPTIONS_OF_ROOM} subscriptions of a room"
                );
                return Err(Refused::new(ErrorCode::Limit, text));
            }
            if rooms.len() >= limit && !rooms.contains_key(&room) {
                let text = format!("a session may be in {limit} rooms");
                return Err(Refused::new(ErrorCode::Limit, text));
            }
        }
        self.context.rooms.open(&room, durable);
        // Replies are sent in order, so the acks of earlier publishes come first. Those publishes also move the marker.
        self.replies.idle().await;
        let marker = if durable {
            let markers = &self.context.markers;
            markers.for_join(&room, &identity.user).await
        } else {
            None
        };
        let name = subscription
            .as_ref()
            .map(|subscription| subscription.id.clone());
        let who = NewMember {
            session: self.member_id(&room),
            user: Arc::clone(&identity.user),
            outlet,
            codec: self.codec.get(),
            wants,
            subscription,
        };
        let refused = Cell::new(false);
        let validity = token.as_ref().map(|token| self.validity(token.exp));
        let reply = |joined: Joined| {
            refused.set(or_refuse && joined.reset.is_some());
            reply(JoinReply {
                room: room.clone(),
                cursor: joined.cursor,
                head: joined.head,
                replay: joined.replay,
                reset: joined.reset.is_some(),
                reason: joined.reset.map(ResetReason::as_str),
                marker,
                own: config.region(),
                validity,
            })
        };
        let rooms = &self.context.rooms;
        let membership = rooms
            .join(&room, durable, since, only, who, reply)
            .await
            .map_err(|error| {
                count(Counter::JoinResult(metrics::Joined::Unavailable), 1);
                Refused::new(ErrorCode::Unavailable, error.to_string())
            })?;
        if refused.get() {
            // Before the user is shown as present. A membership that it has replaced is over.
            self.rooms.borrow_mut().remove(&room);
            return Ok(());
        }
        if let Some(name) = &name
            && let Some(seat) = self.rooms.borrow_mut().get_mut(&room)
            && !seat.membership.has_ended()
        {
            seat.more.push((name.clone(), membership));
            if wants.presence && seat.watch.is_none() {
                seat.watch = Some(self.context.presence.watch(&room, self.context.shard));
            }
            return Ok(());
        }
        // Enter before the replaced seat is dropped: a user who joins again must not be shown as having left.
        let presence = &self.context.presence;
        let seat = Box::new(Seat {
            membership,
            subscription: name,
            more: Vec::new(),
            _present: presence.enter(&room, &identity.user, identity.info.as_ref()),
            watch: wants
                .presence
                .then(|| presence.watch(&room, self.context.shard)),
            token: RefCell::new(token),
            known,
        });
        let replaced = self.rooms.borrow_mut().insert(room.clone(), seat);
        drop(replaced);
        // The record may have changed while the room was joined.
        self.on_record(&room);
        Ok(())
    }

    /// Joins a room for the back end, until the time `until` (seconds since 1970). `tell` makes the frame that is sent
    /// before the messages. Returns whether the session has joined: not if it is in the room already.
    pub(super) async fn join_for_back_end(
        self: &Rc<Self>,
        identity: &Identity,
        room: RoomId,
        until: u64,
        tell: impl FnOnce(JoinReply) -> Option<Bytes>,
    ) -> Result<bool, Refused> {
        let is_in = |seat: &Seat| !seat.membership.has_ended();
        if self
            .rooms
            .borrow()
            .get(&room)
            .is_some_and(|seat| is_in(seat))
        {
            return Ok(false);
        }
        // The seat has a token of its own, so that what the session's own token allows does not matter.
        let verifier = &self.context.verifier;
        let token = verifier.without_token(&identity.user, identity.is_anonymous, unix_s());
        let token =
            token.map_err(|error| Refused::new(ErrorCode::Unauthorized, error.to_string()))?;
        let joining = Joining {
            since: None,
            wants: Wants::default(),
            outlet: Outlet::Socket(Rc::clone(&self.conn)),
            token: Some(Arc::new(token.until(until))),
            subscription: None,
        };
        let entered = self.enter(identity, room, joining, tell);
        let late = |_elapsed| {
            let text = "the room can't be joined now";
            Err(Refused::new(ErrorCode::Unavailable, text))
        };
        let entered = timeout(ANSWER_WITHIN, Box::pin(entered)).await;
        entered.unwrap_or_else(late).map(|()| true)
    }

    pub(super) fn leave(&self, room: RoomId) -> Answered {
        let seat = self.rooms.borrow_mut().remove(&room);
        if seat.is_none_or(|seat| seat.membership.has_ended()) {
            return Err(not_joined(&room));
        }
        now(Reply::Left { room })
    }
}
