//! Names of rooms in the protocols that call them something else.
//!
//! A channel or destination has the name of its room. A name without a colon is a room of the protocol's default
//! namespace (`<protocol>.default_namespace`). Clients of Centrifugo know a subscription by its channel, so there the
//! rooms of that namespace have no other name: everybody is told of a room by one name.

use std::cell::OnceCell;

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
        let bad = |text: String| Refused::new(ErrorCode::BadRoom, text);
        self.with_default(|default| {
            let room = match (name.contains(':'), default) {
                (false, Some(namespace)) => RoomId::from_parts(namespace, name),
                _ => RoomId::parse(name),
            };
            let room = room.map_err(|error| bad(error.to_string()))?;
            if name.contains(':') && self.name(&room) != name {
                let name = room.name();
                return Err(bad(format!("this room is named {name:?} here")));
            }
            Ok(room)
        })
    }

    /// The name of a room, by which everybody is told of it.
    pub(crate) fn name(self, room: &RoomId) -> &str {
        self.with_default(|default| match (self, default) {
            (Self::Centrifugal, Some(namespace)) if namespace == room.namespace() => room.name(),
            // A client of STOMP knows its subscription by a name of its own.
            (Self::Centrifugal | Self::Stomp, _) => room.as_str(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

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
            assert!(refused("main:news").contains("\"news\""));
            refused("a b");
            refused("");
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
