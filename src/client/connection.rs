//! One WebSocket to an edge.
//!
//! `fastwebsockets`' `read_frame` is not cancel-safe (a header is consumed before its payload is awaited), so one task
//! owns the reading half and never selects over it. Another task owns the writing half and sends everything that is
//! queued in one write.

use std::{
    collections::HashMap,
    fmt, io,
    pin::pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use fastwebsockets::{
    FragmentCollector, Frame as WireFrame, OpCode, Payload, Role, WebSocket, WebSocketError,
    handshake::generate_key,
};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    header::{AUTHORIZATION, CONNECTION, HOST, SEC_WEBSOCKET_PROTOCOL, UPGRADE},
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Chain, Join, Sink},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

use super::{Endpoint, Frame, Refusal};

/// The WebSocket subprotocol that this client speaks.
const SUBPROTOCOL: &str = "natter.v1";
/// Timeout of TCP connect and handshake together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout of a command's reply. An edge answers a publish within 5 s, whatever NATS does.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long [`Connection::close`] waits for the edge's half of the closing handshake.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Frames that may wait for [`Connection::next`]; when full, the socket is not read.
const FRAME_QUEUE: usize = 1024;
/// Commands that may wait to be written; when full, further commands wait.
const COMMAND_QUEUE: usize = 256;
/// Maximum number of bytes collected into one write.
const WRITE_BATCH: usize = 64 * 1024;
/// Largest frame accepted from an edge: pages of history are the largest.
const MAX_FRAME: usize = 64 << 20;
/// Maximum number of bytes read of a refused handshake's body, for its message.
const MAX_REFUSAL: usize = 4096;

/// Close code of a connection that ended without a close frame (RFC 6455 section 7.1.5); never on the wire.
const ABNORMAL: u16 = 1006;

/// One session at an edge. Dropping it cuts the connection without a closing handshake, as a crash would.
///
/// Replies to [`Commands::call`] go to the caller. All other frames (pushes, and replies to [`Commands::send`]) come
/// out of [`next`](Self::next) in the order in which they arrived. A checker that only uses `send` sees every frame.
#[derive(Debug)]
pub struct Connection {
    commands: Commands,
    frames: mpsc::Receiver<Frame>,
    reader: AbortOnDropHandle<()>,
    _writer: AbortOnDropHandle<()>,
}

/// The sending side of a [`Connection`]. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Commands {
    queue: mpsc::Sender<Outgoing>,
    shared: Arc<Shared>,
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// The close code of the edge; 1006 if it sent none.
    pub code: u16,
    /// The edge's reason, or what happened to the connection.
    pub reason: String,
}

/// The connection was not established.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("can't connect to {endpoint}")]
    Connect {
        endpoint: Endpoint,
        source: io::Error,
    },
    #[error("no answer from {endpoint} within {within:?}")]
    Timeout {
        endpoint: Endpoint,
        within: Duration,
    },
    #[error("the handshake with {endpoint} failed")]
    Handshake {
        endpoint: Endpoint,
        source: hyper::Error,
    },
    /// The edge answered with a status other than 101.
    #[error("{endpoint} refused the connection: HTTP {status} {message}")]
    Refused {
        endpoint: Endpoint,
        status: u16,
        /// The beginning of the response's body.
        message: String,
    },
    #[error("{endpoint} does not speak {SUBPROTOCOL}")]
    NotNatter { endpoint: Endpoint },
    /// The token has characters that are not allowed in a header.
    #[error("the token is not a JWT")]
    BadToken,
}

/// A command was not executed, or its outcome is unknown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The edge answered `error`.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// The connection ended before the reply; the outcome is unknown.
    #[error("the connection ended ({0})")]
    Closed(End),
    /// No reply in time; the outcome is unknown.
    #[error("no answer within {CALL_TIMEOUT:?}")]
    Timeout,
}

/// When a silent connection counts as dead although TCP has not noticed: a frozen relay, a network that is gone.
///
/// An edge pings every 25 s, so a connection that works needs no ping of this side. If the edge's pings are missing,
/// this side pings once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Silence {
    /// After this time without a frame, this side pings.
    pub ask_after: Duration,
    /// If nothing arrives for this time after that ping, the connection ends. Also the timeout of one frame.
    pub answer_within: Duration,
}

impl Default for Silence {
    fn default() -> Self {
        Self {
            ask_after: Duration::from_secs(27),
            answer_within: Duration::from_secs(10),
        }
    }
}

#[derive(Debug)]
enum Outgoing {
    Text(String),
    Ping,
    Pong(Vec<u8>),
    /// The last frame. Nothing is sent after it.
    Close(u16),
}

#[derive(Debug)]
struct Shared {
    next_rid: AtomicU64,
    /// The calls that wait for a reply, by `rid`. `None` once the connection has ended: no further call may wait then.
    waiting: Mutex<Option<HashMap<u64, oneshot::Sender<Frame>>>>,
    end: OnceLock<End>,
}

/// The reading half, preceded by what hyper had read beyond the handshake, and a writing half that is never used.
/// fastwebsockets needs both in one type, but by itself it only writes pongs and closes, which are switched off.
type Reading = FragmentCollector<Join<Chain<io::Cursor<Bytes>, OwnedReadHalf>, Sink>>;

impl Connection {
    /// Connects and upgrades. `token` goes into the `Authorization` header; without one, `auth` must be the first
    /// command.
    ///
    /// # Errors
    /// [`ConnectError`]; a refused token is `Refused` with status 401.
    pub async fn open(endpoint: &Endpoint, token: Option<&str>) -> Result<Self, ConnectError> {
        Self::open_with(endpoint, token, Silence::default()).await
    }

    /// Like [`open`](Self::open), with the given [`Silence`].
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn open_with(
        endpoint: &Endpoint,
        token: Option<&str>,
        silence: Silence,
    ) -> Result<Self, ConnectError> {
        match timeout(CONNECT_TIMEOUT, Self::handshake(endpoint, token, silence)).await {
            Ok(result) => result,
            Err(_elapsed) => Err(ConnectError::Timeout {
                endpoint: endpoint.clone(),
                within: CONNECT_TIMEOUT,
            }),
        }
    }

    async fn handshake(
        endpoint: &Endpoint,
        token: Option<&str>,
        silence: Silence,
    ) -> Result<Self, ConnectError> {
        let connect = |source| ConnectError::Connect {
            endpoint: endpoint.clone(),
            source,
        };
        let handshake = |source| ConnectError::Handshake {
            endpoint: endpoint.clone(),
            source,
        };
        let mut request = Request::get(endpoint.path())
            .header(HOST, endpoint.authority())
            .header(UPGRADE, "websocket")
            .header(CONNECTION, "Upgrade")
            .header("Sec-WebSocket-Key", generate_key())
            .header("Sec-WebSocket-Version", "13")
            .header(SEC_WEBSOCKET_PROTOCOL, SUBPROTOCOL);
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        // Everything else in the request comes from an `Endpoint`, which is valid.
        let request = request
            .body(Empty::<Bytes>::new())
            .map_err(|_invalid_header| ConnectError::BadToken)?;

        let socket = TcpStream::connect(endpoint.authority())
            .await
            .map_err(connect)?;
        // Commands are small, and the caller waits for the reply.
        socket.set_nodelay(true).map_err(connect)?;
        let (mut sender, http) = hyper::client::conn::http1::handshake(TokioIo::new(socket))
            .await
            .map_err(handshake)?;
        // Both must be polled: `http` moves the bytes of the exchange, and ends when the exchange drops its sender.
        let exchange = async move {
            let response = sender.send_request(request).await?;
            answer(response).await
        };
        let (_, answered) = futures_util::future::join(http.with_upgrades(), exchange).await;
        match answered.map_err(handshake)? {
            Answer::Upgraded(upgraded) => {
                let parts = upgraded
                    .downcast::<TokioIo<TcpStream>>()
                    .expect("the connection was made of a TcpStream a few lines above");
                Ok(Self::start(parts.io.into_inner(), parts.read_buf, silence))
            }
            Answer::NotNatter => Err(ConnectError::NotNatter {
                endpoint: endpoint.clone(),
            }),
            Answer::Refused { status, message } => Err(ConnectError::Refused {
                endpoint: endpoint.clone(),
                status,
                message,
            }),
        }
    }

    fn start(socket: TcpStream, already_read: Bytes, silence: Silence) -> Self {
        let (read_half, write_half) = socket.into_split();
        let stream = tokio::io::join(
            io::Cursor::new(already_read).chain(read_half),
            tokio::io::sink(),
        );
        let mut socket = WebSocket::after_handshake(stream, Role::Client);
        socket.set_auto_close(false);
        socket.set_auto_pong(false);
        socket.set_max_message_size(MAX_FRAME);

        let shared = Arc::new(Shared {
            next_rid: AtomicU64::new(1),
            waiting: Mutex::new(Some(HashMap::new())),
            end: OnceLock::new(),
        });
        let (queue, outgoing) = mpsc::channel(COMMAND_QUEUE);
        let (incoming, frames) = mpsc::channel(FRAME_QUEUE);
        let reader = Reader {
            socket: FragmentCollector::new(socket),
            silence,
            frames: incoming,
            outgoing: queue.clone(),
            // Ends the connection for all waiting callers, even if the task is aborted.
            ending: Ending(Arc::clone(&shared)),
        };
        Self {
            commands: Commands { queue, shared },
            frames,
            reader: AbortOnDropHandle::new(tokio::spawn(reader.run())),
            _writer: AbortOnDropHandle::new(tokio::spawn(write(write_half, outgoing))),
        }
    }

    /// The sending side.
    #[must_use]
    pub fn commands(&self) -> &Commands {
        &self.commands
    }

    /// The next frame that is not the reply to a call; `None` when the connection has ended (see [`end`](Self::end)).
    ///
    /// Cancel-safe.
    pub async fn next(&mut self) -> Option<Frame> {
        self.frames.recv().await
    }

    /// How the connection ended; `None` while it has not.
    #[must_use]
    pub fn end(&self) -> Option<End> {
        self.commands.shared.end.get().cloned()
    }

    /// Closes with 1000, waits a short while for the edge's close frame, and discards frames that arrive meanwhile.
    pub async fn close(mut self) -> End {
        // If the queue is full or the connection has ended, no close frame is needed.
        let asked = self.commands.queue.try_send(Outgoing::Close(1000));
        if asked.is_ok() {
            let drained = async { while self.frames.recv().await.is_some() {} };
            // If the timeout passes, dropping the tasks ends the connection.
            let _elapsed = timeout(CLOSE_TIMEOUT, drained).await;
        }
        self.reader.abort();
        self.end().unwrap_or_else(|| End {
            code: ABNORMAL,
            reason: "the edge did not answer the close".to_owned(),
        })
    }
}

impl Commands {
    /// Sends `op` with `fields` (anything that serialises to a JSON object) and waits for its reply.
    ///
    /// Frames must be taken from the connection meanwhile, or their queue fills up and the reply is stuck behind it.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn call(&self, op: &str, fields: impl Serialize) -> Result<Frame, CallError> {
        let (reply, replied) = oneshot::channel();
        let rid = self.next_rid();
        match self.shared.waiting.lock().as_mut() {
            Some(waiting) => waiting.insert(rid, reply),
            None => return Err(CallError::Closed(self.ended())),
        };
        // If the caller gives up, a late reply is delivered like other frames.
        let _forget = Forget {
            commands: self,
            rid,
        };
        let exchange = async {
            self.send_text(command(op, rid, &fields)).await?;
            replied
                .await
                .map_err(|_ended| CallError::Closed(self.ended()))
        };
        let frame = timeout(CALL_TIMEOUT, exchange)
            .await
            .map_err(|_elapsed| CallError::Timeout)??;
        match frame.refusal() {
            Some(refusal) => Err(CallError::Refused(refusal)),
            None => Ok(frame),
        }
    }

    /// Sends `op` with `fields` without waiting: the reply comes out of [`Connection::next`]. Returns its `rid`.
    ///
    /// # Errors
    /// [`CallError::Closed`].
    pub async fn send(&self, op: &str, fields: impl Serialize) -> Result<u64, CallError> {
        let rid = self.next_rid();
        self.send_text(command(op, rid, &fields)).await?;
        Ok(rid)
    }

    /// Sends any text, even one that is not a command.
    ///
    /// # Errors
    /// [`CallError::Closed`].
    pub async fn send_text(&self, text: String) -> Result<(), CallError> {
        self.queue
            .send(Outgoing::Text(text))
            .await
            .map_err(|_closed| CallError::Closed(self.ended()))
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shared.end.get().is_some()
    }

    fn next_rid(&self) -> u64 {
        self.shared.next_rid.fetch_add(1, Ordering::Relaxed)
    }

    fn ended(&self) -> End {
        self.shared.end.get().cloned().unwrap_or_else(|| End {
            code: ABNORMAL,
            reason: "the connection was cut while writing".to_owned(),
        })
    }
}

/// A command as text. If `fields` is not an object, the edge refuses the command, which may be what a test wants.
fn command(op: &str, rid: u64, fields: &impl Serialize) -> String {
    #[derive(Serialize)]
    struct Command<'a, F> {
        op: &'a str,
        rid: u64,
        #[serde(flatten)]
        fields: &'a F,
    }
    serde_json::to_string(&Command { op, rid, fields }).unwrap_or_else(|error| error.to_string())
}

/// Removes a call from the waiting ones when it is dropped.
struct Forget<'a> {
    commands: &'a Commands,
    rid: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = self.commands.shared.waiting.lock().as_mut() {
            waiting.remove(&self.rid);
        }
    }
}

struct Reader {
    socket: Reading,
    silence: Silence,
    frames: mpsc::Sender<Frame>,
    outgoing: mpsc::Sender<Outgoing>,
    ending: Ending,
}

impl Reader {
    async fn run(mut self) {
        let end = self.read().await;
        tracing::debug!(code = end.code, reason = end.reason, "connection ended");
        self.ending.set(end);
        // `ending` must be dropped before `frames`: a reader that sees the end of the frames may ask for the reason.
        drop(self.ending);
    }

    async fn read(&mut self) -> End {
        let abnormal = |reason: String| End {
            code: ABNORMAL,
            reason,
        };
        loop {
            let Silence {
                ask_after,
                answer_within,
            } = self.silence;
            // The first timeout must not cancel `read_frame` midway. After the second one nothing is read any more.
            let heard = {
                let mut reading = pin!(self.socket.read_frame());
                match timeout(ask_after, reading.as_mut()).await {
                    Err(_elapsed) => {
                        // If the queue is full, the edge answers what is in it just as well.
                        let _full_or_closed = self.outgoing.try_send(Outgoing::Ping);
                        timeout(answer_within, reading).await
                    }
                    heard => heard,
                }
            };
            let frame = match heard {
                Ok(Ok(frame)) => frame,
                Ok(Err(WebSocketError::UnexpectedEOF)) => {
                    return abnormal("the connection was cut".to_owned());
                }
                Ok(Err(error)) => return abnormal(error.to_string()),
                Err(_elapsed) => {
                    let silent = ask_after.saturating_add(answer_within);
                    return abnormal(format!("nothing was received for {silent:?}"));
                }
            };
            match frame.opcode {
                OpCode::Text => {
                    let text = match simdutf8::basic::from_utf8(&frame.payload) {
                        Ok(text) => text,
                        Err(error) => return abnormal(error.to_string()),
                    };
                    let frame = match Frame::parse(text) {
                        Ok(frame) => frame,
                        Err(error) => {
                            return abnormal(format!("a frame that is not {SUBPROTOCOL}: {error}"));
                        }
                    };
                    self.deliver(frame).await;
                }
                // If the queue is full, the pong is not needed: what fills the queue shows that this side is alive.
                OpCode::Ping => {
                    let pong = Outgoing::Pong(frame.payload.to_vec());
                    let _full_or_closed = self.outgoing.try_send(pong);
                }
                OpCode::Close => {
                    let (code, reason) = match frame.payload.split_first_chunk::<2>() {
                        Some((code, reason)) => (
                            u16::from_be_bytes(*code),
                            String::from_utf8_lossy(reason).into_owned(),
                        ),
                        // RFC 6455 section 7.1.5: no status code received.
                        None => (1005, String::new()),
                    };
                    let answer = if code == 1005 { 1000 } else { code };
                    let _full_or_closed = self.outgoing.try_send(Outgoing::Close(answer));
                    return End { code, reason };
                }
                OpCode::Pong => {}
                OpCode::Binary | OpCode::Continuation => {
                    return abnormal(format!("a binary frame, which is not {SUBPROTOCOL}"));
                }
            }
        }
    }

    async fn deliver(&self, frame: Frame) {
        let waiter = frame.rid().and_then(|rid| {
            let mut waiting = self.ending.0.waiting.lock();
            waiting.as_mut().and_then(|waiting| waiting.remove(&rid))
        });
        let unclaimed = match waiter {
            Some(waiter) => waiter.send(frame).err(),
            None => Some(frame),
        };
        if let Some(frame) = unclaimed {
            // Fails only while the connection is being dropped.
            let _dropped = self.frames.send(frame).await;
        }
    }
}

/// Reports the end of the connection to all waiting callers.
struct Ending(Arc<Shared>);

impl Ending {
    fn set(&self, end: End) {
        // The first reason is the cause, later ones are consequences.
        let _already_set = self.0.end.set(end);
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.set(End {
            code: ABNORMAL,
            reason: "dropped by this side".to_owned(),
        });
        self.0.waiting.lock().take();
    }
}

/// Writes what is queued, as much as possible at once. Ends after a close frame, when the connection is gone, or when
/// all senders are gone.
async fn write(mut socket: OwnedWriteHalf, mut queue: mpsc::Receiver<Outgoing>) {
    let mut bytes = Vec::new();
    while let Some(mut next) = queue.recv().await {
        bytes.clear();
        let mut last = false;
        loop {
            last |= matches!(next, Outgoing::Close(_));
            encode(next, &mut bytes);
            if last || bytes.len() >= WRITE_BATCH {
                break;
            }
            match queue.try_recv() {
                Ok(more) => next = more,
                Err(_empty_or_closed) => break,
            }
        }
        if let Err(error) = socket.write_all(&bytes).await {
            // The reader notices the same end of the connection and reports it.
            tracing::debug!(%error, "write failed");
            return;
        }
        if last {
            return;
        }
        bytes.shrink_to(WRITE_BATCH);
    }
}

fn encode(frame: Outgoing, bytes: &mut Vec<u8>) {
    let payload = |bytes: Vec<u8>| Payload::Owned(bytes);
    let mut frame = match frame {
        Outgoing::Text(text) => WireFrame::text(payload(text.into_bytes())),
        Outgoing::Ping => WireFrame::new(true, OpCode::Ping, None, payload(Vec::new())),
        Outgoing::Pong(data) => WireFrame::pong(payload(data)),
        Outgoing::Close(code) => WireFrame::close(code, b""),
    };
    frame.mask();
    // 2 bytes, 8 of length, 4 of mask.
    let mut head = [0; 14];
    let len = frame.fmt_head(&mut head);
    bytes.extend(head.iter().take(len));
    bytes.extend_from_slice(&frame.payload);
}

enum Answer {
    Upgraded(hyper::upgrade::Upgraded),
    NotNatter,
    Refused { status: u16, message: String },
}

async fn answer(mut response: Response<Incoming>) -> Result<Answer, hyper::Error> {
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), MAX_REFUSAL);
        let message = match body.collect().await {
            Ok(body) => String::from_utf8_lossy(&body.to_bytes()).into_owned(),
            Err(_too_long_or_cut) => String::new(),
        };
        return Ok(Answer::Refused { status, message });
    }
    let headers = response.headers();
    let chosen = headers.get(SEC_WEBSOCKET_PROTOCOL);
    if chosen.is_none_or(|protocol| protocol.as_bytes() != SUBPROTOCOL.as_bytes()) {
        return Ok(Answer::NotNatter);
    }
    hyper::upgrade::on(&mut response)
        .await
        .map(Answer::Upgraded)
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.reason.is_empty() {
            write!(f, "{}", self.code)
        } else {
            write!(f, "{} {}", self.code, self.reason)
        }
    }
}
