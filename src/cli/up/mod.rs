//! `natter up`: everything for a laptop.
//!
//! nats-server, mongod, the edges and the history service are children, each of which can be killed alone and is started
//! again. They are stopped in the order that lets them finish: edges first (a drain), then history (which takes what they
//! still published to MongoDB), then the servers they need.

mod data_dir;
mod edge;
mod history;
mod report;
mod supervise;
mod token;

use std::{
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::Context as _;
use figment::providers::{Format as _, Toml};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use self::{
    data_dir::DataDir,
    edge::EdgeTemplate,
    history::HistoryTemplate,
    report::{EdgeReport, HistoryReport, RegionReport, Report},
    supervise::{Event, What, supervise},
};
use crate::{
    bus::provision::{self, provision},
    config::Config,
    servers::{
        Binaries, Launcher, Mongod, MongodOptions, NatsOptions, NatsServer, Process, Sources,
        free_port_from,
    },
};

/// Where the programs that were fetched are kept, whatever the data folder is.
const BINARIES: &str = ".natter/bin";

/// Events that may wait to be printed; a child that has more to tell waits.
const EVENT_QUEUE: usize = 64;

/// How often another port is tried when the chosen one was taken in between.
const PORT_ATTEMPTS: usize = 3;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Flags of `natter up`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folder for data and logs.
    #[arg(long, value_name = "DIR", default_value = ".natter")]
    data: PathBuf,
    /// Port of the first edge [default: that of edge.listen]; the others follow. A port in use: the next free one. 0: any.
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Port of nats-server; in use: the next free one. 0: any.
    #[arg(long, value_name = "PORT", default_value_t = 4222)]
    nats_port: u16,
    /// Port of mongod; in use: the next free one. 0: any.
    #[arg(long, value_name = "PORT", default_value_t = 27017)]
    mongodb_port: u16,
    /// Run without MongoDB.
    #[arg(long)]
    no_mongodb: bool,
    /// How many edges.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(0..=64))]
    edges: u16,
    /// Print one line of JSON when ready, and after every restart of a child; nothing else on stdout.
    #[arg(long)]
    json: bool,
    /// Leave a child that died dead.
    #[arg(long)]
    no_restart: bool,
    /// Name of the region, in place of that in the configuration.
    #[arg(long, value_name = "NAME")]
    region: Option<String>,
}

/// Runs until a signal; exit code 1 when something could not be started.
pub(super) fn run(args: &Args, config_file: Option<&Path>) -> anyhow::Result<ExitCode> {
    let overrides = args
        .region
        .as_ref()
        .map_or_else(String::new, |region| format!("region = {region:?}"));
    let config = Config::load(config_file, Toml::string(&overrides))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(up(args, &config, config_file))
}

async fn up(args: &Args, config: &Config, config_file: Option<&Path>) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    let (events, mut incoming) = mpsc::channel(EVENT_QUEUE);
    let mut stack = Stack::new(!args.no_restart, events);
    let started = tokio::select! {
        started = start(args, config, config_file, &mut stack) => Some(started),
        () = signals.next() => None,
    };
    let result = match started {
        None => Ok(()),
        Some(Err(error)) => Err(error),
        Some(Ok(report)) => {
            watch(args.json, report, &stack.names, &mut incoming, &mut signals).await;
            Ok(())
        }
    };
    // Children that are being stopped must not wait for somebody who reads their events.
    drop(incoming);
    if result.is_ok() {
        say("stopping");
    }
    tokio::select! {
        () = stack.stop() => {}
        () = signals.next() => say("killing what has not stopped"),
    }
    result.map(|()| ExitCode::SUCCESS)
}

/// Prints what runs, and goes on doing so after each restart, until a signal comes.
async fn watch(
    json: bool,
    mut report: Report,
    names: &[Name],
    incoming: &mut mpsc::Receiver<Event>,
    signals: &mut Signals,
) {
    if json {
        print_json(&report);
    } else {
        print(&report.for_people());
    }
    loop {
        // Both branches are cancel-safe.
        let event = tokio::select! {
            () = signals.next() => return,
            event = incoming.recv() => event,
        };
        // The stack holds a sender, so there is always an event to come.
        let Some(Event { child, what }) = event else {
            return signals.next().await;
        };
        let Some(name) = names.get(child) else {
            continue;
        };
        match what {
            What::Died(Some(status)) => say(&format!("{} died: {status}", name.shown)),
            What::Died(None) => say(&format!("{} died", name.shown)),
            What::Hung(error) => say(&format!("{} hangs and is killed: {error}", name.shown)),
            What::RestartFailed { error, pause } => say(&format!(
                "{:#}; the next attempt is in {pause:?}",
                anyhow::Error::from(error)
            )),
            What::Restarted { pid } => {
                say(&format!("{} runs again, process {pid}", name.shown));
                name.role.set_pid(&mut report, pid);
                if json {
                    print_json(&report);
                }
            }
        }
    }
}

/// Starts everything, in order. What was ready once is in `stack`, also when this fails or is dropped; the rest is killed
/// then.
async fn start(
    args: &Args,
    config: &Config,
    config_file: Option<&Path>,
    stack: &mut Stack,
) -> anyhow::Result<Report> {
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

    let mut options = NatsOptions::new(
        config,
        binaries.nats_server,
        data.path().join("nats"),
        args.nats_port,
    );
    options.log = Some(logs.join("nats-server.log"));
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
    let (nats, mongod) = tokio::try_join!(start_nats(&launcher, options), mongod)?;
    let (nats_url, nats_pid) = (nats.url(), nats.pid());
    stack.supervise(Role::Nats, nats.into_process());
    let (mongodb, mongod_pid) = match mongod {
        Some(mongod) => {
            let running = (Some(mongod.url()), mongod.pid());
            stack.supervise(Role::Mongod, mongod.into_process());
            running
        }
        None => (None, None),
    };

    provision_all(config, &nats_url).await?;

    let configured = config.auth.hs256_secret.expose();
    let development = if configured.is_empty() {
        Some(data.secret()?)
    } else {
        None
    };
    let token = token::development(&config.auth, development.as_deref().unwrap_or(configured))?;
    let template = EdgeTemplate {
        binary: &binary,
        config,
        config_file,
        nats_url: &nats_url,
        secret: development.as_deref(),
        logs: logs.clone(),
    };
    let edges = start_edges(args, &template, &launcher, stack).await?;
    let history = match &mongodb {
        Some(mongodb_url) => {
            let template = HistoryTemplate {
                binary: &binary,
                config,
                config_file,
                nats_url: &nats_url,
                mongodb_url,
                logs,
            };
            vec![start_history(args, &template, &launcher, stack).await?]
        }
        None => Vec::new(),
    };
    let report = Report {
        regions: vec![RegionReport {
            name: config.region.clone(),
            nats: nats_url,
            nats_pid,
            edges,
            history,
        }],
        mongodb,
        mongod_pid,
        token,
        pid: std::process::id(),
    };
    Ok(report)
}

async fn start_nats(launcher: &Launcher, options: NatsOptions) -> anyhow::Result<NatsServer> {
    let wanted = options.port;
    let mut attempt = 1;
    loop {
        let mut options = options.clone();
        options.port = choose_port("nats-server", LOOPBACK, wanted)?;
        let port = options.port;
        match NatsServer::start(launcher.clone(), options).await {
            Ok(server) => return Ok(server),
            // Somebody may have taken the port between the look and the start.
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

async fn provision_all(config: &Config, nats_url: &str) -> anyhow::Result<()> {
    // The server that runs here, not the one that the configuration names.
    let mut settings = config.nats.clone();
    nats_url.clone_into(&mut settings.url);
    settings.user.clear();
    settings.creds_file.clear();
    let client = provision::connect(&settings).await?;
    for outcome in provision(&client, config, provision::Options::default()).await? {
        if outcome.is_incomplete() || outcome.action == provision::Action::Update {
            say(&outcome.to_string());
        }
    }
    Ok(())
}

/// Starts all edges at the same time, on consecutive ports as far as these are free.
async fn start_edges(
    args: &Args,
    template: &EdgeTemplate<'_>,
    launcher: &Launcher,
    stack: &mut Stack,
) -> anyhow::Result<Vec<EdgeReport>> {
    let listen = template.config.edge.listen;
    let mut wanted = args.port.unwrap_or(listen.port());
    let mut reports = Vec::new();
    let mut starting = JoinSet::new();
    let mut taken = Vec::new();
    for number in 1..=args.edges {
        let id = format!("{}-{number}", template.config.region);
        let port = loop {
            let port = choose_port(&format!("edge {id}"), listen.ip(), wanted)?;
            // Any free port may be given twice, as long as nobody listens there.
            if !taken.contains(&port) {
                break port;
            }
        };
        taken.push(port);
        if wanted != 0 {
            wanted = port.checked_add(1).context("ports end at 65535")?;
        }
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
                stack.supervise(Role::Edge(index), process);
            }
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    match failed {
        None => Ok(reports),
        Some(error) => Err(error.into()),
    }
}

/// Starts the history service on the configured port or the next free one; on any where the edges have any.
async fn start_history(
    args: &Args,
    template: &HistoryTemplate<'_>,
    launcher: &Launcher,
    stack: &mut Stack,
) -> anyhow::Result<HistoryReport> {
    let listen = template.config.history.listen;
    let wanted = match args.port {
        Some(0) => 0,
        _ => listen.port(),
    };
    let mut attempt = 1;
    loop {
        let port = choose_port("history", listen.ip(), wanted)?;
        let address = SocketAddr::new(listen.ip(), port);
        let mut process = Process::new(launcher.clone(), template.spec(address));
        match process.start().await {
            Ok(()) => {
                let report = HistoryReport {
                    pid: process.pid(),
                    http: format!("http://{}", edge::reachable(address)),
                };
                stack.supervise(Role::History, process);
                return Ok(report);
            }
            // Somebody may have taken the port between the look and the start.
            Err(_taken) if attempt < PORT_ATTEMPTS && is_taken(port) => attempt += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

/// `wanted`, or the next free port, and says so.
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

/// Which child.
#[derive(Debug, Clone, Copy)]
enum Role {
    Nats,
    Mongod,
    Edge(usize),
    History,
}

impl Role {
    fn set_pid(self, report: &mut Report, pid: u32) {
        let region = report.regions.first_mut();
        match self {
            Self::Nats => {
                if let Some(region) = region {
                    region.nats_pid = Some(pid);
                }
            }
            Self::Mongod => report.mongod_pid = Some(pid),
            Self::Edge(index) => {
                if let Some(edge) = region.and_then(|region| region.edges.get_mut(index)) {
                    edge.pid = Some(pid);
                }
            }
            Self::History => {
                if let Some(history) = region.and_then(|region| region.history.first_mut()) {
                    history.pid = Some(pid);
                }
            }
        }
    }
}

#[derive(Debug)]
struct Name {
    role: Role,
    shown: String,
}

/// Children that are stopped together.
#[derive(Debug, Default)]
struct Layer {
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Layer {
    async fn stop(&mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

/// All children that were ready once, each with the task that watches it.
#[derive(Debug)]
struct Stack {
    restart: bool,
    events: mpsc::Sender<Event>,
    names: Vec<Name>,
    edges: Layer,
    history: Layer,
    mongod: Layer,
    nats: Layer,
    /// Locked for other `up`s until the children above are gone: fields are dropped in this order.
    data: Option<Arc<DataDir>>,
}

impl Stack {
    fn new(restart: bool, events: mpsc::Sender<Event>) -> Self {
        Self {
            restart,
            events,
            names: Vec::new(),
            edges: Layer::default(),
            history: Layer::default(),
            mongod: Layer::default(),
            nats: Layer::default(),
            data: None,
        }
    }

    fn supervise(&mut self, role: Role, process: Process) {
        let child = self.names.len();
        self.names.push(Name {
            role,
            shown: process.spec().name.clone(),
        });
        let layer = match role {
            Role::Nats => &mut self.nats,
            Role::Mongod => &mut self.mongod,
            Role::Edge(_) => &mut self.edges,
            Role::History => &mut self.history,
        };
        let (events, stop) = (self.events.clone(), layer.stop.clone());
        layer
            .tasks
            .spawn(supervise(child, process, self.restart, events, stop));
    }

    /// Edges first: their drain needs the servers, and history writes what they still published.
    async fn stop(&mut self) {
        self.edges.stop().await;
        self.history.stop().await;
        self.mongod.stop().await;
        self.nats.stop().await;
    }
}

/// Ctrl-C, SIGTERM, and the terminal that goes away.
struct Signals([Signal; 3]);

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self([
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ]))
    }

    /// Returns when one of them comes. Cancel-safe.
    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

fn say(text: &str) {
    eprintln!("natter: {text}");
}

fn print_json(report: &Report) {
    match serde_json::to_string(report) {
        Ok(line) => print(&format!("{line}\n")),
        Err(error) => say(&format!("the report can't be written: {error}")),
    }
}

/// Writes to stdout, whose reader may have gone: not a reason to stop.
fn print(text: &str) {
    let mut stdout = io::stdout().lock();
    if let Err(error) = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        say(&format!("stdout: {error}"));
    }
}
