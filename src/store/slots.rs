//! What users said about a message by name (reactions, annotations): each user's last value for each name, within
//! bounds.
//!
//! This module does no I/O. Which names and users are kept must depend neither on the order of arrival nor on what was
//! dropped in between. Keeping "the first ones" is impossible: a dropped name may turn out to have come first, and its
//! last value is then lost. So the order is one that no entry can change, that of the texts themselves: for each user
//! the first [`Slot::NAMES`] names, and the first [`Slot::USERS`] users. A value that exceeds the bounds among some of
//! the entries also exceeds them among all of them, so it may be dropped at any time. A user who says too much loses
//! only their own values.
//!
//! A document that holds more than is kept is rewritten. If that is impossible, because the document can't be read or
//! is too large, it accepts no new names and users. What is kept then depends on the order, but the document does not
//! grow to MongoDB's 16 MiB.

use std::collections::BTreeMap;

use crate::model::{MAX_ANNOTATIONS, Place, normal_reaction};

/// Values of users by name; see the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slots<T>(BTreeMap<String, BTreeMap<String, T>>);

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

/// The value of one user for one name.
pub trait Slot {
    /// Maximum number of names per user.
    const NAMES: usize;
    /// Maximum number of users.
    const USERS: usize;
    /// Joins another value of the same user for the same name. The order does not matter.
    fn join(&mut self, other: Self);
}

/// A user's reaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reaction {
    /// The place of its last change.
    pub at: Place,
    /// Whether it is set.
    pub on: bool,
    /// The place of its first use.
    pub first: Place,
    /// The spelling of its first use: one of the texts with this normal form.
    pub key: String,
}

impl Slot for Reaction {
    const NAMES: usize = 10;
    const USERS: usize = 1000;

    fn join(&mut self, other: Self) {
        if other.at > self.at {
            (self.at, self.on) = (other.at, other.on);
        }
        if other.first < self.first {
            (self.first, self.key) = (other.first, other.key);
        }
    }
}

/// A user's annotation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Annotation {
    /// The place of its last change.
    pub at: Place,
    /// Its JSON text.
    pub json: String,
}

impl Slot for Annotation {
    const NAMES: usize = MAX_ANNOTATIONS;
    const USERS: usize = 8;

    fn join(&mut self, other: Self) {
        if other.at > self.at {
            *self = other;
        }
    }
}

impl<T: Slot> Slots<T> {
    /// Adds a user's value. Returns whether a value was dropped, possibly this one.
    pub(super) fn add(&mut self, user: &str, name: &str, said: T) -> bool {
        let names = match self.0.get_mut(user) {
            Some(names) => names,
            None => self.0.entry(user.to_owned()).or_default(),
        };
        match names.get_mut(name) {
            Some(known) => known.join(said),
            None => {
                names.insert(name.to_owned(), said);
            }
        }
        let mut gone = false;
        if names.len() > T::NAMES {
            names.pop_last();
            gone = true;
        }
        if self.0.len() > T::USERS {
            self.0.pop_last();
            gone = true;
        }
        gone
    }
}

impl<T> Slots<T> {
    /// User, name and value.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, &T)> {
        self.0.iter().flat_map(|(user, names)| {
            let names = names.iter();
            names.map(move |(name, said)| (user.as_str(), name.as_str(), said))
        })
    }

    /// The users and their values, by name.
    pub fn by_name(&self) -> BTreeMap<&str, Vec<(&str, &T)>> {
        let mut by_name: BTreeMap<&str, Vec<(&str, &T)>> = BTreeMap::new();
        for (user, name, said) in self.iter() {
            by_name.entry(name).or_default().push((user, said));
        }
        by_name
    }

    /// Keeps only the users and names that `known` has too. Returns whether any were removed.
    pub(super) fn retain_known(&mut self, known: &Self) -> bool {
        let mut less = false;
        self.0.retain(|user, names| {
            let known = known.0.get(user);
            let before = names.len();
            names.retain(|name, _| known.is_some_and(|known| known.contains_key(name)));
            less |= names.len() < before;
            !names.is_empty()
        });
        less
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

impl Slots<Reaction> {
    /// Adds a reaction as it was written.
    pub(super) fn react(&mut self, user: &str, key: &str, place: &Place, on: bool) -> bool {
        let said = Reaction {
            at: place.clone(),
            on,
            first: place.clone(),
            key: key.to_owned(),
        };
        self.add(user, &normal_reaction(key), said)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{Epoch, Region};

    /// Small bounds, which a few entries reach.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct Small(Reaction);

    impl Slot for Small {
        const NAMES: usize = 3;
        const USERS: usize = 2;

        fn join(&mut self, other: Self) {
            self.0.join(other.0);
        }
    }

    fn place(seq: u64) -> Place {
        Place {
            ts: 1000 + seq / 3,
            origin: Region::parse("seoul").unwrap(),
            epoch: Epoch::parse("k3").unwrap(),
            seq,
        }
    }

    type Said = (String, String, u64, bool);

    fn of(said: &[Said]) -> (Slots<Small>, bool) {
        let (mut slots, mut cut) = (Slots::default(), false);
        for (user, name, seq, on) in said {
            let one = Reaction {
                at: place(*seq),
                on: *on,
                first: place(*seq),
                key: format!("{name}{seq}"),
            };
            cut |= slots.add(user, name, Small(one));
        }
        (slots, cut)
    }

    fn texts(slots: &Slots<Small>) -> Vec<(String, String, u64, bool, String)> {
        let texts = slots.iter().map(|(user, name, Small(said))| {
            (
                user.to_owned(),
                name.to_owned(),
                said.at.seq,
                said.on,
                said.key.clone(),
            )
        });
        texts.collect()
    }

    /// The rule, stated for all entries at once.
    fn model(said: &[Said]) -> Vec<(String, String, u64, bool, String)> {
        let mut all: BTreeMap<&str, BTreeMap<&str, Vec<&Said>>> = BTreeMap::new();
        for one in said {
            let names = all.entry(&one.0).or_default();
            names.entry(&one.1).or_default().push(one);
        }
        let mut kept = Vec::new();
        for (user, names) in all.iter().take(Small::USERS) {
            for (name, said) in names.iter().take(Small::NAMES) {
                let (mut first, mut last) = (said[0], said[0]);
                for one in said {
                    first = if one.2 < first.2 { one } else { first };
                    last = if one.2 > last.2 { one } else { last };
                }
                let key = format!("{name}{}", first.2);
                kept.push(((*user).to_owned(), (*name).to_owned(), last.2, last.3, key));
            }
        }
        kept
    }

    fn said() -> impl Strategy<Value = Vec<Said>> {
        let one = ("[a-d]", "[a-f]", any::<bool>());
        prop::collection::vec(one, 1..30).prop_map(|said| {
            let said = said.into_iter().zip(1..);
            said.map(|((user, name, on), seq)| (user, name, seq, on))
                .collect()
        })
    }

    proptest! {
        #[test]
        fn the_same_is_kept_whatever_the_order_the_repeats_and_the_parts(
            (said, shuffled, cut) in said().prop_flat_map(|said| {
                let again: Vec<Said> = said.iter().chain(said.iter().step_by(2)).cloned().collect();
                let count = again.len();
                (Just(said), Just(again).prop_shuffle(), 0..=count)
            })
        ) {
            let (kept, gone) = of(&said);
            prop_assert_eq!(texts(&kept), model(&said));
            let (again, gone_again) = of(&shuffled);
            prop_assert_eq!(&again, &kept);
            // Values beyond the bounds are noticed in every order.
            prop_assert_eq!(gone_again, gone);
            // Two workers fold parts of the entries, and one result is added to the other.
            let (one, two) = shuffled.split_at(cut);
            let ((mut one, mut cut), (two, cut_two)) = (of(one), of(two));
            cut |= cut_two;
            for (user, name, said) in two.iter() {
                cut |= one.add(user, name, said.clone());
            }
            prop_assert_eq!(one, kept);
            prop_assert_eq!(cut, gone);
        }
    }

    #[test]
    fn who_says_too_much_takes_nothing_from_others() {
        let mut slots = Slots::default();
        slots.react("lee", "👍", &place(1), true);
        slots.react("aaa", "~", &place(2), true);
        for n in 0..2400 {
            slots.react("kim", &format!("!{n}"), &place(3 + n), true);
        }
        assert_eq!(slots.iter().count(), 2 + Reaction::NAMES);
        assert!(slots.by_name().contains_key("👍"));
        assert!(slots.by_name().contains_key("~"));
    }
}
