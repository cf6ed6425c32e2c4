//! Half-open connections: a relay holds them, moves nothing any more, and accepts new ones.

use std::time::Duration;

use natter::testing::client::{Backoff, Draft, Event, Room, Silence, Target, Token};
use serde_json::json;

use crate::support::{
    self, LONG,
    calls::reply,
    mesh::{Mesh, token},
    relay::Relay,
};

async fn next(room: &mut Room) -> Event {
    let event = tokio::time::timeout(LONG, room.next()).await;
    event.expect("no event came").expect("the events ended")
}

#[tokio::test]
async fn a_client_on_a_frozen_connection_comes_back_resumes_and_sends_once() {
    let mesh = Mesh::start(support::nats_url(), 1, "").await;
    let relay = Relay::start(mesh.edges[0].address).await;
    let endpoint = format!("ws://{}/ws", relay.address).parse().unwrap();
    let target = Target {
        backoff: Backoff {
            base: Duration::from_millis(10),
            cap: Duration::from_millis(100),
        },
        silence: Silence {
            ask_after: Duration::from_millis(500),
            answer_within: Duration::from_secs(2),
        },
        ..Target::new(vec![endpoint], Token::Fixed(token("kim")))
    };
    let mut room = Room::follow(target, "chat:frozen", None);
    let event = next(&mut room).await;
    assert!(matches!(event, Event::Joined { .. }), "{event:?}");
    let mut lee = mesh.connect(0, "lee").await;
    reply(&mut lee, "join", json!({"room": "chat:frozen"})).await;

    relay.freeze();
    for n in 0..3 {
        let missed = json!({"room": "chat:frozen", "id": format!("missed{n}"), "body": {}});
        reply(&mut lee, "send", missed).await;
    }
    let draft = Draft::new("chat:frozen", json!({"text": "said into the void"}));
    let acked = room.publisher().publish(&draft).await.unwrap();
    assert!(!acked.dup, "{acked:?}");

    let last = json!({"room": "chat:frozen", "id": "last", "body": {}});
    reply(&mut lee, "send", last).await;
    let mut ids = Vec::new();
    let mut lost = 0;
    while ids.last().is_none_or(|id| id != "last") {
        match next(&mut room).await {
            Event::Message(frame) => ids.push(frame.json()["id"].as_str().unwrap().to_owned()),
            Event::Disconnected { .. } => lost += 1,
            Event::Joined { reset, .. } => assert_eq!(reset, None),
            event => assert!(matches!(event, Event::Reconnected { .. }), "{event:?}"),
        }
    }
    assert!(lost > 0, "the connection was not given up");
    assert_eq!(
        ids,
        ["missed0", "missed1", "missed2", draft.id.as_str(), "last"]
    );
}
