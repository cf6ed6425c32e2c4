//! Uploads over HTTP: getting one granted, downloading, and the files of the local storage.
//!
//! A file goes between the client and the storage. Only the local storage has its files go through the edge, at URLs of
//! their own: streamed, with at most a piece of each in memory.

use std::{collections::BTreeMap, io, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::{
        Path, Query, Request, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt as _, stream};
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};
use tracing::Instrument as _;
use utoipa::{IntoParams, ToSchema};

use crate::{
    auth::Right,
    edge::{
        Shared, Uploads,
        request::{
            Api, ENVELOPE_BYTES, ErrorBody, HttpError, authorize, command_span, json_of, read_body,
            room_and_name, room_of,
        },
    },
    http1::LAST_STEP,
    protocol::ErrorCode,
    runtime::{Phase, unix_ms},
    session::answers,
    store::Upload,
    telemetry::metrics::{Counter, UploadEnd, count},
    uploads::{BadFile, File, Local, LocalError, Permit, Receiving, Storage, UploadId},
};

/// Bytes per second, below which an upload to the local storage takes too long.
const SLOWEST: u64 = 8 * 1024;

/// What is to be uploaded.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "documents what `File` reads")]
pub(super) struct UploadRequest {
    /// The name of the file, 1 to 255 bytes. Downloads get it.
    #[schema(example = "cat.png")]
    name: String,
    /// The media type of the file.
    #[schema(example = "image/png")]
    r#type: String,
    /// The exact number of bytes.
    #[schema(example = 12345)]
    size: u64,
}

/// An upload that was granted.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UploadReply {
    /// The id, for the `attachments` of a message.
    upload: String,
    /// How to upload the file.
    put: PutReply,
}

/// How to upload a file.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PutReply {
    /// The URL for a `PUT`, relative to the URL of this request if it begins with `/`. It needs no token.
    url: String,
    /// The headers that the `PUT` must have.
    headers: BTreeMap<&'static str, String>,
    /// The time until which the upload must begin, in ms since 1970.
    expires: u64,
}

/// Where a file can be downloaded.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DownloadReply {
    /// The URL, relative to the URL of this request if it begins with `/`. It needs no token.
    url: String,
    /// The time until which the URL is valid, in ms since 1970.
    expires: u64,
}

/// How a download is answered.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct DownloadQuery {
    /// `false`: the URL is the answer, for pages, which can't see where a redirect leads. By default `true`.
    redirect: Option<bool>,
}

/// The signature of a URL.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct PermitQuery {
    /// What the URL allows, and its signature.
    permit: String,
}

fn bad(text: String) -> HttpError {
    HttpError::new(ErrorCode::BadRequest, text)
}

fn not_there() -> HttpError {
    let text = "there is no such file: it was not uploaded, or it was removed";
    HttpError::with_status(StatusCode::NOT_FOUND, ErrorCode::BadId, text)
}

impl Shared {
    /// Routes of uploads exist only where there are uploads.
    fn uploads(&self) -> Result<&Uploads, HttpError> {
        self.uploads.as_ref().ok_or_else(not_there)
    }

    fn local(&self) -> Result<&Local, HttpError> {
        match &self.uploads()?.storage {
            Storage::Local(local) => Ok(local),
            Storage::S3(_) => Err(not_there()),
        }
    }
}

/// Get an upload granted.
///
/// The answer says where to `PUT` the file. Afterwards a message in the room names the upload:
/// `{"attachments": [{"upload": "…", "name": "…", "type": "…", "size": …}]}`. An upload that no message names is removed.
#[utoipa::path(
    post,
    path = "/v1/rooms/{room}/uploads",
    params(("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby")),
    request_body = UploadRequest,
    responses(
        (status = 201, body = UploadReply, description = "Granted"),
        (status = 400, body = ErrorBody, description = "bad_json, bad_room, bad_request (also: a type that is not allowed; a room without history)"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace; bad_request where there are no uploads"),
        (status = 408, body = ErrorBody, description = "timeout: the body did not arrive in time"),
        (status = 413, body = ErrorBody, description = "too_large: the file, or the request"),
        (status = 429, body = ErrorBody, description = "limit: too many bytes within a day; rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable: the history service or MongoDB is away"),
    ),
    security(("token" = []))
)]
pub(super) async fn grant(
    State(api): State<Api>,
    room: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<(StatusCode, Json<UploadReply>), HttpError> {
    let span = command_span("upload", request.headers());
    let grant = async {
        let (parts, body) = request.into_parts();
        let identity = authorize(&api, &parts.headers)?;
        let (shared, config) = (&api.shared, &api.shared.config);
        let ready = shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let uploads = shared.uploads()?;
        let room = room_of(room)?;
        answers::may_upload(&ready.people, &identity, &room).await?;
        let body = read_body(shared, body, ENVELOPE_BYTES).await?;
        let file: File = json_of(&body)?;
        file.check(&config.uploads).map_err(|flaw| match flaw {
            BadFile::TooLarge { .. } => HttpError::new(ErrorCode::TooLarge, flaw.to_string()),
            flaw => bad(flaw.to_string()),
        })?;
        let id = uploads.signer.make(&room, &identity.user);
        let upload = Upload {
            id: id.to_string(),
            room,
            user: identity.user.to_string(),
            name: file.name.clone(),
            media_type: file.media_type.clone(),
            size: file.size,
        };
        ready.history.grant_upload(&upload).await?;
        let put = uploads.storage.put(&id, &file);
        let reply = UploadReply {
            upload: upload.id,
            put: PutReply {
                url: put.url,
                headers: put.headers,
                expires: put.expires,
            },
        };
        Ok((StatusCode::CREATED, Json(reply)))
    };
    grant.instrument(span).await
}

/// Download the file of an upload.
///
/// The answer leads to the storage, with a URL that needs no token and is valid for a short time. The storage answers 404
/// when the file was not uploaded, or was removed. Where files are checked (`uploads.scan`), only a file that was found
/// clean is given out, and the history service is asked.
#[utoipa::path(
    get,
    path = "/v1/rooms/{room}/uploads/{upload}",
    params(
        ("room" = String, Path, description = "namespace:name, e.g. chat:lobby or chat%3Alobby"),
        ("upload" = String, Path, description = "The id of the upload"),
        DownloadQuery,
    ),
    responses(
        (status = 200, body = DownloadReply, description = "With redirect=false"),
        (status = 302, description = "The URL is in Location"),
        (status = 400, body = ErrorBody, description = "bad_room, bad_request"),
        (status = 401, body = ErrorBody, description = "unauthorized"),
        (status = 403, body = ErrorBody, description = "forbidden"),
        (status = 404, body = ErrorBody, description = "unknown_namespace; bad_id: it is not an upload of the room; bad_request where there are no uploads"),
        (status = 409, body = ErrorBody, description = "pending: the file is not checked yet; with Retry-After"),
        (status = 410, body = ErrorBody, description = "infected: the file was checked, and is held back for good"),
        (status = 429, body = ErrorBody, description = "rate_limited, with Retry-After"),
        (status = 503, body = ErrorBody, description = "unavailable: whether the file was checked is not known now"),
    ),
    security(("token" = []))
)]
pub(super) async fn download(
    State(api): State<Api>,
    path: Result<Path<(String, String)>, PathRejection>,
    query: Result<Query<DownloadQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, HttpError> {
    let span = command_span("download", &headers);
    let download = async {
        let identity = authorize(&api, &headers)?;
        let ready = api.shared.ready.get().ok_or_else(HttpError::not_ready)?;
        let uploads = api.shared.uploads()?;
        let (room, upload) = room_and_name(path)?;
        let query = query.map_err(|error| bad(error.body_text()))?;
        answers::namespace(&api.shared.config, &room)?;
        answers::admitted(&ready.people, &identity, Right::Read, &room).await?;
        let id = uploads.signer.check(&upload, &room).map_err(|flaw| {
            HttpError::with_status(StatusCode::NOT_FOUND, ErrorCode::BadId, flaw.to_string())
        })?;
        if api.shared.config.uploads.scan().is_some() {
            let wait = api.shared.config.history.ask_timeout;
            let admitted = uploads.checked.admit(&ready.history, wait, &id).await;
            admitted.map_err(|refused| match refused.code {
                ErrorCode::BadId => not_there(),
                _ => refused.into(),
            })?;
        }
        let (url, expires) = uploads.storage.get(&id);
        let private = [(header::CACHE_CONTROL, "private, no-store")];
        if query.redirect == Some(false) {
            return Ok((private, Json(DownloadReply { url, expires })).into_response());
        }
        let to = [(header::LOCATION, url)];
        Ok((StatusCode::FOUND, private, to).into_response())
    };
    download.instrument(span).await
}

fn permitted(
    local: &Local,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<PermitQuery>, QueryRejection>,
) -> Result<(UploadId, Permit), HttpError> {
    let Path(upload) = path.map_err(|error| bad(error.body_text()))?;
    let Query(PermitQuery { permit }) = query.map_err(|error| bad(error.body_text()))?;
    let id = UploadId::parse(&upload).map_err(|flaw| {
        HttpError::with_status(StatusCode::NOT_FOUND, ErrorCode::BadId, flaw.to_string())
    })?;
    let permit = local.permit(&id, &permit, unix_ms())?;
    Ok((id, permit))
}

impl From<LocalError> for HttpError {
    fn from(error: LocalError) -> Self {
        let code = match &error {
            LocalError::Forged | LocalError::Expired => ErrorCode::Forbidden,
            LocalError::Busy => ErrorCode::Conflict,
            LocalError::TooLarge(_) => ErrorCode::TooLarge,
            LocalError::TooSmall { .. } => ErrorCode::BadRequest,
            LocalError::Folder(cause) => {
                tracing::error!(%cause, "the folder of uploads failed");
                ErrorCode::Unavailable
            }
        };
        Self::new(code, error.to_string())
    }
}

/// Upload a file to the local storage, at a URL that was granted.
///
/// The body must have exactly the bytes that were announced. A file that is there already stays as it is.
#[utoipa::path(
    put,
    path = "/v1/uploads/{upload}",
    params(("upload" = String, Path, description = "The id of the upload"), PermitQuery),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses(
        (status = 200, description = "Stored"),
        (status = 400, body = ErrorBody, description = "bad_request: fewer bytes than announced"),
        (status = 403, body = ErrorBody, description = "forbidden: the URL is not signed, was changed, has expired, or is for downloads"),
        (status = 404, body = ErrorBody, description = "bad_id; bad_request where the storage is not local"),
        (status = 408, body = ErrorBody, description = "timeout: nothing arrived for http.body_timeout, or the edge is draining"),
        (status = 409, body = ErrorBody, description = "conflict: another request uploads the same file now"),
        (status = 413, body = ErrorBody, description = "too_large: more bytes than announced"),
        (status = 503, body = ErrorBody, description = "unavailable: the file can't be written"),
    ),
)]
pub(super) async fn receive(
    State(api): State<Api>,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<PermitQuery>, QueryRejection>,
    request: Request,
) -> Result<StatusCode, HttpError> {
    let local = api.shared.local()?;
    let (id, permit) = permitted(local, path, query)?;
    let Some(file) = permit.file else {
        let text = "the URL is for a download";
        return Err(HttpError::new(ErrorCode::Forbidden, text));
    };
    if local.has(&id).await.map_err(LocalError::from)? {
        return Ok(StatusCode::OK);
    }
    // Told before anything is sent, where the client waits for it.
    let length = request.headers().get(header::CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let wrong = length.and_then(|got| match (got, file.size) {
        (got, announced) if got > announced => Some(LocalError::TooLarge(announced)),
        (got, announced) if got < announced => Some(LocalError::TooSmall { got, announced }),
        _ => None,
    });
    let mut end = Counted(UploadEnd::Aborted);
    if let Some(wrong) = wrong {
        return Err(end.by(wrong));
    }
    let within = within(&api.shared, file.size);
    let receiving = local.receive(id, file).await;
    let receiving = receiving.map_err(|error| end.by(error))?;
    take(
        &api.shared,
        receiving,
        request.into_body(),
        within,
        &mut end,
    )
    .await?;
    end.0 = UploadEnd::Stored;
    Ok(StatusCode::OK)
}

/// Counts the end of an upload. A client that goes away drops it.
struct Counted(UploadEnd);

impl Drop for Counted {
    fn drop(&mut self) {
        count(Counter::UploadReceived(self.0), 1);
    }
}

impl Counted {
    /// The upload ends with this error.
    fn by(&mut self, error: LocalError) -> HttpError {
        self.0 = match &error {
            LocalError::TooLarge(_) | LocalError::TooSmall { .. } => UploadEnd::WrongSize,
            LocalError::Busy => UploadEnd::Busy,
            LocalError::Folder(_) | LocalError::Forged | LocalError::Expired => UploadEnd::Failed,
        };
        error.into()
    }
}

/// How long an upload of this size may take.
fn within(shared: &Shared, size: u64) -> Duration {
    shared.config.http.body_timeout + Duration::from_secs(size / SLOWEST)
}

/// Takes the body of an upload to the storage, piece by piece: a piece is read when the one before it was written.
async fn take(
    shared: &Shared,
    mut receiving: Receiving,
    body: Body,
    within: Duration,
    end: &mut Counted,
) -> Result<(), HttpError> {
    let stall = shared.config.http.body_timeout;
    let late = |text: String| HttpError::new(ErrorCode::Timeout, text);
    let received = async {
        let mut body = body.into_data_stream();
        loop {
            let next = timeout(stall, body.next()).await;
            match next.map_err(|_elapsed| late(format!("nothing arrived for {stall:?}")))? {
                Some(Ok(bytes)) => {
                    let written = receiving.write(&bytes).await;
                    written.map_err(|error| end.by(error))?;
                }
                Some(Err(error)) => {
                    return Err(bad(format!("the body of the request is broken: {error}")));
                }
                None => return receiving.finish().await.map_err(|error| end.by(error)),
            }
        }
    };
    let drained = async {
        shared.lifecycle.reached(Phase::Draining).await;
        sleep(LAST_STEP).await;
    };
    tokio::select! {
        received = received => received,
        () = sleep(within) => Err(late(format!("the file did not arrive within {within:?}"))),
        () = drained => Err(late("this edge is draining; upload to another one".to_owned())),
    }
}

/// Download a file from the local storage, at a URL that an edge has signed.
#[utoipa::path(
    get,
    path = "/v1/uploads/{upload}",
    params(
        ("upload" = String, Path, description = "The id of the upload"),
        PermitQuery,
        ("range" = Option<String>, Header, description = "One range of bytes"),
    ),
    responses(
        (status = 200, description = "The file, with the type and the name that its uploader gave it"),
        (status = 206, description = "A part of it"),
        (status = 403, body = ErrorBody, description = "forbidden: the URL is not signed, was changed, has expired, or is for an upload"),
        (status = 404, body = ErrorBody, description = "bad_id: there is no such file; bad_request where the storage is not local"),
        (status = 416, body = ErrorBody, description = "bad_request: the range is beyond the end"),
        (status = 503, body = ErrorBody, description = "unavailable: the file can't be read"),
    ),
)]
pub(super) async fn send(
    State(api): State<Api>,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<PermitQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, HttpError> {
    let local = api.shared.local()?;
    let (id, permit) = permitted(local, path, query)?;
    if permit.file.is_some() {
        let text = "the URL is for an upload";
        return Err(HttpError::new(ErrorCode::Forbidden, text));
    }
    let file = local.open_file(&id).await.map_err(LocalError::from)?;
    let sent = file.ok_or_else(not_there)?;
    let File { size, .. } = sent.file;
    let range = headers
        .get(header::RANGE)
        .and_then(|range| range.to_str().ok());
    let (status, first, bytes) = match range.map(|range| part_of(range, size)) {
        None | Some(Part::All) => (StatusCode::OK, 0, size),
        Some(Part::Some(first, bytes)) => (StatusCode::PARTIAL_CONTENT, first, bytes),
        Some(Part::None) => {
            return Err(HttpError::with_status(
                StatusCode::RANGE_NOT_SATISFIABLE,
                ErrorCode::BadRequest,
                format!("the file has {size} bytes"),
            ));
        }
    };
    let mut about = HeaderMap::new();
    for (name, value) in [
        (header::CONTENT_TYPE, &*sent.file.media_type),
        (header::CONTENT_DISPOSITION, &*sent.file.disposition()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; sandbox",
        ),
        (header::CACHE_CONTROL, "private, no-store"),
        (header::ACCEPT_RANGES, "bytes"),
    ] {
        let value = HeaderValue::from_str(value).map_err(|error| bad(error.to_string()))?;
        about.insert(name, value);
    }
    about.insert(header::CONTENT_LENGTH, bytes.into());
    if status == StatusCode::PARTIAL_CONTENT {
        let range = format!("bytes {first}-{}/{size}", first + bytes - 1);
        let range = HeaderValue::from_str(&range).map_err(|error| bad(error.to_string()))?;
        about.insert(header::CONTENT_RANGE, range);
    }
    let sent = sent.from(first, bytes).await.map_err(LocalError::from)?;
    let pieces = stream::try_unfold(sent, async |mut sent| {
        let next = sent.next().await?;
        Ok::<_, io::Error>(next.map(|piece| (piece, sent)))
    });
    Ok((status, about, Body::from_stream(pieces)).into_response())
}

/// What a request wants of a file.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    /// All: the header can't be used. Several ranges are answered with all, too.
    All,
    /// From an offset on, so many bytes.
    Some(u64, u64),
    /// Nothing of the file is in the range.
    None,
}

/// The part of a file that the header `Range` names. A file has at least one byte.
fn part_of(range: &str, size: u64) -> Part {
    let Some((first, last)) = range
        .strip_prefix("bytes=")
        .and_then(|it| it.split_once('-'))
    else {
        return Part::All;
    };
    match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if last < first => Part::All,
        (Ok(first), _) if first >= size => Part::None,
        (Ok(first), Ok(last)) => Part::Some(first, last.min(size - 1) - first + 1),
        (Ok(first), Err(_)) if last.is_empty() => Part::Some(first, size - first),
        (Err(_), Ok(0)) if first.is_empty() => Part::None,
        (Err(_), Ok(bytes)) if first.is_empty() => {
            let bytes = bytes.min(size);
            Part::Some(size - bytes, bytes)
        }
        _ => Part::All,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_range_is_a_part_and_others_are_all() {
        for (range, part) in [
            ("bytes=0-0", Part::Some(0, 1)),
            ("bytes=2-", Part::Some(2, 8)),
            ("bytes=2-99", Part::Some(2, 8)),
            ("bytes=-3", Part::Some(7, 3)),
            ("bytes=-99", Part::Some(0, 10)),
            ("bytes=-0", Part::None),
            ("bytes=10-", Part::None),
            ("bytes=3-2", Part::All),
            ("bytes=0-1,3-4", Part::All),
            ("bytes=-", Part::All),
            ("lines=1-2", Part::All),
        ] {
            assert_eq!(part_of(range, 10), part, "{range}");
        }
    }
}
