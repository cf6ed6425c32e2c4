//! What a page asks of MongoDB.

use std::collections::{HashMap, HashSet};

use tokio::time::{Instant, timeout_at};

use super::{
    entry::key_of_base,
    merge::{Ask, Side, Tail, Told, add_replies},
};
use crate::{
    bus::ReadError,
    model::{Place, RoomId},
    protocol::{ErrorCode, Refused},
    store::{End, Folded, Replies, Store, StoreError},
};

/// Why one way to make a page failed.
pub(super) enum Failed {
    Refused(Refused),
    /// MongoDB did not answer.
    Store(String),
    /// The stream did not answer.
    Stream(ReadError),
}

impl From<ReadError> for Failed {
    fn from(error: ReadError) -> Self {
        Self::Stream(error)
    }
}

/// MongoDB, with the deadline of one answer.
#[derive(Clone, Copy)]
pub(super) struct Asked<'s> {
    pub(super) store: &'s Store,
    pub(super) deadline: Instant,
}

impl Asked<'_> {
    /// Waits for an answer until the deadline. The future is boxed, since those of the driver are large.
    pub(super) fn within<'f, T: 'f>(
        self,
        answer: impl Future<Output = Result<T, StoreError>> + Send + 'f,
    ) -> impl Future<Output = Result<T, Failed>> + Send + 'f {
        let answer = timeout_at(self.deadline, Box::pin(answer));
        async move {
            match answer.await {
                Ok(Ok(answer)) => Ok(answer),
                Ok(Err(StoreError::Query(error))) => Err(Failed::Refused(Refused::new(
                    ErrorCode::BadRequest,
                    format!("q: {error}"),
                ))),
                Ok(Err(error)) => Err(Failed::Store(error.to_string())),
                Err(_elapsed) => Err(Failed::Store("MongoDB does not answer".to_owned())),
            }
        }
    }

    /// The document of a message, or of what is known about one.
    pub(super) async fn document(self, key: &str) -> Result<Folded, Failed> {
        let keys = [key.to_owned()];
        let found = self.within(self.store.get(&keys)).await?;
        Ok(found
            .into_iter()
            .next()
            .map(|document| document.folded)
            .unwrap_or_default())
    }
}

/// Reads what a side needs to know. What is not after `kept_after` is not shown any more.
pub(super) async fn read_side(
    side: &mut Side<'_>,
    room: &RoomId,
    asked: Option<Asked<'_>>,
    kept_after: Option<&Place>,
) -> Result<(), Failed> {
    while let Some(mut ask) = side.ask() {
        if let Some(span) = &mut ask.page {
            span.after = span.after.take().max(kept_after.cloned());
        }
        let told = match asked {
            Some(asked) => documents(asked, room, side.end(), &ask).await?,
            None => Told {
                all: true,
                looked: ask.keys.len(),
                ..Told::default()
            },
        };
        side.tell(&ask, told);
    }
    Ok(())
}

/// The answers to these messages, by key.
pub(super) async fn replies(
    asked: Option<Asked<'_>>,
    room: &RoomId,
    tail: &Tail,
    messages: impl Iterator<Item = &Folded>,
) -> Result<HashMap<String, Replies>, Failed> {
    let bases = messages.filter_map(|folded| folded.base.as_ref());
    let keys: Vec<String> = bases.map(|base| key_of_base(room, base)).collect();
    let to: HashSet<&str> = keys.iter().map(String::as_str).collect();
    let (found, outlines) = match asked {
        Some(asked) => {
            let touched = tail.touched();
            let found = asked.within(asked.store.replies(room, &keys, &touched));
            let outlines = asked.within(asked.store.outlines(&touched));
            tokio::try_join!(found, outlines)?
        }
        None => (HashMap::new(), Vec::new()),
    };
    Ok(add_replies(tail, &to, found, outlines))
}

async fn documents(asked: Asked<'_>, room: &RoomId, end: End, ask: &Ask) -> Result<Told, Failed> {
    let page = async {
        match &ask.page {
            Some(span) => {
                let page = asked.store.page(room, span, end, ask.limit);
                asked.within(page).await
            }
            None => Ok((Vec::new(), true)),
        }
    };
    let of_keys = async {
        if ask.keys.is_empty() {
            return Ok((Vec::new(), 0));
        }
        asked.within(asked.store.get_first(&ask.keys)).await
    };
    let ((page, all), (of_keys, looked)) = tokio::try_join!(page, of_keys)?;
    Ok(Told {
        page,
        all,
        of_keys,
        looked,
    })
}
