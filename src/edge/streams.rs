//! What clients send to a session besides its own connection: further commands to a session whose frames go into the
//! response of an HTTP request, and tickets in place of tokens. Any edge may get them, so edges ask each other.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::mpsc;

use super::{Ready, Shared};
use crate::{
    bus::{self, AskError, Connection, LiveFeed},
    codec::centrifugal::EmulationRequest,
    protocol::{ErrorCode, Refused, StreamAddress},
    subject::Subjects,
};

/// How long another edge may take to answer, and a session to take commands.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);

/// Requests with commands that one session takes before it has carried out the ones before.
const WAITING: usize = 4;

/// Tickets that an edge remembers. Beyond that none is given out until one has expired.
const MAX_TICKETS: usize = 10_000;

/// The answer of another edge that has no such session or ticket.
const GONE: &[u8] = b"gone";
/// The answer of another edge whose session takes no commands now.
const BUSY: &[u8] = b"busy";

/// The streams and tickets of an edge.
#[derive(Debug, Default)]
pub(super) struct Streams {
    sessions: Mutex<HashMap<Arc<str>, mpsc::Sender<Bytes>>>,
    tickets: Mutex<HashMap<Box<str>, Ticket>>,
}

/// What a ticket stands for.
#[derive(Debug)]
struct Ticket {
    token: Box<str>,
    until: Instant,
}

/// Makes a session known until it is dropped.
#[derive(Debug)]
pub(super) struct Known {
    streams: Arc<Streams>,
    session: Arc<str>,
}

impl Drop for Known {
    fn drop(&mut self) {
        self.streams.sessions.lock().remove(&self.session);
    }
}

/// What has become of commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delivered {
    Taken,
    /// The session has ended. Its client learns that from the end of the stream.
    Gone,
    /// The session is still busy with earlier ones.
    Busy,
}

/// A name that can't be guessed.
fn secret() -> String {
    format!("{:032x}", rand::random::<u128>())
}

impl Streams {
    /// Opens an address at which a new session can be reached, as long as the guard is held.
    pub(super) fn open(
        self: &Arc<Self>,
        edge: &Arc<str>,
    ) -> (StreamAddress, mpsc::Receiver<Bytes>, Known) {
        let (sender, commands) = mpsc::channel(WAITING);
        let session: Arc<str> = secret().into();
        self.sessions.lock().insert(Arc::clone(&session), sender);
        let known = Known {
            streams: Arc::clone(self),
            session: Arc::clone(&session),
        };
        let node = Arc::clone(edge);
        (StreamAddress { node, session }, commands, known)
    }

    /// Passes commands to a session of this edge.
    async fn deliver(&self, session: &str, commands: Bytes) -> Delivered {
        let Some(sender) = self.sessions.lock().get(session).cloned() else {
            return Delivered::Gone;
        };
        match sender.send_timeout(commands, ANSWER_WITHIN).await {
            Ok(()) => Delivered::Taken,
            Err(mpsc::error::SendTimeoutError::Closed(_)) => Delivered::Gone,
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => Delivered::Busy,
        }
    }

    /// Makes a ticket for a token that was checked. `None`: there are too many.
    pub(super) fn ticket(&self, edge: &str, token: &str, ttl: Duration) -> Option<String> {
        let now = Instant::now();
        let mut tickets = self.tickets.lock();
        if tickets.len() >= MAX_TICKETS {
            tickets.retain(|_, ticket| ticket.until > now);
            if tickets.len() >= MAX_TICKETS {
                return None;
            }
        }
        let name = secret();
        let ticket = Ticket {
            token: token.into(),
            until: now + ttl,
        };
        tickets.insert(name.as_str().into(), ticket);
        Some(format!("{edge}.{name}"))
    }

    /// The token of a ticket of this edge.
    fn token(&self, name: &str) -> Option<Box<str>> {
        let tickets = self.tickets.lock();
        let ticket = tickets.get(name)?;
        (ticket.until > Instant::now()).then(|| ticket.token.clone())
    }
}

/// Passes commands to a session, wherever it is. `None`: its edge is not there.
pub(super) async fn deliver(
    shared: &Shared,
    ready: &Ready,
    request: EmulationRequest,
) -> Result<Option<Delivered>, Refused> {
    if request.node == *shared.id {
        let delivered = shared.streams.deliver(&request.session, request.data);
        return Ok(Some(delivered.await));
    }
    let subject = Subjects::new(&shared.config.nats.prefix).commands_of(&request.node);
    let Some(answer) = ask(ready, subject, request.encode_to_vec().into()).await? else {
        return Ok(None);
    };
    Ok(Some(match &*answer {
        GONE => Delivered::Gone,
        BUSY => Delivered::Busy,
        _ => Delivered::Taken,
    }))
}

/// The token of a ticket, whichever edge has given it out. `None`: it is not known any more.
pub(super) async fn token_of(
    shared: &Shared,
    ready: &Ready,
    ticket: &str,
) -> Result<Option<Box<str>>, Refused> {
    let Some((edge, name)) = ticket.split_once('.') else {
        return Ok(None);
    };
    if edge == &*shared.id {
        return Ok(shared.streams.token(name));
    }
    let subject = Subjects::new(&shared.config.nats.prefix).tickets_of(edge);
    let answer = ask(ready, subject, Bytes::copy_from_slice(name.as_bytes())).await?;
    let token = answer.and_then(|token| String::from_utf8(token.into()).ok());
    Ok(token
        .filter(|token| token.as_bytes() != GONE)
        .map(Into::into))
}

/// Asks another edge. `None`: it is not there. `subject` is `None` if its name is not one of an edge.
async fn ask(
    ready: &Ready,
    subject: Option<String>,
    payload: Bytes,
) -> Result<Option<Bytes>, Refused> {
    let Some(subject) = subject else {
        return Ok(None);
    };
    match bus::ask(&ready.questions, subject, payload, ANSWER_WITHIN).await {
        Ok(answer) => Ok(Some(answer)),
        Err(AskError::Nobody { .. }) => Ok(None),
        Err(error) => Err(Refused::new(ErrorCode::Unavailable, error.to_string())),
    }
}

/// The subscriptions of an edge.
#[derive(Debug)]
pub(super) struct Asked {
    commands: LiveFeed,
    tickets: LiveFeed,
}

/// Messages that are taken at once.
const BATCH: usize = 64;

/// Subscribes to what other edges ask this one. `None` if NATS was closed.
pub(super) async fn hear(shared: &Shared, connection: &Connection) -> Option<Asked> {
    let subjects = Subjects::new(&shared.config.nats.prefix);
    let open = |subject| LiveFeed::open(connection, subject);
    let asked = Asked {
        commands: open(subjects.commands_of(&shared.id)?).await.ok()?,
        tickets: open(subjects.tickets_of(&shared.id)?).await.ok()?,
    };
    connection.round_trip(&subjects.nobody()).await;
    Some(asked)
}

/// Answers other edges, until the connection ends.
pub(super) async fn answer(streams: Arc<Streams>, connection: Connection, asked: Asked) {
    let Asked {
        mut commands,
        mut tickets,
    } = asked;
    let (mut some_commands, mut some_tickets) = (Vec::new(), Vec::new());
    loop {
        tokio::select! {
            goes_on = commands.next_batch(&mut some_commands, BATCH) => if !goes_on {
                return;
            },
            goes_on = tickets.next_batch(&mut some_tickets, BATCH) => if !goes_on {
                return;
            },
        }
        for message in some_commands.drain(..) {
            let (streams, connection) = (Arc::clone(&streams), connection.clone());
            // In a task, so that a busy session does not hold up the others.
            tokio::spawn(async move {
                let delivered = match EmulationRequest::decode(message.payload) {
                    Ok(request) => streams.deliver(&request.session, request.data).await,
                    Err(_not_protobuf) => Delivered::Gone,
                };
                let answer = match delivered {
                    Delivered::Taken => b"ok",
                    Delivered::Gone => GONE,
                    Delivered::Busy => BUSY,
                };
                reply(&connection, message.reply, Bytes::from_static(answer)).await;
            });
        }
        for message in some_tickets.drain(..) {
            let name = std::str::from_utf8(&message.payload).unwrap_or_default();
            let token = streams.token(name);
            let gone = Bytes::from_static(GONE);
            let answer = token.map_or(gone, |token| Bytes::from(String::from(token)));
            reply(&connection, message.reply, answer).await;
        }
    }
}

async fn reply(connection: &Connection, to: Option<impl ToString>, answer: Bytes) {
    if let Some(to) = to
        && let Err(error) = connection.publish(to.to_string(), None, answer).await
    {
        tracing::debug!(%error, "another edge could not be answered");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_session_is_known_as_long_as_its_guard_is_held() {
        let streams = Arc::new(Streams::default());
        let (address, mut commands, known) = streams.open(&"e1".into());
        assert_eq!(&*address.node, "e1");
        let data = Bytes::from_static(b"{}");
        let deliver = || streams.deliver(&address.session, data.clone());
        assert_eq!(deliver().await, Delivered::Taken);
        assert_eq!(commands.recv().await.unwrap(), data);
        drop(known);
        assert_eq!(deliver().await, Delivered::Gone);
        assert_eq!(
            streams.deliver("guessed", data.clone()).await,
            Delivered::Gone
        );
    }

    #[test]
    fn tickets_expire_and_are_bounded() {
        let streams = Streams::default();
        let name = |ticket: Option<String>| ticket.unwrap().strip_prefix("e1.").unwrap().to_owned();
        let expired = name(streams.ticket("e1", "old", Duration::ZERO));
        assert_eq!(streams.token(&expired), None);
        let long = Duration::from_secs(600);
        let good = name(streams.ticket("e1", "token", long));
        assert_eq!(streams.token(&good).as_deref(), Some("token"));
        for _ in 2..MAX_TICKETS {
            assert!(streams.ticket("e1", "token", long).is_some());
        }
        assert!(
            streams.ticket("e1", "token", long).is_some(),
            "the expired one gives way"
        );
        assert_eq!(streams.ticket("e1", "token", long), None);
    }
}
