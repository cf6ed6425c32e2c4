//! Causal order across origins: a message is not delivered before the messages that its sender had seen.
//!
//! Within one origin the order of the stream ensures this. But a message of another origin, which comes through another
//! mirror, may still be on its way. Then the message that depends on it waits, together with the ones behind it in its
//! own stream, for at most `rooms.causal_wait`. If the missing message does not come in that time (for example because
//! its region is cut off from this one but not from the sender's), the waiting one is delivered without it, and
//! counted.

use std::rc::Rc;

use futures_util::future::try_join_all;
use tokio::{
    task::spawn_local,
    time::{Instant, sleep_until},
};

use super::{fan_out::Pass, hub::Hub, references::MAX_REFERENCES, rooms::Rooms};
use crate::bus::{ReadError, Record};

impl Hub {
    /// Takes an admitted message. Either delivers it, and then the messages that waited for it, or holds it.
    pub(super) fn take(
        self: &Rc<Self>,
        rooms: &Rc<Rooms>,
        track: usize,
        record: Record,
        pass: &mut Pass,
    ) {
        let now = Instant::now();
        let must_wait = self.log.borrow().must_wait(track, &record, now);
        if must_wait {
            let until = now + rooms.config.causal_wait;
            self.log.borrow_mut().hold(track, record, until);
            self.watch_held(rooms);
        } else {
            self.deliver(track, record, pass);
        }
        self.release(rooms, pass);
    }

    /// Delivers the held messages that need not wait any longer.
    pub(super) fn release(&self, rooms: &Rooms, pass: &mut Pass) {
        if self.log.borrow().held() == 0 {
            return;
        }
        let (now, config) = (Instant::now(), &rooms.config);
        loop {
            let mut log = self.log.borrow_mut();
            let next = log.release(now, config.causal_max, config.causal_wait);
            drop(log);
            let Some((track, record)) = next else {
                break;
            };
            self.deliver(track, record, pass);
        }
    }

    /// Whether a held message has waited long enough.
    pub(super) fn has_waited(&self) -> bool {
        let until = self.log.borrow().held_until();
        until.is_some_and(|until| until <= Instant::now())
    }

    /// Makes sure that held messages are released when their wait is over.
    fn watch_held(self: &Rc<Self>, rooms: &Rc<Rooms>) {
        if self.holding.replace(true) {
            return;
        }
        let (hub, rooms) = (Rc::clone(self), Rc::clone(rooms));
        spawn_local(async move {
            while !hub.is_gone() {
                let until = hub.log.borrow().held_until();
                let Some(until) = until else { break };
                tokio::select! {
                    () = sleep_until(until) => {}
                    () = hub.gone() => break,
                }
                hub.work(&rooms);
                // If a task is at work, it releases them. Then start over with the messages that are held after that.
                hub.when(|| !hub.is_busy() || hub.is_gone()).await;
            }
            hub.holding.set(false);
        });
    }

    /// Called when a room with several origins is opened: notes the references of its recent messages, so that a
    /// message that is stored again in another region is recognised.
    pub(super) async fn remember_earlier(&self, rooms: &Rooms) -> Result<(), Rc<ReadError>> {
        if self.sources.len() < 2 {
            return Ok(());
        }
        let reads = self
            .sources
            .iter()
            .enumerate()
            .map(async |(track, source)| {
                let epoch = self.log.borrow().epoch(track);
                let filter = self.filter(rooms, track);
                let within = rooms.retried_within;
                let reader = &rooms.reader;
                reader
                    .recent(&source.stream, epoch, &filter, within, MAX_REFERENCES)
                    .await
            });
        // In parallel: the first member to join waits for all of them.
        let earlier = try_join_all(reads).await?;
        for (track, records) in earlier.iter().enumerate() {
            self.log.borrow_mut().remember(track, records);
        }
        Ok(())
    }
}
