//! Writes batches.
//!
//! New messages take one round trip; changes of existing messages, and repeated messages, take one more: first an
//! unordered `insert`, then an unordered `update` for documents that already exist and for changes. A third one is
//! needed only if two workers created the same document at the same time.
//!
//! The driver's `insert_many` is not used: one document that is too large makes all of it fail. And the driver has no
//! way to send many updates at once to MongoDB 5 to 7.

use std::collections::{BTreeSet, HashMap};

use indexmap::IndexMap;
use mongodb::bson::{
    Document as Fields, RawArrayBuf, RawDocumentBuf,
    raw::{CStr, cstr},
    rawdoc,
};

use super::{
    Entry, Folded, MESSAGES, RefusedEntry, Removal, Store, StoreError, What, document, query,
    schema::DUPLICATE_KEY, update,
};
use crate::{
    model::{Place, RoomId},
    telemetry::metrics::{Counter, count},
};

/// Largest document or statement: MongoDB's limit, minus room for the command around it.
const MAX_DOCUMENT: usize = (16 << 20) - (16 << 10);

/// Bytes of documents or statements in one command, unless a single one is larger.
pub(super) const MAX_COMMAND: usize = 12 << 20;

/// Places read at once: few enough for one answer.
const PLACES: usize = 1000;

/// Attempts at updates that met another worker's insert, or a document without room. After the first attempt the
/// document exists. From attempt `FITTING` on, reactions and annotations that are new to a document that could not be
/// rewritten are left out.
const UPSERTS: usize = 6;
const FITTING: usize = 4;

/// Codes of write errors that are caused by the state of the server and not by the document: they pass, or the server
/// gets repaired. Any other error of a single document means that it will never be accepted.
const PASSING: &[i32] = &[
    6,     // HostUnreachable
    7,     // HostNotFound
    11,    // UserNotFound
    13,    // Unauthorized
    18,    // AuthenticationFailed
    24,    // LockTimeout
    39,    // FileStreamFailed
    43,    // CursorNotFound
    46,    // LockBusy
    50,    // MaxTimeMSExpired
    63,    // StaleShardVersion
    64,    // WriteConcernFailed
    70,    // ShardNotFound
    79,    // UnknownReplWriteConcern
    82,    // NoProgressMade
    83,    // RemoteResultsUnavailable
    89,    // NetworkTimeout
    91,    // ShutdownInProgress
    100,   // UnsatisfiableWriteConcern
    112,   // WriteConflict
    117,   // ConflictingOperationInProgress
    133,   // FailedToSatisfyReadPreference
    134,   // ReadConcernMajorityNotAvailableYet
    146,   // ExceededMemoryLimit
    150,   // StaleEpoch
    175,   // QueryPlanKilled
    189,   // PrimarySteppedDown
    202,   // NetworkInterfaceExceededTimeLimit
    211,   // KeyNotFound, of cluster time
    237,   // CursorKilled
    246,   // SnapshotUnavailable
    249,   // StaleChunkHistory
    262,   // ExceededTimeLimit
    279,   // ClientDisconnect
    314,   // ObjectIsBusy
    317,   // ConnectionPoolExpired
    365,   // TemporarilyUnavailable
    388,   // TransactionTooLargeForCache
    391,   // ReauthenticationRequired
    9001,  // SocketException
    10058, // LegacyNotPrimary
    10107, // NotWritablePrimary
    11600, // InterruptedAtShutdown
    11601, // Interrupted
    11602, // InterruptedDueToReplStateChange
    13388, // StaleConfig
    13435, // NotPrimaryNoSecondaryOk
    13436, // NotPrimaryOrSecondary
    14031, // OutOfDiskSpace
];

/// The entries about one message.
struct Group<'a> {
    key: &'a str,
    room: &'a RoomId,
    folded: Folded,
    /// The indexes of these entries.
    entries: Vec<usize>,
    /// The places of duplicates of the message.
    copies: Vec<Place>,
}

/// MongoDB's error for one document or statement.
struct WriteError {
    index: usize,
    code: i32,
    message: String,
}

impl Store {
    /// Writes entries, and returns those that MongoDB refuses. All others are acknowledged by the majority. Writes may
    /// be repeated, in any order.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`]: some entries may have been written; all must be retried.
    pub async fn write(&self, entries: &[Entry]) -> Result<Vec<RefusedEntry>, StoreError> {
        let mut groups: IndexMap<&str, Group<'_>> = IndexMap::new();
        for (index, entry) in entries.iter().enumerate() {
            if let Some(key) = key(entry) {
                let group = groups.entry(key).or_insert_with(|| Group::new(key, entry));
                group.add(index, entry);
            }
        }
        let mut refused = Vec::new();
        let mut together = Vec::new();
        for (group, reason) in self.write_groups(groups.into_values().collect()).await? {
            match group.entries.as_slice() {
                [index] => refused.push((*index, reason)),
                several => together.extend_from_slice(several),
            }
        }
        // Of several entries about one message, only some may be at fault: write each by itself.
        if !together.is_empty() {
            let alone = together.into_iter().filter_map(|index| {
                let entry = entries.get(index)?;
                let mut group = Group::new(key(entry)?, entry);
                group.add(index, entry);
                Some(group)
            });
            for (group, reason) in self.write_groups(alone.collect()).await? {
                refused.extend(group.entries.iter().map(|index| (*index, reason.clone())));
            }
        }
        refused.sort_unstable();
        let refused = refused.into_iter();
        Ok(refused
            .map(|(index, reason)| RefusedEntry { index, reason })
            .collect())
    }

    /// Writes groups, and returns those that were refused, with the reason.
    async fn write_groups<'a>(
        &self,
        groups: Vec<Group<'a>>,
    ) -> Result<Vec<(Group<'a>, String)>, StoreError> {
        let mut refused = Vec::new();
        let (mut inserts, mut updates) = (Vec::new(), Vec::new());
        let mut removals: Vec<Removal> = Vec::new();
        for group in groups {
            match &group.folded.base {
                Some(base) => {
                    removals.extend(group.removals(&base.place));
                    let new = document::new(group.key, group.room, &group.folded);
                    inserts.push((group, new));
                }
                None => updates.push(group),
            }
        }
        for (group, error) in self.send(cstr!("insert"), inserts, &mut refused).await? {
            if error.code == DUPLICATE_KEY {
                updates.push(group);
            } else {
                refused.push((group, error.text()));
            }
        }
        // The first places known from the documents take precedence over those of the batch.
        let mut known = self.said_before(&mut updates).await?;
        known.append(&mut removals);
        self.record_removals(&known).await?;
        for attempt in 0..UPSERTS {
            if updates.is_empty() {
                return Ok(refused);
            }
            if attempt == FITTING {
                for group in &mut updates {
                    self.leave_out(group).await?;
                }
            }
            let mut statements = Vec::with_capacity(updates.len());
            for group in updates.drain(..) {
                let (key, room, folded) = (group.key, group.room, &group.folded);
                let statement = update::statement(key, room, folded, attempt < FITTING);
                match RawDocumentBuf::try_from(&statement) {
                    Ok(statement) => statements.push((group, statement)),
                    Err(error) => refused.push((group, error.to_string())),
                }
            }
            for (group, error) in self.send(cstr!("update"), statements, &mut refused).await? {
                // Another worker has just created the document, or there is no room in it.
                if error.code == DUPLICATE_KEY {
                    updates.push(group);
                } else {
                    refused.push((group, error.text()));
                }
            }
            if !updates.is_empty() {
                let keys: Vec<String> = updates.iter().map(|group| group.key.to_owned()).collect();
                self.make_room(&keys).await?;
            }
        }
        if updates.is_empty() {
            return Ok(refused);
        }
        let problem = "documents keep changing while they are updated";
        Err(StoreError::Unavailable(problem.to_owned()))
    }

    /// Leaves out the reactions and annotations of a group that a full document does not have yet (all of them, if the
    /// document can't be read). The rest of the group, and new values for existing reactions and annotations, are still
    /// written.
    async fn leave_out(&self, group: &mut Group<'_>) -> Result<(), StoreError> {
        let query = query::keys(&[group.key.to_owned()]);
        let (found, _) = self.find(query, self.read_timeout).await?;
        let Some(found) = found.first() else {
            return Ok(());
        };
        let known = document::read(found)
            .map_or_else(|_unreadable| Folded::default(), |known| known.folded);
        let folded = &mut group.folded;
        let mut less = folded.reactions.retain_known(&known.reactions);
        less |= folded.annotations.retain_known(&known.annotations);
        if less {
            folded.truncated = true;
            count(Counter::HistoryTruncated, 1);
            tracing::warn!(key = group.key, "reactions or annotations were left out");
        }
        Ok(())
    }

    /// Finds the messages of `groups` that are already stored with another place, and returns the removals of the later
    /// copies. It is called before the documents are changed, so that a stored copy that is displaced by an earlier one
    /// is found too.
    async fn said_before(&self, groups: &mut [Group<'_>]) -> Result<Vec<Removal>, StoreError> {
        let messages = groups.iter().filter(|group| group.folded.base.is_some());
        let keys: Vec<String> = messages.map(|group| group.key.to_owned()).collect();
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let mut known: HashMap<String, Place> = HashMap::new();
        for keys in keys.chunks(PLACES) {
            let (found, _) = self.find(query::said(keys), self.read_timeout).await?;
            for found in found {
                let key = found.get_str("_id").unwrap_or_default();
                match document::read_place(&found) {
                    Ok(place) => drop(known.insert(key.to_owned(), place)),
                    // Pages report this too; the rest of the batch is not affected.
                    Err(error) => tracing::warn!(key, %error, "a document can't be read"),
                }
            }
        }
        let mut removals = Vec::new();
        for group in groups {
            let base = group.folded.base.as_ref().map(|base| base.place.clone());
            let (Some(place), Some(base)) = (known.get(group.key), base) else {
                continue;
            };
            group.said_at(place);
            let first = place.min(&base);
            removals.extend(group.removals(first));
            if base < *place {
                // Other messages were copies of the one that was taken for the first until now.
                self.displace_first(place, &base).await?;
            }
        }
        Ok(removals)
    }

    /// Sends documents or statements, in as many commands as needed, and returns those that were not accepted.
    /// Documents that are too large are refused.
    async fn send<'a>(
        &self,
        command: &'static CStr,
        parts: Vec<(Group<'a>, RawDocumentBuf)>,
        refused: &mut Vec<(Group<'a>, String)>,
    ) -> Result<Vec<(Group<'a>, WriteError)>, StoreError> {
        let mut failed = Vec::new();
        let (mut groups, mut body, mut bytes) = (Vec::new(), RawArrayBuf::new(), 0);
        for (group, part) in parts {
            let size = part.as_bytes().len();
            if size > MAX_DOCUMENT {
                let reason = format!("with {size} bytes it is too large for MongoDB");
                refused.push((group, reason));
                continue;
            }
            if bytes + size > MAX_COMMAND && !groups.is_empty() {
                let (groups, body) = (std::mem::take(&mut groups), std::mem::take(&mut body));
                failed.extend(self.send_one(command, groups, body).await?);
                bytes = 0;
            }
            bytes += size;
            body.push(part);
            groups.push(group);
        }
        if !groups.is_empty() {
            failed.extend(self.send_one(command, groups, body).await?);
        }
        Ok(failed)
    }

    async fn send_one<'a>(
        &self,
        name: &'static CStr,
        groups: Vec<Group<'a>>,
        body: RawArrayBuf,
    ) -> Result<Vec<(Group<'a>, WriteError)>, StoreError> {
        let limit = i64::try_from(self.write_timeout.as_millis()).unwrap_or(i64::MAX);
        let parts = if name == cstr!("insert") {
            cstr!("documents")
        } else {
            cstr!("updates")
        };
        let mut command = RawDocumentBuf::new();
        command.append(name, MESSAGES);
        command.append(cstr!("ordered"), false);
        command.append(
            cstr!("writeConcern"),
            rawdoc! { "w": "majority", "wtimeout": limit },
        );
        command.append(cstr!("maxTimeMS"), limit);
        command.append(parts, body);
        let answer = self.run_raw(command, self.write_timeout).await?;
        let errors = write_errors(&answer)?;
        let failed: BTreeSet<usize> = errors.iter().map(|error| error.index).collect();
        // Each part is written or has an error. Any other answer is not valid.
        let written = answer
            .get_i32("n")
            .ok()
            .and_then(|n| usize::try_from(n).ok());
        if written.map(|written| written + failed.len()) != Some(groups.len()) {
            return Err(StoreError::Unavailable(format!(
                "of {} parts of a batch {written:?} were written, with {} errors",
                groups.len(),
                failed.len()
            )));
        }
        let mut groups: Vec<Option<Group<'a>>> = groups.into_iter().map(Some).collect();
        let failed = errors.into_iter().filter_map(|error| {
            let group = groups.get_mut(error.index)?.take()?;
            Some((group, error))
        });
        Ok(failed.collect())
    }
}

impl<'a> Group<'a> {
    fn new(key: &'a str, entry: &'a Entry) -> Self {
        Self {
            key,
            room: &entry.room,
            folded: Folded::default(),
            entries: Vec::new(),
            copies: Vec::new(),
        }
    }

    fn add(&mut self, index: usize, entry: &Entry) {
        if let What::Message { .. } = entry.what {
            self.said_at(&entry.place);
        }
        self.folded.apply(entry);
        self.entries.push(index);
    }

    /// The message is also stored at `place`. The later of the two places is a duplicate.
    fn said_at(&mut self, place: &Place) {
        let known = self.folded.base.as_ref().map(|base| &base.place);
        if let Some(known) = known.filter(|known| *known != place) {
            self.copies.push(known.max(place).clone());
        }
    }

    /// The removals of the duplicates of the message, whose first place is `first`.
    fn removals(&self, first: &Place) -> impl Iterator<Item = Removal> {
        let copies = self.copies.iter();
        copies.map(|copy| {
            let removal = Removal::new(copy.clone(), self.room.clone(), self.key);
            removal.copy_of(first.clone())
        })
    }
}

impl WriteError {
    fn text(&self) -> String {
        format!("{} (MongoDB's code {})", self.message, self.code)
    }
}

/// The key of the document that an entry changes.
fn key(entry: &Entry) -> Option<&str> {
    match &entry.what {
        What::Message { key, .. } => Some(key),
        What::Change { target, .. } => Some(target),
        What::Nothing(_) => None,
    }
}

/// Fails if an answer reports an error, unless another writer was faster.
pub(super) fn unless_duplicate(answer: &Fields) -> Result<(), StoreError> {
    let mut errors = write_errors(answer)?.into_iter();
    match errors.find(|error| error.code != DUPLICATE_KEY) {
        Some(error) => Err(StoreError::Unavailable(error.text())),
        None => Ok(()),
    }
}

/// The errors of single documents in an answer. An error if the answer reports a problem of the server, or that the
/// majority has not acknowledged.
fn write_errors(answer: &Fields) -> Result<Vec<WriteError>, StoreError> {
    let unclear = || StoreError::Unavailable(format!("it answered {answer}"));
    if let Ok(error) = answer.get_document("writeConcernError") {
        return Err(StoreError::Unavailable(format!(
            "the majority has not confirmed: {}",
            error.get_str("errmsg").unwrap_or_default()
        )));
    }
    let Ok(errors) = answer.get_array("writeErrors") else {
        return Ok(Vec::new());
    };
    let mut found = Vec::with_capacity(errors.len());
    for error in errors {
        let error = error.as_document().ok_or_else(unclear)?;
        let index = error.get_i32("index").ok();
        let error = WriteError {
            index: index
                .and_then(|index| usize::try_from(index).ok())
                .ok_or_else(unclear)?,
            code: error.get_i32("code").map_err(|_no_code| unclear())?,
            message: error.get_str("errmsg").unwrap_or_default().to_owned(),
        };
        if PASSING.contains(&error.code) {
            return Err(StoreError::Unavailable(error.text()));
        }
        found.push(error);
    }
    Ok(found)
}
