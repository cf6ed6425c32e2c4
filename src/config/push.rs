//! `[push]`: notifications for users who are away, and the services that deliver them.

use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hyper::Uri;
use serde::{Deserialize, Serialize};

use super::{ConfigError, Network, Secret, SigningSecrets, outbound::check_receiver};

/// Most requests that a process may have open.
const MAX_CONCURRENCY: usize = 1000;

/// Longest timeout of a request.
const MAX_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest `push.after` and `push.max_age`: messages wait in the stream's consumer for the first, and claims are kept for
/// longer than the second.
const MAX_AFTER: Duration = Duration::from_secs(3600);
const MAX_AGE: Duration = Duration::from_secs(12 * 3600);

/// Most devices of a user.
const MAX_DEVICES: usize = 100;

/// Bytes of a public key on the curve P-256, uncompressed.
pub const PUBLIC_KEY_BYTES: usize = 65;

/// `[push]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Push {
    pub listen: SocketAddr,
    #[serde(with = "humantime_serde")]
    pub after: Duration,
    #[serde(with = "humantime_serde")]
    pub max_age: Duration,
    pub content: PushContent,
    pub title: String,
    pub text: String,
    /// When nobody who has set no hours of their own is disturbed.
    pub quiet: String,
    pub badge: bool,
    pub devices: usize,
    pub concurrency: usize,
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    pub allow: Vec<Network>,
    pub vapid_private_key: Secret,
    pub vapid_private_key_file: PathBuf,
    pub vapid_public_key: String,
    pub subject: String,
    pub fcm_service_account: Secret,
    pub fcm_service_account_file: PathBuf,
    pub fcm_url: String,
    pub apns_key: Secret,
    pub apns_key_file: PathBuf,
    pub apns_key_id: String,
    pub apns_team_id: String,
    pub apns_url: String,
    pub webhook_url: String,
    pub webhook_secret: SigningSecrets,
    pub webhook_secret_file: PathBuf,
}

/// What a notification says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PushContent {
    /// Title and text.
    Text,
    /// Only that there is something.
    None,
}

/// Hours of the day in which a user is not disturbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Quiet {
    /// Minutes after midnight.
    from: u32,
    to: u32,
    /// Minutes by which the user's clock is ahead of UTC.
    offset: i32,
}

const DAY: u32 = 24 * 60;

impl Quiet {
    /// Whether it is quiet at a time, in ms since 1970.
    #[must_use]
    pub fn contains(&self, ms: u64) -> bool {
        let minutes = i64::try_from(ms / 60_000).unwrap_or_default() + i64::from(self.offset);
        let at = u32::try_from(minutes.rem_euclid(i64::from(DAY))).unwrap_or_default();
        match self.from <= self.to {
            true => (self.from..self.to).contains(&at),
            false => at >= self.from || at < self.to,
        }
    }
}

/// Minutes of `HH:MM`.
fn minutes(text: &str, hours: u32) -> Option<u32> {
    let (hour, minute) = text.split_once(':')?;
    let number = |text: &str| (text.len() == 2).then(|| text.parse::<u32>().ok())?;
    let (hour, minute) = (number(hour)?, number(minute)?);
    (hour < hours && minute < 60).then_some(hour * 60 + minute)
}

impl TryFrom<String> for Quiet {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parsed = || {
            let (hours, offset) = match text.split_once(' ') {
                Some((hours, offset)) => (hours, offset),
                None => (&*text, "+00:00"),
            };
            let (from, to) = hours.split_once('-')?;
            let (sign, offset) = match offset.strip_prefix('-') {
                Some(offset) => (-1, offset),
                None => (1, offset.strip_prefix('+')?),
            };
            let offset = i32::try_from(minutes(offset, 15)?).ok()?;
            Some(Self {
                from: minutes(from, 24)?,
                to: minutes(to, 24)?,
                offset: sign * offset,
            })
        };
        parsed().ok_or_else(|| {
            format!("{text:?} is not a time of day with an offset, as 22:00-07:00 +09:00")
        })
    }
}

impl From<Quiet> for String {
    fn from(quiet: Quiet) -> Self {
        quiet.to_string()
    }
}

impl fmt::Display for Quiet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to, offset } = self;
        let sign = if *offset < 0 { '-' } else { '+' };
        let offset = offset.unsigned_abs();
        write!(
            f,
            "{:02}:{:02}-{:02}:{:02} {sign}{:02}:{:02}",
            from / 60,
            from % 60,
            to / 60,
            to % 60,
            offset / 60,
            offset % 60
        )
    }
}

impl Push {
    /// Whether there is a service that can deliver something.
    #[must_use]
    pub fn is_on(&self) -> bool {
        [
            &self.vapid_private_key,
            &self.fcm_service_account,
            &self.apns_key,
        ]
        .iter()
        .any(|key| !key.expose().is_empty())
            || !self.webhook_url.is_empty()
    }

    /// The hours of those who have set none.
    #[must_use]
    pub fn quiet(&self) -> Option<Quiet> {
        Quiet::try_from(self.quiet.clone()).ok()
    }

    /// The public key for browsers; `None`: not configured, or not a key.
    #[must_use]
    pub fn public_key(&self) -> Option<Vec<u8>> {
        let key = URL_SAFE_NO_PAD.decode(&self.vapid_public_key).ok()?;
        (key.len() == PUBLIC_KEY_BYTES && key.first() == Some(&4)).then_some(key)
    }

    pub(super) fn read_files(&mut self) -> Result<(), ConfigError> {
        for (key, secret, file) in [
            (
                "push.vapid_private_key_file",
                &mut self.vapid_private_key,
                &self.vapid_private_key_file,
            ),
            (
                "push.fcm_service_account_file",
                &mut self.fcm_service_account,
                &self.fcm_service_account_file,
            ),
            (
                "push.apns_key_file",
                &mut self.apns_key,
                &self.apns_key_file,
            ),
        ] {
            secret.read_file(key, file)?;
        }
        let file = &self.webhook_secret_file;
        self.webhook_secret
            .read_file("push.webhook_secret_file", file)
    }

    pub(super) fn check(&self, check: &mut impl FnMut(bool, String)) {
        for (key, value, most) in [
            ("after", self.after, MAX_AFTER),
            ("max_age", self.max_age, MAX_AGE),
            ("timeout", self.timeout, MAX_TIMEOUT),
        ] {
            check(
                !value.is_zero() && value <= most,
                format!("push.{key} = {value:?}: must be above 0 and at most {most:?}"),
            );
        }
        check(
            self.max_age >= 2 * self.after,
            format!(
                "push.max_age = {:?}: must be at least twice push.after = {:?}, or messages are too old before they are due",
                self.max_age, self.after
            ),
        );
        for (key, value, most) in [
            ("devices", self.devices, MAX_DEVICES),
            ("concurrency", self.concurrency, MAX_CONCURRENCY),
        ] {
            check(
                (1..=most).contains(&value),
                format!("push.{key} = {value}: must be 1 to {most}"),
            );
        }
        if let Err(fault) = Quiet::try_from(self.quiet.clone())
            && !self.quiet.is_empty()
        {
            check(false, format!("push.quiet: {fault}"));
        }
        let has_web = !self.vapid_private_key.expose().is_empty();
        check(
            !has_web || self.subject.starts_with("mailto:") || self.subject.starts_with("https://"),
            format!(
                "push.subject = {:?}: must be mailto:… or https://…, which push services write to if something is wrong",
                self.subject
            ),
        );
        check(
            self.vapid_public_key.is_empty() || self.public_key().is_some(),
            "push.vapid_public_key: must be base64url of 65 bytes, as natter notifier key prints it"
                .to_owned(),
        );
        for (key, url) in [("fcm_url", &self.fcm_url), ("apns_url", &self.apns_url)] {
            let url: Option<Uri> = url.parse().ok();
            let is_good = url.is_some_and(|url| {
                matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some()
            });
            check(
                is_good,
                format!("push.{key}: must be http:// or https:// with a host"),
            );
        }
        check(
            self.apns_key.expose().is_empty()
                || !self.apns_key_id.is_empty() && !self.apns_team_id.is_empty(),
            "push.apns_key_file needs push.apns_key_id and push.apns_team_id".to_owned(),
        );
        if !self.webhook_url.is_empty() {
            check_receiver(
                "push.webhook",
                &self.webhook_url,
                &self.webhook_secret,
                check,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format as _, Toml};

    use super::*;
    use crate::config::Config;

    #[test]
    fn quiet_hours_may_go_over_midnight_and_have_an_offset() {
        let quiet = |text: &str| Quiet::try_from(text.to_owned());
        let at = |hour: u64, minute: u64| (20_000 * 24 + hour) * 3_600_000 + minute * 60_000;
        for (text, inside, outside) in [
            (
                "22:00-07:00",
                [at(22, 0), at(6, 59)],
                [at(7, 0), at(21, 59)],
            ),
            (
                "12:00-13:00 +00:00",
                [at(12, 0), at(12, 59)],
                [at(13, 0), at(11, 59)],
            ),
            // 22:00 in Seoul is 13:00 UTC.
            (
                "22:00-07:00 +09:00",
                [at(13, 0), at(21, 59)],
                [at(22, 0), at(12, 59)],
            ),
            (
                "22:00-07:00 -03:30",
                [at(1, 30), at(10, 29)],
                [at(10, 30), at(1, 29)],
            ),
        ] {
            let its = quiet(text).unwrap();
            assert!(inside.iter().all(|ms| its.contains(*ms)), "{text}");
            assert!(!outside.iter().any(|ms| its.contains(*ms)), "{text}");
            assert_eq!(quiet(&its.to_string()).unwrap(), its);
        }
        for bad in [
            "",
            "22-07",
            "22:00",
            "24:00-07:00",
            "22:60-07:00",
            "22:00-07:00 9",
            "22:00-07:00 +15:00",
        ] {
            assert!(
                quiet(bad).unwrap_err().contains(&format!("{bad:?}")),
                "{bad}"
            );
        }
    }

    #[test]
    fn faults_are_named_and_secrets_are_not_shown() {
        let toml = "[push]\nafter = '2h'\ndevices = 0\nquiet = 'night'\nvapid_private_key = 'hidden'\nvapid_public_key = 'short'\napns_key = 'hidden'\nfcm_url = 'ftp://x'\nwebhook_url = 'http://x'";
        let error = Config::with_defaults(Toml::string(toml))
            .unwrap_err()
            .to_string();
        for told in [
            "push.after",
            "push.max_age",
            "push.devices = 0",
            "push.quiet",
            "push.subject",
            "push.vapid_public_key",
            "push.apns_key_id",
            "push.fcm_url",
            "push.webhook.secret",
        ] {
            assert!(error.contains(told), "{told} is missing in: {error}");
        }
        assert!(!error.contains("hidden"), "{error}");
        assert!(
            !Config::with_defaults(Toml::string(""))
                .unwrap()
                .push
                .is_on()
        );
    }
}
