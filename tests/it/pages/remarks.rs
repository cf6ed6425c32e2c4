//! What is said about messages, as pages show it: from the streams alone, and when MongoDB has it.

use super::*;

const ROOM: &str = "chat:remarks";

/// A mesh without a history service, whose pages come from the streams, and one whose pages come from MongoDB.
async fn meshes() -> [Mesh; 2] {
    [
        Mesh::start(nats_url(), 1, ONE_PART).await,
        Mesh::with_history(nats_url(), mongodb_url(), (1, 1), ONE_PART).await,
    ]
}

/// The page when all is where it is kept.
async fn settled(mesh: &Mesh, writes: bool) -> Value {
    if writes {
        caught_up(mesh).await;
    }
    page(mesh, ROOM, "").await
}

async fn publish(mesh: &Mesh, user: &str, room: &str, fields: Value) -> Answer {
    let path = format!("/v1/rooms/{room}/messages");
    let headers = bearer(&token(user));
    let address = mesh.edges[0].address;
    request(address, "POST", &path, &headers, &fields.to_string()).await
}

fn about(kind: &str, body: &Value) -> Value {
    json!({"kind": kind, "target": "kim/1", "body": body})
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_and_searches_follow_an_edit_of_mentions() {
    for (mesh, writes) in meshes().await.into_iter().zip([false, true]) {
        let first = json!({"id": "1", "body": {"text": "a"}, "mentions": ["ann", "bob"]});
        say(&mesh, ROOM, "kim", first).await;
        for (mentions, expected) in [
            (Some(json!(["lee"])), json!(["lee"])),
            (None, json!(["lee"])),
            (
                Some(json!(["park", "ann", "박"])),
                json!(["park", "ann", "박"]),
            ),
            (Some(json!([])), Value::Null),
            (None, Value::Null),
            (Some(json!(["bob"])), json!(["bob"])),
        ] {
            let mut edit = about("edit", &json!({"text": "b"}));
            if let Some(mentions) = mentions {
                edit["mentions"] = mentions;
            }
            say(&mesh, ROOM, "kim", edit).await;
            let shown = settled(&mesh, writes).await;
            assert_eq!(shown["messages"][0]["mentions"], expected, "{writes}");
            assert_eq!(shown["messages"][0]["body"], json!({"text": "b"}));
            if !writes {
                continue;
            }
            for user in ["ann", "bob", "lee", "박"] {
                let path = format!("/v1/rooms/{ROOM}/search?mentions={}", escaped(user));
                let is = expected
                    .as_array()
                    .is_some_and(|all| all.contains(&json!(user)));
                let hits = found(&mesh, &token("kim"), &path).await;
                assert_eq!(!hits.is_empty(), is, "{user} in {expected}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reactions_that_look_the_same_are_one_in_pages() {
    for (mesh, writes) in meshes().await.into_iter().zip([false, true]) {
        say(&mesh, ROOM, "kim", json!({"id": "1", "body": 1})).await;
        let mut expected = serde_json::Map::new();
        for (first, second, other) in [
            ("👍", "👍\u{fe0f}", "👍🏽"),
            ("❤\u{fe0f}", "❤", "💙"),
            ("1\u{fe0f}\u{20e3}", "1\u{20e3}", "2\u{20e3}"),
            ("👁\u{fe0f}\u{200d}🗨\u{fe0f}", "👁\u{200d}🗨", "👁"),
            ("e\u{301}", "é", "e"),
        ] {
            for (user, key) in [("lee", first), ("ann", second), ("bob", other)] {
                say(&mesh, ROOM, user, about("reaction", &json!(key))).await;
            }
            let remove = json!({"key": second, "remove": true});
            say(&mesh, ROOM, "lee", about("reaction", &remove)).await;
            let one = |user: &str| json!({"count": 1, "users": [user]});
            expected.insert(first.to_owned(), one("ann"));
            expected.insert(other.to_owned(), one("bob"));
        }
        let shown = settled(&mesh, writes).await;
        assert_eq!(
            shown["messages"][0]["reactions"],
            Value::Object(expected),
            "{writes}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_too_much_about_a_message_is_told_and_takes_nothing_from_others() {
    for (mesh, writes) in meshes().await.into_iter().zip([false, true]) {
        let names = |count: usize, bytes: usize| -> Value {
            let value = "x".repeat(bytes);
            let all = (0..count).map(|n| (format!("!{n}"), json!(value)));
            Value::Object(all.collect())
        };
        for room in [ROOM, "live:remarks"] {
            for (kind, body) in [
                ("reaction", json!("x".repeat(65))),
                ("reaction", json!({"key": "👍".repeat(17)})),
                ("annotation", names(33, 1)),
                ("annotation", names(480, 1)),
                ("annotation", names(1, 8191)),
                ("annotation", json!({"x".repeat(65): 1})),
            ] {
                let refused = publish(&mesh, "mal", room, about(kind, &body)).await;
                let code = refused.json()["code"].clone();
                assert_eq!((refused.status, code), (413, json!("too_large")), "{kind}");
            }
        }
        say(&mesh, ROOM, "kim", json!({"id": "1", "body": 1})).await;
        say(&mesh, ROOM, "lee", about("reaction", &json!("👍"))).await;
        let translation = json!({"translation": {"en": "hello"}});
        say(&mesh, ROOM, "translator", about("annotation", &translation)).await;
        for n in 0..40 {
            say(
                &mesh,
                ROOM,
                "mal",
                about("reaction", &json!(format!("!{n:02}"))),
            )
            .await;
        }
        for n in 0..15 {
            let body = (0..8).map(|at| (format!("!{n:02}{at}"), json!("x".repeat(8000))));
            let body = Value::Object(body.collect());
            say(&mesh, ROOM, "mal", about("annotation", &body)).await;
        }
        let shown = settled(&mesh, writes).await;
        let message = &shown["messages"][0];
        assert_eq!(message["truncated"], true);
        assert_eq!(message["reactions"]["👍"]["users"], json!(["lee"]));
        assert_eq!(
            message["annotations"]["translation"],
            translation["translation"]
        );
        assert_eq!(message["reactions"].as_object().unwrap().len(), 11);
        let annotations = message["annotations"].as_object().unwrap();
        assert!(
            (2..=33).contains(&annotations.len()),
            "{}",
            annotations.len()
        );
        assert!(message.to_string().len() < 300 << 10);
    }
}
