//! Where the frames of a session are sent.

use std::{
    cell::{Cell, RefCell},
    mem,
    rc::Rc,
};

use bytes::Bytes;
use tokio::sync::Notify;

use super::{Conn, FRAME_COST};
use crate::protocol::Close;

/// The part of a connection that is needed to send frames. Cloning it increments a reference count.
#[derive(Debug, Clone)]
pub enum Outlet {
    /// A connection.
    Socket(Rc<Conn>),
    /// A connection whose frames wait until a first frame was sent.
    Gate(Rc<Gate>),
    /// A stream of several rooms.
    Room(Rc<RoomOutlet>),
    /// A request that is answered with the first frames.
    Poll(Rc<Collected>),
}

/// The beginning of the first line of a frame that moves the position of its receiver. Only the frames of streams and
/// polls have such a line.
pub const ID: &[u8] = b"id: ";

/// The id in the first line of a frame, and the frame without that line. `None`: it has none.
fn split_id(frame: &Bytes) -> Option<(Bytes, Bytes)> {
    let end = memchr::memchr(b'\n', frame).filter(|_| frame.starts_with(ID))?;
    Some((frame.slice(ID.len()..end), frame.slice(end + 1..)))
}

/// Between a room and its position, in the id of a stream of several rooms.
const AT: char = '~';
/// Between two rooms there.
const AND: char = ',';

/// The stream of several rooms. The id of each frame says where the client stands in all of them.
#[derive(Debug)]
pub struct Positions {
    conn: Rc<Conn>,
    /// The rooms, and where the client stands there, as far as that is known.
    rooms: RefCell<Vec<(Box<str>, Option<Bytes>)>>,
}

/// One of the rooms of a stream.
#[derive(Debug)]
pub struct RoomOutlet {
    of: Rc<Positions>,
    index: usize,
}

impl Positions {
    /// The positions in an id, by room. `None`: it is not an id of a stream of several rooms.
    #[must_use]
    pub fn parse(id: &str) -> Option<Vec<(&str, &str)>> {
        id.split(AND).map(|room| room.split_once(AT)).collect()
    }

    /// An outlet for each of the rooms, with the client's positions.
    #[must_use]
    pub fn outlets(conn: &Rc<Conn>, rooms: Vec<(Box<str>, Option<Bytes>)>) -> Vec<Outlet> {
        let count = rooms.len();
        let of = Rc::new(Self {
            conn: Rc::clone(conn),
            rooms: RefCell::new(rooms),
        });
        let outlet = |index| RoomOutlet {
            of: Rc::clone(&of),
            index,
        };
        (0..count)
            .map(|index| Outlet::Room(Rc::new(outlet(index))))
            .collect()
    }

    fn id(&self) -> Bytes {
        let mut line = ID.to_vec();
        for (room, at) in &*self.rooms.borrow() {
            if let Some(at) = at {
                if line.len() > ID.len() {
                    line.push(AND as u8);
                }
                line.extend_from_slice(room.as_bytes());
                line.push(AT as u8);
                line.extend_from_slice(at);
            }
        }
        line.push(b'\n');
        Bytes::from(line)
    }
}

impl RoomOutlet {
    fn send(&self, frames: &[Bytes]) {
        let mut all = Vec::with_capacity(2 * frames.len());
        for frame in frames {
            match split_id(frame) {
                Some((id, rest)) => {
                    if let Some((_, at)) = self.of.rooms.borrow_mut().get_mut(self.index) {
                        // A copy, which does not keep the frame.
                        *at = Some(Bytes::copy_from_slice(&id));
                    }
                    all.push(self.of.id());
                    all.push(rest);
                }
                None => all.push(frame.clone()),
            }
        }
        self.of.conn.send(&all);
    }
}

/// The frames that answer a poll: at most a number of bytes, or one frame. When there are that many, it takes no more.
#[derive(Debug)]
pub struct Collected {
    most: usize,
    frames: RefCell<Vec<Bytes>>,
    bytes: Cell<usize>,
    is_full: Cell<bool>,
    closing: Cell<Option<Close>>,
    changed: Notify,
}

impl Collected {
    /// Begins to collect at most `most` bytes.
    #[must_use]
    pub fn new(most: usize) -> Rc<Self> {
        Rc::new(Self {
            most,
            frames: RefCell::default(),
            bytes: Cell::new(0),
            is_full: Cell::new(false),
            closing: Cell::new(None),
            changed: Notify::new(),
        })
    }

    fn send(&self, frames: &[Bytes]) {
        let mut collected = self.frames.borrow_mut();
        for frame in frames {
            let bytes = self.bytes.get() + frame.len() + FRAME_COST;
            if self.is_full.get() || (bytes > self.most && !collected.is_empty()) {
                self.is_full.set(true);
                break;
            }
            self.bytes.set(bytes);
            collected.push(frame.clone());
        }
        self.changed.notify_one();
    }

    fn close(&self, reason: Close) {
        self.closing.set(self.closing.get().or(Some(reason)));
        self.changed.notify_one();
    }

    fn is_over(&self) -> bool {
        self.is_full.get() || self.closing.get().is_some()
    }

    /// Resolves when there are `count` frames, or no more will come. For one task. Cancel-safe.
    pub async fn reached(&self, count: usize) {
        while self.frames.borrow().len() < count && !self.is_over() {
            self.changed.notified().await;
        }
    }

    /// The ids and contents of the frames.
    #[must_use]
    pub fn take(&self) -> Vec<(Bytes, Bytes)> {
        let frames = mem::take(&mut *self.frames.borrow_mut());
        frames.iter().filter_map(split_id).collect()
    }
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
    /// Sends complete frames, in order; see [`Conn::send`].
    pub fn send(&self, frames: &[Bytes]) {
        match self {
            Self::Socket(conn) => conn.send(frames),
            Self::Gate(gate) => gate.send(frames),
            Self::Room(room) => room.send(frames),
            Self::Poll(collected) => collected.send(frames),
        }
    }

    /// The connection; a poll has none.
    fn conn(&self) -> Result<&Rc<Conn>, &Collected> {
        match self {
            Self::Socket(conn) => Ok(conn),
            Self::Gate(gate) => Ok(&gate.conn),
            Self::Room(room) => Ok(&room.of.conn),
            Self::Poll(collected) => Err(collected),
        }
    }

    /// Says that another frame is likely to follow soon, or that it has come. See [`Conn::more_follows`].
    pub fn more_follows(&self, follows: bool) {
        if let Ok(conn) = self.conn() {
            conn.more_follows(follows);
        }
    }

    /// Starts to close. The first reason wins. See [`Conn::close`].
    pub fn close(&self, reason: Close) {
        match self.conn() {
            Ok(conn) => conn.close(reason),
            Err(collected) => collected.close(reason),
        }
    }

    /// Resolves when at most `below` bytes are queued, or the connection is closing or dead. Cancel-safe.
    pub async fn drained(&self, below: usize) {
        match (self, self.conn()) {
            (Self::Gate(gate), _) => gate.drained(below).await,
            (_, Ok(conn)) => conn.drained(below).await,
            // What is collected is not queued.
            (_, Err(_)) => {}
        }
    }

    /// The size of what was accepted and is not sent yet: its bytes, and a fixed cost for each frame.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        match (self, self.conn()) {
            (Self::Gate(gate), _) => gate.conn.queued_bytes().saturating_add(gate.bytes()),
            (_, Ok(conn)) => conn.queued_bytes(),
            (_, Err(_)) => 0,
        }
    }

    /// The bound of the queue, in bytes.
    #[must_use]
    pub fn outbox_bytes(&self) -> usize {
        match self.conn() {
            Ok(conn) => conn.outbox_bytes(),
            Err(collected) => collected.most,
        }
    }

    /// Whether the connection is closing or dead, and so accepts no more frames.
    #[must_use]
    pub fn is_over(&self) -> bool {
        match self.conn() {
            Ok(conn) => conn.is_over(),
            Err(collected) => collected.is_over(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        let frame = Bytes::from_static(b"id: seoul.k3.7.a\nevent: msg\n\n");
        let (id, rest) = split_id(&frame).unwrap();
        assert_eq!(
            (&id[..], &rest[..]),
            (&b"seoul.k3.7.a"[..], &b"event: msg\n\n"[..])
        );
        assert_eq!(split_id(&Bytes::from_static(b"event: typing\n\n")), None);
        let both = vec![("chat:a", "seoul.k3.7.a"), ("chat:b", "seoul.k3.9.b")];
        assert_eq!(
            Positions::parse("chat:a~seoul.k3.7.a,chat:b~seoul.k3.9.b"),
            Some(both)
        );
        assert_eq!(Positions::parse("seoul.k3.7.a"), None);
    }

    #[tokio::test]
    async fn a_poll_takes_what_fits_or_one_frame() {
        let frame = |text: &'static str| Bytes::from_static(text.as_bytes());
        let collected = Collected::new(40 + FRAME_COST);
        let outlet = Outlet::Poll(Rc::clone(&collected));
        outlet.send(&[frame(
            "id: 1\n{\"a\":\"longer than forty bytes, all in all\"}",
        )]);
        collected.reached(1).await;
        assert!(!outlet.is_over());
        outlet.send(&[frame("id: 2\n{}")]);
        collected.reached(2).await;
        assert!(outlet.is_over(), "the second one does not fit");
        outlet.send(&[frame("id: 3\n{}")]);
        let ids: Vec<Bytes> = collected.take().into_iter().map(|(id, _)| id).collect();
        assert_eq!(ids, ["1"]);
    }
}
