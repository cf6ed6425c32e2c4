//! One message for one worker: the request, the annotation, the alert.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use hyper::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, value::RawValue};
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::{
    Parts, Worker,
    files::{AskedUpload, Open, left_open, names_uploads},
    seen::{self, Seen},
};
use crate::{
    bus::{Outgoing, PublishError, Record, Stored, message_key},
    config::WorkerKind,
    history::{At, PageAnchor, PageRequest, shown},
    model::{Epoch, Kind, MessageId, Reference, RoomId, json_flaw},
    outbound::{Fault, Outcome},
    people::{Alert, Known},
    protocol::{ErrorCode, Mentions, Publication, RecordReply, Refused},
    session::records,
    telemetry::metrics::{Counter, Gauge, Held, Histogram, WorkerLabel, count, record},
};

/// Messages of a page that is read for one message: it may be anywhere in it.
const PAGE: usize = 3;

/// What became of a job.
#[derive(Debug)]
pub(super) enum Done {
    /// The message has the annotation.
    Annotated,
    /// The worker has nothing to say.
    Empty,
    /// The worker refuses the message, or its answer can't be used.
    Rejected(String),
    /// The message is not for this worker, or is gone.
    Skipped,
}

/// Why a job is not done yet.
#[derive(Debug)]
pub(super) enum Failed {
    /// The request failed. `after`: when the worker wants to be asked again.
    Receiver {
        fault: Fault,
        after: Option<Duration>,
    },
    /// Something of natter can't be reached.
    Natter(String),
}

/// How far an attempt goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attempt {
    /// The job may have been begun before.
    pub(super) again: bool,
    /// There will be another attempt, so it may wait for files that are not there yet.
    pub(super) may_wait: bool,
}

/// The message that a job is about.
pub(super) struct About {
    reference: Reference,
    /// `<user>/<id>`.
    text: String,
    /// Its key in history.
    key: String,
    is_edit: bool,
}

/// The body of a request.
#[derive(Serialize)]
struct Asked<'a> {
    worker: &'a str,
    room: &'a RoomId,
    /// As history shows it.
    message: &'a RawValue,
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<RecordReply>,
    /// The uploads that the message names, for a worker of `attachments`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    uploads: Vec<AskedUpload>,
}

/// The fields of a message as history shows it that decide whether it is the right one.
#[derive(Deserialize)]
struct Head {
    id: String,
    from: String,
    #[serde(default)]
    edited_at: Option<u64>,
    #[serde(default)]
    deleted_at: Option<u64>,
}

fn later(error: &impl ToString) -> Failed {
    Failed::Natter(error.to_string())
}

/// An id that is the same for each attempt: of a user's message that is made for another one.
fn derived_id(prefix: &str, user: &str, key: &str) -> String {
    let digest = Sha256::digest(format!("{user}\n{key}"));
    let hex: String = digest
        .iter()
        .take(16)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("{prefix}{hex}")
}

impl About {
    /// What a worker with these kinds is asked about a record; `None`: nothing.
    fn of(room: &RoomId, record: &Record, kinds: &[WorkerKind]) -> Option<Self> {
        let kind = record.kind.and_then(Kind::parse).unwrap_or_default();
        let (user, id) = match kind {
            Kind::Message if kinds.contains(&WorkerKind::Message) => {
                (record.from.clone(), MessageId::parse(&record.id).ok()?)
            }
            Kind::Edit if kinds.contains(&WorkerKind::Edit) => {
                let target = Reference::parse(record.target.as_deref()?).ok()?;
                if !target.is_by(&record.from) && !record.moderated {
                    return None;
                }
                (
                    target.user.unwrap_or_else(|| record.from.clone()),
                    target.id,
                )
            }
            _ => return None,
        };
        Some(Self {
            text: format!("{user}/{id}"),
            key: message_key(room.as_str(), &user, id.as_str()),
            reference: Reference {
                user: Some(user),
                id,
            },
            is_edit: kind == Kind::Edit,
        })
    }
}

impl Worker {
    /// Counts, if the process has named its workers.
    pub(super) fn count(&self, counter: fn(WorkerLabel) -> Counter) {
        if let Some(label) = self.label {
            count(counter(label), 1);
        }
    }

    /// Whether files wait for what this worker says of them.
    pub(super) fn holds_back(&self, parts: &Parts) -> bool {
        parts.config.uploads.scan() == Some(self.name())
    }

    /// Does a job, as far as it is not done yet.
    ///
    /// # Errors
    /// [`Failed`]: it is to be repeated. A repeat is safe wherever this attempt has ended.
    pub(super) async fn work(
        &self,
        parts: &Parts,
        (stored, about): (&Stored, About),
        epoch: Epoch,
        attempt: Attempt,
    ) -> Result<Done, Failed> {
        let Stored { room, record } = stored;
        let again = attempt.again;
        let user = &*self.identity.user;
        let key = message_key(room.as_str(), &record.from, &record.id);
        let ids = (
            derived_id("w~", user, &key),
            derived_id("alert~", user, &key),
        );
        let look = async || {
            let seen = seen::look(parts, stored, epoch, user, (&ids.0, &ids.1));
            seen.await.map_err(|error| later(&error))
        };
        let looked = Instant::now();
        let mut seen = match again {
            true => look().await?,
            false => Seen::default(),
        };
        let body = match seen.annotation.take() {
            Some(body) => body,
            None => {
                let message = self.message(parts, stored, &about, epoch, again).await?;
                let Some(message) = message else {
                    return Ok(Done::Skipped);
                };
                let asked = self.ask(parts, stored, &message, &ids.0, attempt.may_wait);
                let body = match asked.await? {
                    Ok(body) => body,
                    Err(done) => return Ok(done),
                };
                // This process may have stood still, while another one did the same job.
                if looked.elapsed() > parts.config.streams.duplicate_window / 2 {
                    seen = look().await?;
                }
                match seen.annotation.take() {
                    Some(body) => body,
                    None => {
                        let annotated = self.annotate(parts, room, &about, &ids.0, &body);
                        if let Some(done) = annotated.await? {
                            return Ok(done);
                        }
                        body
                    }
                }
            }
        };
        if !seen.alert {
            self.alert(parts, room, about, &ids.1, &body).await?;
        }
        Ok(Done::Annotated)
    }

    /// The message as history shows it; `None` if it is gone.
    async fn message(
        &self,
        parts: &Parts,
        stored: &Stored,
        about: &About,
        epoch: Epoch,
        again: bool,
    ) -> Result<Option<Box<RawValue>>, Failed> {
        // A new message is what it is. Of one that is edited, or that was published some time ago, history has the rest.
        if !about.is_edit && !again {
            let shown = shown(stored.clone(), parts.streams.origin(), epoch);
            return shown.map_err(|error| later(&error));
        }
        let request = PageRequest {
            room: stored.room.clone(),
            anchor: PageAnchor::Around(At::Key(about.key.clone())),
            limit: PAGE,
            thread: None,
        };
        let messages = match parts.history.page(&request).await {
            Ok(page) => page.messages,
            Err(refused) if refused.code == ErrorCode::BadId => Vec::new(),
            Err(refused) => return Err(later(&refused)),
        };
        for message in messages {
            let head: Head = serde_json::from_str(message.get()).map_err(|error| later(&error))?;
            let is_it = head.id == about.reference.id.as_str()
                && Some(&head.from) == about.reference.user.as_ref();
            if !is_it {
                continue;
            }
            if head.deleted_at.is_some() {
                return Ok(None);
            }
            let edited = stored.record.shown_ts();
            if about.is_edit && head.edited_at.is_none_or(|at| at < edited) {
                return Err(later(&"history does not have the edit yet"));
            }
            return Ok(Some(message));
        }
        // It was erased, or history can't be read as far as there: a replica lags, or MongoDB has it not yet.
        let erased = parts.remembered.has_stored(stored).await;
        if erased.map_err(|error| later(&error))? {
            return Ok(None);
        }
        if about.is_edit {
            return Err(later(&"history does not have the message now"));
        }
        shown(stored.clone(), parts.streams.origin(), epoch).map_err(|error| later(&error))
    }

    /// What it has to do with a message; `None`: nothing.
    pub(super) fn about(&self, Stored { room, record }: &Stored) -> Option<About> {
        let about = About::of(room, record, &self.config.kinds);
        about.filter(|_| {
            self.scope.contains(room) && (!self.config.attachments || names_uploads(&record.body))
        })
    }

    /// Asks the worker. Returns the body of the annotation, or what there is in place of one.
    async fn ask(
        &self,
        parts: &Parts,
        Stored { room, record: of }: &Stored,
        message: &RawValue,
        id: &str,
        may_wait: bool,
    ) -> Result<Result<Bytes, Done>, Failed> {
        let known = parts.people.of(room).await.map_err(|error| later(&error))?;
        let holds_back = self.holds_back(parts);
        let rejected = |reason: &str| Ok(Err(Done::Rejected(reason.to_owned())));
        let mut asked_files = Vec::new();
        let outcome = {
            // First, so that URLs do not age meanwhile. Never closed.
            let _turn = self.turns.acquire().await;
            // Only who asks for them: a URL needs no token, and does not wait until the file is checked.
            let (named, uploads) = match &parts.files {
                Some(files) if self.config.attachments => files.of(room, message),
                Some(_) | None => (0, Vec::new()),
            };
            if self.config.attachments && uploads.is_empty() {
                // What was imported may name uploads of another deployment. All else was checked by an edge.
                if holds_back && named > 0 && of.original_ts.is_none() {
                    return rejected(
                        "it names uploads, but none of its room and author: is uploads.secret the one of the edges?",
                    );
                }
                // An edit has taken them out meanwhile, or whoever published it named what is no upload of theirs.
                return Ok(Err(Done::Skipped));
            }
            if holds_back {
                asked_files = uploads.iter().map(|one| one.id().to_owned()).collect();
            }
            let asked = Asked {
                worker: self.name(),
                room,
                message,
                record: known_record(&known, room),
                uploads,
            };
            let body = serde_json::to_vec(&asked).map_err(|error| later(&error))?;
            let _open = self.label.map(|label| Held::new(Gauge::WorkerOpen(label)));
            let started = Instant::now();
            let outcome = self.receiver.post(id, Bytes::from(body)).await;
            record(Histogram::WorkerRequestDuration, started.elapsed());
            outcome
        };
        let answer = match outcome {
            Outcome::Done {
                status: StatusCode::NO_CONTENT,
                ..
            } if holds_back => return rejected("the answer is 204, and its files are held back"),
            Outcome::Done {
                status: StatusCode::NO_CONTENT,
                ..
            } => return Ok(Err(Done::Empty)),
            Outcome::Done { body, .. } => body,
            Outcome::GiveUp(fault) => return rejected(&fault.to_string()),
            Outcome::Retry { fault, after } => return Err(Failed::Receiver { fault, after }),
        };
        let body = match self.annotation(parts, &answer) {
            Ok(body) => body,
            Err(flaw) => return Ok(Err(Done::Rejected(flaw))),
        };
        match left_open(&answer, &asked_files) {
            Some(Open::Undecided(upload)) => rejected(&format!(
                "the answer has neither \"clean\" nor \"infected\" for the upload {upload}"
            )),
            Some(Open::Missing) if may_wait => Err(later(&"a file is not there yet")),
            Some(Open::Missing) | None => Ok(Ok(body)),
        }
    }

    /// The body of the annotation for an answer; what is wrong with the answer, if it can't be one.
    fn annotation(&self, parts: &Parts, answer: &[u8]) -> Result<Bytes, String> {
        let bad = |error| format!("the answer is not a JSON object: {error}");
        let _is_object: Map<String, Value> = serde_json::from_slice(answer).map_err(bad)?;
        // As it is: its numbers may be longer than those of this process.
        let answer_text: &RawValue = serde_json::from_slice(answer).map_err(bad)?;
        if let Some(flaw) = json_flaw(answer, parts.config.limits.json_depth - 1) {
            return Err(format!("the answer {flaw}"));
        }
        let body = BTreeMap::from([(&self.config.annotation, answer_text)]);
        serde_json::to_vec(&body).map(Bytes::from).map_err(bad)
    }

    /// Publishes the annotation. Returns something if it was not taken, and a repeat makes no sense.
    async fn annotate(
        &self,
        parts: &Parts,
        room: &RoomId,
        about: &About,
        id: &str,
        body: &Bytes,
    ) -> Result<Option<Done>, Failed> {
        let body = serde_json::from_slice::<Box<RawValue>>(body).map_err(|error| later(&error))?;
        let publication = Publication {
            room: room.clone(),
            id: None,
            kind: Kind::Annotation,
            body,
            target: Some((about.text.clone(), about.reference.clone())),
            reply_to: None,
            mentions: Mentions::default(),
        };
        let outgoing = Outgoing {
            publication: &publication,
            user: &self.identity.user,
            id,
            after: None,
            original_ts: None,
        };
        // Its time is of no interest.
        match parts.publisher.durable(&outgoing, |_seq| Some(0)).await {
            Ok(_acked) => Ok(None),
            Err(PublishError::Erased) => Ok(Some(Done::Skipped)),
            Err(error @ (PublishError::TooLarge(_) | PublishError::Refused(_))) => {
                Ok(Some(Done::Rejected(error.to_string())))
            }
            Err(
                error @ (PublishError::Unavailable
                | PublishError::UnknownOutcome(_)
                | PublishError::Lost
                | PublishError::InProcess
                | PublishError::StreamFull(_)
                | PublishError::Doubtful(_)),
            ) => Err(later(&error)),
        }
    }

    /// Marks the room, if the annotation fulfils the condition.
    async fn alert(
        &self,
        parts: &Parts,
        room: &RoomId,
        about: About,
        id: &str,
        body: &[u8],
    ) -> Result<(), Failed> {
        let Some(condition) = &self.config.alert else {
            return Ok(());
        };
        let body: Value = serde_json::from_slice(body).map_err(|error| later(&error))?;
        if condition.holds(&body) != Some(true) {
            return Ok(());
        }
        let alert = Alert {
            worker: self.name().to_owned(),
            message: about.text,
        };
        let Parts {
            people, publisher, ..
        } = parts;
        match records::alert(people, publisher, &self.identity, room, &alert, id).await {
            Ok(()) => {
                self.count(Counter::WorkerAlerts);
                Ok(())
            }
            Err(Refused {
                code: ErrorCode::Unavailable | ErrorCode::UnknownOutcome | ErrorCode::StreamFull,
                message,
                ..
            }) => Err(Failed::Natter(message)),
            // The room has ended, or nobody has made it where only members are let in.
            Err(refused) => {
                tracing::warn!(room.id = %room, error = %refused, "a room can't be marked with an alert");
                Ok(())
            }
        }
    }
}

/// The record of a room, with those who are banned.
fn known_record(known: &Known, room: &RoomId) -> Option<RecordReply> {
    known.record().map(|record| record.reply(room, true))
}
