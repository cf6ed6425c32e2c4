use std::{io::Write as _, time::Duration};

use serde_json::json;

use super::*;
use crate::{
    auth::{Grant, Revocation, Whose, test_keys as keys},
    config::Config,
};

const SECRET: &str = "0123456789abcdef0123456789abcdef";
const NOW: u64 = 1_763_600_000;
const LEEWAY: u64 = 30;

struct Setup {
    secret: &'static str,
    public_key: &'static str,
    issuer: &'static str,
    audience: &'static str,
}

const HS256: Setup = Setup {
    secret: SECRET,
    public_key: "",
    issuer: "",
    audience: "",
};

fn auth(setup: &Setup) -> (config::Auth, Option<tempfile::NamedTempFile>) {
    let toml = figment::providers::Serialized::defaults(json!({"auth": {
        "hs256_secret": setup.secret, "issuer": setup.issuer, "audience": setup.audience,
    }}));
    let mut auth = Config::with_defaults(toml).unwrap().auth;
    assert_eq!(auth.leeway, Duration::from_secs(LEEWAY));
    let file = (!setup.public_key.is_empty()).then(|| {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(setup.public_key.as_bytes()).unwrap();
        file.path().clone_into(&mut auth.public_key_file);
        file
    });
    (auth, file)
}

fn verifier(setup: &Setup) -> Verifier {
    let (auth, _file) = auth(setup);
    Verifier::from_config(&auth).unwrap()
}

fn payload() -> Value {
    json!({"sub": "kim", "exp": NOW + 60, "grants": [{"rooms": "chat:*", "can": ["read"]}]})
}

/// A token of any content, signed with HS256.
fn signed(payload: &Value) -> String {
    sign(
        &Header::new(Algorithm::HS256),
        payload,
        &EncodingKey::from_secret(SECRET.as_bytes()),
    )
}

fn sign(header: &Header, payload: &Value, key: &EncodingKey) -> String {
    encode(header, payload, key).unwrap()
}

/// A token with this header text, signed with HS256 over just these bytes.
fn with_header(header: &str, payload: &Value, secret: &[u8]) -> String {
    let message = format!(
        "{}.{}",
        URL_SAFE_NO_PAD.encode(header),
        URL_SAFE_NO_PAD.encode(payload.to_string())
    );
    let key = EncodingKey::from_secret(secret);
    let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap();
    format!("{message}.{signature}")
}

fn with(claim: &str, value: Value) -> Value {
    let mut payload = payload();
    payload[claim] = value;
    payload
}

fn without(claim: &str) -> Value {
    let mut payload = payload();
    payload.as_object_mut().unwrap().remove(claim);
    payload
}

fn claim(claim: &'static str, rule: &'static str) -> AuthError {
    AuthError::Claim(BadClaim::Wrong { claim, rule })
}

#[test]
fn an_issued_token_is_accepted_with_its_grants() {
    let mut claims = Claims::new("kim", NOW + 60);
    claims.info = Some(Map::from_iter([("name".to_owned(), json!("킴"))]));
    claims.jti = Some("t1".to_owned());
    claims.grants = vec![
        Grant::new("chat:*", &[Right::Read]),
        Grant::new("dm:{sub}", &[Right::Read, Right::Write]),
    ];
    let verifier = verifier(&HS256);
    let identity = verifier
        .verify(&issue(&claims, SECRET).unwrap(), NOW)
        .unwrap();
    assert_eq!((&*identity.user, identity.exp), ("kim", NOW + 60));
    assert_eq!(identity.jti.as_deref(), Some("t1"));
    assert_eq!(identity.info.as_ref().unwrap().get(), r#"{"name":"킴"}"#);
    assert_eq!(verifier.deadline(&identity), NOW + 60 + LEEWAY);
    for (right, room, expected) in [
        (Right::Read, "chat:lobby", true),
        (Right::Write, "chat:lobby", false),
        (Right::Write, "dm:kim", true),
        (Right::Read, "dm:lee", false),
        (Right::Moderate, "dm:kim", false),
    ] {
        let room = RoomId::parse(room).unwrap();
        assert_eq!(identity.may(right, &room), expected, "{right} {room}");
    }
}

#[test]
fn every_refusal_is_named() {
    let malformed = AuthError::Malformed;
    let hs256_only = AuthError::Algorithm {
        accepted: "HS256".to_owned(),
    };
    let good = signed(&payload());
    let (message, signature) = good.rsplit_once('.').unwrap();
    let (header, _) = message.split_once('.').unwrap();
    let signature_end = signature.get(signature.len() - 4..).unwrap();
    let other_payload = URL_SAFE_NO_PAD.encode(with("sub", json!("root")).to_string());
    let other_key = EncodingKey::from_secret(b"fedcba9876543210fedcba9876543210");
    let hs512 = Header::new(Algorithm::HS512);
    let secret = EncodingKey::from_secret(SECRET.as_bytes());
    let parts = "it is not three parts with dots between them";
    for (what, token, expected) in [
        ("empty", String::new(), malformed(parts)),
        ("no dots", "abc".to_owned(), malformed(parts)),
        ("two parts", "a.b".to_owned(), malformed(parts)),
        ("four parts", format!("{good}.x"), malformed(parts)),
        (
            "header not base64",
            format!("!!.{other_payload}.{signature}"),
            malformed("its header is not base64url"),
        ),
        (
            "header not json",
            format!("YWJj.{other_payload}.{signature}"),
            malformed("its header is not a JSON object with `alg`"),
        ),
        (
            "header without alg",
            with_header(r#"{"typ":"JWT"}"#, &payload(), SECRET.as_bytes()),
            malformed("its header is not a JSON object with `alg`"),
        ),
        (
            "crit",
            with_header(
                r#"{"alg":"HS256","crit":["exp"]}"#,
                &payload(),
                SECRET.as_bytes(),
            ),
            malformed("its header has `crit`, and no extension is understood here"),
        ),
        (
            "payload not an object",
            with_header(r#"{"alg":"HS256"}"#, &json!([1]), SECRET.as_bytes()),
            malformed("its payload is not a JSON object"),
        ),
        (
            "oversize",
            format!("{good}{}", "A".repeat(MAX_TOKEN)),
            AuthError::TooLong,
        ),
        (
            "alg none, unsigned",
            format!(
                "{}.{other_payload}.",
                URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#)
            ),
            hs256_only.clone(),
        ),
        (
            "alg None, signed",
            with_header(r#"{"alg":"None"}"#, &payload(), SECRET.as_bytes()),
            hs256_only.clone(),
        ),
        (
            "alg in lower case",
            with_header(r#"{"alg":"hs256"}"#, &payload(), SECRET.as_bytes()),
            hs256_only.clone(),
        ),
        (
            "HS512 with the right secret",
            sign(&hs512, &payload(), &secret),
            hs256_only.clone(),
        ),
        (
            "RS256 without a public key",
            sign(
                &Header::new(Algorithm::RS256),
                &payload(),
                &EncodingKey::from_rsa_pem(keys::RSA_PRIVATE.as_bytes()).unwrap(),
            ),
            hs256_only,
        ),
        (
            "other secret",
            sign(&Header::default(), &payload(), &other_key),
            AuthError::Signature,
        ),
        (
            "payload exchanged",
            format!("{header}.{other_payload}.{signature}"),
            AuthError::Signature,
        ),
        ("no signature", format!("{message}."), AuthError::Signature),
        (
            "signature not base64",
            format!("{message}.!!"),
            AuthError::Signature,
        ),
        (
            "signature cut",
            good.strip_suffix(signature_end).unwrap().to_owned(),
            AuthError::Signature,
        ),
        ("white space", format!("{good}\n"), AuthError::Signature),
        (
            "no sub",
            signed(&without("sub")),
            BadClaim::Missing("sub").into(),
        ),
        (
            "no exp",
            signed(&without("exp")),
            BadClaim::Missing("exp").into(),
        ),
        (
            "exp null",
            signed(&with("exp", Value::Null)),
            BadClaim::Missing("exp").into(),
        ),
        (
            "exp as text",
            signed(&with("exp", json!("never"))),
            claim("exp", "must be a number of unix seconds, not a string"),
        ),
        (
            "sub empty",
            signed(&with("sub", json!(""))),
            claim("sub", "must not be empty"),
        ),
        (
            "sub too long",
            signed(&with("sub", json!("x".repeat(257)))),
            claim("sub", "must be at most 256 bytes"),
        ),
        (
            "sub reserved",
            signed(&with("sub", json!("$mesh"))),
            claim(
                "sub",
                "must not begin with `$`, which is reserved for the mesh",
            ),
        ),
        (
            "info nested too deep",
            signed(&with("info", nested(65))),
            claim("info", "must not be nested deeper than 64 levels"),
        ),
        (
            "info not an object",
            signed(&with("info", json!("kim"))),
            claim("info", "must be an object"),
        ),
        (
            "expired",
            signed(&with("exp", json!(NOW - LEEWAY))),
            AuthError::Expired { exp: NOW - LEEWAY },
        ),
        (
            "expired at 0",
            signed(&with("exp", json!(0))),
            AuthError::Expired { exp: 0 },
        ),
        (
            "not yet valid",
            signed(&with("nbf", json!(NOW + LEEWAY + 1))),
            AuthError::NotYetValid {
                nbf: NOW + LEEWAY + 1,
            },
        ),
        (
            "issued in the future",
            signed(&with("iat", json!(NOW + LEEWAY + 1))),
            AuthError::IssuedInFuture {
                iat: NOW + LEEWAY + 1,
            },
        ),
        (
            "issued in milliseconds",
            signed(&with("iat", json!(NOW * 1000))),
            claim(
                "iat",
                "is after the year 9999: it looks like milliseconds, and must be in unix seconds",
            ),
        ),
        (
            "malformed pattern",
            signed(&with(
                "grants",
                json!([{"rooms": "a:b", "can": []}, {"rooms": "*:b", "can": []}]),
            )),
            AuthError::Pattern {
                index: 1,
                rule: BadPattern,
            },
        ),
    ] {
        let verifier = verifier(&HS256);
        for _ in 0..2 {
            let error = verifier.verify(&token, NOW).unwrap_err();
            assert_eq!(error, expected, "{what}");
            let shown = error.to_string();
            assert!(
                !token.get(..8).is_some_and(|start| shown.contains(start)),
                "{what}: echoed: {shown}"
            );
            assert!(!shown.contains(SECRET), "{what}: {shown}");
        }
    }
}

#[test]
fn leeway_is_given_on_both_ends() {
    let verifier = verifier(&HS256);
    for payload in [
        with("exp", json!(NOW - LEEWAY + 1)),
        with("nbf", json!(NOW + LEEWAY)),
        with("iat", json!(NOW + LEEWAY)),
        with("exp", json!(253_402_300_799_u64)),
        with("sub", json!("x".repeat(256))),
        without("grants"),
    ] {
        verifier.verify(&signed(&payload), NOW).unwrap();
    }
}

#[test]
fn issuer_and_audience_are_checked_when_configured() {
    let verifier = verifier(&Setup {
        issuer: "idp",
        audience: "natter",
        ..HS256
    });
    for (iss, aud, expected) in [
        (json!("idp"), json!("natter"), Ok(())),
        (json!("idp"), json!(["x", "natter"]), Ok(())),
        (json!("other"), json!("natter"), Err(AuthError::Issuer)),
        (Value::Null, json!("natter"), Err(AuthError::Issuer)),
        (json!("idp"), json!("other"), Err(AuthError::Audience)),
        (json!("idp"), json!([]), Err(AuthError::Audience)),
        (json!("idp"), Value::Null, Err(AuthError::Audience)),
    ] {
        let mut payload = payload();
        payload["iss"] = iss;
        payload["aud"] = aud;
        let result = verifier.verify(&signed(&payload), NOW).map(|_identity| ());
        assert_eq!(result, expected, "{payload}");
    }
}

#[test]
fn public_keys_verify_their_own_algorithm_only() {
    let rsa = EncodingKey::from_rsa_pem(keys::RSA_PRIVATE.as_bytes()).unwrap();
    let ec = EncodingKey::from_ec_pem(keys::EC_PRIVATE.as_bytes()).unwrap();
    let ed = EncodingKey::from_ed_pem(keys::ED_PRIVATE.as_bytes()).unwrap();
    for (public_key, algorithm, key) in [
        (keys::RSA_PUBLIC, Algorithm::RS256, &rsa),
        (keys::RSA_PUBLIC_PKCS1, Algorithm::RS256, &rsa),
        (keys::EC_PUBLIC, Algorithm::ES256, &ec),
        (keys::ED_PUBLIC, Algorithm::EdDSA, &ed),
    ] {
        let verifier = verifier(&Setup {
            secret: "",
            public_key,
            ..HS256
        });
        let token = sign(&Header::new(algorithm), &payload(), key);
        let identity = verifier.verify(&token, NOW).unwrap();
        assert_eq!(&*identity.user, "kim", "{algorithm:?}");
        assert!(Arc::ptr_eq(
            &identity,
            &verifier.verify(&token, NOW).unwrap()
        ));

        let forged = format!("{}x", token.rsplit_once('.').unwrap().0);
        let (_, signature) = token.rsplit_once('.').unwrap();
        assert_eq!(
            verifier
                .verify(&format!("{forged}.{signature}"), NOW)
                .unwrap_err(),
            AuthError::Signature
        );
        // Algorithm confusion: HMAC with what the attacker knows, the public key, under every name of an algorithm.
        for secret in [public_key.as_bytes(), public_key.trim().as_bytes(), b""] {
            for alg in [
                "HS256", "HS384", "HS512", "RS256", "ES256", "EdDSA", "PS256", "none", "",
            ] {
                let token = with_header(&json!({"alg": alg}).to_string(), &payload(), secret);
                let error = verifier.verify(&token, NOW).unwrap_err();
                assert!(
                    matches!(error, AuthError::Algorithm { .. } | AuthError::Signature),
                    "{alg}: {error}"
                );
            }
        }
        let rs512 = sign(&Header::new(Algorithm::RS512), &payload(), &rsa);
        assert!(verifier.verify(&rs512, NOW).is_err());
    }
}

#[test]
fn a_secret_and_a_public_key_each_verify_their_own() {
    let verifier = verifier(&Setup {
        public_key: keys::ED_PUBLIC,
        ..HS256
    });
    let ed = EncodingKey::from_ed_pem(keys::ED_PRIVATE.as_bytes()).unwrap();
    verifier.verify(&signed(&payload()), NOW).unwrap();
    verifier
        .verify(&sign(&Header::new(Algorithm::EdDSA), &payload(), &ed), NOW)
        .unwrap();
    let confused = with_header(r#"{"alg":"HS256"}"#, &payload(), keys::ED_PUBLIC.as_bytes());
    assert_eq!(
        verifier.verify(&confused, NOW).unwrap_err(),
        AuthError::Signature
    );
}

#[test]
fn a_remembered_token_still_ends() {
    let verifier = verifier(&HS256);
    let token = signed(&payload());
    let first = verifier.verify(&token, NOW).unwrap();
    let second = verifier.verify(&token, NOW + 60 + LEEWAY - 1).unwrap();
    assert!(
        Arc::ptr_eq(&first, &second),
        "the second time was not from memory"
    );
    for _ in 0..2 {
        assert_eq!(
            verifier.verify(&token, NOW + 60 + LEEWAY).unwrap_err(),
            AuthError::Expired { exp: NOW + 60 }
        );
    }
}

#[test]
fn a_remembered_token_is_not_from_the_future_either() {
    let verifier = verifier(&HS256);
    let token = signed(&with("iat", json!(NOW)));
    verifier.verify(&token, NOW).unwrap();
    // The edge's clock was set back.
    let earlier = NOW - LEEWAY - 1;
    let error = verifier.verify(&token, earlier).unwrap_err();
    assert_eq!(error, AuthError::IssuedInFuture { iat: NOW });
}

/// Whatever its leeway: a revoked token is not good again before it has ended.
#[test]
fn a_revocation_outlives_the_tokens_that_it_names() {
    for leeway in [0, 1, 30, 60, 600] {
        let (mut auth, _file) = auth(&HS256);
        auth.leeway = Duration::from_secs(leeway);
        // How much longer than the token the revocation was said to hold, and the operator's clock against the edge's.
        for longer in [0, 1, 3600] {
            for clock in [-120_i64, 0, 120] {
                let mut payload = payload();
                payload["iat"] = json!(NOW);
                payload["jti"] = json!("t1");
                let token = signed(&payload);
                let exp = NOW + 60;
                let said = NOW.checked_add_signed(clock).unwrap();
                let rule = Revocation::new(said, Duration::from_secs(60 + longer), auth.leeway);
                let rule = serde_json::to_vec(&rule).unwrap();
                // By name at any difference of the clocks; by user where the leeway covers it.
                let mut whose = vec![Whose::Token("t1".to_owned())];
                if clock + i64::try_from(leeway).unwrap() >= 0 {
                    whose.push(Whose::User("kim".to_owned()));
                }
                for whose in whose {
                    let verifier = Verifier::from_config(&auth).unwrap();
                    verifier.verify(&token, NOW).unwrap();
                    let revocations = verifier.revocations();
                    revocations.learn(whose.clone(), &rule).unwrap();
                    for now in NOW..exp + leeway + 2 {
                        revocations.forget(now);
                        let error = verifier.verify(&token, now).unwrap_err();
                        let expected = match now < exp + leeway {
                            true => AuthError::Revoked,
                            false => AuthError::Expired { exp },
                        };
                        assert_eq!(error, expected, "{whose:?}, {leeway}, {longer}, {clock}");
                    }
                }
            }
        }
    }
}

#[test]
fn no_token_that_is_let_in_survives_a_revocation_of_its_user() {
    let (auth, _file) = auth(&HS256);
    for (iat, refused) in [
        (json!(NOW - 3600), true),
        (json!(NOW), true),
        (json!(NOW + 1), true),
        (json!(NOW + 20), true),
        (json!(NOW as f64 + 29.9), true),
        (json!(NOW + LEEWAY), true),
        (json!(0), true),
        (Value::Null, true),
        // What is issued when no clock can be that much ahead any more.
        (json!(NOW + LEEWAY + 1), false),
    ] {
        let verifier = Verifier::from_config(&auth).unwrap();
        let rule = Revocation::new(NOW, Duration::from_secs(3600), auth.leeway);
        let rule = serde_json::to_vec(&rule).unwrap();
        let kim = Whose::User("kim".to_owned());
        verifier.revocations().learn(kim, &rule).unwrap();
        let mut payload = with("iat", iat);
        payload["exp"] = json!(NOW + 600);
        let result = verifier.verify(&signed(&payload), NOW + LEEWAY + 1);
        let expected = if refused {
            Err(AuthError::Revoked)
        } else {
            Ok(())
        };
        assert_eq!(result.map(|_identity| ()), expected, "{payload}");
    }
}

#[test]
fn without_a_key_everything_is_refused() {
    let verifier = verifier(&Setup {
        secret: "",
        ..HS256
    });
    assert_eq!(
        verifier.verify(&signed(&payload()), NOW).unwrap_err(),
        AuthError::NoKey
    );
    let empty_secret = with_header(r#"{"alg":"HS256"}"#, &payload(), b"");
    assert_eq!(
        verifier.verify(&empty_secret, NOW).unwrap_err(),
        AuthError::NoKey
    );
}

#[test]
fn unusable_public_key_files_are_named() {
    let (mut config, _file) = auth(&HS256);
    config.public_key_file = "/nonexistent/key.pem".into();
    let error = Verifier::from_config(&config).unwrap_err().to_string();
    assert!(
        error.contains("auth.public_key_file = /nonexistent/key.pem"),
        "{error}"
    );
    let (config, _file) = auth(&Setup {
        public_key: keys::EC_PRIVATE,
        ..HS256
    });
    let error = Verifier::from_config(&config).unwrap_err().to_string();
    assert!(
        error.contains("private") && error.contains("auth.public_key_file"),
        "{error}"
    );
}

#[test]
fn tokens_nobody_would_accept_are_not_issued() {
    let error = issue(&Claims::new("$mesh", NOW), SECRET).unwrap_err();
    assert!(matches!(error, IssueError::Claims(_)));
    let mut claims = Claims::new("kim", NOW);
    claims.grants = vec![Grant::new("chat:*", &Right::ALL); 1000];
    let error = issue(&claims, SECRET).unwrap_err();
    assert!(matches!(error, IssueError::TooLong { size } if size > MAX_TOKEN));
}

#[test]
fn a_verifier_is_shared_by_threads_and_shows_no_secret() {
    fn shared<T: Send + Sync>(_: &T) {}
    let verifier = verifier(&HS256);
    shared(&verifier);
    assert!(!format!("{verifier:?}").contains(SECRET));
}

/// Objects within each other.
fn nested(levels: usize) -> Value {
    (0..levels).fold(json!(1), |inner, _| json!({ "a": inner }))
}

#[test]
fn info_may_be_nested_so_deep() {
    let mut claims = Claims::new("kim", 1);
    claims.info = nested(64).as_object().cloned();
    assert!(Identity::from_claims(&claims).is_ok());
}
