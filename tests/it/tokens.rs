//! How a token is handed over, which ones are taken, and what happens when it ends.

use std::{net::SocketAddr, time::Duration};

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use natter::testing::{
    auth::{Block, Claims, Grant, Revocation, Right},
    bus::{self, Bucket, Put, Reader},
    client::{ConnectError, Connection},
    runtime::{unix_ms, unix_s},
    subject::{ControlKey, bucket},
};
use serde_json::{Value, json};

use crate::support::{
    self,
    calls::{command, next, reply},
    eventually,
    mesh::{Mesh, SECRET, token, token_with},
    raw::{Dial, Raw, bearer, request},
};

/// Keys of these tests only.
mod keys {
    pub(super) const RSA_PRIVATE: &str = include_str!("keys/rsa_private.pem");
    pub(super) const RSA_PUBLIC: &str = include_str!("keys/rsa_public.pem");
    pub(super) const EC_PRIVATE: &str = include_str!("keys/ec_private.pem");
    pub(super) const EC_PUBLIC: &str = include_str!("keys/ec_public.pem");
    pub(super) const ED_PRIVATE: &str = include_str!("keys/ed_private.pem");
    pub(super) const ED_PUBLIC: &str = include_str!("keys/ed_public.pem");
}

async fn dial(address: SocketAddr, headers: &str) -> Raw {
    let dial = Dial {
        headers,
        ..Dial::default()
    };
    Raw::dial(address, dial).await
}

fn everything() -> Vec<Grant> {
    vec![Grant::new("*:*", &Right::ALL)]
}

/// A token that ends in `seconds`.
fn short(user: &str, seconds: u64) -> String {
    token_with(user, Duration::from_secs(seconds), everything())
}

/// Reads to the end; gives the frames before it and the close code.
async fn end(connection: &mut Connection) -> (Vec<Value>, u16) {
    let mut frames = Vec::new();
    let read = async {
        while let Some(frame) = connection.next().await {
            frames.push(frame.json());
        }
    };
    tokio::time::timeout(support::LONG, read)
        .await
        .expect("the connection does not end");
    (frames, connection.end().unwrap().code)
}

#[tokio::test]
async fn a_token_comes_in_the_header_the_subprotocols_or_the_first_frame() {
    let toml = "auth.leeway = '0s'\nauth.first_frame_timeout = '1s'";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let address = mesh.edges[0].address;
    let good = token("kim");
    let forged = format!("{}x", token("kim"));
    let ping = json!({"op": "ping", "rid": 1});
    let pong = json!({"op": "pong", "rid": 1});

    // In the header. A bad one is told by the status of the handshake.
    let mut kim = dial(address, &bearer(&good)).await;
    assert_eq!(kim.status(), 101, "{}", kim.head);
    assert_eq!(
        kim.header("sec-websocket-protocol"),
        None,
        "none was offered"
    );
    assert_eq!(kim.call(ping.clone()).await, pong);
    for bad in [&forged, "", "x", "a.b.c", &good.replace('.', "")] {
        let refused = Connection::open(&mesh.endpoint(0), Some(bad)).await;
        let Err(refused) = refused else {
            panic!("{bad:?} was taken")
        };
        match refused {
            ConnectError::Refused {
                status, message, ..
            } => {
                assert_eq!(status, 401, "{message}");
                let body: Value = serde_json::from_str(&message).unwrap();
                assert_eq!(body["code"], "unauthorized");
                assert_eq!(body["retry"], json!(false));
            }
            other => panic!("{other}"),
        }
    }

    // In the list of subprotocols, as browsers must. A bad one is told by a close code, for a script can't see a status.
    for list in [
        format!("Sec-WebSocket-Protocol: natter.v1, bearer.{good}\r\n"),
        format!("Sec-WebSocket-Protocol: bearer.{good},natter.v1\r\n"),
        format!(
            "Sec-WebSocket-Protocol: natter.v1\r\nSec-WebSocket-Protocol: other, bearer.{good}\r\n"
        ),
    ] {
        let mut kim = dial(address, &list).await;
        assert_eq!(kim.status(), 101, "{}", kim.head);
        assert_eq!(kim.header("sec-websocket-protocol"), Some("natter.v1"));
        assert_eq!(kim.call(ping.clone()).await, pong);
    }
    let list = format!("Sec-WebSocket-Protocol: natter.v1, bearer.{forged}\r\n");
    let mut kim = dial(address, &list).await;
    assert_eq!(kim.status(), 101, "{}", kim.head);
    assert_eq!(kim.header("sec-websocket-protocol"), Some("natter.v1"));
    assert_eq!(
        kim.until_close().await,
        (vec![], 4001, "bad_token".to_owned())
    );

    // In the first frame.
    let mut kim = dial(address, "").await;
    let authed = kim
        .call(json!({"op": "auth", "rid": 1, "token": good}))
        .await;
    assert_eq!(
        (&authed["op"], &authed["user"]),
        (&json!("authed"), &json!("kim"))
    );
    assert!(authed["exp"].as_u64().unwrap() > unix_s());
    let again = kim
        .call(json!({"op": "auth", "rid": 2, "token": good}))
        .await;
    assert_eq!(again["code"], "bad_request");
    assert_eq!(kim.call(ping.clone()).await, pong);
    let mut kim = dial(address, "").await;
    kim.text(&json!({"op": "auth", "rid": 1, "token": forged}).to_string())
        .await;
    let (frames, code, _) = kim.until_close().await;
    assert_eq!(code, 4001);
    assert_eq!(frames.len(), 1);
    assert_eq!(
        (&frames[0]["rid"], &frames[0]["code"]),
        (&json!(1), &json!("unauthorized"))
    );

    // Another command first is refused, and what stays silent, or does not come to the point, is closed.
    let mut kim = dial(address, "").await;
    for op in [
        json!({"op": "ping", "rid": 5}),
        json!({"op": "join", "rid": 5, "room": "chat:a"}),
        json!({"op": "refresh", "rid": 5, "token": good}),
    ] {
        let error = kim.call(op).await;
        assert_eq!(error["code"], "unauthorized", "{error}");
        assert_eq!(error["retry"], json!(false));
    }
    assert_eq!(kim.until_close().await.1, 4001);
    let mut silent = dial(address, "").await;
    assert_eq!(
        silent.until_close().await,
        (vec![], 4001, "no_token".to_owned())
    );
    let late = mesh
        .metric(0, "natter_session_refused_total", "first_frame")
        .await;
    assert_eq!(late, 2);
}

#[tokio::test]
async fn tokens_signed_with_the_private_key_of_a_configured_public_key_are_taken() {
    type FromPem = fn(&[u8]) -> jsonwebtoken::errors::Result<EncodingKey>;
    let cases: [(Algorithm, FromPem, &str, &str); 3] = [
        (
            Algorithm::RS256,
            EncodingKey::from_rsa_pem,
            keys::RSA_PRIVATE,
            keys::RSA_PUBLIC,
        ),
        (
            Algorithm::ES256,
            EncodingKey::from_ec_pem,
            keys::EC_PRIVATE,
            keys::EC_PUBLIC,
        ),
        (
            Algorithm::EdDSA,
            EncodingKey::from_ed_pem,
            keys::ED_PRIVATE,
            keys::ED_PUBLIC,
        ),
    ];
    let mut claims = Claims::new("kim", unix_s() + 3600);
    claims.grants = everything();
    let sign = |(algorithm, from_pem, private, _): &(Algorithm, FromPem, &str, &str)| {
        let key = from_pem(private.as_bytes()).unwrap();
        encode(&Header::new(*algorithm), &claims, &key).unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    for (n, case) in cases.iter().enumerate() {
        let (algorithm, .., public) = case;
        let pem = dir.path().join(format!("{algorithm:?}.pem"));
        std::fs::write(&pem, public).unwrap();
        let toml = format!("auth.public_key_file = '{}'", pem.display());
        let mesh = Mesh::start(support::nats_url(), 1, &toml).await;
        let mut kim = Connection::open(&mesh.endpoint(0), Some(&sign(case)))
            .await
            .unwrap();
        let joined = reply(&mut kim, "join", json!({"room": "chat:a"})).await;
        assert_eq!(joined["op"], "joined", "{algorithm:?}: {joined}");
        // Its kind of key decides: a token of another kind has no key here, and the public key, which all know, is no
        // secret of HS256.
        let confused = EncodingKey::from_secret(public.as_bytes());
        let confused = encode(&Header::new(Algorithm::HS256), &claims, &confused).unwrap();
        for token in [sign(&cases[(n + 1) % cases.len()]), confused] {
            let answer = request(
                mesh.edges[0].address,
                "POST",
                "/v1/rooms/chat:a/messages",
                &bearer(&token),
                r#"{"body":1}"#,
            )
            .await;
            assert_eq!(answer.status, 401, "{algorithm:?}: {}", answer.body);
        }
    }
}

#[tokio::test]
async fn a_token_that_runs_out_is_announced_swapped_or_closed() {
    let mesh = Mesh::start(support::nats_url(), 1, "auth.leeway = '0s'").await;
    let open = async |token: &str| {
        Connection::open(&mesh.endpoint(0), Some(token))
            .await
            .unwrap()
    };
    // Not announced: an hour is left. The next frame is the reply.
    let mut long = mesh.connect(0, "kim").await;
    assert_eq!(command(&mut long, "ping", json!({})).await.len(), 1);

    let mut swaps = open(&short("kim", 8)).await;
    let told = next(&mut swaps).await.json();
    assert_eq!(told["op"], "token_expiring", "{told}");
    let exp = told["exp"].as_u64().unwrap();
    reply(&mut swaps, "join", json!({"room": "chat:a"})).await;
    let of_another = reply(&mut swaps, "refresh", json!({"token": token("lee")})).await;
    assert_eq!(of_another["code"], "forbidden", "{of_another}");
    let bad = reply(&mut swaps, "refresh", json!({"token": "x"})).await;
    assert_eq!(bad["code"], "unauthorized", "{bad}");
    // One that is short too is announced in its turn.
    let refreshed = reply(&mut swaps, "refresh", json!({"token": short("kim", 30)})).await;
    assert_eq!(refreshed["op"], "refreshed", "{refreshed}");
    let later = refreshed["exp"].as_u64().unwrap();
    assert!(later > exp);
    let told = next(&mut swaps).await.json();
    assert_eq!(told, json!({"op": "token_expiring", "exp": later}));
    let refreshed = reply(&mut swaps, "refresh", json!({"token": token("kim")})).await;
    assert_eq!(refreshed["op"], "refreshed", "{refreshed}");

    // Those whose tokens were not swapped, by header and by frame, are closed; later than the end of the first token.
    let mut by_header = open(&short("kim", 8)).await;
    let mut by_frame = Connection::open(&mesh.endpoint(0), None).await.unwrap();
    let frames = command(&mut by_frame, "auth", json!({"token": short("kim", 8)})).await;
    assert_eq!(frames.len(), 1, "authed before token_expiring: {frames:?}");
    for session in [&mut by_header, &mut by_frame] {
        let (frames, code) = end(session).await;
        assert_eq!(code, 4001);
        assert_eq!(frames.len(), 1, "{frames:?}");
        assert_eq!(frames[0]["op"], "token_expiring");
        assert!(unix_s() >= frames[0]["exp"].as_u64().unwrap());
    }
    assert!(
        unix_s() >= exp,
        "the first token of the swapped session has ended"
    );
    // Never disconnected, and still in its room.
    let frames = command(&mut swaps, "ping", json!({})).await;
    assert_eq!(frames.len(), 1, "{frames:?}");
    let ack = reply(&mut long, "send", json!({"room": "chat:a", "body": 1})).await;
    assert_eq!(ack["op"], "ack");
    assert_eq!(next(&mut swaps).await.json()["body"], json!(1));
    // An expired token opens nothing.
    let expired = token_with("kim", Duration::ZERO, everything());
    let refused = Connection::open(&mesh.endpoint(0), Some(&expired)).await;
    assert!(matches!(
        refused,
        Err(ConnectError::Refused { status: 401, .. })
    ));
}

#[tokio::test]
async fn a_refresh_that_loses_a_grant_leaves_the_room() {
    let mesh = Mesh::start(support::nats_url(), 1, "").await;
    let mut kim = mesh.connect(0, "kim").await;
    let mut lee = mesh.connect(0, "lee").await;
    for room in ["chat:a", "chat:b", "live:c"] {
        reply(&mut kim, "join", json!({"room": room})).await;
    }
    let hour = Duration::from_secs(3600);
    let less = token_with(
        "kim",
        hour,
        vec![Grant::new("chat:b", &[Right::Read, Right::Write])],
    );
    let refreshed = reply(&mut kim, "refresh", json!({"token": less})).await;
    assert_eq!(refreshed["op"], "refreshed", "{refreshed}");
    let mut kicked = [next(&mut kim).await.json(), next(&mut kim).await.json()];
    kicked.sort_by_key(|frame| frame["room"].as_str().map(str::to_owned));
    assert_eq!(
        kicked,
        [
            json!({"op": "kicked", "room": "chat:a", "code": "forbidden"}),
            json!({"op": "kicked", "room": "live:c", "code": "forbidden"}),
        ]
    );
    // What is said where it was does not reach it any more; the room that is left goes on.
    for room in ["chat:a", "live:c", "chat:b"] {
        let ack = reply(&mut lee, "send", json!({"room": room, "body": room})).await;
        assert_eq!(ack["op"], "ack", "{ack}");
    }
    assert_eq!(next(&mut kim).await.json()["body"], json!("chat:b"));
    for (op, room, code) in [
        ("leave", "chat:a", "not_joined"),
        ("join", "chat:a", "forbidden"),
        ("send", "chat:a", "forbidden"),
    ] {
        let error = reply(&mut kim, op, json!({"room": room, "body": 1})).await;
        assert_eq!(error["code"], code, "{op}: {error}");
    }
    // With the grant back it may come back.
    let refreshed = reply(&mut kim, "refresh", json!({"token": token("kim")})).await;
    assert_eq!(refreshed["op"], "refreshed");
    let joined = reply(&mut kim, "join", json!({"room": "chat:a"})).await;
    assert_eq!(joined["op"], "joined");
}

/// A token of kim with these claims besides those that it needs.
fn claiming(claims: Value) -> String {
    let mut all = json!({
        "sub": "kim", "exp": unix_s() + 3600, "grants": [{"rooms": "*:*", "can": ["read", "presence"]}]
    });
    let all_of = all.as_object_mut().unwrap();
    all_of.extend(claims.as_object().unwrap().clone());
    let secret = EncodingKey::from_secret(SECRET.as_bytes());
    encode(&Header::new(Algorithm::HS256), &all, &secret).unwrap()
}

/// What an edge says over HTTP to who comes with `token`.
async fn presence(mesh: &Mesh, token: &str) -> (u16, Value) {
    let (address, bearer) = (mesh.edges[0].address, bearer(token));
    let answer = request(address, "GET", "/v1/rooms/chat:a/presence", &bearer, "").await;
    (answer.status, serde_json::from_str(&answer.body).unwrap())
}

#[tokio::test]
async fn a_token_of_the_future_is_refused_wherever_it_comes() {
    let mesh = Mesh::start(support::nats_url(), 1, "").await;
    let now = unix_s();
    for near in [json!({"iat": now + 20}), json!({"iat": now as f64 + 0.5})] {
        assert_eq!(
            presence(&mesh, &claiming(near.clone())).await.0,
            200,
            "{near}"
        );
    }
    let mut kim = mesh.connect(0, "kim").await;
    for (claims, told) in [
        (json!({"iat": now + 3600}), "in the future"),
        (json!({"iat": now * 1000}), "looks like milliseconds"),
        (
            json!({"iat": now as f64 * 1000.5}),
            "looks like milliseconds",
        ),
        (json!({"iat": now.to_string()}), "not a string"),
        (json!({"iat": -1}), "unix seconds"),
        (json!({"exp": (now + 60) * 1000}), "looks like milliseconds"),
        (json!({"exp": (now + 60).to_string()}), "not a string"),
        (json!({"nbf": now * 1000}), "looks like milliseconds"),
        (json!({"nbf": now.to_string()}), "not a string"),
    ] {
        let token = claiming(claims.clone());
        let says = |error: &Value| {
            let message = error["message"].as_str().unwrap_or_default();
            let ok = error["code"] == "unauthorized" && message.contains(told);
            assert!(ok, "{claims}: {error}");
        };
        let (status, error) = presence(&mesh, &token).await;
        assert_eq!(status, 401, "{claims}: {error}");
        says(&error);
        match Connection::open(&mesh.endpoint(0), Some(&token)).await {
            Err(ConnectError::Refused {
                status, message, ..
            }) => {
                assert_eq!(status, 401, "{claims}: {message}");
                says(&serde_json::from_str(&message).unwrap());
            }
            Err(other) => panic!("{claims}: {other}"),
            Ok(_) => panic!("{claims}: it was let in"),
        }
        let list = format!("Sec-WebSocket-Protocol: natter.v1, bearer.{token}\r\n");
        let mut browser = dial(mesh.edges[0].address, &list).await;
        assert_eq!(browser.until_close().await.1, 4001, "{claims}");
        let mut first = Connection::open(&mesh.endpoint(0), None).await.unwrap();
        says(&reply(&mut first, "auth", json!({"token": token})).await);
        assert_eq!(end(&mut first).await.1, 4001, "{claims}");
        says(&reply(&mut kim, "refresh", json!({"token": token})).await);
    }
    assert_eq!(command(&mut kim, "ping", json!({})).await.len(), 1);
}

/// Also where the edge gives tokens some time after their end.
#[tokio::test]
async fn a_revoked_token_is_not_good_again_before_it_ends() {
    let toml = "auth.leeway = '3s'\nauth.first_frame_timeout = '1m'";
    let mesh = Mesh::start(support::nats_url(), 1, toml).await;
    let mut others = mesh.connect(0, "kim").await;
    // By its name; as one of the user's, issued before and by a clock that is ahead; said to be valid for less, as long, longer.
    let now = unix_s();
    let tokens = ["1s", "4s", "1h"].map(|time| {
        let claims = |user: &str, ahead: u64| {
            json!({"sub": format!("{user}-{time}"), "exp": now + 4, "iat": now + ahead, "jti": format!("{user}-{time}")})
        };
        [
            (claiming(claims("kim", 0)), vec!["--jti".to_owned(), format!("kim-{time}")], time),
            (claiming(claims("lee", 0)), vec!["--user".to_owned(), format!("lee-{time}")], time),
            (claiming(claims("eve", 2)), vec!["--user".to_owned(), format!("eve-{time}")], time),
        ]
    });
    let tokens = tokens.concat();
    for (token, _, _) in &tokens {
        assert_eq!(presence(&mesh, token).await.0, 200);
    }
    for (_, whose, time) in &tokens {
        let args = ["revoke", &whose[0], &whose[1], "--for", time];
        let output = mesh.command(&args).await.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {text}");
    }
    for (token, whose, _) in &tokens {
        eventually(
            "the token is refused",
            support::LONG,
            async || match presence(&mesh, token).await.0 {
                401 => Ok(()),
                status => Err(format!("{whose:?}: {status}")),
            },
        )
        .await;
    }
    // Refused from then on, until it is refused because it has ended.
    eventually("the tokens have expired", support::LONG, async || {
        let mut revoked = 0;
        for (token, whose, time) in &tokens {
            let (status, error) = presence(&mesh, token).await;
            assert_eq!(status, 401, "{whose:?} --for {time}: {error}");
            let handshake = Connection::open(&mesh.endpoint(0), Some(token)).await;
            assert!(handshake.is_err(), "{whose:?} --for {time}");
            let refreshed = reply(&mut others, "refresh", json!({"token": token})).await;
            assert_eq!(refreshed["code"], "unauthorized", "{refreshed}");
            revoked += usize::from(error["message"] == "the token is revoked");
        }
        match revoked {
            0 => Ok(()),
            some => Err(format!("{some} are said to be revoked")),
        }
    })
    .await;
}

/// What stands in the bucket is all that an edge knows which starts later.
#[tokio::test]
async fn what_was_revoked_for_longer_stays_so() {
    let mesh = Mesh::without_edges(support::nats_url(), "").await;
    let nats = &mesh.config.nats;
    let connection = bus::Connection::open(nats, "test").await.unwrap();
    let reader = Reader::new(connection.clone(), nats);
    let control = Bucket::new(connection, reader, &mesh.config, bucket::CONTROL);
    let revoke = async |args: &[&str]| {
        let args = [&["revoke"], args].concat();
        let output = mesh.command(&args).await.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {text}");
    };
    let stands = async |key: &ControlKey| {
        let entries = control.get(&[key.to_string()]).await.unwrap();
        let [entry] = &entries[..] else {
            panic!("{entries:?}")
        };
        entry.value.clone().unwrap()
    };
    for (flag, key) in [
        ("--user", ControlKey::RevokedUser("kim".to_owned())),
        ("--jti", ControlKey::RevokedToken("kim".to_owned())),
    ] {
        revoke(&[flag, "kim", "--for", "30d"]).await;
        let long: Revocation = serde_json::from_slice(&stands(&key).await).unwrap();
        revoke(&[flag, "kim", "--for", "1h"]).await;
        let now: Revocation = serde_json::from_slice(&stands(&key).await).unwrap();
        assert_eq!(now.until, long.until, "{flag}");
        assert!(now.before >= long.before, "{flag}");
        revoke(&[flag, "kim", "--for", "60d"]).await;
        let longer: Revocation = serde_json::from_slice(&stands(&key).await).unwrap();
        assert!(longer.until > long.until, "{flag}");
        // Left out: for good. And there is no way back.
        for args in [&[flag, "kim"][..], &[flag, "kim", "--for", "60d"]] {
            revoke(args).await;
            let now: Revocation = serde_json::from_slice(&stands(&key).await).unwrap();
            assert_eq!(now.until, u64::MAX, "{args:?}");
        }
    }

    // Blocked by a machine whose clock is ahead: the word that is said later counts all the same.
    let key = ControlKey::BlockedUser("kim".to_owned());
    let ahead = Block {
        blocked: true,
        at: unix_ms() + 3_600_000,
    };
    let value = serde_json::to_vec(&ahead).unwrap();
    control
        .put(&key.to_string(), value.into(), Put::default())
        .await
        .unwrap();
    revoke(&["--user", "kim", "--unblock"]).await;
    let now: Block = serde_json::from_slice(&stands(&key).await).unwrap();
    assert!(!now.blocked && now.at > ahead.at, "{now:?}");
    // What is no rule, or was removed, is replaced.
    control
        .put(&key.to_string(), "x".into(), Put::default())
        .await
        .unwrap();
    revoke(&["--user", "kim", "--block"]).await;
    control.remove(&key.to_string()).await.unwrap();
    revoke(&["--user", "kim", "--block"]).await;
    let now: Block = serde_json::from_slice(&stands(&key).await).unwrap();
    assert!(now.blocked, "{now:?}");
}
