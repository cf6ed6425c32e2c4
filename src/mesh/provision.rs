//! Creates and updates the streams and buckets of a mesh's regions from the definitions in `nats/`.
//!
//! Not for the hot path: it is used only by tools and by `natter up`. Streams of others are never touched. The only
//! streams ever deleted are mirrors, and only on request.
//!
//! # Invariants
//! - A second run without other changes does nothing.
//! - A change that would drop stored messages, or shorten the memory for retried publishes, is made only with
//!   [`Options::allow_destructive`]. Otherwise that field is left as it is, and reported.
//! - The epoch of a stream is made once, when the stream is created, and then kept.
//! - This module uses the JSON of the API, not the types of a client. So fields that are newer than this code survive
//!   an update.

mod definition;
mod jetstream;
mod plan;
mod regions;

use std::{collections::BTreeSet, fmt, io, time::Duration};

use async_nats::{Client, ConnectOptions, Event, ServerAddr, ServerError};
use serde_json::Value;
use tokio::sync::watch;

pub use definition::{Definition, definitions};
pub(super) use jetstream::JetStream;
pub(super) use plan::plan as plan_stream;
pub use plan::{Action, Outcome, Verdict};
pub use regions::{Provisioned, known_regions, provision_mesh, remove_region};
pub(super) use regions::{is_mirror, metadata, regions_of};

use crate::{
    bus::{STREAMS_WATCH, new_inbox},
    config::{self, Config},
    model::{MAX_REGIONS, Region},
    subject::{self, PARTITIONS_METADATA, Subjects},
};

/// Timeout of one request to JetStream. Creating a stream with three replicas waits for an election.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// The subjects that the server has denied on one connection.
pub(super) type Denials = watch::Receiver<BTreeSet<String>>;

/// Time for edges and history services to follow a changed list of regions.
const EDGES_FOLLOW: Duration = STREAMS_WATCH
    .saturating_mul(2)
    .saturating_add(Duration::from_secs(5));

/// Options of a run.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Only report what would be done.
    pub dry_run: bool,
    /// Also make changes that may drop stored messages.
    pub allow_destructive: bool,
    /// How long the mirrors of a region are kept after it was removed from the lists, since edges still read them.
    pub edges_follow: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            dry_run: false,
            allow_destructive: false,
            edges_follow: EDGES_FOLLOW,
        }
    }
}

/// The streams could not be brought to their definitions.
#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    /// There is no connection.
    #[error("no connection to NATS at {url}")]
    Connect {
        url: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A file or an address of the configuration is wrong.
    #[error("nats: {what}")]
    Settings { what: String, source: io::Error },
    /// A request was not answered in time.
    #[error("JetStream did not answer {request} within {REQUEST_DEADLINE:?}")]
    Timeout { request: String },
    /// The user has no permission for the request.
    #[error("the user of nats.user may not publish to {request}")]
    Denied { request: String },
    /// A request could not be sent, or has no responder.
    #[error("JetStream: {request} failed; is JetStream enabled for this account?")]
    Request {
        request: String,
        source: async_nats::client::RequestError,
    },
    /// The server answered with an error.
    #[error("JetStream refused {request}: {description} (error {code})")]
    Refused {
        request: String,
        description: String,
        code: u64,
    },
    /// An answer has an unexpected form.
    #[error("JetStream's answer to {request} can't be parsed")]
    Answer {
        request: String,
        source: serde_json::Error,
    },
    /// The JetStream domain of the configured region is not the one by which other regions reach it.
    #[error(
        "nats.url leads to the JetStream domain {found:?}, but must lead to the one named {region}"
    )]
    Domain { region: Region, found: String },
    /// More regions than a cursor can name.
    #[error("a mesh of {count} regions: at most {MAX_REGIONS}, the limit of a cursor")]
    TooManyRegions { count: usize },
    /// The mesh was created with another number of partitions.
    #[error(
        "nats.partitions = {wanted}, but the mesh was created with {found} (stream {stream}): the number is fixed at creation, since rooms would move to other streams"
    )]
    Partitions {
        wanted: u16,
        found: String,
        stream: String,
    },
}

/// Connects with the given settings, for a tool: it does not reconnect, and every wait is bounded.
///
/// # Errors
/// [`ProvisionError::Connect`] and [`ProvisionError::Settings`].
pub async fn connect(nats: &config::Nats) -> Result<Client, ProvisionError> {
    let (client, _denials) = connect_with_denials(nats, "natter provision").await?;
    Ok(client)
}

/// Like [`connect`], and also returns the denied subjects (publish or subscribe) of the connection. A denied request
/// gets no other answer.
pub(super) async fn connect_with_denials(
    nats: &config::Nats,
    name: &str,
) -> Result<(Client, Denials), ProvisionError> {
    let (denied, denials) = watch::channel(BTreeSet::new());
    let settings = |what: &str| {
        let what = what.to_owned();
        move |source| ProvisionError::Settings { what, source }
    };
    let mut options = ConnectOptions::new()
        .name(name)
        .custom_inbox_prefix(new_inbox(nats))
        .event_callback(move |event| {
            if let Event::ServerError(ServerError::Other(text)) = event
                && let Some(subject) = denied_subject(&text)
            {
                denied.send_modify(|denied| {
                    denied.insert(subject.to_owned());
                });
            }
            std::future::ready(())
        })
        .connection_timeout(REQUEST_DEADLINE)
        .request_timeout(Some(REQUEST_DEADLINE));
    if !nats.user.is_empty() {
        options = options.user_and_password(nats.user.clone(), nats.password.expose().to_owned());
    }
    if !nats.creds_file.as_os_str().is_empty() {
        options = options
            .credentials_file(&nats.creds_file)
            .await
            .map_err(settings(&format!(
                "creds_file = {}: can't be used",
                nats.creds_file.display()
            )))?;
    }
    let servers = nats
        .url
        .split(',')
        .map(|url| url.trim().parse::<ServerAddr>())
        .collect::<Result<Vec<_>, _>>()
        .map_err(settings(&format!("url = {:?}: not an address", nats.url)))?;
    // Each server is tried once.
    let options = options.max_reconnects(servers.len());
    let failed = |source| ProvisionError::Connect {
        url: nats.url.clone(),
        source,
    };
    match tokio::time::timeout(REQUEST_DEADLINE, options.connect(servers)).await {
        Ok(Ok(client)) => Ok((client, denials)),
        Ok(Err(error)) => Err(failed(Box::new(error))),
        Err(elapsed) => Err(failed(Box::new(elapsed))),
    }
}

/// The subject in `Permissions Violation for Publish to "natter.in.x"`, or `… for Subscription to …`.
fn denied_subject(error: &str) -> Option<&str> {
    let lower = error.get(.."permissions violation".len())?;
    let (_, rest) = error.split_once('"')?;
    let (subject, _) = rest.split_once('"')?;
    lower
        .eq_ignore_ascii_case("permissions violation")
        .then_some(subject)
}

/// Brings the streams and buckets of the configured region to their definitions. Returns one outcome per stream, in
/// order.
///
/// # Errors
/// [`ProvisionError`]. What was done before the error is kept, and another run continues from there.
pub async fn provision(
    client: &Client,
    config: &Config,
    options: Options,
) -> Result<Vec<Outcome>, ProvisionError> {
    let only = BTreeSet::from([config.region()]);
    let provisioned = provision_mesh(client, config, &only, options).await?;
    match provisioned.unreachable.into_values().next() {
        None => Ok(provisioned.outcomes),
        Some(error) => Err(error),
    }
}

/// Fails if any room stream of this mesh (own or mirrored, recognised by its subjects) was created for another number
/// of partitions.
async fn check_partitions(
    jetstream: &JetStream<'_>,
    subjects: &Subjects,
    wanted: u16,
) -> Result<(), ProvisionError> {
    for stream in jetstream.stream_names().await? {
        let Some((_, part)) = subject::parse_rooms_stream(&stream) else {
            continue;
        };
        let Some(config) = jetstream.stream_config(&stream).await? else {
            continue;
        };
        let of_this_mesh = config
            .get("republish")
            .and_then(|republish| republish.get("src"))
            .and_then(Value::as_str)
            .is_some_and(|src| src.starts_with(&subjects.captured_prefix()));
        if !of_this_mesh {
            continue;
        }
        let recorded = config
            .get("metadata")
            .and_then(|metadata| metadata.get(PARTITIONS_METADATA))
            .and_then(Value::as_str);
        let found = match recorded {
            Some(number) if number != wanted.to_string() => number.to_owned(),
            Some(_) => continue,
            // Created by hand, without the metadata: a higher partition at least shows that there are more.
            None if part >= wanted => format!("at least {}", u32::from(part) + 1),
            None => continue,
        };
        return Err(ProvisionError::Partitions {
            wanted,
            found,
            stream,
        });
    }
    Ok(())
}

/// Whether JetStream answers. For callers that wait until a server is ready.
///
/// # Errors
/// [`ProvisionError`]
pub async fn ping(client: &Client) -> Result<(), ProvisionError> {
    JetStream::here(client).ping().await
}

impl ProvisionError {
    /// The error without the subject of the request, so that the same error of many streams looks the same.
    #[must_use]
    pub fn brief(&self) -> String {
        match self {
            Self::Timeout { .. } => format!("no answer within {REQUEST_DEADLINE:?}"),
            Self::Request { source, .. } => source.kind().to_string(),
            Self::Refused {
                description, code, ..
            } => format!("{description} (error {code})"),
            Self::Connect { .. }
            | Self::Settings { .. }
            | Self::Denied { .. }
            | Self::Answer { .. }
            | Self::Domain { .. }
            | Self::TooManyRegions { .. }
            | Self::Partitions { .. } => self.to_string(),
        }
    }

    /// Whether nobody answered, so that a retry may succeed.
    #[must_use]
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Timeout { .. } | Self::Request { .. })
    }
}

impl fmt::Display for definition::Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rooms { part } => write!(f, "partition {part}"),
            Self::Dead => f.write_str("dead letters"),
            Self::Bucket { bucket } => f.write_str(bucket),
        }
    }
}

impl Definition {
    /// The region whose messages or keys the stream holds.
    #[must_use]
    pub fn origin(&self) -> &Region {
        &self.origin
    }
}
