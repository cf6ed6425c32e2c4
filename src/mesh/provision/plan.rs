//! What to change in an existing stream, and what to leave alone.

use std::{fmt, time::Duration};

use bytesize::ByteSize;
use serde_json::{Map, Value};

use super::definition::Definition;
use crate::model::Region;

/// Prefix of the metadata keys that the server itself writes.
const SERVER_METADATA: &str = "_nats.";

const DAY_NANOS: u64 = 24 * 60 * 60 * 1_000_000_000;

/// What was done with one stream, or would be done in a dry run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Name of the stream.
    pub stream: String,
    /// The region of its domain, in a mesh of several regions.
    pub domain: Option<Region>,
    pub action: Action,
    /// The fields that differ from the definition.
    pub changes: Vec<FieldChange>,
}

/// What is done with a stream as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It did not exist.
    Create,
    /// At least one field is changed.
    Update,
    /// A mirror whose origin was re-created is deleted and created again.
    Recreate,
    /// A mirror of a region that is removed from the mesh is deleted.
    Delete,
    /// Nothing is changed.
    Keep,
}

/// A field that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldChange {
    /// Its name in the API.
    pub field: String,
    /// The current value, for people.
    pub old: String,
    /// The defined value, for people.
    pub new: String,
    /// Whether it is changed.
    pub verdict: Verdict,
}

/// Whether a field is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is changed.
    Apply,
    /// It is changed only with `--allow-destructive`; the text says what is lost.
    Destructive(&'static str),
    /// NATS can't change it on an existing stream.
    Fixed,
}

impl Outcome {
    pub(super) fn new(stream: &str, action: Action) -> Self {
        Self {
            stream: stream.to_owned(),
            domain: None,
            action,
            changes: Vec::new(),
        }
    }

    /// Whether something differs from the definition and was not changed.
    #[must_use]
    pub fn is_incomplete(&self) -> bool {
        self.changes
            .iter()
            .any(|change| change.verdict != Verdict::Apply)
    }
}

/// Compares a stream with its definition. Also returns the configuration to send, if an update is needed.
pub(in crate::mesh) fn plan(
    definition: &Definition,
    existing: &Map<String, Value>,
    allow_destructive: bool,
) -> (Outcome, Option<Map<String, Value>>) {
    let mut merged = existing.clone();
    let mut changes = Vec::new();
    for (field, wanted) in &definition.config {
        let have = existing.get(field).unwrap_or(&Value::Null);
        let wanted = if field == "metadata" {
            &merged_metadata(have, wanted)
        } else {
            wanted
        };
        if same(have, wanted) {
            continue;
        }
        let verdict = match verdict(field, have, wanted) {
            Verdict::Destructive(_) if allow_destructive => Verdict::Apply,
            verdict @ (Verdict::Apply | Verdict::Destructive(_) | Verdict::Fixed) => verdict,
        };
        if verdict == Verdict::Apply {
            merged.insert(field.clone(), wanted.clone());
        }
        changes.push(FieldChange {
            field: field.clone(),
            old: shown(field, have),
            new: shown(field, wanted),
            verdict,
        });
    }
    let update = changes
        .iter()
        .any(|change| change.verdict == Verdict::Apply);
    let action = if update { Action::Update } else { Action::Keep };
    let mut outcome = Outcome::new(&definition.stream, action);
    outcome.changes = changes;
    (outcome, update.then_some(merged))
}

/// The existing metadata, with ours added.
fn merged_metadata(have: &Value, wanted: &Value) -> Value {
    let mut merged = have.as_object().cloned().unwrap_or_default();
    merged.extend(wanted.as_object().cloned().unwrap_or_default());
    Value::Object(merged)
}

/// Whether two values mean the same: the server leaves out settings that are off, and writes "no limit" as -1 or 0.
fn same(have: &Value, wanted: &Value) -> bool {
    fn is_off(value: &Value) -> bool {
        match value {
            Value::Null | Value::Bool(false) => true,
            Value::Number(number) => number.as_i64().is_some_and(|n| n <= 0),
            Value::String(text) => text.is_empty(),
            Value::Array(items) => items.is_empty(),
            Value::Object(fields) => fields.values().all(is_off),
            Value::Bool(true) => false,
        }
    }
    match (have, wanted) {
        (Value::Object(have), Value::Object(wanted)) => have
            .keys()
            .chain(wanted.keys())
            .filter(|key| !key.starts_with(SERVER_METADATA))
            .all(|key| {
                same(
                    have.get(key).unwrap_or(&Value::Null),
                    wanted.get(key).unwrap_or(&Value::Null),
                )
            }),
        (have, wanted) => have == wanted || (is_off(have) && is_off(wanted)),
    }
}

fn verdict(field: &str, have: &Value, wanted: &Value) -> Verdict {
    // "No limit" is larger than any number.
    let limit = |value: &Value| value.as_u64().filter(|n| *n > 0).unwrap_or(u64::MAX);
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    match field {
        "name" | "storage" | "retention" | "mirror" | "max_consumers" => Verdict::Fixed,
        // Once on, the server keeps it on: stored messages may have a TTL.
        "allow_msg_ttl" if wanted == &Value::Bool(false) => Verdict::Fixed,
        "max_age" | "max_bytes" | "max_msgs" | "max_msgs_per_subject"
            if limit(wanted) < limit(have) =>
        {
            Verdict::Destructive("stored messages above the limit are dropped")
        }
        "duplicate_window" if number(wanted) < number(have) => {
            Verdict::Destructive("a publish retried later than that is stored twice")
        }
        "num_replicas" if number(wanted) < number(have) => {
            Verdict::Destructive("copies are removed")
        }
        "subjects" => {
            Verdict::Destructive("messages under the old subjects are not found any more")
        }
        _ => Verdict::Apply,
    }
}

/// A value for people: durations and sizes with their unit.
fn shown(field: &str, value: &Value) -> String {
    match (field, value) {
        ("max_age" | "duplicate_window" | "subject_delete_marker_ttl", Value::Number(number)) => {
            match number.as_u64() {
                // humantime would say "1month 29days 13h 26m 24s" for 60 days.
                Some(nanos) if nanos > 0 && nanos % DAY_NANOS == 0 => {
                    format!("{}d", nanos / DAY_NANOS)
                }
                Some(nanos) if nanos > 0 => {
                    humantime::format_duration(Duration::from_nanos(nanos)).to_string()
                }
                _ => "no limit".to_owned(),
            }
        }
        ("max_bytes" | "max_msg_size", Value::Number(number)) => match number.as_u64() {
            Some(bytes) if bytes > 0 => ByteSize(bytes).to_string(),
            _ => "no limit".to_owned(),
        },
        ("max_msgs" | "max_msgs_per_subject", Value::Number(number))
            if number.as_i64().is_some_and(|n| n <= 0) =>
        {
            "no limit".to_owned()
        }
        ("metadata", Value::Object(fields)) => {
            let fields: Map<String, Value> = fields
                .iter()
                .filter(|(key, _)| !key.starts_with(SERVER_METADATA))
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect();
            Value::Object(fields).to_string()
        }
        (_, Value::Null) => "unset".to_owned(),
        (_, value) => value.to_string(),
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let action = match self.action {
            Action::Create => "create",
            Action::Update => "update",
            Action::Recreate => "re-create",
            Action::Delete => "delete",
            Action::Keep if self.is_incomplete() => "skip",
            Action::Keep => "ok",
        };
        if let Some(domain) = &self.domain {
            write!(f, "{:<12} ", domain.as_str())?;
        }
        write!(f, "{:<24} {action}", self.stream)?;
        let mut separator = ": ";
        for change in &self.changes {
            write!(
                f,
                "{separator}{} {} -> {}",
                change.field, change.old, change.new
            )?;
            match change.verdict {
                Verdict::Apply => {}
                Verdict::Destructive(harm) => {
                    write!(f, " (skipped: {harm}; --allow-destructive does it)")?;
                }
                Verdict::Fixed => write!(f, " (skipped: can't be changed on an existing stream)")?,
            }
            separator = ", ";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format, Toml};
    use serde_json::json;

    use super::*;
    use crate::{config::Config, mesh::provision::definitions, subject::EPOCH_METADATA};

    fn rooms(toml: &str) -> Definition {
        let config = Config::with_defaults(Toml::string(toml)).unwrap();
        let mut rooms = definitions(&config, &config.region()).swap_remove(0);
        rooms.set_metadata(EPOCH_METADATA, "k3");
        rooms
    }

    /// As the server returns it: with its own metadata, and fields that this code does not know.
    fn stored(toml: &str) -> Map<String, Value> {
        let mut config = rooms(toml).config;
        config["metadata"]["_nats.ver"] = json!("2.15.1");
        config.insert("from_the_future".to_owned(), json!(true));
        config.remove("allow_msg_ttl");
        config
    }

    #[test]
    fn an_unchanged_stream_is_left_alone() {
        let (outcome, update) = plan(&rooms(""), &stored(""), false);
        assert_eq!((outcome.action, update), (Action::Keep, None));
        assert_eq!(outcome.changes, []);
    }

    #[test]
    fn growing_is_applied_and_keeps_epoch_and_unknown_fields() {
        let (outcome, update) = plan(&rooms("[streams]\nmax_age = '60d'"), &stored(""), false);
        assert_eq!(outcome.action, Action::Update);
        assert!(!outcome.is_incomplete());
        assert!(
            outcome.to_string().contains("update: max_age 30d -> 60d"),
            "{outcome}"
        );
        let update = update.unwrap();
        assert_eq!(update["metadata"][EPOCH_METADATA], json!("k3"));
        assert_eq!(update["metadata"]["_nats.ver"], json!("2.15.1"));
        assert_eq!(update["from_the_future"], json!(true));
    }

    #[test]
    fn shrinking_needs_to_be_allowed_and_the_rest_is_still_applied() {
        let wanted = "[streams]\nmax_age = '1h'\nmax_bytes = '1MiB'\nmax_msgs_per_room = 6000\nduplicate_window = '1m'\n[limits]\nbody = '32KiB'";
        let (outcome, update) = plan(&rooms(wanted), &stored(""), false);
        let update = update.unwrap();
        assert!(outcome.is_incomplete());
        for field in [
            "max_age",
            "max_bytes",
            "max_msgs_per_subject",
            "duplicate_window",
        ] {
            let change = outcome.changes.iter().find(|c| c.field == field).unwrap();
            assert!(
                matches!(change.verdict, Verdict::Destructive(_)),
                "{field}: {change:?}"
            );
            assert_eq!(update[field], stored("")[field], "{field}");
        }
        assert_eq!(update["max_msg_size"], json!(65536));

        let (outcome, update) = plan(&rooms(wanted), &stored(""), true);
        assert!(!outcome.is_incomplete());
        assert_eq!(update.unwrap()["max_msgs_per_subject"], json!(6000));
    }

    #[test]
    fn what_can_not_be_changed_is_reported_even_when_allowed() {
        let mut existing = stored("");
        existing["storage"] = json!("memory");
        let (outcome, update) = plan(&rooms(""), &existing, true);
        assert_eq!((outcome.action, update), (Action::Keep, None));
        assert_eq!(outcome.changes[0].verdict, Verdict::Fixed);
        assert!(outcome.to_string().contains("skip"), "{outcome}");
    }
}
