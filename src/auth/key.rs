//! Keys: each is bound to the only algorithm with which it may be used.

use jsonwebtoken::{
    Algorithm, DecodingKey,
    crypto::{rust_crypto::DEFAULT_PROVIDER, verify},
};

/// Smallest RSA modulus, in bytes (RFC 7518 section 3.3: 2048 bits).
const MIN_RSA_MODULUS: usize = 256;

/// A key and its algorithm.
#[derive(Debug)]
pub(super) struct Key {
    name: &'static str,
    algorithm: Algorithm,
    key: DecodingKey,
}

impl Key {
    /// A secret for HS256.
    pub(super) fn hs256(secret: &str) -> Self {
        Self {
            name: "HS256",
            algorithm: Algorithm::HS256,
            key: DecodingKey::from_secret(secret.as_bytes()),
        }
    }

    /// A public key in PEM: RSA (RS256), P-256 (ES256) or Ed25519 (`EdDSA`).
    ///
    /// # Errors
    /// What is wrong with it, as a text that follows "the key".
    pub(super) fn from_pem(pem: &[u8]) -> Result<Self, &'static str> {
        let has = |label: &[u8]| pem.windows(label.len()).any(|window| window == label);
        if has(b"PRIVATE KEY-----") {
            return Err("is private; an edge needs the public key only");
        }
        if !has(b"-----BEGIN PUBLIC KEY-----") && !has(b"-----BEGIN RSA PUBLIC KEY-----") {
            return Err(
                "is not a public key in PEM (`-----BEGIN PUBLIC KEY-----`, not a certificate)",
            );
        }
        // Each function reads only its own kind of key: the object identifier inside the key decides, not the text
        // around it.
        let key = if let Ok(key) = DecodingKey::from_ec_pem(pem) {
            Self {
                name: "ES256",
                algorithm: Algorithm::ES256,
                key,
            }
        } else if let Ok(key) = DecodingKey::from_ed_pem(pem) {
            Self {
                name: "EdDSA",
                algorithm: Algorithm::EdDSA,
                key,
            }
        } else if let Ok(key) = DecodingKey::from_rsa_pem(pem) {
            let components = DEFAULT_PROVIDER
                .key_utils
                .rsa_pub_components_from_public_key;
            let modulus = key
                .try_get_as_bytes()
                .and_then(components)
                .map_err(|_detail| "can't be read as an RSA key")?
                .0;
            if modulus.len() < MIN_RSA_MODULUS {
                return Err("is an RSA key of less than 2048 bits");
            }
            Self {
                name: "RS256",
                algorithm: Algorithm::RS256,
                key,
            }
        } else {
            return Err("is not RSA, P-256 or Ed25519");
        };
        // A point of another curve, or not on the curve, is detected only when the verifier is made.
        match (DEFAULT_PROVIDER.verifier_factory)(&key.algorithm, &key.key) {
            Ok(_verifier) => Ok(key),
            Err(_detail) => Err("is not a valid RSA, P-256 or Ed25519 key"),
        }
    }

    /// The `alg` of its tokens.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Whether `signature` (base64url) is this key's signature of `message`.
    pub(super) fn verifies(&self, message: &str, signature: &str) -> bool {
        verify(signature, message.as_bytes(), &self.key, self.algorithm).unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::test_keys as keys;

    #[test]
    fn the_kind_of_key_decides_the_algorithm() {
        for (pem, expected) in [
            (keys::RSA_PUBLIC, "RS256"),
            (keys::RSA_PUBLIC_PKCS1, "RS256"),
            (keys::EC_PUBLIC, "ES256"),
            (keys::ED_PUBLIC, "EdDSA"),
        ] {
            assert_eq!(Key::from_pem(pem.as_bytes()).unwrap().name(), expected);
        }
    }

    #[test]
    fn unfit_keys_are_refused_with_the_reason() {
        let broken = keys::EC_PUBLIC.replace("MFkw", "MFkx");
        for (pem, reason) in [
            (keys::RSA_PRIVATE, "private"),
            (keys::EC_PRIVATE, "private"),
            (keys::ED_PRIVATE, "private"),
            (keys::RSA_1024_PUBLIC, "2048"),
            (keys::P384_PUBLIC, "P-256"),
            (broken.as_str(), "not"),
            ("", "not a public key in PEM"),
            (
                "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----",
                "certificate",
            ),
            (
                "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
                "not RSA",
            ),
        ] {
            let error = Key::from_pem(pem.as_bytes()).unwrap_err();
            assert!(error.contains(reason), "{reason}: {error}");
        }
    }
}
