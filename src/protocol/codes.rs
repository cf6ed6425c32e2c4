//! The one table of error codes and the one table of close codes.

/// Why a command was refused: the `code` of an `error` reply and of an HTTP error body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The frame or body is not JSON.
    BadJson,
    /// Valid JSON, but not a command: a field is missing or has the wrong type or value.
    BadRequest,
    /// There is no such `op`.
    UnknownOp,
    /// This is not a room name.
    BadRoom,
    /// The room's namespace is not configured.
    UnknownNamespace,
    /// The room has no record: nobody has made it.
    UnknownRoom,
    /// This is not a message id or message reference.
    BadId,
    /// The cursor can't be parsed.
    BadCursor,
    /// The body is larger than `limits.body`.
    TooLarge,
    /// The message, or the message that it refers to, was erased. It is not stored again under this id.
    Erased,
    /// There is no token, or it is not valid.
    Unauthorized,
    /// The token's grants do not cover the command.
    Forbidden,
    /// Only over HTTP: the file is not checked yet.
    Pending,
    /// Only over HTTP: the file was checked, and is never given out.
    Infected,
    /// The command needs a join first.
    NotJoined,
    /// It was changed meanwhile: read it again.
    Conflict,
    /// Only over HTTP: the body of the request did not arrive in time. Nothing was done.
    Timeout,
    /// More commands than `limits.commands_per_second` allows.
    RateLimited,
    /// Another limit was reached, which the message names.
    Limit,
    /// NATS can't be reached or does not answer. Nothing was stored.
    Unavailable,
    /// The stream did not acknowledge in time: the message may be stored or not. Retry with the same id.
    UnknownOutcome,
    /// The stream refuses to store more.
    StreamFull,
    /// An internal fault of natter.
    Internal,
}

/// The refusal of a command or request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message}", code.as_str())]
pub struct Refused {
    /// Why.
    pub code: ErrorCode,
    /// What was wrong, for people.
    pub message: String,
    /// After how many ms the same command may be repeated, if that is known.
    pub retry_after_ms: Option<u64>,
}

impl Refused {
    /// Makes a refusal.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            code,
            message,
            retry_after_ms: None,
        }
    }

    /// The same, with the time after which the command may be repeated, in ms.
    #[must_use]
    pub fn after(self, ms: u64) -> Self {
        Self {
            retry_after_ms: Some(ms),
            ..self
        }
    }
}

impl ErrorCode {
    /// Every code.
    pub const ALL: [Self; 23] = [
        Self::BadJson,
        Self::BadRequest,
        Self::UnknownOp,
        Self::BadRoom,
        Self::UnknownNamespace,
        Self::UnknownRoom,
        Self::BadId,
        Self::BadCursor,
        Self::TooLarge,
        Self::Erased,
        Self::Unauthorized,
        Self::Forbidden,
        Self::Pending,
        Self::Infected,
        Self::NotJoined,
        Self::Conflict,
        Self::Timeout,
        Self::RateLimited,
        Self::Limit,
        Self::Unavailable,
        Self::UnknownOutcome,
        Self::StreamFull,
        Self::Internal,
    ];

    /// The code on the wire, also used as the metric label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BadJson => "bad_json",
            Self::BadRequest => "bad_request",
            Self::UnknownOp => "unknown_op",
            Self::BadRoom => "bad_room",
            Self::UnknownNamespace => "unknown_namespace",
            Self::UnknownRoom => "unknown_room",
            Self::BadId => "bad_id",
            Self::BadCursor => "bad_cursor",
            Self::TooLarge => "too_large",
            Self::Erased => "erased",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::Pending => "pending",
            Self::Infected => "infected",
            Self::NotJoined => "not_joined",
            Self::Conflict => "conflict",
            Self::Timeout => "timeout",
            Self::RateLimited => "rate_limited",
            Self::Limit => "limit",
            Self::Unavailable => "unavailable",
            Self::UnknownOutcome => "unknown_outcome",
            Self::StreamFull => "stream_full",
            Self::Internal => "internal",
        }
    }

    /// Whether the same command may succeed if it is retried later.
    #[must_use]
    pub fn retry(self) -> bool {
        match self {
            Self::Pending
            | Self::Timeout
            | Self::RateLimited
            | Self::Unavailable
            | Self::UnknownOutcome => true,
            Self::BadJson
            | Self::BadRequest
            | Self::UnknownOp
            | Self::BadRoom
            | Self::UnknownNamespace
            | Self::UnknownRoom
            | Self::BadId
            | Self::BadCursor
            | Self::TooLarge
            | Self::Erased
            | Self::Unauthorized
            | Self::Forbidden
            | Self::Infected
            | Self::NotJoined
            | Self::Conflict
            | Self::Limit
            | Self::StreamFull
            | Self::Internal => false,
        }
    }

    /// The HTTP status of the same refusal.
    #[must_use]
    pub fn http_status(self) -> u16 {
        match self {
            Self::BadJson
            | Self::BadRequest
            | Self::UnknownOp
            | Self::BadRoom
            | Self::BadId
            | Self::BadCursor => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::UnknownNamespace | Self::UnknownRoom => 404,
            Self::Timeout => 408,
            Self::NotJoined | Self::Conflict | Self::Pending => 409,
            Self::Erased | Self::Infected => 410,
            Self::TooLarge => 413,
            Self::RateLimited | Self::Limit => 429,
            Self::Internal => 500,
            Self::Unavailable | Self::UnknownOutcome | Self::StreamFull => 503,
        }
    }
}

/// Why the server closed a session: the WebSocket close code and reason. The code tells a client whether to reconnect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Close {
    /// The answer to the client's own close.
    Normal,
    /// The edge stops at once.
    GoingAway,
    /// A frame violates RFC 6455.
    Protocol,
    /// A binary message in a text protocol.
    Unsupported,
    /// A text message that is not UTF-8.
    InvalidUtf8,
    /// A message larger than `limits.frame`.
    TooBig,
    /// An internal fault of natter.
    Internal,
    /// Bad token: reconnect with another one.
    BadToken,
    /// The token has expired: reconnect with a new one.
    Expired,
    /// No token came in time: reconnect, and send one.
    Stale,
    /// Token revoked: do not reconnect.
    Revoked,
    /// The client reads too slowly: reconnect with the cursor.
    TooSlow,
    /// The client does not speak the protocol: do not reconnect.
    ClientProtocol,
    /// Too many sessions or commands: reconnect later.
    TooMany,
    /// A back end ended the session: do not reconnect by itself.
    Disconnected,
    /// The edge drains: reconnect now, elsewhere.
    Draining,
    /// The peer was silent despite pings. It may not get the close frame.
    PingTimeout,
}

impl Close {
    /// Every reason.
    pub const ALL: [Self; 17] = [
        Self::Normal,
        Self::GoingAway,
        Self::Protocol,
        Self::Unsupported,
        Self::InvalidUtf8,
        Self::TooBig,
        Self::Internal,
        Self::BadToken,
        Self::Expired,
        Self::Stale,
        Self::Revoked,
        Self::TooSlow,
        Self::ClientProtocol,
        Self::TooMany,
        Self::Disconnected,
        Self::Draining,
        Self::PingTimeout,
    ];

    /// The close code.
    #[must_use]
    pub fn code(self) -> u16 {
        match self {
            Self::Normal => 1000,
            Self::GoingAway | Self::PingTimeout => 1001,
            Self::Protocol => 1002,
            Self::Unsupported => 1003,
            Self::InvalidUtf8 => 1007,
            Self::TooBig => 1009,
            Self::Internal => 1011,
            Self::BadToken | Self::Expired | Self::Stale => 4001,
            Self::Revoked => 4002,
            Self::TooSlow => 4003,
            Self::ClientProtocol => 4004,
            Self::TooMany => 4005,
            Self::Disconnected => 4006,
            Self::Draining => 4010,
        }
    }

    /// The reason on the wire, also used as the metric label; at most 123 bytes.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Normal => "closed",
            Self::GoingAway => "going_away",
            Self::Protocol => "websocket_protocol",
            Self::Unsupported => "binary_not_supported",
            Self::InvalidUtf8 => "invalid_utf8",
            Self::TooBig => "frame_too_big",
            Self::Internal => "internal",
            Self::BadToken => "bad_token",
            Self::Expired => "token_expired",
            Self::Stale => "no_token",
            Self::Revoked => "revoked",
            Self::TooSlow => "too_slow",
            Self::ClientProtocol => "protocol_error",
            Self::TooMany => "too_many",
            Self::Disconnected => "disconnected",
            Self::Draining => "draining",
            Self::PingTimeout => "ping_timeout",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn words_are_unique() {
        let codes: HashSet<_> = ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(codes.len(), ErrorCode::ALL.len());
        let reasons: HashSet<_> = Close::ALL.iter().map(|close| close.reason()).collect();
        assert_eq!(reasons.len(), Close::ALL.len());
    }
}
