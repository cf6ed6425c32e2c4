//! Health and metrics of a service over HTTP.

use std::net::SocketAddr;

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use hyper::{Request, body::Incoming, service::service_fn};
use tokio::net::TcpListener;
use tower_service::Service as _;

use crate::{
    bus::Connection,
    http1,
    runtime::{Lifecycle, Tasks},
    telemetry,
};

#[derive(Debug, Clone)]
struct Health {
    lifecycle: Lifecycle,
    connection: Connection,
}

/// Serves until `tasks` stop.
pub fn serve(
    listener: TcpListener,
    limits: http1::Limits,
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
    let service = move |_peer: SocketAddr| {
        let router = router.clone();
        // A router is always ready.
        service_fn(move |request: Request<Incoming>| router.clone().call(request.map(Body::new)))
    };
    let serve = http1::serve(listener, limits, tasks.clone(), service);
    tasks.spawn_essential("http", serve);
}

/// Whether the service works: it is prepared, and NATS is connected.
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
