//! Which rooms a stream has messages or records of. Not for the path of a message: the server counts all subjects that match.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use serde::{Deserialize, de::IgnoredAny};
use tokio::time::timeout;

use super::{Connection, StreamError, jetstream};
use crate::{model::RoomId, subject::api};

/// The part of the answer to a stream info request that names subjects.
#[derive(Deserialize)]
struct Info {
    /// All matches; the answer has some of them.
    #[serde(default)]
    total: usize,
    state: State,
}

#[derive(Deserialize)]
struct State {
    #[serde(default)]
    subjects: Option<HashMap<String, IgnoredAny>>,
}

async fn info(
    connection: &Connection,
    stream: &str,
    (filter, offset): (&str, usize),
    wait: Duration,
) -> Result<Info, StreamError> {
    let request = serde_json::json!({ "subjects_filter": filter, "offset": offset });
    let subject = api::stream_info(stream);
    let asked = jetstream::ask(connection, subject, request.to_string().into());
    timeout(wait, asked)
        .await
        .map_err(|_elapsed| StreamError::Timeout {
            stream: stream.to_owned(),
            waited: wait,
        })?
        .map_err(|problem| StreamError::Refused {
            stream: stream.to_owned(),
            problem: problem.into(),
        })
}

/// How many subjects of `stream` match `filter`.
///
/// # Errors
/// [`StreamError`].
pub(super) async fn count(
    connection: &Connection,
    stream: &str,
    filter: &str,
    wait: Duration,
) -> Result<usize, StreamError> {
    let Info { total, state } = info(connection, stream, (filter, 0), wait).await?;
    Ok(total.max(state.subjects.unwrap_or_default().len()))
}

/// The rooms of which `stream` has something whose subject matches `filter`; `room` finds them in the subjects. No further
/// page is read once there are `most`.
///
/// # Errors
/// [`StreamError`].
pub async fn rooms_of(
    connection: &Connection,
    stream: &str,
    filter: &str,
    room: impl Fn(&str) -> Option<RoomId>,
    wait: Duration,
    most: usize,
) -> Result<BTreeSet<RoomId>, StreamError> {
    let mut rooms = BTreeSet::new();
    let mut offset = 0;
    loop {
        let Info { total, state } = info(connection, stream, (filter, offset), wait).await?;
        let found = state.subjects.unwrap_or_default();
        offset += found.len();
        rooms.extend(found.keys().filter_map(|subject| room(subject)));
        if found.is_empty() || offset >= total || rooms.len() >= most {
            return Ok(rooms);
        }
    }
}
