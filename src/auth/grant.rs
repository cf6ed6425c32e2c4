//! Grants: rooms by pattern, rights by name.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::model::{RoomId, is_room_name, is_token, key_escape};

/// Stands for the user in a pattern.
const SUB: &str = "{sub}";

/// One permission of a session in a room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Right {
    /// Join and receive.
    Read,
    /// Send, and show that one is typing.
    Write,
    /// See who is present.
    Presence,
    /// Read past messages.
    History,
    /// Edit, delete and annotate messages of others; mute, ban and remove members.
    Moderate,
    /// Erase messages of others, and rooms, for good.
    Erase,
    /// Make rooms, and decide who is in them. It counts as being their owner.
    Manage,
    /// Watch rooms without being in them.
    Follow,
    /// Publish as others, and end their sessions.
    Admin,
}

impl Right {
    /// Every right.
    pub const ALL: [Self; 9] = [
        Self::Read,
        Self::Write,
        Self::Presence,
        Self::History,
        Self::Moderate,
        Self::Erase,
        Self::Manage,
        Self::Follow,
        Self::Admin,
    ];

    /// Its name in a token's `can`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Presence => "presence",
            Self::History => "history",
            Self::Moderate => "moderate",
            Self::Erase => "erase",
            Self::Manage => "manage",
            Self::Follow => "follow",
            Self::Admin => "admin",
        }
    }

    /// The right of that name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|right| right.as_str() == name)
    }

    fn bit(self) -> u16 {
        1 << self as u8
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A set of rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rights(u16);

impl Rights {
    /// Whether `right` is in the set.
    #[must_use]
    pub fn contains(self, right: Right) -> bool {
        self.0 & right.bit() != 0
    }
}

impl FromIterator<Right> for Rights {
    fn from_iter<I: IntoIterator<Item = Right>>(rights: I) -> Self {
        Self(rights.into_iter().fold(0, |set, right| set | right.bit()))
    }
}

/// One entry of a token's `grants`, as it is written there.
///
/// Rights with unknown names are ignored, so that a token for a newer edge also works with an older one. A malformed
/// pattern makes the whole token invalid, because its meaning is unknown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Pattern of rooms: `ns:name`, `ns:*` or `*:*`, where `{sub}` stands for the user.
    pub rooms: String,
    /// Names of rights.
    pub can: Vec<String>,
}

impl Grant {
    /// `can` in the rooms of `pattern`.
    #[must_use]
    pub fn new(pattern: &str, can: &[Right]) -> Self {
        Self {
            rooms: pattern.to_owned(),
            can: can.iter().map(|right| right.as_str().to_owned()).collect(),
        }
    }
}

/// A pattern of rooms is malformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "is not ns:name, ns:* or *:*, where both parts are those of a room and may contain {{sub}}"
)]
pub struct BadPattern;

/// A grant with its pattern resolved for one user: every command is checked against it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Allowed {
    rooms: Rooms,
    rights: Rights,
}

/// The rooms of one grant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Rooms {
    All,
    Namespace(Box<str>),
    One {
        namespace: Box<str>,
        name: Box<str>,
    },
    /// `{sub}` for a user whose name can't be part of a namespace, or makes the name of the room too long.
    None,
}

impl Allowed {
    /// Resolves `grant` for `user`.
    pub(super) fn new(grant: &Grant, user: &str) -> Result<Self, BadPattern> {
        Ok(Self {
            rooms: Rooms::parse(&grant.rooms, user)?,
            rights: grant
                .can
                .iter()
                .filter_map(|name| Right::parse(name))
                .collect(),
        })
    }

    /// Every right in every room.
    pub(super) fn everything() -> Self {
        Self {
            rooms: Rooms::All,
            rights: Right::ALL.into_iter().collect(),
        }
    }

    /// The rooms that it covers, if it gives `right`.
    pub(super) fn rooms_with(&self, right: Right) -> Option<&Rooms> {
        self.rights.contains(right).then_some(&self.rooms)
    }

    /// The rights that it gives in `room`.
    pub(super) fn rights(&self, room: &RoomId) -> Rights {
        let matches = match &self.rooms {
            Rooms::All => true,
            Rooms::Namespace(namespace) => **namespace == *room.namespace(),
            Rooms::One { namespace, name } => {
                **namespace == *room.namespace() && **name == *room.name()
            }
            Rooms::None => false,
        };
        if matches {
            self.rights
        } else {
            Rights::default()
        }
    }
}

impl Rooms {
    fn parse(pattern: &str, user: &str) -> Result<Self, BadPattern> {
        let (namespace, name) = pattern.split_once(':').ok_or(BadPattern)?;
        // Every part is checked before the user is inserted, so a user such as `*` or `a:b` can't become syntax.
        let well_formed = |part: &str| is_token(&part.replace(SUB, "u"));
        let named = |part: &str| is_room_name(&part.replace(SUB, "u"));
        let fill = |part: &str| Some(part.replace(SUB, user)).filter(|part| is_token(part));
        let fill_name = |part: &str| {
            let name = part.replace(SUB, &key_escape(user));
            Some(name).filter(|name| is_room_name(name))
        };
        Ok(match (namespace, name) {
            ("*", "*") => Self::All,
            (namespace, "*") if well_formed(namespace) => {
                fill(namespace).map_or(Self::None, |namespace| Self::Namespace(namespace.into()))
            }
            (namespace, name) if well_formed(namespace) && named(name) => {
                match (fill(namespace), fill_name(name)) {
                    (Some(namespace), Some(name)) => Self::One {
                        namespace: namespace.into(),
                        name: name.into(),
                    },
                    (None, _) | (_, None) => Self::None,
                }
            }
            _ => return Err(BadPattern),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_what_they_say() {
        for (pattern, user, room, expected) in [
            ("chat:lobby", "kim", "chat:lobby", true),
            ("chat:lobby", "kim", "chat:lobby2", false),
            ("chat:lobby", "kim", "live:lobby", false),
            ("chat:*", "kim", "chat:x", true),
            ("chat:*", "kim", "chat2:x", false),
            ("*:*", "kim", "live:x", true),
            ("dm:{sub}", "kim", "dm:kim", true),
            ("dm:{sub}", "kim", "dm:lee", false),
            ("dm:inbox-{sub}", "kim", "dm:inbox-kim", true),
            ("{sub}:*", "kim", "kim:x", true),
            ("{sub}:*", "kim", "lee:x", false),
            ("{sub}:{sub}", "kim", "kim:kim", true),
            (
                "dm:{sub}",
                "kim@example.org",
                "dm:kim=40example=2Eorg",
                true,
            ),
            ("dm:x=20{sub}", "김", "dm:x=20=EA=B9=80", true),
            ("dm:{sub}", "=40", "dm:=40", false),
            ("dm:=EC=84=9C", "kim", "dm:=EC=84=9C", true),
            // Users whose names can't be part of a namespace match nothing, and never become syntax.
            ("dm:{sub}", "*", "dm:x", false),
            ("{sub}:*", "*", "dm:x", false),
            ("dm:{sub}", "kim@example.org", "dm:kim", false),
            ("dm:{sub}", "김", "dm:x", false),
            ("dm:{sub}", "{sub}", "dm:x", false),
            ("dm:{sub}x", "a:b", "dm:x", false),
            // Text that only looks like the placeholder, without braces, is not one.
            ("dm:sub", "kim", "dm:kim", false),
        ] {
            let grant = Grant::new(pattern, &[Right::Read]);
            let allowed = Allowed::new(&grant, user).unwrap();
            let rights = allowed.rights(&RoomId::parse(room).unwrap());
            assert_eq!(
                rights.contains(Right::Read),
                expected,
                "{pattern} {user} {room}"
            );
            assert!(!rights.contains(Right::Write));
        }
        let long = "u".repeat(64);
        let allowed = Allowed::new(&Grant::new("dm:a{sub}", &[Right::Read]), &long).unwrap();
        assert_eq!(allowed.rooms, Rooms::None);
    }

    #[test]
    fn the_configuration_knows_every_right() {
        // But for those that nobody has without a token.
        let names = Right::ALL.map(Right::as_str);
        assert_eq!(names[..5], crate::config::RIGHTS);
        assert_eq!(names[5..], ["erase", "manage", "follow", "admin"]);
    }

    #[test]
    fn malformed_patterns_are_refused() {
        for pattern in [
            "",
            "*",
            ":",
            "chat",
            "chat:",
            ":x",
            "*:x",
            "ch*:x",
            "chat:a*",
            "chat:a.b",
            "chat:>",
            "chat:a:b",
            "chat:{user}",
            "chat:{sub",
            "chat:={sub}",
            "chat:=4{sub}",
            "chat:=EC{sub}",
            "chat:=41",
            "=23:a",
            "chat: x",
            "chat:*:*",
            "**:*",
        ] {
            let grant = Grant::new(pattern, &Right::ALL);
            assert_eq!(Allowed::new(&grant, "kim"), Err(BadPattern), "{pattern:?}");
        }
    }

    #[test]
    fn rights_of_unknown_name_are_ignored() {
        let grant = Grant {
            rooms: "*:*".to_owned(),
            can: vec!["read".to_owned(), "fly".to_owned(), "WRITE".to_owned()],
        };
        let rights = Allowed::new(&grant, "kim")
            .unwrap()
            .rights(&RoomId::parse("a:b").unwrap());
        assert_eq!(rights, [Right::Read].into_iter().collect());
    }

    #[test]
    fn rights_are_distinct_and_parse_back() {
        for right in Right::ALL {
            assert_eq!(Right::parse(right.as_str()), Some(right));
        }
        let all: Rights = Right::ALL.into_iter().collect();
        assert_eq!(all.0.count_ones(), 9);
    }
}
