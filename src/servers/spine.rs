//! Joins the regions of one machine: one spine server each, and the relay between them.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use futures_util::future::try_join_all;

use super::{
    nats::{NatsServer, asks},
    options::SpineOptions,
    port::{free_port_from, free_ports},
    process::{Launcher, StartError},
    relay::Relay,
};
use crate::{
    model::Region,
    subject::api::{self, in_domain},
};

/// How many times other ports are tried when those of a spine were taken meanwhile.
const PORT_ATTEMPTS: usize = 3;

/// Timeout of the wait until every region reaches every other after their start.
const JOINED_WITHIN: Duration = Duration::from_secs(30);

/// Timeout of one request to another region, and the pause after it.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// Where the spine of one region keeps its files.
#[derive(Debug, Clone)]
pub struct SpineFiles {
    /// The region.
    pub region: Region,
    /// Configuration, and the log unless `log` says otherwise.
    pub dir: PathBuf,
    /// The file for its output; `None`: `nats-server.log` in `dir`.
    pub log: Option<PathBuf>,
}

/// The running spines of all regions of this machine, joined by a relay.
#[derive(Debug)]
pub struct Spines {
    /// The links between them.
    pub relay: Relay,
    /// One spine per region, in the order of the arguments.
    pub spines: Vec<Spine>,
}

/// The running spine of one region.
#[derive(Debug)]
pub struct Spine {
    /// Its region.
    pub region: Region,
    /// The server.
    pub server: NatsServer,
    /// Address for the region's own servers: for `NatsOptions::spine`.
    pub leafnodes: SocketAddr,
}

impl Spines {
    /// Starts a spine for each of `files`, with `delay` on each link in each direction. They find each other soon
    /// afterwards; [`joined`] waits for that.
    ///
    /// # Errors
    /// [`StartError`]
    pub async fn start(
        launcher: &Launcher,
        binary: PathBuf,
        files: Vec<SpineFiles>,
        delay: Duration,
        max_payload: u64,
    ) -> Result<Self, StartError> {
        let regions: Vec<_> = files.iter().map(|files| files.region.clone()).collect();
        let port_error = |source| StartError::Port {
            name: "the links between the regions".to_owned(),
            source,
        };
        let relay = Relay::start(&regions, delay).await.map_err(port_error)?;
        let gateways = relay.gates();
        let starting = files.into_iter().map(async |files| {
            let options = SpineOptions {
                binary: binary.clone(),
                dir: files.dir,
                log: files.log,
                port: 0,
                region: files.region,
                // Chosen at the start.
                leafnodes: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
                gateway: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
                gateways: gateways.clone(),
                max_payload,
            };
            start_one(launcher, options, &relay).await
        });
        let spines = try_join_all(starting).await?;
        Ok(Self { relay, spines })
    }
}

/// Starts a spine on free ports, and leads its gate there.
async fn start_one(
    launcher: &Launcher,
    mut options: SpineOptions,
    relay: &Relay,
) -> Result<Spine, StartError> {
    let region = options.region.clone();
    let mut attempt = 1;
    loop {
        let [leafnodes, gateway] = free_ports().map_err(|source| StartError::Port {
            name: format!("spine {region}"),
            source,
        })?;
        options.leafnodes.set_port(leafnodes);
        options.gateway.set_port(gateway);
        match NatsServer::start_spine(launcher.clone(), options.clone()).await {
            Ok(server) => {
                relay.lead_to(&region, options.gateway);
                return Ok(Spine {
                    region,
                    server,
                    leafnodes: options.leafnodes,
                });
            }
            // Another process may have taken a port after it was found free.
            Err(_taken)
                if attempt < PORT_ATTEMPTS
                    && [options.leafnodes, options.gateway].iter().any(|address| {
                        free_port_from(address.ip(), address.port()).ok() != Some(address.port())
                    }) =>
            {
                attempt += 1;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Waits until, from each of `regions`, the JetStream of every other region answers. Clients reach the servers of the
/// regions at these URLs.
///
/// # Errors
/// [`StartError::Apart`] names the first pair that takes too long.
pub async fn joined(regions: &[(Region, String)]) -> Result<(), StartError> {
    let pairs = regions.iter().flat_map(|(from, url)| {
        let others = regions.iter().filter(move |(to, _)| to != from);
        others.map(move |(to, _)| reaches(from, url, to))
    });
    try_join_all(pairs).await.map(drop)
}

async fn reaches(from: &Region, url: &str, to: &Region) -> Result<(), StartError> {
    let started = tokio::time::Instant::now();
    loop {
        let look = asks(url, in_domain(to, api::INFO));
        let source = match tokio::time::timeout(LOOK_TIMEOUT, look).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(elapsed) => elapsed.into(),
        };
        if started.elapsed() >= JOINED_WITHIN {
            return Err(StartError::Apart {
                from: from.clone(),
                to: to.clone(),
                waited: JOINED_WITHIN,
                source,
            });
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}
