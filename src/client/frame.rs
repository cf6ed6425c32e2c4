//! What an edge sends.

use std::{borrow::Cow, fmt, sync::Arc};

use serde::{Deserialize, de::DeserializeOwned};

/// One text frame of an edge: the exact text, and the two fields that identify it.
///
/// Cloning is cheap.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    text: Arc<str>,
    op: Cow<'static, str>,
    rid: Option<u64>,
}

/// An `error` reply.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Refusal {
    /// Code from the table of error codes.
    pub code: String,
    /// For people.
    #[serde(default)]
    pub message: String,
    /// Whether the same command may succeed later.
    #[serde(default)]
    pub retry: bool,
}

#[derive(Deserialize)]
struct Head<'a> {
    #[serde(borrow)]
    op: Cow<'a, str>,
    #[serde(default)]
    rid: Option<u64>,
}

impl Frame {
    /// Reads the head of a frame.
    ///
    /// # Errors
    /// The text is not a JSON object with a text `op` and, if there is one, a numeric `rid`.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        let head: Head<'_> = serde_json::from_str(text)?;
        // Nearly every frame is one of these, which need no allocation for the name.
        let op = match head.op.as_ref() {
            "msg" => Cow::Borrowed("msg"),
            "ack" => Cow::Borrowed("ack"),
            "joined" => Cow::Borrowed("joined"),
            "typing" => Cow::Borrowed("typing"),
            "error" => Cow::Borrowed("error"),
            other => Cow::Owned(other.to_owned()),
        };
        Ok(Self {
            text: Arc::from(text),
            op,
            rid: head.rid,
        })
    }

    /// The frame as it was on the wire.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its `op`: `msg`, `ack`, `joined`, …
    #[must_use]
    pub fn op(&self) -> &str {
        &self.op
    }

    /// Number of the command it answers; `None` for a push.
    #[must_use]
    pub fn rid(&self) -> Option<u64> {
        self.rid
    }

    /// The fields of the frame, as a `T`.
    ///
    /// # Errors
    /// They don't fit `T`.
    pub fn fields<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_str(&self.text)
    }

    /// The frame as a JSON value (never fails: the text was parsed once).
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        self.fields().unwrap_or_default()
    }

    /// The refusal, if this is an `error` reply.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        if self.op == "error" {
            self.fields().ok()
        } else {
            None
        }
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame({})", self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads() {
        let ack = Frame::parse(r#"{"op":"ack","rid":7,"id":"x"}"#).unwrap();
        assert_eq!((ack.op(), ack.rid(), ack.refusal()), ("ack", Some(7), None));
        let error = Frame::parse(
            r#"{"op":"error","rid":null,"code":"bad_json","message":"m","retry":false}"#,
        )
        .unwrap();
        assert_eq!(error.rid(), None);
        assert_eq!(error.refusal().unwrap().code, "bad_json");
        assert_eq!(
            Frame::parse(r#"{"op":"k\u0069cked"}"#).unwrap().op(),
            "kicked"
        );
        for text in ["", "[]", "{}", r#"{"op":1}"#, r#"{"op":"ack","rid":"7"}"#] {
            assert!(Frame::parse(text).is_err(), "{text:?} was accepted");
        }
    }
}
