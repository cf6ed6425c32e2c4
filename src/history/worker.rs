//! Writes messages from the streams to MongoDB.
//!
//! One task per partition collects batches. Each batch is written by its own task, so that the next one is fetched
//! meanwhile.
//!
//! # Invariants
//! - A message that history keeps is acknowledged to its stream only after a majority of MongoDB's replica set, or the
//!   dead-letter stream, has stored it.
//! - After any failure a message is redelivered. The order of retries does not matter, since writes are commutative and
//!   idempotent.
//! - If MongoDB accepts nothing (it can't be reached, has no primary, or its disk is full), no message is at fault.
//!   Only a refusal of a single message while others are accepted counts against that message.

use std::{
    collections::{HashMap, HashSet},
    mem,
    sync::{Arc, OnceLock},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, sleep_until},
};

use super::{
    Parts,
    entry::{entry, place},
    uploads,
};
use crate::{
    bus::{
        Answer, Consumer, DeadLetters, Delivery, Pull, PullError, Stored, StreamError, answer,
        message_key,
    },
    model::{Class, Epoch, Place},
    runtime::Phase,
    store::{Claim, Entry, Removal, What},
    subject::{FROM_NATTER, Subjects, rooms_stream},
    telemetry::metrics::{Counter, Histogram, HistoryEntry, UploadVerdict, count, record},
};

/// Batches of one partition that are written at once. One more is collected meanwhile.
const WRITING: usize = 2;

/// Pause after a failure of MongoDB or a stream; doubled each time, up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Pause before a refused message is redelivered, multiplied by its refusals, and its maximum.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);
const REFUSED_PAUSE_MAX: Duration = Duration::from_secs(30);

/// Refused messages whose refusals are counted. Above it, all counts start again.
const MAX_REFUSALS: usize = 10_000;

/// How long a batch is still retried during shutdown. Shorter than the whole drain, so that the batch can be given
/// back.
const LAST_TRY: Duration = Duration::from_secs(4);

/// Growing pauses between attempts, with jitter so that workers do not retry all at once.
#[derive(Debug)]
pub(super) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(PAUSE_MIN)
    }
}

impl Backoff {
    pub(super) fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(PAUSE_MAX);
        pause.mul_f64(rand::random_range(0.5..1.0))
    }
}

/// One partition's worker.
struct Worker {
    parts: Parts,
    part: u16,
    stream: String,
    subjects: Subjects,
    dead: DeadLetters,
    writing: Arc<Semaphore>,
    /// Number of refusals by sequence.
    refusals: Mutex<HashMap<u64, u32>>,
    told_to_end: OnceLock<Instant>,
}

/// Messages that are written together.
#[derive(Debug, Default)]
struct Batch {
    deliveries: Vec<Delivery>,
    bytes: usize,
    /// The latest time to write it.
    due: Option<Instant>,
}

/// Why a partition's stream can't be processed.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Pull(#[from] PullError),
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// Writes the messages of a partition until the process shuts down.
pub(super) async fn run(parts: Parts, part: u16) {
    tokio::select! {
        phase = parts.lifecycle.reached(Phase::Ready) => if phase != Phase::Ready { return },
        () = parts.tasks.stopping() => return,
    }
    let subjects = Subjects::new(&parts.config.nats.prefix);
    let dead = DeadLetters::of_history(
        parts.connection.clone(),
        parts.reader.clone(),
        &parts.config,
    );
    let worker = Arc::new(Worker {
        stream: rooms_stream(parts.streams.origin(), part),
        subjects,
        dead,
        writing: Arc::new(Semaphore::new(WRITING)),
        refusals: Mutex::default(),
        told_to_end: OnceLock::new(),
        part,
        parts,
    });
    let (connection, stream) = (worker.parts.connection.clone(), worker.stream.clone());
    let config = &worker.parts.config;
    let consumer = Consumer::of_history(&connection, config);
    let mut pull = match Pull::new(connection, stream, consumer, config.nats.read_timeout).await {
        Ok(pull) => pull,
        Err(error) => return tracing::error!(%error, "a partition is not written"),
    };
    let mut told = String::new();
    let mut pause = Backoff::default();
    let mut rest = None;
    loop {
        let worked = tokio::select! {
            worked = worker.open(&mut pull) => worked,
            () = worker.parts.tasks.stopping() => break,
        };
        let trouble = match worked {
            Ok(epoch) => {
                let begun = Instant::now();
                let worked = worker.work(&mut pull, epoch).await;
                if begun.elapsed() > PAUSE_MAX {
                    (told, pause) = (String::new(), Backoff::default());
                }
                match worked {
                    Ok(batch) => {
                        rest = Some((batch, epoch));
                        break;
                    }
                    // The connection has already logged this.
                    Err(PullError::Reconnected { .. }) => continue,
                    Err(trouble) => Trouble::from(trouble),
                }
            }
            Err(trouble) => trouble,
        };
        let text = trouble.to_string();
        if text != told {
            tracing::warn!(error = %text, "the stream can't be taken to MongoDB now");
            told = text;
        }
        tokio::select! {
            () = sleep(pause.next()) => {}
            () = worker.parts.tasks.stopping() => break,
        }
    }
    // Release first, so that messages given back go to another worker and not to this one. Batches being written end by
    // themselves: the drain waits for their tasks too.
    pull.release().await;
    if let Some((batch, epoch)) = rest {
        worker.last(batch, epoch).await;
    }
}

impl Worker {
    /// Opens the consumer, and then reads the stream's epoch.
    async fn open(&self, pull: &mut Pull) -> Result<Epoch, Trouble> {
        pull.open().await?;
        Ok(self.parts.streams.fetch(self.part).await?.epoch)
    }

    /// Collects and writes batches until the process shuts down. Then returns the batch collected so far.
    async fn work(self: &Arc<Self>, pull: &mut Pull, epoch: Epoch) -> Result<Batch, PullError> {
        let history = &self.parts.config.history;
        let most_bytes = usize::try_from(history.batch_bytes.as_u64()).unwrap_or(usize::MAX);
        let mut batch = Batch::default();
        let mut taken = Vec::new();
        loop {
            let full =
                batch.deliveries.len() >= history.batch_messages || batch.bytes >= most_bytes;
            let overdue = full || batch.due.is_some_and(|due| due <= Instant::now());
            let due = batch.due.filter(|_| !overdue);
            let room = history.batch_messages - batch.deliveries.len().min(history.batch_messages);
            // All branches are cancel-safe.
            tokio::select! {
                biased;
                () = self.parts.tasks.stopping() => return Ok(batch),
                Ok(turn) = Arc::clone(&self.writing).acquire_owned(), if overdue => {
                    self.spawn(mem::take(&mut batch), epoch, turn);
                }
                next = pull.next(&mut taken, room), if !full => {
                    for delivery in taken.drain(..) {
                        batch.bytes += delivery.size();
                        batch.deliveries.push(delivery);
                    }
                    if !batch.deliveries.is_empty() {
                        batch.due.get_or_insert_with(|| Instant::now() + history.batch_wait);
                    }
                    if let Err(error) = next {
                        self.last(batch, epoch).await;
                        return Err(error);
                    }
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
        }
    }

    /// Writes the batch collected so far, with the epoch known so far. During shutdown it is given back instead if no
    /// slot becomes free in time.
    async fn last(self: &Arc<Self>, batch: Batch, epoch: Epoch) {
        if batch.deliveries.is_empty() {
            return;
        }
        tokio::select! {
            Ok(turn) = Arc::clone(&self.writing).acquire_owned() => self.spawn(batch, epoch, turn),
            () = self.stopped() => {
                let parts = &self.parts;
                let deliveries = batch.deliveries.iter().collect();
                answer(&parts.connection, deliveries, Answer::Again(Duration::ZERO)).await;
            }
        }
    }

    /// Waits for the shutdown and then for [`LAST_TRY`].
    async fn stopped(&self) {
        self.parts.tasks.stopping().await;
        sleep_until(*self.told_to_end.get_or_init(Instant::now) + LAST_TRY).await;
    }

    fn spawn(self: &Arc<Self>, batch: Batch, epoch: Epoch, turn: OwnedSemaphorePermit) {
        let worker = Arc::clone(self);
        self.parts.tasks.spawn("write", async move {
            let _turn = turn;
            let connection = &worker.parts.connection;
            let deliveries = batch.deliveries;
            tokio::select! {
                () = worker.write(&deliveries, epoch) => {}
                () = worker.keep_busy(&deliveries) => {}
                () = worker.stopped() => {
                    let deliveries = deliveries.iter().collect();
                    answer(connection, deliveries, Answer::Again(Duration::ZERO)).await;
                }
            }
        });
    }

    /// Extends the acknowledgement timeout of messages, forever, so that they are not redelivered.
    async fn keep_busy(&self, deliveries: &[Delivery]) {
        loop {
            sleep(self.parts.config.history.ack_wait / 3).await;
            let deliveries = deliveries.iter().collect();
            answer(&self.parts.connection, deliveries, Answer::Busy).await;
        }
    }

    /// Writes a batch, however long it takes, and answers each of its messages.
    async fn write(&self, deliveries: &[Delivery], epoch: Epoch) {
        let started = Instant::now();
        let mut entries = Vec::with_capacity(deliveries.len());
        // The index of each entry's delivery.
        let mut of = Vec::with_capacity(deliveries.len());
        let mut faults = Vec::new();
        let mut removals = Vec::new();
        // Changes: the entry and the index of its delivery, and for each the removal that is recorded if it is a
        // duplicate.
        let (mut said, mut said_at) = (Vec::new(), Vec::new());
        let (mut messages, mut changes, mut nothing) = (0, 0, 0);
        // Where and when messages came that history does not keep.
        let mut spoken = Vec::new();
        for (index, delivery) in deliveries.iter().enumerate() {
            let Some(stored) = delivery.stored(&self.subjects, epoch) else {
                faults.push((index, "its subject is not a room's".to_owned()));
                continue;
            };
            if self.parts.remembered.is_any() && self.was_erased(&stored).await {
                tracing::info!(seq = delivery.seq, "a message that was erased came again");
                removals.push(self.removal(&stored, epoch));
                continue;
            }
            let namespace = self.parts.config.namespaces.get(stored.room.namespace());
            // A namespace that is unknown here is kept: what is not written now can't be written later.
            if namespace.is_some_and(|namespace| !namespace.history) {
                if stored.record.class == Class::Msg {
                    spoken.push((stored.room.clone(), stored.record.ts));
                }
                continue;
            }
            let removal = stored
                .record
                .target
                .is_some()
                .then(|| self.removal(&stored, epoch));
            let entry = entry(stored, self.parts.streams.origin(), epoch);
            match entry.what {
                What::Message { .. } => messages += 1,
                What::Change { .. } => {
                    // A change always has a target, so there is a removal.
                    said_at.extend(removal);
                    said.push((entry, index));
                    continue;
                }
                What::Nothing(why) => {
                    nothing += 1;
                    tracing::debug!(seq = delivery.seq, why, "nothing to keep");
                    continue;
                }
            }
            entries.push(entry);
            of.push(index);
        }
        let again = self.said_again(&said_at).await;
        for (at, ((entry, index), removal)) in said.into_iter().zip(said_at).enumerate() {
            if let Some(first) = again.get(&at) {
                removals.push(removal.copy_of(first.clone()));
            } else {
                changes += 1;
                entries.push(entry);
                of.push(index);
            }
        }
        self.take_out(&removals).await;
        for (index, reason) in self.write_entries(&entries).await {
            match entries.get(index).map(|entry| &entry.what) {
                Some(What::Message { .. }) => messages -= 1,
                _ => changes -= 1,
            }
            faults.extend(of.get(index).map(|index| (*index, reason)));
        }
        let said = entries.iter().filter_map(|entry| match &entry.what {
            What::Message { .. } if entry.from != FROM_NATTER => {
                Some((&entry.room, entry.place.ts))
            }
            What::Message { .. } | What::Change { .. } | What::Nothing(_) => None,
        });
        let spoken = spoken.iter().map(|(room, ts)| (room, *ts));
        self.parts.directory.spoke(said.chain(spoken));
        let mut undone = HashSet::new();
        for (index, reason) in faults {
            let Some(delivery) = deliveries.get(index) else {
                continue;
            };
            if !self.refuse(delivery, epoch, &reason).await {
                undone.insert(index);
            }
        }
        let done = deliveries
            .iter()
            .enumerate()
            .filter(|(index, _)| !undone.contains(index));
        let done: Vec<&Delivery> = done.map(|(_, delivery)| delivery).collect();
        self.forget(&done);
        answer(&self.parts.connection, done, Answer::Done).await;
        for (kind, n) in [
            (HistoryEntry::Message, messages),
            (HistoryEntry::Change, changes),
            (HistoryEntry::Nothing, nothing),
        ] {
            count(Counter::HistoryWritten(kind), n);
        }
        if !entries.is_empty() {
            count(Counter::HistoryBatches, 1);
            record(Histogram::HistoryBatchDuration, started.elapsed());
            self.parts.figures.written(entries.len());
        }
    }

    /// Whether an erased message was stored again by an edge that did not know of the erasure. Retries until this can
    /// be read.
    async fn was_erased(&self, stored: &Stored) -> bool {
        let mut pause = Backoff::default();
        loop {
            match self.parts.remembered.has_stored(stored).await {
                Ok(erased) => return erased,
                Err(error) => {
                    tracing::debug!(%error, "what was erased can't be read");
                    sleep(pause.next()).await;
                }
            }
        }
    }

    /// The removal of a message from the streams.
    fn removal(&self, stored: &Stored, epoch: Epoch) -> Removal {
        let Stored { room, record } = stored;
        let key = message_key(room.as_str(), &record.from, &record.id);
        let place = place(record, self.parts.streams.origin(), epoch);
        Removal::new(place, room.clone(), &key)
    }

    /// Which changes are duplicates, and the place of the first copy. Retries until MongoDB answers.
    async fn said_again(&self, changes: &[Removal]) -> HashMap<usize, Place> {
        let mut pause = Backoff::default();
        loop {
            match self.parts.store.said_again(changes).await {
                Ok(again) => return again,
                Err(error) => {
                    self.parts.figures.batch_failed(&error);
                    sleep(pause.next()).await;
                }
            }
        }
    }

    /// Records the removals of messages from the streams. Retries until MongoDB accepts them.
    async fn take_out(&self, removals: &[Removal]) {
        let mut pause = Backoff::default();
        while let Err(error) = self.parts.store.record_removals(removals).await {
            self.parts.figures.batch_failed(&error);
            sleep(pause.next()).await;
        }
    }

    /// Forgets the refusals of messages that are done.
    fn forget(&self, done: &[&Delivery]) {
        let mut refusals = self.refusals.lock();
        if !refusals.is_empty() {
            for delivery in done {
                refusals.remove(&delivery.seq);
            }
        }
    }

    /// Writes entries, retrying until MongoDB accepts the batch. Returns the entries that it refuses, with the reason.
    async fn write_entries(&self, entries: &[Entry]) -> Vec<(usize, String)> {
        if entries.is_empty() {
            return Vec::new();
        }
        // Before the write, so that an erasure that finds a message also finds its uploads.
        let claims = match self.parts.config.uploads.is_on() {
            true => uploads::claims(entries),
            false => Vec::new(),
        };
        self.claim_uploads(&claims).await;
        // Before the write too: what is written is not looked at again when it is redelivered.
        self.judge_uploads(entries).await;
        let mut pause = Backoff::default();
        loop {
            match self.parts.store.write(entries).await {
                Ok(refused) => {
                    self.parts.figures.succeeded();
                    self.enforce_erasures(entries).await;
                    self.enforce_deletions(entries, &claims).await;
                    let refused = refused.into_iter();
                    return refused.map(|one| (one.index, one.reason)).collect();
                }
                Err(error) => {
                    self.parts.figures.batch_failed(&error);
                    sleep(pause.next()).await;
                }
            }
        }
    }

    /// Records which messages name which uploads. Retries until MongoDB accepts it.
    async fn claim_uploads(&self, claims: &[Claim<'_>]) {
        let mut pause = Backoff::default();
        while let Err(error) = self.parts.store.claim_uploads(claims).await {
            self.parts.figures.batch_failed(&error);
            sleep(pause.next()).await;
        }
    }

    /// Records what the worker that checks files has said of them. Retries until MongoDB accepts it.
    async fn judge_uploads(&self, entries: &[Entry]) {
        let Some(scan) = self.parts.config.uploads.scan() else {
            return;
        };
        let verdicts = uploads::verdicts(entries, scan);
        let mut pause = Backoff::default();
        while let Err(error) = self.parts.store.judge_uploads(&verdicts).await {
            self.parts.figures.batch_failed(&error);
            sleep(pause.next()).await;
        }
        for (verdict, infected) in [
            (UploadVerdict::Clean, false),
            (UploadVerdict::Infected, true),
        ] {
            let of_it = verdicts.iter().filter(|one| one.is_infected == infected);
            count(Counter::UploadJudged(verdict), of_it.count() as u64);
        }
    }

    /// Has the files of deleted messages removed. Retries until MongoDB accepts it.
    async fn enforce_deletions(&self, entries: &[Entry], claims: &[Claim<'_>]) {
        if !self.parts.config.uploads.is_on() {
            return;
        }
        let messages = uploads::perhaps_deleted(entries, claims);
        let mut pause = Backoff::default();
        while let Err(error) = self.parts.store.doom_uploads_of_deleted(&messages).await {
            self.parts.figures.batch_failed(&error);
            sleep(pause.next()).await;
        }
    }

    /// Deletes documents that were erased between reading the stream and writing. Retries until MongoDB answers.
    async fn enforce_erasures(&self, entries: &[Entry]) {
        let mut pause = Backoff::default();
        loop {
            match self.parts.store.enforce_erasures(entries).await {
                Ok(0) => return,
                Ok(erased) => {
                    return tracing::info!(erased, "what was erased meanwhile is not kept");
                }
                Err(error) => {
                    self.parts.figures.batch_failed(&error);
                    sleep(pause.next()).await;
                }
            }
        }
    }

    /// Handles a refused message: it is redelivered later, or becomes a dead letter. Returns whether it is done.
    async fn refuse(&self, delivery: &Delivery, epoch: Epoch, reason: &str) -> bool {
        count(Counter::HistoryRefused, 1);
        let times = {
            let mut refusals = self.refusals.lock();
            if refusals.len() >= MAX_REFUSALS {
                refusals.clear();
            }
            let times = refusals.entry(delivery.seq).or_default();
            *times += 1;
            *times
        };
        let stream = &self.stream;
        let seq = delivery.seq;
        if times >= self.parts.config.history.max_deliver {
            match self.dead.keep(delivery, "", stream, epoch, reason).await {
                Ok(()) => {
                    count(Counter::HistoryDead, 1);
                    tracing::error!(stream, seq, reason, "a message went to the dead letters");
                    return true;
                }
                Err(error) => {
                    tracing::error!(%error, stream, seq, reason, "a dead letter can't be kept");
                }
            }
        } else {
            tracing::warn!(stream, seq, reason, times, "MongoDB refuses a message");
        }
        let pause = (REFUSED_PAUSE * times).min(REFUSED_PAUSE_MAX);
        answer(&self.parts.connection, vec![delivery], Answer::Again(pause)).await;
        false
    }
}
