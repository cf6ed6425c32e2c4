//! For the operator: dead letters of hooks, another attempt at them, and what enables a hook again.

use std::sync::Arc;

use super::{Hook, Parts, send::Refusal, source::Told, state};
use crate::{
    bus::{Bucket, Connection, DeadLetter, DeadLetters, KvError, Reader},
    config::Config,
    model::partition_of,
    runtime::Tasks,
    subject::{bucket, hook_off_key},
    taking::{Links, Retried, ServiceError},
};

/// What makes other attempts.
#[derive(Debug)]
pub struct Retry {
    hooks: Vec<Arc<Hook>>,
    parts: Parts,
    links: Links,
}

/// A hook can't be enabled.
#[derive(Debug, thiserror::Error)]
pub enum EnableError {
    #[error("there is no hook {0:?} in the configuration")]
    Unknown(String),
    #[error(transparent)]
    Nats(#[from] crate::bus::ConnectError),
    #[error("the bucket of hooks can't be read or written")]
    Bucket(#[from] KvError),
}

/// Enables a hook that is disabled. Returns whether it was.
///
/// # Errors
/// [`EnableError`].
pub async fn enable(config: &Config, name: &str) -> Result<bool, EnableError> {
    if !config.hooks.iter().any(|hook| hook.name == name) {
        return Err(EnableError::Unknown(name.to_owned()));
    }
    let connection = Connection::open(&config.nats, "natter hooks tool").await?;
    let reader = Reader::new(connection.clone(), &config.nats);
    let bucket = Bucket::new(connection.clone(), reader, config, bucket::HOOKS);
    let was_off = state::off(&bucket, name).await?.is_some();
    if was_off {
        bucket.remove(&hook_off_key(name)).await?;
    }
    connection.close().await;
    Ok(was_off)
}

impl Retry {
    /// Connects, and waits for the streams.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn open(config: Config) -> Result<Self, ServiceError> {
        let hooks = Hook::all(&config)?;
        let tasks = Tasks::default();
        let links = Links::open(&config, "natter hooks tool", &tasks).await?;
        let (parts, _origins) = Parts::open(Arc::new(config), &links, tasks).await;
        Ok(Self {
            hooks,
            parts,
            links,
        })
    }

    /// The dead letters of all hooks.
    #[must_use]
    pub fn dead(&self) -> &DeadLetters {
        &self.parts.dead
    }

    /// Sends the events of a dead letter, however old it is, and removes the letter on success.
    pub async fn retry(&self, letter: &DeadLetter) -> Retried {
        let name = letter.receiver.as_deref().unwrap_or_default();
        let hook = self.hooks.iter().find(|hook| hook.name() == name);
        let Some(hook) = hook else {
            let text = format!("there is no hook {name:?} in the configuration");
            return Retried::Refused(text);
        };
        let told = match &letter.stored {
            Some(stored) => Some(Told::Entry {
                part: partition_of(&stored.room, self.parts.streams.partitions()),
                stored: Box::new(stored.clone()),
                epoch: letter.epoch,
            }),
            None => Told::of_note(&letter.payload),
        };
        let Some(told) = told else {
            return Retried::Refused("the letter can't be read".to_owned());
        };
        let retried = match self.send(hook, &told).await {
            Ok(retried) => retried,
            Err(reason) => return Retried::Refused(reason),
        };
        match self.parts.dead.remove(letter.number).await {
            Ok(()) => retried,
            Err(error) => Retried::NotRemoved(error),
        }
    }

    async fn send(&self, hook: &Hook, told: &Told) -> Result<Retried, String> {
        let parts = &self.parts;
        // What the hook wants may have changed.
        let events = told.events(parts, hook);
        if events.is_empty() || told.was_erased(parts).await? {
            return Ok(Retried::Gone);
        }
        for event in &events {
            if !told.counts(parts, event).await? {
                continue;
            }
            match hook.post(event).await {
                Ok(()) => {}
                Err(Refusal::Off(reason)) => return Err(reason),
                Err(Refusal::Failed { fault, .. }) => return Err(fault.to_string()),
            }
        }
        Ok(Retried::Done)
    }

    /// Closes the connections.
    pub async fn close(self) {
        self.parts.tasks.stop();
        self.links.close().await;
    }
}
