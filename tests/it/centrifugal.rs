//! Centrifugo's protocol where its SDKs do not reach: shards, regions, tokens of subscriptions, users without a token.
//! What the SDKs need is tested with them, in `tests/clients/centrifugal`.

use natter::testing::runtime::unix_s;
use serde_json::{Value, json};

use crate::support::{
    self, LONG,
    calls::reply,
    centrifugal::{Client, SECRET, foreign},
    eventually,
    mesh::{Mesh, ask, token},
    raw::{bearer, request},
    regions::Regions,
};

/// Who is in the room `open:a`.
async fn there(mesh: &Mesh) -> (u16, Value) {
    let path = "/v1/rooms/open:a/presence";
    ask(
        mesh.edges[0].address,
        ("GET", path),
        &token("lee"),
        &Value::Null,
    )
    .await
}

fn open() -> String {
    format!(
        "[centrifugal]\nhs256_secret = '{SECRET}'\nanonymous = true\n[namespaces.open]\ndurable = true\ntyping = true\n\
         everybody = ['read', 'write', 'presence']\n"
    )
}

#[tokio::test]
async fn rooms_of_the_token_outlive_a_subscription_of_the_client() {
    let toml = format!("edge.shards = 3\n{}", open());
    let mesh = Mesh::start(support::nats_url(), 1, &toml).await;
    let channels: Vec<String> = (0..6).map(|n| format!("open:s{n}")).collect();
    let token = foreign(json!({ "sub": "kim", "channels": channels }));
    let (mut writer, _) = Client::connect(&mesh, 0, &foreign(json!({ "sub": "lee" }))).await;
    // Each room has a shard of its own choice: some sessions would move.
    for n in 0..6 {
        let (mut kim, connected) = Client::connect(&mesh, 0, &token).await;
        assert_eq!(
            connected["subs"].as_object().unwrap().len(),
            6,
            "{connected}"
        );
        let room = format!("open:c{n}");
        let subscribed = kim.call("subscribe", json!({ "channel": room })).await;
        assert!(subscribed["error"].is_null(), "{subscribed}");
        for channel in channels.iter().chain([&room]) {
            let fields = json!({ "channel": channel, "data": n });
            let published = writer.call("publish", fields).await;
            assert!(published["error"].is_null(), "{published}");
            assert_eq!(kim.publication(channel).await, n);
        }
    }
}

#[tokio::test]
async fn a_channel_of_any_text_is_a_room_that_others_join_by_its_escaped_name() {
    let toml = format!(
        "[namespaces.news]\ndurable = true\ntyping = true\nhistory = true\n{}",
        open()
    );
    let mesh = Mesh::with_history(support::nats_url(), support::mongodb_url(), (2, 1), &toml).await;
    let (channel, room) = ("news:서울 #1", "news:=EC=84=9C=EC=9A=B8=20=231");
    // A pattern names the room, `channels` and `channel` the channel.
    let grants = json!([{ "rooms": room, "can": ["read", "write", "presence", "history"] }]);
    let claims = json!({ "sub": "kim", "channels": [channel], "grants": grants });
    let (mut kim, connected) = Client::connect(&mesh, 0, &foreign(claims)).await;
    assert_eq!(
        connected["subs"][channel]["recoverable"], true,
        "{connected}"
    );
    let (mut lee, _) = Client::connect(&mesh, 1, &foreign(json!({ "sub": "lee" }))).await;
    let only = |channel: &str| foreign(json!({ "sub": "lee", "channel": channel }));
    for (token, code) in [(only(room), json!(103)), (only(channel), Value::Null)] {
        let fields = json!({ "channel": channel, "token": token });
        let subscribed = lee.call("subscribe", fields).await;
        assert_eq!(subscribed["error"]["code"], code, "{subscribed}");
    }

    let mut park = mesh.connect(1, "park").await;
    let joined = reply(&mut park, "join", json!({ "room": room, "presence": true })).await;
    assert_eq!(joined["room"], room, "{joined}");
    let published = kim
        .call("publish", json!({ "channel": channel, "data": "한" }))
        .await;
    assert!(published["error"].is_null(), "{published}");
    let sent = reply(&mut park, "send", json!({ "room": room, "body": "글" })).await;
    assert_eq!(sent["op"], "ack", "{sent}");
    for client in [&mut kim, &mut lee] {
        let both = [
            client.publication(channel).await,
            client.publication(channel).await,
        ];
        assert_eq!(both, ["한", "글"]);
    }
    let fields = json!({ "channel": channel, "limit": 10 });
    let history = kim.call("history", fields).await["history"]["publications"].clone();
    let data: Vec<&Value> = history
        .as_array()
        .unwrap()
        .iter()
        .map(|it| &it["data"])
        .collect();
    assert_eq!(data, ["한", "글"], "{history}");
    let page = reply(&mut park, "history", json!({ "room": room })).await;
    let bodies = page["messages"].as_array().unwrap().iter();
    assert_eq!(
        bodies.map(|it| &it["body"]).collect::<Vec<_>>(),
        ["한", "글"],
        "{page}"
    );
    let path = format!("/v1/rooms/{room}/messages");
    let stored = eventually("all is in MongoDB", LONG, async || {
        let (status, page) = ask(
            mesh.edges[0].address,
            ("GET", &path),
            &token("park"),
            &Value::Null,
        )
        .await;
        let is_whole = status == 200 && page["partial"].is_null();
        is_whole
            .then_some(page.clone())
            .ok_or_else(|| page.to_string())
    });
    assert_eq!(stored.await["messages"].as_array().unwrap().len(), 2);

    eventually("three users on two edges", LONG, async || {
        let there = kim.call("presence", json!({ "channel": channel })).await;
        let users = there["presence"]["presence"].as_object().map(|users| {
            users
                .keys()
                .map(String::as_str)
                .collect::<Vec<_>>()
                .join(" ")
        });
        let users = users.ok_or_else(|| there.to_string())?;
        (users == "kim lee park").then_some(()).ok_or(users)
    })
    .await;
    let marker = json!({ "room": room, "cursor": sent["cursor"] });
    assert_eq!(reply(&mut park, "read", marker).await["op"], "ok");
    let unread = reply(&mut park, "unread", json!({ "rooms": [room] })).await;
    assert_eq!(unread["rooms"][0]["count"], 0, "{unread}");
    drop(lee);
    eventually("lee has left", LONG, async || {
        let there = reply(&mut park, "presence", json!({ "room": room })).await;
        (there["count"] == 2)
            .then_some(())
            .ok_or_else(|| there.to_string())
    })
    .await;

    // What can't be a room is refused, with a reason.
    for channel in ["news:", "news:한글한글한글한글", "뉴스:a"] {
        let refused = kim.call("subscribe", json!({ "channel": channel })).await;
        assert_eq!(refused["error"]["code"], 107, "{refused}");
    }
    for room in ["news:=41", "news:=ec", "news:=EC", "news:서울"] {
        let refused = reply(&mut park, "join", json!({ "room": room })).await;
        assert_eq!(refused["code"], "bad_room", "{refused}");
    }
}

#[tokio::test]
async fn a_client_recovers_in_its_region_and_is_told_where_it_can_not() {
    let names = ["seoul", "virginia"];
    let mut regions = Regions::start_with(&names, &open(), std::time::Duration::ZERO).await;
    for name in names {
        regions.mesh(name).add_edge().await;
    }
    let kim = foreign(json!({ "sub": "kim" }));
    let room = "open:a";
    let recover = |of: &Value, offset: &Value| json!({ "channel": room, "recover": true, "epoch": of["epoch"], "offset": offset });
    let seoul = regions.at("seoul");
    let virginia = regions.at("virginia");
    let (mut here, _) = Client::connect(seoul, 0, &kim).await;
    let (mut there, _) = Client::connect(virginia, 0, &kim).await;
    let (mut reader, _) = Client::connect(seoul, 0, &kim).await;
    let of = reader.call("subscribe", json!({ "channel": room })).await["subscribe"].clone();
    assert_eq!(of["recoverable"], true, "{of}");

    // What was published in its own region is recovered, and what it got of the other one is not sent again.
    let say = async |client: &mut Client, data: u32| {
        let said = client
            .call("publish", json!({ "channel": room, "data": data }))
            .await;
        assert!(said["error"].is_null(), "{said}");
    };
    say(&mut here, 1).await;
    let first = reader.next().await["push"]["pub"].clone();
    drop(reader);
    say(&mut here, 2).await;
    let (mut reader, _) = Client::connect(seoul, 0, &kim).await;
    let again = reader
        .call("subscribe", recover(&of, &first["offset"]))
        .await["subscribe"]
        .clone();
    assert_eq!(again["recovered"], true, "{again}");
    assert_eq!(reader.publication(room).await, 2);

    // Something of the other region is missed: the client may have got it before.
    say(&mut there, 3).await;
    let third = reader.next().await["push"]["pub"].clone();
    assert_eq!(third["data"], 3);
    assert!(
        third["offset"].is_null() && third["tags"]["cursor"].is_string(),
        "{third}"
    );
    drop(reader);
    say(&mut here, 4).await;
    let (mut reader, _) = Client::connect(seoul, 0, &kim).await;
    let again = reader
        .call("subscribe", recover(&again, &again["offset"]))
        .await["subscribe"]
        .clone();
    assert_eq!(
        (&again["was_recovering"], &again["recovered"]),
        (&json!(true), &Value::Null),
        "{again}"
    );
    // It goes on from there.
    say(&mut here, 5).await;
    assert_eq!(reader.publication(room).await, 5);
    drop(reader);
    say(&mut here, 6).await;
    let (mut reader, _) = Client::connect(seoul, 0, &kim).await;
    let last = reader
        .call("subscribe", recover(&again, &again["offset"]))
        .await["subscribe"]
        .clone();
    assert_eq!(last["recovered"], true, "{last}");
    assert_eq!(
        [
            reader.publication(room).await,
            reader.publication(room).await
        ],
        [5, 6]
    );

    // In another region it does not get once more what it has got, although that arrives there later.
    let position = last["offset"].as_u64().unwrap();
    assert!(position > 0);
    regions.cut("seoul");
    say(&mut here, 7).await;
    let seventh = reader.next().await["push"]["pub"].clone();
    assert_eq!(seventh["data"], 7);
    let (mut roamed, _) = Client::connect(virginia, 0, &kim).await;
    let moved = roamed
        .call("subscribe", recover(&last, &seventh["offset"]))
        .await["subscribe"]
        .clone();
    assert_eq!(
        (&moved["was_recovering"], &moved["recovered"]),
        (&json!(true), &Value::Null),
        "{moved}"
    );
    regions.heal("seoul");
    say(&mut here, 8).await;
    assert_eq!(roamed.publication(room).await, 8);
}

#[tokio::test]
async fn tokens_of_subscriptions_give_a_room_while_they_are_valid() {
    let toml = format!(
        "auth.leeway = '0s'\n[namespaces.closed]\ndurable = true\ntyping = false\n{}",
        open()
    );
    let mesh = Mesh::start(support::nats_url(), 1, &toml).await;
    let (mut kim, _) = Client::connect(&mesh, 0, &foreign(json!({ "sub": "kim" }))).await;
    let subscription = |claims: Value| {
        let mut all = json!({ "sub": "kim", "channel": "closed:a" });
        all.as_object_mut()
            .unwrap()
            .extend(claims.as_object().unwrap().clone());
        json!({ "channel": "closed:a", "token": foreign(all) })
    };
    let now = unix_s();
    for (fields, code) in [
        (json!({ "channel": "closed:a" }), 103),
        (json!({ "channel": "closed:a", "token": "x" }), 103),
        (subscription(json!({ "channel": "closed:b" })), 103),
        (subscription(json!({ "sub": "lee" })), 103),
        (subscription(json!({ "exp": now - 5 })), 109),
    ] {
        let refused = kim.call("subscribe", fields.clone()).await;
        assert_eq!(refused["error"]["code"], code, "{fields}: {refused}");
    }
    // It is for nothing else, wherever it comes.
    let only = subscription(json!({}))["token"]
        .as_str()
        .unwrap()
        .to_owned();
    let mut other = Client::dial(&mesh, 0).await;
    other.send("connect", json!({ "token": only })).await;
    assert_eq!(other.end().await, 3500);

    let subscribed = kim
        .call("subscribe", subscription(json!({ "exp": now + 3 })))
        .await;
    let subscribed = &subscribed["subscribe"];
    assert_eq!(subscribed["expires"], true, "{subscribed}");
    let refreshed = kim
        .call(
            "sub_refresh",
            subscription(json!({ "exp": now + 5, "jti": "j1" })),
        )
        .await;
    assert_eq!(refreshed["sub_refresh"]["expires"], true, "{refreshed}");
    let ended = kim.next().await;
    assert_eq!(ended["push"]["unsubscribe"]["code"], 2501, "{ended}");
    assert!(unix_s() >= now + 5);
    let later = kim
        .call(
            "subscribe",
            subscription(json!({ "exp": now + 600, "jti": "j2" })),
        )
        .await;
    assert!(later["error"].is_null(), "{later}");
    let revoke = mesh
        .command(&["revoke", "--jti", "j2"])
        .await
        .output()
        .unwrap();
    assert!(revoke.status.success(), "{revoke:?}");
    let ended = kim.next().await;
    assert_eq!(ended["push"]["unsubscribe"]["code"], 2501, "{ended}");
}

#[tokio::test]
async fn everybody_has_the_rights_of_an_open_namespace_and_nobody_else_has_others() {
    let mesh = Mesh::start(support::nats_url(), 1, &open()).await;
    let (mut nobody, _) = Client::connect(&mesh, 0, "").await;
    let subscribed = nobody
        .call("subscribe", json!({ "channel": "open:a" }))
        .await;
    assert!(subscribed["error"].is_null(), "{subscribed}");
    let published = nobody
        .call("publish", json!({ "channel": "open:a", "data": 1 }))
        .await;
    assert!(published["error"].is_null(), "{published}");
    for (method, fields, code) in [
        ("subscribe", json!({ "channel": "chat:a" }), 103),
        ("publish", json!({ "channel": "chat:a", "data": 1 }), 103),
        ("subscribe", json!({ "channel": "none:a" }), 102),
        ("history", json!({ "channel": "open:a", "limit": 1 }), 103),
    ] {
        let refused = nobody.call(method, fields).await;
        assert_eq!(refused["error"]["code"], code, "{method}: {refused}");
    }
    // Without a name that comes again there is nothing to keep.
    let epoch_and_more = nobody.publication("open:a").await;
    assert_eq!(epoch_and_more, 1);
    let read =
        json!({ "method": "room.read", "data": { "room": "open:a", "cursor": "local.k.1.1" } });
    assert_eq!(nobody.call("rpc", read).await["error"]["code"], 107);
    let block = json!({ "method": "room.block", "data": { "user": "kim", "blocked": true } });
    assert_eq!(nobody.call("rpc", block).await["error"]["code"], 107);
    // With a token of natter without grants, over HTTP and in natter.v1.
    let bare = foreign(json!({ "sub": "kim" }));
    let answer = request(
        mesh.edges[0].address,
        "GET",
        "/v1/rooms/open:a/presence",
        &bearer(&bare),
        "",
    )
    .await;
    assert_eq!(
        answer.status, 401,
        "a token of the other kind: {}",
        answer.body
    );
    let (status, users) = there(&mesh).await;
    assert_eq!(status, 200, "{users}");
    let mut lee = mesh.connect(0, "lee").await;
    let readers = reply(&mut lee, "readers", json!({ "room": "open:a" })).await;
    assert_eq!(readers["readers"], json!([]), "{readers}");
}

#[tokio::test]
async fn a_client_that_leaves_is_gone_however_fast_it_was() {
    let toml = format!(
        "limits.commands_per_second = 1\nlimits.commands_burst = 5\n{}",
        open()
    );
    let mesh = Mesh::start(support::nats_url(), 1, &toml).await;
    let (mut kim, _) = Client::connect(&mesh, 0, &foreign(json!({ "sub": "kim" }))).await;
    kim.call("subscribe", json!({ "channel": "open:a" })).await;
    let mut limited = false;
    while !limited {
        limited = kim.call("ping", json!({})).await["error"]["code"] == 111;
    }
    let left = kim
        .call("unsubscribe", json!({ "channel": "open:a" }))
        .await;
    assert_eq!(left["unsubscribe"], json!({}), "{left}");
    eventually("kim is gone", LONG, async || {
        let (_, there) = there(&mesh).await;
        let users = there["users"].as_array().map(Vec::len);
        (users == Some(0)).then_some(()).ok_or(there.to_string())
    })
    .await;
}

#[tokio::test]
async fn one_message_has_a_bounded_number_of_commands() {
    let mesh = Mesh::start(support::nats_url(), 1, &open()).await;
    let mut many = Client::dial(&mesh, 0).await;
    many.raw.text(&"{}\n".repeat(100_000)).await;
    assert_eq!(many.end().await, 3501);
}
