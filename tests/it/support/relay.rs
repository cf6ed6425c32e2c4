//! A relay between a client and an edge, as a load balancer or a mobile network is one.

use std::net::SocketAddr;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

/// Passes connections on until it is frozen; those that come later are passed on again.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    freezes: watch::Sender<u64>,
    _task: JoinSet<()>,
}

impl Relay {
    pub(crate) async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let freezes = watch::Sender::new(0);
        let state = freezes.clone();
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut relayed = JoinSet::new();
            while let Ok((mut inner, _)) = listener.accept().await {
                let mut frozen = state.subscribe();
                relayed.spawn(async move {
                    let mut outer = TcpStream::connect(to).await.unwrap();
                    tokio::select! {
                        _ended = copy_bidirectional(&mut inner, &mut outer) => {}
                        // Both sockets stay open, and nobody is told.
                        _frozen = frozen.changed() => std::future::pending().await,
                    }
                });
            }
        });
        Self {
            address,
            freezes,
            _task: task,
        }
    }

    /// From now on nothing moves any more on the connections that are there.
    pub(crate) fn freeze(&self) {
        self.freezes.send_modify(|freezes| *freezes += 1);
    }
}
