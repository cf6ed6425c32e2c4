//! Rooms over several regions: what is said in one is seen in all, a member goes from one to another, and a cut is survived.

use natter::testing::client::Connection;
use serde_json::{Value, json};

use crate::support::{
    calls::{next, reply},
    regions::Regions,
};

const SEOUL: &str = "seoul";
const VIRGINIA: &str = "virginia";

/// Two regions with an edge each.
async fn two(toml: &str) -> Regions {
    let mut regions =
        Regions::start_with(&[SEOUL, VIRGINIA], toml, std::time::Duration::ZERO).await;
    for region in [SEOUL, VIRGINIA] {
        regions.mesh(region).add_edge().await;
    }
    regions
}

async fn connect(regions: &mut Regions, region: &str, user: &str) -> Connection {
    regions.mesh(region).connect(0, user).await
}

async fn join(connection: &mut Connection, since: Option<&Value>) -> Value {
    let joined = reply(
        connection,
        "join",
        json!({"room": "chat:a", "since": since}),
    )
    .await;
    assert_eq!(joined["op"], "joined", "{joined}");
    assert_eq!(joined.get("reset"), None, "{joined}");
    joined
}

/// Says something from outside of the room.
async fn say(connection: &mut Connection, body: &str) -> Value {
    let fields = json!({"room": "chat:a", "id": body, "body": body});
    let ack = reply(connection, "send", fields).await;
    assert_eq!(ack["op"], "ack", "{ack}");
    ack
}

/// The next message: its body, and its cursor.
async fn hear(connection: &mut Connection) -> (String, Value) {
    let frame = next(connection).await.json();
    assert_eq!(frame["op"], "msg", "{frame}");
    (
        frame["body"].as_str().unwrap().to_owned(),
        frame["cursor"].clone(),
    )
}

async fn hear_all<const N: usize>(connection: &mut Connection, bodies: [&str; N]) -> Value {
    let mut cursor = Value::Null;
    for body in bodies {
        let heard = hear(connection).await;
        assert_eq!(heard.0, body);
        cursor = heard.1;
    }
    cursor
}

#[tokio::test]
async fn a_member_goes_from_region_to_region_and_back() {
    let mut regions = two("").await;
    let mut mia = connect(&mut regions, SEOUL, "mia").await;
    let mut max = connect(&mut regions, VIRGINIA, "max").await;
    let mut kim = connect(&mut regions, SEOUL, "kim").await;
    let start = join(&mut kim, None).await["cursor"].clone();
    assert_eq!(start.as_str().unwrap().matches('_').count(), 1, "{start}");
    let mut ann = connect(&mut regions, SEOUL, "ann").await;
    join(&mut ann, None).await;
    say(&mut mia, "s1").await;
    hear_all(&mut kim, ["s1"]).await;
    say(&mut max, "v1").await;
    let cursor = hear_all(&mut kim, ["v1"]).await;
    kim.close().await;

    say(&mut max, "v2").await;
    let mut kim = connect(&mut regions, VIRGINIA, "kim").await;
    let joined = join(&mut kim, Some(&cursor)).await;
    assert_eq!(joined["replay"], json!(1));
    hear_all(&mut kim, ["v2"]).await;
    say(&mut mia, "s2").await;
    let cursor = hear_all(&mut kim, ["s2"]).await;
    kim.close().await;

    // Seoul has all of it.
    for _ in 0..4 {
        hear(&mut ann).await;
    }
    // Back again, with nothing new; and from the beginning, on an edge that has it in memory and on one that has not.
    let mut kim = connect(&mut regions, SEOUL, "kim").await;
    assert_eq!(join(&mut kim, Some(&cursor)).await["replay"], json!(0));
    regions.mesh(SEOUL).add_edge().await;
    for edge in [0, 1] {
        let mut lee = regions.mesh(SEOUL).connect(edge, "lee").await;
        let replay = 4 + edge;
        assert_eq!(join(&mut lee, Some(&start)).await["replay"], json!(replay));
        let mut heard = Vec::new();
        for _ in 0..replay {
            heard.push(hear(&mut lee).await.0);
        }
        let of = |region: char| {
            let of = heard.iter().filter(move |body| body.starts_with(region));
            of.cloned().collect::<Vec<_>>()
        };
        assert_eq!(of('v'), ["v1", "v2"]);
        assert_eq!(of('s'), ["s1", "s2", "s3"][..2 + edge]);
        // And live after it.
        let more = format!("s{}", edge + 3);
        say(&mut mia, &more).await;
        hear_all(&mut lee, [&*more]).await;
        hear_all(&mut kim, [&*more]).await;
        leave(&mut lee).await;
    }
}

async fn leave(connection: &mut Connection) {
    let left = reply(connection, "leave", json!({"room": "chat:a"})).await;
    assert_eq!(left["op"], "left", "{left}");
}

#[tokio::test]
async fn who_comes_to_a_region_that_is_cut_off_is_shown_nothing_twice_and_misses_nothing() {
    let mut regions = two("").await;
    let mut mia = connect(&mut regions, SEOUL, "mia").await;
    let mut max = connect(&mut regions, VIRGINIA, "max").await;
    let mut kim = connect(&mut regions, SEOUL, "kim").await;
    let mut lee = connect(&mut regions, VIRGINIA, "lee").await;
    join(&mut kim, None).await;
    join(&mut lee, None).await;
    say(&mut mia, "s1").await;
    hear_all(&mut kim, ["s1"]).await;
    hear_all(&mut lee, ["s1"]).await;

    regions.cut(VIRGINIA);
    say(&mut mia, "s2").await;
    let cursor = hear_all(&mut kim, ["s2"]).await;
    // Each side goes on.
    say(&mut max, "v1").await;
    hear_all(&mut lee, ["v1"]).await;
    // Kim comes to Virginia with what Virginia has not got.
    let mut roaming = connect(&mut regions, VIRGINIA, "kim").await;
    let joined = join(&mut roaming, Some(&cursor)).await;
    // For a moment it is waited for what she has seen: it might come under another name.
    assert_eq!((&joined["cursor"], &joined["replay"]), (&cursor, &json!(0)));
    hear_all(&mut roaming, ["v1"]).await;
    say(&mut max, "v2").await;
    let cursor = hear_all(&mut roaming, ["v2"]).await;
    hear_all(&mut lee, ["v2"]).await;
    // What Kim answers, Lee sees after what Kim has seen, or after rooms.causal_wait.
    roaming.close().await;
    let mut roaming = connect(&mut regions, VIRGINIA, "kim").await;
    assert_eq!(join(&mut roaming, Some(&cursor)).await["replay"], json!(0));

    regions.heal(VIRGINIA);
    say(&mut mia, "s3").await;
    hear_all(&mut lee, ["s2", "s3"]).await;
    // Kim has had s2.
    hear_all(&mut roaming, ["s3"]).await;
    let cursor = hear_two(&mut kim, "v1", "v2", "s3").await;
    // Both are at the same place now.
    let mut here = connect(&mut regions, VIRGINIA, "kim").await;
    assert_eq!(join(&mut here, Some(&cursor)).await["replay"], json!(0));
}

/// Two messages of one region and one of another, in any order between the regions.
async fn hear_two(connection: &mut Connection, first: &str, second: &str, other: &str) -> Value {
    let mut heard = Vec::new();
    let mut cursor = Value::Null;
    for _ in 0..3 {
        let (body, at) = hear(connection).await;
        heard.push(body);
        cursor = at;
    }
    let of_one: Vec<&String> = heard.iter().filter(|body| *body != other).collect();
    assert_eq!(of_one, [first, second], "{heard:?}");
    cursor
}

#[tokio::test]
async fn a_publish_that_is_repeated_in_another_region_is_shown_once_to_everybody() {
    let mut regions = two("").await;
    let mut mia = connect(&mut regions, SEOUL, "mia").await;
    let mut there = connect(&mut regions, VIRGINIA, "mia").await;
    let mut kim = connect(&mut regions, SEOUL, "kim").await;
    let mut lee = connect(&mut regions, VIRGINIA, "lee").await;
    let start = join(&mut kim, None).await["cursor"].clone();
    join(&mut lee, None).await;
    // Both regions store it, since neither knows of the other.
    regions.cut(VIRGINIA);
    let first = say(&mut mia, "once").await["cursor"].clone();
    let second = say(&mut there, "once").await["cursor"].clone();
    assert_ne!(first, second);
    let in_seoul = hear_all(&mut kim, ["once"]).await;
    let in_virginia = hear_all(&mut lee, ["once"]).await;
    regions.heal(VIRGINIA);
    say(&mut mia, "s2").await;
    say(&mut there, "v2").await;
    for connection in [&mut kim, &mut lee] {
        let mut heard = [hear(connection).await.0, hear(connection).await.0];
        heard.sort();
        assert_eq!(heard, ["s2", "v2"]);
    }
    // Whoever had one copy is not shown the other, wherever they come; whoever had none is shown one.
    for region in [SEOUL, VIRGINIA] {
        // On an edge that has the room in memory, and on a new one.
        regions.mesh(region).add_edge().await;
        for edge in [0, 1] {
            for (since, replay) in [(&in_seoul, 2), (&in_virginia, 2), (&start, 3)] {
                let mut max = regions.mesh(region).connect(edge, "max").await;
                let joined = join(&mut max, Some(since)).await;
                assert_eq!(
                    joined["replay"],
                    json!(replay),
                    "{region} {edge} {since}: {joined}"
                );
                let mut heard = Vec::new();
                for _ in 0..replay {
                    heard.push(hear(&mut max).await.0);
                }
                heard.sort();
                let all = ["once", "s2", "v2"];
                assert_eq!(heard, all[3 - replay..], "{region} {edge} since {since}");
            }
        }
    }
}

#[tokio::test]
async fn a_publish_that_is_repeated_where_it_is_known_is_not_stored_again() {
    let mut regions = two("").await;
    let mut mia = connect(&mut regions, SEOUL, "mia").await;
    let mut there = connect(&mut regions, VIRGINIA, "mia").await;
    join(&mut there, None).await;
    let first = say(&mut mia, "once").await;
    hear_all(&mut there, ["once"]).await;
    let second = say(&mut there, "once").await;
    assert_eq!(
        (&second["cursor"], &second["ts"]),
        (&first["cursor"], &first["ts"])
    );
    assert_eq!(
        (&first["dup"], &second["dup"]),
        (&json!(false), &json!(true))
    );
    // Another's message of the same id is another message.
    let mut max = connect(&mut regions, VIRGINIA, "max").await;
    join(&mut max, None).await;
    let other = reply(
        &mut max,
        "send",
        json!({"room": "chat:a", "id": "once", "body": "mine"}),
    )
    .await;
    assert_eq!(
        (&other["op"], &other["dup"]),
        (&json!("ack"), &json!(false))
    );
    hear_all(&mut there, ["mine"]).await;
}

/// A room in which one of the regions has said nothing: where its part of the room stands, each edge sees as far as it looked.
#[tokio::test]
async fn a_member_comes_to_another_edge_though_a_region_has_said_nothing_in_the_room() {
    let mut regions = two("nats.partitions = 1").await;
    let mut mia = connect(&mut regions, SEOUL, "mia").await;
    let mut max = connect(&mut regions, VIRGINIA, "max").await;
    let mut kim = connect(&mut regions, SEOUL, "kim").await;
    join(&mut kim, None).await;
    say(&mut mia, "s1").await;
    let cursor = hear_all(&mut kim, ["s1"]).await;
    // In other rooms Virginia says something, and Seoul has it.
    let mut lee = connect(&mut regions, SEOUL, "lee").await;
    reply(&mut lee, "join", json!({"room": "chat:b"})).await;
    reply(&mut max, "send", json!({"room": "chat:b", "body": "v1"})).await;
    assert_eq!(hear(&mut lee).await.0, "v1");
    regions.mesh(SEOUL).add_edge().await;
    let mut kim = regions.mesh(SEOUL).connect(1, "kim").await;
    assert_eq!(join(&mut kim, Some(&cursor)).await["replay"], json!(0));
}
