//! Connecting to a server: choice of the server, TLS, authentication.

use std::io;

use async_nats::ServerAddr;
use bytes::BytesMut;
use nkeys::KeyPair;
use rand::seq::SliceRandom as _;
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::rustls::pki_types::ServerName;

use super::protocol::{Info, Op, next_op};
use crate::{
    bus::connection::{CONNECT_WITHIN, ConnectError, Identity, servers},
    config,
    runtime::tls,
};

/// Connects to the servers of a region.
pub(super) struct Dialer {
    name: String,
    servers: Vec<ServerAddr>,
    /// Servers that other servers have announced.
    found: Vec<ServerAddr>,
    auth: Auth,
}

/// The identity of this client.
enum Auth {
    Nobody,
    Password(String, String),
    /// A user's JWT, and the key that proves its ownership.
    Credentials(String, Box<KeyPair>),
}

/// A server could not be reached, or it refused this client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the server did not answer within {CONNECT_WITHIN:?}")]
    Timeout,
    #[error("the server refuses: {0}")]
    Refused(String),
    #[error(transparent)]
    Key(#[from] nkeys::error::Error),
    #[error(transparent)]
    Settings(#[from] ConnectError),
}

/// A connection's bytes.
pub(crate) trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// A server to which the `CONNECT` message was sent.
pub(crate) struct Dialed {
    pub(crate) transport: Box<dyn Transport>,
    pub(super) info: Info,
    /// Bytes received so far and not yet parsed.
    pub(crate) buffer: BytesMut,
}

/// The client's `CONNECT` message.
#[derive(Serialize)]
struct Connect<'a> {
    verbose: bool,
    pedantic: bool,
    tls_required: bool,
    name: &'a str,
    /// A server treats a peer that names a language as a client, and refuses it on the port for leaf nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    lang: Option<&'a str>,
    version: &'a str,
    protocol: u8,
    headers: bool,
    no_responders: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pass: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    jwt: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sig: Option<String>,
}

impl Dialer {
    pub(super) fn new(config: &config::Nats, name: &str) -> Result<Self, ConnectError> {
        Self::to(servers(config)?, config, name)
    }

    fn to(
        servers: Vec<ServerAddr>,
        config: &config::Nats,
        name: &str,
    ) -> Result<Self, ConnectError> {
        let auth = match Identity::of(config)? {
            Identity::Nobody => Auth::Nobody,
            Identity::Password(user, password) => Auth::Password(user, password),
            Identity::Credentials(text) => credentials(&text).map_err(ConnectError::Credentials)?,
        };
        Ok(Self {
            name: name.to_owned(),
            servers,
            found: Vec::new(),
            auth,
        })
    }

    /// Tries all configured and announced servers, in random order.
    pub(super) async fn dial(&mut self) -> Result<Dialed, DialError> {
        let mut servers: Vec<ServerAddr> =
            self.servers.iter().chain(&self.found).cloned().collect();
        servers.shuffle(&mut rand::rng());
        let mut failed = DialError::Timeout;
        for server in servers {
            match timeout(CONNECT_WITHIN, self.reach(&server)).await {
                Ok(Ok(dialed)) => {
                    self.learn(&dialed.info);
                    return Ok(dialed);
                }
                Ok(Err(error)) => failed = error,
                Err(_elapsed) => failed = DialError::Timeout,
            }
        }
        Err(failed)
    }

    /// Stores the addresses of the other servers of the cluster.
    pub(super) fn learn(&mut self, info: &Info) {
        let tls = self.servers.iter().any(ServerAddr::tls_required);
        let scheme = if tls { "tls" } else { "nats" };
        let known = |found: &ServerAddr| {
            self.servers
                .iter()
                .any(|known| (known.host(), known.port()) == (found.host(), found.port()))
        };
        self.found = info
            .connect_urls
            .iter()
            .filter_map(|url| format!("{scheme}://{url}").parse().ok())
            .filter(|found| !known(found))
            .collect();
    }

    async fn reach(&self, server: &ServerAddr) -> Result<Dialed, DialError> {
        let mut dialed = self.introduce(server, Some("rust")).await?;
        let Dialed {
            transport, buffer, ..
        } = &mut dialed;
        loop {
            match read_op(transport, buffer).await? {
                Op::Pong => return Ok(dialed),
                Op::Error(text) => return Err(DialError::Refused(text)),
                Op::Ping => transport.write_all(b"PONG\r\n").await?,
                Op::Info(_) | Op::Ok | Op::Message(_) => {}
            }
        }
    }

    /// Connects, with TLS if the server or its address requires it, sends `CONNECT`, and then `PING`.
    async fn introduce(
        &self,
        server: &ServerAddr,
        lang: Option<&str>,
    ) -> Result<Dialed, DialError> {
        let mut stream = TcpStream::connect((server.host(), server.port())).await?;
        stream.set_nodelay(true)?;
        let mut buffer = BytesMut::new();
        let Op::Info(info) = read_op(&mut stream, &mut buffer).await? else {
            return Err(DialError::Refused(
                "it does not introduce itself".to_owned(),
            ));
        };
        let info: Info = serde_json::from_slice(&info).map_err(io::Error::other)?;
        let with_tls = info.tls_required || server.tls_required();
        let mut transport: Box<dyn Transport> = if with_tls {
            let name = ServerName::try_from(server.host().to_owned()).map_err(io::Error::other)?;
            Box::new(tls(&[])?.connect(name, stream).await?)
        } else {
            Box::new(stream)
        };
        let connect = self.connect(server, &info, with_tls, lang)?;
        transport.write_all(&connect).await?;
        transport.flush().await?;
        Ok(Dialed {
            transport,
            info,
            buffer,
        })
    }

    fn connect(
        &self,
        server: &ServerAddr,
        info: &Info,
        tls_required: bool,
        lang: Option<&str>,
    ) -> Result<Vec<u8>, DialError> {
        let mut connect = Connect {
            verbose: false,
            pedantic: false,
            tls_required,
            name: &self.name,
            lang,
            version: env!("CARGO_PKG_VERSION"),
            protocol: 1,
            headers: true,
            no_responders: true,
            user: server.username(),
            pass: server.password(),
            jwt: None,
            sig: None,
        };
        match &self.auth {
            Auth::Nobody => {}
            Auth::Password(user, password) => {
                connect.user = Some(user);
                connect.pass = Some(password);
            }
            Auth::Credentials(jwt, key) => {
                let nonce = info.nonce.as_deref().unwrap_or_default();
                connect.jwt = Some(jwt);
                connect.sig = Some(signature(key, nonce)?);
            }
        }
        let json = serde_json::to_string(&connect).map_err(io::Error::other)?;
        Ok(format!("CONNECT {json}\r\nPING\r\n").into_bytes())
    }
}

/// Connects to a server's port for leaf nodes as a leaf node called `name`. Whether the server accepts it must still be
/// read, among messages about subscriptions, which [`next_op`] does not parse.
pub(crate) async fn introduce_leaf_node(
    config: &config::Nats,
    address: &str,
    name: &str,
) -> Result<Dialed, DialError> {
    let server: ServerAddr = address.parse()?;
    let dialer = Dialer::to(vec![server.clone()], config, name)?;
    dialer.introduce(&server, None).await
}

async fn read_op(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
) -> Result<Op, DialError> {
    loop {
        if let Some(op) = next_op(buffer).map_err(io::Error::other)? {
            return Ok(op);
        }
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
}

/// The server's nonce, signed, as NATS encodes it: base64url without padding.
fn signature(key: &KeyPair, nonce: &str) -> Result<String, nkeys::error::Error> {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    Ok(URL_SAFE_NO_PAD.encode(key.sign(nonce.as_bytes())?))
}

/// Reads a credentials file: the user's JWT and the seed of its key, each between two lines of dashes.
fn credentials(text: &str) -> io::Result<Auth> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let block = |title: &str| {
        let mut lines = text.lines().skip_while(|line| !line.contains(title));
        lines.nth(1).map(str::trim).filter(|line| !line.is_empty())
    };
    let jwt = block("BEGIN NATS USER JWT").ok_or_else(|| wrong("no user JWT in it"))?;
    let seed = block("BEGIN USER NKEY SEED").ok_or_else(|| wrong("no user seed in it"))?;
    let key = KeyPair::from_seed(seed).map_err(|error| wrong(&error.to_string()))?;
    Ok(Auth::Credentials(jwt.to_owned(), Box::new(key)))
}
