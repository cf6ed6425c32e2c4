//! One thread of this process that forks all children.
//!
//! The kernel sends the parent-death signal when the *thread* that forked ends, not the process. A child that is forked
//! by a worker of a tokio runtime, or by a test's thread, would be killed with that thread. So a single thread, which
//! never ends, forks all children.

use std::{io, sync::mpsc, thread};

use parking_lot::Mutex;
use tokio::{
    process::{Child, Command},
    runtime::Handle,
    sync::oneshot,
};

/// Commands that may wait for the thread; when full, callers wait. Forking takes about a millisecond.
const QUEUE: usize = 16;

struct Job {
    command: Command,
    /// The runtime that is notified of the child's end.
    runtime: Handle,
    answer: oneshot::Sender<io::Result<Child>>,
}

static SPAWNER: Mutex<Option<mpsc::SyncSender<Job>>> = Mutex::new(None);

/// Forks `command` from the thread that never ends.
pub(super) async fn spawn(command: Command) -> io::Result<Child> {
    let (answer, child) = oneshot::channel();
    let job = Job {
        command,
        runtime: Handle::current(),
        answer,
    };
    sender()?
        .send(job)
        .map_err(|_gone| io::Error::other("the thread that forks has ended"))?;
    child
        .await
        .map_err(|_gone| io::Error::other("the thread that forks has ended"))?
}

fn sender() -> io::Result<mpsc::SyncSender<Job>> {
    let mut spawner = SPAWNER.lock();
    if let Some(sender) = spawner.as_ref() {
        return Ok(sender.clone());
    }
    let (sender, jobs) = mpsc::sync_channel::<Job>(QUEUE);
    thread::Builder::new()
        .name("spawner".to_owned())
        .spawn(move || {
            for mut job in jobs {
                let _runtime = job.runtime.enter();
                // If the caller has gone, the child is dropped, which kills it.
                drop(job.answer.send(job.command.spawn()));
            }
        })?;
    *spawner = Some(sender.clone());
    Ok(sender)
}
