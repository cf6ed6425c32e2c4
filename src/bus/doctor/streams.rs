//! What is wrong with one stream, by what it tells of itself. No I/O.

use std::{collections::BTreeSet, time::Duration};

use serde_json::{Map, Value};

use super::{Check, Finding, Level};
use crate::{
    bus::provision::{Definition, Verdict, is_mirror, metadata, plan_stream, regions_of},
    model::Region,
    subject::{EPOCH_METADATA, PARTITIONS_METADATA},
};

/// Of a limit, in percent.
const NEAR: u64 = 80;

/// Messages that a mirror or a replica may be behind before it is worth a word.
const BEHIND: u64 = 1000;

/// A mirror hears of its origin every second or so. After 10 s of silence the server asks anew by itself, so this is more.
const SILENT: Duration = Duration::from_secs(30);

const PROVISION: &str = "natter provision";

fn number(value: &Value, path: &str) -> Option<u64> {
    value.pointer(path)?.as_u64()
}

fn config(info: &Value) -> Option<&Map<String, Value>> {
    info.get("config")?.as_object()
}

/// How much of the account's storage is used.
pub(super) fn account(account: &Value) -> Option<Finding> {
    let used = number(account, "/storage")?;
    let limit = number(account, "/limits/max_storage").filter(|limit| *limit > 0)?;
    is_near(used, limit).then(|| {
        Finding::new(
            Level::Problem,
            Check::Limit,
            format!(
                "the account holds {} of the {} that it may: at the end publishes fail with stream_full",
                bytesize::ByteSize(used),
                bytesize::ByteSize(limit)
            ),
            "raise the account's limit, or lower streams.max_age or streams.max_bytes",
        )
    })
}

/// A region's own stream.
pub(super) fn own(definition: &Definition, info: &Value) -> Vec<Finding> {
    let mut findings = as_defined(definition, info);
    let wants_epoch = metadata(&definition.config, EPOCH_METADATA).is_some();
    let epoch = config(info).and_then(|config| metadata(config, EPOCH_METADATA));
    if wants_epoch && epoch.is_none() {
        findings.push(Finding::new(
            Level::Problem,
            Check::Stream,
            format!("has no metadata {EPOCH_METADATA}: cursors can't say to which incarnation they belong, and edges wait"),
            PROVISION,
        ));
    }
    findings
}

/// A mirror; `origin` is what the stream it is of tells, where that could be asked.
pub(super) fn mirror(
    definition: &Definition,
    info: &Value,
    origin: Option<&Value>,
) -> Vec<Finding> {
    let mut findings = as_defined(definition, info);
    if !config(info).is_some_and(is_mirror) {
        // All else follows from that.
        return findings;
    }
    let from = definition.origin();
    if let Some(error) = info.pointer("/mirror/error") {
        let text = error.get("description").and_then(Value::as_str);
        findings.push(Finding::new(
            Level::Problem,
            Check::Mirror,
            format!("stands still: {}", text.unwrap_or("no reason given")),
            format!("see whether the stream is there in {from}, and whether the account may read it from here"),
        ));
    }
    // Without an origin that answers, silence is what there must be.
    let Some(origin) = origin else {
        return findings;
    };
    let epoch = |info| config(info).and_then(|config| metadata(config, EPOCH_METADATA));
    if epoch(info) != epoch(origin) {
        findings.push(Finding::new(
            Level::Problem,
            Check::Mirror,
            format!(
                "has the epoch {}, and its origin in {from} {}: that began anew, and nothing new comes here",
                epoch(info).unwrap_or("unset"),
                epoch(origin).unwrap_or("unset")
            ),
            "natter provision --allow-destructive replaces it; what only it holds is lost",
        ));
        return findings;
    }
    if is_ahead(info, origin) {
        findings.push(Finding::new(
            Level::Problem,
            Check::Mirror,
            format!(
                "is ahead of its origin ({} and {}): the store in {from} was set back, and nothing new comes here until it has caught up",
                last(info),
                last(origin)
            ),
            format!("delete the mirror here (nats stream rm), then natter provision --region {from}"),
        ));
        return findings;
    }
    let silent = info
        .pointer("/mirror/active")
        .and_then(Value::as_i64)
        .unwrap_or(-1);
    match u64::try_from(silent).map(Duration::from_nanos) {
        Ok(silent) if silent < SILENT => {}
        silent => findings.push(Finding::new(
            Level::Problem,
            Check::Mirror,
            match silent {
                Ok(silent) => format!("has heard nothing of its origin for {} s", silent.as_secs()),
                Err(_never) => "has never heard of its origin".to_owned(),
            },
            format!("{from} answers from here, so see whether it may send to here: the account's permissions, and the log of the server that leads the mirror"),
        )),
    }
    let told = number(info, "/mirror/lag").unwrap_or(0);
    let lag = told.max(last(origin).saturating_sub(last(info)));
    if lag >= BEHIND {
        findings.push(Finding::new(
            Level::Warning,
            Check::Mirror,
            format!("is {lag} messages behind: what is said in {from} comes late here"),
            "wait, if it was cut off or is new; else see whether the link carries what is published",
        ));
    }
    findings
}

fn last(info: &Value) -> u64 {
    number(info, "/state/last_seq").unwrap_or(0)
}

/// Whether a mirror holds what its origin, asked before it, had not.
pub(super) fn is_ahead(mirror: &Value, origin: &Value) -> bool {
    last(mirror) > last(origin)
}

/// Whether a region's stream of rooms names the regions that are there: `complete` have all their mirrors.
pub(super) fn regions(
    info: &Value,
    complete: &BTreeSet<Region>,
    mesh: &BTreeSet<Region>,
) -> Vec<Finding> {
    let named = config(info).map(regions_of).unwrap_or_default();
    let unnamed = complete.difference(&named).map(|region| {
        Finding::new(
            Level::Problem,
            Check::Mirror,
            format!("does not name {region}, which is there: edges here show nothing of it"),
            format!("natter provision --region {region}"),
        )
    });
    let unknown = named.difference(mesh).map(|region| {
        Finding::new(
            Level::Warning,
            Check::Region,
            format!("names {region}, of which the region one is connected to knows nothing"),
            format!("natter provision --region {region}, or --remove-region {region}"),
        )
    });
    unnamed.chain(unknown).collect()
}

/// What differs from the definition, how full it is, and the state of its copies.
fn as_defined(definition: &Definition, info: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Some(existing) = config(info) else {
        return findings;
    };
    let mut definition = definition.clone();
    // Epochs and regions have checks of their own.
    if let Some(Value::Object(wanted)) = definition.config.remove("metadata")
        && let Some(wanted) = wanted.get(PARTITIONS_METADATA).and_then(Value::as_str)
        && metadata(existing, PARTITIONS_METADATA).is_none_or(|have| have != wanted)
    {
        findings.push(Finding::new(
            Level::Problem,
            Check::Stream,
            format!(
                "was made for {} partitions, and nats.partitions is {wanted}: rooms would be in other streams",
                metadata(existing, PARTITIONS_METADATA).unwrap_or("an unknown number of")
            ),
            "set nats.partitions to what the mesh was made with",
        ));
    }
    let (outcome, _) = plan_stream(&definition, existing, false);
    for change in outcome.changes {
        let (field, old, new) = (&change.field, &change.old, &change.new);
        let finding = match field.as_str() {
            "republish" => Finding::new(
                Level::Problem,
                Check::Stream,
                format!("RePublish is {old}, and must be {new}: edges are not told of what is stored"),
                PROVISION,
            ),
            "allow_direct" => Finding::new(
                Level::Problem,
                Check::Stream,
                "allows no direct gets: edges can't read it".to_owned(),
                PROVISION,
            ),
            "mirror" => Finding::new(
                Level::Problem,
                Check::Mirror,
                format!("mirror is {old}, and must be {new}: what it should hold does not come here"),
                "if nothing in it is needed, delete it (nats stream rm), then natter provision",
            ),
            "num_replicas" => replicas(&definition, existing),
            _ => Finding::new(
                Level::Warning,
                Check::Stream,
                format!("{field} is {old}, and {new} in the configuration"),
                match change.verdict {
                    Verdict::Apply => PROVISION.to_owned(),
                    Verdict::Destructive(harm) => {
                        format!("natter provision --allow-destructive ({harm}), or change the configuration")
                    }
                    Verdict::Fixed => "it can't be changed on an existing stream; change the configuration, or make the stream anew".to_owned(),
                },
            ),
        };
        findings.push(finding);
    }
    findings.extend(limits(existing, info));
    findings.extend(copies(info));
    findings
}

fn replicas(definition: &Definition, existing: &Map<String, Value>) -> Finding {
    let of = |config: &Map<String, Value>| {
        config
            .get("num_replicas")
            .and_then(Value::as_u64)
            .unwrap_or(1)
    };
    let (have, wanted) = (of(existing), of(&definition.config));
    if have < wanted {
        Finding::new(
            Level::Problem,
            Check::Replicas,
            format!(
                "has {have} of {wanted} copies (streams.replicas): what it holds is gone with {have} disk{}",
                if have == 1 { "" } else { "s" }
            ),
            "natter provision adds the others, where the cluster has as many servers",
        )
    } else {
        Finding::new(
            Level::Warning,
            Check::Replicas,
            format!("has {have} copies, and streams.replicas is {wanted}"),
            "natter provision --allow-destructive gives the others up, or change the configuration",
        )
    }
}

fn is_near(used: u64, limit: u64) -> bool {
    u128::from(used) * 100 >= u128::from(limit) * u128::from(NEAR)
}

fn limits(existing: &Map<String, Value>, info: &Value) -> Vec<Finding> {
    let drops_old = existing.get("discard").and_then(Value::as_str) != Some("new");
    let (consequence, advice) = if drops_old {
        (
            "the oldest messages go, and who comes back after that gets reset",
            "raise streams.max_bytes, or let it be if that is what you want",
        )
    } else {
        ("it takes no more when it is full", "raise its limit")
    };
    let checked = [
        ("max_bytes", "/state/bytes"),
        ("max_msgs", "/state/messages"),
    ];
    let near = checked.into_iter().filter_map(|(field, state)| {
        let limit = existing.get(field)?.as_u64().filter(|limit| *limit > 0)?;
        let used = number(info, state)?;
        // A number of percent, rounded down; what is stored may be a little above the limit.
        let percent = u128::from(used) * 100 / u128::from(limit);
        is_near(used, limit).then(|| {
            Finding::new(
                Level::Warning,
                Check::Limit,
                format!("is at {percent} % of its {field}: {consequence}"),
                advice,
            )
        })
    });
    near.collect()
}

/// The state of a replicated stream's group.
fn copies(info: &Value) -> Vec<Finding> {
    let replicated = number(info, "/config/num_replicas").is_some_and(|n| n > 1);
    let Some(cluster) = info.get("cluster").filter(|_| replicated) else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    let leader = cluster
        .get("leader")
        .and_then(Value::as_str)
        .unwrap_or_default();
    if leader.is_empty() {
        findings.push(Finding::new(
            Level::Problem,
            Check::Replicas,
            "has no leader: publishes fail".to_owned(),
            "see how many of its servers run: more than half must",
        ));
    }
    let peers = cluster.get("replicas").and_then(Value::as_array);
    for peer in peers.into_iter().flatten() {
        let name = peer
            .get("name")
            .and_then(Value::as_str)
            .unwrap_or("a server");
        let is = |field| peer.get(field).and_then(Value::as_bool).unwrap_or(false);
        let lag = number(peer, "/lag").unwrap_or(0);
        if is("offline") {
            findings.push(Finding::new(
                Level::Problem,
                Check::Replicas,
                format!("its copy on {name} is offline"),
                "start that server, or give its place to another (nats server cluster peer-remove)",
            ));
        } else if !is("current") || lag >= BEHIND {
            findings.push(Finding::new(
                Level::Warning,
                Check::Replicas,
                format!("its copy on {name} is behind by {lag} operations"),
                "wait, if that server was restarted; else see its disk and its network",
            ));
        }
    }
    findings
}
