//! Moving in and out: [`Import`] takes a file of messages, [`Export`] gives all of them, both as JSON lines ([`mod@line`]).
//!
//! Both use NATS and MongoDB directly, with the operator's configuration.

mod export;
mod import;
mod line;
mod seen;

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use crate::{
    bus::{Connection, KvError, Origins, PublishError, ReadError, Reader, StreamError},
    config::Config,
    protocol::Refused,
    runtime::Tasks,
    store::{Store, StoreError},
};

pub use export::Export;
pub use import::{Import, Options, Report};

/// How long the streams of the region are waited for.
const STREAMS_WITHIN: Duration = Duration::from_secs(10);

/// Attempts at a read or a write that may succeed later.
const ATTEMPTS: u32 = 10;

/// Pause after the first of them, doubled each time, up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// An import or export can't continue.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The configuration can't be used to connect to NATS.
    #[error(transparent)]
    Connect(#[from] crate::bus::ConnectError),
    /// The streams were not found in time.
    #[error(
        "the streams of region {0} can't be read at {1}: is NATS running, and did `natter provision` run?"
    )]
    NoStreams(String, String),
    /// The file can't be read.
    #[error("the file can't be read")]
    File(#[from] std::io::Error),
    /// The file was written to between the check and the import.
    #[error("line {0} is not the line that was checked: the file changes while it is imported")]
    Changed(u64),
    /// A stream can't be read.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A stream can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The existing messages can't be read.
    #[error("what the streams have can't be read: {0}")]
    Scan(#[from] crate::bus::EraseError),
    /// The list of erased messages can't be read.
    #[error("which messages were erased can't be read")]
    Erased(#[from] KvError),
    /// MongoDB failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A stream did not take a message.
    #[error("line {line} can't be stored")]
    Publish {
        line: u64,
        #[source]
        source: PublishError,
    },
    /// MongoDB did not take a message.
    #[error("line {line}: MongoDB refuses it: {reason}")]
    Refused { line: u64, reason: String },
    /// A page can't be read.
    #[error("the history of {room} can't be read: {}", .refusal.message)]
    Page { room: String, refusal: Refused },
    /// Something may be missing in a page.
    #[error(
        "not all of {0} can be read now: the history service is not running or far behind, or another region can't be reached"
    )]
    Partial(String),
}

/// The deployment that messages are moved into or out of.
#[derive(Debug, Clone)]
pub struct Deployment {
    config: Arc<Config>,
    connection: Connection,
    reader: Reader,
    origins: Arc<Origins>,
    /// `None` if no namespace has a history.
    store: Option<Store>,
    /// The connections.
    tasks: Tasks,
}

impl Deployment {
    /// Connects.
    ///
    /// # Errors
    /// [`TransferError`] if NATS can't be reached or has no streams, or if `mongodb.url` can't be used.
    pub async fn open(config: Config, name: &str) -> Result<Self, TransferError> {
        let connection = Connection::open(&config.nats, name).await?;
        let region = config.region();
        let origins = Origins::wait_for(&connection, &region, &config.nats);
        let origins = timeout(STREAMS_WITHIN, origins).await.map_err(|_elapsed| {
            TransferError::NoStreams(region.to_string(), config.nats.url.clone())
        })?;
        let has_history = config.namespaces.values().any(|its| its.history);
        let store = match has_history {
            true => Some(Store::open(&config.mongodb).await?),
            false => None,
        };
        Ok(Self {
            reader: Reader::new(connection.clone(), &config.nats),
            config: Arc::new(config),
            connection,
            origins,
            store,
            tasks: Tasks::default(),
        })
    }

    /// Whether MongoDB keeps the messages of a namespace.
    fn has_history(&self, namespace: &str) -> bool {
        let its = self.config.namespaces.get(namespace);
        its.is_some_and(|its| its.history)
    }
}

/// Calls MongoDB, again while it can't be reached.
async fn retried<T>(mut call: impl AsyncFnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
    let mut pause = PAUSE;
    for _ in 1..ATTEMPTS {
        match call().await {
            Err(StoreError::Unavailable(problem)) => {
                tracing::warn!(problem, "retrying");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
            answer => return answer,
        }
    }
    call().await
}
