//! What a client says of a file: its name, its type, its size.

use std::fmt::Write as _;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use crate::config::Uploads;

/// Longest name of a file, in bytes.
const MAX_NAME: usize = 255;

/// Longest type of a file, in bytes.
const MAX_TYPE: usize = 127;

/// A file, as the client describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Its name, which is shown to people and is never a path.
    pub name: String,
    /// Its media type, e.g. `image/png`.
    #[serde(rename = "type")]
    pub media_type: String,
    /// Its exact number of bytes.
    pub size: u64,
}

/// A file was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadFile {
    /// The name can't be shown, or is too long.
    #[error("name must have 1 to {MAX_NAME} bytes, without control characters, / and \\")]
    Name,
    /// The type is none.
    #[error("type must be a media type in lower case and without parameters, like image/png")]
    Type,
    /// The type is not among `uploads.types`.
    #[error("type {given} is not allowed, only {}", .allowed.join(", "))]
    TypeNotAllowed { given: String, allowed: Vec<String> },
    /// There is nothing to upload.
    #[error("size must be at least 1 byte")]
    Empty,
    /// It is larger than `uploads.max_size`.
    #[error("the file has {size} bytes, the limit is {} ({limit})", .limit.as_u64())]
    TooLarge { size: u64, limit: ByteSize },
}

impl File {
    /// Checks the file against the limits of the configuration.
    ///
    /// # Errors
    /// [`BadFile`].
    pub fn check(&self, config: &Uploads) -> Result<(), BadFile> {
        let is_bad = |c: char| c.is_control() || c == '/' || c == '\\';
        if self.name.is_empty() || self.name.len() > MAX_NAME || self.name.contains(is_bad) {
            return Err(BadFile::Name);
        }
        let is_part = |part: &str| {
            let is_good =
                |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"!#$&^_.+-".contains(&b);
            !part.is_empty() && part.bytes().all(is_good)
        };
        let parts = self.media_type.split_once('/');
        if self.media_type.len() > MAX_TYPE
            || !parts.is_some_and(|(first, second)| is_part(first) && is_part(second))
        {
            return Err(BadFile::Type);
        }
        if !config.allows(&self.media_type) {
            return Err(BadFile::TypeNotAllowed {
                given: self.media_type.clone(),
                allowed: config.types.clone(),
            });
        }
        match self.size {
            0 => Err(BadFile::Empty),
            size if size > config.max_size.as_u64() => Err(BadFile::TooLarge {
                size,
                limit: config.max_size,
            }),
            _ => Ok(()),
        }
    }

    /// The header `Content-Disposition` with which the file is served. Only types that a browser shows without running
    /// anything are shown in its window; all others, HTML and SVG among them, are saved.
    #[must_use]
    pub fn disposition(&self) -> String {
        let is_shown = match self.media_type.split_once('/') {
            Some(("image" | "audio" | "video", second)) => {
                !second.contains("svg") && !second.contains("xml")
            }
            _ => self.media_type == "text/plain",
        };
        let mut text = match is_shown {
            true => "inline",
            false => "attachment",
        }
        .to_owned();
        // As RFC 8187 writes it, which all browsers read.
        text.push_str("; filename*=UTF-8''");
        for byte in self.name.bytes() {
            if byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte) {
                text.push(char::from(byte));
            } else {
                write!(text, "%{byte:02X}").expect("a String takes everything");
            }
        }
        text
    }
}

#[cfg(test)]
pub(super) mod tests {
    use figment::providers::{Format as _, Toml};

    use super::*;
    use crate::config::Config;

    /// `[uploads]` with the local storage, a secret unless `toml` has one, and `toml`.
    pub(in crate::uploads) fn config(toml: &str) -> Uploads {
        let secret = match toml.contains("secret") {
            true => "",
            false => "secret = 'a secret of the tests, of more than 32 bytes'\n",
        };
        let text = format!("[uploads]\nstorage = 'local'\nfolder = '/nowhere'\n{secret}{toml}");
        Config::with_defaults(Toml::string(&text)).unwrap().uploads
    }

    fn file(name: &str, media_type: &str, size: u64) -> File {
        File {
            name: name.to_owned(),
            media_type: media_type.to_owned(),
            size,
        }
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said() {
        let config = config("types = ['image/*']\nmax_size = '1KiB'");
        let check =
            |name: &str, media_type: &str, size| file(name, media_type, size).check(&config);
        assert_eq!(check("고양이 1.png", "image/png", 1024), Ok(()));
        for name in ["", "a/b", "a\\b", "a\n", &"x".repeat(256)] {
            assert_eq!(check(name, "image/png", 1), Err(BadFile::Name), "{name}");
        }
        for media_type in [
            "",
            "image",
            "image/",
            "IMAGE/png",
            "image/png; a=b",
            "a/b/c",
        ] {
            assert_eq!(
                check("a", media_type, 1),
                Err(BadFile::Type),
                "{media_type}"
            );
        }
        let error = check("a", "text/html", 1).unwrap_err().to_string();
        assert_eq!(error, "type text/html is not allowed, only image/*");
        assert_eq!(check("a", "image/png", 0), Err(BadFile::Empty));
        let error = check("a", "image/png", 1025).unwrap_err().to_string();
        assert_eq!(
            error,
            "the file has 1025 bytes, the limit is 1024 (1.0 KiB)"
        );
    }

    #[test]
    fn what_a_browser_would_run_is_saved() {
        let of = |media_type: &str| file("고 \"1\".x", media_type, 1).disposition();
        let name = "filename*=UTF-8''%EA%B3%A0%20%221%22.x";
        for shown in ["image/png", "video/mp4", "audio/ogg", "text/plain"] {
            assert_eq!(of(shown), format!("inline; {name}"), "{shown}");
        }
        for saved in [
            "text/html",
            "image/svg+xml",
            "application/xhtml+xml",
            "text/xml",
            "text/javascript",
            "application/zip",
            "application/pdf",
        ] {
            assert_eq!(of(saved), format!("attachment; {name}"), "{saved}");
        }
    }
}
