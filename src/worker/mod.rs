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

use std::{fmt, sync::Arc};

use futures_util::future::try_join_all;
use tokio::sync::{Semaphore, oneshot};

use crate::{
    auth::Identity,
    bus::{
        Bucket, ConnectError, Connection, DeadLetters, Line, Publisher, Reader, Remembered,
        Streams, WORKER_ROLE,
    },
    config::{self, Config},
    history,
    model::{MAX_ANNOTATION, RoomScope},
    outbound::{Limits, Receiver},
    people::People,
    runtime::{Late, Phase, Tasks},
    subject::{bucket, worker_user},
    taking::{self, Service, ServiceError},
    telemetry::metrics::{WorkerLabel, worker_label},
};
use files::Files;

pub use dead::Retry;

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
    reads: taking::Links,
    /// For publishing.
    line: Line,
}

/// A running process of workers.
#[derive(Debug)]
pub struct Workers {
    service: Service,
    line: Line,
}

impl Worker {
    fn new(config: &config::Worker) -> Result<Self, ServiceError> {
        let limits = Limits {
            allow: config.allow.clone(),
            timeout: config.timeout,
            answer_bytes: MAX_ANNOTATION,
        };
        let receiver = Receiver::new(&config.url, &config.secret, limits);
        let receiver = receiver.map_err(|source| ServiceError::Receiver {
            key: format!("workers.{}", config.name),
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

    fn all(config: &Config) -> Result<Vec<Arc<Self>>, ServiceError> {
        if config.workers.is_empty() {
            return Err(ServiceError::None("[[workers]]"));
        }
        let all = config.workers.iter();
        all.map(|config| Self::new(config).map(Arc::new)).collect()
    }

    fn name(&self) -> &str {
        &self.config.name
    }
}

impl Links {
    /// Adds a connection for publishing.
    fn open(config: &Config, reads: taking::Links, tasks: &Tasks) -> Result<Self, ConnectError> {
        let (line, driver) = Line::new(&config.nats, "natter worker publish")?;
        tasks.keep_running("publish", driver.run(()));
        Ok(Self { reads, line })
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
        let Links { reads, line } = links;
        let connection = &reads.connection;
        let reader = || reads.reader(&config);
        let origins = reads.origins(&config, &tasks).await;
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
    /// [`ServiceError`].
    pub async fn start(config: Config) -> Result<Self, ServiceError> {
        let (all, files) = (Worker::all(&config)?, Files::open(&config)?);
        let listen = ("worker.listen", config.worker.listen);
        let service = Service::start(&config, "natter worker", listen).await?;
        let links = Links::open(&config, service.links.clone(), &service.tasks)?;
        let line = links.line.clone();
        let (config, tasks) = (Arc::new(config), service.tasks.clone());
        let lifecycle = service.lifecycle.clone();
        service.tasks.spawn_until_stopping("start", async move {
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
        Ok(Self { service, line })
    }

    /// See [`Service::failed`].
    pub async fn failed(&self) -> String {
        self.service.failed().await
    }

    /// See [`Service::drain`].
    ///
    /// # Errors
    /// [`Late`].
    pub async fn drain(self) -> Result<(), Late> {
        let line = self.line;
        self.service.drain(async move { line.close().await }).await
    }
}
