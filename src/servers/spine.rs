//! What joins the regions of one machine: a spine server each, and the relay between them.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use futures_util::future::try_join_all;

use super::{
    nats::{NatsServer, asks},
    port::{free_port_from, free_ports},
    process::{Launcher, StartError},
    relay::Relay,
    template::{Part, quoted, render},
};
use crate::{
    model::Region,
    subject::api::{self, in_domain},
};

/// The configuration of a laptop's spine; `nats/spine.conf` says what each line is for.
const TEMPLATE: &str = include_str!("../../nats/spine.conf");

/// How often other ports are tried when those of a spine were taken in between.
const PORT_ATTEMPTS: usize = 3;

/// How long it may take until every region reaches every other after their start.
const JOINED_WITHIN: Duration = Duration::from_secs(30);

/// How long one look at another region may take, and the pause after it.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// What a region's spine on this machine is told.
#[derive(Debug, Clone)]
pub struct SpineOptions {
    /// The program.
    pub binary: PathBuf,
    /// Its folder: configuration and log.
    pub dir: PathBuf,
    /// Where its output goes; `None`: `nats-server.log` in `dir`.
    pub log: Option<PathBuf>,
    /// Port on loopback for clients; 0: any that is free.
    pub port: u16,
    /// Names the server and its gateway.
    pub region: Region,
    /// Where it listens for the region's own servers.
    pub leafnodes: SocketAddr,
    /// Where it listens for other spines.
    pub gateway: SocketAddr,
    /// Where each spine (its own too) is reached by the others.
    pub gateways: Vec<(Region, SocketAddr)>,
    /// Largest message with its headers, in bytes; the same as in the regions.
    pub max_payload: u64,
}

impl SpineOptions {
    /// The text of the server's configuration.
    pub(super) fn render(&self, port: Option<u16>) -> String {
        let region = &self.region;
        let port = port.map_or_else(|| "-1".to_owned(), |port| port.to_string());
        let listen = |address: SocketAddr| format!("listen: {}", quoted(&address.to_string()));
        let own = self.gateways.iter().find(|(name, _)| name == region);
        let advertise = own.map_or(self.gateway, |(_, address)| *address);
        let gateways = || {
            self.gateways.iter().map(|(name, address)| {
                let (name, url) = (quoted(name.as_str()), quoted(&format!("nats://{address}")));
                format!("{{ name: {name}, url: {url} }}")
            })
        };
        render(TEMPLATE, |name| {
            Some(Part::Line(match name {
                "server_name" => {
                    format!("server_name: {}", quoted(&format!("natter-spine-{region}")))
                }
                "listen" => format!("listen: {}", quoted(&format!("127.0.0.1:{port}"))),
                "leafnodes" => listen(self.leafnodes),
                "gateway_name" => format!("name: {}", quoted(region.as_str())),
                "gateway_listen" => listen(self.gateway),
                "gateway_advertise" => {
                    format!("advertise: {}", quoted(&advertise.to_string()))
                }
                "gateways" => return Some(Part::Block(gateways().collect())),
                "max_payload" => format!("max_payload: {}", self.max_payload),
                _ => return None,
            }))
        })
    }
}

/// Where the spine of one region keeps its files.
#[derive(Debug, Clone)]
pub struct SpineFiles {
    /// The region.
    pub region: Region,
    /// Configuration, and the log unless `log` says otherwise.
    pub dir: PathBuf,
    /// Where its output goes; `None`: `nats-server.log` in `dir`.
    pub log: Option<PathBuf>,
}

/// The running spines of all regions of this machine, joined by a relay.
#[derive(Debug)]
pub struct Spines {
    /// The links between them.
    pub relay: Relay,
    /// A spine a region, in the order in which they were asked for.
    pub spines: Vec<Spine>,
}

/// The running spine of one region.
#[derive(Debug)]
pub struct Spine {
    /// Its region.
    pub region: Region,
    /// The server.
    pub server: NatsServer,
    /// Where the region's own servers reach it: for `NatsOptions::spine`.
    pub leafnodes: SocketAddr,
}

impl Spines {
    /// Starts a spine for each of `files`, with `delay` on the way from each to each. They find each other soon after
    /// that: [`joined`] waits for it.
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
                // Chosen by the start.
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

/// Starts a spine on ports that are free, and leads its gate there.
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
            // Somebody may have taken a port between the look and the start.
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

/// Waits until each of `regions`, whose servers clients reach at these URLs, gets an answer of the JetStream of each
/// other.
///
/// # Errors
/// [`StartError::Apart`] names the first pair for which it takes too long.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_what_its_own_values_render_to() {
        let region = Region::parse("local").unwrap();
        let gateway = "127.0.0.1:7222".parse().unwrap();
        let options = SpineOptions {
            binary: PathBuf::from("nats-server"),
            dir: PathBuf::from(".natter/local/spine"),
            log: None,
            port: 4322,
            leafnodes: "127.0.0.1:7422".parse().unwrap(),
            gateway,
            gateways: vec![(region.clone(), gateway)],
            region,
            max_payload: 1024 * 1024,
        };
        assert_eq!(options.render(Some(4322)), TEMPLATE);
    }

    #[test]
    fn others_are_told_the_way_through_the_relay() {
        let regions = ["seoul", "frankfurt"].map(|name| Region::parse(name).unwrap());
        let [seoul, frankfurt] = regions.clone();
        let options = SpineOptions {
            binary: PathBuf::from("nats-server"),
            dir: PathBuf::from("spine"),
            log: None,
            port: 0,
            region: seoul.clone(),
            leafnodes: "127.0.0.1:10".parse().unwrap(),
            gateway: "127.0.0.1:11".parse().unwrap(),
            gateways: vec![
                (seoul, "127.0.0.1:21".parse().unwrap()),
                (frankfurt, "127.0.0.1:22".parse().unwrap()),
            ],
            max_payload: 1024 * 1024,
        };
        let text = options.render(None);
        for part in [
            "listen: \"127.0.0.1:-1\"",
            "listen: \"127.0.0.1:11\" # @gateway_listen",
            "advertise: \"127.0.0.1:21\"",
            "{ name: \"frankfurt\", url: \"nats://127.0.0.1:22\" }",
        ] {
            assert!(text.contains(part), "{part} is missing in:\n{text}");
        }
        assert!(!text.contains("\"local\""), "{text}");
    }
}
