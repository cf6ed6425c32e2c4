//! Who is online, over all edges and regions, as a process that is no edge sees it.

use std::{sync::Arc, time::Duration};

use natter::testing::{
    bus::{Connection as Nats, Origins, Reader},
    client::Connection,
    config::Config,
    presence::{Online, Turned},
    runtime::Tasks,
    subject::bucket,
};
use serde_json::json;
use tokio::{sync::mpsc, time::Instant};

use crate::support::{
    self, LONG,
    calls::reply,
    mesh::{Mesh, token},
    presence::{bucket_of, living},
    regions::Regions,
};

const ON: &str = "edge.shards = 2\npresence.users = true\npresence.lease = '3s'";

struct Observer {
    online: Arc<Online>,
    turned: mpsc::Receiver<Turned>,
    _tasks: Tasks,
}

impl Observer {
    async fn start(config: &Config) -> Self {
        let nats = Nats::open(&config.nats, "observer").await.unwrap();
        let reader = Reader::new(nats.clone(), &config.nats);
        let tasks = Tasks::default();
        let origins = Origins::wait_for(&nats, &config.region(), &config.nats).await;
        let config = Arc::new(config.clone());
        let (online, turned) = Online::follow(&config, &reader, &origins, &tasks);
        online.ready(Instant::now() + LONG).await.unwrap();
        Self {
            online,
            turned,
            _tasks: tasks,
        }
    }

    /// The next change.
    async fn next(&mut self) -> (String, bool) {
        let turned = tokio::time::timeout(LONG, self.turned.recv()).await;
        let turned = turned.expect("a change").unwrap();
        assert_eq!(self.online.is_online(&turned.user), Some(turned.online));
        assert_eq!(
            self.online.offline_since(&turned.user).is_some(),
            !turned.online
        );
        (turned.user.to_string(), turned.online)
    }

    async fn all(&self) -> Vec<String> {
        let page = self.online.page(None, 1000).await;
        page.iter().map(|user| user.to_string()).collect()
    }
}

#[tokio::test]
async fn users_are_online_over_edges_tabs_and_protocols_and_a_killed_edge() {
    let mesh = Mesh::start(support::nats_url(), 2, ON).await;
    let before = mesh.connect(0, "before").await;
    let mut sees = Observer::start(&mesh.config).await;
    support::eventually("who was there before is seen", LONG, async || {
        match sees.online.is_online("before") {
            Some(true) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!(sees.online.is_online("kim@x.org"), Some(false));
    assert!(sees.online.offline_since("kim@x.org").unwrap() <= Instant::now());

    // In no room, and then in rooms of both kinds, and on another shard.
    let mut kim = mesh.connect(0, "kim@x.org").await;
    let mut next = sees.next().await;
    // Who was there before may be in the first list, or come after it: then this was told.
    if next.0 == "before" {
        next = sees.next().await;
    }
    assert_eq!(next, ("kim@x.org".to_owned(), true));
    for room in ["chat:a", "chat:b", "live:a"] {
        reply(&mut kim, "join", json!({"room": room})).await;
    }
    // More tabs, on either edge, are nothing new; nor is it when they go.
    let mut tabs = Vec::new();
    for tab in 0..4 {
        tabs.push(mesh.connect(tab % 2, "kim@x.org").await);
    }
    for tab in tabs {
        tab.close().await;
    }
    let lee = mesh.connect(1, "lee").await;
    assert_eq!(sees.next().await, ("lee".to_owned(), true));
    assert_eq!(sees.all().await, ["before", "kim@x.org", "lee"]);
    let left = Instant::now();
    kim.close().await;
    assert_eq!(sees.next().await, ("kim@x.org".to_owned(), false));
    assert!(sees.online.offline_since("kim@x.org").unwrap() >= left);

    // A token that comes with the first frame.
    let mut late = Connection::open(&mesh.endpoint(0), None).await.unwrap();
    reply(&mut late, "auth", json!({"token": token("late")})).await;
    assert_eq!(sees.next().await, ("late".to_owned(), true));
    drop(late);
    assert_eq!(sees.next().await, ("late".to_owned(), false));

    // Of the users of an edge that dies, those are gone who are on no other one.
    let _both = mesh.connect(0, "lee").await;
    let presence = bucket_of(&mesh, bucket::PRESENCE).await;
    support::eventually("the second key of lee is written", LONG, async || {
        let keys = living(&presence, "=.=.lee.*").await;
        if keys.len() == 2 {
            Ok(())
        } else {
            Err(keys.len().to_string())
        }
    })
    .await;
    let mut mesh = mesh;
    mesh.edges[0].process.kill().await;
    assert_eq!(sees.next().await, ("before".to_owned(), false));
    assert_eq!(sees.all().await, ["lee"]);
    // What the edge has left is purged by the other one.
    support::eventually("keys of the dead edge are purged", LONG, async || {
        let keys = living(&presence, "=.=.*.*").await;
        if keys.len() == 1 {
            Ok(())
        } else {
            Err(keys.len().to_string())
        }
    })
    .await;
    // The last edge dies too: nobody is left to purge, and its users are gone all the same.
    mesh.edges[1].process.kill().await;
    assert_eq!(sees.next().await, ("lee".to_owned(), false));
    drop((before, lee));
}

#[tokio::test]
async fn who_is_on_edges_that_do_not_write_it_is_nowhere() {
    let mesh = Mesh::start(support::nats_url(), 1, "").await;
    let mut kim = mesh.connect(0, "kim").await;
    reply(&mut kim, "join", json!({"room": "chat:a"})).await;
    let presence = bucket_of(&mesh, bucket::PRESENCE).await;
    support::eventually("the key of the room is written", LONG, async || {
        let keys = living(&presence, ">").await;
        if keys.len() == 1 {
            Ok(())
        } else {
            Err(keys.len().to_string())
        }
    })
    .await;
    assert!(living(&presence, "=.=.*.*").await.is_empty());
}

#[tokio::test]
async fn users_of_a_region_that_is_cut_off_are_still_online() {
    let (seoul, virginia) = ("seoul", "virginia");
    let mut regions = Regions::start_with(&[seoul, virginia], ON, Duration::ZERO).await;
    for region in [seoul, virginia] {
        regions.mesh(region).add_edge().await;
    }
    let mut sees = Observer::start(&regions.mesh(seoul).config).await;
    let mut kim = regions.mesh(virginia).connect(0, "kim").await;
    assert_eq!(sees.next().await, ("kim".to_owned(), true));
    let lee = regions.mesh(seoul).connect(0, "lee").await;
    assert_eq!(sees.next().await, ("lee".to_owned(), true));
    regions.cut(seoul);
    // Longer than a lease: what is known of the other region expires here. The time is what is to be tried.
    tokio::time::sleep(Duration::from_secs(9)).await;
    assert_eq!(sees.all().await, ["kim", "lee"]);
    drop(lee);
    assert_eq!(sees.next().await, ("lee".to_owned(), false));
    reply(&mut kim, "ping", json!({})).await;
    regions.heal(seoul);
    kim.close().await;
    assert_eq!(sees.next().await, ("kim".to_owned(), false));
}
