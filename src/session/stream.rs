//! Sessions whose frames go into the response of an HTTP request. Their first commands are in that request. A client of
//! Centrifugo's protocol sends further ones in requests of their own; a client of `text/event-stream` sends none.

use std::{any::Any, collections::VecDeque, future::pending, io, rc::Rc, str::from_utf8};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::{Carried, Inbound, Session};
use crate::{
    codec::{CommandReader, Request, Tag},
    model::RoomId,
    protocol::{Close, Command, ResumeAt, StreamAddress, Wants},
    wire::{Conn, Outlet, Positions},
};

/// What a session has besides, if its frames go into the response of an HTTP request.
#[derive(Debug)]
pub struct Stream {
    /// Where the client sends further commands; `None` if it sends none.
    pub address: Option<StreamAddress>,
    /// The further commands; `None` if there are none.
    pub commands: Option<mpsc::Receiver<Bytes>>,
    /// The rooms of a stream of several rooms, and the cursors at which the client stands there.
    pub rooms: Vec<(RoomId, Option<String>)>,
    /// Makes the session known under its address until it is dropped.
    pub known: Option<Box<dyn Any + Send>>,
}

/// The part of it that the commands of the session need.
pub(super) struct Streamed {
    pub(super) address: Option<StreamAddress>,
    outlets: Vec<(RoomId, Outlet)>,
    _known: Option<Box<dyn Any + Send>>,
}

impl Streamed {
    /// Also returns the further commands.
    pub(super) fn new(stream: Stream, conn: &Rc<Conn>) -> (Self, Further) {
        let names = stream.rooms.iter().map(|(room, at)| {
            let at = at.as_ref().map(|at| Bytes::copy_from_slice(at.as_bytes()));
            (Box::from(room.as_str()), at)
        });
        let outlets = match stream.rooms.len() {
            0 | 1 => Vec::new(),
            _ => Positions::outlets(conn, names.collect()),
        };
        let rooms = stream.rooms.into_iter().map(|(room, _)| room);
        let streamed = Self {
            address: stream.address,
            outlets: rooms.zip(outlets).collect(),
            _known: stream.known,
        };
        (streamed, Further(stream.commands))
    }

    /// Where the frames of a room go, in a stream of several rooms.
    pub(super) fn outlet_of(&self, room: &RoomId) -> Option<Outlet> {
        let outlet = self.outlets.iter().find(|(its, _)| its == room);
        outlet.map(|(_, outlet)| outlet.clone())
    }
}

/// The further commands of a session whose frames go into the response of an HTTP request.
#[derive(Debug)]
pub(super) struct Further(Option<mpsc::Receiver<Bytes>>);

impl Further {
    /// The commands of the next request. Cancel-safe.
    async fn next(&mut self) -> Bytes {
        let next = match &mut self.0 {
            Some(commands) => commands.recv().await,
            None => None,
        };
        match next {
            Some(commands) => commands,
            None => pending().await,
        }
    }
}

impl Carried {
    /// Makes it the state of a session whose frames go into the response of an HTTP request. It joins the rooms of the
    /// stream first.
    #[must_use]
    pub fn streaming(mut self, stream: Stream, wants: Wants) -> Self {
        for (room, at) in &stream.rooms {
            let since = at.clone().map(|at| Box::new(ResumeAt::Cursor(at).into()));
            self.inbox.push_back(Inbound::Request(Request {
                tag: Tag::None,
                command: Ok(Command::Join {
                    room: room.clone(),
                    since,
                    wants,
                    token: None,
                    subscription: None,
                }),
            }));
        }
        self.stream = Some(Box::new(stream));
        self
    }
}

impl Session {
    /// Reads commands that came in a request.
    pub(super) fn take_commands(
        &self,
        reader: &mut CommandReader,
        inbox: &mut VecDeque<Inbound>,
        commands: &[u8],
    ) -> Result<(), Close> {
        let each = |request| inbox.push_back(Inbound::Request(request));
        if self.codec.get().is_binary() {
            reader.binary(commands, each);
        } else {
            let text = from_utf8(commands).map_err(|_not_utf8| Close::InvalidUtf8)?;
            reader.text(text, each);
        }
        Ok(())
    }

    /// Waits for further commands. `None` at the end of the connection: a client that wants no more closes it. A client
    /// may send nothing on it after the request.
    pub(super) async fn further(
        &self,
        further: &mut Further,
        reader: &mut CommandReader,
        inbox: &mut VecDeque<Inbound>,
    ) -> io::Result<Option<Result<(), Close>>> {
        tokio::select! {
            read = self.conn.read_with(&self.context.buffer, |_| Err(Close::ClientProtocol)) => read,
            commands = further.next() => {
                Ok(Some(self.take_commands(reader, inbox, &commands)))
            }
        }
    }

    /// Where the session is reached with further commands.
    pub(super) fn address(&self) -> Option<StreamAddress> {
        self.streamed.as_ref()?.address.clone()
    }

    /// Where the frames of a room go.
    pub(super) fn outlet_of(&self, room: &RoomId) -> Outlet {
        let streamed = self.streamed.as_ref();
        let outlet = streamed.and_then(|streamed| streamed.outlet_of(room));
        outlet.unwrap_or_else(|| Outlet::Socket(Rc::clone(&self.conn)))
    }
}
