//! Room records of several regions.

use std::time::Duration;

use natter::testing::client::Connection;
use serde_json::{Value, json};

use super::{CLUB, boss, done, group, may, put};
use crate::support::{
    LONG,
    calls::{next, reply},
    eventually,
    mesh::ask,
    regions::Regions,
};

const SEOUL: &str = "seoul";
const VIRGINIA: &str = "virginia";
const BOTH: [&str; 2] = [SEOUL, VIRGINIA];

async fn two() -> Regions {
    let mut regions = Regions::start_with(&BOTH, CLUB, Duration::ZERO).await;
    for region in BOTH {
        regions.mesh(region).add_edge().await;
    }
    regions
}

async fn joined(regions: &Regions, region: &str, user: &str, room: &str) -> Connection {
    let mesh = regions.at(region);
    // The region hears of a record that another one has written.
    eventually("the room is joined", LONG, async || {
        let mut connection = super::open(mesh, 0, &may(user, &[])).await;
        let answer = reply(&mut connection, "join", json!({ "room": room })).await;
        match answer["op"] == "joined" {
            true => Ok(connection),
            false => Err(answer.to_string()),
        }
    })
    .await
}

/// The ids of the next messages that members have sent.
async fn heard(connection: &mut Connection, count: usize) -> Vec<String> {
    let mut ids = Vec::new();
    while ids.len() < count {
        let frame = next(connection).await.json();
        if frame["op"] == "msg" && frame["kind"].is_null() {
            ids.push(frame["id"].as_str().unwrap().to_owned());
        }
    }
    ids.sort();
    ids
}

#[tokio::test]
async fn a_room_that_is_made_on_both_sides_of_a_cut_is_one_room() {
    let regions = two().await;
    regions.cut(VIRGINIA);
    let mut rooms = Vec::new();
    let mut sessions = Vec::new();
    for (region, user, members) in [
        (SEOUL, "kim", ["kim", "lee"]),
        (VIRGINIA, "lee", ["lee", "kim"]),
    ] {
        let address = regions.at(region).edges[0].address;
        let body = json!({"namespace": "club", "kind": "dm", "ref": "item/1", "members": members});
        let (status, made) = ask(address, ("POST", "/v1/rooms"), &may(user, &[]), &body).await;
        assert_eq!(
            (status, &made["created"]),
            (201, &json!(true)),
            "{region}: {made}"
        );
        let room = made["room"].as_str().unwrap().to_owned();
        let connection = joined(&regions, region, user, &room).await;
        let path = format!("/v1/rooms/{room}/messages");
        let message = json!({"id": format!("from-{region}"), "body": 1});
        done(address, ("POST", &path), &may(user, &[]), message).await;
        rooms.push(room);
        sessions.push(connection);
    }
    assert_eq!(rooms[0], rooms[1]);
    let room = &rooms[0];
    // Each side also changes something that the other does not know of.
    for (region, pin) in [(SEOUL, "kim%2Fp"), (VIRGINIA, "lee%2Fp")] {
        let address = regions.at(region).edges[0].address;
        let path = format!("/v1/rooms/{room}");
        if region == SEOUL {
            let title = json!({"title": "Tea"});
            done(address, ("PATCH", &path), &boss(), title).await;
        } else {
            let path = format!("{path}/pins/{pin}");
            done(address, ("PUT", &path), &boss(), Value::Null).await;
        }
    }
    regions.heal(VIRGINIA);
    for session in &mut sessions {
        assert_eq!(heard(session, 2).await, ["from-seoul", "from-virginia"]);
    }
    let record = async |region: &str| {
        let address = regions.at(region).edges[0].address;
        let path = format!("/v1/rooms/{room}");
        done(address, ("GET", &path), &may("kim", &[]), Value::Null).await
    };
    let merged = eventually("both regions have the same record", LONG, async || {
        let (here, there) = (record(SEOUL).await, record(VIRGINIA).await);
        match here == there && here["title"] == "Tea" && here["pins"] == json!(["lee/p"]) {
            true => Ok(here),
            false => Err(format!("{here} {there}")),
        }
    })
    .await;
    let member = |user: &str| json!({"user": user, "role": "member", "state": "in"});
    assert_eq!(
        merged["members"],
        json!([member("kim"), member("lee")]),
        "{merged}"
    );
    // The one that was made first counts.
    assert_eq!(merged["by"], "kim", "{merged}");
    for region in BOTH {
        for user in ["kim", "lee"] {
            joined(&regions, region, user, room).await;
        }
        let address = regions.at(region).edges[0].address;
        let body =
            json!({"namespace": "club", "kind": "dm", "ref": "item/1", "members": ["kim", "lee"]});
        let (status, again) = ask(address, ("POST", "/v1/rooms"), &may("kim", &[]), &body).await;
        assert_eq!((status, &again["created"]), (200, &json!(false)), "{again}");
    }
}

#[tokio::test]
async fn who_is_removed_in_one_region_is_out_in_the_other_also_after_a_cut() {
    let regions = two().await;
    let seoul = regions.at(SEOUL).edges[0].address;
    let room = &group(seoul, "club", "wide", &["kim", "lee", "ann", "dan"]).await;
    let mut kim = joined(&regions, VIRGINIA, "kim", room).await;
    let mut lee = joined(&regions, VIRGINIA, "lee", room).await;
    let mut ann = joined(&regions, VIRGINIA, "ann", room).await;
    let kicked = async |connection: &mut Connection| loop {
        let frame = next(connection).await.json();
        if frame["op"] == "kicked" {
            return frame["code"].as_str().unwrap().to_owned();
        }
    };
    let path = format!("/v1/rooms/{room}/members/kim");
    done(seoul, ("DELETE", &path), &boss(), Value::Null).await;
    assert_eq!(kicked(&mut kim).await, "removed");

    // One who is not in the room, but has it in a list, and is not signalled behind the cut.
    let mut dan = super::open(regions.at(VIRGINIA), 0, &may("dan", &[])).await;
    eventually("the list has the room", LONG, async || {
        let listed = reply(&mut dan, "watch", json!({ "mine": true })).await;
        match listed["rooms"][0]["room"] == **room {
            true => Ok(()),
            false => Err(listed.to_string()),
        }
    })
    .await;

    // Behind a cut the region goes by what it knew; then it follows.
    regions.cut(VIRGINIA);
    put(seoul, room, "lee", json!({"state": "banned"})).await;
    let path = format!("/v1/rooms/{room}/members/dan");
    done(seoul, ("DELETE", &path), &boss(), Value::Null).await;
    let still = reply(
        &mut lee,
        "send",
        json!({"room": room, "id": "still", "body": 1}),
    )
    .await;
    assert_eq!(still["op"], "ack", "{still}");
    regions.heal(VIRGINIA);
    assert_eq!(kicked(&mut lee).await, "banned");
    assert_eq!(heard(&mut ann, 1).await, ["still"]);
    loop {
        let frame = next(&mut dan).await.json();
        if frame["gone"] == json!([room]) {
            break;
        }
        assert_eq!(frame["rooms"][0]["room"], **room, "{frame}");
    }
    for (connection, word) in [(&mut kim, "not a member"), (&mut lee, "banned")] {
        let refused = reply(connection, "join", json!({ "room": room })).await;
        assert_eq!(refused["code"], "forbidden", "{refused}");
        assert!(
            refused["message"].as_str().unwrap().contains(word),
            "{refused}"
        );
    }
}
