//! What the edge knows of the streams it reads: their epochs and where they begin.
//!
//! [`Streams`] are those of one origin, as this region has them: its own, or its mirrors of another region's. [`Origins`] are
//! all of them. Both are read in the region's own domain, under the same names: nobody has to know which is which.

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

/// How often the streams are looked for while they are not there.
const RETRY: Duration = Duration::from_secs(1);

/// A stream of several copies whose leader has just been elected may tell less than there is, until it has applied what the
/// others have: only after so many looks has it lost its end.
const LOOKS: u32 = 10;

/// Pause between two of these.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// In this time all copies of a stream have got what its leader had.
const COPIES_FOLLOW: Duration = Duration::from_secs(1);

/// The state of one stream, as last seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamState {
    /// The incarnation it says it is.
    pub epoch: Epoch,
    /// How often this edge saw it begin anew: with another epoch, or, when a store was rolled back, with the same.
    pub incarnation: u32,
    /// First sequence that it still holds (one more than the last where it is empty).
    pub first_seq: u64,
    /// Its newest sequence.
    pub last_seq: u64,
    /// Whether there are several copies of it: then the one that answers may be behind for a moment, a new leader too.
    pub replicated: bool,
}

/// How often edges and history services look at every stream, and whether a region has joined or left the mesh: it takes them
/// up to twice as long to notice.
pub const STREAMS_WATCH: Duration = Duration::from_secs(10);

/// A stream's state can't be known.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// No answer in time; also while NATS is away.
    #[error("stream {stream}: no answer within {waited:?}")]
    Timeout { stream: String, waited: Duration },
    /// It does not exist.
    #[error("stream {stream} does not exist: run `natter provision`")]
    Missing { stream: String },
    /// It has no epoch.
    #[error("stream {stream} has no metadata {EPOCH_METADATA}: run `natter provision`")]
    NoEpoch { stream: String },
    /// The server answered with an error, or not with JSON.
    #[error("stream {stream}: {problem}")]
    Refused { stream: String, problem: String },
}

/// The streams of one origin's rooms, shared by all parts of an edge.
#[derive(Debug)]
pub struct Streams {
    connection: Connection,
    origin: Region,
    timeout: Duration,
    parts: Vec<Part>,
    /// Changes with every incarnation that changes.
    version: AtomicU64,
    /// The regions of the mesh, as the first stream said last.
    regions: RwLock<Vec<Region>>,
}

/// The streams of all origins that this region sees.
#[derive(Debug)]
pub struct Origins {
    config: config::Nats,
    own: Arc<Streams>,
    /// Those of other regions, in the order in which they were found.
    others: RwLock<Vec<Arc<Streams>>>,
    /// Changes when an origin comes or goes.
    version: AtomicU64,
}

#[derive(Debug)]
struct Part {
    stream: Arc<str>,
    known: RwLock<Known>,
    /// Newest sequence that anybody on this edge has seen of it.
    newest: AtomicU64,
    /// How often it was heard to have a new leader.
    elections: AtomicU64,
    /// Held by who looks because of a suspicion.
    verifying: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Known {
    state: StreamState,
    /// When it was asked for.
    seen: Instant,
    /// Its newest sequence at an earlier look, [`COPIES_FOLLOW`] before that one at least.
    earlier: u64,
}

impl Streams {
    /// Looks at every stream of the region.
    ///
    /// # Errors
    /// The first [`StreamError`]: an edge can't serve durable rooms before all its streams are there.
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

    /// As [`Self::load`], as soon as the streams are there; says what it waits for, once each.
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

    /// The regions of the mesh, as the first stream said when it was looked at last.
    #[must_use]
    pub fn regions(&self) -> Vec<Region> {
        self.regions.read().clone()
    }

    /// How many there are.
    #[must_use]
    pub fn partitions(&self) -> u16 {
        u16::try_from(self.parts.len()).expect("made from a u16")
    }

    /// The state of `part` as last seen. First and last sequence may be behind the truth, never ahead of it (within an
    /// incarnation).
    #[must_use]
    pub fn known(&self, part: u16) -> StreamState {
        self.parts[usize::from(part)].known.read().state
    }

    /// A sequence up to which whatever copy answers has everything: what it does not have there is not stored.
    #[must_use]
    pub fn settled(&self, part: u16) -> u64 {
        let known = self.parts[usize::from(part)].known.read();
        match known.state.replicated && known.seen.elapsed() < COPIES_FOLLOW {
            true => known.earlier,
            false => known.state.last_seq,
        }
    }

    /// Changes with every incarnation that was seen to change.
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

    /// The highest sequence that the stream of `part` is known to have reached. What is published after this was asked gets
    /// a higher one, unless the stream has begun anew.
    #[must_use]
    pub fn newest(&self, part: u16) -> u64 {
        self.parts[usize::from(part)].newest.load(Ordering::Acquire)
    }

    /// A leader was elected of one of the streams, if it is one of these.
    fn note_election(&self, stream: &str) {
        if let Some(part) = self.parts.iter().find(|part| *part.stream == *stream) {
            part.elections.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Looks at a stream now.
    ///
    /// # Errors
    /// [`StreamError`]; what was known stays.
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
        // Whatever was seen before we asked must be in the answer; if it is not, the store lost its end.
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

    /// Looks at a stream because at `since` something did not fit what was known of it; once for all who ask meanwhile.
    ///
    /// # Errors
    /// [`StreamError`]; what was known stays.
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

    /// Looks at every stream once, in the course of `interval`.
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
    /// The streams of the own region as soon as they are there, and what there is of the others'. Those that come later are found by
    /// [`Self::watch`].
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

    /// The region's own streams: those that it writes to.
    #[must_use]
    pub fn own(&self) -> &Arc<Streams> {
        &self.own
    }

    /// The streams of all origins, the own first.
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

    /// Whether `epoch` is the one that the stream of `part` of `origin` has now.
    #[must_use]
    pub fn is_current(&self, origin: &Region, part: u16, epoch: Epoch) -> bool {
        self.get(origin)
            .is_some_and(|streams| streams.known(part).epoch == epoch)
    }

    /// Changes when an origin comes or goes.
    #[must_use]
    pub fn members_version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Changes with every incarnation that was seen to change, and when an origin comes or goes.
    #[must_use]
    pub fn version(&self) -> u64 {
        let others = self.others.read();
        let changes: u64 = others.iter().map(|streams| streams.version()).sum();
        // A lost origin takes its changes along: so each coming and going weighs more than all of them.
        (self.members_version() << 32) + changes + self.own.version()
    }

    /// Changes when a stream of `part` was heard to have a new leader, of whatever origin. What the old one stored last it may not
    /// have republished.
    #[must_use]
    pub fn elections(&self, part: u16) -> u64 {
        let all = self.all();
        let of = |streams: &Arc<Streams>| {
            let part = &streams.parts[usize::from(part)];
            part.elections.load(Ordering::Acquire)
        };
        all.iter().map(of).sum()
    }

    /// Hears of elections, for ever. Without the permission to, it hears of none, and what was not republished is found when rooms
    /// are compared anyway.
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

    /// Looks at every stream every `interval`, for ever: a stream that was re-created is noticed even if nobody speaks, and a
    /// region that joins or leaves the mesh too.
    pub async fn watch(self: Arc<Self>, interval: Duration) {
        loop {
            for streams in self.all() {
                let share = interval / u32::try_from(self.others.read().len() + 1).unwrap_or(1);
                streams.look_around(share).await;
            }
            self.look_for_others().await;
        }
    }

    /// Takes in the mirrors of regions that the own streams name, and gives up those they do not name any more.
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

/// The incarnation of a stream in another region's domain.
///
/// # Errors
/// [`StreamError`]; also when that region can't be reached.
pub async fn epoch_elsewhere(
    connection: &Connection,
    region: &Region,
    stream: &str,
    wait: Duration,
) -> Result<Epoch, StreamError> {
    let state = look_elsewhere(connection, region, stream, wait).await?;
    Ok(state.epoch)
}

/// The newest sequence of a stream as another region has it: of a mirror, how far it has come.
///
/// # Errors
/// [`StreamError`]; also when that region can't be reached.
pub async fn newest_elsewhere(
    connection: &Connection,
    region: &Region,
    stream: &str,
    wait: Duration,
) -> Result<u64, StreamError> {
    let state = look_elsewhere(connection, region, stream, wait).await?;
    Ok(state.last_seq)
}

/// How a stream stands in another region's domain.
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

/// The regions of the mesh, as the streams of `own` name them.
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
