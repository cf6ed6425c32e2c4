//! Room names: `namespace:name`.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// Longest namespace or name, in bytes.
const MAX_PART: usize = 64;

/// A room, `namespace:name`; both parts match `[A-Za-z0-9_-]{1,64}`.
///
/// # Invariants
/// - Neither part can contain `.`, `*`, `>`, a space or a control character, so a room can never form a NATS subject
///   outside its own.
/// - Cloning is a reference count.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoomId {
    text: Arc<str>,
    namespace_len: u8,
}

/// A room name was refused: it is not `namespace:name` with both parts matching `[A-Za-z0-9_-]{1,64}`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("room {0:?} is not namespace:name with both parts matching [A-Za-z0-9_-]{{1,64}}")]
pub struct BadRoom(pub String);

/// Whether `part`, which comes from outside, may be used as one token of a subject: `[A-Za-z0-9_-]{1,64}`.
#[must_use]
pub fn is_token(part: &str) -> bool {
    (1..=MAX_PART).contains(&part.len())
        && part
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

impl RoomId {
    /// Parses `namespace:name`.
    ///
    /// # Errors
    /// [`BadRoom`] with the (shortened) name.
    pub fn parse(text: &str) -> Result<Self, BadRoom> {
        let bad = || BadRoom(text.chars().take(80).collect());
        let (namespace, name) = text.split_once(':').ok_or_else(bad)?;
        if !is_token(namespace) || !is_token(name) {
            return Err(bad());
        }
        let namespace_len = u8::try_from(namespace.len()).map_err(|_too_long| bad())?;
        Ok(Self {
            text: Arc::from(text),
            namespace_len,
        })
    }

    /// The room for two subject tokens.
    ///
    /// # Errors
    /// [`BadRoom`] if either is not a valid part.
    pub fn from_parts(namespace: &str, name: &str) -> Result<Self, BadRoom> {
        Self::parse(&format!("{namespace}:{name}"))
    }

    /// The whole name, `namespace:name`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The part before the colon, which determines the policy.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.text
            .get(..usize::from(self.namespace_len))
            .unwrap_or_default()
    }

    /// The part after the colon.
    #[must_use]
    pub fn name(&self) -> &str {
        self.text
            .get(usize::from(self.namespace_len) + 1..)
            .unwrap_or_default()
    }
}

impl fmt::Display for RoomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for RoomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RoomId({})", self.text)
    }
}

impl Serialize for RoomId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for RoomId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        Self::parse(&text).map_err(D::Error::custom)
    }
}

/// A set of rooms, as in grants: the union of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RoomScope {
    /// Every room.
    pub all: bool,
    /// All rooms of these namespaces.
    pub namespaces: Vec<String>,
    /// These rooms.
    pub rooms: Vec<RoomId>,
}

impl RoomScope {
    /// One room.
    #[must_use]
    pub fn one(room: RoomId) -> Self {
        Self {
            rooms: vec![room],
            ..Self::default()
        }
    }

    /// Whether it contains no room.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.all && self.namespaces.is_empty() && self.rooms.is_empty()
    }

    /// Whether it contains `room`.
    #[must_use]
    pub fn contains(&self, room: &RoomId) -> bool {
        self.all
            || self
                .namespaces
                .iter()
                .any(|namespace| namespace == room.namespace())
            || self.rooms.contains(room)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_are_refused() {
        let long = format!("chat:{}", "a".repeat(65));
        for name in [
            "",
            "chat",
            ":",
            "chat:",
            ":x",
            "chat:a.b",
            "chat:*",
            "chat:>",
            "chat:a b",
            "chat:a\r\nb",
            "chat:$JS",
            "$JS:API",
            "chat:안녕",
            "chat:a:b",
            "chat:\0",
            &long,
            "chat:a\tb",
            "ch/at:a",
        ] {
            assert!(RoomId::parse(name).is_err(), "{name:?} was accepted");
        }
        let longest = format!("{}:{}", "n".repeat(64), "a".repeat(64));
        let room = RoomId::parse(&longest).unwrap();
        assert_eq!((room.namespace().len(), room.name().len()), (64, 64));
        let room = RoomId::parse("chat:lobby-2_x").unwrap();
        assert_eq!((room.namespace(), room.name()), ("chat", "lobby-2_x"));
    }
}
