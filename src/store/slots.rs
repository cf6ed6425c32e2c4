//! What users said about a message by name (reactions, annotations): of each user the last word on each name, within bounds.
//!
//! Pure. Which names and users are kept must not depend on the order in which they come, nor on what was forgotten in
//! between. "Those that came first" can't be had: a name that was forgotten may turn out to have come first, and then its
//! last word is gone. So the order is one that no entry can change, that of the texts themselves: of each user the first
//! [`Slot::NAMES`] names, of the first [`Slot::USERS`] users. What is beyond that in a part of the entries is beyond it in all
//! of them; so it may be forgotten at any time. A user who says too much loses only what they said themselves.
//!
//! A document in which there is more than counts is written anew. Where that can't be done, because it can't be read or is too
//! large, it takes in no new names and users: then it does depend on the order what is kept, but the document does not grow to
//! MongoDB's 16 MiB.

use std::collections::BTreeMap;

use crate::model::{MAX_ANNOTATIONS, Place, normal_reaction};

/// What users said by name; see the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slots<T>(BTreeMap<String, BTreeMap<String, T>>);

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

/// What one user said about one name.
pub trait Slot {
    /// Most names of one user.
    const NAMES: usize;
    /// Most users.
    const USERS: usize;
    /// Adds what the same user said about the same name; the order does not matter.
    fn join(&mut self, other: Self);
}

/// A user's reaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reaction {
    /// Where that was said last.
    pub at: Place,
    /// Whether it is there.
    pub on: bool,
    /// Where it was said first.
    pub first: Place,
    /// How it was written then: one of the texts with this normal form.
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
    /// Where that was said last.
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
    /// Adds what a user said. Whether something had to give way, be it this.
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
    /// User, name, and what was said.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, &T)> {
        self.0.iter().flat_map(|(user, names)| {
            let names = names.iter();
            names.map(move |(name, said)| (user.as_str(), name.as_str(), said))
        })
    }

    /// By name: each user and what they said.
    pub fn by_name(&self) -> BTreeMap<&str, Vec<(&str, &T)>> {
        let mut by_name: BTreeMap<&str, Vec<(&str, &T)>> = BTreeMap::new();
        for (user, name, said) in self.iter() {
            by_name.entry(name).or_default().push((user, said));
        }
        by_name
    }

    /// Leaves only what `known` has too, whatever is said there. Whether that is less.
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

    /// Small bounds, which few entries meet.
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

    /// The rule, said of all entries at once.
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
            // What is beyond the bounds is noticed in every order.
            prop_assert_eq!(gone_again, gone);
            // Two workers put together parts, and one is added to the other.
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
