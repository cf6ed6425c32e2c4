//! Takes the messages of one partition, and has their recipients notified.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, sleep, sleep_until},
};

use super::{Parts, recipients::Message};
use crate::{
    bus::{Answer, Consumer, Delivery, Pull, PullError, answer},
    model::{Class, Epoch, Kind, RoomScope},
    outbound::pause,
    runtime::unix_ms,
    subject::{FROM_NATTER, Subjects, rooms_stream},
    taking::{LAST_TRY, STREAM_PAUSES},
    telemetry::metrics::{Counter, count},
};

/// Pauses before a message is looked at again because something of natter can't be reached: the first and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// Age at which a message is first looked at: who has come a moment before it was said is known to be here by then, on
/// whatever edge, and who has seen it has read it.
const SETTLED: Duration = Duration::from_secs(1);

/// Messages of a partition that are worked on at once.
const AT_ONCE: usize = 64;

/// The messages of a partition in the hand of this process.
struct Taking {
    parts: Arc<Parts>,
    stream: String,
    subjects: Subjects,
    places: Arc<Semaphore>,
    busy_interval: Duration,
    told_to_end: OnceLock<Instant>,
}

/// Takes messages until the process shuts down. Tells `opened` when the consumer is there.
pub(super) async fn run(parts: Arc<Parts>, part: u16, opened: oneshot::Sender<()>) {
    let subjects = Subjects::new(&parts.config.nats.prefix);
    let origin = parts.streams.origin();
    let stream = rooms_stream(origin, part);
    let all = RoomScope {
        all: true,
        ..RoomScope::default()
    };
    let filters = subjects.stored_of(origin, part, &all, &[Class::Msg]);
    let consumer = Consumer::of_push(&parts.config, filters, AT_ONCE);
    let taking = Arc::new(Taking {
        busy_interval: consumer.busy_interval(),
        places: Arc::new(Semaphore::new(AT_ONCE)),
        told_to_end: OnceLock::new(),
        subjects,
        stream: stream.clone(),
        parts,
    });
    let parts = &taking.parts;
    let connection = parts.links.connection.clone();
    let wait = parts.config.nats.read_timeout;
    let mut pull = match Pull::new(connection, stream, consumer, wait).await {
        Ok(pull) => pull,
        Err(error) => return tracing::error!(%error, "the notifier gets no messages"),
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
                    Err(error) => error.to_string(),
                }
            }
            Err(trouble) => trouble,
        };
        if trouble != told {
            tracing::warn!(error = %trouble, "the notifier gets no messages now");
            told = trouble;
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
    async fn open(&self, pull: &mut Pull, part: u16) -> Result<Epoch, String> {
        pull.open().await.map_err(|error| error.to_string())?;
        let state = self.parts.streams.fetch(part).await;
        Ok(state.map_err(|error| error.to_string())?.epoch)
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
        self.parts.tasks.spawn("notify", async move {
            let _place = place;
            let answered = tokio::select! {
                answered = taking.handle(&delivery, epoch) => answered,
                () = taking.keep_busy(&delivery) => return,
                () = taking.stopped() => Answer::Again(Duration::ZERO),
            };
            answer(&taking.parts.links.connection, vec![&delivery], answered).await;
        });
    }

    /// Extends the acknowledgement timeout of a message, forever, so that it is not redelivered.
    async fn keep_busy(&self, delivery: &Delivery) {
        loop {
            sleep(self.busy_interval).await;
            let connection = &self.parts.links.connection;
            answer(connection, vec![delivery], Answer::Busy).await;
        }
    }

    /// Waits for the shutdown and then for [`LAST_TRY`].
    async fn stopped(&self) {
        self.parts.tasks.stopping().await;
        sleep_until(*self.told_to_end.get_or_init(Instant::now) + LAST_TRY).await;
    }

    /// Does what is to be done with a message now, and says how its stream is answered.
    async fn handle(&self, delivery: &Delivery, epoch: Epoch) -> Answer {
        let Some(stored) = delivery.stored(&self.subjects, epoch) else {
            return Answer::Done;
        };
        let kind = stored.record.kind.and_then(Kind::parse).unwrap_or_default();
        // What natter itself says of a room is no message.
        if kind != Kind::Message || stored.record.from == FROM_NATTER {
            return Answer::Done;
        }
        let age = Duration::from_millis(unix_ms().saturating_sub(delivery.ts));
        if age > self.parts.config.push.max_age {
            count(Counter::PushExpired, 1);
            return Answer::Done;
        }
        if age < SETTLED {
            return Answer::Again(SETTLED - age);
        }
        let message = Message::new(&stored, epoch, age, delivery.deliveries);
        match message.notify(&self.parts).await {
            Ok(None) => Answer::Done,
            Ok(Some(wait)) => Answer::Again(wait),
            Err(reason) => {
                let (stream, seq) = (&self.stream, delivery.seq);
                tracing::debug!(stream, seq, reason, "a message must wait");
                Answer::Again(pause(delivery.deliveries, PAUSES, None))
            }
        }
    }
}
