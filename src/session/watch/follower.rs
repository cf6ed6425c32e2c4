//! What one who follows rooms has to be told next. No I/O and no clock.
//!
//! A room is kept only while there is something to tell of it, or, with a filter, while it matches or will match. There
//! are at most [`MAX_ROOMS`] of each; what does not fit is counted, and shows when the client reads the pages again.

use std::collections::{BTreeSet, HashMap, HashSet, hash_map::Entry};

use crate::{
    model::{Cursor, Region, RoomId},
    protocol::LastMessage,
};

/// Rooms that are kept of each sort.
const MAX_ROOMS: usize = 16_384;

/// Reads of a room in a row that do not show the message that was heard. After that it was probably erased.
const MAX_TRIES: u8 = 4;

/// What was said in a room whose messages nothing keeps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum Said {
    /// Nothing.
    #[default]
    Nothing,
    /// The newest message matches the filter.
    Message(LastMessage),
    /// The newest message does not.
    Other,
}

impl Said {
    /// What stands after `self`, if `older` was before it.
    fn after(self, older: Self) -> Self {
        match self {
            Self::Nothing => older,
            Self::Message(_) | Self::Other => self,
        }
    }
}

/// What is new in a room.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct News {
    /// The place of the newest message that was heard: origin and sequence.
    pub(super) place: Option<(Region, u64)>,
    /// Where the user's read marker was heard to be.
    pub(super) marker: Option<Cursor>,
    /// What was said, if nothing keeps it.
    pub(super) said: Said,
    /// Whether the record of the room has changed.
    pub(super) by_record: bool,
    /// When it came, relative to others.
    pub(super) order: u64,
    pub(super) tries: u8,
}

/// The state of a watch of a pattern.
#[derive(Debug, Default)]
pub(super) struct Follower {
    news: HashMap<RoomId, News>,
    order: u64,
    /// Rooms that the client takes for matching; only with a filter.
    shown: HashSet<RoomId>,
    /// Rooms that will match, and when, in ms since 1970.
    timers: BTreeSet<(u64, RoomId)>,
    due: HashMap<RoomId, u64>,
    /// Rooms whose newest annotation fulfils the condition.
    holding: HashSet<RoomId>,
    /// Rooms that were annotated since the last scan began.
    annotated: HashSet<RoomId>,
    /// Rooms that did not fit.
    lost: usize,
}

impl Follower {
    /// Something has happened in a room.
    pub(super) fn note(&mut self, room: &RoomId, news: News) {
        self.order += 1;
        let order = self.order;
        if self.news.len() >= MAX_ROOMS && !self.news.contains_key(room) {
            // The older half, so that this is rare.
            let middle = order.saturating_sub(MAX_ROOMS as u64 / 2);
            let before = self.news.len();
            self.news.retain(|_, news| news.order > middle);
            self.lost += before - self.news.len();
        }
        let by_record = news.by_record || self.news.get(room).is_some_and(|it| it.by_record);
        let known = self.news.entry(room.clone()).or_default();
        *known = News {
            place: news.place.or(known.place.take()),
            marker: news.marker.or(known.marker.take()),
            said: news.said.after(std::mem::take(&mut known.said)),
            by_record,
            order,
            tries: 0,
        };
    }

    /// What is to be told now: at most `most` rooms, the newest first. `now`: ms since 1970.
    pub(super) fn take(&mut self, now: u64, most: usize) -> Vec<(RoomId, News)> {
        while let Some((at, _)) = self.timers.first()
            && *at <= now
            && let Some((_, room)) = self.timers.pop_first()
        {
            self.due.remove(&room);
            self.note(&room, News::default());
        }
        let mut orders: Vec<u64> = self.news.values().map(|news| news.order).collect();
        let least = match orders.len().checked_sub(most) {
            None | Some(0) => 0,
            Some(rest) => *orders.select_nth_unstable(rest).1,
        };
        let taken = self.news.extract_if(|_, news| news.order >= least);
        let mut taken: Vec<_> = taken.collect();
        taken.sort_unstable_by_key(|(_, news)| std::cmp::Reverse(news.order));
        taken
    }

    /// Keeps for the next time what could not be told, unless there is something newer.
    pub(super) fn put_back(&mut self, room: RoomId, news: News) {
        match self.news.entry(room) {
            Entry::Vacant(entry) => drop(entry.insert(news)),
            Entry::Occupied(mut entry) => {
                let newer = entry.get_mut();
                newer.by_record |= news.by_record;
                newer.place = newer.place.take().or(news.place);
                newer.marker = newer.marker.take().or(news.marker);
                newer.said = std::mem::take(&mut newer.said).after(news.said);
            }
        }
    }

    /// Keeps what a read has not shown yet. `false`: it was tried often enough.
    pub(super) fn try_again(&mut self, room: &RoomId, news: &News) -> bool {
        let again = news.tries < MAX_TRIES;
        if again {
            let tries = news.tries + 1;
            self.put_back(
                room.clone(),
                News {
                    tries,
                    ..news.clone()
                },
            );
        }
        again
    }

    /// The number of rooms with something new that were not taken.
    pub(super) fn left(&self) -> usize {
        self.news.len()
    }

    /// The number of rooms that did not fit since this was called last.
    pub(super) fn take_lost(&mut self) -> usize {
        std::mem::take(&mut self.lost)
    }

    /// Whether there is anything to tell, except what becomes due.
    pub(super) fn has_news(&self) -> bool {
        !self.news.is_empty()
    }

    /// The client takes a room for matching from now on. `false`: there is no room for it.
    pub(super) fn show(&mut self, room: &RoomId) -> bool {
        Self::keep(&mut self.shown, room, &mut self.lost)
    }

    /// Whether the client takes a room for matching.
    pub(super) fn is_shown(&self, room: &RoomId) -> bool {
        self.shown.contains(room)
    }

    /// The room does not match. Returns whether the client has to be told.
    pub(super) fn hide(&mut self, room: &RoomId) -> bool {
        self.shown.remove(room)
    }

    /// The room will match at this time, in ms since 1970, if nothing happens until then.
    pub(super) fn wait(&mut self, room: &RoomId, at: u64) {
        self.forget_timer(room);
        if self.due.len() >= MAX_ROOMS {
            self.lost += 1;
            return;
        }
        self.due.insert(room.clone(), at);
        self.timers.insert((at, room.clone()));
    }

    /// The room will not match by itself. Returns whether it would have.
    pub(super) fn forget_timer(&mut self, room: &RoomId) -> bool {
        let at = self.due.remove(room);
        if let Some(at) = at {
            self.timers.remove(&(at, room.clone()));
        }
        at.is_some()
    }

    /// When the next room will match, in ms since 1970.
    pub(super) fn next_due(&self) -> Option<u64> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Whether the condition on annotations is fulfilled in a room.
    pub(super) fn holds(&self, room: &RoomId) -> bool {
        self.holding.contains(room)
    }

    /// What a new annotation says of the condition. Returns whether that has changed.
    pub(super) fn annotated(&mut self, room: &RoomId, holds: bool) -> bool {
        if self.annotated.len() < MAX_ROOMS {
            self.annotated.insert(room.clone());
        }
        let changed = self.holding.contains(room) != holds;
        match holds {
            true => drop(Self::keep(&mut self.holding, room, &mut self.lost)),
            false => drop(self.holding.remove(room)),
        }
        changed
    }

    /// A scan of the newest annotations begins.
    pub(super) fn begin_scan(&mut self) {
        self.annotated = HashSet::new();
    }

    /// Whether a room was annotated since then.
    pub(super) fn was_annotated(&self, room: &RoomId) -> bool {
        self.annotated.contains(room)
    }

    /// Has all rooms looked at that the client takes for matching. Returns whether there are any.
    pub(super) fn note_shown(&mut self) -> bool {
        for room in self.shown.iter().cloned().collect::<Vec<_>>() {
            self.note(&room, News::default());
        }
        !self.shown.is_empty()
    }

    fn keep(rooms: &mut HashSet<RoomId>, room: &RoomId, lost: &mut usize) -> bool {
        if rooms.len() >= MAX_ROOMS && !rooms.contains(room) {
            *lost += 1;
            return false;
        }
        rooms.insert(room.clone());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(number: usize) -> RoomId {
        RoomId::parse(&format!("chat:{number}")).unwrap()
    }

    fn names(taken: &[(RoomId, News)]) -> Vec<RoomId> {
        taken.iter().map(|(room, _)| room.clone()).collect()
    }

    #[test]
    fn the_newest_rooms_come_first_and_the_rest_later() {
        let mut follower = Follower::default();
        for number in [1, 2, 3, 4, 1] {
            follower.note(&room(number), News::default());
        }
        let taken = follower.take(0, 2);
        assert_eq!(names(&taken), [room(1), room(4)]);
        assert_eq!(follower.left(), 2);
        // What was not told does not replace what is newer.
        follower.note(
            &room(4),
            News {
                by_record: true,
                ..News::default()
            },
        );
        for (room, news) in taken {
            follower.put_back(room, news);
        }
        let rest = follower.take(0, 9);
        assert_eq!(names(&rest), [room(4), room(1), room(3), room(2)]);
        assert!(rest[0].1.by_record && !follower.has_news());
        assert_eq!(follower.take(0, 9), []);
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_oldest_is_lost() {
        let mut follower = Follower::default();
        for number in 0..3 * MAX_ROOMS {
            follower.note(&room(number), News::default());
            assert!(follower.news.len() <= MAX_ROOMS);
        }
        let newest = follower.take(0, 1);
        assert_eq!(names(&newest), [room(3 * MAX_ROOMS - 1)]);
        assert_eq!(follower.left() + follower.take_lost(), 3 * MAX_ROOMS - 1);
        assert_eq!(follower.take_lost(), 0);
        for number in 0..MAX_ROOMS + 3 {
            assert_eq!(follower.show(&room(number)), number < MAX_ROOMS);
            follower.annotated(&room(number), true);
            follower.wait(&room(number), 5);
        }
        assert!(follower.holding.len() == MAX_ROOMS && follower.due.len() == MAX_ROOMS);
        assert!(follower.timers.len() == MAX_ROOMS && follower.shown.len() == MAX_ROOMS);
    }

    #[test]
    fn the_newest_message_decides_what_was_said() {
        let message = |id: &str| {
            Said::Message(LastMessage {
                id: id.to_owned(),
                from: "lee".to_owned(),
                ts: 1,
                text: None,
            })
        };
        let mut follower = Follower::default();
        for (said, expected) in [
            (message("1"), message("1")),
            (Said::Nothing, message("1")),
            (Said::Other, Said::Other),
            (Said::Nothing, Said::Other),
            (message("2"), message("2")),
        ] {
            let news = News {
                said,
                ..News::default()
            };
            follower.note(&room(1), news);
            let (room, news) = follower.take(0, 1).remove(0);
            assert_eq!(news.said, expected);
            // Neither does something else that happens while it could not be told.
            follower.note(&room, News::default());
            follower.put_back(room, news);
        }
    }

    #[test]
    fn a_room_is_due_at_the_time_that_was_set_last() {
        let mut follower = Follower::default();
        follower.wait(&room(1), 10);
        follower.wait(&room(2), 20);
        follower.wait(&room(1), 30);
        follower.wait(&room(3), 15);
        follower.forget_timer(&room(3));
        assert_eq!(follower.next_due(), Some(20));
        assert_eq!(names(&follower.take(19, 9)), []);
        assert_eq!(names(&follower.take(25, 9)), [room(2)]);
        assert_eq!(names(&follower.take(30, 9)), [room(1)]);
        assert_eq!(follower.next_due(), None);
    }

    #[test]
    fn a_room_that_a_read_does_not_show_is_tried_a_few_times() {
        let mut follower = Follower::default();
        follower.note(&room(1), News::default());
        let mut tries = 0;
        while let Some((room, news)) = follower.take(0, 1).pop() {
            follower.try_again(&room, &news);
            tries += 1;
        }
        assert_eq!(tries, 1 + usize::from(MAX_TRIES));
    }
}
