//! A small HTTP endpoint of a test: what it is asked, and what it answers.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, Request, StatusCode},
    response::{IntoResponse as _, Response},
};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::{net::TcpListener, sync::Semaphore};

use super::{LONG, eventually};

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) raw: Bytes,
    pub(crate) body: Value,
}

impl Asked {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().unwrap()
    }

    /// The id of the message that it is about.
    pub(crate) fn id(&self) -> &str {
        self.body["message"]["id"].as_str().unwrap()
    }
}

/// What is answered.
#[derive(Debug, Clone)]
pub(crate) enum Say {
    Json(Value),
    Status(u16),
    /// A status with a body.
    Refuse(u16, Value),
    /// A status with a header.
    With(u16, &'static str, String),
    /// A text of so many bytes.
    Large(usize),
    /// Nothing, ever.
    Hang,
}

type Behaviour = Box<dyn FnMut(&Asked) -> Say + Send>;

/// It lives as long as the test.
#[derive(Clone)]
pub(crate) struct Endpoint {
    pub(crate) port: u16,
    inner: Arc<Inner>,
}

struct Inner {
    behaviour: Mutex<Behaviour>,
    asked: Mutex<Vec<Asked>>,
    open: AtomicUsize,
    most_open: AtomicUsize,
    gate: Semaphore,
}

impl Endpoint {
    /// An endpoint that answers as `behaviour` says.
    pub(crate) async fn start(behaviour: impl FnMut(&Asked) -> Say + Send + 'static) -> Self {
        let endpoint = Self::closed(behaviour).await;
        endpoint.open_gate();
        endpoint
    }

    /// The same, but no request is answered before [`Self::open_gate`].
    pub(crate) async fn closed(behaviour: impl FnMut(&Asked) -> Say + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let inner = Arc::new(Inner {
            behaviour: Mutex::new(Box::new(behaviour)),
            asked: Mutex::default(),
            open: AtomicUsize::new(0),
            most_open: AtomicUsize::new(0),
            gate: Semaphore::new(0),
        });
        let router = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&inner));
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { port, inner }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}/work", self.port)
    }

    pub(crate) fn open_gate(&self) {
        self.inner.gate.add_permits(Semaphore::MAX_PERMITS / 2);
    }

    pub(crate) fn behave(&self, behaviour: impl FnMut(&Asked) -> Say + Send + 'static) {
        *self.inner.behaviour.lock() = Box::new(behaviour);
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.inner.asked.lock().clone()
    }

    /// How many requests there were.
    pub(crate) fn count(&self) -> usize {
        self.inner.asked.lock().len()
    }

    /// Most requests that were open at once.
    pub(crate) fn most_open(&self) -> usize {
        self.inner.most_open.load(Ordering::SeqCst)
    }

    /// Waits until it was asked so often.
    pub(crate) async fn asked_times(&self, times: usize) -> Vec<Asked> {
        eventually(&format!("{times} requests"), LONG, async || {
            let asked = self.asked();
            match asked.len() >= times {
                true => Ok(asked),
                false => Err(format!("{} requests", asked.len())),
            }
        })
        .await
    }
}

/// A request that is open, until its connection ends or it is answered.
struct Open<'a>(&'a Inner);

impl<'a> Open<'a> {
    fn new(inner: &'a Inner) -> Self {
        let open = inner.open.fetch_add(1, Ordering::SeqCst) + 1;
        inner.most_open.fetch_max(open, Ordering::SeqCst);
        Self(inner)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn answer(State(inner): State<Arc<Inner>>, request: Request<Body>) -> Response {
    let _open = Open::new(&inner);
    let (head, body) = request.into_parts();
    let raw = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    let asked = Asked {
        path: head.uri.path().to_owned(),
        body: serde_json::from_slice(&raw).unwrap_or_default(),
        headers: head.headers,
        raw,
    };
    let say = (inner.behaviour.lock())(&asked);
    inner.asked.lock().push(asked);
    let _gone_through = inner.gate.acquire().await.unwrap();
    let status = |number| StatusCode::from_u16(number).unwrap();
    match say {
        Say::Json(value) => value.to_string().into_response(),
        Say::Status(number) => status(number).into_response(),
        Say::Refuse(number, value) => (status(number), value.to_string()).into_response(),
        Say::With(number, name, value) => (status(number), [(name, value)]).into_response(),
        Say::Large(bytes) => format!("{{\"a\":\"{}\"}}", "x".repeat(bytes)).into_response(),
        Say::Hang => std::future::pending().await,
    }
}
