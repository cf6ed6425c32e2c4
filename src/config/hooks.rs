//! `[[hooks]]` and `[hook]`: receivers of events.

use std::{collections::BTreeMap, fmt, net::SocketAddr, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    ConfigError, Namespace, Network, Presence, SigningSecrets,
    outbound::{Common, check_common, check_patterns},
};
use crate::model::RoomScope;

/// Most hooks of a region: each has a consumer on every stream of rooms, and metrics of its own.
pub const MAX_HOOKS: usize = 16;

/// `[hook]`: the process that sends events.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HookService {
    pub listen: SocketAddr,
    #[serde(with = "humantime_serde")]
    pub offline_after: Duration,
}

/// An entry of `[[hooks]]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// Its durable consumers and its label in metrics are named after it.
    pub name: String,
    pub url: String,
    #[serde(default)]
    pub secret: SigningSecrets,
    #[serde(default)]
    pub secret_file: PathBuf,
    /// What it is told.
    pub events: Vec<HookEvent>,
    /// `namespace:name`, `namespace:*` or `*:*`.
    #[serde(default)]
    pub rooms: Vec<String>,
    /// All rooms of these namespaces, besides `rooms`.
    #[serde(default)]
    pub namespaces: Vec<String>,
    /// Whether an event of a room is sent only when the one before it is done.
    #[serde(default = "Hook::ordered")]
    pub ordered: bool,
    #[serde(default = "Hook::timeout", with = "humantime_serde")]
    pub timeout: Duration,
    /// Most requests that are open at once.
    #[serde(default = "Hook::concurrency")]
    pub concurrency: usize,
    /// An event that fails when it is older than this becomes a dead letter.
    #[serde(default = "Hook::retry_for", with = "humantime_serde")]
    pub retry_for: Duration,
    /// Ranges of addresses that `url` may lead to although they are not public.
    #[serde(default)]
    pub allow: Vec<Network>,
}

macro_rules! events {
    ($( $variant:ident $name:literal ),+ $(,)?) => {
        /// A type of event.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
        #[serde(try_from = "String", into = "String")]
        pub enum HookEvent { $( $variant ),+ }

        impl HookEvent {
            /// All types, as they are documented.
            pub const ALL: &'static [Self] = &[$( Self::$variant ),+];

            /// The name of the type.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $( Self::$variant => $name ),+ }
            }
        }
    };
}

events! {
    MessageCreated "message.created",
    MessageEdited "message.edited",
    MessageDeleted "message.deleted",
    ReactionAdded "reaction.added",
    ReactionRemoved "reaction.removed",
    AnnotationAdded "annotation.added",
    RoomCreated "room.created",
    RoomUpdated "room.updated",
    RoomDeleted "room.deleted",
    RoomOccupied "room.occupied",
    RoomVacated "room.vacated",
    RoomAlert "room.alert",
    MemberAdded "member.added",
    MemberRemoved "member.removed",
    MemberBanned "member.banned",
    UserOnline "user.online",
    UserOffline "user.offline",
    UploadCompleted "upload.completed",
}

impl HookEvent {
    /// Whether it is about users as such, so that no room decides who is told.
    #[must_use]
    pub fn is_of_user(self) -> bool {
        matches!(self, Self::UserOnline | Self::UserOffline)
    }

    /// Whether it comes from presence, and not from the log of a room.
    #[must_use]
    pub fn is_presence(self) -> bool {
        self.is_of_user() || matches!(self, Self::RoomOccupied | Self::RoomVacated)
    }
}

impl TryFrom<String> for HookEvent {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|event| event.as_str() == text);
        found.copied().ok_or_else(|| {
            let all: Vec<&str> = Self::ALL.iter().map(|event| event.as_str()).collect();
            format!("{text:?} is not an event: there are {}", all.join(", "))
        })
    }
}

impl From<HookEvent> for String {
    fn from(event: HookEvent) -> Self {
        event.as_str().to_owned()
    }
}

impl fmt::Display for HookEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Hook {
    fn ordered() -> bool {
        true
    }

    fn timeout() -> Duration {
        Duration::from_secs(10)
    }

    fn concurrency() -> usize {
        32
    }

    fn retry_for() -> Duration {
        Duration::from_secs(24 * 3600)
    }

    /// The patterns of `rooms` and `namespaces`.
    fn patterns(&self) -> Vec<String> {
        let whole = self.namespaces.iter().map(|name| format!("{name}:*"));
        self.rooms.iter().cloned().chain(whole).collect()
    }

    /// Its rooms, validated.
    #[must_use]
    pub fn scope(&self) -> RoomScope {
        let patterns = self.patterns();
        RoomScope::of_patterns(patterns.iter().map(String::as_str)).unwrap_or_default()
    }

    /// Whether one of these events is wanted.
    #[must_use]
    pub fn wants(&self, events: &[HookEvent]) -> bool {
        events.iter().any(|event| self.events.contains(event))
    }

    pub(super) fn read_files(&mut self) -> Result<(), ConfigError> {
        let key = format!("hooks.{}.secret_file", self.name);
        self.secret.read_file(&key, &self.secret_file)
    }
}

/// Checks all entries.
pub(super) fn check(
    hooks: &[Hook],
    service: &HookService,
    presence: &Presence,
    namespaces: &BTreeMap<String, Namespace>,
    check: &mut impl FnMut(bool, String),
) {
    check(
        hooks.len() <= MAX_HOOKS,
        format!("hooks: {} of them, at most {MAX_HOOKS}", hooks.len()),
    );
    check(
        service.offline_after <= Duration::from_secs(3600),
        format!(
            "hook.offline_after = {:?}: must be at most 1h",
            service.offline_after
        ),
    );
    let common = hooks.iter().map(|hook| Common {
        name: &hook.name,
        url: &hook.url,
        secret: &hook.secret,
        concurrency: hook.concurrency,
        timeout: hook.timeout,
    });
    check_common("hooks", &common.collect::<Vec<_>>(), check);
    for hook in hooks {
        let key = format!("hooks.{}", hook.name);
        check(
            !hook.events.is_empty(),
            format!("{key}.events is empty: the hook would get nothing"),
        );
        let of_rooms = hook.events.iter().any(|event| !event.is_of_user());
        let of_log = hook.events.iter().any(|event| !event.is_presence());
        let of_presence = hook.events.iter().find(|event| event.is_presence());
        if let Some(event) = of_presence {
            check(
                presence.users,
                format!(
                    "presence.users = false: must be true, in all edges of the mesh too, for {event} in {key}.events"
                ),
            );
        }
        let patterns = hook.patterns();
        if of_rooms || !patterns.is_empty() {
            check_patterns(&key, &patterns, of_log, namespaces, check);
        }
        check(
            !hook.retry_for.is_zero(),
            format!("{key}.retry_for = 0: must be above 0"),
        );
    }
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format as _, Toml};

    use super::*;
    use crate::config::Config;

    const GOOD: &str = "[[hooks]]\nname = 'crm'\nrooms = ['chat:*']\nurl = 'http://127.0.0.1:9000/hook'\nsecret = 'whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw'\nevents = ['message.created']\n";

    fn load(toml: &str) -> Result<Config, String> {
        Config::with_defaults(Toml::string(toml)).map_err(|error| error.to_string())
    }

    #[test]
    fn an_entry_has_the_documented_defaults() {
        assert!(load("").unwrap().hooks.is_empty());
        let all = load(GOOD).unwrap().hooks;
        let [hook] = &all[..] else { panic!() };
        assert_eq!(hook.events, [HookEvent::MessageCreated]);
        assert!(hook.ordered && hook.allow.is_empty());
        assert_eq!((hook.concurrency, hook.timeout.as_secs()), (32, 10));
        assert_eq!(hook.retry_for.as_secs(), 86_400);
        let shown = toml::to_string_pretty(&load(GOOD).unwrap()).unwrap();
        assert!(shown.contains("\"message.created\"") && !shown.contains("MfKQ"));
        let namespaces = GOOD.replace("rooms = ['chat:*']", "namespaces = ['chat']");
        assert_eq!(load(&namespaces).unwrap().hooks[0].scope(), hook.scope());
        // Users are in no room, and presence needs no log.
        let users = GOOD
            .replace("rooms = ['chat:*']\n", "")
            .replace("message.created", "user.online");
        let error = load(&users).unwrap_err();
        assert!(
            error.contains("presence.users = false: must be true"),
            "{error}"
        );
        let on = "presence.users = true\n";
        load(&format!("{on}{users}")).unwrap();
        let live = GOOD
            .replace("chat:*", "live:*")
            .replace("message.created", "room.occupied");
        load(&format!("{on}{live}")).unwrap();
    }

    #[test]
    fn every_fault_of_an_entry_is_named() {
        let bad = "hook.offline_after = '2h'\n[[hooks]]\nname = 'a b'\nrooms = ['chat:a*']\nurl = 'ftp://x/?key=hidden'\nevents = []\nconcurrency = 0\ntimeout = '6m'\nretry_for = '0s'\n";
        let error = load(bad).unwrap_err();
        for told in [
            "hook.offline_after = 7200s",
            "hooks: name = \"a b\"",
            "hooks.a b.rooms: \"chat:a*\"",
            "hooks.a b.events is empty",
            "hooks.a b.url",
            "hooks.a b.secret is empty",
            "hooks.a b.concurrency = 0",
            "hooks.a b.timeout = 360s",
            "hooks.a b.retry_for = 0",
        ] {
            assert!(error.contains(told), "{told} is missing in: {error}");
        }
        assert!(!error.contains("hidden"), "{error}");
        for (from, to, told) in [
            ("rooms = ['chat:*']\n", "", "hooks.crm.rooms is empty"),
            ("chat:*", "live:*", "live is not durable"),
            (
                "message.created",
                "message.read",
                "\"message.read\" is not an event",
            ),
        ] {
            let error = load(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.contains(told), "{told} is missing in: {error}");
        }
        let error = load(&GOOD.repeat(2)).unwrap_err();
        assert!(error.contains("\"crm\" is used twice"), "{error}");
    }
}
