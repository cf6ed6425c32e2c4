//! A receiver of natter's event hooks: prints each event that is signed. Needs axum, base64, hmac, sha2 and tokio.

use axum::{Router, body::Bytes, http::HeaderMap, http::StatusCode, routing::post};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// Checks the signature as <https://www.standardwebhooks.com> says, and that the request is not an old one.
fn is_signed(key: &[u8], headers: &HeaderMap, body: &[u8], now: u64) -> bool {
    let header = |name| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    };
    let (id, sent) = (header("webhook-id"), header("webhook-timestamp"));
    let is_fresh = sent.parse().is_ok_and(|sent: u64| sent.abs_diff(now) < 300);
    let mut hmac = Hmac::<Sha256>::new_from_slice(key).expect("any length is fine");
    hmac.update(format!("{id}.{sent}.").as_bytes());
    hmac.update(body);
    let is_ours = |given: &str| {
        let given = given
            .strip_prefix("v1,")
            .and_then(|text| STANDARD.decode(text).ok());
        given.is_some_and(|given| hmac.clone().verify_slice(&given).is_ok())
    };
    is_fresh && header("webhook-signature").split(' ').any(is_ours)
}

/// `secret` is that of the configuration, with `whsec_`; `told` gets each event. An event may come again with the same
/// `webhook-id`.
pub fn receiver(secret: &str, told: impl Fn(&str) + Clone + Send + Sync + 'static) -> Router {
    let key = STANDARD
        .decode(secret.trim_start_matches("whsec_"))
        .expect("a secret");
    let take = async move |headers: HeaderMap, body: Bytes| {
        let now = std::time::UNIX_EPOCH
            .elapsed()
            .unwrap_or_default()
            .as_secs();
        if !is_signed(&key, &headers, &body, now) {
            return StatusCode::UNAUTHORIZED;
        }
        told(&String::from_utf8_lossy(&body));
        StatusCode::NO_CONTENT
    };
    Router::new().route("/", post(take))
}
