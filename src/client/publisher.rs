//! Publishing with retries until the message is acknowledged.

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Backoff, CallError, Refusal, Stop, Target,
    room::{State, spawn},
};

/// Default timeout of [`Publisher::publish`]. Far less than the streams' duplicate window: a retry after that window
/// would be stored twice.
const PATIENCE: Duration = Duration::from_secs(60);

/// Publishes with retries. Each retry has the same id, so that the room shows the message once.
#[derive(Clone, Debug)]
pub struct Publisher {
    state: watch::Receiver<State>,
    backoff: Backoff,
    patience: Duration,
    /// The task of the session, if this publisher has its own; it ends with the last clone.
    _task: Option<Arc<AbortOnDropHandle<()>>>,
}

/// What to publish: the fields of `send`.
#[derive(Clone, Debug, Serialize)]
pub struct Draft {
    pub room: String,
    /// Identifies the message in every retry.
    pub id: String,
    pub body: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mentions: Vec<String>,
}

/// The edge has accepted the message: stored it (durable rooms) or passed it on (ephemeral rooms).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Ack {
    pub id: String,
    /// The room's position with this message; `None` in ephemeral rooms.
    #[serde(default)]
    pub cursor: Option<String>,
    /// Milliseconds since 1970.
    #[serde(default)]
    pub ts: u64,
    /// Whether an earlier attempt had already stored it.
    #[serde(default)]
    pub dup: bool,
}

/// A message was not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The edge will never accept it in this form.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// The client has stopped. The message may be stored if it was being sent.
    #[error("{0}")]
    Stopped(Stop),
    /// Not acknowledged in time; it may be stored or not. Publish it again with the same id.
    #[error("not acknowledged within {within:?}; last: {last}")]
    GaveUp { within: Duration, last: String },
    /// The acknowledgement can't be parsed.
    #[error("an answer that is no acknowledgement: {0}")]
    Garbled(String),
}

impl Draft {
    /// A message with a new id.
    #[must_use]
    pub fn new(room: impl Into<String>, body: Value) -> Self {
        Self {
            room: room.into(),
            id: ulid::Ulid::new().to_string(),
            body,
            kind: None,
            target: None,
            reply_to: None,
            mentions: Vec::new(),
        }
    }
}

impl Publisher {
    /// A session of its own, in no room: its token needs only the right to write.
    #[must_use]
    pub fn open(target: Target) -> Self {
        let backoff = target.backoff;
        let (task, state) = spawn(target, None, None);
        Self {
            state,
            backoff,
            patience: PATIENCE,
            _task: Some(Arc::new(task)),
        }
    }

    pub(super) fn over(state: watch::Receiver<State>, backoff: Backoff) -> Self {
        Self {
            state,
            backoff,
            patience: PATIENCE,
            _task: None,
        }
    }

    /// Sets the timeout of a publish.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Publishes `draft` repeatedly with the same id, until the edge acknowledges or refuses it.
    ///
    /// # Errors
    /// [`PublishError`].
    pub async fn publish(&self, draft: &Draft) -> Result<Ack, PublishError> {
        let mut last = "not connected yet".to_owned();
        match timeout(self.patience, self.until_acked(draft, &mut last)).await {
            Ok(outcome) => outcome,
            Err(_elapsed) => Err(PublishError::GaveUp {
                within: self.patience,
                last,
            }),
        }
    }

    /// Why there is currently no connection; `None` if there is one, or the first attempt is still in progress.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        match &*self.state.borrow() {
            State::Down { why } => why.clone(),
            State::Up(_) => None,
            State::Stopped(stop) => Some(stop.to_string()),
        }
    }

    async fn until_acked(&self, draft: &Draft, last: &mut String) -> Result<Ack, PublishError> {
        let mut state = self.state.clone();
        let mut attempt = 0;
        loop {
            let now = state.borrow_and_update().clone();
            let commands = match now {
                State::Up(commands) if !commands.is_closed() => commands,
                State::Stopped(stop) => return Err(PublishError::Stopped(stop)),
                State::Up(_) | State::Down { .. } => {
                    if let State::Down { why: Some(why) } = now {
                        *last = why;
                    }
                    if state.changed().await.is_err() {
                        let last = std::mem::take(last);
                        return Err(PublishError::Stopped(Stop::Unusable(last)));
                    }
                    continue;
                }
            };
            match commands.call("send", draft).await {
                Ok(reply) => {
                    return reply
                        .fields()
                        .map_err(|error| PublishError::Garbled(error.to_string()));
                }
                Err(CallError::Refused(refusal)) if !refusal.retry => {
                    return Err(PublishError::Refused(refusal));
                }
                Err(error @ CallError::Closed(_)) => {
                    *last = error.to_string();
                    // The loop above waits for the next connection, which has its own backoff.
                    attempt = 0;
                }
                Err(error) => *last = error.to_string(),
            }
            sleep(self.backoff.roll(attempt)).await;
            attempt += 1;
        }
    }

    /// Sends a typing signal. Without a connection it is lost, which is acceptable.
    pub async fn typing(&self, room: &str) {
        let now = self.state.borrow().clone();
        if let State::Up(commands) = now {
            let fields = serde_json::json!({"room": room});
            let _best_effort = commands.send("typing", fields).await;
        }
    }
}
