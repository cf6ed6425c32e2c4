//! Whether the configured user has the permissions that an edge needs, and the user of `[mirrors]` those for restarting
//! mirrors.
//!
//! Subscriptions and reads are tried. Nothing is published that anybody would see or a stream would store: publishes
//! are only compared with the permissions that the server reports for the user.

use std::{collections::BTreeSet, time::Duration};

use async_nats::Client;
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{Check, Finding, Level};
use crate::{
    bus::new_inbox,
    config::{self, Config},
    mesh::provision::{Denials, ProvisionError, connect_with_denials},
    model::{Class, Region, RoomId},
    subject::{self, Subjects, api, bucket},
};

/// Timeout of one round trip to the server.
const ROUND_TRIP: Duration = Duration::from_secs(5);

/// Buckets that an edge writes.
const WRITTEN: [&str; 6] = [
    bucket::PRESENCE,
    bucket::EDGES,
    bucket::LASTREAD,
    bucket::ROOMS,
    bucket::INBOX,
    bucket::DEVICES,
];

/// Checks the user of `nats`.
pub(super) async fn examine(
    config: &Config,
    regions: &BTreeSet<Region>,
) -> Result<Vec<Finding>, ProvisionError> {
    let whose = Whose {
        what: "what an edge needs",
        advice: "allow it for this user, if edges use it (docs/operate.md, Permissions)",
    };
    compare(&config.nats, Needs::of_edges(config, regions), &whose).await
}

/// Checks the user that restarts mirrors.
pub(super) async fn examine_mirrors(
    config: &Config,
    regions: &BTreeSet<Region>,
) -> Result<Vec<Finding>, ProvisionError> {
    let nats = config.nats_of_mirrors();
    let needs = Needs::of_mirrors(&nats, &config.region(), regions);
    let whose = Whose {
        what: "what restarting mirrors needs",
        advice: "allow it for mirrors.user, or for nats.user if that is empty (docs/operate.md, Permissions)",
    };
    compare(&nats, needs, &whose).await
}

/// The texts of findings about a user.
struct Whose {
    what: &'static str,
    advice: &'static str,
}

async fn compare(
    nats: &config::Nats,
    needs: Needs,
    whose: &Whose,
) -> Result<Vec<Finding>, ProvisionError> {
    // Its own connection, since on others requests may have been denied for other reasons.
    let (client, denials) = connect_with_denials(nats, "natter doctor").await?;
    let mut findings = Vec::new();
    let mut denied = BTreeSet::new();
    match tried(&client, &denials, &needs).await {
        Some(tried) => denied.extend(tried),
        None => findings.push(unchecked("the server does not answer within a round trip")),
    }
    match user_info(&client, &denials).await {
        Some(info) => {
            let published = needs.published.iter();
            denied.extend(published.filter(|s| !may_publish(&info, s)).cloned());
        }
        None => findings.push(unchecked(&format!(
            "{} is not answered, so the allowed publishes are not known",
            api::USER_INFO
        ))),
    }
    let (subscribed, published): (Vec<String>, Vec<String>) = denied
        .into_iter()
        .partition(|subject| needs.subscribed.contains(subject));
    for (verb, subjects) in [("subscribe to", subscribed), ("publish to", published)] {
        if !subjects.is_empty() {
            let all = subjects.join(", ");
            let what = format!("the user may not {verb} {}: {all}", whose.what);
            findings.push(Finding::new(
                Level::Problem,
                Check::Permission,
                what,
                whose.advice,
            ));
        }
    }
    Ok(findings)
}

fn unchecked(why: &str) -> Finding {
    Finding::new(
        Level::Note,
        Check::Permission,
        format!("not examined: permissions of the user: {why}"),
        "check the server's log and the user's permissions",
    )
}

/// The needed permissions, by example. For edges, one room per namespace and partition stands for all; for mirrors, one
/// stream of each other region.
#[derive(Default)]
struct Needs {
    subscribed: BTreeSet<String>,
    /// Subjects of requests that change nothing, with a payload that finds nothing.
    asked: Vec<(String, Value)>,
    published: BTreeSet<String>,
}

impl Needs {
    fn of_edges(config: &Config, regions: &BTreeSet<Region>) -> Self {
        let subjects = Subjects::new(&config.nats.prefix);
        let own = config.region();
        let mut needs = Self::default();
        // Not a real room: nobody could use it by accident, and nothing is published to it.
        let rooms = config.namespaces.iter().filter_map(|(name, policy)| {
            Some((RoomId::from_parts(name, "natter-doctor").ok()?, policy))
        });
        for (room, policy) in rooms {
            needs.subscribed.insert(subjects.ephemeral(&room));
            needs.published.insert(subjects.ephemeral(&room));
            for bucket in [bucket::PRESENCE, bucket::LASTREAD] {
                let keys = subject::marker_keys(&room);
                needs
                    .subscribed
                    .insert(subjects.bucket_changes(&own, bucket, &keys));
            }
            for part in (0..config.nats.partitions).filter(|_| policy.durable) {
                needs.subscribed.insert(subjects.live(&own, part, &room));
                for class in [Class::Msg, Class::Ev] {
                    needs
                        .published
                        .insert(subjects.publish(&own, part, &room, class));
                }
            }
            if policy.history {
                needs.published.insert(subjects.history(&own, "page"));
            }
        }
        for subject in [subjects.orders(), subjects.order_answers("natter-doctor")] {
            needs.subscribed.insert(subject.clone());
            needs.published.insert(subject);
        }
        for (bucket, keys) in [
            (bucket::EDGES, ">"),
            (bucket::CONTROL, ">"),
            (bucket::ROOMS, subject::RECORD_KEYS),
            (bucket::INBOX, subject::BLOCK_KEYS),
        ] {
            let changes = subjects.bucket_changes(&own, bucket, keys);
            needs.subscribed.insert(changes);
        }
        needs
            .subscribed
            .insert(format!("{}.*", new_inbox(&config.nats)));
        needs.subscribed.insert(format!("{}*", api::LEADER_ELECTED));
        for origin in regions {
            let rooms = (0..config.nats.partitions).map(|part| subject::rooms_stream(origin, part));
            let buckets = WRITTEN.into_iter().chain([bucket::CONTROL]);
            let buckets = buckets.map(|bucket| subject::bucket_stream(bucket, origin));
            for stream in rooms {
                needs.asked.push((api::stream_info(&stream), json!({})));
                needs.reads(&stream);
            }
            for stream in buckets {
                needs.reads(&stream);
            }
        }
        for bucket in WRITTEN {
            needs
                .published
                .insert(subject::bucket_key(bucket, &own, "natter-doctor"));
        }
        // The keys of leases that are over, in other regions too, since a mirror keeps what its origin purges.
        for origin in regions {
            for bucket in [bucket::PRESENCE, bucket::EDGES] {
                let stream = subject::bucket_stream(bucket, origin);
                needs.published.insert(api::stream_purge(&stream));
            }
        }
        needs
    }

    fn of_mirrors(nats: &config::Nats, own: &Region, regions: &BTreeSet<Region>) -> Self {
        let mut needs = Self::default();
        let inbox = format!("{}.*", new_inbox(nats));
        let heard = [api::CONSUMER_REQUESTS, api::CONSUMER_ANSWERS, &inbox];
        needs.subscribed.extend(heard.map(str::to_owned));
        for origin in regions.iter().filter(|origin| *origin != own) {
            let request = api::consumer_request(&subject::rooms_stream(origin, 0));
            for request in [&request, api::INFO] {
                needs.published.insert(api::in_domain(origin, request));
            }
        }
        needs
    }

    fn reads(&mut self, stream: &str) {
        let nothing = json!({ "last_by_subj": "natter-doctor" });
        self.asked.push((subject::direct_get(stream), nothing));
    }
}

/// Makes the subscriptions and requests. Returns those that the server denied, or `None` if it does not answer at all.
async fn tried(client: &Client, denials: &Denials, needs: &Needs) -> Option<BTreeSet<String>> {
    let mut subscriptions = Vec::new();
    for subject in &needs.subscribed {
        subscriptions.push(client.subscribe(subject.clone()).await.ok()?);
    }
    // The answers are not read: a denial is reported at once, and in order with everything else.
    let inbox = client.new_inbox();
    subscriptions.push(client.subscribe(inbox.clone()).await.ok()?);
    for (subject, payload) in &needs.asked {
        let sent =
            client.publish_with_reply(subject.clone(), inbox.clone(), payload.to_string().into());
        sent.await.ok()?;
    }
    round_trip(client, denials).await?;
    let wanted = |subject: &String| {
        needs.subscribed.contains(subject) || needs.asked.iter().any(|(asked, _)| asked == subject)
    };
    let denied = denials.borrow();
    Some(
        denied
            .iter()
            .filter(|subject| wanted(subject))
            .cloned()
            .collect(),
    )
}

/// Returns when the server has processed everything sent before: it delivers a message to ourselves, or denies it.
async fn round_trip(client: &Client, denials: &Denials) -> Option<()> {
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await.ok()?;
    client.publish(inbox.clone(), "".into()).await.ok()?;
    let mut denials = denials.clone();
    timeout(ROUND_TRIP, async {
        tokio::select! {
            answer = answers.next() => answer.map(drop),
            refused = denials.wait_for(|denied| denied.contains(&inbox)) => refused.ok().map(drop),
        }
    })
    .await
    .ok()?
}

/// What the server reports about the user. Other servers answer too, but about the leaf node over which the request
/// reached them.
async fn user_info(client: &Client, denials: &Denials) -> Option<Value> {
    let own = client.server_info().server_id;
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await.ok()?;
    let sent = client.publish_with_reply(api::USER_INFO, inbox, "".into());
    sent.await.ok()?;
    let mut denials = denials.clone();
    let answer = async {
        while let Some(answer) = answers.next().await {
            let Ok(info) = serde_json::from_slice::<Value>(&answer.payload) else {
                continue;
            };
            if info.pointer("/server/id").and_then(Value::as_str) == Some(&own) {
                return Some(info);
            }
        }
        None
    };
    timeout(ROUND_TRIP, async {
        tokio::select! {
            answer = answer => answer,
            _refused = denials.wait_for(|denied| denied.contains(api::USER_INFO)) => None,
        }
    })
    .await
    .ok()?
}

/// Whether the permissions in the answer to [`api::USER_INFO`] allow publishing to `subject`.
fn may_publish(info: &Value, subject: &str) -> bool {
    let list = |field: &str| -> Option<Vec<&str>> {
        let list = info.pointer("/data/permissions/publish")?.get(field)?;
        Some(list.as_array()?.iter().filter_map(Value::as_str).collect())
    };
    let matches = |patterns: Vec<&str>| patterns.iter().any(|pattern| covers(pattern, subject));
    list("allow").is_none_or(matches) && !list("deny").is_some_and(matches)
}

/// Whether a NATS pattern covers a subject.
fn covers(pattern: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    let mut patterns = pattern.split('.');
    loop {
        match (patterns.next(), tokens.next()) {
            (Some(">"), Some(_)) | (None, None) => return true,
            (Some("*"), Some(_)) => {}
            (Some(pattern), Some(token)) if pattern == token => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_cover_subjects_as_in_nats() {
        for (pattern, subject, wanted) in [
            ("a.b", "a.b", true),
            ("a.*", "a.b", true),
            ("a.>", "a.b.c", true),
            ("a.>", "a", false),
            ("a.*", "a.b.c", false),
            ("a.b.c", "a.b", false),
            (">", "a", true),
        ] {
            assert_eq!(covers(pattern, subject), wanted, "{pattern} {subject}");
        }
    }

    #[test]
    fn deny_goes_before_allow_and_no_list_allows_all() {
        let info = |publish: Value| json!({ "data": { "permissions": { "publish": publish } } });
        assert!(may_publish(&json!({ "data": {} }), "a.b"));
        assert!(!may_publish(&info(json!({ "allow": ["b.>"] })), "a.b"));
        assert!(may_publish(&info(json!({ "deny": ["b.>"] })), "a.b"));
        let both = info(json!({ "allow": ["a.>"], "deny": ["a.b"] }));
        assert!(may_publish(&both, "a.c") && !may_publish(&both, "a.b"));
    }
}
