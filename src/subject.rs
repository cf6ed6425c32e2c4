//! The only place that composes and parses names of NATS subjects, streams and headers.

use std::{collections::BTreeSet, fmt};

use crate::model::{Class, Region, RoomId, RoomScope, header_unescape, is_token, key_escape};

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
    /// Reference to the target of an edit, delete, reaction or annotation, escaped.
    pub const TARGET: &str = "Natter-Target";
    /// Reference to the message that this one answers, escaped.
    pub const REPLY_TO: &str = "Natter-Reply-To";
    /// Cursor with the messages of other regions that the sender had seen; this message is shown after them.
    pub const AFTER: &str = "Natter-After";
    /// JSON array of mentioned users.
    pub const MENTIONS: &str = "Natter-Mentions";
    /// Milliseconds since 1970 at which an edge sent an ephemeral message.
    pub const TS: &str = "Natter-Ts";
    /// Milliseconds since 1970 at which an imported message was sent. It is shown as the message's time, and has no
    /// effect on its place. Only [`crate::bus::Publisher`] writes it; nothing that a client sends becomes a header.
    pub const ORIGINAL_TIME: &str = "Natter-Original-Time";
    /// Edge that published it, for debugging.
    pub const CLIENT: &str = "Natter-Client";
    /// `1` on an edit or delete that an edge accepted because its sender has the right `moderate`.
    pub const MODERATED: &str = "Natter-Moderated";
    /// In a dead letter: why the message could not be written.
    pub const REASON: &str = "Natter-Reason";
    /// In a dead letter: epoch, sequence, time (ms since 1970) and fingerprint of the message in its stream.
    pub const PLACE: &str = "Natter-Place";
    /// W3C trace context.
    pub const TRACEPARENT: &str = "traceparent";
    /// Sequence, in messages that a stream republishes or returns.
    pub const SEQUENCE: &str = "Nats-Sequence";
    /// In a republished message: the previous sequence on the same subject.
    pub const LAST_SEQUENCE: &str = "Nats-Last-Sequence";
    /// RFC 3339 time at which the stream stored the message.
    pub const TIME_STAMP: &str = "Nats-Time-Stamp";
    /// In an answer to a direct get: the subject under which the message is stored.
    pub const SUBJECT: &str = "Nats-Subject";
    /// In an answer to a batched direct get: the number of matches after this one.
    pub const NUM_PENDING: &str = "Nats-Num-Pending";
    /// At the end of a request to a consumer: the number of requested messages that were not delivered.
    pub const PENDING_MESSAGES: &str = "Nats-Pending-Messages";
    /// `DEL` or `PURGE` in a key-value message that removes its key.
    pub const KV_OPERATION: &str = "KV-Operation";
    /// Why the server itself removed a key; `MaxAge` if it was not renewed in time.
    pub const MARKER_REASON: &str = "Nats-Marker-Reason";
    /// How long the stream keeps the message.
    pub const TTL: &str = "Nats-TTL";
    /// Store only if the newest message on the subject has this sequence; 0: if there is none.
    pub const EXPECTED_LAST: &str = "Nats-Expected-Last-Subject-Sequence";
}

/// Value of [`header::KIND`] of a typing signal.
pub const KIND_TYPING: &str = "typing";

/// Value of [`header::KIND`] of a read receipt: the payload is a cursor.
pub const KIND_READ: &str = "read";

/// Sender of natter's own messages in a room. No token can have it, since a `sub` must not begin with `$`.
pub const FROM_NATTER: &str = "$natter";

/// Sender of what a back end publishes with the key of the API in its own name. No token can have it either.
pub const FROM_API: &str = "$api";

/// Name of the history service, as `nats micro ls` shows it.
pub const HISTORY_SERVICE: &str = "natter-history";

/// Before the names of workers: in the names of their users, and of their durable consumers on each stream of rooms.
const WORKER_USER: &str = "$worker.";
const WORKER_CONSUMER: &str = "worker_";

/// The user whose annotations are the answers of a worker. No token can have it, since a `sub` must not begin with `$`.
#[must_use]
pub fn worker_user(worker: &str) -> String {
    format!("{WORKER_USER}{worker}")
}

/// The durable consumer of a worker on each stream of rooms.
#[must_use]
pub fn worker_consumer(worker: &str) -> String {
    format!("{WORKER_CONSUMER}{worker}")
}

/// Before the names of hooks, in the names of their durable consumers.
const HOOK_CONSUMER: &str = "hook_";

/// The durable consumer of a hook on each stream of rooms.
#[must_use]
pub fn hook_consumer(hook: &str) -> String {
    format!("{HOOK_CONSUMER}{hook}")
}
/// Durable consumer of notifiers on each stream of rooms.
pub const PUSH_CONSUMER: &str = "push";

/// Durable consumer of the history service on each stream of rooms.
pub const HISTORY_CONSUMER: &str = "history";

/// What the subjects of events of presence begin with, before the region: keys of the bucket of hooks.
const HOOK_EVENTS: &str = "$KV.hooks_";

/// Buckets of a region.
pub mod bucket {
    /// Which users are in which room, by edge.
    pub const PRESENCE: &str = "presence";
    /// Leases of edges.
    pub const EDGES: &str = "edges";
    /// Read markers.
    pub const LASTREAD: &str = "lastread";
    /// Rules that every edge must obey.
    pub const CONTROL: &str = "control";
    /// Room records.
    pub const ROOMS: &str = "rooms";
    /// Which rooms a user is in, and whom a user has blocked.
    pub const INBOX: &str = "inbox";
    /// What the processes of hooks remember.
    pub const HOOKS: &str = "hooks";
    /// Devices of users.
    pub const DEVICES: &str = "devices";
    /// Notifications that were begun. Not mirrored.
    pub const PUSHED: &str = "pushed";
}

/// Metadata key of a stream that holds its epoch.
pub const EPOCH_METADATA: &str = "natter.epoch";

/// Metadata key of a stream that holds the number of partitions of its mesh.
pub const PARTITIONS_METADATA: &str = "natter.partitions";

/// Metadata key of a region's own streams of rooms, with the regions whose messages are there: the own and the mirrored
/// ones, sorted, separated by commas. `natter provision` adds a region when all its mirrors exist.
pub const REGIONS_METADATA: &str = "natter.regions";

/// Composes the subjects of one mesh.
#[derive(Debug, Clone)]
pub struct Subjects {
    prefix: Box<str>,
}

/// The parts of a subject under `live` or `in`.
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

    /// Subject on which a durable message of `room` is published; the origin's stream captures it.
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
        // Here, and for what else each message needs: one allocation, where `format!` makes several.
        let (namespace, name) = (room.namespace(), room.name());
        let (prefix, origin) = (&*self.prefix, origin.as_str());
        let mut digits = itoa::Buffer::new();
        let part = digits.format(part);
        let parts = [
            prefix, ".in.", origin, ".", part, ".", namespace, ".", name, ".", class,
        ];
        parts.concat()
    }

    /// All subjects that the stream of `origin` and `part` captures.
    #[must_use]
    pub fn captured(&self, origin: &Region, part: u16) -> String {
        format!("{}.in.{origin}.{part}.>", self.prefix)
    }

    /// Subjects on which `region` receives what the stream of `origin` and `part` stored.
    #[must_use]
    pub fn republished(&self, region: &Region, origin: &Region, part: u16) -> String {
        format!("{}.live.{region}.{origin}.{part}.>", self.prefix)
    }

    /// Subscription of an edge of `region` for a durable room: all origins, both classes.
    #[must_use]
    pub fn live(&self, region: &Region, part: u16, room: &RoomId) -> String {
        format!(
            "{}.live.{region}.*.{part}.{}.{}.*",
            self.prefix,
            room.namespace(),
            room.name()
        )
    }

    /// Subscription of an edge of `region` for one class of a durable room: all origins.
    #[must_use]
    pub fn live_class(&self, region: &Region, part: u16, room: &RoomId, class: Class) -> String {
        let (namespace, name) = (room.namespace(), room.name());
        let class = class.as_str();
        format!(
            "{}.live.{region}.*.{part}.{namespace}.{name}.{class}",
            self.prefix
        )
    }

    /// Subscription of an edge of `region` for one class of all durable rooms of a namespace.
    #[must_use]
    pub fn live_namespace(&self, region: &Region, namespace: &str, class: Class) -> String {
        let class = class.as_str();
        format!("{}.live.{region}.*.*.{namespace}.*.{class}", self.prefix)
    }

    /// Subject of ephemeral messages and signals of all rooms of a namespace.
    #[must_use]
    pub fn ephemeral_namespace(&self, namespace: &str) -> String {
        format!("{}.eph.{namespace}.*", self.prefix)
    }

    /// The room of a subject of ephemeral messages.
    #[must_use]
    pub fn parse_ephemeral(&self, subject: &str) -> Option<RoomId> {
        let rest = subject.strip_prefix(&*self.prefix)?.strip_prefix(".eph.")?;
        parse_record_key(rest)
    }

    /// Subject of ephemeral messages and signals of a room.
    #[must_use]
    pub fn ephemeral(&self, room: &RoomId) -> String {
        [&*self.prefix, ".eph.", room.namespace(), ".", room.name()].concat()
    }

    /// Subject for publishing by hand; the server maps it to [`Self::publish`].
    #[must_use]
    pub fn by_hand(&self, room: &RoomId) -> String {
        format!("{}.pub.{}.{}", self.prefix, room.namespace(), room.name())
    }

    /// Subject on which the history service of `region` answers; `endpoint` is `page`, `search` or `erase`.
    #[must_use]
    pub fn history(&self, region: &Region, endpoint: &str) -> String {
        format!("{}.svc.history.{region}.{endpoint}", self.prefix)
    }

    /// Subject on which all edges of all regions are told what to do with their sessions.
    #[must_use]
    pub fn orders(&self) -> String {
        format!("{}.edge.orders", self.prefix)
    }

    /// Subject of the answers to the orders of one edge. `edge` is a name that no other edge has.
    #[must_use]
    pub fn order_answers(&self, edge: &str) -> String {
        format!("{}.edge.answers.{edge}", self.prefix)
    }

    /// Subject of the signals to the sessions of a user who watches rooms.
    #[must_use]
    pub fn signals(&self, user: &str) -> String {
        format!("{}.edge.user.{}", self.prefix, key_escape(user))
    }

    /// All subjects of a partition's rooms: a filter for a read of the whole stream. The room's tokens are wildcards.
    #[must_use]
    pub fn stored_any(&self, origin: &Region, part: u16) -> String {
        format!("{}.in.{origin}.{part}.*.*.*", self.prefix)
    }

    /// All subjects of a partition's rooms of one namespace.
    #[must_use]
    pub fn stored_namespace(&self, origin: &Region, part: u16, namespace: &str) -> String {
        format!("{}.in.{origin}.{part}.{namespace}.*.*", self.prefix)
    }

    /// The subjects of messages, without what refers to them, of a partition's rooms of one namespace.
    #[must_use]
    pub fn stored_messages(&self, origin: &Region, part: u16, namespace: &str) -> String {
        let class = Class::Msg.as_str();
        format!("{}.in.{origin}.{part}.{namespace}.*.{class}", self.prefix)
    }

    /// Subject of a message that history can't write: its subject in the stream, below `dead`.
    #[must_use]
    pub fn dead(&self, stored: &str) -> Option<String> {
        let rest = stored.strip_prefix(&*self.prefix)?.strip_prefix(".in.")?;
        Some(format!("{}.dead.{rest}", self.prefix))
    }

    /// The inverse of [`Self::dead`].
    #[must_use]
    pub fn dead_stored(&self, dead: &str) -> Option<String> {
        let rest = dead.strip_prefix(&*self.prefix)?.strip_prefix(".dead.")?;
        Some(format!("{}.in.{rest}", self.prefix))
    }

    /// All dead letters of `origin`.
    #[must_use]
    pub fn dead_all(&self, origin: &Region) -> String {
        format!("{}.dead.{origin}.>", self.prefix)
    }

    /// Subject of a message that a receiver did not accept: a worker, by `role` and `name`.
    #[must_use]
    pub fn undelivered(&self, role: &str, name: &str, stored: &str) -> Option<String> {
        let prefix = &*self.prefix;
        let (origin, rest) = match stored.strip_prefix(HOOK_EVENTS) {
            Some(rest) => rest.split_once('.')?,
            None => {
                let rest = stored.strip_prefix(prefix)?.strip_prefix(".in.")?;
                rest.split_once('.')?
            }
        };
        Some(format!(
            "{prefix}.undelivered.{origin}.{role}.{name}.{rest}"
        ))
    }

    /// The inverse of [`Self::undelivered`]: the name, and the subject in the stream.
    #[must_use]
    pub fn undelivered_stored<'s>(&self, subject: &'s str) -> Option<(&'s str, String)> {
        let prefix = &*self.prefix;
        let rest = subject
            .strip_prefix(prefix)?
            .strip_prefix(".undelivered.")?;
        let mut tokens = rest.splitn(4, '.');
        let (origin, _role) = (tokens.next()?, tokens.next()?);
        let (name, rest) = (tokens.next()?, tokens.next()?);
        let subject = match rest.starts_with("event.") {
            true => format!("{HOOK_EVENTS}{origin}.{rest}"),
            false => format!("{prefix}.in.{origin}.{rest}"),
        };
        Some((name, subject))
    }

    /// All messages of `origin` that receivers of a role did not accept; of one of them, if `name` is not `*`.
    #[must_use]
    pub fn undelivered_to(&self, origin: &Region, role: &str, name: &str) -> String {
        format!("{}.undelivered.{origin}.{role}.{name}.>", self.prefix)
    }

    /// All messages of `origin` that any receiver did not accept.
    #[must_use]
    pub fn undelivered_all(&self, origin: &Region) -> String {
        format!("{}.undelivered.{origin}.>", self.prefix)
    }

    /// The subjects of a partition's rooms in `scope`, of these classes. None of them overlaps another.
    #[must_use]
    pub fn stored_of(
        &self,
        origin: &Region,
        part: u16,
        scope: &RoomScope,
        classes: &[Class],
    ) -> Vec<String> {
        let mut rooms = BTreeSet::new();
        if scope.all {
            rooms.insert("*.*".to_owned());
        } else {
            rooms.extend(scope.namespaces.iter().map(|its| format!("{its}.*")));
            let is_covered =
                |room: &RoomId| scope.namespaces.iter().any(|its| its == room.namespace());
            let single = scope.rooms.iter().filter(|room| !is_covered(room));
            rooms.extend(single.map(record_key));
        }
        let subject = |room: &String, class: &Class| {
            format!(
                "{}.in.{origin}.{part}.{room}.{}",
                self.prefix,
                class.as_str()
            )
        };
        let of_room = |room| classes.iter().map(move |class| subject(room, class));
        rooms.iter().flat_map(of_room).collect()
    }

    /// Subject on which an edge takes commands for its sessions from other edges. `None`: no edge has this name.
    #[must_use]
    pub fn commands_of(&self, edge: &str) -> Option<String> {
        is_token(edge).then(|| format!("{}.edge.commands.{edge}", self.prefix))
    }

    /// Subject on which an edge tells other edges what its tickets stand for. `None`: no edge has this name.
    #[must_use]
    pub fn tickets_of(&self, edge: &str) -> Option<String> {
        is_token(edge).then(|| format!("{}.edge.tickets.{edge}", self.prefix))
    }

    /// A subject without subscribers: the server reports "no responders" at once.
    #[must_use]
    pub fn nobody(&self) -> String {
        format!("{}.svc.edge.nobody", self.prefix)
    }

    /// The first subject to which the server maps a message published by hand to a durable room of `region`, for all
    /// rooms. Namespace and room are both wildcards there, so that the second mapping can hash them.
    #[must_use]
    pub fn by_hand_durable(&self, region: &Region) -> String {
        format!("{}.put.{region}.*.*", self.prefix)
    }

    /// The subject mappings of a server's configuration for publishing by hand, as source and destination. The `bool`
    /// of a namespace says whether it is durable. `nats/server.conf` explains them. No two sources overlap.
    pub fn mappings<'a>(
        &self,
        region: &Region,
        partitions: u16,
        namespaces: impl IntoIterator<Item = (&'a str, bool)>,
    ) -> Vec<(String, String)> {
        let prefix = &self.prefix;
        let partitioned = (
            self.by_hand_durable(region),
            format!(
                "{prefix}.in.{region}.{{{{partition({partitions},1,2)}}}}.{{{{wildcard(1)}}}}.{{{{wildcard(2)}}}}.msg"
            ),
        );
        let by_namespace = namespaces.into_iter().map(|(namespace, durable)| {
            let to = if durable {
                format!("{prefix}.put.{region}.{namespace}.{{{{wildcard(1)}}}}")
            } else {
                format!("{prefix}.eph.{namespace}.{{{{wildcard(1)}}}}")
            };
            (format!("{prefix}.pub.{namespace}.*"), to)
        });
        std::iter::once(partitioned).chain(by_namespace).collect()
    }

    /// Prefix of all subjects that streams of the mesh capture for rooms.
    #[must_use]
    pub fn captured_prefix(&self) -> String {
        format!("{}.in.", self.prefix)
    }

    /// Subjects on which `region` receives the changes of a bucket of `origin`.
    #[must_use]
    pub fn bucket_republished(&self, region: &Region, origin: &Region, bucket: &str) -> String {
        format!("{}.kv.{region}.{origin}.{bucket}.>", self.prefix)
    }

    /// Subjects on which `region` receives the changes of the keys of all origins that match `keys`.
    #[must_use]
    pub fn bucket_changes(&self, region: &Region, bucket: &str, keys: &str) -> String {
        format!("{}.kv.{region}.*.{bucket}.{keys}", self.prefix)
    }

    /// Parses a subject under `kv`: origin and key.
    #[must_use]
    pub fn parse_change<'a>(&self, subject: &'a str, bucket: &str) -> Option<(Region, &'a str)> {
        let rest = subject.strip_prefix(&*self.prefix)?.strip_prefix(".kv.")?;
        let (_region, rest) = rest.split_once('.')?;
        let (origin, rest) = rest.split_once('.')?;
        let key = rest.strip_prefix(bucket)?.strip_prefix('.')?;
        Some((Region::parse(origin)?, key))
    }

    /// Parses a subject under `live` (`skip` = 1, the region) or under `in` (`skip` = 0).
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

    /// Parses a subject under `live`.
    #[must_use]
    pub fn parse_live(&self, subject: &str) -> Option<LogSubject> {
        self.parse_log(subject, "live", 1)
    }

    /// Origin and class of a subject under `live` whose subscription says which room it is of.
    #[must_use]
    pub fn origin_and_class<'s>(&self, subject: &'s str) -> Option<(&'s str, Class)> {
        let rest = subject
            .strip_prefix(&*self.prefix)?
            .strip_prefix(".live.")?;
        let mut tokens = rest.split('.').skip(1);
        let origin = tokens.next()?;
        let class = match tokens.nth(3)? {
            "msg" => Class::Msg,
            "ev" => Class::Ev,
            _ => return None,
        };
        tokens.next().is_none().then_some((origin, class))
    }

    /// Parses a subject under `in`, as in answers to direct gets.
    #[must_use]
    pub fn parse_stored(&self, subject: &str) -> Option<LogSubject> {
        self.parse_log(subject, "in", 0)
    }
}

/// Subject on which a stream is read without a consumer.
#[must_use]
pub fn direct_get(stream: &str) -> String {
    format!("$JS.API.DIRECT.GET.{stream}")
}

/// Name of the stream of partition `part` of `origin`.
#[must_use]
pub fn rooms_stream(origin: &Region, part: u16) -> String {
    format!("ROOMS_{origin}_{part}")
}

/// Name of the stream of dead letters of `origin`.
#[must_use]
pub fn dead_stream(origin: &Region) -> String {
    format!("HISTORY_DEAD_{origin}")
}

/// Name of the stream of what receivers of `origin` did not accept.
#[must_use]
pub fn undelivered_stream(origin: &Region) -> String {
    format!("UNDELIVERED_{origin}")
}

/// Origin and partition of a [`rooms_stream`], by its name.
#[must_use]
pub fn parse_rooms_stream(name: &str) -> Option<(Region, u16)> {
    let (origin, part) = name.strip_prefix("ROOMS_")?.rsplit_once('_')?;
    Some((Region::parse(origin)?, part.parse().ok()?))
}

/// Name of a key-value bucket of `origin`, as clients open it.
#[must_use]
pub fn bucket_name(bucket: &str, origin: &Region) -> String {
    format!("{bucket}_{origin}")
}

/// Name of the stream behind a bucket.
#[must_use]
pub fn bucket_stream(bucket: &str, origin: &Region) -> String {
    format!("KV_{}", bucket_name(bucket, origin))
}

/// All subjects that the stream behind a bucket captures.
#[must_use]
pub fn bucket_captured(bucket: &str, origin: &Region) -> String {
    format!("$KV.{}.>", bucket_name(bucket, origin))
}

/// The subject of a key, or of all keys that match.
#[must_use]
pub fn bucket_key(bucket: &str, origin: &Region, key: &str) -> String {
    format!("$KV.{}.{key}", bucket_name(bucket, origin))
}

/// Key of the lease of the process that sends the events of a hook.
#[must_use]
pub fn hook_lease_key(hook: &str) -> String {
    format!("lease.{hook}")
}

/// Key that says that a hook is disabled.
#[must_use]
pub fn hook_off_key(hook: &str) -> String {
    format!("off.{hook}")
}

/// Key that says where the entries of a room go on that wait apart for a hook.
#[must_use]
pub fn hook_apart_key(hook: &str, part: u16, room: &RoomId) -> String {
    format!("apart.{hook}.{part}.{}.{}", room.namespace(), room.name())
}

/// All of these keys of a partition.
#[must_use]
pub fn hook_apart_keys(hook: &str, part: u16) -> String {
    format!("apart.{hook}.{part}.*.*")
}

/// The room of a [`hook_apart_key`].
#[must_use]
pub fn parse_hook_apart_key(key: &str) -> Option<RoomId> {
    let mut tokens = key.strip_prefix("apart.")?.split('.').skip(2);
    RoomId::from_parts(tokens.next()?, tokens.next()?).ok()
}

/// Key of what was told of a user (`of` is `user`) or a room (`room`).
#[must_use]
pub fn hook_told_key(of: &str, name: &str) -> String {
    format!("told.{of}.{}", key_escape(name))
}

/// What the keys of the leases of those who tell of presence begin with. No hook has this lease.
pub const HOOK_TELLER_LEASE: &str = "teller";

/// All keys of what was told.
pub const HOOK_TOLD_KEYS: &str = "told.*.*";

/// The parts of a [`hook_told_key`].
#[must_use]
pub fn parse_hook_told_key(key: &str) -> Option<(&str, String)> {
    let (of, name) = key.strip_prefix("told.")?.split_once('.')?;
    Some((of, header_unescape(name).into_owned()))
}

/// Key of an event about a user or a room that is to be sent.
#[must_use]
pub fn hook_event_key(of: &str, name: &str, at: u64) -> String {
    format!("event.{of}.{}.{at}", key_escape(name))
}

/// The subjects of all events about users (`of` is `user`) or rooms (`room`) that `origin` has to send.
#[must_use]
pub fn hook_events(origin: &Region, of: &str) -> String {
    bucket_key(bucket::HOOKS, origin, &format!("event.{of}.>"))
}

/// Key of an upload that an entry of a log was the first to name; `id` is a hash.
#[must_use]
pub fn hook_upload_key(id: &str) -> String {
    format!("upload.{id}")
}

/// Key of a user who is in a room on the edge with `lease`.
#[must_use]
pub fn presence_key(room: &RoomId, user: &str, lease: &str) -> String {
    format!("{}.{lease}", marker_key(room, user))
}

/// The keys of all users in a room.
#[must_use]
pub fn presence_keys(room: &RoomId) -> String {
    format!("{}.{}.*.*", room.namespace(), room.name())
}

/// Key of a user with a session on the edge with `lease`. No room has this name.
#[must_use]
pub fn online_key(user: &str, lease: &str) -> String {
    format!("=.=.{}.{lease}", key_escape(user))
}

/// Key of a room with somebody on the edge with `lease`. No room has this name.
#[must_use]
pub fn occupied_key(room: &str, lease: &str) -> String {
    format!("=.r.{}.{lease}", key_escape(room))
}

/// The keys of all rooms with somebody.
pub const OCCUPIED_KEYS: &str = "=.r.*.*";

/// The keys of all users with a session.
pub const ONLINE_KEYS: &str = "=.=.*.*";

/// All keys written under a lease.
#[must_use]
pub fn presence_keys_of(lease: &str) -> String {
    format!("*.*.*.{lease}")
}

/// User and lease of a [`presence_key`] or an [`online_key`]; room and lease of an [`occupied_key`].
#[must_use]
pub fn parse_presence_key(key: &str) -> Option<(String, &str)> {
    let mut tokens = key.split('.').skip(2);
    let (user, lease) = (tokens.next()?, tokens.next()?);
    let user = header_unescape(user).into_owned();
    tokens.next().is_none().then_some((user, lease))
}

/// Key of a user's read marker in a room.
#[must_use]
pub fn marker_key(room: &RoomId, user: &str) -> String {
    let user = key_escape(user);
    [room.namespace(), ".", room.name(), ".", &user].concat()
}

/// The keys of all read markers in a room.
#[must_use]
pub fn marker_keys(room: &RoomId) -> String {
    format!("{}.{}.*", room.namespace(), room.name())
}

/// Room and user of a [`marker_key`].
#[must_use]
pub fn parse_marker_key(key: &str) -> Option<(RoomId, String)> {
    let mut tokens = key.split('.');
    let room = RoomId::from_parts(tokens.next()?, tokens.next()?).ok()?;
    let user = header_unescape(tokens.next()?).into_owned();
    tokens.next().is_none().then_some((room, user))
}

/// Key of a room's record.
#[must_use]
pub fn record_key(room: &RoomId) -> String {
    format!("{}.{}", room.namespace(), room.name())
}

/// The keys of the records of a namespace.
#[must_use]
pub fn record_keys(namespace: &str) -> String {
    format!("{namespace}.*")
}

/// The keys of all records.
pub const RECORD_KEYS: &str = "*.*";

/// The room of a [`record_key`].
#[must_use]
pub fn parse_record_key(key: &str) -> Option<RoomId> {
    let (namespace, name) = key.split_once('.')?;
    RoomId::from_parts(namespace, name).ok()
}

/// Key of a user's entry of a room.
#[must_use]
pub fn inbox_key(user: &str, room: &RoomId) -> String {
    format!("{}.{}", key_escape(user), record_key(room))
}

/// The keys of all rooms that a user is or was in.
#[must_use]
pub fn inbox_keys(user: &str) -> String {
    format!("{}.*.*", key_escape(user))
}

/// User and room of an [`inbox_key`].
#[must_use]
pub fn parse_inbox_key(key: &str) -> Option<(String, RoomId)> {
    let (user, room) = key.split_once('.')?;
    Some((header_unescape(user).into_owned(), parse_record_key(room)?))
}

/// Key of a user's devices.
#[must_use]
pub fn device_key(user: &str) -> String {
    key_escape(user).into_owned()
}

/// Key of the fact that a user has blocked another one. It has one token more than an [`inbox_key`].
#[must_use]
pub fn block_key(user: &str, other: &str) -> String {
    format!("{}.blocks.user.{}", key_escape(user), key_escape(other))
}

/// The keys of the blocks of a user.
#[must_use]
pub fn block_keys(user: &str) -> String {
    format!("{}.blocks.user.*", key_escape(user))
}

/// The keys of all blocks.
pub const BLOCK_KEYS: &str = "*.blocks.user.*";

/// The two users of a [`block_key`].
#[must_use]
pub fn parse_block_key(key: &str) -> Option<(String, String)> {
    let (user, other) = key.split_once(".blocks.user.")?;
    let name = |text: &str| header_unescape(text).into_owned();
    Some((name(user), name(other)))
}

/// A key of the bucket `control`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ControlKey {
    /// Tokens of this user are revoked: `revoke.user.<user>`.
    RevokedUser(String),
    /// The token with this `jti` is revoked: `revoke.jti.<jti>`.
    RevokedToken(String),
    /// Whether this user is blocked: `block.user.<user>`.
    BlockedUser(String),
}

impl fmt::Display for ControlKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (about, name) = match self {
            Self::RevokedUser(user) => ("revoke.user", user),
            Self::RevokedToken(jti) => ("revoke.jti", jti),
            Self::BlockedUser(user) => ("block.user", user),
        };
        write!(f, "{about}.{}", key_escape(name))
    }
}

/// Parses a [`ControlKey`].
#[must_use]
pub fn parse_control_key(key: &str) -> Option<ControlKey> {
    let (about, name) = key.rsplit_once('.')?;
    let name = header_unescape(name).into_owned();
    match about {
        "revoke.user" => Some(ControlKey::RevokedUser(name)),
        "revoke.jti" => Some(ControlKey::RevokedToken(name)),
        "block.user" => Some(ControlKey::BlockedUser(name)),
        _ => None,
    }
}

/// Keys of the bucket `control` with the rules that every edge must obey, except those about erased messages.
pub const CONTROL_RULES: &str = "*.*.*";

/// Keys of the bucket `control` that name the rooms or users whose messages were erased.
pub const ERASED_SETS: &str = "erased.set.*";

/// Key of a set of erased messages.
#[must_use]
pub fn erased_set_key(set: &str) -> String {
    format!("erased.set.{set}")
}

/// The set of an [`erased_set_key`].
#[must_use]
pub fn parse_erased_set_key(key: &str) -> Option<&str> {
    key.strip_prefix("erased.set.")
}

/// Key of a chunk of a set of erased messages. It has one more token than [`CONTROL_RULES`], so chunks are not read
/// with the rest.
#[must_use]
pub fn erased_ids_key(set: &str, chunk: usize) -> String {
    format!("erased.ids.{set}.{chunk}")
}

/// JetStream's own API, in the domain of the connection.
pub mod api {
    use crate::model::Region;

    /// Whether JetStream is available, and its usage by this account.
    pub const INFO: &str = "$JS.API.INFO";
    /// The user of the connection, and its permissions.
    pub const USER_INFO: &str = "$SYS.REQ.USER.INFO";
    /// Asks all servers for a report, as a user of the system account: `VARZ`, `GATEWAYZ`.
    pub const PING_SERVERS: &str = "$SYS.REQ.SERVER.PING.";
    /// Names of streams, one page per request.
    pub const STREAM_NAMES: &str = "$JS.API.STREAM.NAMES";

    /// Prefix of the subjects that announce a new leader of a replicated stream; the stream's name follows.
    pub const LEADER_ELECTED: &str = "$JS.EVENT.ADVISORY.STREAM.LEADER_ELECTED.";

    /// Prefix of the subjects for acknowledgements to a consumer.
    pub const ACK: &str = "$JS.ACK.";

    /// A stream's state and configuration.
    #[must_use]
    pub fn stream_info(stream: &str) -> String {
        format!("$JS.API.STREAM.INFO.{stream}")
    }

    /// Create a stream.
    #[must_use]
    pub fn stream_create(stream: &str) -> String {
        format!("$JS.API.STREAM.CREATE.{stream}")
    }

    /// Remove messages of a stream.
    #[must_use]
    pub fn stream_purge(stream: &str) -> String {
        format!("$JS.API.STREAM.PURGE.{stream}")
    }

    /// Reads a message, as JSON.
    #[must_use]
    pub fn message_get(stream: &str) -> String {
        format!("$JS.API.STREAM.MSG.GET.{stream}")
    }

    /// Remove one message of a stream.
    #[must_use]
    pub fn message_delete(stream: &str) -> String {
        format!("$JS.API.STREAM.MSG.DELETE.{stream}")
    }

    /// Create a durable consumer, or change it.
    #[must_use]
    pub fn consumer_create(stream: &str, consumer: &str) -> String {
        format!("$JS.API.CONSUMER.CREATE.{stream}.{consumer}")
    }

    /// A consumer's state and configuration.
    #[must_use]
    pub fn consumer_info(stream: &str, consumer: &str) -> String {
        format!("$JS.API.CONSUMER.INFO.{stream}.{consumer}")
    }

    /// Ask a pull consumer for messages.
    #[must_use]
    pub fn consumer_next(stream: &str, consumer: &str) -> String {
        format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}")
    }

    /// Change a stream.
    #[must_use]
    pub fn stream_update(stream: &str) -> String {
        format!("$JS.API.STREAM.UPDATE.{stream}")
    }

    /// Ask all instances of a micro service for their statistics.
    #[must_use]
    pub fn service_stats(service: &str) -> String {
        format!("$SRV.STATS.{service}")
    }

    /// Delete a stream with all it holds.
    #[must_use]
    pub fn stream_delete(stream: &str) -> String {
        format!("$JS.API.STREAM.DELETE.{stream}")
    }

    /// The API of another region's domain, as a mirror's configuration names it.
    #[must_use]
    pub fn of(region: &Region) -> String {
        format!("$JS.{region}.API")
    }

    /// Requests for consumers to the API of any domain, as mirrors send them to their origins. They contain only the
    /// name of the stream, since natter's mirrors have no filter.
    pub const CONSUMER_REQUESTS: &str = "$JS.*.API.CONSUMER.CREATE.*";

    /// Such a request, in the own domain.
    #[must_use]
    pub fn consumer_request(stream: &str) -> String {
        format!("$JS.API.CONSUMER.CREATE.{stream}")
    }

    /// Answers to the requests of mirrors, between servers.
    pub const CONSUMER_ANSWERS: &str = "$JSC.R.>";

    /// Metadata key of a mirror's consumer: the domain that the mirror is in.
    pub const MIRROR_DOMAIN_METADATA: &str = "_nats.mirror.domain";

    /// The region to whose API a subject of [`CONSUMER_REQUESTS`] leads.
    #[must_use]
    pub fn consumer_origin(subject: &str) -> Option<Region> {
        let (domain, _) = subject.strip_prefix("$JS.")?.split_once('.')?;
        Region::parse(domain)
    }

    /// The same request to the API of a region's domain, from any connection of the mesh.
    #[must_use]
    pub fn in_domain(region: &Region, request: &str) -> String {
        let rest = request.strip_prefix("$JS.API").unwrap_or(request);
        format!("{}{rest}", of(region))
    }
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
        fn no_accepted_room_leaves_its_own_subject(text in "\\PC{0,80}|[A-Za-z0-9_.:*>$ \\r\\n-]{0,80}|[A-Za-z0-9_-]{1,70}:[A-Za-z0-9_-]{1,70}|[a-z]{1,9}:([a-z_]|=2[0-9A-F]|=EC=84=9C){1,9}") {
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

        /// Whatever the name of a user: their keys have exactly the tokens of such a key and lead back to them.
        #[test]
        fn keys_lead_back_to_user_room_and_lease(
            user in "\\PC{1,40}|[A-Za-z0-9_.:*>$= \\r\\n-]{1,40}",
            name in "[a-z.=* ]{1,9}",
        ) {
            let room = RoomId::named("chat", &name).unwrap();
            let key = presence_key(&room, &user, "edge-1_x");
            prop_assert_eq!(key.split('.').count(), 4);
            prop_assert!(!key.contains(['*', '>', ' ', '\r', '\n', '$', ':']));
            prop_assert_eq!(parse_presence_key(&key), Some((user.clone(), "edge-1_x")));
            prop_assert_eq!(parse_marker_key(&marker_key(&room, &user)), Some((room, user)));
        }
    }

    #[test]
    fn filters_of_rooms_do_not_overlap() {
        let subjects = Subjects::new("natter");
        let region = Region::parse("seoul").unwrap();
        let of = |patterns: &[&str], classes: &[Class]| {
            let scope = RoomScope::of_patterns(patterns.iter().copied()).unwrap();
            subjects.stored_of(&region, 2, &scope, classes)
        };
        assert_eq!(
            of(
                &["chat:a", "chat:*", "chat:*", "crew:b", "crew:b"],
                &[Class::Msg]
            ),
            [
                "natter.in.seoul.2.chat.*.msg",
                "natter.in.seoul.2.crew.b.msg"
            ]
        );
        assert_eq!(
            of(&["chat:a", "*:*"], &[Class::Msg, Class::Ev]),
            ["natter.in.seoul.2.*.*.msg", "natter.in.seoul.2.*.*.ev"]
        );
    }

    #[test]
    fn subjects_of_undelivered_messages_lead_back() {
        let subjects = Subjects::new("natter");
        let stored = "natter.in.seoul.3.chat.lobby.msg";
        let subject = subjects.undelivered("worker", "translate", stored).unwrap();
        assert_eq!(
            subject,
            "natter.undelivered.seoul.worker.translate.3.chat.lobby.msg"
        );
        let found = subjects.undelivered_stored(&subject);
        assert_eq!(found, Some(("translate", stored.to_owned())));
        assert_eq!(subjects.undelivered_stored(stored), None);
    }

    #[test]
    fn names_of_streams_lead_back_to_origin_and_partition() {
        let region = Region::parse("us-east").unwrap();
        assert_eq!(
            parse_rooms_stream(&rooms_stream(&region, 12)),
            Some((region.clone(), 12))
        );
        for other in ["ROOMS_us", "ROOMS_US_1", "KV_x_1", "ROOMS_us_x", "ROOMS__1"] {
            assert_eq!(parse_rooms_stream(other), None, "{other}");
        }
        assert_eq!(bucket_stream("presence", &region), "KV_presence_us-east");
    }

    #[test]
    fn keys_of_the_control_bucket_are_read_back() {
        for key in [
            ControlKey::RevokedUser("kim@x.org".to_owned()),
            ControlKey::RevokedToken("a.b c".to_owned()),
            ControlKey::BlockedUser("zoë".to_owned()),
        ] {
            assert_eq!(parse_control_key(&key.to_string()), Some(key));
        }
        assert_eq!(
            ControlKey::RevokedUser("k.m".to_owned()).to_string(),
            "revoke.user.k=2Em"
        );
        for other in ["", "revoke", "revoke.user", "close.room.x"] {
            assert_eq!(parse_control_key(other), None, "{other}");
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
            subjects.live_namespace(&seoul, "chat", Class::Msg),
            "natter.live.seoul.*.*.chat.*.msg"
        );
        assert_eq!(
            subjects.live_class(&seoul, 3, &room, Class::Ev),
            "natter.live.seoul.*.3.chat.lobby.ev"
        );
        let ephemeral = subjects.ephemeral(&room);
        assert_eq!(subjects.parse_ephemeral(&ephemeral), Some(room.clone()));
        assert_eq!(
            subjects.republished(&seoul, &virginia, 0),
            "natter.live.seoul.virginia.0.>"
        );
        assert_eq!(subjects.by_hand(&room), "natter.pub.chat.lobby");
        let change = "natter.kv.seoul.virginia.presence.chat.lobby.kim=40x.e1";
        assert_eq!(
            subjects.parse_change(change, bucket::PRESENCE),
            Some((virginia.clone(), "chat.lobby.kim=40x.e1"))
        );
        assert_eq!(presence_key(&room, "kim@x", "e1"), "chat.lobby.kim=40x.e1");
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
