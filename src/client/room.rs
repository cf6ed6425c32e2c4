//! Follows one room, across reconnects.

use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Backoff, Commands, Connection, Frame, Publisher, Stop, Target,
    link::{Link, Lost},
};

/// Events that may wait for [`Room::next`]; when full, the session is not read, and the edge closes it as too slow.
const EVENT_QUEUE: usize = 256;
/// Timeout of the reply to a join; edges give up after `rooms.join_timeout`, which is shorter.
const JOIN_TIMEOUT: Duration = Duration::from_secs(15);

/// What happens in a followed room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The session is in the room. Repeated after each reconnect, before the missed messages.
    Joined {
        /// The session's cursor before the replay; `None` in ephemeral rooms.
        cursor: Option<String>,
        /// Number of missed messages that follow.
        replay: u64,
        /// Why nothing can be replayed, so that the session continues with the newest message. `Some` means that
        /// messages may have been missed; the history has them.
        reset: Option<String>,
    },
    /// A `msg` push.
    Message(Frame),
    /// A user types.
    Typing { user: String },
    /// Any other push.
    Other(Frame),
    /// The connection was lost or not established; the next attempt is made after `retry_in`.
    Disconnected { why: String, retry_in: Duration },
    /// Connected again; `Joined` follows.
    Reconnected { url: String },
    /// The last event.
    Stopped(Stop),
}

/// A room that is followed by its own task, until this is dropped.
///
/// # Invariants
/// - A rejoin sends the cursor of the last message put into the queue of [`next`](Self::next): messages before it are
///   not requested again, messages after it are.
/// - Events come in the order of the room.
#[derive(Debug)]
pub struct Room {
    events: mpsc::Receiver<Event>,
    state: watch::Receiver<State>,
    backoff: Backoff,
    _task: AbortOnDropHandle<()>,
}

/// Whether commands can be sent.
#[derive(Clone, Debug)]
pub(super) enum State {
    Down { why: Option<String> },
    Up(Commands),
    Stopped(Stop),
}

impl Room {
    /// Joins `room` and follows it; with `since`, from that cursor on.
    #[must_use]
    pub fn follow(target: Target, room: &str, since: Option<String>) -> Self {
        let (sender, events) = mpsc::channel(EVENT_QUEUE);
        let backoff = target.backoff;
        let followed = Followed {
            room: room.to_owned(),
            cursor: since,
        };
        let (task, state) = spawn(target, Some(followed), Some(sender));
        Self {
            events,
            state,
            backoff,
            _task: task,
        }
    }

    /// The next event; `None` after [`Event::Stopped`]. Cancel-safe.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Publishes over this room's connection, to any room.
    #[must_use]
    pub fn publisher(&self) -> Publisher {
        Publisher::over(self.state.clone(), self.backoff)
    }
}

/// Starts the task that keeps a session: in a room, or in none if it is only for publishing.
pub(super) fn spawn(
    target: Target,
    followed: Option<Followed>,
    events: Option<mpsc::Sender<Event>>,
) -> (AbortOnDropHandle<()>, watch::Receiver<State>) {
    let (state, watched) = watch::channel(State::Down { why: None });
    let backoff = target.backoff;
    let session = Session {
        link: Link::new(target),
        backoff,
        followed,
        state,
        events,
        was_connected: false,
    };
    (AbortOnDropHandle::new(tokio::spawn(session.run())), watched)
}

/// The room that is joined, and the cursor to join it at.
#[derive(Debug)]
pub(super) struct Followed {
    room: String,
    cursor: Option<String>,
}

/// The receiver of events is gone.
struct Unheard;

enum Over {
    Ended,
    /// The edge asked for a reconnect elsewhere, and the time for it has come.
    Moved,
    Stop(Stop),
    Unheard,
}

impl From<Unheard> for Over {
    fn from(_: Unheard) -> Self {
        Self::Unheard
    }
}

/// The session's state in its room.
enum Standing {
    /// Waits for the answer to the join with this `rid`.
    Joining {
        rid: u64,
        until: Instant,
    },
    /// The edge can't execute the join at the moment.
    Waiting {
        until: Instant,
    },
    In,
}

struct Session {
    link: Link,
    backoff: Backoff,
    followed: Option<Followed>,
    state: watch::Sender<State>,
    events: Option<mpsc::Sender<Event>>,
    was_connected: bool,
}

#[derive(Deserialize)]
struct Joined {
    #[serde(default)]
    cursor: Option<String>,
    #[serde(default)]
    replay: u64,
    #[serde(default)]
    reset: bool,
    #[serde(default)]
    reason: Option<String>,
}

/// The fields of pushes that are used here.
#[derive(Deserialize)]
struct Push {
    #[serde(default)]
    room: Option<String>,
    #[serde(default)]
    cursor: Option<String>,
    #[serde(default)]
    user: Option<String>,
    #[serde(default)]
    code: Option<String>,
    #[serde(default)]
    after_ms: u64,
}

impl Session {
    async fn run(mut self) {
        loop {
            let lost = match self.link.connect().await {
                Ok((endpoint, connection)) => {
                    if self.was_connected {
                        let url = endpoint.to_string();
                        if self.emit(Event::Reconnected { url }).await.is_err() {
                            return;
                        }
                    }
                    self.was_connected = true;
                    match self.attend(connection).await {
                        Ok(lost) => lost,
                        Err(Unheard) => return,
                    }
                }
                Err(lost) => lost,
            };
            match lost {
                Lost::Retry { why, delay } => {
                    let why_down = Some(why.clone());
                    self.state.send_replace(State::Down { why: why_down });
                    let event = Event::Disconnected {
                        why,
                        retry_in: delay,
                    };
                    if self.emit(event).await.is_err() {
                        return;
                    }
                    sleep(delay).await;
                }
                Lost::Stop(stop) => {
                    self.state.send_replace(State::Stopped(stop.clone()));
                    // The last event. Whether it is received does not matter.
                    let _unheard = self.emit(Event::Stopped(stop)).await;
                    return;
                }
            }
        }
    }

    /// Follows one connection to its end.
    async fn attend(&mut self, mut connection: Connection) -> Result<Lost, Unheard> {
        let since = Instant::now();
        match self.listen(&mut connection).await {
            Over::Ended => {
                let end = connection.end().unwrap_or_else(|| super::End {
                    code: 1006,
                    reason: "no answer to the join".to_owned(),
                });
                Ok(self.link.on_end(&end, since.elapsed()))
            }
            Over::Moved => {
                self.link.on_moved();
                connection.close().await;
                Ok(Lost::Retry {
                    why: "the edge drains".to_owned(),
                    delay: Duration::ZERO,
                })
            }
            Over::Stop(stop) => {
                connection.close().await;
                Ok(Lost::Stop(stop))
            }
            Over::Unheard => Err(Unheard),
        }
    }

    async fn listen(&mut self, connection: &mut Connection) -> Over {
        let commands = connection.commands().clone();
        let mut standing = match self.join(&commands).await {
            Ok(standing) => standing,
            Err(over) => return over,
        };
        let mut attempt = 0;
        let mut leave_at = None;
        loop {
            let join_due = match standing {
                Standing::Joining { until, .. } | Standing::Waiting { until } => Some(until),
                Standing::In => None,
            };
            // Receiving from a channel and sleeping are both cancel-safe.
            let frame = tokio::select! {
                frame = connection.next() => frame,
                () = at(leave_at) => return Over::Moved,
                () = at(join_due) => {
                    if matches!(standing, Standing::Joining { .. }) {
                        // Treated like a lost connection: another edge may succeed.
                        return Over::Ended;
                    }
                    standing = match self.join(&commands).await {
                        Ok(standing) => standing,
                        Err(over) => return over,
                    };
                    continue;
                }
            };
            let Some(frame) = frame else {
                return Over::Ended;
            };
            let answers_join = match standing {
                Standing::Joining { rid, .. } => frame.rid() == Some(rid),
                Standing::Waiting { .. } | Standing::In => false,
            };
            if answers_join {
                standing = match self.on_join_reply(&frame, &commands).await {
                    Ok(Some(standing)) => standing,
                    Ok(None) => {
                        attempt += 1;
                        Standing::Waiting {
                            until: Instant::now() + self.backoff.roll(attempt),
                        }
                    }
                    Err(over) => return over,
                };
                continue;
            }
            match self.on_push(frame, &commands).await {
                Ok(Next::Go) => {}
                Ok(Next::Rejoin) => {
                    standing = match self.join(&commands).await {
                        Ok(standing) => standing,
                        Err(over) => return over,
                    };
                }
                Ok(Next::Leave(after)) => {
                    leave_at.get_or_insert(Instant::now() + after);
                }
                Err(over) => return over,
            }
        }
    }

    /// Sends the join, if there is a room to join.
    async fn join(&mut self, commands: &Commands) -> Result<Standing, Over> {
        let Some(followed) = &self.followed else {
            self.link.on_welcome();
            self.state.send_replace(State::Up(commands.clone()));
            return Ok(Standing::In);
        };
        let mut fields = json!({"room": followed.room});
        if let Some(cursor) = &followed.cursor {
            fields["since"] = json!(cursor);
        }
        match commands.send("join", fields).await {
            Ok(rid) => Ok(Standing::Joining {
                rid,
                until: Instant::now() + JOIN_TIMEOUT,
            }),
            // The end of the frames tells the reason.
            Err(_closed) => Err(Over::Ended),
        }
    }

    /// `None`: the join must be repeated later.
    async fn on_join_reply(
        &mut self,
        frame: &Frame,
        commands: &Commands,
    ) -> Result<Option<Standing>, Over> {
        // Even an error reply shows that the token was accepted.
        self.link.on_welcome();
        if let Some(refusal) = frame.refusal() {
            if refusal.retry {
                tracing::debug!(%refusal, "join refused for now");
                return Ok(None);
            }
            return Err(Over::Stop(Stop::Join(refusal)));
        }
        let joined: Joined = match frame.fields() {
            Ok(joined) => joined,
            Err(error) => {
                let fault = format!("the answer to join can't be parsed: {error}");
                return Err(Over::Stop(Stop::Unusable(fault)));
            }
        };
        if let Some(followed) = &mut self.followed
            && joined.cursor.is_some()
        {
            followed.cursor.clone_from(&joined.cursor);
        }
        self.state.send_replace(State::Up(commands.clone()));
        let reset = joined
            .reset
            .then(|| joined.reason.unwrap_or_else(|| "unknown".to_owned()));
        self.emit(Event::Joined {
            cursor: joined.cursor,
            replay: joined.replay,
            reset,
        })
        .await?;
        Ok(Some(Standing::In))
    }

    async fn on_push(&mut self, frame: Frame, commands: &Commands) -> Result<Next, Over> {
        let push: Push = match frame.fields() {
            Ok(push) => push,
            Err(_other_fields) => {
                self.emit(Event::Other(frame)).await?;
                return Ok(Next::Go);
            }
        };
        let ours = self
            .followed
            .as_ref()
            .is_some_and(|followed| push.room.as_deref() == Some(&followed.room));
        match frame.op() {
            "msg" if ours => {
                self.emit(Event::Message(frame)).await?;
                if let Some(followed) = &mut self.followed
                    && push.cursor.is_some()
                {
                    followed.cursor = push.cursor;
                }
            }
            "typing" if ours => {
                let user = push.user.unwrap_or_default();
                self.emit(Event::Typing { user }).await?;
            }
            "kicked" if ours => {
                let code = push.code.unwrap_or_default();
                // The room's log was re-created. The old cursor tells the edge so, and it answers with `reset`.
                if code == "reset" {
                    return Ok(Next::Rejoin);
                }
                return Err(Over::Stop(Stop::Kicked(code)));
            }
            "reconnect" => return Ok(Next::Leave(Duration::from_millis(push.after_ms))),
            "token_expiring" => {
                match self.link.new_token() {
                    // The reply is not awaited: if the refresh fails, the edge closes with 4001.
                    Some(token) => {
                        let _closed = commands.send("refresh", json!({"token": token})).await;
                    }
                    None => self.emit(Event::Other(frame)).await?,
                }
            }
            "refreshed" => {}
            _ => self.emit(Event::Other(frame)).await?,
        }
        Ok(Next::Go)
    }

    async fn emit(&self, event: Event) -> Result<(), Unheard> {
        match &self.events {
            Some(events) => events.send(event).await.map_err(|_closed| Unheard),
            None => Ok(()),
        }
    }
}

/// What to do after a push.
enum Next {
    Go,
    Rejoin,
    Leave(Duration),
}

/// Sleeps until this time, or forever.
async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
