//! Tasks with names, so that a drain can wait for them and say who is late, and so that none is missing unnoticed.
//!
//! A process that has lost a part of itself must not look as if it were well: it ends, and whoever watches it starts another.
//! So a task that panics *fails* all ([`Tasks::failed`]), unless it was only about one request; and so does one that the others
//! can't do without when it ends before they are told to.

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

/// The tasks of a process (or of a part of one): clones share them.
#[derive(Debug, Clone, Default)]
pub struct Tasks(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    tracker: TaskTracker,
    stop: CancellationToken,
    running: Mutex<Running>,
    /// Why the process can't go on: the first reason.
    why: OnceLock<String>,
    failed: CancellationToken,
}

#[derive(Debug, Default)]
struct Running {
    next: u64,
    names: BTreeMap<u64, &'static str>,
}

/// Tasks that had not ended when the drain's time was up: each name with how many.
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

/// Takes the task off the list when it ends in whatever way: done, aborted or panicked.
struct Entry {
    inner: Arc<Inner>,
    id: u64,
    name: &'static str,
    /// Whether nothing but itself is hit when it panics.
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

    /// As [`spawn`](Self::spawn), for a task that is about one request or connection: if it panics nothing else is hit.
    pub fn spawn_contained<F>(&self, name: &'static str, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.start(self.enter(name, true), task)
    }

    /// As [`spawn`](Self::spawn), for a task that the others can't do without: all have [`failed`](Self::failed) when it ends
    /// before they are told to end.
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

    /// As [`spawn_essential`](Self::spawn_essential), for a task that is dropped where it stands when the others are told to end.
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

    /// Notes that a part of the process is gone without which it can't go on. Ends nothing by itself.
    pub fn fail(&self, why: impl Into<String>) {
        self.0.fail(why.into());
    }

    /// Waits until a part of the process is gone without which it can't go on, and says which. Cancel-safe.
    pub async fn failed(&self) -> String {
        self.0.failed.cancelled().await;
        self.0.why.get().cloned().unwrap_or_default()
    }

    /// Starts a task on the current runtime that is dropped where it stands when the others are told to end.
    pub fn spawn_until_stopping<F>(&self, name: &'static str, task: F) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn(name, self.clone().until_stopping(task))
    }

    /// Starts a task on the current `LocalSet`: a shard's.
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

    /// Tells every task to end, and waits for none.
    pub fn stop(&self) {
        self.0.stop.cancel();
    }

    /// Waits for [`stop`](Self::stop): for a task's `select!`. Cancel-safe.
    pub async fn stopping(&self) {
        self.0.stop.cancelled().await;
    }

    /// The token behind [`stopping`](Self::stopping), for parts that stop on their own as well (`child_token`).
    #[must_use]
    pub fn token(&self) -> &CancellationToken {
        &self.0.stop
    }

    /// Tells every task to end and waits until all have, those too that are started meanwhile.
    ///
    /// # Errors
    /// [`Late`] with the names of those that still run after `deadline`; they are left alone.
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

    /// Whether the tasks have failed, and why, once all that can run has run.
    async fn why(tasks: &Tasks) -> Option<String> {
        let long = Duration::from_secs(3600);
        tokio::time::timeout(long, tasks.failed()).await.ok()
    }

    /// What the tasks say, and what was started that makes them say it.
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
            // The first reason stays.
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
