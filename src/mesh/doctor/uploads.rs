//! The storage of uploads.

use super::{Check, Finding, Level};
use crate::{config::Config, uploads::Storage};

/// Tries whether a file can be written to the storage and removed, if there are uploads.
pub(super) async fn examine(config: &Config) -> Option<Finding> {
    let problem = match Storage::open(&config.uploads) {
        Ok(None) => return None,
        Ok(Some(storage)) => storage.try_out(&config.uploads).await.err()?.to_string(),
        Err(error) => error.to_string(),
    };
    Some(Finding::new(
        Level::Problem,
        Check::Uploads,
        format!("no file can be uploaded, or none removed: {problem}"),
        "check uploads.* and the storage. S3: the bucket, the key, and its permissions to put and delete objects; a folder: whether this user may write there",
    ))
}
