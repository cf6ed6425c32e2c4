//! What every command checks first: that the room's namespace exists, and that the user may do this there.

use std::sync::Arc;

use crate::{
    auth::{Identity, Right},
    config::{Config, Namespace},
    model::RoomId,
    people::{Known, People},
    protocol::{ErrorCode, Refused},
};

/// The namespace of a room.
pub(crate) fn namespace<'c>(config: &'c Config, room: &RoomId) -> Result<&'c Namespace, Refused> {
    config.namespaces.get(room.namespace()).ok_or_else(|| {
        let text = format!("there is no namespace {:?}", room.namespace());
        Refused::new(ErrorCode::UnknownNamespace, text)
    })
}

/// Checks that a token grants a right on a room.
pub(crate) fn granted(identity: &Identity, right: Right, room: &RoomId) -> Result<(), Refused> {
    if identity.may(right, room) {
        return Ok(());
    }
    let text = format!("the token does not grant {} on {room}", right.as_str());
    Err(Refused::new(ErrorCode::Forbidden, text))
}

/// Checks that a token grants a right on a room, and that the record of the room does not say otherwise. Returns what is
/// known of the record.
pub(crate) async fn admitted(
    people: &People,
    identity: &Identity,
    right: Right,
    room: &RoomId,
) -> Result<Arc<Known>, Refused> {
    granted(identity, right, room)?;
    people.check(identity, right, room).await
}
