//! The lean NATS connection: who it says it is, TLS, and what it says when a connection breaks. That it delivers, every other
//! test shows.

use std::{path::Path, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::StreamExt as _;
use natter::testing::{
    bus::{Line, LineError},
    servers::{Process, Spec, free_port},
};
use nkeys::KeyPair;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    self, LONG, binaries, config, dedicated_nats, eventually, launcher,
    mesh::{SECRET, answers, token},
    natter, natter_command, signal,
};

const KEYS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/keys");

/// A JWT as NATS has them: <https://docs.nats.io/running-a-nats-service/nats_admin/security/jwt>.
fn jwt(issuer: &KeyPair, subject: &KeyPair, kind: &str, nats: Value) -> String {
    let mut claims = json!({
        "jti": "none", "iat": 1_700_000_000, "iss": issuer.public_key(), "sub": subject.public_key(), "name": kind,
        "nats": {"type": kind, "version": 2},
    });
    for (key, value) in nats.as_object().unwrap() {
        claims["nats"][key] = value.clone();
    }
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!(
        "{}.{}",
        encode(&json!({"typ": "JWT", "alg": "ed25519-nkey"})),
        encode(&claims)
    );
    let signature = URL_SAFE_NO_PAD.encode(issuer.sign(signed.as_bytes()).unwrap());
    format!("{signed}.{signature}")
}

/// The configuration of a server with TLS that knows users by their JWT, and the credentials of one of them.
fn secured(dir: &Path, port: u16, monitor: u16) -> (String, String) {
    let (operator, user) = (KeyPair::new_operator(), KeyPair::new_user());
    let (account, system) = (KeyPair::new_account(), KeyPair::new_account());
    let all = json!({"limits": {
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
        "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
    }});
    let operator_jwt = jwt(&operator, &operator, "operator", json!({}));
    let system_jwt = jwt(&operator, &system, "account", json!({}));
    let account_jwt = jwt(&operator, &account, "account", all);
    let any = json!({"pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1});
    let user_jwt = jwt(&account, &user, "user", any);
    let store = dir.join("js");
    let config = format!(
        "listen: 127.0.0.1:{port}\nhttp: 127.0.0.1:{monitor}\njetstream {{ store_dir: {store:?} }}\n\
         operator: {operator_jwt}\nsystem_account: {system}\nresolver: MEMORY\n\
         resolver_preload: {{ {account}: {account_jwt}, {system}: {system_jwt} }}\n\
         tls {{ cert_file: \"{KEYS}/nats-server.pem\", key_file: \"{KEYS}/nats-server.key\" }}\n",
        account = account.public_key(),
        system = system.public_key(),
    );
    let credentials = format!(
        "-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
        user.seed().unwrap()
    );
    (config, credentials)
}

#[tokio::test]
async fn an_edge_serves_over_tls_with_credentials() {
    let dir = tempfile::tempdir().unwrap();
    let [port, monitor, web] = [(); 3].map(|()| free_port().unwrap());
    let (server, credentials) = secured(dir.path(), port, monitor);
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("nats.conf"), server).unwrap();
    std::fs::write(path("user.creds"), credentials).unwrap();
    let monitor = std::net::SocketAddr::from(([127, 0, 0, 1], monitor));
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], web));
    let spec = |name: &str, program, args, env, ready| Spec {
        name: name.to_owned(),
        program,
        args,
        env,
        log: path(&format!("{name}.log")),
        ready,
        alive: Arc::new(|_pid| Box::pin(async { Ok(()) })),
        ready_within: LONG,
        stop_within: LONG,
    };
    let program = binaries().await.nats_server.clone();
    let args = vec!["-c".into(), path("nats.conf").into()];
    let ready = answers(monitor, "/healthz");
    let mut nats = Process::new(launcher(), spec("nats", program, args, Vec::new(), ready));
    nats.start().await.unwrap();

    let toml = format!(
        "[nats]\nurl = \"tls://localhost:{port}\"\ncreds_file = {:?}\n[auth]\nhs256_secret = \"{SECRET}\"\n[edge]\nlisten = \"{address}\"\nshards = 1\n",
        path("user.creds")
    );
    std::fs::write(path("natter.toml"), toml).unwrap();
    let trusted = ("SSL_CERT_FILE".to_owned(), format!("{KEYS}/nats-ca.pem"));
    let mut provision = natter_command(dir.path()).await;
    provision
        .args(["provision", "--config", "natter.toml"])
        .env(&trusted.0, &trusted.1);
    let provisioned = tokio::task::spawn_blocking(move || provision.output())
        .await
        .unwrap()
        .unwrap();
    assert!(provisioned.status.success(), "{provisioned:?}");

    let args = vec!["edge".into(), "--config".into(), path("natter.toml").into()];
    let ready = answers(address, "/readyz");
    let mut edge = Process::new(
        launcher(),
        spec("edge", natter(), args, vec![trusted], ready),
    );
    edge.start().await.unwrap();
    let endpoint = format!("ws://{address}/ws").parse().unwrap();
    let mut kim = natter::testing::client::Connection::open(&endpoint, Some(&token("kim")))
        .await
        .unwrap();
    kim.commands()
        .call("join", json!({"room": "chat:safe"}))
        .await
        .unwrap();
    let fields = json!({"room": "chat:safe", "id": "1", "body": "hello"});
    kim.commands().call("send", fields).await.unwrap();
    let push = tokio::time::timeout(LONG, kim.next())
        .await
        .unwrap()
        .unwrap();
    assert!(format!("{push:?}").contains("hello"), "{push:?}");

    // A server that nobody vouches for is not talked to.
    let text = format!(
        "[nats]\nurl = \"tls://localhost:{port}\"\ncreds_file = {:?}\n",
        path("user.creds")
    );
    let (line, driver) = Line::new(&config(&text).nats, "no trust").unwrap();
    let driving = tokio::spawn(driver.run(()));
    let ready = tokio::time::timeout(Duration::from_secs(2), line.ready()).await;
    assert!(ready.is_err() && !line.is_up(), "the certificate was taken");
    driving.abort();
}

#[test]
fn what_is_no_credentials_file_is_said_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("user.creds");
    let text = format!("[nats]\ncreds_file = {file:?}\n");
    let nats = config(&text).nats;
    for content in [
        None,
        Some(""),
        Some("-----BEGIN NATS USER JWT-----\nx\n------END NATS USER JWT------\n"),
    ] {
        if let Some(content) = content {
            std::fs::write(&file, content).unwrap();
        }
        let error = Line::new(&nats, "nobody").map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("nats.creds_file"), "{error}");
    }
}

#[tokio::test]
async fn what_is_in_flight_when_the_connection_breaks_is_lost_and_what_comes_later_is_refused() {
    let mut nats = dedicated_nats().await;
    let text = format!("[nats]\nurl = {:?}\n", nats.url());
    let (line, driver) = Line::new(&config(&text).nats, "lost").unwrap();
    assert!(matches!(line.round_trip().await, Err(LineError::Down)));
    let driving = tokio::spawn(driver.run(()));
    line.ready().await;
    line.round_trip().await.unwrap();
    let nobody = line.request("nobody.at.all", |_| {}, b"", LONG).await;
    assert!(matches!(nobody, Err(LineError::NoResponders)), "{nobody:?}");
    let huge = line.publish("any", |_| {}, &vec![0; 9 << 20]);
    assert!(matches!(huge, Err(LineError::TooLarge { .. })), "{huge:?}");

    // A server that stands still answers nothing: the request's own time is up before the connection is given up.
    let pid = nats.server.pid().unwrap();
    signal(pid, Signal::STOP);
    let within = Duration::from_millis(300);
    let late = line.request("$JS.API.INFO", |_| {}, b"", within).await;
    assert!(
        matches!(late, Err(LineError::Timeout(t)) if t == within),
        "{late:?}"
    );
    // It is killed with a request on its way.
    let (asked, ()) = tokio::join!(line.request("$JS.API.INFO", |_| {}, b"", LONG), async {
        signal(pid, Signal::KILL);
    });
    assert!(matches!(asked, Err(LineError::Lost)), "{asked:?}");
    assert!(matches!(
        line.publish("any", |_| {}, b""),
        Err(LineError::Down)
    ));
    nats.server.restart().await.unwrap();
    eventually("it is back", LONG, async || {
        line.round_trip().await.map_err(|error| error.to_string())
    })
    .await;
    assert_eq!(line.generation(), 2);
    line.close().await;
    driving.await.unwrap();
    assert!(!line.is_up());
}

#[tokio::test]
async fn what_is_put_off_arrives_in_order_also_before_the_end() {
    let subject = format!("later.{}", rand::random::<u64>());
    let url = support::nats_url();
    let client = async_nats::connect(url).await.unwrap();
    let mut heard = client.subscribe(subject.clone()).await.unwrap();
    client.flush().await.unwrap();
    let text = format!("[nats]\nurl = {url:?}\n");
    let (line, driver) = Line::new(&config(&text).nats, "later").unwrap();
    assert!(matches!(
        line.publish_later(&subject, b""),
        Err(LineError::Down)
    ));
    let driving = tokio::spawn(driver.run(()));
    line.ready().await;
    let mut expect = async |from: usize, to: usize| {
        for number in from..to {
            let message = tokio::time::timeout(LONG, heard.next())
                .await
                .unwrap()
                .unwrap();
            assert_eq!(message.payload, number.to_string());
        }
    };
    // Nothing else is written that could take it along.
    for round in 0..3 {
        let (from, to) = (round * 100, (round + 1) * 100);
        for number in from..to {
            line.publish_later(&subject, number.to_string().as_bytes())
                .unwrap();
        }
        expect(from, to).await;
    }
    let huge = line.publish_later(&subject, &vec![0; 9 << 20]);
    assert!(matches!(huge, Err(LineError::TooLarge { .. })), "{huge:?}");
    line.publish_later(&subject, b"300").unwrap();
    line.close().await;
    expect(300, 301).await;
    driving.await.unwrap();
}
