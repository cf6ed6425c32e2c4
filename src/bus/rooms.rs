//! Which rooms a stream has messages of. Not for the path of a message: the server counts all subjects that match.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use serde::{Deserialize, de::IgnoredAny};
use tokio::time::timeout;

use super::{Connection, StreamError, jetstream};
use crate::{
    model::RoomId,
    subject::{Subjects, api},
};

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

/// The rooms of which `stream` has messages whose subjects match `filter`. No further page is read once there are `most`.
///
/// # Errors
/// [`StreamError`].
pub async fn rooms_of(
    connection: &Connection,
    subjects: &Subjects,
    stream: &str,
    filter: &str,
    wait: Duration,
    most: usize,
) -> Result<BTreeSet<RoomId>, StreamError> {
    let mut rooms = BTreeSet::new();
    let mut offset = 0;
    loop {
        let request = serde_json::json!({ "subjects_filter": filter, "offset": offset });
        let subject = api::stream_info(stream);
        let asked = jetstream::ask(connection, subject, request.to_string().into());
        let Info { total, state } = timeout(wait, asked)
            .await
            .map_err(|_elapsed| StreamError::Timeout {
                stream: stream.to_owned(),
                waited: wait,
            })?
            .map_err(|problem| StreamError::Refused {
                stream: stream.to_owned(),
                problem: problem.into(),
            })?;
        let found = state.subjects.unwrap_or_default();
        offset += found.len();
        let of_rooms = found
            .keys()
            .filter_map(|found| subjects.parse_stored(found));
        rooms.extend(of_rooms.map(|found| found.room));
        if found.is_empty() || offset >= total || rooms.len() >= most {
            return Ok(rooms);
        }
    }
}
