//! The directory of rooms, as one user may see it.
//!
//! The history service says which rooms there are, newest activity first, and leaves out what the user may not see. It
//! may be behind, so the edge judges each room once more by the record that it knows itself, and shows that.

use std::{fmt, sync::Arc};

use futures_util::future::try_join_all;
use serde::Deserialize;
use utoipa::IntoParams;

use super::answers::bad;
use crate::{
    auth::{Identity, Right, user_flaw},
    config::{Access, Config},
    history,
    model::{RoomId, RoomScope},
    people::{Known, MemberState, People, Record, RoomKind},
    protocol::{ErrorCode, Refused, RoomBody, RoomsReply},
    store::{RoomPlace, Sees, WhichRooms},
};

/// Rooms on a page: the default, and the maximum.
const PAGE: usize = 50;
const MAX_PAGE: usize = 200;

/// Members of a room that are named.
const NAMED: usize = 10;

/// Which rooms. A room must match everything that is given.
#[derive(Debug, Clone, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct RoomsFor {
    /// Only rooms of this namespace.
    pub(crate) namespace: Option<String>,
    /// Only rooms about this.
    #[serde(rename = "ref")]
    #[param(rename = "ref")]
    pub(crate) about: Option<String>,
    /// Only rooms that this user is named in as a member.
    pub(crate) member: Option<String>,
    /// Only `dm`, `group` or `open` rooms.
    pub(crate) kind: Option<String>,
    /// `true`: only rooms that are put aside; `false`: only the others.
    pub(crate) archived: Option<bool>,
    /// The `next` of the page before.
    pub(crate) after: Option<String>,
    /// At most this many rooms, 1 to 200; by default 50.
    pub(crate) limit: Option<u64>,
}

/// The text of a place in the list: the `after` of the next page.
struct Shown<'p>(&'p RoomPlace);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0.active_at, self.0.room)
    }
}

fn place(text: &str) -> Option<RoomPlace> {
    let (active_at, room) = text.split_once('.')?;
    Some(RoomPlace {
        active_at: active_at.parse().ok()?,
        room: RoomId::parse(room).ok()?,
    })
}

/// A page of the rooms that the user may see.
pub(crate) async fn rooms(
    people: &People,
    history: &history::Client,
    identity: &Identity,
    query: RoomsFor,
) -> Result<RoomsReply, Refused> {
    let which = which(people.config(), identity, query)?;
    let found = history.rooms(&which).await?;
    let known = try_join_all(found.rooms.iter().map(|place| people.of(&place.room))).await?;
    let is_unknown = |known: &Arc<Known>| known.record().is_none() && !known.is_read();
    if known.iter().any(is_unknown) {
        let text = "the records of rooms can't be read now";
        return Err(Refused::new(ErrorCode::Unavailable, text));
    }
    let next = found.rooms.last().filter(|_| found.more);
    let next = next.map(|last| Shown(last).to_string());
    let shown = found.rooms.iter().zip(known);
    let shown = shown.filter_map(|(place, known)| {
        let record = seen(people.config(), identity, &place.room, &known)?;
        is_asked_for(&which, &record).then(|| body(place, &record))
    });
    Ok(RoomsReply {
        rooms: shown.collect(),
        next,
    })
}

/// Checks a query, and adds what the user may see.
fn which(config: &Config, identity: &Identity, query: RoomsFor) -> Result<WhichRooms, Refused> {
    let RoomsFor {
        namespace,
        about,
        member,
        kind,
        archived,
        after,
        limit,
    } = query;
    if let Some(name) = &namespace
        && !config.namespaces.contains_key(name)
    {
        let text = format!("there is no namespace {name:?}");
        return Err(Refused::new(ErrorCode::UnknownNamespace, text));
    }
    if let Some(kind) = &kind
        && RoomKind::parse(kind).is_none()
    {
        return Err(bad("kind is not one of dm, group, open".to_owned()));
    }
    if let Some(flaw) = member.as_deref().and_then(user_flaw) {
        return Err(bad(format!("member {flaw}")));
    }
    let after = after.map(|text| {
        place(&text).ok_or_else(|| bad("after is no next of a list of rooms".to_owned()))
    });
    let limit = match limit.map(usize::try_from) {
        None => PAGE,
        Some(Ok(limit @ 1..=MAX_PAGE)) => limit,
        Some(_) => return Err(bad(format!("limit must be 1 to {MAX_PAGE}"))),
    };
    let sees = sees(config, identity, namespace.as_deref());
    let scopes = [&sees.all, &sees.unless_banned, &sees.as_member];
    if scopes.into_iter().all(RoomScope::is_empty) {
        let text = match &namespace {
            None => "the token grants neither read nor manage on any room".to_owned(),
            Some(name) => format!("the token grants neither read nor manage on rooms of {name}"),
        };
        return Err(Refused::new(ErrorCode::Forbidden, text));
    }
    Ok(WhichRooms {
        namespace,
        about,
        member,
        kind,
        archived,
        sees,
        after: after.transpose()?,
        limit,
    })
}

/// The rooms that a user may see, of all namespaces or of one.
fn sees(config: &Config, identity: &Identity, only: Option<&str>) -> Sees {
    let is_asked = |name: &str| only.is_none_or(|only| only == name);
    // Of one namespace, all that is granted there.
    let narrowed = |mut scope: RoomScope| {
        scope.namespaces.retain(|name| is_asked(name));
        scope.rooms.retain(|room| is_asked(room.namespace()));
        scope
    };
    let mut all = narrowed(identity.scope(Right::Manage));
    all.all |= only.is_some() && !all.namespaces.is_empty();
    let mut readable = narrowed(identity.scope(Right::Read));
    if readable.all {
        let named = config.namespaces.keys().filter(|name| is_asked(name));
        readable.namespaces = named.cloned().collect();
    }
    let members_only = |name: &str| {
        let its = config.namespaces.get(name);
        its.is_some_and(|its| its.access == Access::Members)
    };
    let of = |members: bool| RoomScope {
        all: false,
        namespaces: {
            let names = readable.namespaces.iter();
            let names = names.filter(|name| members_only(name) == members);
            names.cloned().collect()
        },
        rooms: {
            let rooms = readable.rooms.iter();
            let rooms = rooms.filter(|room| members_only(room.namespace()) == members);
            rooms.cloned().collect()
        },
    };
    Sees {
        user: identity.user.to_string(),
        all,
        unless_banned: of(false),
        as_member: of(true),
    }
}

/// The record of a room, if there is one that the user may see.
fn seen(config: &Config, identity: &Identity, room: &RoomId, known: &Known) -> Option<Arc<Record>> {
    let is_granted = identity.may(Right::Read, room) || identity.may(Right::Manage, room);
    let is_let_in = known.standing(config, room, |standing| {
        standing.removal(identity, room).is_none()
    });
    let is_configured = config.namespaces.contains_key(room.namespace());
    known
        .record()
        .filter(|_| is_granted && is_let_in && is_configured)
}

/// Whether a record is what was asked for.
fn is_asked_for(which: &WhichRooms, record: &Record) -> bool {
    let WhichRooms {
        namespace: _,
        about,
        member,
        kind,
        archived,
        sees: _,
        after: _,
        limit: _,
    } = which;
    let is_in = |user: &String| {
        let member = record.member(user);
        member.is_some_and(|member| member.state == MemberState::In)
    };
    (about.is_none() || *about == record.about)
        && member.as_ref().is_none_or(is_in)
        && kind
            .as_ref()
            .is_none_or(|kind| kind == record.kind.as_str())
        && archived.is_none_or(|archived| archived == record.is_archived())
}

fn body(place: &RoomPlace, record: &Record) -> RoomBody {
    let members = record.present().map(|(user, _)| user.to_owned());
    RoomBody {
        room: place.room.clone(),
        kind: record.kind.as_str(),
        about: record.about.clone(),
        title: record.title(),
        info: record.info(),
        at: record.made.created,
        by: record.made.by.clone(),
        active_at: place.active_at,
        archived: record.is_archived(),
        frozen: record.is_frozen(),
        assignee: record.assignee(),
        alert: record.alert(),
        member_count: record.present().count(),
        members: members.take(NAMED).collect(),
        version: record.version(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_its_text() {
        for text in ["1763600000123.chat:a", "0.chat:=2Ex"] {
            assert_eq!(Shown(&place(text).unwrap()).to_string(), text);
        }
        for text in ["", "1", "x.chat:a", "1.chat", ".chat:a", "-1.chat:a"] {
            assert_eq!(place(text), None, "{text}");
        }
    }
}
