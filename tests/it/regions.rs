//! Regions of their own servers, joined by spines: what passes, what does not, and what goes on.

use std::time::Duration;

use futures_util::StreamExt as _;
use natter::testing::{
    bus::Connection,
    mesh::{
        mirrors::{self, NudgeError},
        provision,
    },
    model::Region,
    servers::Cut,
    subject::{
        api::{self, in_domain},
        rooms_stream,
    },
};
use serde_json::Value;

use crate::support::{self, LONG, eventually, overheard::Overheard, regions::Regions};

/// How long a look at a region that can't be reached waits.
const LOOK: Duration = Duration::from_secs(1);

/// Looks in which a way around a cut would be found: connections that are closed are tried again every second.
const LOOKS: usize = 4;

async fn client(url: &str) -> async_nats::Client {
    let mut config = support::config("");
    config.nats.url = url.to_owned();
    provision::connect(&config.nats).await.unwrap()
}

/// Whether the JetStream of `region` answers `client`, which may be in another region.
async fn reaches(client: &async_nats::Client, region: &str) -> Result<(), String> {
    let region = Region::parse(region).unwrap();
    let request = client.request(in_domain(&region, api::INFO), "".into());
    match tokio::time::timeout(LOOK, request).await {
        Ok(Ok(_answer)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(elapsed) => Err(elapsed.to_string()),
    }
}

#[tokio::test]
async fn nothing_passes_a_cut_and_both_sides_go_on() {
    let mut regions = Regions::start(&["seoul", "frankfurt", "virginia"]).await;
    let prefix = regions.mesh("seoul").config.nats.prefix.clone();
    let seoul = client(&regions.url("seoul")).await;
    let frankfurt = client(&regions.url("frankfurt")).await;
    let virginia = client(&regions.url("virginia")).await;
    let subject = format!("{prefix}.eph.live.x");
    let mut heard = seoul.subscribe(subject.clone()).await.unwrap();
    let mut control = virginia.subscribe(subject.clone()).await.unwrap();
    seoul.flush().await.unwrap();
    virginia.flush().await.unwrap();
    // Interest spreads asynchronously.
    for who in [&mut heard, &mut control] {
        let passes = async {
            loop {
                frankfurt
                    .publish(subject.clone(), "before".into())
                    .await
                    .unwrap();
                if tokio::time::timeout(LOOK, who.next()).await.is_ok() {
                    return;
                }
            }
        };
        tokio::time::timeout(LONG, passes).await.unwrap();
    }

    for how in [Cut::Close, Cut::Stall] {
        let region = Region::parse("seoul").unwrap();
        regions.relay.cut(&region, how);
        // Each side goes on, with all that it needs.
        let stored = seoul
            .request(format!("{prefix}.pub.chat.lobby"), "\"hi\"".into())
            .await
            .unwrap();
        let ack: Value = serde_json::from_slice(&stored.payload).unwrap();
        assert_eq!(ack["domain"], "seoul", "{ack}");
        // The others see each other, and not the one that is cut off, however often they try.
        for _ in 0..LOOKS {
            reaches(&frankfurt, "seoul").await.unwrap_err();
            reaches(&seoul, "virginia").await.unwrap_err();
            reaches(&frankfurt, "virginia").await.unwrap();
            reaches(&virginia, "frankfurt").await.unwrap();
        }
        // Nothing that is said on the one side is heard on the other meanwhile.
        while let Ok(Some(_early)) = tokio::time::timeout(Duration::ZERO, heard.next()).await {}
        frankfurt
            .publish(subject.clone(), "during".into())
            .await
            .unwrap();
        let others_hear = async { while control.next().await.unwrap().payload != "during" {} };
        tokio::time::timeout(LONG, others_hear).await.unwrap();
        let heard = tokio::time::timeout(LOOK, heard.next()).await;
        assert!(heard.is_err(), "{how:?}: {heard:?}");
        regions.relay.heal(&region);
        for (from, to) in [
            (&frankfurt, "seoul"),
            (&seoul, "virginia"),
            (&virginia, "seoul"),
        ] {
            eventually("the healed region is reached", LONG, || reaches(from, to)).await;
        }
    }
}

/// A request of a mirror that was lost in a cut is answered after it: only because it was repeated.
#[tokio::test]
async fn what_a_mirror_asked_during_a_cut_is_asked_again() {
    let mut regions = Regions::start(&["seoul", "frankfurt"]).await;
    let config = regions.mesh("frankfurt").config.clone();
    let connection = Connection::open(&config.nats, "keeps mirrors")
        .await
        .unwrap();
    let keep = mirrors::keep(connection.clone(), &config);
    let tasks = natter::testing::runtime::Tasks::default();
    tasks.spawn_until_stopping("keep", keep);
    let frankfurt = client(&regions.url("frankfurt")).await;
    // What mirrors ask when they are made is not what this is about.
    let seoul = Region::parse("seoul").unwrap();
    for part in 0..config.nats.partitions {
        let info = api::stream_info(&rooms_stream(&seoul, part));
        eventually("the mirror hears its origin", LONG, async || {
            let answer = frankfurt.request(info.clone(), "".into()).await.unwrap();
            let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
            // Nanoseconds since it heard something; -1: never.
            match answer["mirror"]["active"].as_i64() {
                Some(active) if active >= 0 => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }
    eventually("it listens", LONG, async || {
        connection.is_up().then_some(()).ok_or_else(String::new)
    })
    .await;
    connection.round_trip("nobody.is.there").await;

    // A mirror in frankfurt hears nothing for 10 s, and asks again.
    regions.relay.cut(&seoul, Cut::Close);
    let mut overheard = Overheard::listen(&frankfurt).await;
    let reply = overheard.asked().await;
    reaches(&frankfurt, "seoul").await.unwrap_err();
    regions.heal("seoul");
    overheard.answered(&reply).await;
}

#[tokio::test]
async fn a_nudge_is_taken_and_who_refuses_it_is_named() {
    let mut regions = Regions::start(&["seoul", "frankfurt"]).await;
    let config = regions.mesh("seoul").config.clone();
    let (mut nats, address) = (config.nats_of_mirrors(), config.mirrors.leafnodes.clone());
    mirrors::nudge(&address, &nats).await.unwrap();
    "somebody".clone_into(&mut nats.user);
    let refused = mirrors::nudge(&address, &nats).await.unwrap_err();
    assert!(matches!(refused, NudgeError::Refused { .. }), "{refused:?}");
    assert!(refused.to_string().contains(&address), "{refused}");
    regions.kill("seoul").await;
    let gone = mirrors::nudge(&address, &nats).await.unwrap_err();
    assert!(matches!(gone, NudgeError::Io { .. }), "{gone:?}");
}
