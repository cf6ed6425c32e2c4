//! Helps the region's mirrors on after the links to other regions were broken.
//!
//! Left alone, nats-server 2.15.1 does this: a mirror that has heard nothing for 10 s asks its origin for a consumer; a
//! request that is lost is waited for 30 s; then comes a pause of 10 s, longer by as much with each failure, up to 2 min. So
//! a mirror may stand still for minutes after its link is back. Here:
//!
//! - A request without an answer is sent again as it was, until the server has given it up. Whichever arrives first is
//!   the one that counts; the consumer's name and settings are in it, so a second one changes nothing.
//! - When mirrors pause and their origin answers, the servers are made to look at their mirrors at once: they do so whenever
//!   a leaf node connects, so this connects as one, and leaves. That needs `nats.leafnodes`.
//!
//! Any number of processes of a region may do this: each request is kept by one of them. None is needed: what it does is
//! only to be sooner.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    time::Duration,
};

use async_nats::{HeaderMap, Message, Subject};
use bytes::Bytes;
use futures_util::StreamExt as _;
use serde::Deserialize;
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use super::Connection;
use crate::{
    config,
    model::Region,
    subject::api::{self, in_domain},
};

/// How often unanswered requests are repeated.
const REPEAT_EVERY: Duration = Duration::from_secs(1);

/// How long the server waits for an answer (`srcConsumerWaitTime`), with a second for ours being later than its own.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(31);

/// Pause between two looks whether the origin of a pausing mirror answers.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// How long such a look may take.
const LOOK_WITHIN: Duration = Duration::from_secs(1);

/// How long it may take to connect as a leaf node.
const NUDGE_WITHIN: Duration = Duration::from_secs(5);

/// Mirrors that are kept in mind; more are left to the server.
const MAX_MIRRORS: usize = 4096;

/// Most that a server says to a leaf node before it answers: its interest, a line a subject.
const MAX_GREETING: u64 = 64 * 1024 * 1024;

/// The servers could not be made to look at their mirrors.
#[derive(Debug, thiserror::Error)]
pub enum NudgeError {
    /// No connection, or it broke.
    #[error("{address} can't be reached as a leaf node")]
    Io { address: String, source: io::Error },
    /// It wants what we don't have.
    #[error("{address} does not take us as a leaf node: {reason}")]
    Refused { address: String, reason: String },
}

/// What a mirror has asked, as far as is known. No I/O.
#[derive(Debug)]
struct Asked {
    region: Region,
    /// By name of the consumer, which is that of the mirror.
    waiting: BTreeMap<String, Request>,
    /// Mirrors whose request was given up, with their origins.
    pausing: BTreeMap<String, Region>,
}

#[derive(Debug, Clone)]
struct Request {
    origin: Region,
    subject: Subject,
    reply: Subject,
    headers: Option<HeaderMap>,
    payload: Bytes,
    since: Instant,
}

/// What we need of the request for a consumer.
#[derive(Deserialize)]
struct Create {
    config: ConsumerConfig,
}

#[derive(Deserialize)]
struct ConsumerConfig {
    #[serde(default)]
    name: String,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
}

impl Asked {
    fn new(region: Region) -> Self {
        Self {
            region,
            waiting: BTreeMap::new(),
            pausing: BTreeMap::new(),
        }
    }

    /// A request for a consumer was heard: a mirror's of this region, or another one, which is none of ours.
    fn on_request(&mut self, message: Message, now: Instant) {
        let Some((origin, reply)) = api::consumer_origin(&message.subject).zip(message.reply)
        else {
            return;
        };
        let Ok(Create { config }) = serde_json::from_slice(&message.payload) else {
            return;
        };
        let domain = config.metadata.get(api::MIRROR_DOMAIN_METADATA);
        if domain.map(String::as_str) != Some(self.region.as_str()) {
            return;
        }
        // Our own repetition.
        if self
            .waiting
            .get(&config.name)
            .is_some_and(|known| known.reply == reply)
        {
            return;
        }
        self.pausing.remove(&config.name);
        if self.waiting.len() >= MAX_MIRRORS {
            return;
        }
        let request = Request {
            origin,
            subject: message.subject,
            reply,
            headers: message.headers,
            payload: message.payload,
            since: now,
        };
        self.waiting.insert(config.name, request);
    }

    /// Something was answered to `reply`.
    fn on_answer(&mut self, reply: &Subject) {
        self.waiting.retain(|_, request| request.reply != *reply);
    }

    /// What is to be sent again.
    fn on_tick(&mut self, now: Instant) -> Vec<Request> {
        let mut repeated = Vec::new();
        self.waiting.retain(|name, request| {
            let age = now.saturating_duration_since(request.since);
            if age >= GIVEN_UP_AFTER {
                if self.pausing.len() < MAX_MIRRORS {
                    self.pausing.insert(name.clone(), request.origin.clone());
                }
                return false;
            }
            // The first answer may still be on its way.
            if age >= REPEAT_EVERY {
                repeated.push(request.clone());
            }
            true
        });
        repeated
    }

    fn pausing(&self) -> BTreeSet<Region> {
        self.pausing.values().cloned().collect()
    }

    /// The servers have looked at the mirrors of `origins`.
    fn on_nudged(&mut self, origins: &BTreeSet<Region>) {
        self.pausing.retain(|_, origin| !origins.contains(origin));
    }
}

/// Does this for as long as it is polled, where `nats.leafnodes` names servers. It ends when `connection` is closed; without
/// the permission to listen to the requests it does nothing.
pub async fn keep(connection: Connection, region: Region, nats: config::Nats) {
    let client = connection.client();
    // A group of the region's own: another region's members must not take its requests.
    let group = format!("natter-mirrors-{region}");
    let requests = client.queue_subscribe(api::CONSUMER_REQUESTS, group).await;
    let answers = client.subscribe(api::CONSUMER_ANSWERS).await;
    let (mut requests, mut answers) = match (requests, answers) {
        (Ok(requests), Ok(answers)) => (requests, answers),
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(%error, "mirrors are left to their server");
            return;
        }
    };
    let mut asked = Asked::new(region);
    let mut tick = interval(REPEAT_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut looked = Instant::now();
    loop {
        // All branches are cancel-safe: a message is taken only when its branch is.
        tokio::select! {
            request = requests.next() => match request {
                Some(request) => asked.on_request(request, Instant::now()),
                None => return,
            },
            answer = answers.next() => match answer {
                Some(answer) => asked.on_answer(&answer.subject),
                None => return,
            },
            now = tick.tick() => {
                for request in asked.on_tick(now) {
                    repeat(client, request).await;
                }
                if looked.elapsed() >= LOOK_EVERY {
                    help(client, &mut asked, &nats).await;
                    looked = Instant::now();
                }
            }
        }
    }
}

async fn repeat(client: &async_nats::Client, request: Request) {
    let Request {
        subject,
        reply,
        headers,
        payload,
        ..
    } = request;
    let headers = headers.unwrap_or_default();
    let sent = client
        .publish_with_reply_and_headers(subject, reply, headers, payload)
        .await;
    if let Err(error) = sent {
        tracing::debug!(%error, "a mirror's request was not repeated");
    }
}

/// Makes the servers look at their mirrors when an origin of those that pause answers.
async fn help(client: &async_nats::Client, asked: &mut Asked, nats: &config::Nats) {
    let looks = asked.pausing().into_iter().map(async |origin| {
        let request = client.request(in_domain(&origin, api::INFO), Bytes::new());
        let answered = matches!(timeout(LOOK_WITHIN, request).await, Ok(Ok(_)));
        answered.then_some(origin)
    });
    let back: BTreeSet<Region> = futures_util::future::join_all(looks)
        .await
        .into_iter()
        .flatten()
        .collect();
    if back.is_empty() {
        return;
    }
    for address in nats.leafnodes.split(',').map(str::trim) {
        if let Err(error) = nudge(address, nats).await {
            // The mirrors go on by themselves, later.
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "mirrors were not helped on"
            );
        }
    }
    tracing::info!(regions = ?back, "mirrors of regions that are back were helped on");
    asked.on_nudged(&back);
}

/// Makes the server at `address` (host and port for leaf nodes) set up at once those mirrors that have heard nothing for 10
/// s and do not wait for an answer: connects as a leaf node, with the user and password of `nats`, and leaves.
///
/// # Errors
/// [`NudgeError`]
pub async fn nudge(address: &str, nats: &config::Nats) -> Result<(), NudgeError> {
    let failed = |source| NudgeError::Io {
        address: address.to_owned(),
        source,
    };
    let refused = |reason: &str| NudgeError::Refused {
        address: address.to_owned(),
        reason: reason.trim().to_owned(),
    };
    let talk = async {
        let stream = TcpStream::connect(address).await.map_err(failed)?;
        let (reads, mut writes) = stream.into_split();
        let mut lines = BufReader::new(reads.take(MAX_GREETING));
        let mut line = String::new();
        lines.read_line(&mut line).await.map_err(failed)?;
        if line.contains("\"tls_required\":true") {
            return Err(refused("it wants TLS, which is not supported here"));
        }
        let mut options = json!({ "name": "natter-nudge", "headers": true });
        if !nats.user.is_empty() {
            options["user"] = json!(nats.user);
            options["pass"] = json!(nats.password.expose());
        }
        let greeting = format!("CONNECT {options}\r\nPING\r\n");
        writes
            .write_all(greeting.as_bytes())
            .await
            .map_err(failed)?;
        // The server looks at its mirrors while it takes the CONNECT.
        loop {
            line.clear();
            if lines.read_line(&mut line).await.map_err(failed)? == 0 {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
            if line.starts_with("PONG") {
                return Ok(());
            }
            if let Some(reason) = line.strip_prefix("-ERR") {
                return Err(refused(reason));
            }
        }
    };
    timeout(NUDGE_WITHIN, talk)
        .await
        .unwrap_or_else(|elapsed| Err(failed(elapsed.into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(domain: &str, mirror: &str, reply: &str) -> Message {
        let payload = json!({
            "stream_name": "ROOMS_seoul_0",
            "config": { "name": mirror, "metadata": { "_nats.mirror.domain": domain } },
        });
        Message {
            subject: api::CONSUMER_REQUESTS
                .replace('*', "seoul")
                .replace('>', "ROOMS_seoul_0")
                .into(),
            reply: Some(reply.into()),
            payload: payload.to_string().into(),
            headers: None,
            status: None,
            description: None,
            length: 0,
        }
    }

    fn region(name: &str) -> Region {
        Region::parse(name).unwrap()
    }

    #[test]
    fn a_request_is_repeated_until_it_is_answered() {
        let (mut asked, start) = (Asked::new(region("frankfurt")), Instant::now());
        asked.on_request(request("frankfurt", "JS_MIRROR_a", "r1"), start);
        asked.on_request(request("frankfurt", "JS_MIRROR_b", "r2"), start);
        assert!(
            asked.on_tick(start).is_empty(),
            "the answer may be on its way"
        );
        let later = start + REPEAT_EVERY;
        assert_eq!(asked.on_tick(later).len(), 2);
        // Our own repetition is heard too.
        asked.on_request(request("frankfurt", "JS_MIRROR_a", "r1"), later);
        asked.on_answer(&"r2".into());
        let repeated = asked.on_tick(start + GIVEN_UP_AFTER - REPEAT_EVERY);
        let replies: Vec<_> = repeated
            .iter()
            .map(|request| request.reply.as_str())
            .collect();
        assert_eq!(replies, ["r1"]);
        assert!(asked.pausing().is_empty());
        // What the server has given up must not be answered any more: it may have asked again meanwhile.
        assert!(asked.on_tick(start + GIVEN_UP_AFTER).is_empty());
        assert_eq!(asked.pausing(), BTreeSet::from([region("seoul")]));
    }

    #[test]
    fn a_new_request_takes_the_place_of_the_one_before_and_ends_the_pause() {
        let (mut asked, start) = (Asked::new(region("frankfurt")), Instant::now());
        asked.on_request(request("frankfurt", "JS_MIRROR_a", "r1"), start);
        asked.on_request(request("frankfurt", "JS_MIRROR_a", "r2"), start);
        assert_eq!(asked.on_tick(start + REPEAT_EVERY).len(), 1);
        asked.on_tick(start + GIVEN_UP_AFTER);
        assert!(!asked.pausing().is_empty());
        asked.on_request(
            request("frankfurt", "JS_MIRROR_a", "r3"),
            start + GIVEN_UP_AFTER,
        );
        assert!(asked.pausing().is_empty());
    }

    #[test]
    fn what_is_not_of_this_regions_mirrors_is_left_alone() {
        let (mut asked, now) = (Asked::new(region("frankfurt")), Instant::now());
        asked.on_request(request("virginia", "JS_MIRROR_a", "r1"), now);
        let mut by_hand = request("frankfurt", "JS_MIRROR_a", "r2");
        by_hand.payload = "{}".into();
        asked.on_request(by_hand, now);
        let mut no_reply = request("frankfurt", "JS_MIRROR_a", "r3");
        no_reply.reply = None;
        asked.on_request(no_reply, now);
        assert!(asked.on_tick(now + REPEAT_EVERY).is_empty());
    }

    #[test]
    fn a_nudge_is_for_the_origins_that_are_back() {
        let (mut asked, start) = (Asked::new(region("frankfurt")), Instant::now());
        asked.on_request(request("frankfurt", "JS_MIRROR_a", "r1"), start);
        asked.on_tick(start + GIVEN_UP_AFTER);
        asked.on_nudged(&BTreeSet::from([region("virginia")]));
        assert_eq!(asked.pausing(), BTreeSet::from([region("seoul")]));
        asked.on_nudged(&BTreeSet::from([region("seoul")]));
        assert!(asked.pausing().is_empty());
    }
}
