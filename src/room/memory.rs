//! The memory for backlogs on one shard, bounded by `rooms.replay_memory`.
//!
//! A read of a stream waits for its share before it begins. What it finds is counted message by message, until the
//! message and its frames are freed: in the backlog, in the steps of a session, in the queue of a connection. A frame
//! that several sessions share is counted once. A frame that is made for one session (with its own cursor) is counted
//! when it is made, even above the bound: sessions make such frames one piece at a time. A task that reads several
//! streams waits for the memory of all of them at once, and holds none meanwhile.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use tokio::sync::{Notify, Semaphore};

use crate::{
    telemetry::metrics::{Gauge, gauge_add},
    wire::FRAME_COST,
};

/// Accounts for the memory in use. All of it belongs to one shard, but frames may be freed on other threads, so the
/// counters are atomic.
#[derive(Debug)]
pub(super) struct Memory {
    most: usize,
    used: AtomicUsize,
    /// Number of tasks that wait for a share.
    waiting: AtomicUsize,
    /// Held by the task that is next: shares are given in the order of the requests.
    next: Semaphore,
    freed: Notify,
    /// Notified when a task begins to wait.
    asked: Notify,
}

/// Memory that is in use until this is dropped.
#[derive(Debug)]
pub(super) struct Share {
    memory: Arc<Memory>,
    bytes: usize,
}

/// A frame and its share of the memory.
struct Counted {
    frame: Bytes,
    _share: Share,
    /// The share of the message whose fields the frame keeps in memory, if it does.
    _message: Option<Arc<Share>>,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.frame
    }
}

/// Counts a waiting task until dropped.
struct Waiting<'m>(&'m Memory);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Relaxed);
    }
}

impl Memory {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            used: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            next: Semaphore::new(1),
            freed: Notify::new(),
            asked: Notify::new(),
        })
    }

    /// Waits for a share: until there is enough memory for it, or none is in use. Cancel-safe.
    pub(super) async fn share(self: &Arc<Self>, bytes: usize) -> Share {
        self.waiting.fetch_add(1, Relaxed);
        let _waiting = Waiting(self);
        let mut told = false;
        // The semaphore is never closed.
        let _next = self.next.acquire().await;
        loop {
            let mut freed = pin!(self.freed.notified());
            freed.as_mut().enable();
            let used = self.used.load(Relaxed);
            if used == 0 || used.saturating_add(bytes) <= self.most {
                return self.take(bytes);
            }
            if !std::mem::replace(&mut told, true) {
                self.asked.notify_waiters();
            }
            freed.await;
        }
    }

    /// Takes a share at once, even above the bound.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Share {
        self.used.fetch_add(bytes, Relaxed);
        tell(bytes, 1);
        Share {
            memory: Arc::clone(self),
            bytes,
        }
    }

    /// A frame that is counted until it is freed.
    pub(super) fn count(self: &Arc<Self>, frame: Bytes) -> Bytes {
        Bytes::from_owner(Counted {
            _share: self.take(weight(&frame)),
            frame,
            _message: None,
        })
    }

    /// Resolves when a task waits for a share that there is not enough memory for. Cancel-safe.
    pub(super) async fn is_short(&self) {
        loop {
            let mut asked = pin!(self.asked.notified());
            asked.as_mut().enable();
            if self.waiting.load(Relaxed) > 0 {
                return;
            }
            asked.await;
        }
    }
}

impl Share {
    /// Splits off a share of `bytes`. If this one is too small, the rest is taken in addition.
    pub(super) fn part(&mut self, bytes: usize) -> Self {
        let given = bytes.min(self.bytes);
        self.bytes -= given;
        let mut part = self.memory.take(bytes - given);
        part.bytes += given;
        part
    }

    /// A frame of the message that has this share. `own` bytes of the frame are not counted with the message. The
    /// message's share is kept as long as the frame.
    pub(super) fn frame_of(self: &Arc<Self>, own: usize, frame: Bytes) -> Bytes {
        Bytes::from_owner(Counted {
            frame,
            _share: self.memory.take(own + FRAME_COST),
            _message: Some(Arc::clone(self)),
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.memory.used.fetch_sub(self.bytes, Relaxed);
        tell(self.bytes, -1);
        self.memory.freed.notify_waiters();
    }
}

/// The bytes that a frame is counted with.
pub(super) fn weight(frame: &Bytes) -> usize {
    frame.len() + FRAME_COST
}

fn tell(bytes: usize, sign: i64) {
    gauge_add(
        Gauge::ReplayBytes,
        sign * i64::try_from(bytes).unwrap_or(i64::MAX),
    );
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt as _;
    use tokio::time::timeout;

    use super::*;

    fn frame(bytes: usize) -> Bytes {
        Bytes::from(vec![7; bytes])
    }

    fn used(memory: &Memory) -> usize {
        memory.used.load(Relaxed)
    }

    #[tokio::test]
    async fn a_frame_is_counted_once_until_its_last_part_is_freed() {
        let memory = Memory::new(10_000);
        let mut share = memory.share(5000).await;
        // Two messages, and a frame of each. 100 bytes of each frame are not part of the message.
        let messages = [900, 1900].map(|bytes| Arc::new(share.part(bytes)));
        let one = messages[0].frame_of(100, frame(1000));
        let other = messages[1].frame_of(100, frame(2000));
        assert_eq!(used(&memory), 5000 + 200 + 2 * FRAME_COST);
        drop((messages, share));
        let both = 3000 + 2 * FRAME_COST;
        assert_eq!(used(&memory), both);
        // A clone of a frame, and the rest of a partially written one, are the same frame.
        let (again, rest) = (one.clone(), one.slice(990..));
        drop((one, again));
        assert_eq!((used(&memory), &rest[..]), (both, &[7; 10][..]));
        drop(rest);
        assert_eq!(used(&memory), 2000 + FRAME_COST);
        drop(other);
        assert_eq!(used(&memory), 0);
    }

    #[tokio::test]
    async fn what_does_not_fit_a_share_is_counted_all_the_same() {
        let memory = Memory::new(1000);
        let mut share = memory.share(1000).await;
        let parts: Vec<Share> = (0..3).map(|_| share.part(600)).collect();
        assert_eq!(used(&memory), 3 * 600);
        let copy = memory.count(frame(100));
        assert_eq!(used(&memory), 3 * 600 + 100 + FRAME_COST);
        drop((parts, copy, share));
        assert_eq!(used(&memory), 0);
    }

    #[tokio::test]
    async fn shares_are_given_in_order_and_who_holds_some_is_told() {
        let memory = Memory::new(1000);
        let first = memory.share(900).await;
        assert_eq!(memory.is_short().now_or_never(), None);
        let large = tokio::spawn({
            let memory = Arc::clone(&memory);
            async move { memory.share(800).await }
        });
        // Resolves when the task above waits.
        memory.is_short().await;
        // There is enough memory for this one, but it is not next. A request that is cancelled blocks nobody.
        assert!(memory.share(50).now_or_never().is_none());
        drop(first);
        let large = large.await.unwrap();
        assert_eq!(memory.is_short().now_or_never(), None);
        let small = memory.share(200).now_or_never().unwrap();
        drop((large, small));
        assert_eq!(used(&memory), 0);
    }

    #[tokio::test]
    async fn a_share_larger_than_all_there_is_has_it_alone() {
        let memory = Memory::new(1000);
        let small = memory.take(1);
        let wait = timeout(Duration::from_millis(10), memory.share(5000));
        assert!(wait.await.is_err());
        drop(small);
        let all = memory.share(5000).await;
        assert!(memory.share(1).now_or_never().is_none());
        drop(all);
        assert!(memory.share(1).now_or_never().is_some());
    }
}
