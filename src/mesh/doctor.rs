//! Examines a deployment, and reports what is wrong with it and what to do.
//!
//! It changes nothing and stores nothing, but for a small file of uploads that it removes at once. It checks whether regions answer, their streams and mirrors against the
//! definitions of [`super::provision`], clocks, the permissions of the configured users, whether stalled mirrors can be
//! restarted, the storage of uploads, and, with a user of the system account, what only servers report.
//!
//! # Invariants
//! - A check that could not be made is reported as such. It never counts as passed.
//! - Every wait is bounded.

mod helped;
mod permissions;
mod push;
mod servers;
mod streams;
mod uploads;
mod workers;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant, SystemTime},
};

use async_nats::Client;
use futures_util::{
    future::join_all,
    stream::{self, StreamExt as _},
};
use serde::Serialize;
use serde_json::Value;

use super::provision::{
    Definition, Denials, JetStream, ProvisionError, connect_with_denials, definitions, regions_of,
};
use crate::{
    config::Config,
    model::Region,
    subject::{Subjects, parse_rooms_stream},
};

/// Streams of a region that are asked at the same time.
const AT_ONCE: usize = 8;

/// Tolerated clock difference. Read markers and pages of history are ordered by the times of servers.
const CLOCK_OFF: Duration = Duration::from_secs(1);

/// The severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Something does not work, or will not after the next failure.
    Problem,
    /// It works, but a person should know.
    Warning,
    /// It could not be checked, or is only worth knowing.
    Note,
}

/// The subject of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Check {
    /// Whether a region answers, and has the expected domain.
    Region,
    /// Whether a stream exists as defined.
    Stream,
    /// Whether a mirror exists, mirrors the right stream and does not lag behind, and whether mirrors can be restarted
    /// after a cut.
    Mirror,
    /// The replicas of a stream: their number and state.
    Replicas,
    /// How full a stream or an account is.
    Limit,
    /// Whether acknowledged messages survive a power loss.
    Durability,
    /// The links between spines.
    Gateway,
    /// Clocks.
    Clock,
    /// The permissions of the configured user.
    Permission,
    /// The storage of uploads.
    Uploads,
    /// Workers: whether somebody takes their messages; dead letters of workers and hooks.
    Worker,
    /// Hooks: whether somebody sends their events, and whether they are disabled.
    Hook,
    /// Notifications: whether somebody takes the messages, and whether edges say who is online.
    Push,
}

/// One result.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// The severity.
    pub level: Level,
    /// The subject of the check.
    pub check: Check,
    /// The region concerned, if it is one.
    pub region: Option<String>,
    /// The streams concerned.
    pub streams: Vec<String>,
    /// What is wrong, and its effect.
    pub what: String,
    /// What to do.
    pub advice: String,
}

/// All results.
#[derive(Debug, Default, Serialize)]
pub struct Examination {
    /// Worst first. Equal findings about several streams are merged.
    pub findings: Vec<Finding>,
    /// Number of regions of the mesh.
    pub regions: usize,
    /// Number of streams, buckets and mirrors examined.
    pub streams: usize,
    /// Number of servers that answered the system account.
    pub servers: usize,
}

impl Examination {
    /// The number of findings of a level.
    #[must_use]
    pub fn count(&self, level: Level) -> usize {
        self.findings.iter().filter(|f| f.level == level).count()
    }

    /// Sorts the findings, and merges equal ones about several streams.
    fn collect(&mut self, findings: Vec<Finding>) {
        let mut together = BTreeMap::new();
        for mut finding in findings {
            let streams = std::mem::take(&mut finding.streams);
            let all: &mut BTreeSet<String> = together.entry(finding).or_default();
            all.extend(streams);
        }
        let findings = together.into_iter().map(|(finding, streams)| Finding {
            streams: streams.into_iter().collect(),
            ..finding
        });
        self.findings = findings.collect();
    }
}

impl Finding {
    fn new(level: Level, check: Check, what: String, advice: impl Into<String>) -> Self {
        Self {
            level,
            check,
            region: None,
            streams: Vec::new(),
            what,
            advice: advice.into(),
        }
    }

    fn at(mut self, region: &Region) -> Self {
        self.region = Some(region.to_string());
        self
    }

    fn of(mut self, stream: &str) -> Self {
        self.streams.push(stream.to_owned());
        self
    }
}

/// Makes all checks.
///
/// # Errors
/// [`ProvisionError`] if there is no connection to NATS, or the configuration can't be used for one.
pub async fn examine(config: &Config) -> Result<Examination, ProvisionError> {
    let (client, denials) = connect_with_denials(&config.nats, "natter doctor").await?;
    let mut run = Run {
        client: &client,
        denials,
        config,
        subjects: Subjects::new(&config.nats.prefix),
        findings: Vec::new(),
        asked: 0,
    };
    let regions = run.mesh().await;
    let mut here = permissions::examine(config, &regions).await?;
    here.extend(helped::examine(config, &regions).await);
    here.extend(uploads::examine(config).await);
    let region = config.region();
    run.findings.extend(here.into_iter().map(|f| f.at(&region)));
    let (servers, of_servers) = servers::examine(config, &regions).await;
    run.findings.extend(of_servers);
    let mut examination = Examination {
        regions: regions.len(),
        streams: run.asked,
        servers,
        ..Examination::default()
    };
    examination.collect(run.findings);
    Ok(examination)
}

struct Run<'a> {
    client: &'a Client,
    denials: Denials,
    config: &'a Config,
    subjects: Subjects,
    findings: Vec<Finding>,
    asked: usize,
}

/// A region, and the answers of its own streams.
struct Site<'a> {
    region: Region,
    jetstream: JetStream<'a>,
    own: BTreeMap<String, Value>,
}

/// The answer of one stream.
struct Look {
    definition: Definition,
    answer: Result<Option<Value>, ProvisionError>,
    /// How many seconds the server's clock is ahead of ours, and the error of that number.
    clock: Option<(f64, f64)>,
}

impl<'a> Run<'a> {
    /// Examines all regions and their streams, and returns the regions.
    async fn mesh(&mut self) -> BTreeSet<Region> {
        let own = self.config.region();
        let mut regions = self.config.regions();
        let mut sites = Vec::new();
        let (site, findings) = self.site(&own).await;
        self.findings.extend(findings);
        if let Some(mut site) = site {
            self.own_streams(&mut site).await;
            for (_, info) in site.rooms() {
                regions.extend(
                    info.get("config")
                        .and_then(Value::as_object)
                        .map(regions_of)
                        .unwrap_or_default(),
                );
            }
            let of_workers = workers::examine(&site.jetstream, &site.own, self.config).await;
            let of_workers = of_workers.into_iter().map(|finding| finding.at(&own));
            self.findings.extend(of_workers);
            let of_push = push::examine(&site.jetstream, self.config).await;
            let of_push = of_push.into_iter().map(|finding| finding.at(&own));
            self.findings.extend(of_push);
            sites.push(site);
        }
        let others: Vec<&Region> = regions.iter().filter(|region| **region != own).collect();
        if !self.config.regions.is_empty() {
            let unnamed = others.iter().filter(|r| !self.config.regions().contains(r));
            for region in unnamed {
                self.findings.push(Finding::new(
                    Level::Warning,
                    Check::Region,
                    format!("the streams say that {region} belongs to the mesh, but regions does not name it"),
                    format!("add it to regions, or remove it: natter provision --remove-region {region} --allow-destructive"),
                ));
            }
        }
        // All at the same time, since one that does not answer takes until the deadline.
        let asked = join_all(others.into_iter().map(|region| self.site(region))).await;
        for (site, findings) in asked {
            self.findings.extend(findings);
            if let Some(mut site) = site {
                self.own_streams(&mut site).await;
                sites.push(site);
            }
        }
        for site in &sites {
            self.mirrors(site, &sites, &regions).await;
        }
        regions
    }

    /// A region, if it answers.
    async fn site(&self, region: &Region) -> (Option<Site<'a>>, Vec<Finding>) {
        let mut findings = Vec::new();
        let here = *region == self.config.region();
        let jetstream = if here {
            JetStream::here(self.client)
        } else {
            JetStream::of(self.client, region)
        };
        let jetstream = jetstream.with_denials(&self.denials);
        match jetstream.account().await {
            Ok(account) => {
                let domain = account
                    .get("domain")
                    .and_then(Value::as_str)
                    .unwrap_or_default();
                if here && self.config.regions().len() > 1 && domain != region.as_str() {
                    findings.push(Finding::new(
                        Level::Problem,
                        Check::Region,
                        format!("nats.url leads to the JetStream domain {domain:?}, but region is {region}"),
                        "set nats.url to the servers of the region, and their jetstream { domain } to its name",
                    ).at(region));
                }
                findings.extend(streams::account(&account).map(|f| f.at(region)));
            }
            // The user of an edge need not have this permission.
            Err(ProvisionError::Denied { .. }) if here => {}
            Err(ProvisionError::Denied { request }) => {
                findings.push(
                    Finding::new(
                        Level::Note,
                        Check::Region,
                        format!("not examined: the user may not publish to {request}"),
                        "run natter doctor as the user that provisions",
                    )
                    .at(region),
                );
                return (None, findings);
            }
            Err(error) => {
                let advice = if here {
                    "check whether the region's servers run with JetStream, and whether enough of them run to elect a leader"
                } else {
                    "check whether its servers run, and the links to it: the leaf node to this region's spine, the gateways between the spines, the leaf node there. Each region continues alone meanwhile"
                };
                findings.push(
                    Finding::new(
                        Level::Problem,
                        Check::Region,
                        format!("does not answer: {}", error.brief()),
                        advice,
                    )
                    .at(region),
                );
                return (None, findings);
            }
        }
        let site = Site {
            region: region.clone(),
            jetstream,
            own: BTreeMap::new(),
        };
        (Some(site), findings)
    }

    /// Asks these streams, some at a time. A stream that can't be asked becomes a finding; a stream that does not exist
    /// has no answer.
    async fn look(
        &mut self,
        site: &Site<'a>,
        wanted: Vec<Definition>,
    ) -> Vec<(Definition, Option<Value>)> {
        let looks = stream::iter(wanted).map(|definition| look(&site.jetstream, definition));
        let looks: Vec<Look> = looks.buffered(AT_ONCE).collect().await;
        self.asked += looks.len();
        // The quickest answer is the most precise one about the clock.
        let clocks = looks.iter().filter_map(|look| look.clock);
        if let Some((ahead, about)) = clocks.min_by(|a, b| a.1.total_cmp(&b.1)) {
            self.findings
                .extend(clock(ahead, about).map(|f| f.at(&site.region)));
        }
        let mut answered = Vec::new();
        for Look {
            definition, answer, ..
        } in looks
        {
            let finding = match answer {
                Ok(info) => {
                    answered.push((definition, info));
                    continue;
                }
                Err(ProvisionError::Denied { .. }) => Finding::new(
                    Level::Note,
                    Check::Stream,
                    "not examined: the user may not ask for it".to_owned(),
                    "run natter doctor as the user that provisions",
                ),
                Err(error) => Finding::new(
                    Level::Problem,
                    Check::Stream,
                    format!("does not report its state: {}", error.brief()),
                    "it may have no leader: check whether the servers that hold it run (nats server report jetstream)",
                ),
            };
            self.findings
                .push(finding.at(&site.region).of(&definition.stream));
        }
        answered
    }

    async fn own_streams(&mut self, site: &mut Site<'a>) {
        let region = site.region.clone();
        let wanted = definitions(self.config, &region);
        for (definition, info) in self.look(site, wanted).await {
            let name = definition.stream.clone();
            let Some(info) = info else {
                self.findings.push(
                    Finding::new(
                        Level::Problem,
                        Check::Stream,
                        "missing: edges of the region can't serve what it holds".to_owned(),
                        format!("natter provision, with {region} as region or in regions"),
                    )
                    .at(&region)
                    .of(&name),
                );
                continue;
            };
            let found = streams::own(&definition, &info);
            self.findings
                .extend(found.into_iter().map(|f| f.at(&region).of(&name)));
            site.own.insert(name, info);
        }
    }

    async fn mirrors(&mut self, site: &Site<'a>, sites: &[Site<'a>], regions: &BTreeSet<Region>) {
        let mut complete = BTreeSet::from([site.region.clone()]);
        for origin in regions.iter().filter(|origin| **origin != site.region) {
            let there = sites.iter().find(|other| other.region == *origin);
            let wanted: Vec<Definition> = definitions(self.config, origin)
                .iter()
                .filter_map(|definition| definition.mirror_in(&site.region, &self.subjects))
                .collect();
            let count = wanted.len();
            let looked = self.look(site, wanted).await;
            let mut present = 0;
            for (definition, info) in looked {
                let name = &definition.stream;
                let mut found = Vec::new();
                if let Some(info) = info {
                    present += 1;
                    let mut source = there.and_then(|there| there.own.get(name)).cloned();
                    if let (Some(there), Some(known)) = (there, &source)
                        && streams::is_ahead(&info, known)
                    {
                        // Only a stream that was asked later may be ahead: ask the origin again.
                        source = there.jetstream.stream_info(name).await.ok().flatten();
                    }
                    found.extend(streams::mirror(&definition, &info, source.as_ref()));
                } else {
                    found.push(Finding::new(
                        Level::Problem,
                        Check::Mirror,
                        format!("missing: what {origin} stores does not arrive here"),
                        format!("natter provision --region {origin}"),
                    ));
                }
                self.findings
                    .extend(found.into_iter().map(|f| f.at(&site.region).of(name)));
            }
            if present == count {
                complete.insert(origin.clone());
            }
        }
        for (name, info) in site.rooms() {
            let found = streams::regions(info, &complete, regions);
            self.findings
                .extend(found.into_iter().map(|f| f.at(&site.region).of(name)));
        }
    }
}

impl Site<'_> {
    fn rooms(&self) -> impl Iterator<Item = (&str, &Value)> {
        let all = self.own.iter().map(|(name, info)| (name.as_str(), info));
        all.filter(|(name, _)| parse_rooms_stream(name).is_some())
    }
}

async fn look(jetstream: &JetStream<'_>, definition: Definition) -> Look {
    let (asked, started) = (SystemTime::now(), Instant::now());
    let answer = jetstream.stream_info(&definition.stream).await;
    let took = started.elapsed().as_secs_f64();
    let told = match &answer {
        Ok(Some(info)) => info.get("ts").and_then(Value::as_str),
        Ok(None) | Err(_) => None,
    };
    let clock = told.and_then(|told| Some((ahead(told, asked)? - took / 2.0, took / 2.0)));
    Look {
        definition,
        answer,
        clock,
    }
}

/// By how many seconds `told`, RFC 3339, is later than `ours`.
fn ahead(told: &str, ours: SystemTime) -> Option<f64> {
    let told = humantime::parse_rfc3339_weak(told).ok()?;
    Some(match told.duration_since(ours) {
        Ok(after) => after.as_secs_f64(),
        Err(before) => -before.duration().as_secs_f64(),
    })
}

/// A finding if a clock that is `ahead` seconds ahead of ours, with an error of `about`, is certainly wrong.
fn clock(ahead: f64, about: f64) -> Option<Finding> {
    (ahead.abs() - about > CLOCK_OFF.as_secs_f64()).then(|| {
        let direction = if ahead > 0.0 { "ahead of" } else { "behind" };
        Finding::new(
            Level::Problem,
            Check::Clock,
            format!(
                "the server's clock is {:.1} s {direction} this machine's: history is ordered by the servers' clocks, and leases of edges expire by them",
                ahead.abs()
            ),
            "synchronise both with NTP (chrony, systemd-timesyncd)",
        )
    })
}
