//! Verifies tokens, and issues them for development.

use std::{fmt, fs, io, path::PathBuf, sync::Arc};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde::Deserialize;
use serde_json::{Map, Value, value::RawValue};

use super::{
    BadClaim, BadPattern, Claims, Grant, Revocations, Right,
    cache::Cache,
    claims::LAST_SECOND,
    grant::{Allowed, Rooms},
    key::Key,
};
use crate::{
    config::{self, Config},
    model::{MAX_USER, RoomId, RoomScope, json_flaw},
    telemetry::metrics::{Counter, TokenCheck, TokenFault, count},
};

/// Longest token, in bytes.
pub const MAX_TOKEN: usize = 8 * 1024;

/// Maximum nesting of arrays and objects in `info`, which is shown to others.
const MAX_INFO_DEPTH: usize = 64;

/// Maximum number of verified tokens that are remembered.
const CACHE: usize = 10_000;

/// The user of a verified token, and their permissions.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The user: any text of 1 to [`MAX_USER`] bytes that does not begin with `$`.
    pub user: Arc<str>,
    /// End of validity, unix seconds, without leeway: see [`Verifier::deadline`].
    pub exp: u64,
    /// When it was issued, in unix seconds, if it says so.
    pub iat: Option<u64>,
    /// The token's own name, if it has one.
    pub jti: Option<Box<str>>,
    /// A JSON object for presence, if the token has one.
    pub info: Option<Arc<RawValue>>,
    /// Rooms that the session joins when it connects; only in Centrifugo's protocol.
    pub channels: Box<[String]>,
    /// The room that a subscription is for whose token this is; only in Centrifugo's protocol.
    channel: Option<Box<str>>,
    /// Whether the token is for nothing else.
    is_for_subscription: bool,
    /// Whether the user has no token, and a name that nobody has again.
    pub is_anonymous: bool,
    allowed: Box<[Allowed]>,
}

impl Identity {
    /// Whether the grants cover `right` in `room`.
    #[must_use]
    pub fn may(&self, right: Right, room: &RoomId) -> bool {
        self.allowed
            .iter()
            .any(|allowed| allowed.rights(room).contains(right))
    }

    /// All rooms in which the grants give `right`.
    #[must_use]
    pub fn scope(&self, right: Right) -> RoomScope {
        let mut scope = RoomScope::default();
        for rooms in self
            .allowed
            .iter()
            .filter_map(|allowed| allowed.rooms_with(right))
        {
            match rooms {
                Rooms::All => scope.all = true,
                Rooms::Namespace(namespace) => scope.namespaces.push(namespace.to_string()),
                Rooms::One { namespace, name } => {
                    scope.rooms.extend(RoomId::from_parts(namespace, name));
                }
                Rooms::None => {}
            }
        }
        scope
    }

    /// `user` with the permissions of this identity. Nothing else of it remains.
    #[must_use]
    pub fn acting_as(&self, user: &str) -> Self {
        Self {
            user: Arc::from(user),
            info: None,
            ..self.clone()
        }
    }

    /// The same identity with another end of validity, in unix seconds.
    #[must_use]
    pub fn until(&self, exp: u64) -> Self {
        Self {
            exp,
            ..self.clone()
        }
    }

    /// `user` as seen by a back end that may do everything everywhere.
    #[must_use]
    pub fn of_back_end(user: &str) -> Self {
        Self {
            user: Arc::from(user),
            exp: LAST_SECOND,
            iat: None,
            jti: None,
            info: None,
            channels: Box::default(),
            channel: None,
            is_for_subscription: false,
            is_anonymous: false,
            allowed: Box::new([Allowed::everything()]),
        }
    }

    /// The meaning of `claims`. Times, issuer and audience are not checked.
    ///
    /// # Errors
    /// The claim that breaks a rule.
    pub(super) fn from_claims(claims: &Claims) -> Result<Self, AuthError> {
        user_flaw(&claims.sub)
            .map_or(Ok(()), |rule| Err(BadClaim::Wrong { claim: "sub", rule }))?;
        let allowed = claims
            .grants
            .iter()
            .enumerate()
            .map(|(index, grant)| {
                Allowed::new(grant, &claims.sub).map_err(|rule| AuthError::Pattern { index, rule })
            })
            .collect::<Result<_, _>>()?;
        let info = match &claims.info {
            None => None,
            Some(info) => Some(
                serde_json::value::to_raw_value(info).map_err(|_impossible| BadClaim::Wrong {
                    claim: "info",
                    rule: "must be an object",
                })?,
            ),
        };
        let deep = |info: &RawValue| json_flaw(info.get().as_bytes(), MAX_INFO_DEPTH).is_some();
        if info.as_deref().is_some_and(deep) {
            let rule = "must not be nested deeper than 64 levels";
            return Err(BadClaim::Wrong {
                claim: "info",
                rule,
            }
            .into());
        }
        Ok(Self {
            user: Arc::from(claims.sub.as_str()),
            exp: claims.exp,
            iat: claims.iat,
            jti: claims.jti.as_deref().map(Box::from),
            info: info.map(Arc::from),
            channels: claims.channels.as_slice().into(),
            channel: claims.channel.as_deref().map(Box::from),
            is_for_subscription: false,
            is_anonymous: false,
            allowed,
        })
    }
}

/// What is wrong with the name of a user, if anything is.
#[must_use]
pub fn user_flaw(user: &str) -> Option<&'static str> {
    match user {
        "" => Some("must not be empty"),
        user if user.len() > MAX_USER => Some("must be at most 256 bytes"),
        user if user.starts_with('$') => {
            Some("must not begin with `$`, which is reserved for the mesh")
        }
        _ => None,
    }
}

/// Checks tokens against the configured keys and rules. One instance for all shards, in an `Arc`.
pub struct Verifier {
    /// At most one per algorithm.
    keys: Vec<Key>,
    algorithms: String,
    issuer: String,
    audience: String,
    leeway_s: u64,
    cache: Cache,
    revocations: Arc<Revocations>,
    /// What every user may do.
    everybody: Vec<Grant>,
    /// Whether a token may be without an end.
    may_not_end: bool,
    /// For the tokens of a Centrifugo back end.
    centrifugal: Option<Box<Self>>,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier")
            .field("algorithms", &self.algorithms)
            .field("issuer", &self.issuer)
            .field("audience", &self.audience)
            .field("leeway_s", &self.leeway_s)
            .finish_non_exhaustive()
    }
}

/// The verifier can't be built from the configuration.
#[derive(Debug, thiserror::Error)]
pub enum AuthConfigError {
    /// The file of the public key can't be read.
    #[error("configuration: auth.public_key_file = {}: can't be read", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file contains no usable key.
    #[error("configuration: auth.public_key_file = {}: the key {reason}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong with the key.
        reason: &'static str,
    },
}

/// A token was refused. The messages are safe to show to its sender.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// The edge has neither `auth.hs256_secret` nor `auth.public_key_file`.
    #[error("no key is configured on this edge, so no token can be verified")]
    NoKey,
    /// Longer than [`MAX_TOKEN`].
    #[error("the token is longer than {MAX_TOKEN} bytes")]
    TooLong,
    /// Not a JWT in compact form.
    #[error("the token is malformed: {0}")]
    Malformed(&'static str),
    /// Not signed, or with an algorithm for which no key is configured.
    #[error("the token's algorithm is not accepted here, only {accepted}")]
    Algorithm {
        /// The names of accepted algorithms.
        accepted: String,
    },
    /// The signature was not made with the key, or the signed text was changed.
    #[error("the token's signature is wrong")]
    Signature,
    /// A claim is missing, or breaks a rule.
    #[error(transparent)]
    Claim(#[from] BadClaim),
    /// A pattern of the grants is malformed.
    #[error("the token's `grants[{index}].rooms` {rule}")]
    Pattern {
        /// Which of the grants.
        index: usize,
        /// What it must be.
        rule: BadPattern,
    },
    /// It has expired, even with the leeway.
    #[error("the token has expired (`exp` {exp})")]
    Expired {
        /// Its end, unix seconds.
        exp: u64,
    },
    /// It is not valid yet, even with the leeway.
    #[error("the token is not valid yet (`nbf` {nbf})")]
    NotYetValid {
        /// Its start, unix seconds.
        nbf: u64,
    },
    /// Issued in the future, even with the leeway: a revocation of the user's tokens could not cover it.
    #[error("the token was issued in the future (`iat` {iat}): check the issuer's clock")]
    IssuedInFuture {
        /// The time at which it was issued, according to the token, in unix seconds.
        iat: u64,
    },
    /// It was revoked, or its user is blocked.
    #[error("the token is revoked")]
    Revoked,
    /// Not from the configured issuer.
    #[error("the token's `iss` is not the issuer accepted here")]
    Issuer,
    /// Not for the configured audience.
    #[error("the token's `aud` does not name this service")]
    Audience,
}

impl AuthError {
    fn fault(&self) -> TokenFault {
        match self {
            Self::NoKey => TokenFault::NoKey,
            Self::TooLong | Self::Malformed(_) => TokenFault::Malformed,
            Self::Algorithm { .. } => TokenFault::Algorithm,
            Self::Signature => TokenFault::Signature,
            Self::Claim(_) | Self::Pattern { .. } => TokenFault::Claim,
            Self::Expired { .. } => TokenFault::Expired,
            Self::NotYetValid { .. } | Self::IssuedInFuture { .. } => TokenFault::NotYetValid,
            Self::Revoked => TokenFault::Revoked,
            Self::Issuer => TokenFault::Issuer,
            Self::Audience => TokenFault::Audience,
        }
    }
}

/// No token could be issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// No edge would accept these claims.
    #[error("the claims are not valid")]
    Claims(#[source] AuthError),
    /// The token would be longer than [`MAX_TOKEN`].
    #[error("the token would be {size} bytes, and at most {MAX_TOKEN} are accepted")]
    TooLong {
        /// Its length, in bytes.
        size: usize,
    },
    /// It can't be signed.
    #[error("the token can't be signed")]
    Sign(#[source] jsonwebtoken::errors::Error),
}

/// The result of a check, and how it was made.
type Checked = Result<(Arc<Identity>, TokenCheck), AuthError>;

/// Refuses the token of a subscription: it is for nothing else.
fn for_connections(checked: (Arc<Identity>, TokenCheck)) -> Checked {
    let rule = "names the room of a subscription: the token is not for a connection";
    let claim = "channel";
    match checked.0.is_for_subscription {
        true => Err(BadClaim::Wrong { claim, rule }.into()),
        false => Ok(checked),
    }
}

/// Counts the result of a check.
fn counted(result: Checked) -> Result<Arc<Identity>, AuthError> {
    match &result {
        Ok((_, check)) => count(Counter::TokenVerified(*check), 1),
        Err(error) => count(Counter::TokenRefused(error.fault()), 1),
    }
    result.map(|(identity, _)| identity)
}

/// The fields of a token's header that are used here.
#[derive(Deserialize)]
struct TokenHeader {
    alg: String,
    /// Extensions that must be understood (RFC 7515 section 4.1.11); natter supports none.
    crit: Option<Value>,
}

impl Verifier {
    /// The verifier of `[auth]`. Without any key it refuses every token, and a warning is logged.
    ///
    /// # Errors
    /// [`AuthConfigError`] if the public key can't be used.
    pub fn from_config(config: &config::Auth) -> Result<Self, AuthConfigError> {
        let mut keys = Vec::new();
        let secret = config.hs256_secret.expose();
        if !secret.is_empty() {
            keys.push(Key::hs256(secret));
        }
        let path = &config.public_key_file;
        if !path.as_os_str().is_empty() {
            let pem = fs::read(path).map_err(|source| AuthConfigError::File {
                path: path.clone(),
                source,
            })?;
            keys.push(Key::from_pem(&pem).map_err(|reason| AuthConfigError::Key {
                path: path.clone(),
                reason,
            })?);
        }
        if keys.is_empty() {
            tracing::warn!(
                "neither auth.hs256_secret nor auth.public_key_file is set: every token is refused"
            );
        }
        let algorithms: Vec<_> = keys.iter().map(Key::name).collect();
        Ok(Self {
            algorithms: algorithms.join(" and "),
            keys,
            issuer: config.issuer.clone(),
            audience: config.audience.clone(),
            leeway_s: config.leeway.as_secs(),
            cache: Cache::new(CACHE),
            revocations: Arc::new(Revocations::new(config.leeway)),
            everybody: Vec::new(),
            may_not_end: false,
            centrifugal: None,
        })
    }

    /// The verifier of an edge: of `[auth]`, with what `namespaces.<name>.everybody` gives to every user. In Centrifugo's
    /// protocol it also accepts tokens that are signed with `centrifugal.hs256_secret`.
    ///
    /// # Errors
    /// [`AuthConfigError`] if the public key can't be used.
    pub fn of_edge(config: &Config) -> Result<Self, AuthConfigError> {
        let namespaces = config.namespaces.iter();
        let open = namespaces.filter(|(_, namespace)| !namespace.everybody.is_empty());
        let grant = |(name, namespace): (&String, &config::Namespace)| Grant {
            rooms: format!("{name}:*"),
            can: namespace.everybody.clone(),
        };
        let mut verifier = Self::from_config(&config.auth)?;
        verifier.everybody = open.map(grant).collect();
        let secret = config.centrifugal.hs256_secret.expose();
        if !secret.is_empty() {
            let key = Key::hs256(secret);
            verifier.centrifugal = Some(Box::new(Self {
                algorithms: key.name().to_owned(),
                keys: vec![key],
                // Such tokens name neither.
                issuer: String::new(),
                audience: String::new(),
                leeway_s: verifier.leeway_s,
                cache: Cache::new(CACHE),
                revocations: Arc::clone(&verifier.revocations),
                everybody: verifier.everybody.clone(),
                may_not_end: true,
                centrifugal: None,
            }));
        }
        Ok(verifier)
    }

    /// The identity of the bearer of `token`. `now_s`: unix seconds.
    ///
    /// A token that was verified before costs only a hash, because it is remembered (with a bound). Its times are
    /// checked again.
    ///
    /// # Errors
    /// [`AuthError`], counted with its reason.
    pub fn verify(&self, token: &str, now_s: u64) -> Result<Arc<Identity>, AuthError> {
        counted(self.check_all(token, now_s).and_then(for_connections))
    }

    /// The identity of the bearer of `token` in Centrifugo's protocol. `now_s`: unix seconds.
    ///
    /// # Errors
    /// [`AuthError`], counted with its reason.
    pub fn verify_centrifugal(&self, token: &str, now_s: u64) -> Result<Arc<Identity>, AuthError> {
        let checked = self.check_centrifugal(token, now_s);
        counted(checked.and_then(for_connections))
    }

    /// The identity of the bearer of the token of a subscription: it must be for this user and channel. `now_s`: unix
    /// seconds.
    ///
    /// # Errors
    /// [`AuthError`], counted with its reason.
    pub fn verify_subscription(
        &self,
        token: &str,
        (user, channel): (&str, &str),
        now_s: u64,
    ) -> Result<Arc<Identity>, AuthError> {
        counted(self.check_centrifugal(token, now_s).and_then(|checked| {
            let identity = &checked.0;
            let wrong = |claim, rule| Err(BadClaim::Wrong { claim, rule }.into());
            match &identity.channel {
                _ if *identity.user != *user => wrong("sub", "is not the user of the connection"),
                Some(its) if **its == *channel => Ok(checked),
                Some(_) => wrong("channel", "is not the channel of the subscription"),
                None => Err(BadClaim::Missing("channel").into()),
            }
        }))
    }

    /// A user without a token, who may do what everybody may. `now_s`: unix seconds.
    ///
    /// # Errors
    /// [`AuthError`] if `name` is not a user.
    pub fn without_token(
        &self,
        name: &str,
        is_anonymous: bool,
        now_s: u64,
    ) -> Result<Arc<Identity>, AuthError> {
        let mut claims = Claims::new(name, LAST_SECOND);
        claims.grants.clone_from(&self.everybody);
        // A revocation of the user's tokens is for those that were before it; a block is for all.
        claims.iat = Some(now_s);
        let mut identity = Identity::from_claims(&claims)?;
        identity.is_anonymous = is_anonymous;
        match self.is_revoked(&identity, now_s) {
            true => Err(AuthError::Revoked),
            false => Ok(Arc::new(identity)),
        }
    }

    fn check_centrifugal(&self, token: &str, now_s: u64) -> Checked {
        match (self.check_all(token, now_s), &self.centrifugal) {
            (
                Err(AuthError::Signature | AuthError::NoKey | AuthError::Algorithm { .. }),
                Some(centrifugal),
            ) => centrifugal.check_all(token, now_s),
            (checked, _) => checked,
        }
    }

    /// Everything, revocations included.
    fn check_all(&self, token: &str, now_s: u64) -> Checked {
        self.check(token, now_s).and_then(|(identity, check)| {
            match self.is_revoked(&identity, now_s) {
                true => Err(AuthError::Revoked),
                false => Ok((identity, check)),
            }
        })
    }

    /// The revocations. Whoever learns of new ones adds them here.
    #[must_use]
    pub fn revocations(&self) -> &Arc<Revocations> {
        &self.revocations
    }

    /// Whether a verified token was revoked since, or its user blocked. `now_s`: unix seconds.
    #[must_use]
    pub fn is_revoked(&self, identity: &Identity, now_s: u64) -> bool {
        self.revocations.refuse(identity, now_s)
    }

    /// Until when `identity` is valid, in unix seconds: its `exp` and the configured leeway.
    #[must_use]
    pub fn deadline(&self, identity: &Identity) -> u64 {
        identity.exp.saturating_add(self.leeway_s)
    }

    fn check(&self, token: &str, now_s: u64) -> Checked {
        if self.keys.is_empty() {
            return Err(AuthError::NoKey);
        }
        if token.len() > MAX_TOKEN {
            return Err(AuthError::TooLong);
        }
        let digest = Cache::digest(token);
        if let Some(digest) = &digest
            && let Some(identity) = self.cache.get(digest)
        {
            if let Err(refused) = self.check_times(identity.exp, identity.iat, now_s) {
                self.cache.remove(digest);
                return Err(refused);
            }
            return Ok((identity, TokenCheck::Cached));
        }
        let mut claims = self.open(token)?;
        self.check_times(claims.exp, claims.iat, now_s)?;
        if let Some(nbf) = claims.nbf
            && nbf > now_s.saturating_add(self.leeway_s)
        {
            return Err(AuthError::NotYetValid { nbf });
        }
        if !self.issuer.is_empty() && claims.iss.as_ref() != Some(&self.issuer) {
            return Err(AuthError::Issuer);
        }
        if !self.audience.is_empty() && !claims.aud.contains(&self.audience) {
            return Err(AuthError::Audience);
        }
        let is_for_subscription = claims.channel.is_some() && claims.grants.is_empty();
        claims.grants.extend_from_slice(&self.everybody);
        let mut identity = Identity::from_claims(&claims)?;
        identity.is_for_subscription = is_for_subscription;
        let identity = Arc::new(identity);
        if let Some(digest) = digest {
            self.cache.insert(digest, Arc::clone(&identity));
        }
        Ok((identity, TokenCheck::Signature))
    }

    /// RFC 7519 section 4.1.4: refused "on or after" the end. And not issued in the future.
    fn check_times(&self, exp: u64, iat: Option<u64>, now_s: u64) -> Result<(), AuthError> {
        match iat {
            _ if now_s >= exp.saturating_add(self.leeway_s) => Err(AuthError::Expired { exp }),
            Some(iat) if iat > now_s.saturating_add(self.leeway_s) => {
                Err(AuthError::IssuedInFuture { iat })
            }
            _ => Ok(()),
        }
    }

    /// The claims of `token`, if its signature is right.
    fn open(&self, token: &str) -> Result<Claims, AuthError> {
        let not_a_jwt = AuthError::Malformed("it is not three parts with dots between them");
        let Some((message, signature)) = token.rsplit_once('.') else {
            return Err(not_a_jwt);
        };
        let Some((header, payload)) = message.split_once('.') else {
            return Err(not_a_jwt);
        };
        if payload.contains('.') {
            return Err(not_a_jwt);
        }
        let header = URL_SAFE_NO_PAD
            .decode(header)
            .map_err(|_detail| AuthError::Malformed("its header is not base64url"))?;
        let header: TokenHeader = serde_json::from_slice(&header).map_err(|_detail| {
            AuthError::Malformed("its header is not a JSON object with `alg`")
        })?;
        if header.crit.is_some() {
            return Err(AuthError::Malformed(
                "its header has `crit`, and no extension is understood here",
            ));
        }
        let Some(key) = self.keys.iter().find(|key| key.name() == header.alg) else {
            return Err(AuthError::Algorithm {
                accepted: self.algorithms.clone(),
            });
        };
        if !key.verifies(message, signature) {
            return Err(AuthError::Signature);
        }
        let payload = URL_SAFE_NO_PAD
            .decode(payload)
            .map_err(|_detail| AuthError::Malformed("its payload is not base64url"))?;
        let mut claims: Map<String, Value> = serde_json::from_slice(&payload)
            .map_err(|_detail| AuthError::Malformed("its payload is not a JSON object"))?;
        if self.may_not_end {
            // As in Centrifugo, where 0 means that nothing is said.
            let said = claims.get("exp").filter(|exp| !exp.is_null() && **exp != 0);
            if said.is_none() {
                claims.insert("exp".to_owned(), LAST_SECOND.into());
            }
        }
        Ok(Claims::try_from(claims)?)
    }
}

/// A token with `claims`, signed with HS256, for development and tests, in which natter itself is the issuer.
///
/// # Errors
/// [`IssueError`] if no edge would accept it, or if it can't be signed.
pub fn issue(claims: &Claims, secret: &str) -> Result<String, IssueError> {
    Identity::from_claims(claims).map_err(IssueError::Claims)?;
    let key = EncodingKey::from_secret(secret.as_bytes());
    let token = encode(&Header::new(Algorithm::HS256), claims, &key).map_err(IssueError::Sign)?;
    if token.len() > MAX_TOKEN {
        return Err(IssueError::TooLong { size: token.len() });
    }
    Ok(token)
}

#[cfg(test)]
mod tests;
