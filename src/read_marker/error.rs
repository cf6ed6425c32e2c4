//! Why a marker can't be moved or read.

use crate::{
    bus::{KvError, ReadError},
    model::Cursor,
    protocol::{ErrorCode, Refused},
};

/// A marker can't be moved or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MarkerError {
    /// NATS can't be reached, or does not answer.
    #[error("read markers are not reachable now")]
    Unavailable,
    /// There are too many requests for unread counts at once.
    #[error("too many unread counts are asked for at once")]
    Busy,
    /// The cursor is not one of this room's log.
    #[error("the cursor {0} is not of this room's log")]
    BadCursor(Cursor),
    /// The bucket answered with an error.
    #[error("read markers can't be read: {0}")]
    Refused(String),
}

impl MarkerError {
    /// The error code for the client.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Unavailable | Self::Busy => ErrorCode::Unavailable,
            Self::BadCursor(_) => ErrorCode::BadCursor,
            Self::Refused(_) => ErrorCode::Internal,
        }
    }
}

impl From<MarkerError> for Refused {
    fn from(error: MarkerError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

impl From<ReadError> for MarkerError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Timeout { .. } | ReadError::NoStream { .. } | ReadError::Closed => {
                Self::Unavailable
            }
            ReadError::Refused { .. } | ReadError::Malformed { .. } => {
                Self::Refused(error.to_string())
            }
        }
    }
}

impl From<KvError> for MarkerError {
    fn from(error: KvError) -> Self {
        match error {
            KvError::Conflict | KvError::Unavailable | KvError::UnknownOutcome(_) => {
                Self::Unavailable
            }
            KvError::Refused(text) => Self::Refused(text),
            KvError::Read(error) => error.into(),
        }
    }
}
