//! What is known of users in all regions of a mesh: up to where they have read, what is new, who is there, what was said
//! before, and who is not let in any more.

use std::{collections::BTreeMap, time::Duration};

use futures_util::StreamExt as _;
use mongodb::bson::{DateTime, Document, doc};
use natter::testing::{
    auth::{Claims, Grant, Right, issue},
    client::{ConnectError, Connection},
    mesh::provision::connect,
    model::{Cursor, Region},
    runtime::unix_s,
};
use serde_json::{Value, json};

use crate::support::{
    LONG,
    calls::{next, reply, seq},
    eventually,
    mesh::{Mesh, SECRET, http, token},
    mongodb_url,
    regions::Regions,
};

const ROOM: &str = "chat:a";
const SEOUL: &str = "seoul";
const VIRGINIA: &str = "virginia";
const BOTH: [&str; 2] = [SEOUL, VIRGINIA];

/// Two regions with an edge each.
async fn two(toml: &str) -> Regions {
    let mut regions = Regions::start_with(&BOTH, toml, Duration::ZERO).await;
    for region in BOTH {
        regions.mesh(region).add_edge().await;
    }
    regions
}

/// Says something in the room; its cursor.
async fn say(connection: &mut Connection, id: &str) -> Cursor {
    let fields = json!({"room": ROOM, "id": id, "body": id});
    let ack = reply(connection, "send", fields).await;
    assert_eq!(ack["op"], "ack", "{ack}");
    ack["cursor"].as_str().unwrap().parse().unwrap()
}

/// What a cursor says of one region alone.
fn only(cursor: &Cursor, region: &str) -> Cursor {
    let position = cursor.get(&Region::parse(region).unwrap());
    Cursor::single(position.unwrap().clone())
}

/// The markers of all who have read something, as an edge tells them.
async fn readers(connection: &mut Connection) -> BTreeMap<String, Cursor> {
    let answer = reply(connection, "readers", json!({"room": ROOM})).await;
    let readers = answer["readers"].as_array().unwrap().iter();
    let reader = |reader: &Value| {
        let cursor = reader["cursor"].as_str().unwrap().parse().unwrap();
        (reader["user"].as_str().unwrap().to_owned(), cursor)
    };
    readers.map(reader).collect()
}

async fn marker(connection: &mut Connection, user: &str) -> Option<Cursor> {
    readers(connection).await.remove(user)
}

async fn read(connection: &mut Connection, cursor: &Cursor) -> Cursor {
    let fields = json!({"room": ROOM, "cursor": cursor.to_string()});
    let ok = reply(connection, "read", fields).await;
    assert_eq!(ok["op"], "ok", "{ok}");
    ok["cursor"].as_str().unwrap().parse().unwrap()
}

async fn unread(connection: &mut Connection) -> u64 {
    let answer = reply(connection, "unread", json!({"rooms": [ROOM]})).await;
    answer["rooms"][0]["count"]
        .as_u64()
        .unwrap_or_else(|| panic!("{answer}"))
}

async fn until_unread(connection: &mut Connection, count: u64) {
    eventually(&format!("{count} are unread"), LONG, async || {
        let now = unread(connection).await;
        (now == count).then_some(()).ok_or(now.to_string())
    })
    .await;
}

/// Waits until the marker of `user` is this one in both regions.
async fn until_marked(connections: [&mut Connection; 2], user: &str, at: [u64; 2]) {
    for connection in connections {
        eventually(&format!("{user} has read {at:?}"), LONG, async || {
            let now = marker(connection, user).await;
            let seqs = now
                .as_ref()
                .map(|now| [seq(now, SEOUL), seq(now, VIRGINIA)]);
            (seqs == Some(at)).then_some(()).ok_or(format!("{now:?}"))
        })
        .await;
    }
}

#[tokio::test]
async fn a_marker_is_the_furthest_of_all_regions_and_never_goes_back() {
    let mut regions = two("").await;
    let mut lee_there = regions.mesh(VIRGINIA).connect(0, "lee").await;
    let mut lee_here = regions.mesh(SEOUL).connect(0, "lee").await;
    let mut here = regions.mesh(SEOUL).connect(0, "kim").await;
    let mut there = regions.mesh(VIRGINIA).connect(0, "kim").await;
    let (mut said_here, mut said_there) = (Vec::new(), Vec::new());
    for number in 0..4 {
        said_here.push(say(&mut lee_here, &format!("s{number}")).await);
        said_there.push(say(&mut lee_there, &format!("v{number}")).await);
    }
    // Unread is of both regions, in both.
    until_unread(&mut here, 8).await;
    until_unread(&mut there, 8).await;

    // Moved here, read there.
    let at = read(&mut here, &only(&said_here[1], SEOUL)).await;
    assert_eq!(seq(&at, SEOUL), seq(&said_here[1], SEOUL));
    until_unread(&mut there, 6).await;
    // Of the other region's log as well, here.
    let at = read(&mut here, &only(&said_there[0], VIRGINIA)).await;
    assert_eq!(seq(&at, SEOUL), seq(&said_here[1], SEOUL), "{at}");
    until_unread(&mut there, 5).await;
    assert_eq!(unread(&mut here).await, 5);

    regions.cut(VIRGINIA);
    let before = marker(&mut there, "kim").await.unwrap();
    let in_seoul = read(&mut here, &only(&said_here[3], SEOUL)).await;
    let in_virginia = read(&mut there, &only(&said_there[2], VIRGINIA)).await;
    for (now, what) in [(&in_seoul, "here"), (&in_virginia, "there")] {
        for region in BOTH {
            assert!(seq(now, region) >= seq(&before, region), "{what}: {now}");
        }
    }
    // What lies behind moves nothing, on either side.
    read(&mut here, &only(&said_here[0], SEOUL)).await;
    read(&mut there, &only(&said_there[0], VIRGINIA)).await;
    assert_eq!(
        seq(&marker(&mut here, "kim").await.unwrap(), SEOUL),
        seq(&said_here[3], SEOUL)
    );
    assert_eq!(
        seq(&marker(&mut there, "kim").await.unwrap(), VIRGINIA),
        seq(&said_there[2], VIRGINIA)
    );
    regions.heal(VIRGINIA);
    let both = [seq(&said_here[3], SEOUL), seq(&said_there[2], VIRGINIA)];
    until_marked([&mut here, &mut there], "kim", both).await;
    until_unread(&mut here, 1).await;
    until_unread(&mut there, 1).await;
}

/// Receipts cross regions, also those of what only the other region's log has; who joins later finds the marker.
#[tokio::test]
async fn receipts_are_told_in_all_regions() {
    let mut regions = two("").await;
    let mut kim = regions.mesh(SEOUL).connect(0, "kim").await;
    let join = json!({"room": ROOM, "read": true});
    reply(&mut kim, "join", join.clone()).await;
    let mut lee = regions.mesh(VIRGINIA).connect(0, "lee").await;
    let mut park = regions.mesh(VIRGINIA).connect(0, "park").await;
    let said = say(&mut park, "v").await;
    read(&mut lee, &said).await;
    loop {
        let frame = next(&mut kim).await;
        let frame: Value = serde_json::from_str(frame.text()).unwrap();
        if frame["op"] == "read" && frame["user"] == "lee" {
            let told: Cursor = frame["cursor"].as_str().unwrap().parse().unwrap();
            assert_eq!(seq(&told, VIRGINIA), seq(&said, VIRGINIA), "{frame}");
            break;
        }
    }
    let mut here = regions.mesh(SEOUL).connect(0, "lee").await;
    // The key comes through the mirror.
    eventually("the marker is here", LONG, async || {
        let marked = marker(&mut here, "lee").await;
        let at = marked.as_ref().map(|marked| seq(marked, VIRGINIA));
        (at == Some(seq(&said, VIRGINIA)))
            .then_some(())
            .ok_or(format!("{marked:?}"))
    })
    .await;
    let joined = reply(&mut here, "join", join).await;
    let joined_at: Cursor = joined["marker"].as_str().unwrap().parse().unwrap();
    assert_eq!(seq(&joined_at, VIRGINIA), seq(&said, VIRGINIA), "{joined}");
}

/// A cursor of a region that nobody knows is of no use; together with others it is left out.
#[tokio::test]
async fn what_a_cursor_says_of_unknown_regions_is_left_out() {
    let mut regions = two("").await;
    let mut kim = regions.mesh(SEOUL).connect(0, "kim").await;
    let said = say(&mut kim, "1").await;
    let mixed = format!("mars.k3.7.1_{}", only(&said, SEOUL));
    let fields = json!({"room": ROOM, "cursor": mixed});
    let ok = reply(&mut kim, "read", fields).await;
    assert_eq!(ok["cursor"], only(&said, SEOUL).to_string(), "{ok}");
    let fields = json!({"room": ROOM, "cursor": "mars.k3.7.1"});
    let error = reply(&mut kim, "read", fields).await;
    assert_eq!(error["code"], "bad_cursor", "{error}");
}

/// Users and whether they are shown as unreachable.
async fn present(connection: &mut Connection) -> Vec<(String, bool)> {
    let page = reply(connection, "presence", json!({"room": ROOM})).await;
    let users = page["users"].as_array().unwrap_or_else(|| panic!("{page}"));
    assert_eq!(page["count"], users.len(), "{page}");
    let user = |user: &Value| {
        let name = user["user"].as_str().unwrap().to_owned();
        (name, user["state"] == "unreachable")
    };
    users.iter().map(user).collect()
}

/// Waits until these users are there, each shown as unreachable or not.
async fn until_present(asks: &mut Connection, users: &[(&str, bool)]) {
    eventually(&format!("{users:?} are there"), LONG, async || {
        let seen = present(asks).await;
        let same = seen.iter().map(|(user, state)| (&**user, *state));
        match same.eq(users.iter().copied()) {
            true => Ok(()),
            false => Err(format!("{seen:?}")),
        }
    })
    .await;
}

/// The next push of presence about somebody: who, and what.
async fn told(connection: &mut Connection) -> (String, String) {
    loop {
        let frame = next(connection).await;
        let frame: Value = serde_json::from_str(frame.text()).unwrap();
        if frame["op"] == "presence" && frame.get("rid").is_none() {
            let of = |key: &str| frame[key].as_str().unwrap_or_default().to_owned();
            return (of("user"), of("state"));
        }
    }
}

#[tokio::test]
async fn who_is_behind_a_cut_is_unreachable_and_not_gone() {
    let mut regions = two("presence.lease = '3s'").await;
    let join = json!({"room": ROOM, "presence": true});
    let mut kim = regions.mesh(SEOUL).connect(0, "kim").await;
    reply(&mut kim, "join", join.clone()).await;
    let mut lee = regions.mesh(VIRGINIA).connect(0, "lee").await;
    reply(&mut lee, "join", join.clone()).await;
    let mut asks = regions.mesh(SEOUL).connect(0, "asks").await;
    until_present(&mut asks, &[("kim", false), ("lee", false)]).await;
    let pair = |user: &str, state: &str| (user.to_owned(), state.to_owned());
    // A user's own coming is told where the room was looked at before.
    let mut first = told(&mut kim).await;
    if first == pair("kim", "join") {
        first = told(&mut kim).await;
    }
    assert_eq!(first, pair("lee", "join"));

    regions.cut(VIRGINIA);
    until_present(&mut asks, &[("kim", false), ("lee", true)]).await;
    assert_eq!(told(&mut kim).await, pair("lee", "unreachable"));
    // One who comes meanwhile, and an edge that has known nobody before.
    let mut park = regions.mesh(SEOUL).connect(0, "park").await;
    reply(&mut park, "join", join.clone()).await;
    assert_eq!(told(&mut kim).await, pair("park", "join"));
    let second = regions.mesh(SEOUL).add_edge().await;
    let mut new = regions.mesh(SEOUL).connect(second, "asks").await;
    let all = [("kim", false), ("lee", true), ("park", false)];
    until_present(&mut new, &all).await;
    let answer = {
        let address = regions.mesh(SEOUL).edges[0].address;
        let bearer = format!("Authorization: Bearer {}\r\n", token("asks"));
        http(address, "GET", "/v1/rooms/chat:a/presence", &bearer, "").await
    };
    let (status, body) = answer.unwrap();
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (status, &body["users"][1]["state"]),
        (200, &json!("unreachable")),
        "{body}"
    );
    assert_eq!(body["users"][0].get("state"), None, "{body}");

    regions.heal(VIRGINIA);
    let all = all.map(|(user, _)| (user, false));
    until_present(&mut asks, &all).await;
    until_present(&mut new, &all).await;
    assert_eq!(told(&mut kim).await, pair("lee", "reachable"));
    // Now their end is told.
    lee.close().await;
    assert_eq!(told(&mut kim).await, pair("lee", "leave"));
    until_present(&mut asks, &[("kim", false), ("park", false)]).await;
}

/// An edge that dies behind a cut: when that is over, its end is known.
#[tokio::test]
async fn an_edge_that_died_behind_a_cut_is_gone_when_that_is_over() {
    let mut regions = two("presence.lease = '3s'").await;
    let mut lee = regions.mesh(VIRGINIA).connect(0, "lee").await;
    reply(&mut lee, "join", json!({"room": ROOM})).await;
    let mut asks = regions.mesh(SEOUL).connect(0, "asks").await;
    until_present(&mut asks, &[("lee", false)]).await;
    regions.cut(VIRGINIA);
    until_present(&mut asks, &[("lee", true)]).await;
    regions.mesh(VIRGINIA).edges[0].process.kill().await;
    regions.heal(VIRGINIA);
    until_present(&mut asks, &[]).await;
}

#[tokio::test]
async fn a_page_of_history_has_the_messages_of_all_regions_in_their_order() {
    let toml = format!("[mongodb]\nurl = \"{}\"\n", mongodb_url());
    let mut regions = two(&toml).await;
    for region in BOTH {
        regions.mesh(region).add_worker("/readyz").await;
    }
    let mut here = regions.mesh(SEOUL).connect(0, "kim").await;
    let mut there = regions.mesh(VIRGINIA).connect(0, "kim").await;
    let mut expected = Vec::new();
    for number in 0..6 {
        // Told apart by their times.
        tokio::time::sleep(Duration::from_millis(3)).await;
        let id = format!("s{number}");
        say(&mut here, &id).await;
        expected.push(id);
        tokio::time::sleep(Duration::from_millis(3)).await;
        let id = format!("v{number}");
        say(&mut there, &id).await;
        expected.push(id);
    }
    // The same message in both regions is one, the first.
    say(&mut here, "twice").await;
    expected.push("twice".to_owned());
    tokio::time::sleep(Duration::from_millis(3)).await;
    say(&mut there, "twice").await;

    let ids = |page: &Value| -> Vec<String> {
        let messages = page["messages"]
            .as_array()
            .unwrap_or_else(|| panic!("{page}"));
        let id = |message: &Value| message["id"].as_str().unwrap().to_owned();
        messages.iter().map(id).collect()
    };
    for (connection, region) in [(&mut here, SEOUL), (&mut there, VIRGINIA)] {
        eventually(&format!("all are a page in {region}"), LONG, async || {
            let fields = json!({"room": ROOM, "limit": 50});
            let page = reply(connection, "history", fields).await;
            match ids(&page) == expected && page.get("partial").is_none() {
                true => Ok(()),
                false => Err(format!("not {expected:?}: {page}")),
            }
        })
        .await;
        // Page by page, in both directions, over the places of both regions.
        let (mut back, mut before) = (Vec::new(), Value::Null);
        loop {
            let fields = json!({"room": ROOM, "limit": 4, "before": before});
            let page = reply(connection, "history", fields).await;
            back.splice(0..0, ids(&page));
            match page.get("prev") {
                Some(prev) => before = prev.clone(),
                None => break,
            }
        }
        assert_eq!(back, expected, "{region}, backwards");
        let mut forth = vec![expected[0].clone()];
        let around = json!({"room": ROOM, "limit": 1, "around": "s0"});
        let mut after = reply(connection, "history", around).await["next"].clone();
        while after != Value::Null {
            let fields = json!({"room": ROOM, "limit": 4, "after": after});
            let page = reply(connection, "history", fields).await;
            forth.extend(ids(&page));
            after = page.get("next").cloned().unwrap_or(Value::Null);
        }
        assert_eq!(forth, expected, "{region}, forwards");
    }

    // Behind a cut: what the streams here have, and MongoDB; what is said on the other side comes when it is over.
    regions.cut(VIRGINIA);
    say(&mut here, "cut-s").await;
    let fields = json!({"room": ROOM, "limit": 1});
    let page = reply(&mut here, "history", fields).await;
    assert_eq!(ids(&page), ["cut-s"]);
    regions.heal(VIRGINIA);
    eventually("what was said in the cut is there", LONG, async || {
        let page = reply(&mut there, "history", json!({"room": ROOM, "limit": 1})).await;
        match ids(&page) == ["cut-s"] {
            true => Ok(()),
            false => Err(page.to_string()),
        }
    })
    .await;
}

/// Runs a command of `natter` while the relay between the regions, which is part of this process, goes on.
async fn run(mesh: &Mesh, args: &[&str]) -> std::process::Output {
    let command = mesh.command(args).await;
    let mut command = tokio::process::Command::from(command);
    command.output().await.unwrap()
}

/// A token of lee that says when it was issued.
fn issued(at: u64, jti: &str) -> String {
    let mut claims = Claims::new("lee", unix_s() + 3600);
    claims.iat = Some(at);
    claims.jti = Some(jti.to_owned());
    claims.grants = vec![Grant::new("*:*", &Right::ALL)];
    issue(&claims, SECRET).unwrap()
}

#[tokio::test]
async fn what_is_revoked_in_one_region_is_off_all_edges() {
    let mut regions = two("").await;
    let old = issued(unix_s() - 5, "a");
    let endpoint = regions.mesh(VIRGINIA).endpoint(0);
    let connect = async |token: &str| Connection::open(&endpoint, Some(token)).await;
    let mut lee = connect(&old).await.unwrap();
    let kim = regions.mesh(VIRGINIA).connect(0, "kim").await;
    let address = regions.mesh(VIRGINIA).edges[0].address;
    let get = async |token: &str| {
        let bearer = format!("Authorization: Bearer {token}\r\n");
        let answer = http(address, "GET", "/v1/rooms/chat:a/presence", &bearer, "").await;
        answer.unwrap().0
    };
    assert_eq!(get(&old).await, 200);
    // Issued by a clock that is ahead, within the leeway.
    let ahead = issued(unix_s() + 20, "ahead");
    let mut lee_ahead = connect(&ahead).await.unwrap();
    let mut revoke = async |args: &[&str]| {
        let args: Vec<&str> = ["revoke"].iter().chain(args).copied().collect();
        let output = run(regions.mesh(SEOUL), &args).await;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {text}");
    };
    let until_refused = async |token: &str| {
        eventually("the token is refused", LONG, async || {
            match get(token).await {
                401 => Ok(()),
                status => Err(status.to_string()),
            }
        })
        .await;
    };

    revoke(&["--user", "lee"]).await;
    while lee_is_there(&mut lee).await {}
    assert_eq!(lee.end().unwrap().code, 4002);
    assert_eq!(get(&old).await, 401);
    while lee_is_there(&mut lee_ahead).await {}
    assert_eq!(lee_ahead.end().unwrap().code, 4002);
    assert_eq!(get(&ahead).await, 401);
    assert!(matches!(
        connect(&old).await,
        Err(ConnectError::Refused { .. })
    ));
    // A token that says to be issued later than any clock could say then is as good as any; until it is revoked by its name.
    let leeway = 30;
    let new = eventually("a new token is let in", LONG, async || {
        let new = issued(unix_s() + leeway, "b");
        match get(&new).await {
            200 => Ok(new),
            status => Err(status.to_string()),
        }
    })
    .await;
    let mut lee = connect(&new).await.unwrap();
    revoke(&["--jti", "b"]).await;
    while lee_is_there(&mut lee).await {}
    assert_eq!(lee.end().unwrap().code, 4002);
    let newer = issued(unix_s() + leeway, "c");
    assert_eq!(get(&newer).await, 200);
    // Who knows that the clock is right need not wait with new tokens.
    revoke(&["--user", "kim2", "--leeway", "0s"]).await;
    let mut claims = Claims::new("kim2", unix_s() + 3600);
    claims.grants = vec![Grant::new("*:*", &[Right::Presence])];
    claims.iat = Some(unix_s() - 1);
    until_refused(&issue(&claims, SECRET).unwrap()).await;
    claims.iat = Some(unix_s() + 1);
    assert_eq!(get(&issue(&claims, SECRET).unwrap()).await, 200);

    revoke(&["--user", "lee", "--block"]).await;
    until_refused(&newer).await;
    // An edge that starts afterwards knows it.
    regions.mesh(VIRGINIA).add_edge().await;
    let second = regions.mesh(VIRGINIA).endpoint(1);
    assert!(Connection::open(&second, Some(&newer)).await.is_err());
    let output = run(
        regions.mesh(VIRGINIA),
        &["revoke", "--user", "lee", "--unblock"],
    )
    .await;
    assert!(output.status.success());
    eventually("the user is let in again", LONG, async || {
        match get(&newer).await {
            200 => Ok(()),
            status => Err(status.to_string()),
        }
    })
    .await;
    assert!(!kim.commands().is_closed(), "nobody else is concerned");
}

#[tokio::test]
async fn what_a_revocation_did_not_reach_is_said() {
    let mut regions = two("").await;
    let token = issued(unix_s() - 5, "a");
    let address = regions.mesh(VIRGINIA).edges[0].address;
    let get = async || {
        let bearer = format!("Authorization: Bearer {token}\r\n");
        let answer = http(address, "GET", "/v1/rooms/chat:a/presence", &bearer, "").await;
        answer.unwrap().0
    };
    let revoke = async |regions: &mut Regions, args: &[&str]| {
        let args = [&["revoke"], args].concat();
        let output = run(regions.mesh(SEOUL), &args).await;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (said, warned) = (text(&output.stdout), text(&output.stderr));
        (output.status.code().unwrap(), said, warned)
    };
    assert_eq!(get().await, 200);
    regions.cut(VIRGINIA);
    for args in [
        &["--jti", "a"][..],
        &["--user", "lee"],
        &["--user", "lee", "--block"],
    ] {
        let (code, said, warned) = revoke(&mut regions, args).await;
        let reached = format!("not reached: {VIRGINIA}");
        assert!(
            code == 1 && warned.contains(&reached),
            "{args:?}: {code}, {warned}"
        );
        assert!(said.contains(args[1]), "{args:?}: {said}");
    }
    assert_eq!(get().await, 200, "the region was cut off");
    regions.heal(VIRGINIA);
    eventually("it has heard of it", LONG, async || match get().await {
        401 => Ok(()),
        status => Err(status.to_string()),
    })
    .await;
    let (code, _, warned) = revoke(&mut regions, &["--user", "lee"]).await;
    assert!(code == 0 && warned.is_empty(), "{code}, {warned}");
}

/// What is revoked is heard of also while a bucket is being read that does not answer.
#[tokio::test]
async fn a_revocation_does_not_wait_for_a_bucket_that_is_read() {
    // Longer than any test.
    let toml = "nats.read_timeout = '10m'";
    let mut regions = Regions::start_with(&BOTH, toml, Duration::ZERO).await;
    let seoul = regions.mesh(SEOUL);
    seoul.add_edge().await;
    let mut lee = Connection::open(&seoul.endpoint(0), Some(&issued(unix_s() - 5, "a")))
        .await
        .unwrap();
    // A mirror that can't be read: somebody takes the questions and says nothing.
    let client = connect(&seoul.config.nats).await.unwrap();
    let subject = "$JS.API.DIRECT.GET.KV_control_virginia";
    let mut questions = client.subscribe(subject).await.unwrap();
    client.flush().await.unwrap();
    let request = "$JS.API.STREAM.DELETE.KV_control_virginia";
    client.request(request, "".into()).await.unwrap();
    let question = tokio::time::timeout(LONG, questions.next()).await;
    question.expect("the mirror is read").unwrap();

    let output = run(seoul, &["revoke", "--user", "lee"]).await;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    while lee_is_there(&mut lee).await {}
    assert_eq!(lee.end().unwrap().code, 4002);
}

/// Waits for the next frame, or the end.
async fn lee_is_there(lee: &mut Connection) -> bool {
    let frame = tokio::time::timeout(LONG, lee.next()).await;
    frame.expect("the session is closed").is_some()
}

/// What is erased is gone in the mirrors as well, which do not repeat what their origins remove; in a region that is cut off
/// when the cut is over.
#[tokio::test]
async fn what_is_erased_is_gone_in_all_regions() {
    let toml = format!("[mongodb]\nurl = \"{}\"\n", mongodb_url());
    let mut regions = two(&toml).await;
    for region in BOTH {
        regions.mesh(region).add_worker("/readyz").await;
    }
    let mut here = regions.mesh(SEOUL).connect(0, "kim").await;
    let mut there = regions.mesh(VIRGINIA).connect(0, "kim").await;
    for number in 0..3 {
        say(&mut here, &format!("s{number}")).await;
        say(&mut there, &format!("v{number}")).await;
    }
    let mut lee = regions.mesh(SEOUL).connect(0, "lee").await;
    let mut lee_there = regions.mesh(VIRGINIA).connect(0, "lee").await;
    until_unread(&mut lee, 6).await;
    until_unread(&mut lee_there, 6).await;
    let address = regions.mesh(SEOUL).edges[0].address;
    let erase = async || {
        let bearer = format!("Authorization: Bearer {}\r\n", token("kim"));
        let answer = http(address, "DELETE", "/v1/rooms/chat:a", &bearer, "").await;
        let (status, body) = answer.unwrap();
        (status, serde_json::from_str::<Value>(&body).unwrap())
    };
    let (status, answer) = erase().await;
    assert!(status == 200 || status == 202, "{answer}");
    until_unread(&mut lee, 0).await;
    until_unread(&mut lee_there, 0).await;

    say(&mut here, "s4").await;
    say(&mut there, "v4").await;
    until_unread(&mut lee, 2).await;
    until_unread(&mut lee_there, 2).await;
    regions.mesh(VIRGINIA).workers[0].process.kill().await;
    let (status, answer) = erase().await;
    assert_eq!(status, 202, "{answer}");
    assert_eq!(answer["waiting"], json!([VIRGINIA]), "{answer}");
    until_unread(&mut lee, 0).await;
    regions.mesh(VIRGINIA).add_worker("/readyz").await;
    until_unread(&mut lee_there, 0).await;
}

/// What the other region said behind a cut comes when that is over, and may come before it is erased there: it does not stay
/// in the mirror, which does not repeat what its origin removes.
#[tokio::test]
async fn what_comes_after_a_cut_and_is_erased_there_is_gone_here_too() {
    let toml = format!("[mongodb]\nurl = \"{}\"\n", mongodb_url());
    let mut regions = two(&toml).await;
    for region in BOTH {
        regions.mesh(region).add_worker("/readyz").await;
    }
    let mut there = regions.mesh(VIRGINIA).connect(0, "kim").await;
    let mut lee = regions.mesh(SEOUL).connect(0, "lee").await;
    say(&mut there, "v1").await;
    until_unread(&mut lee, 1).await;

    regions.cut(VIRGINIA);
    // Nothing of the other region's is carried out before the cut is over.
    regions.mesh(VIRGINIA).workers[0].process.kill().await;
    say(&mut there, "v2").await;
    let address = regions.mesh(SEOUL).edges[0].address;
    let bearer = format!("Authorization: Bearer {}\r\n", token("kim"));
    let (status, body) = http(address, "DELETE", "/v1/rooms/chat:a", &bearer, "")
        .await
        .unwrap();
    assert_eq!(status, 202, "{body}");
    until_unread(&mut lee, 0).await;
    // A long cut: the second look at what was erased here is over too.
    let config = &regions.mesh(SEOUL).config.mongodb;
    let client = mongodb::Client::with_uri_str(config.url.expose()).await;
    let erasures = client.unwrap().database(&config.database);
    let erasures = erasures.collection::<Document>("erasures");
    let of_seoul = doc! { "region": SEOUL };
    eventually("it was looked at again", LONG, async || {
        let due = doc! { "region": SEOUL, "state": "settling" };
        let now = doc! { "$set": { "due": DateTime::now() } };
        erasures.update_one(due, now).await.unwrap();
        let record = erasures.find_one(of_seoul.clone()).await.unwrap();
        match record
            .as_ref()
            .and_then(|record| record.get_str("state").ok())
        {
            Some("done") => Ok(()),
            _ => Err(format!("{record:?}")),
        }
    })
    .await;

    regions.heal(VIRGINIA);
    until_unread(&mut lee, 1).await;
    regions.mesh(VIRGINIA).add_worker("/readyz").await;
    until_unread(&mut lee, 0).await;
}
