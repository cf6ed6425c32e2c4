//! All queries of messages. Each uses an index of `schema`.

use mongodb::bson::{Bson, Document as Fields, Regex, doc, raw::cstr};

use super::{
    End, Search, Span,
    schema::{FROM, MENTIONS, ROOM_PLACE, TERMS, THREAD},
    text::{Query as Sought, Term},
};
use crate::model::{Position, RoomId, RoomScope};

/// A query of the collection `messages`.
#[derive(Debug, Clone)]
pub(super) struct Query {
    pub(super) filter: Fields,
    pub(super) sort: Fields,
    pub(super) limit: usize,
    /// The only fields to return.
    pub(super) only: Option<&'static [&'static str]>,
    /// The index to use; `None`: MongoDB chooses.
    pub(super) index: Option<&'static str>,
}

pub(super) fn page(room: &RoomId, span: &Span, end: End, limit: usize) -> Query {
    let mut filter = doc! { "room": room.as_str(), "place": places(span) };
    if let Some(first) = &span.thread {
        filter.insert("reply_key", first);
    }
    Query {
        filter,
        sort: doc! { "place": direction(end) },
        limit,
        only: None,
        // Otherwise MongoDB may look through the room for the answers to one message.
        index: span.thread.as_ref().map(|_| THREAD),
    }
}

pub(super) fn keys(keys: &[String]) -> Query {
    Query {
        filter: doc! { "_id": { "$in": keys } },
        sort: doc! {},
        limit: keys.len(),
        only: None,
        index: None,
    }
}

/// The answers to these messages without their bodies: of one message after the other in the order of their keys, newest
/// first. Answers with the keys `without` are left out.
pub(super) fn answers(room: &RoomId, to: &[String], without: &[String], limit: usize) -> Query {
    Query {
        filter: answering(room, doc! { "$in": to }.into(), without),
        sort: doc! { "reply_key": 1, "room": 1, "place": -1 },
        limit,
        // All of them are in the index.
        only: Some(&["_id", "reply_key", "place", "deleted"]),
        index: Some(THREAD),
    }
}

/// The stages of an aggregation that count the newest answers to a message, at most `limit`.
pub(super) fn count_answers(
    room: &RoomId,
    to: &str,
    without: &[String],
    limit: i64,
) -> [Fields; 4] {
    let there = doc! { "$lte": ["$deleted", Bson::Null] };
    let one = |value: Bson, none: Bson| doc! { "$cond": [there.clone(), value, none] };
    let this = doc! { "place": "$place", "_id": "$_id" };
    [
        doc! { "$match": answering(room, to.into(), without) },
        doc! { "$sort": { "reply_key": 1, "room": 1, "place": -1 } },
        doc! { "$limit": limit },
        doc! { "$group": {
            "_id": "$reply_key",
            "looked": { "$sum": 1 },
            "count": { "$sum": one(1.into(), 0.into()) },
            "last": { "$max": one(this.into(), Bson::Null) },
        } },
    ]
}

fn answering(room: &RoomId, to: Bson, without: &[String]) -> Fields {
    let mut filter =
        doc! { "reply_key": to, "room": room.as_str(), "place": places(&Span::default()) };
    if !without.is_empty() {
        filter.insert("_id", doc! { "$nin": without });
    }
    filter
}

/// What is needed to know of these messages whether they are answers that count.
pub(super) fn outlines(keys: &[String]) -> Query {
    let mut query = self::keys(keys);
    query.only = Some(&["_id", "room", "id", "from", "place", "reply_key", "deleted"]);
    query
}

/// The places of messages with these keys.
pub(super) fn said(keys: &[String]) -> Query {
    let mut query = self::keys(keys);
    query.filter.insert("place", doc! { "$exists": true });
    query.only = Some(&["_id", "place"]);
    query
}

/// Documents in the order of their keys, after a key.
pub(super) fn after(key: &str, limit: usize) -> Query {
    Query {
        filter: doc! { "_id": { "$gt": key } },
        sort: doc! { "_id": 1 },
        limit,
        only: None,
        index: None,
    }
}

/// A message of the first room of a namespace that comes after a room. The index leads there without reading the rooms
/// before it.
pub(super) fn room_after(namespace: &str, room: Option<&RoomId>) -> Query {
    let mut rooms = rooms_of(namespace);
    if let Some(room) = room {
        rooms.insert("$gt", room.as_str());
    }
    Query {
        filter: doc! { "room": rooms, "place": places(&Span::default()) },
        sort: doc! { "room": 1 },
        limit: 1,
        only: Some(&["room"]),
        index: Some(ROOM_PLACE),
    }
}

/// Messages of a namespace before a place.
pub(super) fn before(namespace: &str, place: &str, limit: usize) -> Query {
    Query {
        filter: doc! { "room": rooms_of(namespace), "place": { "$gte": "", "$lt": place } },
        sort: doc! {},
        limit,
        only: Some(&["_id", "room"]),
        index: Some(ROOM_PLACE),
    }
}

/// The condition on the rooms of a namespace: a range of the index. `;` is the character after `:`.
pub(super) fn rooms_of(namespace: &str) -> Fields {
    doc! { "$gt": format!("{namespace}:"), "$lt": format!("{namespace};") }
}

pub(super) fn nearest(room: &RoomId, position: &Position, end: End) -> Query {
    let seq = i64::try_from(position.seq).unwrap_or(i64::MAX);
    let bound = match end {
        End::Oldest => doc! { "$gte": seq },
        End::Newest => doc! { "$lte": seq },
    };
    let (origin, epoch) = (position.origin.as_str(), position.epoch.as_str());
    Query {
        filter: doc! { "room": room.as_str(), "origin": origin, "epoch": epoch, "seq": bound },
        sort: doc! { "seq": direction(end) },
        limit: 1,
        only: Some(&["place"]),
        index: None,
    }
}

/// Candidates of a search. Whether a candidate's text matches, and whether it is a tombstone, is checked afterwards, so
/// that MongoDB can sort index entries before it reads documents.
///
/// `walk`: the only room of the search is so small that reading all of it costs less than reading the messages of all
/// rooms with a word.
pub(super) fn search(
    search: &Search,
    sought: &Sought,
    span: &Span,
    limit: usize,
    walk: bool,
) -> Query {
    let rooms = rooms(&search.rooms);
    let mut filter = doc! { "room": rooms, "place": places(span) };
    let mut exact = Vec::new();
    for term in sought.terms() {
        match term {
            Term::Is(term) => exact.push(term),
            Term::Begins(start) => {
                let end = format!("{start}{}", char::MAX);
                filter.insert(
                    "terms",
                    doc! { "$elemMatch": { "$gte": start, "$lte": end } },
                );
            }
        }
    }
    let words = !exact.is_empty();
    if words {
        filter.insert("terms", doc! { "$all": exact });
    }
    for (name, value) in [
        ("from", &search.from),
        ("mentions", &search.mentions),
        ("reply_key", &search.reply_to),
    ] {
        if let Some(value) = value {
            filter.insert(name, value);
        }
    }
    // MongoDB chooses an index by the first candidates, and again if that turns out badly: it scans rooms for a word
    // that is common there, and keeps doing so for the next word, which is rare. The condition named here is about as
    // rare as any other one.
    let index = match (&search.reply_to, &search.mentions, &search.from, words) {
        (Some(_), ..) => Some(THREAD),
        (None, Some(_), ..) => Some(MENTIONS),
        (None, None, None, true) => Some(if walk { ROOM_PLACE } else { TERMS }),
        (None, None, Some(_), false) if sought.is_empty() => Some(FROM),
        (None, None, ..) => None,
    };
    Query {
        filter,
        sort: doc! { "place": direction(End::Newest) },
        limit,
        only: None,
        index,
    }
}

/// The messages of a room, at most `limit`, for counting.
pub(super) fn size(room: &RoomId, limit: usize) -> Query {
    Query {
        filter: doc! { "room": room.as_str(), "place": places(&Span::default()) },
        sort: doc! {},
        limit,
        only: None,
        index: Some(ROOM_PLACE),
    }
}

fn direction(end: End) -> i32 {
    match end {
        End::Oldest => 1,
        End::Newest => -1,
    }
}

/// Bounds that exclude stubs, which have no place.
fn places(span: &Span) -> Fields {
    let mut bounds = match &span.after {
        Some(after) => doc! { "$gt": after.to_string() },
        None => doc! { "$gte": "" },
    };
    if let Some(before) = &span.before {
        bounds.insert("$lt", before.to_string());
    }
    bounds
}

/// The condition on rooms, in a form from which MongoDB derives index bounds.
fn rooms(scope: &RoomScope) -> Bson {
    if scope.all {
        // Every room; MongoDB needs a condition to use the index.
        return doc! { "$gte": "" }.into();
    }
    if let ([], [room]) = (scope.namespaces.as_slice(), scope.rooms.as_slice()) {
        return room.as_str().into();
    }
    // A namespace contains no special characters of regular expressions, and a prefix becomes a range.
    let namespaces = scope.namespaces.iter().filter_map(|namespace| {
        let pattern = format!("^{namespace}:").try_into().ok()?;
        let options = cstr!("").into();
        Some(Bson::RegularExpression(Regex { pattern, options }))
    });
    let rooms = scope.rooms.iter().map(|room| Bson::from(room.as_str()));
    let any: Vec<Bson> = namespaces.chain(rooms).collect();
    doc! { "$in": any }.into()
}
