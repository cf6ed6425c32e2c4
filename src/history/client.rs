//! Calls the history service, and reads the streams instead where that is possible.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use parking_lot::Mutex;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, timeout},
};

use super::{
    erase::{ANSWER_WITHIN, EraseAnswer, EraseRequest},
    pages::Pages,
    question::{
        PageAnswer, PageRequest, RoomsAnswer, SearchAnswer, SearchRequest, encode, endpoint,
        refusal,
    },
};
use crate::{
    bus::{AskError, Origins, Reader, Streams, ask},
    config::Config,
    model::{Class, Region, RoomId, partition_of},
    protocol::{ErrorCode, Refused},
    store::{Upload, UploadState, WhichRooms},
    subject::{Subjects, rooms_stream},
    telemetry::metrics::{Counter, Histogram, HistoryAnswer, count, record},
};

/// Requests of one edge in flight at once. An answer may have up to 1 MiB.
const AT_ONCE: usize = 64;

/// After a timeout, the service is not called for this long. Meanwhile pages are made from the streams at once.
const SPARED: Duration = Duration::from_secs(1);

/// History as an edge uses it.
#[derive(Debug)]
pub struct Client {
    /// Makes pages from the streams alone.
    pages: Pages,
    reader: Reader,
    subjects: Subjects,
    region: Region,
    wait: Duration,
    turns: Semaphore,
    /// When the service last ran into the timeout.
    silent: Mutex<Option<Instant>>,
}

/// The newest message and the newest change of a room at one origin. While the heads of all origins are unchanged, so
/// are the room's pages.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Heads {
    /// The epoch of the stream.
    pub epoch: String,
    /// Sequence of the newest message; 0 if there is none.
    pub message: u64,
    /// Sequence of the newest change; 0 if there is none.
    pub change: u64,
}

fn unreachable() -> Refused {
    let text = "NATS is not reachable".to_owned();
    Refused::new(ErrorCode::Unavailable, text)
}

/// The answer to a question that only the service can answer.
fn read<T: DeserializeOwned>(asked: Result<bytes::Bytes, AskError>) -> Result<T, Refused> {
    let away = || {
        let text = "the history service does not answer".to_owned();
        Refused::new(ErrorCode::Unavailable, text)
    };
    let answer = asked.map_err(|error| match error {
        AskError::Refused(error) => {
            refusal(&error).unwrap_or(Refused::new(ErrorCode::Unavailable, error.message))
        }
        AskError::Nobody { .. }
        | AskError::Timeout { .. }
        | AskError::TooLarge { .. }
        | AskError::Failed { .. } => away(),
    })?;
    serde_json::from_slice(&answer).map_err(|_other_version| away())
}

impl Client {
    /// A client that uses the reader's connection.
    #[must_use]
    pub fn new(reader: &Reader, origins: &Arc<Origins>, config: &Config) -> Arc<Self> {
        Arc::new(Self {
            pages: Pages::new(reader.clone(), Arc::clone(origins), None, config),
            reader: reader.clone(),
            subjects: Subjects::new(&config.nats.prefix),
            region: config.region(),
            wait: config.history.ask_timeout,
            turns: Semaphore::new(AT_ONCE),
            silent: Mutex::default(),
        })
    }

    async fn turn(&self) -> Result<SemaphorePermit<'_>, Refused> {
        // Neither the service nor the streams could be reached, and every wait would end in a timeout.
        if !self.pages.connection().is_up() {
            return Err(unreachable());
        }
        let turn = timeout(self.wait, self.turns.acquire()).await;
        // The semaphore is never closed.
        turn.ok().and_then(Result::ok).ok_or_else(|| {
            let text = "too many questions for history at once".to_owned();
            Refused::new(ErrorCode::Unavailable, text)
        })
    }

    async fn ask(&self, endpoint: &str, question: bytes::Bytes) -> Result<bytes::Bytes, AskError> {
        let subject = self.subjects.history(&self.region, endpoint);
        let silent = *self.silent.lock();
        if silent.is_some_and(|silent| silent.elapsed() < SPARED) {
            return Err(AskError::Nobody { subject });
        }
        let answer = ask(self.pages.connection(), subject, question, self.wait).await;
        if let Err(AskError::Timeout { .. }) = &answer {
            *self.silent.lock() = Some(Instant::now());
        }
        answer
    }

    /// A page from the service. If the service fails, a partial page from the streams alone.
    ///
    /// # Errors
    /// `bad_id`, `bad_cursor`, `unavailable`.
    pub async fn page(&self, request: &PageRequest) -> Result<PageAnswer, Refused> {
        let started = Instant::now();
        let (answer, source) = self.page_from(request).await;
        let source = if answer.is_ok() {
            source
        } else {
            HistoryAnswer::Failed
        };
        count(Counter::HistoryAnswered(source), 1);
        record(Histogram::HistoryReadDuration, started.elapsed());
        answer
    }

    async fn page_from(
        &self,
        request: &PageRequest,
    ) -> (Result<PageAnswer, Refused>, HistoryAnswer) {
        let _turn = match self.turn().await {
            Ok(turn) => turn,
            Err(refusal) => return (Err(refusal), HistoryAnswer::Failed),
        };
        let asked = match encode(request) {
            Ok(question) => self.ask(request.endpoint(), question).await,
            Err(refusal) => return (Err(refusal), HistoryAnswer::Failed),
        };
        let problem = match asked {
            Ok(answer) => match serde_json::from_slice::<PageAnswer>(&answer) {
                Ok(answer) if answer.partial => return (Ok(answer), HistoryAnswer::Partial),
                Ok(answer) => return (Ok(answer), HistoryAnswer::Full),
                Err(error) => error.to_string(),
            },
            Err(AskError::Refused(error)) => match refusal(&error) {
                // The request itself is wrong, so the streams can't answer it either.
                Some(refusal)
                    if matches!(refusal.code, ErrorCode::BadId | ErrorCode::BadCursor) =>
                {
                    return (Err(refusal), HistoryAnswer::Failed);
                }
                _ => error.message,
            },
            Err(error) => error.to_string(),
        };
        tracing::debug!(problem, "history is read from the streams");
        (self.pages.page(request).await, HistoryAnswer::Streams)
    }

    /// The answer of the service to a question that nobody else can answer.
    async fn answer<T: DeserializeOwned>(
        &self,
        endpoint: &str,
        question: &impl Serialize,
    ) -> Result<T, Refused> {
        let _turn = self.turn().await?;
        read(self.ask(endpoint, encode(question)?).await)
    }

    /// What the directory of rooms finds.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn rooms(&self, which: &WhichRooms) -> Result<RoomsAnswer, Refused> {
        self.answer(endpoint::ROOMS, which).await
    }

    /// A search. There is no fallback, since the streams can't be searched.
    ///
    /// # Errors
    /// `bad_cursor`, `unavailable`.
    pub async fn search(&self, request: &SearchRequest) -> Result<SearchAnswer, Refused> {
        let started = Instant::now();
        let answer = self.answer(endpoint::SEARCH, request).await;
        let source = match &answer {
            Ok(_) => HistoryAnswer::Full,
            Err(_) => HistoryAnswer::Failed,
        };
        count(Counter::HistoryAnswered(source), 1);
        record(Histogram::HistoryReadDuration, started.elapsed());
        answer
    }

    /// Erases messages for good. The erasure is recorded before this returns, and carried out even if this process
    /// ends.
    ///
    /// # Errors
    /// `unavailable`: nothing was erased, or the erasure is recorded and will be carried out. It is safe to retry.
    pub async fn erase(&self, request: &EraseRequest) -> Result<EraseAnswer, Refused> {
        let _turn = self.turn().await?;
        let away = |cause: String| Refused::new(ErrorCode::Unavailable, cause);
        let subject = self.subjects.history(&self.region, endpoint::ERASE);
        let wait = self.wait + ANSWER_WITHIN;
        let asked = ask(self.pages.connection(), subject, encode(request)?, wait).await;
        let answer = asked.map_err(|error| match error {
            AskError::Refused(error) => refusal(&error).unwrap_or_else(|| away(error.message)),
            AskError::Nobody { .. } => away("the history service is not running".to_owned()),
            error => away(error.to_string()),
        })?;
        serde_json::from_slice(&answer).map_err(|error| away(error.to_string()))
    }

    /// Has an upload granted, within the limits of its user.
    ///
    /// # Errors
    /// `limit`, `unavailable`. It is safe to retry with another id.
    pub async fn grant_upload(&self, upload: &Upload) -> Result<(), Refused> {
        let _turn = self.turn().await?;
        let away = |cause: String| Refused::new(ErrorCode::Unavailable, cause);
        let asked = self.ask(endpoint::UPLOAD, encode(upload)?).await;
        let granted = asked.map_err(|error| match error {
            AskError::Refused(error) => refusal(&error).unwrap_or_else(|| away(error.message)),
            AskError::Nobody { .. } => {
                away("uploads need the history service, which does not answer".to_owned())
            }
            error => away(error.to_string()),
        });
        granted.map(|_granted| ())
    }

    /// Whether the file of an upload may be given out. It takes no turn of those for pages, and does not say whether the
    /// service is silent: the caller bounds how many it asks at once.
    ///
    /// # Errors
    /// `unavailable`: it is not known.
    pub async fn upload_state(&self, upload: &str) -> Result<UploadState, Refused> {
        let connection = self.pages.connection();
        if !connection.is_up() {
            return Err(unreachable());
        }
        let subject = self.subjects.history(&self.region, endpoint::UPLOAD_STATE);
        read(ask(connection, subject, encode(&upload)?, self.wait).await)
    }

    /// The heads of a room, one per origin; `None` if they can't be read now. Reads one stream per origin.
    pub async fn heads(&self, room: &RoomId) -> Option<Vec<Heads>> {
        let all = self.pages.origins().all();
        let heads = all.iter().map(|streams| self.heads_of(streams, room));
        let mut heads: Vec<Heads> = join_all(heads).await.into_iter().collect::<Option<_>>()?;
        // The same order on every edge.
        heads.sort_by(|a, b| a.epoch.cmp(&b.epoch));
        Some(heads)
    }

    async fn heads_of(&self, streams: &Streams, room: &RoomId) -> Option<Heads> {
        let part = partition_of(room, streams.partitions());
        let epoch = streams.known(part).epoch;
        let of_class = |class| self.subjects.publish(streams.origin(), part, room, class);
        let subjects = [of_class(Class::Msg), of_class(Class::Ev)];
        let stream = rooms_stream(streams.origin(), part);
        let heads = self.reader.heads(&stream, epoch, &subjects).await.ok()?;
        let newest = |class| {
            let of_class = heads.iter().filter(|head| head.record.class == class);
            of_class.map(|head| head.record.seq).max()
        };
        Some(Heads {
            epoch: epoch.to_string(),
            message: newest(Class::Msg).unwrap_or_default(),
            change: newest(Class::Ev).unwrap_or_default(),
        })
    }
}
