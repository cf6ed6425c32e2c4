//! The start of everything that `natter up` runs, in order.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use tokio::task::JoinSet;

use super::{
    Args,
    control::Control,
    data_dir::DataDir,
    edge::{self, EdgeTemplate},
    history::HistoryTemplate,
    report::{EdgeReport, HealthReport, RegionReport, Report},
    say,
    stack::{Role, Stack},
    token,
    worker::{Demo, ServiceTemplate, worker_env},
};
use crate::{
    config::{Config, Secret, UploadStorage},
    mesh::provision::{self, provision_mesh},
    servers::{
        Binaries, Launcher, Mongod, MongodOptions, NatsOptions, NatsServer, Process, Sources, Spec,
        SpineFiles, SpineLink, Spines, free_port, free_port_from, joined,
    },
};

/// Folder of downloaded programs, independent of the data folder.
const BINARIES: &str = ".natter/bin";

/// How many ports are tried when the chosen one was taken meanwhile.
const PORT_ATTEMPTS: usize = 3;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// The running server of one region.
struct Region {
    config: Config,
    nats_url: String,
    nats_pid: Option<u32>,
    spine_pid: Option<u32>,
}

/// The next port of each kind. Ports of a region follow those of the region before.
struct Ports {
    edges: u16,
    history: u16,
    workers: u16,
    hooks: u16,
    notifiers: u16,
}

/// Starts everything, in order. Children that were ready once are in `stack`, even if this fails or is dropped; all
/// others are killed then. `configs` has one configuration per region.
pub(super) async fn start(
    args: &Args,
    configs: &[Config],
    config_file: Option<&Path>,
    stack: &mut Stack,
) -> anyhow::Result<Report> {
    let config = configs.first().context("there is no region")?;
    let binary = std::env::current_exe().context("the path of this program is not known")?;
    let data = Arc::new(DataDir::open(&args.data).await?);
    stack.data = Some(Arc::clone(&data));
    let sources = Sources {
        nats_server: config.servers.nats_server.clone(),
        mongod: config.servers.mongod.clone(),
        cache: std::path::absolute(BINARIES)?,
        guard: binary.clone(),
    };
    let binaries = Binaries::locate(&sources, !args.no_mongodb, &say).await?;
    let launcher = Launcher {
        guard: binary.clone(),
        held: Some(data.held_by_children()),
    };
    let logs = data.path().join("logs");

    let mongod = async {
        let Some(binary) = binaries.mongod else {
            return Ok(None);
        };
        let options = MongodOptions {
            binary,
            dir: data.path().join("mongo"),
            log: Some(logs.join("mongod.log")),
            port: args.mongodb_port,
        };
        start_mongod(&launcher, options).await.map(Some)
    };
    let nats = start_all_nats(args, configs, &launcher, binaries.nats_server, &data);
    let (started, mongod) = tokio::try_join!(nats, mongod)?;
    let mut regions = keep_all_nats(started, configs, &data, stack)?;
    let (mongodb, mongod_pid) = match mongod {
        Some(mongod) => {
            let running = (Some(mongod.url()), mongod.pid());
            stack.supervise(Role::Mongod, mongod.into_process());
            running
        }
        None => (None, None),
    };

    provision_all(&regions).await?;
    for region in &mut regions {
        let uploads = &mut region.config.uploads;
        // The registry of uploads is in MongoDB.
        if !uploads.is_on() && mongodb.is_some() {
            uploads.storage = UploadStorage::Local;
            uploads.folder = data.path().join("uploads");
            uploads.secret = Secret::new(data.secret()?);
        }
    }

    let configured = config.auth.hs256_secret.expose();
    let development = if configured.is_empty() {
        Some(data.secret()?)
    } else {
        None
    };
    let token = token::development(&config.auth, development.as_deref().unwrap_or(configured))?;
    let mut report = Report {
        regions: Vec::new(),
        mongodb,
        mongod_pid,
        token,
        pid: std::process::id(),
    };
    let any = args.port == Some(0);
    let port_of = |listen: SocketAddr| if any { 0 } else { listen.port() };
    let mut ports = Ports {
        edges: args.port.unwrap_or(config.edge.listen.port()),
        history: port_of(config.history.listen),
        workers: port_of(config.worker.listen),
        hooks: port_of(config.hook.listen),
        notifiers: port_of(config.push.listen),
    };
    let demo = match args.demo_worker {
        true => {
            let demo = Demo::prepare(config, data.path(), &data.secret()?, free_port()?)?;
            let mut process = Process::new(launcher.clone(), demo.spec(&logs));
            process.start().await?;
            stack.supervise(Role::DemoWorker, process);
            Some(demo)
        }
        false => None,
    };
    for (number, region) in regions.iter().enumerate() {
        let template = EdgeTemplate {
            binary: &binary,
            config: &region.config,
            config_file,
            nats_url: &region.nats_url,
            secret: development.as_deref(),
            logs: logs.clone(),
        };
        let edges =
            start_edges(args.edges, number, &mut ports, &template, &launcher, stack).await?;
        let mut history = Vec::new();
        if let Some(mongodb_url) = &report.mongodb {
            let template = HistoryTemplate {
                binary: &binary,
                config: &region.config,
                config_file,
                nats_url: &region.nats_url,
                mongodb_url,
                logs: logs.clone(),
            };
            let listen = config.history.listen.ip();
            let role = Role::History { region: number };
            let spec = |address| template.spec(address);
            let port = &mut ports.history;
            let started = start_service("history", role, listen, port, spec, &launcher, stack);
            history.push(started.await?);
        }
        let mut workers = Vec::new();
        if demo.is_some() || !region.config.workers.is_empty() {
            let edge = edges.first().map(|edge| &*edge.http);
            let template = ServiceTemplate {
                role: "worker",
                listen: "NATTER__WORKER__LISTEN",
                env: worker_env(&region.config, demo.as_ref(), edge),
                binary: &binary,
                config: &region.config,
                config_file,
                nats_url: &region.nats_url,
                logs: logs.clone(),
            };
            let listen = config.worker.listen.ip();
            let role = Role::Workers { region: number };
            let spec = |address| template.spec(address);
            let port = &mut ports.workers;
            let started = start_service("worker", role, listen, port, spec, &launcher, stack);
            workers.push(started.await?);
        }
        let mut hooks = Vec::new();
        if !region.config.hooks.is_empty() {
            let template = ServiceTemplate {
                role: "hooks",
                listen: "NATTER__HOOK__LISTEN",
                env: Vec::new(),
                binary: &binary,
                config: &region.config,
                config_file,
                nats_url: &region.nats_url,
                logs: logs.clone(),
            };
            let listen = config.hook.listen.ip();
            let role = Role::Hooks { region: number };
            let spec = |address| template.spec(address);
            let port = &mut ports.hooks;
            let started = start_service("hooks", role, listen, port, spec, &launcher, stack);
            hooks.push(started.await?);
        }
        let mut notifiers = Vec::new();
        if region.config.push.is_on() {
            let template = ServiceTemplate {
                role: "notifier",
                listen: "NATTER__PUSH__LISTEN",
                env: Vec::new(),
                binary: &binary,
                config: &region.config,
                config_file,
                nats_url: &region.nats_url,
                logs: logs.clone(),
            };
            let listen = config.push.listen.ip();
            let role = Role::Notifier { region: number };
            let spec = |address| template.spec(address);
            let port = &mut ports.notifiers;
            let started = start_service("notifier", role, listen, port, spec, &launcher, stack);
            notifiers.push(started.await?);
        }
        report.regions.push(RegionReport {
            name: region.config.region.clone(),
            nats: region.nats_url.clone(),
            nats_pid: region.nats_pid,
            spine_pid: region.spine_pid,
            edges,
            history,
            workers,
            hooks,
            notifiers,
        });
    }
    Ok(report)
}

/// The nats-servers of all regions, and their spines if there are several; killed when this is dropped.
struct StartedNats {
    spines: Option<Spines>,
    servers: Vec<NatsServer>,
    /// `mirrors.leafnodes` of each region.
    leafnodes: Vec<String>,
}

async fn start_all_nats(
    args: &Args,
    configs: &[Config],
    launcher: &Launcher,
    binary: PathBuf,
    data: &DataDir,
) -> anyhow::Result<StartedNats> {
    let logs = data.path().join("logs");
    let several = configs.len() > 1;
    let mut wanted = args.nats_port;
    let mut all = Vec::new();
    for config in configs {
        let name = &config.region;
        let (dir, log) = if several {
            let dir = data.path().join(name).join("nats");
            (dir, logs.join(format!("nats-server-{name}.log")))
        } else {
            (data.path().join("nats"), logs.join("nats-server.log"))
        };
        let mut options = NatsOptions::new(config, binary.clone(), dir, 0);
        options.log = Some(log);
        all.push(options);
    }
    let mut spines = None;
    if several {
        let files = all.iter().map(|options| SpineFiles {
            region: options.region.clone(),
            dir: data.path().join(options.region.as_str()).join("spine"),
            log: Some(logs.join(format!("spine-{}.log", options.region))),
        });
        let max_payload = all.first().map_or(0, |options| options.max_payload);
        let delay = args.link_delay.map_or(Duration::ZERO, Into::into);
        let started = Spines::start(launcher, binary, files.collect(), delay, max_payload).await?;
        for (options, spine) in all.iter_mut().zip(&started.spines) {
            options.spine = Some(SpineLink {
                spine: spine.leafnodes,
                leafnodes: SocketAddr::new(LOOPBACK, free_port()?),
            });
        }
        spines = Some(started);
    }
    let mut servers = Vec::new();
    let mut leafnodes = Vec::new();
    for mut options in all {
        options.port = wanted;
        let link = options.spine.as_ref();
        leafnodes.push(link.map_or_else(String::new, |link| link.leafnodes.to_string()));
        let server = start_nats(launcher, options).await?;
        wanted = following(wanted, server.port())?;
        servers.push(server);
    }
    if several {
        let urls = configs.iter().zip(&servers);
        let urls: Vec<_> = urls
            .map(|(config, server)| (config.region(), server.url()))
            .collect();
        joined(&urls).await?;
    }
    Ok(StartedNats {
        spines,
        servers,
        leafnodes,
    })
}

/// Hands the servers over to the tasks that watch them.
fn keep_all_nats(
    started: StartedNats,
    configs: &[Config],
    data: &DataDir,
    stack: &mut Stack,
) -> anyhow::Result<Vec<Region>> {
    let mut spine_pids = Vec::new();
    if let Some(Spines { relay, spines }) = started.spines {
        for (region, spine) in spines.into_iter().enumerate() {
            spine_pids.push(spine.server.pid());
            stack.supervise(Role::Spine { region }, spine.server.into_process());
        }
        stack.control = Some(Control::start(relay, data.path())?);
    }
    let mut regions = Vec::new();
    let servers = started.servers.into_iter().zip(started.leafnodes);
    for (region, (config, (nats, leafnodes))) in configs.iter().zip(servers).enumerate() {
        let mut config = config.clone();
        config.mirrors.leafnodes = leafnodes;
        regions.push(Region {
            config,
            nats_url: nats.url(),
            nats_pid: nats.pid(),
            spine_pid: spine_pids.get(region).copied().flatten(),
        });
        stack.supervise(Role::Nats { region }, nats.into_process());
    }
    Ok(regions)
}

async fn start_nats(launcher: &Launcher, options: NatsOptions) -> anyhow::Result<NatsServer> {
    let wanted = options.port;
    let name = match &options.spine {
        None => "nats-server".to_owned(),
        Some(_) => format!("nats-server {}", options.region),
    };
    let mut attempt = 1;
    loop {
        let mut options = options.clone();
        options.port = choose_port(&name, LOOPBACK, wanted)?;
        let port = options.port;
        match NatsServer::start(launcher.clone(), options).await {
            Ok(server) => return Ok(server),
            // Another process may have taken the port after it was found free.
            Err(_taken) if attempt < PORT_ATTEMPTS && is_taken(port) => attempt += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

async fn start_mongod(launcher: &Launcher, options: MongodOptions) -> anyhow::Result<Mongod> {
    let wanted = options.port;
    let mut attempt = 1;
    loop {
        let mut options = options.clone();
        options.port = choose_port("mongod", LOOPBACK, wanted)?;
        let port = options.port;
        match Mongod::start(launcher.clone(), options).await {
            Ok(server) => return Ok(server),
            Err(_taken) if attempt < PORT_ATTEMPTS && is_taken(port) => attempt += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Brings all regions' streams to their definitions, over a connection to the first.
async fn provision_all(regions: &[Region]) -> anyhow::Result<()> {
    let first = regions.first().context("there is no region")?;
    // The server that runs here, not the one that the configuration names.
    let mut settings = first.config.nats.clone();
    first.nats_url.clone_into(&mut settings.url);
    settings.user.clear();
    settings.creds_file.clear();
    let client = provision::connect(&settings).await?;
    let all = first.config.regions();
    let options = provision::Options::default();
    let provisioned = provision_mesh(&client, &first.config, &all, options).await?;
    for outcome in provisioned.outcomes {
        if outcome.is_incomplete() || outcome.action == provision::Action::Update {
            say(&outcome.to_string());
        }
    }
    match provisioned.unreachable.into_iter().next() {
        None => Ok(()),
        Some((region, error)) => {
            Err(error).with_context(|| format!("the streams of region {region} can't be made"))
        }
    }
}

/// Starts all edges of a region at the same time, on consecutive ports as far as these are free.
async fn start_edges(
    count: u16,
    region: usize,
    ports: &mut Ports,
    template: &EdgeTemplate<'_>,
    launcher: &Launcher,
    stack: &mut Stack,
) -> anyhow::Result<Vec<EdgeReport>> {
    let listen = template.config.edge.listen;
    let mut reports = Vec::new();
    let mut starting = JoinSet::new();
    let mut taken = Vec::new();
    for number in 1..=count {
        let id = format!("{}-{number}", template.config.region);
        let port = loop {
            let port = choose_port(&format!("edge {id}"), listen.ip(), ports.edges)?;
            // With port 0 the same port may be found twice, as long as nothing listens on it.
            if !taken.contains(&port) {
                break port;
            }
        };
        taken.push(port);
        ports.edges = following(ports.edges, port)?;
        let address = SocketAddr::new(listen.ip(), port);
        let mut process = Process::new(launcher.clone(), template.spec(&id, address));
        let index = usize::from(number) - 1;
        starting.spawn(async move {
            let result = process.start().await;
            (index, process, result)
        });
        let reachable = edge::reachable(address);
        reports.push(EdgeReport {
            id,
            http: format!("http://{reachable}"),
            ws: format!("ws://{reachable}/ws"),
            pid: None,
        });
    }
    let mut failed = None;
    while let Some(started) = starting.join_next().await {
        let (index, process, result) = started.context("the start of an edge panicked")?;
        match result {
            Ok(()) => {
                if let Some(report) = reports.get_mut(index) {
                    report.pid = process.pid();
                }
                stack.supervise(Role::Edge { region, index }, process);
            }
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    match failed {
        None => Ok(reports),
        Some(error) => Err(error.into()),
    }
}

/// Starts a process of a region on the next free port, or on any port if the edges use any.
async fn start_service(
    name: &str,
    role: Role,
    ip: IpAddr,
    wanted: &mut u16,
    spec: impl Fn(SocketAddr) -> Spec,
    launcher: &Launcher,
    stack: &mut Stack,
) -> anyhow::Result<HealthReport> {
    let mut attempt = 1;
    loop {
        let port = choose_port(name, ip, *wanted)?;
        let address = SocketAddr::new(ip, port);
        let mut process = Process::new(launcher.clone(), spec(address));
        match process.start().await {
            Ok(()) => {
                let report = HealthReport {
                    pid: process.pid(),
                    http: format!("http://{}", edge::reachable(address)),
                };
                stack.supervise(role, process);
                *wanted = following(*wanted, port)?;
                return Ok(report);
            }
            // Another process may have taken the port after it was found free.
            Err(_taken) if attempt < PORT_ATTEMPTS && is_taken(port) => attempt += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

/// The port to begin with after `port` was found for `wanted`; 0 (any) stays 0.
fn following(wanted: u16, port: u16) -> anyhow::Result<u16> {
    if wanted == 0 {
        return Ok(0);
    }
    port.checked_add(1).context("ports end at 65535")
}

/// `wanted`, or the next free port, which is then printed.
fn choose_port(name: &str, ip: IpAddr, wanted: u16) -> anyhow::Result<u16> {
    let port =
        free_port_from(ip, wanted).with_context(|| format!("{name}: no port from {wanted} on"))?;
    if wanted != 0 && port != wanted {
        say(&format!(
            "{name}: port {wanted} is in use, taking port {port}"
        ));
    }
    Ok(port)
}

fn is_taken(port: u16) -> bool {
    port != 0 && free_port_from(LOOPBACK, port).ok() != Some(port)
}
