//! Causal order over origins: a message is not shown before what its sender had seen.
//!
//! Within an origin the stream's order sees to it. A message of another origin may be on its way still, by another mirror: then
//! the one that knows of it waits, and with it those behind it in its own stream, for at most `rooms.causal_wait`. What does not
//! come in that time (a region was cut off from us and not from the sender) is waited for no longer, and counted.

use std::rc::Rc;

use futures_util::future::try_join_all;
use tokio::{
    task::spawn_local,
    time::{Instant, sleep_until},
};

use super::{fan_out::Pass, hub::Hub, references::MAX_REFERENCES, rooms::Rooms};
use crate::bus::{ReadError, Record};

impl Hub {
    /// Takes an admitted message in: delivers it and whatever waited for it, or lets it wait.
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

    /// Delivers what need not wait any longer.
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

    /// Whether a message has waited long enough.
    pub(super) fn has_waited(&self) -> bool {
        let until = self.log.borrow().held_until();
        until.is_some_and(|until| until <= Instant::now())
    }

    /// Sees to it that messages wait no longer than they should.
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
                // A task that is at work does it, and begins anew with what it then holds.
                hub.when(|| !hub.is_busy() || hub.is_gone()).await;
            }
            hub.holding.set(false);
        });
    }

    /// At the opening of a room with several origins: notes what was said in it lately, so that a message that is stored a second
    /// time in another region is known again.
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
        // At once: whoever joins first waits for all of them.
        let earlier = try_join_all(reads).await?;
        for (track, records) in earlier.iter().enumerate() {
            self.log.borrow_mut().remember(track, records);
        }
        Ok(())
    }
}
