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
use tokio::sync::{Semaphore, mpsc};

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

/// Questions to other edges at once; more wait.
const ASKING: usize = 64;

/// Commands of other edges that wait for their sessions at once; more are answered as for a busy session.
const DELIVERING: usize = 64;

/// The answer of another edge that has no such session or ticket.
const GONE: &[u8] = b"gone";
/// The answer of another edge whose session takes no commands now.
const BUSY: &[u8] = b"busy";

/// The streams and tickets of an edge.
#[derive(Debug)]
pub(super) struct Streams {
    sessions: Mutex<HashMap<Arc<str>, mpsc::Sender<Bytes>>>,
    tickets: Mutex<Tickets>,
    /// Limits the questions to other edges, since anybody may cause one.
    asking: Semaphore,
    /// Limits the commands of other edges that wait for a busy session.
    delivering: Arc<Semaphore>,
}

impl Default for Streams {
    fn default() -> Self {
        Self {
            sessions: Mutex::default(),
            tickets: Mutex::default(),
            asking: Semaphore::new(ASKING),
            delivering: Arc::new(Semaphore::new(DELIVERING)),
        }
    }
}

/// The tickets of an edge.
#[derive(Debug, Default)]
struct Tickets {
    by_name: HashMap<Box<str>, Ticket>,
    /// The name of the newest ticket of each token.
    by_token: HashMap<Box<str>, Box<str>>,
}

/// What a ticket stands for.
#[derive(Debug)]
struct Ticket {
    token: Box<str>,
    until: Instant,
}

impl Tickets {
    /// Forgets the ones that have expired.
    fn forget(&mut self, now: Instant) {
        let Self { by_name, by_token } = self;
        by_name.retain(|_, ticket| ticket.until > now);
        by_token.retain(|_, name| by_name.contains_key(name));
    }
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

    /// A ticket for a token that was checked, and how long it is valid. While more than half of that time is left, a token
    /// gets the same one again. `None`: there are too many.
    pub(super) fn ticket(
        &self,
        edge: &str,
        token: &str,
        ttl: Duration,
    ) -> Option<(String, Duration)> {
        let now = Instant::now();
        let mut tickets = self.tickets.lock();
        let Tickets { by_name, by_token } = &*tickets;
        if let Some(name) = by_token.get(token)
            && let Some(ticket) = by_name.get(name)
            && ticket.until > now + ttl / 2
        {
            return Some((format!("{edge}.{name}"), ticket.until - now));
        }
        if tickets.by_name.len() >= MAX_TICKETS {
            tickets.forget(now);
            if tickets.by_name.len() >= MAX_TICKETS {
                return None;
            }
        }
        let name: Box<str> = secret().into();
        let ticket = Ticket {
            token: token.into(),
            until: now + ttl,
        };
        tickets.by_token.insert(token.into(), name.clone());
        let given = format!("{edge}.{name}");
        tickets.by_name.insert(name, ticket);
        Some((given, ttl))
    }

    /// The token of a ticket of this edge.
    fn token(&self, name: &str) -> Option<Box<str>> {
        let tickets = self.tickets.lock();
        let ticket = tickets.by_name.get(name)?;
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
    let question = request.encode_to_vec().into();
    let Some(answer) = ask(shared, ready, subject, question).await? else {
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
    let question = Bytes::copy_from_slice(name.as_bytes());
    let answer = ask(shared, ready, subject, question).await?;
    let token = answer.and_then(|token| String::from_utf8(token.into()).ok());
    Ok(token
        .filter(|token| token.as_bytes() != GONE)
        .map(Into::into))
}

/// Asks another edge. `None`: it is not there. `subject` is `None` if its name is not one of an edge.
async fn ask(
    shared: &Shared,
    ready: &Ready,
    subject: Option<String>,
    payload: Bytes,
) -> Result<Option<Bytes>, Refused> {
    let Some(subject) = subject else {
        return Ok(None);
    };
    // It is never closed.
    let _asking = shared.streams.asking.acquire().await;
    match bus::ask(&ready.questions, subject, payload, ANSWER_WITHIN).await {
        Ok(answer) => Ok(Some(answer)),
        Err(AskError::Nobody { .. }) => Ok(None),
        Err(error @ AskError::TooLarge { .. }) => {
            Err(Refused::new(ErrorCode::TooLarge, error.to_string()))
        }
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
            let Ok(delivering) = Arc::clone(&streams.delivering).try_acquire_owned() else {
                reply(&connection, message.reply, Bytes::from_static(BUSY)).await;
                continue;
            };
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
                drop(delivering);
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
        let get = |token: &str, ttl| {
            let (ticket, _) = streams.ticket("e1", token, ttl)?;
            ticket.strip_prefix("e1.").map(str::to_owned)
        };
        let expired = get("old", Duration::ZERO).unwrap();
        assert_eq!(streams.token(&expired), None);
        let long = Duration::from_secs(600);
        let good = get("token", long).unwrap();
        assert_eq!(streams.token(&good).as_deref(), Some("token"));
        // A client that asks again and again gets the same one, as long as it is good for a while.
        assert_eq!(get("token", long).unwrap(), good);
        let renewed = get("token", 3 * long).unwrap();
        assert_ne!(renewed, good);
        assert_eq!(streams.token(&good).as_deref(), Some("token"));
        for n in 3..MAX_TICKETS {
            assert!(get(&format!("t{n}"), long).is_some());
        }
        assert!(get("one more", long).is_some(), "the expired one gives way");
        assert_eq!(get("too many", long), None);
        assert_eq!(get("token", long).unwrap(), renewed);
        let tickets = streams.tickets.lock();
        assert!(tickets.by_token.len() <= tickets.by_name.len());
    }
}
