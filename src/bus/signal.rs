//! Signals to the sessions of a user who watches rooms without being in them.
//!
//! They go over core NATS, on a subject of the user. NATS drops them where no edge has a session of the user that
//! watches, so an idle room costs nothing. One that is lost is made up for when the watcher compares the heads.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::{
    model::{Cursor, RoomId},
    protocol::LastMessage,
};

/// Something has happened in a room of the user.
#[derive(Debug, Clone)]
pub struct Signal {
    /// The room.
    pub room: RoomId,
    /// What has happened.
    pub what: News,
}

/// What has happened.
#[derive(Debug, Clone)]
pub enum News {
    /// A message.
    Message {
        /// What a summary shows of it.
        last: LastMessage,
        /// Its cursor.
        cursor: Cursor,
        /// The users that it mentions.
        mentions: Vec<String>,
    },
    /// The user has read up to there.
    Read(Cursor),
    /// The record of the room, or the user's entry of it, has changed.
    Changed,
}

/// A signal as it travels. Its fields are written out: with serde's `flatten` each signal would first be read into a tree,
/// and a message in a room of two is two of them.
#[derive(Serialize, Deserialize)]
struct Wire<'w> {
    room: Cow<'w, RoomId>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    message: Option<Message<'w>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    read: Option<Text<'w>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    changed: Option<Nothing>,
}

#[derive(Serialize, Deserialize)]
struct Message<'w> {
    #[serde(borrow)]
    id: Cow<'w, str>,
    #[serde(borrow)]
    from: Cow<'w, str>,
    ts: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text: Option<Cow<'w, str>>,
    cursor: Text<'w>,
    #[serde(default, skip_serializing_if = "<[String]>::is_empty")]
    mentions: Cow<'w, [String]>,
}

#[derive(Serialize, Deserialize)]
struct Nothing {}

/// A cursor as its text.
struct Text<'w>(Cow<'w, Cursor>);

impl Serialize for Text<'_> {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Text<'_> {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(from)?;
        let cursor: Cursor = text.parse().map_err(serde::de::Error::custom)?;
        Ok(Self(Cow::Owned(cursor)))
    }
}

impl Signal {
    /// The payload.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let mut wire = Wire {
            room: Cow::Borrowed(&self.room),
            message: None,
            read: None,
            changed: None,
        };
        match &self.what {
            News::Message {
                last,
                cursor,
                mentions,
            } => {
                wire.message = Some(Message {
                    id: Cow::Borrowed(&last.id),
                    from: Cow::Borrowed(&last.from),
                    ts: last.ts,
                    text: last.text.as_deref().map(Cow::Borrowed),
                    cursor: Text(Cow::Borrowed(cursor)),
                    mentions: Cow::Borrowed(mentions),
                });
            }
            News::Read(cursor) => wire.read = Some(Text(Cow::Borrowed(cursor))),
            News::Changed => wire.changed = Some(Nothing {}),
        }
        serde_json::to_vec(&wire).unwrap_or_default()
    }

    /// The signal in a payload.
    #[must_use]
    pub fn parse(payload: &[u8]) -> Option<Self> {
        let wire: Wire<'_> = serde_json::from_slice(payload).ok()?;
        let what = match wire {
            Wire {
                message: Some(message),
                ..
            } => News::Message {
                last: LastMessage {
                    id: message.id.into_owned(),
                    from: message.from.into_owned(),
                    ts: message.ts,
                    text: message.text.map(Cow::into_owned),
                },
                cursor: message.cursor.0.into_owned(),
                mentions: message.mentions.into_owned(),
            },
            Wire {
                read: Some(read), ..
            } => News::Read(read.0.into_owned()),
            Wire { changed, .. } => changed.map(|Nothing {}| News::Changed)?,
        };
        Some(Self {
            room: wire.room.into_owned(),
            what,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_read_as_they_were_written() {
        let room = RoomId::parse("chat:a").unwrap();
        let cursor: Cursor = "seoul.k3.1042.7f02".parse().unwrap();
        let last = LastMessage {
            id: "1".to_owned(),
            from: "kim".to_owned(),
            ts: 5,
            text: Some("hi".to_owned()),
        };
        for (what, text) in [
            (
                News::Message {
                    last,
                    cursor: cursor.clone(),
                    mentions: vec!["lee".to_owned()],
                },
                r#"{"room":"chat:a","message":{"id":"1","from":"kim","ts":5,"text":"hi","cursor":"seoul.k3.1042.7f02","mentions":["lee"]}}"#,
            ),
            (
                News::Read(cursor),
                r#"{"room":"chat:a","read":"seoul.k3.1042.7f02"}"#,
            ),
            (News::Changed, r#"{"room":"chat:a","changed":{}}"#),
        ] {
            let signal = Signal {
                room: room.clone(),
                what,
            };
            assert_eq!(String::from_utf8(signal.to_json()).unwrap(), text);
            let read = Signal::parse(text.as_bytes()).unwrap();
            assert_eq!(read.to_json(), text.as_bytes());
        }
        assert!(Signal::parse(b"{}").is_none());
    }
}
