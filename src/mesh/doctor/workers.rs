//! The workers of the configuration: whether somebody takes their messages, and what they did not accept.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Check, Finding, Level};
use crate::{
    config::Config,
    mesh::provision::{JetStream, ProvisionError},
    subject::{rooms_stream, undelivered_stream, worker_consumer},
};

/// Looks at the consumers of the workers in the own region, and at the dead letters there.
pub(super) async fn examine(
    jetstream: &JetStream<'_>,
    own: &BTreeMap<String, Value>,
    config: &Config,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let region = config.region();
    let letters = undelivered_stream(&region);
    let letters = own
        .get(&letters)
        .and_then(|info| info.pointer("/state/messages"));
    if let Some(count @ 1..) = letters.and_then(Value::as_u64) {
        findings.push(Finding::new(
            Level::Warning,
            Check::Worker,
            format!("{count} messages were not accepted by workers"),
            "natter worker dead says why; natter worker retry asks again",
        ));
    }
    for worker in &config.workers {
        let consumer = worker_consumer(&worker.name);
        for part in 0..config.nats.partitions {
            let stream = rooms_stream(&region, part);
            let finding = match jetstream.consumer_info(&stream, &consumer).await {
                Ok(Some(info)) if is_idle(&info) => Finding::new(
                    Level::Warning,
                    Check::Worker,
                    format!("no process takes messages for the worker {}", worker.name),
                    "start natter worker with this configuration, as the user worker",
                ),
                Ok(Some(_)) => continue,
                Ok(None) => Finding::new(
                    Level::Warning,
                    Check::Worker,
                    format!("the worker {} has never run", worker.name),
                    "start natter worker with this configuration, as the user worker: it makes the consumers, and gets what is said from then on",
                ),
                Err(ProvisionError::Denied { .. }) => Finding::new(
                    Level::Note,
                    Check::Worker,
                    format!(
                        "not examined: the worker {}: the user may not ask for its consumer",
                        worker.name
                    ),
                    "run natter doctor as the user admin",
                ),
                Err(error) => Finding::new(
                    Level::Problem,
                    Check::Worker,
                    format!(
                        "the consumer of the worker {} does not report its state: {}",
                        worker.name,
                        error.brief()
                    ),
                    "it may have no leader: check whether the servers that hold the stream run",
                ),
            };
            findings.push(finding.of(&stream));
        }
    }
    findings
}

/// Whether nobody waits for messages, or works on one.
pub(super) fn is_idle(info: &Value) -> bool {
    let number = |name| info.get(name).and_then(Value::as_u64).unwrap_or_default();
    number("num_waiting") == 0 && number("num_ack_pending") == 0
}
