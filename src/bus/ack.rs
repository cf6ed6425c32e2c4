//! What a stream answers to a publish.

use serde::Deserialize;

#[derive(Deserialize)]
pub(super) struct PubAck {
    pub(super) seq: Option<u64>,
    #[serde(default)]
    pub(super) duplicate: bool,
    pub(super) error: Option<AckError>,
}

#[derive(Deserialize)]
pub(super) struct AckError {
    pub(super) code: u16,
    #[serde(default)]
    pub(super) err_code: u32,
    #[serde(default)]
    pub(super) description: String,
}
