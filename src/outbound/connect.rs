//! Connections to receivers: the addresses of a name are checked after DNS has answered, and only a checked address is
//! connected to. So a name whose answer changes in between can't lead elsewhere.

use std::{
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs as _},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper::{
    Uri,
    rt::{Read, ReadBufCursor, Write},
};
use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::TokioIo,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::Semaphore,
    task::spawn_blocking,
    time::timeout,
};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};
use tower_service::Service;

use super::address::is_allowed;
use crate::config::Network;

/// Names that are looked up at once for one client. Each look-up occupies a thread until the system's resolver gives up,
/// which may be long after the request has.
const LOOKUPS: usize = 8;

/// Every address of the host is refused.
#[derive(Debug, thiserror::Error)]
#[error("{host} has the address {address}, which is not public, and is not in `allow`")]
pub(super) struct RefusedAddress {
    host: String,
    address: IpAddr,
}

/// Opens connections to the host of a URL.
#[derive(Clone)]
pub(super) struct Connector {
    tls: TlsConnector,
    allow: Arc<[Network]>,
    /// From the look-up of the name to the end of the handshake, and for all addresses of the host together.
    timeout: Duration,
    lookups: Arc<Semaphore>,
}

impl Connector {
    pub(super) fn new(tls: TlsConnector, allow: Arc<[Network]>, timeout: Duration) -> Self {
        Self {
            tls,
            allow,
            timeout,
            lookups: Arc::new(Semaphore::new(LOOKUPS)),
        }
    }

    /// The client goes on with a connection that it has begun, also when the request has ended: so it needs a timeout of
    /// its own.
    async fn connect_in_time(self, url: Uri) -> io::Result<Link> {
        timeout(self.timeout, self.clone().connect(url)).await?
    }

    /// The addresses of a host.
    async fn look_up(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        if let Ok(address) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let turn = Arc::clone(&self.lookups).acquire_owned().await;
        let host = host.to_owned();
        let look_up = move || {
            // Given back when the resolver has answered, whether or not somebody still waits for that.
            let _turn = turn;
            (host, port).to_socket_addrs().map(Iterator::collect)
        };
        spawn_blocking(look_up).await.map_err(io::Error::other)?
    }

    async fn connect(self, url: Uri) -> io::Result<Link> {
        let is_secure = url.scheme_str() == Some("https");
        let host = url.host().unwrap_or_default();
        let port = url.port_u16().unwrap_or(if is_secure { 443 } else { 80 });
        // Brackets around an IPv6 address belong to the URL.
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let stream = self.reach(host, port).await?;
        stream.set_nodelay(true)?;
        if !is_secure {
            return Ok(Link::new(stream, false));
        }
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        let stream = self.tls.connect(name, stream).await?;
        let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        Ok(Link::new(stream, is_h2))
    }

    /// Connects to the first allowed address of the host that answers.
    async fn reach(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        let all: Vec<SocketAddr> = self.look_up(host, port).await?;
        let allowed = all.iter().filter(|its| is_allowed(its.ip(), &self.allow));
        let allowed: Vec<SocketAddr> = allowed.copied().collect();
        if let (true, Some(refused)) = (allowed.is_empty(), all.first()) {
            let (host, address) = (host.to_owned(), refused.ip());
            return Err(io::Error::other(RefusedAddress { host, address }));
        }
        // Each address gets a share of the time, so that one that does not answer leaves time for the others.
        let share = u32::try_from(allowed.len()).unwrap_or(u32::MAX).max(1);
        let mut failure = io::Error::other("the name has no address");
        for address in allowed {
            failure = match timeout(self.timeout / share, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => error,
                Err(elapsed) => elapsed.into(),
            };
        }
        Err(failure)
    }
}

impl Service<Uri> for Connector {
    type Response = Link;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Link>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, url: Uri) -> Self::Future {
        Box::pin(self.clone().connect_in_time(url))
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection, with or without TLS.
pub(super) struct Link {
    io: TokioIo<Box<dyn Stream>>,
    is_h2: bool,
}

impl Link {
    fn new(stream: impl Stream + 'static, is_h2: bool) -> Self {
        let io = TokioIo::new(Box::new(stream) as Box<dyn Stream>);
        Self { io, is_h2 }
    }
}

impl Connection for Link {
    fn connected(&self) -> Connected {
        match self.is_h2 {
            true => Connected::new().negotiated_h2(),
            false => Connected::new(),
        }
    }
}

impl Read for Link {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, into)
    }
}

impl Write for Link {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
