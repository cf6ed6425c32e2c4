//! Dead letters of workers for the operator: the list, and another attempt.

use std::sync::Arc;

use super::{
    Links, Parts, Worker,
    files::Files,
    job::{Attempt, Done, Failed},
};
use crate::{
    bus::{DeadLetter, DeadLetters},
    config::Config,
    runtime::Tasks,
    taking::{self, Retried, ServiceError},
};

/// What makes other attempts.
#[derive(Debug)]
pub struct Retry {
    workers: Vec<Arc<Worker>>,
    parts: Parts,
    links: Links,
}

impl Retry {
    /// Connects, and waits for the streams.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn open(config: Config) -> Result<Self, ServiceError> {
        let (workers, files) = (Worker::all(&config)?, Files::open(&config)?);
        let tasks = Tasks::default();
        let reads = taking::Links::open(&config, "natter worker tool", &tasks).await?;
        let links = Links::open(&config, reads, &tasks)?;
        let parts = Parts::open(Arc::new(config), &links, tasks, files).await;
        Ok(Self {
            workers,
            parts,
            links,
        })
    }

    /// The dead letters of all workers.
    #[must_use]
    pub fn dead(&self) -> &DeadLetters {
        &self.parts.dead
    }

    /// Does the job of a dead letter, however old it is, and removes the letter on success.
    pub async fn retry(&self, letter: &DeadLetter) -> Retried {
        let name = letter.receiver.as_deref().unwrap_or_default();
        let worker = self.workers.iter().find(|worker| worker.name() == name);
        let (Some(worker), Some(stored)) = (worker, &letter.stored) else {
            let text = format!("there is no worker {name:?} in the configuration");
            return Retried::Refused(text);
        };
        let work = async {
            // Its patterns may have changed.
            let Some(about) = worker.about(stored) else {
                return Ok(Done::Skipped);
            };
            let attempt = Attempt {
                again: true,
                may_wait: false,
            };
            let work = worker.work(&self.parts, (stored, about), letter.epoch, attempt);
            work.await
        };
        let retried = match work.await {
            Ok(Done::Annotated | Done::Empty) => Retried::Done,
            Ok(Done::Skipped) => Retried::Gone,
            Ok(Done::Rejected(reason)) | Err(Failed::Natter(reason)) => {
                return Retried::Refused(reason);
            }
            Err(Failed::Receiver { fault, .. }) => return Retried::Refused(fault.to_string()),
        };
        let dead: &DeadLetters = &self.parts.dead;
        match dead.remove(letter.number).await {
            Ok(()) => retried,
            Err(error) => Retried::NotRemoved(error),
        }
    }

    /// Closes the connections.
    pub async fn close(self) {
        self.parts.tasks.stop();
        tokio::join!(self.links.line.close(), self.links.reads.close());
    }
}
