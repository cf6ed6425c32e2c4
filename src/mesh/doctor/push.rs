//! Notifications: whether somebody takes the messages, and whether it is known who is online.

use std::collections::BTreeMap;

use super::{Check, Finding, Level, workers::is_idle};
use crate::{
    config::Config,
    mesh::provision::{JetStream, ProvisionError},
    subject::{PUSH_CONSUMER, rooms_stream},
};

/// Looks at the consumers of notifiers in the own region.
pub(super) async fn examine(jetstream: &JetStream<'_>, config: &Config) -> Vec<Finding> {
    if !config.push.is_on() {
        return Vec::new();
    }
    let mut findings = Vec::new();
    if !config.presence.users {
        findings.push(Finding::new(
            Level::Problem,
            Check::Push,
            "presence.users is off: everybody would be taken for away".to_owned(),
            "set presence.users = true for all edges of the mesh (natter up does it by itself)",
        ));
    }
    if config.namespaces.values().all(|its| !its.durable) {
        return findings;
    }
    let mut by_fault: BTreeMap<(String, &str), Vec<String>> = BTreeMap::new();
    for part in 0..config.nats.partitions {
        let stream = rooms_stream(&config.region(), part);
        let fault = match jetstream.consumer_info(&stream, PUSH_CONSUMER).await {
            Ok(Some(info)) if is_idle(&info) => (
                "no process notifies users who are away".to_owned(),
                "start natter notifier with this configuration, as the user notifier",
            ),
            Ok(Some(_)) => continue,
            Ok(None) => (
                "natter notifier has never run".to_owned(),
                "start natter notifier with this configuration, as the user notifier: it makes the consumers, and takes what is said from then on",
            ),
            Err(ProvisionError::Denied { .. }) => {
                findings.push(Finding::new(
                    Level::Note,
                    Check::Push,
                    "not examined: the user may not ask for the consumers of notifiers".to_owned(),
                    "run natter doctor as the user admin",
                ));
                break;
            }
            Err(error) => (
                format!(
                    "the consumer of notifiers does not report its state: {}",
                    error.brief()
                ),
                "it may have no leader: check whether the servers that hold the stream run",
            ),
        };
        by_fault.entry(fault).or_default().push(stream);
    }
    for ((what, advice), streams) in by_fault {
        let found = |stream: &String| {
            Finding::new(Level::Warning, Check::Push, what.clone(), advice).of(stream)
        };
        findings.extend(streams.iter().map(found));
    }
    findings
}
