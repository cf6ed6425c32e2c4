//! `natter doctor`: it is silent where all is well, and says what is not.

use natter::testing::{
    config::{Config, Secret},
    mesh::{
        doctor::{Check, Examination, Finding, Level, examine},
        provision::{Options, connect, provision_mesh},
    },
    servers::free_port,
};
use serde_json::{Value, json};

use crate::support::{
    LONG, eventually,
    regions::Regions,
    star::{SYNC_ALWAYS, Star, api, stream},
};

const ONE_PARTITION: &str = "[nats]\npartitions = 1";
const BOTH: [&str; 2] = ["seoul", "frankfurt"];

async fn provisioned(star: &Star) -> Config {
    let mut config = star.config("seoul");
    config.regions = BOTH.map(str::to_owned).to_vec();
    config.doctor.sys_user = "sys".to_owned();
    config.doctor.sys_password = Secret::new("sys".to_owned());
    let client = connect(&config.nats).await.unwrap();
    let made = provision_mesh(&client, &config, &config.regions(), Options::default())
        .await
        .unwrap();
    assert!(!made.is_incomplete());
    config
}

/// Mirrors of a moment ago have not heard of their origins yet.
async fn until(config: &Config, what: &str, is: impl Fn(&Examination) -> bool) -> Examination {
    eventually(what, LONG, async || {
        let found = examine(config).await.unwrap();
        if is(&found) {
            Ok(found)
        } else {
            Err(format!("{:#?}", found.findings))
        }
    })
    .await
}

fn is_fine(found: &Examination) -> bool {
    found.count(Level::Problem) == 0 && found.count(Level::Warning) == 0
}

fn has(found: &Examination, check: Check, region: &str, stream: &str, what: &str) -> bool {
    found.findings.iter().any(|finding| {
        finding.level == Level::Problem
            && finding.check == check
            && finding.region.as_deref() == Some(region)
            && (stream.is_empty() || finding.streams.iter().any(|name| name == stream))
            && finding.what.contains(what)
    })
}

fn assert_has(found: &Examination, check: Check, region: &str, stream: &str, what: &str) {
    assert!(
        has(found, check, region, stream, what),
        "no {check:?} of {region} {stream} {what:?} in {:#?}",
        found.findings
    );
}

/// Changes the configuration of a stream behind natter's back.
async fn change(config: &Config, region: &str, name: &str, change: impl Fn(&mut Value)) {
    let mut stream = stream(config, region, name).await["config"].clone();
    change(&mut stream);
    let request = format!("STREAM.UPDATE.{name}");
    let answer = api(config, region, &request, stream).await.unwrap();
    assert!(answer["error"].is_null(), "{answer}");
}

async fn delete(config: &Config, region: &str, name: &str) {
    let request = format!("STREAM.DELETE.{name}");
    let answer = api(config, region, &request, json!({})).await.unwrap();
    assert_eq!(answer["success"], json!(true), "{answer}");
}

#[tokio::test]
async fn nothing_is_said_about_a_good_mesh() {
    let star = Star::start(&BOTH, ONE_PARTITION).await;
    let config = provisioned(&star).await;
    let found = until(&config, "all mirrors run", is_fine).await;
    assert_eq!((found.regions, found.streams, found.servers), (2, 42, 1));

    let flags = [
        "doctor",
        "--json",
        "--sys-user",
        "sys",
        "--sys-password",
        "sys",
    ];
    let output = star.command("seoul", &flags).await.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&told["regions"], &told["streams"], &told["servers"]),
        (&json!(2), &json!(42), &json!(1))
    );
    // The system account of its own server, which alone was asked, does not reach it.
    let findings = told["findings"].as_array().unwrap();
    let [note] = &findings[..] else {
        panic!("{told}")
    };
    assert_eq!(
        (&note["level"], &note["region"], &note["check"]),
        (&json!("note"), &json!("frankfurt"), &json!("durability"))
    );
}

#[tokio::test]
async fn what_is_wrong_with_streams_and_mirrors_is_named() {
    let star = Star::start(&BOTH, "[nats]\npartitions = 2").await;
    let mut config = provisioned(&star).await;
    until(&config, "all mirrors run", is_fine).await;

    delete(&config, "frankfurt", "KV_edges_seoul").await;
    delete(&config, "seoul", "KV_lastread_seoul").await;
    change(&config, "frankfurt", "ROOMS_seoul_0", |stream| {
        stream.as_object_mut().unwrap().remove("republish");
    })
    .await;
    // A mirror of a place that there is not.
    delete(&config, "frankfurt", "ROOMS_seoul_1").await;
    let lost = json!({ "name": "ROOMS_seoul_1", "storage": "file", "mirror": { "name": "ROOMS_seoul_1", "external": { "api": "$JS.nowhere.API" } } });
    api(&config, "frankfurt", "STREAM.CREATE.ROOMS_seoul_1", lost)
        .await
        .unwrap();
    change(&config, "seoul", "ROOMS_seoul_0", |stream| {
        stream["metadata"]["natter.regions"] = json!("seoul");
        stream["max_bytes"] = json!(4096);
    })
    .await;
    let client = connect(&config.nats).await.unwrap();
    for _message in 0..12 {
        let subject = "natter.in.seoul.0.chat.lobby.msg";
        client
            .request(subject, vec![b'x'; 300].into())
            .await
            .unwrap();
    }
    config.streams.max_bytes = bytesize::ByteSize(4096);

    let found = examine(&config).await.unwrap();
    assert_has(
        &found,
        Check::Mirror,
        "frankfurt",
        "KV_edges_seoul",
        "missing",
    );
    assert_has(
        &found,
        Check::Stream,
        "seoul",
        "KV_lastread_seoul",
        "missing",
    );
    assert_has(
        &found,
        Check::Stream,
        "frankfurt",
        "ROOMS_seoul_0",
        "RePublish is unset",
    );
    assert_has(
        &found,
        Check::Mirror,
        "frankfurt",
        "ROOMS_seoul_1",
        "$JS.nowhere.API",
    );
    assert_has(
        &found,
        Check::Mirror,
        "frankfurt",
        "ROOMS_seoul_1",
        "epoch unset",
    );
    assert_has(
        &found,
        Check::Mirror,
        "seoul",
        "ROOMS_seoul_0",
        "does not name frankfurt",
    );
    let near = found.findings.iter().find(|f| f.check == Check::Limit);
    let near = near.expect("the stream is nearly full");
    assert_eq!(near.level, Level::Warning);
    assert!(near.what.contains("% of its max_bytes"), "{near:?}");

    let output = star.command("seoul", &["doctor"]).await.output().unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(
        told.contains("problem  frankfurt KV_edges_seoul: missing")
            && told.contains("-> natter provision --region seoul"),
        "{told}"
    );
}

#[tokio::test]
async fn fewer_copies_than_configured_are_a_problem() {
    let star = Star::start(&BOTH, ONE_PARTITION).await;
    let mut config = provisioned(&star).await;
    config.streams.replicas = 3;
    let found = examine(&config).await.unwrap();
    for region in BOTH {
        assert_has(
            &found,
            Check::Replicas,
            region,
            "ROOMS_seoul_0",
            "1 of 3 copies",
        );
        assert_has(
            &found,
            Check::Replicas,
            region,
            "KV_control_frankfurt",
            "1 of 3 copies",
        );
    }
}

#[tokio::test]
async fn a_region_that_is_away_is_said_once_and_not_of_each_mirror() {
    let mut star = Star::start(&BOTH, ONE_PARTITION).await;
    let mut config = provisioned(&star).await;
    star.kill("frankfurt").await;
    let found = until(&config, "frankfurt is away", |found| {
        has(found, Check::Region, "frankfurt", "", "does not answer")
    })
    .await;
    assert_eq!(found.count(Level::Problem), 1, "{:#?}", found.findings);

    // Its name stands in the streams too.
    config.regions.clear();
    let found = examine(&config).await.unwrap();
    assert_has(&found, Check::Region, "frankfurt", "", "does not answer");
    // Somebody who asks from the wrong place.
    star.revive("frankfurt").await;
    config.regions = BOTH.map(str::to_owned).to_vec();
    config.nats.url = star.config("frankfurt").nats.url;
    let found = examine(&config).await.unwrap();
    assert_has(
        &found,
        Check::Region,
        "seoul",
        "",
        "leads to the JetStream domain \"frankfurt\"",
    );
}

/// Over real spines, where a request into a cut is answered by nobody.
#[tokio::test]
async fn a_cut_is_found_and_its_end_too() {
    let mut regions = Regions::start(&BOTH).await;
    let config = regions.mesh("seoul").config.clone();
    until(&config, "all mirrors run", is_fine).await;
    regions.cut("frankfurt");
    let away = |found: &Examination| has(found, Check::Region, "frankfurt", "", "does not answer");
    let found = until(&config, "the cut is seen", away).await;
    assert_eq!(found.count(Level::Problem), 1, "{:#?}", found.findings);
    regions.heal("frankfurt");
    until(&config, "all is well again", is_fine).await;
}

#[tokio::test]
async fn unsynced_writes_and_a_missing_system_account_are_said() {
    let star = Star::start_with(&["seoul"], ONE_PARTITION, "", "").await;
    let mut config = provisioned_alone(&star).await;
    let found = examine(&config).await.unwrap();
    let [finding] = &found.findings[..] else {
        panic!("{:#?}", found.findings)
    };
    assert_eq!(
        (finding.level, finding.check),
        (Level::Warning, Check::Durability)
    );
    assert!(finding.what.contains("sync_interval is 2m"), "{finding:?}");

    config.doctor.sys_user.clear();
    let found = examine(&config).await.unwrap();
    let [finding] = &found.findings[..] else {
        panic!("{:#?}", found.findings)
    };
    assert_eq!(finding.level, Level::Note);
    assert!(
        finding.what.contains("not examined: sync_interval"),
        "{finding:?}"
    );

    for (user, password, told) in [
        ("sys", "wrong", "authorization violation"),
        ("natter", "natter", "no server answers"),
    ] {
        config.doctor.sys_user = user.to_owned();
        config.doctor.sys_password = Secret::new(password.to_owned());
        let found = examine(&config).await.unwrap();
        assert_eq!(found.count(Level::Problem), 1);
        assert!(
            found.findings[0].what.contains(told),
            "{:#?}",
            found.findings
        );
    }
}

/// Of mirrors, which keep what their origins purge; and the rights of who helps them on.
#[tokio::test]
async fn what_a_user_lacks_for_the_mirrors_of_other_regions_is_named() {
    let some = EDGE.replace('\n', "\n    ").replace(
        "\"$SYS.REQ.USER.INFO\"",
        "\"$JS.API.STREAM.PURGE.KV_presence_frankfurt\", \"$JS.*.API.INFO\", \"$SYS.REQ.USER.INFO\"",
    );
    let star = Star::start_with(&BOTH, ONE_PARTITION, SYNC_ALWAYS, &some).await;
    let mut config = provisioned(&star).await;
    config.mirrors.leafnodes = format!("127.0.0.1:{}", free_port().unwrap());
    let problems = async |config: &Config, check: Check| -> Vec<String> {
        let found = examine(config).await.unwrap();
        let findings = found.findings.into_iter();
        let of = findings.filter(|f| (f.level, f.check) == (Level::Problem, check));
        of.map(|finding| finding.what).collect()
    };
    // The other users may do everything.
    assert_eq!(
        problems(&config, Check::Permission).await,
        Vec::<String>::new()
    );

    config.nats.user = "edge".to_owned();
    config.nats.password = Secret::new("edge".to_owned());
    let found = problems(&config, Check::Permission).await;
    let [publish, mirrors_publish, subscribe] = &found[..] else {
        panic!("{found:#?}")
    };
    assert!(
        publish.ends_with("what an edge needs: $JS.API.STREAM.PURGE.KV_edges_frankfurt"),
        "{publish}"
    );
    assert!(
        mirrors_publish.ends_with(
            "what restarting mirrors needs: $JS.frankfurt.API.CONSUMER.CREATE.ROOMS_frankfurt_0"
        ),
        "{mirrors_publish}"
    );
    assert!(
        subscribe.ends_with("$JS.*.API.CONSUMER.CREATE.*, $JSC.R.>"),
        "{subscribe}"
    );

    // Another user, and nobody at the port for leaf nodes.
    config.mirrors.user = "natter".to_owned();
    config.mirrors.password = Secret::new("natter".to_owned());
    assert_eq!(problems(&config, Check::Permission).await.len(), 1);
    let found = problems(&config, Check::Mirror).await;
    let nobody = found.iter().any(|what| {
        what.contains(&config.mirrors.leafnodes) && what.contains("can't be reached as a leaf node")
    });
    assert!(nobody, "{found:#?}");
    config.mirrors.password = Secret::new("wrong".to_owned());
    let found = problems(&config, Check::Permission).await;
    let refused = found.iter().any(|what| what.contains("can't be restarted"));
    assert!(refused, "{found:#?}");
}

async fn provisioned_alone(star: &Star) -> Config {
    let mut config = star.config("seoul");
    config.doctor.sys_user = "sys".to_owned();
    config.doctor.sys_password = Secret::new("sys".to_owned());
    let client = connect(&config.nats).await.unwrap();
    provision_mesh(&client, &config, &config.regions(), Options::default())
        .await
        .unwrap();
    config
}

/// What an edge's user needs, as it would stand in a server's configuration.
const EDGE: &str = r#", permissions: {
  publish: { allow: [
    "natter.in.seoul.>", "natter.eph.>", "natter.edge.>", "natter.svc.>",
    "$KV.presence_seoul.>", "$KV.edges_seoul.>", "$KV.lastread_seoul.>",
    "$KV.rooms_seoul.>", "$KV.inbox_seoul.>", "$KV.devices_seoul.>",
    "$JS.API.STREAM.INFO.*", "$JS.API.DIRECT.GET.*", "$JS.API.STREAM.PURGE.KV_presence_seoul",
    "$JS.API.STREAM.PURGE.KV_edges_seoul",
    "$SYS.REQ.USER.INFO", "_INBOX.>"
  ] }
  subscribe: { allow: [
    "natter.live.seoul.>", "natter.eph.>", "natter.edge.>", "natter.kv.seoul.>", "$JS.EVENT.ADVISORY.STREAM.LEADER_ELECTED.*", "_INBOX.>"
  ] }
}"#;

#[tokio::test]
async fn an_edges_user_needs_no_more_than_an_edge_and_what_it_lacks_is_named() {
    let permissions = EDGE.replace('\n', "\n    ");
    let star = Star::start_with(&["seoul"], ONE_PARTITION, SYNC_ALWAYS, &permissions).await;
    let mut config = provisioned_alone(&star).await;
    config.nats.user = "edge".to_owned();
    config.nats.password = Secret::new("edge".to_owned());
    let found = examine(&config).await.unwrap();
    assert_eq!(found.findings, []);
    drop(star);

    let less = permissions
        .replace("\"$KV.lastread_seoul.>\",", "")
        .replace("\"$KV.inbox_seoul.>\",", "")
        .replace("\"$JS.API.DIRECT.GET.*\",", "")
        .replace("\"natter.kv.seoul.>\",", "");
    let star = Star::start_with(&["seoul"], ONE_PARTITION, SYNC_ALWAYS, &less).await;
    let mut config = provisioned_alone(&star).await;
    config.nats.user = "edge".to_owned();
    config.nats.password = Secret::new("edge".to_owned());
    let found = examine(&config).await.unwrap();
    for (verb, subject) in [
        ("may not publish to", "$KV.lastread_seoul."),
        ("may not publish to", "$KV.inbox_seoul."),
        ("may not publish to", "$JS.API.DIRECT.GET.ROOMS_seoul_0"),
        ("may not subscribe to", "natter.kv.seoul.*.presence."),
        ("may not subscribe to", "natter.kv.seoul.*.rooms."),
        ("may not subscribe to", "natter.kv.seoul.*.inbox."),
    ] {
        let of = |f: &&Finding| f.check == Check::Permission && f.what.contains(verb);
        let finding = found.findings.iter().find(of);
        let finding = finding.unwrap_or_else(|| panic!("{verb}: {:#?}", found.findings));
        assert_eq!(finding.level, Level::Problem);
        assert!(finding.what.contains(subject), "{finding:?}");
    }
    let others = found
        .findings
        .iter()
        .filter(|f| f.check != Check::Permission);
    assert_eq!(others.collect::<Vec<_>>(), Vec::<&Finding>::new());
}
