//! The state of a message: the message itself with all its changes, independent of the order in which they arrive.
//!
//! This module uses no clock and does no I/O. MongoDB does the same to its documents with update pipelines; a test
//! compares the two.
//!
//! # Invariants
//! - Applying is commutative and idempotent: entries may arrive in any order, repeatedly, before their target, from any
//!   number of workers and regions. So the result may depend on existing content only through the order of [`Place`]s.
//! - Of several messages with the same key, the first counts. Of several edits, the last counts, and any edit overrides
//!   the message. A deletion overrides everything, permanently.
//! - An edit with mentions replaces the mentions; one without leaves them unchanged.
//! - What is kept is bounded, see [`Slots`].

use super::slots::{Annotation, Reaction, Slots};
use crate::model::{Place, RoomId};

/// One entry of a room's log, as history uses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its room.
    pub room: RoomId,
    /// Its place in the log.
    pub place: Place,
    /// When it was sent, if it was imported into a stream; in ms since 1970. Otherwise the time of its place is shown.
    pub original_ts: Option<u64>,
    /// Its sender.
    pub from: String,
    /// Its meaning.
    pub what: What,
}

/// The meaning of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A message.
    Message {
        /// `<room>/<user>/<id>`, with the user escaped: the `_id` of its document.
        key: String,
        /// Its content.
        said: Said,
    },
    /// A change of a message.
    Change {
        /// The key of that message.
        target: String,
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
    /// The fingerprint of its position.
    pub fingerprint: u16,
    /// The body's JSON text, byte for byte.
    pub body: String,
    /// The reference to the message it answers, as the client wrote it.
    pub reply_to: Option<String>,
    /// The key of that message.
    pub reply_key: Option<String>,
    /// Mentioned users.
    pub mentions: Vec<String>,
}

/// A change of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Replaces the body.
    Edit {
        /// The body's JSON text.
        body: String,
        /// The mentioned users; `None`: they stay as they are.
        mentions: Option<Vec<String>>,
    },
    /// Deletes the message: only a tombstone is left.
    Delete,
    /// Sets or removes a reaction of the sender.
    React {
        /// The reaction as it was written, e.g. `👍`.
        key: String,
        /// Whether the reaction is set.
        on: bool,
    },
    /// Results of workers, by name: `translation`, `emotion`, …; each a JSON text.
    Annotate(Vec<(String, String)>),
}

/// A message with its changes. The message itself may not be known yet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Folded {
    /// The message; `None` if only changes are known so far.
    pub base: Option<Base>,
    /// The last edit.
    pub edit: Option<Edit>,
    /// The first deletion.
    pub deleted: Option<Deletion>,
    /// The last edit with mentions: its place and the users.
    pub mentioned: Option<(Place, Vec<String>)>,
    /// Reactions by their normal form.
    pub reactions: Slots<Reaction>,
    /// Annotations by their name.
    pub annotations: Slots<Annotation>,
    /// Whether there were more reactions or annotations than are kept.
    pub truncated: bool,
}

/// A message without its changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// Its place.
    pub place: Place,
    /// Its time as it is shown, in ms since 1970.
    pub ts: u64,
    /// Its sender.
    pub from: String,
    /// Its content; if deleted, without body and mentions.
    pub said: Said,
}

/// An edit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// Its place.
    pub place: Place,
    /// Its time as it is shown, in ms since 1970.
    pub ts: u64,
    /// The body's JSON text.
    pub body: String,
}

/// A deletion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deletion {
    /// Its place.
    pub place: Place,
    /// Its time as it is shown, in ms since 1970.
    pub ts: u64,
}

impl Entry {
    /// The time that is shown, in ms since 1970.
    fn ts(&self) -> u64 {
        self.original_ts.unwrap_or(self.place.ts)
    }
}

impl Folded {
    /// Applies an entry to this message.
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
                        ts: entry.ts(),
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
            Change::Edit { body, mentions } => {
                if self.edit.as_ref().is_none_or(|edit| edit.place < *place) {
                    self.edit = Some(Edit {
                        place: place.clone(),
                        ts: entry.ts(),
                        body: body.clone(),
                    });
                }
                if let Some(users) = mentions
                    && self.mentioned.as_ref().is_none_or(|(last, _)| last < place)
                {
                    self.mentioned = Some((place.clone(), users.clone()));
                }
            }
            Change::Delete => {
                let known = self.deleted.as_ref().map(|deleted| &deleted.place);
                if known.is_none_or(|known| place < known) {
                    self.deleted = Some(Deletion {
                        place: place.clone(),
                        ts: entry.ts(),
                    });
                }
            }
            Change::React { key, on } => {
                self.truncated |= self.reactions.react(&entry.from, key, place, *on);
            }
            Change::Annotate(annotations) => {
                for (name, json) in annotations {
                    let said = Annotation {
                        at: place.clone(),
                        json: json.clone(),
                    };
                    self.truncated |= self.annotations.add(&entry.from, name, said);
                }
            }
        }
    }

    /// Removes what a tombstone must not contain.
    fn bury(&mut self) {
        self.edit = None;
        self.mentioned = None;
        self.reactions.clear();
        self.annotations.clear();
        self.truncated = false;
        if let Some(base) = &mut self.base {
            base.said.body.clear();
            base.said.mentions.clear();
        }
    }

    /// The current body, a JSON text; `None` if the message was deleted.
    #[must_use]
    pub fn body(&self) -> Option<&str> {
        if self.deleted.is_some() {
            return None;
        }
        let edited = self.edit.as_ref().map(|edit| edit.body.as_str());
        edited.or(self.base.as_ref().map(|base| base.said.body.as_str()))
    }

    /// When the last of the changes was stored, in ms since 1970.
    #[must_use]
    pub fn last_change(&self) -> Option<u64> {
        let reactions = self.reactions.iter().map(|(.., said)| &said.at);
        let annotations = self.annotations.iter().map(|(.., said)| &said.at);
        let edits = self.edit.iter().map(|edit| &edit.place);
        let deletions = self.deleted.iter().map(|deleted| &deleted.place);
        let all = reactions.chain(annotations).chain(edits).chain(deletions);
        all.map(|place| place.ts).max()
    }

    /// The users currently mentioned.
    #[must_use]
    pub fn mentions(&self) -> &[String] {
        match (&self.mentioned, &self.base) {
            (Some((_, users)), _) => users,
            (None, Some(base)) => &base.said.mentions,
            (None, None) => &[],
        }
    }
}

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
            3 => ("[0-9]{1,2}", prop::option::of(prop::collection::vec("ann|bob", 0..3)))
                .prop_map(|(body, mentions)| Change::Edit { body, mentions }),
            1 => Just(Change::Delete),
            4 => ("👍|👍\u{fe0f}|👎", any::<bool>()).prop_map(|(key, on)| Change::React { key, on }),
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
                original_ts: None,
                from,
                what,
            });
            // The log of two regions, in order.
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
            // The rules, stated for the log in order.
            let deleted = entries.iter().any(|entry| {
                matches!(&entry.what, What::Change { change: Change::Delete, .. })
            });
            let last_edit = entries.iter().rev().find_map(|entry| match &entry.what {
                What::Change { change: Change::Edit { body, .. }, .. } => Some(body.as_str()),
                _ => None,
            });
            let first = entries.iter().find_map(|entry| match &entry.what {
                What::Message { said, .. } => Some(said.body.as_str()),
                _ => None,
            });
            let expected = if deleted { None } else { last_edit.or(first) };
            prop_assert_eq!(folded.body(), expected);
            let last_mentions = entries.iter().rev().find_map(|entry| match &entry.what {
                What::Change { change: Change::Edit { mentions, .. }, .. } => mentions.clone(),
                _ => None,
            });
            let first_mentions = if first.is_some() { vec!["lee".to_owned()] } else { Vec::new() };
            let expected = last_mentions.unwrap_or(first_mentions);
            prop_assert_eq!(folded.mentions(), if deleted { Vec::new() } else { expected });
            prop_assert_eq!(folded.base.is_some(), first.is_some());
        }
    }
}
