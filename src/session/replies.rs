//! The order of replies.

use std::{
    cell::{Cell, RefCell},
    collections::{HashSet, VecDeque},
    rc::Rc,
};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::{model::RoomId, wire::Conn};

/// Publishes and questions of one session that may wait for their answer, and bytes of theirs; then it is not read further.
const MAX_WAITING: usize = 256;
pub(super) const MAX_WAITING_BYTES: usize = 1 << 20;

/// Replies that wait for earlier ones.
///
/// Commands are answered in order; only the acks of publishes to different rooms may overtake each other, so that one stream
/// without a leader does not hold up the others.
#[derive(Debug)]
pub(super) struct Replies {
    conn: Rc<Conn>,
    state: RefCell<State>,
    bytes: Cell<usize>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    slots: VecDeque<Slot>,
    /// Number of the first slot.
    base: u64,
    /// Slots that have a reply and may not send it yet.
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
    number: u64,
    bytes: usize,
}

impl Replies {
    pub(super) fn new(conn: Rc<Conn>) -> Self {
        Self {
            conn,
            state: RefCell::default(),
            bytes: Cell::new(0),
            changed: Notify::new(),
        }
    }

    /// Takes the next place for the ack of a publish of `bytes` to `room`.
    pub(super) fn promise(&self, room: RoomId, bytes: usize) -> Ticket {
        self.place(Some(room), bytes)
    }

    /// Takes the next place for a reply that nothing overtakes; it may have `bytes`.
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
        self.bytes.set(self.bytes.get() + bytes);
        Ticket { number, bytes }
    }

    /// Sends the reply that was promised as soon as its turn has come.
    pub(super) fn keep(&self, ticket: Ticket, reply: Bytes) {
        self.bytes.set(self.bytes.get() - ticket.bytes);
        {
            let mut state = self.state.borrow_mut();
            let at = usize::try_from(ticket.number - state.base).unwrap_or(usize::MAX);
            if let Some(slot) = state.slots.get_mut(at) {
                slot.reply = Reply::Held(reply);
                state.held += 1;
            }
        }
        self.release();
        self.changed.notify_waiters();
    }

    /// Replies to a command that is done: at once, or after the acks of earlier publishes.
    pub(super) fn now(&self, reply: Bytes) {
        let mut state = self.state.borrow_mut();
        if state.slots.is_empty() {
            drop(state);
            self.conn.send(&[reply]);
        } else {
            state.slots.push_back(Slot {
                room: None,
                reply: Reply::Held(reply),
            });
            state.held += 1;
        }
    }

    /// Sends whatever may go now.
    fn release(&self) {
        let mut ready = Vec::new();
        let mut state = self.state.borrow_mut();
        let State { slots, base, held } = &mut *state;
        loop {
            match slots
                .front_mut()
                .map(|slot| std::mem::replace(&mut slot.reply, Reply::Sent))
            {
                Some(Reply::Held(reply)) => {
                    ready.push(reply);
                    *held -= 1;
                }
                Some(Reply::Sent) => {}
                Some(Reply::Awaited) => {
                    if let Some(front) = slots.front_mut() {
                        front.reply = Reply::Awaited;
                    }
                    break;
                }
                None => break,
            }
            slots.pop_front();
            *base += 1;
        }
        if *held > 0 {
            // Acks behind one that is awaited: those of other rooms, up to the first reply that is no ack.
            let mut blocked = HashSet::new();
            for slot in slots.iter_mut() {
                let Some(room) = &slot.room else { break };
                match std::mem::replace(&mut slot.reply, Reply::Sent) {
                    Reply::Held(reply) if !blocked.contains(room) => {
                        ready.push(reply);
                        *held -= 1;
                    }
                    Reply::Sent => {}
                    kept @ (Reply::Held(_) | Reply::Awaited) => {
                        blocked.insert(room.clone());
                        slot.reply = kept;
                    }
                }
            }
        }
        drop(state);
        if !ready.is_empty() {
            self.conn.send(&ready);
        }
    }

    /// Waits until one more publish may wait for its ack.
    pub(super) async fn room_for_one(&self) {
        self.wait(|this| {
            this.state.borrow().slots.len() < MAX_WAITING && this.bytes.get() < MAX_WAITING_BYTES
        })
        .await;
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{io::AsyncReadExt, net::TcpListener, task::LocalSet};

    use super::*;
    use crate::wire::ConnLimits;

    fn room(name: &str) -> RoomId {
        RoomId::parse(name).unwrap()
    }

    /// Runs `script` and returns what the peer read, which is as many bytes as there are replies.
    async fn sent(count: usize, script: impl FnOnce(&Replies)) -> String {
        LocalSet::new()
            .run_until(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let peer = tokio::net::TcpStream::connect(listener.local_addr().unwrap());
                let (peer, accepted) = tokio::join!(peer, listener.accept());
                let limits = ConnLimits {
                    outbox_bytes: 1 << 20,
                    stall: Duration::from_secs(30),
                };
                let replies = Replies::new(Conn::new(accepted.unwrap().0, Rc::new(limits)));
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
            replies.keep(c1, Bytes::from_static(b"c")); // behind P: waits
            replies.keep(a2, Bytes::from_static(b"2")); // behind a1: waits
            replies.keep(b1, Bytes::from_static(b"b")); // overtakes a1
            replies.keep(a1, Bytes::from_static(b"1")); // then a2, P, and c1 overtakes b2
            replies.keep(b2, Bytes::from_static(b"B"));
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
            replies.keep(b, Bytes::from_static(b"b"));
            replies.keep(page, Bytes::from_static(b"H"));
            replies.keep(a, Bytes::from_static(b"a"));
        })
        .await;
        assert_eq!(order, "aHbP");
    }
}
