//! The devices of a user that are notified while the user is away: a key for each user in the bucket `devices`.

use std::collections::{BTreeMap, HashMap};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde::{Deserialize, Serialize};

use super::{
    index,
    known::People,
    record::{Field, Merge, Stamp, is_on, merged},
    write::refusal,
};
use crate::{
    bus::Entry,
    config::{PUBLIC_KEY_BYTES, Quiet},
    model::{RoomId, is_token},
    protocol::{ErrorCode, Refused},
    runtime::unix_ms,
    subject::{block_key, device_key, inbox_key, parse_block_key},
};

/// Longest token, topic or URL of a device, in bytes.
const MAX_TEXT: usize = 2048;

/// Longest name of a device.
const MAX_NAME: usize = 64;

/// How long it is remembered that a device was removed, so that no other region brings it back.
const REMOVED_FOR_MS: u64 = 30 * 24 * 3_600_000;

/// How many devices more than `push.devices` are remembered of a user, since some were removed. If there are as many, none
/// gets a name that is not known.
const MAX_REMOVED: usize = 200;

/// Bytes of the secret of a subscription.
const AUTH_BYTES: usize = 16;

/// Base64url with and without padding: browsers and libraries differ.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Where a device is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Device {
    /// A browser.
    Webpush {
        /// What its `PushSubscription.toJSON()` says.
        subscription: Subscription,
    },
    /// An app with Firebase Cloud Messaging.
    Fcm {
        /// Its registration token.
        token: String,
    },
    /// An app of Apple's systems.
    Apns {
        /// Its device token, hexadecimal.
        token: String,
        /// The app's bundle id.
        topic: String,
    },
    /// Whatever the operator's own service knows by this token.
    Webhook {
        /// The token.
        token: String,
    },
}

/// A browser's subscription.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Subscription {
    /// URL of the push service.
    pub endpoint: String,
    keys: Keys,
}

/// The keys of a subscription, in base64url.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
struct Keys {
    p256dh: String,
    auth: String,
}

/// What is known of a user's devices.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Devices {
    /// By name; no value: removed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    devices: BTreeMap<String, Field<Option<Device>>>,
    /// When the user is not disturbed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    quiet: Option<Field<Option<Quiet>>>,
}

/// Why a user may get no notification of a room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Unwanted {
    /// The user has muted the room.
    pub muted: bool,
    /// The user has blocked the sender.
    pub blocked: bool,
}

impl Subscription {
    /// A subscription with these keys, in base64url.
    #[cfg(test)]
    pub fn new(endpoint: &str, p256dh: &str, auth: &str) -> Self {
        Self {
            endpoint: endpoint.to_owned(),
            keys: Keys {
                p256dh: p256dh.to_owned(),
                auth: auth.to_owned(),
            },
        }
    }

    /// The browser's public key, and the secret that it shares; `None` if they are none.
    #[must_use]
    pub fn keys(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        let key = BASE64.decode(&self.keys.p256dh).ok()?;
        let auth = BASE64.decode(&self.keys.auth).ok()?;
        (key.len() == PUBLIC_KEY_BYTES && auth.len() == AUTH_BYTES).then_some((key, auth))
    }
}

impl Device {
    /// Checks what a client says of it.
    ///
    /// # Errors
    /// `bad_request`.
    fn check(&self) -> Result<(), Refused> {
        let bad = |text: String| Err(Refused::new(ErrorCode::BadRequest, text));
        let (name, text) = match self {
            Self::Webpush { subscription } => ("subscription.endpoint", &subscription.endpoint),
            Self::Fcm { token } | Self::Webhook { token } => ("token", token),
            Self::Apns { token, .. } => ("token", token),
        };
        if !(1..=MAX_TEXT).contains(&text.len())
            || !text.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return bad(format!(
                "{name} must have 1 to {MAX_TEXT} characters, ASCII without spaces"
            ));
        }
        match self {
            Self::Webpush { subscription } => {
                let url: Option<hyper::Uri> = subscription.endpoint.parse().ok();
                let is_good = url.is_some_and(|url| {
                    let host = url.authority().filter(|its| !its.as_str().contains('@'));
                    matches!(url.scheme_str(), Some("http" | "https")) && host.is_some()
                });
                if !is_good {
                    return bad("subscription.endpoint is no URL".to_owned());
                }
                if subscription.keys().is_none() {
                    let text = "subscription.keys must have p256dh (65 bytes) and auth (16 bytes), in base64url";
                    return bad(text.to_owned());
                }
            }
            Self::Apns { token, topic } => {
                if !token.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                    return bad("token must be hexadecimal".to_owned());
                }
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-".contains(&byte);
                if topic.is_empty() || topic.len() > 255 || !topic.bytes().all(plain) {
                    return bad("topic must be the bundle id of an app".to_owned());
                }
            }
            Self::Fcm { .. } | Self::Webhook { .. } => {}
        }
        Ok(())
    }

    /// The name of its kind.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Webpush { .. } => "webpush",
            Self::Fcm { .. } => "fcm",
            Self::Apns { .. } => "apns",
            Self::Webhook { .. } => "webhook",
        }
    }
}

impl Devices {
    /// Those that were not removed, by name.
    pub fn all(&self) -> impl Iterator<Item = (&str, &Device)> {
        let devices = self.devices.iter();
        devices.filter_map(|(name, field)| Some((name.as_str(), field.value.as_ref()?)))
    }

    /// The user's own quiet hours. `None`: the user has said nothing.
    #[must_use]
    pub fn quiet(&self) -> Option<Option<Quiet>> {
        self.quiet.as_ref().map(|field| field.value)
    }

    fn forget_removed(&mut self, now: u64) {
        self.devices.retain(|_, field| {
            field.value.is_some() || now < field.stamp.at.saturating_add(REMOVED_FOR_MS)
        });
    }
}

impl Merge for Devices {
    fn merge_from(&mut self, other: &Self) {
        self.devices.merge_from(&other.devices);
        self.quiet.merge_from(&other.quiet);
    }
}

impl People {
    /// The devices of users who have some.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn devices_of(&self, users: &[String]) -> Result<HashMap<String, Devices>, Refused> {
        let keys: Vec<String> = users.iter().map(|user| device_key(user)).collect();
        let entries = self.get(&self.devices, &keys).await.map_err(refusal)?;
        let mut found = merged(entries.iter().map(|(_, entry)| entry));
        let all = users.iter().zip(&keys);
        Ok(all
            .filter_map(|(user, key)| Some((user.clone(), found.remove(key.as_str())?)))
            .collect())
    }

    /// Adds or replaces a device, or removes it. `if_is`: only if it still is this one.
    ///
    /// # Errors
    /// `bad_request`, `limit`, or `unavailable`.
    pub async fn put_device(
        &self,
        user: &str,
        name: &str,
        device: Option<&Device>,
        if_is: Option<&Device>,
    ) -> Result<(), Refused> {
        if !is_token(name) || name.len() > MAX_NAME {
            let text = format!("a device is named [A-Za-z0-9_-]{{1,{MAX_NAME}}}");
            return Err(Refused::new(ErrorCode::BadRequest, text));
        }
        if let Some(device) = device {
            device.check()?;
        }
        let most = self.config.push.devices;
        self.change_devices(user, |devices, stamp| {
            let known = devices.devices.get(name);
            let value = known.and_then(|field| field.value.as_ref());
            if value == device || if_is.is_some() && value != if_is {
                return Ok(false);
            }
            if device.is_some() && value.is_none() && devices.all().count() >= most {
                let text = format!("this user has {most} devices, which is the limit");
                return Err(Refused::new(ErrorCode::Limit, text));
            }
            if known.is_none() && devices.devices.len() >= most + MAX_REMOVED {
                let text = format!(
                    "this user has had {} devices within 30 days, which is the limit: use one of their names",
                    most + MAX_REMOVED
                );
                return Err(Refused::new(ErrorCode::Limit, text));
            }
            let stamp = stamp(known.map(|field| &field.stamp));
            devices.devices.insert(
                name.to_owned(),
                Field {
                    value: device.cloned(),
                    stamp,
                },
            );
            Ok(true)
        })
        .await
    }

    /// Sets the user's quiet hours; `None`: there are none, whatever the configuration says.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn set_quiet(&self, user: &str, quiet: Option<Quiet>) -> Result<(), Refused> {
        self.change_devices(user, |devices, stamp| {
            if devices.quiet() == Some(quiet) {
                return Ok(false);
            }
            let stamp = stamp(devices.quiet.as_ref().map(|field| &field.stamp));
            devices.quiet = Some(Field {
                value: quiet,
                stamp,
            });
            Ok(true)
        })
        .await
    }

    /// `change` returns whether it has changed something. It gets what makes the stamp of a field, which had another one
    /// before.
    async fn change_devices(
        &self,
        user: &str,
        change: impl Fn(&mut Devices, &dyn Fn(Option<&Stamp>) -> Stamp) -> Result<bool, Refused>,
    ) -> Result<(), Refused> {
        let origin = self.devices.origin();
        let changed = |known: Option<&Devices>| {
            let mut devices = known.cloned().unwrap_or_default();
            let now = unix_ms();
            let stamp = |before: Option<&Stamp>| Stamp {
                at: before.map_or(0, |stamp| stamp.at + 1).max(now),
                origin: origin.clone(),
            };
            let is_new = change(&mut devices, &stamp)?;
            devices.forget_removed(now);
            Ok((is_new.then_some(devices), ()))
        };
        self.update(&self.devices, &device_key(user), changed)
            .await
            .map(drop)
    }

    /// Which of these users do not want notifications of messages of `sender` in a room.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn unwanted(
        &self,
        room: &RoomId,
        sender: &str,
        users: &[String],
    ) -> Result<HashMap<String, Unwanted>, Refused> {
        let keys: Vec<String> = users
            .iter()
            .flat_map(|user| [inbox_key(user, room), block_key(user, sender)])
            .collect();
        let found = self.get(&self.index, &keys).await.map_err(refusal)?;
        let found = found.into_iter().map(|(_own, entry)| entry);
        let (blocks, entries): (Vec<Entry>, Vec<Entry>) =
            found.partition(|entry| parse_block_key(&entry.key).is_some());
        let entries: BTreeMap<&str, index::Entry> = merged(&entries);
        let blocks: BTreeMap<&str, Field<bool>> = merged(&blocks);
        let all = users.iter().map(|user| {
            let entry = entries.get(inbox_key(user, room).as_str());
            let unwanted = Unwanted {
                muted: entry.is_some_and(|entry| is_on(entry.muted.as_ref())),
                blocked: is_on(blocks.get(block_key(user, sender).as_str())),
            };
            (user.clone(), unwanted)
        });
        Ok(all.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Region;

    fn fcm(token: &str) -> Device {
        Device::Fcm {
            token: token.to_owned(),
        }
    }

    fn field(value: Option<Device>, at: u64, origin: &str) -> Field<Option<Device>> {
        let origin = Region::parse(origin).unwrap();
        Field {
            value,
            stamp: Stamp { at, origin },
        }
    }

    #[test]
    fn the_last_write_of_each_device_counts_over_regions() {
        let of = |name: &str, field: Field<Option<Device>>| Devices {
            devices: BTreeMap::from([(name.to_owned(), field)]),
            quiet: None,
        };
        let mut seoul = of("phone", field(Some(fcm("a")), 5, "seoul"));
        let virginia = of("phone", field(None, 6, "virginia"));
        let tablet = of("tablet", field(Some(fcm("b")), 1, "virginia"));
        let mut other = virginia.clone();
        seoul.merge_from(&virginia);
        seoul.merge_from(&tablet);
        other.merge_from(&tablet);
        other.merge_from(&of("phone", field(Some(fcm("a")), 5, "seoul")));
        assert_eq!(seoul, other);
        let names: Vec<&str> = seoul.all().map(|(name, _)| name).collect();
        assert_eq!(names, ["tablet"]);
        seoul.forget_removed(6 + REMOVED_FOR_MS);
        assert_eq!(seoul.devices.len(), 1);
    }

    #[test]
    fn devices_are_checked() {
        let key = BASE64.encode([4; 65]);
        let device = |json: &str| serde_json::from_str::<Device>(json);
        let web = |endpoint: &str, key: &str, auth: &str| {
            format!(
                r#"{{"kind":"webpush","subscription":{{"endpoint":"{endpoint}","expirationTime":null,"keys":{{"p256dh":"{key}","auth":"{auth}"}}}}}}"#
            )
        };
        for good in [
            web("https://push.example/1", &key, "BTBZMqHH6r4Tts7J_aSIgg"),
            web("https://push.example/1", &key, "BTBZMqHH6r4Tts7J_aSIgg=="),
            r#"{"kind":"fcm","token":"a:b"}"#.to_owned(),
            r#"{"kind":"apns","token":"00ff","topic":"org.example.app"}"#.to_owned(),
            r#"{"kind":"webhook","token":"x"}"#.to_owned(),
        ] {
            device(&good).unwrap().check().unwrap();
        }
        for (bad, told) in [
            (
                web("push.example", &key, "BTBZMqHH6r4Tts7J_aSIgg"),
                "endpoint",
            ),
            (
                web("https://u:p@push.example", &key, "BTBZMqHH6r4Tts7J_aSIgg"),
                "endpoint",
            ),
            (
                web("https://push.example/1", "AAAA", "BTBZMqHH6r4Tts7J_aSIgg"),
                "keys",
            ),
            (web("https://push.example/1", &key, "AAAA"), "keys"),
            (r#"{"kind":"fcm","token":""}"#.to_owned(), "token"),
            (
                r#"{"kind":"apns","token":"xyz","topic":"a"}"#.to_owned(),
                "hexadecimal",
            ),
            (
                r#"{"kind":"apns","token":"00","topic":"a/b"}"#.to_owned(),
                "topic",
            ),
        ] {
            let error = device(&bad).unwrap().check().unwrap_err();
            assert!(error.message.contains(told), "{bad}: {}", error.message);
        }
        assert!(device(r#"{"kind":"pager"}"#).is_err());
    }
}
