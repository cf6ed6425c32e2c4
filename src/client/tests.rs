//! The client against an edge that follows a script.

use std::{future::ready, net::SocketAddr, time::Duration};

use bytes::Bytes;
use fastwebsockets::{FragmentCollector, Frame as WireFrame, OpCode, Payload, upgrade::upgrade};
use http_body_util::Empty;
use hyper::{
    Request, Response, StatusCode, body::Incoming, header::SEC_WEBSOCKET_PROTOCOL,
    service::service_fn, upgrade::Upgraded,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};

use super::{publisher::PublishError, *};

const DEADLINE: Duration = Duration::from_secs(10);

/// Accepts sessions and hands them to the test, which plays the edge.
struct FakeEdge {
    address: SocketAddr,
    sessions: mpsc::Receiver<FakeSession>,
}

struct FakeSession(FragmentCollector<TokioIo<Upgraded>>);

impl FakeEdge {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (accepted, sessions) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let accepted = accepted.clone();
                let service = service_fn(move |request| ready(welcome(request, accepted.clone())));
                let http = hyper::server::conn::http1::Builder::new();
                let serving = http.serve_connection(TokioIo::new(socket), service);
                tokio::spawn(serving.with_upgrades());
            }
        });
        Self { address, sessions }
    }

    fn endpoint(&self) -> Endpoint {
        format!("ws://{}/ws", self.address).parse().unwrap()
    }

    async fn session(&mut self) -> FakeSession {
        let session = timeout(DEADLINE, self.sessions.recv()).await;
        session.expect("nobody connected").unwrap()
    }
}

fn welcome(
    mut request: Request<Incoming>,
    accepted: mpsc::Sender<FakeSession>,
) -> Result<Response<Empty<Bytes>>, hyper::http::Error> {
    if request.headers()["authorization"] != "Bearer good" {
        return Response::builder()
            .status(StatusCode::UNAUTHORIZED)
            .body(Empty::new());
    }
    let (mut response, upgraded) = upgrade(&mut request).unwrap();
    response
        .headers_mut()
        .insert(SEC_WEBSOCKET_PROTOCOL, "natter.v1".parse().unwrap());
    tokio::spawn(async move {
        let mut socket = upgraded.await.unwrap();
        socket.set_auto_pong(false);
        let socket = FragmentCollector::new(socket);
        accepted.send(FakeSession(socket)).await.ok();
    });
    Ok(response)
}

impl FakeSession {
    async fn command(&mut self) -> Value {
        let frame = timeout(DEADLINE, self.0.read_frame()).await;
        let frame = frame.expect("no command came").unwrap();
        assert_eq!(frame.opcode, OpCode::Text, "expected a command");
        serde_json::from_slice(&frame.payload).unwrap()
    }

    async fn say(&mut self, frame: Value) {
        let text = Payload::Owned(frame.to_string().into_bytes());
        self.0.write_frame(WireFrame::text(text)).await.unwrap();
    }

    async fn close(&mut self, code: u16) {
        let frame = WireFrame::close(code, b"because");
        self.0.write_frame(frame).await.unwrap();
    }

    /// Answers a join as if the room were at `cursor`, and returns the join.
    async fn join(&mut self, cursor: &str, replay: u64) -> Value {
        let join = self.command().await;
        assert_eq!(join["op"], "join");
        self.say(json!({"op":"joined","rid":join["rid"],"room":"chat:a","cursor":cursor,"head":cursor,"replay":replay}))
            .await;
        join
    }

    async fn message(&mut self, cursor: &str) {
        self.say(json!({"op":"msg","room":"chat:a","id":cursor,"from":"kim","ts":1,"cursor":cursor,"body":{"text":"안녕"}}))
            .await;
    }
}

fn target(edges: &[&FakeEdge], token: &str) -> Target {
    Target {
        backoff: Backoff {
            base: Duration::from_millis(5),
            cap: Duration::from_millis(50),
        },
        ..Target::new(
            edges.iter().map(|edge| edge.endpoint()).collect(),
            Token::Fixed(token.to_owned()),
        )
    }
}

async fn next(room: &mut Room) -> Event {
    let event = timeout(DEADLINE, room.next()).await;
    event.expect("no event came").expect("the events ended")
}

/// The next event that is not about the connection.
async fn news(room: &mut Room) -> Event {
    loop {
        match next(room).await {
            Event::Disconnected { .. } | Event::Reconnected { .. } => {}
            event => return event,
        }
    }
}

fn joined(cursor: &str, replay: u64) -> Event {
    Event::Joined {
        cursor: Some(cursor.to_owned()),
        replay,
        reset: None,
    }
}

fn cursor_of(event: &Event) -> String {
    match event {
        Event::Message(frame) => frame.json()["cursor"].as_str().unwrap().to_owned(),
        other => panic!("expected a message, not {other:?}"),
    }
}

#[tokio::test]
async fn replies_go_to_their_callers_and_the_rest_stays_in_order() {
    let mut edge = FakeEdge::start().await;
    let mut connection = Connection::open(&edge.endpoint(), Some("good"))
        .await
        .unwrap();
    let mut session = edge.session().await;
    let commands = connection.commands().clone();
    let calls = tokio::spawn(async move {
        let first = commands.call("ping", json!({}));
        let second = commands.call("leave", json!({"room": "chat:b"}));
        tokio::join!(first, second)
    });
    let (a, b) = (session.command().await, session.command().await);
    session.say(json!({"op":"msg","n":1})).await;
    let refusal = json!({"op":"error","rid":b["rid"],"code":"not_joined","message":"m"});
    session.say(refusal).await;
    session.say(json!({"op":"msg","n":2})).await;
    session.say(json!({"op":"pong","rid":a["rid"]})).await;
    session
        .say(json!({"op":"error","rid":null,"code":"bad_json","message":"m"}))
        .await;

    let (pong, left) = calls.await.unwrap();
    assert_eq!(pong.unwrap().op(), "pong");
    assert!(matches!(left, Err(CallError::Refused(refusal)) if refusal.code == "not_joined"));
    let mut rest = Vec::new();
    for _ in 0..3 {
        rest.push(connection.next().await.unwrap());
    }
    assert_eq!(rest[0].json()["n"], 1);
    assert_eq!(rest[1].json()["n"], 2);
    assert_eq!(rest[2].refusal().unwrap().code, "bad_json");
}

#[tokio::test]
async fn replies_nobody_waits_for_come_with_the_pushes() {
    let mut edge = FakeEdge::start().await;
    let mut connection = Connection::open(&edge.endpoint(), Some("good"))
        .await
        .unwrap();
    let mut session = edge.session().await;
    let mut rids = Vec::new();
    for _ in 0..300 {
        rids.push(connection.commands().send("ping", json!({})).await.unwrap());
    }
    for rid in &rids {
        assert_eq!(session.command().await["rid"], *rid);
        session.say(json!({"op":"pong","rid":rid})).await;
    }
    for rid in rids {
        assert_eq!(connection.next().await.unwrap().rid(), Some(rid));
    }
}

#[tokio::test]
async fn close_code_reaches_everybody_who_waits() {
    let mut edge = FakeEdge::start().await;
    let mut connection = Connection::open(&edge.endpoint(), Some("good"))
        .await
        .unwrap();
    let mut session = edge.session().await;
    let commands = connection.commands().clone();
    let call = tokio::spawn(async move { commands.call("ping", json!({})).await });
    session.command().await;
    session.message("c1").await;
    session.close(4010).await;
    let expected = End {
        code: 4010,
        reason: "because".to_owned(),
    };
    assert_eq!(
        call.await.unwrap(),
        Err(CallError::Closed(expected.clone()))
    );
    assert_eq!(connection.next().await.unwrap().op(), "msg");
    assert_eq!(connection.next().await, None);
    assert_eq!(connection.end(), Some(expected.clone()));
    let late = connection.commands().call("ping", json!({})).await;
    assert_eq!(late, Err(CallError::Closed(expected)));
}

#[tokio::test]
async fn cut_connection_is_1006() {
    let mut edge = FakeEdge::start().await;
    let mut connection = Connection::open(&edge.endpoint(), Some("good"))
        .await
        .unwrap();
    drop(edge.session().await);
    assert_eq!(connection.next().await, None);
    assert_eq!(connection.end().unwrap().code, 1006);
}

#[tokio::test]
async fn dropped_connection_fails_its_calls_and_cuts_the_socket() {
    let mut edge = FakeEdge::start().await;
    let connection = Connection::open(&edge.endpoint(), Some("good"))
        .await
        .unwrap();
    let commands = connection.commands().clone();
    let call = tokio::spawn(async move { commands.call("ping", json!({})).await });
    let mut session = edge.session().await;
    session.command().await;
    drop(connection);
    assert!(matches!(call.await.unwrap(), Err(CallError::Closed(_))));
    let read = timeout(DEADLINE, session.0.read_frame()).await.unwrap();
    assert!(read.is_err());
}

#[tokio::test]
async fn close_shakes_hands() {
    let mut edge = FakeEdge::start().await;
    let connection = Connection::open(&edge.endpoint(), Some("good"))
        .await
        .unwrap();
    let mut session = edge.session().await;
    let closing = tokio::spawn(connection.close());
    let frame = session.0.read_frame().await.unwrap();
    assert_eq!(
        (frame.opcode, &frame.payload[..]),
        (OpCode::Close, &[3, 232][..])
    );
    assert_eq!(closing.await.unwrap().code, 1000);
}

#[tokio::test]
async fn room_resumes_at_its_cursor_on_the_other_edge() {
    let (mut one, mut two) = (FakeEdge::start().await, FakeEdge::start().await);
    let mut room = Room::follow(target(&[&one, &two], "good"), "chat:a", None);
    let mut session = one.session().await;
    let join = session.join("c0", 0).await;
    assert_eq!(join.get("since"), None);
    session.message("c1").await;
    session.message("c2").await;
    assert_eq!(next(&mut room).await, joined("c0", 0));
    assert_eq!(cursor_of(&next(&mut room).await), "c1");
    assert_eq!(cursor_of(&next(&mut room).await), "c2");
    drop(session);

    let mut session = two.session().await;
    let join = session.join("c2", 1).await;
    assert_eq!(join["since"], "c2");
    session.message("c3").await;
    assert!(matches!(next(&mut room).await, Event::Disconnected { .. }));
    assert!(
        matches!(next(&mut room).await, Event::Reconnected { url } if url == two.endpoint().to_string())
    );
    assert_eq!(next(&mut room).await, joined("c2", 1));
    assert_eq!(cursor_of(&next(&mut room).await), "c3");
}

#[tokio::test]
async fn recreated_room_is_rejoined_with_the_cursor() {
    let mut edge = FakeEdge::start().await;
    let since = Some("old".to_owned());
    let mut room = Room::follow(target(&[&edge], "good"), "chat:a", since);
    let mut session = edge.session().await;
    assert_eq!(session.join("old", 0).await["since"], "old");
    session
        .say(json!({"op":"kicked","room":"chat:other","code":"closed"}))
        .await;
    session
        .say(json!({"op":"kicked","room":"chat:a","code":"reset"}))
        .await;
    let join = session.command().await;
    assert_eq!(join["since"], "old");
    let reset = json!({"op":"joined","rid":join["rid"],"room":"chat:a","cursor":"new","head":"new","replay":0,"reset":true,"reason":"epoch"});
    session.say(reset).await;
    session.message("n1").await;
    assert_eq!(next(&mut room).await, joined("old", 0));
    assert!(matches!(next(&mut room).await, Event::Other(_)));
    assert_eq!(
        next(&mut room).await,
        Event::Joined {
            cursor: Some("new".to_owned()),
            replay: 0,
            reset: Some("epoch".to_owned())
        }
    );
    assert_eq!(cursor_of(&next(&mut room).await), "n1");
}

#[tokio::test]
async fn draining_edge_is_left_when_it_says() {
    let (mut one, mut two) = (FakeEdge::start().await, FakeEdge::start().await);
    let mut room = Room::follow(target(&[&one, &two], "good"), "chat:a", None);
    let mut session = one.session().await;
    session.join("c0", 0).await;
    session.say(json!({"op":"reconnect","after_ms":30})).await;
    session.message("c1").await;
    let frame = session.0.read_frame().await.unwrap();
    assert_eq!(frame.opcode, OpCode::Close);
    let mut other = two.session().await;
    assert_eq!(other.join("c1", 0).await["since"], "c1");
    assert_eq!(news(&mut room).await, joined("c0", 0));
    assert_eq!(cursor_of(&news(&mut room).await), "c1");
    assert_eq!(news(&mut room).await, joined("c1", 0));
}

#[tokio::test]
async fn join_is_repeated_when_the_edge_says_retry() {
    let mut edge = FakeEdge::start().await;
    let mut room = Room::follow(target(&[&edge], "good"), "chat:a", None);
    let mut session = edge.session().await;
    let join = session.command().await;
    let unavailable =
        json!({"op":"error","rid":join["rid"],"code":"unavailable","message":"m","retry":true});
    session.say(unavailable).await;
    session.join("c0", 0).await;
    assert_eq!(next(&mut room).await, joined("c0", 0));
}

#[tokio::test]
async fn what_can_not_get_better_stops() {
    let mut edge = FakeEdge::start().await;
    let mut room = Room::follow(target(&[&edge], "bad"), "chat:a", None);
    let event = next(&mut room).await;
    assert!(matches!(event, Event::Stopped(Stop::Token(_))), "{event:?}");
    assert_eq!(room.next().await, None);

    let mut room = Room::follow(target(&[&edge], "good"), "chat:a", None);
    let mut session = edge.session().await;
    session.join("c0", 0).await;
    session.close(4002).await;
    assert_eq!(next(&mut room).await, joined("c0", 0));
    let event = next(&mut room).await;
    assert!(
        matches!(event, Event::Stopped(Stop::Closed(End { code: 4002, .. }))),
        "{event:?}"
    );

    let mut room = Room::follow(target(&[&edge], "good"), "chat:a", None);
    let mut session = edge.session().await;
    let join = session.command().await;
    session
        .say(json!({"op":"error","rid":join["rid"],"code":"forbidden","message":"m","retry":false}))
        .await;
    let event = next(&mut room).await;
    assert!(matches!(event, Event::Stopped(Stop::Join(_))), "{event:?}");
}

#[tokio::test]
async fn publish_repeats_the_same_id_until_acked() {
    let (mut one, mut two) = (FakeEdge::start().await, FakeEdge::start().await);
    let publisher = Publisher::open(target(&[&one, &two], "good"));
    let draft = Draft::new("chat:a", json!({"text": "hi"}));
    let id = draft.id.clone();
    let publishing = tokio::spawn(async move { publisher.publish(&draft).await });

    let mut session = one.session().await;
    let send = session.command().await;
    assert_eq!((&send["op"], &send["id"]), (&json!("send"), &json!(id)));
    let unknown =
        json!({"op":"error","rid":send["rid"],"code":"unknown_outcome","message":"m","retry":true});
    session.say(unknown).await;
    assert_eq!(session.command().await["id"], json!(id));
    drop(session);
    let mut session = two.session().await;
    let send = session.command().await;
    assert_eq!(send["id"], json!(id));
    let ack = json!({"op":"ack","rid":send["rid"],"room":"chat:a","id":id,"cursor":"c9","ts":5,"dup":true});
    session.say(ack).await;
    let acked = publishing.await.unwrap().unwrap();
    assert_eq!((acked.cursor.as_deref(), acked.dup), (Some("c9"), true));
}

#[tokio::test]
async fn publish_gives_up_where_retry_is_pointless_or_patience_ends() {
    let mut edge = FakeEdge::start().await;
    let publisher = Publisher::open(target(&[&edge], "good"));
    let draft = Draft::new("chat:a", json!(null));
    let publishing = tokio::spawn({
        let (publisher, draft) = (publisher.clone(), draft.clone());
        async move { publisher.publish(&draft).await }
    });
    let mut session = edge.session().await;
    let send = session.command().await;
    session
        .say(json!({"op":"error","rid":send["rid"],"code":"too_large","message":"m","retry":false}))
        .await;
    let outcome = publishing.await.unwrap();
    assert!(
        matches!(outcome, Err(PublishError::Refused(_))),
        "{outcome:?}"
    );

    let impatient = publisher.with_patience(Duration::from_millis(50));
    let outcome = impatient.publish(&draft).await;
    assert!(
        matches!(outcome, Err(PublishError::GaveUp { .. })),
        "{outcome:?}"
    );
}

/// The opcode of the client's next frame; `None` once the connection is cut.
async fn heard(session: &mut FakeSession) -> Option<OpCode> {
    let frame = timeout(DEADLINE, session.0.read_frame()).await;
    frame
        .expect("nothing was sent, and nothing cut")
        .ok()
        .map(|frame| frame.opcode)
}

#[test]
fn silence_is_noticed_within_forty_seconds_and_an_edge_that_pings_is_not_asked() {
    let Silence {
        ask_after,
        answer_within,
    } = Silence::default();
    assert!(ask_after + answer_within < Duration::from_secs(40));
    // An edge pings every 25 s, and checks once a second whether a ping is due.
    assert!(ask_after > Duration::from_secs(26));
}

#[tokio::test]
async fn a_frozen_connection_is_left_and_what_waits_goes_over_the_next_one() {
    let (mut one, mut two) = (FakeEdge::start().await, FakeEdge::start().await);
    let mut target = target(&[&one, &two], "good");
    target.silence = Silence {
        ask_after: Duration::from_millis(300),
        answer_within: Duration::from_millis(300),
    };
    let mut room = Room::follow(target, "chat:a", None);
    let mut frozen = one.session().await;
    frozen.join("c0", 0).await;
    frozen.message("c1").await;
    assert_eq!(next(&mut room).await, joined("c0", 0));
    assert_eq!(cursor_of(&next(&mut room).await), "c1");
    let publisher = room.publisher();
    let draft = Draft::new("chat:a", json!({"text": "hi"}));
    let id = draft.id.clone();
    let publishing = tokio::spawn(async move { publisher.publish(&draft).await });
    // It neither answers nor closes.
    assert_eq!(heard(&mut frozen).await, Some(OpCode::Text));
    assert_eq!(heard(&mut frozen).await, Some(OpCode::Ping));
    assert_eq!(heard(&mut frozen).await, None);
    let mut session = two.session().await;
    assert_eq!(session.join("c1", 0).await["since"], "c1");
    let send = session.command().await;
    assert_eq!((&send["op"], &send["id"]), (&json!("send"), &json!(id)));
    let ack = json!({"op":"ack","rid":send["rid"],"room":"chat:a","id":id,"cursor":"c2","ts":5});
    session.say(ack).await;
    assert_eq!(publishing.await.unwrap().unwrap().id, id);
}

#[tokio::test]
async fn a_quiet_connection_that_answers_stays() {
    let mut edge = FakeEdge::start().await;
    let silence = Silence {
        ask_after: Duration::from_millis(20),
        answer_within: DEADLINE,
    };
    let connection = Connection::open_with(&edge.endpoint(), Some("good"), silence)
        .await
        .unwrap();
    let mut session = edge.session().await;
    for _ in 0..5 {
        assert_eq!(heard(&mut session).await, Some(OpCode::Ping));
        let pong = WireFrame::pong(Payload::Borrowed(&[]));
        session.0.write_frame(pong).await.unwrap();
    }
    assert_eq!(connection.end(), None);
}
