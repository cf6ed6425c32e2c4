//! Read markers: what `read`, `readers` and `unread` do, and what they need.

use crate::{
    auth::{Identity, Right},
    config::Config,
    model::{BadCursor, Cursor, RoomId},
    protocol::{
        ErrorCode,
        native::{PageOf, Writer},
    },
    read_marker::{MarkerError, Reading, Unread},
    room::Membership,
};

use super::{
    Session,
    commands::{Refused, forbidden, namespace},
    frame,
};

/// What a client is told when markers can't be moved or read.
pub(crate) fn marker_refusal(error: &MarkerError) -> Refused {
    (error.code(), error.to_string())
}

/// Checks that a user may move a read marker in a room, and reads the cursor.
///
/// # Errors
/// The refusal.
pub(crate) fn check_read(
    config: &Config,
    identity: &Identity,
    room: &RoomId,
    cursor: &str,
) -> Result<Cursor, Refused> {
    check_readers(config, identity, room)?;
    cursor
        .parse()
        .map_err(|error: BadCursor| (ErrorCode::BadCursor, error.to_string()))
}

/// Checks that a user may ask who has read what in a room.
///
/// # Errors
/// The refusal.
pub(crate) fn check_readers(
    config: &Config,
    identity: &Identity,
    room: &RoomId,
) -> Result<(), Refused> {
    let durable = namespace(config, room)?.durable;
    if !identity.may(Right::Read, room) {
        return Err(forbidden(Right::Read, room));
    }
    if !durable {
        let text = format!("{room} keeps no log: it has no cursors and no read markers");
        return Err((ErrorCode::BadRequest, text));
    }
    Ok(())
}

/// Checks that a user may ask how much is new in rooms; those that have a log.
///
/// # Errors
/// The refusal, which names the room.
pub(crate) fn check_unread<'r>(
    config: &Config,
    identity: &Identity,
    rooms: &'r [RoomId],
) -> Result<Vec<&'r RoomId>, Refused> {
    let limit = config.limits.unread_rooms;
    if rooms.len() > limit {
        let text = format!("at most {limit} rooms at once");
        return Err((ErrorCode::Limit, text));
    }
    let mut durable = Vec::with_capacity(rooms.len());
    for room in rooms {
        let namespace =
            namespace(config, room).map_err(|(code, text)| (code, format!("{room}: {text}")))?;
        if !identity.may(Right::Read, room) {
            return Err(forbidden(Right::Read, room));
        }
        if namespace.durable {
            durable.push(room);
        }
    }
    Ok(durable)
}

impl Session {
    pub(super) async fn read(
        &self,
        rid: u64,
        identity: &Identity,
        room: &RoomId,
        cursor: &str,
    ) -> Result<(), Refused> {
        let cursor = check_read(&self.context.config, identity, room, cursor)?;
        let head = {
            let rooms = self.rooms.borrow();
            let membership = rooms.get(room).map(|seat| &seat.membership);
            membership
                .filter(|membership| !membership.has_ended())
                .and_then(Membership::head)
        };
        let markers = &self.context.markers;
        let marker = markers
            .read(room, &identity.user, &cursor, head.as_ref())
            .await
            .map_err(|error| marker_refusal(&error))?;
        self.replies.now(frame(|out| {
            Writer::reply(out, "ok", rid)
                .string("cursor", &marker.to_string())
                .end();
        }));
        Ok(())
    }

    pub(super) async fn readers(
        &self,
        rid: u64,
        identity: &Identity,
        room: &RoomId,
        page: &PageOf,
    ) -> Result<(), Refused> {
        check_readers(&self.context.config, identity, room)?;
        let (readers, more) = self
            .context
            .markers
            .readers(room, page)
            .await
            .map_err(|error| marker_refusal(&error))?;
        self.replies.now(frame(|out| {
            let mut writer = Writer::reply(out, "readers", rid);
            writer.string("room", room.as_str());
            writer.list("readers", &readers, |writer, reading| {
                let Reading { user, cursor, at } = reading;
                writer
                    .string("user", user)
                    .string("cursor", &cursor.to_string())
                    .number("at", *at);
            });
            if let (true, Some(last)) = (more, readers.last()) {
                writer.string("next", &last.user);
            }
            writer.end();
        }));
        Ok(())
    }

    pub(super) async fn unread(
        &self,
        rid: u64,
        identity: &Identity,
        rooms: &[RoomId],
    ) -> Result<(), Refused> {
        let durable = check_unread(&self.context.config, identity, rooms)?;
        let counts = self
            .context
            .markers
            .unread(&identity.user, durable)
            .await
            .map_err(|error| marker_refusal(&error))?;
        self.replies.now(frame(|out| {
            let mut writer = Writer::reply(out, "unread", rid);
            writer.list("rooms", rooms, |writer, room| {
                let Unread { count, capped } = counts.get(room).copied().unwrap_or_default();
                writer.string("room", room.as_str()).number("count", count);
                if capped {
                    writer.boolean("capped", true);
                }
            });
            writer.end();
        }));
        Ok(())
    }
}
