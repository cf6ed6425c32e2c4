//! Who is notified of a message, and the sending.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, future::join_all, stream::FuturesUnordered};
use sha2::{Digest as _, Sha256};
use tokio::time::{Instant, sleep};

use super::{
    Parts,
    judge::{Facts, Verdict, judge},
    provider::{Note, Sent, service_of},
    turns::Turn,
};
use crate::{
    bus::{Entry, KvError, Put, Stored, message_key},
    config::PushContent,
    model::{Class, Cursor, Epoch, partition_of},
    outbound::pause,
    people::{Device, Devices, MemberState, Record, RoomKind, preview},
    runtime::unix_ms,
    subject::{Subjects, marker_key, rooms_stream},
    telemetry::metrics::{Counter, Gauge, Held, Histogram, PushSkip, count, record},
};

/// Recipients that are looked at together.
const GROUP: usize = 200;

/// Pages of later changes of the room that are looked at for a deletion: 1,000 changes each.
const MOST_PAGES: usize = 32;

/// Attempts to send a notification while its message is in hand. If the service takes nothing then, the message waits in
/// its stream.
const ATTEMPTS: u32 = 4;

/// Pauses between them: the first and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// Pauses before a device is tried again whose service took nothing: the first and the longest.
const LATER: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// Longest pause for which a message keeps its place.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Users who are still being notified when the next group is looked at.
const LEFT_OPEN: usize = 64;

/// What became of a device.
enum Notified {
    /// It was notified, or the attempt is over.
    Done,
    /// It was claimed by somebody else.
    Not,
    /// Its service takes nothing now. It is tried again after this time.
    Later(Duration),
}

/// A message, as its recipients are told of it.
pub(super) struct Message<'m> {
    stored: &'m Stored,
    epoch: Epoch,
    age: Duration,
    /// How often it was delivered.
    deliveries: u32,
    /// The first change of the room that was not looked at yet for a deletion.
    unseen: AtomicU64,
}

/// Those who may be notified of a message.
fn candidates(stored: &Stored, room_record: &Record) -> Vec<String> {
    let sender = &stored.record.from;
    match room_record.kind {
        RoomKind::Dm | RoomKind::Group => {
            let present = room_record.present().map(|(user, _)| user);
            present
                .filter(|user| user != sender)
                .map(str::to_owned)
                .collect()
        }
        // Nobody knows who is in it.
        RoomKind::Open => {
            let text = stored.record.mentions.as_deref();
            let mentioned: Vec<String> = text
                .and_then(|text| serde_json::from_str(text).ok())
                .unwrap_or_default();
            let may_be_in = |user: &String| {
                let member = room_record.member(user);
                member.is_none_or(|member| member.state == MemberState::In)
            };
            let mut mentioned: Vec<String> = mentioned
                .into_iter()
                .filter(|user| user != sender && may_be_in(user))
                .collect();
            mentioned.sort_unstable();
            mentioned.dedup();
            mentioned
        }
    }
}

/// A template with its fields filled in.
fn filled(template: &str, fields: &[(&str, &str)]) -> String {
    let mut out = String::with_capacity(template.len() + 64);
    let mut rest = template;
    // Once from left to right: what a user wrote is not a template.
    while let Some(at) = rest.find('{') {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        let field = fields.iter().find(|(name, _)| from.starts_with(name));
        let (value, length) = field.map_or(("{", 1), |(name, value)| (*value, name.len()));
        out.push_str(value);
        rest = from.get(length..).unwrap_or_default();
    }
    out.push_str(rest);
    out
}

impl<'m> Message<'m> {
    pub(super) fn new(stored: &'m Stored, epoch: Epoch, age: Duration, deliveries: u32) -> Self {
        Self {
            unseen: AtomicU64::new(stored.record.seq + 1),
            stored,
            epoch,
            age,
            deliveries,
        }
    }

    /// Whether it was probably looked at before: then some may have been notified.
    fn is_again(&self) -> bool {
        self.deliveries > 2
    }

    /// Notifies those who are due. Returns the time until the next of the others is.
    ///
    /// # Errors
    /// What can't be reached now.
    pub(super) async fn notify(&self, parts: &Parts) -> Result<Option<Duration>, String> {
        let known = parts.people.of(&self.stored.room).await;
        let known = known.map_err(|refused| refused.message)?;
        if !known.is_read() {
            return Err("the room's record can't be read".to_owned());
        }
        let Some(room_record) = known.record().filter(|record| !record.is_closed()) else {
            return Ok(None);
        };
        let all = candidates(self.stored, &room_record);
        if all.is_empty() || self.is_gone(parts).await? {
            return Ok(None);
        }
        let deadline = Instant::now() + parts.config.nats.read_timeout;
        let ready = parts.online.ready(deadline).await;
        ready.map_err(|_unavailable| "who is online can't be read".to_owned())?;
        let began = Instant::now();
        let (mut next, mut failed) = (None, None);
        // A device that takes long does not hold up the next group. What has begun goes on to its end, whatever fails
        // elsewhere: a claim without its request would never be notified.
        let mut open = FuturesUnordered::new();
        let mut note = |ended: Result<Option<Duration>, String>| match ended {
            Ok(later) => next = sooner(next, later),
            Err(error) => failed = Some(error),
        };
        for (number, group) in all.chunks(GROUP).enumerate() {
            // Many recipients take a while, in which some leave, and the message may be deleted.
            let record = known.record().filter(|record| !record.is_closed());
            let Some(room_record) = record else { break };
            if self.age + began.elapsed() > parts.config.push.max_age {
                count(Counter::PushExpired, 1);
                break;
            }
            let still: HashSet<String> =
                candidates(self.stored, &room_record).into_iter().collect();
            let group = group.iter().filter(|user| still.contains(*user));
            let group: Vec<String> = group.cloned().collect();
            let look = async {
                match number > 0 && self.is_gone(parts).await? {
                    true => Ok(None),
                    false => self.due(parts, &group).await.map(Some),
                }
            };
            let mut look = std::pin::pin!(look);
            let looked = loop {
                tokio::select! {
                    looked = &mut look => break looked,
                    Some(ended) = open.next(), if !open.is_empty() => note(ended),
                }
            };
            match looked {
                Ok(Some((wait, due))) => {
                    note(Ok(wait));
                    for (user, devices, claimed) in due {
                        let record = Arc::clone(&room_record);
                        open.push(self.notify_user(parts, record, user, devices, claimed));
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    note(Err(error));
                    break;
                }
            }
            while open.len() > LEFT_OPEN
                && let Some(ended) = open.next().await
            {
                note(ended);
            }
        }
        while let Some(ended) = open.next().await {
            note(ended);
        }
        // What could not be claimed is claimed at the next attempt.
        failed.map_or(Ok(next), Err)
    }

    /// Whether the message was erased, or deleted while it waited.
    async fn is_gone(&self, parts: &Parts) -> Result<bool, String> {
        let erased = parts.remembered.has_stored(self.stored).await;
        if erased.map_err(|error| error.to_string())? {
            return Ok(true);
        }
        let Stored { room, record } = self.stored;
        let origin = parts.streams.origin();
        let part = partition_of(room, parts.streams.partitions());
        let stream = rooms_stream(origin, part);
        let subjects = Subjects::new(&parts.config.nats.prefix);
        let filter = subjects.publish(origin, part, room, Class::Ev);
        for _ in 0..MOST_PAGES {
            let from = self.unseen.load(Ordering::Relaxed);
            let page = parts.reader.page(&stream, self.epoch, &filter, from).await;
            let page = page.map_err(|error| error.to_string())?;
            if page.records.iter().any(|change| change.deletes(record)) {
                return Ok(true);
            }
            let Some(last) = page.records.last() else {
                break;
            };
            self.unseen.store(last.seq + 1, Ordering::Relaxed);
            if page.pending == 0 {
                break;
            }
        }
        Ok(false)
    }

    /// Those of a group who are to be notified now, with their devices and the claims that are there; and the time until
    /// the next of the others is.
    async fn due(
        &self,
        parts: &Parts,
        users: &[String],
    ) -> Result<(Option<Duration>, Vec<(String, Devices, HashSet<String>)>), String> {
        let devices = parts.people.devices_of(users).await;
        let mut devices = devices.map_err(|refused| refused.message)?;
        devices.retain(|_, devices| devices.all().next().is_some());
        if devices.is_empty() {
            return Ok((None, Vec::new()));
        }
        let users: Vec<String> = devices.keys().cloned().collect();
        let (room, sender) = (&self.stored.room, &self.stored.record.from);
        let unwanted = parts.people.unwanted(room, sender, &users).await;
        let unwanted = unwanted.map_err(|refused| refused.message)?;
        let read = self.readers(parts, &users).await?;
        let (now, default_quiet) = (Instant::now(), parts.config.push.quiet());
        let (mut next, mut due) = (None, Vec::new());
        for user in users {
            let Some(devices) = devices.remove(&user) else {
                continue;
            };
            let away = parts.online.offline_since(&user);
            let quiet = devices.quiet().unwrap_or(default_quiet);
            let facts = Facts {
                away: away.map(|since| now.saturating_duration_since(since)),
                read: read.get(&user).copied().unwrap_or_default(),
                unwanted: unwanted.get(&user).copied().unwrap_or_default(),
                quiet: quiet.is_some_and(|quiet| quiet.contains(unix_ms())),
            };
            match judge(&facts, self.age, parts.config.push.after) {
                Verdict::Notify => due.push((user, devices)),
                Verdict::Wait(wait) => next = sooner(next, Some(wait)),
                Verdict::Skip(why) => count(Counter::PushSkipped(why), 1),
            }
        }
        let claimed = self.claimed(parts, &due).await?;
        let due = due.into_iter().map(|(user, devices)| {
            let keys = devices.all().map(|(name, _)| self.claim_key(&user, name));
            let claimed = keys.filter(|key| claimed.contains(key)).collect();
            (user, devices, claimed)
        });
        Ok((next, due.collect()))
    }

    /// Notifies the devices of a user. Returns after which time some are to be tried again.
    async fn notify_user(
        &self,
        parts: &Parts,
        room_record: Arc<Record>,
        user: String,
        devices: Devices,
        claimed: HashSet<String>,
    ) -> Result<Option<Duration>, String> {
        let mut wanted = Vec::new();
        for (name, device) in devices.all() {
            let id = self.claim_key(&user, name);
            match claimed.contains(&id) {
                true => count(Counter::PushSkipped(PushSkip::Repeated), 1),
                false => wanted.push((name, device, id)),
            }
        }
        if wanted.is_empty() {
            return Ok(None);
        }
        // Counted only for those who are notified.
        let badge = parts.badge(&user).await;
        let note = &self.note(parts, &room_record, &user, badge);
        let notified = wanted.iter().map(async |(name, device, id)| {
            self.notify_device(parts, (&user, name, device), note, id)
                .await
        });
        let (mut failed, mut later) = (None, None);
        for notified in join_all(notified).await {
            match notified {
                Ok(Notified::Done) => parts.badges.shown(&user, &self.stored.room),
                Ok(Notified::Not) => {}
                Ok(Notified::Later(wait)) => later = sooner(later, Some(wait)),
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(later),
        }
    }

    /// The claims that an earlier attempt has made, as far as they can be seen.
    async fn claimed(
        &self,
        parts: &Parts,
        due: &[(String, Devices)],
    ) -> Result<HashSet<String>, String> {
        if !self.is_again() || due.is_empty() {
            return Ok(HashSet::new());
        }
        let keys = due
            .iter()
            .flat_map(|(user, devices)| devices.all().map(|(name, _)| self.claim_key(user, name)));
        let keys: Vec<String> = keys.collect();
        let found = parts.claims.get(&keys).await;
        let found = found.map_err(|error| error.to_string())?;
        let claimed = found
            .into_iter()
            .filter(|entry| given_back(entry).is_none());
        Ok(claimed.map(|entry| entry.key).collect())
    }

    /// Which of these users have read up to the message.
    async fn readers(
        &self,
        parts: &Parts,
        users: &[String],
    ) -> Result<HashMap<String, bool>, String> {
        let room = &self.stored.room;
        let keys: Vec<String> = users.iter().map(|user| marker_key(room, user)).collect();
        let own = parts.streams.origin();
        let mut read: HashMap<&str, bool> = HashMap::new();
        let mut entries = Vec::new();
        for streams in parts.origins.all() {
            let origin = streams.origin();
            match parts.lastread.of(origin).get(&keys).await {
                Ok(found) => entries.extend(found),
                Err(error) if origin == own => return Err(error.to_string()),
                Err(error) => {
                    tracing::debug!(%origin, %error, "read markers of another region can't be read");
                }
            }
        }
        for entry in &entries {
            let text = entry
                .value
                .as_deref()
                .and_then(|value| std::str::from_utf8(value).ok());
            let cursor = text.and_then(|text| text.parse::<Cursor>().ok());
            let position = cursor.as_ref().and_then(|cursor| cursor.get(own));
            let has = position.is_some_and(|position| {
                position.epoch == self.epoch && position.seq >= self.stored.record.seq
            });
            *read.entry(&entry.key).or_default() |= has;
        }
        let all = users.iter().zip(&keys);
        Ok(all
            .map(|(user, key)| {
                (
                    user.clone(),
                    read.get(key.as_str()).copied().unwrap_or_default(),
                )
            })
            .collect())
    }

    /// What a user is told.
    fn note(&self, parts: &Parts, room_record: &Record, user: &str, badge: Option<u64>) -> Note {
        let Stored { room, record } = self.stored;
        let push = &parts.config.push;
        let (mut title, mut text) = (None, None);
        if push.content == PushContent::Text {
            let its = room_record.title();
            let name = its.as_deref().unwrap_or_else(|| match room_record.kind {
                RoomKind::Dm => &record.from,
                RoomKind::Group | RoomKind::Open => room.name(),
            });
            let said = preview(&record.body).unwrap_or_default();
            let fields = [
                ("{from}", &*record.from),
                ("{room}", room.as_str()),
                ("{title}", name),
                ("{text}", &*said),
            ];
            title = Some(filled(&push.title, &fields));
            text = Some(filled(&push.text, &fields));
        }
        Note {
            user: user.to_owned(),
            room: room.clone(),
            message: Some(format!("{}/{}", record.from, record.id)),
            title,
            text,
            badge,
            at: record.shown_ts(),
        }
    }

    /// Claims a device for the message, and notifies it.
    async fn notify_device(
        &self,
        parts: &Parts,
        whose: (&str, &str, &Device),
        note: &Note,
        id: &str,
    ) -> Result<Notified, String> {
        let service = service_of(whose.2);
        // Before the claim, so that a process that dies has not claimed more than it could send.
        let Some(turn) = parts.turns.turn(whose.0, whose.2).await else {
            // Its service is busy with others, or hangs: the message does not wait for it in hand.
            return Ok(Notified::Later(LONGEST_PAUSE));
        };
        let (revision, tries) = match claim(parts, id).await {
            Ok(Claim::Made { revision, tries }) => (revision, tries),
            Ok(Claim::Later(wait)) => return Ok(Notified::Later(wait)),
            Ok(Claim::OfAnother) => {
                count(Counter::PushSkipped(PushSkip::Repeated), 1);
                return Ok(Notified::Not);
            }
            Err(KvError::Unavailable) => return Err("claims can't be made now".to_owned()),
            Err(error) => {
                // It may be there: sending now could be sending twice.
                count(Counter::PushFailed(service), 1);
                tracing::warn!(%error, "a notification can't be claimed, and is not sent");
                return Ok(Notified::Not);
            }
        };
        // The user chooses where a request goes: it must not hold up those of others.
        let Some(wait) = self.send(parts, whose, (note, id), tries, turn).await else {
            return Ok(Notified::Done);
        };
        // The service has certainly not taken it: whoever looks at the message then may try again.
        let how = Put {
            expected: Some(revision),
            ..Put::default()
        };
        let not_before = unix_ms() + u64::try_from(wait.as_millis()).unwrap_or_default();
        let given_back = format!("{not_before} {}", tries + 1);
        match parts.claims.put(id, given_back.into(), how).await {
            Ok(_) => Ok(Notified::Later(wait)),
            Err(error) => {
                count(Counter::PushFailed(service), 1);
                tracing::warn!(%error, "a notification is given up: its claim can't be given back");
                Ok(Notified::Done)
            }
        }
    }

    /// The same for the same message and device, whoever asks, and whatever address the device has by now.
    fn claim_key(&self, user: &str, name: &str) -> String {
        let Stored { room, record } = self.stored;
        let key = message_key(room.as_str(), &record.from, &record.id);
        let digest = Sha256::digest(format!("{key}\n{user}\n{name}"));
        digest
            .iter()
            .take(20)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// Sends a notification that was claimed, and repeats what the service certainly did not take. Returns after which time
    /// it is to be tried again, if the service takes nothing now.
    async fn send<'p>(
        &self,
        parts: &'p Parts,
        (user, name, device): (&str, &str, &Device),
        (note, id): (&Note, &str),
        tries: u32,
        first: Turn<'p>,
    ) -> Option<Duration> {
        let service = service_of(device);
        let mut turn = Some(first);
        let mut attempt = 1;
        let later = |after| pause(tries + 1, LATER, after).max(LONGEST_PAUSE);
        let why = loop {
            let mut this = match turn.take() {
                Some(turn) => turn,
                None => match parts.turns.turn(user, device).await {
                    Some(turn) => turn,
                    None => return Some(later(None)),
                },
            };
            let _open = Held::new(Gauge::PushOpen);
            let started = Instant::now();
            this.begin();
            let sent = parts.providers.send(device, name, note, id).await;
            record(Histogram::PushRequestDuration, started.elapsed());
            this.over();
            match sent {
                Sent::Done => {
                    count(Counter::PushSent(service), 1);
                    return None;
                }
                Sent::Unable => return None,
                Sent::Gone => {
                    forget(parts, user, name, device).await;
                    return None;
                }
                Sent::Failed(why) => break why,
                Sent::Again { after, why } => {
                    let wait = pause(attempt, PAUSES, after);
                    // A service that took nothing before is asked once each time.
                    if attempt >= ATTEMPTS || tries > 0 || wait > LONGEST_PAUSE {
                        tracing::debug!(kind = device.kind(), why, "a notification must wait");
                        return Some(later(after));
                    }
                    sleep(wait).await;
                    let read = self.readers(parts, &[user.to_owned()]).await;
                    if read.is_ok_and(|read| read.get(user) == Some(&true)) {
                        count(Counter::PushSkipped(PushSkip::Read), 1);
                        return None;
                    }
                }
            }
            attempt += 1;
        };
        count(Counter::PushFailed(service), 1);
        tracing::info!(
            kind = device.kind(),
            why,
            "a notification was not delivered"
        );
        None
    }
}

/// What became of a claim.
enum Claim {
    /// It is made, with this revision, after it was given back so often.
    Made { revision: u64, tries: u32 },
    /// It was given back, and may be made after this time.
    Later(Duration),
    /// Somebody else has it, or had it.
    OfAnother,
}

/// Claims a device for a message: also one that was claimed, and given back.
async fn claim(parts: &Parts, id: &str) -> Result<Claim, KvError> {
    let made = async |revision| {
        let how = Put {
            expected: Some(revision),
            ..Put::default()
        };
        match parts.claims.put(id, Bytes::new(), how).await {
            Ok(revision) => Ok(Some(revision)),
            Err(KvError::Conflict) => Ok(None),
            Err(error) => Err(error),
        }
    };
    if let Some(revision) = made(0).await? {
        return Ok(Claim::Made { revision, tries: 0 });
    }
    let found = parts.claims.get(&[id.to_owned()]).await?.pop();
    let given_back = found.and_then(|entry| Some((given_back(&entry)?, entry.revision)));
    let Some(((not_before, tries), revision)) = given_back else {
        return Ok(Claim::OfAnother);
    };
    let left = not_before.saturating_sub(unix_ms());
    if left > 0 {
        return Ok(Claim::Later(Duration::from_millis(left)));
    }
    let taken = made(revision).await?;
    Ok(taken.map_or(Claim::OfAnother, |revision| Claim::Made { revision, tries }))
}

/// From when on a claim that was given back may be made again, in ms since 1970, and how often it was given back. `None`: it
/// was not.
fn given_back(claim: &Entry) -> Option<(u64, u32)> {
    let value = std::str::from_utf8(claim.value.as_deref()?).ok()?;
    let (not_before, tries) = value.split_once(' ')?;
    Some((not_before.parse().ok()?, tries.parse().ok()?))
}

/// The smaller of two waits.
fn sooner(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    [one, other].into_iter().flatten().min()
}

/// Removes a device that its service does not know any more.
pub(super) async fn forget(parts: &Parts, user: &str, name: &str, device: &Device) {
    count(Counter::PushGone(service_of(device)), 1);
    // Unless it has another address by now. If it can't be removed, the next notification finds the same.
    if let Err(error) = parts
        .people
        .put_device(user, name, None, Some(device))
        .await
    {
        tracing::warn!(%error, "a device that is gone can't be removed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_filled_once() {
        let fields = [("{from}", "{text}"), ("{text}", "hi"), ("{title}", "A")];
        let filled = |template| filled(template, &fields);
        assert_eq!(filled("{from} in {title}: {text}"), "{text} in A: hi");
        assert_eq!(filled("{{from}} {other} {"), "{{text}} {other} {");
        assert_eq!(filled(""), "");
    }
}
