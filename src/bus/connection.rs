//! One connection to the region's NATS cluster.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use async_nats::{Client, ConnectOptions, Event, ServerAddr, Statistics, connection::State};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::{
    config,
    model::is_token,
    telemetry::metrics::{Counter, Gauge, count, gauge_add},
};

/// Longest pause between two attempts to reconnect.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(1);

/// Interval of the pings to the server. After two unanswered pings the connection is given up.
pub(super) const PING_INTERVAL: Duration = Duration::from_secs(5);

/// Timeout for connecting to one server.
pub(super) const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// Timeout for sending the last bytes of a connection.
pub(super) const CLOSE_WITHIN: Duration = Duration::from_secs(1);

/// The pause before an attempt to reconnect. It grows with the number of attempts up to [`MAX_RECONNECT_DELAY`], with
/// jitter, so that clients that lost the same server do not return at once.
pub(super) fn reconnect_delay(attempts: usize) -> Duration {
    let attempts = u32::try_from(attempts).unwrap_or(u32::MAX);
    let step = Duration::from_millis(50).saturating_mul(attempts);
    step.min(MAX_RECONNECT_DELAY)
        .mul_f64(rand::random_range(0.5..1.0))
}

/// The prefix of the subjects on which a connection receives answers; two regions must never share one. It is below
/// `_INBOX.<user>`, so that a user's permissions can be limited to its own answers (subject wildcards match whole
/// tokens only).
pub(crate) fn new_inbox(config: &config::Nats) -> String {
    let unique = ulid::Ulid::new().to_string().to_lowercase();
    if is_token(&config.user) {
        format!("_INBOX.{}.{unique}", config.user)
    } else {
        format!("_INBOX.{unique}")
    }
}

/// The servers that the configuration names.
pub(super) fn servers(config: &config::Nats) -> Result<Vec<ServerAddr>, ConnectError> {
    let servers: Result<_, _> = config
        .url
        .split(',')
        .map(|url| url.trim().parse())
        .collect();
    servers.map_err(|source| ConnectError::Url {
        url: config.url.clone(),
        source,
    })
}

/// The identity given in the configuration.
pub(super) enum Identity {
    Nobody,
    Password(String, String),
    /// The text of a credentials file.
    Credentials(String),
}

impl Identity {
    pub(super) fn of(config: &config::Nats) -> Result<Self, ConnectError> {
        if !config.user.is_empty() {
            let password = config.password.expose().to_owned();
            return Ok(Self::Password(config.user.clone(), password));
        }
        if config.creds_file.as_os_str().is_empty() {
            return Ok(Self::Nobody);
        }
        std::fs::read_to_string(&config.creds_file)
            .map(Self::Credentials)
            .map_err(ConnectError::Credentials)
    }
}

/// A NATS connection that reconnects by itself, without limit.
#[derive(Debug, Clone)]
pub struct Connection {
    client: Client,
    statistics: Arc<Statistics>,
    subscription_capacity: usize,
    ended: CancellationToken,
}

/// The configuration can't be used to connect to NATS.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The credentials file can't be read.
    #[error("nats.creds_file: can't be used")]
    Credentials(#[source] std::io::Error),
    /// The URL can't be parsed.
    #[error("nats.url = {url:?}: not a list of NATS URLs")]
    Url {
        url: String,
        #[source]
        source: std::io::Error,
    },
    /// The first attempt failed with an error that a retry can't fix, e.g. a malformed URL.
    #[error("no connection to NATS at {url}")]
    Connect {
        url: String,
        source: async_nats::ConnectError,
    },
}

/// A message was not published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("NATS is not reachable")]
pub struct NotSent;

impl Connection {
    /// Opens a connection. If the server does not answer, it keeps retrying in the background.
    ///
    /// `name` is shown by `nats server report connections`. Each connection has its own inbox prefix.
    ///
    /// # Errors
    /// [`ConnectError`] if a retry can't help.
    pub async fn open(config: &config::Nats, name: &str) -> Result<Self, ConnectError> {
        let label = name.to_owned();
        // The client drops the callback when it ends, for whatever reason. No event reports all of these cases.
        let ended = CancellationToken::new();
        let end = ended.clone().drop_guard();
        let mut options = ConnectOptions::new()
            .name(name)
            .custom_inbox_prefix(new_inbox(config))
            .request_timeout(None)
            .retry_on_initial_connect()
            .ping_interval(PING_INTERVAL)
            .connection_timeout(CONNECT_WITHIN)
            .subscription_capacity(config.subscription_capacity)
            .reconnect_delay_callback(reconnect_delay)
            .event_callback(move |event| {
                let _end = &end;
                let label = label.clone();
                async move { on_event(&label, &event) }
            });
        options = match Identity::of(config)? {
            Identity::Nobody => options,
            Identity::Password(user, password) => options.user_and_password(user, password),
            Identity::Credentials(text) => options
                .credentials(&text)
                .map_err(ConnectError::Credentials)?,
        };
        let client =
            options
                .connect(servers(config)?)
                .await
                .map_err(|source| ConnectError::Connect {
                    url: config.url.clone(),
                    source,
                })?;
        let statistics = client.statistics();
        Ok(Self {
            client,
            statistics,
            subscription_capacity: config.subscription_capacity,
            ended,
        })
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Messages that one subscription buffers before it drops further ones.
    pub(super) fn subscription_capacity(&self) -> usize {
        self.subscription_capacity
    }

    /// Whether the connection is up, as far as is known: it takes some seconds to notice that a peer has vanished.
    #[must_use]
    pub fn is_up(&self) -> bool {
        !self.ended.is_cancelled() && self.client.connection_state() == State::Connected
    }

    /// Waits until the connection has ended for good: it was closed, or its client panicked. Server errors and
    /// disconnects do not end it. Cancel-safe.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// How many times a connection was established. It is incremented before the first message of the new connection
    /// can arrive. So if the generation has not changed when a message is read, there was no reconnect before that
    /// message.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.statistics.connects.load(Ordering::SeqCst)
    }

    /// Returns when the server has processed everything that was sent before on this connection. It sends a request to
    /// a subject without subscribers, which the server answers at once.
    pub async fn round_trip(&self, subject: &str) {
        // Any answer will do, including "no responders".
        let answered = self
            .client
            .request(subject.to_owned(), bytes::Bytes::new())
            .await
            .is_ok();
        tracing::trace!(answered, "round trip");
    }

    /// Publishes a message that nobody acknowledges; `reply`: where the answers to it go.
    ///
    /// # Errors
    /// [`NotSent`].
    pub async fn publish(
        &self,
        subject: String,
        reply: Option<String>,
        payload: bytes::Bytes,
    ) -> Result<(), NotSent> {
        // Otherwise the client would keep it, and send it when it is up again.
        if !self.is_up() {
            return Err(NotSent);
        }
        let sent = match reply {
            Some(reply) => {
                self.client
                    .publish_with_reply(subject, reply, payload)
                    .await
            }
            None => self.client.publish(subject, payload).await,
        };
        sent.map_err(|_closed| NotSent)
    }

    /// Flushes the client's buffer and ends the connection. While the connection is down, nothing is flushed.
    pub async fn close(&self) {
        let close = async {
            // Either error means that the connection has already ended.
            self.client.flush().await.is_ok() && self.client.drain().await.is_ok()
        };
        let clean = self.is_up() && timeout(CLOSE_WITHIN, close).await.unwrap_or(false);
        tracing::debug!(clean, "NATS connection closed");
    }
}

fn on_event(name: &str, event: &Event) {
    match event {
        Event::Connected => {
            count(Counter::NatsConnects, 1);
            gauge_add(Gauge::NatsConnected, 1);
            tracing::info!(connection = name, "NATS connected");
        }
        Event::Disconnected => {
            gauge_add(Gauge::NatsConnected, -1);
            tracing::warn!(connection = name, "NATS disconnected, reconnecting");
        }
        Event::SlowConsumer(subscription) => {
            count(Counter::NatsSlowConsumer, 1);
            tracing::warn!(
                connection = name,
                subscription,
                "a NATS subscription dropped messages"
            );
        }
        Event::LameDuckMode => tracing::info!(connection = name, "the NATS server is leaving"),
        Event::ServerError(error) => tracing::warn!(connection = name, %error, "NATS server error"),
        Event::ClientError(error) => {
            tracing::debug!(connection = name, %error, "NATS client error")
        }
        Event::Draining | Event::Closed => tracing::debug!(connection = name, %event, "NATS"),
    }
}
