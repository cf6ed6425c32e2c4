//! Checks that need the system account: whether writes are synced, gateways, and the clock of each server.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use async_nats::{Client, Message};
use futures_util::{Stream, StreamExt as _};
use serde_json::Value;
use tokio::time::timeout;

use super::{Check, Finding, Level, ahead, clock};
use crate::{config::Config, mesh::provision::connect, model::Region, subject::api};

/// Timeout for the first answer, which may come over gateways.
const FIRST: Duration = Duration::from_secs(3);

/// The number of servers is not known. Those of one region count as complete after this time without a further answer.
const QUIET: Duration = Duration::from_millis(500);

/// The answers of servers by their ids, each with the time it took.
type Answers = BTreeMap<String, (Duration, Value)>;

/// Examines all servers that the system account reaches. Returns their number and the findings.
pub(super) async fn examine(config: &Config, regions: &BTreeSet<Region>) -> (usize, Vec<Finding>) {
    let doctor = &config.doctor;
    if doctor.sys_user.is_empty() {
        let unchecked = Finding::new(
            Level::Note,
            Check::Durability,
            "not examined: sync_interval, gateways and the clock of each server, which only the system account can see".to_owned(),
            "name a user of that account: --sys-user, --sys-password (doctor.sys_user, doctor.sys_password)",
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
    // Servers of other regions may answer as late as the first one.
    let quiet = if regions.len() > 1 { FIRST } else { QUIET };
    let asked = SystemTime::now();
    let servers = match ask(&client, "VARZ", quiet).await {
        Ok(servers) if servers.is_empty() => {
            let what = format!(
                "no server answers {} with the reports of the system account",
                doctor.sys_user
            );
            return (0, vec![refused(what)]);
        }
        Ok(servers) => servers,
        Err(error) => return (0, vec![refused(error)]),
    };
    let gateways = ask(&client, "GATEWAYZ", quiet).await.unwrap_or_default();
    let durable = config
        .namespaces
        .values()
        .any(|namespace| namespace.durable);
    let mut findings = unheard(&servers, regions);
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

/// Adds the region, which is the server's JetStream domain.
fn placed(mut finding: Finding, varz: &Value) -> Finding {
    let domain = varz.pointer("/server/domain").and_then(Value::as_str);
    finding.region = domain.map(str::to_owned);
    finding
}

fn name(varz: &Value) -> &str {
    let name = varz.pointer("/server/name").and_then(Value::as_str);
    name.unwrap_or("a server")
}

/// The regions of a mesh of which no server with JetStream has answered.
fn unheard(servers: &Answers, regions: &BTreeSet<Region>) -> Vec<Finding> {
    let heard: BTreeSet<&str> = servers
        .values()
        .filter_map(|(_, varz)| varz.pointer("/server/domain")?.as_str())
        .collect();
    // In a mesh of one region, servers need no domain.
    let regions = regions.iter().filter(|_| regions.len() > 1);
    let unheard = regions.filter(|region| !heard.contains(region.as_str()));
    let note = |region| {
        Finding::new(
            Level::Note,
            Check::Durability,
            "not examined: sync_interval and the clocks of its servers: none of them answers this system account".to_owned(),
            "run natter doctor with that region as region too",
        )
        .at(region)
    };
    unheard.map(note).collect()
}

/// The answers of all servers, until none has arrived for `quiet`.
async fn ask(client: &Client, what: &str, quiet: Duration) -> Result<Answers, String> {
    let failed = |error: &dyn std::error::Error| format!("{}{what}: {error}", api::PING_SERVERS);
    let inbox = client.new_inbox();
    let answers = client
        .subscribe(inbox.clone())
        .await
        .map_err(|e| failed(&e))?;
    let subject = format!("{}{what}", api::PING_SERVERS);
    client
        .publish_with_reply(subject, inbox, "".into())
        .await
        .map_err(|e| failed(&e))?;
    Ok(gather(answers, quiet).await)
}

async fn gather(mut answers: impl Stream<Item = Message> + Unpin, quiet: Duration) -> Answers {
    let started = tokio::time::Instant::now();
    let mut servers = Answers::new();
    let mut patience = FIRST;
    while let Ok(Some(answer)) = timeout(patience, answers.next()).await {
        patience = quiet;
        // "No responders" has an empty payload.
        let Ok(answer) = serde_json::from_slice::<Value>(&answer.payload) else {
            continue;
        };
        if let Some(id) = answer.pointer("/server/id").and_then(Value::as_str) {
            servers.insert(id.to_owned(), (started.elapsed(), answer));
        }
    }
    servers
}

/// Whether acknowledged messages are synced to disk.
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
    let advice = "set jetstream { sync_interval: always } if that is not acceptable; it costs about four fifths of the throughput";
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

/// Gateways that the server is configured with but not connected to.
fn links(varz: &Value, gatewayz: Option<&Value>) -> Vec<Finding> {
    let own = varz.pointer("/data/gateway/name").and_then(Value::as_str);
    let told = varz
        .pointer("/data/gateway/gateways")
        .and_then(Value::as_array);
    let names: Vec<&str> = told
        .into_iter()
        .flatten()
        .filter_map(|gateway| gateway.get("name").and_then(Value::as_str))
        .filter(|name| Some(*name) != own)
        .collect();
    let Some(gatewayz) = gatewayz else {
        let unchecked = Finding::new(
            Level::Note,
            Check::Gateway,
            format!(
                "{}: not examined: it did not report its connected gateways",
                name(varz)
            ),
            "run natter doctor again, or with --sys-url of a server that is nearer",
        );
        return (!names.is_empty())
            .then_some(unchecked)
            .into_iter()
            .collect();
    };
    let connected = gatewayz.pointer("/data/outbound_gateways");
    let connected = connected.and_then(Value::as_object);
    names
        .into_iter()
        .filter(|name| !connected.is_some_and(|connected| connected.contains_key(*name)))
        .map(|gateway| {
            Finding::new(
                Level::Problem,
                Check::Gateway,
                format!(
                    "{}: no connection to the gateway {gateway}: nothing arrives from there",
                    name(varz)
                ),
                "check whether that spine runs, and whether its gateway port is reachable from here",
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use serde_json::json;

    use super::*;

    /// As nats-server 2.15.1 answers: VARZ names all configured gateways, GATEWAYZ the connected ones.
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
        // Nothing is known of a server that did not report its gateways.
        let unknown = links(&varz, None);
        assert_eq!(unknown.len(), 1);
        assert_eq!(unknown[0].level, Level::Note, "{unknown:?}");
    }

    fn answer(varz: &Value) -> Message {
        Message {
            subject: "_INBOX.x".into(),
            reply: None,
            payload: varz.to_string().into(),
            headers: None,
            status: None,
            description: None,
            length: 0,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_far_away_is_waited_for() {
        let far = async |quiet| {
            let late = [(10, "near"), (1500, "far"), (9000, "never")];
            let answers = stream::unfold(late.into_iter(), |mut late| async {
                let (ms, id) = late.next()?;
                tokio::time::sleep(Duration::from_millis(ms)).await;
                Some((answer(&json!({ "server": { "id": id } })), late))
            });
            let servers = gather(Box::pin(answers), quiet).await;
            servers.into_keys().collect::<Vec<_>>()
        };
        assert_eq!(far(FIRST).await, ["far", "near"]);
        assert_eq!(far(QUIET).await, ["near"]);
    }

    #[test]
    fn a_region_of_which_no_server_answers_is_named() {
        let varz = json!({ "server": { "name": "seoul-1", "domain": "seoul" } });
        let spine = json!({ "server": { "name": "virginia-spine" } });
        let answers = [("a", varz), ("b", spine)];
        let answers = answers.map(|(id, varz)| (id.to_owned(), (Duration::ZERO, varz)));
        let regions = |names: &[&str]| names.iter().flat_map(|name| Region::parse(name)).collect();
        let named = |answers: &Answers, names: &[&str]| {
            let found = unheard(answers, &regions(names)).into_iter();
            found.map(|f| (f.level, f.region)).collect::<Vec<_>>()
        };
        let note = |region: &str| (Level::Note, Some(region.to_owned()));
        let both = ["seoul", "virginia"];
        assert_eq!(named(&answers.into(), &both), [note("virginia")]);
        assert_eq!(named(&Answers::new(), &["seoul"]), []);
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
