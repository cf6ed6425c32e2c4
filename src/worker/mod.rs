//! Workers: messages of durable rooms are posted to the URLs of the configuration, and the answers become annotations.
//!
//! ```text
//! stream ─► take (durable pull consumer of a worker) ─► job: POST ─► annotation ─► stream ─► ack
//!                                                        └─► other attempts ─► dead letter
//! ```
//!
//! Each region works on what its own streams have stored. Nothing on the path of a message waits for a worker.
//!
//! # Invariants
//! - A message is acknowledged to its stream only when its annotation, or its dead letter, is stored, or there is nothing
//!   to store.
//! - The id of an annotation is made from the worker and the message. So the stream drops a second one, and an attempt
//!   after the first one looks whether there is one already: the stream forgets ids after its duplicate window.
//! - A process has never more than `concurrency` requests of a worker open.

mod dead;
mod files;
mod job;
mod seen;
mod status;
mod take;

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use futures_util::future::try_join_all;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, oneshot},
};

use crate::{
    auth::Identity,
    bus::{
        Bucket, ConnectError, Connection, DeadLetters, Line, Origins, Publisher, Reader,
        Remembered, STREAMS_WATCH, Streams, WORKER_ROLE,
    },
    config::{self, Config},
    history, http1,
    model::{MAX_ANNOTATION, RoomScope},
    outbound::{Limits, Receiver},
    people::People,
    runtime::{Late, Lifecycle, Phase, Tasks},
    subject::{bucket, worker_user},
    telemetry::metrics::{WorkerLabel, worker_label},
    uploads::OpenError,
};
use files::Files;

pub use dead::{Retried, Retry};

/// Timeout of the jobs in hand when the process shuts down. What is not done by then is given back.
const DRAIN_WITHIN: Duration = Duration::from_secs(10);

/// A worker of the configuration.
struct Worker {
    config: config::Worker,
    /// Who annotates.
    identity: Identity,
    scope: RoomScope,
    receiver: Receiver,
    /// Requests that may be open at once.
    turns: Semaphore,
    /// Its label in metrics, in a process that has named its workers.
    label: Option<WorkerLabel>,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("name", &self.config.name)
            .finish_non_exhaustive()
    }
}

/// What all workers of a process share.
#[derive(Debug, Clone)]
struct Parts {
    config: Arc<Config>,
    connection: Connection,
    reader: Reader,
    /// The own region's streams, whose messages the workers get.
    streams: Arc<Streams>,
    people: Arc<People>,
    history: Arc<history::Client>,
    publisher: Publisher,
    /// What was erased.
    remembered: Arc<Remembered>,
    dead: DeadLetters,
    /// What tells workers where the files of messages are.
    files: Option<Arc<Files>>,
    tasks: Tasks,
}

/// The connections of a process to NATS.
#[derive(Debug, Clone)]
struct Links {
    /// For consumers, acknowledgements and questions.
    connection: Connection,
    /// For reads.
    reads: Connection,
    /// For publishing.
    line: Line,
}

/// A running process of workers.
#[derive(Debug)]
pub struct Workers {
    lifecycle: Lifecycle,
    tasks: Tasks,
    http: Tasks,
    links: Links,
}

/// The workers can't run.
#[derive(Debug, thiserror::Error)]
pub enum WorkersError {
    /// The configuration has none.
    #[error("there are no [[workers]] in the configuration")]
    None,
    /// The address is in use, or not an address of this machine.
    #[error("worker.listen = {address}: can't listen there")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    /// The configuration can't be used to connect to NATS.
    #[error(transparent)]
    Nats(#[from] ConnectError),
    /// The configuration can't be used for the files of uploads.
    #[error(transparent)]
    Uploads(#[from] OpenError),
    /// A worker would get nothing.
    #[error(
        "workers.{name}.attachments = true, but this configuration has no uploads: natter worker needs [uploads] as the edges have it, and uploads.public_url with storage \"local\""
    )]
    NoUploads { name: String },
    /// Requests can't be sent.
    #[error("workers.{name}: requests can't be sent")]
    Receiver { name: String, source: io::Error },
}

impl Worker {
    fn new(config: &config::Worker) -> Result<Self, WorkersError> {
        let limits = Limits {
            allow: config.allow.clone(),
            timeout: config.timeout,
            answer_bytes: MAX_ANNOTATION,
        };
        let receiver = Receiver::new(&config.url, &config.secret, limits);
        let receiver = receiver.map_err(|source| WorkersError::Receiver {
            name: config.name.clone(),
            source,
        })?;
        Ok(Self {
            identity: Identity::of_back_end(&worker_user(&config.name)),
            scope: config.scope(),
            receiver,
            turns: Semaphore::new(config.concurrency),
            label: worker_label(&config.name),
            config: config.clone(),
        })
    }

    fn all(config: &Config) -> Result<Vec<Arc<Self>>, WorkersError> {
        if config.workers.is_empty() {
            return Err(WorkersError::None);
        }
        let all = config.workers.iter();
        all.map(|config| Self::new(config).map(Arc::new)).collect()
    }

    fn name(&self) -> &str {
        &self.config.name
    }
}

impl Links {
    async fn open(config: &Config, tasks: &Tasks) -> Result<Self, ConnectError> {
        let connection = Connection::open(&config.nats, "natter worker").await?;
        let reads = Connection::open(&config.nats, "natter worker reads").await?;
        let (line, driver) = Line::new(&config.nats, "natter worker publish")?;
        tasks.keep_running("publish", driver.run(()));
        for connection in [&connection, &reads] {
            let connection = connection.clone();
            tasks.keep_running("NATS connection", async move { connection.ended().await });
        }
        Ok(Self {
            connection,
            reads,
            line,
        })
    }

    async fn close(&self) {
        tokio::join!(
            self.line.close(),
            self.reads.close(),
            self.connection.close()
        );
    }
}

impl Parts {
    /// Waits for the streams, and begins to follow what the jobs need.
    async fn open(
        config: Arc<Config>,
        links: &Links,
        tasks: Tasks,
        files: Option<Arc<Files>>,
    ) -> Self {
        let Links {
            connection,
            reads,
            line,
        } = links;
        let reader = || Reader::new(reads.clone(), &config.nats);
        let origins = Origins::wait_for(connection, &config.region(), &config.nats).await;
        tasks.keep_running("watch streams", Arc::clone(&origins).watch(STREAMS_WATCH));
        let control = Bucket::new(connection.clone(), reader(), &config, bucket::CONTROL);
        let remembered: Arc<Remembered> = Arc::default();
        match remembered.open(&control, &origins).await {
            Some(feed) => {
                let follow = Arc::clone(&remembered).follow(control, Arc::clone(&origins), feed);
                tasks.keep_running("follow what was erased", follow);
            }
            None => tasks.fail("what was erased can't be followed"),
        }
        let (people, loads) = People::new(&config, &reader(), &origins);
        match people.open().await {
            Some(feeds) => {
                let follow = Arc::clone(&people).follow(loads, feeds);
                tasks.keep_running("follow room records", follow);
            }
            None => tasks.fail("room records can't be followed"),
        }
        let streams = Arc::clone(origins.own());
        let publisher = Publisher::new(
            line.clone(),
            reader(),
            Arc::clone(&streams),
            Arc::clone(&remembered),
            &config.nats,
            "worker",
        );
        line.ready().await;
        Self {
            history: history::Client::new(&reader(), &origins, &config),
            dead: DeadLetters::of_receivers(WORKER_ROLE, connection.clone(), reader(), &config),
            connection: connection.clone(),
            reader: reader(),
            streams,
            people,
            publisher,
            remembered,
            files,
            tasks,
            config,
        }
    }
}

impl Workers {
    /// Binds the address. The work begins when the streams can be reached.
    ///
    /// # Errors
    /// [`WorkersError`].
    pub async fn start(config: Config) -> Result<Self, WorkersError> {
        let (all, files) = (Worker::all(&config)?, Files::open(&config)?);
        let config = Arc::new(config);
        let address = config.worker.listen;
        let listen = |source| WorkersError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let tasks = Tasks::default();
        let workers = Self {
            lifecycle: Lifecycle::default(),
            http: Tasks::default(),
            links: Links::open(&config, &tasks).await?,
            tasks,
        };
        history::serve_health(
            listener,
            http1::Limits::new(&config),
            workers.lifecycle.clone(),
            workers.links.connection.clone(),
            &workers.http,
        );
        let (links, tasks) = (workers.links.clone(), workers.tasks.clone());
        let lifecycle = workers.lifecycle.clone();
        workers.tasks.spawn_until_stopping("start", async move {
            let parts = Parts::open(config, &links, tasks.clone(), files).await;
            let mut opened = Vec::new();
            for worker in all {
                tasks.keep_running(
                    "keep figures",
                    status::keep(parts.clone(), Arc::clone(&worker)),
                );
                for part in 0..parts.streams.partitions() {
                    let (open, first) = oneshot::channel();
                    opened.push(first);
                    let take = take::run(parts.clone(), Arc::clone(&worker), part, open);
                    tasks.spawn_essential("take", take);
                }
            }
            // A consumer gets only what is stored after its creation.
            if try_join_all(opened).await.is_ok() {
                lifecycle.advance(Phase::Ready);
                tracing::info!("workers ready");
            }
        });
        tracing::info!(%address, "workers listening");
        Ok(workers)
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
    /// redelivered, to another process.
    ///
    /// # Errors
    /// [`Late`] if a task had to be cut. No message is lost by that.
    pub async fn drain(self) -> Result<(), Late> {
        self.lifecycle.advance(Phase::Draining);
        let tasks = self.tasks.drain(DRAIN_WITHIN).await;
        self.links.close().await;
        let http = self.http.drain(Duration::from_secs(1)).await;
        self.lifecycle.advance(Phase::Stopped);
        tasks.and(http)
    }
}
