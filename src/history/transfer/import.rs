//! The import of a file.
//!
//! # Invariants
//! - Nothing is written before every line was checked.
//! - A message that is stored, in a stream or in MongoDB, is not stored again. So an import may be repeated, and
//!   continued after a crash at any point.
//! - The messages of a room that go into its stream are published one after the other, in the order of the file.
//! - A message that goes into MongoDB gets a place with its original time, and as its epoch a hash of the file. So it
//!   has the same place in every run, and no two messages of a room have the same place.
//! - An erased message is not stored.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use sha2::{Digest as _, Sha256};
use tokio::time::sleep;

use super::{
    ATTEMPTS, Deployment, PAUSE, PAUSE_MAX, TransferError,
    line::{self, Item, Line, Rules},
    retried,
    seen::{self, KeyHash, Wanted},
};
use crate::{
    bus::{Bucket, Line as NatsLine, PublishError, Publisher, Remembered, Suspect},
    config::Config,
    model::{Epoch, RoomId},
    protocol::ErrorCode,
    runtime::unix_ms,
    store::{Entry, Folded, Store, What},
    subject::bucket,
};

/// Longest line, in bytes.
const MAX_LINE: usize = 16 << 20;

/// Lines, and bytes of lines, that are worked on at once.
const LINES: usize = 500;
const BYTES: usize = 4 << 20;

/// Rooms that are published to at once.
const ROOMS: usize = 64;

/// Bytes of a byte order mark.
const MARK: &str = "\u{feff}";

/// How to import.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The room of lines that name none.
    pub room: Option<RoomId>,
    /// Import the good lines although others are bad.
    pub skip_bad: bool,
    /// Write to MongoDB only, and not to the streams.
    pub history_only: bool,
}

/// What an import did, in lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// All lines that are not empty.
    pub lines: u64,
    /// Lines that were new, or had something new.
    pub imported: u64,
    /// Lines that were there before.
    pub known: u64,
    /// Lines that were left out because their messages were erased.
    pub erased: u64,
    /// Lines that can't be imported.
    pub bad: u64,
    /// Messages that stand after an older one of the same room.
    pub unordered: u64,
}

/// Where a message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Stream,
    Mongodb,
}

/// A file that was checked.
#[derive(Debug)]
pub struct Import {
    options: Options,
    policy: Policy,
    epoch: Epoch,
    wanted: Wanted,
    report: Report,
}

/// What the configuration says about lines.
#[derive(Debug)]
struct Policy {
    config: Arc<Config>,
    rules: Rules,
    history_only: bool,
}

/// A line to import.
struct Job {
    number: u64,
    line: Line,
    way: Way,
}

/// What became of an item or a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Done {
    New,
    Known,
    Erased,
}

impl Import {
    /// Checks every line of a file. `on_bad` is told what is wrong with a line.
    ///
    /// # Errors
    /// [`TransferError::File`].
    pub fn check(
        file: &Path,
        config: &Config,
        options: Options,
        mut on_bad: impl FnMut(u64, &str),
    ) -> Result<Self, TransferError> {
        let policy = Policy {
            config: Arc::new(config.clone()),
            rules: Rules {
                body: config.limits.body.as_u64(),
                now: unix_ms(),
                room: options.room.clone(),
            },
            history_only: options.history_only,
        };
        let mut wanted = Wanted::default();
        let mut report = Report::default();
        let mut last: HashMap<RoomId, u64> = HashMap::new();
        let mut digest = Sha256::new();
        let mut lines = Lines::open(file)?;
        while let Some((number, text)) = lines.next()? {
            digest.update(text.as_deref().unwrap_or_default());
            digest.update("\n");
            report.lines += 1;
            let checked = text.and_then(|text| policy.check(&text));
            let checked = checked.and_then(|(line, _way)| {
                let key = seen::hash(&line.first.key());
                match wanted.lines.get(&key) {
                    Some(first) => Err(format!("it is the same message as line {first}")),
                    None => Ok(line),
                }
            });
            let line = match checked {
                Ok(line) => line,
                Err(problem) => {
                    report.bad += 1;
                    on_bad(number, &problem);
                    continue;
                }
            };
            for item in line.items() {
                let key = seen::hash(&item.key());
                wanted.lines.entry(key).or_insert(number);
            }
            if line.first.is_message() {
                let last = last.entry(line.room().clone()).or_default();
                report.unordered += u64::from(line.first.ts < *last);
                *last = line.first.ts.max(*last);
            }
            wanted.rooms.insert(line.room().clone());
        }
        Ok(Self {
            options,
            policy,
            epoch: epoch(&digest.finalize()),
            wanted,
            report,
        })
    }

    /// What is known so far: the numbers of all, of bad and of unordered lines.
    #[must_use]
    pub fn checked(&self) -> Report {
        self.report
    }

    /// Imports the good lines of the file. `on_progress` is told from time to time how far it is.
    ///
    /// # Errors
    /// [`TransferError`]. A part may have been imported; it is safe to repeat the import.
    pub async fn run(
        self,
        file: &Path,
        deployment: &Deployment,
        mut on_progress: impl FnMut(&Report),
    ) -> Result<Report, TransferError> {
        if let Some(store) = &deployment.store {
            // The history service may not have run yet.
            retried(|| store.prepare()).await?;
        }
        let there = seen::in_streams(deployment, &self.wanted).await?;
        let target = Target::open(deployment, self.epoch, there).await?;
        let mut report = self.report;
        let mut lines = Lines::open(file)?;
        let (mut jobs, mut bytes) = (Vec::new(), 0);
        loop {
            let next = lines.next()?;
            let is_end = next.is_none();
            if let Some((number, text)) = next {
                let size = text.as_ref().map_or(0, String::len);
                if let Some(job) = self.job(number, text)? {
                    bytes += size;
                    jobs.push(job);
                }
            }
            if jobs.len() >= LINES || bytes >= BYTES || (is_end && !jobs.is_empty()) {
                target.import(&jobs, &mut report).await?;
                on_progress(&report);
                jobs.clear();
                bytes = 0;
            }
            if is_end {
                break;
            }
        }
        target.line.close().await;
        Ok(report)
    }

    /// The line, unless it is one of those that were found to be bad.
    fn job(&self, number: u64, text: Result<String, String>) -> Result<Option<Job>, TransferError> {
        let checked = text.and_then(|text| self.policy.check(&text));
        let first = checked.as_ref().ok().and_then(|(line, _)| {
            let key = seen::hash(&line.first.key());
            self.wanted.lines.get(&key).copied()
        });
        match checked {
            Ok((line, way)) if first == Some(number) => Ok(Some(Job { number, line, way })),
            _ if self.options.skip_bad => Ok(None),
            _ => Err(TransferError::Changed(number)),
        }
    }
}

impl Policy {
    /// Checks a line, and says where it goes.
    fn check(&self, text: &str) -> Result<(Line, Way), String> {
        let line = line::parse(text, &self.rules)?;
        let way = self.way(&line.first)?;
        Ok((line, way))
    }

    fn way(&self, item: &Item) -> Result<Way, String> {
        let name = item.publication.room.namespace();
        let namespace = self.config.namespaces.get(name);
        let namespace =
            namespace.ok_or_else(|| format!("the namespace {name} is not configured"))?;
        if !namespace.durable {
            return Err(format!("the namespace {name} is not durable"));
        }
        let age = Duration::from_millis(self.rules.now.saturating_sub(item.ts));
        let max_age = self.config.streams.max_age;
        let is_old = !max_age.is_zero() && age >= max_age;
        if !namespace.history {
            return match (is_old, self.history_only) {
                (false, false) => Ok(Way::Stream),
                (true, _) => Err(format!(
                    "it is older than streams.max_age, and the namespace {name} has no history"
                )),
                (_, true) => Err(format!("the namespace {name} has no history")),
            };
        }
        let keep = namespace.history_keep;
        if !keep.is_zero() && age >= keep {
            return Err(format!(
                "it is older than namespaces.{name}.history_keep = {}",
                humantime::format_duration(keep)
            ));
        }
        // The place does not matter here.
        let region = self.config.region();
        let epoch = Epoch::parse("i").ok_or("no epoch")?;
        if let What::Nothing(why) = item.entry(&region, epoch, 0).what {
            return Err(why.to_owned());
        }
        Ok(match is_old || self.history_only {
            true => Way::Mongodb,
            false => Way::Stream,
        })
    }
}

/// The epoch of the messages that a file puts into MongoDB.
fn epoch(digest: &[u8]) -> Epoch {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let digits = digest.iter().take(7);
    let digits = digits.map(|byte| char::from(DIGITS[usize::from(*byte) % DIGITS.len()]));
    let text: String = std::iter::once('i').chain(digits).collect();
    Epoch::parse(&text).expect("8 letters and digits")
}

/// A line with its number, or what is wrong with it.
type Numbered = (u64, Result<String, String>);

/// The lines of a file that are not empty, with their numbers.
struct Lines {
    file: BufReader<File>,
    number: u64,
}

impl Lines {
    fn open(file: &Path) -> Result<Self, TransferError> {
        Ok(Self {
            file: BufReader::with_capacity(1 << 16, File::open(file)?),
            number: 0,
        })
    }

    /// The next line, or what is wrong with it.
    fn next(&mut self) -> Result<Option<Numbered>, TransferError> {
        loop {
            let mut bytes = Vec::new();
            let most = MAX_LINE as u64 + 1;
            let mut part = (&mut self.file).take(most);
            part.read_until(b'\n', &mut bytes)?;
            if bytes.is_empty() {
                return Ok(None);
            }
            self.number += 1;
            if bytes.len() > MAX_LINE && !bytes.ends_with(b"\n") {
                self.skip_rest()?;
                let problem = format!("it has more than {MAX_LINE} bytes");
                return Ok(Some((self.number, Err(problem))));
            }
            let Ok(text) = String::from_utf8(bytes) else {
                return Ok(Some((self.number, Err("it is not UTF-8".to_owned()))));
            };
            let text = text.strip_prefix(MARK).unwrap_or(&text).trim();
            if !text.is_empty() {
                return Ok(Some((self.number, Ok(text.to_owned()))));
            }
        }
    }

    fn skip_rest(&mut self) -> Result<(), TransferError> {
        loop {
            let part = self.file.fill_buf()?;
            let end = part.iter().position(|byte| *byte == b'\n');
            let (used, is_end) = match end {
                Some(end) => (end + 1, true),
                None => (part.len(), part.is_empty()),
            };
            self.file.consume(used);
            if is_end {
                return Ok(());
            }
        }
    }
}

/// Where messages are stored.
struct Target<'d> {
    deployment: &'d Deployment,
    line: NatsLine,
    publisher: Publisher,
    remembered: Arc<Remembered>,
    epoch: Epoch,
    /// Messages that the streams had before.
    there: HashSet<KeyHash>,
}

impl<'d> Target<'d> {
    async fn open(
        deployment: &'d Deployment,
        epoch: Epoch,
        there: HashSet<KeyHash>,
    ) -> Result<Self, TransferError> {
        let Deployment {
            config,
            connection,
            reader,
            origins,
            tasks,
            ..
        } = deployment;
        let control = Bucket::new(connection.clone(), reader.clone(), config, bucket::CONTROL);
        let remembered = Arc::new(Remembered::default());
        for streams in origins.all() {
            remembered.read_of(&control, streams.origin()).await?;
        }
        let (line, driver) = NatsLine::new(&config.nats, "natter import")?;
        tasks.keep_running("publish", driver.run(()));
        line.ready().await;
        let publisher = Publisher::new(
            line.clone(),
            reader.clone(),
            Arc::clone(origins.own()),
            Arc::clone(&remembered),
            &config.nats,
            "import",
        );
        Ok(Self {
            deployment,
            line,
            publisher,
            remembered,
            epoch,
            there,
        })
    }

    /// Imports some lines.
    async fn import(&self, jobs: &[Job], report: &mut Report) -> Result<(), TransferError> {
        let mut documents = self.documents(jobs).await?;
        let mut done: Vec<(usize, Done)> = Vec::new();
        let mut erased = 0;
        if let Some(store) = &self.deployment.store {
            erased = self.write(store, jobs, &mut documents, &mut done).await?;
        }
        let mut by_room: HashMap<&RoomId, Vec<(usize, &Job)>> = HashMap::new();
        for (index, job) in jobs.iter().enumerate() {
            if job.way == Way::Stream {
                by_room
                    .entry(job.line.room())
                    .or_default()
                    .push((index, job));
            }
        }
        let documents = &documents;
        let published = by_room.into_values().map(|jobs| async move {
            let mut done = Vec::new();
            for (index, job) in jobs {
                for item in job.line.items() {
                    done.push((index, self.publish(job.number, item, documents).await?));
                }
            }
            Ok::<_, TransferError>(done)
        });
        let published = stream::iter(published).buffer_unordered(ROOMS);
        let published: Vec<Vec<(usize, Done)>> = published.try_collect().await?;
        done.extend(published.into_iter().flatten());
        let mut of_lines: HashMap<usize, Done> = HashMap::new();
        for (index, done) in done {
            // Whatever is new makes the line new; otherwise the message itself says what became of it.
            let of_line = of_lines.entry(index).or_insert(done);
            if done == Done::New {
                *of_line = Done::New;
            }
        }
        for done in of_lines.into_values() {
            *match done {
                Done::New => &mut report.imported,
                Done::Known => &mut report.known,
                Done::Erased => &mut report.erased,
            } += 1;
        }
        report.imported = report.imported.saturating_sub(erased);
        report.erased += erased;
        Ok(())
    }

    /// What MongoDB has of the messages that the lines are, or are about, by key.
    async fn documents(&self, jobs: &[Job]) -> Result<HashMap<String, Folded>, TransferError> {
        let Some(store) = &self.deployment.store else {
            return Ok(HashMap::new());
        };
        let items = jobs.iter().flat_map(|job| job.line.items());
        let mut keys: Vec<String> = items.map(|item| self.document_key(item)).collect();
        keys.sort_unstable();
        keys.dedup();
        let found = retried(|| store.get(&keys)).await?;
        Ok(found.into_iter().map(|one| (one.key, one.folded)).collect())
    }

    fn document_key(&self, item: &Item) -> String {
        match &item.publication.target {
            Some((_, target)) => super::super::key_of(&item.publication.room, &item.from, target),
            None => item.key(),
        }
    }

    /// Writes the lines that go into MongoDB. Returns how many messages were deleted at once, because an erasure of
    /// the last day covers them.
    async fn write(
        &self,
        store: &Store,
        jobs: &[Job],
        documents: &mut HashMap<String, Folded>,
        done: &mut Vec<(usize, Done)>,
    ) -> Result<u64, TransferError> {
        let origin = self.deployment.config.region();
        let mut entries: Vec<Entry> = Vec::new();
        let mut of: Vec<(usize, u64)> = Vec::new();
        for (index, job) in jobs.iter().enumerate() {
            if job.way != Way::Mongodb {
                continue;
            }
            for item in job.line.items() {
                let became = if self.was_erased(item).await? {
                    Done::Erased
                } else {
                    let entry = item.entry(&origin, self.epoch, job.number);
                    let known = documents.entry(self.document_key(item)).or_default();
                    let mut next = known.clone();
                    // The first of several messages with one key is in place; this one would be older than it.
                    let again = item.is_message() && known.base.is_some();
                    if !again && !self.is_there(item) {
                        next.apply(&entry);
                    }
                    if next == *known {
                        Done::Known
                    } else {
                        *known = next;
                        entries.push(entry);
                        of.push((index, job.number));
                        Done::New
                    }
                };
                done.push((index, became));
            }
        }
        let refused = retried(|| store.write(&entries)).await?;
        if let Some(refused) = refused.into_iter().next() {
            let line = of.get(refused.index).map_or(0, |(_, line)| *line);
            let reason = refused.reason;
            return Err(TransferError::Refused { line, reason });
        }
        // An erasure that was recorded after the list of erased messages was read, or that is about all that was said
        // up to a time.
        Ok(retried(|| store.enforce_erasures(&entries)).await?)
    }

    /// Whether a stream had it before.
    fn is_there(&self, item: &Item) -> bool {
        self.there.contains(&seen::hash(&item.key()))
    }

    async fn was_erased(&self, item: &Item) -> Result<bool, TransferError> {
        if !self.remembered.is_any() {
            return Ok(false);
        }
        let suspect = Suspect {
            room: &item.publication.room,
            from: &item.from,
            id: &item.id,
            target: item.publication.target.as_ref().map(|(_, to)| to),
        };
        Ok(self.remembered.has(suspect).await?)
    }

    /// Publishes an item, unless it is stored.
    async fn publish(
        &self,
        line: u64,
        item: &Item,
        documents: &HashMap<String, Folded>,
    ) -> Result<Done, TransferError> {
        let is_known = || {
            let document = documents.get(&item.key());
            item.is_message() && document.is_some_and(|document| document.base.is_some())
        };
        if self.is_there(item) || is_known() {
            return Ok(Done::Known);
        }
        let outgoing = item.outgoing();
        let mut pause = PAUSE;
        let mut attempt = 0;
        loop {
            attempt += 1;
            // The time of storage is of no interest.
            let source = match self.publisher.durable(&outgoing, |_seq| Some(0)).await {
                Ok(acked) if acked.duplicate => return Ok(Done::Known),
                Ok(_) => return Ok(Done::New),
                Err(PublishError::Erased) => return Ok(Done::Erased),
                Err(error) => error,
            };
            let may_pass = matches!(
                source.code(),
                ErrorCode::Unavailable | ErrorCode::UnknownOutcome
            );
            if !may_pass || attempt == ATTEMPTS {
                return Err(TransferError::Publish { line, source });
            }
            tracing::warn!(error = %source, line, "retrying");
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}
