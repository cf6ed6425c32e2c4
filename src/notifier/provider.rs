//! The services that deliver notifications, behind one interface: [`Providers::send`].

use std::{io, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Request, StatusCode, Uri, header, http::request::Builder};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::{sync::Mutex, time::Instant};

use super::webpush::{MAX_MESSAGE, Vapid, encrypt};
use crate::{
    auth::Signer,
    config,
    model::RoomId,
    outbound::{Answer, Client, Fault, Limits, Outcome, Receiver},
    people::{Device, Subscription},
    runtime::unix_s,
    telemetry::metrics::PushService,
};

/// Most bytes of an answer.
const ANSWER_BYTES: usize = 16 * 1024;

/// How long a service keeps a notification for a device that is off.
const KEPT_S: u64 = 24 * 3600;

/// How long a token for APNs is used: Apple wants a new one after 20 to 60 minutes.
const APNS_TOKEN: Duration = Duration::from_secs(40 * 60);

/// How long before its end a token for FCM is renewed.
const FCM_EARLIER: Duration = Duration::from_secs(60);

/// What FCM tokens are for.
const FCM_SCOPE: &str = "https://www.googleapis.com/auth/firebase.messaging";

/// A notification.
#[derive(Debug, Clone)]
pub(super) struct Note {
    pub user: String,
    pub room: RoomId,
    /// The message, `<user>/<id>`; `None`: there is nothing new, only the badge has changed.
    pub message: Option<String>,
    pub title: Option<String>,
    pub text: Option<String>,
    /// All unread messages of the user.
    pub badge: Option<u64>,
    /// When the message was said, in ms since 1970.
    pub at: u64,
}

/// What became of a notification.
#[derive(Debug)]
pub(super) enum Sent {
    /// The service has accepted it.
    Done,
    /// The device does not exist any more.
    Gone,
    /// The service did not take it, and may later.
    Again {
        after: Option<Duration>,
        why: String,
    },
    /// The service refuses it, or it is not known whether the service has taken it.
    Failed(String),
    /// No service of the configuration is for this device, or it can't do this.
    Unable,
}

/// The services of the configuration.
#[derive(Debug)]
pub(super) struct Providers {
    client: Client,
    web: Option<Vapid>,
    fcm: Option<Fcm>,
    apns: Option<Apns>,
    webhook: Option<Receiver>,
}

/// A token that is used until a time.
type Cached = Mutex<Option<(String, Instant)>>;

#[derive(Debug)]
struct Fcm {
    signer: Signer,
    account: Account,
    url: String,
    token: Cached,
}

/// What is used of the JSON of a service account.
#[derive(Debug, Deserialize)]
struct Account {
    project_id: String,
    client_email: String,
    #[serde(default)]
    private_key_id: Option<String>,
    token_uri: String,
}

#[derive(Deserialize)]
struct AccountKey {
    private_key: String,
}

#[derive(Deserialize)]
struct Granted {
    access_token: String,
    expires_in: u64,
}

#[derive(Debug)]
struct Apns {
    signer: Signer,
    team: String,
    url: String,
    token: Cached,
}

/// The service of a device.
pub(super) fn service_of(device: &Device) -> PushService {
    match device {
        Device::Webpush { .. } => PushService::Webpush,
        Device::Fcm { .. } => PushService::Fcm,
        Device::Apns { .. } => PushService::Apns,
        Device::Webhook { .. } => PushService::Webhook,
    }
}

/// Names a room in a few characters: notifications with the same name replace each other.
fn collapse_key(room: &RoomId) -> String {
    let digest = Sha256::digest(room.as_str());
    digest
        .iter()
        .take(16)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// What an answer means, if it means nothing special for this service.
fn judged(answer: Result<Answer, Fault>, is_gone: impl Fn(&Answer) -> bool) -> Sent {
    let answer = match answer {
        Ok(answer) => answer,
        Err(fault @ Fault::Unconnected(_)) => {
            return Sent::Again {
                after: None,
                why: fault.to_string(),
            };
        }
        Err(fault) => return Sent::Failed(fault.to_string()),
    };
    let status = answer.status;
    let why = format!("the answer is {status}");
    match status {
        _ if status.is_success() => Sent::Done,
        _ if is_gone(&answer) => Sent::Gone,
        StatusCode::TOO_MANY_REQUESTS => Sent::Again {
            after: answer.after,
            why,
        },
        // Another 5xx may be that of a proxy, behind which the service has taken it.
        StatusCode::SERVICE_UNAVAILABLE => Sent::Again {
            after: answer.after,
            why,
        },
        _ => Sent::Failed(why),
    }
}

fn post(uri: &str) -> Builder {
    let agent = concat!("natter/", env!("CARGO_PKG_VERSION"));
    Request::builder()
        .method(Method::POST)
        .uri(uri)
        .header(header::USER_AGENT, agent)
}

impl Note {
    /// The message, unless nothing of it may be told: the reference names its sender.
    fn shown_message(&self) -> Option<String> {
        let has_content = self.title.is_some() || self.text.is_some();
        self.message.clone().filter(|_| has_content)
    }

    /// The JSON for browsers and the operator's own service.
    pub(super) fn body(&self) -> Value {
        json!({
            "room": self.room,
            "message": self.message,
            "title": self.title,
            "text": self.text,
            "badge": self.badge,
            "at": self.at,
        })
    }

    /// The JSON, shortened so that it fits into a message for a browser.
    fn short_body(&self) -> Vec<u8> {
        let mut note = self.clone();
        loop {
            let body = note.body().to_string().into_bytes();
            let Some(over) = body.len().checked_sub(MAX_MESSAGE).filter(|over| *over > 0) else {
                return body;
            };
            let longer = match (&mut note.text, &mut note.title) {
                (Some(text), Some(title)) if title.len() > text.len() => title,
                (Some(text), _) => text,
                (None, Some(title)) => title,
                (None, None) => return body,
            };
            // An escaped character takes up to six bytes.
            let keep = longer.len().saturating_sub(over.div_ceil(6));
            let end = (0..=keep).rev().find(|at| longer.is_char_boundary(*at));
            longer.truncate(end.unwrap_or(0));
            if longer.is_empty() {
                note.text = None;
                note.title = note.title.filter(|title| !title.is_empty());
            }
        }
    }
}

impl Providers {
    /// The services of the configuration, as far as there are some.
    ///
    /// # Errors
    /// Which key can't be used.
    pub(super) fn new(config: &config::Push) -> Result<Self, String> {
        let limits = Limits {
            allow: config.allow.clone(),
            timeout: config.timeout,
            answer_bytes: ANSWER_BYTES,
        };
        let io = |error: io::Error| format!("requests can't be sent: {error}");
        let client = Client::new(limits.clone()).map_err(io)?;
        let text = |secret: &config::Secret| {
            Some(secret.expose().to_owned()).filter(|text| !text.is_empty())
        };
        let web = text(&config.vapid_private_key);
        let web = web
            .map(|key| Vapid::new(&key, &config.subject))
            .transpose()?;
        if let Some(vapid) = &web
            && vapid.public != config.vapid_public_key
        {
            return Err(format!(
                "push.vapid_public_key is not the one of the private key, which is {}",
                vapid.public
            ));
        }
        let fcm = text(&config.fcm_service_account);
        let fcm = fcm
            .map(|account| Fcm::new(&account, &config.fcm_url))
            .transpose()?;
        let apns = text(&config.apns_key).map(|key| {
            let signer = Signer::es256(&key, Some(&config.apns_key_id));
            let signer = signer.map_err(|error| format!("push.apns_key: {error}"))?;
            Ok::<_, String>(Apns {
                signer,
                team: config.apns_team_id.clone(),
                url: config.apns_url.trim_end_matches('/').to_owned(),
                token: Cached::default(),
            })
        });
        let webhook = match &*config.webhook_url {
            "" => None,
            url => Some(Receiver::new(url, &config.webhook_secret, limits).map_err(io)?),
        };
        Ok(Self {
            client,
            web,
            fcm,
            apns: apns.transpose()?,
            webhook,
        })
    }

    /// Sends a notification to a device. `id` is the same for each attempt.
    pub(super) async fn send(&self, device: &Device, name: &str, note: &Note, id: &str) -> Sent {
        match device {
            Device::Webpush { subscription } => match &self.web {
                Some(vapid) => self.to_browser(vapid, subscription, note).await,
                None => Sent::Unable,
            },
            Device::Fcm { token } => match &self.fcm {
                Some(fcm) => fcm.send(&self.client, token, note).await,
                None => Sent::Unable,
            },
            Device::Apns { token, topic } => match &self.apns {
                Some(apns) => apns.send(&self.client, (token, topic), note).await,
                None => Sent::Unable,
            },
            Device::Webhook { token } => match &self.webhook {
                Some(receiver) => {
                    let mut body = note.body();
                    body["user"] = json!(note.user);
                    body["device"] = json!(name);
                    body["token"] = json!(token);
                    let body = body.to_string().into_bytes();
                    match receiver.post(id, Bytes::from(body)).await {
                        Outcome::Done { .. } => Sent::Done,
                        Outcome::GiveUp(Fault::Status(StatusCode::GONE)) => Sent::Gone,
                        Outcome::GiveUp(fault) => Sent::Failed(fault.to_string()),
                        // It recognises a repeated one by its id.
                        Outcome::Retry { fault, after } => Sent::Again {
                            after,
                            why: fault.to_string(),
                        },
                    }
                }
                None => Sent::Unable,
            },
        }
    }

    async fn to_browser(&self, vapid: &Vapid, subscription: &Subscription, note: &Note) -> Sent {
        if note.message.is_none() {
            // A browser must show something for each.
            return Sent::Unable;
        }
        let body = match encrypt(subscription, &note.short_body()) {
            Ok(body) => body,
            Err(error) => return Sent::Failed(error.to_string()),
        };
        let request = || {
            let endpoint: Uri = subscription.endpoint.parse().ok()?;
            let authorization = vapid.authorization(&endpoint, unix_s()).ok()?;
            post(&subscription.endpoint)
                .header(header::AUTHORIZATION, authorization)
                .header(header::CONTENT_ENCODING, "aes128gcm")
                .header(header::CONTENT_TYPE, "application/octet-stream")
                .header("TTL", KEPT_S)
                .header("Urgency", "high")
                // At most 32 characters of base64url.
                .header("Topic", collapse_key(&note.room))
                .body(Full::new(Bytes::from(body)))
                .ok()
        };
        let Some(request) = request() else {
            return Sent::Failed("the endpoint is no URL".to_owned());
        };
        let is_gone =
            |answer: &Answer| matches!(answer.status, StatusCode::NOT_FOUND | StatusCode::GONE);
        judged(self.client.ask(request).await, is_gone)
    }
}

impl Fcm {
    fn new(json: &str, url: &str) -> Result<Self, String> {
        let fault = |what: &str| format!("push.fcm_service_account: {what}");
        let bad = |_quotes_it| fault("not the JSON of a service account");
        let account: Account = serde_json::from_str(json).map_err(bad)?;
        let AccountKey { private_key } = serde_json::from_str(json).map_err(bad)?;
        let signer = Signer::rs256(&private_key, account.private_key_id.as_deref());
        Ok(Self {
            signer: signer.map_err(|error| fault(&error.to_string()))?,
            account,
            url: url.trim_end_matches('/').to_owned(),
            token: Cached::default(),
        })
    }

    /// A token for the service: the last one, or a new one. All wait for one that is asked for.
    async fn token(&self, client: &Client) -> Result<String, Sent> {
        let mut cached = self.token.lock().await;
        let now = Instant::now();
        if let Some((token, until)) = &*cached
            && now < *until
        {
            return Ok(token.clone());
        }
        let (account, at) = (&self.account, unix_s());
        let claims = json!({
            "iss": account.client_email,
            "scope": FCM_SCOPE,
            "aud": account.token_uri,
            "iat": at,
            "exp": at + 3600,
        });
        let failed = |why: String| Sent::Failed(format!("no token for FCM: {why}"));
        let assertion = self
            .signer
            .sign(&claims)
            .map_err(|error| failed(error.to_string()))?;
        let form = format!(
            "grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer&assertion={assertion}"
        );
        let request = post(&account.token_uri)
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(Full::new(Bytes::from(form)))
            .map_err(|error| failed(error.to_string()))?;
        let answer = client.ask(request).await;
        // Nothing was notified yet: another attempt is safe.
        let again = |why: String, after| Sent::Again {
            after,
            why: format!("no token for FCM: {why}"),
        };
        let answer = answer.map_err(|fault| again(fault.to_string(), None))?;
        if !answer.status.is_success() {
            let why = format!("the answer is {}", answer.status);
            return Err(match answer.status.is_client_error() {
                true => failed(why),
                false => again(why, answer.after),
            });
        }
        let granted: Granted = serde_json::from_slice(&answer.body)
            .map_err(|_quotes_it| failed("the answer has no access_token".to_owned()))?;
        let lasts = Duration::from_secs(granted.expires_in).saturating_sub(FCM_EARLIER);
        *cached = Some((
            granted.access_token.clone(),
            now + lasts.min(Duration::from_secs(86_400)),
        ));
        Ok(granted.access_token)
    }

    async fn send(&self, client: &Client, device: &str, note: &Note) -> Sent {
        let token = match self.token(client).await {
            Ok(token) => token,
            Err(sent) => return sent,
        };
        let key = collapse_key(&note.room);
        let text = |value: Option<String>| value.unwrap_or_default();
        let mut message = json!({
            "token": device,
            "data": {
                "room": note.room,
                "message": text(note.shown_message()),
                "badge": text(note.badge.map(|badge| badge.to_string())),
            },
            "android": { "collapse_key": key, "ttl": format!("{KEPT_S}s"), "priority": "high" },
            "apns": { "headers": { "apns-collapse-id": key } },
        });
        if note.message.is_some() {
            message["notification"] = match (&note.title, &note.text) {
                (None, None) => json!({ "body": "There is a new message." }),
                (title, text) => json!({ "title": title, "body": text }),
            };
            message["android"]["notification"] = json!({ "tag": key });
        } else {
            message["android"]["priority"] = json!("normal");
        }
        if let Some(badge) = note.badge {
            message["apns"]["payload"] = json!({ "aps": { "badge": badge } });
        }
        let url = format!(
            "{}/v1/projects/{}/messages:send",
            self.url, self.account.project_id
        );
        let request = post(&url)
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(
                json!({ "message": message }).to_string(),
            )));
        let request = match request {
            Ok(request) => request,
            Err(error) => return Sent::Failed(error.to_string()),
        };
        let answer = client.ask(request).await;
        if let Ok(answer) = &answer
            && answer.status == StatusCode::UNAUTHORIZED
        {
            self.token
                .lock()
                .await
                .take_if(|(known, _)| *known == token);
            return Sent::Again {
                after: None,
                why: "the token for FCM is refused".to_owned(),
            };
        }
        // A 404 without it means that the project is not known.
        judged(answer, |answer| {
            let text = String::from_utf8_lossy(&answer.body);
            answer.status == StatusCode::NOT_FOUND && text.contains("UNREGISTERED")
        })
    }
}

impl Apns {
    async fn token(&self) -> Result<String, Sent> {
        let mut cached = self.token.lock().await;
        let now = Instant::now();
        if let Some((token, until)) = &*cached
            && now < *until
        {
            return Ok(token.clone());
        }
        let claims = json!({ "iss": self.team, "iat": unix_s() });
        let token = self.signer.sign(&claims);
        let token = token.map_err(|error| Sent::Failed(format!("no token for APNs: {error}")))?;
        *cached = Some((token.clone(), now + APNS_TOKEN));
        Ok(token)
    }

    async fn send(&self, client: &Client, (device, topic): (&str, &str), note: &Note) -> Sent {
        let token = match self.token().await {
            Ok(token) => token,
            Err(sent) => return sent,
        };
        let mut aps = json!({ "thread-id": collapse_key(&note.room) });
        if let Some(badge) = note.badge {
            aps["badge"] = json!(badge);
        }
        let (kind, priority) = match &note.message {
            Some(_) => {
                aps["alert"] = match (&note.title, &note.text) {
                    // Without content, the app says what it likes.
                    (None, None) => json!({ "loc-key": "natter.message" }),
                    (title, text) => json!({ "title": title, "body": text }),
                };
                aps["sound"] = json!("default");
                aps["mutable-content"] = json!(1);
                ("alert", "10")
            }
            None => {
                aps["content-available"] = json!(1);
                ("background", "5")
            }
        };
        let body = json!({ "aps": aps, "room": note.room, "message": note.shown_message() });
        let request = post(&format!("{}/3/device/{device}", self.url))
            .header(header::AUTHORIZATION, format!("bearer {token}"))
            .header("apns-topic", topic)
            .header("apns-push-type", kind)
            .header("apns-priority", priority)
            .header("apns-collapse-id", collapse_key(&note.room))
            .header("apns-expiration", unix_s() + KEPT_S)
            .body(Full::new(Bytes::from(body.to_string())));
        let request = match request {
            Ok(request) => request,
            Err(error) => return Sent::Failed(error.to_string()),
        };
        let answer = client.ask(request).await;
        if let Ok(answer) = &answer
            && answer.status == StatusCode::FORBIDDEN
            && String::from_utf8_lossy(&answer.body).contains("ExpiredProviderToken")
        {
            self.token
                .lock()
                .await
                .take_if(|(known, _)| *known == token);
            return Sent::Again {
                after: None,
                why: "the token for APNs has expired".to_owned(),
            };
        }
        judged(answer, |answer| {
            let text = String::from_utf8_lossy(&answer.body);
            answer.status == StatusCode::GONE
                || answer.status == StatusCode::BAD_REQUEST && text.contains("BadDeviceToken")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(text: String) -> Note {
        Note {
            user: "kim".to_owned(),
            room: RoomId::parse("chat:a").unwrap(),
            message: Some("lee/1".to_owned()),
            title: Some("lee in a".to_owned()),
            text: Some(text),
            badge: Some(3),
            at: 5,
        }
    }

    #[test]
    fn a_long_text_is_shortened_until_it_fits() {
        let short = note("hi".to_owned());
        assert_eq!(short.short_body(), short.body().to_string().into_bytes());
        for text in ["한".repeat(5000), "\"".repeat(5000), "a".repeat(5000)] {
            let body = note(text.clone()).short_body();
            assert!(body.len() <= MAX_MESSAGE);
            let shown: Value = serde_json::from_slice(&body).unwrap();
            let shown = shown["text"].as_str().unwrap();
            assert!(
                text.starts_with(shown) && !shown.is_empty(),
                "{}",
                shown.len()
            );
        }
    }

    #[test]
    fn only_what_was_certainly_not_taken_is_repeated() {
        let answer = |status: u16| {
            Ok(Answer {
                status: StatusCode::from_u16(status).unwrap(),
                after: None,
                body: Bytes::new(),
            })
        };
        let gone = |answer: &Answer| answer.status == StatusCode::GONE;
        for (answer, expected) in [
            (answer(201), "Done"),
            (answer(410), "Gone"),
            (answer(400), "Failed"),
            (answer(429), "Again"),
            (answer(503), "Again"),
            (answer(500), "Failed"),
            (answer(502), "Failed"),
            (answer(504), "Failed"),
            (Err(Fault::Unconnected("refused".to_owned())), "Again"),
            (Err(Fault::Timeout(Duration::ZERO)), "Failed"),
            (Err(Fault::Unreachable("reset".to_owned())), "Failed"),
        ] {
            let sent = format!("{:?}", judged(answer, gone));
            assert!(sent.starts_with(expected), "{sent} is not {expected}");
        }
    }
}
