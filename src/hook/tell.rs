//! Tells of presence: who came online and went offline, which rooms have somebody and which have nobody.
//!
//! Each user and each room belongs to one region, by a hash of its name over the regions of the configuration, and only
//! that region tells of it. It sees the presence of all regions. So nobody has to agree with another region, and a change
//! is told once, however many tabs, edges and regions it comes from. Of the processes of a region, the one with the lease
//! tells.
//!
//! What was told is a record in the bucket `hooks`, with what is told next:
//!
//! 1. The record says what is to be told, and that it is not done: `out` is false.
//! 2. The event is a key of its own, from which hooks take it.
//! 3. The record is done: `out` is true, or, of who is gone, it is removed.
//!
//! A process that dies in between leaves a record from which the next one goes on. What happened while nobody told is found
//! by comparing the records with who is there.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};

use super::{Parts, event::hash, source::Note, state::Lease};
use crate::{
    bus::{KvError, Origins, Put, Reader},
    config::HookEvent,
    model::Region,
    outbound::pause,
    presence::{Online, Turned},
    runtime::unix_ms,
    subject::{
        HOOK_TELLER_LEASE, HOOK_TOLD_KEYS, hook_event_key, hook_told_key, parse_hook_told_key,
    },
    taking::STREAM_PAUSES,
};

/// How long an event waits for hooks that do not take it.
const EVENTS_FOR: Duration = Duration::from_secs(7 * 24 * 3600);

/// Names of a page of those who are there.
const PAGE: usize = 1000;

/// Names that are told at once.
const AT_ONCE: usize = 32;

/// How long the first list of who is there may take.
const LIST_WITHIN: Duration = Duration::from_secs(60);

/// What is told of: users or rooms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    Users,
    Rooms,
}

impl Of {
    fn word(self) -> &'static str {
        match self {
            Self::Users => "user",
            Self::Rooms => "room",
        }
    }

    fn kind(self, on: bool) -> HookEvent {
        match (self, on) {
            (Self::Users, true) => HookEvent::UserOnline,
            (Self::Users, false) => HookEvent::UserOffline,
            (Self::Rooms, true) => HookEvent::RoomOccupied,
            (Self::Rooms, false) => HookEvent::RoomVacated,
        }
    }
}

/// What was told, or is to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    on: bool,
    /// When it changed, in ms since 1970. It tells one change from another.
    at: u64,
    /// Whether the event is out.
    out: bool,
}

/// Who tells of users, or of rooms.
struct Teller {
    parts: Parts,
    of: Of,
    regions: BTreeSet<Region>,
    list: Arc<Online>,
    /// How long somebody must be gone.
    gone_after: Duration,
    /// What was told, with the revision of its key.
    told: HashMap<Arc<str>, (u64, Record)>,
    /// Who is gone, and when that is told.
    due: BTreeMap<(Instant, Arc<str>), ()>,
    leaving: HashMap<Arc<str>, Instant>,
}

/// The region that tells of a name: that with the highest hash.
fn home<'r>(regions: &'r BTreeSet<Region>, name: &str) -> Option<&'r Region> {
    regions.iter().max_by_key(|region| {
        let digest = Sha256::digest(format!("{region}\n{name}"));
        digest.first_chunk::<8>().copied()
    })
}

/// Follows who is there, and tells while this process has the lease, until the process shuts down.
pub(super) async fn run(
    parts: Parts,
    origins: Arc<Origins>,
    reader: Reader,
    of: Of,
    instance: String,
) {
    let (config, tasks) = (&parts.config, &parts.tasks);
    let (list, mut turned) = match of {
        Of::Users => Online::follow(config, &reader, &origins, tasks),
        Of::Rooms => Online::follow_rooms(config, &reader, &origins, tasks),
    };
    let key = format!("{HOOK_TELLER_LEASE}.{}", of.word());
    let lease = Lease::new(&parts.bucket, key, &instance);
    loop {
        let held = {
            // Changes are of no interest meanwhile: the lists are compared.
            let drop_changes = async {
                while turned.recv().await.is_some() {}
                std::future::pending::<()>().await;
            };
            tokio::select! {
                held = lease.acquire() => held,
                () = drop_changes => continue,
                () = tasks.stopping() => return,
            }
        };
        let mut teller = Teller {
            parts: parts.clone(),
            of,
            regions: config.regions(),
            list: Arc::clone(&list),
            gone_after: match of {
                Of::Users => config.hook.offline_after,
                Of::Rooms => Duration::ZERO,
            },
            told: HashMap::new(),
            due: BTreeMap::new(),
            leaving: HashMap::new(),
        };
        let is_over = tokio::select! {
            () = teller.tell(&mut turned) => false,
            () = lease.keep(held) => false,
            () = tasks.stopping() => true,
        };
        lease.release().await;
        if is_over {
            return;
        }
    }
}

impl Teller {
    fn is_ours(&self, name: &str) -> bool {
        home(&self.regions, name) == Some(self.parts.streams.origin())
    }

    /// Tells, until the list ends with the process, or something can't be written for certain: then it begins anew.
    async fn tell(&mut self, turned: &mut mpsc::Receiver<Turned>) {
        let mut failures = 0;
        loop {
            match self.begin().await {
                Ok(()) => break,
                Err(error) => tracing::debug!(%error, "what was told can't be read"),
            }
            failures += 1;
            sleep(pause(failures, STREAM_PAUSES, None)).await;
        }
        loop {
            let next = self.due.first_key_value().map(|((at, _), ())| *at);
            let mut batch = Vec::new();
            let result = tokio::select! {
                count = turned.recv_many(&mut batch, PAGE) => match count {
                    0 => std::future::pending().await,
                    _ => self.turned(batch).await,
                },
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                    self.leave().await
                }
            };
            if let Err(error) = result {
                tracing::debug!(%error, "what is told of presence is compared again");
                sleep(pause(1, STREAM_PAUSES, None)).await;
                return;
            }
        }
    }

    /// Reads what was told, and compares it with who is there.
    async fn begin(&mut self) -> Result<(), KvError> {
        let loaded = self.list.ready(Instant::now() + LIST_WITHIN).await;
        loaded.map_err(|_unavailable| KvError::Unavailable)?;
        self.told.clear();
        let keys = HOOK_TOLD_KEYS.replacen('*', self.of.word(), 1);
        for entry in self.parts.bucket.scan(&keys).await? {
            let named = parse_hook_told_key(&entry.key).map(|(_, name)| name);
            let record = entry.value.as_deref().map(serde_json::from_slice);
            if let (Some(name), Some(Ok(record))) = (named, record) {
                self.told.insert(name.into(), (entry.revision, record));
            }
        }
        let half_done = self.told.iter().filter(|(_, (_, record))| !record.out);
        let half_done: Vec<Arc<str>> = half_done.map(|(name, _)| Arc::clone(name)).collect();
        self.change(half_done, None).await?;
        let on = self.told.iter().filter(|(_, (_, record))| record.on);
        let on: Vec<Arc<str>> = on.map(|(name, _)| Arc::clone(name)).collect();
        for name in on {
            if self.list.is_online(&name) == Some(false) {
                self.gone(name);
            }
        }
        let mut after: Option<Arc<str>> = None;
        loop {
            let page = self.list.page(after.as_deref(), PAGE).await;
            let Some(last) = page.last() else {
                return Ok(());
            };
            after = Some(Arc::clone(last));
            self.came(page).await?;
        }
    }

    /// Takes in who came and went, in this order.
    async fn turned(&mut self, turned: Vec<Turned>) -> Result<(), KvError> {
        let last: BTreeMap<Arc<str>, bool> = turned
            .into_iter()
            .filter(|turned| self.is_ours(&turned.user))
            .map(|turned| (turned.user, turned.online))
            .collect();
        let (came, gone): (Vec<_>, Vec<_>) = last.into_iter().partition(|(_, online)| *online);
        gone.into_iter().for_each(|(name, _)| self.gone(name));
        self.came(came.into_iter().map(|(name, _)| name).collect())
            .await
    }

    /// These are there.
    async fn came(&mut self, mut names: Vec<Arc<str>>) -> Result<(), KvError> {
        for name in &names {
            if let Some(at) = self.leaving.remove(name) {
                self.due.remove(&(at, Arc::clone(name)));
            }
        }
        names.retain(|name| {
            let is_known = self.told.get(name).is_some_and(|(_, record)| record.on);
            !is_known && self.is_ours(name)
        });
        self.change(names, Some(true)).await
    }

    /// Somebody is gone; that is told later.
    fn gone(&mut self, name: Arc<str>) {
        if !self.told.get(&name).is_some_and(|(_, record)| record.on) {
            return;
        }
        let since = self.list.offline_since(&name).unwrap_or_else(Instant::now);
        let at = since + self.gone_after;
        if let Some(before) = self.leaving.insert(Arc::clone(&name), at) {
            self.due.remove(&(before, Arc::clone(&name)));
        }
        self.due.insert((at, name), ());
    }

    /// Tells of those who are gone for long enough.
    async fn leave(&mut self) -> Result<(), KvError> {
        let mut names = Vec::new();
        while let Some(first) = self.due.first_entry()
            && first.key().0 <= Instant::now()
        {
            let (_, name) = first.remove_entry().0;
            self.leaving.remove(&name);
            if self.list.is_online(&name) != Some(false) {
                continue;
            }
            // What is told takes its time, in which somebody may have come and gone again.
            let is_gone_for = self.list.offline_since(&name).map(|since| since.elapsed());
            match is_gone_for.is_none_or(|time| time >= self.gone_after) {
                true => names.push(name),
                false => self.gone(name),
            }
        }
        self.change(names, Some(false)).await
    }

    /// Tells that these are there, or gone; `None`: brings out what was written down. Each of them is told on its own, and
    /// several at once.
    async fn change(&mut self, names: Vec<Arc<str>>, on: Option<bool>) -> Result<(), KvError> {
        let telling = names.into_iter().map(|name| {
            let (parts, of) = (&self.parts, self.of);
            let known = self.told.get(&name).copied();
            async move {
                let noted = match (on, known) {
                    (None, Some(known)) => Ok(known),
                    (None, None) => return (name, Ok(None)),
                    (Some(on), _) => note_down(parts, of, &name, known, on).await,
                };
                let told = match noted {
                    Ok(noted) => bring_out(parts, of, &name, noted).await,
                    Err(error) => Err(error),
                };
                (name, told)
            }
        });
        let told: Vec<_> = stream::iter(telling)
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        let mut result = Ok(());
        for (name, told) in told {
            match told {
                Ok(Some(known)) => drop(self.told.insert(name, known)),
                Ok(None) => drop(self.told.remove(&name)),
                Err(error) => result = Err(error),
            }
        }
        result
    }
}

/// Writes down what is to be told, after what is known. Returns it with its revision.
async fn note_down(
    parts: &Parts,
    of: Of,
    name: &str,
    known: Option<(u64, Record)>,
    on: bool,
) -> Result<(u64, Record), KvError> {
    let record = Record {
        on,
        // Later than what was told before, also if the clock was set back.
        at: unix_ms().max(known.map_or(0, |(_, record)| record.at + 1)),
        out: false,
    };
    let expected = known.map_or(0, |(revision, _)| revision);
    let key = hook_told_key(of.word(), name);
    match write(parts, &key, record, expected).await {
        // The marker of a record that was removed is still there.
        Err(KvError::Conflict) if expected == 0 => {
            let found = parts.bucket.get(std::slice::from_ref(&key)).await?.pop();
            let marker = found.filter(|entry| entry.value.is_none());
            let marker = marker.ok_or(KvError::Conflict)?;
            write(parts, &key, record, marker.revision).await
        }
        written => written,
    }
}

async fn write(
    parts: &Parts,
    key: &str,
    record: Record,
    expected: u64,
) -> Result<(u64, Record), KvError> {
    let value = serde_json::to_vec(&record).map_err(|error| KvError::Refused(error.to_string()))?;
    let how = Put {
        ttl: None,
        expected: Some(expected),
    };
    let revision = parts.bucket.put(key, value.into(), how).await?;
    Ok((revision, record))
}

/// Writes the event of a record, and that it is out. Returns what is known then.
async fn bring_out(
    parts: &Parts,
    of: Of,
    name: &Arc<str>,
    (revision, record): (u64, Record),
) -> Result<Option<(u64, Record)>, KvError> {
    let Record { on, at, .. } = record;
    let word = of.word();
    let named = Some(name.to_string());
    let note = Note {
        id: format!("{word}.{}.{at}", hash(name)),
        kind: of.kind(on),
        at,
        room: named.clone().filter(|_| of == Of::Rooms),
        user: named.filter(|_| of == Of::Users),
    };
    let value = serde_json::to_vec(&note).map_err(|error| KvError::Refused(error.to_string()))?;
    let how = Put {
        ttl: Some(EVENTS_FOR),
        expected: Some(0),
    };
    let event = hook_event_key(word, name, at);
    match parts.bucket.put(&event, value.into(), how).await {
        // An earlier process brought it out.
        Ok(_) | Err(KvError::Conflict) => {}
        Err(error) => return Err(error),
    }
    let key = hook_told_key(word, name);
    if on {
        let record = Record {
            out: true,
            ..record
        };
        return write(parts, &key, record, revision).await.map(Some);
    }
    // Not what another process has written since.
    parts.bucket.remove_at(&key, revision).await?;
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_one_home_and_few_move_when_a_region_is_added() {
        let of = |names: &[&str]| -> BTreeSet<Region> {
            names
                .iter()
                .map(|name| Region::parse(name).unwrap())
                .collect()
        };
        let (two, three) = (
            of(&["seoul", "virginia"]),
            of(&["seoul", "virginia", "oslo"]),
        );
        let (mut of_seoul, mut moved) = (0, 0);
        for n in 0..3000 {
            let name = format!("user-{n}");
            let before = home(&two, &name).unwrap();
            let after = home(&three, &name).unwrap();
            of_seoul += usize::from(before.as_str() == "seoul");
            moved += usize::from(before != after);
            assert!(before == after || after.as_str() == "oslo");
        }
        assert!((1300..1700).contains(&of_seoul), "{of_seoul}");
        assert!((850..1150).contains(&moved), "{moved}");
    }
}
