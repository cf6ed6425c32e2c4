//! Making rooms, reading and changing their records, pins, blocks, and all that is refused.

use std::net::SocketAddr;

use natter::testing::{auth::Right, mesh::provision::connect};
use serde_json::{Value, json};

use super::{CLUB, boss, done, group, may, open, put};
use crate::support::{
    self, LONG,
    calls::reply,
    eventually,
    mesh::{Mesh, ask},
    raw::{Answer, bearer, request},
};

async fn post(address: SocketAddr, who: &str, body: Value) -> (u16, Value) {
    ask(address, ("POST", "/v1/rooms"), who, &body).await
}

async fn with_tag(address: SocketAddr, path: &str, tag: &str, body: &Value) -> Answer {
    let headers = format!("{}If-Match: {tag}\r\n", bearer(&boss()));
    request(address, "PATCH", path, &headers, &body.to_string()).await
}

#[tokio::test]
async fn who_makes_a_room_again_finds_it() {
    let mesh = Mesh::start(support::nats_url(), 2, CLUB).await;
    let [here, there] = [mesh.edges[0].address, mesh.edges[1].address];
    let (kim, lee) = (may("kim", &[]), may("lee", &[]));
    let direct = |members: [&str; 2], about: Value| json!({"namespace": "club", "kind": "dm", "ref": about, "members": members});

    let item = json!("item/4711");
    let (status, made) = post(here, &kim, direct(["kim", "lee"], item.clone())).await;
    assert_eq!((status, &made["created"]), (201, &json!(true)), "{made}");
    let room = made["room"].as_str().unwrap();
    assert!(room.starts_with("club:dm-"), "{made}");
    assert_eq!(
        (&made["kind"], &made["ref"], &made["by"]),
        (&json!("dm"), &item, &json!("kim"))
    );
    let member = |user: &str| json!({"user": user, "role": "member", "state": "in"});
    assert_eq!(made["members"], json!([member("kim"), member("lee")]));
    for (address, who) in [(here, &kim), (there, &lee), (there, &boss())] {
        let (status, again) = post(address, who, direct(["lee", "kim"], item.clone())).await;
        assert_eq!((status, &again["created"]), (200, &json!(false)), "{again}");
        assert_eq!(
            (&again["room"], &again["version"]),
            (&made["room"], &made["version"])
        );
    }
    let (_, other) = post(here, &kim, direct(["kim", "lee"], Value::Null)).await;
    assert_ne!(other["room"], made["room"]);

    // Its members come in, on both edges; who leaves is out until the room is made again.
    for (edge, token) in [(0, &kim), (1, &lee)] {
        let mut connection = open(&mesh, edge, token).await;
        let joined = reply(&mut connection, "join", json!({ "room": room })).await;
        assert_eq!(joined["op"], "joined", "{joined}");
    }
    let of_kim = format!("/v1/rooms/{room}/members/kim");
    let left = done(here, ("DELETE", &of_kim), &kim, Value::Null).await;
    assert_eq!(left["members"], json!([member("lee")]), "{left}");
    let (status, back) = post(here, &kim, direct(["lee", "kim"], item)).await;
    assert_eq!((status, &back["created"]), (200, &json!(false)), "{back}");
    assert_eq!(back["members"], made["members"]);

    // Groups are named by their key, by the name that is asked for, or by chance.
    let key = |key: &str| json!({"namespace": "club", "kind": "group", "key": key, "title": "Tea", "info": {"color": 7}});
    let (status, made) = post(here, &boss(), key("k1")).await;
    assert_eq!(status, 201, "{made}");
    assert_eq!(
        (&made["title"], &made["info"]),
        (&json!("Tea"), &json!({"color": 7}))
    );
    let (status, again) = post(there, &boss(), key("k1")).await;
    assert_eq!((status, &again["room"]), (200, &made["room"]), "{again}");
    let (status, other) = post(there, &boss(), key("k2")).await;
    assert_eq!(status, 201, "{other}");
    assert_ne!(other["room"], made["room"]);
    let open = json!({"namespace": "chat", "kind": "open", "name": "서울 #1"});
    let (status, named) = post(here, &boss(), open).await;
    assert_eq!(
        (status, &named["room"]),
        (201, &json!("chat:=EC=84=9C=EC=9A=B8=20=231"))
    );
    let any = json!({"namespace": "chat", "kind": "group"});
    let (one, two) = (
        post(here, &boss(), any.clone()).await,
        post(here, &boss(), any).await,
    );
    assert_eq!((one.0, two.0), (201, 201));
    assert_ne!(one.1["room"], two.1["room"]);

    // Whoever makes a group and is a member of it owns it.
    let own =
        json!({"namespace": "club", "kind": "group", "name": "own", "members": ["boss", "kim"]});
    let (_, owned) = post(here, &boss(), own).await;
    let roles: Vec<_> = owned["members"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["role"])
        .collect();
    assert_eq!(roles, ["owner", "member"], "{owned}");
}

#[tokio::test]
async fn what_can_not_be_made_is_refused_with_the_reason() {
    let toml = format!("limits.room_members = 3\n{CLUB}");
    let mesh = Mesh::start(support::nats_url(), 1, &toml).await;
    let address = mesh.edges[0].address;
    let (kim, boss) = (may("kim", &[]), boss());
    let in_club = |more: Value| {
        let mut body = json!({"namespace": "club", "kind": "dm", "members": ["kim", "lee"]});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        body
    };
    let many: Vec<String> = (0..11).map(|n| format!("u{n}")).collect();
    for (who, body, status, code, told) in [
        // Users make direct rooms with themselves in them, where the namespace lets them.
        (
            &kim,
            in_club(json!({"members": ["ann", "lee"]})),
            403,
            "forbidden",
            "manage",
        ),
        (
            &kim,
            in_club(json!({"namespace": "chat"})),
            403,
            "forbidden",
            "manage",
        ),
        (
            &kim,
            in_club(json!({"kind": "group"})),
            403,
            "forbidden",
            "manage",
        ),
        (
            &kim,
            in_club(json!({"kind": "open"})),
            403,
            "forbidden",
            "manage",
        ),
        (
            &boss,
            in_club(json!({"key": "k"})),
            400,
            "bad_request",
            "key",
        ),
        (
            &boss,
            in_club(json!({"name": "n"})),
            400,
            "bad_request",
            "name",
        ),
        (
            &boss,
            in_club(json!({"kind": "group", "key": "k", "name": "n"})),
            400,
            "bad_request",
            "one of key and name",
        ),
        (
            &boss,
            in_club(json!({"namespace": "nowhere"})),
            404,
            "unknown_namespace",
            "nowhere",
        ),
        (
            &boss,
            in_club(json!({"namespace": "a.b"})),
            400,
            "bad_room",
            "",
        ),
        (
            &boss,
            in_club(json!({"kind": "group", "name": ""})),
            400,
            "bad_room",
            "",
        ),
        (
            &boss,
            in_club(json!({"kind": "heap"})),
            400,
            "bad_request",
            "group",
        ),
        (
            &boss,
            in_club(json!({"members": "kim"})),
            400,
            "bad_request",
            "kim",
        ),
        (
            &boss,
            in_club(json!({"members": ["$kim", "lee"]})),
            400,
            "bad_request",
            "$",
        ),
        (
            &boss,
            in_club(json!({"members": ["", "lee"]})),
            400,
            "bad_request",
            "empty",
        ),
        (
            &boss,
            in_club(json!({"members": []})),
            429,
            "limit",
            "1 to 10",
        ),
        (
            &boss,
            in_club(json!({"members": many})),
            429,
            "limit",
            "1 to 10",
        ),
        (
            &boss,
            in_club(json!({"kind": "group", "members": ["a", "b", "c", "d"]})),
            429,
            "limit",
            "0 to 3",
        ),
        (
            &boss,
            in_club(json!({"title": "x".repeat(257)})),
            400,
            "bad_request",
            "title",
        ),
        (
            &boss,
            in_club(json!({"title": "a\nb"})),
            400,
            "bad_request",
            "title",
        ),
        (
            &boss,
            in_club(json!({"ref": "x".repeat(257)})),
            400,
            "bad_request",
            "ref",
        ),
        (
            &boss,
            in_club(json!({"info": {"x": "y".repeat(8192)}})),
            400,
            "bad_request",
            "info",
        ),
        (&boss, in_club(json!({"info": 7})), 400, "bad_request", "7"),
        (
            &boss,
            json!({"kind": "dm"}),
            400,
            "bad_request",
            "namespace",
        ),
    ] {
        let (got, answer) = post(address, who, body.clone()).await;
        assert_eq!(
            (got, &answer["code"]),
            (status, &json!(code)),
            "{body}: {answer}"
        );
        assert!(
            answer["message"].as_str().unwrap().contains(told),
            "{body}: {answer}"
        );
    }
    let text = request(address, "POST", "/v1/rooms", &bearer(&boss), "{").await;
    assert_eq!(
        (text.status, &text.json()["code"]),
        (400, &json!("bad_json"))
    );
    let nobody = request(address, "POST", "/v1/rooms", "", "{}").await;
    assert_eq!(nobody.status, 401, "{}", nobody.body);

    let room = &group(address, "club", "full", &["kim", "lee", "ann"]).await;
    let base = format!("/v1/rooms/{room}");
    let of = |rest: &str| format!("{base}{rest}");
    for (method, path, body, status, code, told) in [
        ("PUT", of("/members/new"), json!({}), 429, "limit", "3"),
        (
            "PUT",
            of("/members/new"),
            json!({"state": "banned"}),
            429,
            "limit",
            "3",
        ),
        (
            "PUT",
            of("/members/kim"),
            json!({"role": "king"}),
            400,
            "bad_request",
            "king",
        ),
        (
            "PUT",
            of("/members/kim"),
            json!({"state": "out"}),
            400,
            "bad_request",
            "state",
        ),
        (
            "PUT",
            of("/members/kim"),
            json!({"muted_until": -1}),
            400,
            "bad_request",
            "-1",
        ),
        (
            "PUT",
            of("/members/%24kim"),
            json!({}),
            400,
            "bad_request",
            "$",
        ),
        ("PUT", of("/members/%FF"), json!({}), 400, "bad_request", ""),
        (
            "DELETE",
            of("/members/new"),
            Value::Null,
            400,
            "bad_request",
            "new",
        ),
        (
            "PATCH",
            of(""),
            json!({}),
            400,
            "bad_request",
            "title, info",
        ),
        (
            "PATCH",
            of(""),
            json!({"slow_mode_s": 86_401}),
            400,
            "bad_request",
            "86400",
        ),
        (
            "PATCH",
            of(""),
            json!({"assignee": "$x"}),
            400,
            "bad_request",
            "$",
        ),
        ("PUT", of("/pins/a%20b"), Value::Null, 400, "bad_id", ""),
        (
            "GET",
            "/v1/rooms/club:none".to_owned(),
            Value::Null,
            404,
            "unknown_room",
            "club:none",
        ),
        (
            "GET",
            "/v1/rooms/chat:none".to_owned(),
            Value::Null,
            404,
            "unknown_room",
            "chat:none",
        ),
        (
            "GET",
            "/v1/rooms/none".to_owned(),
            Value::Null,
            400,
            "bad_room",
            "",
        ),
        (
            "PATCH",
            "/v1/rooms/nowhere:x".to_owned(),
            json!({"title": "x"}),
            404,
            "unknown_namespace",
            "nowhere",
        ),
    ] {
        let (got, answer) = ask(address, (method, &path), &boss, &body).await;
        assert_eq!(
            (got, &answer["code"]),
            (status, &json!(code)),
            "{method} {path} {body}: {answer}"
        );
        assert!(
            answer["message"].as_str().unwrap().contains(told),
            "{path} {body}: {answer}"
        );
    }
    // Who is not let in does not hear whether there is such a room.
    let stranger = may("eve", &[]);
    let hidden = async |room: &str| {
        let path = format!("/v1/rooms/club:{room}");
        let (status, answer) = ask(address, ("GET", &path), &stranger, &Value::Null).await;
        assert_eq!(status, 403, "{answer}");
        answer["message"].as_str().unwrap().replace(room, "…")
    };
    assert_eq!(hidden("full").await, hidden("none").await);
    // A place is free again.
    let path = of("/members/lee");
    done(address, ("DELETE", &path), &boss, Value::Null).await;
    put(address, room, "new", json!({})).await;
}

/// A list of members may be so long in bytes that no bucket takes it, also below the limit of their number.
#[tokio::test]
async fn a_record_that_would_be_too_large_is_refused() {
    let toml = format!("limits.room_members = 2000\n{CLUB}");
    let mesh = Mesh::start(support::nats_url(), 1, &toml).await;
    // As JSON, a quote takes two bytes.
    let quotes = "\"".repeat(250);
    let members: Vec<String> = (0..1900).map(|n| format!("{quotes}{n}")).collect();
    let body = json!({"namespace": "club", "kind": "group", "name": "large", "members": members});
    let address = mesh.edges[0].address;
    let (status, refused) = post(address, &boss(), body).await;
    assert_eq!(
        (status, &refused["code"]),
        (429, &json!("limit")),
        "{refused}"
    );
    let path = "/v1/rooms/club:large";
    let (status, answer) = ask(address, ("GET", path), &boss(), &Value::Null).await;
    assert_eq!(
        (status, &answer["code"]),
        (404, &json!("unknown_room")),
        "{answer}"
    );
}

#[tokio::test]
async fn a_record_is_changed_only_in_the_version_that_was_read() {
    let mesh = Mesh::start(support::nats_url(), 2, CLUB).await;
    let address = mesh.edges[0].address;
    let room = group(address, "club", "versions", &["kim"]).await;
    let path = format!("/v1/rooms/{room}");
    let read = request(address, "GET", &path, &bearer(&boss()), "").await;
    let tag = read.header("etag").unwrap().to_owned();
    assert_eq!(
        tag,
        format!("\"{}\"", read.json()["version"].as_str().unwrap())
    );
    let first = with_tag(address, &path, &tag, &json!({"title": "first"})).await;
    assert_eq!(first.status, 200, "{}", first.body);
    let newer = first.header("etag").unwrap().to_owned();
    assert_ne!(newer, tag);
    // On the other edge too.
    for edge in &mesh.edges {
        let late = with_tag(edge.address, &path, &tag, &json!({"title": "late"})).await;
        assert_eq!(
            (late.status, &late.json()["code"]),
            (409, &json!("conflict"))
        );
    }
    for tag in [newer.as_str(), "*"] {
        let next = with_tag(address, &path, tag, &json!({"title": tag})).await;
        assert_eq!((next.status, &next.json()["title"]), (200, &json!(tag)));
    }
    // Of a room that nobody has made there is no version.
    let none = with_tag(address, "/v1/rooms/chat:none", &tag, &json!({"title": "x"})).await;
    assert_eq!(none.status, 409, "{}", none.body);
    // Many changes at once: each is made, and none undoes another.
    let names: Vec<String> = (0..12).map(|n| format!("u{n:02}")).collect();
    let puts = names.iter().enumerate().map(async |(number, name)| {
        put(mesh.edges[number % 2].address, &room, name, json!({})).await;
    });
    futures_util::future::join_all(puts).await;
    let record = done(address, ("GET", &path), &boss(), Value::Null).await;
    let members = record["members"].as_array().unwrap().iter();
    let members: Vec<_> = members.map(|one| one["user"].as_str().unwrap()).collect();
    let mut wanted = vec!["kim"];
    wanted.extend(names.iter().map(String::as_str));
    assert_eq!(members, wanted);
}

#[tokio::test]
async fn members_of_a_direct_room_and_moderators_pin_messages() {
    let mesh = Mesh::start(support::nats_url(), 1, CLUB).await;
    let address = mesh.edges[0].address;
    let direct = json!({"namespace": "club", "kind": "dm", "members": ["kim", "lee"]});
    let (_, made) = post(address, &may("kim", &[]), direct).await;
    let base = format!("/v1/rooms/{}", made["room"].as_str().unwrap());
    let pin = async |method: &str, message: &str| {
        let path = format!("{base}/pins/{message}");
        ask(address, (method, &path), &may("lee", &[]), &Value::Null).await
    };
    for number in 0..50 {
        let (status, answer) = pin("PUT", &format!("kim%2Fm{number}")).await;
        assert_eq!(status, 200, "{answer}");
    }
    // Once more changes nothing, one's own goes by its id, and there is an end.
    assert_eq!(pin("PUT", "kim%2Fm7").await.0, 200);
    let (status, full) = pin("PUT", "own").await;
    assert_eq!((status, &full["code"]), (429, &json!("limit")), "{full}");
    let send = async |message: Value| {
        let path = format!("{base}/messages");
        ask(address, ("POST", &path), &may("lee", &[]), &message).await
    };
    let (status, full) = send(json!({"kind": "pin", "target": "own"})).await;
    assert_eq!((status, &full["code"]), (429, &json!("limit")), "{full}");
    let (status, ack) = send(json!({"kind": "unpin", "target": "kim/m0"})).await;
    assert_eq!(status, 200, "{ack}");
    let (status, answer) = pin("PUT", "own").await;
    assert_eq!(status, 200, "{answer}");
    let pins = answer["pins"].as_array().unwrap();
    let ends = (&pins[0], &pins[49], pins.len());
    assert_eq!(ends, (&json!("kim/m1"), &json!("lee/own"), 50));
    // Who may not write there pins nothing, by no way.
    let block = "/v1/users/kim/blocks/lee";
    done(address, ("PUT", block), &may("kim", &[]), Value::Null).await;
    eventually("lee is blocked", LONG, async || {
        let (status, answer) = pin("DELETE", "own").await;
        (status == 403).then_some(()).ok_or(answer.to_string())
    })
    .await;
    let (status, refused) = send(json!({"kind": "unpin", "target": "own"})).await;
    assert_eq!(status, 403, "{refused}");

    let room = &group(address, "club", "pins", &["kim", "mod"]).await;
    put(address, room, "mod", json!({"role": "moderator"})).await;
    let path = format!("/v1/rooms/{room}/pins/kim%2Fm1");
    for (user, wanted) in [("kim", 403), ("eve", 403), ("mod", 200)] {
        let token = may(user, &[Right::Moderate]);
        let (status, answer) = ask(address, ("PUT", &path), &token, &Value::Null).await;
        assert_eq!(status, wanted, "{user}: {answer}");
    }
}

#[tokio::test]
async fn who_has_blocked_somebody_gets_no_direct_messages_and_neither_is_told() {
    let mesh = Mesh::start(support::nats_url(), 2, CLUB).await;
    let [here, there] = [mesh.edges[0].address, mesh.edges[1].address];
    let direct = |other: &str, about: &str| json!({"namespace": "club", "kind": "dm", "ref": about, "members": ["kim", other]});
    let (kim, lee) = (may("kim", &[]), may("lee", &[]));
    let made = post(here, &kim, direct("lee", "")).await.1;
    let with_lee = made["room"].as_str().unwrap().to_owned();
    let made = post(here, &kim, direct("ann", "")).await.1;
    let with_ann = made["room"].as_str().unwrap().to_owned();
    let together = group(here, "club", "both", &["kim", "lee"]).await;
    let say = async |address: SocketAddr, who: &str, room: &str| {
        let path = format!("/v1/rooms/{room}/messages");
        let (status, answer) = ask(address, ("POST", &path), who, &json!({"body": 1})).await;
        match status {
            200 => Ok(()),
            _ => Err(answer["message"].to_string()),
        }
    };
    for (who, address) in [(&kim, here), (&kim, there), (&lee, here), (&lee, there)] {
        assert_eq!(say(address, who, &with_lee).await, Ok(()));
    }

    let block = "/v1/users/lee/blocks/kim";
    // Of others only who looks after everything.
    let (status, _) = ask(here, ("PUT", block), &kim, &Value::Null).await;
    assert_eq!(status, 403);
    let (status, refused) = ask(
        here,
        ("PUT", "/v1/users/lee/blocks/lee"),
        &lee,
        &Value::Null,
    )
    .await;
    assert_eq!(
        (status, &refused["code"]),
        (400, &json!("bad_request")),
        "{refused}"
    );
    for who in [&lee, &boss()] {
        done(here, ("PUT", block), who, Value::Null).await;
        let refused = |text: &Result<(), String>| {
            text.as_ref()
                .is_err_and(|text| text.contains("can't write"))
        };
        let blocker = say(here, &lee, &with_lee).await;
        assert!(refused(&blocker), "{blocker:?}");
        assert_eq!(say(here, &kim, &with_lee).await, blocker);
        for who in [&kim, &lee] {
            eventually("the other edge has heard", LONG, async || {
                match say(there, who, &with_lee).await {
                    told if told == blocker => Ok(()),
                    told => Err(format!("{told:?}")),
                }
            })
            .await;
        }
        // Only of each other, and only directly. They still read what was said.
        assert_eq!(say(here, &kim, &with_ann).await, Ok(()));
        assert_eq!(say(here, &kim, &together).await, Ok(()));
        let path = format!("/v1/rooms/{with_lee}/readers");
        done(here, ("GET", &path), &kim, Value::Null).await;
        // No other room of the two is made, by neither.
        for (who, address) in [(&kim, here), (&lee, there)] {
            let (status, answer) = post(address, who, direct("lee", "new")).await;
            assert_eq!(
                (status, &answer["code"]),
                (403, &json!("forbidden")),
                "{answer}"
            );
            assert!(refused(&Err(answer["message"].to_string())), "{answer}");
        }
        done(here, ("DELETE", block), who, Value::Null).await;
        assert_eq!(say(here, &lee, &with_lee).await, Ok(()));
        eventually("the other edge has heard", LONG, async || {
            say(there, &kim, &with_lee).await
        })
        .await;
    }
    let (status, answer) = post(there, &kim, direct("lee", "new")).await;
    assert_eq!(status, 201, "{answer}");
}

/// A person with the nats CLI reads records: `nats kv get rooms_<region> club.tea`.
#[tokio::test]
async fn records_are_readable_json_in_the_bucket() {
    let mesh = Mesh::start(support::nats_url(), 1, CLUB).await;
    let room = group(mesh.edges[0].address, "club", "tea", &["kim"]).await;
    assert_eq!(room, "club:tea");
    let client = connect(&mesh.config.nats).await.unwrap();
    let read = async |bucket: &str, key: &str| {
        let bucket = format!("{bucket}_{}", mesh.config.region());
        let subject = format!("$JS.API.DIRECT.GET.KV_{bucket}.$KV.{bucket}.{key}");
        let answer = client.request(subject, "".into()).await.unwrap();
        serde_json::from_slice::<Value>(&answer.payload).unwrap()
    };
    let record = read("rooms", "club.tea").await;
    let region = mesh.config.region().to_string();
    assert_eq!(
        (&record["kind"], &record["by"]),
        (&json!("group"), &json!("boss"))
    );
    let kim = &record["members"]["kim"];
    assert_eq!(
        *kim,
        json!({"role": "member", "state": "in", "at": record["created"], "origin": region}),
        "{record}"
    );
    assert!(
        record["created"].as_u64().unwrap() > 1_700_000_000_000,
        "{record}"
    );
    assert_eq!(read("inbox", "kim.club.tea").await["member"], *kim);
}
