//! The statistics that the instances of a micro service report.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use crate::{bus::Connection, subject::api};

/// One instance of a micro service.
#[derive(Debug, Clone, Deserialize)]
pub struct Instance {
    /// Its id, as `nats micro ls` shows it.
    pub id: String,
    #[serde(default)]
    endpoints: Vec<EndpointStats>,
}

#[derive(Debug, Clone, Deserialize)]
struct EndpointStats {
    #[serde(default)]
    data: Value,
}

impl Instance {
    /// The figures it reports besides those that every service has. They are the same at each of its endpoints.
    #[must_use]
    pub fn figures(&self) -> Option<&Value> {
        self.endpoints.first().map(|endpoint| &endpoint.data)
    }
}

/// The instances of `service` that answer within `wait`.
pub async fn instances(connection: &Connection, service: &str, wait: Duration) -> Vec<Instance> {
    let client = connection.client();
    let until = Instant::now() + wait;
    let mut found = Vec::new();
    let gather = async {
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await.ok()?;
        let asked = client.publish_with_reply(api::service_stats(service), inbox, Bytes::new());
        asked.await.ok()?;
        // "No responders" also ends the loop.
        while let Some(answer) = answers.next().await
            && answer.status.is_none()
        {
            found.extend(serde_json::from_slice(&answer.payload).ok());
        }
        Some(())
    };
    // There is no last answer: instances that have not answered by then are left out.
    let ended = timeout_at(until, gather).await;
    tracing::debug!(?ended, "asked for the instances");
    found
}
