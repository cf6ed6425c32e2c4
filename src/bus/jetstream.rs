//! The part of JetStream's API that is used here: one kind of request, and the needed fields of the answers.
//!
//! An answer is an object with either the result or the key `error`. Callers set the deadlines.

use std::collections::HashMap;

use async_nats::{Request, RequestError};
use bytes::Bytes;
use serde::{Deserialize, de::DeserializeOwned};

use super::Connection;

/// An error of JetStream.
#[derive(Debug, Deserialize)]
pub(super) struct ApiError {
    /// As in HTTP.
    pub(super) code: u16,
    /// The code of nats-server (`errors.json`).
    #[serde(default)]
    pub(super) err_code: u32,
    #[serde(default)]
    pub(super) description: String,
}

/// A request failed.
#[derive(Debug)]
pub(super) enum Problem {
    /// JetStream answered with an error.
    Refused(ApiError),
    /// The request could not be sent, nobody answered it, or the answer can't be read.
    Failed(String),
}

impl From<Problem> for String {
    fn from(problem: Problem) -> Self {
        match problem {
            Problem::Refused(error) => error.description,
            Problem::Failed(problem) => problem,
        }
    }
}

impl From<RequestError> for Problem {
    fn from(error: RequestError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<serde_json::Error> for Problem {
    fn from(error: serde_json::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// The acknowledgement of a publish.
#[derive(Debug)]
pub(super) struct PubAck {
    pub(super) seq: u64,
    /// The message had been stored before.
    pub(super) duplicate: bool,
}

impl PubAck {
    /// Reads a stream's answer to a publish. The answer is parsed only once, since this is on the path of a message.
    pub(super) fn read(answer: &[u8]) -> Result<Self, Problem> {
        #[derive(Deserialize)]
        struct Answer {
            seq: Option<u64>,
            #[serde(default)]
            duplicate: bool,
            error: Option<ApiError>,
        }
        let Answer {
            seq,
            duplicate,
            error,
        } = serde_json::from_slice(answer)?;
        match (error, seq) {
            (Some(error), _) => Err(Problem::Refused(error)),
            (None, Some(seq)) => Ok(Self { seq, duplicate }),
            (None, None) => Err(Problem::Failed("an empty answer".to_owned())),
        }
    }
}

/// How many messages a purge has removed.
#[derive(Debug, Deserialize)]
pub(super) struct Purged {
    #[serde(default)]
    pub(super) purged: u64,
}

/// The answer to a stream info request.
#[derive(Debug, Deserialize)]
pub(super) struct StreamInfo {
    pub(super) config: Option<StreamConfig>,
    pub(super) state: Option<StreamEnds>,
    /// Mirrors only.
    pub(super) mirror: Option<MirrorInfo>,
    /// The clock of the stream's leader, as RFC 3339. Servers before 2.10 don't send it.
    pub(super) ts: Option<String>,
    /// When the stream was made, as RFC 3339.
    pub(super) created: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct StreamConfig {
    #[serde(default)]
    pub(super) num_replicas: u8,
    #[serde(default)]
    pub(super) metadata: HashMap<String, String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct StreamEnds {
    pub(super) first_seq: u64,
    pub(super) last_seq: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct MirrorInfo {
    /// Messages that the mirror has still to fetch.
    #[serde(default)]
    pub(super) lag: u64,
    /// Time since the mirror heard from its origin, in nanoseconds; -1 if it never has.
    pub(super) active: i64,
}

/// The answer to a consumer info request.
#[derive(Debug, Deserialize)]
pub(super) struct ConsumerInfo {
    pub(super) num_pending: Option<u64>,
    #[serde(default)]
    pub(super) num_ack_pending: u64,
    pub(super) ack_floor: Option<Floor>,
    pub(super) delivered: Option<Floor>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Floor {
    pub(super) stream_seq: u64,
}

/// Reads the result, or the error.
pub(super) fn read<T: DeserializeOwned>(answer: &[u8]) -> Result<T, Problem> {
    #[derive(Deserialize)]
    struct Outcome {
        error: Option<ApiError>,
    }
    let Outcome { error } = serde_json::from_slice(answer)?;
    match error {
        Some(error) => Err(Problem::Refused(error)),
        None => Ok(serde_json::from_slice(answer)?),
    }
}

/// Sends a request and waits for its answer.
pub(super) async fn ask<T: DeserializeOwned>(
    connection: &Connection,
    subject: String,
    body: Bytes,
) -> Result<T, Problem> {
    let request = Request::new().payload(body);
    let answer = connection.client().send_request(subject, request).await?;
    read(&answer.payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_what_was_asked_for_or_why_it_is_refused() {
        let refused = br#"{"type":"x","error":{"code":404,"err_code":10059,"description":"stream not found"}}"#;
        for problem in [
            read::<StreamInfo>(refused).unwrap_err(),
            read::<Purged>(refused).unwrap_err(),
            PubAck::read(refused).unwrap_err(),
        ] {
            assert!(
                matches!(
                    &problem,
                    Problem::Refused(ApiError {
                        code: 404,
                        err_code: 10059,
                        ..
                    })
                ),
                "{problem:?}"
            );
            assert_eq!(String::from(problem), "stream not found");
        }
        let bare = br#"{"error":{"code":503}}"#;
        assert_eq!(String::from(read::<Purged>(bare).unwrap_err()), "");
        let info: StreamInfo =
            read(br#"{"config":{"name":"A"},"state":{"first_seq":3,"last_seq":7},"ts":"t"}"#)
                .unwrap();
        assert!(matches!(
            info.state,
            Some(StreamEnds {
                first_seq: 3,
                last_seq: 7
            })
        ));
        assert_eq!(
            read::<Purged>(br#"{"success":true,"purged":4}"#)
                .unwrap()
                .purged,
            4
        );
        assert!(
            PubAck::read(br#"{"stream":"A","seq":9,"duplicate":true}"#)
                .unwrap()
                .duplicate
        );
        for unreadable in [&b""[..], b"{", b"[]", b"{}"] {
            let problem = PubAck::read(unreadable).unwrap_err();
            assert!(matches!(&problem, Problem::Failed(_)), "{problem:?}");
        }
    }
}
