//! The result of a join.

use crate::{model::Cursor, protocol::First, telemetry::metrics};

/// Where a session wants to begin in a room.
#[derive(Debug, Clone)]
pub enum JoinAt {
    /// After this place.
    After(Cursor),
    /// Before this message.
    Before(First),
}

/// Content of the reply to a join.
#[derive(Debug)]
pub struct Joined {
    /// Where the session stands before the backlog; `None` in an ephemeral room.
    pub cursor: Option<Cursor>,
    /// The room's head, raised to what the session has seen in other regions; `None` in an ephemeral room.
    pub head: Option<Cursor>,
    /// Number of messages that follow as the backlog.
    pub replay: u64,
    /// Why the session can't resume at its cursor.
    pub reset: Option<ResetReason>,
}

/// Why a session can't resume at its cursor and has to load history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetReason {
    /// Messages after the cursor are not in the stream any more.
    Trimmed,
    /// The cursor belongs to another incarnation of the stream.
    Epoch,
    /// The cursor is beyond the newest message.
    Future,
    /// There are more messages or bytes after the cursor than are replayed.
    ReplayMax,
    /// The client can't know which messages of other origins it has got, and there may be some.
    OtherOrigin,
    /// The room keeps no log.
    Ephemeral,
}

impl ResetReason {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Trimmed => "trimmed",
            Self::Epoch => "epoch",
            Self::Future => "future",
            Self::ReplayMax => "replay_max",
            Self::OtherOrigin => "other_origin",
            Self::Ephemeral => "ephemeral",
        }
    }

    /// The label under which the result is counted.
    pub(super) fn result(self) -> metrics::Joined {
        match self {
            Self::Trimmed => metrics::Joined::ResetTrimmed,
            Self::Epoch => metrics::Joined::ResetEpoch,
            Self::Future => metrics::Joined::ResetFuture,
            Self::ReplayMax => metrics::Joined::ResetReplayMax,
            Self::OtherOrigin => metrics::Joined::ResetOtherOrigin,
            Self::Ephemeral => metrics::Joined::Ephemeral,
        }
    }
}

/// A room can't be joined now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// NATS did not answer in time.
    #[error("the room's stream can't be read now")]
    Unavailable,
}
