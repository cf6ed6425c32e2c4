//! HTTP and WebSocket by hand on a bare TCP socket, for what no proper client sends.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use super::LONG;

pub(crate) const FIN: u8 = 0x80;
pub(crate) const CONTINUATION: u8 = 0x0;
pub(crate) const TEXT: u8 = 0x1;
pub(crate) const BINARY: u8 = 0x2;
pub(crate) const CLOSE: u8 = 0x8;
pub(crate) const PING: u8 = 0x9;
pub(crate) const PONG: u8 = 0xA;

const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

/// The answer to an HTTP request.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Status line and headers, in lower case.
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {}\n{}", self.head, self.body))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value.trim())
}

/// One HTTP request on a connection of its own; `headers` are whole lines with their ends.
pub(crate) async fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> Answer {
    let length = body.len();
    let text = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
    );
    exchange(address, &text).await
}

/// Sends `text` on a connection of its own, and gives the answer after which that is closed.
pub(crate) async fn exchange(address: SocketAddr, text: &str) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // An edge that refuses a request by its size does not read it to the end: the rest may break, the answer is there.
    let written = stream.write_all(text.as_bytes()).await;
    let mut answer = Vec::new();
    let read = timeout(LONG, stream.read_to_end(&mut answer));
    let read = read.await.expect("no answer came");
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("{text}: {written:?}, {read:?}, {answer:?}"));
    Answer {
        status: head.split(' ').nth(1).unwrap().parse().unwrap(),
        head: head.to_lowercase(),
        body: body.to_owned(),
    }
}

/// The client's end of a WebSocket, with nothing between the test and the bytes.
#[derive(Debug)]
pub(crate) struct Raw {
    pub(crate) stream: TcpStream,
    /// What was read and not yet taken.
    unread: Vec<u8>,
    /// Head of the answer to the handshake, in lower case.
    pub(crate) head: String,
}

/// How to connect.
#[derive(Debug)]
pub(crate) struct Dial<'a> {
    pub(crate) path: &'a str,
    /// Whole header lines with their ends.
    pub(crate) headers: &'a str,
    /// Address to come from.
    pub(crate) from: Option<SocketAddr>,
    /// Size of the socket's receive buffer.
    pub(crate) receive_buffer: Option<u32>,
}

impl Default for Dial<'_> {
    fn default() -> Self {
        Self {
            path: "/ws",
            headers: "",
            from: None,
            receive_buffer: None,
        }
    }
}

impl Raw {
    /// Connects with a token in the header, which is taken.
    pub(crate) async fn open(address: SocketAddr, token: &str) -> Self {
        let headers = bearer(token);
        let dial = Dial {
            headers: &headers,
            ..Dial::default()
        };
        let raw = Self::dial(address, dial).await;
        assert_eq!(raw.status(), 101, "{}", raw.head);
        raw
    }

    /// Connects and sends the handshake; whatever the answer is.
    pub(crate) async fn dial(address: SocketAddr, dial: Dial<'_>) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        if let Some(size) = dial.receive_buffer {
            socket.set_recv_buffer_size(size).unwrap();
        }
        if let Some(from) = dial.from {
            socket.bind(from).unwrap();
        }
        let mut stream = socket.connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let Dial { headers, path, .. } = dial;
        let text = format!(
            "GET {path} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{headers}\r\n"
        );
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut raw = Self {
            stream,
            unread: Vec::new(),
            head: String::new(),
        };
        let end = loop {
            if let Some(at) = raw.unread.windows(4).position(|w| w == b"\r\n\r\n") {
                break at;
            }
            assert!(raw.read().await, "the connection ended in the handshake");
        };
        let head: Vec<u8> = raw.unread.drain(..end + 4).collect();
        raw.head = String::from_utf8(head).unwrap().to_lowercase();
        raw
    }

    pub(crate) fn status(&self) -> u16 {
        self.head.split(' ').nth(1).unwrap().parse().unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }

    /// Reads once; `false` at the end of the stream.
    async fn read(&mut self) -> bool {
        let read = timeout(LONG, self.stream.read_buf(&mut self.unread));
        // A reset is an end too.
        read.await.expect("nothing came").unwrap_or(0) > 0
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        timeout(LONG, self.stream.write_all(bytes))
            .await
            .expect("the peer does not read")
            .unwrap();
    }

    /// Sends a command.
    pub(crate) async fn text(&mut self, text: &str) {
        self.write(&frame(FIN | TEXT, text.as_bytes())).await;
    }

    /// The next frame: first byte and payload. `None`: the end.
    pub(crate) async fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            if let Some((head, length)) = self.announced()
                && self.unread.len() >= head + length
            {
                let frame: Vec<u8> = self.unread.drain(..head + length).collect();
                return Some((frame[0], frame[head..].to_vec()));
            }
            if !self.read().await {
                assert!(self.unread.is_empty(), "the stream ended inside a frame");
                return None;
            }
        }
    }

    /// Lengths of head and payload of the first unread frame.
    fn announced(&self) -> Option<(usize, usize)> {
        let unread = &self.unread;
        match *unread.get(1)? {
            126 => {
                let length = unread.get(2..4)?.try_into().unwrap();
                Some((4, usize::from(u16::from_be_bytes(length))))
            }
            127 => {
                let length = unread.get(2..10)?.try_into().unwrap();
                Some((10, usize::try_from(u64::from_be_bytes(length)).unwrap()))
            }
            short => {
                assert!(short < 126, "a server does not mask");
                Some((2, usize::from(short)))
            }
        }
    }

    /// The next text frame; pings are passed over.
    pub(crate) async fn json(&mut self) -> Value {
        loop {
            let (first, payload) = self.frame().await.expect("the connection has ended");
            if first == FIN | PING {
                continue;
            }
            assert_eq!(first, FIN | TEXT, "{}", String::from_utf8_lossy(&payload));
            return serde_json::from_slice(&payload).unwrap();
        }
    }

    /// Sends a command and gives its reply; what is pushed in between is dropped.
    pub(crate) async fn call(&mut self, command: Value) -> Value {
        self.text(&command.to_string()).await;
        loop {
            let frame = self.json().await;
            if frame.get("rid") == command.get("rid") {
                return frame;
            }
        }
    }

    /// What comes up to the close frame, and its code and reason; after it there is only the end.
    pub(crate) async fn until_close(&mut self) -> (Vec<Value>, u16, String) {
        let mut frames = Vec::new();
        loop {
            let (first, payload) = self.frame().await.expect("ended without a close frame");
            if first == FIN | TEXT {
                frames.push(serde_json::from_slice(&payload).unwrap());
            } else if first == FIN | CLOSE {
                assert_eq!(self.frame().await, None, "a frame after the close frame");
                let code = u16::from_be_bytes(payload[..2].try_into().unwrap());
                return (
                    frames,
                    code,
                    String::from_utf8(payload[2..].to_vec()).unwrap(),
                );
            }
        }
    }
}

/// The header line of a token.
pub(crate) fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}\r\n")
}

/// A masked frame.
pub(crate) fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = head(first, payload.len() as u64);
    bytes.extend(payload.iter().zip(MASK.iter().cycle()).map(|(b, m)| b ^ m));
    bytes
}

/// The head of a masked frame that announces `length` bytes.
pub(crate) fn head(first: u8, length: u64) -> Vec<u8> {
    let mut bytes = vec![first];
    if let Ok(length) = u8::try_from(length)
        && length < 126
    {
        bytes.push(0x80 | length);
    } else if let Ok(length) = u16::try_from(length) {
        bytes.push(0x80 | 126);
        bytes.extend(length.to_be_bytes());
    } else {
        bytes.push(0x80 | 127);
        bytes.extend(length.to_be_bytes());
    }
    bytes.extend(MASK);
    bytes
}
