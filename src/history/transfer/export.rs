//! The export of rooms, one after the other.
//!
//! Of a namespace with history, each message is one line, in its current state, as pages show it. Of another namespace,
//! nobody knows the current state, and each entry of the streams is one line. Memory is bounded by one page.

use std::{
    borrow::Cow,
    collections::{BTreeSet, VecDeque},
};

use serde::Deserialize;
use tokio::time::sleep;

use super::{ATTEMPTS, Deployment, PAUSE, PAUSE_MAX, TransferError, line, retried};
use crate::{
    bus::{Record, rooms_of},
    history::{At, PageAnchor, PageRequest, Pages},
    model::{Kind, RoomId, RoomScope, partition_of},
    protocol::ErrorCode,
    subject::{FROM_NATTER, Subjects, rooms_stream},
};

/// Messages of one page.
const PAGE: usize = 200;

/// Reads rooms for an export.
#[derive(Debug)]
pub struct Export<'d> {
    deployment: &'d Deployment,
    pages: Pages,
    subjects: Subjects,
}

impl<'d> Export<'d> {
    /// An export of what `deployment` has.
    #[must_use]
    pub fn new(deployment: &'d Deployment) -> Self {
        let Deployment {
            config,
            reader,
            origins,
            store,
            ..
        } = deployment;
        let pages = Pages::new(reader.clone(), origins.clone(), store.clone(), config);
        Self {
            deployment,
            pages: pages.for_export(),
            subjects: Subjects::new(&config.nats.prefix),
        }
    }

    /// The rooms of `scope` that have messages and come after `after` in the order of their names.
    ///
    /// # Errors
    /// [`TransferError`].
    pub async fn rooms(
        &self,
        scope: &RoomScope,
        after: Option<&RoomId>,
    ) -> Result<BTreeSet<RoomId>, TransferError> {
        let Deployment {
            config,
            connection,
            origins,
            store,
            ..
        } = self.deployment;
        let mut rooms: BTreeSet<RoomId> = scope.rooms.iter().cloned().collect();
        if scope.all || !scope.namespaces.is_empty() {
            for (name, namespace) in &config.namespaces {
                let is_meant = scope.all || scope.namespaces.contains(name);
                if !is_meant || !namespace.durable {
                    continue;
                }
                for streams in origins.all() {
                    for part in 0..streams.partitions() {
                        let (origin, wait) = (streams.origin(), config.nats.read_timeout);
                        let filter = self.subjects.stored_namespace(origin, part, name);
                        let stream = rooms_stream(origin, part);
                        rooms.extend(
                            rooms_of(
                                connection,
                                &self.subjects,
                                &stream,
                                &filter,
                                wait,
                                usize::MAX,
                            )
                            .await?,
                        );
                    }
                }
                if let Some(store) = store.as_ref().filter(|_| namespace.history) {
                    rooms.extend(retried(|| store.rooms(name)).await?);
                }
            }
        }
        Ok(match after {
            Some(after) => rooms.into_iter().filter(|room| room > after).collect(),
            None => rooms,
        })
    }

    /// Gives the lines of a room, the oldest first, to `print`, until it returns `false`.
    ///
    /// # Errors
    /// [`TransferError`], or the error of `print`.
    pub async fn room<E: From<TransferError>>(
        &self,
        room: &RoomId,
        print: &mut impl FnMut(&str) -> Result<bool, E>,
    ) -> Result<bool, E> {
        if self.deployment.has_history(room.namespace()) {
            self.messages(room, print).await
        } else {
            self.entries(room, print).await
        }
    }

    /// Gives the messages of a room in their current state.
    async fn messages<E: From<TransferError>>(
        &self,
        room: &RoomId,
        print: &mut impl FnMut(&str) -> Result<bool, E>,
    ) -> Result<bool, E> {
        let mut anchor = PageAnchor::Oldest;
        loop {
            let request = PageRequest {
                thread: None,
                room: room.clone(),
                anchor,
                limit: PAGE,
            };
            let mut pause = PAUSE;
            let mut attempt = 0;
            let page = loop {
                attempt += 1;
                let error = match self.pages.page(&request).await {
                    Ok(page) if !page.partial => break page,
                    Ok(_partial) => TransferError::Partial(room.to_string()),
                    Err(refusal) => {
                        let may_pass = refusal.code == ErrorCode::Unavailable;
                        let room = room.to_string();
                        let error = TransferError::Page { room, refusal };
                        if !may_pass {
                            return Err(error.into());
                        }
                        error
                    }
                };
                if attempt == ATTEMPTS {
                    return Err(error.into());
                }
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            };
            for message in &page.messages {
                let Sender { from } = serde_json::from_str(message.get())
                    .map_err(|error| TransferError::from(std::io::Error::from(error)))?;
                // What natter itself says of a room, it says of this deployment.
                if from == FROM_NATTER {
                    continue;
                }
                if !print(&line::on_one_line(message.get()))? {
                    return Ok(false);
                }
            }
            match page.next {
                Some(next) => anchor = PageAnchor::After(At::Cursor(next)),
                None => return Ok(true),
            }
        }
    }

    /// Gives the entries of a room's log in the streams. Those of several origins are merged by the time of storage.
    async fn entries<E: From<TransferError>>(
        &self,
        room: &RoomId,
        print: &mut impl FnMut(&str) -> Result<bool, E>,
    ) -> Result<bool, E> {
        let mut logs: Vec<Log<'_>> = Vec::new();
        for streams in self.deployment.origins.all() {
            let part = partition_of(room, streams.partitions());
            let origin = streams.origin();
            logs.push(Log {
                deployment: self.deployment,
                stream: rooms_stream(origin, part),
                filter: self.subjects.stored_all(origin, part, room),
                epoch: streams.known(part).epoch,
                next: Some(1),
                records: VecDeque::new(),
            });
        }
        loop {
            for log in &mut logs {
                log.fill().await?;
            }
            let first = logs
                .iter_mut()
                .filter(|log| !log.records.is_empty())
                .min_by_key(|log| log.records.front().map(|record| record.ts));
            let Some(record) = first.and_then(|log| log.records.pop_front()) else {
                return Ok(true);
            };
            // What natter itself says of a room, it says of this deployment.
            if record.from == FROM_NATTER || record.kind == Some(Kind::Erase.as_str()) {
                continue;
            }
            let text = line::of_record(room, &record).map_err(std::io::Error::from);
            if !print(&text.map_err(TransferError::from)?)? {
                return Ok(false);
            }
        }
    }
}

/// The sender of a message in a page.
#[derive(Deserialize)]
struct Sender<'a> {
    #[serde(borrow)]
    from: Cow<'a, str>,
}

/// The log of a room in one stream.
struct Log<'d> {
    deployment: &'d Deployment,
    stream: String,
    filter: String,
    epoch: crate::model::Epoch,
    /// The sequence to read from; `None` at the end.
    next: Option<u64>,
    records: VecDeque<Record>,
}

impl Log<'_> {
    /// Reads a page, if there is nothing in hand.
    async fn fill(&mut self) -> Result<(), TransferError> {
        while self.records.is_empty()
            && let Some(from) = self.next
        {
            let reader = &self.deployment.reader;
            let page = reader
                .page(&self.stream, self.epoch, &self.filter, from)
                .await?;
            let last = page.records.last().map(|record| record.seq + 1);
            self.next = last.filter(|_| page.pending > 0);
            self.records.extend(page.records);
        }
        Ok(())
    }
}
