//! The memory of backlogs on one shard: `rooms.replay_memory`.
//!
//! A read of a stream waits for its share before it begins. What it finds is counted message by message, from then until the
//! message and its frames are freed: in the backlog, in what a session has yet to be given, in the queue of its connection. A
//! frame that several sessions share is counted once. A frame that is made for one session (with a cursor of its own) is counted
//! as it is made, over the bound if need be: sessions make them a piece at a time. Whoever reads several streams waits for all of them at once, and holds nothing meanwhile.

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

/// How much of the memory is taken. Frames are freed where they are, so the counts are atomic; all of it is of one shard.
#[derive(Debug)]
pub(super) struct Memory {
    most: usize,
    used: AtomicUsize,
    /// How many wait for a share.
    waiting: AtomicUsize,
    /// Held by the one who is next: shares are given in the order in which they were asked for.
    next: Semaphore,
    freed: Notify,
    /// Somebody has begun to wait.
    asked: Notify,
}

/// Memory that is taken until this is dropped.
#[derive(Debug)]
pub(super) struct Share {
    memory: Arc<Memory>,
    bytes: usize,
}

/// A frame, and its part of the memory.
struct Counted {
    frame: Bytes,
    _share: Share,
    /// That of the message whose fields it keeps, if it does.
    _message: Option<Arc<Share>>,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.frame
    }
}

/// One who waits.
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

    /// Waits for a share: until there is room for it, or nothing is taken. Cancel-safe.
    pub(super) async fn share(self: &Arc<Self>, bytes: usize) -> Share {
        self.waiting.fetch_add(1, Relaxed);
        let _waiting = Waiting(self);
        let mut told = false;
        // It is never closed.
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

    /// A share at once, over the bound if need be.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Share {
        self.used.fetch_add(bytes, Relaxed);
        tell(bytes, 1);
        Share {
            memory: Arc::clone(self),
            bytes,
        }
    }

    /// The frame, counted until it is freed.
    pub(super) fn count(self: &Arc<Self>, frame: Bytes) -> Bytes {
        Bytes::from_owner(Counted {
            _share: self.take(weight(&frame)),
            frame,
            _message: None,
        })
    }

    /// Resolves while somebody waits for a share that there is no room for. Cancel-safe.
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
    /// A share of its own of `bytes`, taken of this one, and more where that is not enough.
    pub(super) fn part(&mut self, bytes: usize) -> Self {
        let given = bytes.min(self.bytes);
        self.bytes -= given;
        let mut part = self.memory.take(bytes - given);
        part.bytes += given;
        part
    }

    /// A frame of the message whose share this is. `own` bytes of it are not counted with the message, whose share is kept as
    /// long as the frame.
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

/// What a frame takes.
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
        // Two messages; a frame of each, of which 100 bytes are not a part of the message.
        let messages = [900, 1900].map(|bytes| Arc::new(share.part(bytes)));
        let one = messages[0].frame_of(100, frame(1000));
        let other = messages[1].frame_of(100, frame(2000));
        assert_eq!(used(&memory), 5000 + 200 + 2 * FRAME_COST);
        drop((messages, share));
        let both = 3000 + 2 * FRAME_COST;
        assert_eq!(used(&memory), both);
        // Other sessions' handles, and what is left of a frame that was written in part, are the same frame.
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
        // It resolves when the one above waits.
        memory.is_short().await;
        // There would be room for this one, but it is not next; and who gives up is in nobody's way.
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
