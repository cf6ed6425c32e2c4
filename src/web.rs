//! The small chat page of `web/`, embedded in the binary.

use axum::{
    Router,
    http::header,
    response::{Html, IntoResponse},
    routing::get,
};

const HTML: &str = include_str!("../web/index.html");
const PAGE: &str = include_str!("../web/page.js");
const CLIENT: &str = include_str!("../web/natter.js");
const LOG: &str = include_str!("../web/log.js");
const PAST: &str = include_str!("../web/past.js");

/// The page may load only its own files, and connect only to its own server.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'";

/// Adds `/`, and the scripts beside it.
pub(crate) fn routes<S: Clone + Send + Sync + 'static>(router: Router<S>) -> Router<S> {
    router
        .route("/", get(html))
        .route("/page.js", get(|| async { script(PAGE) }))
        .route("/natter.js", get(|| async { script(CLIENT) }))
        .route("/log.js", get(|| async { script(LOG) }))
        .route("/past.js", get(|| async { script(PAST) }))
}

async fn html() -> impl IntoResponse {
    ([(header::CONTENT_SECURITY_POLICY, POLICY)], Html(HTML))
}

fn script(text: &'static str) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/javascript; charset=utf-8")],
        text,
    )
}
