//! Dead letters of workers for the operator: the list, and another attempt.

use std::sync::Arc;

use super::{
    Links, Parts, Worker, WorkersError,
    files::Files,
    job::{Attempt, Done, Failed},
};
use crate::{
    bus::{DeadLetter, DeadLetters, LetterError, ReadError},
    config::Config,
    history,
    runtime::Tasks,
};

/// The outcome of another attempt.
#[derive(Debug)]
pub enum Retried {
    /// The worker has answered; the dead letter is removed.
    Done,
    /// The message is gone, or not for the worker any more; the dead letter is removed.
    Gone,
    /// The same, but its dead letter could not be removed. It is safe to retry.
    NotRemoved(LetterError),
    /// It still can't be done, with the reason.
    Refused(String),
}

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
    /// [`WorkersError`].
    pub async fn open(config: Config) -> Result<Self, WorkersError> {
        let (workers, files) = (Worker::all(&config)?, Files::open(&config)?);
        let tasks = Tasks::default();
        let links = Links::open(&config, &tasks).await?;
        let parts = Parts::open(Arc::new(config), &links, tasks, files).await;
        Ok(Self {
            workers,
            parts,
            links,
        })
    }

    /// All dead letters, oldest first.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn letters(&self) -> Result<Vec<DeadLetter>, ReadError> {
        history::dead_letters(&self.parts.dead).await
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
        self.links.close().await;
    }
}
