//! Events of presence: one for each user and change, over tabs, edges, regions and a cut.

use std::time::Duration;

use serde_json::json;

use super::{SECRET, kind, told};
use crate::support::{
    LONG,
    calls::reply,
    endpoint::{Asked, Endpoint, Say},
    eventually,
    mesh::Mesh,
    nats_url,
    regions::Regions,
};

fn toml(endpoint: &Endpoint) -> String {
    let url = endpoint.url();
    format!(
        "edge.shards = 1\n[presence]\nusers = true\nlease = '3s'\n[hook]\noffline_after = '2s'\n\
         [[hooks]]\nname = 'who'\nrooms = ['chat:*']\nurl = '{url}'\nsecret = 'whsec_{SECRET}'\n\
         events = ['user.online', 'user.offline', 'room.occupied', 'room.vacated']\nallow = ['127.0.0.1']\n"
    )
}

/// `user.online kim` and so on, in the order in which they were told.
fn of_users(told: &[Asked]) -> Vec<String> {
    let of_user = |asked: &&Asked| asked.body["data"]["user"].is_string();
    let shown = |asked: &Asked| {
        format!(
            "{} {}",
            kind(asked),
            asked.body["data"]["user"].as_str().unwrap()
        )
    };
    told.iter().filter(of_user).map(shown).collect()
}

fn of_rooms(told: &[Asked]) -> Vec<String> {
    let of_room = |asked: &&Asked| asked.body["data"]["room"].is_string();
    let shown = |asked: &Asked| {
        format!(
            "{} {}",
            kind(asked),
            asked.body["data"]["room"].as_str().unwrap()
        )
    };
    told.iter().filter(of_room).map(shown).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_comes_and_goes_once_however_many_tabs_edges_and_processes_there_are() {
    let endpoint = Endpoint::start(|_| Say::Status(200)).await;
    let mesh = Mesh::start(nats_url(), 2, &toml(&endpoint)).await;
    let mut hooks = mesh.start_hooks(0).await;
    let _other = mesh.start_hooks(1).await;
    let mut kim = mesh.connect(0, "kim").await;
    reply(&mut kim, "join", json!({"room": "chat:a"})).await;
    let all = told(&endpoint, 2).await;
    assert_eq!(of_users(&all), ["user.online kim"]);
    assert_eq!(of_rooms(&all), ["room.occupied chat:a"]);
    // More tabs on either edge, also in the same room.
    for edge in [0, 1, 0, 1] {
        let mut tab = mesh.connect(edge, "kim").await;
        reply(&mut tab, "join", json!({"room": "chat:a"})).await;
        tab.close().await;
    }
    // A reload: away for less than `offline_after`. The room was empty for a moment, and may say so.
    kim.close().await;
    let mut kim = mesh.connect(1, "kim").await;
    reply(&mut kim, "join", json!({"room": "chat:b"})).await;
    eventually("the other room is occupied", LONG, async || {
        let all = of_rooms(&super::first_times(&endpoint));
        let is_told = all.iter().any(|told| told == "room.occupied chat:b");
        is_told.then_some(()).ok_or(format!("{all:?}"))
    })
    .await;
    // The process that tells is killed. What happens meanwhile is told by the other one.
    hooks.process.kill().await;
    let lee = mesh.connect(0, "lee").await;
    kim.close().await;
    eventually("kim is offline, and lee is online", LONG, async || {
        let all = super::first_times(&endpoint);
        let mut of_users = of_users(&all);
        of_users.sort_unstable();
        let done = of_users == ["user.offline kim", "user.online kim", "user.online lee"];
        done.then_some(()).ok_or(format!("{of_users:?}"))
    })
    .await;
    eventually("both rooms are empty", LONG, async || {
        let all = of_rooms(&super::first_times(&endpoint));
        let last = |room: &str| all.iter().rfind(|told| told.ends_with(room)).cloned();
        let done = last("chat:a").as_deref() == Some("room.vacated chat:a")
            && last("chat:b").as_deref() == Some("room.vacated chat:b");
        done.then_some(()).ok_or(format!("{all:?}"))
    })
    .await;
    // Each room is told to have somebody and nobody in turn.
    let all = super::first_times(&endpoint);
    for room in ["chat:a", "chat:b"] {
        let of_room: Vec<String> = of_rooms(&all)
            .into_iter()
            .filter(|told| told.ends_with(room))
            .collect();
        for (n, told) in of_room.iter().enumerate() {
            let expected = if n % 2 == 0 {
                "room.occupied"
            } else {
                "room.vacated"
            };
            assert!(told.starts_with(expected), "{of_room:?}");
        }
    }
    lee.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_region_that_is_cut_off_makes_nobody_come_or_go_twice() {
    let endpoint = Endpoint::start(|_| Say::Status(200)).await;
    let (seoul, virginia) = ("seoul", "virginia");
    let mut regions =
        Regions::start_with(&[seoul, virginia], &toml(&endpoint), Duration::ZERO).await;
    let mut processes = Vec::new();
    for region in [seoul, virginia] {
        regions.mesh(region).add_edge().await;
        processes.push(regions.mesh(region).start_hooks(0).await);
    }
    // Some of them belong to each of the regions.
    let users = ["kim", "lee", "ann", "bob", "eve", "joe"];
    let mut tabs = Vec::new();
    for user in users {
        for region in [seoul, virginia] {
            tabs.push((region, user, regions.at(region).connect(0, user).await));
        }
    }
    let mut expected: Vec<String> = users
        .iter()
        .map(|user| format!("user.online {user}"))
        .collect();
    expected.sort_unstable();
    let all = told(&endpoint, users.len()).await;
    let sorted = |told: &[Asked]| {
        let mut all = of_users(told);
        all.sort_unstable();
        all
    };
    assert_eq!(sorted(&all), expected);
    regions.cut(virginia);
    // Longer than a lease: what is known of the other region expires here. The time is what is to be tried.
    tokio::time::sleep(Duration::from_secs(9)).await;
    // Half of them leave one region, and are still in the other one, which can't be reached.
    let mut kept = Vec::new();
    for (region, user, tab) in tabs {
        match region == seoul && ["kim", "lee", "ann"].contains(&user) {
            true => drop(tab.close().await),
            false => kept.push((user, tab)),
        }
    }
    regions.heal(virginia);
    // After the heal somebody really goes: from both regions.
    for (user, tab) in kept {
        if ["kim", "joe"].contains(&user) {
            tab.close().await;
        } else {
            tabs_stay(tab);
        }
    }
    expected.extend(["kim", "joe"].map(|user| format!("user.offline {user}")));
    expected.sort_unstable();
    eventually("those who left are offline", LONG, async || {
        let all = sorted(&super::first_times(&endpoint));
        (all == expected).then_some(()).ok_or(format!("{all:?}"))
    })
    .await;
    drop(processes);
}

/// A session that lives until the process of the test ends.
fn tabs_stay(tab: natter::testing::client::Connection) {
    std::mem::forget(tab);
}
