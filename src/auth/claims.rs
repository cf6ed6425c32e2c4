//! The claims of a token.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Grant;

/// The last second of the year 9999: a later time is not in seconds.
pub(crate) const LAST_SECOND: u64 = 253_402_300_799;

/// The claims of a token, as they are written there: their types are checked, their meaning is not yet.
///
/// Claims of other names are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>")]
pub struct Claims {
    /// The user.
    pub sub: String,
    /// End of validity, unix seconds (a fraction in the token is cut off).
    pub exp: u64,
    /// The issuer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iss: Option<String>,
    /// The audience (a string or a list of strings in the token); empty: absent.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub aud: Vec<String>,
    /// Start of validity, unix seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nbf: Option<u64>,
    /// When it was issued, unix seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iat: Option<u64>,
    /// The token's own name, for revocation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jti: Option<String>,
    /// Shown to others in presence: name, avatar.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub info: Option<Map<String, Value>>,
    /// Its permissions; empty: none.
    pub grants: Vec<Grant>,
    /// Rooms that the session joins when it connects; only in Centrifugo's protocol.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub channels: Vec<String>,
    /// The only room that the token is for, in the token of a subscription; only in Centrifugo's protocol.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel: Option<String>,
}

/// A claim that is missing or has the wrong shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadClaim {
    /// A required claim is missing.
    #[error("the token has no `{0}`")]
    Missing(&'static str),
    /// A claim has a wrong value.
    #[error("the token's `{claim}` {rule}")]
    Wrong {
        /// Its name.
        claim: &'static str,
        /// What it must be.
        rule: &'static str,
    },
}

impl Claims {
    /// Claims of `user` until `exp` (unix seconds), without permissions.
    #[must_use]
    pub fn new(user: &str, exp: u64) -> Self {
        Self {
            sub: user.to_owned(),
            exp,
            iss: None,
            aud: Vec::new(),
            nbf: None,
            iat: None,
            jti: None,
            info: None,
            grants: Vec::new(),
            channels: Vec::new(),
            channel: None,
        }
    }
}

impl TryFrom<Map<String, Value>> for Claims {
    type Error = BadClaim;

    fn try_from(mut map: Map<String, Value>) -> Result<Self, BadClaim> {
        // `null` means absent, as most issuers mean it.
        let mut take = |claim: &str| map.remove(claim).filter(|value| !value.is_null());
        Ok(Self {
            sub: text("sub", take("sub"))?.ok_or(BadClaim::Missing("sub"))?,
            exp: time("exp", take("exp"))?.ok_or(BadClaim::Missing("exp"))?,
            iss: text("iss", take("iss"))?,
            aud: texts("aud", take("aud"))?,
            // Issuers of natter's own tokens may use these names for something else.
            channels: texts("channels", take("channels")).unwrap_or_default(),
            channel: text("channel", take("channel")).unwrap_or_default(),
            nbf: time("nbf", take("nbf"))?,
            iat: time("iat", take("iat"))?,
            jti: text("jti", take("jti"))?,
            info: match take("info") {
                None => None,
                Some(Value::Object(info)) => Some(info),
                Some(_) => return Err(wrong("info", "must be an object")),
            },
            grants: match take("grants") {
                None => Vec::new(),
                Some(grants) => serde_json::from_value(grants).map_err(|_echoes_the_value| {
                    wrong(
                        "grants",
                        "must be a list of {\"rooms\": pattern, \"can\": [rights]}",
                    )
                })?,
            },
        })
    }
}

fn wrong(claim: &'static str, rule: &'static str) -> BadClaim {
    BadClaim::Wrong { claim, rule }
}

fn text(claim: &'static str, value: Option<Value>) -> Result<Option<String>, BadClaim> {
    match value {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(wrong(claim, "must be a string")),
    }
}

/// A `NumericDate` of RFC 7519: seconds since 1970, which may have a fraction.
fn time(claim: &'static str, value: Option<Value>) -> Result<Option<u64>, BadClaim> {
    let Some(value) = value else {
        return Ok(None);
    };
    if value.is_string() {
        return Err(wrong(
            claim,
            "must be a number of unix seconds, not a string",
        ));
    }
    let seconds = match (value.as_u64(), value.as_f64()) {
        (Some(seconds), _) => seconds,
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "not negative, the fraction is to go, and `as` saturates"
        )]
        (None, Some(seconds)) if seconds >= 0.0 => seconds as u64,
        (None, _) => return Err(wrong(claim, "must be a time in unix seconds")),
    };
    // Read as seconds, an `exp` in milliseconds would never pass, and a token with such an `iat` could not be revoked.
    if seconds > LAST_SECOND {
        let rule =
            "is after the year 9999: it looks like milliseconds, and must be in unix seconds";
        return Err(wrong(claim, rule));
    }
    Ok(Some(seconds))
}

fn texts(claim: &'static str, value: Option<Value>) -> Result<Vec<String>, BadClaim> {
    match value {
        None => Ok(Vec::new()),
        Some(Value::String(one)) => Ok(vec![one]),
        Some(value) => serde_json::from_value(value)
            .map_err(|_echoes_the_value| wrong(claim, "must be a string or a list of strings")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn claims_survive_json() {
        let mut claims = Claims::new("kim", 17);
        let bare = serde_json::to_value(&claims).unwrap();
        assert_eq!(bare, json!({"sub": "kim", "exp": 17, "grants": []}));
        assert_eq!(serde_json::from_value::<Claims>(bare).unwrap(), claims);
        claims.iss = Some("issuer".to_owned());
        claims.aud = vec!["a".to_owned(), "b".to_owned()];
        claims.nbf = Some(1);
        claims.iat = Some(2);
        claims.jti = Some("id".to_owned());
        claims.info = Some(Map::from_iter([("name".to_owned(), json!("킴"))]));
        claims.grants = vec![Grant::new("chat:*", &[super::super::Right::Read])];
        let full = serde_json::to_value(&claims).unwrap();
        assert_eq!(serde_json::from_value::<Claims>(full).unwrap(), claims);
    }

    #[test]
    fn other_spellings_of_the_standard_are_read() {
        let claims: Claims = serde_json::from_value(json!({
            "sub": "kim", "exp": 1.7e9, "nbf": 16.9, "aud": "one", "iss": null, "more": {"x": 1}
        }))
        .unwrap();
        assert_eq!((claims.exp, claims.nbf), (1_700_000_000, Some(16)));
        assert_eq!((claims.aud, claims.iss), (vec!["one".to_owned()], None));
    }

    #[test]
    fn times_that_are_not_in_seconds_are_refused_and_say_what_they_look_like() {
        for claim in ["exp", "nbf", "iat"] {
            let read = |value: Value| {
                let mut map = json!({"sub": "kim", "exp": 1}).as_object().unwrap().clone();
                map.insert(claim.to_owned(), value);
                Claims::try_from(map)
            };
            for seconds in [
                json!(0),
                json!(1_763_600_000),
                json!(1_763_600_000.5),
                json!(1.7636e9),
                json!(LAST_SECOND),
            ] {
                assert!(read(seconds.clone()).is_ok(), "{claim}: {seconds}");
            }
            for (value, told) in [
                (json!(1_763_600_000_000_u64), "milliseconds"),
                (json!(1_763_600_000_000.5), "milliseconds"),
                (json!(1_763_600_000_000_000_u64), "milliseconds"),
                (json!(LAST_SECOND + 1), "milliseconds"),
                (json!(u64::MAX), "milliseconds"),
                (json!(1e300), "milliseconds"),
                (json!("1763600000"), "not a string"),
                (json!(""), "not a string"),
                (json!(-1), "unix seconds"),
                (json!(true), "unix seconds"),
            ] {
                let error = read(value.clone()).unwrap_err().to_string();
                let named = error.contains(told) && error.contains(&format!("`{claim}`"));
                assert!(named, "{value}: {error}");
            }
        }
    }

    #[test]
    fn wrong_shapes_name_the_claim_and_not_its_value() {
        for (claim, value) in [
            ("sub", json!(7777)),
            ("exp", json!("7777")),
            ("exp", json!(-7777)),
            ("iat", json!(-7777.5)),
            ("nbf", json!({"7777": 7777})),
            ("exp", json!(true)),
            ("nbf", json!([7777])),
            ("iat", json!("7777")),
            ("iss", json!(7777)),
            ("aud", json!([7777])),
            ("jti", json!(7777)),
            ("info", json!("7777")),
            ("grants", json!("7777")),
            ("grants", json!([{"rooms": "7777"}])),
            ("grants", json!([{"rooms": 7777, "can": []}])),
        ] {
            let mut map = json!({"sub": "kim", "exp": 1}).as_object().unwrap().clone();
            map.insert(claim.to_owned(), value);
            let error = Claims::try_from(map).unwrap_err().to_string();
            assert!(error.contains(&format!("`{claim}`")), "{error}");
            assert!(!error.contains("7777"), "{error}");
        }
    }
}
