//! Proves from a log of operations that every session saw what it had to see: contracts 1 to 4 of the design.
//!
//! Pure: it is fed with what clients sent and received, in the order of each client's wire, and answers with violations. It
//! knows nothing of edges or NATS; sequences are read from the cursors (of one region: one component).
//!
//! What must hold, for each session and room, from the position where the session first joined on and over all its
//! connections:
//! - every message that was acknowledged, or that anybody received, is received exactly once, with the body that was sent;
//! - the cursors of what it receives strictly increase, and no join reply stands elsewhere than at the cursor it was given;
//! - a message has one cursor: in every ack, and in the push to every session. So all agree on the order;
//! - pushes come only between the reply to a join and the reply to a leave, and a join's replay is as long as announced;
//! - nobody is told to begin anew.
//!
//! A message that was sent and never acknowledged may be stored or not, but what one session saw of it, all must see.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
};

use natter::testing::model::Cursor;

/// What all clients did and saw.
#[derive(Debug, Default)]
pub(crate) struct Log {
    /// Publishes, however often each was tried.
    pub(crate) sent: Vec<Sent>,
    /// Acknowledgements; more than one for a message is fine.
    pub(crate) acks: Vec<Ack>,
    /// One logical session each, over all its connections.
    pub(crate) sessions: Vec<Session>,
}

#[derive(Debug, Clone)]
pub(crate) struct Sent {
    pub(crate) room: String,
    pub(crate) from: String,
    pub(crate) id: String,
    /// JSON text.
    pub(crate) body: String,
}

#[derive(Debug, Clone)]
pub(crate) struct Ack {
    pub(crate) room: String,
    pub(crate) from: String,
    pub(crate) id: String,
    pub(crate) cursor: String,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Session {
    pub(crate) name: String,
    /// In the order of the wire.
    pub(crate) events: Vec<Event>,
}

/// What a session received, or what happened to it.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    /// A new connection: it is in no room.
    Connected { to: String },
    /// The reply to a join.
    Joined {
        room: String,
        /// What the join asked for.
        since: Option<String>,
        cursor: String,
        head: String,
        replay: u64,
        /// The reason, where the session is to begin anew.
        reset: Option<String>,
    },
    /// The reply to a leave.
    Left { room: String },
    /// A `msg` push.
    Pushed {
        room: String,
        id: String,
        from: String,
        cursor: String,
        /// JSON text.
        body: String,
        reply_to: Option<String>,
    },
    /// The room let the session go.
    Kicked { room: String, code: String },
    /// The edge did what is never right in the driver's scenario.
    Fault(String),
}

/// Something that must not be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Violation {
    pub(crate) kind: Kind,
    /// Empty: no session in particular.
    pub(crate) session: String,
    pub(crate) room: String,
    /// The message and what is wrong with it.
    pub(crate) what: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// A message never came.
    Lost,
    /// A message came again.
    Repeated,
    /// A message came after one that the stream has later.
    Reordered,
    /// A cursor lies before an earlier one of the same session.
    CursorBack,
    /// Not what was sent.
    WrongBody,
    /// The cursor of an ack is not that of the push, or of another ack.
    AckMismatch,
    /// Sessions saw a message with different cursors, or different messages at one place.
    Disagreement,
    /// A message that nobody sent.
    Foreign,
    /// Told to begin anew.
    Reset,
    /// A push outside join and leave.
    NotJoined,
    /// A join's replay was not as long as announced.
    ReplayCount,
    /// Not a cursor of this region.
    BadCursor,
    /// [`Event::Fault`]
    Fault,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            session,
            room,
            what,
        } = self;
        write!(f, "{kind:?}: session {session:?}, room {room}: {what}")
    }
}

/// What was counted along the way.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) sent: usize,
    pub(crate) acked: usize,
    /// Messages that somebody received though nobody was told that they are stored.
    pub(crate) unacked_seen: usize,
    pub(crate) received: usize,
    pub(crate) replayed: u64,
    pub(crate) joins: usize,
}

/// Room, sender and id.
type Key<'a> = (&'a str, &'a str, &'a str);

/// Where a message is and where that was learned.
struct Place<'a> {
    cursor: &'a str,
    /// `None`: from an ack.
    witness: Option<&'a str>,
}

struct Checker<'a> {
    log: &'a Log,
    violations: Vec<Violation>,
    summary: Summary,
    /// Origin and epoch of each room.
    incarnations: HashMap<&'a str, String>,
    bodies: HashMap<Key<'a>, &'a str>,
    places: HashMap<Key<'a>, Place<'a>>,
    /// The order of each room, as far as anybody has learned it.
    orders: HashMap<&'a str, BTreeMap<u64, Key<'a>>>,
}

/// One session in one room.
#[derive(Default)]
struct View<'a> {
    /// Where it joined first.
    start: Option<u64>,
    last: u64,
    joined: bool,
    received: HashSet<Key<'a>>,
    replay: Option<Replay>,
}

/// A replay in progress.
struct Replay {
    announced: u64,
    head: u64,
    came: u64,
}

/// Checks a log that ends when everybody had caught up.
pub(crate) fn check(log: &Log) -> (Summary, Vec<Violation>) {
    let mut checker = Checker {
        log,
        violations: Vec::new(),
        summary: Summary::default(),
        incarnations: HashMap::new(),
        bodies: HashMap::new(),
        places: HashMap::new(),
        orders: HashMap::new(),
    };
    checker.learn();
    for session in &log.sessions {
        checker.follow(session);
    }
    (checker.summary, checker.violations)
}

impl<'a> Checker<'a> {
    fn report(&mut self, kind: Kind, session: &str, room: &str, what: String) {
        self.violations.push(Violation {
            kind,
            session: session.to_owned(),
            room: room.to_owned(),
            what,
        });
    }

    /// The sequence in a cursor.
    fn seq(&mut self, session: &str, room: &'a str, cursor: &str) -> Option<u64> {
        let parsed = cursor.parse::<Cursor>();
        let position = match &parsed {
            Ok(cursor) => match cursor.positions() {
                [position] => position,
                _ => {
                    let what = format!("{cursor} has not one component");
                    self.report(Kind::BadCursor, session, room, what);
                    return None;
                }
            },
            Err(error) => {
                self.report(Kind::BadCursor, session, room, error.to_string());
                return None;
            }
        };
        let incarnation = format!("{}.{}", position.origin, position.epoch);
        let known = self
            .incarnations
            .entry(room)
            .or_insert_with(|| incarnation.clone());
        if *known != incarnation {
            let what = format!("{cursor} is not of {known}, as those before");
            self.report(Kind::BadCursor, session, room, what);
            return None;
        }
        Some(position.seq)
    }

    /// Learns what was sent and where everything is.
    fn learn(&mut self) {
        let log = self.log;
        for sent in &log.sent {
            let key = (&*sent.room, &*sent.from, &*sent.id);
            self.bodies.insert(key, &sent.body);
        }
        self.summary.sent = self.bodies.len();
        for ack in &log.acks {
            let key = (&*ack.room, &*ack.from, &*ack.id);
            if !self.bodies.contains_key(&key) {
                let what = format!("{} was acknowledged and never sent", name(key));
                self.report(Kind::Foreign, &ack.from, &ack.room, what);
            }
            self.place(key, &ack.cursor, None);
        }
        self.summary.acked = self.places.len();
        for session in &log.sessions {
            for event in &session.events {
                if let Event::Pushed {
                    room,
                    id,
                    from,
                    cursor,
                    ..
                } = event
                {
                    let key = (&**room, &**from, &**id);
                    self.place(key, cursor, Some(&session.name));
                }
            }
        }
        self.summary.unacked_seen = self.places.len() - self.summary.acked;
    }

    fn place(&mut self, key: Key<'a>, cursor: &'a str, witness: Option<&'a str>) {
        let (room, session) = (key.0, witness.unwrap_or(key.1));
        if let Some(known) = self.places.get(&key) {
            if known.cursor != cursor {
                let kind = if known.witness.is_none() || witness.is_none() {
                    Kind::AckMismatch
                } else {
                    Kind::Disagreement
                };
                let by = known
                    .witness
                    .map_or("in an ack".to_owned(), |w| format!("for session {w:?}"));
                let what = format!(
                    "{} has the cursor {cursor}, but {} {by}",
                    name(key),
                    known.cursor
                );
                self.report(kind, session, room, what);
            }
            return;
        }
        let Some(seq) = self.seq(session, room, cursor) else {
            return;
        };
        self.places.insert(key, Place { cursor, witness });
        let order = self.orders.entry(room).or_default();
        if let Some(other) = order.insert(seq, key) {
            let what = format!("{} and {} both are at {cursor}", name(key), name(other));
            self.report(Kind::Disagreement, session, room, what);
        }
    }

    fn follow(&mut self, session: &'a Session) {
        let mut views: HashMap<&str, View<'a>> = HashMap::new();
        let who = &*session.name;
        for event in &session.events {
            match event {
                Event::Connected { .. } => {
                    for view in views.values_mut() {
                        view.joined = false;
                        view.replay = None;
                    }
                }
                Event::Left { room } => {
                    let view = views.entry(room).or_default();
                    view.joined = false;
                    view.replay = None;
                }
                Event::Kicked { room, code } => {
                    views.entry(room).or_default().joined = false;
                    self.report(Kind::Reset, who, room, format!("kicked: {code}"));
                }
                Event::Fault(what) => self.report(Kind::Fault, who, "-", what.clone()),
                Event::Joined { room, .. } => {
                    self.on_joined(who, views.entry(room).or_default(), event);
                }
                Event::Pushed { room, .. } => {
                    self.on_pushed(who, views.entry(room).or_default(), event);
                }
            }
        }
        for (room, view) in views {
            let Some(start) = view.start else { continue };
            let order = self.orders.get(room);
            let after = order.into_iter().flat_map(|order| order.range(start + 1..));
            let lost: Vec<(u64, Key<'a>)> = after
                .filter(|(_, key)| !view.received.contains(*key))
                .map(|(seq, key)| (*seq, *key))
                .collect();
            for (seq, key) in lost {
                let how = match self.places.get(&key).and_then(|place| place.witness) {
                    None => "was acknowledged".to_owned(),
                    Some(other) => format!("was seen by session {other:?}"),
                };
                let what = format!(
                    "{} {how} at {seq} and never came (joined first at {start}, last seen {})",
                    name(key),
                    view.last
                );
                self.report(Kind::Lost, who, room, what);
            }
        }
    }

    fn on_joined(&mut self, who: &str, view: &mut View<'a>, event: &'a Event) {
        let Event::Joined {
            room,
            since,
            cursor,
            head,
            replay,
            reset,
        } = event
        else {
            return;
        };
        self.summary.joins += 1;
        self.summary.replayed += replay;
        if let Some(reason) = reset {
            let what = format!("joined at {since:?} with reset: {reason}");
            return self.report(Kind::Reset, who, room, what);
        }
        let (Some(at), Some(head_seq)) = (self.seq(who, room, cursor), self.seq(who, room, head))
        else {
            return;
        };
        view.joined = true;
        let asked = match since {
            Some(since) => self.seq(who, room, since),
            None => None,
        };
        let expected = asked.or_else(|| view.start.map(|_| view.last));
        match expected {
            Some(expected) if at < expected => {
                let what = format!("joined at {cursor}, but it stood at {expected}");
                self.report(Kind::CursorBack, who, room, what);
            }
            Some(expected) if at > expected => {
                let what = format!("joined at {cursor}, beyond {expected} where it stood");
                self.report(Kind::Lost, who, room, what);
            }
            _ => {}
        }
        if head_seq < at {
            let what = format!("the head {head} lies before the cursor {cursor}");
            self.report(Kind::CursorBack, who, room, what);
        }
        if view.start.is_none() {
            view.start = Some(at);
            view.last = at;
        }
        view.replay = Some(Replay {
            announced: *replay,
            head: head_seq,
            came: 0,
        });
    }

    fn on_pushed(&mut self, who: &str, view: &mut View<'a>, event: &'a Event) {
        let Event::Pushed {
            room,
            id,
            from,
            cursor,
            body,
            ..
        } = event
        else {
            return;
        };
        self.summary.received += 1;
        let key = (&**room, &**from, &**id);
        if !view.joined {
            let what = format!("{} came while it was not in the room", name(key));
            self.report(Kind::NotJoined, who, room, what);
        }
        match self.bodies.get(&key) {
            None => {
                let what = format!("{} was never sent", name(key));
                self.report(Kind::Foreign, who, room, what);
            }
            Some(sent) if sent != body => {
                let what = format!("{} has the body {body}, sent was {sent}", name(key));
                self.report(Kind::WrongBody, who, room, what);
            }
            Some(_) => {}
        }
        let Some(seq) = self.seq(who, room, cursor) else {
            return;
        };
        let last = view.last;
        if !view.received.insert(key) {
            let what = format!("{} came again, at {cursor}, after {last}", name(key));
            self.report(Kind::Repeated, who, room, what);
        } else if seq <= last {
            // Is it the message or only its cursor that is at the wrong place?
            let known = self.places.get(&key).map(|place| place.cursor.to_owned());
            let truly = known.and_then(|cursor| self.seq(who, room, &cursor));
            let (kind, how) = if truly.is_some_and(|truly| truly > last) {
                (Kind::CursorBack, "has a cursor that goes back")
            } else if view.start.is_some_and(|start| seq <= start) {
                (Kind::CursorBack, "lies before the place of the first join")
            } else {
                (Kind::Reordered, "came late")
            };
            let what = format!("{} {how}: {cursor} after {last}", name(key));
            self.report(kind, who, room, what);
        }
        view.last = last.max(seq);
        if let Some(replay) = &mut view.replay {
            let over = if seq <= replay.head {
                replay.came += 1;
                replay.came > replay.announced
            } else {
                replay.came != replay.announced
            };
            let (announced, came) = (replay.announced, replay.came);
            if over || seq > replay.head {
                view.replay = None;
            }
            if over {
                let what = format!(
                    "a replay of {announced} was announced, {came} came up to the head; now {}",
                    name(key)
                );
                self.report(Kind::ReplayCount, who, room, what);
            }
        }
    }
}

fn name(key: Key<'_>) -> String {
    format!("message {}/{}", key.1, key.2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: &str = "chat:a";

    fn cursor(seq: u64) -> String {
        format!("seoul.k3.{seq}.{seq:x}")
    }

    fn body(seq: u64) -> String {
        format!(r#"{{"text":"안녕 👋 {seq}"}}"#)
    }

    fn push(seq: u64) -> Event {
        Event::Pushed {
            room: ROOM.to_owned(),
            id: format!("m{seq}"),
            from: "kim".to_owned(),
            cursor: cursor(seq),
            body: body(seq),
            reply_to: None,
        }
    }

    fn join(since: Option<u64>, at: u64, head: u64, replay: u64) -> Event {
        Event::Joined {
            room: ROOM.to_owned(),
            since: since.map(cursor),
            cursor: cursor(at),
            head: cursor(head),
            replay,
            reset: None,
        }
    }

    fn left() -> Event {
        Event::Left {
            room: ROOM.to_owned(),
        }
    }

    fn connected() -> Event {
        let to = "edge-0".to_owned();
        Event::Connected { to }
    }

    /// Messages 10 to 90, all acknowledged; 100 was sent, seen and never acknowledged. `a` was there from the beginning, with a
    /// leave and a lost connection; `b` came later.
    fn clean() -> Log {
        let messages: Vec<u64> = (1..=9).map(|n| n * 10).collect();
        let of_all = |id: u64| (ROOM.to_owned(), "kim".to_owned(), format!("m{id}"));
        let sent = messages.iter().copied().chain([100, 110]).map(|seq| {
            let (room, from, id) = of_all(seq);
            let body = body(seq);
            Sent {
                room,
                from,
                id,
                body,
            }
        });
        let acks = messages.iter().map(|seq| {
            let (room, from, id) = of_all(*seq);
            Ack {
                room,
                from,
                id,
                cursor: cursor(*seq),
            }
        });
        let mut a = vec![
            connected(),
            join(None, 5, 5, 0),
            push(10),
            push(20),
            push(30),
        ];
        a.extend([
            left(),
            join(Some(30), 30, 50, 2),
            push(40),
            push(50),
            push(60),
        ]);
        a.extend([connected(), join(Some(60), 60, 80, 2), push(70)]);
        a.extend([
            connected(),
            join(Some(70), 70, 80, 1),
            push(80),
            push(90),
            push(100),
        ]);
        let b = vec![
            connected(),
            join(None, 60, 60, 0),
            push(70),
            push(80),
            push(90),
            push(100),
        ];
        let session = |name: &str, events| Session {
            name: name.to_owned(),
            events,
        };
        Log {
            sent: sent.collect(),
            acks: acks.collect(),
            sessions: vec![session("a", a), session("b", b)],
        }
    }

    /// Where session `a` receives `seq`.
    fn at(log: &Log, seq: u64) -> usize {
        let found = log.sessions[0].events.iter().position(
            |event| matches!(event, Event::Pushed { id, .. } if *id == format!("m{seq}")),
        );
        found.unwrap()
    }

    /// The kinds that are found once `plant` has spoiled the clean log, all in the session `a` and the room.
    fn found(plant: impl FnOnce(&mut Log)) -> Vec<Kind> {
        let mut log = clean();
        plant(&mut log);
        let (_, violations) = check(&log);
        for violation in &violations {
            assert_eq!(violation.room, ROOM, "{violation}");
        }
        violations.iter().map(|violation| violation.kind).collect()
    }

    #[test]
    fn a_clean_log_is_clean() {
        let (summary, violations) = check(&clean());
        assert_eq!(violations, []);
        let expected = Summary {
            sent: 11,
            acked: 9,
            unacked_seen: 1,
            received: 14,
            replayed: 5,
            joins: 5,
        };
        assert_eq!(summary, expected);
    }

    #[test]
    fn a_loss_is_reported_with_session_room_and_message() {
        let mut log = clean();
        let lost = at(&log, 60);
        log.sessions[0].events.remove(lost);
        // The session would not know of it.
        log.sessions[0].events[lost + 1] = join(Some(60), 60, 80, 2);
        let (_, violations) = check(&log);
        let [violation] = &*violations else {
            panic!("{violations:?}")
        };
        assert_eq!(violation.kind, Kind::Lost);
        let text = violation.to_string();
        for part in ["\"a\"", ROOM, "kim/m60", "acknowledged"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_loss_at_the_end_is_reported() {
        // 90 was acknowledged, 100 only seen by the other session.
        assert_eq!(
            found(|log| {
                let end = at(log, 90);
                log.sessions[0].events.truncate(end);
            }),
            [Kind::Lost, Kind::Lost]
        );
    }

    #[test]
    fn a_loss_in_a_replay_is_reported() {
        assert_eq!(
            found(|log| {
                let lost = at(log, 40);
                log.sessions[0].events.remove(lost);
            }),
            [Kind::ReplayCount, Kind::Lost]
        );
    }

    #[test]
    fn a_repeat_is_reported() {
        assert_eq!(
            found(|log| {
                let place = at(log, 30) + 1;
                log.sessions[0].events.insert(place, push(20));
            }),
            [Kind::Repeated]
        );
    }

    #[test]
    fn a_repeat_over_a_reconnect_is_reported() {
        assert_eq!(
            found(|log| {
                let place = at(log, 80);
                log.sessions[0].events[place - 1] = join(Some(60), 60, 80, 2);
                log.sessions[0].events.insert(place, push(70));
            }),
            [Kind::Repeated]
        );
    }

    #[test]
    fn a_message_stored_twice_is_reported() {
        let kinds = found(|log| {
            let place = at(log, 90);
            let Event::Pushed { cursor, .. } = &mut log.sessions[0].events[place] else {
                unreachable!()
            };
            *cursor = super::tests::cursor(95);
        });
        assert_eq!(kinds, [Kind::AckMismatch]);
    }

    #[test]
    fn a_reorder_is_reported() {
        assert_eq!(
            found(|log| {
                let place = at(log, 20);
                log.sessions[0].events.swap(place, place + 1);
            }),
            [Kind::Reordered]
        );
    }

    #[test]
    fn a_cursor_that_goes_back_is_reported() {
        let kinds = found(|log| {
            let place = at(log, 30);
            let Event::Pushed { cursor, .. } = &mut log.sessions[0].events[place] else {
                unreachable!()
            };
            *cursor = super::tests::cursor(20);
        });
        assert_eq!(kinds, [Kind::AckMismatch, Kind::CursorBack]);
        let replied = |at: u64| {
            found(|log| {
                let place = super::tests::at(log, 70) - 1;
                log.sessions[0].events[place] = join(Some(60), at, 80, 2);
            })
        };
        assert_eq!(replied(50), [Kind::CursorBack]);
        assert_eq!(replied(65), [Kind::Lost]);
        assert_eq!(
            found(|log| {
                let place = at(log, 70) - 1;
                log.sessions[0].events[place] = join(Some(60), 60, 50, 0);
            }),
            [Kind::CursorBack]
        );
    }

    #[test]
    fn a_wrong_body_is_reported() {
        let kinds = found(|log| {
            let place = at(log, 40);
            let Event::Pushed { body, .. } = &mut log.sessions[0].events[place] else {
                unreachable!()
            };
            *body = super::tests::body(41);
        });
        assert_eq!(kinds, [Kind::WrongBody]);
    }

    #[test]
    fn an_ack_with_another_cursor_is_reported() {
        assert_eq!(
            found(|log| {
                let mut again = log.acks[3].clone();
                log.acks.push(again.clone());
                again.cursor = cursor(41);
                log.acks.push(again);
            }),
            [Kind::AckMismatch]
        );
        // Every push of the message contradicts it.
        assert_eq!(
            found(|log| log.acks[8].cursor = cursor(91)),
            [Kind::AckMismatch, Kind::AckMismatch]
        );
    }

    #[test]
    fn sessions_that_disagree_are_reported() {
        assert_eq!(
            found(|log| {
                let last = log.sessions[1].events.last_mut().unwrap();
                let Event::Pushed { cursor, .. } = last else {
                    unreachable!()
                };
                *cursor = super::tests::cursor(101);
            }),
            [Kind::Disagreement]
        );
    }

    #[test]
    fn resets_kicks_and_strangers_are_reported() {
        let reset = found(|log| {
            let Event::Joined { reset, .. } = &mut log.sessions[0].events[6] else {
                unreachable!()
            };
            *reset = Some("epoch".to_owned());
        });
        assert_eq!(reset[0], Kind::Reset);
        let room = ROOM.to_owned();
        let code = "reset".to_owned();
        assert_eq!(
            found(|log| log.sessions[0].events.push(Event::Kicked { room, code })),
            [Kind::Reset]
        );
        assert_eq!(
            found(|log| {
                log.sent.retain(|sent| sent.id != "m100");
            }),
            [Kind::Foreign, Kind::Foreign]
        );
        assert_eq!(
            found(|log| {
                let place = at(log, 30);
                log.sessions[0].events.insert(place, left());
            }),
            [Kind::NotJoined]
        );
        assert_eq!(
            found(|log| log.acks[0].cursor = "nonsense".to_owned()),
            [Kind::BadCursor]
        );
    }
}
