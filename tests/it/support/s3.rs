//! A server of S3 over a folder, for tests of uploads.

use std::{net::SocketAddr, path::PathBuf};

use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use s3s_fs::FileSystem;
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

pub(crate) const BUCKET: &str = "files";
const KEY: &str = "a-key";
const SECRET: &str = "the secret of the key";

/// A running server with one bucket. It ends with the runtime of its test.
pub(crate) struct S3 {
    address: SocketAddr,
    root: TempDir,
    serving: JoinHandle<()>,
}

impl S3 {
    pub(crate) async fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join(BUCKET)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = Self::serve(listener, &root);
        Self {
            address,
            root,
            serving,
        }
    }

    fn serve(listener: TcpListener, root: &TempDir) -> JoinHandle<()> {
        let files = FileSystem::new(root.path()).unwrap();
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let service = service.build();
        tokio::spawn(async move {
            // A stopped server lets its connections go.
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let service = service.clone();
                connections.spawn(async move {
                    let io = TokioIo::new(stream);
                    // A client that goes away is no failure of the test.
                    drop(http1::Builder::new().serve_connection(io, service).await);
                });
            }
        })
    }

    /// Stops it. Its files stay.
    pub(crate) async fn stop(&mut self) {
        self.serving.abort();
        super::eventually(
            "S3 is away",
            super::LONG,
            async || match TcpStream::connect(self.address).await {
                Ok(_) => Err("it still accepts".to_owned()),
                Err(_) => Ok(()),
            },
        )
        .await;
    }

    /// Starts it again, at the same address.
    pub(crate) async fn start_again(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.serving = Self::serve(listener, &self.root);
    }

    /// What `[uploads]` says of it.
    pub(crate) fn toml(&self) -> String {
        format!(
            "storage = 's3'\ns3_endpoint = 'http://{}'\ns3_bucket = '{BUCKET}'\ns3_key = '{KEY}'\ns3_secret = '{SECRET}'\n",
            self.address
        )
    }

    /// The folder of its objects.
    pub(crate) fn objects(&self) -> PathBuf {
        self.root.path().join(BUCKET)
    }
}
