//! Counts messages after a position, with many small direct gets in flight at once.

use async_nats::{Message, StatusCode};
use futures_util::StreamExt;
use tokio::time::timeout;

use super::{ReadError, Reader, direct_get::pending_of};
use crate::subject::direct_get;

/// Counts in flight at once. The server answers a connection's direct gets one after the other, so more would only wait
/// there.
const IN_FLIGHT: usize = 64;

/// A count to make: the messages of one subject after a sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newer {
    pub stream: String,
    pub subject: String,
    /// Messages after this sequence are counted.
    pub after: u64,
}

impl Reader {
    /// Counts the messages for each of `wanted`, in the same order: one request each, over one subscription.
    ///
    /// # Errors
    /// The first [`ReadError`] that occurs.
    pub async fn count_newer(&self, wanted: &[Newer]) -> Result<Vec<u64>, ReadError> {
        let mut counts: Vec<Option<u64>> = vec![None; wanted.len()];
        let Some(first) = wanted.first() else {
            return Ok(Vec::new());
        };
        let timed_out = |_elapsed| ReadError::Timeout {
            stream: first.stream.clone(),
            waited: self.timeout(),
        };
        let _turn = timeout(self.timeout(), self.turn())
            .await
            .map_err(timed_out)??;
        let closed = |_error| ReadError::Closed;
        let client = self.connection().client();
        let inbox = client.new_inbox();
        let mut answers = client
            .subscribe(format!("{inbox}.*"))
            .await
            .map_err(closed)?;
        let ask = async |number: usize, newer: &Newer| {
            let request = serde_json::json!({
                "seq": newer.after + 1,
                "next_by_subj": newer.subject,
                "batch": 1,
            });
            let reply = format!("{inbox}.{number}");
            client
                .publish_with_reply(direct_get(&newer.stream), reply, request.to_string().into())
                .await
                .map_err(|_error| ReadError::Closed)
        };
        let mut unasked = wanted.iter().enumerate();
        for (number, newer) in unasked.by_ref().take(IN_FLIGHT) {
            ask(number, newer).await?;
        }
        let mut missing = wanted.len();
        while missing > 0 {
            // The timeout is per answer: many counts take longer than one read, and a server that is gone is still
            // noticed.
            let answer = timeout(self.timeout(), answers.next())
                .await
                .map_err(timed_out)?;
            let answer = answer.ok_or(ReadError::Closed)?;
            let number = answer.subject.rsplit_once('.');
            let number = number.and_then(|(_, number)| number.parse::<usize>().ok());
            let Some((number, newer)) = number.and_then(|n| Some((n, wanted.get(n)?))) else {
                continue;
            };
            // Messages after the first answer only end its batch.
            let Some(count @ None) = counts.get_mut(number) else {
                continue;
            };
            *count = Some(counted(&answer, &newer.stream)?);
            missing -= 1;
            if let Some((number, newer)) = unasked.next() {
                ask(number, newer).await?;
            }
        }
        Ok(counts.into_iter().flatten().collect())
    }
}

/// Reads the first answer: a message with the number of matches after it, or "not found".
fn counted(answer: &Message, stream: &str) -> Result<u64, ReadError> {
    match answer.status {
        None => Ok(pending_of(answer).unwrap_or_default() + 1),
        Some(StatusCode::NOT_FOUND) => Ok(0),
        Some(StatusCode::NO_RESPONDERS) => Err(ReadError::NoStream {
            stream: stream.to_owned(),
        }),
        Some(status) => Err(ReadError::Refused {
            stream: stream.to_owned(),
            status: status.as_u16(),
            description: answer.description.clone().unwrap_or_default(),
        }),
    }
}
