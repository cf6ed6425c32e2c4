//! What each command does.

use std::{rc::Rc, sync::Arc};

use bytes::Bytes;
use tokio::task::spawn_local;
use tracing::Instrument as _;

use super::{
    MAX_RATE_STRIKES, MAX_UNDECODABLE, Seat, Session,
    answers::{self, cursor_of, granted, may_see_presence, namespace},
    replies::MAX_WAITING_BYTES,
};
use crate::{
    auth::{AuthError, Identity, Right},
    bus::{Outgoing, PublishError},
    codec::{Request, Tag},
    history::PageRequest,
    model::{Cursor, RoomId},
    protocol::{
        Close, Command, ErrorCode, Event, HistoryOf, JoinReply, PageOf, Publication, PublishReply,
        Refused, Reply, Wants,
    },
    room::{Joined, NewMember, ResetReason},
    runtime::unix_s,
    telemetry::metrics::{self, Counter, Label as _, Published, count},
    wire::Outlet,
};

/// What a page of history counts against [`MAX_WAITING_BYTES`]: half of it, so that at most two pages are read at once.
const PAGE_WEIGHT: usize = MAX_WAITING_BYTES / 2;

/// When a command is answered.
enum Answer {
    Now(Reply),
    /// The reply was sent already, or will be sent when its turn comes.
    Apart,
}

type Answered = Result<Answer, Refused>;

fn now(reply: Reply) -> Answered {
    Ok(Answer::Now(reply))
}

impl Session {
    /// Carries out a command and makes sure that it is answered.
    pub(super) async fn on_request(self: &Rc<Self>, request: Request) {
        let op = match &request.command {
            Ok(command) => label(command),
            Err(_) => metrics::Op::Unknown,
        };
        count(Counter::CommandReceived(op), 1);
        let span = tracing::debug_span!("command", op = op.value());
        self.obey(request).instrument(span).await;
    }

    async fn obey(self: &Rc<Self>, Request { tag, command }: Request) {
        self.replies.room_for_replies().await;
        if self.draining.get() {
            return;
        }
        let command = match command {
            Ok(command) => command,
            Err(refused) => return self.on_undecodable(tag, &refused),
        };
        self.undecodable.set(0);
        if !self.within_pace() {
            self.rate_strikes.set(self.rate_strikes.get() + 1);
            let limit = self.context.config.limits.commands_per_second;
            let text = format!("more than {limit} commands per second");
            self.refuse(tag, &Refused::new(ErrorCode::RateLimited, text));
            if self.rate_strikes.get() >= MAX_RATE_STRIKES {
                self.conn.close(Close::TooMany);
            }
            return;
        }
        self.rate_strikes.set(0);
        match self.carry_out(tag, command).await {
            Ok(Answer::Now(reply)) => self.replies.now(self.codec.reply(tag, &reply)),
            Ok(Answer::Apart) => {}
            Err(refused) => self.refuse(tag, &refused),
        }
    }

    async fn carry_out(self: &Rc<Self>, tag: Tag, command: Command) -> Answered {
        let Some(identity) = self.identity.borrow().clone() else {
            return match command {
                Command::Auth { token } => self.auth(tag, &token),
                _ => Err(Refused::new(
                    ErrorCode::Unauthorized,
                    "the first command must be auth",
                )),
            };
        };
        let (context, config) = (&*self.context, &*self.context.config);
        // Large futures are boxed, so that the others stay small.
        match command {
            Command::Auth { .. } => {
                let text = "auth is only for the first frame; refresh replaces a token";
                Err(Refused::new(ErrorCode::BadRequest, text))
            }
            Command::Ping => now(Reply::Pong),
            Command::Refresh { token } => self.refresh(tag, &identity, &token),
            Command::Join { room, since, wants } => {
                Box::pin(self.join(tag, &identity, room, since, wants)).await
            }
            Command::Leave { room } => self.leave(room),
            Command::Send(publication) => self.send(tag, identity, *publication).await,
            Command::Typing { room } => self.typing(&identity, &room),
            Command::Read { room, cursor } => {
                let markers = &context.markers;
                let head = self.head(&room);
                let read = answers::read(config, markers, &identity, &room, &cursor, head);
                now(Reply::Read(Box::pin(read).await?))
            }
            Command::Presence { room, page } => self.presence(&identity, room, &page).await,
            Command::Readers { room, page } => {
                let readers = answers::readers(config, &context.markers, &identity, room, &page);
                now(Reply::Readers(Box::pin(readers).await?))
            }
            Command::Unread { rooms } => {
                let unread = answers::unread(config, &context.markers, &identity, &rooms);
                now(Reply::Unread(Box::pin(unread).await?))
            }
            Command::History { room, page } => self.history(tag, &identity, room, page).await,
        }
    }

    fn on_undecodable(&self, tag: Tag, refused: &Refused) {
        self.refuse(tag, refused);
        let strikes = if self.within_pace() && tag != Tag::None {
            0
        } else {
            self.undecodable.get() + 1
        };
        self.undecodable.set(strikes);
        if strikes >= MAX_UNDECODABLE {
            self.conn.close(Close::ClientProtocol);
        }
    }

    fn refuse(&self, tag: Tag, refused: &Refused) {
        self.replies.now(self.refusal(tag, refused));
    }

    fn refusal(&self, tag: Tag, refused: &Refused) -> Bytes {
        count(Counter::CommandRefused(refused.code), 1);
        self.codec.refusal(tag, refused)
    }

    fn auth(self: &Rc<Self>, tag: Tag, token: &str) -> Answered {
        let refuse = |code, text: String, close| {
            self.refuse(tag, &Refused::new(code, text));
            self.conn.close(close);
            Ok(Answer::Apart)
        };
        let identity = match self.context.verifier.verify(token, unix_s()) {
            Ok(identity) => identity,
            Err(error) => {
                let close = match error {
                    AuthError::Revoked => Close::Revoked,
                    _ => Close::BadToken,
                };
                return refuse(ErrorCode::Unauthorized, error.to_string(), close);
            }
        };
        let Some(slot) = (self.context.admit_user)(&identity.user) else {
            let text = "this user has too many sessions on this edge".to_owned();
            return refuse(ErrorCode::Limit, text, Close::TooMany);
        };
        *self.user_slot.borrow_mut() = Some(slot);
        let authed = Reply::Authed {
            user: Arc::clone(&identity.user),
            exp: identity.exp,
        };
        self.replies.now(self.codec.reply(tag, &authed));
        *self.identity.borrow_mut() = Some(identity);
        self.tell_expiry(unix_s());
        Ok(Answer::Apart)
    }

    fn refresh(&self, tag: Tag, old: &Arc<Identity>, token: &str) -> Answered {
        let new = self
            .context
            .verifier
            .verify(token, unix_s())
            .map_err(|error| Refused::new(ErrorCode::Unauthorized, error.to_string()))?;
        if new.user != old.user {
            let text = "the new token is of another user";
            return Err(Refused::new(ErrorCode::Forbidden, text));
        }
        let refreshed = Reply::Refreshed { exp: new.exp };
        self.replies.now(self.codec.reply(tag, &refreshed));
        // Leave the rooms that the new token does not cover.
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
            let code = ErrorCode::Forbidden.as_str();
            self.push(&Event::Kicked { room, code });
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
        Ok(Answer::Apart)
    }

    /// Joins a room. The room sends the reply, followed by the backlog, in the same step that starts the membership.
    async fn join(
        self: &Rc<Self>,
        tag: Tag,
        identity: &Identity,
        room: RoomId,
        since: Option<String>,
        wants: Wants,
    ) -> Answered {
        let config = &self.context.config;
        let durable = namespace(config, &room)?.durable;
        granted(identity, Right::Read, &room)?;
        if wants.presence {
            may_see_presence(config, identity, &room)?;
        }
        let since = since.as_deref().map(cursor_of).transpose()?;
        let limit = config.limits.rooms_per_session;
        {
            let mut rooms = self.rooms.borrow_mut();
            rooms.retain(|_, seat| !seat.membership.has_ended());
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
        let who = NewMember {
            session: self.id,
            user: Arc::clone(&identity.user),
            outlet: Outlet::Socket(Rc::clone(&self.conn)),
            codec: self.codec,
            wants,
        };
        let reply = |joined: Joined| {
            let joined = JoinReply {
                room: room.clone(),
                cursor: joined.cursor,
                head: joined.head,
                replay: joined.replay,
                reset: joined.reset.is_some(),
                reason: joined.reset.map(ResetReason::as_str),
                marker,
            };
            self.codec.reply(tag, &Reply::Joined(joined))
        };
        let membership = self
            .context
            .rooms
            .join(&room, durable, since, who, reply)
            .await
            .map_err(|error| {
                count(Counter::JoinResult(metrics::Joined::Unavailable), 1);
                Refused::new(ErrorCode::Unavailable, error.to_string())
            })?;
        // Enter before the replaced seat is dropped: a user who joins again must not be shown as having left.
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
        Ok(Answer::Apart)
    }

    fn leave(&self, room: RoomId) -> Answered {
        let seat = self.rooms.borrow_mut().remove(&room);
        if seat.is_none_or(|seat| seat.membership.has_ended()) {
            return Err(not_joined(&room));
        }
        now(Reply::Left { room })
    }

    fn typing(&self, identity: &Identity, room: &RoomId) -> Answered {
        if !namespace(&self.context.config, room)?.typing {
            let text = format!("typing is off in the namespace {:?}", room.namespace());
            return Err(Refused::new(ErrorCode::BadRequest, text));
        }
        granted(identity, Right::Write, room)?;
        if self
            .rooms
            .borrow()
            .get(room)
            .is_none_or(|seat| seat.membership.has_ended())
        {
            return Err(not_joined(room));
        }
        self.context.publisher.typing(room, &identity.user)?;
        count(Counter::TypingPublished, 1);
        now(Reply::Done)
    }

    /// The head of a room that the session is in, as far as the session was told.
    fn head(&self, room: &RoomId) -> Option<Cursor> {
        let rooms = self.rooms.borrow();
        let membership = &rooms.get(room)?.membership;
        if membership.has_ended() {
            return None;
        }
        membership.head()
    }

    async fn presence(&self, identity: &Identity, room: RoomId, page: &PageOf) -> Answered {
        let (config, presence) = (&self.context.config, &self.context.presence);
        let page = answers::presence(config, presence, identity, room, page).await?;
        now(Reply::Presence(page))
    }

    /// Reads history in the background, so that the session can process its next commands. Their replies wait for this
    /// one, but their effects don't.
    async fn history(
        self: &Rc<Self>,
        tag: Tag,
        identity: &Identity,
        room: RoomId,
        page: HistoryOf,
    ) -> Answered {
        answers::may_read_history(&self.context.config, identity, &room)?;
        let request = PageRequest::new(room, &identity.user, page)?;
        self.replies.room_for_one().await;
        let ticket = self.replies.promise_in_order(PAGE_WEIGHT);
        let session = Rc::clone(self);
        let read = async move {
            let history = Arc::clone(&session.context.history);
            let reply = match answers::history(&history, &request).await {
                Ok(page) => session.codec.reply(tag, &Reply::History(page)),
                Err(refused) => session.refusal(tag, &refused),
            };
            session.replies.keep(ticket, reply);
        };
        spawn_local(read.in_current_span());
        Ok(Answer::Apart)
    }

    /// Publishes in the background, so that the session can process its next commands. The ack is sent when its turn
    /// comes.
    async fn send(
        self: &Rc<Self>,
        tag: Tag,
        identity: Arc<Identity>,
        publication: Publication,
    ) -> Answered {
        let config = &self.context.config;
        let durable = answers::check_publication(config, &identity, &publication)?;
        self.replies.room_for_one().await;
        let room = publication.room.clone();
        let ticket = self.replies.promise(room, publication.body.get().len());
        let session = Rc::clone(self);
        // The shard runs its tasks in the order in which they were started, so the publishes of one session reach NATS
        // in the order in which they were received.
        let publish = async move {
            let reply = match session.publish(&identity, &publication, durable).await {
                Ok(published) => session.codec.reply(tag, &Reply::Published(published)),
                Err(error) => session.refusal(tag, &error.into()),
            };
            session.replies.keep(ticket, reply);
        };
        spawn_local(publish.in_current_span());
        Ok(Answer::Apart)
    }

    async fn publish(
        &self,
        identity: &Identity,
        publication: &Publication,
        durable: bool,
    ) -> Result<PublishReply, PublishError> {
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
        let before = durable.then(|| self.said_before(&outgoing)).flatten();
        let published = match before {
            Some((cursor, ts)) => PublishReply {
                room: publication.room.clone(),
                id: id.to_owned(),
                cursor: Some(cursor),
                ts,
                dup: true,
            },
            None => {
                // The sender is usually a member of the room, and then the room's hub knows the time.
                let known_time = |seq| {
                    let rooms = self.rooms.borrow();
                    rooms.get(&publication.room)?.membership.time_of(seq)
                };
                let (publisher, markers) = (&self.context.publisher, &self.context.markers);
                answers::publish(publisher, markers, &outgoing, durable, known_time).await?
            }
        };
        let way = if durable {
            Published::Durable
        } else {
            Published::Ephemeral
        };
        count(Counter::MessagePublished(way), 1);
        Ok(published)
    }

    /// The cursor and time of a message that is retried here, after it was stored in another region, or after the
    /// duplicate window of the stream. It must not be stored again.
    fn said_before(&self, outgoing: &Outgoing<'_>) -> Option<(Cursor, u64)> {
        // An id that the edge makes is new.
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
}

fn not_joined(room: &RoomId) -> Refused {
    let text = format!("this session is not in {room}");
    Refused::new(ErrorCode::NotJoined, text)
}

fn label(command: &Command) -> metrics::Op {
    match command {
        Command::Auth { .. } => metrics::Op::Auth,
        Command::Join { .. } => metrics::Op::Join,
        Command::Leave { .. } => metrics::Op::Leave,
        Command::Send(_) => metrics::Op::Send,
        Command::Typing { .. } => metrics::Op::Typing,
        Command::Read { .. } => metrics::Op::Read,
        Command::Presence { .. } => metrics::Op::Presence,
        Command::Readers { .. } => metrics::Op::Readers,
        Command::Unread { .. } => metrics::Op::Unread,
        Command::History { .. } => metrics::Op::History,
        Command::Refresh { .. } => metrics::Op::Refresh,
        Command::Ping => metrics::Op::Ping,
    }
}
