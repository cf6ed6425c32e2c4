//! Request and reply over NATS: serving a micro service (`nats micro ls` shows it), and calling one.

use std::{fmt, pin::Pin, sync::Arc, time::Duration};

use async_nats::{
    HeaderMap, RequestErrorKind,
    service::{self, NATS_SERVICE_ERROR, NATS_SERVICE_ERROR_CODE, ServiceExt as _},
};
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::{
    sync::Semaphore,
    time::{sleep, timeout},
};
use tracing::Instrument as _;

use super::{Connection, record::last};
use crate::{
    model::{header_escape, header_unescape},
    runtime::Tasks,
    subject::header,
    telemetry,
};

/// Requests that one instance works on at once.
const AT_ONCE: usize = 64;

/// Requests that wait for a free slot. Further ones are refused at once: a caller has its own timeout.
const WAITING: usize = 512;

/// How long a request may wait for a slot.
const WAIT: Duration = Duration::from_secs(1);

/// Error code of an overloaded instance.
const BUSY: u16 = 503;

/// An error as the answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceError {
    /// As in HTTP.
    pub code: u16,
    /// For people.
    pub message: String,
}

/// The answer of an endpoint.
type Answer = Result<Bytes, ServiceError>;

type Answering = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// One kind of request that a service answers.
pub struct Endpoint {
    name: &'static str,
    subject: String,
    answer: Arc<dyn Fn(Bytes) -> Answering + Send + Sync>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Endpoint {
    /// An endpoint at `subject`, answered by `answer`, which may run many times at once.
    pub fn new<F>(
        name: &'static str,
        subject: String,
        answer: impl Fn(Bytes) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Answer> + Send + 'static,
    {
        Self {
            name,
            subject,
            answer: Arc::new(move |question| Box::pin(answer(question))),
        }
    }
}

/// The service can't be started.
#[derive(Debug, thiserror::Error)]
#[error("the NATS service {name} can't be started: {problem}")]
pub struct ServeError {
    name: &'static str,
    problem: String,
}

/// Serves `endpoints` as an instance of the micro service `name` until `tasks` stop. All instances share the requests
/// of a subject. `figures` is the service's own part of what `nats micro stats` shows.
///
/// The service survives reconnects.
///
/// # Errors
/// [`ServeError`] if the client was closed.
pub async fn serve(
    connection: &Connection,
    name: &'static str,
    description: &str,
    endpoints: Vec<Endpoint>,
    figures: impl Fn() -> serde_json::Value + Send + Sync + 'static,
    tasks: &Tasks,
) -> Result<(), ServeError> {
    let failed = |error: async_nats::Error| ServeError {
        name,
        problem: error.to_string(),
    };
    let service = connection
        .client()
        .service_builder()
        .description(description)
        .stats_handler(move |_endpoint, _stats| figures())
        .start(name, env!("CARGO_PKG_VERSION"))
        .await
        .map_err(failed)?;
    let load = Arc::new(Load {
        working: Semaphore::new(AT_ONCE),
        waiting: Semaphore::new(WAITING),
    });
    for endpoint in endpoints {
        let questions = service
            .endpoint_builder()
            .name(endpoint.name)
            .add(&endpoint.subject)
            .await
            .map_err(failed)?;
        let work = take(questions, endpoint, Arc::clone(&load), tasks.clone());
        tasks.spawn_essential("take questions", work);
    }
    let stop = tasks.clone();
    tasks.spawn("serve questions", async move {
        stop.stopping().await;
        // An error only says that the service has already ended.
        let _stopped = service.stop().await;
    });
    Ok(())
}

/// The slots of one instance.
struct Load {
    working: Semaphore,
    waiting: Semaphore,
}

/// Takes the requests of one endpoint. Requests that were taken are answered, also during shutdown.
async fn take(
    mut questions: service::endpoint::Endpoint,
    endpoint: Endpoint,
    load: Arc<Load>,
    tasks: Tasks,
) {
    let name = endpoint.name;
    loop {
        let question = tokio::select! {
            question = questions.next() => question,
            () = tasks.stopping() => {
                // From now on other instances get the requests. An error means that there is no connection, so no
                // request arrives.
                let _away = questions.stop().await;
                break;
            }
        };
        let Some(question) = question else { break };
        let span = tracing::debug_span!("question", endpoint = name);
        let headers = question.message.headers.as_ref();
        if let Some(parent) = headers.and_then(|headers| last(headers, header::TRACEPARENT)) {
            telemetry::set_remote_parent(&span, parent);
        }
        let (load, answer) = (Arc::clone(&load), Arc::clone(&endpoint.answer));
        let work = async move {
            let answer = load.work(question.message.payload.clone(), &*answer).await;
            let answer = answer.map_err(|error| service::error::Error {
                status: header_escape(&error.message).into_owned(),
                code: usize::from(error.code),
            });
            if let Err(error) = question.respond(answer).await {
                tracing::debug!(endpoint = name, %error, "an answer could not be sent");
            }
        };
        tasks.spawn_contained("answer a question", work.instrument(span));
    }
}

impl Load {
    async fn work(&self, question: Bytes, answer: &(dyn Fn(Bytes) -> Answering + Sync)) -> Answer {
        let busy = || ServiceError {
            code: BUSY,
            message: "this instance has too much to do".to_owned(),
        };
        let waiting = self.waiting.try_acquire();
        let _turn = match waiting {
            Ok(_place) => timeout(WAIT, self.working.acquire()).await,
            Err(_full) => return Err(busy()),
        }
        .map_err(|_elapsed| busy())?;
        answer(question).await
    }
}

/// A request failed.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No instance is running.
    #[error("nobody answers at {subject}")]
    Nobody { subject: String },
    /// No answer in time, or NATS can't be reached.
    #[error("no answer at {subject} within {waited:?}")]
    Timeout { subject: String, waited: Duration },
    /// The answer was an error.
    #[error("refused with {}: {}", .0.code, .0.message)]
    Refused(ServiceError),
    /// It is larger than the server allows.
    #[error("the question at {subject} has {bytes} bytes, more than NATS carries (max_payload)")]
    TooLarge { subject: String, bytes: usize },
    /// The request could not be sent.
    #[error("the question at {subject} could not be sent: {problem}")]
    Failed { subject: String, problem: String },
}

/// Sends a request to the service at `subject`.
///
/// # Errors
/// [`AskError`].
pub async fn ask(
    connection: &Connection,
    subject: String,
    question: Bytes,
    wait: Duration,
) -> Result<Bytes, AskError> {
    let mut headers = HeaderMap::new();
    if let Some(traceparent) = telemetry::current_traceparent() {
        headers.insert(header::TRACEPARENT, traceparent);
    }
    let bytes = question.len();
    let request = connection
        .client()
        .request_with_headers(subject.clone(), headers, question);
    let answered = tokio::select! {
        answered = request => answered,
        () = sleep(wait) => {
            return Err(AskError::Timeout { subject, waited: wait });
        }
    };
    let answer = answered.map_err(|error| match error.kind() {
        RequestErrorKind::NoResponders => AskError::Nobody {
            subject: subject.clone(),
        },
        RequestErrorKind::TimedOut => AskError::Timeout {
            subject: subject.clone(),
            waited: wait,
        },
        RequestErrorKind::MaxPayloadExceeded => AskError::TooLarge {
            subject: subject.clone(),
            bytes,
        },
        RequestErrorKind::InvalidSubject | RequestErrorKind::Other => AskError::Failed {
            subject: subject.clone(),
            problem: error.to_string(),
        },
    })?;
    let headers = answer.headers.as_ref();
    let code = headers.and_then(|headers| last(headers, NATS_SERVICE_ERROR_CODE));
    if let Some(code) = code {
        let message = headers.and_then(|headers| last(headers, NATS_SERVICE_ERROR));
        return Err(AskError::Refused(ServiceError {
            code: code.parse().unwrap_or(500),
            message: header_unescape(message.unwrap_or_default()).into_owned(),
        }));
    }
    Ok(answer.payload)
}
