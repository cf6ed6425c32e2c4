//! Commands about the state of a room: who is there.

use super::{
    Session,
    commands::{Refused, forbidden, namespace},
    frame,
};
use crate::{
    auth::{Identity, Right},
    config::{Config, PresencePolicy},
    model::RoomId,
    presence::{Page, UNREACHABLE, Unavailable},
    protocol::{
        ErrorCode,
        native::{PageOf, Writer},
    },
};

/// Checks whether `identity` may see who is in `room`.
///
/// # Errors
/// The refusal.
pub(crate) fn may_see_presence(
    config: &Config,
    identity: &Identity,
    room: &RoomId,
) -> Result<(), Refused> {
    if namespace(config, room)?.presence == PresencePolicy::Off {
        let text = format!("presence is off in the namespace {:?}", room.namespace());
        return Err((ErrorCode::BadRequest, text));
    }
    if !identity.may(Right::Presence, room) {
        return Err(forbidden(Right::Presence, room));
    }
    Ok(())
}

/// What a client is told when who is in a room is not known.
pub(crate) fn presence_refusal(error: Unavailable) -> Refused {
    (ErrorCode::Unavailable, error.to_string())
}

impl Session {
    pub(super) async fn presence(
        &self,
        rid: u64,
        identity: &Identity,
        room: &RoomId,
        page: &PageOf,
    ) -> Result<(), Refused> {
        may_see_presence(&self.context.config, identity, room)?;
        let page = self
            .context
            .presence
            .page(room, page)
            .await
            .map_err(presence_refusal)?;
        self.replies.now(frame(|out| write(out, rid, room, &page)));
        Ok(())
    }
}

/// The reply `presence`.
fn write(out: &mut Vec<u8>, rid: u64, room: &RoomId, page: &Page) {
    let mut writer = Writer::reply(out, "presence", rid);
    writer
        .string("room", room.as_str())
        .number("count", page.count as u64)
        .list("users", &page.users, |item, (user, shown)| {
            item.string("user", user);
            if let Some(info) = &shown.seen.info {
                item.raw("info", info.get().as_bytes());
            }
            item.number("since", shown.seen.since);
            if shown.unreachable {
                item.string("state", UNREACHABLE);
            }
        });
    if let Some(next) = &page.next {
        writer.string("next", next);
    }
    writer.end();
}
