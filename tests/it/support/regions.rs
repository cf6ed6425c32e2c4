//! Several regions with real servers: a nats-server and a spine each, and the relay between them.

use std::{net::SocketAddr, time::Duration};

use natter::testing::{
    mesh::provision::{self, provision_mesh},
    model::Region,
    servers::{
        Cut, NatsOptions, NatsServer, Relay, Spine, SpineFiles, SpineLink, Spines, free_port,
        joined,
    },
};
use rustix::process::Signal;
use tempfile::TempDir;

use super::{binaries, config, launcher, mesh::Mesh, signal, unique};

/// Regions that see each other, with their streams and the mirrors of those of the others.
pub(crate) struct Regions {
    regions: Vec<Running>,
    pub(crate) relay: Relay,
    _dir: TempDir,
}

struct Running {
    name: String,
    // Dropped first: edges before their servers.
    mesh: Mesh,
    nats: NatsServer,
    spine: Spine,
}

impl Regions {
    /// Starts regions of these names, in one mesh, without edges.
    pub(crate) async fn start(names: &[&str]) -> Self {
        Self::start_with(names, "", Duration::ZERO).await
    }

    /// As [`Self::start`], with `toml` on top of the defaults, and with `delay` from region to region.
    pub(crate) async fn start_with(names: &[&str], toml: &str, delay: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let own = unique("r");
        let mut values: toml::Table = toml.parse().unwrap();
        let section = |values: &mut toml::Table, section: &str, key: &str| {
            let table = values.entry(section).or_insert(toml::Table::new().into());
            let table = table.as_table_mut().unwrap();
            table.entry(key).or_insert(own.clone().into());
        };
        section(&mut values, "nats", "prefix");
        section(&mut values, "mongodb", "database");
        let of_region = |name: &str| {
            let mut values = values.clone();
            values.insert("region".to_owned(), name.into());
            let all: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            values.insert("regions".to_owned(), all.into());
            toml::to_string(&values).unwrap()
        };
        let files = |name: &&str| SpineFiles {
            region: Region::parse(name).unwrap(),
            dir: dir.path().join(name).join("spine"),
            log: None,
        };
        let binary = binaries().await.nats_server.clone();
        let options = |name: &str| {
            let dir = dir.path().join(name).join("nats");
            let config = config(&of_region(name));
            NatsOptions::new(&config, binary.clone(), dir, 0)
        };
        let max_payload = options(names[0]).max_payload;
        let files = names.iter().map(files).collect();
        let Spines { relay, spines } =
            Spines::start(&launcher(), binary.clone(), files, delay, max_payload)
                .await
                .unwrap();
        let mut servers = Vec::new();
        for spine in spines {
            let mut options = options(spine.region.as_str());
            let leafnodes = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
            options.spine = Some(SpineLink {
                spine: spine.leafnodes,
                leafnodes,
            });
            let nats = NatsServer::start(launcher(), options).await.unwrap();
            servers.push((spine, nats, leafnodes));
        }
        let urls: Vec<_> = servers
            .iter()
            .map(|(spine, nats, _)| (spine.region.clone(), nats.url()))
            .collect();
        joined(&urls).await.unwrap();
        let mut regions = Vec::new();
        for (spine, nats, leafnodes) in servers {
            let name = spine.region.as_str().to_owned();
            let mut values: toml::Table = of_region(&name).parse().unwrap();
            let mirrors = [("leafnodes".to_owned(), leafnodes.to_string().into())];
            values.insert("mirrors".to_owned(), toml::Table::from_iter(mirrors).into());
            let toml = toml::to_string(&values).unwrap();
            let mesh = Mesh::without_edges(&nats.url(), &toml).await;
            regions.push(Running {
                name,
                mesh,
                nats,
                spine,
            });
        }
        let started = Self {
            regions,
            relay,
            _dir: dir,
        };
        started.provision(names[0]).await;
        started
    }

    /// Creates what is missing of all streams and mirrors, over the server of one region.
    pub(crate) async fn provision(&self, over: &str) {
        let config = &self.region(over).mesh.config;
        let client = provision::connect(&config.nats).await.unwrap();
        let options = provision::Options::default();
        let provisioned = provision_mesh(&client, config, &config.regions(), options)
            .await
            .unwrap();
        assert!(!provisioned.is_incomplete(), "{provisioned:?}");
    }

    fn region(&self, name: &str) -> &Running {
        let found = self.regions.iter().find(|region| region.name == name);
        found.expect("a region that was started")
    }

    fn region_mut(&mut self, name: &str) -> &mut Running {
        let found = self.regions.iter_mut().find(|region| region.name == name);
        found.expect("a region that was started")
    }

    /// The region's edges, history services and configuration.
    pub(crate) fn mesh(&mut self, name: &str) -> &mut Mesh {
        &mut self.region_mut(name).mesh
    }

    /// As [`Self::mesh`], only to look at and to connect to.
    pub(crate) fn at(&self, name: &str) -> &Mesh {
        &self.region(name).mesh
    }

    /// URL of the region's nats-server.
    pub(crate) fn url(&self, name: &str) -> String {
        self.region(name).nats.url()
    }

    /// Process ids of the region's nats-server and of its spine.
    pub(crate) fn pids(&self, name: &str) -> [u32; 2] {
        let region = self.region(name);
        [&region.nats, &region.spine.server].map(|server| server.pid().unwrap())
    }

    /// Cuts a region off from all others, as a network does that is gone.
    pub(crate) fn cut(&self, name: &str) {
        self.relay.cut(&self.region(name).spine.region, Cut::Stall);
    }

    /// Ends a cut.
    pub(crate) fn heal(&self, name: &str) {
        self.relay.heal(&self.region(name).spine.region);
    }

    /// SIGKILL to the region's nats-server.
    pub(crate) async fn kill(&mut self, name: &str) {
        self.region_mut(name).nats.kill().await;
    }

    /// Starts the region's nats-server (again), with the same port and data.
    pub(crate) async fn restart(&mut self, name: &str) {
        self.region_mut(name).nats.restart().await.unwrap();
    }

    /// SIGSTOP to the region's nats-server; returns when it stands still.
    pub(crate) fn pause(&self, name: &str) {
        signal(self.region(name).nats.pid().unwrap(), Signal::STOP);
    }

    /// SIGCONT to the region's nats-server.
    pub(crate) fn resume(&self, name: &str) {
        signal(self.region(name).nats.pid().unwrap(), Signal::CONT);
    }

    /// SIGKILL to the region's spine, and a start of a new one.
    pub(crate) async fn restart_spine(&mut self, name: &str) {
        self.region_mut(name).spine.server.restart().await.unwrap();
    }
}
