//! Where the frames of a session go.

use std::rc::Rc;

use bytes::Bytes;

use super::Conn;
use crate::protocol::Close;

/// Where frames go: what of a connection those need who only send. Cloning is a reference count.
#[derive(Debug, Clone)]
pub enum Outlet {
    /// A WebSocket connection.
    Socket(Rc<Conn>),
}

impl Outlet {
    /// Sends complete frames, in order; see [`Conn::send`].
    pub fn send(&self, frames: &[Bytes]) {
        match self {
            Self::Socket(conn) => conn.send(frames),
        }
    }

    /// Starts to close; the first reason wins; see [`Conn::close`].
    pub fn close(&self, reason: Close) {
        match self {
            Self::Socket(conn) => conn.close(reason),
        }
    }

    /// Resolves when at most `below` bytes are queued, or nothing is accepted any more. Cancel-safe.
    pub async fn drained(&self, below: usize) {
        match self {
            Self::Socket(conn) => conn.drained(below).await,
        }
    }

    /// What was accepted and is not sent yet: its bytes, and what each frame costs beside them.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        match self {
            Self::Socket(conn) => conn.queued_bytes(),
        }
    }

    /// How much may be queued.
    #[must_use]
    pub fn outbox_bytes(&self) -> usize {
        match self {
            Self::Socket(conn) => conn.outbox_bytes(),
        }
    }

    /// Whether nothing is accepted any more: it is closing or dead.
    #[must_use]
    pub fn is_over(&self) -> bool {
        match self {
            Self::Socket(conn) => conn.is_over(),
        }
    }
}
