//! Notifications for users who are away: messages of durable rooms become requests to the services that reach their
//! devices.
//!
//! ```text
//! stream ─► take (durable pull consumer `push`) ─► recipients ─► judge ─► claim ─► provider ─► ack
//!                       ▲                                          │
//!                       └────── again after a while ◄── still here, or just gone
//! ```
//!
//! Each region notifies of what its own streams have stored, whoever is concerned. Nothing on the path of a message waits
//! for it.
//!
//! # Invariants
//! - A message waits in its stream, not in memory. A process that dies loses nothing that waits.
//! - A device is claimed for a message before the request is sent. The claim is given back only where the service has
//!   certainly not taken the request. So a device gets at most one notification of a message, and none if the process dies
//!   between the two.
//! - Recipients of a message are looked at in groups: its memory does not grow with their number.

mod badges;
mod judge;
mod provider;
mod recipients;
mod take;
mod turns;
mod webpush;

use std::sync::Arc;

use futures_util::future::try_join_all;
use tokio::sync::oneshot;

use crate::{
    bus::{Bucket, Line, Origins, Publisher, Reader, Remembered, Streams},
    config::Config,
    model::RoomId,
    people::People,
    presence::Online,
    read_marker::{Counted, Markers},
    runtime::{Late, Phase, Tasks},
    subject::{PUSH_CONSUMER, bucket},
    taking::{Links, Service, ServiceError, behind, rooms_of, set_gauge},
    telemetry::metrics::Gauge,
};
use badges::Badges;
use provider::Providers;
use turns::Turns;
pub use webpush::new_keys;

/// Interval at which the gauges are updated.
const KEEP: std::time::Duration = std::time::Duration::from_secs(5);

/// What all tasks of a process share.
#[derive(Debug)]
struct Parts {
    config: Arc<Config>,
    links: Links,
    tasks: Tasks,
    reader: Reader,
    origins: Arc<Origins>,
    streams: Arc<Streams>,
    people: Arc<People>,
    markers: Arc<Markers>,
    remembered: Arc<Remembered>,
    lastread: Bucket,
    claims: Bucket,
    online: Arc<Online>,
    providers: Arc<Providers>,
    badges: Arc<Badges>,
    /// Requests that may be open at once.
    turns: Turns,
}

/// A running notifier.
#[derive(Debug)]
pub struct Notifier {
    service: Service,
    line: Line,
}

/// The notifier can't run.
#[derive(Debug, thiserror::Error)]
pub enum NotifierError {
    /// The connections or the address.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// A key of the configuration can't be used.
    #[error("{0}")]
    Key(String),
    /// The configuration can't be used to connect to NATS.
    #[error(transparent)]
    Nats(#[from] crate::bus::ConnectError),
}

impl Parts {
    /// Waits for the streams, and begins to follow what is needed.
    async fn open(
        config: Arc<Config>,
        (links, tasks): (Links, Tasks),
        line: Line,
        providers: Providers,
    ) -> Arc<Self> {
        let reader = || links.reader(&config);
        let origins = links.origins(&config, &tasks).await;
        let of = |name| Bucket::new(links.connection.clone(), reader(), &config, name);
        let control = of(bucket::CONTROL);
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
        // It publishes nothing: read markers want to have one.
        let publisher = Publisher::new(
            line,
            reader(),
            Arc::clone(&streams),
            Arc::clone(&remembered),
            &config.nats,
            "notifier",
        );
        let markers = Markers::new(&reader(), reader(), &origins, &config, publisher);
        tasks.keep_running("keep read markers", Arc::clone(&markers).keep());
        let (online, changes) = Online::follow(&config, &reader(), &origins, &tasks);
        // They are asked for when a message is there.
        drop(changes);
        Arc::new(Self {
            reader: reader(),
            lastread: of(bucket::LASTREAD),
            claims: of(bucket::PUSHED),
            turns: Turns::new(config.push.concurrency),
            badges: Arc::default(),
            providers: Arc::new(providers),
            streams,
            people,
            markers,
            remembered,
            origins,
            online,
            links: links.clone(),
            tasks: tasks.clone(),
            config,
        })
    }

    /// All unread messages of a user, in the rooms that the user is in; `None` if they can't be counted now, or are not
    /// to be.
    async fn badge(&self, user: &str) -> Option<u64> {
        if !self.config.push.badge {
            return None;
        }
        let count = async {
            let rooms = self.people.rooms_of(user).await?;
            let is_durable = |room: &RoomId| {
                let namespace = self.config.namespaces.get(room.namespace());
                namespace.is_some_and(|its| its.durable)
            };
            let rooms = rooms.iter().filter(|(_, entry)| entry.is_in());
            let rooms = rooms.map(|(room, _)| room).filter(|room| is_durable(room));
            let rooms: Vec<&RoomId> = rooms.take(self.config.limits.unread_rooms).collect();
            let unread = self.markers.unread(user, rooms, Counted::Unread).await?;
            Ok::<u64, crate::protocol::Refused>(unread.values().map(|unread| unread.count).sum())
        };
        match count.await {
            Ok(count) => Some(count),
            Err(error) => {
                tracing::debug!(%error, "unread messages can't be counted");
                None
            }
        }
    }

    /// Updates the gauges, forever.
    async fn keep_figures(self: Arc<Self>) {
        let streams = rooms_of(&self.streams, &self.config);
        loop {
            let connection = &self.links.connection;
            let wait = self.config.nats.read_timeout;
            let figures = behind(connection, &self.reader, wait, &streams, PUSH_CONSUMER);
            match figures.await {
                Ok(behind) => {
                    set_gauge(Gauge::PushPending, behind.pending);
                    set_gauge(Gauge::PushLag, behind.lag);
                }
                Err(error) => tracing::debug!(%error, "the lag of notifications is not known"),
            }
            tokio::time::sleep(KEEP).await;
        }
    }
}

impl Notifier {
    /// Binds the address. The work begins when the streams can be reached.
    ///
    /// # Errors
    /// [`NotifierError`].
    pub async fn start(config: Config) -> Result<Self, NotifierError> {
        if !config.push.is_on() {
            return Err(ServiceError::None("service of [push]").into());
        }
        let providers = Providers::new(&config.push).map_err(NotifierError::Key)?;
        let listen = ("push.listen", config.push.listen);
        let service = Service::start(&config, "natter notifier", listen).await?;
        let (line, driver) = Line::new(&config.nats, "natter notifier publish")?;
        service.tasks.keep_running("publish", driver.run(()));
        let (links, tasks) = (service.links.clone(), service.tasks.clone());
        let lifecycle = service.lifecycle.clone();
        let config = Arc::new(config);
        let to_publish = line.clone();
        service.tasks.spawn_until_stopping("start", async move {
            let parts = Parts::open(config, (links, tasks), to_publish, providers).await;
            let tasks = &parts.tasks;
            tasks.keep_running("keep figures", Arc::clone(&parts).keep_figures());
            tasks.keep_running("keep badges", badges::keep(Arc::clone(&parts)));
            let mut opened = Vec::new();
            for part in 0..parts.streams.partitions() {
                let (open, first) = oneshot::channel();
                opened.push(first);
                tasks.spawn_essential("take", take::run(Arc::clone(&parts), part, open));
            }
            // A consumer gets only what is stored after its creation.
            if try_join_all(opened).await.is_ok() {
                lifecycle.advance(Phase::Ready);
                tracing::info!("notifier ready");
            }
        });
        Ok(Self { service, line })
    }

    /// Waits until a part fails that the process can't do without, and returns its name. Cancel-safe.
    pub async fn failed(&self) -> String {
        self.service.failed().await
    }

    /// Shuts down in order: takes no more messages, and waits for the open requests.
    ///
    /// # Errors
    /// [`Late`] if a task had to be cut.
    pub async fn drain(self) -> Result<(), Late> {
        let Self { service, line } = self;
        service.drain(async move { line.close().await }).await
    }
}
