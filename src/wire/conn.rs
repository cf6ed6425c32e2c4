//! The socket of one connection: direct writes, a bounded queue for a peer that is behind, and an orderly close.
//!
//! ```text
//!            send, queue empty ──► one direct write
//!                 │ would block, or partly written, or more follows
//!                 ▼
//!  OPEN ◄── queue empty ── BEHIND: send only appends; one writer task waits for the socket
//!    │                        │
//!    └── close(reason) ───────┴──► CLOSING: send does nothing; one task writes the queue (or the torn frame's rest) and the
//!    │                               close frame, shuts the write half down, and reads until the peer's end
//!    └── error ──► DEAD ◄──────────── all done, error, or grace over
//! ```
//!
//! Frames are complete WebSocket frames; this module does not examine them. It makes no decisions about the session:
//! the session reads, answers the peer's close with `close(Close::Normal)`, and calls [`Conn::check_stall`] from its
//! tick.
//!
//! # Invariants
//! - The bytes on the wire are whole frames, in the order of `send`, followed by the close frame. Only a connection
//!   that dies may end inside a frame.
//! - There is a queue if and only if something is unwritten. While there is one and the connection is open, exactly one
//!   writer task waits for the socket, or for its turn. It ends when it finds no queue.
//! - Only the `async` methods wait, and only [`Conn::read_with`] runs code of its caller: wakers only mark tasks as
//!   ready. No borrow is held across an await.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    fmt,
    future::poll_fn,
    io::{self, IoSlice},
    net::IpAddr,
    pin::Pin,
    rc::{Rc, Weak},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncWrite, Interest},
    net::TcpStream,
};

use crate::{
    protocol::Close,
    telemetry::metrics::{Counter, SocketCall, count},
};

/// Time limit of a close: flushing the queue, the close frame, and the peer's end. After that the socket is reset.
const GRACE: Duration = Duration::from_secs(10);
/// Maximum number of frames in a vectored write. More don't make it cheaper, and the slices are on the stack.
const MAX_SLICES: usize = 64;
/// Frames of up to this many bytes together are copied and written as one piece: that is cheaper than a vectored write.
const COPIED: usize = 1024;
/// Cost of a queued frame besides its bytes: its slot in the queue, and the overhead of the allocator and of `Bytes`.
/// It is counted against [`ConnSettings::outbox_bytes`]. Otherwise a peer that only sends pings and never reads could
/// make the queue hold many times the limit in pongs of two bytes.
pub(crate) const FRAME_COST: usize = 64;
/// Frames that are put off because more follows are written when they are more than this, in bytes.
const DEFERRED: usize = 16 * 1024;
/// Size that [`Conn::read_with`] gives to an empty buffer.
const READ_BYTES: usize = 64 * 1024;
/// Size of the stack buffer for what a peer still sends during a close.
const DISCARD_BYTES: usize = 2048;

/// What all connections of one client protocol on a shard have in common.
#[derive(Debug, Clone, Copy)]
pub struct ConnSettings {
    /// Queued bytes, plus a fixed cost for each frame, above which the peer is too slow. A frame is always accepted if
    /// the queue is empty, whatever its size. So the queue holds at most this much, or one frame.
    pub outbox_bytes: usize,
    /// How long queued bytes may wait without any progress before the peer is too slow.
    pub stall: Duration,
    /// The close frame of the protocol.
    pub close_frame: fn(Close) -> Bytes,
}

/// The read and write sides of one connection. See the top of `conn.rs` for states and invariants.
///
/// All methods must be called inside the shard's runtime. When the last handle of an open connection is dropped, the
/// socket and the queue are dropped too. [`close`](Self::close) keeps the connection alive until it has ended.
pub struct Conn {
    /// `None` = dead. Taking it closes the file descriptor, even if there are other handles.
    stream: RefCell<Option<TcpStream>>,
    outbox: RefCell<Option<Box<Outbox>>>,
    closing: Cell<Option<Close>>,
    /// Number of frames that are about to follow, see [`Conn::more_follows`].
    following: Cell<u32>,
    /// Whether there is a writer task. It may find that the queue was written meanwhile.
    has_writer: Cell<bool>,
    /// Whether the peer has ended its half: there is nothing more to read.
    read_ended: Cell<bool>,
    /// The session's waker in [`read_with`](Self::read_with). Woken when the connection closes or dies. For data, the
    /// runtime wakes it.
    reader: Cell<Option<Waker>>,
    /// The waker of the writer task. Woken when [`Self::finish`] takes over or the connection is dropped.
    writer: Cell<Option<Waker>>,
    /// Tasks in [`drained`](Self::drained) and [`closed`](Self::closed). Woken on any progress and any change of state.
    waiters: RefCell<Vec<Waker>>,
    settings: Rc<ConnSettings>,
}

/// What is unwritten. Never empty.
struct Outbox {
    /// The first frame is without the part that was written. No frame is empty.
    frames: VecDeque<Bytes>,
    /// Whether a part of the first frame was written: then it can't be dropped any more.
    torn: bool,
    /// The sum of the lengths of `frames`.
    bytes: usize,
    /// When the queue began, or last made progress.
    moved_at: Instant,
}

impl Outbox {
    /// A queue of one frame. `torn` if it is the rest of a frame whose beginning was written.
    fn boxed(frame: Bytes, torn: bool) -> Box<Self> {
        // Mostly a message and its acknowledgement.
        let mut frames = VecDeque::with_capacity(2);
        let bytes = frame.len();
        frames.push_back(frame);
        Box::new(Self {
            bytes,
            frames,
            torn,
            moved_at: Instant::now(),
        })
    }

    fn push(&mut self, frame: Bytes) {
        self.bytes += frame.len();
        self.frames.push_back(frame);
    }

    /// Its bytes, plus a fixed cost for each frame.
    fn weight(&self) -> usize {
        let cost = self.frames.len().saturating_mul(FRAME_COST);
        self.bytes.saturating_add(cost)
    }

    fn exceeds(&self, settings: &ConnSettings, frame: &Bytes) -> bool {
        let weight = self.weight().saturating_add(FRAME_COST);
        weight.saturating_add(frame.len()) > settings.outbox_bytes
    }

    /// Drops everything except the rest of a frame whose beginning was written.
    fn keep_torn_frame(&mut self) {
        self.frames.truncate(usize::from(self.torn));
        self.frames.shrink_to_fit();
        self.bytes = self.frames.iter().map(Bytes::len).sum();
    }

    /// Takes `written` bytes off the front.
    fn advance(&mut self, mut written: usize) {
        self.bytes -= written;
        while written > 0 {
            let Some(front) = self.frames.front_mut() else {
                return;
            };
            if front.len() > written {
                front.advance(written);
                self.torn = true;
                return;
            }
            written -= front.len();
            self.torn = false;
            self.frames.pop_front();
        }
    }
}

/// The state of the queue after a write.
enum Flush {
    Empty,
    /// The socket accepts no more for now.
    Blocked,
    Dead,
}

impl Conn {
    /// Takes over a socket on which the handshake is done and `TCP_NODELAY` is set.
    #[must_use]
    pub fn new(stream: TcpStream, settings: Rc<ConnSettings>) -> Rc<Self> {
        Rc::new(Self {
            stream: RefCell::new(Some(stream)),
            outbox: RefCell::new(None),
            closing: Cell::new(None),
            following: Cell::new(0),
            has_writer: Cell::new(false),
            read_ended: Cell::new(false),
            reader: Cell::new(None),
            writer: Cell::new(None),
            waiters: RefCell::new(Vec::new()),
            settings,
        })
    }

    /// Sends complete frames, in order. Writes them at once as far as the socket accepts them, and queues the rest. If
    /// the queue exceeds [`ConnSettings::outbox_bytes`], the connection closes with [`Close::TooSlow`]. To send a lot,
    /// wait for [`drained`](Self::drained) between parts.
    ///
    /// A socket does not count as writable until the runtime has seen its first event, one turn of the shard after
    /// [`new`](Self::new). Frames sent before that go through the queue.
    ///
    /// While [more follows](Self::more_follows), frames are written at the end of the shard's turn.
    ///
    /// Frames for a connection that is closing or dead are dropped. A caller that counts frames checks
    /// [`closing`](Self::closing) first.
    pub fn send(self: &Rc<Self>, frames: &[Bytes]) {
        if self.closing.get().is_some() {
            return;
        }
        let puts_off = self.following.get() > 0;
        let bytes: usize = frames.iter().map(|frame| frame.len() + FRAME_COST).sum();
        let most = DEFERRED.min(self.settings.outbox_bytes / 2);
        let follows = puts_off && self.queued_bytes() + bytes <= most;
        if puts_off && !follows {
            // The client may well read all of it now: what is put off must not count as what it is behind.
            self.flush();
        }
        let behind = self.outbox.borrow().is_some();
        let rest = if behind || follows {
            Some((frames, 0))
        } else {
            self.write_direct(frames)
        };
        let Some((rest, written)) = rest else {
            return;
        };
        if !self.append(rest, written) {
            self.close(Close::TooSlow);
        } else if self.outbox.borrow().is_some() && !self.has_writer.replace(true) {
            tokio::task::spawn_local(write_queue(Rc::downgrade(self)));
        }
    }

    /// Says that another frame is likely to follow soon, or (`false`) that it has come. Until then, what is sent in one
    /// turn of the shard is written together at its end: the message of a client and its acknowledgement arrive
    /// together, and a second write would cost more than all else that is done for them.
    pub fn more_follows(&self, follows: bool) {
        let following = self.following.get();
        self.following.set(match follows {
            true => following.saturating_add(1),
            false => following.saturating_sub(1),
        });
    }

    /// The size of what was accepted by [`send`](Self::send), and the close frame, and not taken by the socket yet: its
    /// bytes, and a fixed cost for each frame.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.outbox
            .borrow()
            .as_ref()
            .map_or(0, |outbox| outbox.weight())
    }

    /// The bound of the queue, in bytes.
    #[must_use]
    pub fn outbox_bytes(&self) -> usize {
        self.settings.outbox_bytes
    }

    /// The address of the peer; `None` if the socket is gone.
    #[must_use]
    pub fn peer(&self) -> Option<IpAddr> {
        let stream = self.stream.borrow();
        // A socket without a peer is one whose connection was reset.
        let peer = stream.as_ref()?.peer_addr().ok()?;
        Some(peer.ip())
    }

    /// Whether the connection is closing or dead, and so accepts no more frames.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.closing.get().is_some() || self.is_dead()
    }

    /// Resolves when at most `below` bytes are queued, or the connection is closing or dead. Cancel-safe.
    pub async fn drained(&self, below: usize) {
        poll_fn(|cx| {
            if self.is_over() || self.queued_bytes() <= below {
                return Poll::Ready(());
            }
            self.wait(cx);
            Poll::Pending
        })
        .await;
    }

    /// Starts to close. The first reason wins; later calls do nothing.
    ///
    /// [`Close::TooSlow`] and [`Close::PingTimeout`] drop what is queued, except the rest of a frame whose beginning
    /// was sent. With other reasons, the queue is sent first. Then the close frame is sent and the write half is shut
    /// down. What the peer still sends is read and discarded until the peer ends: closing a socket with unread bytes
    /// causes a reset, which could destroy a close frame that is still on its way. All of this is bounded by a grace
    /// time; after that the connection is reset.
    ///
    /// From now on [`read_with`](Self::read_with) returns `None`. The close runs in a task of its own, whether or not
    /// somebody waits in [`closed`](Self::closed) or keeps a handle.
    pub fn close(self: &Rc<Self>, reason: Close) {
        self.close_within(reason, GRACE);
    }

    /// The same with a close frame of the caller.
    pub fn close_with(self: &Rc<Self>, reason: Close, frame: Bytes) {
        self.begin_close(reason, frame, GRACE);
    }

    /// Gives the socket away, to continue elsewhere. This connection is then dead. Returns `None` if something is
    /// unwritten, or the connection is closing or dead.
    #[must_use]
    pub fn release(&self) -> Option<std::net::TcpStream> {
        if self.closing.get().is_some() || self.outbox.borrow().is_some() {
            return None;
        }
        let stream = self.stream.take()?;
        self.die();
        stream
            .into_std()
            .inspect_err(|error| tracing::debug!(%error, "a connection was lost"))
            .ok()
    }

    /// The reason of the first [`close`](Self::close). `None` if the connection is open, or died without a close.
    #[must_use]
    pub fn closing(&self) -> Option<Close> {
        self.closing.get()
    }

    /// Waits for bytes, reads once into `buffer`, and passes the bytes to `take`, which may change them in place. An
    /// empty buffer is given a size. Returns `None` at the peer's end, or if the connection is closing or dead.
    ///
    /// The buffer is borrowed only from the read to the end of `take`, with no await in between. So all sessions of a
    /// shard can share one buffer, and none can find another's bytes in it. `take` must not poll another `read_with`.
    ///
    /// Cancel-safe: nothing is read before the poll that calls `take`. Must be used by one task at a time: a second one
    /// would take the wake-ups of the first.
    ///
    /// # Errors
    /// The error of the socket. The connection is then dead.
    pub async fn read_with<R>(
        &self,
        buffer: &RefCell<Vec<u8>>,
        take: impl FnOnce(&mut [u8]) -> R,
    ) -> io::Result<Option<R>> {
        let mut take = Some(take);
        poll_fn(|cx| {
            loop {
                if self.closing.get().is_some() || self.read_ended.get() {
                    return Poll::Ready(Ok(None));
                }
                let read = {
                    let stream = self.stream.borrow();
                    let Some(stream) = stream.as_ref() else {
                        return Poll::Ready(Ok(None));
                    };
                    // For `close`, which the runtime does not know about.
                    set_waker(&self.reader, cx);
                    match stream.poll_read_ready(cx) {
                        Poll::Pending => return Poll::Pending,
                        Poll::Ready(Err(error)) => Err(error),
                        Poll::Ready(Ok(())) => {
                            let mut buffer = buffer.borrow_mut();
                            if buffer.is_empty() {
                                buffer.resize(READ_BYTES, 0);
                            }
                            count(Counter::SocketCalls(SocketCall::ClientRead), 1);
                            let read = stream.try_read(&mut buffer);
                            if matches!(read, Ok(n) if 0 < n && n < buffer.len()) {
                                // The socket is empty: the next wait need not find that out by another read. No event
                                // can come in between, since this thread drives the runtime that would take it in.
                                let _cleared: io::Result<()> = stream
                                    .try_io(Interest::READABLE, || {
                                        Err(io::ErrorKind::WouldBlock.into())
                                    });
                            }
                            read
                        }
                    }
                };
                match read {
                    Ok(0) => {
                        self.read_ended.set(true);
                        return Poll::Ready(Ok(None));
                    }
                    Ok(n) => {
                        let mut buffer = buffer.borrow_mut();
                        let taken = take.take().map(|take| take(&mut buffer[..n]));
                        return Poll::Ready(Ok(taken));
                    }
                    Err(error) if retry(&error) => {}
                    Err(error) => {
                        self.die();
                        return Poll::Ready(Err(error));
                    }
                }
            }
        })
        .await
    }

    /// Called from the shard's tick. Closes with [`Close::TooSlow`] if bytes are queued and there was no progress for
    /// [`ConnSettings::stall`].
    pub fn check_stall(self: &Rc<Self>, now: Instant) {
        let moved_at = self.outbox.borrow().as_ref().map(|outbox| outbox.moved_at);
        if moved_at.is_some_and(|at| now.saturating_duration_since(at) >= self.settings.stall) {
            self.close(Close::TooSlow);
        }
    }

    /// Resolves when the socket is gone: within the grace time after [`close`](Self::close), or after an error of a
    /// read or write. The peer's end alone is not enough: the session sees it in [`read_with`](Self::read_with) and
    /// closes. Cancel-safe.
    pub async fn closed(&self) {
        poll_fn(|cx| {
            if self.is_dead() {
                return Poll::Ready(());
            }
            self.wait(cx);
            Poll::Pending
        })
        .await;
    }

    fn is_dead(&self) -> bool {
        self.stream.borrow().is_none()
    }

    /// Writes until everything is written or the socket accepts no more. Returns what is left: the frames, and how much
    /// of the first one is written.
    fn write_direct<'a>(&self, frames: &'a [Bytes]) -> Option<(&'a [Bytes], usize)> {
        let mut rest = frames;
        while !rest.is_empty() {
            let batch = &rest[..rest.len().min(MAX_SLICES)];
            let length: usize = batch.iter().map(Bytes::len).sum();
            let written = match self.try_write(batch.iter()) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(_) => {
                    self.die();
                    return None;
                }
            };
            if written < length {
                let mut written = written;
                while let Some(first) = rest.first() {
                    if written < first.len() {
                        break;
                    }
                    written -= first.len();
                    rest = &rest[1..];
                }
                return Some((rest, written));
            }
            rest = &rest[batch.len()..];
        }
        None
    }

    /// One write call with up to [`MAX_SLICES`] of `frames`. After [`io::ErrorKind::WouldBlock`] the caller can wait
    /// and retry; every other error is final.
    fn try_write<'a>(&self, mut frames: impl Iterator<Item = &'a Bytes>) -> io::Result<usize> {
        let stream = self.stream.borrow();
        let Some(stream) = stream.as_ref() else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let Some(first) = frames.next() else {
            return Ok(0);
        };
        // By far the most common case: nothing to gather.
        let Some(second) = frames.next() else {
            return write_with(|| stream.try_write(first));
        };
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let mut used = 0;
        let all = [first, second].into_iter().chain(frames);
        for (slice, frame) in slices.iter_mut().zip(all) {
            *slice = IoSlice::new(frame);
            used += 1;
        }
        let slices = &slices[..used];
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        if length > COPIED {
            return write_with(|| stream.try_write_vectored(slices));
        }
        let mut copy = [0; COPIED];
        let mut rest = &mut copy[..];
        for slice in slices {
            let (place, after) = rest.split_at_mut(slice.len());
            place.copy_from_slice(slice);
            rest = after;
        }
        write_with(|| stream.try_write(&copy[..length]))
    }

    /// Queues `frames`. The first `written` bytes of the first frame are already on the wire. Returns `false` if the
    /// frames exceed the bound; some of them may be queued then.
    fn append(&self, frames: &[Bytes], mut written: usize) -> bool {
        let mut slot = self.outbox.borrow_mut();
        for frame in frames {
            let written = std::mem::take(&mut written);
            let frame = frame.slice(written..);
            if frame.is_empty() {
                continue;
            }
            match slot.as_mut() {
                None => *slot = Some(Outbox::boxed(frame, written > 0)),
                Some(outbox) if outbox.exceeds(&self.settings, &frame) => return false,
                Some(outbox) => outbox.push(frame),
            }
        }
        true
    }

    /// Writes from the queue until it is empty (then it is freed) or the socket accepts no more.
    fn flush(&self) -> Flush {
        let mut moved = false;
        let outcome = loop {
            let mut slot = self.outbox.borrow_mut();
            let Some(outbox) = slot.as_mut() else {
                break Flush::Empty;
            };
            match self.try_write(outbox.frames.iter()) {
                // No queued frame is empty, so a socket that writes 0 bytes is broken.
                Ok(0) => break Flush::Dead,
                Ok(written) => {
                    outbox.advance(written);
                    outbox.moved_at = Instant::now();
                    moved = true;
                    if outbox.frames.is_empty() {
                        *slot = None;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Flush::Blocked,
                Err(_) => break Flush::Dead,
            }
        };
        if matches!(outcome, Flush::Dead) {
            self.die();
        } else if moved {
            self.wake_waiters();
        }
        outcome
    }

    /// Ready if the queue is empty or the connection is dead.
    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match self.flush() {
                Flush::Empty | Flush::Dead => return Poll::Ready(()),
                Flush::Blocked => {}
            }
            let ready = match self.stream.borrow().as_ref() {
                Some(stream) => stream.poll_write_ready(cx),
                None => return Poll::Ready(()),
            };
            match ready {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) => {
                    self.die();
                    return Poll::Ready(());
                }
            }
        }
    }

    fn close_within(self: &Rc<Self>, reason: Close, grace: Duration) {
        self.begin_close(reason, (self.settings.close_frame)(reason), grace);
    }

    fn begin_close(self: &Rc<Self>, reason: Close, frame: Bytes, grace: Duration) {
        if self.closing.get().is_some() {
            return;
        }
        self.closing.set(Some(reason));
        if self.is_dead() {
            return;
        }
        {
            let mut slot = self.outbox.borrow_mut();
            if matches!(reason, Close::TooSlow | Close::PingTimeout)
                && let Some(outbox) = slot.as_mut()
            {
                outbox.keep_torn_frame();
            }
            match slot.as_mut() {
                None => *slot = Some(Outbox::boxed(frame, false)),
                Some(outbox) => outbox.push(frame),
            }
        }
        // The reader and the writer end and leave the socket to `finish`. The socket stores one waker for each
        // direction, so two tasks must not wait for the same direction.
        wake(&self.reader);
        wake(&self.writer);
        self.wake_waiters();
        tokio::task::spawn_local(Rc::clone(self).finish(grace));
    }

    /// The task of a closing connection.
    async fn finish(self: Rc<Self>, grace: Duration) {
        let orderly = tokio::time::timeout(grace, poll_fn(|cx| self.poll_finish(cx))).await;
        if orderly.is_err()
            && let Some(stream) = self.stream.borrow().as_ref()
            && let Err(error) = stream.set_zero_linger()
        {
            // Without the reset, the kernel holds unsent bytes for minutes if the peer does not read. This costs
            // memory, but is not an error.
            tracing::debug!(%error, "cannot reset a connection that did not end in time");
        }
        self.die();
    }

    /// Ready if everything is written and shut down and the peer has ended, or if the connection is dead.
    fn poll_finish(&self, cx: &mut Context<'_>) -> Poll<()> {
        // Reads from the start, not only after the close frame. A peer that waits until we read before it reads would
        // never get the close frame.
        if self.poll_discard(cx).is_ready() {
            self.read_ended.set(true);
        }
        if self.poll_flush(cx).is_pending() {
            return Poll::Pending;
        }
        match self.stream.borrow_mut().as_mut() {
            None => return Poll::Ready(()),
            // Repeated on every poll, which is harmless.
            Some(stream) => match Pin::new(stream).poll_shutdown(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) => return Poll::Ready(()),
            },
        }
        if self.read_ended.get() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    /// Reads and discards. Ready when nothing more will arrive.
    fn poll_discard(&self, cx: &mut Context<'_>) -> Poll<()> {
        let stream = self.stream.borrow();
        let Some(stream) = stream.as_ref() else {
            return Poll::Ready(());
        };
        let mut discarded = [0; DISCARD_BYTES];
        while !self.read_ended.get() {
            // This uses up tokio's budget for the poll, so a peer that never stops sending does not block the shard.
            match stream.poll_read_ready(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(_)) => break,
                Poll::Ready(Ok(())) => {}
            }
            match stream.try_read(&mut discarded) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if retry(&error) => {}
                // The write side detects the error itself.
                Err(_) => break,
            }
        }
        Poll::Ready(())
    }

    /// Drops the socket and the queue, and wakes all waiting tasks.
    fn die(&self) {
        drop(self.stream.take());
        drop(self.outbox.take());
        wake(&self.reader);
        wake(&self.writer);
        self.wake_waiters();
    }

    fn wait(&self, cx: &Context<'_>) {
        let mut waiters = self.waiters.borrow_mut();
        if !waiters.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiters.push(cx.waker().clone());
        }
    }

    fn wake_waiters(&self) {
        for waker in self.waiters.take() {
            waker.wake();
        }
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        // The socket is gone, so the writer must not wait for it any longer.
        wake(&self.writer);
    }
}

impl fmt::Debug for Conn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Conn")
            .field("queued_bytes", &self.queued_bytes())
            .field("closing", &self.closing)
            .field("dead", &self.is_dead())
            .finish_non_exhaustive()
    }
}

/// The writer task of a connection that is behind. Ends when the queue is empty, the connection is dead or dropped, or
/// [`Conn::finish`] has taken over. Holds no strong handle, so that dropping the session drops the socket.
async fn write_queue(conn: Weak<Conn>) {
    poll_fn(|cx| {
        let Some(conn) = conn.upgrade() else {
            return Poll::Ready(());
        };
        if conn.closing.get().is_some() {
            return Poll::Ready(());
        }
        set_waker(&conn.writer, cx);
        let flushed = conn.poll_flush(cx);
        if flushed.is_ready() {
            conn.writer.take();
            conn.has_writer.set(false);
        }
        flushed
    })
    .await;
}

/// Writes, and once more if a signal interrupts it.
fn write_with(mut write: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        count(Counter::SocketCalls(SocketCall::ClientWrite), 1);
        match write() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Whether a read should be retried, after waiting if it would block.
fn retry(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

fn set_waker(slot: &Cell<Option<Waker>>, cx: &Context<'_>) {
    let waker = match slot.take() {
        Some(waker) if waker.will_wake(cx.waker()) => waker,
        _ => cx.waker().clone(),
    };
    slot.set(Some(waker));
}

fn wake(slot: &Cell<Option<Waker>>) {
    if let Some(waker) = slot.take() {
        waker.wake();
    }
}

#[cfg(test)]
mod tests;
