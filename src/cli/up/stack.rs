//! The children of one `natter up`, in layers that are stopped one after the other.

use std::sync::Arc;

use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{
    control::Control,
    data_dir::DataDir,
    report::Report,
    supervise::{Event, supervise},
};
use crate::servers::Process;

/// Identifies a child; a region is given by its index in the report.
#[derive(Debug, Clone, Copy)]
pub(super) enum Role {
    Spine { region: usize },
    Nats { region: usize },
    Mongod,
    Edge { region: usize, index: usize },
    History { region: usize },
    Workers { region: usize },
    Hooks { region: usize },
    Notifier { region: usize },
    DemoWorker,
}

impl Role {
    pub(super) fn set_pid(self, report: &mut Report, pid: u32) {
        let slot = match self {
            Self::Mongod => Some(&mut report.mongod_pid),
            Self::Spine { region } => report.regions.get_mut(region).map(|r| &mut r.spine_pid),
            Self::Nats { region } => report.regions.get_mut(region).map(|r| &mut r.nats_pid),
            Self::Edge { region, index } => {
                let region = report.regions.get_mut(region);
                let edge = region.and_then(|region| region.edges.get_mut(index));
                edge.map(|edge| &mut edge.pid)
            }
            Self::History { region } => {
                let region = report.regions.get_mut(region);
                let history = region.and_then(|region| region.history.first_mut());
                history.map(|history| &mut history.pid)
            }
            Self::Workers { region } => {
                let region = report.regions.get_mut(region);
                let workers = region.and_then(|region| region.workers.first_mut());
                workers.map(|workers| &mut workers.pid)
            }
            Self::Hooks { region } => {
                let region = report.regions.get_mut(region);
                let hooks = region.and_then(|region| region.hooks.first_mut());
                hooks.map(|hooks| &mut hooks.pid)
            }
            Self::Notifier { region } => {
                let region = report.regions.get_mut(region);
                let notifier = region.and_then(|region| region.notifiers.first_mut());
                notifier.map(|notifier| &mut notifier.pid)
            }
            Self::DemoWorker => None,
        };
        if let Some(slot) = slot {
            *slot = Some(pid);
        }
    }
}

#[derive(Debug)]
pub(super) struct Name {
    pub role: Role,
    pub shown: String,
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

/// All children that were ready at least once, each with the task that watches it.
#[derive(Debug)]
pub(super) struct Stack {
    restart: bool,
    events: mpsc::Sender<Event>,
    pub names: Vec<Name>,
    edges: Layer,
    workers: Layer,
    history: Layer,
    mongod: Layer,
    nats: Layer,
    spines: Layer,
    /// The links between regions, if there are several.
    pub control: Option<Control>,
    /// Keeps other `up`s out until the children above are gone: fields are dropped in this order.
    pub data: Option<Arc<DataDir>>,
}

impl Stack {
    pub(super) fn new(restart: bool, events: mpsc::Sender<Event>) -> Self {
        Self {
            restart,
            events,
            names: Vec::new(),
            edges: Layer::default(),
            workers: Layer::default(),
            history: Layer::default(),
            mongod: Layer::default(),
            nats: Layer::default(),
            spines: Layer::default(),
            control: None,
            data: None,
        }
    }

    pub(super) fn supervise(&mut self, role: Role, process: Process) {
        let child = self.names.len();
        self.names.push(Name {
            role,
            shown: process.spec().name.clone(),
        });
        let layer = match role {
            Role::Spine { .. } => &mut self.spines,
            Role::Nats { .. } => &mut self.nats,
            Role::Mongod => &mut self.mongod,
            Role::Edge { .. } => &mut self.edges,
            Role::History { .. } => &mut self.history,
            Role::Workers { .. }
            | Role::Hooks { .. }
            | Role::Notifier { .. }
            | Role::DemoWorker => &mut self.workers,
        };
        let (events, stop) = (self.events.clone(), layer.stop.clone());
        layer
            .tasks
            .spawn(supervise(child, process, self.restart, events, stop));
    }

    /// Edges first: their drain needs the servers, and history writes what they and workers still published.
    pub(super) async fn stop(&mut self) {
        self.edges.stop().await;
        self.workers.stop().await;
        self.history.stop().await;
        self.mongod.stop().await;
        self.nats.stop().await;
        self.spines.stop().await;
        self.control = None;
    }
}
