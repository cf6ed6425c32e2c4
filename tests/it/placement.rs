//! Which shard of an edge a session is on.

use serde_json::{Value, json};

use crate::support::{
    self, LONG, eventually,
    mesh::{Mesh, token},
    raw::{FIN, Raw, TEXT, frame},
};

async fn mesh() -> Mesh {
    Mesh::start(
        support::nats_url(),
        1,
        "edge.shards = 2\nnats.partitions = 1",
    )
    .await
}

fn text(value: &Value) -> Vec<u8> {
    frame(FIN | TEXT, value.to_string().as_bytes())
}

async fn rooms_are(mesh: &Mesh, hubs: u64) {
    eventually("the hubs are as many as that", LONG, async || {
        let active = mesh.metric(0, "natter_room_active", "").await;
        (active == hubs).then_some(()).ok_or(active.to_string())
    })
    .await;
}

#[tokio::test]
async fn members_of_a_room_share_a_hub_and_what_was_sent_with_the_join_goes_with_it() {
    const ROOMS: usize = 12;
    let mesh = mesh().await;
    let address = mesh.edges[0].address;
    let mut sessions = Vec::new();
    for n in 0..ROOMS * 3 {
        let room = format!("chat:r{}", n % ROOMS);
        let user = format!("user-{n}");
        let mut raw = Raw::open(address, &token(&user)).await;
        // All at once, and the end of it later: half a frame waits in the decoder while the session changes its thread.
        let commands = [
            json!({ "op": "ping", "rid": 1 }),
            json!({ "op": "join", "rid": 2, "room": room }),
            json!({ "op": "send", "rid": 3, "room": room, "id": "1", "body": user }),
            json!({ "op": "ping", "rid": 4 }),
        ];
        let mut bytes: Vec<u8> = commands.iter().flat_map(text).collect();
        let last = text(&json!({ "op": "ping", "rid": 5 }));
        let (begin, end) = last.split_at(last.len() / 2);
        bytes.extend_from_slice(begin);
        raw.write(&bytes).await;
        let mut rids = Vec::new();
        let mut own = 0;
        while rids.len() < 4 {
            let frame = raw.json().await;
            match frame["op"].as_str().unwrap() {
                "msg" if frame["from"] == json!(user) => own += 1,
                "msg" => panic!("{user} got {frame}"),
                "error" => panic!("{frame}"),
                _ => rids.push(frame["rid"].as_u64().unwrap()),
            }
        }
        assert_eq!(rids, [1, 2, 3, 4]);
        raw.write(end).await;
        loop {
            let frame = raw.json().await;
            match frame["op"].as_str().unwrap() {
                "msg" => own += 1,
                "pong" => break assert_eq!(frame["rid"], json!(5)),
                _ => panic!("{frame}"),
            }
        }
        assert_eq!(own, 1);
        // Who was here before gets it too.
        for (_, other) in sessions
            .iter_mut()
            .filter(|(known, _): &&mut (String, Raw)| *known == room)
        {
            let frame = other.json().await;
            assert_eq!(
                (&frame["op"], &frame["from"]),
                (&json!("msg"), &json!(user))
            );
        }
        sessions.push((room, raw));
    }
    rooms_are(&mesh, ROOMS as u64).await;
    assert!(mesh.metric(0, "natter_session_moved_total", "").await > 0);
    assert_eq!(
        mesh.metric(0, "natter_session_active", "").await,
        sessions.len() as u64
    );
    let opened = mesh.metric(0, "natter_session_opened_total", "").await;
    assert_eq!(opened, sessions.len() as u64, "a session is opened once");
}

#[tokio::test]
async fn a_room_that_is_larger_than_the_share_of_a_shard_is_spread() {
    let mesh = mesh().await;
    let mut connections = Vec::new();
    for n in 0..120 {
        let connection = mesh.connect(0, &format!("user-{n}")).await;
        let join = json!({ "room": "chat:all" });
        let joined = connection.commands().call("join", join).await.unwrap();
        assert_eq!(joined.op(), "joined");
        connections.push(connection);
    }
    rooms_are(&mesh, 2).await;
    let send = json!({ "room": "chat:all", "id": "1", "body": "to both" });
    let ack = connections[0].commands().call("send", send).await.unwrap();
    assert_eq!(ack.op(), "ack");
    for connection in &mut connections {
        assert_eq!(connection.next().await.unwrap().op(), "msg");
    }
}
