//! Tokens that natter itself shows to others: services that deliver push notifications.

use std::fmt;

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::Value;

/// A private key and the header of what it signs.
#[derive(Clone)]
pub struct Signer {
    key: EncodingKey,
    header: Header,
}

/// Not a key of the expected form. The key is not shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a private key of the form {0}")]
pub struct BadKey(&'static str);

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").finish_non_exhaustive()
    }
}

impl Signer {
    /// Signs with ES256. `pem`: PKCS#8. `id`: the `kid` of the header, if there is one.
    ///
    /// # Errors
    /// [`BadKey`].
    pub fn es256(pem: &str, id: Option<&str>) -> Result<Self, BadKey> {
        let key = EncodingKey::from_ec_pem(pem.as_bytes());
        let key = key.map_err(|_quotes_it| BadKey("PEM (PKCS#8) on the curve P-256"))?;
        Ok(Self::new(key, Algorithm::ES256, id))
    }

    /// Signs with RS256. `pem`: PKCS#8 or PKCS#1.
    ///
    /// # Errors
    /// [`BadKey`].
    pub fn rs256(pem: &str, id: Option<&str>) -> Result<Self, BadKey> {
        let key = EncodingKey::from_rsa_pem(pem.as_bytes());
        let key = key.map_err(|_quotes_it| BadKey("PEM, RSA"))?;
        Ok(Self::new(key, Algorithm::RS256, id))
    }

    fn new(key: EncodingKey, algorithm: Algorithm, id: Option<&str>) -> Self {
        let mut header = Header::new(algorithm);
        header.kid = id.map(str::to_owned);
        Self { key, header }
    }

    /// A token with these claims.
    ///
    /// # Errors
    /// [`BadKey`]: the key can't sign.
    pub fn sign(&self, claims: &Value) -> Result<String, BadKey> {
        let token = encode(&self.header, claims, &self.key);
        token.map_err(|_quotes_it| BadKey("of this algorithm"))
    }
}
