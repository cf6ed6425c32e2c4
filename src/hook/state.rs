//! What the processes of hooks of a region remember together, in the bucket `hooks`: which of them sends the events of a
//! hook, which hooks are disabled, and which entry was the first to name an upload.
//!
//! A lease is a key that its holder rewrites. Others take it over when it has not changed for [`OVER_AFTER`] by their own
//! clocks; the holder stops before that, at [`HELD_FOR`] after its last rewrite. So clocks need not agree, and a server that
//! was restarted, and expires old keys late, does no harm.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, sleep_until};

use crate::{
    bus::{Bucket, KvError, Put},
    runtime::unix_ms,
    subject::{hook_off_key, hook_upload_key},
};

/// Interval of the holder's rewrites, and of the looks of others.
const RENEW: Duration = Duration::from_secs(2);

/// After this time without a rewrite the holder has lost its lease.
const HELD_FOR: Duration = Duration::from_secs(5);

/// After this time without a rewrite another process takes a lease over.
const OVER_AFTER: Duration = Duration::from_secs(8);

/// How long is remembered which entry was the first to name an upload.
const UPLOADS_FOR: Duration = Duration::from_secs(90 * 24 * 3600);

/// A lease that some process holds, or none.
#[derive(Debug, Clone)]
pub(super) struct Lease {
    bucket: Bucket,
    key: String,
    /// This process.
    instance: String,
}

/// Why a hook is disabled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Off {
    /// In ms since 1970.
    pub at: u64,
    pub reason: String,
}

impl Lease {
    pub(super) fn new(bucket: &Bucket, key: String, instance: &str) -> Self {
        Self {
            bucket: bucket.clone().with_timeout(RENEW),
            key,
            instance: instance.to_owned(),
        }
    }

    /// The revision of the key, and its holder.
    async fn read(&self) -> Result<(u64, Option<Bytes>), KvError> {
        let entry = self
            .bucket
            .get(std::slice::from_ref(&self.key))
            .await?
            .pop();
        Ok(entry.map_or((0, None), |entry| (entry.revision, entry.value)))
    }

    async fn write(&self, expected: u64) -> Result<u64, KvError> {
        let how = Put {
            ttl: None,
            expected: Some(expected),
        };
        self.bucket
            .put(&self.key, self.instance.clone().into(), how)
            .await
    }

    /// Waits until this process holds it. Returns its revision, and when it was written at the earliest.
    pub(super) async fn acquire(&self) -> (u64, Instant) {
        let mut known = (0, Instant::now());
        loop {
            match self.read().await {
                Ok((revision, holder)) => {
                    if known.0 != revision {
                        known = (revision, Instant::now());
                    }
                    let is_free = holder.is_none_or(|its| its == self.instance.as_bytes());
                    if is_free || known.1.elapsed() > OVER_AFTER {
                        let begun = Instant::now();
                        match self.write(revision).await {
                            Ok(revision) => return (revision, begun),
                            Err(error) => tracing::debug!(key = self.key, %error, "no lease yet"),
                        }
                    }
                }
                Err(error) => tracing::debug!(key = self.key, %error, "a lease can't be read"),
            }
            sleep(RENEW / 4).await;
        }
    }

    /// Rewrites it, until it is lost: [`HELD_FOR`] after the last rewrite, also while a request is under way.
    pub(super) async fn keep(&self, (mut revision, mut written): (u64, Instant)) {
        loop {
            let rewrite = async {
                sleep(RENEW).await;
                let begun = Instant::now();
                match self.write(revision).await {
                    Ok(newer) => Ok(Some((newer, begun))),
                    Err(KvError::Conflict) => match self.read().await {
                        // An earlier write of this process, of which it did not hear.
                        Ok((newer, Some(holder))) if holder == self.instance.as_bytes() => {
                            Ok(Some((newer, written)))
                        }
                        Ok(_) => Ok(None),
                        Err(error) => Err(error),
                    },
                    Err(error) => Err(error),
                }
            };
            let rewritten = tokio::select! {
                rewritten = rewrite => rewritten,
                () = sleep_until(written + HELD_FOR) => return,
            };
            match rewritten {
                Ok(Some(held)) => (revision, written) = held,
                Ok(None) => return,
                Err(error) => tracing::debug!(key = self.key, %error, "a lease can't be renewed"),
            }
        }
    }

    /// Gives it up, so that another process has it at once.
    pub(super) async fn release(&self) {
        let held = self.read().await;
        if let Ok((revision, Some(holder))) = held
            && holder == self.instance.as_bytes()
            && let Err(error) = self.bucket.remove_at(&self.key, revision).await
        {
            tracing::debug!(key = self.key, %error, "a lease could not be given up");
        }
    }
}

/// Whether a hook is disabled.
pub(super) async fn off(bucket: &Bucket, hook: &str) -> Result<Option<Off>, KvError> {
    let entry = bucket.get(&[hook_off_key(hook)]).await?.pop();
    let value = entry.and_then(|entry| entry.value);
    Ok(value.map(|value| {
        serde_json::from_slice(&value).unwrap_or_else(|error| Off {
            at: 0,
            reason: format!("its key can't be read: {error}"),
        })
    }))
}

/// Disables a hook.
pub(super) async fn disable(bucket: &Bucket, hook: &str, reason: &str) -> Result<(), KvError> {
    let off = Off {
        at: unix_ms(),
        reason: reason.to_owned(),
    };
    let value = serde_json::to_vec(&off).map_err(|error| KvError::Refused(error.to_string()))?;
    let key = hook_off_key(hook);
    let put = bucket.put(&key, value.into(), Put::default());
    put.await.map(drop)
}

/// Whether the entry at `place` is the first that names an upload, of those that this region has stored.
pub(super) async fn is_first(bucket: &Bucket, upload: &str, place: &str) -> Result<bool, KvError> {
    let key = hook_upload_key(upload);
    let how = Put {
        ttl: Some(UPLOADS_FOR),
        expected: Some(0),
    };
    match bucket.put(&key, place.to_owned().into(), how).await {
        Ok(_) => Ok(true),
        Err(KvError::Conflict) => {
            let entry = bucket.get(&[key]).await?.pop();
            let value = entry.and_then(|entry| entry.value);
            Ok(value.is_none_or(|value| value == place.as_bytes()))
        }
        Err(error) => Err(error),
    }
}
