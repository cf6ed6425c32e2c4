//! What clients send that other clients and natter itself must survive: names, references, sizes and JSON of all kinds,
//! there and back through real servers.

use std::{io::Read as _, process::Stdio};

use async_nats::HeaderMap;
use natter::testing::{
    auth::{Claims, Grant, Right, issue},
    mesh::provision::connect,
    model::{Class, RoomId, partition_of},
    runtime::unix_s,
    subject::{Subjects, header},
};
use serde_json::{Value, json};

use crate::support::{
    LONG, eventually,
    mesh::{Mesh, SECRET, token},
    mongodb_url, nats_url,
    raw::{Answer, Raw, bearer, request},
};

/// Names that have been trouble somewhere.
fn hostile_names() -> Vec<String> {
    let names = [
        "CORP\\kim",
        "a\"b",
        "\\",
        "\\u0041",
        "a\r\nNatter-From: lee",
        "\n",
        "\0",
        "\u{1}\t\u{7f}\u{85}\u{9b}",
        "김 👋",
        "\u{2028}x\u{2029}",
        " kim  ",
        "\u{a0}kim\u{3000}",
        "\u{feff}kim",
        "=41",
        "=",
        "a//b/",
        "[\"a\"]",
        "null",
        "a.b.*.>",
        "%2F%00",
        "\u{202e}e\u{301}\u{ffff}",
    ];
    let longest = ["\u{1}".repeat(256), "👋".repeat(64), "\\".repeat(256)];
    names
        .into_iter()
        .map(str::to_owned)
        .chain(longest)
        .collect()
}

/// A token of `user` for everything, with `info`.
fn token_of(user: &str, info: &Value) -> String {
    let mut claims = Claims::new(user, unix_s() + 3600);
    claims.grants = vec![Grant::new("*:*", &Right::ALL)];
    claims.info = info.as_object().cloned();
    issue(&claims, SECRET).unwrap()
}

/// The next push of this kind.
async fn pushed(member: &mut Raw, op: &str, fits: impl Fn(&Value) -> bool) -> Value {
    loop {
        let frame = member.json().await;
        if frame["op"] == op && fits(&frame) {
            return frame;
        }
    }
}

async fn get(mesh: &Mesh, path: &str) -> Value {
    let headers = bearer(&token("observer"));
    let answer = request(mesh.edges[0].address, "GET", path, &headers, "").await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    answer.json()
}

async fn post(mesh: &Mesh, room: &str, body: &str) -> Answer {
    let path = format!("/v1/rooms/{room}/messages");
    let headers = bearer(&token("kim"));
    request(mesh.edges[0].address, "POST", &path, &headers, body).await
}

/// The messages of a page, when it has all that was said.
async fn page(mesh: &Mesh, room: &str, partial: bool) -> Vec<Value> {
    let path = format!("/v1/rooms/{room}/messages?limit=200");
    eventually("a page from where it is wanted", LONG, async || {
        let page = get(mesh, &path).await;
        match page["partial"] == true {
            found if found == partial => Ok(page["messages"].as_array().unwrap().clone()),
            _ => Err(page.to_string()),
        }
    })
    .await
}

/// Starts a history service and waits until MongoDB has `count` messages.
async fn with_mongodb(mesh: &mut Mesh, room: &str, count: usize) {
    mesh.add_worker("/readyz").await;
    let client = mongodb::Client::with_uri_str(mesh.config.mongodb.url.expose());
    let database = client
        .await
        .unwrap()
        .database(&mesh.config.mongodb.database);
    let messages = database.collection::<mongodb::bson::Document>("messages");
    let of_room = mongodb::bson::doc! { "room": room, "place": { "$exists": true } };
    eventually("MongoDB has the messages", LONG, async || {
        let found = messages.count_documents(of_room.clone()).await.unwrap();
        if found == count as u64 {
            Ok(())
        } else {
            Err(found.to_string())
        }
    })
    .await;
}

fn escaped(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_names_come_back_from_everywhere() {
    let mut mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 0), "").await;
    let address = mesh.edges[0].address;
    let room = "chat:names";
    let mut lee = Raw::open(address, &token("lee")).await;
    lee.call(json!({"op": "join", "rid": 1, "room": room, "presence": true, "read": true}))
        .await;
    let names = hostile_names();
    let mut said = Vec::new();
    for (n, name) in names.iter().enumerate() {
        let info = json!({name: [name]});
        let mut session = Raw::open(address, &token_of(name, &info)).await;
        let joined = session
            .call(json!({"op": "join", "rid": 1, "room": room}))
            .await;
        assert_eq!(joined["op"], "joined", "{name:?}: {joined}");
        let come = pushed(&mut lee, "presence", |frame| frame["user"] == *name).await;
        assert_eq!((&come["user"], &come["info"]), (&json!(name), &info));

        let id = format!("m{n}");
        let mentions = json!([name, "lee", names[(n + 1) % names.len()]]);
        let reply_to = format!("{name}/m0");
        let ack = session
            .call(
                json!({"op": "send", "rid": 2, "room": room, "id": id, "body": {"text": name},
                "mentions": mentions, "reply_to": reply_to}),
            )
            .await;
        assert_eq!(
            (&ack["op"], &ack["id"]),
            (&json!("ack"), &json!(id)),
            "{name:?}: {ack}"
        );
        let push = pushed(&mut lee, "msg", |_| true).await;
        for (field, expected) in [
            ("id", json!(id)),
            ("from", json!(name)),
            ("mentions", mentions.clone()),
            ("reply_to", json!(reply_to)),
            ("body", json!({"text": name})),
            ("cursor", ack["cursor"].clone()),
        ] {
            assert_eq!(push[field], expected, "{field} of {name:?}");
        }
        said.push(push);

        // What refers to it finds it; from the user's own page too.
        let target = format!("{name}/{id}");
        let note = json!({"op": "send", "rid": 3, "room": room, "kind": "annotation",
            "target": target, "body": {"note": name}});
        let mut moderator = Raw::open(address, &token("mod")).await;
        let ack = moderator.call(note).await;
        assert_eq!(ack["op"], "ack", "{name:?}: {ack}");
        let push = pushed(&mut lee, "msg", |_| true).await;
        assert_eq!(
            (&push["target"], &push["from"]),
            (&json!(target), &json!("mod"))
        );

        session
            .call(json!({"op": "typing", "rid": 4, "room": room}))
            .await;
        assert_eq!(
            pushed(&mut lee, "typing", |_| true).await["user"],
            json!(name)
        );
        let read = json!({"op": "read", "rid": 5, "room": room, "cursor": push["cursor"]});
        assert_eq!(session.call(read).await["op"], "ok", "{name:?}");
        let receipt = pushed(&mut lee, "read", |frame| frame["user"] == *name).await;
        assert_eq!(receipt["room"], room);
        let list = get(&mesh, &format!("/v1/rooms/{room}/presence?limit=1000")).await;
        let there = list["users"].as_array().unwrap();
        let there = there.iter().find(|user| user["user"] == *name);
        assert_eq!(
            there.unwrap_or_else(|| panic!("{name:?} in {list}"))["info"],
            info
        );
    }
    let readers = get(&mesh, &format!("/v1/rooms/{room}/readers?limit=1000")).await;
    for name in &names {
        let all = readers["readers"].as_array().unwrap();
        assert!(
            all.iter().any(|reader| reader["user"] == *name),
            "{name:?} in {readers}"
        );
    }
    // From the streams, and from MongoDB.
    let from_streams = page(&mesh, room, true).await;
    with_mongodb(&mut mesh, room, names.len()).await;
    let from_mongodb = page(&mesh, room, false).await;
    for shown in [&from_streams, &from_mongodb] {
        assert_eq!(shown.len(), said.len());
        for ((shown, said), name) in shown.iter().zip(&said).zip(&names) {
            for field in ["id", "from", "mentions", "reply_to", "body", "cursor", "ts"] {
                assert_eq!(shown[field], said[field], "{field} of {name:?}");
            }
            assert_eq!(shown["annotations"], json!({"note": name}), "{name:?}");
        }
    }
    for (n, name) in names.iter().enumerate() {
        let from = format!("/v1/rooms/{room}/search?from={}&limit=100", escaped(name));
        let found = get(&mesh, &from).await;
        assert_eq!(
            found["messages"].as_array().unwrap().len(),
            1,
            "{name:?}: {found}"
        );
        assert_eq!(found["messages"][0]["id"], format!("m{n}"));
        let mentioned = format!(
            "/v1/rooms/{room}/search?mentions={}&limit=100",
            escaped(name)
        );
        let found = get(&mesh, &mentioned).await;
        assert_eq!(
            found["messages"].as_array().unwrap().len(),
            2,
            "{name:?}: {found}"
        );
    }
    // Erased by the name in a path.
    let name = &names[15];
    let path = format!("/v1/users/{}/messages", escaped(name));
    let erased = request(address, "DELETE", &path, &bearer(&token("observer")), "").await;
    assert!(
        matches!(erased.status, 200 | 202),
        "{} {}",
        erased.status,
        erased.body
    );
    eventually("their message is gone", LONG, async || {
        let left = page(&mesh, room, false).await;
        match left.iter().find(|message| message["from"] == **name) {
            None if left.len() == names.len() - 1 => Ok(()),
            _ => Err(format!("{left:?}")),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_long_is_refused_and_costs_nobody_their_connection() {
    let mesh = Mesh::start(nats_url(), 1, "").await;
    let address = mesh.edges[0].address;
    let controls = |count: usize| vec!["\u{1}".repeat(120); count];
    for room in ["chat:long", "live:long"] {
        let mut lee = Raw::open(address, &token("lee")).await;
        lee.call(json!({"op": "join", "rid": 1, "room": room}))
            .await;
        let mut kim = Raw::open(address, &token("kim")).await;
        let reference = format!("{}/1", "x".repeat(900_000));
        for (fields, named) in [
            (json!({"mentions": controls(100)}), "mentions"),
            (json!({"mentions": vec!["a"; 101]}), "mentions"),
            (json!({"mentions": ["👋".repeat(65)]}), "mentions"),
            (json!({"reply_to": reference}), "reply_to"),
            (json!({"reply_to": "\"".repeat(60_000)}), "reply_to"),
            (json!({"kind": "edit", "target": reference}), "target"),
            (
                json!({"kind": "reaction", "target": format!("{}/1", "=".repeat(320))}),
                "target",
            ),
            (json!({"body": "x".repeat(70_000)}), "body"),
        ] {
            let mut fields = fields;
            if fields["body"].is_null() {
                fields["body"] = json!(1);
            }
            let answer = post(&mesh, room, &fields.to_string()).await;
            for (key, value) in [
                ("op", json!("send")),
                ("rid", json!(7)),
                ("room", json!(room)),
            ] {
                fields[key] = value;
            }
            let error = kim.call(fields).await;
            let over_http = match answer.status {
                // The request as a whole is larger than is read.
                413 if answer.body.contains("the request has") => error.clone(),
                413 => answer.json(),
                other => panic!("{other}: {}", answer.body),
            };
            for error in [error, over_http] {
                assert_eq!(error["code"], "too_large", "{named}: {error}");
                let message = error["message"].as_str().unwrap();
                assert!(
                    message.contains(named) && message.contains("limit is"),
                    "{message}"
                );
            }
        }
        // The longest that is taken comes whole, and nothing of the others.
        let longest = format!("{}/{}", "\u{1}".repeat(256), "i".repeat(64));
        let fields = json!({"op": "send", "rid": 8, "room": room, "body": 1, "mentions": controls(45),
            "reply_to": longest, "kind": "annotation", "target": longest});
        let ack = kim.call(fields).await;
        assert_eq!(ack["op"], "ack", "{ack}");
        let push = lee.json().await;
        assert_eq!(
            (&push["op"], &push["mentions"]),
            (&json!("msg"), &json!(controls(45)))
        );
        assert_eq!(
            (&push["reply_to"], &push["target"]),
            (&json!(longest), &json!(longest))
        );
    }
}

/// Bodies that are refused, and the word of the message that says why.
fn unreadable() -> Vec<(String, &'static str)> {
    let nested = |open: &str, close: &str, levels: usize| {
        format!("{}1{}", open.repeat(levels), close.repeat(levels))
    };
    let mut bodies = vec![
        (nested("[", "]", 65), "nested"),
        (nested("[\n", "]", 10_000), "nested"),
        (nested("{\"a\":", "}", 65), "nested"),
        (nested("[{\"[\":", "}]", 33), "nested"),
    ];
    for text in [
        r"\ud83d",
        r"\uDC00\ud83d",
        r"a\udc4b",
        r"\ud83d\n",
        r"\ud83d\ud83d\udc4b",
    ] {
        bodies.push((format!("\"{text}\""), "surrogate"));
        bodies.push((format!("{{\"text\": [\"{text}\"]}}"), "surrogate"));
        bodies.push((format!("{{\"{text}\":1}}"), "surrogate"));
    }
    bodies
}

/// Bodies that many would change on the way.
fn readable() -> Vec<String> {
    let deepest = format!("{}1{}", "[".repeat(64), "]".repeat(64));
    [
        deepest.as_str(),
        r#""\ud83d\udc4b \\ud83d""#,
        r#"{ "a" : 1.0e3 , "a" : 123456789012345678901234567890, "b": -0 }"#,
        r#"["\u0000","\/","\u00e9é"]"#,
        "[\n1,\r\n\t2 ]",
        "\"\u{feff}\u{2028}\u{7f}\"",
        "1e400",
        "null",
    ]
    .map(str::to_owned)
    .to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn json_that_clients_can_not_read_is_refused_and_other_is_not_touched() {
    let mesh = Mesh::start(nats_url(), 1, "").await;
    let address = mesh.edges[0].address;
    for room in ["chat:json", "live:json"] {
        let mut lee = Raw::open(address, &token("lee")).await;
        lee.call(json!({"op": "join", "rid": 1, "room": room}))
            .await;
        let mut kim = Raw::open(address, &token("kim")).await;
        for (body, named) in unreadable() {
            let send = format!(r#"{{"op":"send","rid":2,"room":"{room}","body":{body}}}"#);
            kim.text(&send).await;
            let error = kim.json().await;
            let answer = post(&mesh, room, &format!("{{\"body\":{body}}}")).await;
            assert_eq!(answer.status, 400, "{}", answer.body);
            for error in [error, answer.json()] {
                assert_eq!(error["code"], "bad_request", "{error}");
                assert!(
                    error["message"].as_str().unwrap().contains(named),
                    "{error}"
                );
            }
        }
        for (n, body) in readable().iter().enumerate() {
            for mark in ["", "\u{feff}"] {
                kim.text(&format!(
                    r#"{mark}{{"op":"send","rid":{n},"room":"{room}","body":{body}}}"#
                ))
                .await;
                let ack = kim.json().await;
                assert_eq!(
                    (&ack["op"], &ack["rid"]),
                    (&json!("ack"), &json!(n)),
                    "{ack}"
                );
                let answer = post(&mesh, room, &format!("{mark}{{\"body\":{body}}}")).await;
                assert_eq!(answer.status, 200, "{}", answer.body);
                for _ in 0..2 {
                    let (_, frame) = lee.frame().await.unwrap();
                    let frame = String::from_utf8(frame).unwrap();
                    assert!(
                        frame.contains(&format!("\"body\":{body}")),
                        "{body:?} in {frame}"
                    );
                }
            }
        }
        for path in [format!("/v1/rooms/{room}/read"), "/v1/unread".to_owned()] {
            let method = if path.ends_with("read") && path.contains("rooms") {
                "PUT"
            } else {
                "POST"
            };
            let body = format!("\u{feff}{{\"cursor\":\"x\",\"rooms\":[\"{room}\"]}}");
            let answer = request(address, method, &path, &bearer(&token("kim")), &body).await;
            assert!(!answer.body.contains("bad_json"), "{}", answer.body);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_depth_that_is_taken_is_configured() {
    let mesh = Mesh::start(nats_url(), 1, "limits.json_depth = 3").await;
    for (body, status) in [("[[[1]]]", 200), ("[[[{}]]]", 400), ("{\"a\":[[[]]]}", 400)] {
        let answer = post(&mesh, "chat:depth", &format!("{{\"body\":{body}}}")).await;
        assert_eq!(answer.status, status, "{}", answer.body);
        assert!(
            status == 200 || answer.body.contains("3 levels"),
            "{}",
            answer.body
        );
    }
}

/// What is published past the edges, or was stored before there were these rules, can't be refused: it comes as text.
#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_refused_comes_as_text_everywhere() {
    let mut mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 0), "").await;
    let room = RoomId::parse("chat:byhand").unwrap();
    let mut lee = Raw::open(mesh.edges[0].address, &token("lee")).await;
    lee.call(json!({"op": "join", "rid": 1, "room": room}))
        .await;
    let part = partition_of(&room, mesh.config.nats.partitions);
    let subject = Subjects::new(&mesh.config.nats.prefix).publish(
        &mesh.config.region(),
        part,
        &room,
        Class::Msg,
    );
    let nats = connect(&mesh.config.nats).await.unwrap();
    let mut payloads: Vec<(String, Option<String>)> = Vec::new();
    for (body, _) in unreadable()
        .into_iter()
        .filter(|(body, _)| !body.contains("[{\"["))
    {
        // Up to 96 levels are left to who publishes past the edges.
        let shallow = body.matches(['[', '{']).count() <= 96 && !body.contains("\\u");
        payloads.push((body.clone(), (!shallow).then_some(body)));
    }
    for (payload, text) in [
        ("\u{feff}{\"a\": 1}", None),
        ("\u{feff}hi", Some("hi")),
        ("{\"a\":", Some("{\"a\":")),
    ] {
        payloads.push((payload.to_owned(), text.map(str::to_owned)));
    }
    let mut said = Vec::new();
    for (n, (payload, text)) in payloads.iter().enumerate() {
        let mut headers = HeaderMap::new();
        // As an edge of before would have sent it.
        headers.insert(header::FROM, "kim");
        headers.insert(header::ID, format!("m{n}"));
        headers.insert(header::MSG_ID, format!("{room}/kim/m{n}"));
        nats.send_request(
            subject.clone(),
            async_nats::Request::new()
                .headers(headers)
                .payload(payload.clone().into()),
        )
        .await
        .unwrap();
        let push = lee.json().await;
        assert_eq!(push["id"], format!("m{n}"));
        match text {
            Some(text) => assert_eq!(push["body"], json!(text)),
            None => {
                let json = payload.trim_start_matches('\u{feff}');
                assert_eq!(push["body"], serde_json::from_str::<Value>(json).unwrap());
            }
        }
        said.push(push);
    }
    let from_streams = page(&mesh, room.as_str(), true).await;
    with_mongodb(&mut mesh, room.as_str(), payloads.len()).await;
    let from_mongodb = page(&mesh, room.as_str(), false).await;
    for shown in [from_streams, from_mongodb] {
        assert_eq!(shown.len(), said.len());
        for (shown, said) in shown.iter().zip(&said) {
            assert_eq!((&shown["id"], &shown["body"]), (&said["id"], &said["body"]));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_print_one_object_a_line() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), "").await;
    let room = "chat:lines";
    let bodies = [
        "{\n  \"text\": \"a\\nb\",\r\n  \"n\": 1.0e3\n}",
        "[\n\n1\r,\r\n\t2 ]",
        "\"\\n\u{2028}\u{85}\"",
        "{\"a\":\n123456789012345678901234567890,\n\"a\":-0}",
        "1",
    ];
    for (n, body) in bodies.iter().enumerate() {
        let answer = post(
            &mesh,
            room,
            &format!("{{\"id\":\"m{n}\",\n\"body\":{body}\n}}"),
        )
        .await;
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
    let lines_hold = |lines: &[String]| {
        assert_eq!(lines.len(), bodies.len(), "{lines:?}");
        for (n, (line, body)) in lines.iter().zip(bodies).enumerate() {
            let message: Value = serde_json::from_str(line).unwrap();
            assert_eq!(message["id"], format!("m{n}"));
            assert_eq!(
                message["body"],
                serde_json::from_str::<Value>(body).unwrap()
            );
            // Numbers and spaces to the letter: only ends of lines go.
            assert!(line.contains(&body.replace(['\r', '\n'], "")), "{line}");
        }
    };
    let url = format!("ws://{}/ws", mesh.edges[0].address);
    let token = token("lee");
    let with_edge = ["--url", &url, "--token", &token];
    let export = [&["history", "export", room][..], &with_edge].concat();
    let output = mesh.command(&export).await.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    lines_hold(
        &text
            .split_terminator('\n')
            .map(str::to_owned)
            .collect::<Vec<_>>(),
    );

    // From the beginning: the position before the first message.
    let all = get(&mesh, &format!("/v1/rooms/{room}/messages")).await;
    let first = all["messages"][0]["cursor"].as_str().unwrap();
    let mut parts: Vec<&str> = first.split('.').collect();
    parts[2..].copy_from_slice(&["0", "0"]);
    let since = parts.join(".");
    let tail = [&["tail", room, "--json", "--since", &since][..], &with_edge].concat();
    let mut tail = mesh
        .command(&tail)
        .await
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = tail.stdout.take().unwrap();
    let read = tokio::task::spawn_blocking(move || {
        let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
        while !text.ends_with(b"\n") || !String::from_utf8_lossy(&text).contains("\"m4\"") {
            let read = stdout.read(&mut buffer).unwrap();
            assert!(read > 0, "tail ended: {}", String::from_utf8_lossy(&text));
            text.extend_from_slice(&buffer[..read]);
        }
        String::from_utf8(text).unwrap()
    });
    let text = read.await;
    drop(tail.kill());
    drop(tail.wait());
    lines_hold(
        &text
            .unwrap()
            .split_terminator('\n')
            .map(str::to_owned)
            .collect::<Vec<_>>(),
    );
}
