//! A watch of a pattern: all rooms of a namespace that match a filter.
//!
//! A message costs little when it arrives: its room is noted, and its body is read only where the filter needs it. What
//! is told is read once a second, of the newest rooms only, so that neither the client nor the edge has to do more when
//! there are more rooms.

use std::{
    cell::{Cell, RefCell},
    rc::{Rc, Weak},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until},
};

use super::{
    super::Session,
    active::covers,
    follower::{Follower, News, Said},
    list::CLOCKS_MS,
    sources::{FIRST_RESYNC, Sources},
};
use crate::{
    auth::{Identity, Right},
    bus::Record,
    config::Config,
    model::{Class, Cursor, RoomId, header_escape},
    people::{Filter, Found},
    protocol::{ErrorCode, Refused, WatchPush, WatchReply},
    runtime::unix_ms,
};

/// Rooms that match are told at most this often.
const INTERVAL: Duration = Duration::from_secs(1);

/// Rooms that are looked at for one push.
const MAX_ROOMS: usize = 64;

/// Bytes of the rooms in one push, if there are several.
const MAX_BYTES: usize = 19_000;

/// A client that has as many bytes still to receive is told nothing more, so that a watch alone never fills its outbox.
const MAX_QUEUED: usize = 64 * 1024;

/// Rooms whose newest messages are read at once when all of them are looked at.
const SCANNED_AT_ONCE: usize = 512;

/// A watch of a pattern.
pub(super) struct Follow {
    session: Weak<Session>,
    number: u64,
    /// The user, as a header names the sender of a message.
    pub(super) from: Box<str>,
    pub(super) namespaces: Vec<Box<str>>,
    pub(super) filter: Filter,
    state: RefCell<Follower>,
    wake: Notify,
    /// Reads under way. What happens meanwhile in a room may not be in what they find, so it is noted whatever it is.
    reads: Cell<usize>,
    /// Since when messages may have been missed, in ms since 1970, and when to look for them.
    missed: Cell<Option<(u64, Instant)>>,
}

/// A read that is under way.
struct Reading<'r>(&'r Cell<usize>);

impl<'r> Reading<'r> {
    fn new(reads: &'r Cell<usize>) -> Self {
        reads.set(reads.get() + 1);
        Self(reads)
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// The namespaces of a pattern, if the token covers it.
///
/// # Errors
/// `bad_request`, `unknown_namespace`, `forbidden`.
pub(super) fn namespaces(
    config: &Config,
    identity: &Identity,
    pattern: &str,
) -> Result<Vec<Box<str>>, Refused> {
    let namespace = pattern.strip_suffix(":*").ok_or_else(|| {
        let text = "pattern must be namespace:* or *:*";
        Refused::new(ErrorCode::BadRequest, text)
    })?;
    let namespaces: Vec<Box<str>> = match namespace {
        "*" => config
            .namespaces
            .keys()
            .map(|it| it.as_str().into())
            .collect(),
        name if config.namespaces.contains_key(name) => vec![name.into()],
        name => {
            let shown: String = name.chars().take(80).collect();
            let text = format!("there is no namespace {shown:?}");
            return Err(Refused::new(ErrorCode::UnknownNamespace, text));
        }
    };
    if is_granted(identity, &namespaces) {
        return Ok(namespaces);
    }
    let text = format!(
        "the token does not grant {} on {namespace}:*",
        Right::Follow
    );
    Err(Refused::new(ErrorCode::Forbidden, text))
}

/// Whether a token lets its user follow all rooms of these namespaces.
fn is_granted(identity: &Identity, namespaces: &[Box<str>]) -> bool {
    let scope = identity.scope(Right::Follow);
    let mut names = namespaces.iter();
    scope.all || names.all(|name| scope.namespaces.iter().any(|it| **it == **name))
}

impl Follow {
    pub(super) fn new(
        session: Weak<Session>,
        number: u64,
        user: &str,
        namespaces: Vec<Box<str>>,
        filter: Filter,
    ) -> Self {
        Self {
            session,
            number,
            from: header_escape(user).into(),
            namespaces,
            filter,
            state: RefCell::default(),
            wake: Notify::new(),
            reads: Cell::new(0),
            missed: Cell::new(None),
        }
    }

    /// Whether a token still covers the pattern.
    pub(super) fn is_covered(&self, identity: &Identity) -> bool {
        is_granted(identity, &self.namespaces)
    }

    /// Takes in a message. `wanted`: from when on it matches, in ms since 1970. `matches`: whether the record of the room
    /// does, as far as is known.
    pub(super) fn heard(
        &self,
        room: &RoomId,
        news: News,
        wanted: impl FnOnce(&Filter) -> Option<u64>,
        matches: impl FnOnce(&Filter) -> bool,
    ) {
        let mut state = self.state.borrow_mut();
        if self.filter.is_empty() {
            state.note(room, news);
            return self.wake.notify_one();
        }
        let is_shown = state.is_shown(room);
        let tells = match wanted(&self.filter) {
            Some(at) if at > unix_ms() => {
                let first = state.next_due();
                state.wait(room, at);
                if state.next_due() != first {
                    self.wake.notify_one();
                }
                false
            }
            Some(_) => {
                state.forget_timer(room);
                (!self.filter.has_annotation() || state.holds(room)) && matches(&self.filter)
            }
            // It may be an older message, of another region: then the read sets the timer again.
            None => state.forget_timer(room),
        };
        if tells || is_shown || self.reads.get() > 0 {
            state.note(room, news);
            self.wake.notify_one();
        }
    }

    /// Takes in what an entry of class `ev` says of the annotations of its room.
    pub(super) fn annotated(&self, room: &RoomId, holds: bool) {
        let mut state = self.state.borrow_mut();
        if !state.annotated(room, holds) {
            return;
        }
        if holds || state.is_shown(room) || self.reads.get() > 0 {
            state.note(room, News::default());
            self.wake.notify_one();
        }
    }

    /// The record of a room has changed.
    pub(super) fn changed(&self, room: &RoomId) {
        let news = News {
            by_record: true,
            ..News::default()
        };
        self.note_if_shown(room, news, self.filter.has_assignee());
    }

    /// The user's entry of a room, or the user's read marker, has changed.
    pub(super) fn arranged(&self, room: &RoomId, marker: Option<&Cursor>) {
        let news = News {
            marker: marker.cloned(),
            ..News::default()
        };
        self.note_if_shown(room, news, false);
    }

    /// Notes a room that the client knows, or that may begin to match.
    fn note_if_shown(&self, room: &RoomId, news: News, may_match: bool) {
        let is_ours = self.namespaces.iter().any(|it| **it == *room.namespace());
        let mut state = self.state.borrow_mut();
        let tells =
            may_match || self.filter.is_empty() || state.is_shown(room) || self.reads.get() > 0;
        if is_ours && tells {
            state.note(room, news);
            self.wake.notify_one();
        }
    }

    /// Looks again at the rooms that the client takes for matching: something else than a message may have been missed.
    pub(super) fn doubt(&self) {
        let mut state = self.state.borrow_mut();
        if state.note_shown() {
            self.wake.notify_one();
        }
    }

    /// Messages may have been missed since then, in ms since 1970. They are looked for a little later, and not by all
    /// watches at once.
    pub(super) fn suspect(&self, since: u64) {
        let soon = Instant::now() + FIRST_RESYNC.mul_f64(rand::random_range(0.3..1.0));
        let (earlier, at) = self.missed.get().unwrap_or((u64::MAX, soon));
        self.missed.set(Some((earlier.min(since), at)));
        self.wake.notify_one();
    }

    fn who(&self) -> Option<(Rc<Session>, Arc<Identity>)> {
        let session = self.session.upgrade()?;
        let identity = session.who()?;
        Some((session, identity))
    }

    /// Looks at all rooms before the first page, if the filter needs more than the newest messages that will come.
    pub(super) async fn prepare(
        &self,
        sources: &Sources,
        identity: &Identity,
    ) -> Result<(), Refused> {
        match self.filter.needs_log() {
            true => self.scan(sources, identity, u64::MAX).await,
            false => Ok(()),
        }
    }

    /// A page of the rooms that match.
    pub(super) async fn page(
        &self,
        sources: &Sources,
        identity: &Identity,
        (after, limit): (Option<&str>, usize),
    ) -> Result<WatchReply, Refused> {
        let after = after.map(|text| {
            RoomId::parse(text).map_err(|_any| {
                let text = "after is no next of this watch";
                Refused::new(ErrorCode::BadRequest, text)
            })
        });
        let after = after.transpose()?;
        let holds = |room: &RoomId| self.state.borrow().holds(room);
        let of = (&*self.namespaces, &self.filter);
        let part = (after.as_ref(), limit);
        let reading = Reading::new(&self.reads);
        let page = sources
            .people
            .followed_page(&sources.markers, identity, of, part, holds, unix_ms())
            .await?;
        drop(reading);
        let mut state = self.state.borrow_mut();
        for (room, at) in &page.later {
            state.wait(room, *at);
        }
        if !self.filter.is_empty() {
            for summary in &page.rooms {
                state.show(&summary.room);
            }
        }
        self.wake.notify_one();
        let mut reply = WatchReply::new(self.number, page.rooms);
        reply.inbox.next = page.next.map(|room| room.to_string());
        reply.partial = page.partial;
        Ok(reply)
    }

    /// Looks at the newest messages of all live rooms: notes those that came at `since` or later, in ms since 1970, and
    /// the others that will match by themselves.
    async fn scan(
        &self,
        sources: &Sources,
        identity: &Identity,
        since: u64,
    ) -> Result<(), Refused> {
        let (people, markers, user) = (&sources.people, &sources.markers, &*identity.user);
        let filter = &self.filter;
        let (rooms, _) = people
            .live_rooms(markers, identity, &self.namespaces)
            .await?;
        let rooms: Vec<&RoomId> = rooms.iter().collect();
        let now = unix_ms();
        for rooms in rooms.chunks(SCANNED_AT_ONCE) {
            if filter.has_annotation() {
                self.state.borrow_mut().begin_scan();
                let look = |record: &Record| (None, filter.of_annotation(record).map(u64::from));
                let newest = markers.latest(user, rooms, Class::Ev, &look).await?;
                for (room, newest) in newest {
                    // What was heard meanwhile is newer.
                    let is_newest = !self.state.borrow().was_annotated(&room);
                    if let Some(holds) = newest.wanted.filter(|_| is_newest) {
                        self.annotated(&room, holds == 1);
                    }
                }
            }
            let look = |record: &Record| (None, filter.of_message(record));
            let newest = markers.latest(user, rooms, Class::Msg, &look).await?;
            for (room, newest) in newest {
                if newest.last.ts >= since {
                    self.heard(&room, News::default(), |_| newest.wanted, |_| true);
                } else if let Some(at) = newest.wanted.filter(|at| *at > now) {
                    self.state.borrow_mut().wait(&room, at);
                }
            }
        }
        Ok(())
    }

    /// Tells the session what is new, until it ends.
    pub(super) async fn run(self: Rc<Self>, sources: Sources) {
        // What was sent just when the subscription was made may be missed.
        self.suspect(unix_ms());
        loop {
            let due = self.state.borrow().next_due();
            let due = due.map(|at| Duration::from_millis(at.saturating_sub(unix_ms()) + 1));
            let scan = self.missed.get().map(|(_, at)| at);
            let timer = due.map(|wait| Instant::now() + wait);
            let next = scan.into_iter().chain(timer).min();
            tokio::select! {
                () = self.wake.notified() => {}
                () = async { sleep_until(next.unwrap_or_else(Instant::now)).await }, if next.is_some() => {}
            }
            let Some((_session, identity)) = self.who() else {
                return;
            };
            let started = Instant::now();
            if let Some((since, at)) = self.missed.get()
                && started >= at
            {
                self.missed.set(None);
                let since_then = since.saturating_sub(CLOCKS_MS);
                if let Err(refused) = self.scan(&sources, &identity, since_then).await {
                    tracing::debug!(%refused, "followed rooms can't be compared");
                    self.missed.set(Some((since, started + FIRST_RESYNC)));
                }
            }
            self.tell(&sources).await;
            // What comes meanwhile is told together.
            sleep(INTERVAL.saturating_sub(started.elapsed())).await;
            if self.state.borrow().has_news() {
                self.wake.notify_one();
            }
        }
    }

    async fn tell(&self, sources: &Sources) {
        if self
            .who()
            .is_some_and(|(session, _)| session.queued_bytes() >= MAX_QUEUED)
        {
            return;
        }
        let (taken, left) = {
            let mut state = self.state.borrow_mut();
            (state.take(unix_ms(), MAX_ROOMS), state.left())
        };
        let Some((session, identity)) = self.who().filter(|_| !taken.is_empty()) else {
            return;
        };
        let rooms: Vec<RoomId> = taken.iter().map(|(room, _)| room.clone()).collect();
        let holds = |room: &RoomId| self.state.borrow().holds(room);
        let reading = Reading::new(&self.reads);
        let looks = sources
            .people
            .followed(
                &sources.markers,
                &identity,
                (&rooms, &self.filter),
                holds,
                unix_ms(),
            )
            .await;
        drop(reading);
        let mut state = self.state.borrow_mut();
        let mut looks = match looks {
            Ok(looks) => looks,
            Err(refused) => {
                tracing::debug!(%refused, "followed rooms can't be read");
                for (room, news) in taken {
                    state.put_back(room, news);
                }
                return;
            }
        };
        let is_filtered = !self.filter.is_empty();
        let mut push = WatchPush {
            watch: self.number,
            more: left,
            ..WatchPush::default()
        };
        let mut bytes = 0;
        for (room, news) in taken {
            let Some(look) = looks.remove(&room) else {
                continue;
            };
            let reached = news.place.as_ref().is_none_or(|(origin, seq)| {
                let head = look.head.as_ref().and_then(|head| head.get(origin));
                head.is_some_and(|at| at.seq >= *seq)
            });
            let read = match (&look.found, &news.marker) {
                (Found::Room(room), Some(expected)) => {
                    let marker = room.marker.as_ref();
                    marker.is_some_and(|marker| covers(marker, expected))
                }
                _ => true,
            };
            // Replicas may lag behind what was heard already, and a marker is heard of before it is stored.
            if !(reached && read) && state.try_again(&room, &news) {
                continue;
            }
            let found = match (look.found, &news.said) {
                // Nothing keeps the messages of an ephemeral room. Whether the newest one matches is as it was.
                (Found::Room(_), Said::Nothing)
                    if look.is_ephemeral && (!news.by_record || self.filter.needs_message()) =>
                {
                    continue;
                }
                (Found::Room(_), Said::Other) if look.is_ephemeral => Found::Nothing,
                (Found::Room(mut room), Said::Message(last)) if look.is_ephemeral => {
                    room.last = Some(last.clone());
                    Found::Room(room)
                }
                (found, _) => found,
            };
            let size = match &found {
                Found::Room(summary) => serde_json::to_vec(summary).map_or(0, |json| json.len()),
                Found::Later(_) | Found::Nothing | Found::Hidden => room.as_str().len() + 3,
            };
            if bytes > 0 && bytes + size > MAX_BYTES {
                state.put_back(room, news);
                push.more += 1;
                continue;
            }
            let is_gone = match found {
                Found::Room(summary) => {
                    if !is_filtered || state.show(&room) {
                        bytes += size;
                        push.rooms.push(*summary);
                    }
                    false
                }
                Found::Later(at) => {
                    state.wait(&room, at);
                    state.hide(&room)
                }
                Found::Nothing => state.hide(&room),
                Found::Hidden => state.hide(&room) || !is_filtered && news.by_record,
            };
            if is_gone {
                bytes += size;
                push.gone.push(room);
            }
        }
        push.more += state.take_lost();
        drop(state);
        session.tell_watch(push);
    }
}
