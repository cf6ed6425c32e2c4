//! The edges that `natter up` runs: children of the same binary.

use std::{
    ffi::OsString,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    config::{Config, UploadStorage},
    servers::{Check, CheckError, Spec},
};

/// Timeout of an edge's start until it is ready.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// Time that an edge gets in addition to its own drain timeout before it is killed.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// Maximum number of bytes read of a health answer; its first line is enough.
const ANSWER_BYTES: u64 = 1024;

/// What all edges of one `up` have in common.
#[derive(Debug)]
pub(super) struct EdgeTemplate<'a> {
    pub binary: &'a Path,
    pub config: &'a Config,
    /// The file given with `--config`, passed on.
    pub config_file: Option<&'a Path>,
    pub nats_url: &'a str,
    /// The development secret; `None` if the configuration has a secret.
    pub secret: Option<&'a str>,
    pub logs: PathBuf,
}

impl EdgeTemplate<'_> {
    /// The edge with this id that listens on `listen`.
    pub(super) fn spec(&self, id: &str, listen: SocketAddr) -> Spec {
        // Quoted, because a name of digits would be read as a number.
        let mut env = vec![
            ("NATTER__EDGE__LISTEN", listen.to_string()),
            ("NATTER__EDGE__ID", format!("{id:?}")),
        ];
        env.extend(common_env(self.config, self.nats_url));
        if self.config.push.is_on() {
            // The notifier asks who is online.
            env.push(("NATTER__PRESENCE__USERS", "true".to_owned()));
        }
        if let Some(secret) = self.secret {
            env.push(("NATTER__AUTH__HS256_SECRET", secret.to_owned()));
        }
        let child = Child {
            role: "edge",
            of: id,
            binary: self.binary,
            config_file: self.config_file,
            logs: &self.logs,
            ready_within: READY_WITHIN,
            stop_within: self.config.edge.drain_timeout + STOP_GRACE,
        };
        child.spec(env, listen)
    }
}

/// A child of the same binary.
#[derive(Debug)]
pub(super) struct Child<'a> {
    pub role: &'a str,
    /// Tells it from others of this role; may be empty.
    pub of: &'a str,
    pub binary: &'a Path,
    /// The file given with `--config`, passed on.
    pub config_file: Option<&'a Path>,
    pub logs: &'a Path,
    pub ready_within: Duration,
    pub stop_within: Duration,
}

impl Child<'_> {
    /// The process that listens on `listen`.
    pub(super) fn spec(&self, env: Vec<(&'static str, String)>, listen: SocketAddr) -> Spec {
        let (role, of) = (self.role, self.of);
        let (name, log) = if of.is_empty() {
            (role.to_owned(), format!("{role}.log"))
        } else {
            (format!("{role} {of}"), format!("{role}-{of}.log"))
        };
        let mut args: Vec<OsString> = vec![role.into()];
        if let Some(file) = self.config_file {
            args.extend(["--config".into(), file.into()]);
        }
        let reachable = reachable(listen);
        Spec {
            name,
            program: self.binary.to_owned(),
            args,
            env: env
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect(),
            log: self.logs.join(log),
            ready: http_check(reachable, "/readyz"),
            // Not `/readyz`: a process that waits for NATS is not ready, and must not be killed for that.
            alive: http_check(reachable, "/healthz"),
            ready_within: self.ready_within,
            stop_within: self.stop_within,
        }
    }
}

/// The region of a child of which each region has one, to tell it from the others; empty if there are no others.
pub(super) fn region_of(config: &Config) -> &str {
    if config.regions.is_empty() {
        ""
    } else {
        &config.region
    }
}

/// Environment of every child: its region, the server that runs here, and the storage of uploads.
pub(super) fn common_env(config: &Config, nats_url: &str) -> Vec<(&'static str, String)> {
    let mut env = vec![
        ("NATTER__NATS__URL", nats_url.to_owned()),
        // Quoted: a name of digits would be read as a number.
        ("NATTER__REGION", format!("{:?}", config.region)),
        ("NATTER__REGIONS", format!("{:?}", config.regions)),
        (
            "NATTER__MIRRORS__LEAFNODES",
            config.mirrors.leafnodes.clone(),
        ),
        // The server that `up` runs needs no credentials, and refuses wrong ones.
        ("NATTER__NATS__USER", String::new()),
        ("NATTER__NATS__PASSWORD", String::new()),
        ("NATTER__NATS__PASSWORD_FILE", String::new()),
        ("NATTER__NATS__CREDS_FILE", String::new()),
        ("NATTER__MIRRORS__USER", String::new()),
        ("NATTER__MIRRORS__PASSWORD_FILE", String::new()),
    ];
    if config.uploads.storage == UploadStorage::Local {
        let secret = config.uploads.secret.expose();
        env.extend([
            ("NATTER__UPLOADS__STORAGE", "local".to_owned()),
            (
                "NATTER__UPLOADS__FOLDER",
                config.uploads.folder.display().to_string(),
            ),
            ("NATTER__UPLOADS__SECRET", secret.to_owned()),
        ]);
    }
    env
}

/// Address at which a local client reaches a listener on `listen`, which may be "all addresses".
pub(super) fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = if listen.ip().is_unspecified() {
        std::net::Ipv4Addr::LOCALHOST.into()
    } else {
        listen.ip()
    };
    SocketAddr::new(ip, listen.port())
}

/// Whether a GET of `path` is answered with 200.
pub(super) fn http_check(address: SocketAddr, path: &'static str) -> Check {
    Arc::new(move |_pid| Box::pin(get_is_ok(address, path)))
}

async fn get_is_ok(address: SocketAddr, path: &str) -> Result<(), CheckError> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES).read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let status = answer.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) == Some("200") {
        Ok(())
    } else {
        Err(format!("GET {path}: {status}").into())
    }
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format as _, Toml};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn only_200_is_well() {
        for (status, well) in [("200 OK", true), ("503 Service Unavailable", false)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let serve = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 512];
                let length = stream.read(&mut request).await.unwrap();
                assert!(request[..length].starts_with(b"GET /readyz HTTP/1.1\r\n"));
                let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            };
            let (answer, ()) = tokio::join!(get_is_ok(address, "/readyz"), serve);
            assert_eq!(answer.is_ok(), well, "{status}: {answer:?}");
        }
    }

    #[test]
    fn an_edge_is_told_what_differs_and_keeps_its_secret_out_of_sight() {
        let config = Config::with_defaults(Toml::string("region = '7'")).unwrap();
        let template = EdgeTemplate {
            binary: Path::new("natter"),
            config: &config,
            config_file: Some(Path::new("my.toml")),
            nats_url: "nats://127.0.0.1:4333",
            secret: Some("dev-0123456789012345678901234567890123"),
            logs: PathBuf::from("logs"),
        };
        let spec = template.spec("7-1", "0.0.0.0:8081".parse().unwrap());
        assert_eq!(spec.args, ["edge", "--config", "my.toml"]);
        for (key, value) in [
            ("NATTER__EDGE__LISTEN", "0.0.0.0:8081"),
            ("NATTER__REGION", "\"7\""),
            ("NATTER__REGIONS", "[]"),
            ("NATTER__NATS__URL", "nats://127.0.0.1:4333"),
        ] {
            assert!(
                spec.env.contains(&(key.to_owned(), value.to_owned())),
                "{key}"
            );
        }
        assert!(!format!("{spec:?}").contains("dev-"));
        assert_eq!(
            reachable("0.0.0.0:8081".parse().unwrap()),
            "127.0.0.1:8081".parse().unwrap()
        );
    }
}
