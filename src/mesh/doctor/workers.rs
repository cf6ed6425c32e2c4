//! The workers and hooks of the configuration: whether somebody takes their messages, what they did not accept, and which
//! hooks are disabled.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{Check, Finding, Level};
use crate::{
    config::{self, Config},
    mesh::provision::{JetStream, ProvisionError},
    subject::{
        bucket, bucket_key, bucket_stream, hook_consumer, hook_off_key, rooms_stream,
        undelivered_stream, worker_consumer,
    },
};

/// The words of a kind of receivers.
struct Words {
    check: Check,
    /// As in `the worker translate`.
    one: &'static str,
    command: &'static str,
}

const WORKERS: Words = Words {
    check: Check::Worker,
    one: "worker",
    command: "natter worker",
};

const HOOKS: Words = Words {
    check: Check::Hook,
    one: "hook",
    command: "natter hooks",
};

/// Looks at the consumers of the workers and hooks in the own region, and at the dead letters there.
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
            format!("{count} messages were not accepted by workers or hooks"),
            "natter worker dead and natter hooks dead say why; natter worker retry and natter hooks retry ask again",
        ));
    }
    let parts = 0..config.nats.partitions;
    let rooms: Vec<String> = parts.map(|part| rooms_stream(&region, part)).collect();
    // Without the worker that judges files none is given out, wherever its entry is.
    let names = config.workers.iter().map(|worker| &*worker.name);
    let names: BTreeSet<&str> = names.chain(config.uploads.scan()).collect();
    for name in names {
        let consumer = worker_consumer(name);
        findings.extend(takes(jetstream, rooms.clone(), &WORKERS, name, &consumer).await);
    }
    for hook in &config.hooks {
        let name = &hook.name;
        findings.extend(is_off(jetstream, config, name).await);
        // Events of presence wait in the bucket, others in the streams of the rooms.
        let of_presence = bucket_stream(bucket::HOOKS, &region);
        let of_presence = [of_presence].into_iter().filter(|_| wants(hook, true));
        let of_rooms = rooms.iter().filter(|_| wants(hook, false));
        let streams = of_rooms.cloned().chain(of_presence).collect();
        let consumer = hook_consumer(name);
        findings.extend(takes(jetstream, streams, &HOOKS, name, &consumer).await);
    }
    findings
}

/// Whether a hook wants events of presence, or others.
fn wants(hook: &config::Hook, presence: bool) -> bool {
    hook.events
        .iter()
        .any(|event| event.is_presence() == presence)
}

/// Whether a hook is disabled.
async fn is_off(jetstream: &JetStream<'_>, config: &Config, name: &str) -> Option<Finding> {
    let region = config.region();
    let stream = bucket_stream(bucket::HOOKS, &region);
    let key = bucket_key(bucket::HOOKS, &region, &hook_off_key(name));
    match jetstream.has_key(&stream, &key).await {
        Ok(true) => Some(Finding::new(
            Level::Problem,
            Check::Hook,
            format!("the hook {name} is disabled: its receiver has answered 410"),
            "if the receiver is there again: natter hooks enable",
        )),
        Ok(false) => None,
        Err(error) => Some(Finding::new(
            Level::Note,
            Check::Hook,
            format!(
                "not examined: whether the hook {name} is disabled: {}",
                error.brief()
            ),
            "natter provision creates the bucket; natter doctor must be allowed to read it",
        )),
    }
}

/// Whether somebody takes messages for a receiver.
async fn takes(
    jetstream: &JetStream<'_>,
    streams: Vec<String>,
    words: &Words,
    name: &str,
    consumer: &str,
) -> Vec<Finding> {
    let Words {
        check,
        one,
        command,
    } = words;
    let check = *check;
    let start = format!("start {command} with this configuration, as the user worker");
    let mut findings = Vec::new();
    for stream in streams {
        let finding = match jetstream.consumer_info(&stream, consumer).await {
            Ok(Some(info)) if is_idle(&info) => Finding::new(
                Level::Warning,
                check,
                format!("no process takes messages for the {one} {name}"),
                start.clone(),
            ),
            Ok(Some(_)) => continue,
            Ok(None) => Finding::new(
                Level::Warning,
                check,
                format!("the {one} {name} has never run"),
                format!("{start}: it makes the consumers, and gets what is said from then on"),
            ),
            Err(ProvisionError::Denied { .. }) => Finding::new(
                Level::Note,
                check,
                format!("not examined: the {one} {name}: the user may not ask for its consumer"),
                "run natter doctor as the user admin",
            ),
            Err(error) => Finding::new(
                Level::Problem,
                check,
                format!(
                    "the consumer of the {one} {name} does not report its state: {}",
                    error.brief()
                ),
                "it may have no leader: check whether the servers that hold the stream run",
            ),
        };
        findings.push(finding.of(&stream));
    }
    findings
}

/// Whether nobody waits for messages, or works on one.
pub(super) fn is_idle(info: &Value) -> bool {
    let number = |name| info.get(name).and_then(Value::as_u64).unwrap_or_default();
    number("num_waiting") == 0 && number("num_ack_pending") == 0
}
