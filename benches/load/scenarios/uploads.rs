//! Messages while a large file comes in, and while none does.

use std::{net::SocketAddr, thread, time::Duration};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep_until},
};

use super::{
    Begin, Bench, Peer, Runs, Server, Swarm, Table, Target, WARM_UP, latency, print, publishers,
    row,
};
use crate::support::{
    mesh::{Mesh, ask, token},
    mongodb_url,
};

const FILE: usize = 200_000_000;
const PIECE: usize = 64 * 1024;
const ROOMS: usize = 100;
const MEMBERS: usize = 10;
/// Messages a second in each room.
const RATE: f64 = 10.0;

/// An edge with the local storage, whose files are the hardest for messages: they come to the edge itself.
async fn edge(bench: &Bench, folder: &std::path::Path) -> Target {
    let toml = format!(
        "[limits]\ncommands_per_second = 10000000\ncommands_burst = 10000000\n\
         [uploads]\nstorage = 'local'\nsecret = 'a secret of the benchmark, long enough'\nmax_size = '1GiB'\nmax_per_day = '1TiB'\nfolder = '{}'\n\
         [namespaces.log]\ndurable = true\ntyping = false\npresence = 'off'\nhistory = false\n\
         [namespaces.files]\ndurable = true\ntyping = false\npresence = 'off'\nhistory = true\n",
        folder.display()
    );
    let mesh = Mesh::with_history(&bench.nats.url(), mongodb_url(), (1, 1), &toml).await;
    let server = |name, pid: Option<u32>| Server {
        name,
        pid: pid.unwrap(),
    };
    Target {
        peer: Peer::Durable,
        addresses: vec![mesh.edges[0].address],
        servers: vec![
            server("edge", mesh.edges[0].process.pid()),
            server("nats", bench.nats.server.pid()),
        ],
        mesh: Some(mesh),
        _process: None,
    }
}

/// Uploads a file over a link that takes `time` for it.
async fn upload(address: SocketAddr, time: Duration) {
    let file = json!({ "name": "film.mp4", "type": "video/mp4", "size": FILE });
    let path = "/v1/rooms/files:x/uploads";
    let (status, granted) = ask(address, ("POST", path), &token("kim"), &file).await;
    assert_eq!(status, 201, "{granted}");
    let url = granted["put"]["url"].as_str().unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "PUT {url} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {FILE}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let (piece, begun) = (vec![7; PIECE], Instant::now());
    let mut sent = 0;
    while sent < FILE {
        sleep_until(begun + time.mul_f64(sent as f64 / FILE as f64)).await;
        let bytes = PIECE.min(FILE - sent);
        stream.write_all(&piece[..bytes]).await.unwrap();
        sent += bytes;
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

pub(super) fn uploads(bench: &mut Bench) -> Table {
    let mut all = [Runs::default(), Runs::default()];
    let names = ["none", "200 MB during the run"];
    for _ in 0..bench.runs {
        let folder = tempfile::tempdir().unwrap();
        let target = bench.runtime.block_on(edge(bench, folder.path()));
        let mut swarm: Swarm = target.swarm(ROOMS);
        let publishers = publishers(&mut swarm, ROOMS);
        swarm.connect((0..ROOMS * MEMBERS).map(|i| Some(i % ROOMS)));
        swarm.load(publishers.clone(), ROOMS, RATE, WARM_UP);
        // One after the other on the same edge, so that nothing else differs.
        for ((with, name), runs) in [false, true].into_iter().zip(names).zip(&mut all) {
            let mut faults = 0;
            let figures = bench.quiet(|| {
                swarm.reset();
                let said = |swarm: &Swarm| (0..ROOMS).map(|room| swarm.said(room)).sum::<u64>();
                let before = said(&swarm);
                let (address, time) = (target.addresses[0], bench.time);
                // On a thread of its own, so that it does not wait for the swarm.
                let uploading = with.then(|| {
                    thread::spawn(move || {
                        let runtime = tokio::runtime::Builder::new_current_thread()
                            .enable_all()
                            .build();
                        runtime.unwrap().block_on(upload(address, time));
                    })
                });
                let begin = Begin::now(&target.servers);
                swarm.load(publishers.clone(), ROOMS, RATE, bench.time);
                let cost = begin.end();
                if let Some(uploading) = uploading {
                    uploading.join().unwrap();
                }
                let expected = (said(&swarm) - before) * MEMBERS as u64;
                faults += print("uploads", name, &swarm.tally, expected, &cost);
                let each = |server| cost.cpu_of(server) / swarm.tally.deliveries.max(1) as f64;
                let [p50, _, p99, ..] = latency(&swarm.tally);
                let figures = vec![each("edge"), each("nats"), p50, p99];
                (cost, figures)
            });
            bench.faults += faults;
            runs.add(figures);
        }
    }
    let rows = names.iter().zip(&all);
    Table {
        title: "Uploads: 100 durable rooms of 10, 1,000 messages/s, while a file comes to the local storage of the edge, and while none does",
        columns: &[
            "file",
            "edge, µs a delivery",
            "NATS, µs a delivery",
            "p50, ms",
            "p99, ms",
        ],
        rows: rows.map(|(name, runs)| row(&[name], runs)).collect(),
    }
}
