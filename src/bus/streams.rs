//! What the edge knows of the streams it reads: their epochs and first sequences.
//!
//! [`Streams`] are the streams of one origin, as this region has them: the region's own, or mirrors of another
//! region's. [`Origins`] holds all of them. Both are read in the region's own domain under the same names, so callers
//! need not distinguish an origin from a mirror.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt as _;
use parking_lot::RwLock;
use tokio::time::{Instant, sleep, timeout};

use super::{
    Connection,
    jetstream::{self, ApiError, Problem, StreamInfo},
};
use crate::{
    config,
    model::{Epoch, Region},
    subject::{EPOCH_METADATA, REGIONS_METADATA, api, rooms_stream},
};

/// Pause between attempts to load the streams while they do not exist.
const RETRY: Duration = Duration::from_secs(1);

/// A newly elected leader of a replicated stream may report an older state until it has applied what the other replicas
/// have. Only after this many reads is the end of the stream considered lost.
const LOOKS: u32 = 10;

/// Pause between two of these reads.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Time after which all replicas of a stream are assumed to have what its leader had.
const COPIES_FOLLOW: Duration = Duration::from_secs(1);

/// The state of one stream, as last seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamState {
    /// Its epoch.
    pub epoch: Epoch,
    /// How many times this edge saw the stream begin again: with another epoch, or with the same one after its store
    /// was rolled back.
    pub incarnation: u32,
    /// The first sequence it still holds (one more than the last if it is empty).
    pub first_seq: u64,
    /// Its newest sequence.
    pub last_seq: u64,
    /// Whether the stream has several replicas. The one that answers may then lag behind for a moment, also a new
    /// leader.
    pub replicated: bool,
}

/// Interval at which edges and history services read the state of every stream, and the list of regions. It takes up to
/// twice this time to notice that a region has joined or left the mesh.
pub const STREAMS_WATCH: Duration = Duration::from_secs(10);

/// The state of a stream is not known.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// No answer in time, or NATS can't be reached.
    #[error("stream {stream}: no answer within {waited:?}")]
    Timeout { stream: String, waited: Duration },
    /// It does not exist.
    #[error("stream {stream} does not exist: run `natter provision`")]
    Missing { stream: String },
    /// It has no epoch in its metadata.
    #[error("stream {stream} has no metadata {EPOCH_METADATA}: run `natter provision`")]
    NoEpoch { stream: String },
    /// The server answered with an error, or not with JSON.
    #[error("stream {stream}: {problem}")]
    Refused { stream: String, problem: String },
}

/// The streams of one origin's rooms. All shards of an edge share them.
#[derive(Debug)]
pub struct Streams {
    connection: Connection,
    origin: Region,
    timeout: Duration,
    parts: Vec<Part>,
    /// Changes whenever the incarnation of a stream changes.
    version: AtomicU64,
    /// The regions of the mesh, as the first stream last named them.
    regions: RwLock<Vec<Region>>,
}

/// The streams of all origins that this region sees.
#[derive(Debug)]
pub struct Origins {
    config: config::Nats,
    own: Arc<Streams>,
    /// The streams of other regions, in the order in which they were found.
    others: RwLock<Vec<Arc<Streams>>>,
    /// Changes when an origin is added or removed.
    version: AtomicU64,
}

#[derive(Debug)]
struct Part {
    stream: Arc<str>,
    known: RwLock<Known>,
    /// The newest sequence of the stream seen by any part of this edge.
    newest: AtomicU64,
    /// The number of leader elections reported.
    elections: AtomicU64,
    /// Held during a read that was caused by a suspicion.
    verifying: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Known {
    state: StreamState,
    /// When the state was requested.
    seen: Instant,
    /// The newest sequence at an earlier read, at least [`COPIES_FOLLOW`] before this one.
    earlier: u64,
}

impl Streams {
    /// Reads the state of every stream of `origin`.
    ///
    /// # Errors
    /// The first [`StreamError`]: an edge can't serve durable rooms before all streams exist.
    pub async fn load(
        connection: Connection,
        origin: Region,
        config: &config::Nats,
    ) -> Result<Arc<Self>, StreamError> {
        let mut parts = Vec::new();
        let mut regions = Vec::new();
        for part in 0..config.partitions {
            let stream = rooms_stream(&origin, part);
            let (state, named) = look(
                &connection,
                api::stream_info(&stream),
                &stream,
                config.read_timeout,
            )
            .await?;
            if part == 0 {
                regions = named;
            }
            parts.push(Part {
                stream: stream.into(),
                newest: AtomicU64::new(state.last_seq),
                elections: AtomicU64::new(0),
                verifying: tokio::sync::Mutex::default(),
                known: RwLock::new(Known {
                    state,
                    seen: Instant::now(),
                    earlier: 0,
                }),
            });
        }
        Ok(Arc::new(Self {
            connection,
            origin,
            timeout: config.read_timeout,
            parts,
            version: AtomicU64::new(0),
            regions: RwLock::new(regions),
        }))
    }

    /// Like [`Self::load`], but waits until the streams exist. It logs each different reason for waiting.
    pub async fn wait_for(
        connection: &Connection,
        origin: &Region,
        config: &config::Nats,
    ) -> Arc<Self> {
        let mut told = String::new();
        loop {
            match Self::load(connection.clone(), origin.clone(), config).await {
                Ok(streams) => return streams,
                Err(error) => {
                    let text = error.to_string();
                    if text != told {
                        tracing::warn!(error = %text, "waiting for the streams");
                        told = text;
                    }
                    sleep(RETRY).await;
                }
            }
        }
    }

    /// The region whose streams these are.
    #[must_use]
    pub fn origin(&self) -> &Region {
        &self.origin
    }

    /// The name of the stream of `part`.
    #[must_use]
    pub fn stream(&self, part: u16) -> &Arc<str> {
        &self.parts[usize::from(part)].stream
    }

    /// The regions of the mesh, as the first stream named them when it was last read.
    #[must_use]
    pub fn regions(&self) -> Vec<Region> {
        self.regions.read().clone()
    }

    /// The number of partitions.
    #[must_use]
    pub fn partitions(&self) -> u16 {
        u16::try_from(self.parts.len()).expect("made from a u16")
    }

    /// The last seen state of `part`. Within an incarnation, the first and last sequence may lag behind the truth, but
    /// are never ahead of it.
    #[must_use]
    pub fn known(&self, part: u16) -> StreamState {
        self.parts[usize::from(part)].known.read().state
    }

    /// The sequence up to which every replica has everything: a message that a replica does not have there is not
    /// stored.
    #[must_use]
    pub fn settled(&self, part: u16) -> u64 {
        let known = self.parts[usize::from(part)].known.read();
        match known.state.replicated && known.seen.elapsed() < COPIES_FOLLOW {
            true => known.earlier,
            false => known.state.last_seq,
        }
    }

    /// Changes whenever a stream was seen to begin a new incarnation.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Notes that the stream of `part` has reached `seq`.
    pub fn note(&self, part: u16, seq: u64) {
        self.parts[usize::from(part)]
            .newest
            .fetch_max(seq, Ordering::AcqRel);
    }

    /// The highest sequence that the stream of `part` is known to have reached. A message published after this call
    /// gets a higher one, unless the stream has begun again.
    #[must_use]
    pub fn newest(&self, part: u16) -> u64 {
        self.parts[usize::from(part)].newest.load(Ordering::Acquire)
    }

    /// Notes the election of a leader, if `stream` is one of these streams.
    fn note_election(&self, stream: &str) {
        if let Some(part) = self.parts.iter().find(|part| *part.stream == *stream) {
            part.elections.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Reads the state of a stream from the server now.
    ///
    /// # Errors
    /// [`StreamError`]. The known state is kept.
    pub async fn fetch(&self, part: u16) -> Result<StreamState, StreamError> {
        let slot = &self.parts[usize::from(part)];
        let newest = slot.newest.load(Ordering::Acquire);
        let mut looks = 0;
        let (mut state, regions, seen) = loop {
            let seen = Instant::now();
            let (state, regions) = look(
                &self.connection,
                api::stream_info(&slot.stream),
                &slot.stream,
                self.timeout,
            )
            .await?;
            looks += 1;
            let before = slot.known.read().state.epoch;
            let behind = state.replicated && state.epoch == before && state.last_seq < newest;
            if !behind || looks == LOOKS {
                break (state, regions, seen);
            }
            sleep(LOOK_AGAIN).await;
        };
        if part == 0 {
            *self.regions.write() = regions;
        }
        let mut known = slot.known.write();
        let before = known.state;
        state.incarnation = before.incarnation;
        // Everything seen before the request must be in the answer. Otherwise the store has lost its end.
        if state.epoch != before.epoch || state.last_seq < newest {
            tracing::warn!(
                stream = &*slot.stream, before = %before.epoch, now = %state.epoch, newest, last_seq = state.last_seq,
                "the stream began anew",
            );
            state.incarnation += 1;
            slot.newest.store(state.last_seq, Ordering::Release);
        } else {
            slot.newest.fetch_max(state.last_seq, Ordering::AcqRel);
        }
        let earlier = if state.incarnation != before.incarnation {
            0
        } else if known.seen.elapsed() >= COPIES_FOLLOW {
            before.last_seq
        } else {
            known.earlier
        };
        *known = Known {
            state,
            seen,
            earlier,
        };
        drop(known);
        if state.incarnation != before.incarnation {
            self.version.fetch_add(1, Ordering::AcqRel);
        }
        Ok(state)
    }

    /// Reads the state of a stream because at `since` something contradicted its known state. Concurrent callers share
    /// one read.
    ///
    /// # Errors
    /// [`StreamError`]. The known state is kept.
    pub async fn verify(&self, part: u16, since: Instant) -> Result<StreamState, StreamError> {
        let _turn = self.parts[usize::from(part)].verifying.lock().await;
        let (state, seen) = {
            let known = self.parts[usize::from(part)].known.read();
            (known.state, known.seen)
        };
        if seen > since {
            Ok(state)
        } else {
            self.fetch(part).await
        }
    }

    /// Reads the state of every stream once, spread over `interval`.
    async fn look_around(&self, interval: Duration) {
        let pause = interval / u32::from(self.partitions());
        for part in 0..self.partitions() {
            sleep(pause).await;
            if let Err(error) = self.fetch(part).await
                && self.connection.is_up()
            {
                tracing::warn!(error = %error, "a stream's state is not known");
            }
        }
    }
}

impl Origins {
    /// Waits for the streams of the own region, and loads those of the other regions that can be read. [`Self::watch`]
    /// finds the rest.
    pub async fn wait_for(
        connection: &Connection,
        own: &Region,
        config: &config::Nats,
    ) -> Arc<Self> {
        let own = Streams::wait_for(connection, own, config).await;
        let origins = Self {
            config: config.clone(),
            own,
            others: RwLock::default(),
            version: AtomicU64::new(0),
        };
        origins.look_for_others().await;
        Arc::new(origins)
    }

    /// The region's own streams, the only ones it writes to.
    #[must_use]
    pub fn own(&self) -> &Arc<Streams> {
        &self.own
    }

    /// The streams of all origins, the own ones first.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Streams>> {
        let others = self.others.read();
        let all = std::iter::once(&self.own).chain(others.iter());
        all.cloned().collect()
    }

    /// The streams of one origin.
    #[must_use]
    pub fn get(&self, origin: &Region) -> Option<Arc<Streams>> {
        if origin == self.own.origin() {
            return Some(Arc::clone(&self.own));
        }
        let others = self.others.read();
        others.iter().find(|s| s.origin() == origin).cloned()
    }

    /// Whether `epoch` is the current epoch of the stream of `part` of `origin`.
    #[must_use]
    pub fn is_current(&self, origin: &Region, part: u16, epoch: Epoch) -> bool {
        self.get(origin)
            .is_some_and(|streams| streams.known(part).epoch == epoch)
    }

    /// Changes when an origin is added or removed.
    #[must_use]
    pub fn members_version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Changes when a stream was seen to begin a new incarnation, and when an origin is added or removed.
    #[must_use]
    pub fn version(&self) -> u64 {
        let others = self.others.read();
        let changes: u64 = others.iter().map(|streams| streams.version()).sum();
        // An origin that is removed takes its changes out of the sum. So a change of the members weighs more than all
        // of them.
        (self.members_version() << 32) + changes + self.own.version()
    }

    /// Changes when a new leader was elected for a stream of `part`, of any origin. The old leader may not have
    /// republished the last messages it stored.
    #[must_use]
    pub fn elections(&self, part: u16) -> u64 {
        let all = self.all();
        let of = |streams: &Arc<Streams>| {
            let part = &streams.parts[usize::from(part)];
            part.elections.load(Ordering::Acquire)
        };
        all.iter().map(of).sum()
    }

    /// Listens for leader elections, until the subscription ends. Without the permission to subscribe there are no
    /// reports; messages that were not republished are then found by the regular comparison of rooms.
    pub async fn hear_elections(self: Arc<Self>) {
        let subject = format!("{}*", api::LEADER_ELECTED);
        let mut elected = match self.own.connection.client().subscribe(subject).await {
            Ok(elected) => elected,
            Err(error) => return tracing::warn!(%error, "elections are not heard of"),
        };
        while let Some(message) = elected.next().await {
            let stream = message.subject.strip_prefix(api::LEADER_ELECTED);
            for streams in self.all() {
                streams.note_election(stream.unwrap_or_default());
            }
        }
    }

    /// Reads the state of every stream about once per `interval`, forever. So it notices a re-created stream without
    /// any traffic, and regions that join or leave the mesh.
    pub async fn watch(self: Arc<Self>, interval: Duration) {
        loop {
            for streams in self.all() {
                let share = interval / u32::try_from(self.others.read().len() + 1).unwrap_or(1);
                streams.look_around(share).await;
            }
            self.look_for_others().await;
        }
    }

    /// Adds the mirrors of regions that the own streams name, and removes those of regions that they no longer name.
    async fn look_for_others(&self) {
        let named: Vec<Region> = {
            let regions = self.own.regions.read();
            let others = regions.iter().filter(|region| *region != self.own.origin());
            others.cloned().collect()
        };
        for region in &named {
            if self.get(region).is_some() {
                continue;
            }
            let connection = self.own.connection.clone();
            match Streams::load(connection, region.clone(), &self.config).await {
                Ok(streams) => {
                    tracing::info!(origin = %region, "the rooms of another region are seen here");
                    self.others.write().push(streams);
                    self.version.fetch_add(1, Ordering::AcqRel);
                }
                Err(error) => {
                    tracing::warn!(origin = %region, error = %error, "a region of the mesh is not mirrored here yet");
                }
            }
        }
        let mut others = self.others.write();
        let before = others.len();
        others.retain(|streams| named.contains(streams.origin()));
        if others.len() != before {
            tracing::info!("a region has left the mesh");
            self.version.fetch_add(1, Ordering::AcqRel);
        }
    }
}

/// The epoch of a stream in another region's domain.
///
/// # Errors
/// [`StreamError`], also if that region can't be reached.
pub async fn epoch_elsewhere(
    connection: &Connection,
    region: &Region,
    stream: &str,
    wait: Duration,
) -> Result<Epoch, StreamError> {
    let state = look_elsewhere(connection, region, stream, wait).await?;
    Ok(state.epoch)
}

/// The newest sequence of a stream in another region's domain. For a mirror this is how far it has come.
///
/// # Errors
/// [`StreamError`], also if that region can't be reached.
pub async fn newest_elsewhere(
    connection: &Connection,
    region: &Region,
    stream: &str,
    wait: Duration,
) -> Result<u64, StreamError> {
    let state = look_elsewhere(connection, region, stream, wait).await?;
    Ok(state.last_seq)
}

/// The state of a stream in another region's domain.
async fn look_elsewhere(
    connection: &Connection,
    region: &Region,
    stream: &str,
    wait: Duration,
) -> Result<StreamState, StreamError> {
    let subject = api::in_domain(region, &api::stream_info(stream));
    let (state, _regions) = look(connection, subject, stream, wait).await?;
    Ok(state)
}

/// The regions of the mesh, as the first stream of `own` names them.
///
/// # Errors
/// [`StreamError`].
pub async fn mesh_regions(
    connection: &Connection,
    own: &Region,
    wait: Duration,
) -> Result<Vec<Region>, StreamError> {
    let stream = rooms_stream(own, 0);
    let (_state, regions) = look(connection, api::stream_info(&stream), &stream, wait).await?;
    Ok(regions)
}

async fn look(
    connection: &Connection,
    subject: String,
    stream: &str,
    wait: Duration,
) -> Result<(StreamState, Vec<Region>), StreamError> {
    let refused = |problem: String| StreamError::Refused {
        stream: stream.to_owned(),
        problem,
    };
    let asked = jetstream::ask(connection, subject, bytes::Bytes::new());
    match timeout(wait, asked).await {
        Err(_elapsed) => Err(StreamError::Timeout {
            stream: stream.to_owned(),
            waited: wait,
        }),
        Ok(Err(Problem::Refused(ApiError { code: 404, .. }))) => Err(StreamError::Missing {
            stream: stream.to_owned(),
        }),
        Ok(Err(problem)) => Err(refused(problem.into())),
        Ok(Ok(StreamInfo {
            config: Some(config),
            state: Some(state),
            ..
        })) => {
            let epoch = config
                .metadata
                .get(EPOCH_METADATA)
                .and_then(|text| Epoch::parse(text));
            let epoch = epoch.ok_or_else(|| StreamError::NoEpoch {
                stream: stream.to_owned(),
            })?;
            let regions = config.metadata.get(REGIONS_METADATA);
            let regions = regions.map_or("", String::as_str).split(',');
            let state = StreamState {
                epoch,
                incarnation: 0,
                first_seq: state.first_seq,
                last_seq: state.last_seq,
                replicated: config.num_replicas > 1,
            };
            Ok((state, regions.filter_map(Region::parse).collect()))
        }
        Ok(Ok(_)) => Err(refused("the answer has neither state nor error".to_owned())),
    }
}
