//! The devices of a user that are notified while the user is away, over HTTP.

use axum::{
    Json,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderMap, StatusCode},
};
use serde::{Deserialize, Serialize};
use tracing::Instrument as _;
use utoipa::ToSchema;

use super::rooms::fields_of;
use crate::{
    config::Quiet,
    edge::request::{Api, ErrorBody, HttpError, authorize, command_span},
    people::Device,
    protocol::ErrorCode,
};

/// The user's devices.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DevicesReply {
    devices: Vec<DeviceBody>,
    /// When the user is not disturbed; absent: the user has said nothing, and the configuration's hours count.
    #[serde(skip_serializing_if = "Option::is_none")]
    quiet: Option<String>,
    /// The key with which a browser subscribes (`applicationServerKey`), in base64url; absent: there is no Web Push.
    #[serde(skip_serializing_if = "Option::is_none")]
    vapid_public_key: Option<String>,
}

/// A device, without its address.
#[derive(Debug, Serialize, ToSchema)]
struct DeviceBody {
    device: String,
    kind: &'static str,
}

/// What a user wants of all devices.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DevicesRequest {
    /// Hours of the day in which the user is not disturbed, with the offset of the user's clock from UTC; empty: none.
    #[schema(example = "22:00-07:00 +09:00")]
    quiet: String,
}

/// The devices that are notified while the user is away, and the key for new browsers.
#[utoipa::path(
    get,
    path = "/v1/devices",
    responses(
        (status = 200, body = DevicesReply),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn devices(
    State(api): State<Api>,
    headers: HeaderMap,
) -> Result<Json<DevicesReply>, HttpError> {
    let ask = async {
        let identity = authorize(&api, &headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let user = identity.user.to_string();
        let mut found = ready.people.devices_of(std::slice::from_ref(&user)).await?;
        let known = found.remove(&user).unwrap_or_default();
        let devices = known.all().map(|(name, device)| DeviceBody {
            device: name.to_owned(),
            kind: device.kind(),
        });
        let key = &api.shared.config.push.vapid_public_key;
        Ok(Json(DevicesReply {
            devices: devices.collect(),
            quiet: known
                .quiet()
                .map(|quiet| quiet.map_or_else(String::new, |its| its.to_string())),
            vapid_public_key: Some(key.clone()).filter(|key| !key.is_empty()),
        }))
    };
    ask.instrument(command_span("devices", &headers)).await
}

/// Set the user's quiet hours.
#[utoipa::path(
    patch,
    path = "/v1/devices",
    request_body = DevicesRequest,
    responses(
        (status = 204, description = "Done"),
        (status = 400, body = ErrorBody, description = "bad_json, bad_request"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 413, body = ErrorBody, description = "too_large"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn quiet(
    State(api): State<Api>,
    request: Request,
) -> Result<StatusCode, HttpError> {
    let span = command_span("devices", request.headers());
    let ask = async {
        let identity = authorize(&api, request.headers())?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let DevicesRequest { quiet } = fields_of(&api, request).await?;
        let quiet = match &*quiet {
            "" => None,
            _ => {
                let bad = |text| HttpError::new(ErrorCode::BadRequest, format!("quiet: {text}"));
                Some(Quiet::try_from(quiet).map_err(bad)?)
            }
        };
        ready.people.set_quiet(&identity.user, quiet).await?;
        Ok(StatusCode::NO_CONTENT)
    };
    ask.instrument(span).await
}

/// The name of a device in the path.
fn name_of(path: Result<Path<String>, PathRejection>) -> Result<String, HttpError> {
    let bad = |error: PathRejection| HttpError::new(ErrorCode::BadRequest, error.body_text());
    path.map(|Path(name)| name).map_err(bad)
}

/// Register a device, or give one another address.
#[utoipa::path(
    put,
    path = "/v1/devices/{device}",
    params(("device" = String, Path, description = "a name of the client's choice, [A-Za-z0-9_-]{1,64}")),
    request_body = Device,
    responses(
        (status = 204, description = "Done"),
        (status = 400, body = ErrorBody, description = "bad_json, bad_request"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 413, body = ErrorBody, description = "too_large"),
        (status = 429, body = ErrorBody, description = "limit: too many devices; rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn put(
    State(api): State<Api>,
    device: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<StatusCode, HttpError> {
    let span = command_span("devices", request.headers());
    let ask = async {
        let identity = authorize(&api, request.headers())?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let name = name_of(device)?;
        let device: Device = fields_of(&api, request).await?;
        let people = &ready.people;
        people
            .put_device(&identity.user, &name, Some(&device), None)
            .await?;
        Ok(StatusCode::NO_CONTENT)
    };
    ask.instrument(span).await
}

/// Remove a device.
#[utoipa::path(
    delete,
    path = "/v1/devices/{device}",
    params(("device" = String, Path, description = "its name")),
    responses(
        (status = 204, description = "Done, or there was none"),
        (status = 400, body = ErrorBody, description = "bad_request"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable"),
    ),
    security(("token" = []))
)]
pub(super) async fn remove(
    State(api): State<Api>,
    device: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<StatusCode, HttpError> {
    let ask = async {
        let identity = authorize(&api, &headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let name = name_of(device)?;
        ready
            .people
            .put_device(&identity.user, &name, None, None)
            .await?;
        Ok(StatusCode::NO_CONTENT)
    };
    ask.instrument(command_span("devices", &headers)).await
}
