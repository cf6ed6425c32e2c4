//! Token → claims → grants: which user may do what in which room.
//!
//! This module does not know sessions or sockets. It learns revocations from its caller ([`Revocations`]), and reads no
//! clock: `now` is an argument. It is the only module that uses jsonwebtoken, and only for signatures: which claims are
//! valid, and until when, is decided here.
//!
//! # Invariants
//! - The algorithm belongs to the key. A token's `alg` can only pick one of the configured pairs, so a public key is never
//!   used as an HMAC secret, and `none` is not an algorithm.
//! - Before its signature is verified, only the header's `alg` and `crit` are read from a token.
//! - No error and no log line contains the token, a part of it, or a secret.

mod cache;
mod claims;
mod grant;
mod key;
mod revoked;
mod signer;
#[cfg(test)]
mod test_keys;
mod verifier;

pub(crate) use claims::LAST_SECOND;
pub use claims::{BadClaim, Claims};
pub use grant::{BadPattern, Grant, Right};
pub use revoked::{Block, Revocation, Revocations, Whose};
pub use signer::{BadKey, Signer};
pub use verifier::{AuthConfigError, AuthError, Identity, MAX_TOKEN, Verifier, issue, user_flaw};
