//! Messages without a WebSocket, where browsers and SDKs do not reach: `text/event-stream`, polls, tickets, the streams of
//! Centrifugo's clients, and clients that do what no browser does.

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use natter::testing::auth::{Grant, Right};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    time::timeout,
};

use crate::support::{
    self, LONG,
    events::Events,
    eventually,
    mesh::{Mesh, ask, token, token_with},
    raw::{Answer, bearer, request},
    regions::Regions,
    signal,
};

async fn say(mesh: &Mesh, room: &str, body: Value) -> Value {
    let path = format!("/v1/rooms/{room}/messages");
    let address = mesh.edges[0].address;
    let (status, ack) = ask(
        address,
        ("POST", &path),
        &token("lee"),
        &json!({ "body": body }),
    )
    .await;
    assert_eq!(status, 200, "{ack}");
    ack
}

/// Waits until an edge has so many members in its rooms.
async fn members(mesh: &Mesh, edge: usize, count: u64) {
    eventually("members", LONG, async || {
        match mesh.metric(edge, "natter_member_active", "").await {
            there if there == count => Ok(()),
            there => Err(format!("{there} members")),
        }
    })
    .await;
}

fn cursor(of: &Value) -> String {
    of["cursor"].as_str().unwrap().to_owned()
}

async fn poll(address: SocketAddr, room: &str, query: &str) -> Answer {
    let path = format!("/v1/rooms/{room}/poll{query}");
    request(address, "GET", &path, &bearer(&token("kim")), "").await
}

#[tokio::test]
async fn one_room_and_several_resume_on_another_edge() {
    let mesh = Mesh::start(support::nats_url(), 2, "").await;
    let [here, there] = [mesh.edges[0].address, mesh.edges[1].address];
    let kim = bearer(&token("kim"));
    let one = "/v1/rooms/chat:a/events";
    let three = "/v1/events?room=chat:a&room=live:x&room=chat:b";

    let mut room = Events::open(here, one, &kim).await;
    let joined = room.named("joined").await;
    assert_eq!(joined.id.as_deref(), joined.data["cursor"].as_str());
    let mut rooms = Events::open(there, three, &kim).await;
    let joined = [rooms.next().await, rooms.next().await, rooms.next().await];
    let names = joined.map(|event| event.unwrap().data["room"].clone());
    assert_eq!(names, [json!("chat:a"), json!("live:x"), json!("chat:b")]);

    // A line break between tokens is one of the event, and none in the value.
    let body = json!({"text": "한글 🙂\n", "n": 1});
    let text = format!(
        "{{\"body\":{}}}",
        serde_json::to_string_pretty(&body).unwrap()
    );
    let first = request(here, "POST", "/v1/rooms/chat:a/messages", &kim, &text)
        .await
        .json();
    say(&mesh, "chat:b", json!("b")).await;
    say(&mesh, "live:x", json!("x")).await;
    let message = room.named("msg").await;
    assert_eq!(message.data["body"], body);
    assert_eq!(message.id, Some(cursor(&first)));
    let mut got = HashMap::new();
    let mut last = None;
    for _ in 0..3 {
        let message = rooms.named("msg").await;
        assert_eq!(
            message.id.is_some(),
            message.data["room"] != "live:x",
            "{message:?}"
        );
        last = message.id.or(last);
        got.insert(
            message.data["room"].as_str().unwrap().to_owned(),
            message.data["body"].clone(),
        );
    }
    assert_eq!(got["chat:a"], body);
    assert_eq!((&got["chat:b"], &got["live:x"]), (&json!("b"), &json!("x")));
    drop((room, rooms));

    let second = say(&mesh, "chat:a", json!(2)).await;
    let third = say(&mesh, "chat:b", json!(3)).await;
    // What the browser sends goes before what stands in the URL.
    let resumed = format!("{kim}Last-Event-ID: {}\r\n", cursor(&first));
    let mut room = Events::open(there, &format!("{one}?since={}", cursor(&second)), &resumed).await;
    assert_eq!(room.named("joined").await.data["replay"], 1);
    assert_eq!(room.named("msg").await.data["body"], 2);
    let mut rooms = Events::open(here, &format!("{three}&since={}", last.unwrap()), &kim).await;
    let mut got = Vec::new();
    while got.len() < 2 {
        let event = rooms.next().await.unwrap();
        if event.name == "msg" {
            got.push((event.data["room"].clone(), event.data["body"].clone()));
        }
    }
    got.sort_by_key(|(room, _)| room.to_string());
    assert_eq!(
        got,
        [(json!("chat:a"), json!(2)), (json!("chat:b"), json!(3))]
    );

    // Both are at the end.
    say(&mesh, "chat:a", json!(4)).await;
    assert_eq!(room.named("msg").await.data["body"], 4);
    let last = rooms.until("msg").await;
    assert_eq!(last.data["body"], 4);
    assert!(last.id.unwrap().contains(&cursor(&third)));
}

#[tokio::test]
async fn polls_wait_and_lose_nothing_between_them() {
    let mesh = Mesh::start(
        support::nats_url(),
        2,
        "limits.outbox = '16KiB'\nauth.leeway = '0s'",
    )
    .await;
    let [here, there] = [mesh.edges[0].address, mesh.edges[1].address];
    let first = poll(here, "chat:a", "").await;
    assert_eq!(first.status, 204);
    let mut at = first.header("cursor").unwrap().to_owned();

    let waiting = tokio::spawn({
        let query = format!("?wait=60s&since={at}");
        async move { poll(there, "chat:a", &query).await }
    });
    members(&mesh, 1, 1).await;
    say(&mesh, "chat:a", json!(0)).await;
    let answer = waiting.await.unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    let answer = answer.json();
    assert_eq!(answer["messages"][0]["body"], 0);
    assert_eq!(answer["messages"].as_array().unwrap().len(), 1);
    at = cursor(&answer);

    // More than fits into one answer, and a message that is larger than that by itself.
    let bodies: Vec<Value> = (1..=20)
        .map(|n| json!({"n": n, "text": "x".repeat(if n == 7 { 12000 } else { 1500 })}))
        .collect();
    for body in &bodies {
        say(&mesh, "chat:a", body.clone()).await;
    }
    let (mut got, mut polls) = (Vec::new(), 0);
    while got.len() < bodies.len() {
        polls += 1;
        let address = [here, there][polls % 2];
        let answer = poll(address, "chat:a", &format!("?since={at}"))
            .await
            .json();
        let messages = answer["messages"].as_array().unwrap();
        got.extend(messages.iter().map(|message| message["body"].clone()));
        at = cursor(&answer);
    }
    assert_eq!(got, bodies);
    assert!(polls > 3, "{polls} polls");

    // Who gives up a poll is gone at once.
    members(&mesh, 0, 0).await;
    let mut waiting = TcpStream::connect(here).await.unwrap();
    let kim = bearer(&token("kim"));
    let text =
        format!("GET /v1/rooms/chat:a/poll?wait=60s&since={at} HTTP/1.1\r\nHost: x\r\n{kim}\r\n");
    waiting.write_all(text.as_bytes()).await.unwrap();
    members(&mesh, 0, 1).await;
    drop(waiting);
    members(&mesh, 0, 0).await;
    // And a token is good for no message after its end.
    let short = token_with(
        "kim",
        Duration::from_secs(2),
        vec![Grant::new("*:*", &[Right::Read])],
    );
    let path = format!("/v1/rooms/chat:a/poll?wait=60s&since={at}");
    let expired = request(here, "GET", &path, &bearer(&short), "").await;
    assert_eq!(expired.status, 401, "{expired:?}");

    let none = poll(here, "chat:a", &format!("?wait=10ms&since={at}")).await;
    assert_eq!((none.status, none.header("cursor")), (204, Some(&*at)));
    let lost = poll(here, "chat:a", "?since=elsewhere.k3.9.a").await.json();
    assert_eq!(
        (&lost["reset"], &lost["reason"]),
        (&json!(true), &json!("epoch")),
        "{lost}"
    );
    assert_eq!(lost["cursor"], at);
    assert_eq!(mesh.metric(0, "natter_member_active", "").await, 0);
}

#[tokio::test]
async fn what_can_not_be_followed_is_refused_before_the_stream() {
    let toml = "limits.rooms_per_session = 2\nauth.ticket_ttl = '1s'";
    let mesh = Mesh::start(support::nats_url(), 2, toml).await;
    let address = mesh.edges[0].address;
    let many: String = (0..33).map(|n| format!("room=chat:r{n}&")).collect();
    let reader = token_with("kim", LONG, vec![Grant::new("chat:a", &[Right::Read])]);
    for (path, status, code) in [
        ("/v1/rooms/chat:b/events", 403, "forbidden"),
        ("/v1/rooms/chat:a/events?presence=true", 403, "forbidden"),
        ("/v1/rooms/chat:a/events?presence=maybe", 400, "bad_request"),
        ("/v1/rooms/chat:a/events?since=x", 400, "bad_cursor"),
        ("/v1/rooms/none:a/events", 404, "unknown_namespace"),
        ("/v1/rooms/nonsense/events", 400, "bad_room"),
        ("/v1/events", 400, "bad_request"),
        (
            "/v1/events?room=chat:a&since=chat:a~garbage",
            400,
            "bad_cursor",
        ),
        ("/v1/events?room=chat:a&room=nonsense", 400, "bad_room"),
        ("/v1/events?room=chat:a&room=chat:b", 403, "forbidden"),
        (&format!("/v1/events?{many}"), 429, "limit"),
        ("/v1/rooms/chat:a/poll?wait=soon", 400, "bad_request"),
        ("/v1/rooms/chat:a/poll?since=x", 400, "bad_cursor"),
        ("/v1/rooms/chat:b/poll", 403, "forbidden"),
        ("/v1/rooms/chat:a/events?ticket=", 401, "unauthorized"),
        ("/v1/rooms/chat:a/events?ticket=a.b.c", 401, "unauthorized"),
        ("/connection/sse", 400, "bad_request"),
    ] {
        let headers = if path.contains("ticket") {
            String::new()
        } else {
            bearer(&reader)
        };
        let answer = request(address, "GET", path, &headers, "").await;
        assert_eq!(answer.status, status, "{path}: {answer:?}");
        assert_eq!(answer.json()["code"], code, "{path}: {answer:?}");
    }
    let everything = bearer(&token("kim"));
    let three = "/v1/events?room=chat:a&room=chat:b&room=chat:c";
    let answer = request(address, "GET", three, &everything, "").await;
    assert_eq!(
        (answer.status, answer.json()["code"].clone()),
        (429, json!("limit"))
    );
    let ephemeral = request(address, "GET", "/v1/rooms/live:x/poll", &everything, "").await;
    assert_eq!(ephemeral.status, 400, "{ephemeral:?}");
    let head = request(address, "HEAD", "/v1/rooms/chat:a/events", &everything, "").await;
    assert_eq!(head.status, 405);
    let nobody = request(address, "GET", "/v1/rooms/chat:a/events", "", "").await;
    assert_eq!(nobody.status, 401);

    // A ticket is good on every edge, until it expires.
    let no_token = request(address, "POST", "/v1/tickets", "", "").await;
    assert_eq!(no_token.status, 401);
    let ticket = request(address, "POST", "/v1/tickets", &everything, "")
        .await
        .json();
    let path = format!(
        "/v1/rooms/chat:a/events?ticket={}",
        ticket["ticket"].as_str().unwrap()
    );
    for edge in &mesh.edges {
        Events::open(edge.address, &path, "")
            .await
            .named("joined")
            .await;
    }
    eventually("the ticket expires", LONG, async || {
        let answer = request(address, "GET", &path.replace("events", "poll"), "", "").await;
        match answer.status {
            401 => Ok(()),
            status => Err(format!("{status}")),
        }
    })
    .await;
}

#[tokio::test]
async fn a_stream_ends_with_its_reason() {
    let toml = "limits.sessions_per_user = 2\nedge.drain_spread = '1ms'";
    let mut mesh = Mesh::start(support::nats_url(), 2, toml).await;
    let address = mesh.edges[0].address;
    let path = "/v1/rooms/chat:a/events?presence=true&read=true";
    let open = async |user: &str| {
        let mut events = Events::open(address, path, &bearer(&token(user))).await;
        events.named("joined").await;
        events
    };

    // Everybody who follows is present, and seen to come and go.
    let mut kim = open("kim").await;
    // Changes are pushed from the moment at which the edge has the list.
    eventually("the edge knows who is there", LONG, async || {
        let path = "/v1/rooms/chat:a/presence";
        let (status, there) = ask(address, ("GET", path), &token("root"), &Value::Null).await;
        match (status, &there["count"]) {
            (200, count) if *count == 1 => Ok(()),
            _ => Err(format!("{status} {there}")),
        }
    })
    .await;
    let mut lee = open("lee").await;
    let came = kim.until("presence").await;
    assert_eq!(
        (&came.data["user"], &came.data["state"]),
        (&json!("lee"), &json!("join"))
    );
    let one_more = open("lee").await;
    let too_many = request(address, "GET", path, &bearer(&token("lee")), "").await;
    assert_eq!(
        (too_many.status, too_many.json()["code"].clone()),
        (429, json!("limit"))
    );
    drop(one_more);

    let revoke = ["revoke", "--user", "lee", "--for", "1h"];
    let output = mesh.command(&revoke).await.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let close = lee.until("close").await;
    assert_eq!(close.data["code"], 4002, "{close:?}");
    assert_eq!(lee.next().await, None);
    loop {
        let gone = kim.until("presence").await;
        if gone.data["state"] == "leave" {
            assert_eq!(gone.data["user"], "lee");
            break;
        }
    }

    // A client sends nothing after its request.
    let mut chatty = open("sun").await;
    chatty
        .reader
        .get_mut()
        .write_all(b"GET / HTTP/1.1\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(chatty.until("close").await.data["code"], 4004);

    // A drain: streams are told, polls are answered.
    let at = poll(address, "chat:a", "")
        .await
        .header("cursor")
        .unwrap()
        .to_owned();
    members(&mesh, 0, 1).await;
    let waiting = tokio::spawn({
        let query = format!("?wait=60s&since={at}");
        async move { poll(address, "chat:a", &query).await }
    });
    members(&mesh, 0, 2).await;
    signal(mesh.edges[0].process.pid().unwrap(), Signal::TERM);
    let waited = waiting.await.unwrap();
    assert_eq!((waited.status, waited.header("cursor")), (204, Some(&*at)));
    kim.until("reconnect").await;
    assert_eq!(kim.until("close").await.data["code"], 4010);
    assert_eq!(kim.next().await, None);
    let status = timeout(LONG, mesh.edges[0].process.exited()).await;
    assert_eq!(status.expect("it does not end").unwrap().code(), Some(0));
}

/// Cursors name positions of all regions, so both ways resume over them.
#[tokio::test]
async fn a_cut_between_regions_loses_nothing() {
    let names = ["seoul", "virginia"];
    let mut regions = Regions::start(&names).await;
    for name in names {
        regions.mesh(name).add_edge().await;
    }
    let (seoul, virginia) = (regions.at("seoul"), regions.at("virginia"));
    let kim = bearer(&token("kim"));
    let path = "/v1/events?room=chat:a&room=chat:b";
    let mut stream = Events::open(seoul.edges[0].address, path, &kim).await;
    let first = poll(seoul.edges[0].address, "chat:a", "").await;
    let mut at = first.header("cursor").unwrap().to_owned();
    let mut streamed = Vec::new();
    let mut id = None;
    say(seoul, "chat:a", json!("before")).await;
    while streamed.is_empty() {
        let event = stream.next().await.unwrap();
        id = event.id.or(id);
        if event.name == "msg" {
            streamed.push(event.data["body"].clone());
        }
    }
    drop(stream);
    regions.cut("virginia");
    say(seoul, "chat:a", json!("seoul")).await;
    say(virginia, "chat:a", json!("virginia")).await;
    // In the other region, which has not got all that the client has seen, and then in the own one.
    let mut polled = Vec::new();
    let mut follow = async |mesh: &Mesh, count: usize| {
        let path = format!("{path}&since={}", id.clone().unwrap());
        let mut stream = Events::open(mesh.edges[0].address, &path, &kim).await;
        while streamed.len() < count {
            let event = stream.next().await.unwrap();
            id = event.id.or(id.take());
            if event.name == "msg" {
                streamed.push(event.data["body"].clone());
            }
        }
        while polled.len() < count {
            let query = format!("?since={at}");
            let answer = poll(mesh.edges[0].address, "chat:a", &query).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            let answer = answer.json();
            let messages = answer["messages"].as_array().unwrap();
            polled.extend(messages.iter().map(|message| message["body"].clone()));
            at = cursor(&answer);
        }
    };
    follow(seoul, 2).await;
    regions.heal("virginia");
    follow(virginia, 3).await;
    say(virginia, "chat:a", json!("after")).await;
    follow(seoul, 4).await;
    let all = [
        json!("before"),
        json!("seoul"),
        json!("virginia"),
        json!("after"),
    ];
    assert_eq!(streamed, all);
    assert_eq!(polled, all);
}

/// The streams of Centrifugo's clients. What the SDK needs is tested with it.
#[tokio::test]
async fn commands_reach_a_stream_through_any_edge_and_nobody_else() {
    let toml = "auth.first_frame_timeout = '1s'\nlimits.frame = '68KiB'";
    let mesh = Mesh::start(support::nats_url(), 2, toml).await;
    let [here, there] = [mesh.edges[0].address, mesh.edges[1].address];
    let open = async |commands: &str| {
        let mut stream = TcpStream::connect(here).await.unwrap();
        let text = format!(
            "POST /connection/http_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{commands}",
            commands.len()
        );
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut lines = BufReader::new(stream);
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            assert!(lines.read_line(&mut line).await.unwrap() > 0);
        }
        lines
    };
    let next = async |lines: &mut BufReader<TcpStream>| {
        let mut line = String::new();
        let read = timeout(LONG, lines.read_line(&mut line))
            .await
            .expect("nothing comes");
        (read.unwrap() > 0).then(|| serde_json::from_str::<Value>(&line).unwrap())
    };
    let emulate = async |address, body: Value| {
        request(address, "POST", "/emulation", "", &body.to_string()).await
    };

    let connect = json!({"id": 1, "connect": {"token": token("kim")}}).to_string();
    let mut stream = open(&connect).await;
    let connected = next(&mut stream).await.unwrap()["connect"].clone();
    let (session, node) = (connected["session"].clone(), connected["node"].clone());
    assert!(session.as_str().unwrap().len() >= 32, "{connected}");
    for (id, address) in [(2, here), (3, there)] {
        let data = json!({"id": id, "publish": {"channel": "chat:a", "data": id}}).to_string();
        let sent = emulate(
            address,
            json!({"session": session, "node": node, "data": data}),
        )
        .await;
        assert_eq!(sent.status, 204, "{sent:?}");
        assert_eq!(
            next(&mut stream).await.unwrap(),
            json!({"id": id, "publish": {}})
        );
    }
    // Nobody else's session, and no edge that is not there.
    let data = json!({"id": 9, "publish": {"channel": "chat:a", "data": "forged"}}).to_string();
    for (address, name) in [(here, &node), (there, &node)] {
        let guessed = json!({"session": "0".repeat(32), "node": name, "data": data});
        assert_eq!(emulate(address, guessed).await.status, 204);
    }
    for name in ["nobody", "a.b", "*", ">"] {
        let lost = json!({"session": session, "node": name, "data": data});
        assert_eq!(emulate(here, lost).await.status, 404, "{name}");
    }
    for wrong in [
        json!({}),
        json!({"data": 1}),
        json!({"node": node}),
        json!({"session": session}),
    ] {
        let answer = emulate(here, wrong.clone()).await;
        assert_eq!(answer.status, 400, "{wrong}: {answer:?}");
    }
    let large = json!({"session": session, "node": node, "data": "x".repeat(70_000)});
    assert_eq!(emulate(there, large).await.status, 413);
    let page = ask(
        here,
        ("GET", "/v1/rooms/chat:a/messages"),
        &token("kim"),
        &Value::Null,
    )
    .await;
    let bodies = page.1["messages"].as_array().unwrap().iter();
    assert_eq!(
        bodies.map(|message| &message["body"]).collect::<Vec<_>>(),
        [2, 3]
    );

    // Garbage ends the session with its code; so does a client that says nothing, and a token that is not good.
    let garbage = json!({"session": session, "node": node, "data": "{garbage"});
    assert_eq!(emulate(there, garbage).await.status, 204);
    let end = next(&mut stream).await.unwrap();
    assert_eq!(end["push"]["disconnect"]["code"], 3501, "{end}");
    assert_eq!(next(&mut stream).await, None);
    let gone = json!({"session": session, "node": node, "data": data});
    assert_eq!(emulate(there, gone).await.status, 204);
    let mut silent = open("").await;
    let end = next(&mut silent).await.unwrap();
    assert_eq!(end["push"]["disconnect"]["code"], 3502, "{end}");
    let bad = json!({"id": 1, "connect": {"token": "x"}}).to_string();
    let mut bad = open(&bad).await;
    let end = next(&mut bad).await.unwrap();
    assert_eq!(end["push"]["disconnect"]["code"], 3500, "{end}");
}

/// A client that reads nothing is closed as any other, and what it missed is there when it comes back.
#[tokio::test]
async fn a_client_that_does_not_read_is_closed() {
    let toml = "limits.outbox = '64KiB'\nlimits.body = '512KiB'";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let address = mesh.edges[0].address;
    let mut slow = Events::open(address, "/v1/rooms/chat:a/events", &bearer(&token("kim"))).await;
    slow.named("joined").await;
    let large = "x".repeat(500_000);
    let mut said = 0;
    while mesh
        .metric(0, "natter_session_closed_total", "code=\"too_slow\"")
        .await
        == 0
    {
        said += 1;
        assert!(said < 200, "it is not closed");
        say(&mesh, "chat:a", json!(large)).await;
    }
    let mut rest = Vec::new();
    let read = timeout(LONG, slow.reader.read_to_end(&mut rest)).await;
    let _reset_or_end = read.expect("the connection does not end");
    assert!(rest.len() < 200 * 500_000, "it got everything");
}

/// A stream takes over the connection of its request. What was answered before on it is not lost or torn.
#[tokio::test]
async fn pipelined_requests_are_answered_before_a_stream() {
    let mesh = Mesh::start(support::nats_url(), 1, "").await;
    let kim = bearer(&token("kim"));
    for count in [1, 3, 200] {
        let mut stream = TcpStream::connect(mesh.edges[0].address).await.unwrap();
        let before = "GET /v1/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n".repeat(count);
        let follow = format!("GET /v1/rooms/chat:a/events HTTP/1.1\r\nHost: x\r\n{kim}\r\n");
        stream
            .write_all((before + &follow).as_bytes())
            .await
            .unwrap();
        let mut bytes = Vec::new();
        let mut part = vec![0; 1 << 16];
        // Either the stream begins, or it is refused because the client has not read.
        let is_last = |end: &[u8]| {
            let end = String::from_utf8_lossy(end);
            end.contains("event: joined") || end.contains("were not read")
        };
        loop {
            let read = timeout(LONG, stream.read(&mut part))
                .await
                .expect("nothing comes");
            let read = read.unwrap();
            assert!(read > 0, "it ended after {} bytes", bytes.len());
            bytes.extend_from_slice(&part[..read]);
            if is_last(&bytes[bytes.len().saturating_sub(read + 32)..]) {
                break;
            }
        }
        // Not before: a read may end within a character.
        let text = String::from_utf8(bytes).unwrap();
        let answers: Vec<&str> = text.split("HTTP/1.1 ").skip(1).collect();
        assert_eq!(answers.len(), count + 1);
        for answer in &answers[..count] {
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("200 OK"), "{head}");
            assert!(
                serde_json::from_str::<Value>(body).is_ok(),
                "an answer is torn"
            );
        }
    }
}
