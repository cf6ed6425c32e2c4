//! Readers that are too slow, and a NATS subscription that overflows: who is behind loses nothing and harms nobody.

use std::{net::SocketAddr, os::fd::AsFd as _};

use natter::testing::{
    auth::{Claims, Grant, Right, issue},
    client::Connection,
    runtime::unix_s,
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt as _, sync::watch, task::JoinHandle};

use crate::support::{
    self, LONG,
    calls::{next, reply},
    eventually,
    mesh::{Mesh, SECRET, http, token},
    raw::{Dial, FIN, Raw, TEXT, bearer, frame},
    signal,
};

/// Reads `n` messages whose bodies begin with their number, from `first` on.
async fn read_in_order(connection: &mut Connection, first: usize, n: usize) {
    for expected in first..first + n {
        let frame = next(connection).await.json();
        assert_eq!(frame["op"], "msg", "{frame}");
        assert_eq!(number(&frame), expected);
    }
}

fn number(frame: &Value) -> usize {
    let body = frame["body"].as_str().unwrap();
    body.split(' ').next().unwrap().parse().unwrap()
}

async fn a_slow_reader(toml: &str) {
    const BODY: usize = 60 * 1024;
    const CLOSED: &str = "code=\"too_slow\"";
    // How much is sent before it is closed depends on the machine: all of it can be replayed.
    let toml = format!("rooms.replay_max_bytes = '128MiB'\nrooms.replay_memory = '256MiB'\n{toml}");
    let mesh = Mesh::start(support::nats_url(), 1, &toml).await;
    let address: SocketAddr = mesh.edges[0].address;
    let headers = bearer(&token("slow"));
    let dial = Dial {
        headers: &headers,
        receive_buffer: Some(4096),
        ..Dial::default()
    };
    let mut slow = Raw::dial(address, dial).await;
    let join = json!({"op": "join", "rid": 1, "room": "chat:a"});
    let joined = slow.call(join).await;
    let mut readers = Vec::new();
    for _ in 0..3 {
        let mut reader = mesh.connect(0, "lee").await;
        reply(&mut reader, "join", json!({"room": "chat:a"})).await;
        readers.push(reader);
    }
    let mut kim = mesh.connect(0, "kim").await;
    let padding = "x".repeat(BODY);
    // The kernel holds a few MiB for the one that does not read; then it is our turn. All others get each message before
    // the next is sent.
    let mut sent = 0;
    loop {
        let fields = json!({"room": "chat:a", "body": format!("{sent} {padding}")});
        let ack = reply(&mut kim, "send", fields).await;
        assert_eq!(ack["op"], "ack", "{ack}");
        for reader in &mut readers {
            read_in_order(reader, sent, 1).await;
        }
        sent += 1;
        let closed = mesh.metric(0, "natter_session_closed_total", CLOSED).await;
        if closed > 0 {
            assert_eq!(closed, 1);
            break;
        }
        assert!(sent < 1000, "nobody is too slow after {sent} messages");
    }
    // A few more, to show that the others go on.
    for n in sent..sent + 5 {
        let fields = json!({"room": "chat:a", "body": format!("{n} {padding}")});
        reply(&mut kim, "send", fields).await;
        for reader in &mut readers {
            read_in_order(reader, n, 1).await;
        }
    }
    let sent = sent + 5;
    // It reads at last: whole messages in order, then the close frame. From there it resumes.
    let (frames, code, reason) = slow.until_close().await;
    assert_eq!((code, reason.as_str()), (4003, "too_slow"));
    for (expected, frame) in frames.iter().enumerate() {
        assert_eq!(number(frame), expected);
    }
    let cursor = frames.last().map_or(&joined["cursor"], |f| &f["cursor"]);
    let mut back = mesh.connect(0, "slow").await;
    let join = json!({"room": "chat:a", "since": cursor});
    let joined = reply(&mut back, "join", join).await;
    assert_eq!(joined.get("reset"), None, "{joined}");
    assert_eq!(joined["replay"], json!(sent - frames.len()));
    read_in_order(&mut back, frames.len(), sent - frames.len()).await;
    eprintln!("{} of {sent} messages before the close", frames.len());
}

#[tokio::test]
async fn a_reader_that_never_reads_is_closed_and_resumes() {
    a_slow_reader("edge.shards = 1").await;
}

#[tokio::test]
async fn a_small_outbox_closes_sooner_and_loses_nothing_either() {
    a_slow_reader("edge.shards = 1\nlimits.outbox = '64KiB'").await;
}

#[tokio::test]
async fn a_reader_whose_socket_stands_still_is_closed_though_little_waits() {
    // The outbox would take all of it: it is the time without progress that ends it.
    let toml = "edge.shards = 1\nlimits.outbox = '1GiB'\nlimits.outbox_stall = '1s'";
    a_slow_reader(toml).await;
}

/// Publishes past all edges, as fast as NATS takes it, with the edge frozen.
async fn burst(mesh: &Mesh, room: &str, messages: usize) {
    let nats = async_nats::connect(support::nats_url()).await.unwrap();
    let (prefix, region) = (&mesh.config.nats.prefix, &mesh.config.region);
    let subject = format!("{prefix}.in.{region}.0.chat.{room}.msg");
    for n in 0..messages {
        nats.publish(subject.clone(), format!("\"{n}\"").into())
            .await
            .unwrap();
    }
    nats.flush().await.unwrap();
    let stream = format!("ROOMS_{region}_0");
    eventually("the stream has all", LONG, async || {
        let mut stream = async_nats::jetstream::new(nats.clone())
            .get_stream(&stream)
            .await
            .unwrap();
        match stream.info().await.unwrap().state.messages {
            all if all == messages as u64 => Ok(()),
            some => Err(format!("{some} messages")),
        }
    })
    .await;
}

#[tokio::test]
async fn a_subscription_that_drops_messages_loses_none() {
    const MESSAGES: usize = 6_000;
    // With these the room is too large to be served in one turn: what comes meanwhile waits, up to the capacity.
    const MORE: usize = 130;
    let toml = "edge.shards = 1\nnats.partitions = 1\nnats.subscription_capacity = 1024\n\
                limits.outbox = '64MiB'\nrooms.resync = '1h'";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let mut members = Vec::new();
    for _ in 0..3 {
        let mut member = mesh.connect(0, "kim").await;
        reply(&mut member, "join", json!({"room": "chat:a"})).await;
        members.push(member);
    }
    for _ in 0..MORE {
        let mut member = Raw::open(mesh.edges[0].address, &token("lee")).await;
        let join = json!({"op": "join", "rid": 1, "room": "chat:a"});
        assert_eq!(member.call(join).await["op"], "joined");
        // What it gets is counted by the edge.
        tokio::spawn(
            async move { tokio::io::copy(&mut member.stream, &mut tokio::io::sink()).await },
        );
    }
    let reading = members.into_iter().map(|mut member| {
        tokio::spawn(async move {
            read_in_order(&mut member, 0, MESSAGES).await;
            member
        })
    });
    let reading: Vec<_> = reading.collect();
    // Frozen, the edge finds all of it in its socket at once.
    let pid = mesh.edges[0].process.pid().unwrap();
    signal(pid, Signal::STOP);
    burst(&mesh, "a", MESSAGES).await;
    signal(pid, Signal::CONT);
    for member in reading {
        let mut member = tokio::time::timeout(2 * LONG, member)
            .await
            .expect("messages are missing")
            .unwrap();
        // Exactly once: nothing comes after the last.
        assert_eq!(reply(&mut member, "ping", json!({})).await["op"], "pong");
    }
    // Noted where they are dropped, or found first by the comparison that a busy room gets after every 1,000 messages.
    let gaps = mesh.metric(0, "natter_gap_detected_total", "").await;
    let events = mesh.metric(0, "natter_nats_slow_consumer_total", "").await;
    let filled = mesh.metric(0, "natter_gap_filled_total", "").await;
    println!("{gaps} gaps, {events} events, {filled} messages read from the stream");
    assert!(events > 0, "nothing was dropped: the test shows nothing");
    assert!(gaps > 0 && filled > 0);
    let expected = ((3 + MORE) * MESSAGES) as u64;
    eventually("everybody has everything", LONG, async || {
        let delivered = mesh.metric(0, "natter_message_delivered_total", "").await;
        assert!(delivered <= expected, "{delivered} of {expected}");
        (delivered == expected)
            .then_some(())
            .ok_or_else(|| delivered.to_string())
    })
    .await;
}

/// A client for which the kernel keeps little.
async fn one_that_does_not_read(mesh: &Mesh, user: &str) -> Raw {
    let headers = bearer(&token(user));
    let dial = Dial {
        headers: &headers,
        receive_buffer: Some(64 * 1024),
        ..Dial::default()
    };
    Raw::dial(mesh.edges[0].address, dial).await
}

/// Polls a gauge of the edge until it is stopped; the highest value.
fn highest(mesh: &Mesh, gauge: &'static str) -> (watch::Sender<bool>, JoinHandle<u64>) {
    let (stop, stopped) = watch::channel(false);
    let address = mesh.edges[0].address;
    let polls = tokio::spawn(async move {
        let mut most = 0;
        while !*stopped.borrow() {
            let (_, text) = http(address, "GET", "/metrics", "", "").await.unwrap();
            let line = text.lines().find_map(|line| line.strip_prefix(gauge));
            let value = line.unwrap_or_else(|| panic!("no {gauge}")).trim();
            most = most.max(value.parse().unwrap());
            // The pause of a poll.
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        most
    });
    (stop, polls)
}

/// 10,000 commands whose answers nobody reads for as long as they can be written, then all of the answers.
async fn asks_and_does_not_read(outbox: u64, command: impl Fn(usize) -> Value) {
    const COMMANDS: usize = 10_000;
    /// A page of history has about so much, and two may be read at once.
    const PAGE: u64 = 512 * 1024;
    const QUEUED: &str = "natter_outbox_size_bytes ";
    // Nobody is closed for not reading here: it is the edge that stops to listen.
    let toml = format!(
        "edge.shards = 1\nlimits.outbox = '{outbox}B'\nlimits.outbox_stall = '10m'\n\
         limits.commands_per_second = 1000000\nlimits.commands_burst = 1000000"
    );
    let mesh = Mesh::start(support::nats_url(), 1, &toml).await;
    // What makes the answers large: users with something to show, and messages.
    let mut users = Vec::new();
    for n in 0..6 {
        let mut claims = Claims::new(&format!("user-{n}"), unix_s() + 3600);
        claims.grants = vec![Grant::new("*:*", &Right::ALL)];
        let info = json!({"name": "이름".repeat(50)});
        claims.info = info.as_object().cloned();
        let token = issue(&claims, SECRET).unwrap();
        let mut user = Raw::open(mesh.edges[0].address, &token).await;
        let join = json!({"op": "join", "rid": 1, "room": "chat:a"});
        assert_eq!(user.call(join).await["op"], "joined");
        users.push(user);
    }
    let mut kim = mesh.connect(0, "kim").await;
    for n in 0..10 {
        let fields = json!({"room": "chat:a", "body": format!("{n} {}", "x".repeat(20_000))});
        assert_eq!(reply(&mut kim, "send", fields).await["op"], "ack");
    }
    let (stop, most) = highest(&mesh, QUEUED);
    let mut slow = one_that_does_not_read(&mesh, "slow").await;
    let write = std::net::TcpStream::from(slow.stream.as_fd().try_clone_to_owned().unwrap());
    let mut write = tokio::net::TcpStream::from_std(write).unwrap();
    let commands: Vec<Value> = (0..COMMANDS)
        .map(|rid| {
            let mut command = command(rid);
            command["rid"] = json!(rid);
            command
        })
        .collect();
    let frames: Vec<u8> = commands
        .iter()
        .flat_map(|command| frame(FIN | TEXT, command.to_string().as_bytes()))
        .collect();
    let writing = tokio::spawn(async move {
        write.write_all(&frames).await.unwrap();
        write
    });
    // It has not read anything, and the edge keeps what it can.
    eventually("something waits", LONG, async || {
        let (_, text) = http(mesh.edges[0].address, "GET", "/metrics", "", "")
            .await
            .unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(QUEUED));
        let waits: u64 = line.unwrap().trim().parse().unwrap();
        (waits > outbox / 8).then_some(()).ok_or(waits.to_string())
    })
    .await;
    // Now it reads: every command was answered, in order.
    for command in &commands {
        let answer = slow.json().await;
        assert_eq!(answer["rid"], command["rid"], "{answer}");
        assert_eq!(answer["op"], command["op"], "{answer}");
    }
    drop(writing.await.unwrap());
    stop.send(true).unwrap();
    let most = most.await.unwrap();
    eprintln!("{most} bytes at most, outbox {outbox}");
    assert!(most <= outbox + 2 * PAGE, "{most}");
}

#[tokio::test]
async fn who_asks_who_is_there_and_does_not_read_slows_only_themselves() {
    asks_and_does_not_read(1 << 20, |_| json!({"op": "presence", "room": "chat:a"})).await;
}

#[tokio::test]
async fn replies_behind_one_that_is_awaited_are_counted() {
    // What comes after a page of history waits for it.
    asks_and_does_not_read(256 << 10, |n| match n % 100 {
        0 => json!({"op": "history", "room": "chat:a", "limit": 10}),
        _ => json!({"op": "presence", "room": "chat:a"}),
    })
    .await;
}

/// Bytes of an edge that are in memory.
fn resident(mesh: &Mesh) -> usize {
    let pid = mesh.edges[0].process.pid().unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: usize = line
        .unwrap()
        .trim()
        .trim_end_matches("kB")
        .trim()
        .parse()
        .unwrap();
    kib * 1024
}

/// Slow clients that have much to catch up with, each in a room of its own, in a quarter of the memory that all of it would take: they
/// are joined, they keep within the memory, nobody else is kept from joining, and each gets everything, once, in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backlogs_of_slow_clients_keep_within_the_memory_and_lose_nothing() {
    const ROOMS: usize = 16;
    const MESSAGES: usize = 120;
    const BODY: usize = 60 * 1024;
    const MEMORY: u64 = 16 << 20;
    const TAKEN: &str = "natter_replay_memory_bytes ";
    let toml = "edge.shards = 1\nnats.partitions = 1\nrooms.ring = '16KiB'\nrooms.replay_memory = '16MiB'\n\
                rooms.join_timeout = '50s'\nlimits.outbox_stall = '10m'\nrooms.idle = '1h'";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let mut starts = Vec::new();
    let mut kim = mesh.connect(0, "kim").await;
    for room in 0..ROOMS {
        let place = json!({"room": format!("chat:r{room}")});
        let joined = reply(&mut kim, "join", place.clone()).await;
        starts.push(joined["cursor"].clone());
        reply(&mut kim, "leave", place).await;
    }
    let client = async_nats::connect(support::nats_url()).await.unwrap();
    let (prefix, region) = (&mesh.config.nats.prefix, &mesh.config.region);
    let padding = "x".repeat(BODY);
    for room in 0..ROOMS {
        let subject = format!("{prefix}.in.{region}.0.chat.r{room}.msg");
        for n in 0..MESSAGES {
            let body = json!(format!("{n} {padding}")).to_string();
            client.request(subject.clone(), body.into()).await.unwrap();
        }
    }
    let (stop, most) = highest(&mesh, TAKEN);
    let before = resident(&mesh);
    // They join one after the other and read only the reply.
    let mut slow = Vec::new();
    for (room, since) in starts.iter().enumerate() {
        let mut raw = one_that_does_not_read(&mesh, &format!("slow-{room}")).await;
        let join = json!({"op": "join", "rid": 1, "room": format!("chat:r{room}"), "since": since});
        let joined = raw.call(join).await;
        assert_eq!(joined["replay"], json!(MESSAGES), "{joined}");
        slow.push(raw);
    }
    // One that reads gets all that a slow one has yet to get.
    let mut lee = mesh.connect(0, "lee").await;
    let join = json!({"room": "chat:r0", "since": starts[0]});
    assert_eq!(reply(&mut lee, "join", join).await["op"], "joined");
    read_in_order(&mut lee, 0, MESSAGES).await;
    // What the kernel holds for them is not the edge's.
    let grown = resident(&mesh).saturating_sub(before);
    let all = ROOMS * MESSAGES * BODY;
    println!("{grown} bytes more are resident, of {all} to be replayed");
    assert!(grown < 40 << 20, "{grown}");
    // Something is said meanwhile: it comes behind the rest.
    for room in 0..ROOMS {
        let fields = json!({"room": format!("chat:r{room}"), "body": format!("{MESSAGES} !")});
        assert_eq!(reply(&mut kim, "send", fields).await["op"], "ack");
    }
    let reading = slow.into_iter().map(|mut raw| {
        tokio::spawn(async move {
            for n in 0..=MESSAGES {
                let message = raw.json().await;
                assert_eq!((&message["op"], number(&message)), (&json!("msg"), n));
            }
            // Nothing comes after the last.
            raw.text(r#"{"op":"ping","rid":2}"#).await;
            assert_eq!(raw.json().await["op"], "pong");
        })
    });
    for reading in reading.collect::<Vec<_>>() {
        reading.await.unwrap();
    }
    stop.send(true).unwrap();
    let most = most.await.unwrap();
    println!("{most} bytes at most of {MEMORY}");
    assert!(most > MEMORY / 8, "{most}: nobody was slow");
    // The last read may take a little more than its share: frames are larger than bodies.
    assert!(most <= MEMORY + (1 << 20), "{most}");
    eventually("all of it is given back", LONG, async || {
        let (_, text) = http(mesh.edges[0].address, "GET", "/metrics", "", "")
            .await
            .unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(TAKEN));
        match line.unwrap().trim() {
            "0" => Ok(()),
            some => Err(some.to_owned()),
        }
    })
    .await;
}
