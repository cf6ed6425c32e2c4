//! Creates and updates a region's streams and buckets from the definitions in `nats/`.
//!
//! Not for the hot path: only `natter provision` and `natter up` come here. Streams that are not ours are never touched,
//! and nothing is ever deleted.
//!
//! # Invariants
//! - Running it twice changes nothing the second time.
//! - What would drop stored messages, or shorten the memory for retried publishes, is done only when
//!   [`Options::allow_destructive`] says so; otherwise that field is left as it is, and reported.
//! - The epoch of a stream is made once, when the stream is, and kept.
//! - It speaks the JSON of the API rather than a client's types, so fields that are newer than us survive an update.

mod definition;
mod plan;

use std::{fmt, io, time::Duration};

use async_nats::{Client, ConnectOptions, ServerAddr};
use serde_json::{Map, Value, json};

pub use definition::{Definition, definitions};
pub use plan::{Action, FieldChange, Outcome, Verdict};

use crate::{
    config::{self, Config},
    model::Region,
    subject::{self, PARTITIONS_METADATA, Subjects, api},
};

/// How long one request to JetStream may take. Creating a stream with three replicas waits for an election.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// `err_code` of "stream not found" (nats-server `errors.json`).
const STREAM_NOT_FOUND: u64 = 10059;

/// How to provision.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Only say what would be done.
    pub dry_run: bool,
    /// Also do what may drop stored messages.
    pub allow_destructive: bool,
}

/// Why the streams could not be brought to their definitions.
#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    /// No connection.
    #[error("no connection to NATS at {url}")]
    Connect {
        url: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A file or address of the configuration is wrong.
    #[error("nats: {what}")]
    Settings { what: String, source: io::Error },
    /// A request was not answered in time.
    #[error("JetStream did not answer {request} within {REQUEST_DEADLINE:?}")]
    Timeout { request: String },
    /// A request could not be sent, or nobody answers it.
    #[error("JetStream: {request} failed; is JetStream enabled for this account?")]
    Request {
        request: String,
        source: async_nats::client::RequestError,
    },
    /// The server said no.
    #[error("JetStream refused {request}: {description} (error {code})")]
    Refused {
        request: String,
        description: String,
        code: u64,
    },
    /// An answer is not what the API promises.
    #[error("JetStream's answer to {request} can't be understood")]
    Answer {
        request: String,
        source: serde_json::Error,
    },
    /// The mesh was made with another number of partitions.
    #[error(
        "nats.partitions = {wanted}, but the mesh was created with {found} (stream {stream}): the number is fixed at creation, since rooms would move to other streams"
    )]
    Partitions {
        wanted: u16,
        found: String,
        stream: String,
    },
}

/// Connects as the configuration says, for a tool: no reconnect, every wait bounded.
///
/// # Errors
/// [`ProvisionError::Connect`] and [`ProvisionError::Settings`].
pub async fn connect(nats: &config::Nats) -> Result<Client, ProvisionError> {
    let settings = |what: &str| {
        let what = what.to_owned();
        move |source| ProvisionError::Settings { what, source }
    };
    let mut options = ConnectOptions::new()
        .name("natter provision")
        .connection_timeout(REQUEST_DEADLINE)
        .request_timeout(Some(REQUEST_DEADLINE))
        .max_reconnects(1);
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
    let failed = |source| ProvisionError::Connect {
        url: nats.url.clone(),
        source,
    };
    match tokio::time::timeout(REQUEST_DEADLINE, options.connect(servers)).await {
        Ok(Ok(client)) => Ok(client),
        Ok(Err(error)) => Err(failed(Box::new(error))),
        Err(elapsed) => Err(failed(Box::new(elapsed))),
    }
}

/// Brings the streams and buckets of the configured region to their definitions; one outcome a stream, in their order.
///
/// # Errors
/// [`ProvisionError`]; what was done before it stays done, and a repeat goes on from there.
pub async fn provision(
    client: &Client,
    config: &Config,
    options: Options,
) -> Result<Vec<Outcome>, ProvisionError> {
    let subjects = Subjects::new(&config.nats.prefix);
    check_partitions(client, &subjects, config.nats.partitions).await?;
    let mut outcomes = Vec::new();
    for definition in definitions(config) {
        outcomes.push(provision_one(client, &definition, options).await?);
    }
    Ok(outcomes)
}

async fn provision_one(
    client: &Client,
    definition: &Definition,
    options: Options,
) -> Result<Outcome, ProvisionError> {
    let name = definition.stream.as_str();
    let outcome = match stream_config(client, name).await? {
        None => {
            if !options.dry_run {
                let config = Value::Object(definition.with_new_epoch());
                request(client, &api::stream_create(name), &config).await?;
            }
            Outcome::created(name)
        }
        Some(existing) => {
            let (outcome, merged) = plan::plan(definition, &existing, options.allow_destructive);
            if let (Some(merged), false) = (merged, options.dry_run) {
                request(client, &api::stream_update(name), &Value::Object(merged)).await?;
            }
            outcome
        }
    };
    Ok(outcome)
}

/// Refuses when any stream of rooms of this mesh (own or mirrored, told by its subjects) was made for another number of
/// partitions.
async fn check_partitions(
    client: &Client,
    subjects: &Subjects,
    wanted: u16,
) -> Result<(), ProvisionError> {
    for stream in stream_names(client).await? {
        let Some((_, part)) = subject::parse_rooms_stream(&stream) else {
            continue;
        };
        let Some(config) = stream_config(client, &stream).await? else {
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
            // Made by hand, without the metadata: a higher partition tells at least that there are more.
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

async fn stream_names(client: &Client) -> Result<Vec<String>, ProvisionError> {
    let mut names = Vec::new();
    loop {
        let page = request(client, api::STREAM_NAMES, &json!({ "offset": names.len() })).await?;
        let before = names.len();
        if let Some(streams) = page.get("streams").and_then(Value::as_array) {
            names.extend(
                streams
                    .iter()
                    .filter_map(|name| name.as_str().map(str::to_owned)),
            );
        }
        let total = page.get("total").and_then(Value::as_u64).unwrap_or(0);
        if names.len() == before || names.len() as u64 >= total {
            return Ok(names);
        }
    }
}

/// The configuration of a stream, or `None` where there is none of this name.
async fn stream_config(
    client: &Client,
    name: &str,
) -> Result<Option<Map<String, Value>>, ProvisionError> {
    match request(client, &api::stream_info(name), &json!({})).await {
        Ok(mut info) => Ok(match info.get_mut("config").map(Value::take) {
            Some(Value::Object(config)) => Some(config),
            _ => None,
        }),
        Err(ProvisionError::Refused {
            code: STREAM_NOT_FOUND,
            ..
        }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// One request to the API, within [`REQUEST_DEADLINE`].
async fn request(client: &Client, subject: &str, payload: &Value) -> Result<Value, ProvisionError> {
    let request = || subject.to_owned();
    let answer = client.request(subject.to_owned(), payload.to_string().into());
    let answer = tokio::time::timeout(REQUEST_DEADLINE, answer)
        .await
        .map_err(|_elapsed| ProvisionError::Timeout { request: request() })?
        .map_err(|source| ProvisionError::Request {
            request: request(),
            source,
        })?;
    let answer: Value =
        serde_json::from_slice(&answer.payload).map_err(|source| ProvisionError::Answer {
            request: request(),
            source,
        })?;
    match answer.get("error") {
        None => Ok(answer),
        Some(error) => Err(ProvisionError::Refused {
            request: request(),
            description: error
                .get("description")
                .and_then(Value::as_str)
                .unwrap_or("no reason given")
                .to_owned(),
            code: error.get("err_code").and_then(Value::as_u64).unwrap_or(0),
        }),
    }
}

/// Whether JetStream answers: for those who wait for a server to be ready.
///
/// # Errors
/// [`ProvisionError`]
pub async fn ping(client: &Client) -> Result<(), ProvisionError> {
    request(client, api::INFO, &json!({})).await.map(drop)
}

impl fmt::Display for definition::Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rooms { part } => write!(f, "partition {part}"),
            Self::HistoryDead => f.write_str("dead letters of history"),
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
