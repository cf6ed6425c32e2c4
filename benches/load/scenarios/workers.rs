//! Messages while a worker takes part, while it hangs, and while there is none.

use super::{
    Begin, Bench, Peer, Runs, Server, Swarm, Table, Target, WARM_UP, latency, print, publishers,
    row,
};
use crate::support::{
    endpoint::{Endpoint, Say},
    mesh::{Edge, Mesh},
};

const ROOMS: usize = 100;
const MEMBERS: usize = 10;
/// Messages a second in each room: 10,000 in ten seconds.
const RATE: f64 = 10.0;
const CONCURRENCY: usize = 32;

/// An edge, and a worker of this endpoint for all of its rooms.
async fn start(bench: &Bench, endpoint: &Endpoint, works: bool) -> (Target, Option<Edge>) {
    let url = endpoint.url();
    let toml = format!(
        "[limits]\ncommands_per_second = 10000000\ncommands_burst = 10000000\n\
         [namespaces.log]\ndurable = true\ntyping = false\npresence = 'off'\nhistory = false\n\
         [[workers]]\nname = 'bench'\nrooms = ['log:*']\nurl = '{url}'\nannotation = 'x'\nallow = ['127.0.0.1']\n\
         secret = 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw'\nconcurrency = {CONCURRENCY}\n"
    );
    let mesh = Mesh::start(&bench.nats.url(), 1, &toml).await;
    let workers = match works {
        true => Some(mesh.start_workers().await),
        false => None,
    };
    let server = |name, pid: Option<u32>| Server {
        name,
        pid: pid.unwrap(),
    };
    let target = Target {
        peer: Peer::Durable,
        addresses: vec![mesh.edges[0].address],
        servers: vec![
            server("edge", mesh.edges[0].process.pid()),
            server("nats", bench.nats.server.pid()),
        ],
        mesh: Some(mesh),
        _process: None,
    };
    (target, workers)
}

pub(super) fn workers(bench: &mut Bench) -> Table {
    let mut rows = Vec::new();
    for (name, works, say) in [
        ("none", false, Say::Hang),
        ("answers 204", true, Say::Status(204)),
        ("hangs", true, Say::Hang),
    ] {
        let mut runs = Runs::default();
        for _ in 0..bench.runs {
            let mut faults = 0;
            let figures = bench.quiet(|| {
                let say = say.clone();
                let (target, _workers, endpoint) = bench.runtime.block_on(async {
                    let endpoint = Endpoint::start(move |_| say.clone()).await;
                    let (target, workers) = start(bench, &endpoint, works).await;
                    (target, workers, endpoint)
                });
                let mut swarm: Swarm = target.swarm(ROOMS);
                let publishers = publishers(&mut swarm, ROOMS);
                swarm.connect((0..ROOMS * MEMBERS).map(|i| Some(i % ROOMS)));
                swarm.load(publishers.clone(), ROOMS, RATE, WARM_UP);
                swarm.reset();
                let said = |swarm: &Swarm| (0..ROOMS).map(|room| swarm.said(room)).sum::<u64>();
                let before = said(&swarm);
                let begin = Begin::now(&target.servers);
                swarm.load(publishers, ROOMS, RATE, bench.time);
                let cost = begin.end();
                let expected = (said(&swarm) - before) * MEMBERS as u64;
                faults += print("workers", name, &swarm.tally, expected, &cost);
                assert!(endpoint.most_open() <= CONCURRENCY, "too many requests");
                let each = |server| cost.cpu_of(server) / swarm.tally.deliveries.max(1) as f64;
                let [p50, _, p99, ..] = latency(&swarm.tally);
                let open = endpoint.most_open() as f64;
                let figures = vec![each("edge"), each("nats"), p50, p99, open];
                (cost, figures)
            });
            bench.faults += faults;
            runs.add(figures);
        }
        rows.push(row(&[name], &runs));
    }
    Table {
        title: "Workers: 100 durable rooms of 10, 1,000 messages/s, with a worker for all of them (32 requests at once)",
        columns: &[
            "worker",
            "edge, µs a delivery",
            "NATS, µs a delivery",
            "p50, ms",
            "p99, ms",
            "most open requests",
        ],
        rows,
    }
}
