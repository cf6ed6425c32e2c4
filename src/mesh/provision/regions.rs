//! The streams of all regions of a mesh, over one connection.
//!
//! Each region's JetStream is asked in its own domain. A region that does not answer is reported and left for another
//! run; the others are brought as far as possible without it.
//!
//! # Invariants
//! - The [`REGIONS_METADATA`] of a region's streams names another region only while its mirrors exist: the name is
//!   added after they were created, and removed, early enough for edges to follow, before they are deleted.
//! - A mirror has the epoch of its origin, read there. The streams of an origin are never deleted.

use std::collections::{BTreeMap, BTreeSet};

use async_nats::Client;
use futures_util::future::join_all;
use serde_json::{Map, Value, json};
use tokio::time::sleep;

use super::{
    Options, ProvisionError, check_partitions,
    definition::{Definition, Kind, definitions, new_epoch},
    jetstream::JetStream,
    plan::{Action, FieldChange, Outcome, Verdict, plan},
};
use crate::{
    config::Config,
    model::{MAX_REGIONS, Region},
    subject::{EPOCH_METADATA, REGIONS_METADATA, Subjects, rooms_stream},
};

/// What was done in a mesh.
#[derive(Debug, Default)]
pub struct Provisioned {
    /// One per stream and domain, in the order of processing.
    pub outcomes: Vec<Outcome>,
    /// The regions that did not answer, and why. Their part is still to be done.
    pub unreachable: BTreeMap<Region, ProvisionError>,
}

impl Provisioned {
    /// Whether something is left to do.
    #[must_use]
    pub fn is_incomplete(&self) -> bool {
        !self.unreachable.is_empty() || self.outcomes.iter().any(Outcome::is_incomplete)
    }
}

/// Brings the streams and buckets of all `regions`, and their mirrors in the others, to their definitions. A region
/// that does not answer is reported.
///
/// With the configured region alone, no domain is named, and nothing but JetStream is needed from the server.
///
/// # Errors
/// [`ProvisionError`], except for unreachable regions. What was done before the error is kept, and another run
/// continues from there.
pub async fn provision_mesh(
    client: &Client,
    config: &Config,
    regions: &BTreeSet<Region>,
    options: Options,
) -> Result<Provisioned, ProvisionError> {
    let count = regions.len();
    if count > MAX_REGIONS {
        return Err(ProvisionError::TooManyRegions { count });
    }
    let mut run = Run::new(client, config, options, regions);
    run.ping(regions).await;
    for region in regions {
        run.own_streams(region).await?;
    }
    for region in regions {
        run.mirrors(region, regions).await?;
    }
    Ok(run.report)
}

/// Removes the region `gone` from a mesh: first from the lists of all other regions; then, after
/// [`Options::edges_follow`], its mirrors there are deleted. Its own streams are left alone, and it need not be
/// reachable.
///
/// # Errors
/// As [`provision_mesh`].
pub async fn remove_region(
    client: &Client,
    config: &Config,
    regions: &BTreeSet<Region>,
    gone: &Region,
    options: Options,
) -> Result<Provisioned, ProvisionError> {
    let mut run = Run::new(client, config, options, regions);
    let others: BTreeSet<_> = regions.iter().filter(|r| *r != gone).cloned().collect();
    run.ping(&others).await;
    for region in &others {
        run.unlist(region, gone).await?;
    }
    let mut left = false;
    for region in &others {
        left |= !run.mirrors_of(region, gone).await?.is_empty();
    }
    // Waits even if the lists were changed by an earlier run that was aborted: the time of that is not known.
    if left && !options.dry_run {
        sleep(options.edges_follow).await;
    }
    for region in &others {
        run.delete_mirrors(region, gone).await?;
    }
    Ok(run.report)
}

/// The regions that the configured region's streams name, those that the configuration names, and the configured region
/// itself.
///
/// # Errors
/// [`ProvisionError`]
pub async fn known_regions(
    client: &Client,
    config: &Config,
) -> Result<BTreeSet<Region>, ProvisionError> {
    let jetstream = JetStream::here(client);
    let own = config.region();
    let mut known = config.regions();
    for part in 0..config.nats.partitions {
        let stream = rooms_stream(&own, part);
        if let Some(stream) = jetstream.stream_config(&stream).await? {
            known.extend(regions_of(&stream));
        }
    }
    known.insert(own);
    Ok(known)
}

/// The regions that a stream's metadata names.
pub(in crate::mesh) fn regions_of(stream: &Map<String, Value>) -> BTreeSet<Region> {
    metadata(stream, REGIONS_METADATA)
        .unwrap_or_default()
        .split(',')
        .filter_map(Region::parse)
        .collect()
}

/// A value of a stream's metadata.
pub(in crate::mesh) fn metadata<'a>(stream: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    stream.get("metadata")?.get(key)?.as_str()
}

/// The list as it is written into the metadata.
fn listed(regions: &BTreeSet<Region>) -> String {
    let names: Vec<&str> = regions.iter().map(Region::as_str).collect();
    names.join(",")
}

/// One run over a mesh.
struct Run<'a> {
    client: &'a Client,
    config: &'a Config,
    options: Options,
    subjects: Subjects,
    /// Whether requests name a domain.
    several: bool,
    /// The epochs of the origins' streams, by stream.
    epochs: BTreeMap<String, String>,
    report: Provisioned,
}

impl<'a> Run<'a> {
    fn new(
        client: &'a Client,
        config: &'a Config,
        options: Options,
        regions: &BTreeSet<Region>,
    ) -> Self {
        Self {
            client,
            config,
            options,
            subjects: Subjects::new(&config.nats.prefix),
            several: regions.iter().any(|region| *region != config.region()),
            epochs: BTreeMap::new(),
            report: Provisioned::default(),
        }
    }

    fn jetstream(&self, region: &Region) -> JetStream<'a> {
        if self.several {
            JetStream::of(self.client, region)
        } else {
            JetStream::here(self.client)
        }
    }

    /// Notes the regions that do not answer. All at the same time, since each may take until the deadline.
    async fn ping(&mut self, regions: &BTreeSet<Region>) {
        let jetstreams = regions.iter().map(|region| self.jetstream(region));
        let pings = jetstreams.map(async |jetstream| jetstream.ping().await);
        let answers = join_all(pings).await;
        for (region, answer) in regions.iter().zip(answers) {
            if let Err(error) = answer {
                let error = self.because_of_its_domain(region).await.unwrap_or(error);
                self.report.unreachable.insert(region.clone(), error);
            }
        }
    }

    /// Why a region can't be reached although the connection leads to it: its domain has another name.
    async fn because_of_its_domain(&self, region: &Region) -> Option<ProvisionError> {
        if !self.several || *region != self.config.region() {
            return None;
        }
        let account = JetStream::here(self.client).account().await.ok()?;
        let domain = account.get("domain").and_then(Value::as_str);
        let found = domain.unwrap_or_default().to_owned();
        (found != region.as_str()).then(|| ProvisionError::Domain {
            region: region.clone(),
            found,
        })
    }

    fn is_away(&self, region: &Region) -> bool {
        self.report.unreachable.contains_key(region)
    }

    /// Notes a region that went away during the run; any other error ends the run.
    fn unless_away(
        &mut self,
        region: &Region,
        result: Result<(), ProvisionError>,
    ) -> Result<(), ProvisionError> {
        match result {
            Err(error) if error.is_unreachable() => {
                self.report.unreachable.insert(region.clone(), error);
                Ok(())
            }
            result => result,
        }
    }

    fn push(&mut self, mut outcome: Outcome, region: &Region) {
        outcome.domain = self.several.then(|| region.clone());
        self.report.outcomes.push(outcome);
    }

    async fn own_streams(&mut self, region: &Region) -> Result<(), ProvisionError> {
        if self.is_away(region) {
            return Ok(());
        }
        let result = self.try_own_streams(region).await;
        self.unless_away(region, result)
    }

    async fn try_own_streams(&mut self, region: &Region) -> Result<(), ProvisionError> {
        let jetstream = self.jetstream(region);
        check_partitions(&jetstream, &self.subjects, self.config.nats.partitions).await?;
        for mut definition in definitions(self.config, region) {
            let existing = jetstream.stream_config(&definition.stream).await?;
            if definition.has_epoch() {
                let epoch = existing
                    .as_ref()
                    .and_then(|stream| metadata(stream, EPOCH_METADATA))
                    .map_or_else(new_epoch, str::to_owned);
                definition.set_metadata(EPOCH_METADATA, &epoch);
                self.epochs.insert(definition.stream.clone(), epoch);
            }
            if matches!(definition.kind, Kind::Rooms { .. }) {
                // Other regions are added when their mirrors exist, and removed only on request.
                let mut regions = existing.as_ref().map(regions_of).unwrap_or_default();
                regions.insert(region.clone());
                definition.set_metadata(REGIONS_METADATA, &listed(&regions));
            }
            let outcome = self.bring(&jetstream, definition, existing).await?;
            self.push(outcome, region);
        }
        Ok(())
    }

    /// Creates a stream, or updates the fields that differ.
    async fn bring(
        &self,
        jetstream: &JetStream<'_>,
        definition: Definition,
        existing: Option<Map<String, Value>>,
    ) -> Result<Outcome, ProvisionError> {
        let name = &definition.stream;
        let Some(existing) = existing else {
            let outcome = Outcome::new(name, Action::Create);
            if !self.options.dry_run {
                jetstream.create(name, definition.config).await?;
            }
            return Ok(outcome);
        };
        let (outcome, merged) = plan(&definition, &existing, self.options.allow_destructive);
        if let (Some(merged), false) = (merged, self.options.dry_run) {
            jetstream.update(name, merged).await?;
        }
        Ok(outcome)
    }

    async fn mirrors(
        &mut self,
        region: &Region,
        regions: &BTreeSet<Region>,
    ) -> Result<(), ProvisionError> {
        if self.is_away(region) {
            return Ok(());
        }
        let result = self.try_mirrors(region, regions).await;
        self.unless_away(region, result)
    }

    async fn try_mirrors(
        &mut self,
        region: &Region,
        regions: &BTreeSet<Region>,
    ) -> Result<(), ProvisionError> {
        let jetstream = self.jetstream(region);
        let mut present = BTreeSet::new();
        for origin in regions.iter().filter(|origin| *origin != region) {
            let mut complete = true;
            for definition in definitions(self.config, origin) {
                let Some(mirror) = definition.mirror_in(region, &self.subjects) else {
                    continue;
                };
                let existing = jetstream.stream_config(&mirror.stream).await?;
                if let Some(epoch) = self.epochs.get(&mirror.stream).cloned() {
                    let outcome = self.mirror(&jetstream, mirror, existing, &epoch).await?;
                    self.push(outcome, region);
                } else {
                    // The origin is away, so its epoch is not known.
                    complete &= existing.is_some();
                }
            }
            if complete {
                present.insert(origin.clone());
            }
        }
        if present.is_empty() {
            return Ok(());
        }
        self.change_regions(&jetstream, region, |regions| {
            regions.extend(present.clone())
        })
        .await
    }

    async fn mirror(
        &self,
        jetstream: &JetStream<'_>,
        mut mirror: Definition,
        existing: Option<Map<String, Value>>,
        epoch: &str,
    ) -> Result<Outcome, ProvisionError> {
        mirror.set_metadata(EPOCH_METADATA, epoch);
        let other = existing.as_ref().filter(|stream| is_mirror(stream));
        let Some(other) = other.filter(|s| metadata(s, EPOCH_METADATA) != Some(epoch)) else {
            return self.bring(jetstream, mirror, existing).await;
        };
        let allowed = self.options.allow_destructive;
        let action = if allowed {
            Action::Recreate
        } else {
            Action::Keep
        };
        let mut outcome = Outcome::new(&mirror.stream, action);
        outcome.changes.push(FieldChange {
            field: EPOCH_METADATA.to_owned(),
            old: metadata(other, EPOCH_METADATA).unwrap_or("unset").to_owned(),
            new: epoch.to_owned(),
            verdict: if allowed {
                Verdict::Apply
            } else {
                Verdict::Destructive(
                    "the origin was re-created, and what is mirrored of its former stream would be lost",
                )
            },
        });
        if allowed && !self.options.dry_run {
            jetstream.delete(&mirror.stream).await?;
            jetstream.create(&mirror.stream, mirror.config).await?;
        }
        Ok(outcome)
    }

    /// Changes the list of regions in the region's own room streams, and notes the change in their outcomes.
    async fn change_regions(
        &mut self,
        jetstream: &JetStream<'_>,
        region: &Region,
        change: impl Fn(&mut BTreeSet<Region>),
    ) -> Result<(), ProvisionError> {
        for part in 0..self.config.nats.partitions {
            let name = rooms_stream(region, part);
            // In a dry run it was not created.
            let Some(mut stream) = jetstream.stream_config(&name).await? else {
                continue;
            };
            let before = regions_of(&stream);
            let mut after = before.clone();
            change(&mut after);
            if before == after {
                continue;
            }
            self.note(
                &name,
                region,
                FieldChange {
                    field: REGIONS_METADATA.to_owned(),
                    old: listed(&before),
                    new: listed(&after),
                    verdict: Verdict::Apply,
                },
            );
            if !self.options.dry_run {
                if !matches!(stream.get("metadata"), Some(Value::Object(_))) {
                    stream.insert("metadata".to_owned(), json!({}));
                }
                if let Some(Value::Object(metadata)) = stream.get_mut("metadata") {
                    metadata.insert(REGIONS_METADATA.to_owned(), json!(listed(&after)));
                }
                jetstream.update(&name, stream).await?;
            }
        }
        Ok(())
    }

    /// Adds a change to the outcome of a stream, or a new outcome if there is none yet.
    fn note(&mut self, stream: &str, region: &Region, change: FieldChange) {
        let domain = self.several.then(|| region.clone());
        let made = self
            .report
            .outcomes
            .iter_mut()
            .find(|outcome| outcome.stream == stream && outcome.domain == domain);
        if let Some(outcome) = made {
            if outcome.action == Action::Create {
                return;
            }
            outcome.action = Action::Update;
            outcome.changes.push(change);
        } else {
            let mut outcome = Outcome::new(stream, Action::Update);
            outcome.changes.push(change);
            self.push(outcome, region);
        }
    }

    /// Removes a region from the list of another one.
    async fn unlist(&mut self, region: &Region, gone: &Region) -> Result<(), ProvisionError> {
        if self.is_away(region) {
            return Ok(());
        }
        let jetstream = self.jetstream(region);
        let remove = |regions: &mut BTreeSet<Region>| {
            regions.remove(gone);
        };
        let result = self.change_regions(&jetstream, region, remove).await;
        self.unless_away(region, result)
    }

    /// The mirrors of `gone` in a region.
    async fn mirrors_of(
        &mut self,
        region: &Region,
        gone: &Region,
    ) -> Result<Vec<String>, ProvisionError> {
        let mut mirrors = Vec::new();
        if self.is_away(region) {
            return Ok(mirrors);
        }
        let jetstream = self.jetstream(region);
        let look = async {
            for definition in definitions(self.config, gone) {
                let stream = jetstream.stream_config(&definition.stream).await?;
                // A stream with this name that is not a mirror belongs to somebody else.
                if stream.is_some_and(|stream| is_mirror(&stream)) {
                    mirrors.push(definition.stream);
                }
            }
            Ok::<_, ProvisionError>(())
        };
        let result = look.await;
        self.unless_away(region, result)?;
        Ok(mirrors)
    }

    async fn delete_mirrors(
        &mut self,
        region: &Region,
        gone: &Region,
    ) -> Result<(), ProvisionError> {
        let jetstream = self.jetstream(region);
        for name in self.mirrors_of(region, gone).await? {
            if !self.options.dry_run
                && let Err(error) = jetstream.delete(&name).await
            {
                return self.unless_away(region, Err(error));
            }
            self.push(Outcome::new(&name, Action::Delete), region);
        }
        Ok(())
    }
}

pub(in crate::mesh) fn is_mirror(stream: &Map<String, Value>) -> bool {
    stream.get("mirror").is_some_and(Value::is_object)
}
