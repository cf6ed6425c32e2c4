//! Writing records, the index of users, and blocks.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use serde::{Serialize, de::DeserializeOwned};
use tokio::time::sleep;

use super::{
    change::{Ask, Change, Told, check_user},
    index,
    known::People,
    record::{Field, Member, Merge, Record, Stamp, merged},
};
use crate::{
    auth::{Identity, Right},
    bus::{Bucket, Entry, KvError, Put},
    config::{Access, Create as WhoCreates},
    model::RoomId,
    protocol::{Arrangement, ErrorCode, Refused},
    runtime::unix_ms,
    subject::{block_key, block_keys, inbox_key, inbox_keys, parse_inbox_key, record_key},
    telemetry::metrics::{Counter, count},
};

/// Attempts to write a key that others write at the same time.
const ATTEMPTS: u32 = 20;

/// Pause before another attempt, times their number.
const PAUSE: Duration = Duration::from_millis(2);

/// Largest value of a key, in bytes: what NATS carries by default, with room for headers.
const MAX_VALUE: usize = 900 * 1024;

/// Most users that a user has blocked, those included that are no longer blocked: their keys stay, for the other regions.
const MAX_BLOCKS: usize = 1000;

/// Entries of the index that are written at once.
const INDEX_WRITES: usize = 16;

/// The outcome of a change.
#[derive(Debug)]
pub struct Changed {
    /// The record after it.
    pub record: Record,
    /// What the room is to be told; `None` if nothing has changed.
    pub told: Option<Told>,
    /// Whether the room was made by it.
    pub created: bool,
    /// The users whose entries have changed.
    pub concerned: Vec<String>,
}

pub(super) fn refusal(error: KvError) -> Refused {
    let code = match &error {
        KvError::Conflict
        | KvError::Unavailable
        | KvError::UnknownOutcome(_)
        | KvError::Read(_) => ErrorCode::Unavailable,
        KvError::Refused(_) => ErrorCode::Internal,
    };
    Refused::new(code, format!("the record: {error}"))
}

fn has_no_record(room: &RoomId) -> Refused {
    Refused::new(ErrorCode::UnknownRoom, format!("{room} has no record"))
}

/// The entries of the index by room, those of all regions merged.
fn by_room(entries: &[Entry]) -> Vec<(RoomId, index::Entry)> {
    let merged = merged(entries).into_iter();
    let rooms = merged.filter_map(|(key, entry)| Some((parse_inbox_key(key)?.1, entry)));
    rooms.collect()
}

impl People {
    /// Merges a change into a key of the own region. `change` returns the new value, or `None` if nothing changes.
    pub(super) async fn update<T, R>(
        &self,
        bucket: &Bucket,
        key: &str,
        change: impl Fn(Option<&T>) -> Result<(Option<T>, R), Refused>,
    ) -> Result<(Option<T>, R), Refused>
    where
        T: Merge + Serialize + DeserializeOwned,
    {
        let keys = [key.to_owned()];
        for attempt in 0..ATTEMPTS {
            let entries = self.get(bucket, &keys).await.map_err(refusal)?;
            let own = entries.iter().find(|(own, _)| *own);
            let revision = own.map_or(0, |(_, entry)| entry.revision);
            let text = own.and_then(|(_, entry)| entry.value.as_deref());
            if let Some(Err(error)) = text.map(serde_json::from_slice::<T>) {
                // It is not overwritten: it may say who is banned.
                let text = format!("the record can't be read: {error}");
                return Err(Refused::new(ErrorCode::Internal, text));
            }
            let known: Option<T> = merged(entries.iter().map(|(_, entry)| entry)).remove(key);
            let (new, result) = change(known.as_ref())?;
            let Some(new) = new else {
                return Ok((known, result));
            };
            let value = serde_json::to_vec(&new).map_err(|error| {
                Refused::new(ErrorCode::Internal, format!("the record: {error}"))
            })?;
            if value.len() > MAX_VALUE {
                let text = format!(
                    "the record would have {} bytes, the limit is {MAX_VALUE}",
                    value.len()
                );
                return Err(Refused::new(ErrorCode::Limit, text));
            }
            let how = Put {
                expected: Some(revision),
                ..Put::default()
            };
            match bucket.put(key, Bytes::from(value), how).await {
                Ok(_revision) => return Ok((Some(new), result)),
                // Somebody else wrote it, or a replica that lags behind has answered.
                Err(KvError::Conflict) => sleep(PAUSE * attempt).await,
                Err(error) => return Err(refusal(error)),
            }
        }
        let text = "the record is changed by too many at once";
        Err(Refused::new(ErrorCode::Unavailable, text))
    }

    /// A change that is made now.
    fn ask<'a>(&'a self, identity: &'a Identity, room: &'a RoomId) -> Result<Ask<'a>, Refused> {
        let namespace = self.config.namespaces.get(room.namespace());
        let namespace = namespace.ok_or_else(|| {
            let text = format!("there is no namespace {:?}", room.namespace());
            Refused::new(ErrorCode::UnknownNamespace, text)
        })?;
        Ok(Ask {
            room,
            identity,
            members_only: namespace.access == Access::Members,
            users_create: namespace.create == WhoCreates::Members,
            room_members: self.config.limits.room_members,
            now: unix_ms(),
            origin: self.records.origin(),
        })
    }

    /// Checks whether a change could be made now.
    ///
    /// # Errors
    /// Why it would be refused, or `unavailable`.
    pub async fn judge(
        &self,
        identity: &Identity,
        room: &RoomId,
        change: &Change,
    ) -> Result<(), Refused> {
        let ask = self.ask(identity, room)?;
        self.may_pin(identity, room, change).await?;
        let record = self.read_record(room).await?;
        match ask.apply(record.as_ref(), change)? {
            None if record.is_none() => Err(has_no_record(room)),
            Some(_) | None => Ok(()),
        }
    }

    /// Who may not write in a room pins nothing there.
    async fn may_pin(
        &self,
        identity: &Identity,
        room: &RoomId,
        change: &Change,
    ) -> Result<(), Refused> {
        match change {
            Change::Pin { .. } => self.check(identity, Right::Write, room).await.map(drop),
            _ => Ok(()),
        }
    }

    /// Makes a change of a room's record, and writes the index of the users concerned. `version`: only if the record has
    /// this version.
    ///
    /// # Errors
    /// Why it was refused, or that it can't be written now. After `unavailable` it may have been made; a repeat is safe.
    pub async fn change(
        &self,
        identity: &Identity,
        room: &RoomId,
        change: &Change,
        version: Option<&str>,
    ) -> Result<Changed, Refused> {
        if let Change::Create(create) = change
            && let [one, other] = &create.members[..]
            && create.kind == super::RoomKind::Dm
            && !identity.may(Right::Manage, room)
            && self.is_blocked_between(one, other).await.map_err(refusal)?
        {
            let text = format!("this user can't write in {room}");
            return Err(Refused::new(ErrorCode::Forbidden, text));
        }
        self.may_pin(identity, room, change).await?;
        let made = |record: Option<&Record>| {
            let ask = self.ask(identity, room)?;
            let created = record.is_none();
            // First whether the user may: the version of a record is not for everybody.
            let applied = ask.apply(record, change)?;
            if let (Some(version), record) = (version, record)
                && record.is_none_or(|record| record.version() != version)
            {
                let text = "the record has another version: read it again";
                return Err(Refused::new(ErrorCode::Conflict, text));
            }
            Ok(match applied {
                Some((new, told)) => {
                    let concerned: Vec<String> = new
                        .members
                        .iter()
                        .filter(|(user, member)| {
                            record.and_then(|record| record.member(user)) != Some(*member)
                        })
                        .map(|(user, _)| user.clone())
                        .collect();
                    (Some(new), Some((told, concerned, created)))
                }
                None => (None, None),
            })
        };
        let (record, done) = self.update(&self.records, &record_key(room), made).await?;
        let record = record.ok_or_else(|| has_no_record(room))?;
        self.wrote(room, &record);
        let (told, concerned, created) = match done {
            Some((told, concerned, created)) => {
                count(Counter::RecordChanged, 1);
                self.write_index(room, &record, &concerned).await;
                (Some(told), concerned, created)
            }
            None => {
                // A repeat, perhaps because it is not known how far the first one got.
                self.write_index(room, &record, change.users()).await;
                (None, Vec::new(), false)
            }
        };
        Ok(Changed {
            record,
            told,
            created,
            concerned,
        })
    }

    /// Writes into the index what the record says of these users. What can't be written is repaired later
    /// ([`Self::repair_index`]).
    pub async fn write_index(&self, room: &RoomId, record: &Record, users: &[String]) {
        let writes = users.iter().filter_map(|user| {
            let key = inbox_key(user, room);
            let member = record.member(user)?;
            Some(async move {
                if let Err(error) = self.write_entry(&key, member).await {
                    count(Counter::IndexFailed, 1);
                    tracing::warn!(room.id = %room, %error, "the index of a user can't be written");
                }
            })
        });
        let writes: Vec<_> = writes.collect();
        stream::iter(writes)
            .buffer_unordered(INDEX_WRITES)
            .collect::<Vec<()>>()
            .await;
    }

    /// Merges what a record says of a user into the user's entry, whose own settings stay. Returns whether that has
    /// changed the entry.
    pub(super) async fn write_entry(&self, key: &str, member: &Member) -> Result<bool, Refused> {
        let merged = |known: Option<&index::Entry>| match known {
            Some(known) if !known.is_behind(member) => Ok((None, false)),
            known => {
                let mut merged = known.cloned().unwrap_or_default();
                merged.member.merge_from(&Some(member.clone()));
                Ok((Some(merged), true))
            }
        };
        let (_entry, written) = self.update(&self.index, key, merged).await?;
        Ok(written)
    }

    /// The record of a room, as all regions that can be read have it now.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn read_record(&self, room: &RoomId) -> Result<Option<Record>, Refused> {
        let key = record_key(room);
        let keys = [key.clone()];
        let entries = self.get(&self.records, &keys).await.map_err(refusal)?;
        let mut records = merged(entries.iter().map(|(_, entry)| entry));
        Ok(records.remove(&*key))
    }

    /// The rooms that a user is or was in, with the user's own settings, by name.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn rooms_of(&self, user: &str) -> Result<Vec<(RoomId, index::Entry)>, Refused> {
        let mut all = Vec::new();
        for streams in self.origins.all() {
            let origin = streams.origin();
            let own = origin == self.index.origin();
            match self.index.of(origin).scan(&inbox_keys(user)).await {
                Ok(entries) => all.extend(entries),
                Err(error) if own => return Err(refusal(error)),
                Err(error) => {
                    tracing::debug!(%origin, %error, "the index of another region can't be read");
                }
            }
        }
        Ok(by_room(&all))
    }

    /// The user's entries of these rooms.
    ///
    /// # Errors
    /// `unavailable`.
    pub(super) async fn entries_of(
        &self,
        user: &str,
        rooms: &[RoomId],
    ) -> Result<Vec<(RoomId, index::Entry)>, Refused> {
        let keys: Vec<String> = rooms.iter().map(|room| inbox_key(user, room)).collect();
        let found = self.get(&self.index, &keys).await.map_err(refusal)?;
        let found: Vec<Entry> = found.into_iter().map(|(_own, entry)| entry).collect();
        Ok(by_room(&found))
    }

    /// Changes how a user wants to see a room.
    ///
    /// # Errors
    /// `unknown_room` if the user is not in it, or `unavailable`.
    pub async fn arrange(
        &self,
        user: &str,
        room: &RoomId,
        how: &Arrangement,
    ) -> Result<(), Refused> {
        let origin = self.index.origin();
        let changed = |known: Option<&index::Entry>| {
            let member = known.and_then(|known| known.member.as_ref());
            let Some(known) = known.filter(|_| member.is_some()) else {
                let text = format!("this user is not in {room}");
                return Err(Refused::new(ErrorCode::UnknownRoom, text));
            };
            let mut new = known.clone();
            let now = unix_ms();
            for (field, value) in [
                (&mut new.muted, how.muted),
                (&mut new.pinned, how.pinned),
                (&mut new.archived, how.archived),
            ] {
                let Some(value) = value else { continue };
                if field.as_ref().is_some_and(|field| field.value) != value {
                    let at = field
                        .as_ref()
                        .map_or(0, |field| field.stamp.at + 1)
                        .max(now);
                    let origin = origin.clone();
                    *field = Some(Field {
                        value,
                        stamp: Stamp { at, origin },
                    });
                }
            }
            Ok(((new != *known).then_some(new), ()))
        };
        self.update(&self.index, &inbox_key(user, room), changed)
            .await
            .map(drop)
    }

    /// Blocks another user, or ends that. Only direct rooms of the two are concerned.
    ///
    /// # Errors
    /// `bad_request`, `limit`, or `unavailable`.
    pub async fn block(&self, user: &str, other: &str, on: bool) -> Result<(), Refused> {
        check_user(user)?;
        check_user(other)?;
        if user == other {
            let text = "a user can't block oneself";
            return Err(Refused::new(ErrorCode::BadRequest, text));
        }
        let origin = self.index.origin();
        let key = block_key(user, other);
        let changed = |known: Option<&Field<bool>>| {
            let at = known.map_or(0, |known| known.stamp.at + 1).max(unix_ms());
            let same = known.map_or(!on, |known| known.value == on);
            let new = Field {
                value: on,
                stamp: Stamp {
                    at,
                    origin: origin.clone(),
                },
            };
            Ok(((!same).then_some(new), !same))
        };
        if on
            && self
                .get(&self.index, std::slice::from_ref(&key))
                .await
                .map_err(refusal)?
                .is_empty()
        {
            let blocks = self.index.count(&block_keys(user)).await;
            let blocks = blocks.map_err(|error| {
                Refused::new(
                    ErrorCode::Unavailable,
                    format!("the blocks of a user: {error}"),
                )
            })?;
            if blocks >= MAX_BLOCKS {
                let text = format!(
                    "a user blocks at most {MAX_BLOCKS} others, those of the past included"
                );
                return Err(Refused::new(ErrorCode::Limit, text));
            }
        }
        let (_now, changed) = self.update(&self.index, &key, changed).await?;
        if changed {
            // At once, and not when it is republished: the next message may be on its way.
            self.apply_own_block(user, other).await;
        }
        Ok(())
    }
}
