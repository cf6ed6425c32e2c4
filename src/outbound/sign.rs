//! Signatures of requests, as Standard Webhooks defines them: HMAC-SHA256 over `<id>.<timestamp>.<body>`.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// The keys that requests to one receiver are signed with.
#[derive(Clone)]
pub(super) struct Keys(Vec<Hmac<Sha256>>);

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

impl Keys {
    pub(super) fn new(keys: Vec<Vec<u8>>) -> Self {
        let key = |key: Vec<u8>| {
            Hmac::new_from_slice(&key).expect("HMAC takes keys of any length (RFC 2104)")
        };
        Self(keys.into_iter().map(key).collect())
    }

    /// The value of `webhook-signature`: a signature per key, separated by spaces.
    pub(super) fn sign(&self, id: &str, timestamp: u64, body: &[u8]) -> String {
        let signature = |key: &Hmac<Sha256>| {
            let mut hmac = key.clone();
            hmac.update(format!("{id}.{timestamp}.").as_bytes());
            hmac.update(body);
            format!("v1,{}", STANDARD.encode(hmac.finalize().into_bytes()))
        };
        let all: Vec<String> = self.0.iter().map(signature).collect();
        all.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example that the reference libraries of Standard Webhooks test themselves with.
    #[test]
    fn the_published_example_is_signed_alike() {
        let key = |text: &str| STANDARD.decode(text).unwrap();
        let signed = |keys: &[&str]| {
            let keys = Keys::new(keys.iter().map(|text| key(text)).collect());
            let id = "msg_p5jXN8AQM9LWM0D4loKWxJek";
            keys.sign(id, 1_614_265_330, br#"{"test": 2432232314}"#)
        };
        let published = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
        let secret = "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        assert_eq!(signed(&[secret]), published);
        let both = signed(&["AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", secret]);
        let (first, second) = both.split_once(' ').unwrap();
        assert!(first.starts_with("v1,") && first != published);
        assert_eq!(second, published);
    }
}
