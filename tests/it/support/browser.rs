//! A stand-in of a browser that has subscribed to notifications: it has the keys of a subscription, and opens what a push
//! service would hand to it (RFC 8291), with other code than natter's.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use p256::{PublicKey, SecretKey, ecdh::diffie_hellman, elliptic_curve::sec1::ToEncodedPoint as _};
use ring::{
    aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey},
    hmac,
};
use serde_json::{Value, json};

/// The keys of a subscription.
#[derive(Clone)]
pub(crate) struct Browser {
    key: SecretKey,
    auth: [u8; 16],
}

fn hmac_of(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    hmac::sign(&key, &parts.concat()).as_ref().to_vec()
}

fn public(key: &PublicKey) -> Vec<u8> {
    key.to_encoded_point(false).as_bytes().to_vec()
}

impl Browser {
    pub(crate) fn new() -> Self {
        let bytes = loop {
            let bytes: [u8; 32] = rand::random();
            if SecretKey::from_slice(&bytes).is_ok() {
                break bytes;
            }
        };
        Self {
            key: SecretKey::from_slice(&bytes).unwrap(),
            auth: rand::random(),
        }
    }

    /// What `PushSubscription.toJSON()` would say.
    pub(crate) fn subscription(&self, endpoint: &str) -> Value {
        json!({
            "endpoint": endpoint,
            "expirationTime": null,
            "keys": {
                "p256dh": URL_SAFE_NO_PAD.encode(public(&self.key.public_key())),
                "auth": URL_SAFE_NO_PAD.encode(self.auth),
            },
        })
    }

    /// The message in the body of a request (RFC 8188, one record).
    pub(crate) fn open(&self, body: &[u8]) -> Value {
        let (salt, rest) = body.split_at(16);
        let (size, rest) = rest.split_at(4);
        let size = u32::from_be_bytes(size.try_into().unwrap()) as usize;
        let (length, rest) = rest.split_first().unwrap();
        let (theirs, sealed) = rest.split_at(usize::from(*length));
        assert!(sealed.len() <= size, "more than one record");
        let their_key = PublicKey::from_sec1_bytes(theirs).unwrap();
        let shared = diffie_hellman(self.key.to_nonzero_scalar(), their_key.as_affine());
        let own = public(&self.key.public_key());
        let key = hmac_of(&self.auth, &[shared.raw_secret_bytes()]);
        let ikm = hmac_of(&key, &[b"WebPush: info\0", &own, theirs, &[1]]);
        let prk = hmac_of(salt, &[&ikm]);
        let cek = hmac_of(&prk, &[b"Content-Encoding: aes128gcm\0", &[1]]);
        let nonce = hmac_of(&prk, &[b"Content-Encoding: nonce\0", &[1]]);
        let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &cek[..16]).unwrap());
        let nonce = Nonce::try_assume_unique_for_key(&nonce[..12]).unwrap();
        let mut sealed = sealed.to_vec();
        let text = key.open_in_place(nonce, Aad::empty(), &mut sealed).unwrap();
        let end = text.iter().rposition(|byte| *byte != 0).unwrap();
        assert_eq!(text[end], 2, "not the last record");
        serde_json::from_slice(&text[..end]).unwrap()
    }
}
