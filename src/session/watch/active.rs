//! A room of a list in which something has happened: its summary, kept up with what is heard. No I/O and no clock.

use std::time::{Duration, Instant};

use crate::{
    model::Cursor,
    protocol::{LastMessage, RoomSummary},
};

/// Reads of a room in a row that do not show what was heard, within one and a half minutes. After that it was probably
/// erased.
const MAX_TRIES: u8 = 13;

/// Pause after the first of these reads. Each pause is half as long again as the one before: what is heard may be minutes
/// ahead of a mirror of another region.
const LAG: Duration = Duration::from_millis(250);

/// A room in which messages came during a read, or whose read failed, is read again after this time at the earliest.
const PAUSE: Duration = Duration::from_secs(1);

/// Messages that are kept while a room is read. If more are heard, it is read again.
const MAX_DURING: usize = 64;

/// A room in which something has happened.
#[derive(Debug, Default)]
pub(super) struct Active {
    /// `None` if it must be read, or if the room is not one of the list.
    pub(super) summary: Option<RoomSummary>,
    /// The head of the room when the summary was read.
    read_at: Option<Cursor>,
    /// Whether it must be read.
    pub(super) is_stale: bool,
    /// Whether the session has to be told.
    pub(super) is_new: bool,
    /// What a read must have seen.
    expects: Option<Cursor>,
    /// The marker that a read must have seen.
    expects_marker: Option<Cursor>,
    /// Whether something else than a message has happened since a read began.
    again: bool,
    /// When it may be read again at the earliest.
    not_before: Option<Instant>,
    tries: u8,
    /// Whether it is not read before `not_before` because the last read did not show what was heard.
    lags: bool,
    /// The newest message of an ephemeral room, which can't be read.
    ephemeral: Option<LastMessage>,
    /// Whether it is being read.
    is_reading: bool,
    /// What was heard during the read. It is counted on top of what the read finds: otherwise a busy room would be read
    /// without end.
    during: Vec<During>,
}

/// A message that was heard while its room was read.
#[derive(Debug)]
struct During {
    last: LastMessage,
    cursor: Cursor,
    previous: Option<u64>,
    mentions: bool,
    is_own: bool,
}

/// A message that was heard.
#[derive(Debug)]
pub(super) struct Heard<'h> {
    /// What a summary shows of it.
    pub(super) last: LastMessage,
    /// Its cursor: one position.
    pub(super) cursor: &'h Cursor,
    /// The sequence of the message of the same origin before it, if that is known.
    pub(super) previous: Option<u64>,
    /// Whether it mentions the user.
    pub(super) mentions: bool,
}

/// Up to where messages are counted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caps {
    pub(super) unread: u64,
    pub(super) mentions: u64,
}

/// Whether a cursor is at or after another one. Positions of another log can't be compared, and count as reached.
pub(super) fn covers(head: &Cursor, other: &Cursor) -> bool {
    other.positions().iter().all(|at| {
        let its = head.get(&at.origin);
        its.is_some_and(|its| its.epoch != at.epoch || its.seq >= at.seq)
    })
}

fn add(expects: &mut Option<Cursor>, cursor: &Cursor) {
    *expects = Some(match expects {
        Some(expects) => expects.merge(cursor, |_, _| true),
        None => cursor.clone(),
    });
}

impl Active {
    /// Takes in a message of a user's room. Without a summary, or if the message may be of another log, or one before it
    /// was missed, the room has to be read. Sending moves the sender's marker, but that is stored later than the message.
    pub(super) fn message(&mut self, user: &str, heard: Heard<'_>, caps: Caps) {
        let Heard {
            last,
            cursor,
            previous,
            mentions,
        } = heard;
        let is_own = last.from == user;
        if self.is_reading && self.during.len() < MAX_DURING {
            return self.during.push(During {
                last,
                cursor: cursor.clone(),
                previous,
                mentions,
                is_own,
            });
        }
        let Some(summary) = self.summary.as_mut().filter(|_| !self.is_stale) else {
            return self.expect(cursor, is_own);
        };
        let Some(position) = cursor.positions().first() else {
            return;
        };
        let known = summary
            .head
            .as_ref()
            .and_then(|head| head.get(&position.origin));
        match known {
            Some(known) if known.epoch != position.epoch => return self.expect(cursor, is_own),
            Some(known) if known.seq >= position.seq => {
                // It was counted when the summary was read, or comes late: signals have no order.
                let read = self
                    .read_at
                    .as_ref()
                    .and_then(|read| read.get(&position.origin));
                let marker = summary.marker.as_ref();
                if read.is_none_or(|read| read.seq < position.seq) {
                    self.expect(cursor, is_own);
                } else if is_own && !marker.is_some_and(|marker| covers(marker, cursor)) {
                    self.read(cursor);
                }
                return;
            }
            Some(known) if previous.is_some_and(|previous| previous != known.seq) => {
                return self.expect(cursor, is_own);
            }
            Some(_) => {}
            // The first message of another region: what else is there is not known.
            None if summary.head.is_some() => return self.expect(cursor, is_own),
            None => {}
        }
        let head = match &summary.head {
            Some(head) => head.merge(cursor, |_, _| true),
            None => cursor.clone(),
        };
        let only_origin = head.positions().len() == 1;
        let unread = summary.unread.unwrap_or_default();
        // What is unread of other regions stays so.
        if is_own && !only_origin && unread > 0 {
            return self.expect(cursor, is_own);
        }
        // That it was read on another device may have been heard before.
        let marked = summary.marker.as_ref();
        let marked = marked.and_then(|marker| marker.get(&position.origin));
        let is_read = marked.is_some_and(|at| at.epoch == position.epoch && at.seq >= position.seq);
        summary.head = Some(head);
        if is_own {
            if only_origin {
                (summary.unread, summary.capped, summary.mentions) = (Some(0), false, Some(0));
                summary.marker = Some(cursor.clone());
            }
        } else if !summary.capped && !is_read {
            let now = unread + 1;
            summary.capped = now > caps.unread;
            summary.unread = Some(now.min(caps.unread));
            let mentions = summary.mentions.map(|known| known + u64::from(mentions));
            summary.mentions = mentions.filter(|_| now <= caps.mentions);
        }
        if summary
            .last
            .as_ref()
            .is_none_or(|known| known.ts <= last.ts)
        {
            summary.last = Some(last);
        }
        self.is_new = true;
    }

    /// Takes in a message of an ephemeral room.
    pub(super) fn ephemeral(&mut self, last: LastMessage) {
        match self.summary.as_mut().filter(|_| !self.is_stale) {
            Some(summary) => {
                summary.last = Some(last.clone());
                self.is_new = true;
            }
            None => self.is_stale = true,
        }
        self.ephemeral = Some(last);
    }

    /// Takes in that the user has read.
    pub(super) fn read(&mut self, marker: &Cursor) {
        let Some(summary) = self.summary.as_mut().filter(|_| !self.is_stale) else {
            return self.expect_marker(marker);
        };
        let covered = summary.head.as_ref().is_some_and(|head| {
            head.positions().iter().all(|at| {
                let marked = marker.get(&at.origin);
                marked.is_some_and(|marked| marked.epoch == at.epoch && marked.seq >= at.seq)
            })
        });
        if covered {
            (summary.unread, summary.capped, summary.mentions) = (Some(0), false, Some(0));
            summary.marker = Some(marker.clone());
            self.is_new = true;
        } else {
            self.expect_marker(marker);
        }
    }

    /// The room has to be read. What is heard of a marker comes before it is stored.
    fn expect_marker(&mut self, marker: &Cursor) {
        self.changed();
        add(&mut self.expects_marker, marker);
    }

    /// Something has changed that can only be read.
    pub(super) fn changed(&mut self) {
        (self.is_stale, self.again) = (true, true);
        self.hurry();
    }

    /// There is something new, so the next read may show more than the last one.
    fn hurry(&mut self) {
        if std::mem::take(&mut self.lags) {
            (self.not_before, self.tries) = (None, 0);
        }
    }

    /// The room has to be read, and the read must show what stands at `cursor`. `is_own`: the user has sent it.
    fn expect(&mut self, cursor: &Cursor, is_own: bool) {
        self.is_stale = true;
        self.hurry();
        add(&mut self.expects, cursor);
        if is_own {
            add(&mut self.expects_marker, cursor);
        }
    }

    /// Whether it is to be read now.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.is_stale && self.not_before.is_none_or(|at| at <= now)
    }

    /// Whether the summary is not what is stored. The newest message of an ephemeral room is not stored.
    pub(super) fn differs(&self, stored: &RoomSummary) -> bool {
        match &self.ephemeral {
            None => self.summary.as_ref() != Some(stored),
            Some(last) => {
                let mut stored = stored.clone();
                stored.last = Some(last.clone());
                self.summary.as_ref() != Some(&stored)
            }
        }
    }

    /// A read begins.
    pub(super) fn begin_read(&mut self) {
        (self.again, self.is_reading) = (false, true);
    }

    /// A read has failed: it is repeated, but not at once.
    pub(super) fn fail_read(&mut self, now: Instant) {
        self.is_reading = false;
        self.expect_during();
        self.not_before = Some(now + PAUSE);
    }

    /// What was heard during a read must show in the next one.
    fn expect_during(&mut self) {
        for During { cursor, is_own, .. } in std::mem::take(&mut self.during) {
            self.expect(&cursor, is_own);
        }
    }

    /// Takes in what was heard while the room was read.
    pub(super) fn catch_up(&mut self, user: &str, caps: Caps) {
        for heard in std::mem::take(&mut self.during) {
            let heard_now = Heard {
                last: heard.last,
                cursor: &heard.cursor,
                previous: heard.previous,
                mentions: heard.mentions,
            };
            self.message(user, heard_now, caps);
        }
    }

    /// A read has ended, and [`Self::catch_up`] follows. `read`: `None` if the room is not one of the list; `false` if
    /// messages came meanwhile. Returns `false` if it was read often enough, and what was heard never showed.
    pub(super) fn end_read(&mut self, read: Option<(RoomSummary, bool)>, now: Instant) -> bool {
        self.is_reading = false;
        let is_exact = read.as_ref().is_none_or(|(_, exact)| *exact);
        // A room in which messages come all the time is not read all the time.
        self.not_before = (!is_exact).then(|| now + PAUSE);
        let before = std::mem::replace(&mut self.summary, read.map(|(summary, _)| summary));
        if let (Some(summary), Some(last)) = (&mut self.summary, &self.ephemeral) {
            summary.last = Some(last.clone());
        }
        self.read_at = self.summary.as_ref().and_then(|it| it.head.clone());
        // Replicas may lag behind what was heard already.
        let has = |known: Option<&Cursor>, expects: &Option<Cursor>| {
            let expects = expects.as_ref();
            expects.is_none_or(|expects| known.is_some_and(|known| covers(known, expects)))
        };
        let shows = self.summary.as_ref().is_none_or(|summary| {
            has(summary.head.as_ref(), &self.expects)
                && has(summary.marker.as_ref(), &self.expects_marker)
        });
        self.tries = match shows {
            true => 0,
            false => self.tries + u8::from(is_exact),
        };
        let lags = !shows && self.tries < MAX_TRIES;
        self.lags = lags && is_exact;
        if self.lags {
            let pause = LAG.mul_f64(1.5_f64.powi(i32::from(self.tries) - 1));
            self.not_before = Some(now + pause);
        }
        if !lags {
            (self.expects, self.expects_marker, self.tries) = (None, None, 0);
        }
        self.is_stale = !is_exact || lags || self.again;
        if self.summary.is_none() {
            self.during.clear();
        } else if self.is_stale {
            let (lags, not_before) = (self.lags, self.not_before);
            self.expect_during();
            // It is not read sooner for that.
            (self.lags, self.not_before) = (lags, not_before);
        }
        // Without a summary it is not known what the client was told.
        self.is_new |= before.is_none() || before != self.summary;
        shows || lags
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::model::RoomId;

    const CAPS: Caps = Caps {
        unread: 6,
        mentions: 4,
    };

    fn cursor(seq: u64) -> Cursor {
        format!("seoul.k3.{seq}.7f02").parse().unwrap()
    }

    pub(in super::super) fn summary(head: u64, unread: u64) -> RoomSummary {
        RoomSummary {
            room: RoomId::parse("chat:a").unwrap(),
            kind: None,
            about: None,
            title: None,
            info: None,
            peers: Vec::new(),
            head: Some(cursor(head)),
            last: None,
            unread: Some(unread),
            capped: false,
            mentions: Some(0),
            marker: None,
            muted: false,
            pinned: false,
            archived: false,
            assignee: None,
            alert: None,
        }
    }

    fn say(active: &mut Active, seq: u64, previous: Option<u64>, from: &str) {
        let last = LastMessage {
            id: seq.to_string(),
            from: from.to_owned(),
            ts: seq,
            text: None,
        };
        let heard = Heard {
            last,
            cursor: &cursor(seq),
            previous,
            mentions: true,
        };
        active.message("kim", heard, CAPS);
    }

    fn counts(active: &Active) -> (Option<u64>, bool, Option<u64>) {
        let summary = active.summary.as_ref().unwrap();
        (summary.unread, summary.capped, summary.mentions)
    }

    #[test]
    fn counts_stop_at_their_caps() {
        let mut active = Active::default();
        say(&mut active, 3, None, "lee");
        assert!(active.is_stale && active.summary.is_none());
        active.begin_read();
        active.end_read(Some((summary(3, 1), true)), Instant::now());
        assert!(!active.is_stale);
        for (seq, expected) in [
            (4, (Some(2), false, Some(1))),
            (5, (Some(3), false, Some(2))),
            (6, (Some(4), false, Some(3))),
            (7, (Some(5), false, None)),
            (8, (Some(6), false, None)),
            (9, (Some(6), true, None)),
        ] {
            say(&mut active, seq, Some(seq - 1), "lee");
            assert_eq!(counts(&active), expected, "{seq}");
        }
        say(&mut active, 10, Some(9), "kim");
        assert_eq!(counts(&active), (Some(0), false, Some(0)));
        // What is heard a second time is not counted a second time.
        say(&mut active, 11, Some(10), "lee");
        active.end_read(Some((summary(11, 1), true)), Instant::now());
        say(&mut active, 11, Some(10), "lee");
        assert_eq!(counts(&active).0, Some(1));
    }

    #[test]
    fn what_can_not_be_told_from_what_was_heard_is_read() {
        let read = || {
            let mut active = Active::default();
            active.end_read(Some((summary(3, 1), true)), Instant::now());
            active
        };
        // One is missing.
        let mut active = read();
        say(&mut active, 5, Some(4), "lee");
        assert!(active.is_stale);
        // The answer of a replica that lags behind does not count, nor does one from before a change.
        active.begin_read();
        active.end_read(Some((summary(4, 2), true)), Instant::now());
        assert!(active.is_stale);
        active.begin_read();
        active.changed();
        active.end_read(Some((summary(5, 3), true)), Instant::now());
        assert!(active.is_stale);
        active.begin_read();
        active.end_read(Some((summary(5, 3), true)), Instant::now());
        assert!(!active.is_stale);
        // What was erased meanwhile is not waited for without end.
        say(&mut active, 9, Some(8), "lee");
        for tries in 1..=MAX_TRIES {
            assert!(active.is_stale);
            active.begin_read();
            let shows = active.end_read(Some((summary(5, 3), true)), Instant::now());
            assert_eq!(shows, tries < MAX_TRIES);
        }
        assert!(!active.is_stale);
        // A message while a read is under way, which the read shows or not.
        for shown in [3, 4] {
            let mut active = read();
            active.changed();
            active.begin_read();
            say(&mut active, 4, Some(3), "lee");
            active.end_read(Some((summary(shown, shown - 2), true)), Instant::now());
            active.catch_up("kim", CAPS);
            assert!(!active.is_stale);
            assert_eq!(counts(&active).0, Some(2), "{shown}");
        }
        // If the read is not exact, or fails, the next one must show it.
        for exact in [Some(false), None] {
            let mut active = read();
            active.changed();
            active.begin_read();
            say(&mut active, 4, Some(3), "lee");
            match exact {
                Some(exact) => {
                    active.end_read(Some((summary(3, 2), exact)), Instant::now());
                    active.catch_up("kim", CAPS);
                }
                None => active.fail_read(Instant::now()),
            }
            assert!(active.is_stale);
            for (shown, is_stale) in [(3, true), (4, false)] {
                active.begin_read();
                active.end_read(Some((summary(shown, shown - 2), true)), Instant::now());
                active.catch_up("kim", CAPS);
                assert_eq!(active.is_stale, is_stale, "{exact:?} {shown}");
            }
        }
        // A marker that covers the head, and one that does not.
        let mut active = read();
        active.read(&cursor(3));
        assert!(!active.is_stale && counts(&active).0 == Some(0));
        active.read(&cursor(2));
        // It is not stored yet when it is heard.
        let mut stored = summary(3, 1);
        for (marker, is_stale) in [(None, true), (Some(1), true), (Some(2), false)] {
            assert!(active.is_stale);
            active.begin_read();
            stored.marker = marker.map(cursor);
            active.end_read(Some((stored.clone(), true)), Instant::now());
            assert_eq!(active.is_stale, is_stale, "{marker:?}");
        }
    }

    #[test]
    fn the_senders_marker_is_stored_after_the_message() {
        let stored = |marker: Option<u64>, unread| RoomSummary {
            marker: marker.map(cursor),
            ..summary(4, unread)
        };
        let read = |active: &mut Active, stored| {
            active.begin_read();
            active.end_read(Some((stored, true)), Instant::now());
        };
        // Heard before the room is read: until the marker shows.
        let mut active = Active::default();
        say(&mut active, 4, Some(3), "kim");
        for (marker, unread, is_stale) in [(None, 2, true), (Some(2), 2, true), (Some(4), 0, false)]
        {
            assert!(active.is_stale);
            read(&mut active, stored(marker, unread));
            assert_eq!(active.is_stale, is_stale, "{marker:?}");
        }
        // Heard after it: it is the newest message.
        let mut active = Active::default();
        read(&mut active, stored(None, 2));
        say(&mut active, 4, Some(3), "kim");
        assert!(!active.is_stale && !active.differs(&stored(Some(4), 0)));
        // Or it is not, and what is unread after it has to be counted.
        let mut active = Active::default();
        read(&mut active, stored(None, 2));
        say(&mut active, 3, Some(2), "kim");
        assert!(active.is_stale);
        read(&mut active, stored(Some(3), 1));
        assert!(!active.is_stale);
        say(&mut active, 3, Some(2), "kim");
        assert!(!active.is_stale && counts(&active).0 == Some(1));
    }

    #[test]
    fn what_was_read_before_it_was_heard_is_not_unread() {
        let mut active = Active::default();
        active.end_read(Some((summary(4, 1), true)), Instant::now());
        active.read(&cursor(5));
        say(&mut active, 5, Some(4), "lee");
        assert_eq!(counts(&active), (Some(0), false, Some(0)));
        say(&mut active, 6, Some(5), "lee");
        assert_eq!(counts(&active), (Some(1), false, Some(1)));
        // A marker of an older log says nothing.
        let mut active = Active::default();
        let stored = RoomSummary {
            marker: Some("seoul.k2.9.7f02".parse().unwrap()),
            ..summary(4, 1)
        };
        active.end_read(Some((stored, true)), Instant::now());
        say(&mut active, 5, Some(4), "lee");
        assert_eq!(counts(&active).0, Some(2));
    }

    #[test]
    fn a_room_that_lags_is_read_less_and_less_often_until_something_new_comes() {
        let mut now = Instant::now();
        let began = now;
        let mut active = Active::default();
        say(&mut active, 5, None, "lee");
        let mut read = |active: &mut Active| {
            while !active.is_due(now) {
                now += Duration::from_millis(1);
            }
            active.begin_read();
            let shows = active.end_read(Some((summary(3, 1), true)), now);
            (shows, now - began)
        };
        let waits: Vec<Duration> = (0..4).map(|_| read(&mut active).1).collect();
        let pauses: Vec<Duration> = waits.windows(2).map(|two| two[1] - two[0]).collect();
        assert!(pauses[0] >= LAG && pauses.is_sorted(), "{pauses:?}");
        say(&mut active, 6, None, "lee");
        assert!(active.is_due(began + waits[3]));
        let mut shows = true;
        let mut last = Duration::ZERO;
        while shows {
            (shows, last) = read(&mut active);
        }
        assert!(
            last > Duration::from_secs(60) && !active.is_stale,
            "{last:?}"
        );
    }

    #[test]
    fn a_busy_room_is_read_again_after_a_pause() {
        let now = Instant::now();
        let mut active = Active::default();
        say(&mut active, 3, None, "lee");
        assert!(active.is_due(now));
        // However often: the messages that came during the reads are not missing.
        for head in 3..3 + 2 * u64::from(MAX_TRIES) {
            active.begin_read();
            say(&mut active, head + 1, Some(head), "lee");
            assert!(active.end_read(Some((summary(head, 1), false)), now));
            active.changed();
            assert!(active.is_stale && !active.is_due(now) && active.is_due(now + PAUSE));
        }
        active.begin_read();
        assert!(active.end_read(Some((summary(99, 1), true)), now));
        assert!(!active.is_stale);
        active.changed();
        assert!(active.is_due(now));
    }

    #[test]
    fn only_what_differs_from_what_was_told_is_new() {
        let now = Instant::now();
        let mut active = Active::default();
        let mut stored = summary(3, 1);
        for (read, is_new) in [
            (Some(stored.clone()), true),
            (Some(stored.clone()), false),
            (None, true),
            (None, true),
            (Some(stored.clone()), true),
        ] {
            active.is_new = false;
            active.end_read(read.map(|it| (it, true)), now);
            assert_eq!(active.is_new, is_new);
        }
        // What is not told yet stays new.
        active.end_read(Some((stored.clone(), true)), now);
        assert!(active.is_new && !active.differs(&stored));
        stored.title = Some("other".to_owned());
        assert!(active.differs(&stored));
        // What nothing keeps is no difference.
        let last = LastMessage {
            id: "1".to_owned(),
            from: "lee".to_owned(),
            ts: 1,
            text: None,
        };
        active.ephemeral(last);
        assert!(!active.differs(&summary(3, 1)) && active.differs(&stored));
    }
}
