//! Named tasks. A drain can wait for them and name those that are late, and no task ends unnoticed.
//!
//! A process that has lost a part of itself must not look healthy: it ends, and its supervisor starts another. So a
//! task that panics *fails* the process ([`Tasks::failed`]), unless it only served one request. An essential task also
//! does so if it ends before the shutdown.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    sync::{Arc, OnceLock},
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The tasks of a process, or of a part of one. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Tasks(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    tracker: TaskTracker,
    stop: CancellationToken,
    running: Mutex<Running>,
    /// Why the process can't continue: the first reason.
    why: OnceLock<String>,
    failed: CancellationToken,
}

#[derive(Debug, Default)]
struct Running {
    next: u64,
    names: BTreeMap<u64, &'static str>,
}

/// Tasks that were still running at the deadline of a drain, by name, with their numbers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Late(pub BTreeMap<&'static str, usize>);

impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tasks still run:")?;
        for (name, count) in &self.0 {
            match count {
                1 => write!(f, " {name}")?,
                count => write!(f, " {name} ({count})")?,
            }
        }
        Ok(())
    }
}

/// Removes the task from the list when it ends, whether it completed, was aborted or panicked.
struct Entry {
    inner: Arc<Inner>,
    id: u64,
    name: &'static str,
    /// Whether a panic of the task affects only the task itself.
    contained: bool,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.inner.running.lock().names.remove(&self.id);
        if thread::panicking() {
            tracing::error!(task = self.name, "a task panicked");
            if !self.contained {
                self.inner
                    .fail(format!("the task {:?} panicked", self.name));
            }
        }
    }
}

impl Inner {
    fn fail(&self, why: String) {
        let _known_before = self.why.set(why);
        self.failed.cancel();
    }
}

impl Tasks {
    /// Starts a task on the current runtime. It should end soon after [`stopping`](Self::stopping).
    pub fn spawn<F>(&self, name: &'static str, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.start(self.enter(name, false), task)
    }

    /// Like [`spawn`](Self::spawn), for a task that serves one request or connection: a panic affects nothing else.
    pub fn spawn_contained<F>(&self, name: &'static str, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.start(self.enter(name, true), task)
    }

    /// Like [`spawn`](Self::spawn), for a task that the others can't do without: if it ends before the shutdown, the
    /// process has [`failed`](Self::failed).
    pub fn spawn_essential<F>(&self, name: &'static str, task: F) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let tasks = self.clone();
        self.spawn(name, async move {
            task.await;
            if !tasks.0.stop.is_cancelled() {
                tasks.fail(format!("the task {name:?} ended"));
            }
        })
    }

    /// Like [`spawn_essential`](Self::spawn_essential), for a task that may be dropped at any point: it is dropped at
    /// the shutdown.
    pub fn keep_running<F>(&self, name: &'static str, task: F) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn_essential(name, self.clone().until_stopping(task))
    }

    async fn until_stopping(self, task: impl Future<Output = ()>) {
        tokio::select! {
            () = task => {}
            () = self.stopping() => {}
        }
    }

    fn start<F>(&self, entry: Entry, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.0.tracker.spawn(async move {
            let _entry = entry;
            task.await
        })
    }

    /// Notes that the process has lost a part that it can't do without. It does not end anything itself.
    pub fn fail(&self, why: impl Into<String>) {
        self.0.fail(why.into());
    }

    /// Waits until the process has lost a part that it can't do without, and returns the reason. Cancel-safe.
    pub async fn failed(&self) -> String {
        self.0.failed.cancelled().await;
        self.0.why.get().cloned().unwrap_or_default()
    }

    /// Starts a task on the current runtime that may be dropped at any point: it is dropped at the shutdown.
    pub fn spawn_until_stopping<F>(&self, name: &'static str, task: F) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn(name, self.clone().until_stopping(task))
    }

    /// Starts a task on the current local runtime, or `LocalSet`, as the shards use.
    pub fn spawn_local<F>(&self, name: &'static str, task: F) -> JoinHandle<F::Output>
    where
        F: Future + 'static,
    {
        let entry = self.enter(name, false);
        self.0.tracker.spawn_local(async move {
            let _entry = entry;
            task.await
        })
    }

    fn enter(&self, name: &'static str, contained: bool) -> Entry {
        let mut running = self.0.running.lock();
        let id = running.next;
        running.next += 1;
        running.names.insert(id, name);
        Entry {
            inner: Arc::clone(&self.0),
            id,
            name,
            contained,
        }
    }

    /// Tells every task to end. Does not wait.
    pub fn stop(&self) {
        self.0.stop.cancel();
    }

    /// Waits for [`stop`](Self::stop), e.g. in a task's `select!`. Cancel-safe.
    pub async fn stopping(&self) {
        self.0.stop.cancelled().await;
    }

    /// The token behind [`stopping`](Self::stopping), for parts that can also be stopped alone (`child_token`).
    #[must_use]
    pub fn token(&self) -> &CancellationToken {
        &self.0.stop
    }

    /// Tells every task to end and waits for all of them, including tasks that are started meanwhile.
    ///
    /// # Errors
    /// [`Late`] with the names of the tasks that still run at the deadline. They keep running.
    pub async fn drain(&self, deadline: Duration) -> Result<(), Late> {
        self.stop();
        self.0.tracker.close();
        match tokio::time::timeout(deadline, self.0.tracker.wait()).await {
            Ok(()) => Ok(()),
            Err(_elapsed) => {
                let mut late = BTreeMap::new();
                for name in self.0.running.lock().names.values() {
                    *late.entry(*name).or_default() += 1;
                }
                Err(Late(late))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_drain_waits_for_tasks_and_names_who_is_late() {
        let tasks = Tasks::default();
        for _ in 0..2 {
            tasks.spawn("stuck", future::pending::<()>());
        }
        let good = tasks.spawn("good", {
            let tasks = tasks.clone();
            async move { tasks.stopping().await }
        });
        let late = tasks.drain(Duration::from_secs(5)).await.unwrap_err();
        assert_eq!(late.to_string(), "tasks still run: stuck (2)");
        good.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn ended_aborted_and_panicked_tasks_are_not_waited_for() {
        let tasks = Tasks::default();
        assert_eq!(tasks.spawn("done", async { 7 }).await.unwrap(), 7);
        tasks.spawn("aborted", future::pending::<()>()).abort();
        let panicked = tasks.spawn("panicked", async { panic!("on purpose") });
        assert!(panicked.await.unwrap_err().is_panic());
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let rc = std::rc::Rc::new(1);
                assert_eq!(
                    *tasks.spawn_local("local", async move { rc }).await.unwrap(),
                    1
                );
            })
            .await;
        assert_eq!(tasks.drain(Duration::from_secs(5)).await, Ok(()));
        assert!(tasks.0.running.lock().names.is_empty());
    }

    /// Whether the tasks have failed, and why, after everything that can run has run.
    async fn why(tasks: &Tasks) -> Option<String> {
        let long = Duration::from_secs(3600);
        tokio::time::timeout(long, tasks.failed()).await.ok()
    }

    /// The expected reason, and the tasks that cause it.
    type Case<'a> = (&'a str, &'a dyn Fn(&Tasks));

    #[tokio::test(start_paused = true)]
    async fn a_task_that_is_missed_is_told_of() {
        let panicking = async || panic!("on purpose");
        let cases: [Case<'_>; 5] = [
            ("the task \"x\" panicked", &|tasks| {
                tasks.spawn("x", panicking());
            }),
            ("the task \"x\" panicked", &|tasks| {
                tasks.spawn_until_stopping("x", async { panic!("on purpose") });
            }),
            ("the task \"x\" panicked", &|tasks| {
                tasks.keep_running("x", async { panic!("on purpose") });
            }),
            ("the task \"x\" ended", &|tasks| {
                tasks.spawn_essential("x", async {});
            }),
            ("the task \"x\" ended", &|tasks| {
                tasks.keep_running("x", async {});
            }),
        ];
        for (told, start) in cases {
            let tasks = Tasks::default();
            tasks.keep_running("well", future::pending());
            assert_eq!(why(&tasks).await, None);
            start(&tasks);
            assert_eq!(why(&tasks).await.as_deref(), Some(told));
            // The first reason is kept.
            tasks.fail("another");
            assert_eq!(why(&tasks).await.as_deref(), Some(told));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_may_end_and_who_is_told_to_is_not_missed() {
        let tasks = Tasks::default();
        tasks.spawn("done", async {});
        tasks.spawn_until_stopping("done", async {});
        tasks.spawn_contained("one request", async { panic!("on purpose") });
        tasks.keep_running("kept", future::pending());
        let told = tasks.clone();
        tasks.spawn_essential("told", async move { told.stopping().await });
        assert_eq!(why(&tasks).await, None);
        assert_eq!(tasks.drain(Duration::from_secs(5)).await, Ok(()));
        assert_eq!(why(&tasks).await, None);
    }
}
