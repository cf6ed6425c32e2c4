//! Loading and writing: what waits is taken together, and what grows again while it is written is written once more.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::oneshot,
    task::yield_now,
    time::{Instant, sleep_until, timeout_at},
};

use super::{
    Markers,
    index::STEP,
    marker::{Marker, Phase},
    markers::{Key, State},
};
use crate::{
    bus::{KvError, Put},
    telemetry::metrics::{Counter, MarkerWrite, count},
};

/// Length of a round. A key is written at most once in a round, besides the first time; what need not be written at once waits
/// for its end, so that many writes wake this process and the server once.
pub const WRITE_PAUSE: Duration = Duration::from_millis(250);

/// Writes in flight at once; more wait, and what grows meanwhile is written once.
const WRITES: usize = 64;

/// Pause of all writes after one that failed.
const RETRY: Duration = Duration::from_millis(500);

/// How long another edge has to write what it told, before this one looks whether it has.
const CHECK_AFTER: Duration = Duration::from_secs(1);

/// Conflicts in a row after which a key has to wait like others.
const ATTEMPTS: usize = 5;

/// How long the last writes of an edge may take: a bucket that does not answer must not cut the rest of a drain.
const FLUSH_WITHIN: Duration = Duration::from_secs(5);

/// How often markers that rest are forgotten, and in how many of these times all are looked at.
const SWEEP: Duration = Duration::from_secs(1);
const SWEEPS: usize = 10;

/// Keys on their way to the bucket, each in the queue of its [`Phase`].
#[derive(Debug)]
pub(super) struct Queues {
    /// When the first round began.
    began: Instant,
    /// To be written at once.
    now: VecDeque<Key>,
    /// To be written at the end of a round, the first first.
    gathering: VecDeque<(Instant, Key)>,
    /// Written a moment ago: at the end of which round they may be written again, the first first.
    later: VecDeque<(Instant, Key)>,
    /// Told by other edges: when to look whether they were written. All wait equally long.
    checks: VecDeque<(Instant, Key)>,
    check_after: Duration,
    /// Who waits for the write of a key.
    waiting: HashMap<Key, oneshot::Sender<()>>,
    /// Nothing is written before this.
    not_before: Option<Instant>,
    /// The edge stops: no pauses.
    flushing: bool,
    writing: usize,
}

impl Default for Queues {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            now: VecDeque::new(),
            gathering: VecDeque::new(),
            later: VecDeque::new(),
            checks: VecDeque::new(),
            // Another time on each edge: the first to look repairs, the others see that it is done.
            check_after: CHECK_AFTER.mul_f64(rand::random_range(1.0..2.0)),
            waiting: HashMap::new(),
            not_before: None,
            flushing: false,
            writing: 0,
        }
    }
}

impl Queues {
    pub(super) fn check_later(&mut self, key: Key, now: Instant) {
        self.checks.push_back((now + self.check_after, key));
    }

    /// When the round ends in which `at` lies.
    fn end_of_round(&self, at: Instant) -> Instant {
        let pause = WRITE_PAUSE.as_nanos();
        let rounds = at.duration_since(self.began).as_nanos().div_ceil(pause);
        self.began + WRITE_PAUSE * u32::try_from(rounds).unwrap_or(u32::MAX)
    }
}

impl State {
    /// Sees to it that a marker is written, if this edge has to. Who gets a receiver is told when it was; who comes while it
    /// is written or right after that gets none: it has its turn later.
    pub(super) fn queue(&mut self, key: &Key) -> Option<oneshot::Receiver<()>> {
        let marker = self.marker(key);
        if !marker.is_owed() {
            return None;
        }
        match marker.phase() {
            Phase::Resting | Phase::Checking | Phase::Gathering => {
                marker.set_phase(Phase::Queued);
                self.queues.now.push_back(Arc::clone(key));
                let (done, written) = oneshot::channel();
                self.queues.waiting.insert(Arc::clone(key), done);
                Some(written)
            }
            Phase::Queued | Phase::Writing | Phase::Pausing => None,
        }
    }

    /// Sees to it that a marker is written at the end of this round, if this edge has to. Whether it is the first one.
    pub(super) fn gather(&mut self, key: &Key, now: Instant) -> bool {
        let marker = self.marker(key);
        let rests = matches!(marker.phase(), Phase::Resting | Phase::Checking);
        if !marker.is_owed() || !rests {
            return false;
        }
        marker.set_phase(Phase::Gathering);
        let due = self.queues.end_of_round(now);
        self.queues.gathering.push_back((due, Arc::clone(key)));
        self.queues.gathering.len() == 1
    }

    /// Moves keys whose pause is over to where they belong now, some of them: what is left is still due.
    fn wake(&mut self, now: Instant) {
        let flushing = self.queues.flushing;
        let (mut gathered, mut paused, mut checked) = (0..STEP, 0..STEP, 0..STEP);
        while let Some((due, _)) = self.queues.gathering.front()
            && (*due <= now || flushing)
            && gathered.next().is_some()
            && let Some((_, key)) = self.queues.gathering.pop_front()
        {
            // Others have been queued by a command meanwhile.
            if let Some(marker) = self.markers.get_mut(&key)
                && marker.phase() == Phase::Gathering
            {
                marker.set_phase(Phase::Queued);
                self.queues.now.push_back(key);
            }
        }
        while let Some((due, _)) = self.queues.later.front()
            && (*due <= now || flushing)
            && paused.next().is_some()
            && let Some((_, key)) = self.queues.later.pop_front()
        {
            let Some(marker) = self.markers.get_mut(&key) else {
                continue;
            };
            if marker.is_owed() {
                marker.set_phase(Phase::Queued);
                self.queues.now.push_back(key);
            } else if marker.is_ahead() != Some(false) {
                marker.set_phase(Phase::Checking);
                self.queues.check_later(key, now);
            } else {
                marker.set_phase(Phase::Resting);
            }
        }
        while let Some((due, _)) = self.queues.checks.front()
            && *due <= now
            && checked.next().is_some()
            && let Some((_, key)) = self.queues.checks.pop_front()
        {
            // Others have been queued by a command meanwhile.
            if let Some(marker) = self.markers.get_mut(&key)
                && marker.phase() == Phase::Checking
            {
                // What is known of the key may be older than what was heard.
                marker.doubt();
                marker.set_phase(Phase::Queued);
                self.queues.now.push_back(key);
            }
        }
    }

    /// The next key to be written.
    fn next(&mut self, now: Instant) -> Option<Key> {
        if self.queues.not_before.is_some_and(|until| now < until) {
            return None;
        }
        self.queues.not_before = None;
        let key = self.queues.now.pop_front()?;
        self.marker(&key).set_phase(Phase::Writing);
        self.queues.writing += 1;
        Some(key)
    }

    /// When there is something to do again; `None`: when somebody says so.
    fn due(&self) -> Option<Instant> {
        let queues = &self.queues;
        let not_before = queues.not_before.filter(|_| !queues.now.is_empty());
        let first = |queue: &VecDeque<(Instant, Key)>| queue.front().map(|(due, _)| *due);
        let (gathering, later) = (first(&queues.gathering), first(&queues.later));
        let check = first(&queues.checks);
        [not_before, gathering, later, check]
            .into_iter()
            .flatten()
            .min()
    }

    fn done(&mut self, key: Key, written: bool, now: Instant) {
        self.queues.writing -= 1;
        if let Some(waits) = self.queues.waiting.remove(&key) {
            // It may have given up.
            let _gave_up = waits.send(());
        }
        if written {
            self.marker(&key).set_phase(Phase::Pausing);
            let due = self.queues.end_of_round(now);
            self.queues.later.push_back((due, key));
        } else {
            self.marker(&key).set_phase(Phase::Queued);
            self.queues.now.push_back(key);
            self.queues.not_before = Some(now + RETRY);
        }
    }

    /// Whether something of this edge's own is not in the bucket.
    fn owes(&self) -> bool {
        let queues = &self.queues;
        queues.writing > 0
            || !queues.now.is_empty()
            || queues
                .gathering
                .iter()
                .chain(&queues.later)
                .any(|(_, key)| self.markers.get(key).is_some_and(Marker::is_owed))
    }
}

impl Markers {
    /// Loads and writes, for ever.
    pub async fn keep(self: Arc<Self>) {
        tokio::join!(self.keep_loading(), self.keep_writing());
    }

    /// What waits while a read is under way is read together by the next one.
    async fn keep_loading(&self) {
        loop {
            self.load.notified().await;
            let loads = std::mem::take(&mut self.state.lock().loads);
            let keys: HashSet<&Key> = loads.iter().flat_map(|load| &load.keys).collect();
            let keys: Vec<String> = keys.into_iter().map(ToString::to_string).collect();
            if keys.is_empty() {
                continue;
            }
            let loaded = self.fetch(&keys).await;
            for load in loads {
                // Whoever asked may be gone.
                let _gone = load.done.send(loaded.clone());
            }
        }
    }

    async fn keep_writing(&self) {
        let mut writes = FuturesUnordered::new();
        let mut sweep = Instant::now() + SWEEP;
        loop {
            let now = Instant::now();
            if now >= sweep {
                sweep = now + SWEEP;
                self.sweep(now).await;
            }
            let due = {
                let mut state = self.state.lock();
                state.wake(now);
                while writes.len() < WRITES
                    && let Some(key) = state.next(now)
                {
                    writes.push(self.write_key(key));
                }
                if state.queues.flushing && !state.owes() {
                    self.written.notify_waiters();
                }
                state.due().map_or(sweep, |due| due.min(sweep))
            };
            // All branches are cancel-safe: a write that is not done stays in `writes`.
            tokio::select! {
                Some((key, written)) = writes.next() => {
                    self.state.lock().done(key, written, Instant::now());
                }
                () = self.write.notified() => {}
                () = sleep_until(due) => {}
            }
        }
    }

    /// Forgets markers that rest. The lock is held for a step at a time: each durable send takes it.
    async fn sweep(&self, now: Instant) {
        let steps = self.state.lock().markers.len() / (STEP * SWEEPS) + 1;
        for _ in 0..steps {
            self.state.lock().markers.sweep(now);
            yield_now().await;
        }
    }

    /// Writes a key unless the bucket has it; whether that is settled.
    async fn write_key(&self, key: Key) -> (Key, bool) {
        for _ in 0..ATTEMPTS {
            let known = self.state.lock().marker(&key).is_ahead().is_some();
            if !known && self.load(vec![Arc::clone(&key)]).await.is_err() {
                return (key, false);
            }
            let (next, repair) = {
                let mut state = self.state.lock();
                let marker = state.marker(&key);
                (marker.to_write(), marker.is_repair())
            };
            let Some((cursor, revision)) = next else {
                return (key, true);
            };
            let value = Bytes::from(cursor.to_string());
            let how = Put {
                ttl: None,
                expected: Some(revision),
            };
            let result = self.bucket.put(&key, value, how).await;
            let mut state = self.state.lock();
            let marker = state.marker(&key);
            match result {
                Ok(revision) => {
                    marker.written(cursor, revision, Instant::now());
                    count(Counter::MarkerWrites(MarkerWrite::Written), 1);
                    count(Counter::MarkerRepaired, u64::from(repair));
                    return (key, true);
                }
                Err(KvError::Conflict) => {
                    marker.doubt();
                    count(Counter::MarkerWrites(MarkerWrite::Conflict), 1);
                }
                Err(error) => {
                    marker.doubt();
                    drop(state);
                    count(Counter::MarkerWrites(MarkerWrite::Failed), 1);
                    tracing::debug!(error = %error, "a read marker is written again");
                    return (key, false);
                }
            }
        }
        (key, false)
    }

    /// Writes at once what has not been written, at most until `deadline` and not for ever; whether nothing is left.
    pub async fn flush(&self, deadline: Instant) -> bool {
        let deadline = deadline.min(Instant::now() + FLUSH_WITHIN);
        self.state.lock().queues.flushing = true;
        let done = async {
            loop {
                let written = self.written.notified();
                if !self.state.lock().owes() {
                    return;
                }
                self.write.notify_one();
                written.await;
            }
        };
        timeout_at(deadline, done).await.is_ok()
    }
}
