//! The accounts of a deployment's nats-servers.

use std::collections::BTreeSet;

use crate::{
    config::Config,
    model::Region,
    servers::template::{Part, quoted, render},
    subject::{
        PUSH_CONSUMER, Subjects, api, bucket, bucket_stream, hook_consumer, rooms_stream,
        undelivered_stream, worker_consumer,
    },
};

/// The accounts of region `local` with the default configuration.
const TEMPLATE: &str = include_str!("../../nats/accounts.conf");

/// Text before the partition in template lines that are repeated for each partition.
const ROOMS: &str = "ROOMS_local_";

/// Messages that are removed must also be removed from mirrors. So template lines with one of these are repeated for
/// each region.
const REMOVED: [&str; 2] = [
    "\"$JS.API.STREAM.PURGE.",
    "\"$JS.API.STREAM.MSG.DELETE.ROOMS_",
];

/// The text of a nats-server configuration with accounts, users and subject mappings of the region that `config` names.
#[must_use]
pub fn accounts(config: &Config) -> String {
    let (own, prefix) = (config.region(), &config.nats.prefix);
    // Regions and prefixes contain no character that needs quoting.
    let named = |line: &str, region: &Region| {
        line.replace("\"natter.", &format!("\"{prefix}."))
            .replace(".local.", &format!(".{region}."))
            .replace("_local", &format!("_{region}"))
    };
    let mut text = String::with_capacity(TEMPLATE.len());
    for line in TEMPLATE.lines() {
        if line.trim_start().starts_with('#') {
            text.push_str(&format!("{line}\n"));
            continue;
        }
        let regions = if REMOVED.iter().any(|removed| line.contains(removed)) {
            config.regions()
        } else {
            BTreeSet::from([own.clone()])
        };
        match line.split_once(ROOMS) {
            None => {
                for region in &regions {
                    text.push_str(&format!("{}\n", named(line, region)));
                }
            }
            Some((before, after)) if after.starts_with('0') => {
                let after = after.trim_start_matches('0');
                for region in &regions {
                    for part in 0..config.nats.partitions {
                        let line = named(&format!("{before}{ROOMS}{part}{after}"), region);
                        text.push_str(&format!("{line}\n"));
                    }
                }
            }
            // Lines for the other partitions of the template.
            Some(_) => {}
        }
    }
    let namespaces = config.namespaces.iter();
    let namespaces = namespaces.map(|(name, namespace)| (&**name, namespace.durable));
    let mappings = Subjects::new(prefix).mappings(&own, config.nats.partitions, namespaces);
    render(&text, |name| match name {
        "mappings" => {
            let lines = mappings.iter();
            let lines = lines.map(|(from, to)| format!("{}: {}", quoted(from), quoted(to)));
            Some(Part::Block(lines.collect()))
        }
        "workers" => Some(Part::Block(worker_user(config, &own))),
        "notifier" => Some(Part::Block(notifier_user(config, &own))),
        _ => None,
    })
}

/// The lines of the user of `natter worker` and `natter hooks`; none without workers and hooks. One durable consumer per
/// worker or hook and stream, and no other.
fn worker_user(config: &Config, own: &Region) -> Vec<String> {
    if config.workers.is_empty() && config.hooks.is_empty() {
        return Vec::new();
    }
    let prefix = &config.nats.prefix;
    let letters = undelivered_stream(own);
    let mut publish = vec![
        "$JS.API.STREAM.INFO.*".to_owned(),
        "$JS.API.DIRECT.GET.>".to_owned(),
        api::message_delete(&letters),
    ];
    let mut subscribe = vec![
        format!("{prefix}.kv.{own}.*.control.erased.>"),
        "_INBOX.worker.>".to_owned(),
    ];
    if !config.workers.is_empty() {
        publish.extend([
            format!("{prefix}.in.{own}.*.*.*.ev"),
            format!("{prefix}.undelivered.{own}.worker.>"),
            format!("$KV.rooms_{own}.>"),
            format!("{prefix}.edge.user.*"),
            format!("{prefix}.svc.history.{own}.page"),
        ]);
        subscribe.extend([
            format!("{prefix}.kv.{own}.*.rooms.>"),
            format!("{prefix}.kv.{own}.*.inbox.>"),
        ]);
    }
    if !config.hooks.is_empty() {
        publish.extend([
            format!("{prefix}.undelivered.{own}.hook.>"),
            format!("$KV.hooks_{own}.>"),
        ]);
        subscribe.extend([
            format!("{prefix}.kv.{own}.*.presence.>"),
            format!("{prefix}.kv.{own}.*.edges.>"),
        ]);
    }
    let rooms = (0..config.nats.partitions).map(|part| rooms_stream(own, part));
    let rooms: Vec<String> = rooms.collect();
    let of_hooks = bucket_stream(bucket::HOOKS, own);
    let of_hooks: Vec<String> = rooms.iter().cloned().chain([of_hooks]).collect();
    let workers = config.workers.iter();
    let workers = workers.map(|worker| (worker_consumer(&worker.name), &rooms));
    let hooks = config.hooks.iter();
    let hooks = hooks.map(|hook| (hook_consumer(&hook.name), &of_hooks));
    for (consumer, streams) in workers.chain(hooks) {
        let streams = streams.iter();
        publish.extend(streams.map(|stream| api::consumer_create(stream, &consumer)));
        publish.extend([
            api::consumer_info("*", &consumer),
            api::consumer_next("*", &consumer),
            format!("{}*.{consumer}.>", api::ACK),
            // The same with domain and account, as newer servers may write it.
            format!("{}*.*.*.{consumer}.>", api::ACK),
        ]);
    }
    user("worker", &publish, &subscribe)
}

/// The lines of the user of `natter notifier`; none without push. One durable consumer on each partition.
fn notifier_user(config: &Config, own: &Region) -> Vec<String> {
    if !config.push.is_on() {
        return Vec::new();
    }
    let prefix = &config.nats.prefix;
    let consumer = PUSH_CONSUMER;
    let mut publish = vec![
        format!("$KV.devices_{own}.>"),
        format!("$KV.pushed_{own}.>"),
        "$JS.API.STREAM.INFO.*".to_owned(),
        "$JS.API.DIRECT.GET.>".to_owned(),
    ];
    let parts = 0..config.nats.partitions;
    let streams = parts.map(|part| rooms_stream(own, part));
    publish.extend(streams.map(|stream| api::consumer_create(&stream, consumer)));
    publish.extend([
        api::consumer_info("*", consumer),
        api::consumer_next("*", consumer),
        format!("{}*.{consumer}.>", api::ACK),
        // The same with domain and account, as newer servers may write it.
        format!("{}*.*.*.{consumer}.>", api::ACK),
    ]);
    let subscribe = [
        format!("{prefix}.kv.{own}.*.control.erased.>"),
        format!("{prefix}.kv.{own}.*.rooms.>"),
        format!("{prefix}.kv.{own}.*.inbox.>"),
        format!("{prefix}.kv.{own}.*.lastread.>"),
        // Who is online.
        format!("{prefix}.kv.{own}.*.presence.>"),
        format!("{prefix}.kv.{own}.*.edges.>"),
        "_INBOX.notifier.>".to_owned(),
    ];
    user("notifier", &publish, &subscribe)
}

/// The lines of a user.
fn user(name: &str, publish: &[String], subscribe: &[String]) -> Vec<String> {
    let variable = name.to_uppercase();
    let mut lines = vec![
        "{".to_owned(),
        format!(
            "  user: {name}, password: $NATTER_{variable}_PASSWORD, allowed_connection_types: [ STANDARD ]"
        ),
        "  permissions: {".to_owned(),
    ];
    for (verb, subjects) in [("publish", publish), ("subscribe", subscribe)] {
        lines.push(format!("    {verb}: {{ allow: ["));
        lines.extend(
            subjects
                .iter()
                .map(|subject| format!("      {}", quoted(subject))),
        );
        lines.push("    ] }".to_owned());
    }
    lines.extend(["  }", "}"].map(str::to_owned));
    lines
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format, Toml};

    use super::*;

    #[test]
    fn the_file_is_what_the_defaults_render_to() {
        let config = Config::with_defaults(Toml::string("")).unwrap();
        assert_eq!(accounts(&config), TEMPLATE);
    }

    #[test]
    fn region_prefix_partitions_and_namespaces_are_those_of_the_configuration() {
        let toml = "region = 'us-east'\nregions = ['us-east', 'oslo']\n[nats]\nprefix = 'm2'\npartitions = 16\n[namespaces.games]\ndurable = true\ntyping = false";
        let config = Config::with_defaults(Toml::string(toml)).unwrap();
        let text = accounts(&config);
        for part in [
            "\"m2.in.us-east.>\"",
            "\"$KV.presence_us-east.>\"",
            "\"$JS.API.STREAM.PURGE.KV_presence_us-east\"",
            "\"$JS.API.STREAM.PURGE.ROOMS_us-east_0\"",
            "\"$JS.API.STREAM.PURGE.ROOMS_oslo_15\"",
            "\"$JS.API.STREAM.MSG.DELETE.ROOMS_oslo_0\"",
            "\"$JS.API.STREAM.PURGE.KV_edges_oslo\"",
            "\"$JS.API.CONSUMER.CREATE.ROOMS_us-east_15.history\"",
            "\"m2.put.us-east.*.*\": \"m2.in.us-east.{{partition(16,1,2)}}.",
            "\"m2.pub.games.*\": \"m2.put.us-east.games.{{wildcard(1)}}\"",
        ] {
            assert!(text.contains(part), "{part} is missing in:\n{text}");
        }
        assert!(!text.contains("user: worker"));
        let rules = text
            .lines()
            .filter(|line| !line.trim_start().starts_with('#'));
        let rules = rules.collect::<Vec<_>>().join("\n");
        assert!(
            !rules.contains("local") && !rules.contains("\"natter."),
            "{rules}"
        );
    }

    #[test]
    fn workers_have_a_user_that_takes_from_their_consumers_only() {
        let toml = "region = 'oslo'\nnats.partitions = 2\n[[workers]]\nname = 'mood'\nrooms = ['chat:*']\nurl = 'https://example.org'\nsecret = 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw'\nannotation = 'mood'";
        let text = accounts(&Config::with_defaults(Toml::string(toml)).unwrap());
        for part in [
            "user: worker, password: $NATTER_WORKER_PASSWORD",
            "\"$JS.API.CONSUMER.CREATE.ROOMS_oslo_1.worker_mood\"",
            "\"$JS.API.CONSUMER.MSG.NEXT.*.worker_mood\"",
            "\"$JS.ACK.*.worker_mood.>\"",
            "\"$JS.API.STREAM.MSG.DELETE.UNDELIVERED_oslo\"",
            "\"natter.undelivered.oslo.worker.>\"",
        ] {
            assert!(text.contains(part), "{part} is missing in:\n{text}");
        }
        assert!(!text.contains("MfKQ"));
        assert!(
            !text.contains("KV_hooks") && !text.contains("presence.>\"\n      \"_INBOX.worker")
        );
    }

    #[test]
    fn hooks_have_the_same_user_that_says_nothing_in_rooms() {
        let toml = "region = 'oslo'\nnats.partitions = 2\n[[hooks]]\nname = 'crm'\nrooms = ['chat:*']\nurl = 'https://example.org'\nsecret = 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw'\nevents = ['message.created']";
        let text = accounts(&Config::with_defaults(Toml::string(toml)).unwrap());
        let (_, user) = text.split_once("user: worker").unwrap();
        let (user, _) = user.split_once("# @end").unwrap();
        for part in [
            "\"$JS.API.CONSUMER.CREATE.ROOMS_oslo_1.hook_crm\"",
            "\"$JS.API.CONSUMER.CREATE.KV_hooks_oslo.hook_crm\"",
            "\"$JS.ACK.*.hook_crm.>\"",
            "\"$KV.hooks_oslo.>\"",
            "\"natter.undelivered.oslo.hook.>\"",
        ] {
            assert!(user.contains(part), "{part} is missing in:\n{user}");
        }
        assert!(
            !user.contains(".in.oslo") && !user.contains("rooms_oslo"),
            "{user}"
        );
    }
}
