//! Takes the messages of one partition for one worker.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, sleep, sleep_until},
};

use super::{
    Parts, Worker,
    job::{Attempt, Done, Failed},
};
use crate::{
    bus::{Answer, Consumer, Delivery, Pull, PullError, Stored, StreamError, answer},
    config::WorkerKind,
    model::{Class, Epoch},
    outbound::pause,
    runtime::unix_ms,
    subject::{Subjects, rooms_stream},
    taking::{LAST_TRY, STREAM_PAUSES},
    telemetry::metrics::Counter,
};

/// Pauses before a failed request is repeated: the first and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));

/// Attempts for a message with files that are not there. Few: while it waits, it takes one of the places of its partition,
/// and anybody can name a file that never comes.
const FILE_TRIES: u32 = 4;

/// Deliveries, after `max_deliver`, in which the dead letter of a message that is too old must be kept.
const LETTER_TRIES: u32 = 5;

/// The messages of a partition in the hand of this process.
struct Taking {
    parts: Parts,
    worker: Arc<Worker>,
    stream: String,
    subjects: Subjects,
    /// Messages that may be in hand at once. Their acknowledgement timeout is extended until they are done.
    places: Arc<Semaphore>,
    busy_interval: Duration,
    told_to_end: OnceLock<Instant>,
}

#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Pull(#[from] PullError),
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// Takes messages until the process shuts down. Tells `opened` when the consumer is there.
pub(super) async fn run(parts: Parts, worker: Arc<Worker>, part: u16, opened: oneshot::Sender<()>) {
    let config = &worker.config;
    let at_once = if config.ordered {
        1
    } else {
        config.concurrency
    };
    let subjects = Subjects::new(&parts.config.nats.prefix);
    let origin = parts.streams.origin();
    let stream = rooms_stream(origin, part);
    let class_of = |kind: &WorkerKind| match kind {
        WorkerKind::Message => Class::Msg,
        WorkerKind::Edit => Class::Ev,
    };
    let is_asked = |class: &Class| config.kinds.iter().any(|kind| class_of(kind) == *class);
    let mut classes = vec![Class::Msg, Class::Ev];
    classes.retain(is_asked);
    let filters = subjects.stored_of(origin, part, &worker.scope, &classes);
    let name = worker.name();
    let consumer = Consumer::of_worker(&parts.config, name, filters, at_once, config.ordered);
    let taking = Arc::new(Taking {
        busy_interval: consumer.busy_interval(),
        places: Arc::new(Semaphore::new(at_once)),
        told_to_end: OnceLock::new(),
        subjects,
        stream: stream.clone(),
        worker: Arc::clone(&worker),
        parts,
    });
    let parts = &taking.parts;
    let wait = parts.config.nats.read_timeout;
    let mut pull = match Pull::new(parts.connection.clone(), stream, consumer, wait).await {
        Ok(pull) => pull,
        Err(error) => return tracing::error!(%error, "a worker gets no messages"),
    };
    let (mut told, mut failures) = (String::new(), 0);
    let mut tell = Some(opened);
    loop {
        let opened = tokio::select! {
            opened = taking.open(&mut pull, part) => opened,
            () = parts.tasks.stopping() => break,
        };
        let trouble = match opened {
            Ok(epoch) => {
                (told, failures) = (String::new(), 0);
                if let Some(tell) = tell.take() {
                    // Nobody waits any more when the process is about to end.
                    let _unheard = tell.send(());
                }
                match taking.work(&mut pull, epoch).await {
                    Ok(()) => break,
                    // The connection has already logged this.
                    Err(PullError::Reconnected { .. }) => continue,
                    Err(error) => Trouble::from(error),
                }
            }
            Err(trouble) => trouble,
        };
        let text = trouble.to_string();
        if text != told {
            tracing::warn!(worker = worker.name(), error = %text, "a worker gets no messages now");
            told = text;
        }
        failures += 1;
        tokio::select! {
            () = sleep(pause(failures, STREAM_PAUSES, None)) => {}
            () = parts.tasks.stopping() => break,
        }
    }
    pull.release().await;
}

impl Taking {
    /// Opens the consumer, and then reads the stream's epoch.
    async fn open(&self, pull: &mut Pull, part: u16) -> Result<Epoch, Trouble> {
        pull.open().await?;
        Ok(self.parts.streams.fetch(part).await?.epoch)
    }

    /// Takes messages until the process shuts down.
    async fn work(self: &Arc<Self>, pull: &mut Pull, epoch: Epoch) -> Result<(), PullError> {
        let tasks = &self.parts.tasks;
        let mut taken = Vec::new();
        loop {
            // Only this task takes places, so none of the free ones is lost again.
            let free = tokio::select! {
                Ok(place) = self.places.acquire() => {
                    drop(place);
                    self.places.available_permits()
                }
                () = tasks.stopping() => return Ok(()),
            };
            // Both branches are cancel-safe: what was taken stays in the list.
            let (next, is_over) = tokio::select! {
                next = pull.next(&mut taken, free) => (next, false),
                () = tasks.stopping() => (Ok(()), true),
            };
            for delivery in taken.drain(..) {
                // There is one for each: no more were asked for. Otherwise it is redelivered.
                if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
                    self.spawn(delivery, epoch, place);
                }
            }
            next?;
            if is_over {
                return Ok(());
            }
        }
    }

    fn spawn(self: &Arc<Self>, delivery: Delivery, epoch: Epoch, place: OwnedSemaphorePermit) {
        let taking = Arc::clone(self);
        self.parts.tasks.spawn("job", async move {
            let _place = place;
            let answered = tokio::select! {
                answered = taking.handle(&delivery, epoch) => answered,
                () = taking.keep_busy(&delivery) => return,
                () = taking.stopped() => Answer::Again(Duration::ZERO),
            };
            answer(&taking.parts.connection, vec![&delivery], answered).await;
        });
    }

    /// Extends the acknowledgement timeout of a message, forever, so that it is not redelivered.
    async fn keep_busy(&self, delivery: &Delivery) {
        loop {
            sleep(self.busy_interval).await;
            answer(&self.parts.connection, vec![delivery], Answer::Busy).await;
        }
    }

    /// Waits for the shutdown and then for [`LAST_TRY`].
    async fn stopped(&self) {
        self.parts.tasks.stopping().await;
        sleep_until(*self.told_to_end.get_or_init(Instant::now) + LAST_TRY).await;
    }

    /// Does what is to be done with a message, and says how its stream is answered.
    async fn handle(&self, delivery: &Delivery, epoch: Epoch) -> Answer {
        let worker = &self.worker;
        let Some(stored) = delivery.stored(&self.subjects, epoch) else {
            return Answer::Done;
        };
        let Some(about) = worker.about(&stored) else {
            return Answer::Done;
        };
        let age = Duration::from_millis(unix_ms().saturating_sub(delivery.ts));
        // Its files stay back until there is a verdict, so an operator must be able to ask for one.
        let holds_back = worker.holds_back(&self.parts);
        let max_deliver = worker.config.max_deliver;
        if age > worker.config.max_age {
            let reason = "it is older than max_age, and its files are held back";
            if holds_back && !self.bury(delivery, &stored, epoch, reason).await {
                // Not forever: it keeps a place from the messages behind it.
                if delivery.deliveries < max_deliver.saturating_add(LETTER_TRIES) {
                    return Answer::Again(pause(delivery.deliveries, PAUSES, None));
                }
                worker.count(Counter::WorkerLost);
                let (name, stream, seq) = (worker.name(), &self.stream, delivery.seq);
                let id = &stored.record.id;
                tracing::error!(worker = name, stream, seq, room.id = %stored.room, message.id = id, reason,
                    "a message is skipped without a dead letter");
            }
            worker.count(Counter::WorkerExpired);
            return Answer::Done;
        }
        // A server that was killed may have lost acknowledgements, and then counts from 1 again. As long as the message is
        // younger than the stream's duplicate window, so is its annotation, and the stream remembers its id.
        let is_old = age > self.parts.config.streams.duplicate_window / 2;
        let attempt = Attempt {
            again: delivery.deliveries > 1 || is_old,
            may_wait: delivery.deliveries < FILE_TRIES.min(max_deliver),
        };
        let (stream, seq) = (&self.stream, delivery.seq);
        let name = worker.name();
        match worker
            .work(&self.parts, (&stored, about), epoch, attempt)
            .await
        {
            Ok(done) => {
                match done {
                    Done::Annotated => worker.count(Counter::WorkerAnnotated),
                    Done::Empty => worker.count(Counter::WorkerEmpty),
                    Done::Rejected(reason) => {
                        worker.count(Counter::WorkerRejected);
                        tracing::debug!(
                            worker = name,
                            stream,
                            seq,
                            reason,
                            "a message is given up"
                        );
                        if holds_back && !self.bury(delivery, &stored, epoch, &reason).await {
                            return Answer::Again(pause(delivery.deliveries, PAUSES, None));
                        }
                    }
                    Done::Skipped => {}
                }
                Answer::Done
            }
            Err(Failed::Natter(reason)) => {
                tracing::debug!(worker = name, stream, seq, reason, "a message must wait");
                Answer::Again(pause(delivery.deliveries, PAUSES, None))
            }
            Err(Failed::Receiver { fault, after }) => {
                worker.count(Counter::WorkerFailed);
                let reason = fault.to_string();
                let wait = pause(delivery.deliveries, PAUSES, after);
                // One that would be too old by then would be dropped without a trace.
                let is_last =
                    delivery.deliveries >= max_deliver || age + wait > worker.config.max_age;
                if is_last && self.bury(delivery, &stored, epoch, &reason).await {
                    return Answer::Done;
                }
                tracing::debug!(worker = name, stream, seq, reason, "a worker failed");
                Answer::Again(wait)
            }
        }
    }

    /// Makes a dead letter of a message, unless it was erased: the letter would keep it. Returns whether nothing is left
    /// to do.
    async fn bury(&self, delivery: &Delivery, stored: &Stored, epoch: Epoch, reason: &str) -> bool {
        let (name, stream, seq) = (self.worker.name(), &self.stream, delivery.seq);
        match self.parts.remembered.has_stored(stored).await {
            Ok(false) => {}
            Ok(true) => return true,
            Err(error) => {
                tracing::debug!(worker = name, %error, "what was erased can't be read");
                return false;
            }
        }
        let kept = self
            .parts
            .dead
            .keep(delivery, name, stream, epoch, reason)
            .await;
        match kept {
            Ok(()) => {
                self.worker.count(Counter::WorkerDead);
                tracing::warn!(
                    worker = name,
                    stream,
                    seq,
                    reason,
                    "a message went to the dead letters"
                );
                true
            }
            Err(error) => {
                tracing::error!(worker = name, %error, stream, seq, reason, "a dead letter can't be kept");
                false
            }
        }
    }
}
