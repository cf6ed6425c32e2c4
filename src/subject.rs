//! The only place that spells a NATS subject, stream or header name, both ways.

use crate::model::{Class, Region, RoomId, is_token};

/// Header names of a message on NATS.
pub mod header {
    /// Id for the stream's de-duplication: `<room>/<user>/<id>`, user escaped.
    pub const MSG_ID: &str = "Nats-Msg-Id";
    /// Sender, escaped ([`crate::model::header_escape`]).
    pub const FROM: &str = "Natter-From";
    /// The sender's id of the message.
    pub const ID: &str = "Natter-Id";
    /// [`crate::model::Kind`], absent for `message`; `typing` on the ephemeral subject.
    pub const KIND: &str = "Natter-Kind";
    /// Reference an edit, delete, reaction or annotation is about, escaped.
    pub const TARGET: &str = "Natter-Target";
    /// Reference this message answers, escaped.
    pub const REPLY_TO: &str = "Natter-Reply-To";
    /// JSON array of mentioned users.
    pub const MENTIONS: &str = "Natter-Mentions";
    /// Milliseconds since 1970 at which an edge sent an ephemeral message.
    pub const TS: &str = "Natter-Ts";
    /// Edge that published it, for people who debug.
    pub const CLIENT: &str = "Natter-Client";
    /// W3C trace context.
    pub const TRACEPARENT: &str = "traceparent";
    /// Sequence, in what a stream republishes or answers.
    pub const SEQUENCE: &str = "Nats-Sequence";
    /// In a republished message: the previous sequence on the same subject.
    pub const LAST_SEQUENCE: &str = "Nats-Last-Sequence";
    /// RFC 3339 time at which the stream stored the message.
    pub const TIME_STAMP: &str = "Nats-Time-Stamp";
    /// In an answer to a direct get: the subject it was stored under.
    pub const SUBJECT: &str = "Nats-Subject";
    /// In an answer to a batched direct get: matches after this one.
    pub const NUM_PENDING: &str = "Nats-Num-Pending";
}

/// Value of [`header::KIND`] of a typing signal.
pub const KIND_TYPING: &str = "typing";

/// Metadata key of a stream that holds its epoch.
pub const EPOCH_METADATA: &str = "natter.epoch";

/// Spells the subjects of one mesh.
#[derive(Debug, Clone)]
pub struct Subjects {
    prefix: Box<str>,
}

/// What a subject under `live` or `in` says.
#[derive(Debug, PartialEq, Eq)]
pub struct LogSubject {
    /// The region whose stream holds the message.
    pub origin: Region,
    /// The stream's partition.
    pub part: u16,
    /// The room.
    pub room: RoomId,
    /// The room's log subject.
    pub class: Class,
}

impl Subjects {
    /// Subjects that begin with `prefix`, which the configuration has checked.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        debug_assert!(is_token(prefix), "the configuration checks the prefix");
        Self {
            prefix: prefix.into(),
        }
    }

    /// Where a durable message of `room` is published: captured by the origin's stream.
    #[must_use]
    pub fn publish(&self, origin: &Region, part: u16, room: &RoomId, class: Class) -> String {
        self.stored(origin, part, room, class.as_str())
    }

    /// Both classes of a room's log in the stream of `origin`: the filter of a replay.
    #[must_use]
    pub fn stored_all(&self, origin: &Region, part: u16, room: &RoomId) -> String {
        self.stored(origin, part, room, "*")
    }

    fn stored(&self, origin: &Region, part: u16, room: &RoomId, class: &str) -> String {
        format!(
            "{}.in.{origin}.{part}.{}.{}.{class}",
            self.prefix,
            room.namespace(),
            room.name()
        )
    }

    /// Everything that the stream of `origin` and `part` captures.
    #[must_use]
    pub fn captured(&self, origin: &Region, part: u16) -> String {
        format!("{}.in.{origin}.{part}.>", self.prefix)
    }

    /// Where `region` sees what the stream of `origin` and `part` stored.
    #[must_use]
    pub fn republished(&self, region: &Region, origin: &Region, part: u16) -> String {
        format!("{}.live.{region}.{origin}.{part}.>", self.prefix)
    }

    /// What an edge of `region` subscribes to for a durable room: all origins, both classes.
    #[must_use]
    pub fn live(&self, region: &Region, part: u16, room: &RoomId) -> String {
        format!(
            "{}.live.{region}.*.{part}.{}.{}.*",
            self.prefix,
            room.namespace(),
            room.name()
        )
    }

    /// Ephemeral messages and signals of a room.
    #[must_use]
    pub fn ephemeral(&self, room: &RoomId) -> String {
        format!("{}.eph.{}.{}", self.prefix, room.namespace(), room.name())
    }

    /// Where people publish by hand; the server maps it to [`Self::publish`].
    #[must_use]
    pub fn by_hand(&self, room: &RoomId) -> String {
        format!("{}.pub.{}.{}", self.prefix, room.namespace(), room.name())
    }

    /// A subject that nobody serves: the server says so at once.
    #[must_use]
    pub fn nobody(&self) -> String {
        format!("{}.svc.edge.nobody", self.prefix)
    }

    /// Reads a subject under `live` (`skip` = 1, the region) or under `in` (`skip` = 0).
    fn parse_log(&self, subject: &str, kind: &str, skip: usize) -> Option<LogSubject> {
        let rest = subject.strip_prefix(&*self.prefix)?.strip_prefix('.')?;
        let mut tokens = rest
            .strip_prefix(kind)?
            .strip_prefix('.')?
            .split('.')
            .skip(skip);
        let origin = Region::parse(tokens.next()?)?;
        let part = tokens.next()?.parse().ok()?;
        let room = RoomId::from_parts(tokens.next()?, tokens.next()?).ok()?;
        let class = match tokens.next()? {
            "msg" => Class::Msg,
            "ev" => Class::Ev,
            _ => return None,
        };
        tokens.next().is_none().then_some(LogSubject {
            origin,
            part,
            room,
            class,
        })
    }

    /// Reads a subject under `live`.
    #[must_use]
    pub fn parse_live(&self, subject: &str) -> Option<LogSubject> {
        self.parse_log(subject, "live", 1)
    }

    /// Reads a subject under `in`, as direct gets answer it.
    #[must_use]
    pub fn parse_stored(&self, subject: &str) -> Option<LogSubject> {
        self.parse_log(subject, "in", 0)
    }
}

/// Name of the stream that holds partition `part` of `origin`.
#[must_use]
pub fn rooms_stream(origin: &Region, part: u16) -> String {
    format!("ROOMS_{origin}_{part}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::partition_of;

    proptest! {
        /// Whatever text a client gives as a room: it is refused, or its subjects have exactly the tokens of a room's
        /// subject and lead back to that same room.
        #[test]
        fn no_accepted_room_leaves_its_own_subject(text in "\\PC{0,80}|[A-Za-z0-9_.:*>$ \\r\\n-]{0,80}|[A-Za-z0-9_-]{1,70}:[A-Za-z0-9_-]{1,70}") {
            let Ok(room) = RoomId::parse(&text) else { return Ok(()) };
            let subjects = Subjects::new("natter");
            let region = Region::parse("seoul").unwrap();
            let part = partition_of(&room, 4);
            let stored = subjects.publish(&region, part, &room, Class::Msg);
            prop_assert_eq!(stored.split('.').count(), 7);
            prop_assert!(!stored.contains(['*', '>', ' ', '\r', '\n', '$']));
            prop_assert_eq!(
                subjects.parse_stored(&stored),
                Some(LogSubject { origin: region.clone(), part, room: room.clone(), class: Class::Msg })
            );
            let live = subjects.live(&region, part, &room);
            prop_assert_eq!(live.split('.').count(), 8);
            prop_assert_eq!(live.matches('*').count(), 2);
            prop_assert_eq!(subjects.ephemeral(&room).split('.').count(), 4);
            prop_assert_eq!(room.as_str(), text.as_str());
        }
    }

    #[test]
    fn subjects_are_those_of_the_design() {
        let subjects = Subjects::new("natter");
        let (seoul, virginia) = (
            Region::parse("seoul").unwrap(),
            Region::parse("virginia").unwrap(),
        );
        let room = RoomId::parse("chat:lobby").unwrap();
        assert_eq!(
            subjects.publish(&seoul, 3, &room, Class::Ev),
            "natter.in.seoul.3.chat.lobby.ev"
        );
        assert_eq!(
            subjects.live(&seoul, 3, &room),
            "natter.live.seoul.*.3.chat.lobby.*"
        );
        assert_eq!(
            subjects.republished(&seoul, &virginia, 0),
            "natter.live.seoul.virginia.0.>"
        );
        assert_eq!(subjects.by_hand(&room), "natter.pub.chat.lobby");
        assert_eq!(
            subjects
                .parse_live("natter.live.seoul.virginia.3.chat.lobby.msg")
                .unwrap()
                .origin,
            virginia
        );
        assert!(
            subjects
                .parse_live("natter.live.seoul.virginia.3.chat.lobby.msg.x")
                .is_none()
        );
        assert!(
            subjects
                .parse_live("other.live.seoul.virginia.3.chat.lobby.msg")
                .is_none()
        );
    }
}
