//! Who is notified of a message, and the sending.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use sha2::{Digest as _, Sha256};
use tokio::{
    sync::SemaphorePermit,
    time::{Instant, sleep, timeout},
};

use super::{
    Parts,
    judge::{Facts, Verdict, judge},
    provider::{Note, Sent, service_of},
};
use crate::{
    bus::{KvError, Put, Stored, message_key},
    config::PushContent,
    model::{Cursor, Epoch},
    outbound::pause,
    people::{Device, Devices, MemberState, Record, RoomKind, preview},
    runtime::unix_ms,
    subject::marker_key,
    telemetry::metrics::{Counter, Gauge, Held, Histogram, PushSkip, count, record},
};

/// Recipients that are looked at together.
const GROUP: usize = 200;

/// Attempts to send a notification.
const ATTEMPTS: u32 = 4;

/// Pauses between them: the first and the longest. One that must wait for longer is not sent.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// Longest pause that a service may ask for: the message keeps its place meanwhile.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Timeout of a notification of one device, with all attempts.
const SENT_WITHIN: Duration = Duration::from_secs(20);

/// A message, as its recipients are told of it.
pub(super) struct Message<'m> {
    stored: &'m Stored,
    epoch: Epoch,
    age: Duration,
    /// Whether it was probably looked at before: then some may have been notified.
    again: bool,
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
    pub(super) fn new(stored: &'m Stored, epoch: Epoch, age: Duration, again: bool) -> Self {
        Self {
            stored,
            epoch,
            age,
            again,
        }
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
        if all.is_empty() {
            return Ok(None);
        }
        let deadline = Instant::now() + parts.config.nats.read_timeout;
        let ready = parts.online.ready(deadline).await;
        ready.map_err(|_unavailable| "who is online can't be read".to_owned())?;
        let mut next: Option<Duration> = None;
        for group in all.chunks(GROUP) {
            let wait = self.notify_group(parts, &room_record, group).await?;
            next = [next, wait].into_iter().flatten().min();
        }
        Ok(next)
    }

    async fn notify_group(
        &self,
        parts: &Parts,
        room_record: &Record,
        users: &[String],
    ) -> Result<Option<Duration>, String> {
        let devices = parts.people.devices_of(users).await;
        let mut devices = devices.map_err(|refused| refused.message)?;
        devices.retain(|_, devices| devices.all().next().is_some());
        if devices.is_empty() {
            return Ok(None);
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
                Verdict::Wait(wait) => next = [next, Some(wait)].into_iter().flatten().min(),
                Verdict::Skip(why) => count(Counter::PushSkipped(why), 1),
            }
        }
        let claimed = self.claimed(parts, &due).await?;
        let sends = due.iter().map(async |(user, devices)| {
            let mut wanted = Vec::new();
            for (name, device) in devices.all() {
                let id = self.claim_key(user, name, device);
                match claimed.contains(&id) {
                    true => count(Counter::PushSkipped(PushSkip::Repeated), 1),
                    false => wanted.push((name, device, id)),
                }
            }
            if wanted.is_empty() {
                return Ok(());
            }
            // Counted only for those who are notified.
            let badge = parts.badge(user).await;
            let note = &self.note(parts, room_record, user, badge);
            let notified = wanted.iter().map(async |(name, device, id)| {
                self.notify_device(parts, (user, name, device), note, id)
                    .await
            });
            let mut failed = None;
            for notified in join_all(notified).await {
                match notified {
                    Ok(true) => parts.badges.shown(user, room),
                    Ok(false) => {}
                    Err(error) => failed = Some(error),
                }
            }
            if let Some(error) = failed {
                return Err(error);
            }
            Ok::<(), String>(())
        });
        // What could not be claimed is claimed at the next attempt.
        join_all(sends)
            .await
            .into_iter()
            .collect::<Result<(), String>>()?;
        Ok(next)
    }

    /// The claims that an earlier attempt has made, as far as they can be seen.
    async fn claimed(
        &self,
        parts: &Parts,
        due: &[(String, Devices)],
    ) -> Result<HashSet<String>, String> {
        if !self.again || due.is_empty() {
            return Ok(HashSet::new());
        }
        let keys = due.iter().flat_map(|(user, devices)| {
            let devices = devices.all();
            devices.map(|(name, device)| self.claim_key(user, name, device))
        });
        let keys: Vec<String> = keys.collect();
        let found = parts.claims.get(&keys).await;
        let found = found.map_err(|error| error.to_string())?;
        Ok(found.into_iter().map(|entry| entry.key).collect())
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

    /// Claims a device for the message, and notifies it. Returns whether the claim was made by this.
    async fn notify_device(
        &self,
        parts: &Parts,
        whose: (&str, &str, &Device),
        note: &Note,
        id: &str,
    ) -> Result<bool, String> {
        let service = service_of(whose.2);
        // Before the claim, so that a process that dies has not claimed more than it could send. Never closed.
        let turn = parts.turns.acquire().await;
        let how = Put {
            expected: Some(0),
            ..Put::default()
        };
        match parts.claims.put(id, Bytes::new(), how).await {
            Ok(_revision) => {}
            Err(KvError::Conflict) => {
                count(Counter::PushSkipped(PushSkip::Repeated), 1);
                return Ok(false);
            }
            Err(KvError::Unavailable) => return Err("claims can't be made now".to_owned()),
            Err(error) => {
                // It may be there: sending now could be sending twice.
                count(Counter::PushFailed(service), 1);
                tracing::warn!(%error, "a notification can't be claimed, and is not sent");
                return Ok(false);
            }
        }
        // The user chooses where a request goes: it must not hold up those of others.
        let sent = self.send(parts, whose, note, id, turn.ok());
        if timeout(SENT_WITHIN, sent).await.is_err() {
            count(Counter::PushFailed(service), 1);
            tracing::info!(
                kind = whose.2.kind(),
                "a notification was not delivered in time"
            );
        }
        Ok(true)
    }

    /// The same for the same message and device, whoever asks.
    fn claim_key(&self, user: &str, name: &str, device: &Device) -> String {
        let Stored { room, record } = self.stored;
        let key = message_key(room.as_str(), &record.from, &record.id);
        let device = serde_json::to_string(device).unwrap_or_default();
        let digest = Sha256::digest(format!("{key}\n{user}\n{name}\n{device}"));
        digest
            .iter()
            .take(20)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// Sends a notification that was claimed, and repeats what the service certainly did not take.
    async fn send<'p>(
        &self,
        parts: &'p Parts,
        (user, name, device): (&str, &str, &Device),
        note: &Note,
        id: &str,
        mut turn: Option<SemaphorePermit<'p>>,
    ) {
        let service = service_of(device);
        for attempt in 1..=ATTEMPTS {
            let sent = {
                let _turn = match turn.take() {
                    Some(turn) => Some(turn),
                    None => parts.turns.acquire().await.ok(),
                };
                let _open = Held::new(Gauge::PushOpen);
                let started = Instant::now();
                let sent = parts.providers.send(device, name, note, id).await;
                record(Histogram::PushRequestDuration, started.elapsed());
                sent
            };
            let why = match sent {
                Sent::Done => return count(Counter::PushSent(service), 1),
                Sent::Unable => return,
                Sent::Gone => return forget(parts, user, name, device).await,
                Sent::Failed(why) => why,
                Sent::Again { after, why } => {
                    let wait = pause(attempt, PAUSES, after);
                    if attempt < ATTEMPTS && wait <= LONGEST_PAUSE {
                        sleep(wait).await;
                        match self.readers(parts, &[user.to_owned()]).await {
                            Ok(read) if read.get(user) == Some(&true) => {
                                return count(Counter::PushSkipped(PushSkip::Read), 1);
                            }
                            Ok(_) | Err(_) => continue,
                        }
                    }
                    why
                }
            };
            count(Counter::PushFailed(service), 1);
            return tracing::info!(
                kind = device.kind(),
                why,
                "a notification was not delivered"
            );
        }
    }
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
