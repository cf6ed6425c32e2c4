//! The options of a nats-server on this machine, and its configuration file.

use std::{net::SocketAddr, path::PathBuf};

use super::template::{Part, quoted, render};
use crate::{config::Config, model::Region, subject::Subjects};

/// The configuration of a laptop's server; lines marked `# @name` are replaced.
const REGION: &str = include_str!("../../nats/server.conf");

/// The configuration of a laptop's spine; `nats/spine.conf` explains each line.
const SPINE: &str = include_str!("../../nats/spine.conf");

/// Smallest `max_payload`: the server's own default.
const MIN_MAX_PAYLOAD: u64 = 1024 * 1024;

/// Space for headers in addition to the largest body.
const HEADER_ROOM: u64 = 64 * 1024;

/// Options of a region's server on this machine.
#[derive(Debug, Clone)]
pub struct NatsOptions {
    /// The program.
    pub binary: PathBuf,
    /// Its folder: configuration, JetStream's store, log.
    pub dir: PathBuf,
    /// The file for its output; `None`: `nats-server.log` in `dir`.
    pub log: Option<PathBuf>,
    /// Port on loopback; 0: any free one.
    pub port: u16,
    /// Name of the server and of its JetStream domain.
    pub region: Region,
    /// `None`: there are no other regions.
    pub spine: Option<SpineLink>,
    /// First token of the subjects.
    pub prefix: String,
    /// For the mapping of `<prefix>.pub.<namespace>.<room>`.
    pub partitions: u16,
    /// Namespaces, and whether they are durable.
    pub namespaces: Vec<(String, bool)>,
    /// Largest message with its headers, in bytes.
    pub max_payload: u64,
}

/// The links of a region's server to other regions.
#[derive(Debug, Clone)]
pub struct SpineLink {
    /// Address at which the region's spine listens for leaf nodes.
    pub spine: SocketAddr,
    /// Address at which the server itself listens for leaf nodes: `mirrors.leafnodes` of its region.
    pub leafnodes: SocketAddr,
}

/// Options of a region's spine on this machine.
#[derive(Debug, Clone)]
pub struct SpineOptions {
    /// The program.
    pub binary: PathBuf,
    /// Its folder: configuration and log.
    pub dir: PathBuf,
    /// The file for its output; `None`: `nats-server.log` in `dir`.
    pub log: Option<PathBuf>,
    /// Port on loopback for clients; 0: any free one.
    pub port: u16,
    /// Name of the server and of its gateway.
    pub region: Region,
    /// Address at which it listens for the region's own servers.
    pub leafnodes: SocketAddr,
    /// Address at which it listens for other spines.
    pub gateway: SocketAddr,
    /// Address at which each spine (this one too) is reached by the others.
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
        render(SPINE, |name| {
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

impl NatsOptions {
    /// The options of a region's server according to `config`.
    #[must_use]
    pub fn new(config: &Config, binary: PathBuf, dir: PathBuf, port: u16) -> Self {
        Self {
            binary,
            dir,
            log: None,
            port,
            region: config.region(),
            spine: None,
            prefix: config.nats.prefix.clone(),
            partitions: config.nats.partitions,
            namespaces: config
                .namespaces
                .iter()
                .map(|(name, namespace)| (name.clone(), namespace.durable))
                .collect(),
            max_payload: (config.limits.body.as_u64() + HEADER_ROOM).max(MIN_MAX_PAYLOAD),
        }
    }

    /// The text of the server's configuration.
    pub(super) fn render(&self, port: Option<u16>) -> String {
        let subjects = Subjects::new(&self.prefix);
        let region = &self.region;
        let by_hand = subjects.by_hand_durable(region);
        // -1 lets the server choose a port, which it writes to the ports file.
        let port = port.map_or_else(|| "-1".to_owned(), |port| port.to_string());
        let mappings = || {
            let namespaces = self.namespaces.iter().map(|(n, durable)| (&**n, *durable));
            subjects
                .mappings(region, self.partitions, namespaces)
                .into_iter()
                .map(|(from, to)| format!("{}: {}", quoted(&from), quoted(&to)))
        };
        let spine = || match &self.spine {
            None => vec!["remotes: [ ]".to_owned()],
            Some(SpineLink { spine, leafnodes }) => {
                let listen = quoted(&leafnodes.to_string());
                let url = quoted(&format!("nats-leaf://natter:natter@{spine}"));
                vec![
                    format!("listen: {listen}"),
                    format!("remotes: [ {{ url: {url}, account: natter }} ]"),
                ]
            }
        };
        render(REGION, |name| {
            Some(Part::Line(match name {
                "server_name" => format!("server_name: {}", quoted(&format!("natter-{region}"))),
                "listen" => format!("listen: {}", quoted(&format!("127.0.0.1:{port}"))),
                "store_dir" => format!("store_dir: {}", quoted(&self.dir.to_string_lossy())),
                "domain" => format!("domain: {}", quoted(region.as_str())),
                "spine" => return Some(Part::Block(spine())),
                "max_payload" => format!("max_payload: {}", self.max_payload),
                "exports" => format!(
                    "exports: [ {{ service: {}, accounts: [ natter ] }} ]",
                    quoted(&by_hand)
                ),
                "imports" => format!(
                    "imports: [ {{ service: {{ account: natter, subject: {} }} }} ]",
                    quoted(&by_hand)
                ),
                "mappings" => return Some(Part::Block(mappings().collect())),
                _ => return None,
            }))
        })
    }
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format, Toml};

    use super::*;

    fn options(toml: &str) -> NatsOptions {
        let config = Config::with_defaults(Toml::string(toml)).unwrap();
        NatsOptions::new(
            &config,
            PathBuf::from("nats-server"),
            PathBuf::from(".natter/nats"),
            4222,
        )
    }

    #[test]
    fn a_regions_file_is_what_the_defaults_render_to() {
        assert_eq!(options("").render(Some(4222)), REGION);
    }

    #[test]
    fn the_configuration_follows_region_prefix_and_namespaces() {
        let text = options(
            "region = 'seoul'\n[nats]\nprefix = 'm2'\npartitions = 2\n[namespaces.games]\ndurable = true\ntyping = false",
        )
        .render(None);
        for part in [
            "listen: \"127.0.0.1:-1\"",
            "domain: \"seoul\"",
            "\"m2.put.seoul.*.*\": \"m2.in.seoul.{{partition(2,1,2)}}.{{wildcard(1)}}.{{wildcard(2)}}.msg\"",
            "\"m2.pub.games.*\": \"m2.put.seoul.games.{{wildcard(1)}}\"",
            "\"m2.pub.live.*\": \"m2.eph.live.{{wildcard(1)}}\"",
            "service: \"m2.put.seoul.*.*\"",
        ] {
            assert!(text.contains(part), "{part} is missing in:\n{text}");
        }
        let rules = text
            .lines()
            .filter(|line| !line.trim_start().starts_with('#'));
        assert!(
            rules.clone().all(|line| !line.contains("natter.")),
            "{text}"
        );
    }

    #[test]
    fn a_spines_file_is_what_its_own_values_render_to() {
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
        assert_eq!(options.render(Some(4322)), SPINE);
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
