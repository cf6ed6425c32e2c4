//! What is asked of history, and what it answers: JSON over NATS.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::entry::key_of;
use crate::{
    bus::ServiceError,
    model::{Cursor, Reference, RoomId, RoomScope},
    protocol::{Anchor, ErrorCode, HistoryOf, Refused},
};

/// Endpoints of the service.
pub(super) mod endpoint {
    /// A page of a room.
    pub(crate) const PAGE: &str = "page";
    /// A search.
    pub(crate) const SEARCH: &str = "search";
    /// An erasure.
    pub(crate) const ERASE: &str = "erase";
}

/// A question for a page of a room's history.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRequest {
    /// Which room.
    pub room: RoomId,
    /// Where in it.
    pub lies: Lies,
    /// At most this many messages.
    pub limit: usize,
}

/// Where a page lies.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lies {
    /// At the end.
    Newest,
    /// At the beginning.
    Oldest,
    /// Before a place; what is there is not in it.
    Before(At),
    /// After a place; what is there is not in it.
    After(At),
    /// Around a place; what is there is in it.
    Around(At),
}

/// A place, as clients name it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum At {
    /// The text of a cursor.
    Cursor(String),
    /// The key of a message.
    Key(String),
}

/// A page. Messages are JSON objects that nobody on their way reads.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PageAnswer {
    /// The oldest first.
    pub messages: Vec<Box<RawValue>>,
    /// The cursor of the first message, if there are others before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prev: Option<String>,
    /// The cursor of the last message, if there are others after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// It may lack something.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub partial: bool,
}

/// A search; all that it names must fit.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SearchRequest {
    /// In these rooms.
    pub rooms: RoomScope,
    /// Words.
    pub text: String,
    /// By this user.
    pub from: Option<String>,
    /// Mentioning this user.
    pub mentions: Option<String>,
    /// Answering the message with this key.
    pub reply_to: Option<String>,
    /// `next` of the page before.
    pub before: Option<String>,
    /// At most this many messages.
    pub limit: usize,
}

/// What was found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SearchAnswer {
    /// The newest first.
    pub messages: Vec<Box<RawValue>>,
    /// From where to go on, if there may be more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

impl PageRequest {
    /// The page that `user` wants of `room`.
    ///
    /// # Errors
    /// `bad_id` or `bad_cursor` when the anchor is neither a cursor nor a reference.
    pub fn new(room: RoomId, user: &str, page: HistoryOf) -> Result<Self, Refused> {
        let at = |text: &str| At::parse(&room, user, text);
        let lies = match page.anchor {
            Anchor::Newest => Lies::Newest,
            Anchor::After(text) if text.is_empty() => Lies::Oldest,
            Anchor::Before(text) => Lies::Before(at(&text)?),
            Anchor::After(text) => Lies::After(at(&text)?),
            Anchor::Around(text) => Lies::Around(at(&text)?),
        };
        Ok(Self {
            room,
            lies,
            limit: page.limit,
        })
    }
}

impl At {
    /// What `user` means by `text`: `<user>/<id>`, else a cursor, else the id of a message of their own.
    fn parse(room: &RoomId, user: &str, text: &str) -> Result<Self, Refused> {
        let reference = Reference::parse(text);
        if text.contains('/') {
            let reference =
                reference.map_err(|error| Refused::new(ErrorCode::BadId, error.to_string()))?;
            return Ok(Self::Key(key_of(room, user, &reference)));
        }
        if text.parse::<Cursor>().is_ok() {
            return Ok(Self::Cursor(text.to_owned()));
        }
        match reference {
            Ok(reference) => Ok(Self::Key(key_of(room, user, &reference))),
            Err(_bad) => {
                let shown: String = text.chars().take(80).collect();
                let text = format!("{shown:?} is neither a cursor nor a message reference");
                Err(Refused::new(ErrorCode::BadCursor, text))
            }
        }
    }
}

/// A refusal as it goes over NATS.
pub(super) fn refused(refused: &Refused) -> ServiceError {
    ServiceError {
        code: refused.code.http_status(),
        message: refused.to_string(),
    }
}

/// The inverse of [`refused`]; `None`: not one of natter's own.
pub(super) fn refusal(error: &ServiceError) -> Option<Refused> {
    let (word, message) = error.message.split_once(": ")?;
    let code = ErrorCode::ALL.into_iter().find(|it| it.as_str() == word)?;
    Some(Refused::new(code, message))
}

/// Reads a question.
pub(super) fn decode<'a, T: Deserialize<'a>>(question: &'a [u8]) -> Result<T, Refused> {
    serde_json::from_slice(question)
        .map_err(|error| Refused::new(ErrorCode::BadRequest, error.to_string()))
}

/// Writes a question or an answer.
pub(super) fn encode(value: &impl Serialize) -> Result<Bytes, Refused> {
    serde_json::to_vec(value)
        .map(Bytes::from)
        .map_err(|error| Refused::new(ErrorCode::Internal, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors_are_references_cursors_or_own_ids() {
        let room = RoomId::parse("chat:x").unwrap();
        let at =
            |text: &str| At::parse(&room, "kim", text).map_err(|refused| refused.code.as_str());
        let key = |key: &str| Ok(At::Key(key.to_owned()));
        assert_eq!(at("lee/1"), key("chat:x/lee/1"));
        assert_eq!(at("a/b/1"), key("chat:x/a/b/1"));
        assert_eq!(at("1"), key("chat:x/kim/1"));
        assert_eq!(at("seoul.k3.7.a0"), Ok(At::Cursor("seoul.k3.7.a0".into())));
        assert_eq!(at("kim/seoul.k3.7.a0"), key("chat:x/kim/seoul.k3.7.a0"));
        assert_eq!(at("/"), Err("bad_id"));
        assert_eq!(at("lee/a b"), Err("bad_id"));
        for neither in ["", "a b", "안녕", "a_b c"] {
            assert_eq!(at(neither), Err("bad_cursor"), "{neither}");
        }
    }

    #[test]
    fn refusals_come_back_as_they_were() {
        let given = Refused::new(ErrorCode::BadId, "there is: no message");
        assert_eq!(refusal(&refused(&given)), Some(given));
        let foreign = ServiceError {
            code: 503,
            message: "this instance has too much to do".to_owned(),
        };
        assert_eq!(refusal(&foreign), None);
    }
}
