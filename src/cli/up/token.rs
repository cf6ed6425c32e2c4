//! The development token that `natter up` prints.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::{
    auth::{Claims, Grant, Right, issue},
    config::Auth,
};

/// How long it is valid.
const VALID_FOR: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// A token for user `dev` with the rights to take part in every room.
pub(super) fn development(auth: &Auth, secret: &str) -> anyhow::Result<String> {
    let expires = SystemTime::now().duration_since(UNIX_EPOCH)? + VALID_FOR;
    let required = |value: &String| (!value.is_empty()).then(|| value.clone());
    let can = [Right::Read, Right::Write, Right::Presence, Right::History];
    let claims = Claims {
        sub: "dev".to_owned(),
        exp: expires.as_secs(),
        iss: required(&auth.issuer),
        aud: required(&auth.audience).into_iter().collect(),
        grants: vec![Grant::new("*:*", &can)],
        nbf: None,
        iat: None,
        jti: None,
        info: None,
        channels: Vec::new(),
        channel: None,
    };
    Ok(issue(&claims, secret)?)
}
