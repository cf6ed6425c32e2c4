//! JetStream's API as JSON, in the domain of the connection or of any region of the mesh.

use async_nats::Client;
use serde_json::{Map, Value, json};

use super::{Denials, ProvisionError, REQUEST_DEADLINE};
use crate::{model::Region, subject::api};

/// `err_code` of "stream not found" (nats-server `errors.json`).
const STREAM_NOT_FOUND: u64 = 10059;

/// `err_code` of "consumer not found".
const CONSUMER_NOT_FOUND: u64 = 10014;

/// `err_code` of "no message found".
const NO_MESSAGE: u64 = 10037;

/// JetStream of one domain. Every request ends within [`REQUEST_DEADLINE`].
#[derive(Debug, Clone)]
pub(in crate::mesh) struct JetStream<'a> {
    client: &'a Client,
    /// `None`: the domain of the server of the connection.
    domain: Option<Region>,
    /// If set, a denied request fails at once and not at the deadline.
    denials: Option<Denials>,
}

impl<'a> JetStream<'a> {
    /// JetStream of the server of the connection.
    pub(in crate::mesh) fn here(client: &'a Client) -> Self {
        Self {
            client,
            domain: None,
            denials: None,
        }
    }

    /// JetStream of a region of the mesh.
    pub(in crate::mesh) fn of(client: &'a Client, region: &Region) -> Self {
        Self {
            client,
            domain: Some(region.clone()),
            denials: None,
        }
    }

    /// The same, with the denied subjects of the connection.
    pub(in crate::mesh) fn with_denials(mut self, denials: &Denials) -> Self {
        self.denials = Some(denials.clone());
        self
    }

    /// Whether JetStream answers.
    pub(in crate::mesh) async fn ping(&self) -> Result<(), ProvisionError> {
        self.account().await.map(drop)
    }

    /// Usage and limits of the account, and the domain.
    pub(in crate::mesh) async fn account(&self) -> Result<Value, ProvisionError> {
        self.request(api::INFO, &json!({})).await
    }

    pub(super) async fn stream_names(&self) -> Result<Vec<String>, ProvisionError> {
        let mut names = Vec::new();
        loop {
            let offset = json!({ "offset": names.len() });
            let page = self.request(api::STREAM_NAMES, &offset).await?;
            let before = names.len();
            if let Some(streams) = page.get("streams").and_then(Value::as_array) {
                names.extend(
                    streams
                        .iter()
                        .filter_map(|name| name.as_str().map(str::to_owned)),
                );
            }
            let total = page.get("total").and_then(Value::as_u64).unwrap_or(0);
            if names.len() == before || names.len() as u64 >= total {
                return Ok(names);
            }
        }
    }

    /// The stream's info; `None` if there is no such stream.
    pub(in crate::mesh) async fn stream_info(
        &self,
        name: &str,
    ) -> Result<Option<Value>, ProvisionError> {
        match self.request(&api::stream_info(name), &json!({})).await {
            Ok(info) => Ok(Some(info)),
            Err(ProvisionError::Refused {
                code: STREAM_NOT_FOUND,
                ..
            }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The stream's configuration; `None` if there is no such stream.
    pub(super) async fn stream_config(
        &self,
        name: &str,
    ) -> Result<Option<Map<String, Value>>, ProvisionError> {
        let info = self.stream_info(name).await?;
        let config = info.and_then(|mut info| info.get_mut("config").map(Value::take));
        Ok(match config {
            Some(Value::Object(config)) => Some(config),
            _ => None,
        })
    }

    /// A consumer's info; `None` if there is no such consumer.
    pub(in crate::mesh) async fn consumer_info(
        &self,
        stream: &str,
        consumer: &str,
    ) -> Result<Option<Value>, ProvisionError> {
        let request = api::consumer_info(stream, consumer);
        match self.request(&request, &json!({})).await {
            Ok(info) => Ok(Some(info)),
            Err(ProvisionError::Refused {
                code: CONSUMER_NOT_FOUND,
                ..
            }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the last message on a subject of a bucket is the value of a key, and not its removal.
    pub(in crate::mesh) async fn has_key(
        &self,
        stream: &str,
        subject: &str,
    ) -> Result<bool, ProvisionError> {
        let request = json!({ "last_by_subj": subject });
        match self.request(&api::message_get(stream), &request).await {
            Ok(answer) => Ok(answer.pointer("/message/data").is_some()),
            Err(ProvisionError::Refused {
                code: NO_MESSAGE, ..
            }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn create(
        &self,
        name: &str,
        config: Map<String, Value>,
    ) -> Result<(), ProvisionError> {
        let request = api::stream_create(name);
        self.request(&request, &Value::Object(config))
            .await
            .map(drop)
    }

    pub(super) async fn update(
        &self,
        name: &str,
        config: Map<String, Value>,
    ) -> Result<(), ProvisionError> {
        let request = api::stream_update(name);
        self.request(&request, &Value::Object(config))
            .await
            .map(drop)
    }

    /// Deletes a stream with all its messages.
    pub(super) async fn delete(&self, name: &str) -> Result<(), ProvisionError> {
        let request = api::stream_delete(name);
        self.request(&request, &json!({})).await.map(drop)
    }

    /// Makes one request; `subject` is without a domain.
    async fn request(&self, subject: &str, payload: &Value) -> Result<Value, ProvisionError> {
        let subject = match &self.domain {
            None => subject.to_owned(),
            Some(region) => api::in_domain(region, subject),
        };
        let request = || subject.clone();
        let answer = self
            .client
            .request(subject.clone(), payload.to_string().into());
        let denied = async {
            match self.denials.clone() {
                Some(mut denials) => {
                    // On an error the connection has ended, and nothing is denied any more.
                    if denials.wait_for(|d| d.contains(&subject)).await.is_err() {
                        std::future::pending().await
                    }
                }
                None => std::future::pending().await,
            }
        };
        let answer = tokio::time::timeout(REQUEST_DEADLINE, async {
            tokio::select! {
                answer = answer => Some(answer),
                () = denied => None,
            }
        })
        .await
        .map_err(|_elapsed| ProvisionError::Timeout { request: request() })?
        .ok_or_else(|| ProvisionError::Denied { request: request() })?
        .map_err(|source| ProvisionError::Request {
            request: request(),
            source,
        })?;
        let answer: Value =
            serde_json::from_slice(&answer.payload).map_err(|source| ProvisionError::Answer {
                request: request(),
                source,
            })?;
        match answer.get("error") {
            None => Ok(answer),
            Some(error) => Err(ProvisionError::Refused {
                request: request(),
                description: error
                    .get("description")
                    .and_then(Value::as_str)
                    .unwrap_or("no reason given")
                    .to_owned(),
                code: error.get("err_code").and_then(Value::as_u64).unwrap_or(0),
            }),
        }
    }
}
