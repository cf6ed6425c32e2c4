//! What a join is answered with.

use crate::{model::Cursor, telemetry::metrics};

/// What the reply to a join says.
#[derive(Debug)]
pub struct Joined {
    /// Where the session stands before the backlog; `None` in an ephemeral room.
    pub cursor: Option<Cursor>,
    /// The room's newest place; `None` in an ephemeral room.
    pub head: Option<Cursor>,
    /// Messages that follow.
    pub replay: u64,
    /// Why the session can't go on where it was.
    pub reset: Option<ResetReason>,
}

/// Why a session can't go on at its cursor and has to load history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetReason {
    /// Messages after the cursor are not in the stream any more.
    Trimmed,
    /// The cursor is of another incarnation of the stream.
    Epoch,
    /// The cursor is beyond the newest message.
    Future,
    /// More messages or bytes than are replayed.
    ReplayMax,
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
            Self::Ephemeral => "ephemeral",
        }
    }

    /// As it is counted.
    pub(super) fn result(self) -> metrics::Joined {
        match self {
            Self::Trimmed => metrics::Joined::ResetTrimmed,
            Self::Epoch => metrics::Joined::ResetEpoch,
            Self::Future => metrics::Joined::ResetFuture,
            Self::ReplayMax => metrics::Joined::ResetReplayMax,
            Self::Ephemeral => metrics::Joined::Ephemeral,
        }
    }
}

/// A room can't be joined now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// NATS does not answer.
    #[error("the room's stream can't be read now")]
    Unavailable,
}
