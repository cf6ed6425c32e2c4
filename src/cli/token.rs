//! `natter token`: makes a token for development.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::Args;
use figment::{
    Profile, Provider,
    providers::Serialized,
    value::{Dict, Map},
};

use crate::{
    auth::{Claims, Grant, Right, issue},
    config::{self, Config},
    runtime::unix_s,
};

/// File with the development secret, in the data folder of `natter up`.
pub(super) const DEV_SECRET_FILE: &str = "dev-secret";

/// Make a token for development, signed with the HS256 secret, and print it.
///
/// The secret is `--secret`, or `auth.hs256_secret` of the configuration, or that of a `natter up` with its data in
/// DIR.
#[derive(Debug, Args)]
pub(super) struct Token {
    /// The user (`sub`).
    #[arg(long)]
    user: String,
    /// Rooms of the token: ns:name, ns:* or *:*, where {sub} stands for the user; may be repeated.
    #[arg(long, value_name = "PATTERN", default_value = "*:*")]
    rooms: Vec<String>,
    /// Rights in those rooms: read, write, presence, history, moderate, erase, manage, follow, admin.
    #[arg(
        long,
        value_name = "RIGHTS",
        value_delimiter = ',',
        default_value = "read,write,presence,history",
        value_parser = right
    )]
    can: Vec<Right>,
    /// How long it is valid.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = humantime::parse_duration)]
    ttl: Duration,
    /// JSON object that others see in presence, e.g. '{"name":"Kim"}'.
    #[arg(long, value_name = "JSON", value_parser = info)]
    info: Option<Info>,
    /// The secret; other users of this machine can see it in the list of processes.
    #[arg(long)]
    secret: Option<String>,
    /// Data folder of a `natter up`.
    #[arg(long, value_name = "DIR", default_value = ".natter")]
    data: PathBuf,
}

type Info = serde_json::Map<String, serde_json::Value>;

fn right(name: &str) -> Result<Right, String> {
    let known = || Right::ALL.map(Right::as_str).join(", ");
    Right::parse(name).ok_or_else(|| format!("must be one of {}", known()))
}

fn info(text: &str) -> Result<Info, String> {
    serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))
}

/// The flags as a source of configuration.
struct Flags<'a>(Option<&'a str>);

impl Provider for Flags<'_> {
    fn metadata(&self) -> figment::Metadata {
        figment::Metadata::named("--secret")
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        match self.0 {
            None => Ok(Map::new()),
            // A configured file would override this value, so it is unset.
            Some(secret) => Serialized::defaults(serde_json::json!({
                "auth": {"hs256_secret": secret, "hs256_secret_file": ""}
            }))
            .data(),
        }
    }
}

impl Token {
    /// Makes the token for the configuration file `config`.
    pub(super) fn make(&self, config: Option<&Path>) -> anyhow::Result<String> {
        let config = Config::load(config, Flags(self.secret.as_deref()))?;
        let secret = secret(&config, &self.data)?;
        let grants = self
            .rooms
            .iter()
            .map(|rooms| Grant::new(rooms, &self.can))
            .collect();
        sign(
            &config.auth,
            &self.user,
            grants,
            self.ttl,
            self.info.clone(),
            &secret,
        )
    }
}

/// A token of `user`, signed with `secret`, for an edge with the configuration `auth`.
pub(super) fn sign(
    auth: &config::Auth,
    user: &str,
    grants: Vec<Grant>,
    ttl: Duration,
    info: Option<Info>,
    secret: &str,
) -> anyhow::Result<String> {
    let now = unix_s();
    let mut claims = Claims::new(user, now.saturating_add(ttl.as_secs()));
    claims.iat = Some(now);
    claims.info = info;
    claims.grants = grants;
    let set = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    claims.iss = set(&auth.issuer);
    claims.aud = set(&auth.audience).into_iter().collect();
    Ok(issue(&claims, secret)?)
}

/// The secret of the configuration, or else that of the `natter up` with its data in `data`.
pub(super) fn secret(config: &Config, data: &Path) -> anyhow::Result<String> {
    let configured = config.auth.hs256_secret.expose();
    if !configured.is_empty() {
        return Ok(configured.to_owned());
    }
    let path = data.join(DEV_SECRET_FILE);
    match fs::read_to_string(&path) {
        Ok(text) if !text.trim().is_empty() => Ok(text.trim().to_owned()),
        Ok(_empty) => bail!("{} is empty; start `natter up` again", path.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => bail!(
            "there is no secret to sign with: set NATTER__AUTH__HS256_SECRET (or auth.hs256_secret in a --config file), \
             or start `natter up` here, or name its data folder with --data ({} does not exist)",
            path.display()
        ),
        Err(error) => Err(error).with_context(|| format!("can't read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::{auth::Verifier, model::RoomId};

    const SECRET: &str = "0123456789abcdef0123456789abcdef";

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        token: Token,
    }

    fn parse(args: &[&str]) -> Result<Token, clap::Error> {
        Ok(Line::try_parse_from([&["token"], args].concat())?.token)
    }

    fn make(args: &[&str]) -> anyhow::Result<String> {
        parse(args)?.make(None)
    }

    fn verifier() -> Verifier {
        let config = Config::with_defaults(Flags(Some(SECRET))).unwrap();
        Verifier::from_config(&config.auth).unwrap()
    }

    fn may(token: &str, right: Right, room: &str) -> bool {
        let identity = verifier().verify(token, unix_s()).unwrap();
        assert_eq!(&*identity.user, "kim");
        identity.may(right, &RoomId::parse(room).unwrap())
    }

    #[test]
    fn the_defaults_allow_to_take_part_for_an_hour() {
        let token = make(&["--user", "kim", "--secret", SECRET]).unwrap();
        for right in Right::ALL {
            let by_default = matches!(
                right,
                Right::Read | Right::Write | Right::Presence | Right::History
            );
            assert_eq!(may(&token, right, "any:room"), by_default);
        }
        let identity = verifier().verify(&token, unix_s()).unwrap();
        assert!((3590..=3600).contains(&(identity.exp - unix_s())));
    }

    #[test]
    fn flags_say_what_is_allowed() {
        let token = make(&[
            "--user",
            "kim",
            "--rooms",
            "chat:*",
            "--rooms",
            "dm:{sub}",
            "--can",
            "read,moderate",
            "--ttl",
            "90s",
            "--info",
            r#"{"name":"킴"}"#,
            "--secret",
            SECRET,
        ])
        .unwrap();
        assert!(may(&token, Right::Read, "chat:x") && may(&token, Right::Moderate, "dm:kim"));
        assert!(!may(&token, Right::Write, "chat:x") && !may(&token, Right::Read, "dm:lee"));
        let identity = verifier().verify(&token, unix_s()).unwrap();
        assert_eq!(identity.info.as_ref().unwrap().get(), r#"{"name":"킴"}"#);
    }

    #[test]
    fn the_secret_of_a_running_up_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().to_str().unwrap();
        let error = make(&["--user", "kim", "--data", data])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("NATTER__AUTH__HS256_SECRET") && error.contains(data),
            "{error}"
        );
        fs::write(folder.path().join(DEV_SECRET_FILE), format!("{SECRET}\n")).unwrap();
        let token = make(&["--user", "kim", "--data", data]).unwrap();
        assert!(may(&token, Right::Read, "chat:x"));
    }

    #[test]
    fn wrong_flags_are_named() {
        for (args, named) in [
            (&["--secret", SECRET][..], "--user"),
            (
                &["--user", "kim", "--can", "read,fly", "--secret", SECRET],
                "fly",
            ),
            (
                &["--user", "kim", "--ttl", "soon", "--secret", SECRET],
                "--ttl",
            ),
            (
                &["--user", "kim", "--info", "[1]", "--secret", SECRET],
                "--info",
            ),
            (&["--user", "$mesh", "--secret", SECRET], "sub"),
            (
                &["--user", "kim", "--rooms", "chat", "--secret", SECRET],
                "rooms",
            ),
            (&["--user", "kim", "--secret", "short"], "auth.hs256_secret"),
        ] {
            let error = format!("{:#}", make(args).unwrap_err());
            assert!(error.contains(named), "{named}: {error}");
        }
    }
}
