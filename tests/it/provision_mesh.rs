//! `natter provision` for several regions.

use std::{collections::BTreeSet, time::Duration};

use futures_util::StreamExt as _;
use natter::testing::{
    config::Config,
    mesh::provision::{Action, Options, Provisioned, connect, provision_mesh, remove_region},
    model::Region,
    subject::{EPOCH_METADATA, REGIONS_METADATA},
};
use serde_json::{Value, json};

use crate::support::{
    LONG, eventually,
    star::{SYNC_ALWAYS, Star, api, stream},
};

const ONE_PARTITION: &str = "[nats]\npartitions = 1";

/// Streams of one region with one partition: rooms, two of dead letters, nine buckets.
const OWN: usize = 12;
/// Those of them that are mirrored.
const MIRRORED: usize = 9;

const DRY: Options = Options {
    dry_run: true,
    allow_destructive: false,
    edges_follow: Duration::ZERO,
};
const DESTRUCTIVE: Options = Options {
    dry_run: false,
    allow_destructive: true,
    edges_follow: Duration::ZERO,
};

fn region(name: &str) -> Region {
    Region::parse(name).unwrap()
}

fn set(names: &[&str]) -> BTreeSet<Region> {
    names.iter().map(|name| region(name)).collect()
}

async fn run(config: &Config, regions: &[&str], options: Options) -> Provisioned {
    let client = connect(&config.nats).await.unwrap();
    provision_mesh(&client, config, &set(regions), options)
        .await
        .unwrap()
}

fn count(provisioned: &Provisioned, action: Action) -> usize {
    let outcomes = provisioned.outcomes.iter();
    outcomes.filter(|outcome| outcome.action == action).count()
}

fn lines(provisioned: &Provisioned) -> String {
    let lines: Vec<String> = provisioned
        .outcomes
        .iter()
        .map(ToString::to_string)
        .collect();
    lines.join("\n")
}

async fn regions_in(config: &Config, region: &str) -> Value {
    let info = stream(config, region, &format!("ROOMS_{region}_0")).await;
    info["config"]["metadata"][REGIONS_METADATA].clone()
}

async fn publish(config: &Config, region: &str, text: &str) {
    let client = connect(&config.nats).await.unwrap();
    let subject = format!("natter.in.{region}.0.chat.lobby.msg");
    let ack = client
        .request(subject, text.to_owned().into())
        .await
        .unwrap();
    let ack: Value = serde_json::from_slice(&ack.payload).unwrap();
    assert!(ack["seq"].is_u64(), "{ack}");
}

async fn last_seq(config: &Config, region: &str, name: &str, wanted: u64) {
    eventually("the mirror has it", LONG, async || {
        let info = stream(config, region, name).await;
        if info["state"]["last_seq"] == json!(wanted) {
            Ok(())
        } else {
            Err(info.to_string())
        }
    })
    .await;
}

#[tokio::test]
async fn each_region_mirrors_the_others_and_a_second_run_changes_nothing() {
    let star = Star::start(&["seoul", "frankfurt"], ONE_PARTITION).await;
    let (seoul, frankfurt) = (star.config("seoul"), star.config("frankfurt"));
    let both = ["frankfurt", "seoul"];

    let dry = run(&seoul, &both, DRY).await;
    assert_eq!(count(&dry, Action::Create), 2 * (OWN + MIRRORED));
    assert!(stream(&seoul, "frankfurt", "ROOMS_seoul_0").await["config"].is_null());

    let first = run(&seoul, &both, Options::default()).await;
    assert_eq!(
        count(&first, Action::Create),
        2 * (OWN + MIRRORED),
        "{}",
        lines(&first)
    );
    assert!(!first.is_incomplete());
    assert!(
        lines(&first).contains("frankfurt    ROOMS_seoul_0"),
        "{}",
        lines(&first)
    );
    for (at, from) in [(&frankfurt, &seoul), (&seoul, &frankfurt)] {
        assert_eq!(regions_in(at, &at.region).await, json!("frankfurt,seoul"));
        for name in [
            format!("ROOMS_{}_0", from.region),
            format!("KV_edges_{}", from.region),
        ] {
            let mirror = stream(at, &at.region, &name).await;
            let origin = stream(at, &from.region, &name).await;
            let metadata = &mirror["config"]["metadata"];
            assert!(metadata[EPOCH_METADATA].is_string(), "{mirror}");
            assert_eq!(
                metadata[EPOCH_METADATA],
                origin["config"]["metadata"][EPOCH_METADATA]
            );
            assert!(metadata[REGIONS_METADATA].is_null(), "{mirror}");
            assert_eq!(mirror["config"]["allow_direct"], json!(true));
            assert_eq!(mirror["config"]["mirror_direct"], json!(false));
        }
    }

    // From the other side too.
    for config in [&seoul, &frankfurt] {
        let again = run(config, &both, Options::default()).await;
        assert_eq!(
            count(&again, Action::Keep),
            2 * (OWN + MIRRORED),
            "{}",
            lines(&again)
        );
        assert!(!again.is_incomplete(), "{}", lines(&again));
    }
    // Who provisions one region alone does not forget the other.
    let alone = run(&seoul, &["seoul"], Options::default()).await;
    assert_eq!(count(&alone, Action::Keep), OWN, "{}", lines(&alone));
    assert_eq!(regions_in(&seoul, "seoul").await, json!("frankfurt,seoul"));
}

#[tokio::test]
async fn a_mirror_has_the_same_messages_and_tells_its_own_edges() {
    let star = Star::start(&["seoul", "frankfurt"], ONE_PARTITION).await;
    let (seoul, frankfurt) = (star.config("seoul"), star.config("frankfurt"));
    run(&seoul, &["frankfurt", "seoul"], Options::default()).await;

    let client = connect(&frankfurt.nats).await.unwrap();
    let mut live = client.subscribe("natter.live.frankfurt.>").await.unwrap();
    let mut keys = client
        .subscribe("natter.kv.frankfurt.seoul.edges.>")
        .await
        .unwrap();
    client.flush().await.unwrap();
    for text in ["one", "two", "three"] {
        publish(&seoul, "seoul", text).await;
    }
    let header = |message: &async_nats::Message, name: &str| {
        let headers = message.headers.as_ref();
        headers
            .and_then(|h| h.get(name))
            .map(|v| v.as_str().to_owned())
    };
    for (seq, text) in [("1", "one"), ("2", "two"), ("3", "three")] {
        let message = tokio::time::timeout(LONG, live.next())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(
            (&*message.payload, message.subject.as_str()),
            (
                text.as_bytes(),
                "natter.live.frankfurt.seoul.0.chat.lobby.msg"
            )
        );
        assert_eq!(header(&message, "Nats-Sequence").as_deref(), Some(seq));
    }
    // An edge reads the copy in its own domain.
    let copy = client
        .request("$JS.API.DIRECT.GET.ROOMS_seoul_0", r#"{"seq":2}"#.into())
        .await
        .unwrap();
    assert_eq!(&*copy.payload, b"two");
    last_seq(&frankfurt, "frankfurt", "ROOMS_seoul_0", 3).await;

    // Keys, their removal, and their end by age: all of it comes in the other region.
    let edges = async_nats::jetstream::new(connect(&seoul.nats).await.unwrap())
        .get_key_value("edges_seoul")
        .await
        .unwrap();
    let next = async |keys: &mut async_nats::Subscriber| {
        let message = tokio::time::timeout(LONG, keys.next())
            .await
            .unwrap()
            .unwrap();
        assert!(message.subject.contains(".edges."), "{}", message.subject);
        message
    };
    edges.put("a", "here".into()).await.unwrap();
    assert_eq!(&*next(&mut keys).await.payload, b"here");
    edges.delete("a").await.unwrap();
    let deleted = next(&mut keys).await;
    assert_eq!(header(&deleted, "KV-Operation").as_deref(), Some("DEL"));
    let ttl = Duration::from_secs(1);
    edges
        .create_with_ttl("b", "here".into(), ttl)
        .await
        .unwrap();
    assert_eq!(&*next(&mut keys).await.payload, b"here");
    let ended = next(&mut keys).await;
    assert_eq!(
        header(&ended, "Nats-Marker-Reason").as_deref(),
        Some("MaxAge")
    );
}

#[tokio::test]
async fn a_region_joins_a_running_mesh_and_leaves_it() {
    let mut star = Star::start(&["seoul", "frankfurt"], ONE_PARTITION).await;
    let seoul = star.config("seoul");
    run(&seoul, &["frankfurt", "seoul"], Options::default()).await;
    publish(&seoul, "seoul", "before").await;
    star.add("virginia", SYNC_ALWAYS, "").await;

    let output = async |star: &Star, args: &[&str]| {
        let output = star.command("seoul", args).await.output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let add = ["provision", "--region", "virginia"];
    let (code, out, _) = output(&star, &["provision", "--region", "virginia", "--dry-run"]).await;
    assert_eq!(code, Some(0), "{out}");
    assert!(
        out.contains("natter.regions frankfurt,seoul -> frankfurt,seoul,virginia"),
        "{out}"
    );
    assert!(stream(&seoul, "virginia", "ROOMS_virginia_0").await["config"].is_null());

    let (code, out, err) = output(&star, &add).await;
    assert_eq!(code, Some(0), "{out}{err}");
    // Its own, two others in it, and it in two others.
    assert_eq!(out.matches(" create").count(), OWN + 4 * MIRRORED, "{out}");
    for name in ["seoul", "frankfurt", "virginia"] {
        assert_eq!(
            regions_in(&seoul, name).await,
            json!("frankfurt,seoul,virginia")
        );
    }
    last_seq(&seoul, "virginia", "ROOMS_seoul_0", 1).await;
    let (code, out, _) = output(&star, &add).await;
    assert_eq!(
        (code, out.matches(" ok").count()),
        (Some(0), 3 * (OWN + 2 * MIRRORED)),
        "{out}"
    );

    // It goes while it can't be reached.
    star.kill("virginia").await;
    let (code, _, err) = output(&star, &["provision", "--remove-region", "virginia"]).await;
    assert_eq!(code, Some(64), "{err}");
    assert!(err.contains("--allow-destructive"), "{err}");
    let remove = [
        "provision",
        "--remove-region",
        "virginia",
        "--allow-destructive",
    ];
    let (code, out, err) = output(&star, &[&remove[..], &["--dry-run"]].concat()).await;
    assert_eq!(
        (code, out.matches(" delete").count()),
        (Some(0), 2 * MIRRORED),
        "{out}{err}"
    );
    assert!(!err.contains("when edges have followed"), "{err}");
    // Nobody has to follow here.
    let all = set(&["seoul", "frankfurt", "virginia"]);
    let client = connect(&seoul.nats).await.unwrap();
    let removed = remove_region(&client, &seoul, &all, &region("virginia"), DESTRUCTIVE)
        .await
        .unwrap();
    assert_eq!(count(&removed, Action::Delete), 2 * MIRRORED);
    for name in ["seoul", "frankfurt"] {
        assert_eq!(regions_in(&seoul, name).await, json!("frankfurt,seoul"));
        assert!(stream(&seoul, name, "ROOMS_virginia_0").await["config"].is_null());
        assert!(stream(&seoul, name, "KV_edges_virginia").await["config"].is_null());
    }
    let (code, out, err) = output(&star, &remove).await;
    assert_eq!((code, &*out), (Some(0), ""), "nothing is left to do");
    assert!(err.contains("25s later, when edges have followed"), "{err}");
    // What it stored is still there.
    star.revive("virginia").await;
    assert!(stream(&seoul, "virginia", "ROOMS_virginia_0").await["config"].is_object());
    let (code, _, err) = output(
        &star,
        &[
            "provision",
            "--remove-region",
            "seoul",
            "--allow-destructive",
        ],
    )
    .await;
    assert_eq!(code, Some(1));
    assert!(err.contains("connected region"), "{err}");
}

#[tokio::test]
async fn a_region_that_is_away_is_named_and_the_others_are_done() {
    let mut star = Star::start(&["seoul", "frankfurt", "virginia"], ONE_PARTITION).await;
    let seoul = star.config("seoul");
    let all = ["frankfurt", "seoul", "virginia"];
    star.kill("virginia").await;
    let provisioned = run(&seoul, &all, Options::default()).await;
    assert_eq!(
        provisioned.unreachable.keys().collect::<Vec<_>>(),
        [&region("virginia")]
    );
    assert!(provisioned.is_incomplete());
    assert_eq!(
        count(&provisioned, Action::Create),
        2 * (OWN + MIRRORED),
        "{}",
        lines(&provisioned)
    );
    assert_eq!(regions_in(&seoul, "seoul").await, json!("frankfurt,seoul"));

    let mut command = star.command("seoul", &["provision"]).await;
    command.env("NATTER__REGIONS", r#"["frankfurt","seoul","virginia"]"#);
    let output = command.output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("region virginia does not answer"), "{err}");

    star.revive("virginia").await;
    let provisioned = run(&seoul, &all, Options::default()).await;
    assert!(!provisioned.is_incomplete(), "{}", lines(&provisioned));
    assert_eq!(
        regions_in(&seoul, "seoul").await,
        json!("frankfurt,seoul,virginia")
    );
    // Whoever says to be in one region, and is connected to another.
    let mut wrong = seoul.clone();
    wrong.region = "tokyo".to_owned();
    let provisioned = run(&wrong, &["seoul", "tokyo"], DRY).await;
    let told = provisioned.unreachable[&region("tokyo")].to_string();
    assert!(told.contains("JetStream domain \"seoul\""), "{told}");
    // While it is away again, its mirrors stay, and it stays in the list.
    star.kill("virginia").await;
    let provisioned = run(&seoul, &all, Options::default()).await;
    assert_eq!(
        count(&provisioned, Action::Keep),
        provisioned.outcomes.len()
    );
    assert_eq!(
        regions_in(&seoul, "frankfurt").await,
        json!("frankfurt,seoul,virginia")
    );
}

#[tokio::test]
async fn the_mirror_of_an_origin_that_began_anew_is_replaced_only_when_that_is_allowed() {
    let star = Star::start(&["seoul", "frankfurt"], ONE_PARTITION).await;
    let seoul = star.config("seoul");
    let both = ["frankfurt", "seoul"];
    run(&seoul, &both, Options::default()).await;
    for text in ["one", "two"] {
        publish(&seoul, "seoul", text).await;
    }
    last_seq(&seoul, "frankfurt", "ROOMS_seoul_0", 2).await;
    for name in ["ROOMS_seoul_0", "KV_control_seoul"] {
        let request = format!("STREAM.DELETE.{name}");
        api(&seoul, "seoul", &request, json!({})).await.unwrap();
    }
    let provisioned = run(&seoul, &both, Options::default()).await;
    assert_eq!(count(&provisioned, Action::Create), 2);
    let told = lines(&provisioned);
    assert!(provisioned.is_incomplete());
    assert_eq!(told.matches("was re-created").count(), 2, "{told}");
    last_seq(&seoul, "frankfurt", "ROOMS_seoul_0", 2).await;

    publish(&seoul, "seoul", "anew").await;
    let provisioned = run(&seoul, &both, DESTRUCTIVE).await;
    assert_eq!(
        count(&provisioned, Action::Recreate),
        2,
        "{}",
        lines(&provisioned)
    );
    assert!(!provisioned.is_incomplete());
    last_seq(&seoul, "frankfurt", "ROOMS_seoul_0", 1).await;
}

#[tokio::test]
async fn streams_of_a_removed_regions_name_that_are_no_mirrors_stay() {
    let star = Star::start(&["seoul"], ONE_PARTITION).await;
    let seoul = star.config("seoul");
    let client = connect(&seoul.nats).await.unwrap();
    run(&seoul, &["seoul"], Options::default()).await;
    let other = json!({ "name": "ROOMS_virginia_0", "subjects": ["other.>"] });
    api(&seoul, "seoul", "STREAM.CREATE.ROOMS_virginia_0", other)
        .await
        .unwrap();
    let provisioned = remove_region(
        &client,
        &seoul,
        &set(&["seoul", "virginia"]),
        &region("virginia"),
        DESTRUCTIVE,
    )
    .await
    .unwrap();
    assert_eq!(provisioned.outcomes, []);
    assert!(stream(&seoul, "seoul", "ROOMS_virginia_0").await["config"].is_object());
}

/// Edges ask the mirrors of every region that is listed, and take a while to see that one is not any more.
#[tokio::test]
async fn mirrors_of_a_removed_region_stay_until_edges_have_followed() {
    let star = Star::start(&["seoul", "frankfurt", "virginia"], ONE_PARTITION).await;
    let seoul = star.config("seoul");
    run(
        &seoul,
        &["frankfurt", "seoul", "virginia"],
        Options::default(),
    )
    .await;
    let all = set(&["frankfurt", "seoul", "virginia"]);
    let virginia = region("virginia");
    let never = Options {
        edges_follow: Duration::MAX,
        ..DESTRUCTIVE
    };
    let client = connect(&seoul.nats).await.unwrap();
    let listed = async || {
        let both = [
            regions_in(&seoul, "seoul").await,
            regions_in(&seoul, "frankfurt").await,
        ];
        both.map(|regions| regions == json!("frankfurt,seoul"))
    };
    // Broken off when both lists were changed: neither before that nor for a while after it a mirror goes.
    let others_follow = async {
        eventually("no list names it", LONG, async || {
            assert_eq!(mirrors_of_virginia(&seoul).await, 2 * MIRRORED);
            let listed = listed().await;
            let all = listed == [true; 2];
            all.then_some(()).ok_or_else(|| format!("{listed:?}"))
        })
        .await;
        for _look in 0..50 {
            assert_eq!(mirrors_of_virginia(&seoul).await, 2 * MIRRORED);
        }
    };
    tokio::select! {
        removed = remove_region(&client, &seoul, &all, &virginia, never) => panic!("{removed:?}"),
        () = others_follow => {}
    }
    assert_eq!(mirrors_of_virginia(&seoul).await, 2 * MIRRORED);
    let removed = remove_region(&client, &seoul, &all, &virginia, DESTRUCTIVE)
        .await
        .unwrap();
    assert_eq!(count(&removed, Action::Delete), 2 * MIRRORED);
    assert_eq!(mirrors_of_virginia(&seoul).await, 0);
}

async fn mirrors_of_virginia(config: &Config) -> usize {
    let mut there = 0;
    for at in ["seoul", "frankfurt"] {
        let names = api(config, at, "STREAM.NAMES", json!({})).await.unwrap();
        let names = names["streams"].as_array().unwrap();
        let mirrors = names.iter().filter_map(Value::as_str);
        there += mirrors.filter(|name| name.contains("virginia")).count();
    }
    there
}
