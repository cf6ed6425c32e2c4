//! Watching: sessions that are told what is new in rooms that they have not joined.

mod active;
mod desk;
mod follow;
mod follower;
mod list;
mod sources;
mod told;

use std::{collections::BTreeMap, rc::Rc, sync::Arc, time::Instant};

use futures_util::future::join_all;
use tokio::task::{AbortHandle, spawn_local};

pub use desk::Desk;
use desk::{Ear, Hearing};
use follow::Follow;
use list::List;
use sources::FIRST_RESYNC;

use super::{
    Session,
    answers::{admitted, namespace},
    commands::{Answered, now},
};
use crate::{
    auth::{Identity, Right},
    model::RoomId,
    people::{Filter, InboxOf, Known, Whose, fitting, page_limit},
    protocol::{
        ErrorCode, Event, Refused, RefusedRoom, Reply, WatchOf, WatchPush, WatchReply, Watched,
    },
    telemetry::metrics::{Counter, Gauge, Held, count},
};

/// Watches of a session.
const MAX_WATCHES: usize = 8;

/// Rooms that one watch names.
const MAX_NAMED: usize = 500;

/// The watches of a session, by number.
#[derive(Default)]
pub(super) struct Watches {
    last: u64,
    by_number: BTreeMap<u64, Watching>,
}

impl Watches {
    pub(super) fn is_empty(&self) -> bool {
        self.by_number.is_empty()
    }
}

/// A watch of a session. It ends when it is dropped.
struct Watching {
    ear: Ear,
    _hearing: Hearing,
    /// The task of a watch of a pattern.
    task: Option<AbortHandle>,
    _counted: Held,
}

impl Watching {
    fn new(ear: Ear, hearing: Hearing) -> Self {
        Self {
            ear,
            _hearing: hearing,
            task: None,
            _counted: Held::new(Gauge::Watching),
        }
    }

    fn is_mine(&self) -> bool {
        matches!(&self.ear, Ear::List(list) if list.mine().is_some())
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

fn bad(text: String) -> Refused {
    Refused::new(ErrorCode::BadRequest, text)
}

impl Session {
    /// Is told what happens in rooms, from the reply on; or gets a further page of a watch.
    pub(super) async fn watch(
        self: &Rc<Self>,
        identity: &Arc<Identity>,
        WatchOf { what, limit }: WatchOf,
    ) -> Answered {
        let per_page = page_limit(limit)?;
        let reply = match what {
            Watched::Page { watch, after } => {
                let ear = self.ear(watch).ok_or_else(|| no_watch(watch))?;
                let after = Some(&*after);
                self.page(identity, watch, &ear, (after, per_page)).await?
            }
            Watched::Mine => self.watch_mine(identity, per_page).await?,
            Watched::Rooms(rooms) => self.watch_rooms(identity, rooms, per_page).await?,
            Watched::Pattern { pattern, filter } => {
                let filter = Filter::parse(&filter)?;
                let namespaces = follow::namespaces(&self.context.config, identity, &pattern)?;
                self.watch_pattern(identity, (namespaces, filter), per_page)
                    .await?
            }
        };
        now(Reply::Watching(reply))
    }

    /// The watch of this number.
    fn ear(&self, watch: u64) -> Option<Ear> {
        let watches = self.watching.borrow();
        let watching = watches.by_number.get(&watch)?;
        Some(watching.ear.clone())
    }

    /// Ends a watch.
    pub(super) fn unwatch(&self, watch: u64) -> Answered {
        let ended = self.watching.borrow_mut().by_number.remove(&watch);
        ended.map(drop).ok_or_else(|| no_watch(watch))?;
        now(Reply::Done)
    }

    /// A number for one more watch.
    fn new_watch(&self) -> Result<u64, Refused> {
        let mut watches = self.watching.borrow_mut();
        if watches.by_number.len() >= MAX_WATCHES {
            let text = format!("a session has at most {MAX_WATCHES} watches");
            return Err(Refused::new(ErrorCode::Limit, text));
        }
        watches.last += 1;
        Ok(watches.last)
    }

    /// Begins a watch, unless its first page can't be read.
    async fn begin(
        &self,
        identity: &Identity,
        number: u64,
        watching: Watching,
        limit: usize,
    ) -> Result<WatchReply, Refused> {
        let ear = watching.ear.clone();
        self.watching
            .borrow_mut()
            .by_number
            .insert(number, watching);
        let page = self.page(identity, number, &ear, (None, limit)).await;
        match &ear {
            Ear::List(list) => list.has_begun.set(true),
            Ear::Follow(follow) => {
                let task = spawn_local(Rc::clone(follow).run(self.context.desk.sources.clone()));
                if let Some(watching) = self.watching.borrow_mut().by_number.get_mut(&number) {
                    watching.task = Some(task.abort_handle());
                }
            }
        }
        if page.is_err() {
            self.watching.borrow_mut().by_number.remove(&number);
        }
        page
    }

    async fn watch_mine(
        self: &Rc<Self>,
        identity: &Arc<Identity>,
        limit: usize,
    ) -> Result<WatchReply, Refused> {
        if identity.is_anonymous {
            return Err(bad("users without a token are in no rooms".to_owned()));
        }
        let existing = {
            let watches = self.watching.borrow();
            let mut mine = watches.by_number.iter().filter(|(_, it)| it.is_mine());
            mine.next().map(|(number, it)| (*number, it.ear.clone()))
        };
        if let Some((number, ear)) = existing {
            return self.page(identity, number, &ear, (None, limit)).await;
        }
        let number = self.new_watch()?;
        let watching = self.list(identity, number, None).await;
        self.begin(identity, number, watching, limit).await
    }

    /// Hears of a list before its rooms are read, so that nothing is missed in between.
    async fn list(
        self: &Rc<Self>,
        identity: &Identity,
        number: u64,
        named: Option<Vec<(RoomId, Arc<Known>)>>,
    ) -> Watching {
        let (session, due) = (Rc::downgrade(self), Instant::now() + FIRST_RESYNC);
        let list = Rc::new(List::new(session, number, &identity.user, named, due));
        let hearing = self.context.desk.hear_list(&identity.user, &list).await;
        Watching::new(Ear::List(list), hearing)
    }

    async fn watch_rooms(
        self: &Rc<Self>,
        identity: &Arc<Identity>,
        mut rooms: Vec<RoomId>,
        limit: usize,
    ) -> Result<WatchReply, Refused> {
        rooms.sort_unstable();
        rooms.dedup();
        if !(1..=MAX_NAMED).contains(&rooms.len()) {
            let text = format!("rooms must name 1 to {MAX_NAMED} rooms");
            return Err(bad(text));
        }
        let people = &self.context.people;
        let checks = rooms.iter().map(async |room| {
            namespace(&self.context.config, room)?;
            admitted(people, identity, Right::Read, room).await
        });
        let checks = join_all(checks).await;
        let (mut named, mut refused) = (Vec::new(), Vec::new());
        for (room, checked) in rooms.into_iter().zip(checks) {
            match checked {
                Ok(known) => named.push((room, known)),
                Err(why) if why.code == ErrorCode::Unavailable => return Err(why),
                Err(why) => refused.push((room, why)),
            }
        }
        if named.is_empty() {
            return Err(refused.swap_remove(0).1);
        }
        let number = self.new_watch()?;
        let watching = self.list(identity, number, Some(named)).await;
        let mut reply = self.begin(identity, number, watching, limit).await?;
        let refused = refused.into_iter().map(|(room, why)| RefusedRoom {
            room,
            code: why.code.as_str(),
            message: why.message,
        });
        reply.refused = refused.collect();
        Ok(reply)
    }

    async fn watch_pattern(
        self: &Rc<Self>,
        identity: &Arc<Identity>,
        (namespaces, filter): (Vec<Box<str>>, Filter),
        limit: usize,
    ) -> Result<WatchReply, Refused> {
        let config = &self.context.config;
        let mut its = namespaces
            .iter()
            .filter_map(|name| config.namespaces.get(&**name));
        if filter.needs_log() && !its.any(|namespace| namespace.durable) {
            let text = "filter.unanswered_for and filter.annotation need a durable namespace";
            return Err(bad(text.to_owned()));
        }
        let number = self.new_watch()?;
        let desk = &self.context.desk;
        let follow = Follow::new(
            Rc::downgrade(self),
            number,
            &identity.user,
            namespaces,
            filter,
        );
        let follow = Rc::new(follow);
        let hearing = desk.hear_all(&identity.user, &follow).await;
        follow.prepare(&desk.sources, identity).await?;
        let watching = Watching::new(Ear::Follow(follow), hearing);
        self.begin(identity, number, watching, limit).await
    }

    /// A page of a watch.
    async fn page(
        &self,
        identity: &Identity,
        watch: u64,
        ear: &Ear,
        (after, limit): (Option<&str>, usize),
    ) -> Result<WatchReply, Refused> {
        let (people, markers) = (&self.context.people, &self.context.markers);
        let list = match ear {
            Ear::Follow(follow) => {
                return follow
                    .page(&self.context.desk.sources, identity, (after, limit))
                    .await;
            }
            Ear::List(list) => list,
        };
        let Some(named) = list.named() else {
            let page = InboxOf::new(after, Some(limit as u64), false)?;
            let inbox = people.inbox(markers, identity, &page).await?;
            list.tell_page(&inbox.rooms, limit, after.is_none());
            let mut reply = WatchReply::new(watch, inbox.rooms);
            reply.inbox.next = inbox.next;
            return Ok(reply);
        };
        let after = after.map(|text| {
            RoomId::parse(text).map_err(|_any| bad("after is no next of this watch".to_owned()))
        });
        let after = after.transpose()?;
        let start = after.map_or(0, |after| named.partition_point(|room| *room <= after));
        let page = &named[start..named.len().min(start + limit)];
        let mut read = people
            .summaries(markers, identity, page, Whose::Readable)
            .await?;
        let rooms = page.iter().filter_map(|room| read.remove(room));
        let mut rooms: Vec<_> = rooms.map(|(summary, _)| summary).collect();
        let fits = fitting(&rooms);
        // Not all rooms have a summary: the user may not see some of them any more.
        let last = match rooms.get(fits.saturating_sub(1)) {
            Some(last) if fits < rooms.len() => Some(last.room.clone()),
            Some(_) | None => page.last().cloned(),
        };
        rooms.truncate(fits);
        list.tell_page(&rooms, limit, start == 0);
        let mut reply = WatchReply::new(watch, rooms);
        let last = last.filter(|last| named.last() != Some(last));
        reply.inbox.next = last.map(|last| last.to_string());
        Ok(reply)
    }

    /// The user, if the session is open.
    fn who(&self) -> Option<Arc<Identity>> {
        self.identity.borrow().clone()
    }

    /// Ends the watches that the token does not cover any more, and has those of named rooms look at them again.
    pub(super) fn judge_watches(&self) {
        let Some(identity) = self.who() else { return };
        let mut ended = Vec::new();
        for (number, watching) in &self.watching.borrow().by_number {
            match &watching.ear {
                Ear::List(list) => self.context.desk.mark_if(list, list.judge()),
                Ear::Follow(follow) if !follow.is_covered(&identity) => ended.push(*number),
                Ear::Follow(_) => {}
            }
        }
        for watch in ended {
            self.watching.borrow_mut().by_number.remove(&watch);
            self.push(&Event::Inbox(WatchPush {
                watch,
                ended: Some(ErrorCode::Forbidden.as_str()),
                ..WatchPush::default()
            }));
        }
    }

    /// Tells the client what is new in rooms that it watches, if anything is, and the watch has not ended.
    fn tell_watch(&self, push: WatchPush) {
        let is_over = !self.watching.borrow().by_number.contains_key(&push.watch);
        if is_over || push.rooms.is_empty() && push.gone.is_empty() && push.more == 0 {
            return;
        }
        count(Counter::SummaryDelivered, push.rooms.len() as u64);
        self.push(&Event::Inbox(push));
    }
}

fn no_watch(watch: u64) -> Refused {
    bad(format!("this session has no watch {watch}"))
}
