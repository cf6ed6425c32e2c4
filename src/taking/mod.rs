//! What processes have in common that take stored messages somewhere: `natter worker`, `natter hooks` and
//! `natter notifier`. Connections, health, the end of the process, and how far a consumer is behind.
//!
//! It does not know what is sent, or how often.

use std::{io, net::SocketAddr, time::Duration};

use tokio::net::TcpListener;

use crate::{
    bus::{
        ConnectError, Connection, LetterError, Origins, Reader, STREAMS_WATCH, Streams,
        consumer_state, stored_after,
    },
    config::Config,
    history, http1,
    runtime::{Late, Lifecycle, Phase, Tasks, unix_ms},
    subject::{Subjects, rooms_stream},
    telemetry::metrics::{Gauge, gauge, gauge_add},
    uploads::OpenError,
};

/// Timeout of what is in hand when the process shuts down. What is not done by then is given back.
const DRAIN_WITHIN: Duration = Duration::from_secs(10);

/// Pauses after a failure of a stream: the first and the longest.
pub const STREAM_PAUSES: (Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(5));

/// How long something in hand may go on during shutdown. Shorter than the whole drain, so that it can be given back.
pub const LAST_TRY: Duration = Duration::from_secs(5);

/// The connections of a process to NATS.
#[derive(Debug, Clone)]
pub struct Links {
    /// For consumers, acknowledgements and questions.
    pub connection: Connection,
    /// For reads.
    pub reads: Connection,
}

impl Links {
    /// Connects; `name` is shown to the server.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn open(config: &Config, name: &str, tasks: &Tasks) -> Result<Self, ConnectError> {
        let links = Self {
            connection: Connection::open(&config.nats, name).await?,
            reads: Connection::open(&config.nats, &format!("{name} reads")).await?,
        };
        for connection in [&links.connection, &links.reads] {
            let connection = connection.clone();
            tasks.keep_running("NATS connection", async move { connection.ended().await });
        }
        Ok(links)
    }

    /// A reader over the connection for reads.
    #[must_use]
    pub fn reader(&self, config: &Config) -> Reader {
        Reader::new(self.reads.clone(), &config.nats)
    }

    /// Waits for the streams of all regions, and follows which there are.
    pub async fn origins(&self, config: &Config, tasks: &Tasks) -> std::sync::Arc<Origins> {
        let origins = Origins::wait_for(&self.connection, &config.region(), &config.nats).await;
        let watch = std::sync::Arc::clone(&origins).watch(STREAMS_WATCH);
        tasks.keep_running("watch streams", watch);
        origins
    }

    /// Closes them.
    pub async fn close(&self) {
        tokio::join!(self.reads.close(), self.connection.close());
    }
}

/// A running process.
#[derive(Debug)]
pub struct Service {
    /// Whether it is ready.
    pub lifecycle: Lifecycle,
    /// Its tasks.
    pub tasks: Tasks,
    /// Its connections.
    pub links: Links,
    http: Tasks,
}

/// The process can't run.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The configuration has nothing to do for it.
    #[error("the configuration has no {0}")]
    None(&'static str),
    /// The address is in use, or not an address of this machine.
    #[error("{key} = {address}: can't listen there")]
    Listen {
        key: &'static str,
        address: SocketAddr,
        source: io::Error,
    },
    /// The configuration can't be used to connect to NATS.
    #[error(transparent)]
    Nats(#[from] ConnectError),
    /// Requests can't be sent.
    #[error("{key}: requests can't be sent")]
    Receiver { key: String, source: io::Error },
    /// The configuration can't be used for the files of uploads.
    #[error(transparent)]
    Uploads(#[from] OpenError),
    /// A worker would get nothing.
    #[error(
        "workers.{name}.attachments = true, but this configuration has no uploads: natter worker needs [uploads] as the edges have it, and uploads.public_url with storage \"local\""
    )]
    NoUploads { name: String },
}

impl Service {
    /// Binds the address of the configuration's `key`, connects, and serves health and metrics.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn start(
        config: &Config,
        name: &str,
        (key, address): (&'static str, SocketAddr),
    ) -> Result<Self, ServiceError> {
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(|source| ServiceError::Listen {
            key,
            address,
            source,
        })?;
        let tasks = Tasks::default();
        let service = Self {
            lifecycle: Lifecycle::default(),
            http: Tasks::default(),
            links: Links::open(config, name, &tasks).await?,
            tasks,
        };
        history::serve_health(
            listener,
            http1::Limits::new(config),
            service.lifecycle.clone(),
            service.links.connection.clone(),
            &service.http,
        );
        tracing::info!(%address, "{name} listens");
        Ok(service)
    }

    /// Waits until a part fails that the process can't do without, and returns its name. The caller should then drain,
    /// and end the process with an error. Cancel-safe.
    pub async fn failed(&self) -> String {
        tokio::select! {
            why = self.tasks.failed() => why,
            why = self.http.failed() => why,
        }
    }

    /// Shuts down in order: takes no more messages, and waits for the open requests. What is not done in time is
    /// redelivered, to another process. `close` closes further connections.
    ///
    /// # Errors
    /// [`Late`] if a task had to be cut. No message is lost by that.
    pub async fn drain(self, close: impl Future<Output = ()>) -> Result<(), Late> {
        self.lifecycle.advance(Phase::Draining);
        let tasks = self.tasks.drain(DRAIN_WITHIN).await;
        close.await;
        self.links.close().await;
        let http = self.http.drain(Duration::from_secs(1)).await;
        self.lifecycle.advance(Phase::Stopped);
        tasks.and(http)
    }
}

/// The outcome of another attempt at a dead letter.
#[derive(Debug)]
pub enum Retried {
    /// The receiver has accepted it; the dead letter is removed.
    Done,
    /// The message is gone, or not for the receiver any more; the dead letter is removed.
    Gone,
    /// The same, but its dead letter could not be removed. It is safe to retry.
    NotRemoved(LetterError),
    /// It still can't be done, with the reason.
    Refused(String),
}

/// How far the consumers of one receiver are behind, over several streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Behind {
    /// Messages that are not done.
    pub pending: u64,
    /// The age of the oldest of them, in seconds.
    pub lag: u64,
}

/// The streams of a region's rooms, each with a filter for all that it has.
pub fn rooms_of(streams: &Streams, config: &Config) -> Vec<(String, String)> {
    let (origin, subjects) = (streams.origin(), Subjects::new(&config.nats.prefix));
    let stream = |part| (rooms_stream(origin, part), subjects.captured(origin, part));
    (0..streams.partitions()).map(stream).collect()
}

/// Asks NATS how far `consumer` is behind in these streams; a filter says what may be before it.
///
/// # Errors
/// What can't be read.
pub async fn behind(
    connection: &Connection,
    reader: &Reader,
    wait: Duration,
    streams: &[(String, String)],
    consumer: &str,
) -> Result<Behind, Box<dyn std::error::Error + Send + Sync>> {
    let (mut pending, mut oldest) = (0, u64::MAX);
    for (stream, filter) in streams {
        let state = consumer_state(connection, stream, consumer, wait).await?;
        // None: it is about to be created, or there is nothing for it.
        let Some(state) = state else { continue };
        let waiting = state.pending + state.ack_pending;
        pending += waiting;
        if waiting > 0 {
            // The first message after what is done is not later than the first of this consumer.
            let ts = stored_after(reader, stream, filter, state.floor).await?;
            oldest = oldest.min(ts.unwrap_or(u64::MAX));
        }
    }
    let lag = match oldest {
        u64::MAX => 0,
        oldest => unix_ms().saturating_sub(oldest) / 1000,
    };
    Ok(Behind { pending, lag })
}

/// Sets a gauge that only the caller changes.
pub fn set_gauge(which: Gauge, value: u64) {
    let value = i64::try_from(value).unwrap_or(i64::MAX);
    gauge_add(which, value - gauge(which));
}
