//! Requests to the history service and its answers: JSON over NATS.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::entry::key_of;
use crate::{
    bus::ServiceError,
    model::{Cursor, Reference, RoomId, RoomScope},
    protocol::{Anchor, ErrorCode, HistoryOf, Refused},
    store::RoomPlace,
};

/// Endpoints of the service.
pub(super) mod endpoint {
    /// A page of a room.
    pub(crate) const PAGE: &str = "page";
    /// A page of a thread. Services of earlier versions, which would answer with a page of the room, don't have it.
    pub(crate) const THREAD: &str = "thread";
    /// A search.
    pub(crate) const SEARCH: &str = "search";
    /// An erasure.
    pub(crate) const ERASE: &str = "erase";
    /// A question to the directory of rooms.
    pub(crate) const ROOMS: &str = "rooms";
    /// An upload.
    pub(crate) const UPLOAD: &str = "upload";
    /// Whether the file of an upload may be given out.
    pub(crate) const UPLOAD_STATE: &str = "upload_state";
}

/// A request for a page of a room's history.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRequest {
    /// The room.
    pub room: RoomId,
    /// The position of the page in it.
    // The name is that of earlier versions, which may run in the mesh.
    #[serde(rename = "lies")]
    pub anchor: PageAnchor,
    /// At most this many messages.
    pub limit: usize,
    /// Only answers to the message with this key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread: Option<String>,
}

/// The position of a page.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PageAnchor {
    /// The end of the log.
    Newest,
    /// The beginning of the log.
    Oldest,
    /// Before a place, without the message there.
    Before(At),
    /// After a place, without the message there.
    After(At),
    /// Around a place, including the message there.
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

/// A page. Its messages are JSON objects that are passed on unread.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PageAnswer {
    /// Oldest first.
    pub messages: Vec<Box<RawValue>>,
    /// The cursor of the first message, if there are others before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prev: Option<String>,
    /// The cursor of the last message, if there are others after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// Whether messages may be missing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub partial: bool,
}

/// A search. All given conditions must match.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SearchRequest {
    /// Only in these rooms.
    pub rooms: RoomScope,
    /// The words to search for.
    pub text: String,
    /// Only by this user.
    pub from: Option<String>,
    /// Only messages that mention this user.
    pub mentions: Option<String>,
    /// Only answers to the message with this key.
    pub reply_to: Option<String>,
    /// The `next` of the previous page.
    pub before: Option<String>,
    /// At most this many messages.
    pub limit: usize,
}

/// The answer to a search.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SearchAnswer {
    /// Newest first.
    pub messages: Vec<Box<RawValue>>,
    /// The place to continue from, if there may be more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// What the directory finds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RoomsAnswer {
    /// The rooms, newest activity first.
    pub rooms: Vec<RoomPlace>,
    /// Whether there may be more.
    #[serde(default)]
    pub more: bool,
}

impl PageRequest {
    /// The page that `user` wants of `room`.
    ///
    /// # Errors
    /// `bad_id` or `bad_cursor` when the anchor is neither a cursor nor a reference; `bad_id` when `thread` is no
    /// reference.
    pub fn new(room: RoomId, user: &str, page: HistoryOf) -> Result<Self, Refused> {
        let at = |text: &str| At::parse(&room, user, text);
        let anchor = match page.anchor {
            Anchor::Newest => PageAnchor::Newest,
            Anchor::After(text) if text.is_empty() => PageAnchor::Oldest,
            Anchor::Before(text) => PageAnchor::Before(at(&text)?),
            Anchor::After(text) => PageAnchor::After(at(&text)?),
            Anchor::Around(text) => PageAnchor::Around(at(&text)?),
        };
        let thread = page.thread.map(|text| {
            let reference = Reference::parse(&text)
                .map_err(|error| Refused::new(ErrorCode::BadId, format!("thread: {error}")))?;
            Ok::<_, Refused>(key_of(&room, user, &reference))
        });
        Ok(Self {
            thread: thread.transpose()?,
            room,
            anchor,
            limit: page.limit,
        })
    }

    /// The service's endpoint for this request.
    pub(super) fn endpoint(&self) -> &'static str {
        match self.thread {
            None => endpoint::PAGE,
            Some(_) => endpoint::THREAD,
        }
    }
}

impl At {
    /// What `user` means by `text`: `<user>/<id>`, else a cursor, else the id of one of the user's own messages.
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

/// A refusal as a NATS service error.
pub(super) fn refused(refused: &Refused) -> ServiceError {
    ServiceError {
        code: refused.code.http_status(),
        message: refused.to_string(),
    }
}

/// The inverse of [`refused`]; `None` if the error is not one of natter's codes.
pub(super) fn refusal(error: &ServiceError) -> Option<Refused> {
    let (word, message) = error.message.split_once(": ")?;
    let code = ErrorCode::ALL.into_iter().find(|it| it.as_str() == word)?;
    Some(Refused::new(code, message))
}

/// Parses a request.
pub(super) fn decode<'a, T: Deserialize<'a>>(question: &'a [u8]) -> Result<T, Refused> {
    serde_json::from_slice(question)
        .map_err(|error| Refused::new(ErrorCode::BadRequest, error.to_string()))
}

/// Serializes a request or an answer.
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
