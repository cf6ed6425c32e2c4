//! What a message has become: the message itself and everything that was said about it, whatever order it is heard in.
//!
//! Pure: no clock, no I/O. MongoDB does the same to its documents with update pipelines; a test compares the two.
//!
//! # Invariants
//! - Applying commutes and is idempotent: entries may come in any order, repeatedly, before their target, from any number
//!   of workers and regions. So nothing here may depend on what is already there, other than by an order of [`Place`]s.
//! - Of several messages with the same key the first counts. Of several edits the last counts, and any edit counts more than
//!   the message. A deletion counts more than all else, for good.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use crate::model::{Place, RoomId};

/// One message of a room's log, as history sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it was said.
    pub room: RoomId,
    /// Where it stands in the log.
    pub place: Place,
    /// Who said it.
    pub from: String,
    /// What it means.
    pub what: What,
}

/// What an entry means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A message.
    Message {
        /// `<room>/<user>/<id>`, the user escaped: the `_id` of its document.
        key: String,
        /// What was said.
        said: Said,
    },
    /// Something about a message.
    Change {
        /// The key of that message.
        target: String,
        /// What.
        change: Change,
    },
    /// Nothing that history keeps, with the reason.
    Nothing(&'static str),
}

/// The content of a message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Said {
    /// The sender's id.
    pub id: String,
    /// Fingerprint of its position.
    pub fingerprint: u16,
    /// The body's JSON text, byte for byte.
    pub body: String,
    /// What it answers, as the client named it.
    pub reply_to: Option<String>,
    /// The key of that message.
    pub reply_key: Option<String>,
    /// Mentioned users.
    pub mentions: Vec<String>,
}

/// What can be said about a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Another body.
    Edit(String),
    /// It is withdrawn: only a tombstone is left.
    Delete,
    /// The sender has, or no longer has, this reaction to it.
    React {
        /// Which, e.g. `👍`.
        key: String,
        /// Whether it is there now.
        on: bool,
    },
    /// What workers found out, by name: `translation`, `emotion`, …; JSON text each.
    Annotate(Vec<(String, String)>),
}

/// A message and what became of it; also the beginning of one that is not known yet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Folded {
    /// The message; `None`: only what was said about it is known so far.
    pub base: Option<Base>,
    /// The last edit.
    pub edit: Option<Edit>,
    /// The first deletion.
    pub deleted: Option<Place>,
    /// By reaction and user: where that was said last, and whether it is there.
    pub reactions: BTreeMap<String, BTreeMap<String, (Place, bool)>>,
    /// By name: where that was said last, by whom, and its JSON text.
    pub annotations: BTreeMap<String, (Place, String, String)>,
}

/// A message as it was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// Where it stands.
    pub place: Place,
    /// Who said it.
    pub from: String,
    /// What was said; of a deleted message without body and mentions.
    pub said: Said,
}

/// An edit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// Where it stands.
    pub place: Place,
    /// The body's JSON text.
    pub body: String,
}

impl Folded {
    /// Adds what an entry says of this message.
    pub fn apply(&mut self, entry: &Entry) {
        match &entry.what {
            What::Nothing(_) => {}
            What::Message { said, .. } => {
                let first = self
                    .base
                    .as_ref()
                    .is_none_or(|base| entry.place < base.place);
                if first {
                    self.base = Some(Base {
                        place: entry.place.clone(),
                        from: entry.from.clone(),
                        said: said.clone(),
                    });
                }
            }
            What::Change { change, .. } => self.change(entry, change),
        }
        if self.deleted.is_some() {
            self.bury();
        }
    }

    fn change(&mut self, entry: &Entry, change: &Change) {
        let place = &entry.place;
        match change {
            Change::Edit(body) => {
                if self.edit.as_ref().is_none_or(|edit| edit.place < *place) {
                    self.edit = Some(Edit {
                        place: place.clone(),
                        body: body.clone(),
                    });
                }
            }
            Change::Delete => {
                if self.deleted.as_ref().is_none_or(|deleted| place < deleted) {
                    self.deleted = Some(place.clone());
                }
            }
            Change::React { key, on } => {
                let users = self.reactions.entry(key.clone()).or_default();
                if users.get(&entry.from).is_none_or(|(said, _)| said < place) {
                    users.insert(entry.from.clone(), (place.clone(), *on));
                }
            }
            Change::Annotate(annotations) => {
                for (name, json) in annotations {
                    let known = self.annotations.get(name);
                    if known.is_none_or(|(said, ..)| said < place) {
                        let annotation = (place.clone(), entry.from.clone(), json.clone());
                        self.annotations.insert(name.clone(), annotation);
                    }
                }
            }
        }
    }

    /// What a tombstone must not have.
    fn bury(&mut self) {
        self.edit = None;
        self.reactions.clear();
        self.annotations.clear();
        if let Some(base) = &mut self.base {
            base.said.body.clear();
            base.said.mentions.clear();
        }
    }

    /// The body as it is now, JSON text; `None` if the message was deleted.
    #[must_use]
    pub fn body(&self) -> Option<&str> {
        if self.deleted.is_some() {
            return None;
        }
        let edited = self.edit.as_ref().map(|edit| edit.body.as_str());
        edited.or(self.base.as_ref().map(|base| base.said.body.as_str()))
    }
}

/// The reaction that a body means: a string, or `{"key": …}` (also `text`), with `"remove": true` to take it back.
#[must_use]
pub fn reaction(body: &str) -> Option<Change> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Body {
        Plain(String),
        Full {
            #[serde(alias = "text")]
            key: String,
            #[serde(default)]
            remove: bool,
        },
    }
    let (key, on) = match serde_json::from_str(body).ok()? {
        Body::Plain(key) => (key, true),
        Body::Full { key, remove } => (key, !remove),
    };
    (1..=MAX_REACTION)
        .contains(&key.len())
        .then_some(Change::React { key, on })
}

/// The annotations that a body means: the fields of an object, at most [`MAX_ANNOTATIONS`].
#[must_use]
pub fn annotations(body: &str) -> Option<Change> {
    let fields: BTreeMap<String, Box<RawValue>> = serde_json::from_str(body).ok()?;
    let few = (1..=MAX_ANNOTATIONS).contains(&fields.len());
    let short = fields
        .keys()
        .all(|name| (1..=MAX_ANNOTATION_NAME).contains(&name.len()));
    let fields = fields
        .into_iter()
        .map(|(name, json)| (name, json.get().to_owned()));
    (few && short).then(|| Change::Annotate(fields.collect()))
}

/// Longest reaction, in bytes.
pub const MAX_REACTION: usize = 64;

/// Most annotations in one message.
pub const MAX_ANNOTATIONS: usize = 32;

/// Longest name of an annotation, in bytes.
pub const MAX_ANNOTATION_NAME: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{Epoch, Region};

    fn place(seq: u64) -> Place {
        Place {
            ts: 1_000 + seq / 2,
            origin: Region::parse(if seq.is_multiple_of(3) {
                "seoul"
            } else {
                "virginia"
            })
            .unwrap(),
            epoch: Epoch::parse("k3").unwrap(),
            seq,
        }
    }

    fn whats() -> impl Strategy<Value = What> {
        let said = "[0-9]{1,2}".prop_map(|body| Said {
            id: "1".to_owned(),
            fingerprint: 7,
            body,
            reply_to: None,
            reply_key: None,
            mentions: vec!["lee".to_owned()],
        });
        let change = prop_oneof![
            3 => "[0-9]{1,2}".prop_map(Change::Edit),
            1 => Just(Change::Delete),
            4 => ("👍|👎", any::<bool>()).prop_map(|(key, on)| Change::React { key, on }),
            2 => prop::collection::btree_map("emotion|translation", "[0-9]", 1..3)
                .prop_map(|fields| Change::Annotate(fields.into_iter().collect())),
        ];
        let target = "chat:x/kim/1".to_owned();
        let key = target.clone();
        prop_oneof![
            2 => said.prop_map(move |said| What::Message { key: key.clone(), said }),
            6 => change.prop_map(move |change| What::Change { target: target.clone(), change }),
        ]
    }

    fn entries() -> impl Strategy<Value = Vec<Entry>> {
        prop::collection::vec(("kim|lee", whats()), 1..12).prop_map(|said| {
            let entries = said.into_iter().zip(1..).map(|((from, what), seq)| Entry {
                room: RoomId::parse("chat:x").unwrap(),
                place: place(seq),
                from,
                what,
            });
            // The log of two regions in its order.
            let mut entries: Vec<Entry> = entries.collect();
            entries.sort_by(|a, b| a.place.cmp(&b.place));
            entries
        })
    }

    proptest! {
        #[test]
        fn any_order_and_any_repeat_ends_the_same(
            (entries, shuffled) in entries().prop_flat_map(|entries| {
                let twice: Vec<Entry> = entries.iter().chain(&entries).cloned().collect();
                (Just(entries), Just(twice).prop_shuffle())
            })
        ) {
            let fold = |entries: &[Entry]| {
                let mut folded = Folded::default();
                entries.iter().for_each(|entry| folded.apply(entry));
                folded
            };
            let folded = fold(&entries);
            prop_assert_eq!(&fold(&shuffled), &folded);
            // As one would say it in the order of the log.
            let deleted = entries.iter().any(|entry| {
                matches!(&entry.what, What::Change { change: Change::Delete, .. })
            });
            let last_edit = entries.iter().rev().find_map(|entry| match &entry.what {
                What::Change { change: Change::Edit(body), .. } => Some(body.as_str()),
                _ => None,
            });
            let first = entries.iter().find_map(|entry| match &entry.what {
                What::Message { said, .. } => Some(said.body.as_str()),
                _ => None,
            });
            let expected = if deleted { None } else { last_edit.or(first) };
            prop_assert_eq!(folded.body(), expected);
            prop_assert_eq!(folded.base.is_some(), first.is_some());
        }

        #[test]
        fn any_body_is_a_reaction_and_annotations_or_neither(body in "\\PC{0,40}") {
            if let Some(Change::React { key, .. }) = reaction(&body) {
                prop_assert!(!key.is_empty());
            }
            if let Some(Change::Annotate(fields)) = annotations(&body) {
                prop_assert!(!fields.is_empty());
            }
        }
    }

    #[test]
    fn bodies_of_reactions_and_annotations() {
        let react = |key: &str, on| {
            Some(Change::React {
                key: key.to_owned(),
                on,
            })
        };
        assert_eq!(reaction(r#""👍""#), react("👍", true));
        assert_eq!(
            reaction(r#"{"key":"👍","remove":true}"#),
            react("👍", false)
        );
        assert_eq!(reaction(r#"{"text":"👍"}"#), react("👍", true));
        for nothing in ["7", "\"\"", "{}", "{\"key\":7}", "[]", "{"] {
            assert_eq!(reaction(nothing), None, "{nothing}");
        }
        let found = Some(Change::Annotate(vec![(
            "translation".to_owned(),
            r#"{ "ko" : "안녕" }"#.to_owned(),
        )]));
        assert_eq!(annotations(r#"{"translation": { "ko" : "안녕" }}"#), found);
        for nothing in ["7", "{}", "[]", "\"x\"", r#"{"":1}"#] {
            assert_eq!(annotations(nothing), None, "{nothing}");
        }
    }
}
