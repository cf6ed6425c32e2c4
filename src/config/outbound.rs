//! What entries of the configuration that name a URL have in common: how its requests are signed, and which addresses
//! they may reach.

use std::{collections::BTreeMap, fmt, net::IpAddr, path::Path, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hyper::Uri;
use serde::{Deserialize, Serialize, Serializer};

use super::{ConfigError, Namespace, Secret, value::secret_text};
use crate::model::{RoomScope, is_token};

/// Most requests of one entry at once.
const MAX_CONCURRENCY: usize = 1000;

/// Longest timeout of a request.
const MAX_TIMEOUT: Duration = Duration::from_secs(300);

/// Longest name of an entry.
const MAX_NAME: usize = 32;

/// What a secret for signatures begins with (Standard Webhooks).
const SECRET_PREFIX: &str = "whsec_";

/// Bytes of a key for signatures (Standard Webhooks).
const KEY_BYTES: std::ops::RangeInclusive<usize> = 24..=64;

/// The secrets that sign the requests of one receiver: one, or several while they are exchanged.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(from = "OneOrMany")]
pub struct SigningSecrets(Vec<Secret>);

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(Secret),
    Many(Vec<Secret>),
}

impl From<OneOrMany> for SigningSecrets {
    fn from(secrets: OneOrMany) -> Self {
        Self(match secrets {
            OneOrMany::One(secret) => vec![secret],
            OneOrMany::Many(secrets) => secrets,
        })
    }
}

impl Serialize for SigningSecrets {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            [secret] => secret.serialize(serializer),
            secrets => secrets.serialize(serializer),
        }
    }
}

impl SigningSecrets {
    /// Replaces the secrets by those in the file `path`, unless `path` is empty: separated by spaces or lines.
    pub(super) fn read_file(&mut self, key: &str, path: &Path) -> Result<(), ConfigError> {
        if let Some(text) = secret_text(key, path)? {
            let secrets = text.split_whitespace().map(str::to_owned);
            self.0 = secrets.map(Secret::new).collect();
        }
        Ok(())
    }

    /// The keys.
    ///
    /// # Errors
    /// What is wrong with one of them, without the secret itself.
    pub fn keys(&self) -> Result<Vec<Vec<u8>>, String> {
        let key = |secret: &Secret| {
            let text = secret.expose().strip_prefix(SECRET_PREFIX);
            let text = text.ok_or_else(|| format!("must begin with {SECRET_PREFIX}"))?;
            let key = STANDARD.decode(text).map_err(|_quotes_it| {
                format!("must be base64 (standard, with padding) after {SECRET_PREFIX}")
            })?;
            if KEY_BYTES.contains(&key.len()) {
                return Ok(key);
            }
            let (least, most) = (KEY_BYTES.start(), KEY_BYTES.end());
            Err(format!(
                "{} bytes after {SECRET_PREFIX}, must be {least} to {most}",
                key.len()
            ))
        };
        self.0.iter().map(key).collect()
    }
}

/// A range of IP addresses: `10.0.0.0/8`, `fd00::/8`, or a single address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

impl Network {
    /// Whether `address` is in the range. An IPv4 address within an IPv6 address (`::ffff:10.0.0.1`) is that IPv4
    /// address.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let starts_alike = |all: u32, differences: u128| {
            let rest = all - u32::from(self.bits);
            differences.checked_shr(rest).unwrap_or_default() == 0
        };
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(its), IpAddr::V4(given)) => {
                starts_alike(32, u128::from(its.to_bits() ^ given.to_bits()))
            }
            (IpAddr::V6(its), IpAddr::V6(given)) => {
                starts_alike(128, its.to_bits() ^ given.to_bits())
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let fault = || format!("{text:?} is not a range of addresses, as 10.0.0.0/8 or fd00::/8");
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (&*text, None),
        };
        let address: IpAddr = address.parse().map_err(|_not_one| fault())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(most), str::parse);
        match bits {
            Ok(bits) if bits <= most => Ok(Self { address, bits }),
            _ => Err(fault()),
        }
    }
}

impl From<Network> for String {
    fn from(network: Network) -> Self {
        network.to_string()
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

/// What all entries that name a URL have.
pub(super) struct Common<'a> {
    pub name: &'a str,
    pub url: &'a str,
    pub secret: &'a SigningSecrets,
    pub concurrency: usize,
    pub timeout: Duration,
}

/// Whether a receiver may have this name.
pub(super) fn is_name(name: &str) -> bool {
    is_token(name) && name.len() <= MAX_NAME
}

/// Checks what all entries of `table` have, as `workers`.
pub(super) fn check_common(
    table: &str,
    entries: &[Common<'_>],
    check: &mut impl FnMut(bool, String),
) {
    for (index, entry) in entries.iter().enumerate() {
        let name = entry.name;
        let key = format!("{table}.{name}");
        check(
            is_name(name),
            format!("{table}: name = {name:?}: must match [A-Za-z0-9_-]{{1,{MAX_NAME}}}"),
        );
        let first = entries.iter().position(|other| other.name == name);
        check(
            first == Some(index),
            format!("{table}: name = {name:?} is used twice"),
        );
        check_receiver(&key, entry.url, entry.secret, check);
        let (concurrency, timeout) = (entry.concurrency, entry.timeout);
        check(
            (1..=MAX_CONCURRENCY).contains(&concurrency),
            format!("{key}.concurrency = {concurrency}: must be 1 to {MAX_CONCURRENCY}"),
        );
        check(
            !timeout.is_zero() && timeout <= MAX_TIMEOUT,
            format!("{key}.timeout = {timeout:?}: must be above 0 and at most {MAX_TIMEOUT:?}"),
        );
    }
}

/// Checks the patterns of rooms of the entry `key`. `of_log`: it gets something that streams have.
pub(super) fn check_patterns(
    key: &str,
    patterns: &[String],
    of_log: bool,
    namespaces: &BTreeMap<String, Namespace>,
    check: &mut impl FnMut(bool, String),
) {
    check(
        !patterns.is_empty(),
        format!("{key}.rooms is empty: there would be nothing to send"),
    );
    for pattern in patterns {
        let scope = match RoomScope::of_patterns([&**pattern]) {
            Ok(scope) => scope,
            Err(bad) => {
                let rule = "is not namespace:name, namespace:* or *:*";
                check(false, format!("{key}.rooms: {bad:?} {rule}"));
                continue;
            }
        };
        let of_rooms = scope.rooms.iter().map(|room| room.namespace());
        for name in of_rooms.chain(scope.namespaces.iter().map(String::as_str)) {
            let is_durable = namespaces.get(name).map(|its| its.durable);
            let fault = match is_durable {
                Some(true) => continue,
                Some(false) if !of_log => continue,
                Some(false) => format!("{name} is not durable, so no stream has its messages"),
                None => format!("there is no namespace {name}"),
            };
            check(false, format!("{key}.rooms: {pattern:?}: {fault}"));
        }
    }
}

/// Checks `url` and `secret` of the entry `key`, as `workers.translate`.
pub(super) fn check_receiver(
    key: &str,
    url: &str,
    secrets: &SigningSecrets,
    check: &mut impl FnMut(bool, String),
) {
    let parsed: Option<Uri> = url.parse().ok();
    let is_good = parsed.is_some_and(|url| {
        let host = url.authority().filter(|its| !its.as_str().contains('@'));
        matches!(url.scheme_str(), Some("http" | "https"))
            && host.is_some_and(|its| !its.host().is_empty())
    });
    // A URL can contain a secret: it is not shown.
    check(
        is_good,
        format!("{key}.url: must be http:// or https:// with a host, and without user or password"),
    );
    match secrets.keys() {
        Ok(keys) => check(
            !keys.is_empty(),
            format!("{key}.secret is empty: every request is signed"),
        ),
        Err(fault) => check(false, format!("{key}.secret = ***: {fault}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Result<Network, String> {
        Network::try_from(text.to_owned())
    }

    #[test]
    fn a_network_contains_its_addresses_in_both_spellings() {
        for (range, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.1"),
            ("10.0.0.0/8", "::ffff:10.1.2.3", "::ffff:11.1.2.3"),
            ("192.168.1.7", "192.168.1.7", "192.168.1.8"),
            ("0.0.0.0/0", "8.8.8.8", "2001:4860::1"),
            ("fd00::/8", "fd12::1", "fe80::1"),
            ("::/0", "::1", "127.0.0.1"),
            ("::1", "::1", "::2"),
        ] {
            let range = network(range).unwrap();
            assert!(range.contains(inside.parse().unwrap()), "{range} {inside}");
            assert!(
                !range.contains(outside.parse().unwrap()),
                "{range} {outside}"
            );
        }
        for bad in [
            "",
            "10.0.0.0/33",
            "10.0.0/8",
            "::/129",
            "example.org",
            "10.0.0.0/-1",
        ] {
            let error = network(bad).unwrap_err();
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
    }

    #[test]
    fn secrets_are_one_or_many_and_never_shown() {
        let of = |toml: &str| {
            #[derive(Debug, Deserialize, Serialize)]
            struct Entry {
                secret: SigningSecrets,
            }
            toml::from_str::<Entry>(toml).unwrap().secret
        };
        let good = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        assert_eq!(of(&format!("secret = '{good}'")).keys().unwrap().len(), 1);
        let two = of(&format!("secret = ['{good}', '{good}']"));
        assert_eq!(two.keys().unwrap().len(), 2);
        assert!(!format!("{two:?}").contains("MfKQ"));
        assert_eq!(serde_json::to_string(&two).unwrap(), "[\"***\",\"***\"]");
        for (bad, told) in [
            ("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "begin with whsec_"),
            ("whsec_MfKQ9r8!", "base64"),
            ("whsec_MfKQ", "3 bytes after whsec_, must be 24 to 64"),
        ] {
            let error = of(&format!("secret = '{bad}'")).keys().unwrap_err();
            assert!(error.contains(told) && !error.contains("MfKQ"), "{error}");
        }
    }
}
