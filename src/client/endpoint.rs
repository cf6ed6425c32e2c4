//! The address of an edge: `ws://host:port/path`.

use std::{fmt, str::FromStr};

use hyper::Uri;

/// Path of an edge's WebSocket, used if a URL has none.
const DEFAULT_PATH: &str = "/ws";

/// The address of an edge's WebSocket.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    host: String,
    port: u16,
    path: String,
}

/// A URL was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("URL {url:?}: {what}")]
pub struct BadEndpoint {
    /// The URL that was given.
    pub url: String,
    /// What is wrong with it.
    pub what: &'static str,
}

impl Endpoint {
    /// `host:port`, in the form of the `Host` header and of `TcpStream::connect`.
    #[must_use]
    pub fn authority(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// Path and query of the handshake request.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl FromStr for Endpoint {
    type Err = BadEndpoint;

    /// Parses `ws://host[:port][/path]`; the default path is `/ws`. `http://` is accepted as `ws://`, because people
    /// copy it from the address bar.
    fn from_str(url: &str) -> Result<Self, BadEndpoint> {
        let bad = |what| BadEndpoint {
            url: url.to_owned(),
            what,
        };
        let uri: Uri = url.parse().map_err(|_invalid| bad("not a URL"))?;
        match uri.scheme_str() {
            Some("ws" | "http") => {}
            Some("wss" | "https") => {
                return Err(bad(
                    "TLS is not supported by this tool; use ws:// to the edge itself, or a local tunnel",
                ));
            }
            Some(_) => return Err(bad("the scheme must be ws")),
            None => return Err(bad("the scheme is missing: ws://host:port")),
        }
        let host = uri
            .host()
            .filter(|host| !host.is_empty())
            .ok_or_else(|| bad("the host is missing"))?;
        let path = match uri.path_and_query().map_or("/", |path| path.as_str()) {
            "/" => DEFAULT_PATH,
            path => path,
        };
        Ok(Self {
            host: host.to_owned(),
            port: uri.port_u16().unwrap_or(80),
            path: path.to_owned(),
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ws://{}:{}{}", self.host, self.port, self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        for (url, shown) in [
            ("ws://127.0.0.1:8080/ws", "ws://127.0.0.1:8080/ws"),
            ("ws://127.0.0.1:8080", "ws://127.0.0.1:8080/ws"),
            ("http://edge:8080/", "ws://edge:8080/ws"),
            ("ws://[::1]:9/x?y=1", "ws://[::1]:9/x?y=1"),
            ("ws://edge", "ws://edge:80/ws"),
        ] {
            assert_eq!(url.parse::<Endpoint>().unwrap().to_string(), shown, "{url}");
        }
        for url in ["wss://edge", "edge:8080", "/ws", "", "ftp://edge", "ws://"] {
            assert!(url.parse::<Endpoint>().is_err(), "{url:?} was accepted");
        }
        let tls = "wss://edge".parse::<Endpoint>().unwrap_err().to_string();
        assert!(tls.contains("TLS"), "{tls}");
    }
}
