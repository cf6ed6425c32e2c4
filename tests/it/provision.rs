//! `natter provision`, and the subjects that people publish to.

use std::{collections::BTreeMap, time::Duration};

use natter::testing::{
    config::Config,
    mesh::provision::{Action, Options, Outcome, Verdict, connect, provision},
    model::{RoomId, partition_of},
    subject,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use crate::support;

const DRY: Options = Options {
    dry_run: true,
    allow_destructive: false,
    edges_follow: Duration::ZERO,
};
const PLAIN: Options = Options {
    dry_run: false,
    allow_destructive: false,
    edges_follow: Duration::ZERO,
};
const DESTRUCTIVE: Options = Options {
    dry_run: false,
    allow_destructive: true,
    edges_follow: Duration::ZERO,
};

async fn run(config: &Config, options: Options) -> Vec<Outcome> {
    let client = connect(&config.nats).await.unwrap();
    provision(&client, config, options).await.unwrap()
}

async fn api(config: &Config, request: String, payload: Value) -> Value {
    let client = connect(&config.nats).await.unwrap();
    let answer = client
        .request(request, payload.to_string().into())
        .await
        .unwrap();
    serde_json::from_slice(&answer.payload).unwrap()
}

async fn stream(config: &Config, name: &str) -> Value {
    api(config, subject::api::stream_info(name), json!({})).await["config"].clone()
}

fn actions(outcomes: &[Outcome]) -> Vec<Action> {
    outcomes.iter().map(|outcome| outcome.action).collect()
}

#[tokio::test]
async fn a_second_run_changes_nothing_and_a_dry_run_never_does() {
    let config = support::config_on_shared("idempotent", "[nats]\npartitions = 2");
    let first = format!("ROOMS_{}_0", config.region);
    assert_eq!(actions(&run(&config, DRY).await), [Action::Create; 13]);
    assert!(stream(&config, &first).await.is_null(), "a dry run created");

    assert_eq!(actions(&run(&config, PLAIN).await), [Action::Create; 13]);
    let created = stream(&config, &first).await;
    let epoch = created["metadata"][subject::EPOCH_METADATA].clone();
    assert!(epoch.is_string() && epoch != "example1", "{epoch}");
    let second = stream(&config, &format!("ROOMS_{}_1", config.region)).await;
    assert_ne!(epoch, second["metadata"][subject::EPOCH_METADATA]);

    for outcome in run(&config, PLAIN).await {
        assert_eq!((outcome.action, &*outcome.changes), (Action::Keep, &[][..]));
    }
    assert_eq!(stream(&config, &first).await, created);

    let mut more = config.clone();
    more.streams.max_age *= 2;
    let outcomes = run(&more, DRY).await;
    assert_eq!(outcomes[0].action, Action::Update);
    assert!(
        outcomes[0].to_string().contains("max_age 30d -> 60d"),
        "{}",
        outcomes[0]
    );
    assert_eq!(stream(&config, &first).await, created);
    run(&more, PLAIN).await;
    let updated = stream(&config, &first).await;
    assert_ne!(updated["max_age"], created["max_age"]);
    assert_eq!(updated["metadata"][subject::EPOCH_METADATA], epoch);
}

#[tokio::test]
async fn limits_shrink_only_when_that_is_allowed() {
    let config = support::config_on_shared("shrink", "[nats]\npartitions = 1");
    let name = format!("ROOMS_{}_0", config.region);
    run(&config, PLAIN).await;
    let before = stream(&config, &name).await;

    let mut less = config.clone();
    less.streams.max_age = Duration::from_secs(3600);
    less.streams.duplicate_window = Duration::from_secs(60);
    less.streams.max_bytes = bytesize::ByteSize::mib(16);
    less.streams.max_msgs_per_room = 6000;
    let outcomes = run(&less, PLAIN).await;
    assert!(outcomes[0].is_incomplete());
    assert_eq!(outcomes[0].changes.len(), 4, "{}", outcomes[0]);
    assert!(
        outcomes[0]
            .changes
            .iter()
            .all(|c| matches!(c.verdict, Verdict::Destructive(_))),
        "{}",
        outcomes[0]
    );
    assert_eq!(stream(&config, &name).await, before);

    let outcomes = run(&less, DESTRUCTIVE).await;
    assert!(!outcomes[0].is_incomplete());
    let after = stream(&config, &name).await;
    assert_eq!(after["max_age"], json!(3_600_000_000_000_u64));
    assert_eq!(after["max_msgs_per_subject"], json!(6000));
}

#[tokio::test]
async fn the_number_of_partitions_is_fixed_by_the_first_run() {
    let config = support::config_on_shared("fixed", "[nats]\npartitions = 2");
    run(&config, PLAIN).await;
    for wanted in [1, 3] {
        let mut other = config.clone();
        other.nats.partitions = wanted;
        let client = connect(&other.nats).await.unwrap();
        let error = provision(&client, &other, DESTRUCTIVE).await.unwrap_err();
        assert!(error.to_string().contains("created with 2"), "{error}");
    }
    // A run that was interrupted after the first stream is completed.
    api(
        &config,
        format!("$JS.API.STREAM.DELETE.ROOMS_{}_1", config.region),
        json!({}),
    )
    .await;
    assert_eq!(run(&config, PLAIN).await[1].action, Action::Create);
}

#[tokio::test]
async fn streams_of_others_are_left_alone() {
    let config = support::config_on_shared("others", "[nats]\npartitions = 1");
    let name = support::unique("OTHER");
    let subjects = json!({ "name": name, "subjects": [format!("{name}.>")] });
    let created = api(&config, subject::api::stream_create(&name), subjects).await;
    run(&config, PLAIN).await;
    run(&config, DESTRUCTIVE).await;
    assert_eq!(stream(&config, &name).await, created["config"]);
}

#[tokio::test]
async fn buckets_can_be_opened_and_announce_changes_and_expiry() {
    use async_nats::jetstream;
    use futures_util::StreamExt as _;

    let config = support::config_on_shared("bucket", "[nats]\npartitions = 1");
    run(&config, PLAIN).await;
    let client = connect(&config.nats).await.unwrap();
    let (region, prefix) = (&config.region, &config.nats.prefix);
    let mut seen = client
        .subscribe(format!("{prefix}.kv.{region}.{region}.edges.>"))
        .await
        .unwrap();
    client.flush().await.unwrap();
    let edges = jetstream::new(client.clone())
        .get_key_value(format!("edges_{region}"))
        .await
        .unwrap();
    edges
        .create_with_ttl("e1", "here".into(), Duration::from_secs(1))
        .await
        .unwrap();
    let put = tokio::time::timeout(support::LONG, seen.next())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&*put.payload, b"here");
    assert!(put.subject.ends_with(".edges.e1"), "{}", put.subject);
    let gone = tokio::time::timeout(support::LONG, seen.next())
        .await
        .unwrap()
        .unwrap();
    let reason = gone
        .headers
        .as_ref()
        .and_then(|h| h.get("Nats-Marker-Reason"));
    assert_eq!(reason.map(async_nats::HeaderValue::as_str), Some("MaxAge"));
}

/// What is published by hand is stored in the partition that [`partition_of`] says, whatever the room; in an ephemeral
/// namespace it is not stored; and this does not depend on the order in which a server reads its configuration.
#[tokio::test]
async fn what_people_publish_reaches_the_room() {
    use futures_util::StreamExt as _;

    const ROOMS: usize = 500;
    let seed = rand::random();
    eprintln!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);

    for partitions in [1, 4, 16] {
        let mut config = support::config(&format!(
            "region = 'seoul'\n[nats]\npartitions = {partitions}\n[namespaces.a_b-C9]\ndurable = true\ntyping = true"
        ));
        let mut nats = support::dedicated_nats_for(&config).await;
        config.nats.url = nats.url();
        run(&config, PLAIN).await;
        // Go iterates a map in random order: a rule that overlaps with another would win in some starts only.
        for _start in 0..4 {
            nats.server.stop().await;
            nats.server.restart().await.unwrap();
            let client = connect(&config.nats).await.unwrap();
            let mut live = client.subscribe("natter.live.>").await.unwrap();
            let mut ephemeral = client.subscribe("natter.eph.>").await.unwrap();
            client.flush().await.unwrap();

            let mut wanted = BTreeMap::new();
            for number in 0..ROOMS {
                let namespace = ["chat", "a_b-C9"][number % 2];
                let length = rng.random_range(0..45);
                let name: String = (0..length)
                    .map(|_| char::from(b"abcXYZ0189_-"[rng.random_range(0..12)]))
                    .collect();
                let escapes = ["", "=20", "=EC=84=9C"][number % 3];
                let room = format!("{namespace}:r{number}{escapes}{name}");
                let room = RoomId::parse(&room).unwrap();
                let part = partition_of(&room, partitions);
                client
                    .publish(
                        format!("natter.pub.{namespace}.{}", room.name()),
                        room.to_string().into(),
                    )
                    .await
                    .unwrap();
                wanted.insert(
                    room.to_string(),
                    format!(
                        "natter.live.seoul.seoul.{part}.{namespace}.{}.msg",
                        room.name()
                    ),
                );
            }
            client
                .publish("natter.pub.live.show", "now".into())
                .await
                .unwrap();
            client
                .publish("natter.pub.unknown.show", "lost".into())
                .await
                .unwrap();

            let mut got = BTreeMap::new();
            while got.len() < wanted.len() {
                let message = tokio::time::timeout(support::LONG, live.next())
                    .await
                    .expect("all are stored")
                    .unwrap();
                let room = String::from_utf8(message.payload.to_vec()).unwrap();
                got.insert(room, message.subject.to_string());
            }
            assert_eq!(got, wanted);
            let message = tokio::time::timeout(support::LONG, ephemeral.next())
                .await
                .unwrap()
                .unwrap();
            assert_eq!(message.subject.as_str(), "natter.eph.live.show");
        }
        let stored: u64 = {
            let mut sum = 0;
            for part in 0..partitions {
                let name = format!("ROOMS_seoul_{part}");
                let info = api(&config, subject::api::stream_info(&name), json!({})).await;
                sum += info["state"]["messages"].as_u64().unwrap();
            }
            sum
        };
        assert_eq!(stored, 4 * ROOMS as u64, "each is stored once");
    }
}

#[tokio::test]
async fn a_publish_by_hand_is_acknowledged_and_deduplicated() {
    let nats = support::dedicated_nats().await;
    let mut config = support::config("");
    config.nats.url = nats.url();
    run(&config, PLAIN).await;
    let client = connect(&config.nats).await.unwrap();
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Nats-Msg-Id", "chat:lobby/kim/1");
    for duplicate in [false, true] {
        let answer = client
            .request_with_headers("natter.pub.chat.lobby", headers.clone(), "{}".into())
            .await
            .unwrap();
        let ack: Value = serde_json::from_slice(&answer.payload).unwrap();
        assert_eq!(ack["seq"], json!(1), "{ack}");
        assert_eq!(ack["duplicate"].as_bool().unwrap_or(false), duplicate);
    }
    // No namespace of this name: nobody answers, at once.
    let error = client
        .request("natter.pub.nope.lobby", "{}".into())
        .await
        .unwrap_err();
    assert_eq!(
        error.kind(),
        async_nats::client::RequestErrorKind::NoResponders
    );
}

#[tokio::test]
async fn the_command_reports_and_exits_by_what_it_did() {
    let config = support::config_on_shared("cli", "");
    let folder = tempfile::tempdir().unwrap();
    let run = async |partitions: &str, max_age: &str, flags: &[&str]| {
        let mut command = support::natter_command(folder.path()).await;
        let output = command
            .arg("provision")
            .args(flags)
            .env("NATTER__REGION", &config.region)
            .env("NATTER__NATS__PREFIX", &config.nats.prefix)
            .env("NATTER__NATS__URL", &config.nats.url)
            .env("NATTER__NATS__PARTITIONS", partitions)
            .env("NATTER__STREAMS__MAX_AGE", max_age)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, out, _) = run("2", "30d", &["--dry-run"]).await;
    assert_eq!(
        (code, out.matches(" create").count()),
        (Some(0), 13),
        "{out}"
    );
    let (code, out, _) = run("2", "30d", &[]).await;
    assert_eq!(
        (code, out.matches(" create").count()),
        (Some(0), 13),
        "{out}"
    );
    let (code, out, _) = run("2", "30d", &[]).await;
    assert_eq!((code, out.matches(" ok").count()), (Some(0), 13), "{out}");
    let (code, out, _) = run("2", "1d", &[]).await;
    assert_eq!((code, out.matches(" skip").count()), (Some(1), 2), "{out}");
    assert!(
        out.contains("max_age 30d -> 1d") && out.contains("--allow-destructive"),
        "{out}"
    );
    let (code, out, _) = run("2", "1d", &["--allow-destructive"]).await;
    assert_eq!(
        (code, out.matches(" update").count()),
        (Some(0), 2),
        "{out}"
    );
    let (code, _, err) = run("4", "1d", &[]).await;
    assert_eq!(code, Some(1));
    assert!(err.contains("nats.partitions = 4"), "{err}");
}

#[tokio::test]
async fn nobody_there_is_an_error_and_not_a_wait() {
    let port = natter::testing::servers::free_port().unwrap();
    let config = support::config(&format!("nats.url = 'nats://127.0.0.1:{port}'"));
    let error = tokio::time::timeout(support::LONG, connect(&config.nats))
        .await
        .unwrap()
        .unwrap_err();
    assert!(error.to_string().contains(&port.to_string()), "{error}");
}
