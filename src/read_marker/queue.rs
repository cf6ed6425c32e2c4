//! The markers that are to be loaded, written or checked, and when: pure state.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};

use super::{
    error::MarkerError,
    index::{Index, Key, STEP},
    marker::{Marker, Phase},
};

/// Length of a round. After the first time, a key is written at most once in a round.
pub const WRITE_PAUSE: Duration = Duration::from_millis(250);

/// Length of a round of the markers that only sending has moved. They wait for its end, so that many writes wake this
/// process and the server only once, and what somebody says in one breath is one write.
pub const SENT_PAUSE: Duration = Duration::from_secs(1);

/// Pause of all writes after a failed one.
const RETRY: Duration = Duration::from_millis(500);

/// How long this edge waits before it checks whether another edge has written what it announced.
const CHECK_AFTER: Duration = Duration::from_secs(1);

/// What an edge knows of the markers.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) markers: Index,
    pub(super) queues: Queues,
    pub(super) loads: Vec<Load>,
    /// When the bucket last failed to answer.
    pub(super) failed: Option<Instant>,
}

/// A request for keys to be read.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) keys: Vec<Key>,
    pub(super) done: oneshot::Sender<Result<(), MarkerError>>,
}

/// Keys that are to be written or checked, each in the queue of its [`Phase`].
#[derive(Debug)]
pub(super) struct Queues {
    /// When the first round began.
    began: Instant,
    /// To be written at once.
    now: VecDeque<Key>,
    /// To be written at the end of a round, ordered by that time.
    gathering: VecDeque<(Instant, Key)>,
    /// Just written. Each may be written again at the end of a round; ordered by that time.
    later: VecDeque<(Instant, Key)>,
    /// Announced by other edges: when to check whether they were written. Ordered, since the delay is the same for all.
    checks: VecDeque<(Instant, Key)>,
    check_after: Duration,
    /// Who waits for the write of a key.
    waiting: HashMap<Key, oneshot::Sender<()>>,
    /// Nothing is written before this time.
    not_before: Option<Instant>,
    /// Whether the edge stops: no pauses.
    pub(super) flushing: bool,
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
            // Different on each edge: the first one to check repairs, and the others find it done.
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

    /// The end of the round of this length that contains `at`.
    fn end_of_round(&self, at: Instant, pause: Duration) -> Instant {
        let rounds = at.duration_since(self.began).as_nanos();
        let rounds = rounds.div_ceil(pause.as_nanos());
        self.began + pause * u32::try_from(rounds).unwrap_or(u32::MAX)
    }

    fn gather(&mut self, key: Key, now: Instant) {
        let due = self.end_of_round(now, SENT_PAUSE);
        self.gathering.push_back((due, key));
    }
}

impl State {
    pub(super) fn marker(&mut self, key: &Key) -> &mut Marker {
        self.markers.marker(key)
    }

    /// Queues a marker to be written now, if this edge has to write it. Returns a receiver that resolves after the
    /// write. Returns `None` if somebody waits for it already, if it is being written, or was just written: then it is
    /// written later.
    pub(super) fn queue(&mut self, key: &Key) -> Option<oneshot::Receiver<()>> {
        let marker = self.marker(key);
        if !marker.is_owed() {
            return None;
        }
        marker.promise();
        match marker.phase() {
            Phase::Resting | Phase::Checking | Phase::Gathering => {
                marker.set_phase(Phase::Queued);
                // Before those that only sending has moved, of which a round may bring thousands.
                self.queues.now.push_front(Arc::clone(key));
            }
            // Sending has moved it before.
            Phase::Queued if !self.queues.waiting.contains_key(key) => {}
            Phase::Queued | Phase::Writing | Phase::Pausing => return None,
        }
        let (done, written) = oneshot::channel();
        self.queues.waiting.insert(Arc::clone(key), done);
        Some(written)
    }

    /// Queues a marker to be written at the end of this round of [`SENT_PAUSE`], if this edge has to write it. Returns
    /// whether it is the first one of the queue.
    pub(super) fn gather(&mut self, key: &Key, now: Instant) -> bool {
        let marker = self.marker(key);
        let rests = matches!(marker.phase(), Phase::Resting | Phase::Checking);
        if !marker.is_owed() || !rests {
            return false;
        }
        marker.set_phase(Phase::Gathering);
        self.queues.gather(Arc::clone(key), now);
        self.queues.gathering.len() == 1
    }

    /// Moves keys whose time has come to their next queue, at most [`STEP`] of each queue. The rest stays due.
    pub(super) fn wake(&mut self, now: Instant) {
        let flushing = self.queues.flushing;
        let (mut gathered, mut paused, mut checked) = (0..STEP, 0..STEP, 0..STEP);
        while let Some((due, _)) = self.queues.gathering.front()
            && (*due <= now || flushing)
            && gathered.next().is_some()
            && let Some((_, key)) = self.queues.gathering.pop_front()
        {
            // The others have been queued by a command meanwhile.
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
            if marker.is_owed() && (marker.is_promised() || flushing) {
                marker.set_phase(Phase::Queued);
                self.queues.now.push_back(key);
            } else if marker.is_owed() {
                marker.set_phase(Phase::Gathering);
                self.queues.gather(key, now);
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
            // The others have been queued by a command meanwhile.
            if let Some(marker) = self.markers.get_mut(&key)
                && marker.phase() == Phase::Checking
            {
                // What is known of the key may be older than the receipt.
                marker.doubt();
                marker.set_phase(Phase::Queued);
                self.queues.now.push_back(key);
            }
        }
    }

    /// The next key to be written.
    pub(super) fn next(&mut self, now: Instant) -> Option<Key> {
        if self.queues.not_before.is_some_and(|until| now < until) {
            return None;
        }
        self.queues.not_before = None;
        let key = self.queues.now.pop_front()?;
        self.marker(&key).set_phase(Phase::Writing);
        self.queues.writing += 1;
        Some(key)
    }

    /// When there is something to do next; `None` if only on a notification.
    pub(super) fn due(&self) -> Option<Instant> {
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

    pub(super) fn done(&mut self, key: Key, written: bool, now: Instant) {
        self.queues.writing -= 1;
        if let Some(waits) = self.queues.waiting.remove(&key) {
            // The receiver may have given up.
            let _gave_up = waits.send(());
        }
        if written {
            self.marker(&key).set_phase(Phase::Pausing);
            let due = self.queues.end_of_round(now, WRITE_PAUSE);
            self.queues.later.push_back((due, key));
        } else {
            self.marker(&key).set_phase(Phase::Queued);
            self.queues.now.push_back(key);
            self.queues.not_before = Some(now + RETRY);
        }
    }

    /// Whether this edge still has to write a marker.
    pub(super) fn owes(&self) -> bool {
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
