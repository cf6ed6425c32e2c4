//! Token → claims → grants: who may do what in which room.
//!
//! Does not know sessions or sockets, is told what was revoked ([`Revocations`]), and reads no clock: `now` is an argument. The only module that
//! imports jsonwebtoken, and of it only the signatures: what a token may say, and until when it holds, is decided here.
//!
//! # Invariants
//! - The algorithm belongs to the key. A token's `alg` can only pick one of the configured pairs, so a public key is never
//!   used as an HMAC secret, and `none` is not an algorithm.
//! - Nothing of a token is read before its signature is verified, except the header's `alg` and `crit`.
//! - No error and no log line contains the token, a part of it, or a secret.

mod cache;
mod claims;
mod grant;
mod key;
mod revoked;
#[cfg(test)]
mod test_keys;
mod verifier;

pub use claims::{BadClaim, Claims};
pub use grant::{BadPattern, Grant, Right};
pub use revoked::{Block, Revocation, Revocations, Whose};
pub use verifier::{AuthConfigError, AuthError, Identity, MAX_TOKEN, Verifier, issue};
