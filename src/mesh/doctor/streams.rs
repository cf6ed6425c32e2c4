//! What is wrong with one stream, according to its own report. Does no I/O.

use std::{collections::BTreeSet, time::Duration};

use serde_json::{Map, Value};

use super::{Check, Finding, Level};
use crate::{
    mesh::provision::{Definition, Verdict, is_mirror, metadata, plan_stream, regions_of},
    model::Region,
    subject::{EPOCH_METADATA, PARTITIONS_METADATA},
};

/// Percentage of a limit that is reported.
const NEAR: u64 = 80;

/// Messages that a mirror or a replica may lag behind without being reported.
const BEHIND: u64 = 1000;

/// A mirror hears from its origin about every second. After 10 s of silence the server retries by itself, so this is
/// longer.
const SILENT: Duration = Duration::from_secs(30);

/// The leader of a replicated stream hears from each replica about every second.
const SILENT_COPY: Duration = Duration::from_secs(10);

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
                "the account holds {} of at most {}: when it is full, publishes fail with stream_full",
                bytesize::ByteSize(used),
                bytesize::ByteSize(limit)
            ),
            "raise the account's limit, or lower streams.max_age or streams.max_bytes",
        )
    })
}

/// Checks a region's own stream.
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

/// Checks a mirror. `origin` is the report of the mirrored stream, if it could be asked.
pub(super) fn mirror(
    definition: &Definition,
    info: &Value,
    origin: Option<&Value>,
) -> Vec<Finding> {
    let mut findings = as_defined(definition, info);
    if !config(info).is_some_and(is_mirror) {
        // All other problems follow from this one.
        return findings;
    }
    let from = definition.origin();
    if let Some(error) = info.pointer("/mirror/error") {
        let text = error.get("description").and_then(Value::as_str);
        findings.push(Finding::new(
            Level::Problem,
            Check::Mirror,
            format!("is stalled: {}", text.unwrap_or("no reason given")),
            format!("check whether the stream exists in {from}, and whether the account may read it from here"),
        ));
    }
    // While the origin does not answer, a silent mirror is normal.
    let Some(origin) = origin else {
        return findings;
    };
    let epoch = |info| config(info).and_then(|config| metadata(config, EPOCH_METADATA));
    if epoch(info) != epoch(origin) {
        findings.push(Finding::new(
            Level::Problem,
            Check::Mirror,
            format!(
                "has the epoch {}, but its origin in {from} has {}: the origin was re-created, and nothing new arrives here",
                epoch(info).unwrap_or("unset"),
                epoch(origin).unwrap_or("unset")
            ),
            "natter provision --allow-destructive replaces it; what only the mirror holds is lost",
        ));
        return findings;
    }
    if is_ahead(info, origin) {
        findings.push(Finding::new(
            Level::Problem,
            Check::Mirror,
            format!(
                "is ahead of its origin ({} and {}): the store in {from} was reset to an older state, and nothing new arrives here until the origin has caught up",
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
        Err(_never) if age(info).is_some_and(|age| age < SILENT) => findings.push(Finding::new(
            Level::Note,
            Check::Mirror,
            "is new and has not heard from its origin yet".to_owned(),
            "run natter doctor again in half a minute",
        )),
        silent => findings.push(Finding::new(
            Level::Problem,
            Check::Mirror,
            match silent {
                Ok(silent) => format!("has heard nothing from its origin for {} s", silent.as_secs()),
                Err(_never) => "has never heard from its origin".to_owned(),
            },
            format!("{from} answers requests from here, so check whether it may send here: the account's permissions, and the log of the server that leads the mirror"),
        )),
    }
    let told = number(info, "/mirror/lag").unwrap_or(0);
    let lag = told.max(last(origin).saturating_sub(last(info)));
    if lag >= BEHIND {
        findings.push(Finding::new(
            Level::Warning,
            Check::Mirror,
            format!("is {lag} messages behind: messages of {from} arrive late here"),
            "wait, if it was cut off or is new; otherwise check whether the link is fast enough",
        ));
    }
    findings
}

/// The age of the stream, by the server's clock.
fn age(info: &Value) -> Option<Duration> {
    let time = |field| humantime::parse_rfc3339_weak(info.get(field)?.as_str()?).ok();
    time("ts")?.duration_since(time("created")?).ok()
}

fn last(info: &Value) -> u64 {
    number(info, "/state/last_seq").unwrap_or(0)
}

/// Whether a mirror holds more than its origin, which was asked before it.
pub(super) fn is_ahead(mirror: &Value, origin: &Value) -> bool {
    last(mirror) > last(origin)
}

/// Whether a region's room stream names the right regions: those in `complete`, which have all their mirrors.
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
            format!("does not name {region}, which is mirrored: edges here show nothing of it"),
            format!("natter provision --region {region}"),
        )
    });
    let unknown = named.difference(mesh).map(|region| {
        Finding::new(
            Level::Warning,
            Check::Region,
            format!("names {region}, which the connected region does not know"),
            format!("natter provision --region {region}, or --remove-region {region}"),
        )
    });
    unnamed.chain(unknown).collect()
}

/// Checks the differences from the definition, how full the stream is, and the state of its replicas.
fn as_defined(definition: &Definition, info: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Some(existing) = config(info) else {
        return findings;
    };
    let mut definition = definition.clone();
    // Epochs and regions are checked separately.
    if let Some(Value::Object(wanted)) = definition.config.remove("metadata")
        && let Some(wanted) = wanted.get(PARTITIONS_METADATA).and_then(Value::as_str)
        && metadata(existing, PARTITIONS_METADATA).is_none_or(|have| have != wanted)
    {
        findings.push(Finding::new(
            Level::Problem,
            Check::Stream,
            format!(
                "was created for {} partitions, but nats.partitions is {wanted}: rooms would be in other streams",
                metadata(existing, PARTITIONS_METADATA).unwrap_or("an unknown number of")
            ),
            "set nats.partitions to the number that the mesh was created with",
        ));
    }
    let (outcome, _) = plan_stream(&definition, existing, false);
    for change in outcome.changes {
        let (field, old, new) = (&change.field, &change.old, &change.new);
        let finding = match field.as_str() {
            "republish" => Finding::new(
                Level::Problem,
                Check::Stream,
                format!("RePublish is {old}, but must be {new}: edges do not receive what is stored"),
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
                format!("mirror is {old}, but must be {new}: what it should hold does not arrive here"),
                "if nothing in it is needed, delete it (nats stream rm), then natter provision",
            ),
            "num_replicas" => replicas(&definition, existing),
            _ => Finding::new(
                Level::Warning,
                Check::Stream,
                format!("{field} is {old}, but {new} in the configuration"),
                match change.verdict {
                    Verdict::Apply => PROVISION.to_owned(),
                    Verdict::Destructive(harm) => {
                        format!("natter provision --allow-destructive ({harm}), or change the configuration")
                    }
                    Verdict::Fixed => "it can't be changed on an existing stream; change the configuration, or re-create the stream".to_owned(),
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
                "has {have} of {wanted} copies (streams.replicas): what it holds is lost with {have} disk{}",
                if have == 1 { "" } else { "s" }
            ),
            "natter provision adds the others, if the cluster has enough servers",
        )
    } else {
        Finding::new(
            Level::Warning,
            Check::Replicas,
            format!("has {have} copies, but streams.replicas is {wanted}"),
            "natter provision --allow-destructive removes the others; or change the configuration",
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
            "the oldest messages are dropped, and clients that come back after that get reset",
            "raise streams.max_bytes, or leave it if that is intended",
        )
    } else {
        ("it accepts nothing more when it is full", "raise its limit")
    };
    let checked = [
        ("max_bytes", "/state/bytes"),
        ("max_msgs", "/state/messages"),
    ];
    let near = checked.into_iter().filter_map(|(field, state)| {
        let limit = existing.get(field)?.as_u64().filter(|limit| *limit > 0)?;
        let used = number(info, state)?;
        // A percentage, rounded down. The stored amount may be slightly above the limit.
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
            "check how many of its servers run: more than half must",
        ));
        // Without a leader the state of the others is not known.
        return findings;
    }
    let peers = cluster.get("replicas").and_then(Value::as_array);
    for peer in peers.into_iter().flatten() {
        let name = peer
            .get("name")
            .and_then(Value::as_str)
            .unwrap_or("a server");
        let is = |field| peer.get(field).and_then(Value::as_bool).unwrap_or(false);
        let current = is("current");
        // Time since the leader heard from it. A leader that was elected after the replica went away reports 0.
        let active = Duration::from_nanos(number(peer, "/active").unwrap_or(0));
        let silent = active > SILENT_COPY || (active.is_zero() && !current);
        let lag = number(peer, "/lag").unwrap_or(0);
        if is("offline") || silent {
            findings.push(Finding::new(
                Level::Problem,
                Check::Replicas,
                format!("its copy on {name} is out of service: the server is down or cut off"),
                "start that server, or replace it by another (nats server cluster peer-remove)",
            ));
        } else if !current || lag >= BEHIND {
            findings.push(Finding::new(
                Level::Warning,
                Check::Replicas,
                format!("its copy on {name} is behind by {lag} operations"),
                "wait, if that server was restarted; otherwise check its disk and its network",
            ));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format, Toml};
    use serde_json::json;

    use super::*;
    use crate::{config::Config, mesh::provision::definitions, subject::Subjects};

    fn rooms(replicas: u64) -> Definition {
        let toml = format!("region = 'seoul'\n[streams]\nreplicas = {replicas}");
        let config = Config::with_defaults(Toml::string(&toml)).unwrap();
        definitions(&config, &config.region()).swap_remove(0)
    }

    fn mirrored() -> Definition {
        let frankfurt = Region::parse("frankfurt").unwrap();
        rooms(1)
            .mirror_in(&frankfurt, &Subjects::new("natter"))
            .unwrap()
    }

    fn info(definition: &Definition, state: Value, more: Value) -> Value {
        let mut info = json!({ "config": definition.config, "state": state });
        if let (Some(info), Value::Object(more)) = (info.as_object_mut(), more) {
            info.extend(more);
        }
        info
    }

    fn told(findings: &[Finding]) -> Vec<(Level, &str)> {
        findings
            .iter()
            .map(|f| (f.level, f.what.as_str()))
            .collect()
    }

    fn only(findings: &[Finding], level: Level, text: &str) {
        let told = told(findings);
        assert!(
            matches!(told[..], [(l, what)] if l == level && what.contains(text)),
            "{told:?}, not {level:?} {text:?}"
        );
    }

    #[test]
    fn a_mirror_is_judged_by_its_silence_its_lag_and_what_its_origin_holds() {
        let definition = mirrored();
        let origin = info(&rooms(1), json!({ "last_seq": 5000 }), json!({}));
        let of = |last: u64, mirror: Value| {
            let here = info(
                &definition,
                json!({ "last_seq": last }),
                json!({ "mirror": mirror }),
            );
            super::mirror(&definition, &here, Some(&origin))
        };
        let fresh = json!({ "lag": 0, "active": 146_777 });
        assert_eq!(told(&of(5000, fresh.clone())), []);
        assert_eq!(told(&of(4990, fresh.clone())), []);
        // The reported lag is as old as the last message from the origin.
        only(
            &of(3000, fresh.clone()),
            Level::Warning,
            "2000 messages behind",
        );
        let late = json!({ "lag": 1234, "active": 146_777 });
        only(&of(5000, late), Level::Warning, "1234 messages behind");
        let silent = json!({ "lag": 0, "active": 35_000_000_000_u64 });
        only(
            &of(5000, silent),
            Level::Problem,
            "nothing from its origin for 35 s",
        );
        only(
            &of(5000, json!({ "active": -1 })),
            Level::Problem,
            "never heard",
        );
        let here = info(
            &definition,
            json!({ "last_seq": 0 }),
            json!({
                "created": "2026-11-24T14:35:04.259058021Z",
                "ts": "2026-11-24T14:35:07.26676104Z",
                "mirror": { "active": -1 }
            }),
        );
        let empty = info(&rooms(1), json!({}), json!({}));
        only(
            &super::mirror(&definition, &here, Some(&empty)),
            Level::Note,
            "is new",
        );
        only(
            &of(5001, fresh.clone()),
            Level::Problem,
            "ahead of its origin",
        );
        let failed =
            json!({ "lag": 0, "active": 1, "error": { "description": "stream not found" } });
        only(
            &of(5000, failed),
            Level::Problem,
            "is stalled: stream not found",
        );
        // The origin's region is away, which is reported once: the silence is not a further finding.
        let here = info(
            &definition,
            json!({}),
            json!({ "mirror": { "active": -1 } }),
        );
        assert_eq!(told(&super::mirror(&definition, &here, None)), []);
        // Another epoch.
        let mut anew = origin.clone();
        anew["config"]["metadata"][EPOCH_METADATA] = json!("k9");
        let here = info(
            &definition,
            json!({ "last_seq": 9000 }),
            json!({ "mirror": fresh }),
        );
        only(
            &super::mirror(&definition, &here, Some(&anew)),
            Level::Problem,
            "was re-created",
        );
    }

    #[test]
    fn copies_are_counted_and_their_state_is_told() {
        let three = rooms(3);
        let one = info(&rooms(1), json!({}), json!({}));
        only(&own(&three, &one), Level::Problem, "has 1 of 3 copies");
        let with = |cluster: Value| {
            let here = info(&three, json!({}), json!({ "cluster": cluster }));
            own(&three, &here)
        };
        let peers = |peer: Value| json!({ "leader": "c1", "replicas": [peer, { "name": "c2", "current": true, "active": 500_000_000 }] });
        assert_eq!(
            told(&with(peers(
                json!({ "name": "c3", "current": true, "active": 900_000_000 })
            ))),
            []
        );
        // As nats-server 2.15.1 reports a killed server, before and after the election of a new leader.
        for dead in [
            json!({ "name": "c3", "current": false, "active": 0, "lag": 3 }),
            json!({ "name": "c3", "current": true, "active": 25_000_000_000_u64 }),
            json!({ "name": "c3", "current": false, "offline": true, "active": 1 }),
        ] {
            only(
                &with(peers(dead)),
                Level::Problem,
                "copy on c3 is out of service",
            );
        }
        let behind = json!({ "name": "c3", "current": false, "active": 1, "lag": 7 });
        only(&with(peers(behind)), Level::Warning, "behind by 7");
        let none = json!({ "replicas": [{ "name": "c1", "current": false }] });
        only(&with(none), Level::Problem, "no leader");
    }

    #[test]
    fn limits_are_told_from_four_fifths_on() {
        let mut definition = rooms(1);
        definition.config["max_bytes"] = json!(1000);
        let at = |bytes: u64| {
            own(
                &definition,
                &info(&definition, json!({ "bytes": bytes }), json!({})),
            )
        };
        assert_eq!(told(&at(799)), []);
        only(&at(800), Level::Warning, "80 % of its max_bytes");
        let account = |used: u64, limit: i64| {
            super::account(&json!({ "storage": used, "limits": { "max_storage": limit } }))
        };
        assert_eq!(account(1 << 40, -1), None);
        assert!(account(80, 100).is_some() && account(79, 100).is_none());
    }

    #[test]
    fn a_stream_names_the_regions_whose_mirrors_are_there() {
        let named = |names: &[&str]| -> BTreeSet<Region> {
            names
                .iter()
                .filter_map(|name| Region::parse(name))
                .collect()
        };
        let info = json!({ "config": { "metadata": { "natter.regions": "seoul,virginia" } } });
        let both = named(&["seoul", "virginia"]);
        assert_eq!(super::regions(&info, &both, &both), []);
        let all = named(&["frankfurt", "seoul", "virginia"]);
        only(
            &super::regions(&info, &all, &all),
            Level::Problem,
            "does not name frankfurt",
        );
        // A region whose mirrors are missing must not be named; the missing mirrors are reported instead.
        assert_eq!(super::regions(&info, &both, &all), []);
        let alone = named(&["seoul"]);
        only(
            &super::regions(&info, &alone, &alone),
            Level::Warning,
            "names virginia",
        );
    }
}
