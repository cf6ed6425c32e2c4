//! The small chat page, embedded.

use axum::{
    Router,
    http::header,
    response::{Html, IntoResponse},
    routing::get,
};

const HTML: &str = include_str!("page/index.html");
const SCRIPT: &str = include_str!("page/natter.js");

/// Only what the page itself brings, and its own server's WebSocket.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'";

/// Adds `/` and `/natter.js`.
pub(super) fn routes<S: Clone + Send + Sync + 'static>(router: Router<S>) -> Router<S> {
    router
        .route("/", get(html))
        .route("/natter.js", get(script))
}

async fn html() -> impl IntoResponse {
    ([(header::CONTENT_SECURITY_POLICY, POLICY)], Html(HTML))
}

async fn script() -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/javascript; charset=utf-8")],
        SCRIPT,
    )
}
