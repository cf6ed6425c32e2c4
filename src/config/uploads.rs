//! `[uploads]`: files that clients upload and name in messages.

use std::{path::PathBuf, time::Duration};

use bytesize::ByteSize;
use hyper::Uri;
use serde::{Deserialize, Serialize};

use super::{ConfigError, MIN_SECRET, Secret, outbound::is_name};

/// Longest life of a signed URL: the limit of S3.
const MAX_URL_TTL: Duration = Duration::from_secs(7 * 24 * 3600);

/// Largest file that one PUT of S3 takes.
const MAX_SIZE: u64 = 5 << 30;

/// Where uploaded files are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    /// Nowhere: there are no uploads.
    Off,
    /// In a folder that edges and history services share.
    Local,
    /// In a bucket of S3, or of a storage with the same interface.
    S3,
}

/// `[uploads]`: files that clients upload and name in messages.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Uploads {
    pub storage: Storage,
    pub secret: Secret,
    pub secret_file: PathBuf,
    #[serde(with = "humantime_serde")]
    pub url_ttl: Duration,
    pub max_size: ByteSize,
    pub max_per_day: ByteSize,
    pub max_per_message: usize,
    pub types: Vec<String>,
    #[serde(with = "humantime_serde")]
    pub unused_ttl: Duration,
    pub scan: String,
    pub public_url: String,
    pub folder: PathBuf,
    pub s3_endpoint: String,
    pub s3_bucket: String,
    pub s3_region: String,
    pub s3_path_style: bool,
    pub s3_key: String,
    pub s3_secret: Secret,
    pub s3_secret_file: PathBuf,
}

impl Uploads {
    /// Whether clients may upload files.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.storage != Storage::Off
    }

    /// The worker whose verdict a file needs before it is given out; `None`: files are given out unchecked.
    #[must_use]
    pub fn scan(&self) -> Option<&str> {
        (self.is_on() && !self.scan.is_empty()).then_some(&*self.scan)
    }

    /// Whether files of this media type may be uploaded.
    #[must_use]
    pub fn allows(&self, media_type: &str) -> bool {
        let mut patterns = self.types.iter();
        patterns.any(|pattern| match pattern.strip_suffix("/*") {
            Some("*") => true,
            Some(first) => media_type
                .split_once('/')
                .is_some_and(|(its, _)| its == first),
            None => pattern == media_type,
        })
    }

    pub(super) fn read_files(&mut self) -> Result<(), ConfigError> {
        self.secret
            .read_file("uploads.secret_file", &self.secret_file)?;
        self.s3_secret
            .read_file("uploads.s3_secret_file", &self.s3_secret_file)
    }

    /// Checks the section; `check` takes whether a rule holds, and the text if it does not.
    pub(super) fn check(&self, check: &mut impl FnMut(bool, String)) {
        for pattern in &self.types {
            check(
                is_pattern(pattern),
                format!(
                    "uploads.types: {pattern:?} is not a type, like \"image/png\", \"image/*\" or \"*/*\", in lower case"
                ),
            );
        }
        check(
            (1..=MAX_URL_TTL.as_secs()).contains(&self.url_ttl.as_secs()),
            format!(
                "uploads.url_ttl = {:?}: must be 1s to 7d, the limits of S3",
                self.url_ttl
            ),
        );
        for (key, size, most) in [
            ("uploads.max_size", self.max_size, MAX_SIZE),
            (
                "uploads.max_per_day",
                self.max_per_day,
                i64::MAX.unsigned_abs(),
            ),
        ] {
            check(
                (1..=most).contains(&size.as_u64()),
                format!("{key} = {size}: must be 1 B to {}", ByteSize(most)),
            );
        }
        check(
            (1..=100).contains(&self.max_per_message),
            format!(
                "uploads.max_per_message = {}: must be 1 to 100",
                self.max_per_message
            ),
        );
        check(
            self.unused_ttl >= Duration::from_secs(1),
            format!(
                "uploads.unused_ttl = {:?}: must be at least 1s",
                self.unused_ttl
            ),
        );
        check(
            self.scan.is_empty() || is_name(&self.scan),
            format!(
                "uploads.scan = {:?}: must be the name of a worker, [A-Za-z0-9_-]{{1,32}}, or empty",
                self.scan
            ),
        );
        check(
            self.public_url.is_empty() || is_base(&self.public_url),
            format!(
                "uploads.public_url = {:?}: must be like \"https://chat.example.org\", without a path, or empty",
                self.public_url
            ),
        );
        if !self.is_on() {
            return;
        }
        let bytes = self.secret.expose().len();
        check(
            bytes >= MIN_SECRET,
            format!(
                "uploads.secret = ***: {bytes} bytes, must be at least {MIN_SECRET} when there are uploads"
            ),
        );
        check(
            self.storage != Storage::Local || self.folder.is_absolute(),
            format!(
                "uploads.folder = {:?}: must be an absolute path when uploads.storage is \"local\"",
                self.folder.display()
            ),
        );
        if self.storage == Storage::S3 {
            let scheme = ["http://", "https://"];
            check(
                scheme
                    .iter()
                    .any(|scheme| self.s3_endpoint.starts_with(scheme)),
                format!(
                    "uploads.s3_endpoint = {:?}: must begin with https:// or http://",
                    self.s3_endpoint
                ),
            );
            for (key, value) in [
                ("s3_bucket", &*self.s3_bucket),
                ("s3_region", &*self.s3_region),
                ("s3_key", &*self.s3_key),
                ("s3_secret", self.s3_secret.expose()),
            ] {
                check(
                    !value.is_empty(),
                    format!("uploads.{key} is empty: it is needed when uploads.storage is \"s3\""),
                );
            }
        }
    }
}

/// Whether a text is the scheme and the host of a URL, with or without a port.
fn is_base(url: &str) -> bool {
    let is_web = url.starts_with("http://") || url.starts_with("https://");
    is_web
        && url.parse::<Uri>().is_ok_and(|url| {
            let host = url
                .authority()
                .is_some_and(|host| !host.as_str().contains('@'));
            host && url.path() == "/" && url.query().is_none()
        })
}

/// Whether a text is a media type, or has `*` in place of its second part or of both.
fn is_pattern(pattern: &str) -> bool {
    let is_part = |part: &str| {
        let is_good = |byte: u8| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"!#$&^_.+-".contains(&byte)
        };
        !part.is_empty() && part.bytes().all(is_good)
    };
    match pattern.split_once('/') {
        Some(("*", second)) => second == "*",
        Some((first, second)) => is_part(first) && (second == "*" || is_part(second)),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format as _, Toml};

    use super::*;
    use crate::config::Config;

    fn load(toml: &str) -> Result<Uploads, String> {
        let config = Config::with_defaults(Toml::string(&format!("[uploads]\n{toml}")));
        config
            .map(|config| config.uploads)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn types_are_named_or_match_a_pattern() {
        let of = |types: &str| load(&format!("types = {types}")).unwrap();
        assert!(of("['*/*']").allows("image/png"));
        let some = of("['image/*', 'application/pdf']");
        assert!(some.allows("image/svg+xml") && some.allows("application/pdf"));
        assert!(!some.allows("imagex/png") && !some.allows("application/pdfx"));
        assert!(!of("[]").allows("image/png"));
        for bad in ["image", "image/", "/png", "*/png", "Image/*", "a/b/c"] {
            let error = load(&format!("types = ['{bad}']")).unwrap_err();
            assert!(error.contains(&format!("{bad:?}")), "{bad}: {error}");
        }
    }

    #[test]
    fn what_a_storage_needs_is_named() {
        assert!(!load("").unwrap().is_on());
        let error = load("storage = 's3'\nsecret = 'short'").unwrap_err();
        for key in [
            "uploads.secret = ***: 5 bytes",
            "uploads.s3_endpoint",
            "uploads.s3_bucket",
            "uploads.s3_key",
            "uploads.s3_secret",
        ] {
            assert!(error.contains(key), "{key} is missing in: {error}");
        }
        let error = load("storage = 'local'\nfolder = 'files'").unwrap_err();
        assert!(
            error.contains("uploads.folder = \"files\": must be an absolute path"),
            "{error}"
        );
        let error = load("scan = 'a b'\npublic_url = 'https://example.org/chat'").unwrap_err();
        for key in ["uploads.scan = \"a b\"", "uploads.public_url = "] {
            assert!(error.contains(key), "{key} is missing in: {error}");
        }
        let on = "storage = 'local'\nfolder = '/f'\nsecret = 'a secret of the tests, of more than 32 bytes'";
        for (base, is_good) in [
            ("http://127.0.0.1:8080", true),
            ("https://chat.example.org", true),
            ("ftp://example.org", false),
            ("https://kim@example.org", false),
            ("https://", false),
            ("example.org", false),
        ] {
            let loaded = load(&format!("{on}\nscan = 'scan'\npublic_url = '{base}'"));
            assert_eq!(loaded.is_ok(), is_good, "{base}: {loaded:?}");
        }
        assert_eq!(
            load(&format!("{on}\nscan = 'scan'")).unwrap().scan(),
            Some("scan")
        );
        assert_eq!(load("scan = 'scan'").unwrap().scan(), None);
        let error = load("url_ttl = '8d'\nmax_size = '6GiB'\nmax_per_message = 0").unwrap_err();
        for key in [
            "uploads.url_ttl",
            "uploads.max_size",
            "uploads.max_per_message",
        ] {
            assert!(error.contains(key), "{key} is missing in: {error}");
        }
    }
}
