//! A client of `text/event-stream`, with nothing between the test and the lines.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    time::timeout,
};

use super::LONG;

/// One event: its id, name and data.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Event {
    pub(crate) id: Option<String>,
    pub(crate) name: String,
    pub(crate) data: Value,
}

/// A stream of events.
pub(crate) struct Events {
    pub(crate) reader: BufReader<TcpStream>,
}

impl Events {
    pub(crate) async fn open(address: SocketAddr, path: &str, headers: &str) -> Self {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let text = format!("GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n");
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut events = Self {
            reader: BufReader::new(stream),
        };
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            let line = events.line().await.unwrap_or_else(|| panic!("{head}"));
            head += &line;
        }
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains("text/event-stream"), "{head}");
        assert_eq!(events.line().await.unwrap(), "retry: 1000\n");
        assert_eq!(events.line().await.unwrap(), "\n");
        events
    }

    pub(crate) async fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = timeout(LONG, self.reader.read_line(&mut line)).await;
        let read = read.expect("nothing comes");
        matches!(read, Ok(1..)).then_some(line)
    }

    /// The next event; `None` at the end. Comments are skipped.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        let (mut id, mut name, mut data) = (None, None, Vec::new());
        loop {
            let line = self.line().await?;
            let line = line.strip_suffix('\n').unwrap();
            match line.split_once(": ") {
                Some(("id", its)) => id = Some(its.to_owned()),
                Some(("event", its)) => name = Some(its.to_owned()),
                Some(("data", its)) => data.push(its.to_owned()),
                _ if line.is_empty() && name.is_some() => break,
                _ => assert!(line.is_empty() || line.starts_with(':'), "{line}"),
            }
        }
        let data = serde_json::from_str(&data.join("\n")).unwrap();
        let name = name.unwrap();
        Some(Event { id, name, data })
    }

    pub(crate) async fn named(&mut self, name: &str) -> Event {
        let event = self.next().await.expect("the stream ended");
        assert_eq!(event.name, name, "{event:?}");
        event
    }

    pub(crate) async fn until(&mut self, name: &str) -> Event {
        let until = async {
            loop {
                let event = self.next().await.expect("the stream ended");
                if event.name == name {
                    return event;
                }
            }
        };
        // Comments come all the time, so a wait for a line alone would have no end.
        timeout(LONG, until).await.expect("no such event")
    }
}
