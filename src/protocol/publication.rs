//! What a publish carries, and what of it is refused in any protocol.

use serde_json::value::RawValue;

use super::{ErrorCode, Refused};
use crate::model::{self, BadRemark, Kind, MAX_MESSAGE_ID, MAX_USER, MessageId, Reference, RoomId};

/// Most users one message may mention.
pub const MAX_MENTIONS: usize = 100;

/// Longest reference, in bytes: a user, `/` and an id.
const MAX_REFERENCE: usize = MAX_USER + 1 + MAX_MESSAGE_ID;

/// Mentions as they stand in a header, a JSON array, in bytes. 100 users of 256 bytes fit, unless most of their characters have to
/// be escaped. With it all headers of a message are well below the 64 KiB that a stream takes.
const MAX_MENTIONS_JSON: usize = 32 * 1024;

/// The fields of a publish as a client gave them.
#[derive(Debug, Default)]
pub struct Draft<'a> {
    /// The sender's id.
    pub id: Option<&'a str>,
    /// The word of the kind; none: a message.
    pub kind: Option<&'a str>,
    /// The body's JSON text.
    pub body: Option<&'a RawValue>,
    /// What it is about.
    pub target: Option<&'a str>,
    /// What it answers.
    pub reply_to: Option<&'a str>,
    /// Whom it mentions.
    pub mentions: Option<Vec<String>>,
}

/// What a publish carries.
#[derive(Debug, Clone)]
pub struct Publication {
    /// Where to.
    pub room: RoomId,
    /// The sender's id; the edge makes one where it is absent.
    pub id: Option<MessageId>,
    /// What it is.
    pub kind: Kind,
    /// The body's JSON text as the client sent it.
    pub body: Box<RawValue>,
    /// What an edit, delete, reaction or annotation is about, as it was sent and as it was read.
    pub target: Option<(String, Reference)>,
    /// What it answers, as it was sent.
    pub reply_to: Option<String>,
    /// Mentioned users; an edit without any leaves them as they are.
    pub mentions: Mentions,
}

/// The users that a message mentions, as they stand in its header: a JSON array.
#[derive(Debug, Clone, Default)]
pub struct Mentions(Option<Box<str>>);

impl Publication {
    /// Checks a publish to `room`: everything that does not depend on who sends it.
    ///
    /// # Errors
    /// `bad_request`, `bad_id` or `too_large`, which name the field.
    pub fn new(room: RoomId, draft: Draft<'_>) -> Result<Self, Refused> {
        let bad = |message: String| Refused::new(ErrorCode::BadRequest, message);
        let kind = match draft.kind {
            None => Kind::Message,
            Some(word) => Kind::parse(word)
                .filter(|kind| *kind != Kind::Erase)
                .ok_or_else(|| {
                    bad("kind is not one of message, edit, delete, reaction, annotation".to_owned())
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
            (Kind::Delete, None) => RawValue::NULL.to_owned(),
            (_, None) => return Err(bad("body is missing".to_owned())),
        };
        let remark = match kind {
            Kind::Reaction => model::reaction(body.get()).map(|_reaction| ()),
            Kind::Annotation => model::annotations(body.get()).map(|_annotations| ()),
            Kind::Message | Kind::Edit | Kind::Delete | Kind::Erase => Ok(()),
        };
        // What has another form is carried all the same.
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

/// Refuses what has more than so many bytes.
fn fits(name: &str, bytes: usize, most: usize) -> Result<(), Refused> {
    if bytes <= most {
        return Ok(());
    }
    let text = format!("{name} has {bytes} bytes, the limit is {most}");
    Err(Refused::new(ErrorCode::TooLarge, text))
}

impl Mentions {
    /// The mentions of `users`, who may be named more than once. An edit takes mentions away with an empty list; in a message
    /// it says nothing.
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

    /// The users as a JSON array; `None` where nothing is said of them.
    #[must_use]
    pub fn json(&self) -> Option<&str> {
        self.0.as_deref()
    }
}
