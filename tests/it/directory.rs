//! The directory of rooms, and the repair of the index of users: what the history service does with room records.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use futures_util::StreamExt as _;
use mongodb::bson::{Document as Fields, doc};
use natter::testing::{
    auth::{Grant, Right},
    mesh::provision::connect,
    subject::{bucket, bucket_name},
};
use serde_json::{Value, json};

use crate::support::{
    self, LONG, eventually,
    mesh::{Mesh, ask, http, token_with},
    mongodb_url, nats_url,
    regions::Regions,
};

/// `crew` lets in members only; in `chat`, grants say who is in a room.
const TOML: &str = "limits.commands_per_second = 100000\nlimits.commands_burst = 100000\n\
    [nats]\npartitions = 1\n[mongodb]\nread_timeout = '1s'\n\
    [namespaces.chat]\ndurable = true\ntyping = false\nhistory = true\n\
    [namespaces.crew]\ndurable = true\ntyping = false\nhistory = true\naccess = 'members'\n";

fn token(user: &str, grants: &[(&str, &[Right])]) -> String {
    let grants = grants.iter().map(|(rooms, can)| Grant::new(rooms, can));
    token_with(user, Duration::from_secs(3600), grants.collect())
}

/// The token of one who looks after all rooms.
fn boss() -> String {
    token("boss", &[("*:*", &Right::ALL)])
}

/// The token of a user without special rights.
fn user(name: &str) -> String {
    token(name, &[("*:*", &[Right::Read, Right::Write])])
}

async fn done(address: SocketAddr, method: &str, path: &str, who: &str, body: Value) -> Value {
    let (status, answer) = ask(address, (method, path), who, &body).await;
    assert!(
        (200..300).contains(&status),
        "{method} {path} {body}: {status} {answer}"
    );
    answer
}

/// Makes a room; its name.
async fn make(address: SocketAddr, room: Value) -> String {
    let made = done(address, "POST", "/v1/rooms", &boss(), room).await;
    made["room"].as_str().unwrap().to_owned()
}

async fn say(address: SocketAddr, room: &str) {
    let path = format!("/v1/rooms/{room}/messages");
    done(address, "POST", &path, &boss(), json!({ "body": 1 })).await;
}

/// The rooms of all pages of a question.
async fn pages(address: SocketAddr, query: &str, who: &str) -> Result<Vec<String>, String> {
    let (mut rooms, mut after) = (Vec::new(), String::new());
    loop {
        let path = format!("/v1/rooms?{query}{after}");
        let (status, page) = ask(address, ("GET", &path), who, &Value::Null).await;
        if status != 200 {
            return Err(format!("{path}: {status} {page}"));
        }
        let found = page["rooms"].as_array().unwrap().iter();
        rooms.extend(found.map(|room| room["room"].as_str().unwrap().to_owned()));
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => return Ok(rooms),
        }
    }
}

/// Waits until a question finds these rooms, in this order.
async fn finds(address: SocketAddr, query: &str, who: &str, wanted: &[&str]) {
    eventually(query, LONG, async || {
        let found = pages(address, query, who).await?;
        match found == wanted {
            true => Ok(()),
            false => Err(format!("{found:?}, and not {wanted:?}")),
        }
    })
    .await;
}

/// Checks that a question is refused: with what status, what code, and what in its text.
async fn refused(address: SocketAddr, query: &str, who: &str, wanted: (u16, &str, &str)) {
    let path = format!("/v1/rooms?{query}");
    let (status, answer) = ask(address, ("GET", &path), who, &Value::Null).await;
    let text = answer["message"].as_str().unwrap_or_default();
    let is_wanted = (status, answer["code"].as_str()) == (wanted.0, Some(wanted.1));
    assert!(
        is_wanted && text.contains(wanted.2),
        "{path}: {status} {answer}"
    );
}

async fn database(mesh: &Mesh) -> mongodb::Database {
    let client = mongodb::Client::with_uri_str(mesh.config.mongodb.url.expose());
    client
        .await
        .unwrap()
        .database(&mesh.config.mongodb.database)
}

/// A bucket of the mesh's region.
async fn bucket_of(mesh: &Mesh, name: &str) -> async_nats::jetstream::kv::Store {
    let client = connect(&mesh.config.nats).await.unwrap();
    let name = bucket_name(name, &mesh.config.region());
    let jetstream = async_nats::jetstream::new(client);
    jetstream.get_key_value(name).await.unwrap()
}

#[tokio::test]
async fn rooms_are_listed_newest_first_in_pages_and_to_those_who_may_read_them() {
    let mesh = Mesh::with_history(nats_url(), mongodb_url(), (1, 1), TOML).await;
    let at = mesh.edges[0].address;
    let group = |namespace: &str, name: &str, members: &[&str]| json!({"namespace": namespace, "kind": "group", "name": name, "members": members});
    let mut about = group("crew", "a", &["kim", "lee"]);
    about["ref"] = json!("item/1");
    make(at, about).await;
    make(at, group("crew", "b", &["lee"])).await;
    let dm = json!({"namespace": "crew", "kind": "dm", "ref": "item/1", "members": ["kim", "lee"]});
    let dm = &*make(at, dm).await;
    make(
        at,
        json!({"namespace": "crew", "kind": "open", "name": "o"}),
    )
    .await;
    for name in ["c", "d"] {
        make(at, group("chat", name, &["lee"])).await;
    }
    let banned = json!({"state": "banned"});
    let ban = "/v1/rooms/chat:c/members/kim";
    done(at, "PUT", ban, &boss(), banned.clone()).await;
    // The last one to be made has never been spoken in, and so is first; then by the last message.
    for room in ["chat:c", "crew:a", "chat:d", dm, "crew:o", "crew:b"] {
        say(at, room).await;
    }
    make(at, group("chat", "e", &[])).await;

    let all = [
        "chat:e", "crew:b", "crew:o", dm, "chat:d", "crew:a", "chat:c",
    ];
    for query in ["", "limit=2", "limit=7"] {
        finds(at, query, &boss(), &all).await;
    }
    let questions: [(&str, &[&str]); 7] = [
        ("namespace=chat", &["chat:e", "chat:d", "chat:c"]),
        ("ref=item/1", &[dm, "crew:a"]),
        ("member=kim", &[dm, "crew:a"]),
        (
            "member=lee&kind=group",
            &["crew:b", "chat:d", "crew:a", "chat:c"],
        ),
        ("kind=open&namespace=crew", &["crew:o"]),
        ("ref=item/2", &[]),
        ("archived=true", &[]),
    ];
    for (query, wanted) in questions {
        finds(at, query, &boss(), wanted).await;
    }
    let page = done(
        at,
        "GET",
        "/v1/rooms?ref=item/1&kind=group",
        &boss(),
        Value::Null,
    )
    .await;
    let shown = &page["rooms"][0];
    assert_eq!(
        (&shown["members"], &shown["member_count"], &shown["ref"]),
        (&json!(["kim", "lee"]), &json!(2), &json!("item/1")),
        "{page}"
    );
    assert!(shown["active_at"].as_u64() > shown["at"].as_u64(), "{page}");

    // In `crew` their own rooms and open ones, in `chat` those that nobody has banned them from.
    let kim = &user("kim");
    finds(
        at,
        "limit=2",
        kim,
        &["chat:e", "crew:o", dm, "chat:d", "crew:a"],
    )
    .await;
    finds(at, "member=lee", kim, &[dm, "chat:d", "crew:a"]).await;
    let stranger = &user("stranger");
    finds(at, "namespace=crew", stranger, &["crew:o"]).await;
    finds(at, "member=lee&namespace=crew", stranger, &[]).await;
    let one = token(
        "kim",
        &[("chat:d", &[Right::Read]), ("crew:b", &[Right::Read])],
    );
    finds(at, "", &one, &["chat:d"]).await;
    let manages = token(
        "kim",
        &[("chat:*", &[Right::Manage]), ("crew:b", &[Right::Manage])],
    );
    finds(at, "", &manages, &["chat:e", "crew:b", "chat:d", "chat:c"]).await;
    let nothing = token(
        "kim",
        &[("*:*", &[Right::Write]), ("chat:*", &[Right::Read])],
    );
    refused(
        at,
        "namespace=crew",
        &nothing,
        (403, "forbidden", "rooms of crew"),
    )
    .await;
    for (query, wanted) in [
        ("kind=x", (400, "bad_request", "dm, group, open")),
        ("limit=0", (400, "bad_request", "1 to 200")),
        ("limit=201", (400, "bad_request", "1 to 200")),
        ("after=x", (400, "bad_request", "after")),
        ("member=", (400, "bad_request", "member")),
        ("archived=x", (400, "bad_request", "archived")),
        ("namespace=x", (404, "unknown_namespace", "\"x\"")),
    ] {
        refused(at, query, kim, wanted).await;
    }

    // What the edge knows counts at once, whatever MongoDB has.
    let member = "/v1/rooms/crew:a/members/kim";
    done(at, "PUT", member, &boss(), banned).await;
    let found = pages(at, "namespace=crew", kim).await.unwrap();
    assert_eq!(found, ["crew:o", dm]);
    let aside = json!({"archived": true});
    done(at, "PATCH", "/v1/rooms/chat:d", &boss(), aside).await;
    finds(at, "archived=true", &boss(), &["chat:d"]).await;
    finds(
        at,
        "archived=false&namespace=chat",
        &boss(),
        &["chat:e", "chat:c"],
    )
    .await;
    done(at, "DELETE", "/v1/rooms/chat:c", &boss(), Value::Null).await;
    let found = pages(at, "namespace=chat", &boss()).await.unwrap();
    assert_eq!(found, ["chat:e", "chat:d"]);
}

#[tokio::test]
async fn the_directory_outlives_restarts_and_an_outage_of_mongodb_and_is_made_anew() {
    let mut mongod = support::dedicated_mongod().await;
    let mut mesh = Mesh::with_history(nats_url(), &mongod.url(), (1, 2), TOML).await;
    let at = mesh.edges[0].address;
    let group = |name: &str| json!({"namespace": "chat", "kind": "group", "name": name, "members": ["kim"]});
    for name in ["a", "b", "c"] {
        make(at, group(name)).await;
    }
    for room in ["chat:c", "chat:b", "chat:a"] {
        say(at, room).await;
    }
    finds(at, "", &boss(), &["chat:a", "chat:b", "chat:c"]).await;

    mongod.server.kill().await;
    eventually("questions are refused", LONG, async || {
        match pages(at, "", &boss()).await {
            Err(text) if text.contains("503") && text.contains("unavailable") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    make(at, group("d")).await;
    say(at, "chat:b").await;
    done(
        at,
        "DELETE",
        "/v1/rooms/chat:a/members/kim",
        &boss(),
        Value::Null,
    )
    .await;
    mongod.server.restart().await.unwrap();
    finds(at, "", &boss(), &["chat:b", "chat:d", "chat:a", "chat:c"]).await;
    finds(at, "member=kim", &boss(), &["chat:b", "chat:d", "chat:c"]).await;

    // A service that was killed before it had written who was active finds it in the messages.
    for worker in &mut mesh.workers {
        worker.process.kill().await;
    }
    make(at, group("e")).await;
    let rooms = database(&mesh).await.collection::<Fields>("rooms");
    let lost = doc! { "$set": { "active": 1_i64 } };
    let spoken = doc! { "_id": { "$ne": "chat:d" } };
    rooms.update_many(spoken, lost).await.unwrap();
    mesh.workers[0].process.start().await.unwrap();
    finds(
        at,
        "",
        &boss(),
        &["chat:e", "chat:b", "chat:d", "chat:a", "chat:c"],
    )
    .await;

    // Without its collection it is made anew.
    mesh.workers[0].process.kill().await;
    database(&mesh).await.drop().await.unwrap();
    mesh.workers[0].process.start().await.unwrap();
    let all: BTreeSet<String> = ["a", "b", "c", "d", "e"]
        .map(|it| format!("chat:{it}"))
        .into();
    eventually("all rooms are listed again", LONG, async || {
        let found = pages(at, "", &boss()).await?;
        match found.iter().cloned().collect::<BTreeSet<_>>() == all {
            true => Ok(()),
            false => Err(format!("{found:?}")),
        }
    })
    .await;
}

#[tokio::test]
async fn rooms_of_all_regions_are_listed_in_each() {
    let toml = format!("mongodb.url = '{}'\n{TOML}", mongodb_url()).replace("[mongodb]", "");
    let toml = toml.replace("read_timeout = '1s'\n", "");
    let mut regions = Regions::start_with(&["seoul", "virginia"], &toml, Duration::ZERO).await;
    for region in ["seoul", "virginia"] {
        regions.mesh(region).add_edge().await;
    }
    // The other region's service does not run.
    regions.mesh("virginia").add_worker("/readyz").await;
    let at = |region: &str| regions.at(region).edges[0].address;
    let (seoul, virginia) = (at("seoul"), at("virginia"));
    let group = |name: &str| json!({"namespace": "crew", "kind": "group", "name": name, "members": ["kim"]});
    make(seoul, group("far")).await;
    finds(virginia, "member=kim", &boss(), &["crew:far"]).await;
    make(virginia, group("near")).await;
    finds(
        virginia,
        "member=kim",
        &user("kim"),
        &["crew:near", "crew:far"],
    )
    .await;
    // A change in one region of what was made in the other.
    let lee = "/v1/rooms/crew:near/members/lee";
    eventually("the other region has the room", LONG, async || {
        let path = "/v1/rooms/crew:near";
        let (status, answer) = ask(seoul, ("GET", path), &boss(), &Value::Null).await;
        (status == 200).then_some(()).ok_or(answer.to_string())
    })
    .await;
    done(seoul, "PUT", lee, &boss(), json!({})).await;
    finds(virginia, "member=lee", &boss(), &["crew:near"]).await;
    // Where no service runs, nobody is told anything.
    refused(seoul, "", &boss(), (503, "unavailable", "history service")).await;
}

/// The rooms in a user's inbox.
async fn inbox(address: SocketAddr, name: &str) -> BTreeSet<String> {
    let page = done(
        address,
        "GET",
        "/v1/inbox?limit=200",
        &user(name),
        Value::Null,
    )
    .await;
    let rooms = page["rooms"].as_array().unwrap().iter();
    rooms
        .map(|room| room["room"].as_str().unwrap().to_owned())
        .collect()
}

async fn repaired(mesh: &Mesh) -> u64 {
    let address = mesh.workers[0].address;
    let (_, text) = http(address, "GET", "/metrics", "", "").await.unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("natter_record_index_repaired_total "));
    line.map_or(0, |value| value.parse().unwrap())
}

#[tokio::test]
async fn a_record_without_an_index_gets_one_and_the_settings_of_users_stay() {
    let mut mesh = Mesh::start(nats_url(), 1, TOML).await;
    let at = mesh.edges[0].address;
    let group = json!({"namespace": "crew", "kind": "group", "name": "a", "members": ["kim"]});
    make(at, group).await;
    let pinned = json!({"pinned": true, "muted": true});
    done(at, "PATCH", "/v1/inbox/crew:a", &user("kim"), pinned).await;
    let (records, index) = (
        bucket_of(&mesh, bucket::ROOMS).await,
        bucket_of(&mesh, bucket::INBOX).await,
    );
    // What an edge has written that did not come to the index: kim is a moderator, and lee has joined.
    let record = records.get("crew.a").await.unwrap().unwrap();
    let mut record: Value = serde_json::from_slice(&record).unwrap();
    let later = record["members"]["kim"]["at"].as_u64().unwrap() + 1;
    record["members"]["kim"]["role"] = json!("moderator");
    record["members"]["kim"]["at"] = json!(later);
    record["members"]["lee"] = record["members"]["kim"].clone();
    let text = record.to_string();
    records.put("crew.a", text.clone().into()).await.unwrap();
    assert!(inbox(at, "lee").await.is_empty());

    let entry = async |key: &str| -> Result<Value, String> {
        let entry = index.get(key).await.map_err(|error| error.to_string())?;
        let entry = entry.ok_or("there is none")?;
        serde_json::from_slice(&entry).map_err(|error| error.to_string())
    };
    let before = entry("kim.crew.a").await.unwrap();
    // Found at the start, without MongoDB.
    mesh.add_worker("/healthz").await;
    eventually("lee's inbox has the room", LONG, async || {
        let rooms = inbox(at, "lee").await;
        rooms
            .contains("crew:a")
            .then_some(())
            .ok_or(format!("{rooms:?}"))
    })
    .await;
    let after = eventually("kim's entry is that of the record", LONG, async || {
        let entry = entry("kim.crew.a").await?;
        match entry["member"] == record["members"]["kim"] {
            true => Ok(entry),
            false => Err(entry.to_string()),
        }
    })
    .await;
    assert_eq!(
        (&after["pinned"], &after["muted"]),
        (&before["pinned"], &before["muted"])
    );
    assert!(after["pinned"]["value"] == true, "{after}");
    eventually("it is counted", LONG, async || {
        match repaired(&mesh).await {
            2 => Ok(()),
            other => Err(other.to_string()),
        }
    })
    .await;

    // Found while it runs: a record of another room, and an entry that was lost.
    records.put("crew.b", text.into()).await.unwrap();
    let both: BTreeSet<String> = ["crew:a", "crew:b"].map(str::to_owned).into();
    for name in ["kim", "lee"] {
        eventually("the inbox has both", LONG, async || {
            let rooms = inbox(at, name).await;
            (rooms == both)
                .then_some(())
                .ok_or(format!("{name}: {rooms:?}"))
        })
        .await;
    }
    // They are counted after they are written.
    eventually("the status counts all", LONG, async || {
        let mut status = mesh.command(&["history", "status", "--json"]).await;
        let output = status.output().unwrap();
        let status: Value = serde_json::from_slice(&output.stdout).unwrap();
        match &status["instances"][0]["figures"]["writing"]["index_repaired"] {
            repaired if *repaired == 4 => Ok(()),
            _ => Err(status.to_string()),
        }
    })
    .await;
}

#[tokio::test]
async fn edges_that_are_killed_while_members_change_leave_nobody_out() {
    /// Members of a room, so that the index takes an edge some time.
    const MEMBERS: usize = 200;
    let mut mesh = Mesh::start(nats_url(), 1, TOML).await;
    let members: Vec<String> = (0..MEMBERS).map(|n| format!("u{n}")).collect();
    let index = bucket_of(&mesh, bucket::INBOX).await;
    let client = connect(&mesh.config.nats).await.unwrap();
    let region = &mesh.config.region;
    let changes = format!("{}.kv.{region}.*.rooms.*.*", mesh.config.nats.prefix);
    let mut changes = client.subscribe(changes).await.unwrap();
    client.flush().await.unwrap();
    // Makes a room, and kills the edge as soon as its record is there. Returns the entries that the index lacks.
    let mut made = BTreeSet::new();
    let mut kill_one = async |mesh: &mut Mesh, name: &str| {
        let at = mesh.edges[0].address;
        let room = json!({"namespace": "crew", "kind": "group", "name": name, "members": members});
        // The edge is killed before it answers.
        let making = tokio::spawn(async move {
            let headers = format!("Authorization: Bearer {}\r\n", boss());
            http(at, "POST", "/v1/rooms", &headers, &room.to_string()).await
        });
        changes.next().await.unwrap();
        mesh.edges[0].process.kill().await;
        drop(making.await.unwrap());
        mesh.edges[0].process.start().await.unwrap();
        made.insert(format!("crew:{name}"));
        let mut missing = 0;
        for member in &members {
            let key = format!("{member}.crew.{name}");
            missing += usize::from(index.get(key).await.unwrap().is_none());
        }
        missing
    };
    let mut missing = 0;
    for round in 0..20 {
        missing += kill_one(&mut mesh, &format!("r{round}")).await;
        if round >= 2 && missing > 0 {
            break;
        }
    }
    assert!(missing > 0, "no edge was killed between the two writes");
    mesh.add_worker("/healthz").await;
    // And while the service runs.
    kill_one(&mut mesh, "last").await;
    let at = mesh.edges[0].address;
    for member in &members {
        eventually("the inbox has all rooms", LONG, async || {
            let rooms = inbox(at, member).await;
            (rooms == made)
                .then_some(())
                .ok_or(format!("{member}: {rooms:?}"))
        })
        .await;
    }
}
