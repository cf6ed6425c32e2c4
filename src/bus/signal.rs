//! Signals to the sessions of a user who watches rooms without being in them.
//!
//! They go over core NATS, on a subject of the user. NATS drops them where no edge has a session of the user that
//! watches, so an idle room costs nothing. One that is lost is made up for when the watcher compares the heads.

use serde::{Deserialize, Serialize};

use crate::{
    model::{Cursor, RoomId},
    protocol::LastMessage,
};

/// Something has happened in a room of the user.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Signal {
    /// The room.
    pub room: RoomId,
    /// What has happened.
    #[serde(flatten)]
    pub what: News,
}

/// What has happened.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum News {
    /// A message.
    Message {
        /// What a summary shows of it.
        #[serde(flatten)]
        last: LastMessage,
        /// Its cursor.
        #[serde(with = "text")]
        cursor: Cursor,
        /// The users that it mentions.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        mentions: Vec<String>,
    },
    /// The user has read up to there.
    Read(#[serde(with = "text")] Cursor),
    /// The record of the room, or the user's entry of it, has changed.
    Changed {},
}

/// A cursor as its text.
mod text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error as _};

    use crate::model::Cursor;

    pub(super) fn serialize<S: Serializer>(cursor: &Cursor, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(cursor)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Cursor, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(from)?;
        text.parse().map_err(D::Error::custom)
    }
}

impl Signal {
    /// The payload.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// The signal in a payload.
    #[must_use]
    pub fn parse(payload: &[u8]) -> Option<Self> {
        serde_json::from_slice(payload).ok()
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
            (News::Changed {}, r#"{"room":"chat:a","changed":{}}"#),
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
