//! Names of rooms in the protocols that call them something else.
//!
//! A channel or destination has the name of its room, without the escapes: any text can be one. A name without a colon
//! is a room of the protocol's default namespace (`<protocol>.default_namespace`). Clients of Centrifugo know a
//! subscription by its channel, so there the rooms of that namespace have no other name, unless theirs contains a colon:
//! everybody is told of a room by one name.

use std::{borrow::Cow, cell::OnceCell};

use crate::{
    model::RoomId,
    protocol::{ErrorCode, Refused},
};

thread_local! {
    /// The default namespaces. Per thread, because each shard encodes on its own thread, and a message is encoded far
    /// from any configuration.
    static DEFAULTS: [OnceCell<Box<str>>; 2] = const { [OnceCell::new(), OnceCell::new()] };
}

/// A protocol that names rooms in its own way.
#[derive(Debug, Clone, Copy)]
pub enum Names {
    /// Channels of Centrifugo's protocol.
    Centrifugal,
    /// Destinations of STOMP.
    Stomp,
}

impl Names {
    /// Sets the default namespace for this thread. The first call wins. Empty: there is none.
    #[expect(clippy::indexing_slicing, reason = "a slot for each protocol")]
    pub fn set_default(self, namespace: &str) {
        DEFAULTS.with(|defaults| {
            defaults[self as usize].get_or_init(|| namespace.into());
        });
    }

    #[expect(clippy::indexing_slicing, reason = "a slot for each protocol")]
    fn with_default<T>(self, run: impl FnOnce(Option<&str>) -> T) -> T {
        DEFAULTS.with(|defaults| {
            let default = defaults[self as usize].get();
            run(default.map(|it| &**it).filter(|it| !it.is_empty()))
        })
    }

    /// The room of a name.
    ///
    /// # Errors
    /// `bad_room`.
    pub(crate) fn room(self, name: &str) -> Result<RoomId, Refused> {
        let bad = |text: String| {
            let shown: String = name.chars().take(80).collect();
            Refused::new(ErrorCode::BadRoom, format!("{shown:?}: {text}"))
        };
        self.with_default(|default| {
            let room = match (name.split_once(':'), default) {
                (Some((namespace, name)), _) => RoomId::named(namespace, name),
                (None, Some(namespace)) => RoomId::named(namespace, name),
                (None, None) => RoomId::parse(name),
            };
            let room = room.map_err(|error| bad(error.to_string()))?;
            if name.contains(':') && self.name(&room) != name {
                let name = room.text();
                return Err(bad(format!("this room is named {name:?} here")));
            }
            Ok(room)
        })
    }

    /// The name of a room, by which everybody is told of it.
    pub(crate) fn name(self, room: &RoomId) -> Cow<'_, str> {
        let text = room.text();
        let is_short = self.with_default(|default| match self {
            Self::Centrifugal => default == Some(room.namespace()) && !text.contains(':'),
            // A client of STOMP knows its subscription by a name of its own.
            Self::Stomp => false,
        });
        match text {
            text if is_short => text,
            Cow::Borrowed(_) => Cow::Borrowed(room.as_str()),
            Cow::Owned(text) => Cow::Owned(format!("{}:{text}", room.namespace())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    const NAMES: Names = Names::Centrifugal;

    /// Runs on a thread of its own, with a namespace.
    fn with(namespace: &'static str, test: fn()) {
        let test = move || {
            NAMES.set_default(namespace);
            test();
        };
        thread::spawn(test).join().unwrap();
    }

    /// Whatever text is a name, it is that of one room, and every room has one.
    fn is_one_to_one(names: Names) {
        proptest!(|(text in "\\PC{0,20}|(main|chat)?:?[a-c=:. #0-9A-F]{0,12}")| {
            if let Ok(room) = names.room(&text) {
                let name = names.name(&room);
                // Of STOMP, the default namespace may be written or not.
                let is_same = name == text || matches!(names, Names::Stomp) && name == format!("main:{text}");
                prop_assert!(is_same, "{:?} is {} is {:?}", text, room, name);
            }
            if let Ok(room) = RoomId::parse(&text) {
                let name = names.name(&room);
                let back = names.room(&name);
                prop_assert_eq!(back.map_err(|it| it.message), Ok(room));
            }
        });
    }

    #[test]
    fn names_are_one_to_one() {
        for namespace in ["", "main"] {
            let test = move || {
                for names in [Names::Centrifugal, Names::Stomp] {
                    names.set_default(namespace);
                    is_one_to_one(names);
                }
            };
            thread::spawn(test).join().unwrap();
        }
    }

    fn refused(name: &str) -> String {
        NAMES.room(name).unwrap_err().message
    }

    #[test]
    fn every_room_has_one_name() {
        with("main", || {
            for (name, its_room) in [("news", "main:news"), ("chat:news", "chat:news")] {
                let room = NAMES.room(name).unwrap();
                assert_eq!(room.as_str(), its_room);
                assert_eq!(NAMES.name(&room), name);
            }
            for (name, its_room) in [
                ("서울 #1", "main:=EC=84=9C=EC=9A=B8=20=231"),
                ("chat:a:b.c", "chat:a=3Ab=2Ec"),
                ("main:a:b", "main:a=3Ab"),
                ("=3A", "main:=3D3A"),
            ] {
                let room = NAMES.room(name).unwrap();
                assert_eq!(room.as_str(), its_room);
                assert_eq!(NAMES.name(&room), name);
            }
            assert!(refused("main:news").contains("\"news\""));
            refused("");
            refused("chat:");
            refused("a b:c");
            assert!(refused(&"한".repeat(8)).contains("1 to 64 bytes"));
            // The other protocol has none.
            assert!(Names::Stomp.room("news").is_err());
        });
        for none in ["", "chat"] {
            with(none, || {
                assert_eq!(NAMES.name(&NAMES.room("main:news").unwrap()), "main:news");
            });
        }
        with("", || {
            refused("news");
        });
    }
}
