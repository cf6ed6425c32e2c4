//! The storage in a bucket of S3: clients put and get files with signed URLs; natter itself only removes them,
//! or puts something empty in their place.

use std::{fmt, time::Duration};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, client::conn::http1::handshake, header};
use hyper_util::rt::TokioIo;
use rusty_s3::{Bucket, Credentials, S3Action as _, UrlStyle};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

use super::{File, OpenError, Put, StorageError, UploadId};
use crate::{config::Uploads, runtime::tls};

/// How long a request of natter's own may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// Bytes of an answer that are read, and of its text that are shown.
const ANSWER_BYTES: usize = 64 * 1024;
const SHOWN: usize = 300;

/// Before the id in the name of an object.
const FOLDER: &str = "uploads";

/// A bucket.
pub struct S3 {
    bucket: Bucket,
    credentials: Credentials,
    url_ttl: Duration,
    /// Whether a file that is there can't be replaced. Otherwise another one could take its place after it was checked.
    once: bool,
    /// `None` for an endpoint without TLS.
    tls: Option<TlsConnector>,
}

impl fmt::Debug for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("S3").field(&self.bucket).finish()
    }
}

impl S3 {
    pub(super) fn open(config: &Uploads) -> Result<Self, OpenError> {
        let style = match config.s3_path_style {
            true => UrlStyle::Path,
            false => UrlStyle::VirtualHost,
        };
        let (bucket, region) = (config.s3_bucket.clone(), config.s3_region.clone());
        let endpoint = config.s3_endpoint.parse();
        let endpoint = endpoint.map_err(|error| OpenError::Bucket(format!("{error}")))?;
        let bucket = Bucket::new(endpoint, style, bucket, region)
            .map_err(|error| OpenError::Bucket(error.to_string()))?;
        let is_secure = bucket.base_url().scheme() == "https";
        Ok(Self {
            credentials: Credentials::new(config.s3_key.clone(), config.s3_secret.expose()),
            url_ttl: config.url_ttl,
            once: config.scan().is_some(),
            tls: is_secure
                .then(|| tls(&[]))
                .transpose()
                .map_err(OpenError::Tls)?,
            bucket,
        })
    }

    fn expires(&self, now: u64) -> u64 {
        now + u64::try_from(self.url_ttl.as_millis()).unwrap_or(u64::MAX / 2)
    }

    pub(super) fn put(&self, id: &UploadId, file: &File, now: u64) -> Put {
        let object = object(id);
        let mut action = self.bucket.put_object(Some(&self.credentials), &object);
        let mut headers = file.headers();
        if self.once {
            headers.insert("if-none-match", "*".to_owned());
        }
        for (name, value) in &headers {
            action.headers_mut().insert(*name, value.clone());
        }
        // Signed, so that no other number of bytes is taken. Every client sends it by itself.
        action
            .headers_mut()
            .insert("content-length", file.size.to_string());
        Put {
            url: action.sign(self.url_ttl).into(),
            headers,
            expires: self.expires(now),
        }
    }

    pub(super) fn get(&self, id: &UploadId, now: u64) -> (String, u64) {
        let object = object(id);
        let action = self.bucket.get_object(Some(&self.credentials), &object);
        (action.sign(self.url_ttl).into(), self.expires(now))
    }

    pub(super) fn origin(&self) -> String {
        self.bucket.base_url().origin().ascii_serialization()
    }

    pub(super) async fn remove(&self, id: &UploadId) -> Result<(), StorageError> {
        let object = object(id);
        let action = self.bucket.delete_object(Some(&self.credentials), &object);
        let url: String = action.sign(ANSWER_WITHIN).into();
        match self.send(Method::DELETE, &url, &[], "").await {
            // There is no such object.
            Err(StorageError::Refused { status: 404, text }) if !text.contains("NoSuchBucket") => {
                Ok(())
            }
            removed => removed,
        }
    }

    /// Puts an empty object in the place of a file, which `If-None-Match` then sees.
    pub(super) async fn bar(&self, id: &UploadId) -> Result<(), StorageError> {
        let object = object(id);
        let action = self.bucket.put_object(Some(&self.credentials), &object);
        let url: String = action.sign(ANSWER_WITHIN).into();
        // Without a body nobody else would send it, and S3 wants it.
        let length = [("content-length", "0".to_owned())];
        self.send(Method::PUT, &url, &length, "").await
    }

    /// Writes a file with this text. [`StorageError::Kept`]: there is one, which can't be replaced.
    pub(super) async fn write(
        &self,
        id: &UploadId,
        file: &File,
        text: &str,
    ) -> Result<(), StorageError> {
        let put = self.put(id, file, 0);
        let headers: Vec<_> = put.headers.into_iter().collect();
        match self.send(Method::PUT, &put.url, &headers, text).await {
            Err(StorageError::Refused { status: 412, .. }) => Err(StorageError::Kept),
            written => written,
        }
    }

    /// Sends a request, and waits until S3 has done it.
    async fn send(
        &self,
        method: Method,
        url: &str,
        headers: &[(&str, String)],
        body: &str,
    ) -> Result<(), StorageError> {
        match timeout(ANSWER_WITHIN, self.exchange(method, url, headers, body)).await {
            Ok(Ok((200..300, _))) => Ok(()),
            Ok(Ok((status, text))) => Err(StorageError::Refused { status, text }),
            Ok(Err(error)) => Err(StorageError::Unreachable(error.to_string())),
            Err(_elapsed) => Err(StorageError::Unreachable(format!(
                "no answer within {ANSWER_WITHIN:?}"
            ))),
        }
    }

    async fn exchange(
        &self,
        method: Method,
        url: &str,
        headers: &[(&str, String)],
        body: &str,
    ) -> Result<(u16, String), Box<dyn std::error::Error + Send + Sync>> {
        let base = self.bucket.base_url();
        let host = base.host_str().unwrap_or_default();
        let port = base.port_or_known_default().unwrap_or(443);
        // Brackets around an IPv6 address belong to the URL.
        let name = host.trim_start_matches('[').trim_end_matches(']');
        let stream = TcpStream::connect((name, port)).await?;
        let stream: Box<dyn Stream> = match &self.tls {
            None => Box::new(stream),
            Some(tls) => {
                let name = ServerName::try_from(name.to_owned())?;
                Box::new(tls.connect(name, stream).await?)
            }
        };
        let origin = url.find("://").map_or(0, |at| at + 3);
        let path = url.get(origin..).and_then(|rest| rest.find('/'));
        let path = path.and_then(|at| url.get(origin + at..)).unwrap_or("/");
        let authority = match base.port() {
            None => host.to_owned(),
            Some(port) => format!("{host}:{port}"),
        };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, authority)
            .header(header::CONNECTION, "close");
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let request = request.body(Full::new(bytes::Bytes::copy_from_slice(body.as_bytes())))?;
        let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
        let exchange = async {
            let answer = sender.send_request(request).await?;
            let status = answer.status().as_u16();
            let text = Limited::new(answer.into_body(), ANSWER_BYTES).collect();
            let text = String::from_utf8_lossy(&text.await?.to_bytes()).into_owned();
            Ok((status, text.chars().take(SHOWN).collect()))
        };
        // The connection moves the bytes, and ends after the answer.
        let (answer, _ended) = tokio::join!(exchange, connection);
        answer
    }
}

/// A connection, with or without TLS.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The name of the object with the file of an upload.
fn object(id: &UploadId) -> String {
    format!("{FOLDER}/{id}")
}
