//! What only the system account is told: whether writes are synced, gateways, the clock of each server.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use async_nats::Client;
use futures_util::StreamExt as _;
use serde_json::Value;
use tokio::time::timeout;

use super::{Check, Finding, Level, ahead, clock};
use crate::{bus::provision::connect, config::Config, subject::api};

/// How long the first server may take to answer, over gateways too.
const FIRST: Duration = Duration::from_secs(3);

/// Nobody says how many servers there are: they have all answered when none did for this long.
const QUIET: Duration = Duration::from_millis(500);

/// All servers that the system account reaches: how many, and what is wrong.
pub(super) async fn examine(config: &Config) -> (usize, Vec<Finding>) {
    let doctor = &config.doctor;
    if doctor.sys_user.is_empty() {
        let unchecked = Finding::new(
            Level::Note,
            Check::Durability,
            "not looked at: sync_interval, gateways and the clock of each server, which only the system account is told".to_owned(),
            "name a user of it: --sys-user, --sys-password (doctor.sys_user, doctor.sys_password)",
        );
        return (0, vec![unchecked]);
    }
    let mut nats = config.nats.clone();
    nats.user.clone_from(&doctor.sys_user);
    nats.password = doctor.sys_password.clone();
    nats.creds_file.clear();
    if !doctor.sys_url.is_empty() {
        nats.url.clone_from(&doctor.sys_url);
    }
    let refused = |what: String| {
        let advice = "see doctor.sys_url, doctor.sys_user and doctor.sys_password";
        Finding::new(Level::Problem, Check::Durability, what, advice)
    };
    let client = match connect(&nats).await {
        Ok(client) => client,
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            let what = format!(
                "as user of the system account: {error}{}",
                cause.unwrap_or_default()
            );
            return (0, vec![refused(what)]);
        }
    };
    let asked = SystemTime::now();
    let servers = match ask(&client, "VARZ").await {
        Ok(servers) if servers.is_empty() => {
            let what = format!(
                "no server answers {} as it answers the system account",
                doctor.sys_user
            );
            return (0, vec![refused(what)]);
        }
        Ok(servers) => servers,
        Err(error) => return (0, vec![refused(error)]),
    };
    let gateways = ask(&client, "GATEWAYZ").await.unwrap_or_default();
    let durable = config
        .namespaces
        .values()
        .any(|namespace| namespace.durable);
    let mut findings = Vec::new();
    for (id, (took, varz)) in &servers {
        let found = [
            durable
                .then(|| sync(varz, config.streams.replicas))
                .flatten(),
            server_clock(varz, asked, *took),
        ];
        findings.extend(found.into_iter().flatten().map(|f| placed(f, varz)));
        let gatewayz = gateways.get(id).map(|(_, gatewayz)| gatewayz);
        findings.extend(links(varz, gatewayz).into_iter().map(|f| placed(f, varz)));
    }
    (servers.len(), findings)
}

/// With the region, which is the server's JetStream domain.
fn placed(mut finding: Finding, varz: &Value) -> Finding {
    let domain = varz.pointer("/server/domain").and_then(Value::as_str);
    finding.region = domain.map(str::to_owned);
    finding
}

fn name(varz: &Value) -> &str {
    let name = varz.pointer("/server/name").and_then(Value::as_str);
    name.unwrap_or("a server")
}

/// The answers of all servers by their ids, each with the time it took.
async fn ask(client: &Client, what: &str) -> Result<BTreeMap<String, (Duration, Value)>, String> {
    let failed = |error: &dyn std::error::Error| format!("{}{what}: {error}", api::PING_SERVERS);
    let inbox = client.new_inbox();
    let mut answers = client
        .subscribe(inbox.clone())
        .await
        .map_err(|e| failed(&e))?;
    let started = tokio::time::Instant::now();
    let subject = format!("{}{what}", api::PING_SERVERS);
    client
        .publish_with_reply(subject, inbox, "".into())
        .await
        .map_err(|e| failed(&e))?;
    let mut servers = BTreeMap::new();
    let mut patience = FIRST;
    while let Ok(Some(answer)) = timeout(patience, answers.next()).await {
        patience = QUIET;
        // "No responders" is empty.
        let Ok(answer) = serde_json::from_slice::<Value>(&answer.payload) else {
            continue;
        };
        if let Some(id) = answer.pointer("/server/id").and_then(Value::as_str) {
            servers.insert(id.to_owned(), (started.elapsed(), answer));
        }
    }
    Ok(servers)
}

/// Whether an acknowledged message is on the disk.
fn sync(varz: &Value, replicas: usize) -> Option<Finding> {
    let config = varz.pointer("/data/jetstream/config")?;
    if config.get("sync_always").and_then(Value::as_bool) == Some(true) {
        return None;
    }
    let interval = config
        .get("sync_interval")
        .and_then(Value::as_u64)
        .unwrap_or(0);
    let interval = humantime::format_duration(Duration::from_nanos(interval));
    let advice = "set jetstream { sync_interval: always } where that must not be; it costs about four fifths of the throughput";
    Some(if replicas == 1 {
        Finding::new(
            Level::Warning,
            Check::Durability,
            format!(
                "{}: sync_interval is {interval} and streams have one copy: a power loss loses what was acknowledged in that time",
                name(varz)
            ),
            advice,
        )
    } else {
        Finding::new(
            Level::Note,
            Check::Durability,
            format!(
                "{}: sync_interval is {interval}: a power loss of most copies at once loses what was acknowledged in that time",
                name(varz)
            ),
            advice,
        )
    })
}

fn server_clock(varz: &Value, asked: SystemTime, took: Duration) -> Option<Finding> {
    let told = varz.pointer("/data/now").and_then(Value::as_str)?;
    let half = took.as_secs_f64() / 2.0;
    let mut finding = clock(ahead(told, asked)? - half, half)?;
    finding.what = format!("{}: {}", name(varz), finding.what);
    Some(finding)
}

/// Gateways that the server is told of and has no connection to.
fn links(varz: &Value, gatewayz: Option<&Value>) -> Vec<Finding> {
    let own = varz.pointer("/data/gateway/name").and_then(Value::as_str);
    let told = varz
        .pointer("/data/gateway/gateways")
        .and_then(Value::as_array);
    let connected = gatewayz.and_then(|z| z.pointer("/data/outbound_gateways")?.as_object());
    let names = told
        .into_iter()
        .flatten()
        .filter_map(|gateway| gateway.get("name").and_then(Value::as_str));
    names
        .filter(|name| Some(*name) != own)
        .filter(|name| !connected.is_some_and(|connected| connected.contains_key(*name)))
        .map(|gateway| {
            Finding::new(
                Level::Problem,
                Check::Gateway,
                format!(
                    "{}: no connection to the gateway {gateway}: nothing comes from there",
                    name(varz)
                ),
                "see whether that spine runs, and whether its gateway port is reached from here",
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// As nats-server 2.15.1 answers: VARZ names all gateways that it is told of, GATEWAYZ those it has.
    #[test]
    fn a_gateway_without_a_connection_is_named() {
        let varz = json!({
            "server": { "name": "spine1" },
            "data": { "gateway": { "name": "g1", "gateways": [{ "name": "g1" }, { "name": "g2" }] } }
        });
        let with = |outbound: Value| json!({ "data": { "outbound_gateways": outbound } });
        assert_eq!(links(&varz, Some(&with(json!({ "g2": {} })))), []);
        let down = links(&varz, Some(&with(json!({}))));
        assert_eq!(down.len(), 1);
        assert!(down[0].what.contains("gateway g2"), "{down:?}");
        assert_eq!(links(&json!({ "data": { "gateway": {} } }), None), []);
    }

    #[test]
    fn a_clock_is_wrong_by_more_than_a_second_and_what_the_way_took() {
        assert_eq!(clock(0.9, 0.0), None);
        assert_eq!(clock(-1.4, 0.5), None);
        let behind = clock(-2.5, 0.5).unwrap();
        assert!(behind.what.contains("2.5 s behind"), "{behind:?}");
        let now = SystemTime::now();
        let told = humantime::format_rfc3339_nanos(now + Duration::from_secs(7)).to_string();
        let varz = json!({ "server": { "name": "s1" }, "data": { "now": told } });
        let wrong = server_clock(&varz, now, Duration::from_millis(20)).unwrap();
        assert!(
            wrong.what.contains("s1: ") && wrong.what.contains("7.0 s ahead"),
            "{wrong:?}"
        );
    }
}
