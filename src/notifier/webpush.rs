//! Web Push: encryption of a message for a browser (RFC 8291 and RFC 8188), and the key that shows whose it is (RFC 8292).

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hyper::Uri;
use p256::{
    PublicKey, SecretKey,
    ecdh::diffie_hellman,
    elliptic_curve::{rand_core::OsRng, sec1::ToEncodedPoint as _},
    pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _, LineEnding},
};
use rand::Rng as _;
use ring::{
    aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey},
    hkdf,
};
use serde_json::json;

use crate::{
    auth::{BadKey, Signer},
    people::Subscription,
};

/// Size of the only record, in bytes. Services must accept messages of 4096 bytes.
const RECORD: u32 = 4096;

/// Most bytes of a message: a record without its header, its padding and its tag.
pub(super) const MAX_MESSAGE: usize = 3993;

const SALT: usize = 16;
const TAG: usize = 16;

/// How long a token is valid, in seconds; at most a day.
const TOKEN_S: u64 = 12 * 3600;

/// A message can't be encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unencrypted {
    /// The browser's key is none.
    #[error("the subscription has no valid key")]
    Key,
    /// The message is too large.
    #[error("the message has more than {MAX_MESSAGE} bytes")]
    TooLarge,
    /// The library refuses it.
    #[error("the encryption failed")]
    Failed,
}

/// The key pair of this deployment.
#[derive(Debug)]
pub(super) struct Vapid {
    signer: Signer,
    /// Base64url of the public key.
    pub(super) public: String,
    subject: String,
}

/// Reads a private key: PEM (PKCS#8 or SEC1), or base64url of its 32 bytes.
fn private_key(text: &str) -> Option<SecretKey> {
    let text = text.trim();
    if text.starts_with("-----") {
        return SecretKey::from_pkcs8_pem(text).ok();
    }
    let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
    SecretKey::from_slice(&bytes).ok()
}

fn public_bytes(key: &PublicKey) -> Vec<u8> {
    key.to_encoded_point(false).as_bytes().to_vec()
}

/// A new key pair: the private key as PEM, and the public one as base64url.
#[must_use]
pub fn new_keys() -> Option<(String, String)> {
    let key = SecretKey::random(&mut OsRng);
    let pem = key.to_pkcs8_pem(LineEnding::LF).ok()?.to_string();
    let public = URL_SAFE_NO_PAD.encode(public_bytes(&key.public_key()));
    Some((pem, public))
}

impl Vapid {
    /// # Errors
    /// What is wrong with the key.
    pub(super) fn new(key: &str, subject: &str) -> Result<Self, String> {
        let fault =
            || "push.vapid_private_key: not PEM (PKCS#8) or base64url of 32 bytes".to_owned();
        let key = private_key(key).ok_or_else(fault)?;
        let pem = key
            .to_pkcs8_pem(LineEnding::LF)
            .map_err(|_quotes_it| fault())?;
        let signer = Signer::es256(&pem, None).map_err(|error| error.to_string())?;
        Ok(Self {
            signer,
            public: URL_SAFE_NO_PAD.encode(public_bytes(&key.public_key())),
            subject: subject.to_owned(),
        })
    }

    /// The header `Authorization` of a request to `endpoint`. `now`: in s since 1970.
    pub(super) fn authorization(&self, endpoint: &Uri, now: u64) -> Result<String, BadKey> {
        let scheme = endpoint.scheme_str().unwrap_or("https");
        let authority = endpoint.authority().map_or("", |its| its.as_str());
        let token = self.signer.sign(&json!({
            "aud": format!("{scheme}://{authority}"),
            "exp": now + TOKEN_S,
            "sub": self.subject,
        }))?;
        Ok(format!("vapid t={token}, k={}", self.public))
    }
}

/// Output lengths of HKDF.
struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// HKDF with SHA-256: extract and expand.
fn derive<const N: usize>(salt: &[u8], secret: &[u8], info: &[&[u8]]) -> Option<[u8; N]> {
    let key = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(secret);
    let mut out = [0; N];
    let material = key.expand(info, Length(N)).ok()?;
    material.fill(&mut out).ok()?;
    Some(out)
}

/// Encrypts a message for a browser.
pub(super) fn encrypt(subscription: &Subscription, message: &[u8]) -> Result<Vec<u8>, Unencrypted> {
    let own = SecretKey::random(&mut OsRng);
    let salt: [u8; SALT] = rand::rng().random();
    encrypt_with(subscription, message, &own, salt)
}

fn encrypt_with(
    subscription: &Subscription,
    message: &[u8],
    own: &SecretKey,
    salt: [u8; SALT],
) -> Result<Vec<u8>, Unencrypted> {
    if message.len() > MAX_MESSAGE {
        return Err(Unencrypted::TooLarge);
    }
    let (theirs, auth) = subscription.keys().ok_or(Unencrypted::Key)?;
    let their_key = PublicKey::from_sec1_bytes(&theirs).map_err(|_not_a_point| Unencrypted::Key)?;
    let own_public = public_bytes(&own.public_key());
    let shared = diffie_hellman(own.to_nonzero_scalar(), their_key.as_affine());
    let info: [&[u8]; 3] = [b"WebPush: info\0", &theirs, &own_public];
    let derived = || {
        let secret: [u8; 32] = derive(&auth, shared.raw_secret_bytes(), &info)?;
        let key: [u8; 16] = derive(&salt, &secret, &[b"Content-Encoding: aes128gcm\0"])?;
        let nonce: [u8; 12] = derive(&salt, &secret, &[b"Content-Encoding: nonce\0"])?;
        let key = UnboundKey::new(&AES_128_GCM, &key).ok()?;
        Some((LessSafeKey::new(key), Nonce::assume_unique_for_key(nonce)))
    };
    let (key, nonce) = derived().ok_or(Unencrypted::Failed)?;
    let mut sealed = Vec::with_capacity(message.len() + 1 + TAG);
    sealed.extend_from_slice(message);
    // This record is the last one, and has no padding.
    sealed.push(2);
    key.seal_in_place_append_tag(nonce, Aad::empty(), &mut sealed)
        .map_err(|_says_nothing| Unencrypted::Failed)?;
    let mut body = Vec::with_capacity(SALT + 5 + own_public.len() + sealed.len());
    body.extend_from_slice(&salt);
    body.extend_from_slice(&RECORD.to_be_bytes());
    body.push(u8::try_from(own_public.len()).unwrap_or(u8::MAX));
    body.extend_from_slice(&own_public);
    body.extend_from_slice(&sealed);
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(text: &str) -> Vec<u8> {
        URL_SAFE_NO_PAD.decode(text).unwrap()
    }

    fn of_the_rfc() -> Subscription {
        Subscription::new(
            "https://push.example.net/push/JzLQ3raZJfFBR0aqvOMsLrt54w4rJUsV",
            "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4",
            "BTBZMqHH6r4Tts7J_aSIgg",
        )
    }

    /// RFC 8291, section 5 and appendix A.
    #[test]
    fn the_example_of_the_rfc_is_what_it_becomes() {
        let own = private_key("yfWPiYE-n46HLnH0KqZOF1fJJU3MYrct3AELtAQ-oRw").unwrap();
        let salt = decode("DGv6ra1nlYgDCS1FRnbzlw").try_into().unwrap();
        let message = b"When I grow up, I want to be a watermelon";
        let body = encrypt_with(&of_the_rfc(), message, &own, salt).unwrap();
        let expected = decode(
            "DGv6ra1nlYgDCS1FRnbzlwAAEABBBP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIgDll6e3vCYLocInmYWAmS6TlzAC8wEqKK6PBru3jl7A_yl95bQpu6cVPTpK4Mqgkf1CXztLVBSt2Ks3oZwbuwXPXLWyouBWLVWGNWQexSgSxsj_Qulcy4a-fN",
        );
        assert_eq!(body, expected);
    }

    #[test]
    fn what_can_not_be_encrypted_is_an_error() {
        let large = vec![b'a'; MAX_MESSAGE + 1];
        assert_eq!(encrypt(&of_the_rfc(), &large), Err(Unencrypted::TooLarge));
        let body = encrypt(&of_the_rfc(), &large[1..]).unwrap();
        assert_eq!(body.len(), RECORD as usize);
        // Not on the curve.
        let bad = Subscription::new(
            "https://x",
            &URL_SAFE_NO_PAD.encode([4; 65]),
            "BTBZMqHH6r4Tts7J_aSIgg",
        );
        assert_eq!(encrypt(&bad, b""), Err(Unencrypted::Key));
    }

    #[test]
    fn keys_are_read_in_both_forms() {
        let (pem, public) = new_keys().unwrap();
        let vapid = Vapid::new(&pem, "mailto:a@example.org").unwrap();
        assert_eq!(vapid.public, public);
        let raw = private_key(&pem).unwrap().to_bytes();
        let raw = URL_SAFE_NO_PAD.encode(raw);
        assert_eq!(Vapid::new(&raw, "").unwrap().public, public);
        let error = Vapid::new("secret text", "").unwrap_err();
        assert!(!error.contains("secret text"), "{error}");
        let header = vapid.authorization(&"https://push.example:8443/a/b".parse().unwrap(), 1000);
        let header = header.unwrap();
        let token = header
            .strip_prefix("vapid t=")
            .unwrap()
            .split(',')
            .next()
            .unwrap();
        let claims: serde_json::Value =
            serde_json::from_slice(&decode(token.split('.').nth(1).unwrap())).unwrap();
        assert_eq!(claims["aud"], "https://push.example:8443");
        assert_eq!(claims["exp"], json!(1000 + TOKEN_S));
    }
}
