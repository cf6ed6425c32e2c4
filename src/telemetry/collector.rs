//! The connection to an OTLP collector: HTTP/1.1 without TLS, one connection per export.

use std::{pin::Pin, time::Duration};

use futures_util::future::join;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Uri,
    client::conn::http1::handshake,
    header::{CONNECTION, HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use tokio::{net::TcpStream, runtime, time::timeout};

/// Maximum number of bytes read of an answer; a successful one is nearly empty.
const MAX_ANSWER: usize = 4 * 1024 * 1024;

/// Port of a URL without one.
const HTTP: u16 = 80;

/// Sends what the SDK exports.
///
/// The SDK's threads have no runtime, so each export makes one and blocks its thread. It must not be used on a thread
/// of a runtime.
#[derive(Debug)]
pub(super) struct Collector {
    /// Timeout of one export.
    pub(super) within: Duration,
}

impl HttpClient for Collector {
    fn send_bytes<'this, 'sending>(
        &'this self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'sending>>
    where
        'this: 'sending,
        Self: 'sending,
    {
        Box::pin(async move {
            let runtime = runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async { timeout(self.within, exchange(request)).await? })
        })
    }
}

async fn exchange(request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let (mut head, body) = request.into_parts();
    let host = head.uri.host().ok_or("the URL has no host")?;
    let port = head.uri.port_u16();
    let address = (host.trim_matches(['[', ']']), port.unwrap_or(HTTP));
    let stream = TcpStream::connect(address).await?;
    let host = match port {
        Some(port) => HeaderValue::try_from(format!("{host}:{port}"))?,
        None => HeaderValue::try_from(host)?,
    };
    head.headers.insert(HOST, host);
    head.headers
        .insert(CONNECTION, HeaderValue::from_static("close"));
    let path = head.uri.path_and_query().cloned();
    head.uri = path.map_or_else(Uri::default, Uri::from);

    let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
    let answer = async move {
        let answer = sender
            .send_request(Request::from_parts(head, Full::new(body)))
            .await?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, MAX_ANSWER).collect().await?;
        Ok(Response::from_parts(head, body.to_bytes()))
    };
    // The connection ends with the answer. If it ends earlier, there is no answer.
    let (answer, _ended) = join(answer, connection).await;
    answer
}
