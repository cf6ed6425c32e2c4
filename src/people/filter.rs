//! Filters of those who follow rooms: what they say, and what they match. No I/O and no clock.

use std::time::Duration;

use serde_json::{Map, Value};

use super::{inbox::text_of, record::Record};
use crate::{
    bus,
    model::{Condition, Kind, MAX_USER},
    protocol::{ErrorCode, Refused},
};

/// Patterns in `staff`.
const MAX_STAFF: usize = 32;

/// Bytes of a text to look for.
const MAX_TEXT: usize = 256;

/// The times after which a message may count as unanswered.
const UNANSWERED: (Duration, Duration) =
    (Duration::from_secs(1), Duration::from_secs(7 * 24 * 3600));

/// Which rooms are told. A room must match everything that is given; with nothing, every room matches.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Filter {
    unanswered: Option<Unanswered>,
    annotation: Option<Condition>,
    mentions: Option<String>,
    from: Option<Name>,
    assignee: Option<String>,
    /// In lower case.
    text: Option<String>,
}

#[derive(Debug, Clone, PartialEq)]
struct Unanswered {
    /// In ms.
    within: u64,
    staff: Vec<Name>,
}

/// A user, or all whose names begin so.
#[derive(Debug, Clone, PartialEq)]
enum Name {
    Is(String),
    BeginsWith(String),
}

fn bad(field: &str, rule: &str) -> Refused {
    Refused::new(ErrorCode::BadRequest, format!("filter.{field} {rule}"))
}

fn text(field: &str, value: &Value, most: usize) -> Result<String, Refused> {
    let text = value.as_str().filter(|it| (1..=most).contains(&it.len()));
    let rule = || bad(field, &format!("must be a text of 1 to {most} bytes"));
    text.map(str::to_owned).ok_or_else(rule)
}

impl Name {
    fn parse(field: &str, value: &Value) -> Result<Self, Refused> {
        let text = text(field, value, MAX_USER)?;
        let (name, is_pattern) = match text.strip_suffix('*') {
            Some(name) => (name, true),
            None => (&*text, false),
        };
        if name.contains('*') {
            return Err(bad(field, "may have * only at its end"));
        }
        Ok(match is_pattern {
            true => Self::BeginsWith(name.to_owned()),
            false => Self::Is(name.to_owned()),
        })
    }

    fn matches(&self, user: &str) -> bool {
        match self {
            Self::Is(name) => name == user,
            Self::BeginsWith(name) => user.starts_with(&**name),
        }
    }
}

/// A condition on a value in an annotation.
fn condition(value: &Value) -> Result<Condition, Refused> {
    let text = value.as_str().unwrap_or_default().to_owned();
    Condition::try_from(text).map_err(|error| bad("annotation", &error.to_string()))
}

/// Whether the body of an annotation fulfils a condition; `None` if the value is not in it.
fn holds(condition: &Condition, body: &[u8]) -> Option<bool> {
    // Most annotations have other names: those are not parsed.
    memchr::memmem::find(body, condition.name().as_bytes())?;
    condition.holds(&serde_json::from_slice(body).ok()?)
}

impl Filter {
    /// Reads a filter.
    ///
    /// # Errors
    /// `bad_request`; it names the field.
    pub fn parse(fields: &Map<String, Value>) -> Result<Self, Refused> {
        let mut filter = Self::default();
        let (mut within, mut staff) = (None, None);
        for (name, value) in fields {
            match name.as_str() {
                "unanswered_for" => within = Some(duration(value)?),
                "staff" => {
                    let names = value.as_array();
                    let names = names.filter(|names| (1..=MAX_STAFF).contains(&names.len()));
                    let names = names.ok_or_else(|| {
                        let rule = format!("must be a list of 1 to {MAX_STAFF} users or patterns");
                        bad("staff", &rule)
                    })?;
                    let names = names.iter().map(|name| Name::parse("staff", name));
                    staff = Some(names.collect::<Result<_, _>>()?);
                }
                "annotation" => filter.annotation = Some(condition(value)?),
                "mentions" => filter.mentions = Some(text("mentions", value, MAX_USER)?),
                "from" => filter.from = Some(Name::parse("from", value)?),
                "assignee" => filter.assignee = Some(text("assignee", value, MAX_USER)?),
                "text" => filter.text = Some(text("text", value, MAX_TEXT)?.to_lowercase()),
                other => {
                    let shown: String = other.chars().take(80).collect();
                    return Err(bad(
                        &shown,
                        "is unknown: there are unanswered_for with staff, annotation, mentions, from, assignee and text",
                    ));
                }
            }
        }
        filter.unanswered = match (within, staff) {
            (None, None) => None,
            (Some(within), Some(staff)) => Some(Unanswered { within, staff }),
            (Some(_), None) => return Err(bad("staff", "is missing: who can answer")),
            (None, Some(_)) => return Err(bad("staff", "goes with unanswered_for only")),
        };
        Ok(filter)
    }

    /// Whether every room matches.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it needs what only streams keep.
    #[must_use]
    pub fn needs_log(&self) -> bool {
        self.unanswered.is_some() || self.annotation.is_some()
    }

    /// Whether only a room with a message can match.
    #[must_use]
    pub fn needs_message(&self) -> bool {
        self.needs_log() || self.from.is_some() || self.mentions.is_some() || self.text.is_some()
    }

    /// Whether it looks at annotations.
    #[must_use]
    pub fn has_annotation(&self) -> bool {
        self.annotation.is_some()
    }

    /// Whether it looks at the record of a room.
    #[must_use]
    pub fn has_assignee(&self) -> bool {
        self.assignee.is_some()
    }

    /// From when on the newest message of a room matches, if nothing happens until then: in ms since 1970. `None`: it does
    /// not.
    #[must_use]
    pub fn of_message(&self, record: &bus::Record) -> Option<u64> {
        let from = self.from.as_ref();
        let mentions = self.mentions.as_ref();
        let has_text = |wanted: &String| {
            text_of(&record.body).is_some_and(|text| text.to_lowercase().contains(wanted))
        };
        // The text is last: it needs the body.
        let matches = from.is_none_or(|name| name.matches(&record.from))
            && mentions.is_none_or(|user| record.mentions_user(user))
            && self.text.as_ref().is_none_or(has_text);
        match &self.unanswered {
            _ if !matches => None,
            None => Some(0),
            Some(its) if its.staff.iter().any(|name| name.matches(&record.from)) => None,
            Some(its) => Some(record.ts.saturating_add(its.within)),
        }
    }

    /// What an entry of class `ev` says of the annotations of its room; `None`: nothing new.
    #[must_use]
    pub fn of_annotation(&self, record: &bus::Record) -> Option<bool> {
        let is_annotation = record.kind == Some(Kind::Annotation.as_str());
        let condition = self.annotation.as_ref().filter(|_| is_annotation)?;
        holds(condition, &record.body)
    }

    /// Whether the record of a room matches.
    #[must_use]
    pub fn of_record(&self, record: Option<&Record>) -> bool {
        self.assignee
            .as_ref()
            .is_none_or(|name| record.and_then(Record::assignee).as_ref() == Some(name))
    }
}

/// A duration in ms.
fn duration(value: &Value) -> Result<u64, Refused> {
    let (least, most) = UNANSWERED;
    let rule = || {
        bad(
            "unanswered_for",
            "must be a time of 1s to 7days, such as \"5m\"",
        )
    };
    let time = value
        .as_str()
        .and_then(|text| humantime::parse_duration(text).ok());
    let time = time
        .filter(|time| (least..=most).contains(time))
        .ok_or_else(rule)?;
    u64::try_from(time.as_millis()).map_err(|_too_long| rule())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::json;

    use super::*;

    fn filter(json: &Value) -> Result<Filter, Refused> {
        Filter::parse(json.as_object().unwrap())
    }

    fn message(from: &str, mentions: &str, body: &str) -> bus::Record {
        let headers = [
            ("Natter-From", from),
            ("Natter-Mentions", mentions),
            ("Natter-Ts", "1000"),
        ];
        bus::Record::ephemeral(
            headers.into_iter(),
            Bytes::copy_from_slice(body.as_bytes()),
            0,
        )
    }

    #[test]
    fn bad_filters_name_the_field() {
        for (json, field) in [
            (json!({ "unanswered_for": "5m" }), "filter.staff is missing"),
            (json!({ "staff": ["a"] }), "filter.staff goes"),
            (
                json!({ "unanswered_for": 5, "staff": ["a"] }),
                "filter.unanswered_for ",
            ),
            (
                json!({ "unanswered_for": "0s", "staff": ["a"] }),
                "filter.unanswered_for ",
            ),
            (
                json!({ "unanswered_for": "8days", "staff": ["a"] }),
                "filter.unanswered_for ",
            ),
            (
                json!({ "unanswered_for": "5m", "staff": [] }),
                "filter.staff must",
            ),
            (
                json!({ "unanswered_for": "5m", "staff": [1] }),
                "filter.staff must",
            ),
            (json!({ "from": "a*b" }), "filter.from may"),
            (json!({ "from": "" }), "filter.from must"),
            (json!({ "mentions": null }), "filter.mentions must"),
            (json!({ "assignee": 1 }), "filter.assignee must"),
            (json!({ "text": "x".repeat(257) }), "filter.text must"),
            (json!({ "colour": 1 }), "filter.colour is unknown"),
            (json!({ "annotation": "score" }), "filter.annotation must"),
            (json!({ "annotation": "score <" }), "filter.annotation must"),
            (json!({ "annotation": 1 }), "filter.annotation must"),
        ] {
            let refused = filter(&json).unwrap_err();
            assert_eq!(refused.code, ErrorCode::BadRequest);
            assert!(refused.message.starts_with(field), "{json}: {refused}");
        }
        assert!(filter(&json!({})).unwrap().is_empty());
    }

    #[test]
    fn everything_that_is_given_must_match() {
        let said = message("kim-1", r#"["lee"]"#, r#"{"text":"A REFUND, please"}"#);
        for (json, expected) in [
            (json!({ "from": "kim-1" }), true),
            (json!({ "from": "kim*" }), true),
            (json!({ "from": "kim" }), false),
            (json!({ "mentions": "lee" }), true),
            (json!({ "mentions": "le" }), false),
            (json!({ "text": "Refund" }), true),
            (json!({ "text": "money" }), false),
            (
                json!({ "from": "kim*", "mentions": "lee", "text": "please" }),
                true,
            ),
            (
                json!({ "from": "kim*", "mentions": "lee", "text": "money" }),
                false,
            ),
            (json!({ "from": "*", "text": "ease" }), true),
        ] {
            let matched = filter(&json).unwrap().of_message(&said);
            assert_eq!(matched == Some(0), expected, "{json}");
        }
    }

    #[test]
    fn a_message_is_unanswered_from_its_time_on() {
        let of = |from: &str, with: Value| {
            let mut json = json!({ "unanswered_for": "5m", "staff": ["staff-*", "boss"] });
            json.as_object_mut()
                .unwrap()
                .extend(with.as_object().unwrap().clone());
            filter(&json)
                .unwrap()
                .of_message(&message(from, "", "\"hi\""))
        };
        assert_eq!(of("kim", json!({})), Some(301_000));
        assert_eq!(of("kim", json!({ "text": "x" })), None);
        assert_eq!(of("staff-1", json!({})), None);
        assert_eq!(of("boss", json!({})), None);
        assert_eq!(of("staff", json!({})), Some(301_000));
    }

    #[test]
    fn conditions_on_annotations() {
        for (condition, body, expected) in [
            (
                "sentiment.score < -0.5",
                r#"{"sentiment":{"score":-0.7}}"#,
                Some(true),
            ),
            (
                "sentiment.score<-0.5",
                r#"{"sentiment":{"score":-0.5}}"#,
                Some(false),
            ),
            ("sentiment.score < 1", r#"{"sentiment":{}}"#, None),
            ("sentiment.score < 1", r#"{"translation":{"en":"x"}}"#, None),
            ("lang = \"ko\"", r#"{"lang":"ko"}"#, Some(true)),
        ] {
            let filter = filter(&json!({ "annotation": condition })).unwrap();
            let mut record = message("bot", "", body);
            assert_eq!(filter.of_annotation(&record), None, "not an annotation");
            record.kind = Some("annotation");
            assert_eq!(
                filter.of_annotation(&record),
                expected,
                "{condition} {body}"
            );
        }
    }
}
