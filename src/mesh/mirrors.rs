//! Restarts the region's stalled mirrors after the links to other regions were broken.
//!
//! By itself nats-server 2.15.1 does this: a mirror that has heard nothing for 10 s asks its origin for a consumer; if
//! the request is lost, it waits for 30 s; then it pauses for 10 s, and 10 s longer after each failure, up to 2 min. So
//! a mirror may be stalled for minutes after its link is back. This module shortens that:
//!
//! - A lost request is sent again unchanged, before the server has given it up. A request counts as lost only if its
//!   origin has answered requests that were sent after it, but not this one. That matters because each copy that
//!   arrives creates a consumer, and all of them send the mirror the same messages over the link between regions, until
//!   the mirror is set up again.
//! - When mirrors pause although their origin answers, the servers are made to check their mirrors at once. A server
//!   does so whenever a leaf node connects, so this module connects as a leaf node and leaves again. That needs
//!   `mirrors.leafnodes`.
//!
//! Any number of processes of a region may do this: each request is handled by one of them. None is required, since
//! mirrors also recover without them, only later.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    time::Duration,
};

use async_nats::{HeaderMap, Message, Subject};
use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::{
    bus::{
        Connection,
        line::{DialError, Dialed, introduce_leaf_node},
    },
    config::{self, Config},
    model::Region,
    subject::api::{self, in_domain},
};

/// Interval at which it is checked whether the origins of unanswered requests and of pausing mirrors answer.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Checks in a row that an origin must have answered since a request was sent, before the request counts as lost: the
/// origin received a request sent before the first check before that check, and may answer it until the next one.
const ANSWERED: u32 = 2;

/// Pause before a request is sent once more.
const REPEAT_AFTER: Duration = Duration::from_secs(5);

/// How long the server waits for an answer (`srcConsumerWaitTime`), plus a second because our clock for it starts
/// later.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(31);

/// Timeout of such a check.
const LOOK_WITHIN: Duration = Duration::from_secs(1);

/// Timeout for connecting as a leaf node.
const NUDGE_WITHIN: Duration = Duration::from_secs(5);

/// Our name as a leaf node, in the logs of servers.
const NAME: &str = "natter-nudge";

/// Mirrors that are tracked. Further ones are left to the server.
const MAX_MIRRORS: usize = 4096;

/// Largest number of bytes that a server may send to a leaf node before its answer: its subscriptions, one line per
/// subject.
const MAX_GREETING: u64 = 64 * 1024 * 1024;

/// A server could not be made to check its mirrors.
#[derive(Debug, thiserror::Error)]
pub enum NudgeError {
    /// There is no connection, or it broke.
    #[error("{address} can't be reached as a leaf node")]
    Io { address: String, source: io::Error },
    /// The server refuses the connection.
    #[error("{address} refuses the leaf node: {reason}")]
    Refused { address: String, reason: String },
    /// The credentials can't be used.
    #[error("the credentials for {address} can't be used")]
    Identity {
        address: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The known requests of mirrors. Does no I/O.
#[derive(Debug)]
struct Asked {
    region: Region,
    /// Unanswered requests, by the name of the consumer, which is that of the mirror.
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
    /// Checks in a row that its origin has answered.
    answered: u32,
    repeated: Option<Instant>,
}

/// The needed fields of the request for a consumer.
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

    /// Handles a request for a consumer. Requests that are not from a mirror of this region are ignored.
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
        // This is our own repetition.
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
            answered: 0,
            repeated: None,
        };
        self.waiting.insert(config.name, request);
    }

    /// Handles an answer to `reply`.
    fn on_answer(&mut self, reply: &Subject) {
        self.waiting.retain(|_, request| request.reply != *reply);
    }

    /// Drops requests that the server has given up. Returns the regions to check.
    fn on_tick(&mut self, now: Instant) -> BTreeSet<Region> {
        let age = |request: &Request| now.saturating_duration_since(request.since);
        self.waiting.retain(|name, request| {
            let is_waiting = age(request) < GIVEN_UP_AFTER;
            if !is_waiting && self.pausing.len() < MAX_MIRRORS {
                self.pausing.insert(name.clone(), request.origin.clone());
            }
            is_waiting
        });
        // The answer to a new request may still be on its way.
        let waiting = self.waiting.values().filter(|r| age(r) >= LOOK_EVERY);
        let origins = waiting.map(|request| &request.origin);
        origins.chain(self.pausing.values()).cloned().collect()
    }

    /// Of the regions in `asked`, those in `back` have answered. Returns the requests to send again.
    fn on_looked(
        &mut self,
        asked: &BTreeSet<Region>,
        back: &BTreeSet<Region>,
        now: Instant,
    ) -> Vec<Request> {
        let mut lost = Vec::new();
        for request in self.waiting.values_mut() {
            // A request that arrived during the check was not sent before it.
            if now.saturating_duration_since(request.since) < LOOK_EVERY + LOOK_WITHIN
                || !asked.contains(&request.origin)
            {
                continue;
            }
            request.answered = match back.contains(&request.origin) {
                true => request.answered + 1,
                false => 0,
            };
            let rested = request
                .repeated
                .is_none_or(|at| now.saturating_duration_since(at) >= REPEAT_AFTER);
            if request.answered >= ANSWERED && rested {
                request.repeated = Some(now);
                lost.push(request.clone());
            }
        }
        lost
    }

    fn pausing(&self) -> BTreeSet<Region> {
        self.pausing.values().cloned().collect()
    }

    /// The servers have checked the mirrors of `origins`.
    fn on_nudged(&mut self, origins: &BTreeSet<Region>) {
        self.pausing.retain(|_, origin| !origins.contains(origin));
    }
}

/// Restarts stalled mirrors while it is polled, over a connection of [`Config::nats_of_mirrors`]. It ends when
/// `connection` is closed. Without the permission to listen to the requests it does nothing.
pub fn keep(connection: Connection, config: &Config) -> impl Future<Output = ()> + Send + use<> {
    let servers = Servers {
        leafnodes: config.mirrors.leafnodes().map(str::to_owned).collect(),
        nats: config.nats_of_mirrors(),
    };
    run(connection, config.region(), servers)
}

/// The servers that are made to check their mirrors.
struct Servers {
    leafnodes: Vec<String>,
    /// The identity for the connections to them.
    nats: config::Nats,
}

async fn run(connection: Connection, region: Region, servers: Servers) {
    let client = connection.client();
    // The queue group is the region's own, so that members in another region do not take its requests.
    let group = format!("natter-mirrors-{region}");
    let requests = client.queue_subscribe(api::CONSUMER_REQUESTS, group).await;
    let answers = client.subscribe(api::CONSUMER_ANSWERS).await;
    let (mut requests, mut answers) = match (requests, answers) {
        (Ok(requests), Ok(answers)) => (requests, answers),
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(%error, "requests of mirrors can't be received; stalled mirrors recover by themselves, but later");
            return;
        }
    };
    let mut asked = Asked::new(region);
    let mut tick = interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // All branches are cancel-safe: a message is taken only if its branch is selected.
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
                let origins = asked.on_tick(now);
                if origins.is_empty() {
                    continue;
                }
                let back = answering(client, &origins).await;
                // Requests that were answered meanwhile are not lost.
                while let Some(Some(answer)) = answers.next().now_or_never() {
                    asked.on_answer(&answer.subject);
                }
                for request in asked.on_looked(&origins, &back, Instant::now()) {
                    repeat(client, request).await;
                }
                help(&mut asked, &back, &servers).await;
            }
        }
    }
}

/// Those of `regions` whose JetStream answers.
async fn answering(client: &async_nats::Client, regions: &BTreeSet<Region>) -> BTreeSet<Region> {
    let looks = regions.iter().map(async |region| {
        let request = client.request(in_domain(region, api::INFO), Bytes::new());
        let answered = matches!(timeout(LOOK_WITHIN, request).await, Ok(Ok(_)));
        answered.then(|| region.clone())
    });
    let looks = futures_util::future::join_all(looks).await;
    looks.into_iter().flatten().collect()
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

/// Makes the servers check their mirrors if a pausing mirror has its origin among the regions in `back`.
async fn help(asked: &mut Asked, back: &BTreeSet<Region>, servers: &Servers) {
    let pausing = asked.pausing();
    let back: BTreeSet<Region> = pausing.intersection(back).cloned().collect();
    if back.is_empty() {
        return;
    }
    let mut nudged = true;
    for address in &servers.leafnodes {
        if let Err(error) = nudge(address, &servers.nats).await {
            // The mirrors recover by themselves, later.
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "stalled mirrors were not restarted"
            );
            nudged = false;
        }
    }
    // A server that was not reached may still have pausing mirrors, so it is tried again.
    if nudged {
        tracing::info!(regions = ?back, "regions are back; stalled mirrors were restarted");
        asked.on_nudged(&back);
    }
}

/// Connects to the server at `address` (host and port for leaf nodes; with `tls://` before them, only with TLS) as a
/// leaf node with the identity in `nats`, and leaves again. The server then sets up at once those of its mirrors that
/// have heard nothing for 10 s and are not waiting for an answer. Each server checks the mirrors that it leads.
///
/// # Errors
/// [`NudgeError`]
pub async fn nudge(address: &str, nats: &config::Nats) -> Result<(), NudgeError> {
    let failed = |source| NudgeError::Io {
        address: address.to_owned(),
        source,
    };
    let talk = async {
        let Dialed {
            transport, buffer, ..
        } = introduce_leaf_node(nats, address, NAME)
            .await
            .map_err(|error| NudgeError::at(address, error))?;
        let said = (&buffer[..]).chain(transport).take(MAX_GREETING);
        let mut lines = BufReader::new(said);
        let mut line = String::new();
        // The server checks its mirrors while it accepts the connection.
        loop {
            line.clear();
            if lines.read_line(&mut line).await.map_err(failed)? == 0 {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
            if line.starts_with("PONG") {
                return Ok(());
            }
            if let Some(reason) = line.strip_prefix("-ERR") {
                return Err(NudgeError::Refused {
                    address: address.to_owned(),
                    reason: reason.trim().to_owned(),
                });
            }
        }
    };
    timeout(NUDGE_WITHIN, talk)
        .await
        .unwrap_or_else(|elapsed| Err(failed(elapsed.into())))
}

impl NudgeError {
    fn at(address: &str, error: DialError) -> Self {
        let address = address.to_owned();
        match error {
            DialError::Io(source) => Self::Io { address, source },
            DialError::Refused(reason) => Self::Refused { address, reason },
            DialError::Timeout => Self::Io {
                address,
                source: io::ErrorKind::TimedOut.into(),
            },
            error @ (DialError::Key(_) | DialError::Settings(_)) => Self::Identity {
                address,
                source: error.into(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn request(domain: &str, mirror: &str, reply: &str) -> Message {
        let payload = json!({
            "stream_name": "ROOMS_seoul_0",
            "config": { "name": mirror, "metadata": { "_nats.mirror.domain": domain } },
        });
        Message {
            subject: api::CONSUMER_REQUESTS
                .replace("$JS.*", "$JS.seoul")
                .replace("CREATE.*", "CREATE.ROOMS_seoul_0")
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

    /// The replies of the requests that are sent again after a check that Seoul has answered, or not.
    fn look(asked: &mut Asked, now: Instant, answers: bool) -> Vec<String> {
        let origins = asked.on_tick(now);
        let back = if answers {
            origins.clone()
        } else {
            BTreeSet::new()
        };
        let lost = asked.on_looked(&origins, &back, now);
        lost.iter()
            .map(|request| request.reply.to_string())
            .collect()
    }

    #[test]
    fn a_request_is_repeated_once_it_is_known_to_be_lost() {
        let (mut asked, start) = (Asked::new(region("frankfurt")), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        asked.on_request(request("frankfurt", "JS_MIRROR_a", "r1"), start);
        asked.on_request(request("frankfurt", "JS_MIRROR_b", "r2"), start);
        // The answer may be on its way; while the origin does not answer, the request may be, too.
        assert!(asked.on_tick(start).is_empty());
        for seconds in 2..10 {
            assert!(look(&mut asked, after(seconds), false).is_empty());
        }
        assert!(look(&mut asked, after(10), true).is_empty());
        // It was not lost.
        asked.on_answer(&"r2".into());
        assert_eq!(look(&mut asked, after(11), true), ["r1"]);
        // Our own repetition is heard too, and no further one is sent at once.
        asked.on_request(request("frankfurt", "JS_MIRROR_a", "r1"), after(11));
        assert!(look(&mut asked, after(12), true).is_empty());
        assert_eq!(look(&mut asked, after(16), true), ["r1"]);
        assert!(asked.pausing().is_empty());
        // A request that the server has given up must not be answered any more: the server may have sent another one.
        assert!(look(&mut asked, start + GIVEN_UP_AFTER, true).is_empty());
        assert_eq!(asked.pausing(), BTreeSet::from([region("seoul")]));
    }

    #[test]
    fn a_new_request_takes_the_place_of_the_one_before_and_ends_the_pause() {
        let (mut asked, start) = (Asked::new(region("frankfurt")), Instant::now());
        asked.on_request(request("frankfurt", "JS_MIRROR_a", "r1"), start);
        asked.on_request(request("frankfurt", "JS_MIRROR_a", "r2"), start);
        let later = start + LOOK_EVERY + LOOK_WITHIN;
        assert!(look(&mut asked, later, true).is_empty());
        assert_eq!(look(&mut asked, later + LOOK_EVERY, true), ["r2"]);
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
        assert!(asked.on_tick(now + LOOK_EVERY).is_empty());
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
