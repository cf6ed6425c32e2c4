//! What was said before: what `history` does.

use std::{rc::Rc, sync::Arc};

use bytes::Bytes;
use tokio::task::spawn_local;
use tracing::Instrument as _;

use super::{
    Session,
    commands::{Refused, error_frame, forbidden, namespace},
    frame,
    replies::MAX_WAITING_BYTES,
};
use crate::{
    auth::{Identity, Right},
    config::Config,
    history::{PageAnswer, PageRequest},
    model::RoomId,
    protocol::{
        ErrorCode,
        native::{HistoryOf, Writer},
    },
};

/// What a page weighs among what a session waits for: half of it, so that two are asked for at once at most.
const PAGE_WEIGHT: usize = MAX_WAITING_BYTES / 2;

/// Checks that a user may read what was said in a room.
///
/// # Errors
/// The refusal.
pub(crate) fn check_history(
    config: &Config,
    identity: &Identity,
    room: &RoomId,
) -> Result<(), Refused> {
    let namespace = namespace(config, room)?;
    if !identity.may(Right::History, room) {
        return Err(forbidden(Right::History, room));
    }
    if !namespace.durable || !namespace.history {
        let text = format!("no history is kept in the namespace {:?}", room.namespace());
        return Err((ErrorCode::BadRequest, text));
    }
    Ok(())
}

impl Session {
    /// Reads in the background: the session goes on with its next command. The reply comes in its turn, so what comes after
    /// it waits for it; what is *done* does not.
    pub(super) async fn history(
        self: &Rc<Self>,
        rid: u64,
        identity: &Identity,
        room: RoomId,
        page: HistoryOf,
    ) -> Result<(), Refused> {
        check_history(&self.context.config, identity, &room)?;
        let request = PageRequest::new(room, &identity.user, page)?;
        self.replies.room_for_one().await;
        let ticket = self.replies.promise_in_order(PAGE_WEIGHT);
        let session = Rc::clone(self);
        let read = async move {
            let history = Arc::clone(&session.context.history);
            let reply = match history.page(&request).await {
                Ok(answer) => page_frame(rid, &request.room, &answer),
                Err((code, message)) => error_frame(rid, code, message),
            };
            session.replies.keep(ticket, reply);
        };
        spawn_local(read.in_current_span());
        Ok(())
    }
}

fn page_frame(rid: u64, room: &RoomId, answer: &PageAnswer) -> Bytes {
    frame(|out| {
        let mut messages = vec![b'['];
        for (i, message) in answer.messages.iter().enumerate() {
            if i > 0 {
                messages.push(b',');
            }
            messages.extend_from_slice(message.get().as_bytes());
        }
        messages.push(b']');
        let mut writer = Writer::reply(out, "history", rid);
        writer
            .string("room", room.as_str())
            .raw("messages", &messages);
        if let Some(prev) = &answer.prev {
            writer.string("prev", prev);
        }
        if let Some(next) = &answer.next {
            writer.string("next", next);
        }
        if answer.partial {
            writer.boolean("partial", true);
        }
        writer.end();
    })
}
