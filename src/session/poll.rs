//! A poll: joins a room, takes the first messages, leaves.

use std::{rc::Rc, sync::Arc, time::Duration};

use tokio::time::timeout;

use super::{Context, join::lone_member};
use crate::{
    auth::{AuthError, Identity, Right},
    codec::Codec,
    model::{Cursor, RoomId},
    protocol::{ErrorCode, PollReply, Refused, Wants},
    room::{JoinAt, NewMember},
    runtime::unix_s,
    wire::{Collected, Outlet},
};

/// A request for the messages after a cursor. What the user may do was checked.
#[derive(Debug)]
pub struct Poll {
    /// Who asks.
    pub identity: Arc<Identity>,
    /// A room with a log.
    pub room: RoomId,
    /// Where the client stands; `None`: it wants to know where the room stands.
    pub since: Option<Cursor>,
    /// How long to wait for a message, if there is none.
    pub wait: Duration,
    /// The size of an answer, in bytes. A larger message is answered alone.
    pub most: usize,
}

impl Context {
    /// Answers a poll as soon as there are messages, and without messages after its time.
    ///
    /// # Errors
    /// If the room can't be joined now, or the token was revoked meanwhile.
    pub async fn poll(&self, poll: Poll) -> Result<PollReply, Refused> {
        let Poll {
            identity,
            room,
            since,
            wait,
            most,
        } = poll;
        let waits = since.is_some();
        let deadline = self.verifier.deadline(&identity);
        let wait = wait.min(Duration::from_secs(deadline.saturating_sub(unix_s())));
        let collected = Collected::new(most);
        let who = NewMember {
            session: lone_member(),
            user: Arc::clone(&identity.user),
            outlet: Outlet::Poll(Rc::clone(&collected)),
            codec: Codec::Poll,
            wants: Wants::default(),
            subscription: None,
        };
        let mut stands = None;
        let membership = self
            .rooms
            .join(&room, true, since.map(JoinAt::After), None, who, |joined| {
                stands = Some(joined);
                None
            })
            .await
            .map_err(|error| Refused::new(ErrorCode::Unavailable, error.to_string()))?;
        let joined = stands.ok_or_else(|| {
            Refused::new(ErrorCode::Internal, "the room was joined without a reply")
        })?;
        let missed = usize::try_from(joined.replay).unwrap_or(usize::MAX);
        if waits && joined.reset.is_none() {
            // The end of the time is not an error.
            let _elapsed = timeout(wait, collected.reached(missed.max(1))).await;
        }
        let now_s = unix_s();
        if self.verifier.is_revoked(&identity, now_s) {
            let text = AuthError::Revoked.to_string();
            return Err(Refused::new(ErrorCode::Unauthorized, text));
        }
        if now_s >= deadline {
            let text = "the token expired while the poll waited";
            return Err(Refused::new(ErrorCode::Unauthorized, text));
        }
        self.people.check(&identity, Right::Read, &room).await?;
        let messages = collected.take();
        let cursor = match messages.last() {
            Some((cursor, _)) => Some(String::from_utf8_lossy(cursor).into_owned()),
            // Beyond what is not shown to anybody.
            None if joined.reset.is_none() => membership
                .reached()
                .or(joined.cursor)
                .map(|at| at.to_string()),
            None => joined.cursor.map(|cursor| cursor.to_string()),
        };
        drop(membership);
        let messages = messages.into_iter().map(|(_, message)| message);
        PollReply::new(
            room,
            messages,
            cursor,
            joined.reset.map(|reset| reset.as_str()),
        )
    }
}
