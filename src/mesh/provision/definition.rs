//! The streams that a region must have, made from the files in `nats/`.

use rand::Rng;
use serde_json::{Map, Value, json};

use crate::{
    config::Config,
    model::Region,
    subject::{self, EPOCH_METADATA, PARTITIONS_METADATA, REGIONS_METADATA, Subjects, api, bucket},
};

/// Space for a message's headers on top of `limits.body` in the stream.
const HEADER_ROOM: u64 = 32 * 1024;

const ROOMS: &str = include_str!("../../../nats/streams/rooms.json");

const HISTORY_DEAD: &str = include_str!("../../../nats/streams/history_dead.json");

const UNDELIVERED: &str = include_str!("../../../nats/streams/undelivered.json");

/// The buckets of a region, with their definitions.
const BUCKETS: [(&str, &str); 9] = [
    (
        bucket::PRESENCE,
        include_str!("../../../nats/buckets/presence.json"),
    ),
    (
        bucket::EDGES,
        include_str!("../../../nats/buckets/edges.json"),
    ),
    (
        bucket::LASTREAD,
        include_str!("../../../nats/buckets/lastread.json"),
    ),
    (
        bucket::CONTROL,
        include_str!("../../../nats/buckets/control.json"),
    ),
    (
        bucket::ROOMS,
        include_str!("../../../nats/buckets/rooms.json"),
    ),
    (
        bucket::INBOX,
        include_str!("../../../nats/buckets/inbox.json"),
    ),
    (
        bucket::HOOKS,
        include_str!("../../../nats/buckets/hooks.json"),
    ),
    (
        bucket::DEVICES,
        include_str!("../../../nats/buckets/devices.json"),
    ),
    (
        bucket::PUSHED,
        include_str!("../../../nats/buckets/pushed.json"),
    ),
];

/// What a stream holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// One partition of the durable rooms.
    Rooms { part: u16 },
    /// Messages that history could not write, or that receivers did not accept.
    Dead,
    /// The keys of a bucket.
    Bucket { bucket: &'static str },
}

/// A stream as it must be. The epoch in it is only an example: a new stream gets its own, and a mirror that of its
/// origin. Its list of regions contains only its own one.
#[derive(Debug, Clone)]
pub struct Definition {
    /// Name of the stream.
    pub stream: String,
    /// Its configuration, as the API of JetStream takes it.
    pub config: Map<String, Value>,
    pub(super) origin: Region,
    pub(super) kind: Kind,
}

/// All streams of the region `origin`.
#[must_use]
pub fn definitions(config: &Config, origin: &Region) -> Vec<Definition> {
    let subjects = Subjects::new(&config.nats.prefix);
    let rooms = (0..config.nats.partitions).map(|part| rooms(config, &subjects, origin, part));
    let buckets =
        BUCKETS.map(|(bucket, file)| bucket_definition(config, &subjects, origin, bucket, file));
    let dead = [
        (
            HISTORY_DEAD,
            subject::dead_stream(origin),
            subjects.dead_all(origin),
        ),
        (
            UNDELIVERED,
            subject::undelivered_stream(origin),
            subjects.undelivered_all(origin),
        ),
    ];
    let dead =
        dead.map(|(file, stream, captured)| dead_letters(config, origin, file, stream, captured));
    rooms.chain(dead).chain(buckets).collect()
}

fn parse(file: &str) -> Map<String, Value> {
    serde_json::from_str(file).expect("a file of nats/, embedded, and checked by a test")
}

fn rooms(config: &Config, subjects: &Subjects, origin: &Region, part: u16) -> Definition {
    let stream = subject::rooms_stream(origin, part);
    let captured = subjects.captured(origin, part);
    let streams = &config.streams;
    let mut json = parse(ROOMS);
    set(&mut json, "name", json!(stream));
    set(
        &mut json,
        "description",
        json!(format!(
            "Durable messages of the rooms of partition {part}, said in region {origin}"
        )),
    );
    set(&mut json, "subjects", json!([captured]));
    let live = subjects.republished(origin, origin, part);
    set(
        &mut json,
        "republish",
        json!({ "src": captured, "dest": live }),
    );
    set(&mut json, "num_replicas", json!(streams.replicas));
    set(&mut json, "max_bytes", limit(streams.max_bytes.as_u64()));
    set(&mut json, "max_age", nanos(streams.max_age));
    set(
        &mut json,
        "max_msgs_per_subject",
        limit(streams.max_msgs_per_room),
    );
    set(
        &mut json,
        "max_msg_size",
        json!(config.limits.body.as_u64() + HEADER_ROOM),
    );
    set(
        &mut json,
        "duplicate_window",
        nanos(streams.duplicate_window),
    );
    if let Some(Value::Object(metadata)) = json.get_mut("metadata") {
        set(
            metadata,
            PARTITIONS_METADATA,
            json!(config.nats.partitions.to_string()),
        );
        set(metadata, REGIONS_METADATA, json!(origin.as_str()));
    }
    Definition {
        stream,
        config: json,
        origin: origin.clone(),
        kind: Kind::Rooms { part },
    }
}

fn dead_letters(
    config: &Config,
    origin: &Region,
    file: &str,
    stream: String,
    captured: String,
) -> Definition {
    let mut json = parse(file);
    set(&mut json, "name", json!(stream));
    set(&mut json, "subjects", json!([captured]));
    set(&mut json, "num_replicas", json!(config.streams.replicas));
    Definition {
        stream,
        config: json,
        origin: origin.clone(),
        kind: Kind::Dead,
    }
}

fn bucket_definition(
    config: &Config,
    subjects: &Subjects,
    origin: &Region,
    bucket: &'static str,
    file: &str,
) -> Definition {
    let stream = subject::bucket_stream(bucket, origin);
    let captured = subject::bucket_captured(bucket, origin);
    let mut json = parse(file);
    set(&mut json, "name", json!(stream));
    set(&mut json, "subjects", json!([captured]));
    // Nobody but its writers wants to know of one without.
    if json.contains_key("republish") {
        let seen = subjects.bucket_republished(origin, origin, bucket);
        set(
            &mut json,
            "republish",
            json!({ "src": captured, "dest": seen }),
        );
    }
    set(&mut json, "num_replicas", json!(config.streams.replicas));
    Definition {
        stream,
        config: json,
        origin: origin.clone(),
        kind: Kind::Bucket { bucket },
    }
}

fn set(json: &mut Map<String, Value>, key: &str, value: Value) {
    json.insert(key.to_owned(), value);
}

/// "No limit" is 0 in the configuration and -1 in JetStream.
fn limit(number: u64) -> Value {
    if number == 0 {
        json!(-1)
    } else {
        json!(number)
    }
}

fn nanos(duration: std::time::Duration) -> Value {
    json!(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
}

impl Definition {
    /// Whether the stream has an epoch.
    pub(super) fn has_epoch(&self) -> bool {
        let metadata = self.config.get("metadata");
        metadata.is_some_and(|metadata| metadata.get(EPOCH_METADATA).is_some())
    }

    /// Sets a value in the metadata, if the stream has metadata.
    pub(super) fn set_metadata(&mut self, key: &str, value: &str) {
        if let Some(Value::Object(metadata)) = self.config.get_mut("metadata") {
            set(metadata, key, json!(value));
        }
    }

    /// The same stream as another region, `region`, must have it: a read-only mirror that republishes arriving messages
    /// to the edges there. The caller must set the epoch to that of the origin's stream. `None` if other regions do not
    /// mirror this stream.
    #[must_use]
    pub fn mirror_in(&self, region: &Region, subjects: &Subjects) -> Option<Self> {
        let mut mirror = self.clone();
        let config = &mut mirror.config;
        // A mirror accepts no messages and does not deduplicate or expire them by itself.
        for field in ["subjects", "duplicate_window", "subject_delete_marker_ttl"] {
            config.remove(field);
        }
        if let Some(Value::Object(metadata)) = config.get_mut("metadata") {
            metadata.remove(REGIONS_METADATA);
        }
        set(
            config,
            "mirror",
            json!({ "name": self.stream, "external": { "api": api::of(&self.origin) } }),
        );
        let (captured, seen) = match self.kind {
            Kind::Rooms { part } => (
                subjects.captured(&self.origin, part),
                subjects.republished(region, &self.origin, part),
            ),
            Kind::Dead => return None,
            Kind::Bucket { .. } if !self.config.contains_key("republish") => return None,
            Kind::Bucket { bucket } => (
                subject::bucket_captured(bucket, &self.origin),
                subjects.bucket_republished(region, &self.origin, bucket),
            ),
        };
        set(
            config,
            "republish",
            json!({ "src": captured, "dest": seen }),
        );
        Some(mirror)
    }
}

/// A random epoch: 8 characters of `[a-z0-9]`, 41 bits, so that two incarnations of a stream practically never have the
/// same.
pub(super) fn new_epoch() -> String {
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut rng = rand::rng();
    (0..8)
        .filter_map(|_| ALPHABET.get(rng.random_range(0..ALPHABET.len())))
        .map(|byte| char::from(*byte))
        .collect()
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format, Toml};

    use super::*;
    use crate::model::Epoch;

    fn definitions(config: &Config) -> Vec<Definition> {
        super::definitions(config, &config.region())
    }

    fn config(toml: &str) -> Config {
        Config::with_defaults(Toml::string(toml)).unwrap()
    }

    #[test]
    fn the_files_are_the_definitions_of_the_defaults() {
        let definitions = definitions(&config(""));
        assert_eq!(definitions.len(), 15);
        assert_eq!(definitions[0].config, parse(ROOMS));
        assert_eq!(definitions[4].config, parse(HISTORY_DEAD));
        assert_eq!(definitions[5].config, parse(UNDELIVERED));
        for (definition, (_, file)) in definitions[6..].iter().zip(BUCKETS) {
            assert_eq!(definition.config, parse(file));
        }
    }

    #[test]
    fn definitions_follow_the_configuration() {
        let definitions = definitions(&config(
            "region = 'seoul'\n[nats]\nprefix = 'm2'\npartitions = 2\n[streams]\nreplicas = 3\nmax_age = '1h'\nmax_bytes = '1GiB'\nmax_msgs_per_room = 9000\nduplicate_window = '1m'",
        ));
        let names: Vec<_> = definitions.iter().map(|d| d.stream.as_str()).collect();
        assert_eq!(
            names,
            [
                "ROOMS_seoul_0",
                "ROOMS_seoul_1",
                "HISTORY_DEAD_seoul",
                "UNDELIVERED_seoul",
                "KV_presence_seoul",
                "KV_edges_seoul",
                "KV_lastread_seoul",
                "KV_control_seoul",
                "KV_rooms_seoul",
                "KV_inbox_seoul",
                "KV_hooks_seoul",
                "KV_devices_seoul",
                "KV_pushed_seoul"
            ]
        );
        let virginia = Region::parse("virginia").unwrap();
        let subjects = Subjects::new("m2");
        let mirrored = |at: usize| definitions[at].mirror_in(&virginia, &subjects).is_some();
        assert!(mirrored(11) && !mirrored(12));
        let rooms = &definitions[1].config;
        assert_eq!(rooms["subjects"], json!(["m2.in.seoul.1.>"]));
        assert_eq!(
            rooms["republish"],
            json!({ "src": "m2.in.seoul.1.>", "dest": "m2.live.seoul.seoul.1.>" })
        );
        assert_eq!(rooms["max_age"], json!(3_600_000_000_000_u64));
        assert_eq!(rooms["max_bytes"], json!(1_u64 << 30));
        assert_eq!(rooms["max_msgs_per_subject"], json!(9000));
        assert_eq!(rooms["duplicate_window"], json!(60_000_000_000_u64));
        assert_eq!(rooms["metadata"][PARTITIONS_METADATA], json!("2"));
        for definition in &definitions {
            assert_eq!(definition.config["num_replicas"], json!(3));
        }
        assert_eq!(
            definitions[2].config["subjects"],
            json!(["m2.dead.seoul.>"])
        );
        assert_eq!(
            definitions[4].config["republish"]["dest"],
            json!("m2.kv.seoul.seoul.presence.>")
        );
    }

    #[test]
    fn epochs_are_random_and_can_stand_in_a_cursor() {
        let epoch = new_epoch();
        assert!(Epoch::parse(&epoch).is_some(), "{epoch}");
        assert_ne!(epoch, new_epoch());
    }

    #[test]
    fn a_mirror_reads_from_the_origin_and_republishes_in_its_own_region() {
        let config = config("region = 'seoul'");
        let subjects = Subjects::new("natter");
        let virginia = Region::parse("virginia").unwrap();
        let definitions = definitions(&config);
        let rooms = definitions[3].mirror_in(&virginia, &subjects).unwrap();
        assert_eq!(rooms.stream, "ROOMS_seoul_3");
        assert!(!rooms.config.contains_key("subjects"));
        assert_eq!(
            rooms.config["mirror"],
            json!({ "name": "ROOMS_seoul_3", "external": { "api": "$JS.seoul.API" } })
        );
        assert_eq!(
            rooms.config["republish"],
            json!({ "src": "natter.in.seoul.3.>", "dest": "natter.live.virginia.seoul.3.>" })
        );
        let presence = definitions[6].mirror_in(&virginia, &subjects).unwrap();
        for dead in &definitions[4..6] {
            assert!(dead.mirror_in(&virginia, &subjects).is_none());
        }
        assert_eq!(
            presence.config["republish"]["dest"],
            json!("natter.kv.virginia.seoul.presence.>")
        );
    }
}
