//! The content of a publish, and the checks that are the same in every protocol.

use serde_json::value::RawValue;

use super::{ErrorCode, Refused};
use crate::model::{self, BadRemark, Kind, MAX_MESSAGE_ID, MAX_USER, MessageId, Reference, RoomId};

/// Most users one message may mention.
const MAX_MENTIONS: usize = 100;

/// Longest reference, in bytes: a user, `/` and an id.
const MAX_REFERENCE: usize = MAX_USER + 1 + MAX_MESSAGE_ID;

/// Longest JSON array of mentions in a header, in bytes. 100 users of 256 bytes fit, unless most of their characters
/// have to be escaped. With this bound, all headers of a message together stay well below the 64 KiB that a stream
/// accepts.
const MAX_MENTIONS_JSON: usize = 32 * 1024;

/// The fields of a publish as the client gave them.
#[derive(Debug, Default)]
pub struct Draft<'a> {
    /// The id that the sender gave it.
    pub id: Option<&'a str>,
    /// Its kind; `None` means a message.
    pub kind: Option<&'a str>,
    /// The body's JSON text.
    pub body: Option<&'a RawValue>,
    /// The message that it refers to.
    pub target: Option<&'a str>,
    /// The message that it answers.
    pub reply_to: Option<&'a str>,
    /// The users that it mentions.
    pub mentions: Option<Vec<String>>,
}

/// A publish that was checked.
#[derive(Debug, Clone)]
pub struct Publication {
    /// The room.
    pub room: RoomId,
    /// The id that the sender gave it. If `None`, the edge makes one.
    pub id: Option<MessageId>,
    /// The kind.
    pub kind: Kind,
    /// The body's JSON text as the client sent it.
    pub body: Box<RawValue>,
    /// The message to which any other kind than a message refers: as it was sent, and parsed.
    pub target: Option<(String, Reference)>,
    /// The message that it answers, as it was sent.
    pub reply_to: Option<String>,
    /// The users that it mentions. An edit without this field leaves the mentions unchanged.
    pub mentions: Mentions,
}

/// The users that a message mentions, as a JSON array for its header.
#[derive(Debug, Clone, Default)]
pub struct Mentions(Option<Box<str>>);

impl Publication {
    /// Checks a publish to `room`: everything that does not depend on the sender.
    ///
    /// # Errors
    /// `bad_request`, `bad_id` or `too_large`. The text names the field.
    pub fn new(room: RoomId, draft: Draft<'_>) -> Result<Self, Refused> {
        let bad = |message: String| Refused::new(ErrorCode::BadRequest, message);
        let kind = match draft.kind {
            None => Kind::Message,
            Some(word) => Kind::parse(word)
                .filter(|kind| !matches!(kind, Kind::Erase | Kind::System))
                .ok_or_else(|| {
                    bad(
                        "kind is not one of message, edit, delete, reaction, annotation, pin, unpin"
                            .to_owned(),
                    )
                })?,
        };
        let reference = |name: &str, text: &str| {
            fits(name, text.len(), MAX_REFERENCE)?;
            Reference::parse(text)
                .map_err(|error| Refused::new(ErrorCode::BadId, error.to_string()))
        };
        let target = match (kind, draft.target) {
            (Kind::Message, None) => None,
            (Kind::Message, Some(_)) => {
                return Err(bad(
                    "a message has no target; reply_to names what it answers".to_owned(),
                ));
            }
            (_, None) => {
                return Err(bad(format!(
                    "target is missing: a {} has one",
                    kind.as_str()
                )));
            }
            (_, Some(text)) => Some((text.to_owned(), reference("target", text)?)),
        };
        let reply_to = draft
            .reply_to
            .map(|text| reference("reply_to", text).map(|_valid| text.to_owned()));
        let body = match (kind, draft.body) {
            (_, Some(body)) => body.to_owned(),
            (Kind::Delete | Kind::Pin | Kind::Unpin, None) => RawValue::NULL.to_owned(),
            (_, None) => return Err(bad("body is missing".to_owned())),
        };
        let remark = match kind {
            Kind::Reaction => model::reaction(body.get()).map(|_reaction| ()),
            Kind::Annotation => model::annotations(body.get()).map(|_annotations| ()),
            Kind::Message
            | Kind::Edit
            | Kind::Delete
            | Kind::Pin
            | Kind::Unpin
            | Kind::Erase
            | Kind::System => Ok(()),
        };
        // A reaction or annotation of another form is accepted as it is.
        if let Err(BadRemark::TooLarge(message)) = remark {
            return Err(Refused::new(ErrorCode::TooLarge, message));
        }
        let mentions = Mentions::of(draft.mentions, kind)?;
        Ok(Self {
            room,
            id: draft
                .id
                .map(MessageId::parse)
                .transpose()
                .map_err(|error| Refused::new(ErrorCode::BadId, error.to_string()))?,
            kind,
            body,
            target,
            reply_to: reply_to.transpose()?,
            mentions,
        })
    }
}

/// Refuses a value of more than `most` bytes.
fn fits(name: &str, bytes: usize, most: usize) -> Result<(), Refused> {
    if bytes <= most {
        return Ok(());
    }
    let text = format!("{name} has {bytes} bytes, the limit is {most}");
    Err(Refused::new(ErrorCode::TooLarge, text))
}

impl Mentions {
    /// The mentions of `users`, who may be named more than once. In an edit, an empty list removes all mentions; in
    /// other kinds it has no effect.
    fn of(users: Option<Vec<String>>, kind: Kind) -> Result<Self, Refused> {
        let says = |users: &Vec<String>| !users.is_empty() || kind == Kind::Edit;
        let Some(users) = users.filter(says) else {
            return Ok(Self::default());
        };
        if users.len() > MAX_MENTIONS {
            let text = format!(
                "mentions has {} users, the limit is {MAX_MENTIONS}",
                users.len()
            );
            return Err(Refused::new(ErrorCode::TooLarge, text));
        }
        for user in &users {
            fits("a user in mentions", user.len(), MAX_USER)?;
        }
        let json = serde_json::to_string(&users)
            .map_err(|error| Refused::new(ErrorCode::Internal, error.to_string()))?;
        fits("mentions, as JSON,", json.len(), MAX_MENTIONS_JSON)?;
        Ok(Self(Some(json.into())))
    }

    /// The users as a JSON array; `None` if the publish does not contain mentions.
    #[must_use]
    pub fn json(&self) -> Option<&str> {
        self.0.as_deref()
    }
}
