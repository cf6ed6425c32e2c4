//! What each command does.

use std::{rc::Rc, sync::Arc};

use bytes::Bytes;
use tokio::task::spawn_local;
use tracing::Instrument as _;

use super::{
    Context, MAX_RATE_STRIKES, MAX_UNDECODABLE, Seat, Session, frame, state::may_see_presence,
};
use crate::{
    auth::{AuthError, Identity, Right},
    bus::{Outgoing, PublishError},
    config::Config,
    model::{Cursor, Kind, RoomId, json_flaw},
    protocol::{
        Close, ErrorCode,
        native::{Command, Op, Publication, Refusal, Wants, Writer, write_error},
    },
    room::{Joined, NewMember},
    runtime::unix_s,
    telemetry::metrics::{self, Counter, Label as _, Published, count},
};

/// A refusal without its `rid`.
pub(crate) type Refused = (ErrorCode, String);

/// The message's id, its cursor where it has one, its time, and whether it had been stored before.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) cursor: Option<Cursor>,
    pub(crate) ts: u64,
    pub(crate) duplicate: bool,
}

/// Checks a publication against grants, namespace and limits.
///
/// # Errors
/// The refusal.
pub(crate) fn check_publication(
    config: &Config,
    identity: &Identity,
    publication: &Publication,
) -> Result<bool, Refused> {
    let Publication {
        room,
        kind,
        body,
        target,
        ..
    } = publication;
    let durable = namespace(config, room)?.durable;
    if !identity.may(Right::Write, room) {
        return Err(forbidden(Right::Write, room));
    }
    if let (Kind::Edit | Kind::Delete, Some((_, reference))) = (kind, target)
        && !reference.is_by(&identity.user)
        && !identity.may(Right::Moderate, room)
    {
        let text = format!(
            "{} of another's message needs the right moderate",
            kind.as_str()
        );
        return Err((ErrorCode::Forbidden, text));
    }
    let (size, limit) = (body.get().len() as u64, config.limits.body.as_u64());
    if size > limit {
        return Err((
            ErrorCode::TooLarge,
            format!("the body has {size} bytes, the limit is {limit}"),
        ));
    }
    if let Some(flaw) = json_flaw(body.get().as_bytes(), config.limits.json_depth) {
        return Err((ErrorCode::BadRequest, format!("the body {flaw}")));
    }
    Ok(durable)
}

pub(crate) fn namespace<'c>(
    config: &'c Config,
    room: &RoomId,
) -> Result<&'c crate::config::Namespace, Refused> {
    config.namespaces.get(room.namespace()).ok_or_else(|| {
        let text = format!("there is no namespace {:?}", room.namespace());
        (ErrorCode::UnknownNamespace, text)
    })
}

pub(super) fn forbidden(right: Right, room: &RoomId) -> Refused {
    (
        ErrorCode::Forbidden,
        format!("the token does not grant {} on {room}", right.as_str()),
    )
}

/// What a client is told of a publish that failed.
pub(crate) fn publish_refusal(error: &PublishError) -> Refused {
    (error.code(), error.to_string())
}

impl Session {
    /// Takes a command and sees to it that it is answered.
    pub(super) async fn on_command(self: &Rc<Self>, command: Result<Command, Refusal>) {
        let op = command
            .as_ref()
            .map_or(metrics::Op::Unknown, |command| label(&command.op));
        count(Counter::CommandReceived(op), 1);
        let span = tracing::debug_span!("command", op = op.value());
        self.obey(command).instrument(span).await;
    }

    async fn obey(self: &Rc<Self>, command: Result<Command, Refusal>) {
        self.replies.room_for_replies().await;
        if self.draining.get() {
            return;
        }
        let command = match command {
            Ok(command) => command,
            Err(refusal) => return self.on_undecodable(&refusal),
        };
        self.undecodable.set(0);
        let Command { rid, op } = command;
        if !self.within_pace() {
            self.rate_strikes.set(self.rate_strikes.get() + 1);
            let limit = self.context.config.limits.commands_per_second;
            self.refuse(
                rid,
                (
                    ErrorCode::RateLimited,
                    format!("more than {limit} commands per second"),
                ),
            );
            if self.rate_strikes.get() >= MAX_RATE_STRIKES {
                self.conn.close(Close::TooMany);
            }
            return;
        }
        self.rate_strikes.set(0);
        let identity = self.identity.borrow().clone();
        let done = match (identity, op) {
            (None, Op::Auth { token }) => self.auth(rid, &token),
            (None, _) => Err((
                ErrorCode::Unauthorized,
                "the first command must be auth".to_owned(),
            )),
            (Some(_), Op::Auth { .. }) => {
                let text = "auth is only for the first frame; refresh replaces a token".to_owned();
                Err((ErrorCode::BadRequest, text))
            }
            (Some(_), Op::Ping) => {
                self.replies
                    .now(frame(|out| Writer::reply(out, "pong", rid).end()));
                Ok(())
            }
            (Some(identity), Op::Refresh { token }) => self.refresh(rid, &identity, &token),
            // The large ones apart, for the others to be small.
            (Some(identity), Op::Join { room, since, wants }) => {
                Box::pin(self.join(rid, &identity, room, since, wants)).await
            }
            (Some(_), Op::Leave { room }) => self.leave(rid, &room),
            (Some(identity), Op::Send(publication)) => self.send(rid, identity, *publication).await,
            (Some(identity), Op::Typing { room }) => self.typing(rid, &identity, &room),
            (Some(identity), Op::Read { room, cursor }) => {
                Box::pin(self.read(rid, &identity, &room, &cursor)).await
            }
            (Some(identity), Op::Presence { room, page }) => {
                self.presence(rid, &identity, &room, &page).await
            }
            (Some(identity), Op::Readers { room, page }) => {
                Box::pin(self.readers(rid, &identity, &room, &page)).await
            }
            (Some(identity), Op::Unread { rooms }) => {
                Box::pin(self.unread(rid, &identity, &rooms)).await
            }
            (Some(identity), Op::History { room, page }) => {
                self.history(rid, &identity, room, page).await
            }
        };
        if let Err(refused) = done {
            self.refuse(rid, refused);
        }
    }

    fn on_undecodable(&self, refusal: &Refusal) {
        count(Counter::CommandRefused(refusal.code), 1);
        self.replies.now(frame(|out| write_error(out, refusal)));
        let strikes = if self.within_pace() && refusal.rid.is_some() {
            0
        } else {
            self.undecodable.get() + 1
        };
        self.undecodable.set(strikes);
        if strikes >= MAX_UNDECODABLE {
            self.conn.close(Close::ClientProtocol);
        }
    }

    fn refuse(&self, rid: u64, (code, message): Refused) {
        self.replies.now(error_frame(rid, code, message));
    }

    fn auth(self: &Rc<Self>, rid: u64, token: &str) -> Result<(), Refused> {
        let identity = match self.context.verifier.verify(token, unix_s()) {
            Ok(identity) => identity,
            Err(error) => {
                self.refuse(rid, (ErrorCode::Unauthorized, error.to_string()));
                self.conn.close(match error {
                    AuthError::Revoked => Close::Revoked,
                    _ => Close::BadToken,
                });
                return Ok(());
            }
        };
        let Some(slot) = (self.context.admit_user)(&identity.user) else {
            let text = "this user has too many sessions on this edge".to_owned();
            self.refuse(rid, (ErrorCode::Limit, text));
            self.conn.close(Close::TooMany);
            return Ok(());
        };
        *self.user_slot.borrow_mut() = Some(slot);
        self.replies.now(frame(|out| {
            Writer::reply(out, "authed", rid)
                .string("user", &identity.user)
                .number("exp", identity.exp)
                .end();
        }));
        *self.identity.borrow_mut() = Some(identity);
        self.tell_expiry(unix_s());
        Ok(())
    }

    fn refresh(&self, rid: u64, old: &Arc<Identity>, token: &str) -> Result<(), Refused> {
        let new = self
            .context
            .verifier
            .verify(token, unix_s())
            .map_err(|error| (ErrorCode::Unauthorized, error.to_string()))?;
        if new.user != old.user {
            let text = "the new token is of another user".to_owned();
            return Err((ErrorCode::Forbidden, text));
        }
        self.replies.now(frame(|out| {
            Writer::reply(out, "refreshed", rid)
                .number("exp", new.exp)
                .end()
        }));
        // Rooms that the new token does not cover any more.
        let lost: Vec<RoomId> = {
            let rooms = self.rooms.borrow();
            rooms
                .keys()
                .filter(|room| !new.may(Right::Read, room))
                .cloned()
                .collect()
        };
        for room in lost {
            self.rooms.borrow_mut().remove(&room);
            self.push(|out| {
                Writer::new(out, "kicked")
                    .string("room", room.as_str())
                    .string("code", ErrorCode::Forbidden.as_str())
                    .end();
            });
        }
        for (room, seat) in self.rooms.borrow_mut().iter_mut() {
            if seat.watch.is_some() && !new.may(Right::Presence, room) {
                seat.membership.ignore_presence();
                seat.watch = None;
            }
        }
        *self.identity.borrow_mut() = Some(new);
        self.expiry_told.set(false);
        self.tell_expiry(unix_s());
        Ok(())
    }

    async fn join(
        self: &Rc<Self>,
        rid: u64,
        identity: &Identity,
        room: RoomId,
        since: Option<String>,
        wants: Wants,
    ) -> Result<(), Refused> {
        let config = &self.context.config;
        let durable = namespace(config, &room)?.durable;
        if !identity.may(Right::Read, &room) {
            return Err(forbidden(Right::Read, &room));
        }
        if wants.presence {
            may_see_presence(config, identity, &room)?;
        }
        let since: Option<Cursor> = since
            .map(|text| text.parse())
            .transpose()
            .map_err(|error: crate::model::BadCursor| (ErrorCode::BadCursor, error.to_string()))?;
        let limit = config.limits.rooms_per_session;
        {
            let mut rooms = self.rooms.borrow_mut();
            rooms.retain(|_, seat| !seat.membership.has_ended());
            if rooms.len() >= limit && !rooms.contains_key(&room) {
                return Err((
                    ErrorCode::Limit,
                    format!("a session may be in {limit} rooms"),
                ));
            }
        }
        self.context.rooms.open(&room, durable);
        // The reply begins the membership, and replies go in order: the acks before it first. They move the marker too.
        self.replies.idle().await;
        let marker = if durable {
            let markers = &self.context.markers;
            markers.for_join(&room, &identity.user).await
        } else {
            None
        };
        let who = NewMember {
            session: self.id,
            user: Arc::clone(&identity.user),
            conn: Rc::clone(&self.conn),
            wants,
        };
        let reply = |joined: &Joined| joined_frame(rid, &room, joined, marker.as_ref());
        let membership = self
            .context
            .rooms
            .join(&room, durable, since, who, reply)
            .await
            .map_err(|error| {
                count(Counter::JoinResult(metrics::Joined::Unavailable), 1);
                (ErrorCode::Unavailable, error.to_string())
            })?;
        // Before the seat that it replaces is given up: who joins again does not leave.
        let presence = &self.context.presence;
        let seat = Seat {
            membership,
            _present: presence.enter(&room, &identity.user, identity.info.as_ref()),
            watch: wants
                .presence
                .then(|| presence.watch(&room, self.context.shard)),
        };
        let replaced = self.rooms.borrow_mut().insert(room, seat);
        drop(replaced);
        Ok(())
    }

    fn leave(&self, rid: u64, room: &RoomId) -> Result<(), Refused> {
        let seat = self.rooms.borrow_mut().remove(room);
        if seat.is_none_or(|seat| seat.membership.has_ended()) {
            return Err(not_joined(room));
        }
        self.replies.now(frame(|out| {
            Writer::reply(out, "left", rid)
                .string("room", room.as_str())
                .end();
        }));
        Ok(())
    }

    fn typing(&self, rid: u64, identity: &Identity, room: &RoomId) -> Result<(), Refused> {
        if !namespace(&self.context.config, room)?.typing {
            let text = format!("typing is off in the namespace {:?}", room.namespace());
            return Err((ErrorCode::BadRequest, text));
        }
        if !identity.may(Right::Write, room) {
            return Err(forbidden(Right::Write, room));
        }
        if self
            .rooms
            .borrow()
            .get(room)
            .is_none_or(|seat| seat.membership.has_ended())
        {
            return Err(not_joined(room));
        }
        self.context
            .publisher
            .typing(room, &identity.user)
            .map_err(|error| publish_refusal(&error))?;
        count(Counter::TypingPublished, 1);
        self.replies
            .now(frame(|out| Writer::reply(out, "ok", rid).end()));
        Ok(())
    }

    /// Publishes in the background: the session goes on with its next command, and the ack comes in its turn.
    async fn send(
        self: &Rc<Self>,
        rid: u64,
        identity: Arc<Identity>,
        publication: Publication,
    ) -> Result<(), Refused> {
        let durable = check_publication(&self.context.config, &identity, &publication)?;
        self.replies.room_for_one().await;
        let room = publication.room.clone();
        let ticket = self.replies.promise(room, publication.body.get().len());
        let session = Rc::clone(self);
        // The shard runs its tasks in the order in which they were started: publishes of one session reach NATS in the order
        // in which they came.
        let publish = async move {
            let reply = session.publish(rid, &identity, &publication, durable).await;
            session.replies.keep(ticket, reply);
        };
        spawn_local(publish.in_current_span());
        Ok(())
    }

    async fn publish(
        &self,
        rid: u64,
        identity: &Identity,
        publication: &Publication,
        durable: bool,
    ) -> Bytes {
        let made;
        let id = match &publication.id {
            Some(id) => id.as_str(),
            None => {
                made = ulid::Ulid::new().to_string();
                &made
            }
        };
        let after = {
            let rooms = self.rooms.borrow();
            let joined = rooms.get(&publication.room);
            joined.and_then(|joined| joined.membership.seen_elsewhere())
        };
        let outgoing = Outgoing {
            publication,
            user: &identity.user,
            id,
            after,
        };
        match self.accept(&outgoing, durable).await {
            Ok(accepted) => {
                count(
                    Counter::MessagePublished(if durable {
                        Published::Durable
                    } else {
                        Published::Ephemeral
                    }),
                    1,
                );
                ack_frame(rid, &publication.room, id, &accepted)
            }
            Err(error) => {
                let (code, message) = publish_refusal(&error);
                error_frame(rid, code, message)
            }
        }
    }

    /// A message that is repeated here, after it was stored in another region, or so long ago that the stream has forgotten it:
    /// it need not be stored again.
    fn said_before(&self, outgoing: &Outgoing<'_>) -> Option<(Cursor, u64)> {
        // What the edge has made an id for is new.
        outgoing.publication.id.as_ref()?;
        let rooms = self.rooms.borrow();
        let joined = rooms.get(&outgoing.publication.room)?;
        let class = outgoing.publication.kind.class();
        let window = self.context.config.streams.duplicate_window;
        let found = joined
            .membership
            .said_before(class, (outgoing.user, outgoing.id), window)?;
        count(Counter::PublishDuplicate, 1);
        Some(found)
    }

    async fn accept(
        &self,
        outgoing: &Outgoing<'_>,
        durable: bool,
    ) -> Result<Accepted, PublishError> {
        let Context { publisher, .. } = &*self.context;
        if !durable {
            let ts = publisher.ephemeral(outgoing)?;
            return Ok(Accepted {
                cursor: None,
                ts,
                duplicate: false,
            });
        }
        let room = &outgoing.publication.room;
        if let Some((cursor, ts)) = self.said_before(outgoing) {
            return Ok(Accepted {
                cursor: Some(cursor),
                ts,
                duplicate: true,
            });
        }
        // A sender is usually a member, and then its hub knows the time.
        let known_time = |seq| self.rooms.borrow().get(room)?.membership.time_of(seq);
        let acked = publisher.durable(outgoing, known_time).await?;
        if outgoing.publication.kind == Kind::Message {
            let markers = &self.context.markers;
            markers.sent(room, outgoing.user, &acked.cursor);
        }
        Ok(Accepted {
            cursor: Some(acked.cursor),
            ts: acked.ts,
            duplicate: acked.duplicate,
        })
    }
}

fn not_joined(room: &RoomId) -> Refused {
    (
        ErrorCode::NotJoined,
        format!("this session is not in {room}"),
    )
}

pub(super) fn error_frame(rid: u64, code: ErrorCode, message: String) -> Bytes {
    count(Counter::CommandRefused(code), 1);
    frame(|out| {
        write_error(
            out,
            &Refusal {
                rid: Some(rid),
                code,
                message,
            },
        )
    })
}

fn joined_frame(rid: u64, room: &RoomId, joined: &Joined, marker: Option<&Cursor>) -> Bytes {
    frame(|out| {
        let mut writer = Writer::reply(out, "joined", rid);
        writer.string("room", room.as_str());
        if let (Some(cursor), Some(head)) = (&joined.cursor, &joined.head) {
            writer
                .string("cursor", &cursor.to_string())
                .string("head", &head.to_string());
        }
        writer.number("replay", joined.replay);
        if let Some(reason) = joined.reset {
            writer
                .boolean("reset", true)
                .string("reason", reason.as_str());
        }
        if let Some(marker) = marker {
            writer.string("marker", &marker.to_string());
        }
        writer.end();
    })
}

fn ack_frame(rid: u64, room: &RoomId, id: &str, accepted: &Accepted) -> Bytes {
    frame(|out| {
        let mut writer = Writer::reply(out, "ack", rid);
        writer.string("room", room.as_str()).string("id", id);
        if let Some(cursor) = &accepted.cursor {
            writer.string("cursor", &cursor.to_string());
        }
        writer
            .number("ts", accepted.ts)
            .boolean("dup", accepted.duplicate)
            .end();
    })
}

fn label(op: &Op) -> metrics::Op {
    match op {
        Op::Auth { .. } => metrics::Op::Auth,
        Op::Join { .. } => metrics::Op::Join,
        Op::Leave { .. } => metrics::Op::Leave,
        Op::Send(_) => metrics::Op::Send,
        Op::Typing { .. } => metrics::Op::Typing,
        Op::Read { .. } => metrics::Op::Read,
        Op::Presence { .. } => metrics::Op::Presence,
        Op::Readers { .. } => metrics::Op::Readers,
        Op::Unread { .. } => metrics::Op::Unread,
        Op::History { .. } => metrics::Op::History,
        Op::Refresh { .. } => metrics::Op::Refresh,
        Op::Ping => metrics::Op::Ping,
    }
}
