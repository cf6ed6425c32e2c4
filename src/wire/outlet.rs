//! Where the frames of a session are sent.

use std::{cell::RefCell, rc::Rc};

use bytes::Bytes;
use tokio::sync::Notify;

use super::{Conn, FRAME_COST};
use crate::protocol::Close;

/// The part of a connection that is needed to send frames. Cloning it increments a reference count.
#[derive(Debug, Clone)]
pub enum Outlet {
    /// A WebSocket connection.
    Socket(Rc<Conn>),
    /// A WebSocket connection whose frames wait until a first frame was sent.
    Gate(Rc<Gate>),
}

/// Frames that wait for a frame which must come first. After that, frames go straight to the connection. If more waits
/// than the connection's queue may hold, the connection closes with [`Close::TooSlow`].
#[derive(Debug)]
pub struct Gate {
    conn: Rc<Conn>,
    /// `None` after the first frame.
    waiting: RefCell<Option<Vec<Bytes>>>,
    opened: Notify,
}

impl Gate {
    /// Begins to hold frames for `conn`.
    #[must_use]
    pub fn new(conn: Rc<Conn>) -> Rc<Self> {
        Rc::new(Self {
            conn,
            waiting: RefCell::new(Some(Vec::new())),
            opened: Notify::new(),
        })
    }

    /// Sends the first frame, if there is one, then the ones that wait.
    pub fn open(&self, first: Option<Bytes>) {
        let waiting = self.waiting.take().unwrap_or_default();
        if let Some(first) = first {
            self.conn.send(&[first]);
        }
        if !waiting.is_empty() {
            self.conn.send(&waiting);
        }
        self.opened.notify_waiters();
    }

    fn send(&self, frames: &[Bytes]) {
        let mut waiting = self.waiting.borrow_mut();
        let Some(waits) = waiting.as_mut() else {
            return self.conn.send(frames);
        };
        waits.extend_from_slice(frames);
        drop(waiting);
        if self.bytes() > self.conn.outbox_bytes() {
            // As for a client that does not read.
            self.waiting.take();
            self.conn.close(Close::TooSlow);
        }
    }

    /// The size of the frames that wait.
    fn bytes(&self) -> usize {
        let waiting = self.waiting.borrow();
        let frames = waiting.iter().flatten();
        frames.map(|frame| frame.len() + FRAME_COST).sum()
    }

    async fn drained(&self, below: usize) {
        loop {
            let opened = self.opened.notified();
            if self.bytes() <= below || self.conn.is_over() {
                break;
            }
            tokio::select! {
                () = opened => {}
                () = self.conn.closed() => {}
            }
        }
        self.conn.drained(below).await;
    }
}

impl Outlet {
    fn conn(&self) -> &Rc<Conn> {
        match self {
            Self::Socket(conn) => conn,
            Self::Gate(gate) => &gate.conn,
        }
    }

    /// Sends complete frames, in order; see [`Conn::send`].
    pub fn send(&self, frames: &[Bytes]) {
        match self {
            Self::Socket(conn) => conn.send(frames),
            Self::Gate(gate) => gate.send(frames),
        }
    }

    /// Starts to close. The first reason wins. See [`Conn::close`].
    pub fn close(&self, reason: Close) {
        self.conn().close(reason);
    }

    /// Resolves when at most `below` bytes are queued, or the connection is closing or dead. Cancel-safe.
    pub async fn drained(&self, below: usize) {
        match self {
            Self::Socket(conn) => conn.drained(below).await,
            Self::Gate(gate) => gate.drained(below).await,
        }
    }

    /// The size of what was accepted and is not sent yet: its bytes, and a fixed cost for each frame.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        match self {
            Self::Socket(conn) => conn.queued_bytes(),
            Self::Gate(gate) => gate.conn.queued_bytes().saturating_add(gate.bytes()),
        }
    }

    /// The bound of the queue, in bytes.
    #[must_use]
    pub fn outbox_bytes(&self) -> usize {
        self.conn().outbox_bytes()
    }

    /// Whether the connection is closing or dead, and so accepts no more frames.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.conn().is_over()
    }
}
