//! Tasks with names, so that a drain can wait for them and say who is late.

use std::{collections::BTreeMap, fmt, future::Future, sync::Arc, thread, time::Duration};

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
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.inner.running.lock().names.remove(&self.id);
        if thread::panicking() {
            tracing::error!(task = self.name, "a task panicked");
        }
    }
}

impl Tasks {
    /// Starts a task on the current runtime. It should end soon after [`stopping`](Self::stopping).
    pub fn spawn<F>(&self, name: &'static str, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let entry = self.enter(name);
        self.0.tracker.spawn(async move {
            let _entry = entry;
            task.await
        })
    }

    /// Starts a task on the current runtime that is dropped where it stands when the others are told to end.
    pub fn spawn_until_stopping<F>(&self, name: &'static str, task: F) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let tasks = self.clone();
        self.spawn(name, async move {
            tokio::select! {
                () = task => {}
                () = tasks.stopping() => {}
            }
        })
    }

    /// Starts a task on the current `LocalSet`: a shard's.
    pub fn spawn_local<F>(&self, name: &'static str, task: F) -> JoinHandle<F::Output>
    where
        F: Future + 'static,
    {
        let entry = self.enter(name);
        self.0.tracker.spawn_local(async move {
            let _entry = entry;
            task.await
        })
    }

    fn enter(&self, name: &'static str) -> Entry {
        let mut running = self.0.running.lock();
        let id = running.next;
        running.next += 1;
        running.names.insert(id, name);
        Entry {
            inner: Arc::clone(&self.0),
            id,
            name,
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
}
