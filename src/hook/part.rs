//! Takes the entries of one stream for one hook, and sends them, each room's in its order.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};

use super::{
    Hook, Parts,
    apart::{self, Act, Apart, Page},
    hand::{Hand, IN_HAND, Taken},
    lead::Leading,
    send::{Sent, Signs, send},
    source::{Source, Told},
};
use crate::{
    bus::{
        Answer, Consumer, Delivery, KvError, Pull, PullError, StreamError, answer, consumer_state,
    },
    model::{Epoch, RoomId},
    outbound::pause,
    subject::Subjects,
    taking::{LAST_TRY, STREAM_PAUSES},
    telemetry::metrics::Counter,
};

/// Interval of the looks at rooms whose events are refused.
const LOOK: Duration = Duration::from_secs(1);

/// Interval of the questions whether all that an earlier process had in hand is in hand here.
const SETTLE: Duration = Duration::from_millis(200);

/// Pauses before a dead letter is written again: the first and the longest.
const BURY_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error(transparent)]
    Pull(#[from] PullError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("the bucket of hooks can't be read")]
    Bucket(#[from] KvError),
}

/// An entry in hand: how it is answered, and what is sent.
#[derive(Debug)]
struct Item {
    /// `None`: it was read again, and was acknowledged before.
    delivery: Option<Delivery>,
    told: Arc<Told>,
    signs: Arc<Signs>,
}

/// What has ended.
enum Ended {
    Sent(u64, Sent),
    Read(Page),
    Forgotten(Arc<str>, u64),
}

/// A partition in the hand of this process.
struct Taking<'l> {
    leading: &'l Arc<Leading>,
    source: Source,
    stream: String,
    subjects: Subjects,
    hand: Hand<Item>,
    epoch: Option<Epoch>,
    apart: Apart,
    sending: FuturesUnordered<BoxFuture<'static, Ended>>,
    /// Whether nothing more can be taken because of entries that are refused.
    is_full: Arc<AtomicBool>,
    busy_interval: Duration,
}

/// Why it takes no more.
enum End {
    /// The process ends, or has lost the lease.
    Over,
    /// The receiver wants nothing more.
    Off(String),
}

fn consumer(parts: &Parts, hook: &Hook, filters: Vec<String>) -> Consumer {
    Consumer::of_hook(&parts.config, hook.name(), filters, IN_HAND)
}

async fn pull_of(parts: &Parts, hook: &Hook, source: Source) -> Result<Option<Pull>, PullError> {
    let filters = source.filters(parts, hook);
    if filters.is_empty() {
        return Ok(None);
    }
    let stream = source.stream(parts);
    let consumer = consumer(parts, hook, filters);
    let wait = parts.config.nats.read_timeout;
    let pull = Pull::new(parts.connection.clone(), stream, consumer, wait).await;
    pull.map(Some)
}

/// Creates the consumer of a partition, if the hook wants something from there.
pub(super) async fn make_consumer(
    parts: &Parts,
    hook: &Hook,
    source: Source,
) -> Result<(), PullError> {
    if let Some(mut pull) = pull_of(parts, hook, source).await? {
        let opened = pull.open().await;
        pull.release().await;
        opened?;
    }
    Ok(())
}

/// Takes entries until it is over; returns the reason if the hook must be disabled.
pub(super) async fn take(leading: &Arc<Leading>, source: Source) -> Option<String> {
    let (parts, hook) = (&leading.parts, &leading.hook);
    let over = async {
        tokio::select! {
            () = leading.over.cancelled() => {}
            () = parts.tasks.stopping() => {}
        }
    };
    let mut pull = match pull_of(parts, hook, source).await {
        Ok(Some(pull)) => pull,
        Ok(None) => {
            over.await;
            return None;
        }
        Err(error) => {
            tracing::error!(hook = hook.name(), %error, "a hook gets no events");
            over.await;
            return None;
        }
    };
    let mut over = std::pin::pin!(over);
    let mut taking = Taking {
        leading,
        source,
        stream: source.stream(parts),
        subjects: Subjects::new(&parts.config.nats.prefix),
        hand: Hand::new(hook.config.ordered),
        epoch: None,
        apart: Apart::default(),
        sending: FuturesUnordered::new(),
        is_full: Arc::default(),
        busy_interval: consumer(parts, hook, Vec::new()).busy_interval(),
    };
    let (mut told, mut failures) = (String::new(), 0);
    let end = loop {
        let opened = async {
            pull.open().await.map_err(Trouble::from)?;
            source.epoch(parts).await
        };
        let opened = tokio::select! {
            opened = opened => opened,
            () = &mut over => break End::Over,
        };
        let trouble = match opened {
            Ok(epoch) => {
                taking.belongs_to(epoch);
                let worked = async {
                    taking.load_apart(epoch).await?;
                    (told, failures) = (String::new(), 0);
                    taking.work(&mut pull, epoch).await.map_err(Trouble::from)
                };
                let worked = tokio::select! {
                    worked = worked => worked,
                    () = &mut over => break End::Over,
                };
                match worked {
                    Ok(reason) => break End::Off(reason),
                    // The connection has already logged this.
                    Err(Trouble::Pull(PullError::Reconnected { .. })) => continue,
                    Err(trouble) => trouble,
                }
            }
            Err(trouble) => trouble,
        };
        let text = trouble.to_string();
        if text != told {
            tracing::warn!(hook = hook.name(), error = %text, "a hook gets no events now");
            told = text;
        }
        failures += 1;
        tokio::select! {
            () = sleep(pause(failures, STREAM_PAUSES, None)) => {}
            () = &mut over => break End::Over,
        }
    };
    let reason = match end {
        End::Over => None,
        End::Off(reason) => {
            leading.over.cancel();
            Some(reason)
        }
    };
    pull.release().await;
    reason.or(taking.finish().await)
}

impl Taking<'_> {
    /// What is in hand of another incarnation of the stream can't be answered any more.
    fn belongs_to(&mut self, epoch: Epoch) {
        if self.epoch.is_some_and(|known| known != epoch) {
            self.sending = FuturesUnordered::new();
            self.hand = Hand::new(self.leading.hook.config.ordered);
            self.apart = Apart::default();
        }
        self.epoch = Some(epoch);
    }

    async fn load_apart(&mut self, epoch: Epoch) -> Result<(), KvError> {
        let Source::Rooms(part) = self.source else {
            return Ok(());
        };
        let Leading { parts, hook, .. } = &**self.leading;
        self.apart.load(parts, hook, part, epoch).await
    }

    /// Takes and sends, until the receiver wants nothing more: returns the reason. Cancel-safe but for deliveries, which
    /// are redelivered.
    async fn work(&mut self, pull: &mut Pull, epoch: Epoch) -> Result<String, PullError> {
        // What was delivered before, to whichever process, comes again, in any order. Nothing begins until all of it is
        // here: otherwise a later event of a room could be sent before an earlier one.
        let mut is_settled = false;
        let mut settle = interval(SETTLE);
        let mut busy = interval(self.busy_interval);
        let mut look = interval(LOOK);
        for timer in [&mut settle, &mut busy, &mut look] {
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let mut taken = Vec::new();
        loop {
            if is_settled {
                self.go_on(epoch);
            }
            let free = self.free();
            let is_full = free == 0 && self.stuck() + apart::READ >= IN_HAND;
            self.is_full.store(is_full, Ordering::Relaxed);
            tokio::select! {
                // Cancel-safe: what was taken stays in the list.
                next = pull.next(&mut taken, free), if free > 0 => {
                    for delivery in taken.drain(..) {
                        self.take(delivery, epoch).await;
                    }
                    next?;
                }
                Some(ended) = self.sending.next(), if !self.sending.is_empty() => {
                    if let Some(reason) = self.ended(ended, epoch).await {
                        return Ok(reason);
                    }
                }
                _ = look.tick() => self.set_apart(epoch).await,
                _ = busy.tick() => {
                    let all = self.hand.items().filter_map(|item| item.delivery.as_ref()).collect();
                    answer(&self.leading.parts.connection, all, Answer::Busy).await;
                }
                _ = settle.tick(), if !is_settled => {
                    let in_hand = (IN_HAND - self.free()) as u64;
                    let parts = &self.leading.parts;
                    if let Some(delivered) = all_here(parts, &self.stream, pull, in_hand).await {
                        self.apart.delivered(delivered);
                        is_settled = true;
                    }
                }
            }
        }
    }

    async fn take(&mut self, delivery: Delivery, epoch: Epoch) {
        let Leading { parts, hook, .. } = &**self.leading;
        let told = self.source.told(&delivery, &self.subjects, epoch);
        // What it is not told of does not wait for what it is.
        let told = told.filter(|told| !told.events(parts, hook).is_empty());
        let Some(told) = told else {
            return answer(&parts.connection, vec![&delivery], Answer::Done).await;
        };
        let seq = delivery.seq;
        if self.hand.get(seq).is_none() && self.apart.takes(told.of(), seq) {
            return answer(&parts.connection, vec![&delivery], Answer::Done).await;
        }
        match self.hold(told, Some(delivery.clone()), seq) {
            Taken::New | Taken::Again => {}
            Taken::Done => answer(&parts.connection, vec![&delivery], Answer::Done).await,
        }
    }

    fn hold(&mut self, told: Told, delivery: Option<Delivery>, seq: u64) -> Taken {
        let of = told.of().to_owned();
        // A redelivery is of the same entry: what is known of its sending stays.
        let signs = self.hand.get(seq).map(|item| Arc::clone(&item.signs));
        let item = Item {
            told: Arc::new(told),
            delivery,
            signs: signs.unwrap_or_default(),
        };
        self.hand.take(seq, &of, item)
    }

    /// How many entries more may be taken from the consumer.
    fn free(&self) -> usize {
        let delivered = self.hand.items().filter(|item| item.delivery.is_some());
        IN_HAND.saturating_sub(delivered.count())
    }

    /// How many entries in hand are refused.
    fn stuck(&self) -> usize {
        self.hand
            .items()
            .filter(|item| item.signs.is_stuck())
            .count()
    }

    /// Begins what may begin: to send entries, and to read those of rooms apart.
    fn go_on(&mut self, epoch: Epoch) {
        if let Source::Rooms(part) = self.source {
            let read = self.hand.items().filter(|item| item.delivery.is_none());
            let free = IN_HAND.saturating_sub(read.count());
            let acts = self.apart.acts(free, |room| self.hand.has(room));
            for act in acts {
                let Leading { parts, hook, .. } = &**self.leading;
                let (parts, hook) = (parts.clone(), Arc::clone(hook));
                self.sending.push(match act {
                    Act::Read(room, next) => {
                        let source = (self.stream.clone(), part, epoch);
                        let read = apart::read(parts, hook, source, (room, next));
                        Box::pin(read.map(Ended::Read))
                    }
                    Act::Remove(room, revision) => {
                        let its = (Arc::clone(&room), revision);
                        let forget = apart::forget(parts, hook, part, its);
                        Box::pin(forget.map(move |()| Ended::Forgotten(room, revision)))
                    }
                });
            }
        }
        for seq in self.hand.begin() {
            self.begin(seq);
        }
    }

    /// Begins to send an entry.
    fn begin(&mut self, seq: u64) {
        let Some(item) = self.hand.get(seq) else {
            return;
        };
        let (leading, told) = (Arc::clone(self.leading), Arc::clone(&item.told));
        let (signs, is_full) = (Arc::clone(&item.signs), Arc::clone(&self.is_full));
        self.sending.push(Box::pin(async move {
            let is_full = move || is_full.load(Ordering::Relaxed);
            Ended::Sent(seq, send(leading, told, signs, is_full).await)
        }));
    }

    /// Rooms whose event is refused, and in which others wait, wait apart.
    async fn set_apart(&mut self, epoch: Epoch) {
        let Source::Rooms(part) = self.source else {
            return;
        };
        let Leading { parts, hook, .. } = &**self.leading;
        let is_full = self.free() == 0;
        let is_stuck = |seq| self.hand.get(seq).is_some_and(|item| item.signs.is_stuck());
        let stuck = self.hand.behind().filter(|(_, seq, waiting)| {
            hook.config.ordered && (is_full || *waiting >= apart::WAITING) && is_stuck(*seq)
        });
        let stuck: Vec<Arc<str>> = stuck.map(|(room, ..)| Arc::clone(room)).collect();
        for room in stuck {
            let waiting = self.hand.waiting(&room);
            let Some(((first, last), id)) = waiting.zip(RoomId::parse(&room).ok()) else {
                continue;
            };
            // Of a room that is read, the key stands further back, or here.
            let mut revision = None;
            if !self.apart.has(&room) {
                match apart::keep(parts, hook, part, &id, (epoch, first)).await {
                    Ok(kept) => revision = Some(kept),
                    Err(error) => {
                        tracing::debug!(hook = hook.name(), %room, %error, "a room can't wait apart");
                        continue;
                    }
                }
                tracing::warn!(
                    hook = hook.name(),
                    %room,
                    "an event is refused: what comes later in its room waits in the stream"
                );
            }
            self.apart.begin(Arc::clone(&room), (first, last), revision);
            let put_off = self.hand.put_off(&room);
            let delivered = put_off.iter().filter_map(|item| item.delivery.as_ref());
            answer(&parts.connection, delivered.collect(), Answer::Done).await;
        }
    }

    async fn ended(&mut self, ended: Ended, epoch: Epoch) -> Option<String> {
        let page = match ended {
            Ended::Sent(seq, sent) => return self.done(seq, sent).await,
            Ended::Forgotten(room, revision) => {
                self.apart.forgotten(&room, revision);
                return None;
            }
            Ended::Read(page) => page,
        };
        let (parts, hook) = (&self.leading.parts, &self.leading.hook);
        let Source::Rooms(part) = self.source else {
            return None;
        };
        let room = Arc::clone(&page.room);
        match self.apart.took(page) {
            Ok(stored) => {
                for stored in stored {
                    let seq = stored.record.seq;
                    let told = Told::Entry {
                        stored: Box::new(stored),
                        part,
                        epoch,
                    };
                    if !told.events(parts, hook).is_empty() {
                        self.hold(told, None, seq);
                    }
                }
            }
            Err(error) => {
                tracing::debug!(hook = hook.name(), %room, error, "a room that waits apart can't be read");
            }
        }
        None
    }

    /// An entry was sent, or is given up. Returns the reason if the hook must be disabled.
    async fn done(&mut self, seq: u64, sent: Sent) -> Option<String> {
        match sent {
            Sent::Done => {}
            Sent::Off(reason) => return Some(reason),
            Sent::Dead(reason) => {
                let item = self.hand.get(seq)?;
                let leading = Arc::clone(self.leading);
                let (delivery, told) = (item.delivery.clone(), Arc::clone(&item.told));
                let stream = self.stream.clone();
                // It may take a while, in which others go on. Its room waits for it.
                self.sending.push(Box::pin(async move {
                    bury(&leading, delivery, &told, (&stream, seq), &reason).await;
                    Ended::Sent(seq, Sent::Done)
                }));
                return None;
            }
        }
        if let Some(delivery) = self.hand.finish(seq).and_then(|item| item.delivery) {
            let connection = &self.leading.parts.connection;
            answer(connection, vec![&delivery], Answer::Done).await;
        }
        None
    }

    /// Waits for the open requests, if the process ends, and gives back the rest.
    async fn finish(&mut self) -> Option<String> {
        let mut reason = None;
        let until = Instant::now() + LAST_TRY;
        while !self.leading.over.is_cancelled() && !self.sending.is_empty() {
            tokio::select! {
                // What was read of rooms apart is read again by the next process.
                Some(ended) = self.sending.next() => {
                    if let Ended::Sent(seq, sent) = ended
                        && let Some(off) = self.done(seq, sent).await
                    {
                        reason = Some(off);
                        break;
                    }
                }
                () = self.leading.over.cancelled() => {}
                () = sleep_until(until) => break,
            }
        }
        self.sending.clear();
        let left = self.hand.items().filter_map(|item| item.delivery.as_ref());
        let left: Vec<&Delivery> = left.collect();
        let connection = &self.leading.parts.connection;
        answer(connection, left, Answer::Again(Duration::ZERO)).await;
        reason
    }
}

/// Whether everything that the server has delivered and that is not acknowledged is in hand: up to where it has delivered.
async fn all_here(parts: &Parts, stream: &str, pull: &Pull, in_hand: u64) -> Option<u64> {
    let wait = parts.config.nats.read_timeout;
    let state = consumer_state(&parts.connection, stream, pull.consumer_name(), wait);
    match state.await {
        Ok(state) => {
            let state = state.filter(|state| state.ack_pending <= in_hand);
            state.map(|state| state.delivered)
        }
        Err(error) => {
            tracing::debug!(%error, "what is in the hands of others is not known");
            None
        }
    }
}

/// Makes a dead letter of an entry, unless it was erased: the letter would keep it. `delivery`: `None` if it was
/// acknowledged before, and is read again.
async fn bury(
    leading: &Leading,
    delivery: Option<Delivery>,
    told: &Told,
    (stream, seq): (&str, u64),
    reason: &str,
) {
    let Leading { parts, hook, .. } = leading;
    let name = hook.name();
    let mut failures = 0;
    loop {
        let kept = async {
            if told.was_erased(parts).await? {
                return Ok(false);
            }
            let delivery = match &delivery {
                Some(delivery) => Some(delivery.clone()),
                None => {
                    let read = parts.reader.delivery(stream, seq).await;
                    read.map_err(|error| error.to_string())?
                }
            };
            // The stream keeps it no longer.
            let Some(delivery) = delivery else {
                return Ok(false);
            };
            let kept = parts
                .dead
                .keep(&delivery, name, stream, told.epoch(), reason);
            kept.await.map_err(|error| error.to_string())?;
            Ok::<bool, String>(true)
        };
        match kept.await {
            Ok(true) => {
                hook.count(Counter::HookDead);
                return tracing::warn!(
                    hook = name,
                    stream,
                    seq,
                    reason,
                    "an event went to the dead letters"
                );
            }
            Ok(false) => return,
            Err(error) if failures == 0 => {
                tracing::error!(
                    hook = name,
                    error,
                    stream,
                    seq,
                    reason,
                    "a dead letter can't be kept"
                );
            }
            Err(error) => tracing::debug!(
                hook = name,
                error,
                stream,
                seq,
                "a dead letter can't be kept"
            ),
        }
        failures += 1;
        sleep(pause(failures, BURY_PAUSES, None)).await;
    }
}
