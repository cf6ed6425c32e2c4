//! The answers to commands, whether they arrive over a connection or as an HTTP request.
//!
//! Each function checks what the user may do, carries out the command, and makes the reply. Connections and the order
//! of replies are handled elsewhere.

use std::sync::Arc;

use futures_util::future::try_join_all;

pub(crate) use super::checks::{admitted, granted, namespace};
use super::records;
use crate::{
    auth::{AuthError, Identity, Right},
    bus::{Outgoing, PublishError, Publisher},
    config::{Access, Config, PresencePolicy},
    history::{self, PageRequest, SearchRequest},
    model::{BadCursor, Cursor, Kind, Position, Reference, RoomId, RoomScope, json_flaw},
    people::{Known, People},
    presence::Presence,
    protocol::{
        Anchor, Close, ErrorCode, HistoryReply, PageOf, PresenceReply, PresenceState, PresentUser,
        Publication, PublishReply, ReadReply, ReaderBody, ReadersReply, Refused, SearchFor,
        SearchReply, UnreadBody, UnreadReply,
    },
    read_marker::{Counted, Markers},
    runtime::unix_ms,
    uploads,
};

/// Maximum length of the text of a search, in characters, and of the name of a user there, in bytes.
const MAX_QUERY: usize = 256;

/// Number of messages that a search returns: the default, and the maximum.
const FOUND: usize = 20;
const MAX_FOUND: usize = 100;

/// Why a connection is closed whose token was refused.
pub(crate) fn refusal_of(error: &AuthError) -> Close {
    match error {
        AuthError::Revoked => Close::Revoked,
        AuthError::Expired { .. } => Close::Expired,
        _ => Close::BadToken,
    }
}

pub(super) fn bad(text: String) -> Refused {
    Refused::new(ErrorCode::BadRequest, text)
}

/// Parses a cursor from a client.
pub(crate) fn cursor_of(text: &str) -> Result<Cursor, Refused> {
    text.parse()
        .map_err(|error: BadCursor| Refused::new(ErrorCode::BadCursor, error.to_string()))
}

/// Checks that a cursor in `anchor` is of the log that `head` is of.
pub(crate) fn check_epochs(anchor: &Anchor, head: &Cursor) -> Result<(), Refused> {
    let (Anchor::Before(text) | Anchor::After(text) | Anchor::Around(text)) = anchor else {
        return Ok(());
    };
    if text.is_empty() {
        return Ok(());
    }
    let cursor = cursor_of(text)?;
    let is_known = |at: &Position| {
        let its = head.get(&at.origin);
        its.is_some_and(|its| its.epoch == at.epoch)
    };
    if cursor.positions().iter().all(is_known) {
        return Ok(());
    }
    let text = "the position is of another log";
    Err(Refused::new(ErrorCode::BadCursor, text))
}

/// Checks a publication against grants, namespace and limits. Returns whether its room keeps a log.
pub(crate) async fn check_publication(
    people: &People,
    identity: &Identity,
    publication: &Publication,
) -> Result<bool, Refused> {
    let checked = checked(people, identity, publication).await;
    checked.map(|(durable, _known)| durable)
}

/// Also returns what is known of the record of the room.
async fn checked(
    people: &People,
    identity: &Identity,
    publication: &Publication,
) -> Result<(bool, Arc<Known>), Refused> {
    let config = people.config();
    let Publication {
        room,
        kind,
        body,
        target,
        ..
    } = publication;
    let durable = namespace(config, room)?.durable;
    if let Some(pinning) = records::Pinning::of(identity, publication) {
        // Boxed: rare, and a large future.
        Box::pin(pinning.check(people, identity)).await?;
        return Ok((durable, people.of(room).await?));
    }
    let known = admitted(people, identity, Right::Write, room).await?;
    if let (Kind::Edit | Kind::Delete, Some((_, reference))) = (kind, target)
        && !reference.is_by(&identity.user)
    {
        if !identity.may(Right::Moderate, room) {
            let text = format!(
                "{} of another's message needs the right moderate",
                kind.as_str()
            );
            return Err(Refused::new(ErrorCode::Forbidden, text));
        }
        people.check(identity, Right::Moderate, room).await?;
    }
    let (size, limit) = (body.get().len() as u64, config.limits.body.as_u64());
    if size > limit {
        let text = format!("the body has {size} bytes, the limit is {limit}");
        return Err(Refused::new(ErrorCode::TooLarge, text));
    }
    if let Some(flaw) = json_flaw(body.get().as_bytes(), config.limits.json_depth) {
        return Err(bad(format!("the body {flaw}")));
    }
    if config.uploads.is_on()
        && let Some(refused) = uploads_flaw(config, identity, publication)
    {
        return Err(refused);
    }
    Ok((durable, known))
}

/// As [`check_publication`], for what is published now: a message in a room in slow mode takes its sender's turn.
pub(crate) async fn accept_publication(
    people: &People,
    identity: &Identity,
    publication: &Publication,
) -> Result<bool, Refused> {
    let (durable, known) = checked(people, identity, publication).await?;
    if publication.kind == Kind::Message {
        people.take_turn(&known, identity, &publication.room)?;
    }
    Ok(durable)
}

/// Why a publication can't name the uploads that it names, if it can't.
fn uploads_flaw(
    config: &Config,
    identity: &Identity,
    publication: &Publication,
) -> Option<Refused> {
    let (author, until) = match (publication.kind, &publication.target) {
        (Kind::Message, _) => {
            let ttl = u64::try_from(config.uploads.unused_ttl.as_millis()).unwrap_or(u64::MAX);
            (&*identity.user, Some(unix_ms().saturating_sub(ttl)))
        }
        // An edit names again what its message has named long ago, and a moderator edits the messages of others.
        (Kind::Edit, Some((_, Reference { user, .. }))) => {
            (user.as_deref().unwrap_or(&identity.user), None)
        }
        _ => return None,
    };
    let (room, body) = (&publication.room, publication.body.get());
    uploads::refusal(&config.uploads, room, author, until, body)
}

/// Checks that files may be uploaded to a room.
pub(crate) async fn may_upload(
    people: &People,
    identity: &Identity,
    room: &RoomId,
) -> Result<(), Refused> {
    let namespace = namespace(people.config(), room)?;
    admitted(people, identity, Right::Write, room).await?;
    if !namespace.durable || !namespace.history {
        let text = format!(
            "the namespace {:?} keeps no history, which uploads need",
            room.namespace()
        );
        return Err(bad(text));
    }
    Ok(())
}

/// Publishes a publication that was checked. `markers`: where the marker of the user is moved, if it is. `known_time` returns the time of a stored message by its sequence, if it
/// is in memory.
///
/// # Errors
/// [`PublishError`].
pub(crate) async fn publish(
    people: &People,
    publisher: &Publisher,
    markers: Option<&Markers>,
    outgoing: &Outgoing<'_>,
    durable: bool,
    known_time: impl Fn(u64) -> Option<u64>,
) -> Result<PublishReply, PublishError> {
    let Publication { room, kind, .. } = outgoing.publication;
    let (cursor, ts, dup) = if durable {
        let acked = publisher.durable(outgoing, known_time).await?;
        if *kind == Kind::Message
            && let Some(markers) = markers
        {
            markers.sent(room, outgoing.user, &acked.cursor);
        }
        if *kind == Kind::Message {
            // Also if it was stored before: then the one who stored it may not have got so far.
            records::signal(people, publisher, outgoing, &acked);
        }
        (Some(acked.cursor), acked.ts, acked.duplicate)
    } else {
        (None, publisher.ephemeral(outgoing)?, false)
    };
    Ok(PublishReply {
        room: room.clone(),
        id: outgoing.id.to_owned(),
        cursor,
        ts,
        dup,
    })
}

/// Checks that a user may see who is in a room.
pub(crate) async fn may_see_presence(
    people: &People,
    identity: &Identity,
    room: &RoomId,
) -> Result<(), Refused> {
    if namespace(people.config(), room)?.presence == PresencePolicy::Off {
        let text = format!("presence is off in the namespace {:?}", room.namespace());
        return Err(bad(text));
    }
    admitted(people, identity, Right::Presence, room)
        .await
        .map(drop)
}

/// Who is in a room.
pub(crate) async fn presence(
    people: &People,
    presence: &Arc<Presence>,
    identity: &Identity,
    room: RoomId,
    page: &PageOf,
) -> Result<PresenceReply, Refused> {
    may_see_presence(people, identity, &room).await?;
    let page = presence
        .page(&room, page)
        .await
        .map_err(|error| Refused::new(ErrorCode::Unavailable, error.to_string()))?;
    let users = page.users.into_iter().map(|(user, shown)| PresentUser {
        user,
        info: shown.seen.info,
        since: shown.seen.since,
        state: shown
            .unreachable
            .then_some(PresenceState::Unreachable.as_str()),
    });
    Ok(PresenceReply {
        room,
        count: page.count,
        users: users.collect(),
        next: page.next,
    })
}

/// Checks that a user may move and see the read markers of a room.
async fn may_see_markers(
    people: &People,
    identity: &Identity,
    room: &RoomId,
) -> Result<(), Refused> {
    let durable = namespace(people.config(), room)?.durable;
    admitted(people, identity, Right::Read, room).await?;
    if !durable {
        let text = format!("{room} keeps no log: it has no cursors and no read markers");
        return Err(bad(text));
    }
    Ok(())
}

/// Moves the user's read marker. `head` is the room's head, if the caller knows it.
pub(crate) async fn read(
    people: &People,
    markers: &Markers,
    identity: &Identity,
    room: &RoomId,
    cursor: &str,
    head: Option<Cursor>,
) -> Result<ReadReply, Refused> {
    may_see_markers(people, identity, room).await?;
    if identity.is_anonymous {
        return Err(bad("users without a token have no read markers".to_owned()));
    }
    let cursor = cursor_of(cursor)?;
    let marker = markers
        .read(room, &identity.user, &cursor, head.as_ref())
        .await?;
    Ok(ReadReply { cursor: marker })
}

/// Who has read up to where in a room.
pub(crate) async fn readers(
    people: &People,
    markers: &Markers,
    identity: &Identity,
    room: RoomId,
    page: &PageOf,
) -> Result<ReadersReply, Refused> {
    may_see_markers(people, identity, &room).await?;
    let (readings, more) = markers.readers(&room, page).await?;
    let last = readings.last().map(|reading| reading.user.clone());
    let readers = readings.into_iter().map(|reading| ReaderBody {
        user: reading.user,
        cursor: reading.cursor,
        at: reading.at,
    });
    Ok(ReadersReply {
        room,
        readers: readers.collect(),
        next: last.filter(|_| more),
    })
}

/// Counts the unread messages of rooms. A room without a log has none. A refusal names the room.
pub(crate) async fn unread(
    people: &People,
    markers: &Markers,
    identity: &Identity,
    rooms: &[RoomId],
) -> Result<UnreadReply, Refused> {
    let config = people.config();
    let limit = config.limits.unread_rooms;
    if rooms.len() > limit {
        let text = format!("at most {limit} rooms at once");
        return Err(Refused::new(ErrorCode::Limit, text));
    }
    let mut durable = Vec::with_capacity(rooms.len());
    for room in rooms {
        let namespace = namespace(config, room).map_err(|refused| {
            Refused::new(refused.code, format!("{room}: {}", refused.message))
        })?;
        granted(identity, Right::Read, room)?;
        if namespace.durable {
            durable.push(room);
        }
    }
    let checks = rooms
        .iter()
        .map(|room| people.check(identity, Right::Read, room));
    try_join_all(checks).await?;
    let counts = markers
        .unread(&identity.user, durable, Counted::Unread)
        .await?;
    let rooms = rooms.iter().map(|room| {
        let unread = counts.get(room).cloned().unwrap_or_default();
        UnreadBody {
            room: room.clone(),
            count: unread.count,
            capped: unread.capped,
        }
    });
    Ok(UnreadReply {
        rooms: rooms.collect(),
    })
}

/// Checks that a user may read a room's history.
pub(crate) async fn may_read_history(
    people: &People,
    identity: &Identity,
    room: &RoomId,
) -> Result<(), Refused> {
    let namespace = namespace(people.config(), room)?;
    admitted(people, identity, Right::History, room).await?;
    if !namespace.durable || !namespace.history {
        let text = format!("no history is kept in the namespace {:?}", room.namespace());
        return Err(bad(text));
    }
    Ok(())
}

/// Reads a page of a room's history.
pub(crate) async fn history(
    history: &history::Client,
    request: &PageRequest,
) -> Result<HistoryReply, Refused> {
    let answer = history.page(request).await?;
    Ok(HistoryReply {
        messages: answer.messages,
        prev: answer.prev,
        next: answer.next,
        partial: answer.partial,
        ..HistoryReply::empty(request.room.clone())
    })
}

/// The rooms in which a user's token gives a right. In namespaces for members only, of the history these are the user's
/// own; to erase there, the token must give `manage`.
pub(crate) async fn scope(
    people: &People,
    identity: &Identity,
    right: Right,
) -> Result<RoomScope, Refused> {
    let granted = identity.scope(right);
    let managed = identity.scope(Right::Manage);
    let namespaces = &people.config().namespaces;
    let members_only = |name: &str| {
        let its = namespaces.get(name).map(|its| its.access);
        its == Some(Access::Members)
            && !managed.all
            && !managed.namespaces.iter().any(|managed| managed == name)
    };
    if !namespaces.keys().any(|name| members_only(name)) {
        return Ok(granted);
    }
    let named: Vec<&String> = match granted.all {
        true => namespaces.keys().collect(),
        false => granted.namespaces.iter().collect(),
    };
    let (own, whole): (Vec<&String>, Vec<&String>) =
        named.into_iter().partition(|name| members_only(name));
    let (closed, open): (Vec<RoomId>, Vec<RoomId>) = granted
        .rooms
        .into_iter()
        .partition(|room| members_only(room.namespace()));
    let mut rooms = open;
    if right == Right::History && !(own.is_empty() && closed.is_empty()) {
        let is_granted =
            |room: &RoomId| own.iter().any(|it| *it == room.namespace()) || closed.contains(room);
        let mine = people.rooms_of(&identity.user).await?.into_iter();
        let mine = mine.filter(|(room, entry)| entry.is_in() && is_granted(room));
        rooms.extend(mine.map(|(room, _)| room));
    }
    Ok(RoomScope {
        all: false,
        namespaces: whole.into_iter().cloned().collect(),
        rooms,
    })
}

/// The room of a message that was found.
#[derive(serde::Deserialize)]
struct InRoom {
    room: RoomId,
}

/// Searches a room, or all rooms whose history the user may read.
pub(crate) async fn search(
    people: &People,
    history: &history::Client,
    identity: &Identity,
    room: Option<RoomId>,
    query: SearchFor,
) -> Result<SearchReply, Refused> {
    let (rooms, reply_to) = match room {
        Some(room) => {
            may_read_history(people, identity, &room).await?;
            let reply_to = query.reply_to.as_deref().map(|text| {
                let reference = Reference::parse(text);
                let reference =
                    reference.map_err(|error| Refused::new(ErrorCode::BadId, error.to_string()))?;
                Ok::<_, Refused>(history::key_of(&room, &identity.user, &reference))
            });
            let reply_to = reply_to.transpose()?;
            (RoomScope::one(room), reply_to)
        }
        None => {
            let rooms = scope(people, identity, Right::History).await?;
            if rooms.is_empty() {
                let text = "the token does not grant history on any room";
                return Err(Refused::new(ErrorCode::Forbidden, text));
            }
            if query.reply_to.is_some() {
                return Err(bad("reply_to is for the search of one room".to_owned()));
            }
            (rooms, None)
        }
    };
    if query.text.chars().count() > MAX_QUERY {
        return Err(bad(format!("q: at most {MAX_QUERY} characters")));
    }
    let users = [&query.from, &query.mentions];
    if users
        .into_iter()
        .flatten()
        .any(|user| user.len() > MAX_QUERY)
    {
        return Err(bad(format!("from, mentions: at most {MAX_QUERY} bytes")));
    }
    let names_user = query.from.is_some() || query.mentions.is_some();
    if query.text.trim().is_empty() && !names_user && reply_to.is_none() {
        let text = "one of q, from, mentions and reply_to is needed";
        return Err(bad(text.to_owned()));
    }
    let limit = match query.limit.map(usize::try_from) {
        None => FOUND,
        Some(Ok(limit @ 1..=MAX_FOUND)) => limit,
        Some(_) => return Err(bad(format!("limit must be 1 to {MAX_FOUND}"))),
    };
    let request = SearchRequest {
        rooms,
        text: query.text.trim().to_owned(),
        from: query.from,
        mentions: query.mentions,
        reply_to,
        before: query.before,
        limit,
    };
    let found = history.search(&request).await?;
    let mut messages = Vec::with_capacity(found.messages.len());
    for message in found.messages {
        // Records are not part of the question: the user may be banned from a room, or not be in it any more.
        let of: InRoom = serde_json::from_str(message.get())
            .map_err(|error| Refused::new(ErrorCode::Internal, error.to_string()))?;
        match people.check(identity, Right::History, &of.room).await {
            Ok(_) => messages.push(message),
            Err(refused) if refused.code == ErrorCode::Forbidden => {}
            Err(refused) => return Err(refused),
        }
    }
    Ok(SearchReply {
        messages,
        next: found.next,
    })
}
