//! `natter import` and `natter export`, and how long history is kept.

use std::{
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use mongodb::bson::{Bson, Document as Fields, doc};
use natter::testing::{
    bus::{Connection, Reader},
    history::status,
    runtime::unix_ms,
};
use serde_json::{Value, json};

use crate::support::{
    LONG,
    calls::{command, next, reply},
    eventually,
    mesh::{Mesh, ask, token},
    mongodb_url, nats_url,
};

const DAY: u64 = 24 * 3600 * 1000;

const ONE_PART: &str = "[nats]\npartitions = 1\n";

fn file(mesh: &Mesh, name: &str, lines: &[Value]) -> PathBuf {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let path = mesh.dir().join(name);
    std::fs::write(&path, text).unwrap();
    path
}

async fn natter(mesh: &Mesh, args: &[&str]) -> Output {
    let mut command = mesh.command(args).await;
    tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap()
}

/// Runs `natter import` and returns what it prints, if it succeeds.
async fn import(mesh: &Mesh, file: &Path, flags: &[&str]) -> String {
    let mut args = vec!["import", file.to_str().unwrap()];
    args.extend(flags);
    let output = natter(mesh, &args).await;
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn imported(lines: u64, imported: u64, known: u64) -> String {
    format!("{lines} lines: {imported} imported, {known} already there, 0 erased before, 0 bad")
}

/// The lines of `natter export`.
async fn export(mesh: &Mesh, args: &[&str]) -> Vec<Value> {
    let mut all = vec!["export"];
    all.extend(args);
    let output = natter(mesh, &all).await;
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

async fn caught_up(mesh: &Mesh) {
    let connection = Connection::open(&mesh.config.nats, "test").await.unwrap();
    let reader = Reader::new(connection.clone(), &mesh.config.nats);
    eventually("history has everything", LONG, async || {
        let status = status(&connection, &reader, &mesh.config).await;
        match &status {
            Ok(status) if status.lag_messages == 0 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

async fn messages(mesh: &Mesh) -> mongodb::Collection<Fields> {
    let client = mongodb::Client::with_uri_str(mesh.config.mongodb.url.expose());
    let database = client.await.unwrap();
    let database = database.database(&mesh.config.mongodb.database);
    database.collection("messages")
}

/// All messages of a room, read in pages of `limit`, from one end to the other; and back.
async fn pages(mesh: &Mesh, room: &str, limit: usize) -> Vec<Value> {
    let mut all: Vec<Value> = Vec::new();
    let mut query = "after=".to_owned();
    loop {
        let path = format!("/v1/rooms/{room}/messages?limit={limit}&{query}");
        let page = mesh.get(0, &path).await.unwrap();
        assert_eq!(page["partial"], Value::Null);
        all.extend(page["messages"].as_array().unwrap().iter().cloned());
        match page["next"].as_str() {
            Some(next) => query = format!("after={next}"),
            None => break,
        }
    }
    let mut back: Vec<Value> = Vec::new();
    let mut query = String::new();
    loop {
        let path = format!("/v1/rooms/{room}/messages?limit={limit}{query}");
        let page = mesh.get(0, &path).await.unwrap();
        back.splice(0..0, page["messages"].as_array().unwrap().iter().cloned());
        match page["prev"].as_str() {
            Some(prev) => query = format!("&before={prev}"),
            None => break,
        }
    }
    assert_eq!(all, back);
    all
}

fn ids(messages: &[Value]) -> Vec<&str> {
    let ids = messages.iter().map(|one| one["id"].as_str().unwrap());
    ids.collect()
}

/// A message that kim sent `age` ms ago.
fn message(room: &str, id: &str, age: u64) -> Value {
    let ts = unix_ms() - age;
    json!({"room": room, "from": "kim", "id": id, "ts": ts, "body": {"text": format!("word{id}")}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_and_recent_messages_come_with_their_times_once() {
    let mut mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 0), ONE_PART).await;
    let room = "chat:moved";
    let mut lines: Vec<Value> = (0..7)
        .map(|n| message(room, &format!("old{n}"), 40 * DAY - n / 2))
        .collect();
    lines.extend((0..5).map(|n| message(room, &format!("new{n}"), DAY - n)));
    lines[8]["reply_to"] = json!("kim/old1");
    lines[8]["mentions"] = json!(["lee"]);
    let path = file(&mesh, "team.jsonl", &lines);

    // Somebody is there, and somebody comes back.
    let mut lee = mesh.connect(0, "lee").await;
    let joined = reply(&mut lee, "join", json!({ "room": room })).await;
    let since = joined["cursor"].clone();
    assert_eq!(import(&mesh, &path, &[]).await, imported(12, 12, 0));
    let mut pushed = Vec::new();
    while pushed.len() < 5 {
        let frame = next(&mut lee).await.json();
        assert_eq!(frame["op"], "msg", "{frame}");
        pushed.push(frame);
    }
    for (pushed, line) in pushed.iter().zip(&lines[7..]) {
        for field in ["id", "from", "ts", "body", "reply_to", "mentions"] {
            assert_eq!(pushed[field], line[field], "{field} of {pushed}");
        }
    }
    let unread = reply(&mut lee, "unread", json!({ "rooms": [room] })).await;
    assert_eq!(unread["rooms"][0]["count"], 5);
    let mut ann = mesh.connect(0, "ann").await;
    let resumed = command(&mut ann, "join", json!({ "room": room, "since": since })).await;
    assert_eq!(resumed.last().unwrap()["replay"], 5);
    for line in &lines[7..] {
        let frame = next(&mut ann).await.json();
        assert_eq!((&frame["id"], &frame["ts"]), (&line["id"], &line["ts"]));
    }

    // The history service has not seen them yet; then it has. Nothing else changes.
    mesh.add_worker("/readyz").await;
    caught_up(&mesh).await;
    let told = pages(&mesh, room, 3).await;
    for (told, line) in told.iter().zip(&lines) {
        for field in ["id", "from", "ts", "body", "reply_to", "mentions"] {
            assert_eq!(told[field], line[field], "{field} of {told}");
        }
    }
    assert_eq!(told.len(), 12);
    let messages = messages(&mesh).await;
    let at = doc! { "room": room, "id": "new1" };
    let found = messages.find_one(at).await.unwrap().unwrap();
    let at = found.get_datetime("at").unwrap().timestamp_millis();
    assert_eq!(json!(at), lines[8]["ts"]);

    // Again, and with what is new in front, in the middle and at the end.
    assert_eq!(import(&mesh, &path, &[]).await, imported(12, 0, 12));
    lines.insert(0, message(room, "older", 50 * DAY));
    lines.push(message(room, "newest", 5));
    let path = file(&mesh, "more.jsonl", &lines);
    assert_eq!(import(&mesh, &path, &[]).await, imported(14, 2, 12));
    caught_up(&mesh).await;
    let all = pages(&mesh, room, 4).await;
    let expected: Vec<&str> = lines
        .iter()
        .map(|one| one["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids(&all), expected);

    // A message of MongoDB is edited like any other; its cursor is no place to resume from.
    let fields = json!({"room": room, "kind": "edit", "target": "kim/old3", "body": "edited"});
    let mut kim = mesh.connect(0, "kim").await;
    assert_eq!(reply(&mut kim, "send", fields).await["op"], "ack");
    let sought = mesh.get(0, "/v1/search?q=wordold2").await.unwrap();
    assert_eq!(sought["messages"][0]["id"], "old2");
    let since = all[4]["cursor"].clone();
    let fields = json!({ "room": room, "since": since });
    let joined = reply(&mut kim, "join", fields).await;
    assert_eq!(joined["reset"], true, "{joined}");
    let fields = json!({ "room": room, "cursor": since });
    let read = reply(&mut kim, "read", fields).await;
    assert_eq!(read["code"], "bad_cursor", "{read}");
    caught_up(&mesh).await;
    let around = format!("/v1/rooms/{room}/messages?around=kim/old3&limit=1");
    let around = mesh.get(0, &around).await.unwrap();
    assert_eq!(around["messages"][0]["body"], "edited");
    // Now MongoDB has an edit of its own time.
    assert!(around["messages"][0]["edited_at"].as_u64().unwrap() > unix_ms() - DAY);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_that_was_killed_is_continued() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), "").await;
    let room = |n: u64| format!("chat:killed{}", n % 7);
    let lines = |age: u64, name: &str| -> Vec<Value> {
        let ids = (0..4000).map(|n| message(&room(n), &format!("{name}{n}"), age - n));
        ids.collect()
    };
    let mut lines_ = lines(40 * DAY, "old");
    lines_.extend(lines(DAY, "new"));
    let path = file(&mesh, "killed.jsonl", &lines_);
    let found = messages(&mesh).await;
    let mut killed = 0;
    for id in ["old1200", "new900", "new2500"] {
        let mut import = mesh.command(&["import", path.to_str().unwrap()]).await;
        let mut import = import.stdout(Stdio::null()).spawn().unwrap();
        eventually("a part is there", LONG, async || {
            let one = found.find_one(doc! { "id": id }).await.unwrap();
            let is_over = import.try_wait().unwrap().is_some();
            if one.is_some() || is_over {
                Ok(())
            } else {
                Err(format!("{id} is not there"))
            }
        })
        .await;
        killed += usize::from(import.try_wait().unwrap().is_none());
        import.kill().unwrap();
        import.wait().unwrap();
    }
    assert!(killed > 0, "every import was over before it was killed");
    let told = import(&mesh, &path, &[]).await;
    assert!(told.starts_with("8000 lines: "), "{told}");
    caught_up(&mesh).await;
    assert_eq!(import(&mesh, &path, &[]).await, imported(8000, 0, 8000));
    for n in 0..7 {
        let name = room(n);
        let of_room = lines_.iter().filter(|line| line["room"] == json!(name));
        let expected: Vec<&str> = of_room.map(|line| line["id"].as_str().unwrap()).collect();
        assert_eq!(ids(&pages(&mesh, &name, 200).await), expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_line_is_named_and_nothing_is_imported() {
    let toml = "[nats]\npartitions = 1\n[namespaces.log]\ndurable = true\ntyping = false\n";
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), toml).await;
    let good = message("chat:bad", "good", 5);
    let with = |field: &str, value: Value| {
        let mut line = message("chat:bad", "x", 5);
        line[field] = value;
        line.to_string()
    };
    let bad = [
        ("{".to_owned(), "EOF while parsing"),
        (with("room", json!("nowhere")), "nowhere"),
        (
            with("room", json!("what:x")),
            "the namespace what is not configured",
        ),
        (
            with("room", json!("live:x")),
            "the namespace live is not durable",
        ),
        (with("from", json!("")), "from is empty"),
        (with("id", json!("a b")), "\"a b\""),
        (with("ts", json!(unix_ms() + DAY)), "in the future"),
        (with("ts", json!("now")), "invalid type"),
        (
            with("body", json!("x".repeat(70_000))),
            "limits.body is 65536",
        ),
        (with("reply-to", json!("kim/1")), "unknown field `reply-to`"),
        (with("kind", json!("edit")), "target is missing"),
        (with("kind", json!("erase")), "kind is not one of"),
        (with("mentions", json!("lee")), "invalid type"),
        (
            message("log:x", "x", 40 * DAY).to_string(),
            "older than streams.max_age, and the namespace log has no history",
        ),
        (good.to_string(), "the same message as line 1"),
    ];
    let mut text = format!("{good}\n\n");
    bad.iter()
        .for_each(|(line, _)| text.push_str(&format!("{line}\r\n")));
    let path = mesh.dir().join("bad.jsonl");
    std::fs::write(&path, text).unwrap();
    let args = ["import", path.to_str().unwrap()];
    for flags in [&[][..], &["--check"][..]] {
        let output = natter(&mesh, &[&args[..], flags].concat()).await;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let told = String::from_utf8(output.stderr).unwrap();
        for (number, (_, problem)) in (3..).zip(&bad) {
            let line = told
                .lines()
                .find(|told| told.contains(&format!("line {number}: ")));
            let line = line.unwrap_or_else(|| panic!("line {number} is not in {told}"));
            assert!(line.contains(problem), "{line}, not {problem}");
        }
        assert_eq!(told.lines().count(), bad.len(), "{told}");
        let done = String::from_utf8(output.stdout).unwrap();
        assert!(done.contains("16 lines, 15 bad"), "{done}");
    }
    assert!(export(&mesh, &[]).await.is_empty());

    let output = natter(&mesh, &[&args[..], &["--skip-bad"]].concat()).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let done = String::from_utf8(output.stdout).unwrap();
    let expected = "16 lines: 1 imported, 0 already there, 0 erased before, 15 bad\n";
    assert_eq!(done, expected);
    caught_up(&mesh).await;
    assert_eq!(ids(&export(&mesh, &[]).await), ["good"]);
}

/// What an export writes of a room in use, and of one that was imported.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_can_be_imported_elsewhere_and_exported_again() {
    let toml = "[nats]\npartitions = 2\n[namespaces.log]\ndurable = true\ntyping = false\n";
    let mut from = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), toml).await;
    let old = |id: &str, more: Value| {
        let mut line = message("chat:a", id, 40 * DAY);
        line.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        line
    };
    // Messages of one millisecond, in this order.
    let at = unix_ms() - 35 * DAY;
    let lines = [
        old(
            "z",
            json!({"ts": at, "edited_at": at + 5, "mentions": ["lee"]}),
        ),
        old(
            "y",
            json!({"ts": at, "deleted_at": at + 9, "body": null, "reply_to": "z"}),
        ),
        old(
            "x",
            json!({"ts": at, "reactions": {"👍": {"users": ["lee", "$odd\nname"]}}}),
        ),
        json!({"room": "chat:a", "kind": "annotation", "from": "bot", "ts": at + 4,
               "target": "kim/x", "body": {"translation": {"en": 1.50}}}),
        json!({"room": "chat:a", "kind": "edit", "from": "mod", "ts": at + 5,
               "target": "kim/x", "body": "moderated"}),
    ];
    let path = file(&from, "old.jsonl", &lines);
    assert_eq!(import(&from, &path, &[]).await, imported(5, 5, 0));
    assert_eq!(import(&from, &path, &[]).await, imported(5, 0, 5));
    let mut kim = from.connect(0, "kim").await;
    let bodies = [
        "{ \"a\" : 1.0, \"a\": [ -0 ] }",
        "\"안녕\\u0000\"",
        "null",
        "1e2",
    ];
    for (n, body) in bodies.iter().enumerate() {
        for room in ["chat:a", "log:a"] {
            let body: &serde_json::value::RawValue = serde_json::from_str(body).unwrap();
            let fields = json!({"room": room, "id": format!("n{n}"), "reply_to": "kim/z"});
            let mut text = fields.to_string();
            text.truncate(text.len() - 1);
            let text = format!("{text},\"body\":{body}}}");
            let path = format!("/v1/rooms/{room}/messages");
            let headers = format!("Authorization: Bearer {}\r\n", token("kim"));
            let address = from.edges[0].address;
            let answer = crate::support::mesh::http(address, "POST", &path, &headers, &text);
            assert_eq!(answer.await.unwrap().0, 200);
        }
    }
    let mut lee = from.connect(0, "lee").await;
    for room in ["chat:a", "log:a"] {
        for (who, fields) in [
            (
                0,
                json!({"kind": "edit", "target": "n0", "body": 7, "mentions": ["ann"]}),
            ),
            (0, json!({"kind": "delete", "target": "n1"})),
            (
                1,
                json!({"kind": "reaction", "target": "kim/n2", "body": "❤️"}),
            ),
            (
                1,
                json!({"kind": "reaction", "target": "kim/n2", "body": "👍"}),
            ),
            (
                1,
                json!({"kind": "reaction", "target": "kim/n2", "body": {"key": "👍", "remove": true}}),
            ),
            (
                0,
                json!({"kind": "reaction", "target": "kim/n2", "body": "❤"}),
            ),
            (
                1,
                json!({"kind": "annotation", "target": "kim/n3", "body": {"mood": "good"}}),
            ),
            (
                1,
                json!({"kind": "annotation", "target": "kim/z", "body": {"mood": [1, {}]}}),
            ),
        ] {
            let mut fields = fields;
            fields["room"] = json!(room);
            let client = if who == 0 { &mut kim } else { &mut lee };
            let sent = reply(client, "send", fields).await;
            assert_eq!(sent["op"], "ack", "{sent}");
        }
    }
    caught_up(&from).await;
    let first = export(&from, &[]).await;
    assert_eq!(ids(&first)[..7], ["z", "y", "x", "n0", "n1", "n2", "n3"]);
    // Of a namespace without history it is the log: four messages and eight changes.
    assert_eq!(first.len(), 7 + 12);
    assert_eq!(first[2]["annotated_by"], json!({"translation": "bot"}));
    assert_eq!(first[2]["body"], "moderated");
    assert_eq!(first[5]["reactions"]["❤️"]["users"], json!(["kim", "lee"]));

    let to = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), toml).await;
    // Byte for byte, which JSON values do not tell.
    let path = to.dir().join("all.jsonl");
    std::fs::write(&path, natter(&from, &["export"]).await.stdout).unwrap();
    assert_eq!(import(&to, &path, &[]).await, imported(19, 19, 0));
    caught_up(&to).await;
    assert_eq!(import(&to, &path, &[]).await, imported(19, 0, 19));
    let second = export(&to, &[]).await;
    for (first, second) in first.iter().zip(&second) {
        assert_eq!(first, second);
    }
    assert_eq!(first.len(), second.len());
    let text = |mesh| async move { natter(mesh, &["export", "chat:a"]).await.stdout };
    assert_eq!(text(&to).await, text(&from).await);

    // A part.
    assert_eq!(export(&to, &["chat:*"]).await, first[..7]);
    assert_eq!(export(&to, &["log:a"]).await, first[7..]);
    assert_eq!(export(&to, &["--after", "chat:a"]).await, first[7..]);
    // As nobody writes to MongoDB, not all of it can be said to be there.
    from.workers[0].process.stop().await;
    let fields = json!({"room": "chat:a", "id": "last", "body": 1});
    assert_eq!(reply(&mut kim, "send", fields).await["op"], "ack");
    let last = export(&from, &["chat:a"]).await;
    assert_eq!(last.last().unwrap()["id"], "last");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_erased_is_not_imported() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), ONE_PART).await;
    let lines = [
        message("chat:gone", "old", 40 * DAY),
        message("chat:gone", "new", DAY),
        message("chat:stays", "old", 40 * DAY),
    ];
    let path = file(&mesh, "gone.jsonl", &lines);
    assert_eq!(import(&mesh, &path, &[]).await, imported(3, 3, 0));
    caught_up(&mesh).await;
    eventually("the room is erased", LONG, async || {
        let what = ("DELETE", "/v1/rooms/chat:gone");
        let (status, answer) = ask(mesh.edges[0].address, what, &token("mod"), &Value::Null).await;
        if status == 200 {
            Ok(())
        } else {
            Err(format!("{status} {answer}"))
        }
    })
    .await;
    assert_eq!(
        import(&mesh, &path, &[]).await,
        "3 lines: 0 imported, 1 already there, 2 erased before, 0 bad"
    );
    let left = export(&mesh, &[]).await;
    assert_eq!(left.len(), 1);
    assert_eq!(left[0]["room"], "chat:stays");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_only_neither_tells_members_nor_counts_as_unread() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), ONE_PART).await;
    let room = "chat:quiet";
    let mut kim = mesh.connect(0, "kim").await;
    reply(&mut kim, "join", json!({ "room": room })).await;
    let fields = json!({"room": room, "id": "live", "body": 1});
    let mut told = command(&mut kim, "send", fields).await;
    while !told.iter().any(|frame| frame["op"] == "msg") {
        told.push(next(&mut kim).await.json());
    }
    let lines: Vec<Value> = (0..30)
        .map(|n| message(room, &format!("m{n}"), DAY - n))
        .collect();
    let path = file(&mesh, "quiet.jsonl", &lines);
    let done = import(&mesh, &path, &["--history-only"]).await;
    assert_eq!(done, imported(30, 30, 0));
    assert_eq!(import(&mesh, &path, &[]).await, imported(30, 0, 30));
    // Frames come in order: a message would have come before this.
    let unread = command(&mut kim, "unread", json!({ "rooms": [room] })).await;
    assert_eq!(unread.len(), 1, "{unread:?}");
    assert_eq!(unread[0]["rooms"][0]["count"], 0);
    // They stand before what was said since, by their times.
    let all = pages(&mesh, room, 7).await;
    assert_eq!((all.len(), all[30]["id"].as_str()), (31, Some("live")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_ends_where_it_is_not_kept_any_longer() {
    let toml = "[nats]\npartitions = 1\n[streams]\nmax_age = '1h'\n[namespaces.chat]\nhistory_keep = '90d'\n";
    let mut mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 0), toml).await;
    let room = "chat:kept";
    let lines: Vec<Value> = (0..40)
        .map(|n| message(room, &format!("m{n}"), (110 - n) * DAY - DAY / 2))
        .collect();
    let path = file(&mesh, "kept.jsonl", &lines);
    let refused = natter(&mesh, &["import", path.to_str().unwrap()]).await;
    let told = String::from_utf8(refused.stderr).unwrap();
    assert!(
        told.contains("line 1: it is older than namespaces.chat.history_keep = 2months"),
        "{told}"
    );
    let args = ["import", path.to_str().unwrap()];
    let mut command = mesh.command(&args).await;
    command.env("NATTER__NAMESPACES__CHAT__HISTORY_KEEP", "0s");
    let done = tokio::task::spawn_blocking(move || command.output().unwrap());
    assert!(done.await.unwrap().status.success());
    let messages = messages(&mesh).await;
    // Changes of messages that are gone.
    for (id, ts) in [("old", 100 * DAY), ("young", DAY)] {
        let at = format!("{:011x}.local.k3.01", unix_ms() - ts);
        let stub =
            doc! { "_id": format!("{room}/kim/{id}"), "room": room, "edited": at, "body": 1 };
        messages.insert_one(stub).await.unwrap();
    }
    let other = doc! { "_id": "other:x/kim/1", "room": "other:x", "place": "00000000001.local.k3.01", "id": "1" };
    messages.insert_one(other).await.unwrap();
    for _ in 0..3 {
        mesh.add_worker("/readyz").await;
    }
    // Whether they are removed or still to be removed.
    let shown: Vec<String> = (20..40).map(|n| format!("m{n}")).collect();
    assert_eq!(ids(&pages(&mesh, room, 3).await), shown);
    let sought = mesh.get(0, "/v1/search?q=wordm3").await.unwrap();
    assert!(
        sought["messages"].as_array().unwrap().is_empty(),
        "{sought}"
    );
    let sought = mesh.get(0, "/v1/search?q=wordm33").await.unwrap();
    assert_eq!(sought["messages"][0]["id"], "m33");
    let path = format!("/v1/rooms/{room}/messages?around=kim/m3");
    let refused = mesh.get(0, &path).await.unwrap_err();
    assert!(refused.contains("bad_id"), "{refused}");

    eventually("the old ones are removed", LONG, async || {
        let all = doc! { "room": room, "place": { "$exists": true } };
        let left = messages.count_documents(all).await.unwrap();
        let stub = doc! { "room": room, "place": Bson::Null };
        let stubs = messages.count_documents(stub).await.unwrap();
        match (left, stubs) {
            (20, 1) => Ok(()),
            left => Err(format!("{left:?} are left")),
        }
    })
    .await;
    let young = doc! { "_id": format!("{room}/kim/young") };
    assert!(messages.find_one(young).await.unwrap().is_some());
    let other = doc! { "room": "other:x" };
    assert!(messages.find_one(other).await.unwrap().is_some());
    assert_eq!(ids(&pages(&mesh, room, 3).await), shown);
    // What a client has a cursor of that is gone is the beginning.
    let cursor = "local.gone1.7.abcd";
    let page = mesh
        .get(0, &format!("/v1/rooms/{room}/messages?before={cursor}"))
        .await;
    let page = page.unwrap();
    assert_eq!(
        (&page["messages"], &page["prev"]),
        (&json!([]), &Value::Null)
    );
}
