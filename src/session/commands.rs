//! What each command does.

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{
    task::spawn_local,
    time::{sleep, timeout},
};
use tracing::Instrument as _;

use super::{
    Beating, MAX_RATE_STRIKES, MAX_UNDECODABLE, Session,
    answers::{self, check_epochs, namespace, refusal_of},
    records::{self, Pinning},
    replies::MAX_WAITING_BYTES,
};
use crate::{
    auth::{AuthError, Identity, LAST_SECOND, Right},
    bus::{Outgoing, PublishError},
    codec::{Codec, Request, Tag},
    history::PageRequest,
    model::{Cursor, RoomId},
    people::{Change, InboxOf},
    protocol::{
        AuthReply, Beats, Close, Command, ErrorCode, Event, HistoryOf, HistoryReply, PageOf,
        Publication, PublishReply, Refused, Reply, Since, Validity,
    },
    runtime::unix_s,
    telemetry::metrics::{self, Counter, Gauge, Held, Label as _, Published, count},
    wire::Gate,
};

/// What a page of history counts against [`MAX_WAITING_BYTES`]: half of it, so that at most two pages are read at once.
const PAGE_WEIGHT: usize = MAX_WAITING_BYTES / 2;

/// Within this time a client of Centrifugo's protocol is answered. Its SDKs give up after 5 s.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(4);

/// How long a client that acknowledges too fast is held up at once.
const PACE_WAIT: Duration = Duration::from_millis(20);

/// How often it is looked whether a client whose login was bad is still there.
const LOGIN_STEP: Duration = Duration::from_millis(200);

/// How long before the end of its session a client is made to refresh its token.
const REFRESH_MARGIN: Duration = Duration::from_secs(10);

/// When a command is answered.
pub(super) enum Answer {
    Now(Reply),
    /// The reply was sent already, or will be sent when its turn comes.
    Apart,
}

pub(super) type Answered = Result<Answer, Refused>;

pub(super) fn now(reply: Reply) -> Answered {
    Ok(Answer::Now(reply))
}

impl Session {
    /// Carries out a command and makes sure that it is answered.
    pub(super) async fn on_request(self: &Rc<Self>, request: Request) {
        if matches!(request.command, Ok(Command::Pong)) {
            match self.pinged.get().checked_sub(1) {
                Some(rest) => self.pinged.set(rest),
                None => self.conn.close(Close::ClientProtocol),
            }
            return;
        }
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
            Err(refused) => return self.on_undecodable(&tag, &refused),
        };
        self.undecodable.set(0);
        // A client that leaves takes it as done, whatever the answer is.
        let leaves = matches!(command, Command::Leave { .. } | Command::Unsubscribe { .. });
        // An acknowledgement can't be refused without the end of the session, so the client is slowed down.
        let is_ack = self.codec.get().is_stomp() && matches!(command, Command::Read { .. });
        let is_paid = matches!(&tag, Tag::Stomp(asked) if asked.is_paid());
        let mut within = is_paid || self.within_pace();
        while is_ack && !within && !self.conn.is_over() {
            sleep(PACE_WAIT).await;
            within = self.within_pace();
        }
        if !within && leaves {
            self.strike();
        } else if !within {
            let limit = self.context.config.limits.commands_per_second;
            let text = format!("more than {limit} commands per second");
            self.refuse(&tag, &Refused::new(ErrorCode::RateLimited, text));
            return self.strike();
        }
        if within {
            self.rate_strikes.set(0);
        }
        match self.carry_out(tag.clone(), command).await {
            Ok(Answer::Now(reply)) => self.reply(&tag, &reply),
            Ok(Answer::Apart) => {}
            // Without the message there is nothing to move a marker to.
            Err(_) if is_ack => self.reply(&tag, &Reply::Done),
            Err(refused) => self.refuse(&tag, &refused),
        }
    }

    async fn carry_out(self: &Rc<Self>, tag: Tag, command: Command) -> Answered {
        let Some(identity) = self.identity.borrow().clone() else {
            return match command {
                Command::Auth {
                    token,
                    login,
                    beats,
                    since,
                } => {
                    self.agree(&tag, beats);
                    let login = login.as_deref();
                    self.auth(tag, (login, token.as_deref()), since).await
                }
                _ => self.not_now(ErrorCode::Unauthorized, "the first command must be auth"),
            };
        };
        let (context, people) = (&*self.context, &*self.context.people);
        // Large futures are boxed, so that the others stay small.
        match command {
            Command::Auth {
                token,
                login,
                beats,
                ..
            } if self.codec.get().is_stomp() => {
                self.agree(&tag, beats);
                // A token came with the handshake, too.
                let again = token.map(|token| self.identify(login.as_deref(), Some(&token)));
                match again.transpose() {
                    Ok(None) => {}
                    Ok(Some(again)) if again.user == identity.user => {
                        *self.identity.borrow_mut() = Some(again);
                        self.judge_rooms();
                    }
                    Ok(Some(_)) => {
                        let text = "the token of the handshake is of another user";
                        return Err(Refused::new(ErrorCode::Forbidden, text));
                    }
                    Err(error) => {
                        return Err(Refused::new(ErrorCode::Unauthorized, error.to_string()));
                    }
                }
                now(Reply::Authed(Box::new(self.authed(&identity))))
            }
            Command::Auth { .. } => {
                let text = "auth is only for the first frame; refresh replaces a token";
                self.not_now(ErrorCode::BadRequest, text)
            }
            Command::Ping | Command::Pong => now(Reply::Pong),
            Command::Refresh { token } => self.refresh(tag, &identity, &token),
            Command::Join {
                room,
                since,
                wants,
                token,
                subscription,
            } => {
                let of = (since, wants, token, subscription);
                Box::pin(self.join(tag, &identity, room, of)).await
            }
            Command::Unsubscribe { room, id } => Ok(self.unsubscribe(&room, &id)),
            Command::End => {
                self.replies.idle().await;
                if self.draining.get() {
                    // A refusal came before it, which ends the session.
                    return Ok(Answer::Apart);
                }
                if let Some(frame) = self.codec.get().reply(&tag, &Reply::Done) {
                    self.conn.send(&[frame]);
                }
                self.conn.close(Close::Normal);
                Ok(Answer::Apart)
            }
            Command::RefreshJoin { room, token } => self.refresh_join(&identity, &room, &token),
            Command::Leave { room } => self.leave(room),
            Command::Send(publication) => self.send(tag, identity, *publication).await,
            Command::Check(publication) => {
                answers::check_publication(people, &identity, &publication).await?;
                now(Reply::Done)
            }
            Command::Typing { room } => self.typing(&identity, &room).await,
            Command::Read { room, cursor } => {
                let markers = &context.markers;
                let head = self.head(&room);
                let read = answers::read(people, markers, &identity, &room, &cursor, head);
                now(Reply::Read(Box::pin(read).await?))
            }
            Command::Presence { room, page } => self.presence(&identity, room, &page).await,
            Command::Readers { room, page } => {
                let readers = answers::readers(people, &context.markers, &identity, room, &page);
                now(Reply::Readers(Box::pin(readers).await?))
            }
            Command::Unread { rooms } => {
                let unread = answers::unread(people, &context.markers, &identity, &rooms);
                now(Reply::Unread(Box::pin(unread).await?))
            }
            Command::History { room, page } => self.history(tag, &identity, room, page).await,
            Command::Search { room, query } => {
                let search = answers::search(people, &context.history, &identity, room, *query);
                now(Reply::Search(Box::pin(search).await?))
            }
            Command::Create(new) => {
                let made = records::create(people, &context.publisher, &identity, *new);
                now(Reply::Room(Box::new(Box::pin(made).await?)))
            }
            Command::Room { room } => {
                let record = records::record(people, &identity, &room).await?;
                now(Reply::Room(Box::new(record)))
            }
            Command::Settings {
                room,
                settings,
                version,
            } => {
                let set = Change::Set(settings);
                let set = self.change(&identity, &room, &set, version.as_deref());
                Box::pin(set).await
            }
            Command::Member { room, user, what } => {
                let change = records::of_member(user, what)?;
                Box::pin(self.change(&identity, &room, &change, None)).await
            }
            Command::Arrange { room, how } => {
                let arrange = records::arrange(people, &context.publisher, &identity, room, &how);
                Box::pin(arrange).await?;
                now(Reply::Done)
            }
            Command::Block { user, blocked } => {
                Box::pin(records::block(people, &identity, &user, blocked)).await?;
                now(Reply::Done)
            }
            Command::Watch(of) => Box::pin(self.watch(&identity, *of)).await,
            Command::Unwatch { watch } => self.unwatch(watch),
            Command::Inbox {
                after,
                limit,
                archived,
            } => {
                let page = InboxOf::new(after.as_deref(), limit, archived)?;
                let inbox = people.inbox(&context.markers, &identity, &page);
                now(Reply::Inbox(Box::pin(inbox).await?))
            }
        }
    }

    /// Changes the record of a room.
    async fn change(
        &self,
        identity: &Identity,
        room: &RoomId,
        change: &Change,
        version: Option<&str>,
    ) -> Answered {
        let (people, publisher) = (&self.context.people, &self.context.publisher);
        let record = records::changed(people, publisher, identity, room, (change, version)).await?;
        now(Reply::Room(Box::new(record)))
    }

    /// A command that is not allowed at this point.
    fn not_now(&self, code: ErrorCode, text: &str) -> Answered {
        if self.codec.get().is_strict() {
            self.conn.close(Close::ClientProtocol);
            return Ok(Answer::Apart);
        }
        Err(Refused::new(code, text))
    }

    fn on_undecodable(self: &Rc<Self>, tag: &Tag, refused: &Refused) {
        self.refuse(tag, refused);
        if self.codec.get().is_strict() {
            if *tag == Tag::None || self.identity.borrow().is_none() {
                self.conn.close(Close::ClientProtocol);
            }
            // Otherwise it is a command that can be answered. Their number is limited by their rate.
            if !self.within_pace() {
                self.strike();
            }
            return;
        }
        let strikes = if self.within_pace() && *tag != Tag::None {
            0
        } else {
            self.undecodable.get() + 1
        };
        self.undecodable.set(strikes);
        if strikes >= MAX_UNDECODABLE {
            self.conn.close(Close::ClientProtocol);
        }
    }

    /// Counts a command that came too early. Closes the connection of a client that does not stop.
    fn strike(&self) {
        self.rate_strikes.set(self.rate_strikes.get() + 1);
        if self.rate_strikes.get() >= MAX_RATE_STRIKES {
            self.conn.close(Close::TooMany);
        }
    }

    fn reply(&self, tag: &Tag, reply: &Reply) {
        if let Some(frame) = self.codec.get().reply(tag, reply) {
            self.replies.now(frame);
        }
    }

    pub(super) fn refuse(self: &Rc<Self>, tag: &Tag, refused: &Refused) {
        if let Some(frame) = self.refusal(tag, refused) {
            self.replies.now(frame);
        }
        self.end_if_final(refused, None);
    }

    /// Closes the connection after a refusal and the replies before it, if the protocol wants that. What the client has
    /// sent after it is not carried out, or not answered. `ticket`: that of the refusal, if it is not the last reply.
    fn end_if_final(self: &Rc<Self>, refused: &Refused, ticket: Option<u64>) {
        if !self.codec.get().refusal_is_final() || self.draining.replace(true) {
            return;
        }
        self.replies.seal(ticket);
        let close = match refused.code {
            ErrorCode::RateLimited | ErrorCode::Limit => Close::TooMany,
            code if code.retry() => Close::Internal,
            _ => Close::ClientProtocol,
        };
        let session = Rc::clone(self);
        spawn_local(async move {
            session.replies.idle().await;
            session.conn.close(close);
        });
    }

    /// Sets what the first command says of the protocol.
    fn agree(&self, tag: &Tag, beats: Option<Box<Beats>>) {
        let codec = self.codec.get().agreed(tag);
        if codec != self.codec.replace(codec) {
            self.active.set(Held::new(Gauge::SessionActive(codec)));
        }
        if let Some(beats) = beats {
            // There is one first command.
            self.beats
                .get_or_init(|| Box::new(Beating::new(*beats, Instant::now())));
        }
    }

    /// The frame of a refusal, if there is one.
    pub(super) fn refusal(&self, tag: &Tag, refused: &Refused) -> Option<Bytes> {
        count(Counter::CommandRefused(refused.code), 1);
        self.codec.get().refusal(tag, refused)
    }

    /// The user of the first command. `login`: the name that goes with a password.
    fn identify(
        &self,
        login: Option<&str>,
        token: Option<&str>,
    ) -> Result<Arc<Identity>, AuthError> {
        let (verifier, config) = (&self.context.verifier, &self.context.config);
        match token {
            Some(passcode)
                if self.codec.get().is_stomp()
                    && login.is_some_and(|login| config.stomp.login == login)
                    && config.stomp.passcode.is(passcode) =>
            {
                verifier.without_token(&config.stomp.login, false, unix_s())
            }
            Some(token) if self.codec.get() != Codec::Native => {
                verifier.verify_centrifugal(token, unix_s())
            }
            Some(token) => verifier.verify(token, unix_s()),
            None if self.codec.get().is_strict() && config.centrifugal.anonymous => {
                let name = format!("anon-{}", ulid::Ulid::new());
                verifier.without_token(&name, true, unix_s())
            }
            None => Err(AuthError::Malformed("there is none")),
        }
    }

    /// Opens the session, and joins the rooms that its token names. Their messages begin after the reply.
    async fn auth(
        self: &Rc<Self>,
        tag: Tag,
        (login, token): (Option<&str>, Option<&str>),
        since: Vec<(RoomId, Since)>,
    ) -> Answered {
        let refuse = |code, text: String, close| {
            // A strict protocol has only the close for it, but for a token that has expired.
            if !self.codec.get().is_strict() || close == Close::Expired {
                self.refuse(&tag, &Refused::new(code, text));
            }
            self.conn.close(close);
            Ok(Answer::Apart)
        };
        let identity = match self.identify(login, token) {
            Ok(identity) => identity,
            Err(error) => {
                if self.codec.get().is_stomp() {
                    self.hold_up().await;
                }
                let close = refusal_of(&error);
                return refuse(ErrorCode::Unauthorized, error.to_string(), close);
            }
        };
        let Some(slot) = (self.context.admit_user)(&identity.user) else {
            let text = "this user has too many sessions on this edge".to_owned();
            return refuse(ErrorCode::Limit, text, Close::TooMany);
        };
        *self.user_slot.borrow_mut() = Some(slot);
        *self.online.borrow_mut() = self.context.presence.arrive(&identity.user);
        let mut authed = self.authed(&identity);
        if identity.channels.is_empty() || !self.codec.get().is_strict() {
            self.reply(&tag, &Reply::Authed(Box::new(authed)));
        } else {
            self.connecting.set(true);
            let gate = Gate::new(Rc::clone(&self.conn));
            let joined = self.join_channels(&identity, since, &gate);
            let late = |_elapsed| {
                let text = "the rooms of the token can't be joined now";
                Err(Refused::new(ErrorCode::Unavailable, text))
            };
            let joined = timeout(ANSWER_WITHIN, Box::pin(joined)).await;
            match joined.unwrap_or_else(late) {
                Ok(joined) => authed.joined = joined,
                Err(refused) => {
                    // The client connects again. It must not get less than it asks for without being told.
                    self.rooms.borrow_mut().clear();
                    self.refuse(&tag, &refused);
                    self.conn.close(Close::Internal);
                    return Ok(Answer::Apart);
                }
            }
            // Channels are those of a protocol in which this is the first command: there are no earlier replies.
            let authed = Reply::Authed(Box::new(authed));
            gate.open(self.codec.get().reply(&tag, &authed));
        }
        *self.identity.borrow_mut() = Some(identity);
        self.judge_rooms();
        self.tell_expiry(unix_s());
        Ok(Answer::Apart)
    }

    /// Makes a client wait whose login was bad, if there were many from its address: its library logs in again as soon as
    /// it is answered.
    async fn hold_up(&self) {
        let Some(address) = self.conn.peer() else {
            return;
        };
        let end = Instant::now() + (self.context.bad_login)(address);
        // It is not late with its first command.
        self.connecting.set(true);
        while Instant::now() < end && !self.conn.is_over() && !self.draining.get() {
            sleep(LOGIN_STEP).await;
        }
    }

    /// How long a token is valid that expires at `exp`, in seconds since 1970.
    pub(super) fn validity(&self, exp: u64) -> Validity {
        // Clients ask for a new token at the end of this time. They must have it before the session ends.
        let leeway = self.context.config.auth.leeway;
        let margin = REFRESH_MARGIN.saturating_sub(leeway).as_secs();
        let left = exp.saturating_sub(unix_s()).saturating_sub(margin);
        let ttl = (exp < LAST_SECOND).then_some(left.max(1));
        Validity { exp, ttl }
    }

    fn authed(&self, identity: &Identity) -> AuthReply {
        AuthReply {
            user: Arc::clone(&identity.user),
            validity: self.validity(identity.exp),
            session: ulid::Ulid::new().to_string(),
            stream: self.address(),
            joined: Vec::new(),
        }
    }

    fn refresh(self: &Rc<Self>, tag: Tag, old: &Arc<Identity>, token: &str) -> Answered {
        let new = self
            .identify(None, Some(token))
            .map_err(|error| Refused::new(ErrorCode::Unauthorized, error.to_string()))?;
        if new.user != old.user {
            let text = "the new token is of another user";
            return Err(Refused::new(ErrorCode::Forbidden, text));
        }
        self.reply(&tag, &Reply::Refreshed(self.validity(new.exp)));
        // Leave the rooms that the new token does not cover.
        let lost: Vec<RoomId> = {
            let rooms = self.rooms.borrow();
            rooms
                .iter()
                .filter(|(room, seat)| seat.token.borrow().is_none() && !new.may(Right::Read, room))
                .map(|(room, _)| room.clone())
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
        self.judge_rooms();
        self.expiry_told.set(false);
        self.tell_expiry(unix_s());
        Ok(Answer::Apart)
    }

    async fn typing(&self, identity: &Identity, room: &RoomId) -> Answered {
        if !namespace(&self.context.config, room)?.typing {
            let text = format!("typing is off in the namespace {:?}", room.namespace());
            return Err(Refused::new(ErrorCode::BadRequest, text));
        }
        answers::admitted(&self.context.people, identity, Right::Write, room).await?;
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
        let (people, presence) = (&self.context.people, &self.context.presence);
        let page = answers::presence(people, presence, identity, room, page).await?;
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
        answers::may_read_history(&self.context.people, identity, &room).await?;
        // A client of this protocol is told where the room stands.
        let head = match self.codec.get().is_strict() {
            true => Some(self.head_of(&room).await?),
            false => None,
        };
        if let Some(head) = &head {
            check_epochs(&page.anchor, head)?;
            if page.limit == 0 {
                return now(Reply::History(HistoryReply {
                    head: Some(head.clone()),
                    own: Some(self.context.config.region()),
                    ..HistoryReply::empty(room)
                }));
            }
        }
        let request = PageRequest::new(room, &identity.user, page)?;
        self.replies.room_for_one().await;
        let ticket = self.replies.promise_in_order(PAGE_WEIGHT);
        let session = Rc::clone(self);
        let read = async move {
            let history = Arc::clone(&session.context.history);
            let reply = match answers::history(&history, &request).await {
                Ok(page) => {
                    let own = head.as_ref().map(|_| session.context.config.region());
                    let page = HistoryReply { head, own, ..page };
                    session.codec.get().reply(&tag, &Reply::History(page))
                }
                Err(refused) => session.refusal(&tag, &refused),
            };
            session.replies.keep(ticket, reply);
        };
        spawn_local(read.in_current_span());
        Ok(Answer::Apart)
    }

    /// The head of a room, whether the session is in it or not.
    async fn head_of(&self, room: &RoomId) -> Result<Cursor, Refused> {
        if let Some(head) = self.head(room) {
            return Ok(head);
        }
        let head = timeout(ANSWER_WITHIN, self.context.rooms.head(room)).await;
        head.ok().flatten().ok_or_else(|| {
            let text = "the room's stream can't be read now";
            Refused::new(ErrorCode::Unavailable, text)
        })
    }

    /// Publishes in the background, so that the session can process its next commands. The ack is sent when its turn
    /// comes.
    async fn send(
        self: &Rc<Self>,
        tag: Tag,
        identity: Arc<Identity>,
        publication: Publication,
    ) -> Answered {
        let people = &self.context.people;
        let durable = answers::accept_publication(people, &identity, &publication).await?;
        if let Some(pinning) = Pinning::of(&identity, &publication) {
            // Before the next command: what a session pins and unpins reaches the record in that order.
            let pinned = pinning.carry_out(people, &self.context.publisher, &identity);
            let pinned = Box::pin(pinned).await?;
            count(Counter::MessagePublished(way_of(durable)), 1);
            return now(Reply::Published(pinned));
        }
        self.replies.room_for_one().await;
        let room = publication.room.clone();
        let ticket = self.replies.promise(room, publication.body.get().len());
        let session = Rc::clone(self);
        // The shard runs its tasks in the order in which they were started, so the publishes of one session reach NATS
        // in the order in which they were received.
        let publish = async move {
            let reply = match session.publish(&identity, &publication, durable).await {
                Ok(published) => session
                    .codec
                    .get()
                    .reply(&tag, &Reply::Published(published)),
                Err(error) => {
                    let refused = error.into();
                    let (frame, number) = (session.refusal(&tag, &refused), ticket.number);
                    session.replies.keep(ticket, frame);
                    return session.end_if_final(&refused, Some(number));
                }
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
            original_ts: None,
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
                // A user that nobody is again has no marker.
                let markers = (!identity.is_anonymous).then_some(&**markers);
                answers::publish(
                    &self.context.people,
                    publisher,
                    markers,
                    &outgoing,
                    durable,
                    known_time,
                )
                .await?
            }
        };
        count(Counter::MessagePublished(way_of(durable)), 1);
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

fn way_of(durable: bool) -> Published {
    if durable {
        Published::Durable
    } else {
        Published::Ephemeral
    }
}

pub(super) fn not_joined(room: &RoomId) -> Refused {
    let text = format!("this session is not in {room}");
    Refused::new(ErrorCode::NotJoined, text)
}

fn label(command: &Command) -> metrics::Op {
    match command {
        Command::Auth { .. } => metrics::Op::Auth,
        Command::Join { .. } => metrics::Op::Join,
        Command::Leave { .. } => metrics::Op::Leave,
        Command::Send(_) | Command::Check(_) => metrics::Op::Send,
        Command::Typing { .. } => metrics::Op::Typing,
        Command::Read { .. } => metrics::Op::Read,
        Command::Presence { .. } => metrics::Op::Presence,
        Command::Readers { .. } => metrics::Op::Readers,
        Command::Unread { .. } => metrics::Op::Unread,
        Command::History { .. } => metrics::Op::History,
        Command::Search { .. } => metrics::Op::Search,
        Command::Create(_) => metrics::Op::Create,
        Command::Room { .. } => metrics::Op::Room,
        Command::Settings { .. } => metrics::Op::Settings,
        Command::Member { .. } => metrics::Op::Member,
        Command::Arrange { .. } => metrics::Op::Arrange,
        Command::Block { .. } => metrics::Op::Block,
        Command::Inbox { .. } => metrics::Op::Inbox,
        Command::Watch(_) => metrics::Op::Watch,
        Command::Unwatch { .. } => metrics::Op::Unwatch,
        Command::Refresh { .. } | Command::RefreshJoin { .. } => metrics::Op::Refresh,
        Command::Ping | Command::Pong => metrics::Op::Ping,
        Command::Unsubscribe { .. } | Command::End => metrics::Op::Leave,
    }
}
