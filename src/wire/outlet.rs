//! Where the frames of a session are sent.

use std::rc::Rc;

use bytes::Bytes;

use super::Conn;
use crate::protocol::Close;

/// The part of a connection that is needed to send frames. Cloning it increments a reference count.
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

    /// Starts to close. The first reason wins. See [`Conn::close`].
    pub fn close(&self, reason: Close) {
        match self {
            Self::Socket(conn) => conn.close(reason),
        }
    }

    /// Resolves when at most `below` bytes are queued, or the connection is closing or dead. Cancel-safe.
    pub async fn drained(&self, below: usize) {
        match self {
            Self::Socket(conn) => conn.drained(below).await,
        }
    }

    /// The size of what was accepted and is not sent yet: its bytes, and a fixed cost for each frame.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        match self {
            Self::Socket(conn) => conn.queued_bytes(),
        }
    }

    /// The bound of the queue, in bytes.
    #[must_use]
    pub fn outbox_bytes(&self) -> usize {
        match self {
            Self::Socket(conn) => conn.outbox_bytes(),
        }
    }

    /// Whether the connection is closing or dead, and so accepts no more frames.
    #[must_use]
    pub fn is_over(&self) -> bool {
        match self {
            Self::Socket(conn) => conn.is_over(),
        }
    }
}
