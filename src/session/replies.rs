//! The order of replies, and the pace at which they are sent.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::Rc,
};

use bytes::Bytes;
use tokio::{sync::Notify, task::spawn_local};

use crate::{
    model::RoomId,
    wire::{FRAME_COST, Outlet},
};

/// Bounds of a session's queue of replies: its entries, and the bytes promised for replies that are awaited. At a
/// bound, the session takes no further publish or read of history, and so reads no further commands.
const MAX_WAITING: usize = 256;
pub(super) const MAX_WAITING_BYTES: usize = 1 << 20;

/// Replies that wait for earlier ones, or for the client to read.
///
/// Commands are answered in order, with one exception: the acks of publishes to different rooms may overtake each
/// other, so that a stream without a leader does not hold up the others.
///
/// Replies use at most half of `limits.outbox`, so that a client is never closed as too slow because of its own
/// requests. Replies that don't fit wait here, and meanwhile no further command is taken ([`Self::room_for_replies`]).
/// A reply that is larger than that is sent alone, after the client has read everything before it.
#[derive(Debug)]
pub(super) struct Replies {
    outlet: Outlet,
    state: RefCell<State>,
    /// Bytes promised for commands that wait for their reply.
    promised: Cell<usize>,
    /// Bytes of the replies that are here and not sent yet.
    held: Cell<usize>,
    /// Bytes that may be queued on the connection when a reply is sent.
    most: usize,
    /// Whether a task is running that sends replies as the client reads.
    pacing: Cell<bool>,
    /// Whether the session ends: replies no longer wait for the client to read.
    hurried: Cell<bool>,
    /// The number of the last slot whose reply is sent. Those after it are dropped.
    last: Cell<Option<u64>>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    slots: VecDeque<Slot>,
    /// Number of the first slot.
    base: u64,
    /// Number of slots with a reply that is not sent yet.
    held: usize,
}

#[derive(Debug)]
struct Slot {
    /// The room of a publish; `None` for every other command.
    room: Option<RoomId>,
    reply: Reply,
}

#[derive(Debug)]
enum Reply {
    Awaited,
    Held(Bytes),
    Sent,
}

/// A promise to reply.
#[derive(Debug)]
#[must_use = "a command without a reply holds up all later ones"]
pub(super) struct Ticket {
    pub(super) number: u64,
    bytes: usize,
}

/// How much may still be sent.
struct Budget {
    queued: usize,
    most: usize,
    /// For the first reply that did not fit: the number of queued bytes at which it fits.
    below: Option<usize>,
}

impl Budget {
    fn fits(&mut self, reply: &Bytes) -> bool {
        let weight = weight(reply);
        let fits = self.queued == 0 || self.queued.saturating_add(weight) <= self.most;
        if fits {
            self.queued = self.queued.saturating_add(weight);
        } else {
            self.below = Some(self.most.saturating_sub(weight));
        }
        fits
    }
}

/// The bytes that a reply is counted with while it waits.
fn weight(reply: &Bytes) -> usize {
    reply.len() + FRAME_COST
}

impl Replies {
    pub(super) fn new(outlet: Outlet) -> Rc<Self> {
        Rc::new(Self {
            most: outlet.outbox_bytes() / 2,
            outlet,
            state: RefCell::default(),
            promised: Cell::new(0),
            held: Cell::new(0),
            pacing: Cell::new(false),
            hurried: Cell::new(false),
            last: Cell::new(None),
            changed: Notify::new(),
        })
    }

    /// Takes the next place in the order for the ack of a publish of `bytes` to `room`.
    pub(super) fn promise(&self, room: RoomId, bytes: usize) -> Ticket {
        self.outlet.more_follows(true);
        self.place(Some(room), bytes)
    }

    /// Takes the next place in the order for a reply of up to `bytes` that no later reply may overtake.
    pub(super) fn promise_in_order(&self, bytes: usize) -> Ticket {
        self.place(None, bytes)
    }

    fn place(&self, room: Option<RoomId>, bytes: usize) -> Ticket {
        let mut state = self.state.borrow_mut();
        let number = state.base + state.slots.len() as u64;
        state.slots.push_back(Slot {
            room,
            reply: Reply::Awaited,
        });
        self.promised.set(self.promised.get() + bytes);
        Ticket { number, bytes }
    }

    /// The reply that was given last, or that of `ticket`, is the last one that is sent.
    pub(super) fn seal(&self, ticket: Option<u64>) {
        let mut state = self.state.borrow_mut();
        let State { slots, base, held } = &mut *state;
        let end = *base + slots.len() as u64;
        // If it was sent already, no slot is left that may be.
        let last = ticket.unwrap_or_else(|| end.saturating_sub(1));
        self.last.set(Some(last));
        let numbered = (*base..).zip(slots.iter_mut());
        for (_, slot) in numbered.filter(|(number, _)| *number > last) {
            // One that is awaited is dropped when it comes.
            match std::mem::replace(&mut slot.reply, Reply::Sent) {
                Reply::Held(reply) => {
                    self.held.set(self.held.get() - weight(&reply));
                    *held -= 1;
                }
                kept @ (Reply::Awaited | Reply::Sent) => slot.reply = kept,
            }
        }
    }

    fn is_sealed(&self, number: u64) -> bool {
        self.last.get().is_some_and(|last| number > last)
    }

    /// Sends the promised reply as soon as it is its turn. `None`: the command has no reply.
    pub(super) fn keep(self: &Rc<Self>, ticket: Ticket, reply: Option<Bytes>) {
        self.promised.set(self.promised.get() - ticket.bytes);
        let reply = reply.filter(|_| !self.is_sealed(ticket.number));
        {
            let mut state = self.state.borrow_mut();
            let at = usize::try_from(ticket.number - state.base).unwrap_or(usize::MAX);
            if let Some(slot) = state.slots.get_mut(at) {
                if slot.room.is_some() {
                    self.outlet.more_follows(false);
                }
                self.held
                    .set(self.held.get() + reply.as_ref().map_or(0, weight));
                match reply {
                    Some(reply) => {
                        slot.reply = Reply::Held(reply);
                        state.held += 1;
                    }
                    None => slot.reply = Reply::Sent,
                }
            }
        }
        self.release();
        self.changed.notify_waiters();
    }

    /// Replies to a command that is done: at once, or after the acks of earlier publishes.
    pub(super) fn now(self: &Rc<Self>, reply: Bytes) {
        if self.last.get().is_some() {
            return;
        }
        self.held.set(self.held.get() + weight(&reply));
        {
            let mut state = self.state.borrow_mut();
            state.slots.push_back(Slot {
                room: None,
                reply: Reply::Held(reply),
            });
            state.held += 1;
        }
        self.release();
    }

    /// Sends the replies whose turn it is and that fit; the rest is sent as the client reads.
    fn release(self: &Rc<Self>) {
        if self.pacing.get() && !self.hurried.get() {
            return;
        }
        let Some(mut below) = self.hand_over() else {
            return;
        };
        self.pacing.set(true);
        let replies = Rc::clone(self);
        spawn_local(async move {
            loop {
                replies.outlet.drained(below).await;
                match replies.hand_over() {
                    Some(next) => below = next,
                    None => break,
                }
            }
            replies.pacing.set(false);
        });
    }

    /// Sends the replies whose turn it is and that fit. If one does not fit, returns the number of queued bytes at
    /// which it does.
    fn hand_over(&self) -> Option<usize> {
        loop {
            let hurried = self.hurried.get() || self.outlet.is_over();
            let mut budget = Budget {
                queued: self.outlet.queued_bytes(),
                most: if hurried { usize::MAX } else { self.most },
                below: None,
            };
            let mut state = self.state.borrow_mut();
            let only = state.take_only(&mut budget);
            let others = match only {
                Some(_) => Vec::new(),
                None => state.take_ready(&mut budget),
            };
            drop(state);
            let ready = only.as_ref().map_or(&*others, std::slice::from_ref);
            if !ready.is_empty() {
                let bytes: usize = ready.iter().map(weight).sum();
                self.held.set(self.held.get() - bytes);
                self.outlet.send(ready);
                self.changed.notify_waiters();
            }
            // The socket may have taken everything.
            let below = budget.below?;
            if self.outlet.queued_bytes() > below && !self.outlet.is_over() {
                return Some(below);
            }
        }
    }

    /// From now on, replies don't wait for the client to read: the session is about to end.
    pub(super) fn hurry(&self) {
        self.hurried.set(true);
        let _all = self.hand_over();
    }

    /// Waits until there is room for one more promised reply.
    pub(super) async fn room_for_one(&self) {
        self.wait(|this| {
            this.state.borrow().slots.len() < MAX_WAITING && this.promised.get() < MAX_WAITING_BYTES
        })
        .await;
    }

    /// Waits until the client has read enough for another command to be taken.
    pub(super) async fn room_for_replies(&self) {
        loop {
            let changed = self.changed.notified();
            if self.outlet.is_over() {
                return;
            }
            match self.most.checked_sub(self.held.get()) {
                Some(below) if self.outlet.queued_bytes() <= below => return,
                Some(below) => self.outlet.drained(below).await,
                None => changed.await,
            }
        }
    }

    /// Bytes of the replies that are not sent yet.
    pub(super) fn held_bytes(&self) -> usize {
        self.held.get()
    }

    /// Waits until every command taken so far has its reply.
    pub(super) async fn idle(&self) {
        self.wait(Self::is_idle).await;
    }

    /// Whether every command taken so far has its reply.
    pub(super) fn is_idle(&self) -> bool {
        self.state.borrow().slots.is_empty()
    }

    async fn wait(&self, ready: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            if ready(self) {
                return;
            }
            changed.await;
        }
    }
}

impl State {
    /// Takes the reply that is awaited alone, as it mostly is, if it has come and fits.
    fn take_only(&mut self, budget: &mut Budget) -> Option<Bytes> {
        let Self { slots, base, held } = self;
        let mut all = slots.iter();
        let (Some(first), None) = (all.next(), all.next()) else {
            return None;
        };
        let fits = matches!(&first.reply, Reply::Held(reply) if budget.fits(reply));
        let Reply::Held(reply) = slots.pop_front_if(|_| fits)?.reply else {
            return None;
        };
        *base += 1;
        *held -= 1;
        Some(reply)
    }

    /// Takes the replies whose turn it is, as many as fit.
    fn take_ready(&mut self, budget: &mut Budget) -> Vec<Bytes> {
        let Self { slots, base, held } = self;
        let mut ready = Vec::new();
        while let Some(front) = slots.front_mut() {
            match std::mem::replace(&mut front.reply, Reply::Sent) {
                Reply::Held(reply) if budget.fits(&reply) => {
                    ready.push(reply);
                    *held -= 1;
                }
                Reply::Sent => {}
                kept @ (Reply::Held(_) | Reply::Awaited) => {
                    front.reply = kept;
                    break;
                }
            }
            slots.pop_front();
            *base += 1;
        }
        if *held == 0 || budget.below.is_some() {
            return ready;
        }
        // Acks behind an awaited one: those of other rooms may overtake it, up to the first reply that is not an ack. Few
        // are held at once, while many may be awaited.
        let mut at = 0;
        while *held > 0
            && budget.below.is_none()
            && let Some(Slot {
                room: Some(room),
                reply,
            }) = slots.get(at)
        {
            let unsent = |slot: &Slot| !matches!(slot.reply, Reply::Sent);
            if let Reply::Held(reply) = reply
                && !slots
                    .range(..at)
                    .any(|earlier| unsent(earlier) && earlier.room.as_ref() == Some(room))
                && budget.fits(reply)
                && let Reply::Held(reply) = std::mem::replace(&mut slots[at].reply, Reply::Sent)
            {
                ready.push(reply);
                *held -= 1;
            }
            at += 1;
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt as _;
    use tokio::{
        io::AsyncReadExt,
        net::{TcpListener, TcpSocket, TcpStream},
        task::{LocalSet, yield_now},
    };

    use super::*;
    use crate::{
        codec::Codec,
        wire::{Conn, ConnSettings},
    };

    fn room(name: &str) -> RoomId {
        RoomId::parse(name).unwrap()
    }

    /// Runs `script` and returns what the peer read. Each reply is one byte, and there are `count` of them.
    async fn sent(count: usize, script: impl FnOnce(&Rc<Replies>)) -> String {
        LocalSet::new()
            .run_until(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let peer = TcpStream::connect(listener.local_addr().unwrap());
                let (peer, accepted) = tokio::join!(peer, listener.accept());
                let settings = ConnSettings {
                    outbox_bytes: 1 << 20,
                    stall: Duration::from_secs(30),
                    close_frame: Codec::Native.close_frame(),
                };
                let replies = Replies::new(Outlet::Socket(Conn::new(
                    accepted.unwrap().0,
                    Rc::new(settings),
                )));
                script(&replies);
                let mut read = vec![0; count];
                peer.unwrap().read_exact(&mut read).await.unwrap();
                String::from_utf8(read).unwrap()
            })
            .await
    }

    #[tokio::test(flavor = "current_thread")]
    async fn acks_of_other_rooms_overtake_and_nothing_else_does() {
        let order = sent(6, |replies| {
            let a1 = replies.promise(room("chat:a"), 1);
            let b1 = replies.promise(room("chat:b"), 1);
            let a2 = replies.promise(room("chat:a"), 1);
            replies.now(Bytes::from_static(b"P"));
            let b2 = replies.promise(room("chat:b"), 1);
            let c1 = replies.promise(room("chat:c"), 1);
            replies.keep(c1, Some(Bytes::from_static(b"c"))); // behind P: waits
            replies.keep(a2, Some(Bytes::from_static(b"2"))); // behind a1: waits
            replies.keep(b1, Some(Bytes::from_static(b"b"))); // overtakes a1
            replies.keep(a1, Some(Bytes::from_static(b"1"))); // then a2, P, and c1 overtakes b2
            replies.keep(b2, Some(Bytes::from_static(b"B")));
        })
        .await;
        assert_eq!(order, "b12PcB");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn nothing_overtakes_a_page_of_history_nor_does_it_overtake() {
        let order = sent(4, |replies| {
            let a = replies.promise(room("chat:a"), 1);
            let page = replies.promise_in_order(1);
            let b = replies.promise(room("chat:b"), 1);
            replies.now(Bytes::from_static(b"P"));
            replies.keep(b, Some(Bytes::from_static(b"b")));
            replies.keep(page, Some(Bytes::from_static(b"H")));
            replies.keep(a, Some(Bytes::from_static(b"a")));
        })
        .await;
        assert_eq!(order, "aHbP");
    }

    const OUTBOX: usize = 200_000;

    /// Runs `script` with replies to a peer that reads only what the script reads.
    async fn with_peer<F: Future<Output = ()>>(script: impl FnOnce(Rc<Replies>, TcpStream) -> F) {
        LocalSet::new()
            .run_until(async {
                // Small kernel buffers, so that what the peer does not read waits here.
                let (listener, peer) = (TcpSocket::new_v4().unwrap(), TcpSocket::new_v4().unwrap());
                listener.set_send_buffer_size(4096).unwrap();
                peer.set_recv_buffer_size(4096).unwrap();
                listener.bind("127.0.0.1:0".parse().unwrap()).unwrap();
                let listener = listener.listen(1).unwrap();
                let peer = peer.connect(listener.local_addr().unwrap());
                let (peer, accepted) = tokio::join!(peer, listener.accept());
                let settings = ConnSettings {
                    outbox_bytes: OUTBOX,
                    stall: Duration::from_secs(30),
                    close_frame: Codec::Native.close_frame(),
                };
                let conn = Conn::new(accepted.unwrap().0, Rc::new(settings));
                script(Replies::new(Outlet::Socket(conn)), peer.unwrap()).await;
            })
            .await;
    }

    fn reply(number: u8, bytes: usize) -> Bytes {
        Bytes::from(vec![number; bytes])
    }

    /// Sends replies until the client has to read first. Returns the number of bytes sent.
    async fn until_full(replies: &Rc<Replies>, bytes: usize) -> usize {
        let mut sent = 0;
        while replies.room_for_replies().now_or_never().is_some() {
            replies.now(reply(b'x', bytes));
            sent += bytes;
            assert!(!replies.outlet.is_over(), "the peer is gone");
            yield_now().await;
        }
        sent
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_client_that_does_not_read_has_bounded_replies_and_gets_all_of_them() {
        for bytes in [1, 50, 3000, OUTBOX / 2, OUTBOX, 3 * OUTBOX] {
            with_peer(|replies, mut peer| async move {
                let sent = until_full(&replies, bytes).await;
                let queued = replies.outlet.queued_bytes() + replies.held_bytes();
                let most = OUTBOX / 2 + 2 * (bytes + FRAME_COST);
                assert!(queued <= most, "{bytes}: {queued}");
                assert!(!replies.outlet.is_over(), "{bytes}");
                let mut read = vec![0; sent];
                peer.read_exact(&mut read).await.unwrap();
                replies.room_for_replies().await;
                replies.idle().await;
                assert_eq!(
                    (replies.held_bytes(), replies.outlet.queued_bytes()),
                    (0, 0)
                );
            })
            .await;
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn replies_behind_one_that_is_awaited_count_and_come_in_order() {
        with_peer(|replies, mut peer| async move {
            let page = replies.promise_in_order(1);
            let mut expected = vec![b'H'; OUTBOX];
            let mut number = 0;
            while replies.room_for_replies().now_or_never().is_some() {
                number += 1;
                replies.now(reply(number, 5000));
                expected.extend(vec![number; 5000]);
            }
            assert_eq!(replies.outlet.queued_bytes(), 0);
            let held = replies.held_bytes();
            assert!(
                (OUTBOX / 2..OUTBOX / 2 + 2 * 5064).contains(&held),
                "{held}"
            );
            replies.keep(page, Some(reply(b'H', OUTBOX)));
            assert!(replies.room_for_replies().now_or_never().is_none());
            let mut read = vec![0; expected.len()];
            peer.read_exact(&mut read).await.unwrap();
            assert!(!replies.outlet.is_over());
            assert!(read == expected, "not in order");
            replies.room_for_replies().await;
        })
        .await;
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_session_that_ends_does_not_wait_for_its_client_to_read() {
        with_peer(|replies, peer| async move {
            until_full(&replies, 3000).await;
            let ack = replies.promise(room("chat:a"), 1);
            assert!(replies.idle().now_or_never().is_none());
            replies.hurry();
            replies.keep(ack, Some(reply(b'a', 100)));
            assert!(replies.idle().now_or_never().is_some());
            assert_eq!(replies.held_bytes(), 0);
            drop(peer);
        })
        .await;
    }

    #[tokio::test(flavor = "current_thread")]
    async fn nothing_is_sent_after_the_last_reply() {
        // Behind an awaited one, a refusal that is the last, and replies to what was sent after it.
        let order = sent(3, |replies| {
            let a = replies.promise(room("chat:a"), 1);
            let b = replies.promise(room("chat:b"), 1);
            let c = replies.promise_in_order(1);
            replies.now(Bytes::from_static(b"X"));
            let number = b.number;
            replies.keep(b, Some(Bytes::from_static(b"b")));
            replies.seal(Some(number));
            replies.now(Bytes::from_static(b"Y"));
            replies.keep(c, Some(Bytes::from_static(b"c")));
            replies.keep(a, Some(Bytes::from_static(b"a")));
            assert_eq!(replies.held_bytes(), 0);
            let peer = &replies.outlet;
            peer.send(&[Bytes::from_static(b"!")]);
        })
        .await;
        assert_eq!(order, "ba!");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_comes_before_the_last_reply_is_sent() {
        let order = sent(3, |replies| {
            let page = replies.promise_in_order(1);
            replies.now(Bytes::from_static(b"E"));
            replies.seal(None);
            replies.now(Bytes::from_static(b"x"));
            replies.keep(page, Some(Bytes::from_static(b"p")));
            replies.outlet.send(&[Bytes::from_static(b"!")]);
        })
        .await;
        assert_eq!(order, "pE!");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_connection_that_closes_holds_nothing() {
        with_peer(|replies, peer| async move {
            let page = replies.promise_in_order(1);
            let sent = until_full(&replies, 3000).await;
            assert!(sent > 0);
            replies.outlet.close(crate::protocol::Close::TooSlow);
            // Nothing waits forever, and promised replies are dropped.
            replies.room_for_replies().await;
            replies.keep(page, Some(reply(b'H', 10)));
            replies.idle().await;
            assert_eq!(replies.held_bytes(), 0);
            drop(peer);
        })
        .await;
    }
}
