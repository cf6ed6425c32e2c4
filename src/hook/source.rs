//! Where the events of a hook come from: a partition of the rooms, or what the teller has to say of presence.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{
    Hook, Parts,
    event::{Event, Only, events, hash},
    part::Trouble,
};
use crate::{
    bus::{Delivery, Stored},
    config::HookEvent,
    model::{Class, Epoch, RoomId},
    subject::{Subjects, bucket, bucket_stream, hook_events, rooms_stream},
};

/// Events that the subjects of messages have.
const OF_MESSAGES: [HookEvent; 2] = [HookEvent::MessageCreated, HookEvent::UploadCompleted];

/// A stream with events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// A partition of the rooms.
    Rooms(u16),
    /// The bucket of hooks.
    Presence,
}

/// Something of a stream that may have events.
#[derive(Debug, Clone)]
pub(super) enum Told {
    /// An entry of a room's log.
    Entry {
        stored: Box<Stored>,
        part: u16,
        epoch: Epoch,
    },
    /// Somebody came or went.
    Presence(Arc<Note>),
}

/// An event of presence, as the bucket has it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Note {
    /// `webhook-id`.
    pub id: String,
    #[serde(rename = "type")]
    pub kind: HookEvent,
    pub at: u64,
    #[serde(default)]
    pub room: Option<String>,
    #[serde(default)]
    pub user: Option<String>,
}

/// What is said of presence.
#[derive(Serialize)]
struct Data<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    room: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<&'a str>,
}

impl Note {
    fn event(&self) -> serde_json::Result<Event> {
        let data: Box<RawValue> = serde_json::value::to_raw_value(&Data {
            room: self.room.as_deref(),
            user: self.user.as_deref(),
        })?;
        Ok(Event {
            kind: self.kind,
            at: self.at,
            id: self.id.clone(),
            data,
            only: Only::Always,
        })
    }
}

impl Source {
    /// All sources of a region.
    pub(super) fn all(parts: &Parts) -> Vec<Self> {
        let rooms = (0..parts.streams.partitions()).map(Self::Rooms);
        rooms.chain([Self::Presence]).collect()
    }

    /// Its stream.
    pub(super) fn stream(self, parts: &Parts) -> String {
        let origin = parts.streams.origin();
        match self {
            Self::Rooms(part) => rooms_stream(origin, part),
            Self::Presence => bucket_stream(bucket::HOOKS, origin),
        }
    }

    /// The subjects there that may have events for a hook; none if it wants none.
    pub(super) fn filters(self, parts: &Parts, hook: &Hook) -> Vec<String> {
        let (origin, wanted) = (parts.streams.origin(), &hook.config);
        let Self::Rooms(part) = self else {
            let mut filters = Vec::new();
            if wanted.wants(&[HookEvent::UserOnline, HookEvent::UserOffline]) {
                filters.push(hook_events(origin, "user"));
            }
            if wanted.wants(&[HookEvent::RoomOccupied, HookEvent::RoomVacated]) {
                filters.push(hook_events(origin, "room"));
            }
            return filters;
        };
        let of_changes =
            |event: &HookEvent| !event.is_presence() && *event != HookEvent::MessageCreated;
        let mut classes = Vec::new();
        if wanted.wants(&OF_MESSAGES) {
            classes.push(Class::Msg);
        }
        if wanted.events.iter().any(of_changes) {
            classes.push(Class::Ev);
        }
        Subjects::new(&parts.config.nats.prefix).stored_of(origin, part, &hook.scope, &classes)
    }

    /// The incarnation of its stream: sequences mean nothing in another one.
    pub(super) async fn epoch(self, parts: &Parts) -> Result<Epoch, Trouble> {
        match self {
            Self::Rooms(part) => Ok(parts.streams.fetch(part).await?.epoch),
            Self::Presence => {
                let created = hash(&parts.bucket.created().await?);
                let epoch = created.get(..8).and_then(Epoch::parse);
                Ok(epoch.unwrap_or_else(presence_epoch))
            }
        }
    }

    /// What a delivery tells; `None`: nothing.
    pub(super) fn told(
        self,
        delivery: &Delivery,
        subjects: &Subjects,
        epoch: Epoch,
    ) -> Option<Told> {
        match self {
            Self::Rooms(part) => Some(Told::Entry {
                stored: Box::new(delivery.stored(subjects, epoch)?),
                part,
                epoch,
            }),
            Self::Presence => Told::of_note(&delivery.message.payload),
        }
    }
}

/// An epoch for dead letters of presence, which are not looked up in a stream.
fn presence_epoch() -> Epoch {
    Epoch::parse("presence").expect("8 letters are an epoch")
}

impl Told {
    /// What an event of presence says. An expired one is empty.
    pub(super) fn of_note(payload: &[u8]) -> Option<Self> {
        let note = serde_json::from_slice(payload).ok()?;
        Some(Self::Presence(Arc::new(note)))
    }

    /// When it was stored, in ms since 1970.
    pub(super) fn ts(&self) -> u64 {
        match self {
            Self::Entry { stored, .. } => stored.record.ts,
            Self::Presence(note) => note.at,
        }
    }

    /// What has an order of its own.
    pub(super) fn of(&self) -> &str {
        match self {
            Self::Entry { stored, .. } => stored.room.as_str(),
            Self::Presence(note) => {
                let named = note.room.as_deref().or(note.user.as_deref());
                named.unwrap_or_default()
            }
        }
    }

    pub(super) fn epoch(&self) -> Epoch {
        match self {
            Self::Entry { epoch, .. } => *epoch,
            Self::Presence(_) => presence_epoch(),
        }
    }

    /// Whether it was erased.
    pub(super) async fn was_erased(&self, parts: &Parts) -> Result<bool, String> {
        match self {
            Self::Entry { stored, .. } => {
                let erased = parts.remembered.has_stored(stored).await;
                erased.map_err(|error| error.to_string())
            }
            Self::Presence(_) => Ok(false),
        }
    }

    /// Its events that a hook is told.
    pub(super) fn events(&self, parts: &Parts, hook: &Hook) -> Vec<Event> {
        let found = match self {
            Self::Entry { stored, .. } if !hook.scope.contains(&stored.room) => return Vec::new(),
            Self::Entry {
                stored,
                part,
                epoch,
            } => events(stored, (parts.streams.origin(), *part), *epoch),
            Self::Presence(note) => {
                let room = note.room.as_deref().map(RoomId::parse);
                let is_in_scope = match room {
                    None => true,
                    Some(Ok(room)) => hook.scope.contains(&room),
                    Some(Err(_not_a_room)) => false,
                };
                if !is_in_scope {
                    return Vec::new();
                }
                note.event().map(|event| vec![event])
            }
        };
        match found {
            Ok(mut events) => {
                events.retain(|event| hook.config.wants(&[event.kind]));
                events
            }
            Err(error) => {
                // Bodies are checked when they are read.
                tracing::error!(hook = hook.name(), %error, "an entry can't be told");
                Vec::new()
            }
        }
    }
}
