//! `natter up --regions` and `natter dev`, as a person or a program runs them.

use std::path::Path;

use natter::testing::{
    mesh::provision,
    model::{Region, RoomId, partition_of},
    subject::{api, rooms_stream},
};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    self, LONG, eventually, is_running, mesh,
    up::{Up, publish},
};

/// What a run of `natter` printed, and how it ended.
struct Said {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

async fn dev(data: &Path, args: &[&str]) -> Said {
    let mut command = support::natter_command(data).await;
    command.arg("dev").args(args).arg("--data").arg(data);
    run(command)
}

fn run(mut command: std::process::Command) -> Said {
    let output = command.output().unwrap();
    Said {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The last sequence that the server at `url` has of the room `chat:lobby` of `origin`'s stream.
async fn last_seq(url: &str, origin: &str) -> u64 {
    let mut config = support::config("");
    config.nats.url = url.to_owned();
    let client = provision::connect(&config.nats).await.unwrap();
    let room = RoomId::parse("chat:lobby").unwrap();
    let part = partition_of(&room, config.nats.partitions);
    let stream = rooms_stream(&Region::parse(origin).unwrap(), part);
    let answer = client.request(api::stream_info(&stream), "".into()).await;
    let info: Value = serde_json::from_slice(&answer.unwrap().payload).unwrap();
    info["state"]["last_seq"].as_u64().unwrap()
}

fn url(report: &Value, region: usize) -> &str {
    report["regions"][region]["nats"].as_str().unwrap()
}

async fn arrives(report: &Value, region: usize, origin: &str, seq: u64) {
    eventually(
        "the message is in the mirror",
        LONG,
        async || match last_seq(url(report, region), origin).await {
            found if found == seq => Ok(()),
            found => Err(format!("{found} of {seq}")),
        },
    )
    .await;
}

#[tokio::test]
async fn regions_run_are_cut_and_healed_and_leave_nothing() {
    let data = tempfile::tempdir().unwrap();
    let flags = ["--regions", "seoul,frankfurt", "--edges", "1"];
    let mut up = Up::start(data.path(), &flags).await;
    let report = up.report.clone();
    let names: Vec<_> = (0..2)
        .map(|region| &report["regions"][region]["name"])
        .collect();
    assert_eq!(names, ["seoul", "frankfurt"]);
    // Itself, mongod, and of each region nats-server, spine, edge and history.
    assert_eq!(up.pids().len(), 2 + 2 * 4);
    assert!(up.pids().iter().all(|pid| is_running(*pid)));

    // The same token is good in each region, and what is said there is stored there.
    let authorization = format!(
        "Authorization: Bearer {}\r\nContent-Type: application/json\r\n",
        report["token"].as_str().unwrap()
    );
    for (region, name) in ["seoul", "frankfurt"].iter().enumerate() {
        let http = report["regions"][region]["edges"][0]["http"]
            .as_str()
            .unwrap();
        let address = http.strip_prefix("http://").unwrap().parse().unwrap();
        let path = "/v1/rooms/chat:lobby/messages";
        let (status, answer) =
            mesh::http(address, "POST", path, &authorization, r#"{"body":"hi"}"#)
                .await
                .unwrap();
        assert_eq!(status, 200, "{answer}");
        assert!(answer.contains(&format!("\"{name}.")), "{answer}");
    }
    arrives(&report, 0, "frankfurt", 1).await;
    arrives(&report, 1, "seoul", 1).await;
    let mongodb = mongodb::Client::with_uri_str(report["mongodb"].as_str().unwrap())
        .await
        .unwrap();
    let messages = mongodb
        .database("natter")
        .collection::<mongodb::bson::Document>("messages");
    eventually(
        "the history services of both regions have written",
        LONG,
        async || match messages
            .count_documents(mongodb::bson::doc! {})
            .await
            .unwrap()
        {
            2 => Ok(()),
            count => Err(format!("{count} of 2")),
        },
    )
    .await;

    // Cut, both go on; healed, each has what the other stored meanwhile.
    let said = dev(data.path(), &["cut", "seoul"]).await;
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert_eq!(
        said.stdout,
        "frankfurt -> seoul      cut\nseoul     -> frankfurt  cut\n"
    );
    for region in 0..2 {
        assert_eq!(publish(url(&report, region), "during").await, 2);
    }
    assert_eq!(last_seq(url(&report, 1), "seoul").await, 1);
    assert_eq!(last_seq(url(&report, 0), "frankfurt").await, 1);
    let said = dev(data.path(), &["heal", "seoul"]).await;
    assert_eq!(
        said.stdout,
        "frankfurt -> seoul      up\nseoul     -> frankfurt  up\n"
    );
    arrives(&report, 0, "frankfurt", 2).await;
    arrives(&report, 1, "seoul", 2).await;

    // A spine that dies, and a region's server, are back in their places.
    for child in ["spine_pid", "nats_pid"] {
        let before = up.report["regions"][1].clone();
        let pid = u32::try_from(before[child].as_u64().unwrap()).unwrap();
        support::signal(pid, Signal::KILL);
        up.next_line();
        let after = &up.report["regions"][1];
        assert_ne!(after[child], before[child]);
        assert_eq!(after["nats"], before["nats"]);
        assert_eq!(up.report["regions"][0], report["regions"][0]);
    }
    let seq = publish(url(&report, 1), "after").await;
    arrives(&report, 0, "frankfurt", seq).await;

    let pids = up.pids();
    assert!(up.end(Signal::INT).await.success());
    assert!(pids.iter().all(|pid| !is_running(*pid)));
    for file in ["lock", "children.lock", "dev.sock"] {
        assert!(!data.path().join(file).exists(), "{file} is left");
    }
}

#[tokio::test]
async fn what_can_not_be_done_is_said() {
    let data = tempfile::tempdir().unwrap();
    let shown = data.path().to_string_lossy().into_owned();
    let said = dev(data.path(), &["links"]).await;
    assert_eq!((said.code, said.stdout.as_str()), (Some(1), ""));
    assert!(said.stderr.contains("no natter up runs"), "{}", said.stderr);
    assert!(said.stderr.contains(&shown), "{}", said.stderr);

    let wrong = [
        ("seoul", 1, "at least two"),
        ("seoul,seoul", 64, "named twice"),
        ("seoul,Frankfurt", 64, "Frankfurt"),
    ];
    for (regions, code, text) in wrong {
        let mut command = Up::command(data.path(), &["--regions", regions]).await;
        command.stderr(std::process::Stdio::piped());
        let said = run(command);
        assert_eq!(said.code, Some(code), "{regions}");
        assert_eq!(said.stdout, "");
        assert!(said.stderr.contains(text), "{regions}: {}", said.stderr);
    }

    let flags = ["--no-mongodb", "--edges", "0"];
    let alone = Up::start(data.path(), &flags).await;
    let said = dev(data.path(), &["cut", "local"]).await;
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.contains("--regions"), "{}", said.stderr);
    let pid = alone.report["pid"].to_string();
    assert!(said.stderr.contains(&pid), "{}", said.stderr);
    assert_eq!(alone.report["regions"][0]["spine_pid"], json!(null));
    assert!(alone.end(Signal::TERM).await.success());

    let flags = ["--regions", "a,b", "--no-mongodb", "--edges", "0"];
    let up = Up::start(data.path(), &flags).await;
    let said = dev(data.path(), &["cut", "mars"]).await;
    assert_eq!((said.code, said.stdout.as_str()), (Some(1), ""));
    assert!(said.stderr.contains("\"mars\""), "{}", said.stderr);
    assert!(said.stderr.contains("a, b"), "{}", said.stderr);
    let said = dev(data.path(), &["cut", "a", "--close"]).await;
    assert_eq!(said.stdout, "a -> b  closed\nb -> a  closed\n");
    assert!(up.end(Signal::TERM).await.success());
}
