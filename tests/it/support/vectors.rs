//! [`checker`](super::checker) for several regions: where a cursor is a vector, and edges agree on the order of each region, not on
//! one order of all.
//!
//! What must hold, for each session and room, from the cursor at which the session first joined on and over all its connections, in
//! whatever regions:
//! - every message that was acknowledged, or that anybody received, is received exactly once, with the body that was sent;
//! - no component of its cursors goes back, and with each message one grows;
//! - messages of one origin come in the order of its stream;
//! - an answer comes after what it answers (those that do not are told apart: a message waits for a bounded time only).
//!
//! A message that was repeated in another region may be stored in both: it has two places, and is shown once all the same. With one
//! exception, which is counted: a session that has got one copy and comes to a region that has not, and cannot know of it, is shown
//! the other.

use std::collections::{BTreeMap, HashMap, HashSet};

use natter::testing::{
    bus::message_key,
    model::{Cursor, Fingerprint},
};

use super::checker::{Event, Kind, Log, Session, Violation};

/// Room, sender and id.
type Key<'a> = (&'a str, &'a str, &'a str);

/// A place in a room: the last sequence of each origin, 0 where the cursor names no message there: up to where an edge knows a room
/// to be empty differs from edge to edge, and says nothing.
type Vector = BTreeMap<String, u64>;

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) violations: Vec<Violation>,
    /// Answers that came before what they answer.
    pub(crate) early: Vec<String>,
    pub(crate) acked: usize,
    pub(crate) received: usize,
    /// Messages that are stored in more than one region.
    pub(crate) twins: usize,
    /// Second copies that were shown to sessions that came from where the first was.
    pub(crate) copies: usize,
    /// Joins with a cursor of another region's edge.
    pub(crate) roamed: usize,
}

/// Where each message is, by origin.
type Places<'a> = HashMap<Key<'a>, BTreeMap<String, u64>>;

#[derive(Default)]
struct View<'a> {
    start: Vector,
    began: bool,
    joined: bool,
    last: Vector,
    received: HashSet<Key<'a>>,
}

fn vector(cursor: &str) -> Vector {
    let cursor: Cursor = cursor.parse().expect("a cursor of an edge");
    let positions = cursor.positions().iter();
    positions
        .map(|p| {
            let seq = if p.names_message() { p.seq } else { 0 };
            (p.origin.as_str().to_owned(), seq)
        })
        .collect()
}

/// Checks a log that ends when everybody had caught up.
pub(crate) fn check(log: &Log) -> Verdict {
    let mut verdict = Verdict::default();
    let bodies: HashMap<Key<'_>, &str> = log
        .sent
        .iter()
        .map(|sent| ((&*sent.room, &*sent.from, &*sent.id), &*sent.body))
        .collect();
    let mut places: Places<'_> = HashMap::new();
    for ack in &log.acks {
        let of = places.entry((&ack.room, &ack.from, &ack.id)).or_default();
        // An acknowledgement names the place of the message alone.
        for (origin, seq) in vector(&ack.cursor) {
            let known = of.entry(origin).or_insert(seq);
            if *known != seq {
                let what = format!("{} has two places: {known} and {seq}", ack.id);
                verdict.report(Kind::AckMismatch, &ack.from, &ack.room, what);
            }
        }
    }
    verdict.acked = places.len();
    // A message is where a component grew to its fingerprint. Not every place of it was acknowledged.
    // Of two with one fingerprint nobody knows which one it is.
    let mut known: HashMap<(&str, Fingerprint), Option<Key<'_>>> = HashMap::new();
    for sent in &log.sent {
        let key = (&*sent.room, &*sent.from, &*sent.id);
        let its_own = Fingerprint::of(message_key(key.0, key.1, key.2).as_bytes());
        let entry = known.entry((key.0, its_own)).or_insert(Some(key));
        *entry = entry.filter(|other| *other == key);
    }
    for session in &log.sessions {
        learn(session, &known, &mut places);
    }
    verdict.twins = places.values().filter(|of| of.len() > 1).count();
    for session in &log.sessions {
        verdict.follow(session, &bodies, &places);
    }
    verdict
}

fn learn<'a>(
    session: &'a Session,
    known: &HashMap<(&'a str, Fingerprint), Option<Key<'a>>>,
    places: &mut Places<'a>,
) {
    let mut last: HashMap<&str, Vector> = HashMap::new();
    for event in &session.events {
        match event {
            Event::Joined { room, cursor, .. } => {
                // Nobody may have got the last message before the first member came.
                let cursor_of: Cursor = cursor.parse().expect("a cursor of an edge");
                for at in cursor_of.positions() {
                    if let Some(Some(key)) = known.get(&(&**room, at.fingerprint)) {
                        let of = places.entry(*key).or_default();
                        of.entry(at.origin.as_str().to_owned()).or_insert(at.seq);
                    }
                }
                last.insert(room, vector(cursor));
            }
            Event::Pushed {
                room,
                from,
                id,
                cursor,
                ..
            } => {
                let now = vector(cursor);
                let before = last.insert(room, now.clone()).unwrap_or_default();
                // Others may have grown with it: by copies that were not shown.
                let its_own = Fingerprint::of(message_key(room, from, id).as_bytes());
                for (origin, seq) in grown(&before, &now) {
                    if fingerprint(cursor, &origin) == Some(its_own) {
                        let of = places.entry((room, from, id)).or_default();
                        of.entry(origin).or_insert(seq);
                    }
                }
            }
            _ => {}
        }
    }
}

fn fingerprint(cursor: &str, origin: &str) -> Option<Fingerprint> {
    let cursor: Cursor = cursor.parse().ok()?;
    let mut positions = cursor.positions().iter();
    let position = positions.find(|p| p.origin.as_str() == origin)?;
    Some(position.fingerprint)
}

/// The components that grew.
fn grown(before: &Vector, now: &Vector) -> Vec<(String, u64)> {
    let grown = now
        .iter()
        .filter(|(origin, seq)| before.get(*origin).is_none_or(|was| was < seq));
    grown.map(|(origin, seq)| (origin.clone(), *seq)).collect()
}

impl Verdict {
    fn report(&mut self, kind: Kind, session: &str, room: &str, what: String) {
        self.violations.push(Violation {
            kind,
            session: session.to_owned(),
            room: room.to_owned(),
            what,
        });
    }

    fn follow<'a>(
        &mut self,
        session: &'a Session,
        bodies: &HashMap<Key<'a>, &str>,
        places: &Places<'a>,
    ) {
        let who = &*session.name;
        let mut views: HashMap<&str, View<'a>> = HashMap::new();
        let mut here = "";
        let mut left_at: HashMap<&str, &str> = HashMap::new();
        for event in &session.events {
            match event {
                Event::Connected { to } => {
                    here = to;
                    views.values_mut().for_each(|view| view.joined = false);
                }
                Event::Left { room } | Event::Kicked { room, .. } => {
                    views.entry(room).or_default().joined = false;
                }
                Event::Fault(what) => self.report(Kind::Fault, who, "", what.clone()),
                Event::Joined {
                    room,
                    since,
                    cursor,
                    reset,
                    ..
                } => {
                    if let Some(reason) = reset {
                        self.report(Kind::Reset, who, room, reason.clone());
                    }
                    if since.as_ref().is_some_and(|since| since != cursor) {
                        let what = format!("asked for {since:?}, stands at {cursor}");
                        self.report(Kind::CursorBack, who, room, what);
                    }
                    let roams = left_at.insert(room, here).is_some_and(|was| was != here);
                    self.roamed += usize::from(roams);
                    let view = views.entry(room).or_default();
                    view.joined = true;
                    let at = vector(cursor);
                    if !view.began {
                        view.began = true;
                        view.start.clone_from(&at);
                    }
                    view.last = at;
                }
                Event::Pushed {
                    room,
                    from,
                    id,
                    cursor,
                    body,
                    reply_to,
                } => {
                    let key = (&**room, &**from, &**id);
                    let view = views.entry(room).or_default();
                    let answered = reply_to.as_deref();
                    if view.has_other_copy(key, places) {
                        self.copies += 1;
                        view.received.remove(&key);
                    }
                    for (kind, what) in view.take(key, cursor, bodies.get(&key), body, places) {
                        self.report(kind, who, room, what);
                    }
                    if let Some(cause) = answered.and_then(|of| of.rsplit_once('/'))
                        && let Some(cause) = places.get_key_value(&(key.0, cause.0, cause.1))
                        && view.must_have(cause.1)
                        && !view.received.contains(cause.0)
                    {
                        self.early
                            .push(format!("{who} in {room}: {id} before {}", cause.0.2));
                    }
                    self.received += 1;
                }
            }
        }
        for (key, of) in places {
            let Some(view) = views.get(key.0).filter(|view| view.began) else {
                continue;
            };
            if view.must_have(of) && !view.received.contains(key) {
                let what = format!("{}/{} at {of:?}, joined at {:?}", key.1, key.2, view.start);
                self.report(Kind::Lost, who, key.0, what);
            }
        }
    }
}

impl<'a> View<'a> {
    /// Whether all places of a message lie after the one at which the session joined.
    fn must_have(&self, of: &BTreeMap<String, u64>) -> bool {
        of.iter()
            .all(|(origin, seq)| self.start.get(origin).is_none_or(|start| seq > start))
    }

    /// Whether it has received a message of which two copies are stored, one of them where it has been.
    fn has_other_copy(&self, key: Key<'a>, places: &Places<'a>) -> bool {
        let seen = |(origin, seq): (&String, &u64)| self.last.get(origin) >= Some(seq);
        let of = places.get(&key);
        self.received.contains(&key) && of.is_some_and(|of| of.len() > 1 && of.iter().any(seen))
    }

    fn take(
        &mut self,
        key: Key<'a>,
        cursor: &str,
        sent: Option<&&str>,
        body: &str,
        places: &Places<'a>,
    ) -> Vec<(Kind, String)> {
        let mut wrong = Vec::new();
        let name = format!("{}/{}", key.1, key.2);
        if !self.joined {
            wrong.push((Kind::NotJoined, name.clone()));
        }
        match sent {
            None => wrong.push((Kind::Foreign, name.clone())),
            Some(sent) if **sent != *body => wrong.push((Kind::WrongBody, name.clone())),
            Some(_) => {}
        }
        if !self.received.insert(key) {
            wrong.push((Kind::Repeated, format!("{name} at {cursor}")));
        }
        let now = vector(cursor);
        let back = self
            .last
            .iter()
            .any(|(origin, was)| now.get(origin).is_none_or(|at| at < was));
        if back || now == self.last {
            let what = format!("{name}: {cursor} after {:?}", self.last);
            wrong.push((Kind::CursorBack, what));
        }
        // Cursors grow: a message that comes at its own place comes in the order of its stream.
        let grown = grown(&self.last, &now);
        let of = places.get(&key);
        if !of.is_some_and(|of| grown.iter().any(|(o, seq)| of.get(o) == Some(seq))) {
            wrong.push((
                Kind::Reordered,
                format!("{name}: {cursor}, and it is at {of:?}"),
            ));
        }
        self.last = now;
        wrong
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::checker::{Ack, Sent},
        *,
    };

    fn sent(id: &str) -> Sent {
        Sent {
            room: "a:b".to_owned(),
            from: "kim".to_owned(),
            id: id.to_owned(),
            body: "1".to_owned(),
        }
    }

    fn ack(id: &str, cursor: &str) -> Ack {
        Ack {
            room: "a:b".to_owned(),
            from: "kim".to_owned(),
            id: id.to_owned(),
            cursor: cursor.to_owned(),
        }
    }

    fn joined(cursor: &str) -> Event {
        Event::Joined {
            room: "a:b".to_owned(),
            since: None,
            cursor: cursor.to_owned(),
            head: cursor.to_owned(),
            replay: 0,
            reset: None,
        }
    }

    fn pushed(id: &str, cursor: &str, reply_to: Option<&str>) -> Event {
        Event::Pushed {
            room: "a:b".to_owned(),
            id: id.to_owned(),
            from: "kim".to_owned(),
            cursor: cursor.to_owned(),
            body: "1".to_owned(),
            reply_to: reply_to.map(str::to_owned),
        }
    }

    /// Seoul stores `x` at 5 and `y` at 6, Virginia `z` at 2, an answer to `y`.
    fn verdict(events: &[Event]) -> (Vec<Kind>, usize) {
        let log = Log {
            sent: ["x", "y", "z"].map(sent).to_vec(),
            acks: vec![
                ack("x", "s.k.5.1"),
                ack("y", "s.k.6.2"),
                ack("z", "v.k.2.3"),
            ],
            sessions: vec![Session {
                name: "lee".to_owned(),
                events: events.to_vec(),
            }],
        };
        let verdict = check(&log);
        let kinds = verdict.violations.iter().map(|v| v.kind).collect();
        (kinds, verdict.early.len())
    }

    #[test]
    fn what_is_right_passes_and_each_fault_has_its_kind() {
        let start = joined("s.k.4.9_v.k.1.9");
        let x = pushed("x", "s.k.5.1_v.k.1.9", None);
        let y = pushed("y", "s.k.6.2_v.k.1.9", None);
        let z = pushed("z", "s.k.6.2_v.k.2.3", Some("kim/y"));
        let good = [start.clone(), x.clone(), y.clone(), z.clone()];
        assert_eq!(verdict(&good), (vec![], 0));
        let early = pushed("z", "s.k.5.1_v.k.2.3", Some("kim/y"));
        let y_late = pushed("y", "s.k.6.2_v.k.2.3", None);
        let events = [start.clone(), x.clone(), early, y_late];
        assert_eq!(verdict(&events), (vec![], 1));
        // Nothing is missed that lies before the beginning.
        let later = [joined("s.k.5.1_v.k.1.9"), y.clone(), z.clone()];
        assert_eq!(verdict(&later), (vec![], 0));
        assert_eq!(
            verdict(&[start.clone(), x.clone(), y.clone()]).0,
            [Kind::Lost]
        );
        let back = pushed("z", "s.k.5.1_v.k.2.3", None);
        let events = [start.clone(), x.clone(), y.clone(), back];
        assert_eq!(verdict(&events).0, [Kind::CursorBack]);
        let again = pushed("x", "s.k.7.1_v.k.2.3", None);
        let events = [start.clone(), x, y.clone(), z, again];
        assert_eq!(verdict(&events).0, [Kind::Repeated, Kind::Reordered]);
        let wrong_order = [
            start,
            pushed("y", "s.k.6.2_v.k.1.9", None),
            pushed("x", "s.k.7.2_v.k.1.9", None),
            pushed("z", "s.k.7.2_v.k.2.3", None),
        ];
        assert_eq!(verdict(&wrong_order).0, [Kind::Reordered]);
    }
}
