//! Uploads, as far as history is concerned: which messages name them, and which files are removed.
//!
//! A file is removed when its message is erased or deleted, or when no message has named it in time. The registry in
//! MongoDB ([`Store`](crate::store::Store)) says which; the files are in the storage ([`Storage`]).
//!
//! **Unused uploads.** A message may be in the stream of any region, and may not be written to MongoDB yet. So each region
//! says for itself that its streams do not name an upload: it notes the ends of its streams, waits until its workers have
//! written everything up to there, and then speaks for the uploads that could not be named any more when it noted
//! them. A file goes when all regions have spoken.

use std::{collections::HashMap, sync::Arc, time::Duration};

use serde::Deserialize;
use tokio::time::sleep;

use super::Parts;
use crate::{
    bus::{PullError, StreamError, consumer_state},
    protocol::{ErrorCode, Refused},
    runtime::{Phase, unix_ms},
    store::{
        Change, Claim, Entry, FileRemoval, StoreError, Upload, UploadState, Verdict, What, author,
    },
    subject::{HISTORY_CONSUMER, rooms_stream, worker_user},
    telemetry::metrics::{Counter, UploadGrant, count},
    uploads::{Storage, UploadId, named},
};

/// Pause between two looks for files to remove.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Bounds of the pause between two looks for unused uploads, which is a part of `uploads.unused_ttl`.
const UNUSED_EVERY: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(600)];
const UNUSED_PART: u32 = 20;

/// How much longer than `uploads.unused_ttl` an unused upload is kept: for messages that are just being sent, and clocks
/// that differ. With a short `unused_ttl` half of that.
const LATE_MESSAGES: Duration = Duration::from_secs(5 * 60);

/// Without success in this time, the removal of a file is tried again, by any instance.
const REMOVED_WITHIN: Duration = Duration::from_secs(60);

/// The registry can't say now which uploads are unused.
#[derive(Debug, thiserror::Error)]
enum UnusedError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Consumer(#[from] PullError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Grants an upload, within the limit of its user.
pub(super) async fn grant(parts: &Parts, upload: &Upload) -> Result<(), Refused> {
    let most = parts.config.uploads.max_per_day;
    let is_checked = parts.config.uploads.scan().is_some();
    let granted = parts.store.grant_upload(upload, most.as_u64(), is_checked);
    let granted = granted.await;
    let granted = granted.map_err(|error| {
        tracing::warn!(%error, "an upload could not be granted");
        count(Counter::UploadGranted(UploadGrant::Unavailable), 1);
        let text = format!("uploads need the registry: {error}");
        Refused::new(ErrorCode::Unavailable, text)
    })?;
    if let Err(used) = granted {
        count(Counter::UploadGranted(UploadGrant::Limit), 1);
        let (size, limit) = (upload.size, most.as_u64());
        let text = format!(
            "{size} bytes more would be too much: {used} bytes were granted to this user in the last 24 hours, the limit is {limit} ({most})"
        );
        return Err(Refused::new(ErrorCode::Limit, text));
    }
    count(Counter::UploadGranted(UploadGrant::Granted), 1);
    Ok(())
}

/// Whether the file of an upload may be given out.
pub(super) async fn state(parts: &Parts, upload: &str) -> Result<UploadState, Refused> {
    let state = parts.store.upload_state(upload).await;
    state.map_err(|error| {
        let text = format!("whether the file was checked is not known: {error}");
        Refused::new(ErrorCode::Unavailable, text)
    })
}

/// What a worker says of uploads: `{"files": {"<upload>": "clean" | "infected"}}`. All else is none of our business.
#[derive(Deserialize)]
struct Judged {
    files: HashMap<String, serde_json::Value>,
}

/// The verdicts among these entries: what the worker `scan` itself has annotated. Nobody else can have its name, since no
/// token has one that begins with `$`. What was imported is only told: whoever wrote the file of an import may have named
/// anybody.
pub(super) fn verdicts<'a>(entries: &'a [Entry], scan: &str) -> Vec<Verdict<'a>> {
    let judge = worker_user(scan);
    let mut verdicts = Vec::new();
    let own = |entry: &&Entry| entry.from == judge && entry.original_ts.is_none();
    for entry in entries.iter().filter(own) {
        let What::Change {
            change: Change::Annotate(said),
            ..
        } = &entry.what
        else {
            continue;
        };
        for (_name, json) in said {
            let Ok(Judged { files }) = serde_json::from_str(json) else {
                continue;
            };
            verdicts.extend(files.into_iter().filter_map(|(upload, verdict)| {
                let is_infected = match verdict.as_str() {
                    Some("clean") => false,
                    Some("infected") => true,
                    _ => return None,
                };
                Some(Verdict {
                    upload,
                    room: &entry.room,
                    is_infected,
                })
            }));
        }
    }
    verdicts
}

/// What messages and edits say of uploads.
pub(super) fn claims(entries: &[Entry]) -> Vec<Claim<'_>> {
    let claims = entries.iter().filter_map(|entry| {
        let (message, user, body) = match &entry.what {
            What::Message { key, said } => (key, entry.from.clone(), &said.body),
            What::Change {
                target,
                change: Change::Edit { body, .. },
            } => (target, author(&entry.room, target), body),
            What::Change { .. } | What::Nothing(_) => return None,
        };
        // Not every publisher is an edge, so it may be anything.
        let uploads = named(body).unwrap_or_default();
        (!uploads.is_empty()).then_some(Claim {
            uploads,
            room: &entry.room,
            user,
            message,
            ts: entry.place.ts,
        })
    });
    claims.collect()
}

/// The keys of the messages among these that may be deleted and have uploads.
pub(super) fn perhaps_deleted<'a>(entries: &'a [Entry], claims: &[Claim<'a>]) -> Vec<&'a str> {
    let deleted = entries.iter().filter_map(|entry| match &entry.what {
        What::Change {
            target,
            change: Change::Delete,
        } => Some(target.as_str()),
        What::Change { .. } | What::Message { .. } | What::Nothing(_) => None,
    });
    deleted
        .chain(claims.iter().map(|claim| claim.message))
        .collect()
}

/// Removes files that are due, forever.
pub(super) async fn remove(parts: Parts, storage: Arc<Storage>) {
    if parts.lifecycle.reached(Phase::Ready).await != Phase::Ready {
        return;
    }
    loop {
        match parts.store.claim_file_removal(REMOVED_WITHIN).await {
            Ok(Some(removal)) => remove_one(&parts, &storage, &removal).await,
            Ok(None) => sleep(LOOK_EVERY.mul_f64(rand::random_range(0.5..1.0))).await,
            Err(error) => {
                tracing::debug!(%error, "files to remove can't be looked for");
                sleep(LOOK_EVERY).await;
            }
        }
    }
}

async fn remove_one(parts: &Parts, storage: &Storage, removal: &FileRemoval) {
    let uploads = &parts.config.uploads;
    let again_at = removal.again_at(uploads.url_ttl);
    let remove = async |id: UploadId| match again_at {
        // An edge may still remember the file as clean, so no other one may take its place as long as that is possible.
        Some(_) if uploads.scan().is_some() => storage.bar(&id).await,
        _ => storage.remove(&id).await,
    };
    // Only ids that an edge made are in the registry; a record that a person wrote has no file.
    if let Ok(id) = UploadId::parse(&removal.id)
        && let Err(error) = remove(id).await
    {
        count(Counter::UploadRemovalFailed, 1);
        tracing::warn!(%error, upload = removal.id, "a file could not be removed; it will be tried again");
        return;
    }
    match parts.store.file_removed(removal, again_at).await {
        Ok(()) if removal.again => {}
        Ok(()) => count(Counter::UploadRemoved, 1),
        Err(error) => tracing::debug!(%error, "a removed file will be removed again"),
    }
}

/// Finds uploads that no message has named in time, forever.
pub(super) async fn find_unused(parts: Parts) {
    if parts.lifecycle.reached(Phase::Ready).await != Phase::Ready {
        return;
    }
    let ttl = parts.config.uploads.unused_ttl;
    let [least, most] = UNUSED_EVERY;
    let every = (ttl / UNUSED_PART).clamp(least, most);
    let kept = ttl + LATE_MESSAGES.min(ttl / 2);
    let kept = u64::try_from(kept.as_millis()).unwrap_or(u64::MAX);
    loop {
        sleep(every.mul_f64(rand::random_range(0.5..1.0))).await;
        let now = unix_ms();
        let look = async {
            let ends = ends(&parts).await?;
            for (part, end) in ends {
                while !is_written(&parts, part, end).await? {
                    sleep(every).await;
                }
            }
            let (own, regions) = (parts.streams.origin(), parts.streams.regions());
            let before = now.saturating_sub(kept);
            let unused = parts.store.unused_uploads(own, &regions, before).await?;
            Ok::<_, UnusedError>(unused)
        };
        match look.await {
            Ok(0) => {}
            Ok(unused) => {
                count(Counter::UploadUnused, unused);
                tracing::info!(unused, "uploads that no message named are removed");
            }
            Err(error) => tracing::debug!(%error, "unused uploads can't be looked for"),
        }
    }
}

/// The ends of the region's streams.
async fn ends(parts: &Parts) -> Result<Vec<(u16, u64)>, StreamError> {
    let mut ends = Vec::new();
    for part in 0..parts.streams.partitions() {
        ends.push((part, parts.streams.fetch(part).await?.last_seq));
    }
    Ok(ends)
}

/// Whether the workers have written the messages of a partition up to `end`.
async fn is_written(parts: &Parts, part: u16, end: u64) -> Result<bool, PullError> {
    let stream = rooms_stream(parts.streams.origin(), part);
    let wait = parts.config.nats.read_timeout;
    let state = consumer_state(&parts.connection, &stream, HISTORY_CONSUMER, wait).await?;
    Ok(state
        .is_some_and(|state| state.floor >= end || (state.pending == 0 && state.ack_pending == 0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Epoch, Place, Region, RoomId},
        store::Said,
    };

    fn entry(from: &str, what: What) -> Entry {
        Entry {
            room: RoomId::parse("chat:x").unwrap(),
            place: Place {
                ts: 7,
                origin: Region::parse("here").unwrap(),
                epoch: Epoch::parse("e").unwrap(),
                seq: 1,
            },
            from: from.to_owned(),
            original_ts: None,
            what,
        }
    }

    #[test]
    fn only_the_worker_that_is_asked_gives_verdicts() {
        let annotated = |from: &str, body: &str| {
            let said = vec![("scan".to_owned(), body.to_owned())];
            let change = Change::Annotate(said);
            let target = "chat:x/kim/1".to_owned();
            entry(from, What::Change { target, change })
        };
        let both = r#"{"files":{"u1":"clean","u2":"infected","u3":"unknown","u4":{"width":1}}}"#;
        let imported = Entry {
            original_ts: Some(1),
            ..annotated("$worker.scan", r#"{"files":{"u7":"clean"}}"#)
        };
        let entries = [
            imported,
            annotated("$worker.scan", both),
            annotated("$worker.scan", r#"{"files":["u1"]}"#),
            annotated("$worker.image", r#"{"files":{"u5":"clean"}}"#),
            annotated("scan", r#"{"files":{"u6":"clean"}}"#),
            annotated("kim", both),
        ];
        let verdicts = verdicts(&entries, "scan");
        let mut told: Vec<_> = verdicts
            .iter()
            .map(|one| (&*one.upload, one.room.as_str(), one.is_infected))
            .collect();
        told.sort_unstable();
        assert_eq!(told, [("u1", "chat:x", false), ("u2", "chat:x", true)]);
    }

    #[test]
    fn messages_and_edits_claim_for_the_author_and_deletions_let_go() {
        let body = r#"{"attachments":[{"upload":"u1"}]}"#.to_owned();
        let message = |body: &str| What::Message {
            key: "chat:x/kim/1".to_owned(),
            said: Said {
                body: body.to_owned(),
                ..Said::default()
            },
        };
        let change = |change| What::Change {
            target: "chat:x/lee//2".to_owned(),
            change,
        };
        let edit = Change::Edit {
            body: body.clone(),
            mentions: None,
        };
        let entries = [
            entry("kim", message(&body)),
            entry("kim", message(r#"{"text":"no attachments"}"#)),
            entry("mod", change(edit)),
            entry("mod", change(Change::Delete)),
        ];
        let claims = claims(&entries);
        let told = claims
            .iter()
            .map(|claim| (&*claim.user, claim.message, &*claim.uploads));
        let uploads = &["u1".to_owned()][..];
        assert_eq!(
            told.collect::<Vec<_>>(),
            [
                ("kim", "chat:x/kim/1", uploads),
                ("lee/", "chat:x/lee//2", uploads)
            ]
        );
        let keys = perhaps_deleted(&entries, &claims);
        assert_eq!(keys, ["chat:x/lee//2", "chat:x/kim/1", "chat:x/lee//2"]);
    }
}
