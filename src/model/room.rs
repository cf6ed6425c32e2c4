//! Room names: `namespace:name`.

use std::{borrow::Cow, fmt, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::{header_unescape, key_escape};

/// Longest namespace or name, in bytes.
const MAX_PART: usize = 64;

/// A room, `namespace:name`. The namespace matches `[A-Za-z0-9_-]{1,64}`. The name has 1 to 64 bytes of the same
/// characters, and any others as [`key_escape`] writes them: `=20` is a space.
///
/// # Invariants
/// - A name is the escaped form of one text, and the only one: an escape of a character that needs none is refused, and
///   so are escapes that are not UTF-8.
/// - Neither part can contain `.`, `*`, `>`, a space or a control character, so a room can never form a NATS subject
///   outside its own.
/// - Cloning is a reference count.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoomId {
    text: Arc<str>,
    namespace_len: u8,
}

/// A room name was refused: it is not `namespace:name` as [`RoomId`] says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "room {0:?} is not namespace:name, a namespace of [A-Za-z0-9_-]{{1,64}} and a name of 1 to 64 bytes, of the same \
     characters and others as =XX"
)]
pub struct BadRoom(pub String);

/// Whether `part`, which comes from outside, may be used as one token of a subject: `[A-Za-z0-9_-]{1,64}`.
#[must_use]
pub fn is_token(part: &str) -> bool {
    (1..=MAX_PART).contains(&part.len())
        && part
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// Whether `name` may be the name of a room: a token, or the escaped form of a text.
#[must_use]
pub fn is_room_name(name: &str) -> bool {
    is_token(name)
        || ((1..=MAX_PART).contains(&name.len()) && key_escape(&header_unescape(name)) == name)
}

impl RoomId {
    /// Parses `namespace:name`.
    ///
    /// # Errors
    /// [`BadRoom`] with the (shortened) name.
    pub fn parse(text: &str) -> Result<Self, BadRoom> {
        let bad = || BadRoom(text.chars().take(80).collect());
        let (namespace, name) = text.split_once(':').ok_or_else(bad)?;
        if !is_token(namespace) || !is_room_name(name) {
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

    /// The room for a namespace and any text as a name, which is escaped.
    ///
    /// # Errors
    /// [`BadRoom`] if the namespace is not a valid part, or the name is empty or too long when it is escaped.
    pub fn named(namespace: &str, text: &str) -> Result<Self, BadRoom> {
        Self::from_parts(namespace, &key_escape(text))
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

    /// The part after the colon as the text that it is the escaped form of: the inverse of [`Self::named`].
    #[must_use]
    pub fn text(&self) -> Cow<'_, str> {
        header_unescape(self.name())
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

    /// The rooms of patterns: `namespace:name`, `namespace:*` or `*:*`.
    ///
    /// # Errors
    /// The first text that is no pattern.
    pub fn of_patterns<'p>(patterns: impl IntoIterator<Item = &'p str>) -> Result<Self, String> {
        let mut scope = Self::default();
        for pattern in patterns {
            match pattern.split_once(':') {
                Some(("*", "*")) => scope.all = true,
                Some((namespace, "*")) if is_token(namespace) => {
                    scope.namespaces.push(namespace.to_owned());
                }
                _ => match RoomId::parse(pattern) {
                    Ok(room) => scope.rooms.push(room),
                    Err(_not_a_room) => return Err(pattern.chars().take(80).collect()),
                },
            }
        }
        Ok(scope)
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
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Every text is the name of one room, and every name of a room is that of one text.
        #[test]
        fn texts_and_names_are_one_to_one(text in "\\PC{1,24}|[A-Fa-f0-9=:. #]{1,24}", name in "(=[0-9A-Fa-f]{2}|[a-c=]){1,8}") {
            match RoomId::named("chat", &text) {
                Ok(room) => {
                    prop_assert_eq!(room.text(), text.as_str());
                    prop_assert_eq!(RoomId::parse(room.as_str()), Ok(room));
                }
                Err(_) => prop_assert!(key_escape(&text).len() > MAX_PART),
            }
            if let Ok(room) = RoomId::from_parts("chat", &name) {
                prop_assert_eq!(RoomId::named("chat", &room.text()), Ok(room));
            }
        }
    }

    #[test]
    fn patterns_are_rooms_namespaces_or_all() {
        let scope = RoomScope::of_patterns(["chat:a", "crew:*"]).unwrap();
        for (room, expected) in [("chat:a", true), ("chat:b", false), ("crew:x", true)] {
            let room = RoomId::parse(room).unwrap();
            assert_eq!(scope.contains(&room), expected, "{room}");
        }
        assert!(RoomScope::of_patterns(["*:*"]).unwrap().all);
        for bad in [
            "", "chat", "chat:", "*:a", "chat:a*", "c*:*", "a.b:*", "chat:a:b",
        ] {
            assert_eq!(RoomScope::of_patterns([bad]), Err(bad.to_owned()));
        }
    }

    #[test]
    fn only_what_needs_an_escape_has_one() {
        let room = RoomId::named("news", "서울 #1").unwrap();
        assert_eq!(room.as_str(), "news:=EC=84=9C=EC=9A=B8=20=231");
        assert_eq!(room.text(), "서울 #1");
        for name in ["=3D", "a=2Eb", "=00", "=F0=9F=98=80"] {
            assert!(RoomId::from_parts("chat", name).is_ok(), "{name}");
        }
        for name in [
            "=", "=2", "=2e", "=41", "=5F", "=2D", "=FF", "=EC=84", "=C0=80", "==3D",
        ] {
            assert!(RoomId::from_parts("chat", name).is_err(), "{name}");
        }
        assert!(RoomId::parse("=23:a").is_err(), "an escape in a namespace");
        assert!(RoomId::named("chat", &"한".repeat(7)).is_ok());
        assert!(RoomId::named("chat", &"한".repeat(8)).is_err());
        assert!(RoomId::named("chat", "").is_err());
    }

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
