//! Value types of the configuration.

use std::{fmt, fs, path::Path};

use serde::{Deserialize, Serialize, Serializer};

use super::ConfigError;

/// The text of the file of a secret; `None` if `path` is empty.
pub(super) fn secret_text(key: &str, path: &Path) -> Result<Option<String>, ConfigError> {
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let text = fs::read_to_string(path).map_err(|source| ConfigError::File {
        key: key.to_owned(),
        path: path.to_owned(),
        source,
    })?;
    Ok(Some(text))
}

/// The text of a secret; prints and serialises as `***`, or as the empty text if it is empty.
#[derive(Clone, Default, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// A secret given by a flag.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The secret itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether `given` is the secret. Takes as long wherever they differ.
    #[must_use]
    pub fn is(&self, given: &str) -> bool {
        let (its, given) = (self.0.as_bytes(), given.as_bytes());
        let pairs = its.iter().zip(given);
        let differences = pairs.fold(0, |all, (a, b)| all | (a ^ b));
        its.len() == given.len() && differences == 0
    }

    /// Replaces the secret by the content of `path` (without trailing white space), unless `path` is empty.
    pub(super) fn read_file(&mut self, key: &str, path: &Path) -> Result<(), ConfigError> {
        if let Some(text) = secret_text(key, path)? {
            text.trim_end().clone_into(&mut self.0);
        }
        Ok(())
    }

    fn shown(&self) -> &'static str {
        if self.0.is_empty() { "" } else { "***" }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.shown())
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.shown())
    }
}
