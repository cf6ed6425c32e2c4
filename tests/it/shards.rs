//! Shards that die or stand still, and NATS connections that end or are refused.

use std::{
    cell::Cell,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    rc::Rc,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use natter::testing::{
    bus::{Connection, Line, Origins, Publisher, Reader},
    codec::Codec,
    config::Config,
    model::RoomId,
    protocol::Wants,
    read_marker::Markers,
    room::{JoinError, NewMember, Rooms},
    subject::Subjects,
    wire::{Conn, ConnSettings, Outlet},
};
use serde_json::json;
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
    task::{LocalSet, yield_now},
    time::timeout,
};

use crate::support::{
    self, LONG, eventually,
    mesh::{Mesh, http, token},
    raw::Raw,
};

/// Attaches to a thread as a debugger does, stops it, says so, and stays until it is gone. (What is needed for that is no safe
/// Rust.)
const STOP: &str = r#"
import ctypes, os, sys
SEIZE, INTERRUPT, WALL = 0x4206, 0x4207, 0x40000000
thread = int(sys.argv[1])
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
for request in SEIZE, INTERRUPT:
    if ptrace(request, thread, None, None) != 0:
        sys.exit(os.strerror(ctypes.get_errno()))
os.waitpid(thread, WALL)
print("stopped", flush=True)
os.waitpid(thread, WALL)
"#;

/// Stops one thread of a process for good, as a loop without an end would, until the process is gone.
fn stop_thread(process: u32, name: &str) -> Child {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let of_name = |path: &std::path::PathBuf| {
        std::fs::read_to_string(path.join("comm")).is_ok_and(|found| found.trim() == name)
    };
    let mut paths = tasks.map(|task| task.unwrap().path());
    let path = paths.find(of_name).expect("the thread is there");
    let mut tracer = Command::new("python3")
        .args(["-c", STOP])
        .arg(path.file_name().unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let stdout = tracer.stdout.as_mut().unwrap();
    BufReader::new(stdout).read_line(&mut said).unwrap();
    assert_eq!(
        said, "stopped\n",
        "a thread can't be stopped: may this user trace processes?"
    );
    tracer
}

async fn not_ready(address: SocketAddr, why: &str) {
    eventually("it is not ready", LONG, async || {
        match http(address, "GET", "/readyz", "", "").await {
            Ok((503, text)) if text.trim() == why => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

async fn exits(mesh: &mut Mesh, code: i32) {
    let status = timeout(LONG, mesh.edges[0].process.exited()).await;
    let status = status.expect("the edge ends").unwrap();
    assert_eq!(status.code(), Some(code), "{status}");
}

#[tokio::test]
async fn an_edge_one_of_whose_shards_stands_still_is_not_ready_and_ends() {
    let toml = "edge.shards = 2\nedge.drain_spread = '0s'\nedge.drain_timeout = '2s'";
    let mut mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let address = mesh.edges[0].address;
    let mut tracer = stop_thread(mesh.edges[0].process.pid().unwrap(), "shard-1");
    not_ready(address, "shard 1 gives no sign of life").await;
    // The other one goes on, and gets all new connections.
    let mut sessions = Vec::new();
    for n in 0..4 {
        let mut session = Raw::open(address, &token("kim")).await;
        let ping = json!({"op": "ping", "rid": n});
        assert_eq!(session.call(ping).await["op"], "pong");
        let join = json!({"op": "join", "rid": 1, "room": format!("chat:r{n}")});
        assert_eq!(session.call(join).await["op"], "joined");
        sessions.push(session);
    }
    // In the end it gives up; who can be told is told where to go.
    for mut session in sessions {
        let (frames, code, _) = session.until_close().await;
        assert_eq!(code, 4010);
        assert!(
            frames.iter().any(|frame| frame["op"] == "reconnect"),
            "{frames:?}"
        );
    }
    exits(&mut mesh, 1).await;
    tracer.wait().unwrap();
}

#[tokio::test]
async fn a_drain_does_not_wait_for_a_shard_that_stands_still() {
    let toml = "edge.shards = 2\nedge.drain_spread = '0s'\nedge.drain_timeout = '1s'";
    for name in ["shard-0", "shard-1"] {
        let mut mesh = Mesh::start(support::nats_url(), 1, toml).await;
        let mut tracer = stop_thread(mesh.edges[0].process.pid().unwrap(), name);
        let begun = Instant::now();
        mesh.edges[0].process.terminate();
        exits(&mut mesh, 1).await;
        tracer.wait().unwrap();
        println!("drained in {:?}", begun.elapsed());
    }
}

/// The rooms of a shard on a line that is not driven any more: it has ended for good.
async fn rooms(config: &Config) -> Rc<Rooms> {
    let connection = Connection::open(&config.nats, "rooms").await.unwrap();
    let reader = Reader::new(connection.clone(), &config.nats);
    let origins = Origins::wait_for(&connection, &config.region(), &config.nats).await;
    let (line, driver) = Line::new(&config.nats, "ended").unwrap();
    let own = Arc::clone(origins.own());
    let publisher = Publisher::new(
        line.clone(),
        reader.clone(),
        own,
        Arc::default(),
        &config.nats,
        "e",
    );
    let markers = Markers::new(&reader, reader.clone(), &origins, config, publisher);
    let subjects = Subjects::new(&config.nats.prefix);
    drop(driver);
    Rooms::new(line, reader, origins, subjects, config, markers)
}

async fn member() -> NewMember {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let limits = ConnSettings {
        outbox_bytes: 1 << 20,
        stall: LONG,
        close_frame: Codec::Native.close_frame(),
    };
    NewMember {
        session: 1,
        user: "kim".into(),
        outlet: Outlet::Socket(Conn::new(stream, Rc::new(limits))),
        codec: Codec::Native,
        wants: Wants::default(),
        subscription: None,
    }
}

#[tokio::test]
async fn a_room_on_a_line_that_has_ended_refuses_joins_and_does_not_spin() {
    let mesh = Mesh::without_edges(support::nats_url(), "").await;
    let config = mesh.config.clone();
    let (done, wait) = tokio::sync::oneshot::channel();
    // A thread that spins does not come back: it is only waited for.
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        LocalSet::new().block_on(&runtime, async {
            let rooms = rooms(&config).await;
            for (room, durable) in [("chat:a", true), ("live:a", false)] {
                let room = RoomId::parse(room).unwrap();
                for _ in 0..3 {
                    let joined = rooms.join(&room, durable, None, None, member().await, |_| None);
                    assert_eq!(joined.await.err(), Some(JoinError::Unavailable), "{room}");
                    // What the join has begun has its turn.
                    for _ in 0..100 {
                        yield_now().await;
                    }
                }
            }
        });
        done.send(()).unwrap();
    });
    timeout(LONG, wait).await.expect("the shard spins").unwrap();
}

/// What a server may do to whoever connects.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Closes,
    Refuses,
    TalksNonsense,
    EndsInTheMiddle,
    SaysNothing,
}

const FAULTS: [Fault; 5] = [
    Fault::Closes,
    Fault::Refuses,
    Fault::TalksNonsense,
    Fault::EndsInTheMiddle,
    Fault::SaysNothing,
];

/// Stands before a nats-server: does each of the faults to somebody who connects, then lets everybody through.
async fn faulty(target: SocketAddr) -> SocketAddr {
    const INFO: &[u8] = b"INFO {\"max_payload\":1048576}\r\n";
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut faults = FAULTS.iter();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let fault = faults.next();
            tokio::spawn(async move {
                let told = match fault {
                    None => {
                        let mut server = TcpStream::connect(target).await.unwrap();
                        return tokio::io::copy_bidirectional(&mut stream, &mut server)
                            .await
                            .map(drop);
                    }
                    Some(Fault::Closes) => Vec::new(),
                    Some(Fault::Refuses) => [INFO, b"-ERR 'Authorization Violation'\r\n"].concat(),
                    Some(Fault::TalksNonsense) => [INFO, b"PONG\r\nHELLO\r\nMSG a b\r\n"].concat(),
                    Some(Fault::EndsInTheMiddle) => [INFO, b"PONG\r\nMSG a 1 100\r\nhalf"].concat(),
                    Some(Fault::SaysNothing) => {
                        tokio::time::sleep(Duration::from_secs(5)).await;
                        Vec::new()
                    }
                };
                stream.write_all(&told).await
            });
        }
    });
    address
}

/// Neither ends for good by anything a server does: what then waits for it would have to be told.
#[tokio::test]
async fn no_server_can_end_a_connection_for_good() {
    let target = support::nats_url()
        .trim_start_matches("nats://")
        .parse()
        .unwrap();
    let config = |address: SocketAddr| support::config(&format!("nats.url = 'nats://{address}'"));
    let (line, driver) = Line::new(&config(faulty(target).await).nats, "line").unwrap();
    let driving = tokio::spawn(driver.run(()));
    let connection = Connection::open(&config(faulty(target).await).nats, "connection")
        .await
        .unwrap();
    eventually("both have come through", LONG, async || {
        match (line.round_trip().await, connection.is_up()) {
            (Ok(()), true) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert!(!driving.is_finished());
    // And when they are ended, it shows.
    let ended = Cell::new(false);
    let end = async {
        connection.ended().await;
        ended.set(true);
    };
    let close = async {
        assert!(line.ready().await && !ended.get());
        tokio::join!(connection.close(), line.close());
    };
    let both = async { tokio::join!(end, close) };
    timeout(LONG, both).await.expect("the end shows");
    assert!(ended.get() && !connection.is_up() && !line.is_up());
    assert!(!line.ready().await);
}
