//! Health and metrics of the service over HTTP.

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::net::TcpListener;

use crate::{
    bus::Connection,
    runtime::{Lifecycle, Tasks},
    telemetry,
};

#[derive(Debug, Clone)]
struct Health {
    lifecycle: Lifecycle,
    connection: Connection,
}

/// Serves until `tasks` stop.
pub(super) fn serve(
    listener: TcpListener,
    lifecycle: Lifecycle,
    connection: Connection,
    tasks: &Tasks,
) {
    let router = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(Health {
            lifecycle,
            connection,
        });
    let stop = tasks.clone();
    tasks.spawn("http", async move {
        let stopping = async move { stop.stopping().await };
        let served = axum::serve(listener, router).with_graceful_shutdown(stopping);
        if let Err(error) = served.await {
            tracing::error!(%error, "HTTP ended");
        }
    });
}

/// Whether messages are written: MongoDB was prepared, NATS is up.
async fn readyz(State(health): State<Health>) -> (StatusCode, String) {
    let why = match (health.lifecycle.is_ready(), health.connection.is_up()) {
        (true, true) => return (StatusCode::OK, "ready\n".to_owned()),
        (_, false) => "NATS is away",
        (false, true) => health.lifecycle.phase().as_str(),
    };
    (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n"))
}

async fn metrics() -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        telemetry::prometheus_text(),
    )
}
