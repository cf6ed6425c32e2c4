//! An announcement to many who are away: how long until each has their notification, and what it takes.

use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use serde_json::json;
use tokio::time::sleep;

use super::{
    Begin, Bench, Runs, Server, Table, print, row,
    watch::{post, token},
};
use crate::{
    measure::Tally,
    support::{
        browser::Browser,
        endpoint::{Endpoint, Say},
        mesh::{Mesh, ask},
    },
};

/// Rooms that get the announcement, each with as many members as a room may name.
const ROOMS: usize = 10;
const MEMBERS: usize = 1000;

/// Requests at once to make devices and rooms.
const AT_ONCE: usize = 64;

pub(super) fn push(bench: &mut Bench) -> Table {
    const PRIVATE: &str = "yfWPiYE-n46HLnH0KqZOF1fJJU3MYrct3AELtAQ-oRw";
    const PUBLIC: &str =
        "BP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIgDll6e3vCYLocInmYWAmS6TlzAC8wEqKK6PBru3jl7A8";
    let toml = format!(
        "presence.users = true\n[namespaces.log]\ndurable = true\ntyping = false\n\
         [push]\nallow = ['127.0.0.1']\nsubject = 'mailto:ops@example.org'\n\
         vapid_private_key = '{PRIVATE}'\nvapid_public_key = '{PUBLIC}'\n"
    );
    let all = ROOMS * MEMBERS;
    let mut runs = Runs::default();
    for _ in 0..bench.runs {
        let (mesh, notifier, service) = bench.runtime.block_on(async {
            let service = Endpoint::start(|_| Say::Status(201)).await;
            let mesh = Mesh::start(&bench.nats.url(), 1, &toml).await;
            let address = mesh.edges[0].address;
            let (browser, port) = (Browser::new(), service.port);
            stream::iter(0..all)
                .for_each_concurrent(AT_ONCE, |user| {
                    let url = format!("http://127.0.0.1:{port}/{user}");
                    let body = json!({ "kind": "webpush", "subscription": browser.subscription(&url) });
                    async move {
                        let put = ("PUT", "/v1/devices/laptop");
                        let (status, answer) = ask(address, put, &token(&format!("u{user}")), &body).await;
                        assert_eq!(status, 204, "{answer}");
                    }
                })
                .await;
            for room in 0..ROOMS {
                let members = room * MEMBERS..(room + 1) * MEMBERS;
                let members: Vec<String> = members.map(|user| format!("u{user}")).collect();
                let name = format!("a{room}");
                let new =
                    json!({ "namespace": "log", "kind": "group", "name": name, "members": members });
                post(address, "/v1/rooms", "desk", new).await;
            }
            let notifier = mesh.start_notifier(&[]).await;
            (mesh, notifier, service)
        });
        let server = |name, pid: Option<u32>| Server {
            name,
            pid: pid.unwrap(),
        };
        let servers = [
            server("notifier", notifier.process.pid()),
            server("nats", bench.nats.server.pid()),
        ];
        let idle = servers[0].memory().0;
        let begin = Begin::now(&servers);
        let asked_at = Instant::now();
        bench.runtime.block_on(async {
            let address = mesh.edges[0].address;
            for room in 0..ROOMS {
                let path = format!("/v1/rooms/log:a{room}/messages");
                post(
                    address,
                    &path,
                    "desk",
                    json!({ "body": { "text": "we are moving" } }),
                )
                .await;
            }
            while service.count() < all && asked_at.elapsed() < Duration::from_secs(300) {
                sleep(Duration::from_millis(20)).await;
            }
        });
        let cost = begin.end();
        let mut notified: Vec<String> = service
            .asked()
            .into_iter()
            .map(|asked| asked.path)
            .collect();
        let sent = notified.len();
        notified.sort_unstable();
        notified.dedup();
        let tally = Tally {
            deliveries: sent as u64,
            lost: (all - notified.len()) as u64,
            repeated: (sent - notified.len()) as u64,
            ..Tally::default()
        };
        bench.faults += print("push", "web push", &tally, all as u64, &cost);
        let memory = servers[0].memory().1 as f64 / 1_048_576.0;
        runs.add(vec![
            cost.seconds,
            cost.cpu_of("notifier") / all as f64,
            cost.cpu_of("nats") / all as f64,
            idle as f64 / 1_048_576.0,
            memory,
            service.most_open() as f64,
        ]);
    }
    Table {
        title: "Push: an announcement in 10 groups of 1,000 who are all away, one browser each",
        columns: &[
            "service",
            "s until the last",
            "notifier, µs each",
            "NATS, µs each",
            "notifier before, MiB",
            "at most, MiB",
            "most open requests",
        ],
        rows: vec![row(&["Web Push"], &runs)],
    }
}
