//! `natter up` as a person or a program runs it: a process with signals, a data folder and children.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use natter::testing::mesh::provision;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{
    self, LONG,
    endpoint::{Endpoint, Say},
    eventually, is_running, mesh,
    up::{EDGES, Up, next_line, publish},
};

async fn all_gone(pids: &[u32]) {
    eventually("no process is left", LONG, async || {
        let left: Vec<_> = pids.iter().filter(|pid| is_running(**pid)).collect();
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    })
    .await;
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[tokio::test]
async fn it_runs_everything_and_leaves_nothing_when_it_is_told_to_stop() {
    for signal in [Signal::TERM, Signal::INT] {
        let data = folder();
        let up = Up::start(data.path(), &[]).await;
        let report = &up.report;
        assert_eq!(report["pid"], json!(up.child.0.id()));
        assert_eq!(report["regions"][0]["name"], "local");
        assert!(report["token"].as_str().unwrap().split('.').count() == 3);
        let pids = up.pids();
        // With nats-server, mongod, and history.
        assert_eq!(pids.len(), 4 + EDGES.parse::<usize>().unwrap());
        assert!(pids.iter().all(|pid| is_running(*pid)));
        assert_eq!(publish(up.nats(), "hi").await, 1);

        let mongodb = mongodb::Client::with_uri_str(report["mongodb"].as_str().unwrap())
            .await
            .unwrap();
        // What was said is in MongoDB soon.
        let messages = mongodb
            .database("natter")
            .collection::<mongodb::bson::Document>("messages");
        eventually("the message is in MongoDB", LONG, async || {
            match messages.find_one(mongodb::bson::doc! {}).await.unwrap() {
                Some(message) => {
                    assert_eq!(message.get_str("body").unwrap(), "hi");
                    Ok(())
                }
                None => Err("nothing".to_owned()),
            }
        })
        .await;
        let history = report["regions"][0]["history"][0]["http"].as_str().unwrap();
        let address = history.strip_prefix("http://").unwrap().parse().unwrap();
        let (status, metrics) = mesh::http(address, "GET", "/metrics", "", "")
            .await
            .unwrap();
        assert_eq!(status, 200);
        assert!(
            metrics.contains("natter_history_written_total"),
            "{metrics}"
        );

        assert!(up.end(signal).await.success());
        assert!(pids.iter().all(|pid| !is_running(*pid)), "{signal:?}");
        for lock in ["lock", "children.lock"] {
            assert!(!data.path().join(lock).exists(), "{lock} is left");
        }
    }
}

#[tokio::test]
async fn a_second_one_on_the_same_data_is_refused_by_name() {
    let data = folder();
    let first = Up::start(data.path(), &["--no-mongodb"]).await;
    assert_eq!(first.report["mongodb"], Value::Null);
    assert_eq!(first.report["mongod_pid"], Value::Null);
    assert_eq!(first.report["regions"][0]["history"], json!([]));
    let second = Up::command(data.path(), &["--no-mongodb"])
        .await
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(second.stdout.is_empty());
    let said = String::from_utf8(second.stderr).unwrap();
    let path = std::fs::canonicalize(data.path()).unwrap();
    assert!(said.contains(&*path.to_string_lossy()), "{said}");
    assert!(said.contains(&first.child.0.id().to_string()), "{said}");
    assert!(is_running(first.nats_pid()));
    assert!(first.end(Signal::TERM).await.success());
}

#[tokio::test]
async fn a_kill_takes_the_children_along_and_the_next_one_has_the_data() {
    let data = folder();
    let first = Up::start(data.path(), &[]).await;
    let (pids, url) = (first.pids(), first.nats().to_owned());
    let secret = std::fs::read(data.path().join("dev-secret")).unwrap();
    let mongodb = first.report["mongodb"].as_str().unwrap().to_owned();
    let port = |url: &str| {
        url.split(':')
            .nth(2)
            .unwrap()
            .split('/')
            .next()
            .unwrap()
            .to_owned()
    };
    let acknowledged = publish(&url, "before").await;
    first.end(Signal::KILL).await;

    // At once, on the same ports: it waits until the children of the first are gone. MongoDB gets another port, which
    // its replica set must follow.
    let flags = ["--nats-port", &port(&url)];
    let second = Up::start(data.path(), &flags).await;
    all_gone(&pids).await;
    assert_eq!(second.nats(), url, "the port was not free");
    assert_ne!(second.report["mongodb"].as_str().unwrap(), mongodb);
    assert_eq!(publish(&url, "after").await, acknowledged + 1);
    assert_eq!(
        std::fs::read(data.path().join("dev-secret")).unwrap(),
        secret
    );
    assert!(second.end(Signal::TERM).await.success());
}

#[tokio::test]
async fn a_child_that_dies_is_started_again_in_its_place() {
    let data = folder();
    let mut up = Up::start(data.path(), &[]).await;
    let before = up.report.clone();
    let acknowledged = publish(up.nats(), "before").await;
    support::signal(up.nats_pid(), Signal::KILL);
    up.next_line();
    assert_ne!(
        up.report["regions"][0]["nats_pid"],
        before["regions"][0]["nats_pid"]
    );
    assert_eq!(
        up.report["regions"][0]["nats"],
        before["regions"][0]["nats"]
    );
    assert_eq!(publish(up.nats(), "after").await, acknowledged + 1);

    let mongod = u32::try_from(up.report["mongod_pid"].as_u64().unwrap()).unwrap();
    support::signal(mongod, Signal::KILL);
    up.next_line();
    assert_ne!(up.report["mongod_pid"], before["mongod_pid"]);
    assert_eq!(up.report["mongodb"], before["mongodb"]);

    let edge = |report: &Value| report["regions"][0]["edges"][1].clone();
    let pid = u32::try_from(edge(&before)["pid"].as_u64().unwrap()).unwrap();
    support::signal(pid, Signal::KILL);
    up.next_line();
    assert_ne!(edge(&up.report)["pid"], edge(&before)["pid"]);
    for same in ["id", "http", "ws"] {
        assert_eq!(edge(&up.report)[same], edge(&before)[same]);
    }

    let history = |report: &Value| report["regions"][0]["history"][0].clone();
    let pid = u32::try_from(history(&before)["pid"].as_u64().unwrap()).unwrap();
    support::signal(pid, Signal::KILL);
    up.next_line();
    assert_ne!(history(&up.report)["pid"], history(&before)["pid"]);
    assert_eq!(history(&up.report)["http"], history(&before)["http"]);
    let other = &before["regions"][0]["edges"][0];
    assert_eq!(&up.report["regions"][0]["edges"][0], other);
    let pids = up.pids();
    assert!(up.end(Signal::TERM).await.success());
    assert!(pids.iter().all(|pid| !is_running(*pid)));
}

#[tokio::test]
async fn a_child_stays_dead_where_that_is_asked_for() {
    let data = folder();
    let up = Up::start(data.path(), &["--no-mongodb", "--no-restart"]).await;
    let nats = up.nats_pid();
    support::signal(nats, Signal::KILL);
    all_gone(&[nats]).await;
    // Nothing more comes on stdout until the end.
    let (url, mut lines) = (up.nats().to_owned(), up.lines);
    support::signal(up.child.0.id(), Signal::TERM);
    let mut line = String::new();
    tokio::task::spawn_blocking(move || {
        lines.read_line(&mut line).unwrap();
        assert_eq!(line, "");
        let mut child = up.child;
        assert!(child.0.wait().unwrap().success());
    })
    .await
    .unwrap();
    let mut config = support::config("");
    config.nats.url = url;
    provision::connect(&config.nats).await.unwrap_err();
}

/// The printed token opens the printed edges: a message posted there is in the room.
#[tokio::test]
async fn the_printed_token_is_good_for_the_printed_edges() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let data = folder();
    let up = Up::start(data.path(), &["--no-mongodb"]).await;
    let token = up.report["token"].as_str().unwrap();
    for (edge, token, status) in [(0, token, "200"), (1, token, "200"), (0, "wrong", "401")] {
        let http = up.report["regions"][0]["edges"][edge]["http"]
            .as_str()
            .unwrap();
        let address = http.strip_prefix("http://").unwrap();
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let body = r#"{"body":{"text":"hi"}}"#;
        let request = format!(
            "POST /v1/rooms/chat:lobby/messages HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer.split(' ').nth(1), Some(status), "{answer}");
    }
    assert_eq!(publish(up.nats(), "by hand").await, 3);
    assert!(up.end(Signal::TERM).await.success());
}

#[tokio::test]
async fn a_port_in_use_is_passed_over_and_said() {
    let data = folder();
    let occupied = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = occupied.local_addr().unwrap().port();
    let mut child = Up::command(
        data.path(),
        &["--no-mongodb", "--nats-port", &port.to_string()],
    )
    .await
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    let report = next_line(&mut BufReader::new(child.stdout.take().unwrap()));
    assert_ne!(
        report["regions"][0]["nats"],
        json!(format!("nats://127.0.0.1:{port}"))
    );
    support::signal(child.id(), Signal::TERM);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains(&format!("port {port} is in use")), "{said}");
}

#[tokio::test]
async fn a_server_that_can_not_start_ends_everything_with_its_reason() {
    let data = folder();
    // mongod can't make its journal in a file.
    std::fs::write(data.path().join("mongo"), "not a folder").unwrap();
    let output = Up::command(data.path(), &[])
        .await
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("mongo"), "{said}");
    assert!(!data.path().join("lock").exists());
}

/// The hooks of the configuration run beside the rest.
#[tokio::test(flavor = "multi_thread")]
async fn it_runs_the_hooks_of_its_configuration() {
    let endpoint = Endpoint::start(|_| Say::Status(200)).await;
    let data = folder();
    let config = data.path().join("natter.toml");
    let hook = format!(
        "[[hooks]]\nname = 'crm'\nrooms = ['chat:*']\nurl = '{}'\nallow = ['127.0.0.1']\n\
         secret = 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw'\nevents = ['message.created']\n",
        endpoint.url()
    );
    std::fs::write(&config, hook).unwrap();
    let flags = ["--no-mongodb", "--config", config.to_str().unwrap()];
    let up = Up::start(data.path(), &flags).await;
    publish(up.nats(), "hi").await;
    let asked = endpoint.asked_times(1).await;
    assert_eq!(asked[0].body["type"], "message.created");
    assert_eq!(asked[0].body["data"]["message"]["body"], "hi");
    let pids = up.pids();
    assert!(up.end(Signal::TERM).await.success());
    all_gone(&pids).await;
}
