//! Up to where the members of a room were told that others have read: pure state.

use std::collections::HashMap;

use indexmap::IndexMap;

use crate::model::{Cursor, Epoch, Region};

/// The marker of each user that members were told, or could have read.
///
/// It starts with what the bucket holds ([`Self::seed`]). Receipts before that wait. Receipts arrive out of order and
/// from several edges: only markers that have grown are told.
#[derive(Debug, Default)]
pub struct Table {
    users: HashMap<String, Shown>,
    /// Whether the bucket was read, and the receipts before that.
    seeded: bool,
    waiting: IndexMap<String, Cursor>,
    /// Users whose markers have grown while no member was told.
    missed: IndexMap<String, ()>,
}

#[derive(Debug)]
struct Shown {
    cursor: Cursor,
    /// Whether members were told. If not, a member may have read an older value from the bucket than this one. Then the
    /// next receipt tells it, even if the marker has not grown.
    told: bool,
}

impl Table {
    /// Takes a receipt. Returns the marker to be told, if any.
    pub fn hear(
        &mut self,
        user: &str,
        cursor: &Cursor,
        is_current: impl Fn(&Region, &Epoch) -> bool,
    ) -> Option<Cursor> {
        if !self.seeded {
            match self.waiting.get_mut(user) {
                Some(heard) => *heard = heard.merge(cursor, is_current),
                None => {
                    self.waiting.insert(user.to_owned(), cursor.clone());
                }
            }
            return None;
        }
        let Some(shown) = self.users.get_mut(user) else {
            let shown = Shown {
                cursor: cursor.clone(),
                told: true,
            };
            self.users.insert(user.to_owned(), shown);
            return Some(cursor.clone());
        };
        let merged = shown.cursor.merge(cursor, is_current);
        let news = !shown.told || merged != shown.cursor;
        shown.cursor = merged;
        shown.told = true;
        news.then(|| shown.cursor.clone())
    }

    /// Takes a message of the user. Its receivers know that its sender has read up to it, so nothing needs to be told.
    pub fn spoke(
        &mut self,
        user: &str,
        cursor: &Cursor,
        is_current: impl Fn(&Region, &Epoch) -> bool,
    ) {
        match self.users.get_mut(user) {
            Some(shown) => {
                let merged = shown.cursor.merge(cursor, is_current);
                // If the marker is beyond the message and was not told yet, it must still be told.
                shown.told |= merged == *cursor;
                shown.cursor = merged;
            }
            None => {
                let shown = Shown {
                    cursor: cursor.clone(),
                    told: true,
                };
                self.users.insert(user.to_owned(), shown);
            }
        }
    }

    /// Takes what the bucket holds, and returns the markers to be told. The first time these are only the ones from
    /// receipts that waited. Later they are the ones that have grown, whose receipts were missed.
    pub fn seed(
        &mut self,
        stored: impl IntoIterator<Item = (String, Cursor)>,
        is_current: impl Fn(&Region, &Epoch) -> bool,
    ) -> Vec<(String, Cursor)> {
        let first = !std::mem::replace(&mut self.seeded, true);
        let mut news = Vec::new();
        for (user, cursor) in stored {
            let Some(shown) = self.users.get_mut(&user) else {
                if !first {
                    news.push((user.clone(), cursor.clone()));
                }
                let told = !first;
                self.users.insert(user, Shown { cursor, told });
                continue;
            };
            let merged = shown.cursor.merge(&cursor, &is_current);
            if merged != shown.cursor {
                shown.told = !first;
                if shown.told {
                    news.push((user, merged.clone()));
                }
                shown.cursor = merged;
            }
        }
        for (user, heard) in std::mem::take(&mut self.waiting) {
            if let Some(cursor) = self.hear(&user, &heard, &is_current) {
                news.push((user, cursor));
            }
        }
        news
    }

    /// Notes that the marker of `user` was not told. [`Self::missed`] returns it later.
    pub fn miss(&mut self, user: String) {
        self.missed.insert(user, ());
    }

    /// Returns the markers that were not told, each once.
    pub fn missed(&mut self) -> Vec<(String, Cursor)> {
        std::mem::take(&mut self.missed)
            .into_keys()
            .filter_map(|user| {
                let cursor = self.users.get(&user)?.cursor.clone();
                Some((user, cursor))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{Fingerprint, Position};

    fn cursor(seq: u64) -> Cursor {
        Cursor::single(Position {
            origin: Region::parse("seoul").unwrap(),
            epoch: Epoch::parse("k3").unwrap(),
            seq,
            fingerprint: Fingerprint(1),
        })
    }

    fn seq(cursor: &Cursor) -> u64 {
        cursor.positions()[0].seq
    }

    fn current(_: &Region, _: &Epoch) -> bool {
        true
    }

    #[test]
    fn what_was_heard_before_the_bucket_was_read_is_told_then() {
        let mut table = Table::default();
        assert_eq!(table.hear("kim", &cursor(5), current), None);
        assert_eq!(table.hear("lee", &cursor(2), current), None);
        assert_eq!(table.hear("kim", &cursor(4), current), None);
        let stored = [("kim", 3), ("lee", 4), ("park", 9)];
        let stored = stored.map(|(user, seq)| (user.to_owned(), cursor(seq)));
        let told = table.seed(stored, current);
        let expected = [("kim", 5), ("lee", 4)].map(|(user, seq)| (user.to_owned(), cursor(seq)));
        assert_eq!(told, expected);
        // It is in the bucket, but a member that read the bucket before does not know it.
        assert_eq!(table.hear("park", &cursor(8), current), Some(cursor(9)));
        assert_eq!(table.hear("park", &cursor(9), current), None);
    }

    #[test]
    fn a_message_tells_the_marker_of_its_sender() {
        let mut table = Table::default();
        table.seed([("kim".to_owned(), cursor(7))], current);
        table.spoke("kim", &cursor(5), current);
        assert_eq!(table.hear("kim", &cursor(6), current), Some(cursor(7)));
        table.spoke("kim", &cursor(8), current);
        assert_eq!(table.hear("kim", &cursor(8), current), None);
    }

    proptest! {
        /// Whatever arrives in whatever order: no marker is told twice or goes back, and after the bucket was read,
        /// everyone knows the maximum of what was heard.
        #[test]
        fn nobody_is_told_of_a_marker_that_goes_back(
            events in prop::collection::vec((0..3_usize, 0..4_u8, 0..20_u64), 0..80)
        ) {
            const USERS: [&str; 3] = ["kim", "lee", "park"];
            let mut table = Table::default();
            let mut told = [None::<u64>; 3];
            let mut heard = [None::<u64>; 3];
            let mut bucket = [None::<u64>; 3];
            let mut seeded = false;
            for (user, what, at) in events {
                let mut news = Vec::new();
                match what {
                    0 | 1 => {
                        heard[user] = heard[user].max(Some(at));
                        news.extend(table.hear(USERS[user], &cursor(at), current).map(|c| (USERS[user].to_owned(), c)));
                    }
                    2 => bucket[user] = bucket[user].max(Some(at)),
                    _ => {
                        seeded = true;
                        let stored: Vec<_> = USERS.iter().zip(bucket)
                            .filter_map(|(user, seq)| Some(((*user).to_owned(), cursor(seq?)))).collect();
                        news = table.seed(stored, current);
                    }
                }
                for (user, cursor) in news {
                    let at = USERS.iter().position(|name| *name == user).unwrap();
                    prop_assert!(told[at] < Some(seq(&cursor)), "{} was told {:?} again", user, told[at]);
                    told[at] = Some(seq(&cursor));
                }
                if seeded {
                    for user in 0..USERS.len() {
                        prop_assert!(told[user] >= heard[user]);
                    }
                }
            }
        }
    }
}
