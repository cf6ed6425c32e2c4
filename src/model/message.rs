//! Identity and classification of messages.

use std::{borrow::Cow, fmt, fmt::Write as _, sync::Arc};

/// Longest user name, in bytes: the limit of a token's `sub`.
pub const MAX_USER: usize = 256;

/// Longest message id, in bytes.
pub const MAX_MESSAGE_ID: usize = 64;

/// A message's id, chosen by its sender: `[A-Za-z0-9._~-]{1,64}`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct MessageId(Arc<str>);

/// A message id was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("id {0:?} does not match [A-Za-z0-9._~-]{{1,64}}")]
pub struct BadMessageId(pub String);

/// A reference to another message: `<user>/<id>`, or a bare `<id>` for one of the sender's own.
///
/// A user may contain `/`, an id can't: the last `/` separates them. A user has at most [`MAX_USER`] bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reference {
    /// The author; `None` if the reference is bare.
    pub user: Option<String>,
    /// The message's id.
    pub id: MessageId,
}

/// A message reference was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a message reference, <user>/<id> or <id>")]
pub struct BadReference(pub String);

/// The two subjects of a room's log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Class {
    /// Messages, which count as unread.
    Msg,
    /// Changes of a message: edit, delete, reaction, annotation.
    Ev,
}

/// The kind of a `send`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Kind {
    /// A new message.
    #[default]
    Message,
    /// Replaces the body of `target`.
    Edit,
    /// Deletes `target`.
    Delete,
    /// A reaction to `target`.
    Reaction,
    /// A worker's result about `target`: translation, sentiment, a moderation verdict.
    Annotation,
    /// Announces that messages were erased for good: those of one user, or all. Only natter itself sends it.
    Erase,
    /// Pins `target`. It is kept as an entry about the room, and in the room's record.
    Pin,
    /// Unpins `target`.
    Unpin,
    /// An entry about the room: who was added, muted, banned, what was changed by whom. Only natter itself sends it.
    System,
}

impl MessageId {
    /// Parses an id.
    ///
    /// # Errors
    /// [`BadMessageId`] with the (shortened) text.
    pub fn parse(text: &str) -> Result<Self, BadMessageId> {
        if Self::is_valid(text) {
            Ok(Self(Arc::from(text)))
        } else {
            Err(BadMessageId(text.chars().take(80).collect()))
        }
    }

    /// Whether a text is an id.
    #[must_use]
    pub fn is_valid(text: &str) -> bool {
        (1..=MAX_MESSAGE_ID).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._~-".contains(&b))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Reference {
    /// Parses `<user>/<id>` or `<id>`.
    ///
    /// # Errors
    /// [`BadReference`] with the (shortened) text.
    pub fn parse(text: &str) -> Result<Self, BadReference> {
        let bad = |_: BadMessageId| BadReference(text.chars().take(80).collect());
        match text.rsplit_once('/') {
            Some((user, _)) if user.is_empty() || user.len() > MAX_USER => {
                Err(BadReference(text.chars().take(80).collect()))
            }
            Some((user, id)) => Ok(Self {
                user: Some(user.to_owned()),
                id: MessageId::parse(id).map_err(bad)?,
            }),
            None => Ok(Self {
                user: None,
                id: MessageId::parse(text).map_err(bad)?,
            }),
        }
    }

    /// The reference as `user` has made it, with the author: `<user>/<id>`.
    #[must_use]
    pub fn of(&self, user: &str) -> String {
        format!("{}/{}", self.user.as_deref().unwrap_or(user), self.id)
    }

    /// Whether the message was sent by `user`, who made the reference.
    #[must_use]
    pub fn is_by(&self, user: &str) -> bool {
        self.user.as_deref().is_none_or(|author| author == user)
    }
}

impl Class {
    /// The last token of the room's subject.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Msg => "msg",
            Self::Ev => "ev",
        }
    }
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 9] = [
        Self::Message,
        Self::Edit,
        Self::Delete,
        Self::Reaction,
        Self::Annotation,
        Self::Pin,
        Self::Unpin,
        Self::Erase,
        Self::System,
    ];

    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Message => "message",
            Self::Edit => "edit",
            Self::Delete => "delete",
            Self::Reaction => "reaction",
            Self::Annotation => "annotation",
            Self::Pin => "pin",
            Self::Unpin => "unpin",
            Self::Erase => "erase",
            Self::System => "system",
        }
    }

    /// The kind with this name; `None` if there is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }

    /// The class of the subject it is published to.
    #[must_use]
    pub fn class(self) -> Class {
        match self {
            Self::Message => Class::Msg,
            Self::Edit
            | Self::Delete
            | Self::Reaction
            | Self::Annotation
            | Self::Pin
            | Self::Unpin
            | Self::Erase
            | Self::System => Class::Ev,
        }
    }

    /// Whether it pins (`true`) or unpins (`false`) a message; `None`: neither.
    #[must_use]
    pub fn pins(self) -> Option<bool> {
        match self {
            Self::Pin => Some(true),
            Self::Unpin => Some(false),
            Self::Message
            | Self::Edit
            | Self::Delete
            | Self::Reaction
            | Self::Annotation
            | Self::Erase
            | Self::System => None,
        }
    }
}

/// Makes any text safe as a NATS header value, and keeps it readable: control characters, `=`, and white space at
/// either end become `=XX` per byte.
#[must_use]
pub fn header_escape(text: &str) -> Cow<'_, str> {
    let edge_space = text.starts_with(char::is_whitespace) || text.ends_with(char::is_whitespace);
    if !edge_space && !text.chars().any(|c| c.is_control() || c == '=') {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    let last = text.chars().count() - 1;
    for (i, c) in text.chars().enumerate() {
        if c.is_control() || c == '=' || (c.is_whitespace() && (i == 0 || i == last)) {
            let mut utf8 = [0; 4];
            for byte in c.encode_utf8(&mut utf8).bytes() {
                // Writing to a String can't fail.
                let _infallible = write!(out, "={byte:02X}");
            }
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// A text as one token of a key: bytes outside `[A-Za-z0-9_-]` become `=XX`. Reversible with [`header_unescape`], and
/// readable if the text is.
#[must_use]
pub fn key_escape(text: &str) -> Cow<'_, str> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    if text.bytes().all(plain) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for byte in text.bytes() {
        if plain(byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String can't fail.
            let _infallible = write!(out, "={byte:02X}");
        }
    }
    Cow::Owned(out)
}

/// The inverse of [`header_escape`] and of [`key_escape`]. Other sequences after a `=` are kept as they are. If the
/// result is not UTF-8, the whole text is returned unchanged.
#[must_use]
pub fn header_unescape(text: &str) -> Cow<'_, str> {
    if !text.contains('=') {
        return Cow::Borrowed(text);
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while let Some(&byte) = bytes.get(i) {
        let decoded = (byte == b'=')
            .then(|| bytes.get(i + 1..i + 3))
            .flatten()
            .filter(|hex| hex.iter().all(u8::is_ascii_hexdigit))
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        if let Some(decoded) = decoded {
            out.push(decoded);
            i += 3;
        } else {
            out.push(byte);
            i += 1;
        }
    }
    String::from_utf8(out).map_or_else(|_not_utf8| Cow::Borrowed(text), Cow::Owned)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn references() {
        let own = Reference::parse("01JA").unwrap();
        assert!(own.is_by("anyone"));
        let other = Reference::parse("a/b/01JA").unwrap();
        assert_eq!(other.user.as_deref(), Some("a/b"));
        assert!(other.is_by("a/b") && !other.is_by("a"));
        let longest = "u".repeat(MAX_USER);
        assert!(Reference::parse(&format!("{longest}/1")).is_ok());
        for bad in [
            "",
            "/",
            "/x",
            "kim/",
            "kim/a b",
            "kim/안",
            &format!("{longest}u/1"),
        ] {
            assert!(Reference::parse(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn ids() {
        for bad in ["", "a b", "a/b", "안", &"x".repeat(65)] {
            assert!(MessageId::parse(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(MessageId::parse("A.z_9~-").is_ok());
    }

    proptest! {
        #[test]
        fn header_escape_is_reversible_and_safe(text in "\\PC{0,40}|[ =\\r\\n\\t\\x00-\\x1f\\x7fA-F0-9]{0,40}") {
            let escaped = header_escape(&text);
            prop_assert!(!escaped.chars().any(char::is_control));
            prop_assert_eq!(escaped.trim(), escaped.as_ref());
            prop_assert_eq!(header_unescape(&escaped), text.as_str());
            let key = key_escape(&text);
            prop_assert!(key.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-=".contains(&b)));
            prop_assert_eq!(header_unescape(&key), text.as_str());
        }
    }
}
