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
            let result = tokio::select! {
                turned = turned.recv() => match turned {
                    Some(turned) => self.turned(turned).await,
                    None => std::future::pending().await,
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
        let known: Vec<(Arc<str>, Record)> = {
            let all = self.told.iter();
            all.map(|(name, (_, record))| (Arc::clone(name), *record))
                .collect()
        };
        for (name, record) in known {
            if !record.out {
                self.bring_out(&name, record).await?;
            }
            if record.on && self.list.is_online(&name) == Some(false) {
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
            for name in page {
                self.came(&name).await?;
            }
        }
    }

    async fn turned(&mut self, turned: Turned) -> Result<(), KvError> {
        if !self.is_ours(&turned.user) {
            return Ok(());
        }
        match turned.online {
            true => self.came(&turned.user).await,
            false => {
                self.gone(turned.user);
                Ok(())
            }
        }
    }

    /// Somebody is there.
    async fn came(&mut self, name: &Arc<str>) -> Result<(), KvError> {
        if let Some(at) = self.leaving.remove(name) {
            self.due.remove(&(at, Arc::clone(name)));
        }
        let is_known = self.told.get(name).is_some_and(|(_, record)| record.on);
        if is_known || !self.is_ours(name) {
            return Ok(());
        }
        self.change(name, true).await
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
        while let Some(first) = self.due.first_entry()
            && first.key().0 <= Instant::now()
        {
            let (_, name) = first.remove_entry().0;
            self.leaving.remove(&name);
            if self.list.is_online(&name) == Some(false) {
                self.change(&name, false).await?;
            }
        }
        Ok(())
    }

    async fn change(&mut self, name: &Arc<str>, on: bool) -> Result<(), KvError> {
        let known = self.told.get(name).copied();
        let record = Record {
            on,
            // Later than what was told before, also if the clock was set back.
            at: unix_ms().max(known.map_or(0, |(_, record)| record.at + 1)),
            out: false,
        };
        let expected = known.map_or(0, |(revision, _)| revision);
        self.write(name, record, expected).await?;
        self.bring_out(name, record).await
    }

    async fn write(
        &mut self,
        name: &Arc<str>,
        record: Record,
        expected: u64,
    ) -> Result<(), KvError> {
        let value =
            serde_json::to_vec(&record).map_err(|error| KvError::Refused(error.to_string()))?;
        let how = Put {
            ttl: None,
            expected: Some(expected),
        };
        let key = hook_told_key(self.of.word(), name);
        let written = self.parts.bucket.put(&key, value.into(), how).await;
        let revision = match written {
            // The marker of a record that was removed is still there.
            Err(KvError::Conflict) if expected == 0 => {
                let found = self
                    .parts
                    .bucket
                    .get(std::slice::from_ref(&key))
                    .await?
                    .pop();
                let marker = found.filter(|entry| entry.value.is_none());
                let marker = marker.ok_or(KvError::Conflict)?;
                let how = Put {
                    ttl: None,
                    expected: Some(marker.revision),
                };
                let value = serde_json::to_vec(&record)
                    .map_err(|error| KvError::Refused(error.to_string()))?;
                self.parts.bucket.put(&key, value.into(), how).await?
            }
            written => written?,
        };
        self.told.insert(Arc::clone(name), (revision, record));
        Ok(())
    }

    /// Writes the event of a record, and that it is out.
    async fn bring_out(&mut self, name: &Arc<str>, record: Record) -> Result<(), KvError> {
        let Record { on, at, .. } = record;
        let word = self.of.word();
        let named = Some(name.to_string());
        let note = Note {
            id: format!("{word}.{}.{at}", hash(name)),
            kind: self.of.kind(on),
            at,
            room: named.clone().filter(|_| self.of == Of::Rooms),
            user: named.filter(|_| self.of == Of::Users),
        };
        let value =
            serde_json::to_vec(&note).map_err(|error| KvError::Refused(error.to_string()))?;
        let how = Put {
            ttl: Some(EVENTS_FOR),
            expected: Some(0),
        };
        let key = hook_event_key(word, name, at);
        match self.parts.bucket.put(&key, value.into(), how).await {
            // An earlier process brought it out.
            Ok(_) | Err(KvError::Conflict) => {}
            Err(error) => return Err(error),
        }
        if on {
            let expected = self.told.get(name).map_or(0, |(revision, _)| *revision);
            let record = Record {
                out: true,
                ..record
            };
            return self.write(name, record, expected).await;
        }
        self.parts.bucket.remove(&hook_told_key(word, name)).await?;
        self.told.remove(name);
        Ok(())
    }
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
