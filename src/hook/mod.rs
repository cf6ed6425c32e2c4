//! Event hooks: what happens in rooms and to users is posted to the URLs of the configuration.
//!
//! ```text
//! stream ─► part (durable pull consumer of a hook) ─► hand: a queue per room ─► send: POST ─► ack
//!                                                                     └─► other attempts ─► dead letter
//! ```
//!
//! Each region tells what its own streams have stored. Nothing on the path of a message waits for a hook.
//!
//! # Invariants
//! - An entry is acknowledged to its stream only when all its events were accepted, or its dead letter is stored, or there
//!   is nothing to send.
//! - The id of an event is made from its place in the stream, so each attempt has the same.
//! - Of the processes of a region, one at a time sends the events of a hook: the one with the lease. So it can keep each
//!   room's order, while other rooms go on.

mod apart;
mod dead;
mod event;
mod gate;
mod hand;
mod lead;
mod part;
mod send;
mod source;
mod state;
mod status;
mod tell;

use std::{fmt, sync::Arc};

use futures_util::future::try_join_all;
use tokio::sync::oneshot;

use crate::{
    bus::{Bucket, Connection, DeadLetters, HOOK_ROLE, Origins, Reader, Remembered, Streams},
    config::{self, Config, HookEvent},
    model::RoomScope,
    outbound::{Limits, Receiver},
    people::People,
    runtime::{Late, Phase, Tasks},
    subject::bucket,
    taking::{Links, Service, ServiceError},
    telemetry::metrics::{Counter, HookLabel, count, hook_label},
};

pub use dead::{Retry, enable};
use tell::Of;

/// A hook of the configuration.
struct Hook {
    config: config::Hook,
    scope: RoomScope,
    receiver: Receiver,
    /// Its label in metrics, in a process that has named its hooks.
    label: Option<HookLabel>,
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hook")
            .field("name", &self.config.name)
            .finish_non_exhaustive()
    }
}

/// What all hooks of a process share.
#[derive(Debug, Clone)]
struct Parts {
    config: Arc<Config>,
    connection: Connection,
    reader: Reader,
    /// The own region's streams, whose entries are told.
    streams: Arc<Streams>,
    /// What was erased.
    remembered: Arc<Remembered>,
    /// For reads of room records; nobody follows them here.
    people: Arc<People>,
    /// What the processes of the region remember together.
    bucket: Bucket,
    dead: DeadLetters,
    tasks: Tasks,
}

/// A running process of hooks.
#[derive(Debug)]
pub struct Hooks {
    service: Service,
}

impl Hook {
    fn new(config: &config::Hook) -> Result<Self, ServiceError> {
        let limits = Limits {
            allow: config.allow.clone(),
            timeout: config.timeout,
            // Nothing that a receiver says is of interest but its status.
            answer_bytes: 0,
        };
        let receiver = Receiver::new(&config.url, &config.secret, limits);
        let receiver = receiver.map_err(|source| ServiceError::Receiver {
            key: format!("hooks.{}", config.name),
            source,
        })?;
        Ok(Self {
            scope: config.scope(),
            receiver,
            label: hook_label(&config.name),
            config: config.clone(),
        })
    }

    fn all(config: &Config) -> Result<Vec<Arc<Self>>, ServiceError> {
        if config.hooks.is_empty() {
            return Err(ServiceError::None("[[hooks]]"));
        }
        let all = config.hooks.iter();
        all.map(|config| Self::new(config).map(Arc::new)).collect()
    }

    fn name(&self) -> &str {
        &self.config.name
    }

    /// Counts, if the process has named its hooks.
    fn count(&self, counter: fn(HookLabel) -> Counter) {
        if let Some(label) = self.label {
            count(counter(label), 1);
        }
    }
}

impl Parts {
    /// Waits for the streams, and begins to follow what was erased. Also returns all streams.
    async fn open(config: Arc<Config>, links: &Links, tasks: Tasks) -> (Self, Arc<Origins>) {
        let connection = &links.connection;
        let origins = links.origins(&config, &tasks).await;
        let bucket_of =
            |name| Bucket::new(connection.clone(), links.reader(&config), &config, name);
        let control = bucket_of(bucket::CONTROL);
        let remembered: Arc<Remembered> = Arc::default();
        match remembered.open(&control, &origins).await {
            Some(feed) => {
                let follow = Arc::clone(&remembered).follow(control, Arc::clone(&origins), feed);
                tasks.keep_running("follow what was erased", follow);
            }
            None => tasks.fail("what was erased can't be followed"),
        }
        let reader = links.reader(&config);
        let (people, _unused) = People::new(&config, &reader, &origins);
        let dead = DeadLetters::of_receivers(HOOK_ROLE, connection.clone(), reader, &config);
        let parts = Self {
            dead,
            people,
            bucket: bucket_of(bucket::HOOKS),
            reader: links.reader(&config),
            connection: connection.clone(),
            streams: Arc::clone(origins.own()),
            remembered,
            tasks,
            config,
        };
        (parts, origins)
    }
}

impl Hooks {
    /// Binds the address. The work begins when the streams can be reached. `instance` is a name that no other process
    /// has.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn start(config: Config, instance: String) -> Result<Self, ServiceError> {
        let all = Hook::all(&config)?;
        let listen = ("hook.listen", config.hook.listen);
        let service = Service::start(&config, "natter hooks", listen).await?;
        let (config, links) = (Arc::new(config), service.links.clone());
        let (tasks, lifecycle) = (service.tasks.clone(), service.lifecycle.clone());
        service.tasks.spawn_until_stopping("start", async move {
            let (parts, origins) = Parts::open(config, &links, tasks.clone()).await;
            let mut opened = Vec::new();
            let wanted = |events: [HookEvent; 2]| all.iter().any(|hook| hook.config.wants(&events));
            for (of, events) in [
                (Of::Users, [HookEvent::UserOnline, HookEvent::UserOffline]),
                (Of::Rooms, [HookEvent::RoomOccupied, HookEvent::RoomVacated]),
            ] {
                if wanted(events) {
                    let (origins, reader) = (Arc::clone(&origins), parts.reader.clone());
                    let tell = tell::run(parts.clone(), origins, reader, of, instance.clone());
                    tasks.spawn_essential("tell", tell);
                }
            }
            for hook in all {
                let keep = status::keep(parts.clone(), Arc::clone(&hook));
                tasks.keep_running("keep figures", keep);
                let (open, first) = oneshot::channel();
                opened.push(first);
                let run = lead::run(parts.clone(), hook, instance.clone(), open);
                tasks.spawn_essential("hook", run);
            }
            // A consumer gets only what is stored after its creation.
            if try_join_all(opened).await.is_ok() {
                lifecycle.advance(Phase::Ready);
                tracing::info!("hooks ready");
            }
        });
        Ok(Self { service })
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
        self.service.drain(std::future::ready(())).await
    }
}
