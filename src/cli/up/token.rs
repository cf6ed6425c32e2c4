//! The development token that `natter up` prints.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::config::Auth;

/// How long it is valid.
const VALID_FOR: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// A token for user `dev` with everything in every room.
///
/// TODO(#3): replace the body by `auth::issue`, the only module that is to know jsonwebtoken.
pub(super) fn development(auth: &Auth, secret: &str) -> anyhow::Result<String> {
    let expires = SystemTime::now().duration_since(UNIX_EPOCH)? + VALID_FOR;
    let mut claims = json!({
        "sub": "dev",
        "exp": expires.as_secs(),
        "grants": [{ "rooms": "*:*", "can": ["read", "write", "presence", "history"] }],
    });
    for (claim, required) in [("iss", &auth.issuer), ("aud", &auth.audience)] {
        if !required.is_empty() {
            claims[claim] = json!(required);
        }
    }
    Ok(jsonwebtoken::encode(
        &jsonwebtoken::Header::default(),
        &claims,
        &jsonwebtoken::EncodingKey::from_secret(secret.as_bytes()),
    )?)
}
