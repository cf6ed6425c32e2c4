//! The closed list of metrics: only those in [`Counter`], [`Gauge`] and [`Histogram`] are measured.
//!
//! A metric is one line below: its doc comment is the help text, its name is dotted lower case by domain, and the unit
//! is given to the instrument, not in the name. A label is an enum, so that its values are a closed set: never a room,
//! user or session. To add a metric, add its line; to add a label, add its enum to `labels!`.
//!
//! Counters and gauges are plain atomics, so counting a message is one relaxed addition without a lookup. The exporters
//! (Prometheus and OTLP) read them through observable instruments when they collect. The values belong to the process:
//! edges in the same process (in tests) share them.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use opentelemetry::{
    KeyValue,
    metrics::{Histogram as OtelHistogram, Meter},
};

use crate::protocol::{Close, Codec, ErrorCode};

/// A closed set of label values.
pub trait Label: Copy + 'static {
    /// Name of the label.
    const NAME: &'static str;
    /// Every value, at its [`index`](Label::index).
    const ALL: &'static [Self];
    /// The value as exported.
    fn value(self) -> &'static str;
    /// Its index in [`ALL`](Label::ALL).
    fn index(self) -> usize;
}

impl Label for ErrorCode {
    const NAME: &'static str = "code";
    const ALL: &'static [Self] = &ErrorCode::ALL;

    fn value(self) -> &'static str {
        self.as_str()
    }

    fn index(self) -> usize {
        self as usize
    }
}

impl Label for Close {
    const NAME: &'static str = "code";
    const ALL: &'static [Self] = &Close::ALL;

    fn value(self) -> &'static str {
        self.reason()
    }

    fn index(self) -> usize {
        self as usize
    }
}

impl Label for Codec {
    const NAME: &'static str = "protocol";
    const ALL: &'static [Self] = Codec::ALL;

    fn value(self) -> &'static str {
        self.name()
    }

    fn index(self) -> usize {
        self.number()
    }
}

/// Declares labels whose values are names of the configuration: those of a process are set once, when it starts, and all
/// other places have no series.
macro_rules! named {
    ($( $(#[$doc:meta])* $name:ident $label:literal $most:path, $names:ident $all:ident, $set:ident $find:ident; )+) => {
        $(
            static $names: OnceLock<Vec<&'static str>> = OnceLock::new();

            $(#[$doc])*
            #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
            pub struct $name(u8);

            /// Every place.
            const $all: [$name; $most] = {
                let mut all = [$name(0); $most];
                let mut at = 0_u8;
                while (at as usize) < $most {
                    all[at as usize] = $name(at);
                    at += 1;
                }
                all
            };

            impl Label for $name {
                const NAME: &'static str = $label;
                const ALL: &'static [Self] = &$all;

                fn value(self) -> &'static str {
                    let names = $names.get();
                    let name = names.and_then(|names| names.get(self.index()));
                    name.copied().unwrap_or_default()
                }

                fn index(self) -> usize {
                    usize::from(self.0)
                }
            }

            /// Gives the labels of this process their names, before telemetry is set up. Later calls have no effect.
            pub fn $set<'n>(names: impl IntoIterator<Item = &'n str>) {
                $names.get_or_init(|| {
                    let names = names.into_iter().take($most);
                    // A few names, for as long as the process lives.
                    names.map(|name| &*name.to_owned().leak()).collect()
                });
            }

            /// The label of a name of this process.
            #[must_use]
            pub fn $find(name: &str) -> Option<$name> {
                let at = $names.get()?.iter().position(|its| *its == name)?;
                $all.get(at).copied()
            }
        )+
    };
}

named! {
    /// A worker, by its place in the configuration.
    WorkerLabel "worker" crate::config::MAX_WORKERS, WORKER_NAMES WORKER_LABELS, name_workers worker_label;
    /// A hook, by its place in the configuration.
    HookLabel "hook" crate::config::MAX_HOOKS, HOOK_NAMES HOOK_LABELS, name_hooks hook_label;
}

/// Declares label enums: `Name "label" { Variant "value", … }`.
macro_rules! labels {
    ($( $(#[$doc:meta])* $name:ident $label:literal { $( $variant:ident $value:literal ),+ $(,)? } )+) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
            pub enum $name { $( $variant ),+ }

            impl Label for $name {
                const NAME: &'static str = $label;
                const ALL: &'static [Self] = &[$( Self::$variant ),+];

                fn value(self) -> &'static str {
                    match self { $( Self::$variant => $value ),+ }
                }

                fn index(self) -> usize {
                    self as usize
                }
            }
        )+
    };
}

labels! {
    /// A command of the native protocol; `unknown` for every other word.
    Op "op" {
        Auth "auth", Join "join", Leave "leave", Send "send", Typing "typing", Read "read",
        Presence "presence", Readers "readers", Unread "unread", History "history",
        Search "search", Create "create", Room "room", Settings "settings", Member "member",
        Arrange "arrange", Block "block", Inbox "inbox", Watch "watch", Unwatch "unwatch", Refresh "refresh", Ping "ping", Unknown "unknown",
    }
    /// How a message was published and where it went: into a stream, or past all streams.
    Published "kind" {
        Durable "durable", Ephemeral "ephemeral", HttpDurable "http_durable",
        HttpEphemeral "http_ephemeral",
    }
    /// Why a publish failed, or its outcome is unknown.
    PublishFault "reason" {
        Unavailable "unavailable", UnknownOutcome "unknown_outcome", StreamFull "stream_full",
        Refused "refused",
    }
    /// Where a replayed message was read.
    Source "source" { Ring "ring", Stream "stream" }
    /// Why a message was not shown again.
    Suppressed "reason" { Old "old", Duplicate "duplicate" }
    /// Why a message did not reach a session, or no session at all.
    Dropped "reason" {
        BadSubject "bad_subject", BadMessage "bad_message", UnknownOrigin "unknown_origin",
        NotStored "not_stored", Trimmed "trimmed", Erased "erased",
    }
    /// The start of a join: nothing to replay, replay from memory or from the stream, or a reset.
    Joined "result" {
        Live "live", Ring "ring", Stream "stream", Ephemeral "ephemeral",
        ResetTrimmed "reset_trimmed", ResetEpoch "reset_epoch", ResetFuture "reset_future",
        ResetReplayMax "reset_replay_max", ResetOtherOrigin "reset_other_origin",
        Unavailable "unavailable",
    }
    /// The answer of the registry of uploads.
    UploadGrant "result" { Granted "granted", Limit "limit", Unavailable "unavailable" }
    /// The verdict of the worker that checks files.
    UploadVerdict "result" { Clean "clean", Infected "infected" }
    /// The end of an upload to the local storage: the file was stored, had another size than announced, did not arrive,
    /// was being uploaded by another request, or could not be written.
    UploadEnd "result" {
        Stored "stored", WrongSize "wrong_size", Aborted "aborted", Busy "busy", Failed "failed",
    }
    /// How a gap was noticed.
    GapCause "cause" {
        Sequence "sequence", Reconnect "reconnect", Overflow "overflow", Resync "resync",
    }
    /// A call of the operating system: a read or a write of the socket of a client, or of a connection to NATS that carries
    /// messages.
    SocketCall "call" {
        ClientRead "client_read", ClientWrite "client_write", NatsRead "nats_read", NatsWrite "nats_write",
    }
    /// The result of writing a read marker. On a conflict with another writer, the marker is merged and written again.
    MarkerWrite "result" { Written "written", Conflict "conflict", Failed "failed" }
    /// Why a read receipt was not shown: it has no user or no cursor, the room has no log, the cursor belongs to
    /// another log, or more members want receipts than `limits.read_push_max`.
    ReceiptFault "reason" {
        Malformed "malformed", Ephemeral "ephemeral", Epoch "epoch", PushMax "push_max",
    }
    /// Why a connection was refused.
    Admission "reason" {
        Draining "draining", PerUser "per_user", PerAddress "per_address", BadToken "bad_token",
        BadHandshake "bad_handshake", FirstFrame "first_frame",
    }
    /// What members were told about presence: that a user came or left, or the number of users.
    PresencePush "kind" { User "user", Count "count" }
    /// Which lease ended: the edge's own, or that of another edge.
    LeaseEnd "whose" { Lost "own", Seen "other" }
    /// The effect of a message of a log on the history: a document, a change of one, or nothing.
    HistoryEntry "kind" { Message "message", Change "change", Nothing "nothing" }
    /// What an answer from the history was made of: MongoDB and the streams, only what was available of both, only the
    /// streams, read by the edge itself; or nothing.
    HistoryAnswer "source" { Full "full", Partial "partial", Streams "streams", Failed "failed" }
    /// A service that delivers notifications.
    PushService "kind" { Webpush "webpush", Fcm "fcm", Apns "apns", Webhook "webhook" }
    /// Why somebody who could have been notified of a message was not: had a session, had read it, had muted the room, had
    /// blocked the sender, had quiet hours, or was notified by an earlier attempt.
    PushSkip "reason" {
        Present "present", Read "read", Muted "muted", Blocked "blocked", Quiet "quiet", Repeated "repeated",
    }
    /// How a token was verified.
    TokenCheck "check" { Signature "signature", Cached "cached" }
    /// Why a token was refused.
    TokenFault "reason" {
        NoKey "no_key", Malformed "malformed", Algorithm "algorithm", Signature "signature",
        Claim "claim", Expired "expired", NotYetValid "not_yet_valid", Revoked "revoked", Issuer "issuer",
        Audience "audience",
    }
}

/// An entry of the list.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Dotted name.
    pub name: &'static str,
    /// Unit, in UCUM.
    pub unit: &'static str,
    /// Help text.
    pub help: &'static str,
    /// Its label, if it has one.
    pub label: Option<LabelSet>,
}

/// The label of a metric.
#[derive(Debug, Clone, Copy)]
pub struct LabelSet {
    /// Name of the label.
    pub name: &'static str,
    values: fn() -> Vec<&'static str>,
}

impl LabelSet {
    const fn of<L: Label>() -> Self {
        Self {
            name: L::NAME,
            // Only the last ones can have no name.
            values: || {
                let all = L::ALL.iter().map(|label| label.value());
                all.take_while(|value| !value.is_empty()).collect()
            },
        }
    }

    /// Every value it can have.
    #[must_use]
    pub fn values(&self) -> Vec<&'static str> {
        (self.values)()
    }
}

/// `Some($x)` of the only repetition, or `None`.
macro_rules! optional {
    () => {
        None
    };
    ($x:expr) => {
        Some($x)
    };
}

/// Declares counters or gauges, and the constants that say where their values are: doc,
/// `Name(label: Type) = "dotted.name", "unit";`
macro_rules! counted {
    ($(#[doc = $enum_doc:literal])+ $enum:ident, $place:ident, $widths:ident, $bases:ident, $slots:ident;
     $( $(#[doc = $help:literal])+ $name:ident $( ($arg:ident: $label:ty) )? = $dotted:literal, $unit:literal; )+) => {
        $(#[doc = $enum_doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $enum {
            $( $(#[doc = $help])+ $name $( ($label) )? ),+
        }

        enum $place { $( $name ),+ }

        /// The number of values of each: one, or one per label value.
        const $widths: [usize; $enum::LIST.len()] = [$( 1 $( * <$label as Label>::ALL.len() )? ),+];

        /// The index of the first value of each.
        const $bases: [usize; $enum::LIST.len()] = bases($widths);

        const $slots: usize = $bases[$bases.len() - 1] + $widths[$widths.len() - 1];

        impl $enum {
            /// All of them.
            pub const LIST: &'static [Metric] = &[$( Metric {
                name: $dotted,
                unit: $unit,
                help: concat!($( $help ),+).trim_ascii(),
                label: optional!($( LabelSet::of::<$label>() )?),
            } ),+];

            #[inline]
            fn slot(self) -> usize {
                match self {
                    $( Self::$name $( ($arg) )? => $bases[$place::$name as usize] $( + $arg.index() )? ),+
                }
            }
        }
    };
}

/// Declares histograms: doc, `Name = "dotted.name", "unit";`
macro_rules! plain {
    ($(#[doc = $enum_doc:literal])+ $enum:ident; $( $(#[doc = $help:literal])+ $name:ident = $dotted:literal, $unit:literal; )+) => {
        $(#[doc = $enum_doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $enum { $( $(#[doc = $help])+ $name ),+ }

        impl $enum {
            /// All of them.
            pub const LIST: &'static [Metric] = &[$( Metric {
                name: $dotted,
                unit: $unit,
                help: concat!($( $help ),+).trim_ascii(),
                label: None,
            } ),+];
        }
    };
}

counted! {
    /// Events, counted since the process started.
    Counter, CounterPlace, COUNTER_WIDTHS, COUNTER_BASES, COUNTER_SLOTS;
    /// Sessions opened: the WebSocket handshake is done.
    SessionOpened(protocol: Codec) = "natter.session.opened", "{session}";
    /// Sessions that were moved to the shard of their first room.
    SessionMoved = "natter.session.moved", "{session}";
    /// Sessions closed, by the reason of the close frame.
    SessionClosed(close: Close) = "natter.session.closed", "{session}";
    /// Connections that did not become sessions with a user.
    SessionRefused(reason: Admission) = "natter.session.refused", "{session}";
    /// Bad logins of STOMP whose answer waited, because there were more than `limits.bad_logins_per_second`.
    LoginDelayed = "natter.session.login_delayed", "{login}";
    /// Tokens accepted.
    TokenVerified(check: TokenCheck) = "natter.token.verified", "{token}";
    /// Tokens refused.
    TokenRefused(reason: TokenFault) = "natter.token.refused", "{token}";
    /// Commands received from sessions.
    CommandReceived(op: Op) = "natter.command.received", "{command}";
    /// Commands and HTTP requests answered with an error.
    CommandRefused(code: ErrorCode) = "natter.command.refused", "{command}";
    /// Changes of room records that this edge has written.
    RecordChanged = "natter.record.changed", "{change}";
    /// Entries of the index of users that could not be written. They are repaired later.
    IndexFailed = "natter.record.index_failed", "{entry}";
    /// Entries of the index of users that this history service has repaired.
    IndexRepaired = "natter.record.index_repaired", "{entry}";
    /// Signals to users who watch that this edge has published: one per named member of a room and message.
    SignalPublished = "natter.signal.published", "{signal}";
    /// Signals received for users who watch here.
    SignalReceived = "natter.signal.received", "{signal}";
    /// Messages received because a session watches their rooms by name or by pattern.
    WatchReceived = "natter.watch.received", "{message}";
    /// Summaries of rooms handed to sessions that watch.
    SummaryDelivered = "natter.inbox.delivered", "{summary}";
    /// Messages that clients published, and that were stored or (ephemeral) sent on.
    MessagePublished(kind: Published) = "natter.message.published", "{message}";
    /// Messages that were already stored when they were published again with the same id.
    PublishDuplicate = "natter.publish.duplicate", "{message}";
    /// Publishes that failed.
    PublishFailed(reason: PublishFault) = "natter.publish.failed", "{message}";
    /// Message frames handed to sessions, live and replayed.
    MessageDelivered = "natter.message.delivered", "{message}";
    /// Message frames handed to sessions as backlog of a join.
    MessageReplayed(source: Source) = "natter.message.replayed", "{message}";
    /// Messages received again from NATS and not shown again.
    MessageSuppressed(reason: Suppressed) = "natter.message.suppressed", "{message}";
    /// Messages dropped. In a durable room they are replayed later, or the session resumes after them.
    MessageDropped(reason: Dropped) = "natter.message.dropped", "{message}";
    /// Messages shown before a message that their sender had seen, because that did not arrive within
    /// `rooms.causal_wait`.
    MessageCausalTimeout = "natter.message.causal_timeout", "{message}";
    /// Joins answered, by how they started.
    JoinResult(result: Joined) = "natter.join.result", "{join}";
    /// Gaps noticed in a room's sequence, or suspected.
    GapDetected(cause: GapCause) = "natter.gap.detected", "{gap}";
    /// Messages read from the stream to close a gap.
    GapFilled = "natter.gap.filled", "{message}";
    /// Requests for a range of a room, read from the stream.
    ReplayRequests = "natter.replay.requests", "{request}";
    /// Requests for a range that joined one already in progress.
    ReplayCoalesced = "natter.replay.coalesced", "{request}";
    /// Requests for a range that failed.
    ReplayFailed = "natter.replay.failed", "{request}";
    /// Calls of the operating system for sockets: of clients, and of the connections to NATS that carry messages.
    SocketCalls(call: SocketCall) = "natter.socket.calls", "{call}";
    /// Times a connection to NATS was established, including the first time.
    NatsConnects = "natter.nats.connects", "{connection}";
    /// Times a NATS subscription reported that it dropped messages; they are read from the stream.
    NatsSlowConsumer = "natter.nats.slow_consumer", "{event}";
    /// Writes of read markers to their bucket.
    MarkerWrites(result: MarkerWrite) = "natter.marker.writes", "{write}";
    /// Requests for read markers to their bucket, each for many keys.
    MarkerLoads = "natter.marker.loads", "{request}";
    /// Read markers written in place of their edge, which died before it could.
    MarkerRepaired = "natter.marker.repaired", "{marker}";
    /// Read receipts published.
    ReceiptPublished = "natter.receipt.published", "{receipt}";
    /// Read receipts handed to sessions.
    ReceiptDelivered = "natter.receipt.delivered", "{receipt}";
    /// Read receipts not shown.
    ReceiptDropped(reason: ReceiptFault) = "natter.receipt.dropped", "{receipt}";
    /// Requests to NATS for counts of unread messages: markers, heads and counts.
    UnreadRequests = "natter.unread.requests", "{request}";
    /// Typing notices that clients sent and that were published.
    TypingPublished = "natter.typing.published", "{notice}";
    /// Typing frames handed to sessions.
    TypingDelivered = "natter.typing.delivered", "{notice}";
    /// Keys of users in rooms written or removed.
    PresenceWrites = "natter.presence.writes", "{write}";
    /// Writes of such keys that failed and were repeated.
    PresenceWriteFailed = "natter.presence.write_failed", "{write}";
    /// Presence pushes made, each counted once for all members of the room.
    PresencePushed(kind: PresencePush) = "natter.presence.pushed", "{push}";
    /// Presence frames handed to sessions.
    PresenceDelivered = "natter.presence.delivered", "{frame}";
    /// Rooms whose users were read from NATS.
    PresenceScans = "natter.presence.scans", "{room}";
    /// Leases of edges that ended.
    LeaseEnded(whose: LeaseEnd) = "natter.lease.ended", "{lease}";
    /// Messages of the log written to MongoDB and acknowledged by its majority.
    HistoryWritten(kind: HistoryEntry) = "natter.history.written", "{message}";
    /// Batches written to MongoDB.
    HistoryBatches = "natter.history.batches", "{batch}";
    /// Batches that MongoDB did not accept and that were repeated.
    HistoryBatchFailed = "natter.history.batch_failed", "{batch}";
    /// Messages that MongoDB refused, counted at each redelivery.
    HistoryRefused = "natter.history.refused", "{message}";
    /// Documents from which reactions or annotations were left out because there are more than are kept.
    HistoryTruncated = "natter.history.truncated", "{message}";
    /// Messages that went to the dead-letter stream.
    HistoryDead = "natter.history.dead", "{message}";
    /// Requests for pages and searches answered.
    HistoryAnswered(source: HistoryAnswer) = "natter.history.answered", "{request}";
    /// Messages erased from MongoDB and the streams.
    HistoryErased = "natter.history.erased", "{message}";
    /// Messages removed from MongoDB because they are older than `history_keep` of their namespace.
    HistoryExpired = "natter.history.expired", "{message}";
    /// Messages removed from the streams: duplicates with the same id, or erased before.
    HistoryRemoved = "natter.history.removed", "{message}";
    /// Answers of workers that became annotations.
    WorkerAnnotated(worker: WorkerLabel) = "natter.worker.annotated", "{message}";
    /// Messages to which a worker had nothing to say.
    WorkerEmpty(worker: WorkerLabel) = "natter.worker.empty", "{message}";
    /// Messages that a worker refused for good, or to which it gave an answer that can't be used.
    WorkerRejected(worker: WorkerLabel) = "natter.worker.rejected", "{message}";
    /// Requests to a worker that failed; another attempt is made, or the message becomes a dead letter.
    WorkerFailed(worker: WorkerLabel) = "natter.worker.failed", "{request}";
    /// Messages older than `max_age` of a worker, which were skipped.
    WorkerExpired(worker: WorkerLabel) = "natter.worker.expired", "{message}";
    /// Messages for a worker that went to the dead letters.
    WorkerDead(worker: WorkerLabel) = "natter.worker.dead", "{message}";
    /// Messages for the worker `uploads.scan` that were skipped although their dead letter could not be kept.
    WorkerLost(worker: WorkerLabel) = "natter.worker.lost", "{message}";
    /// Alerts that the annotations of a worker have raised.
    WorkerAlerts(worker: WorkerLabel) = "natter.worker.alerts", "{alert}";
    /// Events that a hook has accepted.
    HookDelivered(hook: HookLabel) = "natter.hook.delivered", "{event}";
    /// Requests to a hook that failed; another attempt is made, or the event becomes a dead letter.
    HookFailed(hook: HookLabel) = "natter.hook.failed", "{request}";
    /// Entries of logs whose events went to the dead letters of a hook.
    HookDead(hook: HookLabel) = "natter.hook.dead", "{message}";
    /// Notifications that a service has accepted.
    PushSent(service: PushService) = "natter.push.sent", "{notification}";
    /// Notifications that a service refused, or whose fate is not known. They are not repeated.
    PushFailed(service: PushService) = "natter.push.failed", "{notification}";
    /// Devices that were removed because their service says that they are gone.
    PushGone(service: PushService) = "natter.push.gone", "{device}";
    /// Users with devices who were not notified of a message.
    PushSkipped(reason: PushSkip) = "natter.push.skipped", "{user}";
    /// Messages older than `push.max_age`, of which nobody was notified.
    PushExpired = "natter.push.expired", "{message}";
    /// Uploads that clients asked for.
    UploadGranted(result: UploadGrant) = "natter.upload.granted", "{upload}";
    /// Files that edges received for the local storage.
    UploadReceived(result: UploadEnd) = "natter.upload.received", "{upload}";
    /// Verdicts that the history service took from the annotations of the worker `uploads.scan`, repeats included.
    UploadJudged(result: UploadVerdict) = "natter.upload.judged", "{upload}";
    /// Uploads that no message named in time.
    UploadUnused = "natter.upload.unused", "{upload}";
    /// Files removed from the storage, whether they were there or not.
    UploadRemoved = "natter.upload.removed", "{upload}";
    /// Removals of files that failed and will be repeated.
    UploadRemovalFailed = "natter.upload.removal_failed", "{upload}";
}

counted! {
    /// Current values.
    Gauge, GaugePlace, GAUGE_WIDTHS, GAUGE_BASES, GAUGE_SLOTS;
    /// Sessions that are open.
    SessionActive(protocol: Codec) = "natter.session.active", "{session}";
    /// Rooms with a subscription on this process.
    RoomActive = "natter.room.active", "{room}";
    /// Memberships: the sum of the rooms of all sessions.
    MemberActive = "natter.member.active", "{member}";
    /// Watches of sessions.
    Watching = "natter.session.watching", "{watch}";
    /// Subscriptions that these watches have.
    WatchSubscription = "natter.watch.subscriptions", "{subscription}";
    /// Sessions that are present in rooms.
    PresenceSessions = "natter.presence.sessions", "{session}";
    /// Rooms whose users are followed, because a session watches their presence.
    RosterActive = "natter.roster.active", "{room}";
    /// Connections to NATS that are up.
    NatsConnected = "natter.nats.connected", "{connection}";
    /// Bytes that wait for clients to read: outboxes, and replies on the way to them.
    OutboxBytes = "natter.outbox.size", "By";
    /// Bytes of messages that rooms keep in memory for sessions that resume.
    RingBytes = "natter.ring.memory", "By";
    /// Bytes of backlog in memory, until clients have read them.
    ReplayBytes = "natter.replay.memory", "By";
    /// Messages that the history service has not acknowledged yet.
    HistoryPending = "natter.history.pending", "{message}";
    /// Age of the oldest of them.
    HistoryLag = "natter.history.lag", "s";
    /// Messages in the dead-letter stream.
    HistoryDeadLetters = "natter.history.dead_letters", "{message}";
    /// Requests to push services that are open.
    PushOpen = "natter.push.open", "{request}";
    /// Messages that notifiers have not done yet, with those that wait until their readers are away.
    PushPending = "natter.push.pending", "{message}";
    /// Age of the oldest of them.
    PushLag = "natter.push.lag", "s";
    /// Requests to a worker that are open.
    WorkerOpen(worker: WorkerLabel) = "natter.worker.open", "{request}";
    /// Messages that a worker has not done yet.
    WorkerPending(worker: WorkerLabel) = "natter.worker.pending", "{message}";
    /// Age of the oldest message that was delivered to no process of a worker, or is not done.
    WorkerLag(worker: WorkerLabel) = "natter.worker.lag", "s";
    /// Dead letters of a worker.
    WorkerDeadLetters(worker: WorkerLabel) = "natter.worker.dead_letters", "{message}";
    /// Requests to a hook that are open.
    HookOpen(hook: HookLabel) = "natter.hook.open", "{request}";
    /// Entries of logs that are not done for a hook yet.
    HookPending(hook: HookLabel) = "natter.hook.pending", "{message}";
    /// Age of the oldest of them.
    HookLag(hook: HookLabel) = "natter.hook.lag", "s";
    /// Dead letters of a hook.
    HookDeadLetters(hook: HookLabel) = "natter.hook.dead_letters", "{message}";
    /// 1 if a hook is disabled, because its receiver answered 410.
    HookDisabled(hook: HookLabel) = "natter.hook.disabled", "{hook}";
}

plain! {
    /// Durations of operations that are rare compared to messages: each record takes a lock of the SDK.
    Histogram;
    /// From a request for a range of a room to its last message.
    ReplayDuration = "natter.replay.duration", "s";
    /// From a publish to the stream's acknowledgement.
    PublishDuration = "natter.publish.duration", "s";
    /// From a join command to its reply.
    JoinDuration = "natter.join.duration", "s";
    /// From the last message of a batch to MongoDB's acknowledgement.
    HistoryBatchDuration = "natter.history.batch_duration", "s";
    /// From a request for a page or a search to its answer.
    HistoryReadDuration = "natter.history.read_duration", "s";
    /// From a request to a push service to its answer, or to the timeout.
    PushRequestDuration = "natter.push.request_duration", "s";
    /// From a request to a worker to its answer, or to the timeout.
    WorkerRequestDuration = "natter.worker.request_duration", "s";
    /// From a request to a hook to its answer, or to the timeout.
    HookRequestDuration = "natter.hook.request_duration", "s";
}

/// Bounds of the buckets of every histogram, in seconds: from a local acknowledgement to a client's timeout.
const SECONDS: [f64; 14] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
];

/// For each width, the sum of those before it.
const fn bases<const N: usize>(widths: [usize; N]) -> [usize; N] {
    let mut bases = [0; N];
    let mut at = 1;
    while at < N {
        bases[at] = bases[at - 1] + widths[at - 1];
        at += 1;
    }
    bases
}

/// One value alone on its cache lines, so that shards that count different things do not slow each other down.
#[repr(align(128))]
struct Slot<T>(T);

static COUNTER_VALUES: [Slot<AtomicU64>; COUNTER_SLOTS] =
    [const { Slot(AtomicU64::new(0)) }; COUNTER_SLOTS];

static GAUGE_VALUES: [Slot<AtomicI64>; GAUGE_SLOTS] =
    [const { Slot(AtomicI64::new(0)) }; GAUGE_SLOTS];

/// Adds `n` to a counter. One relaxed addition: on the path of messages, count a batch at once.
#[inline]
pub fn count(counter: Counter, n: u64) {
    COUNTER_VALUES[counter.slot()].0.fetch_add(n, Relaxed);
}

/// The value of a counter.
#[must_use]
pub fn counted(counter: Counter) -> u64 {
    COUNTER_VALUES[counter.slot()].0.load(Relaxed)
}

/// Adds `by` (which may be negative) to a gauge. If the counted thing has an owner that is dropped, use [`Held`].
#[inline]
pub fn gauge_add(gauge: Gauge, by: i64) {
    GAUGE_VALUES[gauge.slot()].0.fetch_add(by, Relaxed);
}

/// The value of a gauge.
#[must_use]
pub fn gauge(gauge: Gauge) -> i64 {
    GAUGE_VALUES[gauge.slot()].0.load(Relaxed)
}

/// One unit of a gauge, subtracted when dropped: on every path, panics included.
#[derive(Debug)]
pub struct Held(Gauge);

impl Held {
    /// Adds one to `gauge` until dropped.
    #[must_use = "dropped at once, it counts nothing"]
    pub fn new(gauge: Gauge) -> Self {
        gauge_add(gauge, 1);
        Self(gauge)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        gauge_add(self.0, -1);
    }
}

/// Records a duration. It is discarded until telemetry is set up.
pub fn record(histogram: Histogram, duration: Duration) {
    if let Some(metrics) = super::exporters::installed() {
        metrics.record(histogram, duration);
    }
}

/// The labels of each value of a metric.
fn series(metric: &Metric) -> Vec<Vec<KeyValue>> {
    let Some(label) = &metric.label else {
        return vec![Vec::new()];
    };
    let values = label.values().into_iter();
    values
        .map(|value| vec![KeyValue::new(label.name, value)])
        .collect()
}

/// The instruments of `meter` for the whole list. The counters and gauges live as long as the meter's provider.
pub(super) fn instruments(meter: &Meter) -> Vec<OtelHistogram<f64>> {
    for (metric, base) in Counter::LIST.iter().zip(COUNTER_BASES) {
        let series = series(metric);
        meter
            .u64_observable_counter(metric.name)
            .with_description(metric.help)
            .with_unit(metric.unit)
            .with_callback(move |observer| {
                for (slot, labels) in COUNTER_VALUES[base..].iter().zip(&series) {
                    observer.observe(slot.0.load(Relaxed), labels);
                }
            })
            .build();
    }
    for (metric, base) in Gauge::LIST.iter().zip(GAUGE_BASES) {
        let series = series(metric);
        meter
            .i64_observable_gauge(metric.name)
            .with_description(metric.help)
            .with_unit(metric.unit)
            .with_callback(move |observer| {
                for (slot, labels) in GAUGE_VALUES[base..].iter().zip(&series) {
                    observer.observe(slot.0.load(Relaxed), labels);
                }
            })
            .build();
    }
    Histogram::LIST
        .iter()
        .map(|metric| {
            meter
                .f64_histogram(metric.name)
                .with_description(metric.help)
                .with_unit(metric.unit)
                .with_boundaries(SECONDS.to_vec())
                .build()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn list() -> impl Iterator<Item = &'static Metric> {
        Counter::LIST
            .iter()
            .chain(Gauge::LIST)
            .chain(Histogram::LIST)
    }

    #[test]
    fn the_list_is_well_named_and_documented() {
        let mut names = HashSet::new();
        for metric in list() {
            let Metric {
                name, help, unit, ..
            } = metric;
            assert!(names.insert(name), "{name} is there twice");
            assert!(name.starts_with("natter."), "{name}");
            assert!(
                name.split('.').count() == 3
                    && name
                        .bytes()
                        .all(|b| b.is_ascii_lowercase() || b == b'.' || b == b'_'),
                "{name} is not natter.domain.thing"
            );
            assert!(help.ends_with('.') && help.len() > 10, "{name}: {help:?}");
            assert!(
                ["s", "By"].contains(unit) || unit.starts_with('{') && unit.ends_with('}'),
                "{name}: unit {unit}"
            );
        }
    }

    #[test]
    fn labels_are_closed_sets_of_plain_words() {
        for metric in list() {
            let Some(label) = &metric.label else { continue };
            assert!(
                [
                    "code", "op", "kind", "reason", "source", "result", "cause", "check", "whose",
                    "protocol", "worker", "hook", "call"
                ]
                .contains(&label.name),
                "{}: label {} is not known; never a room, user or session",
                metric.name,
                label.name
            );
            let values = label.values();
            let distinct: HashSet<_> = values.iter().collect();
            assert_eq!(distinct.len(), values.len(), "{}: {values:?}", metric.name);
            for value in values {
                assert!(
                    value.bytes().all(|b| b.is_ascii_lowercase()
                        || b.is_ascii_digit()
                        || b"_.-".contains(&b)),
                    "{}: {value:?}",
                    metric.name
                );
            }
        }
    }

    #[test]
    fn every_label_value_stands_at_its_index() {
        fn check<L: Label + std::fmt::Debug>() {
            for (index, label) in L::ALL.iter().enumerate() {
                assert_eq!(label.index(), index, "{label:?}");
            }
        }
        check::<ErrorCode>();
        check::<Close>();
        check::<Codec>();
        check::<Op>();
        check::<Dropped>();
        check::<WorkerLabel>();
        check::<HookLabel>();
    }

    #[test]
    fn counters_do_not_share_a_place() {
        let mut slots = HashSet::new();
        let mut add = |counter: Counter| assert!(slots.insert(counter.slot()), "{counter:?}");
        Codec::ALL
            .iter()
            .for_each(|codec| add(Counter::SessionOpened(*codec)));
        add(Counter::SessionMoved);
        Close::ALL
            .into_iter()
            .for_each(|c| add(Counter::SessionClosed(c)));
        ErrorCode::ALL
            .into_iter()
            .for_each(|c| add(Counter::CommandRefused(c)));
        Op::ALL
            .iter()
            .for_each(|op| add(Counter::CommandReceived(*op)));
        add(Counter::MessageDelivered);
        add(Counter::TypingDelivered);
        let last = Counter::UploadRemovalFailed;
        add(last);
        assert_eq!(last.slot(), COUNTER_SLOTS - 1);
        let of = |codec: &Codec| Gauge::SessionActive(*codec).slot();
        let mut slots: HashSet<usize> = Codec::ALL.iter().map(of).collect();
        assert!(slots.insert(Gauge::RoomActive.slot()) && slots.len() == Codec::ALL.len() + 1);
        let last = HOOK_LABELS[HOOK_LABELS.len() - 1];
        assert_eq!(Gauge::HookDisabled(last).slot(), GAUGE_SLOTS - 1);
    }

    #[test]
    fn a_held_gauge_is_given_back_on_panic() {
        let before = gauge(Gauge::MemberActive);
        let caught = std::panic::catch_unwind(|| {
            let _held = Held::new(Gauge::MemberActive);
            assert_eq!(gauge(Gauge::MemberActive), before + 1);
            panic!("on purpose");
        });
        assert!(caught.is_err());
        assert_eq!(gauge(Gauge::MemberActive), before);
    }
}
