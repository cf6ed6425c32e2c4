//! Chooses the edge of the next attempt, its token, and the pause before it.

use std::{fmt, sync::Arc, time::Duration};

use super::{
    Advice, Backoff, ConnectError, Connection, End, Endpoint, Refusal, Silence, advice,
    retry::LATER,
};

/// A connection that lived this long resets the backoff. A shorter life counts as one more failed attempt: otherwise a
/// client that is closed right after every join would hammer the edges.
const HEALTHY: Duration = Duration::from_secs(5);

/// Makes a token when one is needed. The error is a sentence for people.
pub type TokenMaker = Arc<dyn Fn() -> Result<String, String> + Send + Sync>;

/// The source of tokens.
#[derive(Clone)]
pub enum Token {
    /// A single token; when it expires, the client stops.
    Fixed(String),
    /// A new token for each connection, and when the edge announces that the current one expires.
    Made(TokenMaker),
}

/// The edges and the token to connect with.
#[derive(Clone, Debug)]
pub struct Target {
    /// Usable edges, the best first; after a failure the next one is tried. At least one.
    pub endpoints: Vec<Endpoint>,
    pub token: Token,
    pub backoff: Backoff,
    pub silence: Silence,
}

/// Why a client gave up permanently.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Stop {
    /// Close code 4001, status 401, or no token could be made.
    #[error("the token was refused or has expired: {0}")]
    Token(String),
    /// A close code that forbids reconnecting.
    #[error("closed by the edge: {0}")]
    Closed(End),
    /// Not an edge, or one that answers this client with a permanent error.
    #[error("{0}")]
    Unusable(String),
    /// The room can't be joined.
    #[error("can't join: {0}")]
    Join(Refusal),
    /// The session was removed from the room.
    #[error("removed from the room: {0}")]
    Kicked(String),
}

/// What to do after a connection failed or ended.
#[derive(Debug)]
pub(super) enum Lost {
    Retry { why: String, delay: Duration },
    Stop(Stop),
}

/// Chooses endpoint, token and delay of the next attempt.
#[derive(Debug)]
pub(super) struct Link {
    target: Target,
    /// Index of the current endpoint, modulo their number.
    turn: usize,
    attempt: u32,
    /// Whether the edge accepted the last token. Only then is a new token tried when the edge reports that the token
    /// has expired.
    token_was_good: bool,
}

impl Target {
    /// One or more edges with one source of tokens.
    #[must_use]
    pub fn new(endpoints: Vec<Endpoint>, token: Token) -> Self {
        Self {
            endpoints,
            token,
            backoff: Backoff::default(),
            silence: Silence::default(),
        }
    }
}

impl Link {
    pub(super) fn new(target: Target) -> Self {
        Self {
            target,
            turn: 0,
            attempt: 0,
            token_was_good: false,
        }
    }

    /// One attempt at the current endpoint. Does not wait.
    pub(super) async fn connect(&mut self) -> Result<(Endpoint, Connection), Lost> {
        let endpoints = &self.target.endpoints;
        let Some(endpoint) = endpoints.get(self.turn % endpoints.len().max(1)).cloned() else {
            return Err(Lost::Stop(Stop::Unusable("no URL was given".to_owned())));
        };
        let token = self
            .target
            .token
            .get()
            .map_err(|fault| Lost::Stop(Stop::Token(fault)))?;
        match Connection::open_with(&endpoint, Some(&token), self.target.silence).await {
            Ok(connection) => Ok((endpoint, connection)),
            Err(error) => Err(self.on_refused(&error)),
        }
    }

    /// A token to replace the current one; `None` if there is only one.
    pub(super) fn new_token(&self) -> Option<String> {
        match &self.target.token {
            Token::Fixed(_) => None,
            Token::Made(make) => make().ok(),
        }
    }

    /// The edge accepted the token and answered.
    pub(super) fn on_welcome(&mut self) {
        self.token_was_good = true;
    }

    fn on_refused(&mut self, error: &ConnectError) -> Lost {
        let mut why = error.to_string();
        if let Some(source) = std::error::Error::source(error) {
            why = format!("{why}: {source}");
        }
        match error {
            ConnectError::BadToken => return Lost::Stop(Stop::Token(why)),
            ConnectError::Refused { status: 401, .. } => return self.on_bad_token(why),
            ConnectError::NotNatter { .. } => return Lost::Stop(Stop::Unusable(why)),
            // 429 and 5xx are temporary. Any other status does not come from an edge, or is permanent.
            ConnectError::Refused { status, .. } if *status != 429 && *status < 500 => {
                return Lost::Stop(Stop::Unusable(why));
            }
            ConnectError::Refused { .. }
            | ConnectError::Connect { .. }
            | ConnectError::Timeout { .. }
            | ConnectError::Handshake { .. } => {}
        }
        self.retry(why, Duration::ZERO)
    }

    /// A connection has ended after `lived`.
    pub(super) fn on_end(&mut self, end: &End, lived: Duration) -> Lost {
        if lived >= HEALTHY {
            self.attempt = 0;
        }
        match advice(end.code) {
            Advice::Reconnect => self.retry(end.to_string(), Duration::ZERO),
            Advice::Later => self.retry(end.to_string(), LATER),
            Advice::NewToken => self.on_bad_token(end.to_string()),
            Advice::Never => Lost::Stop(Stop::Closed(end.clone())),
        }
    }

    /// The edge asked the client to reconnect elsewhere, and the time it gave is over: the next attempt is made at
    /// once.
    pub(super) fn on_moved(&mut self) {
        self.turn = self.turn.wrapping_add(1);
        self.attempt = 0;
    }

    fn on_bad_token(&mut self, why: String) -> Lost {
        let another = matches!(self.target.token, Token::Made(_));
        if another && self.token_was_good {
            self.token_was_good = false;
            self.retry(why, Duration::ZERO)
        } else {
            Lost::Stop(Stop::Token(why))
        }
    }

    fn retry(&mut self, why: String, at_least: Duration) -> Lost {
        let delay = at_least + self.target.backoff.roll(self.attempt);
        self.attempt = self.attempt.saturating_add(1);
        self.turn = self.turn.wrapping_add(1);
        Lost::Retry { why, delay }
    }
}

impl Token {
    /// A token to connect with. The error is a sentence for people.
    ///
    /// # Errors
    /// When no token can be made.
    pub fn get(&self) -> Result<String, String> {
        match self {
            Self::Fixed(token) => Ok(token.clone()),
            Self::Made(make) => make(),
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(***)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(token: Token) -> Link {
        Link::new(Target::new(vec!["ws://a".parse().unwrap()], token))
    }

    fn end(code: u16) -> End {
        End {
            code,
            reason: String::new(),
        }
    }

    #[test]
    fn fixed_token_is_not_tried_twice() {
        let mut link = link(Token::Fixed("t".to_owned()));
        link.on_welcome();
        let lost = link.on_end(&end(4001), HEALTHY);
        assert!(matches!(lost, Lost::Stop(Stop::Token(_))), "{lost:?}");
    }

    #[test]
    fn made_token_is_renewed_once_until_it_was_good_again() {
        let mut link = link(Token::Made(Arc::new(|| Ok("t".to_owned()))));
        assert!(matches!(link.on_end(&end(4001), HEALTHY), Lost::Stop(_)));
        link.on_welcome();
        assert!(matches!(
            link.on_end(&end(4001), HEALTHY),
            Lost::Retry { .. }
        ));
        assert!(matches!(link.on_end(&end(4001), HEALTHY), Lost::Stop(_)));
    }

    #[test]
    fn short_lives_do_not_reset_the_backoff() {
        let mut link = link(Token::Fixed("t".to_owned()));
        for _ in 0..3 {
            link.on_end(&end(4003), Duration::from_millis(10));
        }
        assert_eq!(link.attempt, 3);
        link.on_end(&end(4003), HEALTHY);
        assert_eq!(link.attempt, 1);
    }

    #[test]
    fn later_is_later() {
        let mut link = link(Token::Fixed("t".to_owned()));
        let lost = link.on_end(&end(4005), HEALTHY);
        assert!(
            matches!(lost, Lost::Retry { delay, .. } if delay >= LATER),
            "{lost:?}"
        );
    }
}
